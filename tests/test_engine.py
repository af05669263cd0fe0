"""The integer engine: a literal reference in Python integers, hand numbers, torch's LSTM, messages."""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.engine import LayerEngine, cell_update, gate_values, run_layer
from workbench.fixedpoint import LinearTable, QFormat
from workbench.packed import PackedCirculant, PackedDense, PackedLayer, PackedSparse

SIGNALS = {"input": QFormat(16, 12), "pre": QFormat(16, 12), "sigmoid": QFormat(16, 16, signed=False), "tanh": QFormat(16, 15),
           "cell": QFormat(16, 12), "hidden": QFormat(16, 15)}
TABLES = {name: LinearTable.build(name) for name in ("sigmoid", "tanh")}


# The literal reference: Python's own integers and fractions, one element at a time. It shares no code with the package.


def rounded(value, fmt):
    """A value in units of fmt's last place -> half up, saturated."""
    return min(max(math.floor(value + Fraction(1, 2)), fmt.min), fmt.max)


def scale(frac):
    return Fraction(2) ** frac


def table_value(table, q, in_fmt, out_fmt):
    position = min(abs(q) / scale(in_fmt.frac) * 32, Fraction(256))  # 32 segments per unit, up to 8
    segment = min(math.floor(position), 255)
    start, end = int(table.knots[segment]), int(table.knots[segment + 1])
    value = (start + (end - start) * (position - segment)) / scale(15)
    if q < 0:
        value = -value if table.function == "tanh" else 1 - value
    return rounded(value * scale(out_fmt.frac), out_fmt)


