import functools
import itertools
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from workbench import quantise
from workbench.constrain import attach, compress, pack
from workbench.fixedpoint import QFormat
from workbench.methods import Dense, TopK
from workbench.packed import signals_of
from workbench.plan import uniform
from workbench.quantise import (
    CLIPPINGS,
    MAX_WEIGHT_FRAC,
    calibrate,
    float_signals,
    format_of,
    observe,
    time_first,
    weight_format,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")

KINDS = {"LSTM": (nn.LSTM, {}), "GRU": (nn.GRU, {}), "projected": (nn.LSTM, {"proj_size": 2})}


def rnn_of(kind, *, input_size=3, seed=3, scale=1.0, **options):
    """A recurrent module of 4 units in float64, weights and biases multiplied by `scale`."""
    torch.manual_seed(seed)
    cls, more = KINDS[kind]
    rnn = cls(input_size, 4, **more, **options).double()
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.mul_(scale)
    return rnn


def states_of(rnn, batch):
    """Random initial states as the module takes them."""
    places = rnn.num_layers * (1 + rnn.bidirectional)
    h = torch.randn(places, batch, rnn.proj_size or rnn.hidden_size, dtype=torch.float64)
    return (h, torch.randn(places, batch, rnn.hidden_size, dtype=torch.float64)) if isinstance(rnn, nn.LSTM) else h


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


def test_the_fractions_of_factors_add_up():
    """A weight that is the product of two stored values has their fraction bits together, which the bias must hold."""
    assert weight_format(torch.tensor([1e-9]), 8, factors=2) == QFormat(8, MAX_WEIGHT_FRAC // 2)
    assert weight_format(torch.zeros(3, 3), 16, factors=2) == QFormat(16, MAX_WEIGHT_FRAC // 2)
    assert weight_format(torch.tensor([3.0]), 8, factors=2) == weight_format(torch.tensor([3.0]), 8) == QFormat(8, 5)


def test_weight_format_refuses_a_width_that_no_format_has():
    with pytest.raises(ValueError, match="needs 2 to 32 bits when signed"):
        weight_format(torch.ones(3, 3), 33)


# --- signals in float


@pytest.mark.parametrize(("form", "given"), [
    ("time first", False), ("batch first", True), ("unbatched", False), ("unbatched", True), ("packed", False),
    ("packed", True), ("packed in order", True)])  # fmt: skip
@pytest.mark.parametrize(("num_layers", "bidirectional", "bias"), [
    (1, False, True), (1, True, False), (2, False, False), (2, True, True)])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_float_signals_are_torchs_outputs_and_states(kind, num_layers, bidirectional, bias, form, given):
    rnn = rnn_of(kind, num_layers=num_layers, bidirectional=bidirectional, bias=bias, batch_first=form == "batch first")
    lengths = torch.tensor({"packed": [2, 5, 1], "packed in order": [5, 3, 3], "unbatched": [5]}.get(form, [5, 5, 5]))
    padded, state = torch.randn(5, len(lengths), 3, dtype=torch.float64), states_of(rnn, len(lengths)) if given else None
    x = {"batch first": padded.transpose(0, 1), "unbatched": padded[:, 0]}.get(form, padded)
    if form.startswith("packed"):
        x = pack_padded_sequence(padded, lengths, enforce_sorted=form == "packed in order")
    single = state
    if form == "unbatched" and given:
        single = tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0]
    output, last = rnn(x, single)
    if form.startswith("packed"):
        output, _ = pad_packed_sequence(output)
    output = {"batch first": output.transpose(0, 1), "unbatched": output[:, None]}.get(form, output)
    finals = dict(zip(("hidden", "cell"), last if isinstance(last, tuple) else (last,), strict=False))
    found = list(float_signals(rnn, *time_first(rnn, x, single), path="net"))
    prefix = [f"net.l{n}" for n in range(num_layers)]
    assert [layer.name for layer, *_ in found] == [p + s for p in prefix for s in ["", "_reverse"][: 1 + bidirectional]]
    for place, (layer, signals, alive, first) in enumerate(found):
        assert {format_of(name) for name in signals} == set(signals_of("GRU" if kind == "GRU" else "LSTM", kind == "projected"))
        assert torch.equal(alive, torch.arange(5)[:, None] < lengths)
        assert set(first) == (set(finals) if given else set())
        for name, final in finals.items():
            ends = torch.stack([signals[name][n - 1, b] for b, n in enumerate(lengths)])  # in the direction's own order
            torch.testing.assert_close(ends, final[place] if final.ndim == 3 else final[place][None])
        if layer.index == num_layers - 1:
            for b, n in enumerate(lengths):
                mine = output[:n, b].chunk(1 + bidirectional, -1)[layer.reverse]
                torch.testing.assert_close(signals["hidden"][:n, b], mine.flip(0) if layer.reverse else mine)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_signals_within_a_step_follow_from_torchs_own_states(kind, bias):
    """Every signal from its definition, with h before each step as torch gives it."""
    rnn = rnn_of(kind, bias=bias)
    x, state = torch.randn(6, 2, 3, dtype=torch.float64), states_of(rnn, 2)
    (_, signals, _, _), = float_signals(rnn, x, state)
    with torch.no_grad():
        output, _ = rnn(x, state)
        h = torch.cat([state[0] if isinstance(state, tuple) else state, output[:-1]])
        b_ih, b_hh = (rnn.bias_ih_l0, rnn.bias_hh_l0) if bias else torch.zeros(2, len(rnn.weight_ih_l0), dtype=torch.float64)
        from_input, from_hidden = x @ rnn.weight_ih_l0.T + b_ih, h @ rnn.weight_hh_l0.T + b_hh
        if kind == "GRU":
            a, s = from_input.chunk(3, -1), from_hidden.chunk(3, -1)
            r, z = (a[0] + s[0]).sigmoid(), (a[1] + s[1]).sigmoid()
            pre_n = a[2] + r * s[2]
            expected = {"pre": torch.cat([a[0] + s[0], a[1] + s[1], pre_n], -1), "r": r, "z": z, "hidden_product": s[2],
                        "n": pre_n.tanh(), "hidden": output}
        else:
            pre = from_input + from_hidden
            i, f, g, o = (p.tanh() if n == 2 else p.sigmoid() for n, p in enumerate(pre.chunk(4, -1)))
            c = [state[1][0]]
            for t in range(6):
                c.append(f[t] * c[-1] + i[t] * g[t])
            c = torch.stack(c[1:])
            expected = {"pre": pre, "i": i, "f": f, "g": g, "o": o, "cell": c, "tanh c": c.tanh(), "hidden": output}
            if kind == "projected":
                expected["unprojected"] = o * c.tanh()
                torch.testing.assert_close(expected["unprojected"] @ rnn.weight_hr_l0.T, output)
    assert set(signals) == {"input", *expected} and torch.equal(signals["input"], x)
    for name, values in expected.items():
        torch.testing.assert_close(signals[name], values)


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


def holding(largest, bits=16, finest=40):
    """The finest format, of at most `finest` fraction bits, whose range reaches twice as far as `largest`."""
    return QFormat(bits, max(frac for frac in range(-20, finest + 1) if 2.0 ** (bits - 1 - frac) >= 2 * largest))


@pytest.fixture
def lstm():
    torch.manual_seed(3)
    return nn.LSTM(3, 5).double()


@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_ranges_are_those_of_torchs_own_cell(lstm, scale):
    x = scale * torch.randn(12, 3, dtype=torch.float64)
    pre, cell = lstm_internals(lstm, x)
    signals = calibrate(lstm, [x[:, None]])["l0"]
    assert tuple(signals) == signals_of("LSTM")
    assert signals["input"] == holding(x.abs().max().item(), finest=15)
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
    assert calibrate(lstm, [small])["l0"]["input"] == QFormat(16, 15)  # 16 bits would do, but for the bias
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


def test_steps_that_a_sequence_does_not_have_have_no_say(lstm):
    with torch.no_grad():
        for bias in (lstm.bias_ih_l0, lstm.bias_hh_l0):
            bias.fill_(3.0)  # the cell grows by almost 1 with every step
    x, c = torch.zeros(4, 2, 3, dtype=torch.float64), torch.zeros(1, 2, 5, dtype=torch.float64)
    c[:, 0] = 6.5  # 7.5 after its only step, and beyond 8 after one more
    packed = pack_padded_sequence(x, torch.tensor([1, 4]), enforce_sorted=False)
    assert calibrate(lstm, [(packed, (torch.zeros_like(c), c))])["l0"]["cell"] == QFormat(16, 11)
    assert calibrate(lstm, [(x, (torch.zeros_like(c), c))])["l0"]["cell"] == QFormat(16, 10)


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
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    with pytest.raises(RuntimeError):
        calibrate(model, [torch.zeros(4, 2, 99, dtype=torch.float64)])
    with pytest.raises(ValueError, match="finite"):
        calibrate(model, [x, x / 0])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("scale", "bits"), [(4, 16), (1, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_shares_hidden_formats_and_holds_what_torch_computes(kind, scale, bits):
    """The ranges of a layer are those of a module that is this layer alone, run by torch on the outputs of the one below."""
    rnn, x = rnn_of(kind, scale=scale, num_layers=2, bidirectional=True), 3 * torch.randn(9, 5, 3, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([9, 2, 5, 9, 1]), enforce_sorted=False)
    formats = calibrate(rnn, [packed], bits)
    assert list(formats) == ["l0", "l0_reverse", "l1", "l1_reverse"]
    for signals in formats.values():
        assert tuple(signals) == signals_of("GRU" if kind == "GRU" else "LSTM", kind == "projected")
    for index in (0, 1):
        below, above = (formats[f"l{index}{suffix}"] for suffix in ("", "_reverse"))
        assert below["hidden"] == above["hidden"] and below["input"] == above["input"]
        assert index == 0 or below["input"] == formats["l0"]["hidden"]
    first = rnn_of(kind, bidirectional=True)
    first.load_state_dict({name: w for name, w in rnn.state_dict().items() if "_l0" in name})
    outputs = [first(packed)[0].data.abs().max().item(), rnn(packed)[0].data.abs().max().item()]
    for index, largest in enumerate(outputs):
        hidden = formats[f"l{index}"]["hidden"]
        assert hidden == (holding(largest, bits) if kind == "projected" else QFormat(bits, bits - 1))
    if kind == "projected":
        # Its h is bounded by no 1, o * tanh(c) is.
        assert min(outputs) > 1 if scale > 1 else max(outputs) < 1
        assert formats["l1"]["unprojected"] == QFormat(bits, bits - 1)
    assert formats["l0"]["input"] == formats["l0_reverse"]["input"] == holding(packed.data.abs().max().item(), bits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_state_beyond_one_is_held(kind):
    rnn, x = rnn_of(kind), torch.randn(2, 1, 3, dtype=torch.float64)
    state = states_of(rnn, 1)
    h = state[0] if isinstance(state, tuple) else state
    h.fill_(20.0)
    assert calibrate(rnn, [(x, state)])["l0"]["hidden"] == QFormat(16, 9)
    assert calibrate(rnn, [x])["l0"]["hidden"].frac >= 14


def test_the_formats_of_a_gru():
    gru, x = rnn_of("GRU", scale=6), 2 * torch.randn(8, 3, 3, dtype=torch.float64)
    (_, signals, _, _), = float_signals(gru, x)
    assert calibrate(gru, [x])["l0"] == {
        "input": holding(x.abs().max().item()), "pre": QFormat(16, 12),
        "hidden_product": holding(signals["hidden_product"].abs().max().item()),
        "sigmoid": QFormat(16, 16, signed=False), "hidden": QFormat(16, 15)}


@pytest.mark.parametrize("clip", CLIPPINGS)
@pytest.mark.parametrize(("scale", "size", "bias"), [
    (1e-3, 1e-4, True), (1e-3, 1e-4, False), (1e-9, 1e-9, False), (1e-40, 1e-40, False), (1, 0, False)])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_ranges_still_pack(kind, scale, size, bias, clip):
    """Biases at 29 fraction bits reach 4, whatever the signals; sums stay within 48 bits."""
    rnn, x = rnn_of(kind, scale=scale, bias=bias), size * torch.randn(6, 2, 3, dtype=torch.float64)
    if bias:
        with torch.no_grad():
            rnn.bias_ih_l0.fill_(1.9)
            rnn.bias_hh_l0.fill_(2.0)
    for bits in (8, 16):
        packed = pack(rnn, uniform(rnn, Dense(), 16, calibrate(rnn, [x], bits, clip)))
        assert max(packed.layers["l0"].bias_fracs.values()) <= 29
        torch.testing.assert_close(attach(rnn, packed)(x)[0], rnn(x)[0], rtol=0, atol=2.0 ** (3 - bits))


@pytest.mark.parametrize("bits", [10, 12, 17])
def test_a_hidden_product_is_no_finer_than_the_bias_allows(bits):
    """r * s has the fraction bits of both; beside them lies b_in, in 32 bits."""
    gru, x = rnn_of("GRU", scale=1e-3), torch.randn(4, 2, 3, dtype=torch.float64)
    signals = calibrate(gru, [x], bits)["l0"]
    assert signals["hidden_product"] == QFormat(bits, 29 - bits) and signals["sigmoid"].frac == bits


def test_bits_of_each_signal():
    gru, x = rnn_of("GRU"), torch.randn(4, 2, 3, dtype=torch.float64)
    bits = {"input": 9, "pre": 10, "hidden_product": 11, "sigmoid": 12, "hidden": 13}
    assert {name: fmt.bits for name, fmt in calibrate(gru, [x], bits | {"cell": 7})["l0"].items()} == bits
    with pytest.raises(ValueError, match="calibrate needs bits for every signal of l0, got none for hidden_product, hidden"):
        calibrate(gru, [x], {"input": 9, "pre": 10, "sigmoid": 12})
    stacked = rnn_of("projected", num_layers=2, bidirectional=True)
    bits = dict(zip(signals_of("LSTM", True), range(10, 17), strict=True))
    for name, signals in calibrate(stacked, [x], bits).items():  # between layers h is the input, as it is
        assert {s: fmt.bits for s, fmt in signals.items()} == bits | ({"input": bits["hidden"]} if "l1" in name else {})


def test_one_observation_serves_every_width_and_rule():
    rnn, x = rnn_of("GRU", num_layers=2), torch.randn(6, 3, 3, dtype=torch.float64)
    seen = observe(rnn, [x])
    for clip, bits in itertools.product([*CLIPPINGS, *CLIPPINGS], (16, 6)):
        assert seen.formats(bits, clip) == calibrate(rnn, [x], bits, clip)


# --- clipping rules


def input_format(values, bits, clip):
    """What calibrate chooses for inputs of these values; the recurrent layer is of no matter."""
    return calibrate(rnn_of("GRU", input_size=1), [values.reshape(10, -1, 1)], bits, clip)["l0"]["input"]


def with_outlier(outlier, count=10_000):
    values = torch.linspace(1, 1.7, count, dtype=torch.float64)
    values[0] = outlier
    return values


# Width 4: the range is 2**3 = 8 steps. The outlier alone asks for steps of 16, with one bit of headroom of 32. Without it steps
# of 1/4 hold everything. Clipping it at 7 costs 93**2 = 8649, at 1.75 9653; steps of 1 cost the others about 0.07 each, 700,
# steps of 16 their whole squares, 1.9 each. Width 8: clipping it at 63.5 costs 1332, steps of 1 cost 700.
@pytest.mark.parametrize(("clip", "outlier", "bits", "frac"), [
    ("max", 1.7, 4, 1), ("max", 100, 4, -5), ("max", -100, 4, -5), ("max", 100, 8, -1),
    ("percentile", 1.7, 4, 2), ("percentile", 100, 4, 2), ("percentile", -100, 8, 6),
    ("mse", 1.7, 4, 2), ("mse", 100, 4, 0), ("mse", -100, 4, 0), ("mse", 100, 8, 0)])  # fmt: skip
def test_clipping_by_hand(clip, outlier, bits, frac):
    assert input_format(with_outlier(outlier), bits, clip) == QFormat(bits, frac)


@pytest.mark.parametrize(("large", "frac"), [(9, 3), (10, 3), (11, 1)])
def test_percentile_by_hand(large, frac):
    """Of 10,000 magnitudes 9,990 are to be held: ten values of 3 may be clipped, of eleven one may not."""
    values = torch.linspace(0.51, 0.99, 10_000, dtype=torch.float64)
    values[:large] = -3.0
    assert input_format(values, 4, "percentile") == QFormat(4, frac)
    padded = torch.cat([values, torch.zeros(20_000, dtype=torch.float64)])
    assert input_format(padded, 4, "percentile") == QFormat(4, frac)  # zeros have no say


@pytest.mark.parametrize("most", [1, 333, 500, 1000, 2000, 1 << 20])
def test_a_sample_of_a_large_signal_leaves_no_unit_out(monkeypatch, most):
    """Of four units one is ten times larger; most steps are zero."""
    monkeypatch.setattr(quantise, "MOST_BINNED", most)
    x = torch.zeros(10, 1000, 4, dtype=torch.float64)
    x[:, ::10] = torch.tensor([0.75, 7.5, 0.75, -0.75])
    seen = observe(rnn_of("GRU", input_size=4), [x])
    assert seen.formats(8, "max")["l0"]["input"] == QFormat(8, 3)
    formats = seen.formats(8, "percentile")
    assert formats["l0"]["input"] == (QFormat(8, 4) if most > 1 else QFormat(8, 7))
    formats["l0"]["input"] = QFormat(8, 6)
    row = seen.explain(formats)[0]
    assert most == 1 or row["beyond the range %"] == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize("bits", [3, 4, 6, 8, 12])
@pytest.mark.parametrize("sample", ["normal", "laplace", "uniform", "cubed", "ones and tens"])
def test_mse_has_the_least_squared_error(sample, bits):
    rng = np.random.default_rng(bits)
    values = 3 * {"normal": rng.normal(size=20_000), "laplace": rng.laplace(size=20_000), "uniform": rng.uniform(-1, 1, 20_000),
                  "cubed": rng.normal(size=20_000) ** 3,
                  "ones and tens": rng.normal(size=20_000) * rng.choice([1, 10], 20_000, p=[0.99, 0.01])}[sample]
    values = torch.from_numpy(values)
    chosen = input_format(values, bits, "mse")
    errors = {frac: squared_error(values, QFormat(bits, frac)) for frac in range(chosen.frac - 4, chosen.frac + 5)}
    assert errors[chosen.frac] <= 1.005 * min(errors.values())  # the histogram has bins of a sixteenth of an octave


@pytest.mark.parametrize("kind", KINDS)
def test_mse_of_the_signals_inside(kind):
    rnn, x = rnn_of(kind, num_layers=2, bidirectional=True), 2 * torch.randn(40, 60, 3, dtype=torch.float64)
    formats, values = calibrate(rnn, [x], 5, "mse"), {}
    for layer, signals, _, _ in float_signals(rnn, x):
        for name, found in signals.items():
            values.setdefault((layer.name, format_of(name)), []).append(found.flatten())
    for (layer, name), parts in values.items():
        if name == "hidden" or (name == "input" and layer.startswith("l1")):
            continue  # shared with the other direction and the next layer
        fmt, mine = formats[layer][name], torch.cat(parts)
        fracs = [frac for frac in range(fmt.frac - 3, fmt.frac + 4) if name != "sigmoid" or frac <= 5]
        errors = {frac: squared_error(mine, QFormat(5, frac, fmt.signed)) for frac in fracs}
        assert errors[fmt.frac] <= 1.005 * min(errors.values()), (layer, name)


def test_explain_by_hand():
    """-2 lies within QFormat(4, 2), 2 does not; zeros count among the values."""
    values = torch.zeros(10, 1000, 1, dtype=torch.float64)
    values.view(-1)[:5000] = 0.5
    values.view(-1)[:20] = torch.tensor([100.0] + [-2.0] * 9 + [2.0] * 10)
    seen = observe(rnn_of("GRU", input_size=1, bidirectional=True), [values])
    formats = seen.formats(4)
    formats["l0_reverse"]["input"] = QFormat(4, 2)
    rows = seen.explain(formats)
    assert [(row["layer"], row["signal"]) for row in rows] == [
        (layer, signal) for layer in ("l0", "l0_reverse") for signal in signals_of("GRU")]  # fmt: skip
    first, second = (row for row in rows if row["signal"] == "input")
    assert second == {"layer": "l0_reverse", "signal": "input", "bits": 4, "fraction bits": 2, "signed": True, "smallest": -2.0,
                      "largest": 1.75, "largest seen": 100.0, "beyond the range %": pytest.approx(0.11)}
    assert (first["fraction bits"], first["largest"], first["beyond the range %"]) == (-5, 224.0, 0.0)
    assert not next(row for row in rows if row["signal"] == "sigmoid")["signed"]


# --- what cannot be calibrated


@pytest.mark.parametrize(("bits", "error", "message"), [
    (4.0, TypeError, "a whole number for bits, got 4.0"), (1, ValueError, "2 to 32 bits when signed .*, got 1"),
])
def test_weights_need_a_width_that_a_format_has(bits, error, message):
    with pytest.raises(error, match=message):
        weight_format(torch.ones(2, 3), bits)


class Aside(nn.Module):
    """Its second layer is called past the module, and where it trains."""

    def __init__(self):
        super().__init__()
        self.rnn, self.aside = nn.GRU(3, 5), nn.GRU(3, 5)

    def forward(self, x):
        return self.rnn(x)[0] + (self.aside(x)[0] if self.training else self.aside.forward(x)[0])


def test_a_layer_that_no_batch_calls_has_no_formats():
    with pytest.raises(ValueError, match=r"calls every recurrent module .*, got no call of 'aside'"):
        calibrate(Aside(), [torch.ones(4, 2, 3)])
    assert sorted(calibrate(Aside().rnn, [torch.zeros(4, 2, 3)])) == ["l0"]  # called, if with zeros alone


def test_states_in_a_list_are_states(lstm):
    x, states = torch.randn(4, 2, 3).double(), [torch.full((1, 2, 5), value).double() for value in (0.5, 3.0)]
    assert calibrate(lstm, [(x, states)]) == calibrate(lstm, [(x, tuple(states))]) != calibrate(lstm, [x])


def test_a_model_that_has_autocast_within_is_calibrated():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.rnn = nn.Linear(3, 3), nn.GRU(3, 5)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.rnn(self.front(x))

    torch.manual_seed(0)
    model, x = Cast(), torch.randn(6, 2, 3)
    assert calibrate(model, [x])["rnn.l0"]["pre"] == calibrate(model.rnn, [model.front(x)])["l0"]["pre"]


class Taking(nn.Module):
    def forward(self, results):
        return results[0] + 1


@pytest.mark.parametrize("keep", [
    lambda rnn: [rnn], lambda rnn: {"a": (0, [nn.Sequential(rnn)])}, lambda rnn: lambda x: rnn(x), lambda rnn: rnn.__call__,
    lambda rnn: functools.partial(rnn, hx=None),
])  # fmt: skip
@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN, nn.LSTMCell])
def test_a_recurrent_layer_that_is_called_and_no_module_of_the_model_is_refused(kind, keep):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.kept, self.uncalled = nn.LSTM(4, 8), keep(kind(8, 8)), [nn.LSTM(8, 8)]

        def forward(self, x):
            found = self.kept
            while isinstance(found, dict | list | tuple | nn.ModuleList):
                found = found["a"] if isinstance(found, dict) else found[-1]
            return found(self.a(x)[0][-1])

    model, x = Keeping(), torch.zeros(5, 2, 4)
    with pytest.raises(ValueError, match=rf"Keeping calls {kind.__name__}\(8, 8\), which is none of its modules, so neither"):
        calibrate(model, [x])
    model.kept = nn.ModuleList([nn.GRU(8, 8)])
    assert list(calibrate(model, [x])) == ["a.l0", "kept.0.l0"]


def test_a_copy_that_calls_a_layer_of_the_original_is_refused():
    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 8)
            self.run = lambda x: self.rnn(x)[0]

        def forward(self, x):
            return self.run(x)

    model, batches = Bound(), [torch.randn(5, 2, 4)]
    signals = calibrate(model, batches)
    compressed = compress(model, uniform(model, TopK(0.5), 8, signals))
    with pytest.raises(ValueError, match=r"Bound calls LSTM\(4, 8\), which is none of .*, or before a copy, calls that one's"):
        calibrate(compressed, batches)


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_model_is_calibrated_without_a_word_on_hooks(whole):
    torch.manual_seed(0)
    rnn, head = nn.LSTM(4, 8), Taking()
    plain, x = nn.Sequential(rnn, head), torch.randn(5, 2, 4)
    model = torch.compile(plain, backend="eager") if whole else nn.Sequential(rnn, torch.compile(head, backend="eager"))
    (found,) = calibrate(model, [x, x]).values()
    assert found == calibrate(plain, [x])["0.l0"]


def test_layers_that_other_threads_call_meanwhile_are_their_own():
    class Threaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 8)

        def forward(self, x):
            other = threading.Thread(target=lambda: results.append(nn.GRU(4, 8)(x)))
            other.start()
            other.join()
            return self.rnn(x)

    results = []
    assert list(calibrate(Threaded(), [torch.zeros(5, 2, 4)])) == ["rnn.l0"]
    assert len(results) == 1


def test_calibrate_refuses(lstm):
    with pytest.raises(ValueError, match="calibrate needs at least one batch, got none"):
        calibrate(lstm, [])
    with pytest.raises(ValueError, match="needs several batches, each the model's arguments, got one Tensor"):
        calibrate(lstm, torch.zeros(2, 2, 3).double())
    with pytest.raises(ValueError, match="calibrate needs batches, each the model's arguments, got 3"):
        calibrate(lstm, 3)
    dropping, x = nn.Sequential(lstm), torch.zeros(2, 2, 3).double()
    dropping.register_forward_pre_hook(lambda module, arguments: arguments[:1])
    assert calibrate(dropping, [(x, torch.zeros(2))]) == {f"0.{name}": s for name, s in calibrate(lstm, [x]).items()}
    pair = torch.zeros(2, 2, 3).double(), torch.zeros(2)  # as a loader of examples gives them
    with pytest.raises(ValueError, match=r"without targets, got one of 2 for Sequential\.forward\(input\): .* takes 2 "):
        calibrate(nn.Sequential(lstm), [pair])
    with pytest.raises(ValueError, match="calibrate needs batches that hold values, got only empty ones for '0'"):
        calibrate(nn.Sequential(lstm), [torch.zeros(2, 0, 3).double()])
    assert calibrate(lstm, [torch.zeros(2, 0, 3).double(), x]) == calibrate(lstm, [x])
    for bits in ("8", None, [4], 0, 33, True, 2.0):
        with pytest.raises(ValueError, match="calibrate needs a whole number of bits for every signal from 1 to 32, got "):
            calibrate(lstm, None, bits)
    with pytest.raises(ValueError, match="calibrate needs a whole number of bits for cell from 1 to 32, got '8'"):
        calibrate(lstm, None, {"input": 8, "cell": "8"})
    with pytest.raises(ValueError, match="calibrate knows the clipping rules max, percentile, mse, got 'least'"):
        calibrate(lstm, [torch.zeros(2, 2, 3).double()], clip="least")
    for rnn in (nn.RNN(3, 5), nn.Sequential(lstm, nn.GRUCell(5, 5))):
        with pytest.raises(ValueError, match=f"is an nn.{'RNN' if isinstance(rnn, nn.RNN) else 'GRUCell'}: the workbench"):
            calibrate(rnn, [torch.zeros(2, 2, 3)])


@pytest.mark.parametrize(("place", "value", "message"), [
    ("x", math.nan, "got nan in input of layer net.l0"),
    ("x", -math.inf, "got -inf in input of layer net.l0"),
    ("weight_ih_l0", math.nan, "got nan in pre of layer net.l0"),
    ("bias_hh_l0_reverse", math.inf, "got inf in pre of layer net.l0_reverse"),
    ("weight_hh_l1_reverse", math.nan, "got nan in pre of layer net.l1_reverse"),
    ("h", math.nan, "got nan in pre of layer net.l1"),
    ("x", 1e200, r"input of layer net.l0, up to 1e\+200: QFormat\(bits=16, frac=-651, signed=True\) needs frac from -64"),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_no_format_holds_name_signal_and_layer(kind, place, value, message):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = rnn_of(kind, num_layers=2, bidirectional=True)

        def forward(self, x, state):
            return self.net(x, state)

    model, x = Net(), torch.randn(4, 2, 3, dtype=torch.float64)
    state = states_of(model.net, 2)
    h = state[0] if isinstance(state, tuple) else state
    target = {"x": x, "h": h[2]}.get(place)
    with torch.no_grad():
        (target if target is not None else getattr(model.net, place)).view(-1)[-1] = value
    with pytest.raises(ValueError, match=message):
        calibrate(model, [(x, state)])


def test_nothing_seen_in_calibration_saturates(lstm):
    x = torch.randn(20, 4, 3, dtype=torch.float64)
    fmt = calibrate(lstm, [x])["l0"]["input"]
    q = fmt.quantise(x.numpy())
    assert fmt.min < q.min() and q.max() < fmt.max
    assert np.abs(fmt.dequantise(q) - x.numpy()).max() <= 2.0 ** -(fmt.frac + 1)
