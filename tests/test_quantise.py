import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from workbench.fixedpoint import QFormat
from workbench.packed import SIGNALS, signals_of
from workbench.quantise import MAX_WEIGHT_FRAC, calibrate, weight_format


def squared_error(w, fmt):
    return float(((fmt.dequantise(fmt.quantise(w.numpy())) - w.numpy()) ** 2).sum())


# --- formats of weights


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("scale", [1e-4, 0.3, 1, 40])
@pytest.mark.parametrize("sample", [torch.randn, torch.rand, lambda *a, **k: torch.randn(*a, **k) ** 3])
def test_weight_format_is_the_best_of_all_up_to_the_cap(bits, scale, sample):
    w = scale * sample(300, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    everything = [squared_error(w, QFormat(bits, frac)) for frac in range(-20, MAX_WEIGHT_FRAC + 1)]
    assert squared_error(w, weight_format(w, bits)) == min(everything)


@pytest.mark.parametrize(("values", "bits", "frac"), [
    ([0.25, -0.75], 4, 2),  # exact on the grid of quarters and on finer ones: the coarsest exact one is taken
    ([0.5, -1.0], 4, 3),  # -1 fits where 1 does not
    ([0.5, 1.0], 4, 2),
    ([3.0, -8.0], 4, 0),
    ([6.0, 40.0], 4, -3),
    ([1e-9], 8, MAX_WEIGHT_FRAC),
])  # fmt: skip
def test_weight_format_by_hand(values, bits, frac):
    w = torch.tensor(values, dtype=torch.float64)
    chosen = weight_format(w, bits)
    assert chosen.bits == bits and chosen.signed
    assert squared_error(w, chosen) == squared_error(w, QFormat(bits, frac))


def test_zeros_of_a_sparse_block_have_no_say():
    w = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sparse = torch.cat([w, torch.zeros(64, 8, dtype=torch.float64)])
    assert weight_format(sparse, 4) == weight_format(w, 4)
    assert weight_format(torch.zeros(3, 3), 8) == QFormat(8, 7)
    assert weight_format(torch.zeros(3, 3), 16) == QFormat(16, MAX_WEIGHT_FRAC)


def test_weight_format_refuses_a_width_that_no_format_has():
    with pytest.raises(ValueError, match="needs 2 to 32 bits when signed"):
        weight_format(torch.ones(3, 3), 33)


# --- calibration


def lstm_internals(lstm, x, state=None):
    """Pre-activations and cells of one unbatched sequence, step by step by nn.LSTMCell."""
    cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size).to(x.dtype)
    with torch.no_grad():
        for part in ("ih", "hh"):
            getattr(cell, f"weight_{part}").copy_(getattr(lstm, f"weight_{part}_l0"))
            getattr(cell, f"bias_{part}").copy_(getattr(lstm, f"bias_{part}_l0"))
        h, c = state or (torch.zeros(1, lstm.hidden_size, dtype=x.dtype),) * 2
        pres, cells = [], []
        for step in x:
            pres.append(step @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh)
            h, c = cell(step[None], (h, c))
            cells.append(c)
    return torch.cat([p.reshape(-1) for p in pres]).abs().max().item(), torch.cat(cells).abs().max().item()


def holding(largest, bits=16):
    """The finest format whose range reaches twice as far as `largest`."""
    return QFormat(bits, max(frac for frac in range(-20, 40) if 2.0 ** (bits - 1 - frac) >= 2 * largest))


@pytest.fixture
def lstm():
    torch.manual_seed(3)
    return nn.LSTM(3, 5).double()


@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_ranges_are_those_of_torchs_own_cell(lstm, scale):
    x = scale * torch.randn(12, 3, dtype=torch.float64)
    pre, cell = lstm_internals(lstm, x)
    signals = calibrate(lstm, [x[:, None]])["l0"]
    assert tuple(signals) == SIGNALS
    assert signals["input"] == holding(x.abs().max().item())
    assert signals["pre"] == holding(min(pre, 4))
    assert signals["cell"] == holding(cell)
    assert signals["sigmoid"] == QFormat(16, 16, signed=False)
    assert signals["tanh"] == signals["hidden"] == QFormat(16, 15)


def test_the_width_is_the_callers(lstm):
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    narrow, wide = (calibrate(lstm, [x], bits)["l0"] for bits in (8, 16))
    assert all(fmt.bits == 8 for fmt in narrow.values())
    assert {name: fmt.frac + 8 for name, fmt in narrow.items()} == {name: fmt.frac for name, fmt in wide.items()}


