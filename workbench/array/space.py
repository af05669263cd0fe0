"""The design space: one layer on many arrays in one call, every figure exactly that of schedule_layer at each point.

Points that differ only in TIMING fields share their mappings and programs: they are scheduled together, by the rules of
schedule.py on arrays (points,) in place of integers. Every other field changes what lies where, so each of its values makes
a group of its own.
"""

from collections import defaultdict
from dataclasses import asdict, fields, replace
from itertools import product
from types import SimpleNamespace

import numpy as np

from workbench.array.cost import energy, resources
from workbench.array.mapping import (
    LayerMapping,
    candidate_layouts,
    least_cycles,
    least_loaded_bits,
    map_blocks,
    map_layer,
    sized_layouts,
    takes_multicast,
    units_of,
)
from workbench.array.schedule import Schedule, beats, events, run_points, schedule_layer, time_program
from workbench.array.spec import GROUP, ArraySpec, ceil_div, in_step
from workbench.checks import check_whole
from workbench.fixedpoint import QFormat
from workbench.packed import PackedLayer, PackedSparse

# Fields that change cycles alone, never what lies where or the program.
TIMING = ("clock_mhz", "mac_latency", "link_cycles", "h_words_per_cycle", "act_units", "act_latency", "act_ii",
          "load_bits_per_cycle", "config_cycles")
PLACING = ("rows", "cols", "acc_depth")  # all that the places of the words depend on, beside the weights
FIGURES = ("steady_state_cycles", "first_step_latency", "cycles", "energy_low_nj", "energy_high_nj", "dsp", "bram36",
           "lut_low", "lut_high", "ff_low", "ff_high")
AT_ONCE = 512  # points that are scheduled together, which bounds the memory
_NO_TIMING = {name: getattr(ArraySpec(), name) for name in TIMING}
STORED = ("values", "vectors", "left", "right")  # fields of packed blocks that hold the stored integers


def grid_points(**axes) -> dict[str, np.ndarray]:
    """Every combination of the values of the axes, as points for sweep_space; the last axis changes fastest."""
    if not axes:
        raise ValueError("grid_points needs the values of one axis at least, got none")
    values = {name: np.asarray(list(values)) for name, values in axes.items()}
    _check_columns("grid_points", values)
    combined = np.array(list(product(*values.values())), dtype=np.int64).reshape(-1, len(axes))
    return dict(zip(axes, combined.T, strict=True))


def scaled_points(most: int = 32, **axes) -> dict[str, np.ndarray]:
    """Arrays of up to most x most PEs with all else in_step. axes: further fields, as grid_points takes them."""
    sides = range(GROUP, most + 1, GROUP)
    points = grid_points(rows=sides, cols=sides, **axes)
    return points | in_step(points["rows"], points["cols"])


def with_weight_bits(layer: PackedLayer, bits: int) -> PackedLayer:
    """The layer with its weights stored in `bits` bits: the same range, more or fewer fraction bits, rounded half up.

    The supports stay: a weight of a sparse block that would become zero keeps the smallest magnitude. Formats of the signals
    stay. Cycles, events and resources depend on the width and the supports alone; what accuracy is left, this does not say.
    """

    def at(values, shift, kept):
        moved = values << shift if shift >= 0 else (values + (1 << (-shift - 1))) >> -shift
        return np.where(kept & (moved == 0), np.sign(values), moved)

    blocks = {}
    for name, block in layer.blocks.items():
        more = bits - block.fmt.bits
        fmt = QFormat(bits, block.fmt.frac + more, block.fmt.signed)
        stored = {field: np.clip(at(getattr(block, field), more, isinstance(block, PackedSparse)), fmt.min, fmt.max)
                  for field in STORED if hasattr(block, field)}
        blocks[name] = replace(block, fmt=fmt, **stored)
    moved = replace(layer, blocks=blocks, bias={name: 0 * bias for name, bias in layer.bias.items()})
    return replace(moved, bias={name: at(bias, moved.bias_fracs[name] - layer.bias_fracs[name], False)
                                for name, bias in layer.bias.items()})


