"""The integer engine: a literal reference in Python integers, planted roundings, hand numbers, torch's layers, messages."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_spectrum import literal_sums

from workbench import engine
from workbench.engine import LayerEngine, StackEngine, candidate, cell_update, gate_values, gru_update, run_layer
from workbench.fixedpoint import TABLES, QFormat, requantise
from workbench.packed import (
    FORMS,
    GATES,
    PackedCirculant,
    PackedDense,
    PackedLayer,
    PackedLowRank,
    PackedSparse,
    signals_of,
    table_uses,
)

SIGNALS = {"input": QFormat(16, 12), "pre": QFormat(16, 12), "sigmoid": QFormat(16, 16, signed=False), "tanh": QFormat(16, 15),
           "cell": QFormat(16, 12), "hidden": QFormat(16, 15), "unprojected": QFormat(16, 14),
           "hidden_product": QFormat(16, 13)}
COARSE = {"input": QFormat(8, 5), "pre": QFormat(8, 4), "sigmoid": QFormat(8, 8, signed=False), "tanh": QFormat(8, 7),
          "cell": QFormat(8, 5), "hidden": QFormat(8, 7), "unprojected": QFormat(8, 6), "hidden_product": QFormat(8, 4)}
CELLS = {"LSTM": ("LSTM", 0), "projected": ("LSTM", 2), "GRU": ("GRU", 0)}  # label -> cell, projection


# The literal reference: Python's own integers and fractions, one element at a time. It shares no code with the package and
# reads nothing of it but what is stored: integers, formats, tables.


def rounded(value, fmt):
    """A value in units of fmt's last place -> half up, saturated."""
    return min(max(math.floor(value + Fraction(1, 2)), fmt.min), fmt.max)


def scale(frac):
    return Fraction(2) ** frac


def table_value(table, q, in_fmt, out_fmt):
    x, tanh = q / scale(in_fmt.frac), table.function == "tanh"
    if type(table).__name__ == "ExactTable":
        return int(table.entries[in_fmt, out_fmt][q - in_fmt.min])
    if type(table).__name__ == "HardTable":
        value = min(max(x, -1), 1) if tanh else min(max(x / 4 + Fraction(1, 2), 0), 1)
    else:
        position = min(abs(x) * 32, Fraction(256))  # 32 segments per unit, up to 8
        segment = min(math.floor(position), 255)
        start, end = int(table.knots[segment]), int(table.knots[segment + 1])
        value = (start + (end - start) * (position - segment)) / scale(15)
        if q < 0:
            value = -value if tanh else 1 - value
    return rounded(value * scale(out_fmt.frac), out_fmt)


