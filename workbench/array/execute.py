"""What the array computes: values from the mapped words, cycles and counts from the schedule."""

from dataclasses import dataclass

import numpy as np

from workbench.array.mapping import Layout, multiplication
from workbench.array.schedule import Schedule, schedule_layer
from workbench.array.skipping import multiplied
from workbench.array.spec import ArraySpec
from workbench.array.stack import StagedSchedule, checked_stack, layer_name, schedule_hoisted, schedule_stack
from workbench.engine import (
    LayerResult,
    candidate,
    cell_update,
    gate_values,
    gru_update,
    hidden_product,
    project,
    reversed_steps,
    run_layer,
    sender,
    sent_steps,
)
from workbench.packed import PackedLayer


@dataclass(frozen=True)
class Execution:
    output: np.ndarray  # (T, B, output_size) int64 in the hidden format
    h: np.ndarray  # (B, output_size) int64
    c: np.ndarray | None  # (B, hidden_size) int64 in the cell format; None for a GRU
    schedule: Schedule | StagedSchedule


def execute_layer(layer: PackedLayer, spec: ArraySpec, x, layout: Layout | None = None, hoist: bool | int = False) -> Execution:
    """Run B sequences side by side: x (T, B, input_size) integers in the input format, h and c zero at the start.

    hoist: True, or so many steps at a time: input products ahead of the recurrence, as schedule_hoisted does; a layout beside
    it raises ValueError.

    The sums come from the words as they lie in the PEs; each part is drained, then shifted once, as the engine defines.
    """
    x = _checked(layer, x, "execute_layer")
    steps, batch, _ = x.shape
    inputs = multiplied(layer, x) if spec.lookahead > 1 else None
    if hoist:
        if layout is not None:
            raise ValueError(f"execute_layer takes no layout with hoist, whose stages have one each, got {layout.name}")
        schedule = schedule_hoisted(layer, spec, steps, batch, 0 if hoist is True else hoist, inputs)
    else:
        schedule = schedule_layer(layer, spec, steps, layout, batch, inputs)
    found = _run(layer, {place: block for m in schedule.mapping.layers for place, block in m.blocks.items()}, x)
    return Execution(found.output, found.h, found.c, schedule)


def _checked(layer, x, who):
    """The integers as int64, in which neither sums nor differences overflow."""
    if not isinstance(layer, PackedLayer):
        raise TypeError(f"{who} needs a PackedLayer, got a {type(layer).__name__}")
    x = np.asarray(x)
    if x.ndim != 3 or x.shape[2] != layer.input_size or not x.size:
        raise ValueError(f"{who} needs x of shape (T, B, {layer.input_size}) with T and B of at least 1, got {x.shape}")
    fmt = layer.signals["input"]
    if x.dtype.kind not in "iu" or x.min() < fmt.min or x.max() > fmt.max:
        raise ValueError(f"{who} needs integers of {fmt}, got {x.dtype} from {x.min()} to {x.max()}")
    return x.astype(np.int64)


def _run(layer, blocks, x) -> LayerResult:
    """What a layer computes from its words as they lie in the PEs. blocks: (part, gate) -> BlockMapping."""
    steps, batch, _ = x.shape
    sums = {(part, gate): multiplication(layer, blocks, part, gate) for part, gate in layer.products}
    sent = sent_steps(x, layer.delta["input"]) if "input" in layer.delta else x
    aligned = {}  # gate -> (T, B, hidden_size): the input's sum and the bias
    for gate in layer.gates:
        _, shift, _ = layer.alignment(gate)
        aligned[gate] = (sums["ih", gate](sent) << shift) + layer.bias[gate]
    h = np.zeros((batch, layer.output_size), dtype=np.int64)
    c = np.zeros((batch, layer.hidden_size), dtype=np.int64) if layer.cell == "LSTM" else None
    output = np.empty((steps, batch, layer.output_size), dtype=np.int64)
    step = _lstm_step if layer.cell == "LSTM" else _gru_step
    send_h, send_m = (sender(layer, name, (batch, size), np.int64)
                      for name, size in (("hidden", layer.output_size), ("unprojected", layer.hidden_size)))
    for t in range(steps):
        h, c = step(layer, sums, {gate: values[t] for gate, values in aligned.items()}, h, c, send_h(h), send_m)
        output[t] = h
    return LayerResult(output, h, c)


def _gate(layer, sums, inputs, gate, h):
    return gate_values(layer, gate, inputs[gate] + (sums["hh", gate](h) << layer.alignment(gate)[2]))


def _lstm_step(layer, sums, inputs, h, c, sent, send_m):
    h, c = cell_update(layer, *(_gate(layer, sums, inputs, gate, sent) for gate in layer.gates), c)
    return project(layer, sums["hr", "p"](send_m(h))) if layer.projected else h, c


def _gru_step(layer, sums, inputs, h, _, sent, send_m):
    r, z = (_gate(layer, sums, inputs, gate, sent) for gate in "rz")
    s = hidden_product(layer, sums["hh", "n"](sent) + layer.bias["hn"])
    return gru_update(layer, z, candidate(layer, r, s, inputs["n"]), h), None


@dataclass(frozen=True)
class StackExecution:
    """layers: one entry per layer index, (forward,) or (forward, reverse); a reverse direction's values are listed by the steps
    in the order in which it takes them, the last of the sequence first."""

    output: np.ndarray  # (T, B, directions * output_size) int64 of the last layer
    layers: tuple[tuple[LayerResult, ...], ...]
    schedule: StagedSchedule


def execute_stack(stack, spec: ArraySpec, x, form: str = "", hoist: bool | int = False) -> StackExecution:
    """Run B sequences through all layers and directions of one recurrent module: x (T, B, input_size), as schedule_stack
    arranges them."""
    stack = checked_stack("execute_stack", stack)
    x = _checked(stack[0][0], x, "execute_stack")
    inputs = _multiplied_by_all(stack, x) if spec.lookahead > 1 else None
    schedule, blocks = schedule_stack(stack, spec, len(x), x.shape[1], form, inputs, hoist), {}
    for mapping in schedule.mapping.layers:
        blocks.setdefault(mapping.name, {}).update(mapping.blocks)
    results = []
    for index, directions in enumerate(stack):
        found = tuple(_run(layer, blocks[layer_name(index, reverse)], _turned(x, reverse))
                      for reverse, layer in enumerate(directions))
        results.append(found)
        x = np.concatenate([_turned(run.output, reverse) for reverse, run in enumerate(found)], axis=-1)
    return StackExecution(x, tuple(results), schedule)


def _turned(x, reverse):
    return reversed_steps(x, None) if reverse else x


def _multiplied_by_all(stack, x):
    """Layer's name -> skipping.multiplied."""
    found = {}
    for index, directions in enumerate(stack):
        found |= {layer_name(index, reverse): multiplied(layer, _turned(x, reverse))
                  for reverse, layer in enumerate(directions)}
        x = np.concatenate([_turned(run_layer(layer, _turned(x, reverse)).output, reverse)
                            for reverse, layer in enumerate(directions)], axis=-1)
    return found
