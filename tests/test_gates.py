import pytest
import torch
from torch import nn

from workbench.gates import Layer, blocks, check_supported, get_block, layers, parameters_of, rnns, weight
from workbench.packed import GATES


class Nested(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), rnn)


def test_names_shapes_and_rows_of_an_lstm():
    found = blocks(Nested(nn.LSTM(3, 5)))
    assert list(found) == [f"encoder.1.weight_{part}_l0.{gate}" for part in ("ih", "hh") for gate in "ifgo"]
    block = found["encoder.1.weight_hh_l0.g"]
    assert (block.rnn, block.parameter, block.part, block.gate, block.rows, block.shape) == (
        "encoder.1", "weight_hh_l0", "hh", "g", slice(10, 15), (5, 5))
    assert block.layer == Layer("encoder.1", 0, False) and block.layer.name == "encoder.1.l0"
    assert found["encoder.1.weight_ih_l0.o"].shape == (5, 3)


def test_a_model_that_is_an_rnn_has_names_without_a_prefix():
    assert list(rnns(nn.GRU(3, 5))) == [""]
    assert list(blocks(nn.GRU(3, 5))) == [f"weight_{part}_l0.{gate}" for part in ("ih", "hh") for gate in "rzn"]


def test_layers_stand_in_torchs_order():
    model = nn.ModuleDict({"encoder": nn.LSTM(3, 5, num_layers=2, bidirectional=True), "decoder": nn.GRU(3, 5)})
    found = layers(model)
    assert list(found) == ["encoder.l0", "encoder.l0_reverse", "encoder.l1", "encoder.l1_reverse", "decoder.l0"]
    assert found["encoder.l1_reverse"] == Layer("encoder", 1, True) and found["encoder.l1_reverse"].suffix == "l1_reverse"
    assert list(layers(nn.GRU(3, 5))) == ["l0"]
    # torch keeps the parameters of each layer and direction together, in this order.
    named = [name for name, _ in model["encoder"].named_parameters() if name.startswith("weight_ih")]
    assert named == [f"weight_ih_{layer.suffix}" for layer in found.values() if layer.rnn == "encoder"]


@pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")
@pytest.mark.parametrize("rnn", [
    nn.LSTM(3, 5, num_layers=2, bidirectional=True),
    nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=2),
    nn.GRU(3, 5, num_layers=2, bidirectional=True, bias=False),
])  # fmt: skip
def test_blocks_cover_every_weight_once_in_torchs_order(rnn):
    found = blocks(rnn)
    matrices = {name: w for name, w in rnn.named_parameters() if name.startswith("weight")}
    assert list(dict.fromkeys(block.parameter for block in found.values())) == list(matrices) == parameters_of(rnn)
    for parameter, w in matrices.items():
        of_matrix = [name for name, block in found.items() if block.parameter == parameter]
        assert torch.equal(torch.cat([weight(rnn, name) for name in of_matrix]), w)
    if rnn.proj_size:
        assert found["weight_hr_l1_reverse.p"].shape == (2, 5)


def test_each_gate_is_the_one_that_torch_uses():
    """A saturating bias would hide in any order of the gates; the outputs of a hand-written cell do not."""
    lstm = nn.LSTM(3, 4, bias=False)
    x, h, c = torch.randn(1, 1, 3), torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    pre = {gate: x[0] @ weight(lstm, f"weight_ih_l0.{gate}").T + h[0] @ weight(lstm, f"weight_hh_l0.{gate}").T
           for gate in GATES["LSTM"]}
    new_c = pre["f"].sigmoid() * c[0] + pre["i"].sigmoid() * pre["g"].tanh()
    output, (_, torch_c) = lstm(x, (h, c))
    torch.testing.assert_close(torch_c[0], new_c)
    torch.testing.assert_close(output[0], pre["o"].sigmoid() * new_c.tanh())

    gru = nn.GRU(3, 4, bias=False)
    a = {gate: x[0] @ weight(gru, f"weight_ih_l0.{gate}").T for gate in GATES["GRU"]}
    b = {gate: h[0] @ weight(gru, f"weight_hh_l0.{gate}").T for gate in GATES["GRU"]}
    z, n = (a["z"] + b["z"]).sigmoid(), (a["n"] + (a["r"] + b["r"]).sigmoid() * b["n"]).tanh()
    torch.testing.assert_close(gru(x, h)[0][0], (1 - z) * n + z * h[0])


def test_weight_is_detached():
    assert not weight(nn.LSTM(3, 4), "weight_hh_l0.f").requires_grad


def test_unknown_block_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"LSTM has the blocks weight_ih_l0\.i, .*, none named 'weight_hh_l0\.z'"):
        get_block(nn.LSTM(3, 4), "weight_hh_l0.z")


@pytest.mark.parametrize(("rnn", "message"), [
    (nn.RNN(3, 4), "compresses nn.LSTM and nn.GRU, and found neither in Nested"),
    (nn.Linear(3, 4), "found neither in Nested"),
    (nn.Sequential(nn.LSTM(3, 4), nn.RNN(3, 4)), "'encoder.1.1' is an nn.RNN: the workbench takes nn.LSTM and nn.GRU"),
    (nn.Sequential(nn.LSTM(3, 4), nn.GRUCell(3, 4)), "'encoder.1.1' is an nn.GRUCell: the workbench takes"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(rnn, message):
    with pytest.raises(ValueError, match=message):
        check_supported(Nested(rnn))


@pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")
@pytest.mark.parametrize("rnn", [
    nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, bias=False, proj_size=2),
    nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True, bias=False),
])  # fmt: skip
def test_what_is_supported_passes(rnn):
    check_supported(Nested(rnn))