def sweep_space(layer: PackedLayer, points: dict, spec: ArraySpec | None = None, steps: int = 100) -> dict[str, np.ndarray]:
    """Schedule a layer at every point, over `steps` time steps, each with its best layout.

    points: name -> whole numbers (n,): fields of ArraySpec, and `weight_bits`, the stored width of all weights
    (with_weight_bits). What is not named is as in `spec` (default: ArraySpec()). Returned: the points' own columns, `layout`,
    `fits`, `reason`, and FIGURES as schedule_layer, energy and resources give them (of the whole sequence: cycles and energy;
    step_us: steady-state cycles over the clock). A point at which the layer does not fit has NaN figures and its reason.
    """
    spec, points = ArraySpec() if spec is None else spec, _checked(points)
    steps = check_whole("sweep_space", "number of steps", steps, 1)
    number = len(next(iter(points.values())))
    found = {name: np.full(number, np.nan) for name in FIGURES}
    found |= {name: np.full(number, "", dtype=object) for name in ("layout", "reason")}
    groups = defaultdict(lambda: defaultdict(list))  # (weight bits, PLACING) -> specification without TIMING -> points
    for n, values in enumerate(zip(*(column.tolist() for column in points.values()), strict=True)):
        changes = dict(zip(points, values, strict=True))
        bits = changes.pop("weight_bits", None)
        try:
            at = spec.with_(**changes)
        except ValueError as error:
            found["reason"][n] = str(error)
        else:
            groups[bits, *(getattr(at, name) for name in PLACING)][at.with_(**_NO_TIMING)].append(n)
    timing, layers = _Timing(points, spec), {None: layer}
    for (bits, *_), of_placing in groups.items():
        try:
            layers[bits] = layers.get(bits) or with_weight_bits(layer, bits)
        except ValueError as error:
            found["reason"][[n for numbers in of_placing.values() for n in numbers]] = str(error)
        else:
            _sweep_placing(layers[bits], of_placing, timing, steps, found)
    return points | found | {"step_us": found["steady_state_cycles"] / points.get("clock_mhz", spec.clock_mhz),
                             "fits": found["reason"] == ""}


def smallest_array(layers: dict[str, PackedLayer], at_most: float, figure: str = "step_us", points: dict | None = None,
                   spec: ArraySpec | None = None, steps: int = 100) -> list[dict]:
    """Of each layer the array with the fewest PEs, of these with the fewest BRAM36, on which a figure of sweep_space (by
    default the microseconds of a step) is at most so much: a row a label with `pes`, `meets` and the columns of sweep_space.

    points: to choose from, as sweep_space takes them (default: scaled_points()). Where no point meets the limit, the row is the
    one that comes nearest; where the layer fits nowhere, ValueError has the first reason.
    """
    points = _checked(scaled_points() if points is None else points)
    spec = ArraySpec() if spec is None else spec
    if figure not in (*FIGURES, "step_us"):
        raise ValueError(f"smallest_array knows the figures {', '.join((*FIGURES, 'step_us'))}, got {figure!r}")
    if not at_most > 0:
        raise ValueError(f"smallest_array needs a limit above 0 for {figure}, got {at_most}")
    sides = (points.get("rows", spec.rows), points.get("cols", spec.cols))
    pes = np.broadcast_to(np.multiply(*sides), next(iter(points.values())).shape)
    return [{"label": label} | _smallest(label, layer, at_most, figure, points, pes, spec, steps)
            for label, layer in layers.items()]


