"""Integer-only inference of packed layers: bit for bit what the hardware computes.

Every rounding stands in gate_values, cell_update, project, hidden_product, candidate and gru_update, once, so that the
array's execution shares it.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from workbench.fixedpoint import ExactMatrix, requantise
from workbench.packed import PARTS, PackedLayer


def gate_values(layer: PackedLayer, gate: str, acc) -> np.ndarray:
    """Exact aligned sums of one gate, bias included -> its values: one rounding to `pre`, then the table. Not a GRU's n.

    acc: (..., hidden_size) int64 at layer.alignment(gate)[0] fraction bits.
    """
    pre = requantise(acc, layer.alignment(gate)[0], layer.signals["pre"])
    function = "tanh" if gate == "g" else "sigmoid"
    return layer.tables[function].lookup(pre, layer.signals["pre"], layer.signals[function])


def cell_update(layer: PackedLayer, i, f, g, o, c) -> tuple[np.ndarray, np.ndarray]:
    """c' = f*c + i*g exactly, one rounding; o * tanh(stored c'), one rounding: to h, or with a projection to what it takes.
    Returns (o * tanh(c'), c'), each (..., hidden_size)."""
    s = layer.signals
    kept, new = s["sigmoid"].frac + s["cell"].frac, s["sigmoid"].frac + s["tanh"].frac
    frac = max(kept, new)
    c = requantise(((f * c) << (frac - kept)) + ((i * g) << (frac - new)), frac, s["cell"])
    tanh_c = layer.tables["tanh"].lookup(c, s["cell"], s["tanh"])
    return requantise(o * tanh_c, s["sigmoid"].frac + s["tanh"].frac, s["unprojected" if layer.projected else "hidden"]), c


def project(layer: PackedLayer, acc) -> np.ndarray:
    """Exact sums W_hr (o * tanh(c')) -> h, one rounding. acc: (..., output_size) at product_frac("hr", "p") fraction bits."""
    return requantise(acc, layer.product_frac("hr", "p"), layer.signals["hidden"])


def hidden_product(layer: PackedLayer, acc) -> np.ndarray:
    """Exact sums W_hn h + b_hn of a GRU -> one rounding. acc: (..., hidden_size) at product_frac("hh", "n") fraction bits."""
    return requantise(acc, layer.product_frac("hh", "n"), layer.signals["hidden_product"])


def candidate(layer: PackedLayer, r, s, acc) -> np.ndarray:
    """n of a GRU: r * s joins the exact aligned sum W_in x + b_in, one rounding to `pre`, then tanh in the hidden format.

    r, s: gate and rounded hidden product; acc: (..., hidden_size) at alignment("n")[0] fraction bits.
    """
    frac, _, shift = layer.alignment("n")
    pre = requantise(acc + ((r * s) << shift), frac, layer.signals["pre"])
    return layer.tables["tanh"].lookup(pre, layer.signals["pre"], layer.signals["hidden"])


def gru_update(layer: PackedLayer, z, n, h) -> np.ndarray:
    """h' = (1 - z) * n + z * h exactly, one rounding; n and h share the hidden format."""
    s = layer.signals
    return requantise((layer.one - z) * n + z * h, s["sigmoid"].frac + s["hidden"].frac, s["hidden"])


def _integers(name, values, shape, fmt):
    values = np.asarray(values)
    # A letter in the expected shape stands for any size.
    if values.ndim != len(shape) or any(isinstance(n, int) and n != m for n, m in zip(shape, values.shape, strict=True)):
        raise ValueError(f"the engine needs {name} of shape ({', '.join(map(str, shape))}), got {values.shape}")
    if values.dtype.kind not in "iu":
        raise ValueError(f"the engine needs integers as {name}, got {values.dtype}")
    if values.size and (values.min() < fmt.min or values.max() > fmt.max):
        raise ValueError(f"the engine needs {name} in {fmt}, got {values.min()} to {values.max()}")
    return values


@dataclass(frozen=True)
class LayerResult:
    output: np.ndarray  # (T, B, output_size) int64 in the hidden format
    h: np.ndarray  # (B, output_size) int64
    c: np.ndarray | None  # (B, hidden_size) int64 in the cell format; None for a GRU


class LayerEngine:
    """Runs one packed layer; holds its matrices in the float type in which their products are exact."""

    def __init__(self, layer: PackedLayer):
        self.layer = layer
        # The alignment shifts are folded into the matrices: exact, and the overflow check of the layer covers them.
        self.products = {}
        for part in ("ih", "hh"):
            rows = [layer.block(part, gate).dense() << self._shift(part, gate) for gate in layer.gates]
            self.products[part] = ExactMatrix(np.concatenate(rows), layer.signals[PARTS[part]].magnitude)
        if layer.projected:
            self.products["hr"] = ExactMatrix(layer.block("hr", "p").dense(), layer.signals["unprojected"].magnitude)
        self.bias = np.concatenate([layer.bias[gate] for gate in layer.gates])  # (gates * hidden_size,)

    def _shift(self, part, gate):
        if part == "hh" and gate == "n":
            return 0  # a GRU's hidden product is rounded before it joins
        return self.layer.alignment(gate)[1 if part == "ih" else 2]

    def run(self, x, h=None, c=None, lengths=None, trace=None) -> LayerResult:
        """x: (T, B, input_size) integers in the input format; h (B, output_size) and, for an LSTM, c (B, hidden_size) in
        their formats, zero by default; lengths: (B,), the number of steps after which each sequence keeps its state (output
        0 from there on). trace: called with (step, signal, integers) for every signal that a step stores; gates under their
        own names. Other shapes, floats and integers outside their format raise ValueError."""
        layer = self.layer
        x = _integers("x", x, ("T", "B", layer.input_size), layer.signals["input"])
        steps, batch, _ = x.shape
        h = np.zeros((batch, layer.output_size), dtype=np.int64) if h is None else h
        h = _integers("h", h, (batch, layer.output_size), layer.signals["hidden"])
        if layer.cell == "LSTM":
            c = np.zeros((batch, layer.hidden_size), dtype=np.int64) if c is None else c
            c = _integers("c", c, (batch, layer.hidden_size), layer.signals["cell"])
        elif c is not None:
            raise ValueError("the engine needs no c for a GRU, got one")
        if lengths is not None and np.shape(lengths) != (batch,):
            raise ValueError(f"the engine needs lengths of shape ({batch},), got {np.shape(lengths)}")
        from_input = self.products["ih"](x) + self.bias  # (T, B, gates * hidden_size)
        output = np.zeros((steps, batch, layer.output_size), dtype=np.int64)
        step = self._lstm_step if layer.cell == "LSTM" else self._gru_step
        for t in range(steps):
            new_h, new_c, signals = step(from_input[t], h, c)
            for name, values in signals.items() if trace else ():
                trace(t, name, values)
            if lengths is not None:
                alive = (t < np.asarray(lengths))[:, None]
                new_c = None if c is None else np.where(alive, new_c, c)
                h, output[t] = np.where(alive, new_h, h), np.where(alive, new_h, 0)
            else:
                h = output[t] = new_h
            c = new_c
        return LayerResult(output, h, c)

    def _lstm_step(self, from_input, h, c):
        layer = self.layer
        acc = np.split(from_input + self.products["hh"](h), len(layer.gates), axis=-1)
        gates = {gate: gate_values(layer, gate, part) for gate, part in zip(layer.gates, acc, strict=True)}
        h, c = cell_update(layer, *gates.values(), c)
        signals = gates | {"cell": c, "hidden": h}
        if layer.projected:
            signals["unprojected"] = h
            signals["hidden"] = h = project(layer, self.products["hr"](h))
        return h, c, signals

    def _gru_step(self, from_input, h, _):
        layer = self.layer
        inputs, hidden = (np.split(acc, 3, axis=-1) for acc in (from_input, self.products["hh"](h)))
        r, z = (gate_values(layer, gate, a + b) for gate, a, b in zip("rz", inputs, hidden, strict=False))
        s = hidden_product(layer, hidden[2] + layer.bias["hn"])
        n = candidate(layer, r, s, inputs[2])
        h = gru_update(layer, z, n, h)
        return h, None, {"r": r, "z": z, "hidden_product": s, "n": n, "hidden": h}


def run_layer(layer: PackedLayer, x, h0=None, c0=None, lengths=None) -> LayerResult:
    """One layer over a batch of integer sequences: LayerEngine.run, for a single call."""
    return LayerEngine(layer).run(x, h0, c0, lengths)


@dataclass(frozen=True)
class StackResult:
    output: np.ndarray  # (T, B, directions * output_size) int64 of the last layer
    h: np.ndarray  # (layers * directions, B, output_size) int64
    c: np.ndarray | None  # (layers * directions, B, hidden_size) int64; None for a GRU


class StackEngine:
    """Runs all layers and directions of one recurrent module, in torch's order. stack: as PackedModel.stack gives it."""

    def __init__(self, stack):
        self.engines = [tuple(map(LayerEngine, directions)) for directions in stack]

    def run(self, x, h=None, c=None, lengths=None, trace=None) -> StackResult:
        """x: (T, B, input_size); h, c: (layers * directions, B, ...) integers or None; lengths as LayerEngine.run. A reverse
        direction begins at the last step of each sequence. trace: as of LayerEngine.run, with the number of the layer and
        direction, in torch's order, in front."""
        results, place = [], 0
        for directions in self.engines:
            outputs = []
            for reverse, engine in enumerate(directions):
                states = (None if state is None else state[place] for state in (h, c))
                result = engine.run(reversed_steps(x, lengths) if reverse else x, *states, lengths,
                                    partial(trace, place) if trace else None)
                outputs.append(reversed_steps(result.output, lengths) if reverse else result.output)
                results.append(result)
                place += 1
            x = np.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]
        c = None if results[0].c is None else np.stack([result.c for result in results])
        return StackResult(x, np.stack([result.h for result in results]), c)


def reversed_steps(x, lengths):
    """(T, B, ...) with the steps of each sequence in reverse; steps beyond its length stay where they are."""
    if lengths is None:
        return x[::-1]
    step = np.arange(len(x))[:, None]  # (T, B) below
    order = np.where(step < np.asarray(lengths), np.asarray(lengths) - 1 - step, step)
    return np.take_along_axis(x, order[:, :, None], axis=0)
