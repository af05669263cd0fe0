"""When everything runs: a step's program -> operations with start and end. Cycles are read off the schedule, nowhere else.

Model: an operation starts when all that it needs has ended and its resource is free; a resource serves in program order.
Resources are pipelined: an operation holds its resource for `busy` cycles and its result is there `latency` cycles later.
Sums lie in accumulator banks, which entries (see Instruction) take in turn. A bank serves multiplications or a drain, never
both in one cycle, and changes over in program order: each waits for the end of all earlier ones of the other kind.
A PE keeps the sum of the row it works on in its DSP: it reads an accumulator when it turns to a row (the first time, too)
and writes it back when it turns to the next, or at the end of the operation.
Assumed: a barrier per region between operations (the fullest PE counts); a drain takes one row per cycle from every PE
row, each PE column adding its sum on the way; alignment, bias and rounding belong to the activation latency; every
activation unit owns a multiplier and keeps its part of c, or of a GRU's h; a sum that is rounded without a look-up passes
the activation units as a look-up does; resident weights and the first h are in place at the start.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from workbench.array.mapping import (
    LayerMapping,
    Layout,
    candidate_layouts,
    columns_kept,
    fitting_mappings,
    least_cycles,
    map_layer,
    words_taken,
)
from workbench.array.spec import ArraySpec, ceil_div
from workbench.packed import PackedLayer

MAX_TRANSIENT = 512  # steps within which a schedule must have become periodic
MAX_PERIOD = 12  # steps per period that are looked for
SPLIT = ("multiply", "stall", "drain", "activation", "multicast", "load", "config")
BOUND_BY = {"compute": ("multiply", "stall"), "memory": ("load",), "links": ("drain", "multicast"),
            "activation": ("activation",)}
EVENTS = ("macs", "padding_macs", "weight_reads", "data_reads", "acc_reads", "acc_writes", "link_words", "activation_lookups",
          "elementwise_multiplies", "roundings", "multicast_words", "data_writes", "loaded_bits", "weight_writes")
CONFIG, FIRST_X = -2, -1  # numbers of the two operations before the first step
X_TO_PES = 0  # every program begins with the multicast of the next step's x, which the last step leaves out
# Part -> (steps back, multicast) of what it multiplies.
ARRIVES = {"ih": (1, "x to PEs"), "hh": (1, "h to PEs"), "hr": (0, "m to PEs")}


@dataclass(frozen=True)
class Operation:
    """One operation. start, end: cycles, end excluded; after: numbers of the operations whose end it waits for."""

    name: str
    kind: str
    gate: str
    region: int
    step: int
    resource: str
    start: int
    end: int
    after: tuple[int, ...]
    counts: dict[str, int]


@dataclass(frozen=True)
class Timed:
    """What the schedule adds to an instruction: cycles, events and what it needs beyond the order of its resource."""

    busy: int  # cycles for which it holds its resource
    latency: int  # cycles from then to its end
    needs: tuple[tuple[int, int], ...]  # (steps back, number in the program)
    counts: dict[str, int]
    multiply: int = 0  # cycles in which the mean PE of its region multiplies what is no padding


def _time_program(mapping: LayerMapping) -> tuple[Timed, ...]:
    """Cycles and events of every instruction."""
    spec, layer = mapping.spec, mapping.layer
    needs, counted = _needs(mapping), _slice_counts(mapping)

    def timed(n, i, needs):
        if i.kind in ("mac", "load"):
            block = mapping.blocks[i.parts[0], i.gate]
            words, macs, padding, runs = counted[n]
            padding, runs = int(padding), int(runs)
            total, taken = int(macs.sum()), words_taken(block, spec)
            accesses = int(words.sum()) * taken
            if i.kind == "load":
                bits = int(words.sum()) * block.word_bits
                return Timed(ceil_div(bits, spec.load_bits_per_cycle), 0, needs,
                             {"loaded_bits": bits, "weight_writes": accesses})
            # A word is used once it is whole: each memory word after its first holds the PE for a cycle.
            fullest = int((macs * spec.mac_ii + words * (taken - 1)).max())
            counts = {"macs": total, "padding_macs": padding, "weight_reads": accesses, "data_reads": total, "acc_reads": runs,
                      "acc_writes": runs}
            return Timed(fullest, spec.mac_latency, needs, counts, (total - padding) * spec.mac_ii // macs.size)
        if i.kind == "drain":
            block, (low, high) = mapping.blocks[i.parts[0], i.gate], i.rows
            words = int(np.clip(block.local_rows - low, 0, high - low).sum()) * block.pe_cols
            return Timed(high - low, (block.pe_cols - 1) * spec.link_cycles, needs, {"acc_reads": words, "link_words": words})
        if i.kind == "multicast":
            kept = (columns_kept(layer, mapping.layout, mapping.blocks, i.parts[0], n)[:, : i.values].sum()
                    for n in range(len(mapping.layout.regions)))
            writes = sum(int(columns) * r.rows for columns, r in zip(kept, mapping.layout.regions, strict=True))
            return Timed(ceil_div(i.values, spec.h_words_per_cycle), 0, needs,
                         {"multicast_words": i.values, "data_writes": writes})
        return Timed(ceil_div(i.values, spec.act_units) * spec.act_ii, spec.act_latency, needs, {i.event: i.values})

    return tuple(timed(n, i, needed) for n, (i, needed) in enumerate(zip(mapping.program, needs, strict=True)))


def _slice_counts(mapping):
    """Number of each mac and load -> what BlockMapping.slice_counts says of its words."""
    slices, counted = defaultdict(list), {}
    for n, i in enumerate(mapping.program):
        if i.kind in ("mac", "load"):
            slices[i.parts[0], i.gate, i.rows].append(n)
    for (part, gate, rows), numbers in slices.items():
        words = np.array([mapping.program[n].words for n in numbers])
        counts = mapping.blocks[part, gate].slice_counts(*rows, words[:, 0], words[:, 1])
        counted |= dict(zip(numbers, zip(*counts, strict=True), strict=True))
    return counted


def _needs(mapping):
    """Per instruction the (steps back, number) of those whose end it waits for. In-order resources spare all but the last
    of several that end in order."""
    program, banks = mapping.program, mapping.spec.acc_banks
    sum_drains, drains, streamed = defaultdict(list), defaultdict(list), defaultdict(list)
    named, drained_before = {}, {}
    for n, i in enumerate(program):
        if i.kind == "mac":
            # The latest entry of the same bank that is drained before this; negative: of an earlier step.
            latest = len(drains[i.region]) - 1
            drained_before[n] = latest - (latest - i.entry) % banks
            if i.chunk >= 0:
                streamed[i.region].append(n)
        elif i.kind == "drain":
            sum_drains[i.sum].append(n)
            drains[i.region].append(n)
        else:
            named[i.name] = n

    def needs(n, i):
        if i.kind == "mac":
            back, name = ARRIVES[i.parts[0]]
            yield back, named[name]
            back, entry = divmod(drained_before[n], len(drains[i.region]))
            yield -back, drains[i.region][entry]
            if i.chunk >= 0:
                yield 0, n - 1  # its load
        elif i.kind == "load":  # double buffer: the chunk before the last must be used up
            back, chunk = divmod(i.chunk - 2, len(streamed[i.region]))
            yield -back, streamed[i.region][chunk]
        elif i.kind == "drain":
            yield 0, n - 1  # its last multiplication: all earlier ones of the region end before
        elif n == X_TO_PES:  # its place in the double buffer is free once the former h has passed on the same network
            return
        else:
            yield from ((0, d) for d in (sum_drains[i.sum] if i.sum else ()))
            yield from ((0, named[name]) for name in i.takes)

    return [tuple(needs(n, i)) for n, i in enumerate(program)]


def _run(timed, resources, config_end, first_x_end, steps):
    """Starts (steps, n) of all operations, and the period (steps, cycles) into which they fall."""
    depth = max(back for op in timed for back, _ in op.needs)
    rows = []

    def run_step(step, past, leave_out_x):
        # past: rows of the steps before, latest last
        if past:
            free = {resource: past[-1][n] + timed[n].busy for n, resource in enumerate(resources)}
        else:
            free = dict.fromkeys(resources, config_end) | {resources[X_TO_PES]: first_x_end}
        row = []
        for n, op in enumerate(timed):
            if leave_out_x and n == X_TO_PES:
                row.append(-1)
                continue
            start = free[resources[n]]
            for back, m in op.needs:
                if back <= step:
                    end = (past[-back][m] if back else row[m]) + timed[m].busy + timed[m].latency
                else:
                    end = first_x_end if (m, back - step) == (X_TO_PES, 1) else config_end
                start = max(start, end)
            row.append(start)
            free[resources[n]] = start + op.busy
        return row

    period = None
    while period is None:
        if len(rows) == MAX_TRANSIENT:
            raise RuntimeError(f"the schedule is not periodic after {MAX_TRANSIENT} steps")
        rows.append(run_step(len(rows), rows, leave_out_x=False))
        period = _period(rows, depth)
    length, advance = period
    while len(rows) < steps - 1:  # the past that matters repeats, so everything repeats
        rows.append([start + advance for start in rows[-length]])
    rows = rows[: steps - 1]
    rows.append(run_step(steps - 1, rows, leave_out_x=True))
    return np.array(rows), period


def _period(rows, depth):
    """(steps, cycles) if the last `depth` rows repeat earlier ones, all moved by the same number of cycles."""
    for length in range(1, min(MAX_PERIOD, len(rows) - depth) + 1):
        moved = np.subtract(rows[-depth:], rows[len(rows) - depth - length : len(rows) - length])
        if (moved == moved[0, 0]).all():
            return length, int(moved[0, 0])
    return None


@dataclass(frozen=True)
class Schedule:
    """The operations of a sequence. candidates: what the scheduler compared, a row each: layout, least_cycles (bound by
    multiplications), and where it was scheduled steady_state_cycles and cr_chip."""

    mapping: LayerMapping
    steps: int
    timed: tuple[Timed, ...]
    starts: np.ndarray  # (steps, instructions) cycles; -1 where the last step has no next x
    period: tuple[int, int]  # (steps, cycles) once periodic
    candidates: tuple[dict, ...] = ()

    @cached_property
    def ends(self) -> np.ndarray:
        """(steps, instructions) cycles."""
        ends = self.starts + np.array([op.busy + op.latency for op in self.timed])
        return np.where(self.starts < 0, -1, ends)

    @property
    def cycles(self) -> int:
        """Of the whole sequence, configuration included: the last end."""
        return int(self.ends.max())

    @property
    def steady_state_cycles(self) -> float:
        """Cycles from one step's h in the PEs to the next step's, once periodic (mean over a period of several steps)."""
        return self.period[1] / self.period[0]

    @property
    def first_step_latency(self) -> int:
        """Cycles from the start, configuration and first x included, until the first h is in the PEs."""
        return int(self.ends[0, -1])

    @property
    def initial_load_cycles(self) -> int:
        """Cycles that the loader takes once, before the sequence, for the resident weights; in no other figure."""
        bits = self.mapping.on_chip_bits - self.mapping.streamed_bits
        return ceil_div(bits, self.mapping.spec.load_bits_per_cycle)

    @property
    def _first_x_end(self):
        return self.mapping.spec.config_cycles + self.timed[X_TO_PES].busy

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """All operations: configuration, the first x, then step by step in program order."""
        config_end, width, last = self.mapping.spec.config_cycles, len(self.timed), self.steps - 1

        def number(step, n):
            if step < 0:
                return 1 if (step, n) == (-1, X_TO_PES) else 0
            return 2 + step * width + n - (step == last)  # the last step has no next x

        found = [Operation("configuration", "config", "", -1, -1, "config", 0, config_end, (), {}),
                 Operation("x to PEs", "multicast", "", -1, -1, "network", config_end, self._first_x_end, (0,),
                           self.timed[X_TO_PES].counts)]
        for step in range(self.steps):
            for n, (i, op) in enumerate(zip(self.mapping.program, self.timed, strict=True)):
                if self.starts[step, n] >= 0:
                    after = tuple(sorted({number(step - back, m) for back, m in op.needs}))
                    found.append(Operation(i.name, i.kind, i.gate, i.region, step, i.resource, int(self.starts[step, n]),
                                           int(self.ends[step, n]), after, op.counts))
        return tuple(found)

    def table(self, step: int | None = None) -> list[dict]:
        """The operations as rows, all or those of one step; step -1 holds the configuration and the first x."""
        return [asdict(op) for op in self.operations if step is None or op.step == step]

    def to_json(self) -> str:
        return json.dumps({"layout": self.mapping.layout.name, "spec": asdict(self.mapping.spec), "cycles": self.cycles,
                           "steps": self.steps, "operations": self.table()})

    def counts(self) -> dict[str, int]:
        """Events of the whole sequence (EVENTS)."""
        total = dict.fromkeys(EVENTS, 0)
        for op in self.timed:
            for event, count in op.counts.items():
                total[event] += count * self.steps
        return total

    def split(self) -> dict[str, int]:
        """The total's cycles by what the critical path waits for, walked back from the last end; sums to `cycles`.

        A mac operation's cycles are multiply as far as the mean PE of its region multiplies what is no padding, stall beyond
        (imbalance, padding, further memory words, pipeline latency). Element-wise operations count as activation.
        """
        split = dict.fromkeys(SPLIT, 0)
        step, n = (int(v) for v in np.unravel_index(self.ends.argmax(), self.ends.shape))
        boundary = self.cycles
        while n not in (CONFIG, FIRST_X):
            kind, cycles = self.mapping.program[n].kind, boundary - int(self.starts[step, n])
            if kind == "mac":
                split["multiply"] += self.timed[n].multiply
                split["stall"] += cycles - self.timed[n].multiply
            else:
                split["activation" if kind == "elementwise" else kind] += cycles
            boundary = int(self.starts[step, n])
            step, n = self._released_by(step, n)
        split["multicast"] += boundary - self.mapping.spec.config_cycles
        split["config"] += self.mapping.spec.config_cycles
        return split

    def _released_by(self, step, n):
        """(step, number) of the operation whose end, or whose leaving the resource, let this one start."""
        start = self.starts[step, n]
        for back, m in self.timed[n].needs:
            if back <= step and self.ends[step - back, m] == start:
                return step - back, m
        program = self.mapping.program
        same = [m for m, i in enumerate(program) if i.resource == program[n].resource]
        place = same.index(n)
        step, m = (step, same[place - 1]) if place else (step - 1, same[-1])
        if step >= 0 and self.starts[step, m] >= 0 and self.starts[step, m] + self.timed[m].busy == start:
            return step, m
        return -1, FIRST_X if start == self._first_x_end else CONFIG

    @property
    def bound(self) -> str:
        """What the sequence's cycles mostly wait for: compute, memory (the loader), links (drain, multicast) or activation."""
        split = self.split()
        return max(BOUND_BY, key=lambda name: sum(split[kind] for kind in BOUND_BY[name]))

    def utilisation(self) -> np.ndarray:
        """(rows, cols): multiply-accumulates that each PE issues per cycle, those of padding included."""
        return self.mapping.macs * self.steps / self.cycles