def faster_part(schedule: Schedule) -> Schedule | None:
    """The schedule of the same layer on a part of its array where a step takes fewer cycles: PE rows or columns are halved (in
    whole groups) as long as that helps. None where no halving does; another part may still be faster by a little.

    A layout spans all PEs, and a small layer waits for its links on a large array. Whoever compares with it should compare
    with the part, on which it could run as well. ValueError for a schedule of several layers, of parts of one, or in which
    zeros are skipped.
    """
    mapping = schedule.mapping
    whole = isinstance(mapping, LayerMapping) and mapping.parts == {part for part, _ in mapping.layer.products}
    if not whole or schedule.by_row:
        raise ValueError(f"faster_part needs the schedule of one whole layer without skipped zeros, got {schedule!r}")
    best = schedule
    while True:
        spec, found = best.mapping.spec, []
        for name in ("rows", "cols"):
            if (half := getattr(spec, name) // 2 // GROUP * GROUP) >= GROUP:
                part = spec.with_(**{name: half})
                part = part.with_(h_words_per_cycle=min(part.h_words_per_cycle, part.cols))
                try:
                    found.append(schedule_layer(mapping.layer, part, schedule.steps, batch=mapping.batch))
                except ValueError:  # the part does not hold it
                    continue
        fastest = min(found, key=lambda of: of.steady_state_cycles, default=best)
        if fastest.steady_state_cycles >= best.steady_state_cycles:
            return None if best is schedule else best
        best = fastest


def _smallest(label, layer, at_most, figure, points, pes, spec, steps):
    reasons, bounds = [], {}

    def points_of(count):
        return {name: values[pes == count] for name, values in points.items()}

    def nearest_of(count):
        space = sweep_space(layer, points_of(count), spec, steps)
        if not space["fits"].any():
            reasons.append(space["reason"][0])
            return None
        meets = space[figure] <= at_most
        best = np.lexsort((space[figure], np.where(meets, space["bram36"], np.inf), ~meets))[0]
        return {"pes": count, "meets": bool(meets.any())} | {
            name: getattr(value, "tolist", lambda value=value: value)()
            for name, value in ((name, values[best]) for name, values in space.items())}

    found = []
    for count in np.unique(pes).tolist():
        bounds[count] = _least(layer, points_of(count), spec, figure)
        if bounds[count] <= at_most and (row := nearest_of(count)):
            if row["meets"]:
                return row
            found.append(row)
    # None meets the limit. The largest arrays come nearest in general, so that small ones are seldom scheduled.
    for count in sorted((count for count in bounds if bounds[count] > at_most), key=bounds.get):
        if found and bounds[count] > min(row[figure] for row in found):
            break
        if row := nearest_of(count):
            found.append(row)
    if not found:
        raise ValueError(f"{label} fits none of {pes.size} arrays: {reasons[0]}")
    return min(found, key=lambda row: (row[figure], row["pes"]))


def _least(layer, points, spec, figure) -> float:
    """A bound that a figure of a step stays above at every point (least_cycles); of other figures none is known."""
    if figure not in ("step_us", "steady_state_cycles"):
        return 0.0
    bounds = []
    for values in zip(*(column.tolist() for column in points.values()), strict=True):
        try:
            at = spec.with_(**{name: value for name, value in zip(points, values, strict=True) if name != "weight_bits"})
            cycles = min(least_cycles(layer, at, layout) for layout in candidate_layouts(layer, at))
        except ValueError:  # sweep_space has the reason
            continue
        bounds.append(cycles / at.clock_mhz if figure == "step_us" else cycles)
    return min(bounds, default=np.inf)


class _Timing:
    """The TIMING fields of every point."""

    def __init__(self, points, spec):
        self.fields = {name: points.get(name, getattr(spec, name)) for name in TIMING}

    def at(self, name, numbers):
        """A field of the points of these numbers, or what it is at all points."""
        values = self.fields[name]
        return values[numbers] if isinstance(values, np.ndarray) else values

    def of(self, spec, numbers):
        """A specification whose TIMING fields are arrays (points,)."""
        return SimpleNamespace(**asdict(spec) | {name: self.at(name, numbers) for name in TIMING})


def _checked(points):
    """The points as columns of int64."""
    columns = {name: np.asarray(values) for name, values in points.items()}
    known = [f.name for f in fields(ArraySpec)] + ["weight_bits"]
    if unknown := [name for name in columns if name not in known]:
        raise ValueError(f"sweep_space knows the fields {', '.join(known)}, got {', '.join(unknown)}")
    if len({column.shape for column in columns.values()}) != 1 or next(iter(columns.values())).ndim != 1:
        raise ValueError("sweep_space needs columns of one length, got "
                         + (", ".join(f"{name} {column.shape}" for name, column in columns.items()) or "none"))
    _check_columns("sweep_space", columns)
    return columns


def _check_columns(who, columns):
    if wrong := [name for name, column in columns.items() if column.size and column.dtype.kind not in "iu"]:
        raise ValueError(f"{who} needs whole numbers, got {columns[wrong[0]].dtype} for {wrong[0]}")


def _sweep_placing(layer, groups, timing, steps, found):
    """Points with the same places of words: the candidates that schedule_layer goes through, those that may win first."""
    spec, layouts, mapped, known = next(iter(groups)), {}, {}, {}
    try:
        for layout in sorted(candidate_layouts(layer, spec), key=lambda layout: least_cycles(layer, spec, layout)):
            layouts.setdefault(units_of(layer, spec, layout), layout)
    except ValueError as error:  # as of too few accumulators for a transform, at all these points
        found["reason"][[n for numbers in groups.values() for n in numbers]] = str(error)
        return
    for layout in layouts.values():
        mapped[layout] = map_blocks(layer, spec, layout, known=known)
    for spec, numbers in groups.items():
        for low in range(0, len(numbers), AT_ONCE):
            _sweep_group(layer, spec, np.array(numbers[low : low + AT_ONCE]), mapped, timing, steps, found)


def _sweep_group(layer, spec, points, mapped, timing, steps, found):
    """Points whose specifications differ in TIMING fields alone. mapped: layout -> blocks, in the order of schedule_layer."""
    candidates = [(sized, blocks) for layout, blocks in mapped.items()
                  for sized in sized_layouts(layer, spec, layout, blocks)]
    bandwidth, words = (timing.at(name, points) for name in ("load_bits_per_cycle", "h_words_per_cycle"))
    bounds = np.array([np.where(
        takes_multicast(layout.regions, words + 0 * bandwidth),
        np.maximum(least_cycles(layer, spec, layout), ceil_div(least_loaded_bits(layer, spec, layout, blocks), bandwidth)),
        np.inf) for layout, blocks in candidates])
    fewest, rank, refusals, mappings = np.full(points.size, np.inf), np.full(points.size, -1), {}, {}
    for n in np.argsort(bounds.reshape(len(candidates), -1).mean(axis=1), kind="stable").tolist():
        some = np.flatnonzero(beats(bounds[n], fewest, n < rank))
        if not some.size:
            continue
        try:
            mapping = map_layer(layer, spec, *candidates[n])
        except ValueError as error:
            refusals[n] = str(error)
            continue
        mappings[n] = replace(mapping, spec=timing.of(spec, points[some]))
        timed = time_program(mappings[n])
        figures = run_points(timed, mappings[n], some.size, steps)
        wins = beats(figures[0], fewest[some], n < rank[some])
        fewest[some[wins]], rank[some[wins]] = figures[0][wins], n
        spent = energy(events(timed, steps))
        for name, values in zip(FIGURES, (*figures, spent.low_pj / 1000, spent.high_pj / 1000), strict=False):
            found[name][points[some[wins]]] = np.broadcast_to(values, some.shape)[wins]
        found["layout"][points[some[wins]]] = mapping.layout.name
    found["reason"][points[rank < 0]] = refusals[min(refusals)] if refusals else ""
    units, links = (np.broadcast_to(timing.at(name, points), points.shape) for name in ("act_units", "link_cycles"))
    for n, act_units, link_cycles in set(zip(rank.tolist(), units.tolist(), links.tolist(), strict=True)):
        if n >= 0:  # all else that resources depend on is that of the group
            used = resources(replace(mappings[n], spec=spec.with_(act_units=act_units, link_cycles=link_cycles)))
            some = points[(rank == n) & (units == act_units) & (links == link_cycles)]
            for name, value in zip(FIGURES[5:], (used.dsp, used.bram36, *used.lut, *used.ff), strict=True):
                found[name][some] = value
