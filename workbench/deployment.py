"""A packed model on an array: what a report of a network of one's own shows. The packed file is all that it takes.

No accuracy is in such a file: that of the integer engine is measured where model and data are (attach).
"""

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from workbench.array import ArraySpec, Schedule, StagedSchedule, schedule_layer, schedule_stack
from workbench.array.cost import BASELINE, DEVICES, compare
from workbench.checks import check_whole
from workbench.constrain import pack
from workbench.exploration import Question, untrained
from workbench.methods import Dense
from workbench.packed import PackedLayer, PackedModel, load
from workbench.plan import LOSSLESS_BITS, pack_block, plan_blocks, with_room
from workbench.plots import gantt_figure, region_figure
from workbench.report import show
from workbench.tables import (
    baseline_text,
    device_table,
    energy_table,
    fit_text,
    hardware_table,
    present,
    signal_table,
    step_text,
)

PACKED = "packed"  # label of what the file holds, beside BASELINE


@dataclass(frozen=True)
class Deployment:
    """modules: path of a recurrent module -> BASELINE and PACKED -> the schedule of all its layers and directions; layers:
    layer name -> the same two of that layer alone, on the whole array."""

    packed: PackedModel
    modules: dict[str, dict[str, StagedSchedule]]
    layers: dict[str, dict[str, Schedule]]

    def sentence(self) -> str:
        """What was found, in words (Markdown)."""
        packed = self.packed
        text = (f"**cr_disk {packed.cr_disk:.1f}: {packed.storage_bits // 8:,} bytes of recurrent matrices**, "
                f"{packed.mean_bits:.3g} bits a stored value; the whole model, with biases and everything around at 32 "
                f"bits, is {packed.cr_model:.1f} times smaller (cr_model). ")
        if packed.counted_weights != packed.dense_weights:
            text += ("These ratios are counted from the model before units were removed; accelerations, cr_chip and the "
                     "cr_disk of a block are against what is left. ")
        for path, schedules in self.modules.items():
            base, mine = schedules[BASELINE], schedules[PACKED]
            count, what = len(mine.mapping.layers), f" of {_shown(path)!r}" if len(self.modules) > 1 else ""
            what += f", {count} layers and directions," if count > 1 else ""
            text += step_text(mine, base, what) + " "
            if count == 1:
                text += baseline_text(base.stages[0]) + " "
        if any(layer.delta for layer in packed.layers.values()):
            text += "Delta thresholds save nothing here, as every change is taken as sent; what they need is counted. "
        return text + "No accuracy: the file holds none."

    def ratios(self) -> pd.DataFrame:
        """A row a figure: the ratios and what they are counted from."""
        packed = self.packed
        rows = {
            "cr_disk": (packed.cr_disk, "32 bits a weight / every bit written for the matrices"),
            "cr_bits": (packed.cr_bits, "32 bits a weight / bits of the stored values, without index"),
            "cr_params": (packed.cr_params, "weights / stored values"),
            "cr_model": (packed.cr_model, "the whole model, biases and everything around at 32 bits"),
            "weights": (packed.counted_weights, "of the recurrent matrices, before anything was left out"),
            "stored values": (packed.stored_values, "of them on disk"),
            "bytes": (packed.storage_bits // 8, "on disk, values and indices"),
            "biases": (packed.rnn_bias_params, "of the recurrent layers, not compressed"),
            "other parameters": (packed.other_params, "of the model around, not compressed and not in the file"),
        }
        return pd.DataFrame([{"figure": name, "value": value, "counted": what} for name, (value, what) in rows.items()])

    def by_layer(self) -> pd.DataFrame:
        """A row a layer and direction, alone on the array: steady-state cycles, and what else `compare` says of it."""
        rows = []
        for name, schedules in self.layers.items():
            layer, (base, mine) = self.packed.layers[name], compare(schedules)
            rows.append({"layer": _shown(name), "inputs x units": f"{layer.cell} {layer.input_size} x {layer.hidden_size}",
                         "cycles, dense 16-bit": base["steady_state_cycles"], "cycles, packed": mine["steady_state_cycles"],
                         "acceleration": mine["acceleration"], "bound": mine["bound"],
                         "streamed bits a step": mine["streamed_bits_per_step"], "cr_chip": mine["cr_chip"]})
        return pd.DataFrame(rows)

    def figures(self) -> dict:
        """What a run records: ratios; of one step of every module cycles, microseconds and the acceleration; and rows of
        `compare` by module and by layer."""
        dense, mine = (sum(schedules[label].steady_state_cycles for schedules in self.modules.values())
                       for label in (BASELINE, PACKED))
        step_us = sum(schedules[PACKED].step_us for schedules in self.modules.values())
        return {row["figure"].replace(" ", "_"): row["value"] for row in self.ratios().to_dict("records")} | {
            "steady_state_cycles": mine, "step_us": step_us, "acceleration": dense / mine} | {
            kind: [{of: name} | row for name, schedules in found.items() for row in compare(schedules)]
            for kind, of, found in (("modules", "module", self.modules), ("layers", "layer", self.layers))}


def _shown(name: str) -> str:
    """A name from a file, for texts that are rendered."""
    return re.sub(r"[^\w.\- ]", "?", name)


def packed_from(path: str | Path | None) -> PackedModel:
    """`load`; None: an example, one LSTM layer with random weights under the hybrid plan that explore.ipynb begins with."""
    if path is not None:
        return load(path)
    model, signals = untrained("LSTM", 40, 128, seed=0)
    question = Question().of(model)
    return pack(model, question.plan(model, signals))


def dense_baseline(layer: PackedLayer) -> PackedLayer:
    """The layer with its matrices written out dense in 16 bits and without delta thresholds: what accelerations are against."""
    ws = {name: torch.from_numpy(np.ldexp(block.dense(), -block.frac)) for name, block in layer.blocks.items()}
    bias = {gate: np.ldexp(integers, -layer.bias_fracs[gate]) for gate, integers in layer.bias.items()}
    planned = plan_blocks(ws, Dense(), LOSSLESS_BITS)
    return with_room(planned, lambda entries: PackedLayer.from_float_bias(
        layer.cell, {name: pack_block(ws[name], entry) for name, entry in entries.items()}, bias, layer.signals, layer.tables,
        layer.acc_bits))[1]


def deploy(packed: PackedModel, spec: ArraySpec, steps: int = 20, batch: int = 1) -> Deployment:
    """Schedule every recurrent module of a packed model for `steps` steps of `batch` sequences, and each of its layers alone,
    beside dense 16-bit. ValueError for what the array cannot hold, with its name and whether it is dense 16-bit."""
    if not isinstance(packed, PackedModel):
        raise TypeError(f"deploy needs a PackedModel, as pack and load give it, got a {type(packed).__name__}")
    if not isinstance(spec, ArraySpec):
        raise TypeError(f"deploy needs an ArraySpec, as array.preset and array_of give it, got {spec!r}")
    steps = check_whole("deploy", "number of steps", steps, 1)
    batch = check_whole("deploy", "batch", batch, 1)
    dense = replace(packed, layers={name: dense_baseline(layer) for name, layer in packed.layers.items()})

    def scheduled(names, schedule):
        found = {name: {} for name in names}
        for name, (label, of) in itertools.product(names, ((BASELINE, dense), (PACKED, packed))):
            try:
                found[name][label] = schedule(of, name)
            except ValueError as error:
                raise ValueError(f"{name or 'the network'}, {label}: {error}") from error
        return found

    layers = scheduled(packed.layers, lambda of, name: schedule_layer(of.layers[name], spec, steps, batch=batch))
    modules = scheduled(packed.paths, lambda of, path: schedule_stack(of.stack(path), spec, steps, batch))
    return Deployment(packed, modules, layers)


def present_deployment(deployment: Deployment, array: str) -> None:
    """Display it: a sentence, then by module tables of cycles, energy and resources.

    array: name of the preset; where it is a device, resources are against that device's."""
    from IPython.display import Markdown, display

    display(Markdown(deployment.sentence()))
    for path, schedules in deployment.modules.items():
        if len(deployment.modules) > 1:
            display(Markdown(f"**Module {_shown(path)!r}**"))
        display(present(hardware_table(schedules), index=True))
        display(present(energy_table(schedules), index=True))
        if array in DEVICES:
            display(present(device_table(schedules, array)))
        if refused := fit_text(schedules[PACKED], array):
            display(Markdown(refused))


def present_layers(deployment: Deployment) -> None:
    """Display every layer and direction alone on the array: its figures, its regions, one step, and what its baseline is."""
    from IPython.display import Markdown, display

    display(present(deployment.by_layer()))
    for name, schedules in deployment.layers.items():
        shown, schedule = _shown(name), schedules[PACKED]
        display(Markdown(f"**Layer {shown}.** {baseline_text(schedules[BASELINE])}"))
        show(region_figure(schedules),
             f"Which processing elements take which gates of layer {shown}, and how much of a step each multiplies")
        show(gantt_figure(schedule, schedule.steps // 2), f"What runs when in one time step of layer {shown}")


def present_packed(deployment: Deployment) -> None:
    """Display what is in the file: ratios, a row a block, a row a signal."""
    from IPython.display import display

    display(present(deployment.ratios()))
    display(present(pd.DataFrame(deployment.packed.table())))
    display(present(signal_table(deployment.packed)))