def schedule_mapping(mapping: LayerMapping, steps: int) -> Schedule:
    """The schedule of one mapping over `steps` time steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"a schedule needs a whole number of steps, at least 1, got {steps!r}")
    timed = _time_program(mapping)
    config_end = mapping.spec.config_cycles
    starts, period = _run(timed, [i.resource for i in mapping.program], config_end, config_end + timed[X_TO_PES].busy, steps)
    return Schedule(mapping, steps, timed, starts, period)


def schedule_layer(layer: PackedLayer, spec: ArraySpec, steps: int, layout: Layout | None = None) -> Schedule:
    """Schedule one layer over `steps` time steps.

    Without a layout the candidate with the fewest steady-state cycles is taken; one whose multiplications alone take as
    many cycles as the best so far is not scheduled (exact: it cannot win). What the array cannot hold or does not map
    raises ValueError with the numbers.
    """
    if not isinstance(layer, PackedLayer) or not isinstance(spec, ArraySpec):
        raise TypeError("schedule_layer needs a PackedLayer and an ArraySpec, got "
                        f"{type(layer).__name__} and {type(spec).__name__}")
    layouts = [layout] if layout is not None else sorted(
        candidate_layouts(layer, spec), key=lambda candidate: least_cycles(layer, spec, candidate))
    best, rows = None, []
    for candidate in layouts:
        bound = least_cycles(layer, spec, candidate)
        if best is not None and bound >= best.steady_state_cycles:
            rows.append({"layout": candidate.name, "least_cycles": bound})
            continue
        for mapping in [map_layer(layer, spec, layout)] if layout is not None else fitting_mappings(layer, spec, candidate):
            schedule = schedule_mapping(mapping, steps)
            rows.append({"layout": mapping.layout.name, "least_cycles": bound, "cr_chip": mapping.cr_chip,
                         "steady_state_cycles": schedule.steady_state_cycles})
            if best is None or schedule.steady_state_cycles < best.steady_state_cycles:
                best = schedule
    return replace(best, candidates=tuple(rows))


def schedule_layers(layers: dict[str, PackedLayer], spec: ArraySpec, steps: int) -> dict[str, Schedule]:
    """Label -> schedule_layer of that layer, each with its own best layout."""
    return {label: schedule_layer(layer, spec, steps) for label, layer in layers.items()}