def weight(block, i, j):
    """One weight, from what is stored."""
    if isinstance(block, PackedDense):
        return int(block.values[i, j])
    if isinstance(block, PackedSparse):
        return sum(int(v) for r, c, v in zip(block.rows, block.cols, block.values, strict=True) if (r, c) == (i, j))
    k = block.block
    return int(block.vectors[i // k, j // k, (i - j) % k])


def reference_step(layer, weights, x, h, c):
    """One sequence, one step: lists of integers in, (h, c) out."""
    s, gates = layer.signals, {}
    for gate in "ifgo":
        formats = layer.blocks[f"lstm.weight_ih_l0.{gate}"].fmt, layer.blocks[f"lstm.weight_hh_l0.{gate}"].fmt
        fracs = formats[0].frac + s["input"].frac, formats[1].frac + s["hidden"].frac
        values = []
        for n in range(len(h)):
            from_input = sum(w * v for w, v in zip(weights["ih", gate][n], x, strict=True)) / scale(fracs[0])
            from_hidden = sum(w * v for w, v in zip(weights["hh", gate][n], h, strict=True)) / scale(fracs[1])
            total = from_input + from_hidden + int(layer.bias[gate][n]) / scale(max(fracs))
            pre = rounded(total * scale(s["pre"].frac), s["pre"])
            function = "tanh" if gate == "g" else "sigmoid"
            values.append(table_value(layer.tables[function], pre, s["pre"], s[function]))
        gates[gate] = values
    new_h, new_c = [], []
    for i, f, g, o, old in zip(*(gates[gate] for gate in "ifgo"), c, strict=True):
        kept = f / scale(s["sigmoid"].frac) * old / scale(s["cell"].frac)
        new = i / scale(s["sigmoid"].frac) * g / scale(s["tanh"].frac)
        new_c.append(rounded((kept + new) * scale(s["cell"].frac), s["cell"]))
        tanh_c = table_value(layer.tables["tanh"], new_c[-1], s["cell"], s["tanh"])
        new_h.append(rounded(o * tanh_c * scale(s["hidden"].frac - s["sigmoid"].frac - s["tanh"].frac), s["hidden"]))
    return new_h, new_c


def reference(layer, x, h=None, c=None, lengths=None):
    """(T, B, I) -> output (T, B, H), h and c (B, H) as nested lists."""
    steps, batch, _ = x.shape
    hidden = layer.hidden_size
    weights = {(part, gate): [[weight(block, i, j) for j in range(block.shape[1])] for i in range(block.shape[0])]
               for part in ("ih", "hh") for gate in "ifgo" for block in [layer.blocks[f"lstm.weight_{part}_l0.{gate}"]]}
    output = [[[0] * hidden for _ in range(batch)] for _ in range(steps)]
    last_h, last_c = [], []
    for b in range(batch):
        h_b = [0] * hidden if h is None else h[b].tolist()
        c_b = [0] * hidden if c is None else c[b].tolist()
        for t in range(steps if lengths is None else lengths[b]):
            h_b, c_b = reference_step(layer, weights, x[t, b].tolist(), h_b, c_b)
            output[t][b] = h_b
        last_h.append(h_b)
        last_c.append(c_b)
    return output, last_h, last_c


def codes(fmt, shape, rng):
    return rng.integers(fmt.min, fmt.max + 1, shape)


def make_block(form, shape, rng, fmt, block=2):
    if form == "dense":
        return PackedDense(codes(fmt, shape, rng), fmt)
    if form == "sparse":
        return PackedSparse.from_dense(codes(fmt, shape, rng) * (rng.random(shape) < 0.4), fmt)
    return PackedCirculant(shape, fmt, block, codes(fmt, (shape[0] // block, -(-shape[1] // block), block), rng))


def random_layer(rng, forms, hidden=4, inputs=3, signals=SIGNALS, fmt=None, block=2):
    """forms: cycled over the eight blocks; fmt: of every block, or one drawn per block."""
    blocks = {}
    for n, (part, gate) in enumerate((p, g) for p in ("ih", "hh") for g in "ifgo"):
        chosen = fmt or QFormat(int(rng.integers(2, 13)), int(rng.integers(3, 10)))
        shape = (hidden, inputs if part == "ih" else hidden)
        blocks[f"lstm.weight_{part}_l0.{gate}"] = make_block(forms[n % len(forms)], shape, rng, chosen, block)
    bias = {gate: rng.integers(-(2**17), 2**17, hidden) for gate in "ifgo"}
    return PackedLayer("LSTM", blocks, bias, signals, TABLES)


def assert_equal_to_reference(layer, x, h=None, c=None, lengths=None):
    result = run_layer(layer, x, h, c, lengths)
    output, last_h, last_c = reference(layer, x, h, c, lengths)
    assert result.output.dtype == result.h.dtype == result.c.dtype == np.int64
    assert result.output.tolist() == output and result.h.tolist() == last_h and result.c.tolist() == last_c
    return result


@pytest.mark.parametrize("forms", [["dense"], ["sparse"], ["circulant"], ["dense", "sparse", "circulant"]], ids="-".join)
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_reference(forms, seed):
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, forms)
    assert len({layer.alignment(gate) for gate in "ifgo"}) > 1  # unequal product fracs
    result = assert_equal_to_reference(layer, codes(SIGNALS["input"], (4, 2, 3), rng))
    assert np.unique(result.output).size > 8


def test_equal_to_the_reference_with_states_and_lengths():
    rng = np.random.default_rng(7)
    layer = random_layer(rng, ["sparse", "circulant"], hidden=6, inputs=4, block=3)
    x, h, c = (codes(SIGNALS[name], shape, rng) for name, shape in (("input", (5, 4, 4)), ("hidden", (4, 6)), ("cell", (4, 6))))
    assert_equal_to_reference(layer, x, h, c)
    result = assert_equal_to_reference(layer, x, h, c, np.array([5, 0, 1, 3]))
    assert np.array_equal(result.h[1], h[1]) and np.array_equal(result.c[1], c[1])
    assert not result.output[:, 1].any() and not result.output[3:, 3].any()


@st.composite
def signal_formats(draw):
    def fmt(low, high, signed=True):
        bits = draw(st.integers(3, 12))
        return QFormat(bits, draw(st.integers(low, high)), signed)

    return {"input": fmt(0, 14), "pre": fmt(-2, 12), "sigmoid": fmt(2, 14, draw(st.booleans())), "tanh": fmt(1, 13),
            "cell": fmt(-4, 12), "hidden": fmt(1, 13)}


@settings(max_examples=60, deadline=None)
@given(signal_formats(), st.integers(0, 2**32))
def test_equal_to_the_reference_in_any_formats(signals, seed):
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, ["dense", "circulant", "sparse"], hidden=2, inputs=2, signals=signals)
    x, h, c = (codes(signals[name], shape, rng) for name, shape in (("input", (2, 2, 2)), ("hidden", (2, 2)), ("cell", (2, 2))))
    assert_equal_to_reference(layer, x, h, c)


@pytest.mark.parametrize(("bits", "dtype"), [(2, np.float32), (12, np.float64)])
def test_equal_to_the_reference_in_both_float_types(bits, dtype):
    signals = SIGNALS | {"input": QFormat(16, 12), "hidden": QFormat(16, 15)}
    layer = random_layer(np.random.default_rng(3), ["dense"], hidden=8, inputs=8, signals=signals, fmt=QFormat(bits, bits - 1))
    # The shifts of the alignment, 3 bits for W_ih, are part of the bound.
    assert LayerEngine(layer).products["ih"].dtype == dtype
    assert_equal_to_reference(layer, codes(signals["input"], (3, 2, 8), np.random.default_rng(4)))


def unit(weights, bias=(0, 0, 0, 0), signals=SIGNALS):
    """One input, one unit: weights: gate -> (w_ih, w_hh) in QFormat(8, 6)."""
    blocks = {f"lstm.weight_{part}_l0.{gate}": PackedDense(np.array([[weights[gate][n]]]), QFormat(8, 6))
              for n, part in enumerate(("ih", "hh")) for gate in "ifgo"}
    return PackedLayer("LSTM", blocks, {gate: np.array([b]) for gate, b in zip("ifgo", bias, strict=True)}, signals, TABLES)


def test_one_unit_by_hand():
    # Product fracs: 6 + 12 = 18 (W_ih) and 6 + 15 = 21 (W_hh): F = 21, the W_ih sum moves left by 3.
    # x = 1.0 = 4096. Gate i: w 1.0; f: w 0, bias 0; g: w 0.5; o: w -1.0.
    layer = unit({"i": (64, 64), "f": (0, 0), "g": (32, 0), "o": (-64, 0)})
    assert layer.alignment("i") == (21, 3, 0)
    # Step 1: i = sigmoid(1): a knot, 23955 / 2**15 -> 47910 / 2**16. g = tanh(0.5): a knot, 15143 / 2**15.
    # o = sigmoid(-1) = 1 - 23955 / 2**15 = 8813 / 2**15 -> 17626 / 2**16. f = 0.5.
    # c = 47910 * 15143 / 2**31 * 2**12 = 1383.77... -> 1384 (0.33789); tanh(c): 1384 / 128 = segment 10, remainder 104:
    # 9919 + (10840 - 9919) * 104 / 128 = 10667.3 -> 10667; h = 17626 * 10667 / 2**16 = 2868.9 -> 2869.
    assert [int(TABLES["sigmoid"].knots[32]), int(TABLES["tanh"].knots[16])] == [23955, 15143]
    assert TABLES["tanh"].knots[10:12].tolist() == [9919, 10840]
    first = run_layer(layer, [[[4096]]])
    assert (first.c.item(), first.h.item(), first.output.tolist()) == (1384, 2869, [[[2869]]])
    # Step 2, x = 0: only W_hh of gate i: h = 2869 / 2**15 -> pre = 2869 * 64 / 2**21 * 2**12 = 358.6 -> 359;
    # g = tanh(0) = 0, f = 0.5: c = 692; tanh(c): segment 5, remainder 52: 5079 + (6073 - 5079) * 52 / 128 = 5482.8 -> 5483;
    # o = 0.5: h = 2741.5 -> 2742.
    assert TABLES["tanh"].knots[5:7].tolist() == [5079, 6073]
    second = run_layer(layer, [[[4096]], [[0]]])
    assert (second.c.item(), second.h.item(), second.output.ravel().tolist()) == (692, 2742, [2869, 2742])
    acc = np.array([[2869 * 64]])
    assert gate_values(layer, "i", acc) == TABLES["sigmoid"].lookup(359, SIGNALS["pre"], SIGNALS["sigmoid"])


def test_pre_activations_are_rounded_once():
    layer = unit(dict.fromkeys("ifgo", (0, 0)))
    half = 1 << 8  # F - pre.frac = 9 bits are dropped: 256 is half of a last place
    assert gate_values(layer, "g", np.array([half - 1, half, -half, -half - 1])).tolist() == [0, 8, 0, -8]
    # tanh(2**-12) is 8 / 2**15: the first segment rises by 1024 over 128 places.
    assert TABLES["tanh"].knots[1] == 1024


def test_the_cell_is_rounded_once_and_tanh_reads_what_is_stored():
    layer = unit(dict.fromkeys("ifgo", (0, 0)))
    one = 1 << 15  # 0.5 as sigmoid
    # f*c = 0.5 * 1 and i*g = 0.5 * 2**-12: half a last place each, together one (0.5 + 0.5, not 1 + 1).
    h, c = cell_update(layer, *(np.array([v]) for v in (one, one, 8, 65535, 1)))
    assert c == 1
    assert h == 8  # tanh(2**-12) = 8 / 2**15, times 65535 / 65536 = 7.9999 -> 8
    # f*c + i*g = 0.25 of a last place is stored as 0, so h is 0 although tanh of the exact sum times 2**15 would be 2.
    h, c = cell_update(layer, *(np.array([v]) for v in (1 << 14, 0, 8, 65535, 0)))
    assert (c, h) == (0, 0)


def test_signals_saturate():
    layer = unit({"i": (127, 0), "f": (127, 0), "g": (127, 0), "o": (127, 0)}, signals=SIGNALS | {"cell": QFormat(16, 15)})
    result = run_layer(layer, np.full((40, 1, 1), 32767))  # the true cell grows by 1 a step; the stored one stops below 1
    assert result.c == 32767
    assert result.h.item() == pytest.approx(math.tanh(1) * 2**15, abs=40)


def test_sequences_of_no_steps_keep_the_states():
    layer = unit(dict.fromkeys("ifgo", (1, 1)))
    result = run_layer(layer, np.zeros((0, 2, 1), dtype=np.int64), [[5], [6]], [[7], [8]])
    assert result.output.shape == (0, 2, 1) and result.h.tolist() == [[5], [6]] and result.c.tolist() == [[7], [8]]


def test_lengths_and_steps_may_be_split():
    rng = np.random.default_rng(1)
    layer = random_layer(rng, ["dense"])
    x = codes(SIGNALS["input"], (6, 3, 3), rng)
    whole = run_layer(layer, x)
    first = run_layer(layer, x[:2])
    rest = run_layer(layer, x[2:], first.h, first.c)
    assert np.array_equal(whole.output, np.concatenate([first.output, rest.output])) and np.array_equal(whole.c, rest.c)
    assert np.array_equal(run_layer(layer, x, lengths=[2, 2, 2]).c, first.c)


def test_close_to_torch():
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(10, 16).double()
    fmt = QFormat(16, 15)
    gates = {name: dict(zip("ifgo", getattr(lstm, name).detach().numpy().reshape(4, 16, *extra), strict=True))
             for name, extra in (("weight_ih_l0", (10,)), ("weight_hh_l0", (16,)))}
    blocks = {f"lstm.{name}.{gate}": PackedDense(fmt.quantise(w), fmt) for name, ws in gates.items() for gate, w in ws.items()}
    bias = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().numpy().reshape(4, 16)
    layer = PackedLayer.from_float_bias("LSTM", blocks, dict(zip("ifgo", bias, strict=True)), SIGNALS, TABLES)
    x = np.random.default_rng(0).normal(size=(20, 4, 10))
    expected, (_, cell) = lstm(torch.from_numpy(x))
    result = run_layer(layer, SIGNALS["input"].quantise(x))
    # Inputs and pre-activations are known to 2**-13, the tables to 2**-13 (tanh): a few of them add up.
    assert np.abs(SIGNALS["hidden"].dequantise(result.output) - expected.detach().numpy()).max() < 2**-10
    assert np.abs(SIGNALS["cell"].dequantise(result.c) - cell[0].detach().numpy()).max() < 2**-10


def test_the_engine_loads_without_torch():
    code = "import sys, workbench.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("x", "states", "message"),
    [
        (np.zeros((2, 3), dtype=np.int64), {}, "the engine needs x of shape (T, B, 3), got (2, 3)"),
        (np.zeros((2, 2, 4), dtype=np.int64), {}, "the engine needs x of shape (T, B, 3), got (2, 2, 4)"),
        (np.zeros((2, 2, 3)), {}, "the engine needs integers as x, got float64"),
        (np.full((2, 2, 3), 32768), {}, "the engine needs x in QFormat(bits=16, frac=12, signed=True), got 32768 to 32768"),
        (np.zeros((2, 2, 3), dtype=np.int64), {"h0": np.zeros((1, 4), dtype=np.int64)},
         "the engine needs h of shape (2, 4), got (1, 4)"),
        (np.zeros((2, 2, 3), dtype=np.int64), {"c0": np.zeros(4, dtype=np.int64)},
         "the engine needs c of shape (2, 4), got (4,)"),
        (np.zeros((2, 2, 3), dtype=np.int64), {"c0": np.full((2, 4), -32769)}, "the engine needs c in QFormat"),
        (np.zeros((2, 2, 3), dtype=np.int64), {"lengths": [1]}, "the engine needs lengths of shape (2,), got (1,)"),
    ],
)
def test_messages(x, states, message):
    with pytest.raises(ValueError) as caught:
        run_layer(random_layer(np.random.default_rng(0), ["dense"]), x, **states)
    assert message in str(caught.value)
