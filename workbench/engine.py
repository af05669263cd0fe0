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
        """x: (T, B, input_size) integers in the input format; h, c: (B, hidden_size), zero by default;
        lengths: (B,), the number of steps after which each sequence keeps its state (output 0 from there on)."""
        layer, (steps, batch, _) = self.layer, x.shape
        hidden = layer.hidden_size
        h = np.zeros((batch, hidden), dtype=np.int64) if h is None else h
        c = np.zeros((batch, hidden), dtype=np.int64) if c is None else c
        from_input = self.products["ih"](x) + self.bias  # (T, B, gates * hidden_size)
        output = np.zeros((steps, batch, hidden), dtype=np.int64)
        for t in range(steps):
            acc = from_input[t] + self.products["hh"](h)  # (B, gates * hidden_size)
            gates = (gate_values(layer, gate, part)
                     for gate, part in zip(layer.gates, np.split(acc, len(layer.gates), axis=1), strict=True))
            new_h, new_c = cell_update(layer, *gates, c)
            if lengths is not None:
                alive = (t < lengths)[:, None]
                new_c, h = np.where(alive, new_c, c), np.where(alive, new_h, h)
                output[t] = np.where(alive, new_h, 0)
            else:
                h = output[t] = new_h
            c = new_c
        return LayerResult(output, h, c)


def run_layer(layer: PackedLayer, x, h0=None, c0=None, lengths=None) -> LayerResult:
    """One layer over a batch of integer sequences; see LayerEngine.run for shapes. Bad input raises ValueError."""
    x = np.asarray(x)
    if x.ndim != 3 or x.shape[2] != layer.input_size:
        raise ValueError(f"run_layer needs x of shape (T, B, {layer.input_size}), got {x.shape}")
    fmt = layer.signals["input"]
    if x.dtype.kind not in "iu" or (x.size and (x.min() < fmt.min or x.max() > fmt.max)):
        raise ValueError(f"run_layer needs integers of {fmt}, got {x.dtype} from {x.min()} to {x.max()}")
    return LayerEngine(layer).run(x, h0, c0, lengths)
