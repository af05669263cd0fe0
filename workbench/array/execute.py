"""What the array computes: values from the mapped words, cycles and counts from the schedule."""

from dataclasses import dataclass

import numpy as np

from workbench.array.mapping import Layout
from workbench.array.schedule import Schedule, schedule_layer
from workbench.array.spec import ArraySpec
from workbench.engine import cell_update, gate_values
from workbench.fixedpoint import ExactMatrix
from workbench.packed import PARTS, PackedLayer


@dataclass(frozen=True)
class Execution:
    output: np.ndarray  # (T, 1, hidden_size) int64 in the hidden format
    h: np.ndarray  # (1, hidden_size) int64
    c: np.ndarray  # (1, hidden_size) int64 in the cell format
    schedule: Schedule


def execute_layer(layer: PackedLayer, spec: ArraySpec, x, layout: Layout | None = None) -> Execution:
    """Run one sequence on the array: x (T, 1, input_size) integers in the input format, h and c zero at the start.

    The sums come from the words as they lie in the PEs; each part is drained, then shifted once, as the engine defines.
    """
    x = np.asarray(x)
    if x.ndim != 3 or x.shape[1:] != (1, layer.input_size) or not len(x):
        raise ValueError(f"execute_layer needs x of shape (T, 1, {layer.input_size}) with T of at least 1, got {x.shape}")
    fmt = layer.signals["input"]
    if x.dtype.kind not in "iu" or x.min() < fmt.min or x.max() > fmt.max:
        raise ValueError(f"execute_layer needs integers of {fmt}, got {x.dtype} from {x.min()} to {x.max()}")
    schedule = schedule_layer(layer, spec, len(x), layout)
    sums = {(part, gate): ExactMatrix(block.dense(), layer.signals[PARTS[part]].magnitude)
            for (part, gate), block in schedule.mapping.blocks.items()}
    aligned = {}  # gate -> (T, 1, hidden_size): the input's sum and the bias
    for gate in layer.gates:
        _, shift, _ = layer.alignment(gate)
        aligned[gate] = (sums["ih", gate](x) << shift) + layer.bias[gate]
    h = c = np.zeros((1, layer.hidden_size), dtype=np.int64)
    output = np.empty((len(x), 1, layer.hidden_size), dtype=np.int64)
    for t in range(len(x)):
        gates = (gate_values(layer, gate, aligned[gate][t] + (sums["hh", gate](h) << layer.alignment(gate)[2]))
                 for gate in layer.gates)
        h, c = cell_update(layer, *gates, c)
        output[t] = h
    return Execution(output, h, c, schedule)
