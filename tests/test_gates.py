import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from workbench.gates import Layer, blocks, get_block, layers, parameters_of, rnns, weight
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
    (nn.RNN(3, 4), "'encoder.1' is an nn.RNN: the workbench takes nn.LSTM and nn.GRU"),
    (nn.Linear(3, 4), "compresses nn.LSTM and nn.GRU, and found neither in Nested"),
    (nn.Sequential(nn.LSTM(3, 4), nn.RNN(3, 4)), "'encoder.1.1' is an nn.RNN: the workbench takes nn.LSTM and nn.GRU"),
    (nn.Sequential(nn.LSTM(3, 4), nn.GRUCell(3, 4)), "'encoder.1.1' is an nn.GRUCell: the workbench takes"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(rnn, message):
    with pytest.raises(ValueError, match=message):
        rnns(Nested(rnn))


@pytest.mark.parametrize("given", [{}, nn.LSTM, nn.LSTM(3, 4).state_dict()])
def test_what_is_no_module_is_refused(given):
    with pytest.raises(ValueError, match="takes a model that is a torch.nn.Module, got a (dict|type|OrderedDict)"):
        rnns(given)


class Doubled(nn.LSTM):
    def forward(self, input, hx=None):
        output, hx = super().forward(input, hx)
        return 2 * output, hx


class Renamed(nn.LSTM):
    """A subclass that is what its parent is."""

    def __init__(self, hidden_size, input_size=3):
        super().__init__(input_size, hidden_size)


class Learned(nn.LSTM):
    """A subclass with states that it learns and hands out."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.first = nn.Parameter(torch.zeros(4))

    def initial(self):
        return self.first


def with_parameter():
    rnn = nn.GRU(3, 4)
    rnn.first = nn.Parameter(torch.zeros(4))
    return rnn


def with_module():
    rnn = nn.GRU(3, 4)
    rnn.norm = nn.LayerNorm(4)
    return rnn


def compiled():
    rnn = nn.LSTM(3, 4)
    rnn.compile(backend="eager")  # nothing is compiled before the first call
    return rnn


def own_forward():
    rnn = nn.GRU(3, 4)
    rnn.forward = lambda input: input
    return rnn


def changed(change, *args):
    rnn = nn.LSTM(3, 4)
    change(rnn, "weight_hh_l0", *args)
    return rnn


def tied(first, second):
    second.weight_hh_l0 = first.weight_hh_l0
    return nn.Sequential(first, second)


def tied_to_a_head():
    rnn, head = nn.LSTM(3, 4), nn.Linear(4, 16, bias=False)
    head.weight = rnn.weight_hh_l0
    return nn.Sequential(head, rnn)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
@pytest.mark.parametrize(("make", "message"), [
    (lambda: Doubled(3, 4), r"'encoder\.1\.1' is a Doubled with forward of its own, .* what nn\.LSTM is"),
    (own_forward, r"'encoder\.1\.1' is a GRU with forward of its own, .* what nn\.GRU is"),
    (lambda: Learned(3, 4), r"'encoder\.1\.1' is a Learned with initial, first of its own, which integers would not have"),
    (with_parameter, r"'encoder\.1\.1' is a GRU with first of its own, which integers would not have"),
    (with_module, r"'encoder\.1\.1' is a GRU with norm of its own, which integers would not have"),
    (compiled, r"'encoder\.1\.1' is compiled, which a copy would not be, or it would go on calling the original"),
    (lambda: torch.compile(nn.LSTM(3, 4), backend="eager"), r"'encoder\.1\.1\._orig_mod' is compiled, which a copy"),
    (lambda: torch.ao.nn.quantizable.LSTM(3, 4), r"'encoder\.1\.1' is the LSTM of torch\.ao\.nn\.quantizable"),
    (lambda: torch.ao.nn.quantized.dynamic.GRU(3, 4), r"'encoder\.1\.1' is the GRU of torch\.ao\.nn\.quantized\.dyn"),
    (lambda: torch.ao.nn.quantized.dynamic.LSTMCell(3, 4), r"'encoder\.1\.1' is the LSTMCell of torch\.ao\.nn\."),
    (lambda: torch.jit.script(nn.LSTM(3, 4)), r"'encoder\.1\.1' is the LSTM of torch\.jit.*: the workbench takes"),
    (lambda: changed(nn.utils.prune.random_unstructured, 0.5), r"weight_hh_l0 of 'encoder\.1\.1' is no plain parameter"),
    (lambda: changed(nn.utils.weight_norm), r"weight_hh_l0 of 'encoder\.1\.1' is no plain parameter"),
    (lambda: changed(nn.utils.parametrizations.weight_norm), r"weight_hh_l0 of 'encoder\.1\.1' has the parametrization _"),
    (lambda: tied(nn.LSTM(3, 4), nn.LSTM(5, 4)), r"1\.1\.1\.weight_hh_l0 and encoder\.1\.1\.0\.weight_hh_l0 are one tied"),
    (tied_to_a_head, r"encoder\.1\.1\.1\.weight_hh_l0 and encoder\.1\.1\.0\.weight are one tied parameter"),
])  # fmt: skip
def test_what_would_go_wrong_in_silence_is_refused_by_name_beside_a_layer_that_is_taken(make, message):
    with pytest.raises(ValueError, match=message):
        blocks(Nested(nn.Sequential(nn.LSTM(3, 4), make())))


def test_a_module_under_two_names_and_a_subclass_that_computes_the_same_are_taken():
    rnn = Renamed(4)
    assert list(rnns(nn.ModuleDict({"a": rnn, "b": rnn, "c": nn.Linear(4, 4)}))) == ["a"]


@pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")
@pytest.mark.parametrize("rnn", [
    nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, bias=False, proj_size=2),
    nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True, bias=False),
])  # fmt: skip
def test_what_is_supported_passes(rnn):
    assert list(rnns(Nested(rnn))) == ["encoder.1"]
