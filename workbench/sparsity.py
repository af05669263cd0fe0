"""Studies of zeros on the array, counted from what a trained model really multiplies: delta thresholds, and sparse or dense
operation of its blocks."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from workbench.array import ArraySpec, Choice, compare_operations, map_layer, multiplied, schedule_layer
from workbench.array.schedule import schedule_mapping
from workbench.checks import check_whole
from workbench.constrain import attach, check_packed, pack
from workbench.engine import LayerEngine, reversed_steps
from workbench.packed import PackedModel
from workbench.plan import Plan
from workbench.quantise import quantised_states, recurrent_calls
from workbench.tasks import Task
from workbench.train import evaluate


def layer_sequences(model: torch.nn.Module, packed: PackedModel, task: Task, split: str,
                    count: int) -> dict[str, list[np.ndarray]]:
    """Layer name -> the integers (T, 1, input_size) that it takes, one array for each of the first `count` sequences of a
    split, as long as it is; those of a reverse direction last step first."""
    check_packed("layer_sequences", model, packed)
    if not isinstance(task, Task):
        raise ValueError(f"layer_sequences needs a task of sequences, got a {type(task).__name__}")
    count = check_whole("layer_sequences", "number of sequences", count, 1)
    data = task.splits[split]
    batches = ((torch.from_numpy(data.x[n : n + 1, : data.lengths[n]]), torch.from_numpy(data.lengths[n : n + 1]))
               for n in range(min(count, len(data.lengths))))
    found, engines = {name: [] for name in packed.layers}, {name: LayerEngine(layer) for name, layer in packed.layers.items()}
    for path, (x, state, _) in recurrent_calls("layer_sequences", model, batches):
        stack = packed.stack(path)
        states = quantised_states([layer for directions in stack for layer in directions], state)
        names = {id(layer): name for name, layer in packed.layers.items()}
        x = stack[0][0].signals["input"].quantise(x.cpu())
        place = 0  # in torch's order of layers and directions
        for directions in stack:
            outputs = []
            for reverse, layer in enumerate(directions):
                mine = reversed_steps(x, None) if reverse else x
                found[names[id(layer)]].append(mine)
                output = engines[names[id(layer)]].run(mine, *(values[place] for values in states)).output
                place += 1
                outputs.append(reversed_steps(output, None) if reverse else output)
            x = np.concatenate(outputs, axis=-1)
    return found


@dataclass(frozen=True)
class DeltaStudy:
    """table: a row per layer, threshold and lookahead. chosen: the largest threshold whose validation loss is within the limit,
    0 where none is; test_accuracy: label ("without", "chosen") -> percent, read once."""

    table: pd.DataFrame
    chosen: float
    test_accuracy: dict[str, float]


def delta_study(model: torch.nn.Module, plan: Plan, task: Task, spec: ArraySpec, thresholds: list[float],
                lookaheads: list[int], sequences: int, limit: float) -> DeltaStudy:
    """What delta thresholds cost in accuracy and save in cycles. model: trained, constrained to the plan or not.

    Each threshold holds for the inputs and hidden values of every layer, in units of the signals' own values; the first row is
    without. Loss (nats) and accuracy (percent) of the integers are those of the whole validation split. Counted from its first
    `sequences` sequences, each layer alone on the array: the share of inputs and hidden values that are sent (without: that are
    not zero), and of all steps but the first the mean, 95th percentile and maximum of the cycles, multiply-accumulates per
    step, and cycles per sequence. acceleration: against no threshold and the first lookahead. limit: nats by which the
    validation loss may rise.
    """
    rows, validation, layouts, base = [], {}, {}, {}
    for threshold in (None, *sorted(thresholds)):
        packed = pack(model, plan.with_delta() if threshold is None else plan.with_delta(input=threshold, hidden=threshold))
        found = layer_sequences(model, packed, task, "valid", sequences)
        validation[threshold] = evaluate(attach(model, packed), task, "valid")
        for name, layer in packed.layers.items():
            engine = LayerEngine(layer)
            inputs = [multiplied(layer, x, engine) for x in found[name]]
            # A difference is a bit wider than its signal; the words of the array are made as wide for all.
            array = spec.with_(word_bits=max(spec.word_bits, *(layer.signals[s].bits + 1 for s in ("input", "hidden"))))
            if threshold is None:
                layouts[name] = schedule_layer(layer, array, 1).mapping.layout
            sent = {part: sum(np.count_nonzero(mine[part]) for mine in inputs) / sum(mine[part].size for mine in inputs)
                    for part in ("ih", "hh")}
            for lookahead in lookaheads:
                mapping = map_layer(layer, array.with_(lookahead=lookahead), layouts[name])
                schedules = [schedule_mapping(mapping, len(x), mine) for x, mine in zip(found[name], inputs, strict=True)]
                steps = np.concatenate([schedule.step_cycles[1:] for schedule in schedules])
                if not steps.size:
                    raise ValueError("delta_study needs sequences of at least 2 steps, got 1 step each")
                mean = float(steps.mean())
                base.setdefault(name, mean)
                rows.append({
                    "layer": name, "threshold": "none" if threshold is None else f"{threshold:g}", "lookahead": lookahead,
                    "valid loss": validation[threshold].loss, "valid accuracy": validation[threshold].accuracy,
                    "input sent": sent["ih"], "hidden sent": sent["hh"],
                    "cycles mean": mean, "cycles p95": float(np.percentile(steps, 95)), "cycles max": int(steps.max()),
                    "cycles per sequence": float(np.mean([schedule.cycles for schedule in schedules])),
                    "macs per step": sum(s.counts()["macs"] for s in schedules) / sum(s.steps for s in schedules),
                    "acceleration": base[name] / mean})
    chosen = max((t for t in thresholds if validation[t].loss <= validation[None].loss + limit), default=0.0)
    test = {label: evaluate(attach(model, pack(model, mine)), task, "test").accuracy for label, mine in (
        ("without", plan.with_delta()), ("chosen", plan.with_delta(input=chosen, hidden=chosen)))}
    return DeltaStudy(pd.DataFrame(rows), chosen, test)


def operation_study(model: torch.nn.Module, packed: PackedModel, task: Task, spec: ArraySpec, lookaheads: list[int],
                    sequences: int) -> tuple[pd.DataFrame, dict[tuple[str, int], Choice]]:
    """Sparse or dense operation of a trained model's blocks, chosen from real sequences of the validation split: the rows of
    compare_operations, with their layer and lookahead, and (layer name, lookahead) -> the Choice itself."""
    found, choices, rows = layer_sequences(model, packed, task, "valid", sequences), {}, []
    for name, layer in packed.layers.items():
        for lookahead in lookaheads:
            choice = choices[name, lookahead] = compare_operations(layer, spec.with_(lookahead=lookahead), found[name])
            rows += [{"layer": name, "lookahead": lookahead} | row for row in choice.rows]
    return pd.DataFrame(rows), choices
