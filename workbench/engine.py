"""Integer-only inference of packed layers: bit for bit what the hardware computes.

Every rounding stands in gate_values and cell_update, once, so that the array's execution shares it.
"""

from dataclasses import dataclass

import numpy as np

from workbench.fixedpoint import ExactMatrix, requantise
from workbench.packed import PARTS, PackedLayer


def gate_values(layer: PackedLayer, gate: str, acc) -> np.ndarray:
    """Exact aligned sums of one gate, bias included -> its values: one rounding to `pre`, then the table.

    acc: (..., hidden_size) int64 at layer.alignment(gate)[0] fraction bits.
    """
    pre = requantise(acc, layer.alignment(gate)[0], layer.signals["pre"])
    function = "tanh" if gate == "g" else "sigmoid"
    return layer.tables[function].lookup(pre, layer.signals["pre"], layer.signals[function])


def cell_update(layer: PackedLayer, i, f, g, o, c) -> tuple[np.ndarray, np.ndarray]:
    """c' = f*c + i*g exactly, one rounding; h = o * tanh(stored c'), one rounding. Returns (h, c'), each (..., hidden_size)."""
    s = layer.signals
    kept, new = s["sigmoid"].frac + s["cell"].frac, s["sigmoid"].frac + s["tanh"].frac
    frac = max(kept, new)
    c = requantise(((f * c) << (frac - kept)) + ((i * g) << (frac - new)), frac, s["cell"])
    tanh_c = layer.tables["tanh"].lookup(c, s["cell"], s["tanh"])
    return requantise(o * tanh_c, s["sigmoid"].frac + s["tanh"].frac, s["hidden"]), c


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
    output: np.ndarray  # (T, B, hidden_size) int64 in the hidden format
    h: np.ndarray  # (B, hidden_size) int64
    c: np.ndarray  # (B, hidden_size) int64 in the cell format


class LayerEngine:
    """Runs one packed layer; holds its matrices in the float type in which their products are exact."""

    def __init__(self, layer: PackedLayer):
        self.layer = layer
        # The alignment shifts are folded into the matrices: exact, and the overflow check of the layer covers them.
        shifts = {gate: dict(zip(PARTS, layer.alignment(gate)[1:], strict=True)) for gate in layer.gates}
        self.products = {
            part: ExactMatrix(
                np.concatenate([layer.block(part, gate).dense() << shifts[gate][part] for gate in layer.gates]),
                layer.signals[signal].magnitude,
            )
            for part, signal in PARTS.items()
        }
        self.bias = np.concatenate([layer.bias[gate] for gate in layer.gates])  # (gates * hidden_size,)

    def run(self, x, h=None, c=None, lengths=None) -> LayerResult:
        """x: (T, B, input_size) integers in the input format; h, c: (B, hidden_size) in their formats, zero by default;
        lengths: (B,), the number of steps after which each sequence keeps its state (output 0 from there on).
        Other shapes, floats and integers outside their format raise ValueError."""
        layer, hidden = self.layer, self.layer.hidden_size
        x = _integers("x", x, ("T", "B", layer.input_size), layer.signals["input"])
        steps, batch, _ = x.shape
        zeros = np.zeros((batch, hidden), dtype=np.int64)
        h = _integers("h", zeros if h is None else h, (batch, hidden), layer.signals["hidden"])
        c = _integers("c", zeros if c is None else c, (batch, hidden), layer.signals["cell"])
        if lengths is not None and np.shape(lengths) != (batch,):
            raise ValueError(f"the engine needs lengths of shape ({batch},), got {np.shape(lengths)}")
        from_input = self.products["ih"](x) + self.bias  # (T, B, gates * hidden_size)
        output = np.zeros((steps, batch, hidden), dtype=np.int64)
        for t in range(steps):
            acc = from_input[t] + self.products["hh"](h)  # (B, gates * hidden_size)
            gates = (gate_values(layer, gate, part)
                     for gate, part in zip(layer.gates, np.split(acc, len(layer.gates), axis=1), strict=True))
            new_h, new_c = cell_update(layer, *gates, c)
            if lengths is not None:
                alive = (t < np.asarray(lengths))[:, None]
                new_c, h = np.where(alive, new_c, c), np.where(alive, new_h, h)
                output[t] = np.where(alive, new_h, 0)
            else:
                h = output[t] = new_h
            c = new_c
        return LayerResult(output, h, c)


def run_layer(layer: PackedLayer, x, h0=None, c0=None, lengths=None) -> LayerResult:
    """One layer over a batch of integer sequences: LayerEngine.run, for a single call."""
    return LayerEngine(layer).run(x, h0, c0, lengths)