def test_the_largest_of_all_batches_counts(lstm):
    small, large = torch.full((2, 1, 3), 0.25).double(), torch.full((2, 1, 3), -5.0).double()
    assert calibrate(lstm, [small])["l0"]["input"] == QFormat(16, 16)
    for batches in ([small, large, small], iter([large])):
        assert calibrate(lstm, batches)["l0"]["input"] == QFormat(16, 11)


def test_every_way_to_call_an_lstm_gives_the_same_ranges(lstm):
    x = 3 * torch.randn(6, 3, 3, dtype=torch.float64)  # (T, B, input_size)
    state = tuple(20 * torch.randn(1, 3, 5, dtype=torch.float64) for _ in range(2))
    expected = calibrate(lstm, [(x, state)])
    assert expected != calibrate(lstm, [x])
    batch_first = nn.LSTM(3, 5, batch_first=True).double()
    batch_first.load_state_dict(lstm.state_dict())
    assert calibrate(batch_first, [(x.transpose(0, 1), state)]) == expected

    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x, state):
            return self.lstm(input=x, hx=state)

    assert calibrate(ByKeyword(), [(x, state)])["lstm.l0"] == expected["l0"]
    alone = tuple(s[:, 0] for s in state)
    for layer in (lstm, batch_first):
        assert calibrate(layer, [(x[:, 0], alone)]) == calibrate(lstm, [(x[:, :1], tuple(s[:, :1] for s in state))])


def test_packed_sequences_end_where_they_end(lstm):
    with torch.no_grad():
        for bias in (lstm.bias_ih_l0, lstm.bias_hh_l0):
            bias.fill_(3.0)  # the cell grows with every step, so a step too many would show
    x = torch.randn(30, 2, 3, dtype=torch.float64)
    x[3:, 1] = 0
    lengths = torch.tensor([2, 3])
    packed = pack_padded_sequence(x[:3], lengths, enforce_sorted=False)
    signals = calibrate(lstm, [packed])["l0"]  # a PackedSequence is one argument, though it is a tuple
    assert calibrate(lstm, [(packed,)])["l0"] == signals
    each = [lstm_internals(lstm, x[:n, b]) for b, n in enumerate(lengths)]
    assert signals["cell"] == holding(max(cell for _, cell in each))
    assert signals["cell"] != calibrate(lstm, [x])["l0"]["cell"]


def test_without_biases(lstm):
    plain = nn.LSTM(3, 5, bias=False).double()
    plain.load_state_dict({k: v for k, v in lstm.state_dict().items() if k.startswith("weight")})
    with torch.no_grad():
        for bias in (lstm.bias_ih_l0, lstm.bias_hh_l0):
            bias.zero_()
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    assert calibrate(plain, [x]) == calibrate(lstm, [x])


def test_the_model_is_left_as_it_was(lstm):
    frozen = nn.Dropout(0.5).eval()
    model = nn.Sequential(nn.Dropout(0.5), frozen, lstm)
    modes = [module.training for module in model.modules()]
    before = {name: w.clone() for name, w in model.state_dict().items()}
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    first, state = calibrate(model, [x]), torch.get_rng_state()
    assert calibrate(model, [x]) == first  # no dropout while calibrating
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not lstm._forward_pre_hooks
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    with pytest.raises(RuntimeError):
        calibrate(model, [torch.zeros(4, 2, 99, dtype=torch.float64)])
    assert [module.training for module in model.modules()] == modes
    assert not lstm._forward_pre_hooks


def test_calibrate_refuses(lstm):
    with pytest.raises(ValueError, match="calibrate needs at least one batch, got none"):
        calibrate(lstm, [])
    with pytest.raises(ValueError, match="got nn.GRU"):
        calibrate(nn.GRU(3, 5), [torch.zeros(2, 2, 3)])
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    x[1, 1, 1] = math.nan
    with pytest.raises(ValueError, match="finite"):
        calibrate(lstm, [x])


def test_layer_names():
    assert (layer_name(""), layer_name("encoder.lstm")) == ("l0", "encoder.lstm.l0")


def test_nothing_seen_in_calibration_saturates(lstm):
    x = torch.randn(20, 4, 3, dtype=torch.float64)
    fmt = calibrate(lstm, [x])["l0"]["input"]
    q = fmt.quantise(x.numpy())
    assert fmt.min < q.min() and q.max() < fmt.max
    assert np.abs(fmt.dequantise(q) - x.numpy()).max() <= 2.0 ** -(fmt.frac + 1)