def weight(block, i, j):
    """One weight, from what is stored."""
    if isinstance(block, PackedDense):
        return int(block.values[i, j])
    if isinstance(block, PackedSparse):
        return sum(int(v) for r, c, v in zip(block.rows, block.cols, block.values, strict=True) if (r, c) == (i, j))
    if isinstance(block, PackedLowRank):
        return sum(int(u) * int(v) for u, v in zip(block.left[i], block.right[:, j], strict=True))
    k = block.block
    return int(block.vectors[i // k, j // k, (i - j) % k])


class Reference:
    """One layer and direction, one sequence at a time."""

    def __init__(self, layer):
        self.s, self.bias, self.tables, self.cell = layer.signals, layer.bias, layer.tables, layer.cell
        self.weights, self.fracs, self.spectral = {}, {}, {}  # (part, gate) -> rows of integers, fraction bits, fft blocks
        for name, block in layer.blocks.items():
            key = name.split("_")[-2 - name.count("_reverse")], name[-1]
            if getattr(block, "datapath", "") == "fft":
                self.spectral[key] = block
            self.weights[key] = [[weight(block, i, j) for j in range(block.shape[1])] for i in range(block.shape[0])]
            self.fracs[key] = block.fmt.frac * (2 if isinstance(block, PackedLowRank) else 1)
        self.size = len(self.weights["hh", layer.gates[0]])

    def frac(self, part, gate, signal):
        """Fraction bits of a block's sums."""
        if (part, gate) in self.spectral:
            block = self.spectral[part, gate]
            return literal_sums(block, [0] * block.shape[1], self.s[signal])[1]
        return self.fracs[part, gate] + self.s[signal].frac

    def sums(self, part, gate, values, signal):
        """Exact sums of a block, as fractions."""
        unit = scale(self.frac(part, gate, signal))
        if (part, gate) in self.spectral:  # of integers, as all that rounds
            values = [int(v * scale(self.s[signal].frac)) if isinstance(v, Fraction) else v for v in values]
            return [v / unit for v in literal_sums(self.spectral[part, gate], values, self.s[signal])[0]]
        return [sum(w * v for w, v in zip(row, values, strict=True)) / unit for row in self.weights[part, gate]]

    def look_up(self, function, value, in_name, out_name):
        """The value is rounded to a format, the stored code goes through the table."""
        fmt = self.s[in_name]
        return table_value(self.tables[function], rounded(value * scale(fmt.frac), fmt), fmt, self.s[out_name])

    def gate(self, gate, x, h):
        frac = max(self.frac("ih", gate, "input"), self.frac("hh", gate, "hidden"))
        function = "tanh" if gate == "g" else "sigmoid"
        return [self.look_up(function, a + b + int(bias) / scale(frac), "pre", function) for a, b, bias in zip(
            self.sums("ih", gate, x, "input"), self.sums("hh", gate, h, "hidden"), self.bias[gate], strict=True)]

    def lstm(self, x, h, c):
        s, new_c, m = self.s, [], []
        target = s.get("unprojected", s["hidden"])
        for i, f, g, o, old in zip(*(self.gate(gate, x, h) for gate in "ifgo"), c, strict=True):
            kept = f / scale(s["sigmoid"].frac) * old / scale(s["cell"].frac)
            added = i / scale(s["sigmoid"].frac) * g / scale(s["tanh"].frac)
            new_c.append(rounded((kept + added) * scale(s["cell"].frac), s["cell"]))
            tanh_c = table_value(self.tables["tanh"], new_c[-1], s["cell"], s["tanh"])
            m.append(rounded(o * tanh_c * scale(target.frac - s["sigmoid"].frac - s["tanh"].frac), target))
        if "unprojected" not in s:
            return m, new_c
        return [rounded(v * scale(s["hidden"].frac), s["hidden"]) for v in self.sums("hr", "p", m, "unprojected")], new_c

    def gru(self, x, h, c):
        s, one, new_h = self.s, scale(self.s["sigmoid"].frac), []
        b_in = max(self.frac("ih", "n", "input"), s["sigmoid"].frac + s["hidden_product"].frac)
        b_hn = self.frac("hh", "n", "hidden")
        from_input, from_hidden = self.sums("ih", "n", x, "input"), self.sums("hh", "n", h, "hidden")
        for k, (r, z) in enumerate(zip(self.gate("r", x, h), self.gate("z", x, h), strict=True)):
            product = from_hidden[k] + int(self.bias["hn"][k]) / scale(b_hn)
            product = rounded(product * scale(s["hidden_product"].frac), s["hidden_product"]) / scale(s["hidden_product"].frac)
            n = self.look_up("tanh", from_input[k] + int(self.bias["n"][k]) / scale(b_in) + r / one * product, "pre", "hidden")
            new_h.append(rounded((1 - z / one) * n + z / one * h[k], s["hidden"]))
        return new_h, c

    def run(self, x, h, c):
        """Lists of integers, one step after another: ([h of each step], c)."""
        output = []
        for step in x:
            h, c = self.lstm(step, h, c) if self.cell == "LSTM" else self.gru(step, h, c)
            output.append(h)
        return output, c


def reference(layer, x, h=None, c=None, lengths=None, reverse=False, make=None):
    """(T, B, I) -> output (T, B, width), h and c as nested lists; c None for a GRU."""
    model = (make or Reference)(layer)
    width = len(model.weights["hh", layer.gates[0]][0])
    output = [[[0] * width for _ in range(x.shape[1])] for _ in range(x.shape[0])]
    last_h, last_c = [], []
    for b in range(x.shape[1]):
        steps = list(range(x.shape[0] if lengths is None else lengths[b]))[:: -1 if reverse else 1]
        first_h = [0] * width if h is None else h[b].tolist()
        first_c = [0] * model.size if c is None else c[b].tolist()
        outputs, end_c = model.run([x[t, b].tolist() for t in steps], first_h, first_c)
        for t, values in zip(steps, outputs, strict=True):
            output[t][b] = values
        last_h.append(outputs[-1] if outputs else first_h)
        last_c.append(end_c)
    return output, last_h, None if layer.cell == "GRU" else last_c


# Random layers.


def codes(fmt, shape, rng):
    return rng.integers(fmt.min, fmt.max + 1, shape)


def make_block(form, shape, rng, fmt, block=2):
    if form == "dense":
        return PackedDense(codes(fmt, shape, rng), fmt)
    if form == "sparse":
        return PackedSparse.from_dense(codes(fmt, shape, rng) * (rng.random(shape) < 0.4), fmt)
    if form == "fft":
        return PackedCirculant(shape, fmt, block, codes(fmt, (shape[0] // block, -(-shape[1] // block), block), rng), "fft")
    if form == "lowrank":
        fmt = QFormat(min(fmt.bits, 6), fmt.frac - max(fmt.bits - 6, 0))  # so that the sums V x are operands
        return PackedLowRank(fmt, codes(fmt, (shape[0], 1), rng), codes(fmt, (1, shape[1]), rng))
    return PackedCirculant(shape, fmt, block, codes(fmt, (shape[0] // block, -(-shape[1] // block), block), rng))


def random_layer(rng, forms, label="LSTM", hidden=4, inputs=3, signals=SIGNALS, fmt=None, block=2, kind="linear", bias=2**17,
                 suffix="l0"):
    """forms: cycled over the blocks; fmt: of every block, or one drawn per block; bias: its largest integer."""
    cell, projection = CELLS[label]
    gates, width, blocks = GATES[cell], projection or hidden, {}
    shapes = {("ih", gate): (hidden, inputs) for gate in gates} | {("hh", gate): (hidden, width) for gate in gates}
    shapes |= {("hr", "p"): (projection, hidden)} if projection else {}
    for form, ((part, gate), shape) in zip(itertools.cycle(forms), shapes.items(), strict=False):
        bits = int(rng.integers(2, 13))
        chosen = fmt or QFormat(bits, bits + int(rng.integers(-3, 4)))
        blocks[f"lstm.weight_{part}_{suffix}.{gate}"] = make_block(form, shape, rng, chosen, block)
    biases = {gate: rng.integers(-bias, bias, hidden) for gate in (*gates, *["hn"] * (cell == "GRU"))}
    signals = {name: signals[name] for name in signals_of(cell, bool(projection))}
    tables = {name: TABLES[kind].build(name, uses) for name, uses in table_uses(cell, signals).items()}
    return PackedLayer(cell, blocks, biases, signals, tables)


def random_states(layer, rng, steps=3, batch=3, fill=codes):
    """x, h, c that may take every code of their formats; c None for a GRU."""
    shapes = {"input": (steps, batch, layer.input_size), "hidden": (batch, layer.output_size),
              "cell": (batch, layer.hidden_size)}
    return [fill(layer.signals[name], shape, rng) if name in layer.signals else None for name, shape in shapes.items()]


def result_lists(result):
    return result.output.tolist(), result.h.tolist(), None if result.c is None else result.c.tolist()


def assert_equal_to_reference(layer, *arguments):
    """The engine as it runs, and its definition in int64 (which a traced run takes)."""
    expected, runner = reference(layer, *arguments), LayerEngine(layer)
    result = runner.run(*arguments)
    assert {array.dtype for array in vars(result).values() if array is not None} == {np.dtype(np.int64)}
    assert result_lists(result) == expected
    assert result_lists(runner.run(*arguments, trace=lambda *_: None)) == expected
    return result


@pytest.mark.parametrize("label", CELLS)
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("forms", [*([form] for form in FORMS), list(FORMS)], ids="-".join)
def test_equal_to_the_reference(label, kind, forms):
    rng = np.random.default_rng(0)
    layer = random_layer(rng, forms, label, kind=kind)
    assert len({layer.alignment(gate) for gate in layer.gates}) > 1  # unequal product fracs
    x, h, c = random_states(layer, rng)
    result = assert_equal_to_reference(layer, x, h, c, np.array([3, 1, 2]))
    assert np.unique(result.output).size > 5  # more than extremes


@pytest.mark.parametrize("label", CELLS)
@pytest.mark.parametrize("forms", [
    ["fft"], ["fft"] * 4 + ["circulant"] * 4, ["dense"] * 4 + ["fft"] * 4, ["fft", "sparse", "lowrank", "circulant"]],
    ids=["both", "W_ih", "W_hh", "mixed"])  # fmt: skip
@pytest.mark.parametrize(("hidden", "inputs", "block"), [(4, 3, 2), (8, 5, 8), (8, 9, 4)])
def test_the_fft_datapath_equals_the_reference(label, forms, hidden, inputs, block):
    """W_ih only and W_hh only: the first and the last four blocks of an LSTM (of a GRU the fourth belongs to W_hh)."""
    rng = np.random.default_rng(hidden + block)
    if label == "projected":
        block = 2  # outputs of a projection
    layer = random_layer(rng, forms, label, hidden, inputs, block=block)
    x, h, c = random_states(layer, rng, 3, 2)
    assert isinstance(LayerEngine(layer).steps, engine._Integers) and layer.spectral_blocks
    result = assert_equal_to_reference(layer, x, h, c, np.array([3, 2]))
    assert np.unique(result.output).size > 3


def test_the_datapaths_give_other_integers_of_nearly_the_same_values():
    rng = np.random.default_rng(0)
    time = random_layer(rng, ["circulant"], "LSTM", 32, 32, signals=SIGNALS, fmt=QFormat(8, 9), block=16, bias=2)
    fft = replace(time, blocks={name: replace(block, datapath="fft") for name, block in time.blocks.items()})
    x = rng.integers(-8192, 8192, (20, 3, 32))
    (a, b), scale_of = (run_layer(layer, x).output for layer in (time, fft)), 2.0 ** SIGNALS["hidden"].frac
    assert (a != b).mean() > 0.5 and np.abs(a - b).max() / scale_of < 0.01


@pytest.mark.parametrize("label", CELLS)
def test_lengths(label):
    rng = np.random.default_rng(7)
    layer = random_layer(rng, ["sparse", "circulant"], label, hidden=6, inputs=4, block=2)
    x, h, c = random_states(layer, rng, steps=4, batch=4)
    result = assert_equal_to_reference(layer, x, h, c, np.array([4, 0, 1, 3]))
    assert np.array_equal(result.h[1], h[1]) and (c is None or np.array_equal(result.c[1], c[1]))
    assert not result.output[:, 1].any() and not result.output[3:, 3].any()
    x[1:, 2] = rng.permutation(x[1:, 2])  # what lies beyond a sequence's end means nothing
    assert result_lists(run_layer(layer, x, h, c, [4, 0, 1, 3])) == result_lists(result)
    assert_equal_to_reference(layer, x)


@st.composite
def signal_formats(draw):
    bits = st.integers(3, draw(st.sampled_from([8, 16, 18])))

    def fmt(low, high, signed=True):
        return QFormat(draw(bits), draw(st.integers(low, high)), signed)

    return {"input": fmt(0, 14), "pre": fmt(-2, 12), "sigmoid": fmt(2, 17, draw(st.booleans())), "tanh": fmt(1, 17),
            "cell": fmt(-4, 14), "hidden": fmt(-1, 17), "unprojected": fmt(-1, 17), "hidden_product": fmt(-4, 14)}


def drawn_layer(label, signals, kind, seed, **sizes):
    """A layer of all forms; formats that PackedLayer refuses are not drawn."""
    assume(kind != "exact" or max(fmt.bits for fmt in signals.values()) <= 16)
    rng = np.random.default_rng(seed)
    try:
        bias = 2 ** int(rng.integers(1, 18))
        return rng, random_layer(rng, list(FORMS), label, signals=signals, kind=kind, bias=bias, **sizes)
    except ValueError as error:
        assert any(words in str(error) for words in ("needs an accumulator under", "18 x 27"))
        assume(False)


@pytest.mark.parametrize("label", CELLS)
@settings(max_examples=40, deadline=None)
@given(signal_formats(), st.sampled_from(list(TABLES)), st.integers(0, 2**32))
def test_equal_to_the_reference_in_any_formats(label, signals, kind, seed):
    rng, layer = drawn_layer(label, signals, kind, seed, hidden=2, inputs=2)
    assert_equal_to_reference(layer, *random_states(layer, rng, steps=2, batch=2))


@pytest.mark.parametrize("label", CELLS)
@settings(max_examples=60, deadline=None)
@given(signal_formats(), st.sampled_from(list(TABLES)), st.integers(0, 2**32), st.integers(1, 3))
def test_floats_give_the_integers_of_the_definition(label, signals, kind, seed, batch):
    rng, layer = drawn_layer(label, signals, kind, seed, hidden=16, inputs=12)

    def extremes(fmt, shape, rng):
        return rng.choice([fmt.min, fmt.max, 0, *codes(fmt, 3, rng)], shape)

    for fill in (codes, extremes):
        states = random_states(layer, rng, 6, batch, fill)
        fast, traced = (LayerEngine(layer).run(*states, trace=trace) for trace in (None, lambda *_: None))
        assert result_lists(fast) == result_lists(traced)


@pytest.mark.parametrize("label", CELLS)
@pytest.mark.parametrize(("signals", "bits", "weights", "others"), [
    (COARSE, 2, np.float32, np.float32),
    (COARSE | {"cell": QFormat(16, 12), "hidden_product": QFormat(16, 12)}, 8, np.float32, np.float64),
    (SIGNALS, 12, np.float64, np.float64),
])
def test_the_float_types_are_chosen_by_what_may_occur(label, signals, bits, weights, others):
    rng = np.random.default_rng(3)
    layer = random_layer(rng, ["dense"], label, hidden=8, inputs=8, signals=signals, fmt=QFormat(bits, 6), bias=100)
    chosen = LayerEngine(layer).steps.types
    assert chosen["ih"] == chosen["hh"] == weights and chosen["cell"] == others
    assert_equal_to_reference(layer, *random_states(layer, rng))


@pytest.mark.parametrize(("bias", "dtype"), [(0, np.float32), (1, np.float64)])
def test_sums_are_exact_at_the_very_bound_of_float32(bias, dtype):
    # Sums and `pre` have no fraction bits, so that 1/2 is the unit: row bound and offset, 2**15 + 1/2, make 2**24 - 1 halves.
    signals = COARSE | {"input": QFormat(8, 0), "hidden": QFormat(8, 0), "pre": QFormat(16, 0)}
    bound = ((1 << 24) - 1 - (2 * (1 << 15) + 1)) // 2
    ih, rest = divmod(bound - 128, 128)  # |x| and |h| reach 128; the recurrent weight is 1
    blocks = {f"lstm.weight_{part}_l0.{gate}": PackedDense(np.array([[ih if part == "ih" else 1]]), QFormat(18, 0))
              for part in ("ih", "hh") for gate in "ifgo"}
    signals = {name: signals[name] for name in signals_of("LSTM")}
    tables = {name: TABLES["linear"].build(name) for name in ("sigmoid", "tanh")}
    layer = PackedLayer("LSTM", blocks, {gate: np.array([rest + bias]) for gate in "ifgo"}, signals, tables)
    runner = LayerEngine(layer)
    assert set(layer.row_bounds().values()) == {bound + bias}
    assert runner.steps.types["sums"] == dtype
    x = np.array([[[-128], [-1], [0], [127]]])
    assert_equal_to_reference(layer, x, np.array([[-128], [127], [-1], [0]]), np.array([[5], [6], [7], [8]]))


@pytest.mark.parametrize(("label", "signals", "sums", "cell"), [
    ("GRU", {}, np.float32, np.float32),
    # W_hn h + b_hn alone is large: 4 * 2**17 * 128 at 10 + 7 fraction bits, the offset at as many: 2**26 + 2**7 * 2**13.
    ("GRU", {"hn": 2**17 - 1}, np.float64, np.float32),
    # The update: (2 * 255 + 256) * 2**15 and the offset 2**15 * 2**8 pass 2**24; with one bit less they do not.
    ("GRU", {"hidden": QFormat(15, 7)}, np.float32, np.float32),
    ("GRU", {"hidden": QFormat(16, 7)}, np.float32, np.float64),
    # f * c + i * g: 255 * (2**15 + 2**7) and the offset, (2**15 + 1/2) * 2**8, make 2**24 itself.
    ("LSTM", {"cell": QFormat(15, 7)}, np.float32, np.float32),
    ("LSTM", {"cell": QFormat(16, 7)}, np.float32, np.float64),
    # o * tanh(c'): the offset of a 16-bit format alone counts 2**15 * 2**(8 + 7 - frac).
    ("projected", {"unprojected": QFormat(16, 7)}, np.float32, np.float32),
    ("projected", {"unprojected": QFormat(16, 6)}, np.float32, np.float64),
])
def test_every_rounded_sum_counts_for_the_types(label, signals, sums, cell):
    rng, signals = np.random.default_rng(0), dict(signals)
    hn = signals.pop("hn", 0)
    layer = random_layer(rng, ["dense"], label, hidden=4, signals=COARSE | signals, fmt=QFormat(2, 4), bias=10)
    if hn:
        layer.blocks["lstm.weight_hh_l0.n"] = PackedDense(np.full((4, 4), hn), QFormat(18, 10))
    types = LayerEngine(layer).steps.types
    assert (types["sums"], types["cell"]) == (sums, cell)
    assert_equal_to_reference(layer, *random_states(layer, rng))


@pytest.mark.parametrize("label", CELLS)
def test_what_floats_cannot_hold_runs_in_integers(label):
    rng = np.random.default_rng(0)
    wide = random_layer(rng, ["dense"], label, signals=SIGNALS | {"pre": QFormat(17, 12)})
    assert isinstance(LayerEngine(wide).steps, engine._Integers)
    assert_equal_to_reference(wide, *random_states(wide, rng))
    assert isinstance(LayerEngine(random_layer(rng, ["dense"], label)).steps, engine._Floats)


@pytest.mark.parametrize("label", CELLS)
def test_the_weights_are_held_once(label):
    """At most 2.5 times the bytes of float32 weights."""
    layer = random_layer(np.random.default_rng(0), ["dense"], label, hidden=32, inputs=16)
    arrays = LayerEngine(layer).steps.weights.values()
    assert sum(array.nbytes for array in arrays) <= 8 * sum(block.dense().size for block in layer.blocks.values())


@pytest.mark.parametrize("label", CELLS)
def test_gates_multiplied_one_by_one_give_the_same(label, monkeypatch):
    """As those of a large layer are; each way against the steps in integers."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        layer = random_layer(rng, ["dense"], label, hidden=6, inputs=5)
        states = random_states(layer, rng, steps=7)
        expected = result_lists(LayerEngine(layer).run(*states, [7, 2, 3], trace=lambda *_: None))
        for most, dimensions in ((10**6, 2), (0, 3)):
            monkeypatch.setattr(engine, "SIDE_BY_SIDE_BYTES", most)
            runner = LayerEngine(layer)
            assert {matrix.ndim for matrix in runner.steps.weights.values()} == {dimensions}
            assert result_lists(runner.run(*states, [7, 2, 3])) == expected


@pytest.mark.parametrize("label", CELLS)
def test_long_inputs_are_taken_in_pieces(label, monkeypatch):
    rng = np.random.default_rng(1)
    layer = random_layer(rng, ["dense"], label)
    x, h, c = random_states(layer, rng, steps=7)
    whole = [result_lists(LayerEngine(layer).run(x, h, c, [7, 2, 3], trace=trace)) for trace in (None, lambda *_: None)]
    monkeypatch.setattr(engine, "CHUNK_VALUES", 2 * 3 * 4 * len(layer.gates))  # two steps
    pieces = [result_lists(LayerEngine(layer).run(x, h, c, [7, 2, 3], trace=trace)) for trace in (None, lambda *_: None)]
    assert pieces == whole


@pytest.mark.parametrize("label", CELLS)
def test_steps_may_be_split(label):
    rng = np.random.default_rng(1)
    layer = random_layer(rng, ["dense"], label)
    x, h, c = random_states(layer, rng, steps=6)
    whole, first = run_layer(layer, x, h, c), run_layer(layer, x[:2], h, c)
    rest = run_layer(layer, x[2:], first.h, first.c)
    assert np.array_equal(whole.output, np.concatenate([first.output, rest.output]))
    assert result_lists(rest)[1:] == result_lists(whole)[1:]
    assert result_lists(run_layer(layer, x, h, c, [2, 2, 2]))[1:] == result_lists(first)[1:]


@pytest.mark.parametrize("label", CELLS)
def test_no_steps_and_no_sequences(label):
    rng = np.random.default_rng(1)
    layer = random_layer(rng, ["dense"], label)
    x, h, c = random_states(layer, rng, steps=0)
    result = run_layer(layer, x, h, c)
    assert result.output.shape == (0, 3, layer.output_size) and result_lists(result)[1:] == (
        h.tolist(), None if c is None else c.tolist())
    assert run_layer(layer, *random_states(layer, rng, batch=0)).output.shape == (3, 0, layer.output_size)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
@pytest.mark.parametrize("signals", [COARSE, COARSE | {"cell": QFormat(17, 12)}], ids=["floats", "integers"])
def test_any_integer_type_is_taken(dtype, signals):
    rng = np.random.default_rng(1)
    layer = random_layer(rng, ["dense"], signals=signals)
    states = [np.abs(values) % 128 for values in random_states(layer, rng)]
    assert result_lists(run_layer(layer, *(v.astype(dtype) for v in states))) == result_lists(run_layer(layer, *states))


def test_a_trace_shows_what_each_step_stores():
    for label, names in (("LSTM", "i f g o cell hidden"), ("projected", "i f g o cell unprojected hidden"),
                         ("GRU", "r z hidden_product n hidden")):
        rng, seen = np.random.default_rng(1), {}
        layer = random_layer(rng, ["dense"], label)
        x, h, c = random_states(layer, rng, steps=2)
        result = LayerEngine(layer).run(x, h, c, trace=lambda t, name, values, seen=seen: seen.update({(t, name): values}))
        assert list(seen) == [(t, name) for t in range(2) for name in names.split()]
        assert np.array_equal(seen[1, "hidden"], result.h) and np.array_equal(seen[0, "hidden"], result.output[0])
        assert label == "GRU" or np.array_equal(seen[1, "cell"], result.c)


# Stacks: several layers, both directions.


def random_stack(rng, label, directions, depth=2):
    """Layers of which the upper ones take what the lower ones give."""
    stack, inputs = [], 3
    for index in range(depth):
        signals = SIGNALS | ({"input": SIGNALS["hidden"]} if index else {})
        stack.append(tuple(random_layer(rng, list(FORMS), label, inputs=inputs, signals=signals, suffix=f"l{index}{end}")
                           for end in ("", "_reverse")[:directions]))
        inputs = sum(layer.output_size for layer in stack[-1])
    return stack


@pytest.mark.parametrize("label", CELLS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("lengths", [None, [3, 1, 2]])
def test_a_stack_equals_the_reference(label, directions, lengths):
    rng = np.random.default_rng(5)
    stack = random_stack(rng, label, directions)
    layers = [layer for row in stack for layer in row]
    x = codes(SIGNALS["input"], (3, 3, 3), rng)
    h = np.stack([codes(layer.signals["hidden"], (3, layer.output_size), rng) for layer in layers])
    c = None if label == "GRU" else np.stack([codes(layer.signals["cell"], (3, layer.hidden_size), rng) for layer in layers])
    result, values, last = StackEngine(stack).run(x, h, c, lengths), x, []
    for row in stack:
        outputs = []
        for reverse, layer in enumerate(row):
            place = len(last)
            output, *states = reference(layer, values, h[place], None if c is None else c[place], lengths, bool(reverse))
            outputs.append(np.array(output))
            last.append(states)
        values = np.concatenate(outputs, axis=-1)
    assert result.output.tolist() == values.tolist() and result.h.tolist() == [states[0] for states in last]
    assert result.c is None if label == "GRU" else result.c.tolist() == [states[1] for states in last]
    seen = []
    traced = StackEngine(stack).run(x, h, c, lengths, lambda place, t, name, values: seen.append((place, t, name)))
    assert result_lists(traced) == result_lists(result)
    assert [key for key in seen if key[2] == "hidden"] == [(n, t, "hidden") for n in range(len(layers)) for t in range(3)]


# Planted faults: a rounding more, less or elsewhere must not go unnoticed.


def twice(q, frac, fmt):
    """A rounding three bits before the right one."""
    return requantise(requantise(q, frac, QFormat(32, fmt.frac + 3)), fmt.frac + 3, fmt)


def gate_rounded_twice(layer, gate, acc):
    pre = twice(acc, layer.alignment(gate)[0], layer.signals["pre"])
    function = "tanh" if gate == "g" else "sigmoid"
    return layer.tables[function].lookup(pre, layer.signals["pre"], layer.signals[function])


def gate_rounded_down(layer, gate, acc):
    return gate_values(layer, gate, acc - (1 << (layer.alignment(gate)[0] - layer.signals["pre"].frac - 1)))


def wrong_cell(products_rounded=False, tanh_of_the_sum=False, output_truncated=False):
    def update(layer, i, f, g, o, c):
        s = layer.signals
        one, target = s["sigmoid"].frac, s["unprojected" if layer.projected else "hidden"]
        if products_rounded:
            new_c = np.clip(requantise(f * c, one + s["cell"].frac, s["cell"])
                            + requantise(i * g, one + s["tanh"].frac, s["cell"]), s["cell"].min, s["cell"].max)
            frac, total = s["cell"].frac, new_c
        else:
            frac = one + s["tanh"].frac
            total = ((f * c) << (s["tanh"].frac - s["cell"].frac)) + i * g
            new_c = requantise(total, frac, s["cell"])
        read = QFormat(26, s["cell"].frac + 8) if tanh_of_the_sum else s["cell"]
        tanh_c = layer.tables["tanh"].lookup(requantise(total, frac, read), read, s["tanh"])
        product = o * tanh_c - ((1 << (one + s["tanh"].frac - target.frac - 1)) if output_truncated else 0)
        return requantise(product, one + s["tanh"].frac, target), new_c

    return update


def candidate_with_rounded_product(layer, r, s, acc):
    frac, _, shift = layer.alignment("n")
    pre = layer.signals["pre"]
    product = requantise((r * s) << shift, frac, pre) << (frac - pre.frac)
    return layer.tables["tanh"].lookup(requantise(acc + product, frac, pre), pre, layer.signals["hidden"])


def gru_with_rounded_products(layer, z, n, h):
    frac, fmt = layer.signals["sigmoid"].frac + layer.signals["hidden"].frac, layer.signals["hidden"]
    return np.clip(requantise((layer.one - z) * n, frac, fmt) + requantise(z * h, frac, fmt), fmt.min, fmt.max)


FAULTS = [
    ("LSTM", "gate_values", gate_rounded_twice),
    ("LSTM", "gate_values", gate_rounded_down),
    ("GRU", "gate_values", gate_rounded_twice),
    ("LSTM", "cell_update", wrong_cell(products_rounded=True)),
    ("LSTM", "cell_update", wrong_cell(tanh_of_the_sum=True)),
    ("LSTM", "cell_update", wrong_cell(output_truncated=True)),
    ("projected", "cell_update", wrong_cell(products_rounded=True)),
    ("projected", "project", lambda layer, acc: twice(acc, layer.product_frac("hr", "p"), layer.signals["hidden"])),
    ("GRU", "hidden_product", lambda layer, acc: twice(acc, layer.product_frac("hh", "n"), layer.signals["hidden_product"])),
    ("GRU", "candidate", candidate_with_rounded_product),
    ("GRU", "gru_update", gru_with_rounded_products),
    *((label, "_offset", lambda fmt: -fmt.min) for label in CELLS),  # of the floats: no half, so everything rounds down
    *((label, "_offset", lambda fmt: 0.5 - fmt.min + 2**-6) for label in CELLS),
]


@pytest.mark.parametrize(("label", "name", "fault"), FAULTS)
def test_planted_roundings_are_noticed(label, name, fault, monkeypatch):
    rng = np.random.default_rng(2)
    layer = random_layer(rng, ["dense"], label, hidden=6, inputs=4, fmt=QFormat(8, 10))  # small: little saturates
    states = random_states(layer, rng, steps=6)
    expected = reference(layer, *states)
    monkeypatch.setattr(engine, name, fault)
    trace = None if name == "_offset" else lambda *_: None
    assert result_lists(LayerEngine(layer).run(*states, trace=trace)) != expected


# By hand.


def unit(weights, bias=0, **signals):
    """One input, one unit, weights gate -> (w_ih, w_hh) in QFormat(8, 6): an LSTM, or with the gates r z n a GRU."""
    cell = "LSTM" if "i" in weights else "GRU"
    blocks = {f"lstm.weight_{part}_l0.{gate}": PackedDense(np.array([[weights[gate][n]]]), QFormat(8, 6))
              for n, part in enumerate(("ih", "hh")) for gate in GATES[cell]}
    biases = {gate: np.array([bias]) for gate in (*GATES[cell], *["hn"] * (cell == "GRU"))}
    signals = {name: (SIGNALS | signals)[name] for name in signals_of(cell)}
    return PackedLayer(cell, blocks, biases, signals, LINEAR)


LINEAR = {name: TABLES["linear"].build(name) for name in ("sigmoid", "tanh")}


def test_one_lstm_unit_by_hand():
    # Product fracs: 6 + 12 = 18 (W_ih) and 6 + 15 = 21 (W_hh): F = 21, the W_ih sum moves left by 3.
    # x = 1.0 = 4096. Gate i: w 1.0; f: w 0, bias 0; g: w 0.5; o: w -1.0.
    layer = unit({"i": (64, 64), "f": (0, 0), "g": (32, 0), "o": (-64, 0)})
    assert layer.alignment("i") == (21, 3, 0)
    # Step 1: i = sigmoid(1): a knot, 23955 / 2**15 -> 47910 / 2**16. g = tanh(0.5): a knot, 15143 / 2**15.
    # o = sigmoid(-1) = 1 - 23955 / 2**15 = 8813 / 2**15 -> 17626 / 2**16. f = 0.5.
    # c = 47910 * 15143 / 2**31 * 2**12 = 1383.77... -> 1384 (0.33789); tanh(c): 1384 / 128 = segment 10, remainder 104:
    # 9919 + (10840 - 9919) * 104 / 128 = 10667.3 -> 10667; h = 17626 * 10667 / 2**16 = 2868.9 -> 2869.
    assert [int(LINEAR["sigmoid"].knots[32]), int(LINEAR["tanh"].knots[16])] == [23955, 15143]
    assert LINEAR["tanh"].knots[10:12].tolist() == [9919, 10840]
    first = run_layer(layer, [[[4096]]])
    assert (first.c.item(), first.h.item(), first.output.tolist()) == (1384, 2869, [[[2869]]])
    # Step 2, x = 0: only W_hh of gate i: h = 2869 / 2**15 -> pre = 2869 * 64 / 2**21 * 2**12 = 358.6 -> 359;
    # g = tanh(0) = 0, f = 0.5: c = 692; tanh(c): segment 5, remainder 52: 5079 + (6073 - 5079) * 52 / 128 = 5482.8 -> 5483;
    # o = 0.5: h = 2741.5 -> 2742.
    assert LINEAR["tanh"].knots[5:7].tolist() == [5079, 6073]
    second = run_layer(layer, [[[4096]], [[0]]])
    assert (second.c.item(), second.h.item(), second.output.ravel().tolist()) == (692, 2742, [2869, 2742])
    acc = np.array([[2869 * 64]])
    assert gate_values(layer, "i", acc) == LINEAR["sigmoid"].lookup(359, SIGNALS["pre"], SIGNALS["sigmoid"])


def test_one_gru_unit_by_hand():
    # r: w 1.0; z: w -1.0; n: w_ih 0.5, w_hh 1.0. x = 1.0 = 4096, h = 0.25 = 8192.
    layer = unit({"r": (64, 0), "z": (-64, 0), "n": (32, 64)})
    # r = sigmoid(1) = 47910 / 2**16, z = sigmoid(-1) = 17626 / 2**16. s = 64 * 8192 / 2**21 = 0.25 -> 2048 / 2**13.
    # r * s has 16 + 13 = 29 fraction bits, W_in x = 32 * 4096 = 2**17 has 18, so that it moves left by 11:
    # 2**28 + 47910 * 2048 = 366555136; / 2**17 = 2796.6 -> pre = 2797 (0.68286).
    assert layer.alignment("n") == (29, 11, 0)
    # tanh: 2797 / 128 = segment 21, remainder 109.
    start, end = LINEAR["tanh"].knots[21:23].tolist()
    n = math.floor(start + (end - start) * 109 / 128 + 0.5)
    assert n == pytest.approx(math.tanh(2797 / 4096) * 2**15, abs=5)
    # h' = (65536 - 17626) * n + 17626 * 8192, over 2**16.
    expected = math.floor((47910 * n + 17626 * 8192) / 2**16 + 0.5)
    assert run_layer(layer, [[[4096]]], [[8192]]).h.item() == expected


def test_one_projected_unit_by_hand():
    # i, f and o are 0.5, g = tanh(0.5) = 15143 / 2**15: c = 946.4 -> 946 / 2**12; tanh(c): segment 7, remainder 50.
    blocks = {f"lstm.weight_{part}_l0.{gate}": PackedDense(np.array([[32 * (gate == "g" and part == "ih")]]), QFormat(8, 6))
              for part in ("ih", "hh") for gate in "ifgo"}
    blocks["lstm.weight_hr_l0.p"] = PackedDense(np.array([[-3]]), QFormat(3, 2))
    signals = {name: SIGNALS[name] for name in signals_of("LSTM", True)}
    layer = PackedLayer("LSTM", blocks, {gate: np.array([0]) for gate in "ifgo"}, signals, LINEAR)
    start, end = LINEAR["tanh"].knots[7:9].tolist()
    tanh_c = math.floor(start + (end - start) * 50 / 128 + 0.5)
    m = math.floor(tanh_c / 4 + 0.5)  # times 0.5, from 15 to 14 fraction bits
    result = run_layer(layer, [[[4096]]])
    assert (result.c.item(), result.h.item()) == (946, math.floor(-3 * m / 2 + 0.5))  # from 16 to 15 fraction bits


def test_pre_activations_are_rounded_once():
    layer = unit(dict.fromkeys("ifgo", (0, 0)))
    half = 1 << 8  # F - pre.frac = 9 bits are dropped: 256 is half of a last place
    assert gate_values(layer, "g", np.array([half - 1, half, -half, -half - 1])).tolist() == [0, 8, 0, -8]
    # tanh(2**-12) is 8 / 2**15: the first segment rises by 1024 over 128 places.
    assert LINEAR["tanh"].knots[1] == 1024


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


def test_a_gru_rounds_n_and_h_once():
    layer = unit(dict.fromkeys("rzn", (0, 0)))
    # r * s = 0.5 * 2**-13 is a quarter of pre's last place; with another quarter from the input it makes the tie, which rises.
    quarter = 1 << 15  # of 2**17
    r, s = np.array([1 << 15] * 2), np.array([1, 1])
    assert candidate(layer, r, s, np.array([quarter, quarter - 1])).tolist() == [8, 0]
    # Half a last place from n and half from h, together one.
    z = np.array([1 << 15] * 2)
    assert gru_update(layer, z, np.array([1, 1]), np.array([1, 0])).tolist() == [1, 1]
    assert gru_update(layer, z - 1, np.array([0, 0]), np.array([1, -1])).tolist() == [0, 0]
    assert gru_update(layer, np.array([0, 65535]), np.array([7, 7]), np.array([-9, -9])).tolist() == [7, -9]


def test_signals_saturate():
    layer = unit(dict.fromkeys("ifgo", (127, 0)), cell=QFormat(16, 15))
    result = run_layer(layer, np.full((40, 1, 1), 32767))  # the true cell grows by 1 a step; the stored one stops below 1
    assert result.c == 32767
    assert result.h.item() == pytest.approx(math.tanh(1) * 2**15, abs=40)


# Torch's own layers, in formats so wide that little is lost.


def stack_of(module, fmt):
    """The packed layers of a torch module; weights and signals nowhere saturate."""
    cell, size = type(module).__name__, module.hidden_size
    tensors = {name: value.detach().numpy() for name, value in module.named_parameters()}
    stack = []
    for index in range(module.num_layers):
        signals = SIGNALS | ({"input": SIGNALS["hidden"]} if index else {})
        signals = {name: signals[name] for name in signals_of(cell, bool(module.proj_size))}
        row = []
        for end in ("", "_reverse")[: 1 + module.bidirectional]:
            suffix, blocks = f"l{index}{end}", {}
            for part, gates in (("ih", GATES[cell]), ("hh", GATES[cell]), ("hr", "p" if module.proj_size else "")):
                for n, gate in enumerate(gates):
                    w = tensors[f"weight_{part}_{suffix}"]
                    blocks[f"lstm.weight_{part}_{suffix}.{gate}"] = PackedDense(
                        fmt.quantise(w[n * size : (n + 1) * size] if part != "hr" else w), fmt)
            b_ih, b_hh = (tensors[f"bias_{part}_{suffix}"].reshape(-1, size) for part in ("ih", "hh"))
            bias = dict(zip(GATES[cell], b_ih + b_hh, strict=True))
            bias |= {"n": b_ih[2], "hn": b_hh[2]} if cell == "GRU" else {}
            row.append(PackedLayer.from_float_bias(cell, blocks, bias, signals, LINEAR))
        stack.append(tuple(row))
    return stack


@pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("make", "projection"), [(torch.nn.LSTM, 0), (torch.nn.LSTM, 6), (torch.nn.GRU, 0)])
def test_close_to_torch(make, projection, bidirectional):
    torch.manual_seed(0)
    options = {"proj_size": projection} if projection else {}
    module = make(10, 16, num_layers=2, bidirectional=bidirectional, **options).double()
    rng, directions = np.random.default_rng(0), 1 + bidirectional
    lengths, x = [20, 3, 11, 1], rng.normal(size=(20, 4, 10))
    h, c = (rng.uniform(-0.9, 0.9, (2 * directions, 4, size)) for size in (projection or 16, 16))
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.from_numpy(x), lengths, enforce_sorted=False)
    states = torch.from_numpy(h), torch.from_numpy(c)
    expected, last = module(packed, states if make is torch.nn.LSTM else states[0])
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(expected)
    h, c, hidden = SIGNALS["hidden"].quantise(h), SIGNALS["cell"].quantise(c), SIGNALS["hidden"]
    result = StackEngine(stack_of(module, QFormat(16, 15))).run(
        SIGNALS["input"].quantise(x), h, c if make is torch.nn.LSTM else None, lengths)
    last_h, last_c = last if make is torch.nn.LSTM else (last, None)
    # Inputs and pre-activations are known to 2**-13, the tables to 2**-13 (tanh): a few of them add up.
    assert np.abs(hidden.dequantise(result.output) - expected.detach().numpy()).max() < 2**-10
    assert np.abs(hidden.dequantise(result.h) - last_h.detach().numpy()).max() < 2**-10
    if last_c is not None:
        assert np.abs(SIGNALS["cell"].dequantise(result.c) - last_c.detach().numpy()).max() < 2**-10


def test_the_engine_loads_without_torch():
    code = "import sys, workbench.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Messages.

ZEROS = np.zeros((2, 2, 3), dtype=np.int64)


@pytest.mark.parametrize(
    ("x", "states", "message"),
    [
        (np.zeros((2, 3), dtype=np.int64), {}, "the engine needs x of shape (T, B, 3), got (2, 3)"),
        (np.zeros((2, 2, 4), dtype=np.int64), {}, "the engine needs x of shape (T, B, 3), got (2, 2, 4)"),
        (np.zeros((2, 2, 3)), {}, "the engine needs integers as x, got float64"),
        (np.full((2, 2, 3), np.nan), {}, "the engine needs integers as x, got float64"),
        (ZEROS == 0, {}, "the engine needs integers as x, got bool"),
        (np.full((2, 2, 3), 32768), {}, "the engine needs x in QFormat(bits=16, frac=12, signed=True), got 32768 to 32768"),
        (ZEROS, {"h": np.zeros((1, 4), dtype=np.int64)}, "the engine needs h of shape (2, 4), got (1, 4)"),
        (ZEROS, {"h": np.full((2, 4), np.nan)}, "the engine needs integers as h, got float64"),
        (ZEROS, {"c": np.zeros(4, dtype=np.int64)}, "the engine needs c of shape (2, 4), got (4,)"),
        (ZEROS, {"c": np.full((2, 4), -32769)}, "the engine needs c in QFormat"),
        (ZEROS, {"lengths": [1]}, "the engine needs lengths of shape (2,), got (1,)"),
        (ZEROS, {"lengths": [1.0, 2.0]}, "the engine needs integers as lengths, got float64"),
        (ZEROS, {"lengths": [1, 3]}, "the engine needs lengths from 0 to the 2 steps of x, got 1 to 3"),
        (ZEROS, {"lengths": [-1, 2]}, "the engine needs lengths from 0 to the 2 steps of x, got -1 to 2"),
    ],
)
def test_messages(x, states, message):
    with pytest.raises(ValueError) as caught:
        LayerEngine(random_layer(np.random.default_rng(0), ["dense"])).run(x, **states)
    assert message in str(caught.value)


def test_messages_of_cells_and_stacks():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="the engine needs no c for a GRU, got one"):
        run_layer(random_layer(rng, ["dense"], "GRU"), ZEROS, c=np.zeros((2, 4), dtype=np.int64))
    stack = StackEngine(random_stack(rng, "LSTM", 2))
    for name in "hc":
        with pytest.raises(ValueError, match=f"the engine needs {name} for 4 layers and directions, got 2"):
            stack.run(ZEROS, **{name: np.zeros((2, 2, 4), dtype=np.int64)})
    for lengths in ([1], [0, 3], [1.5, 2]):
        with pytest.raises(ValueError, match="the engine needs .*lengths"):
            stack.run(ZEROS, lengths=lengths)
