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
ABSENT = -1  # the start of an instruction whose step of the sequence does not exist
# Part -> (steps of the sequence back, multicast) of what it multiplies.
ARRIVES = {"ih": (0, "x to PEs"), "hh": (1, "h to PEs"), "hr": (0, "m to PEs")}


@dataclass(frozen=True)
class Operation:
    """One operation. step: of the program; -1 holds the configuration and the first x. start, end: cycles, end excluded;
    after: numbers of the operations whose end it waits for. item: sequence of the batch."""

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
    item: int = 0


@dataclass(frozen=True)
class Timed:
    """What the schedule adds to an instruction: cycles, events and what it needs beyond the order of its resource."""

    busy: int  # cycles for which it holds its resource
    latency: int  # cycles from then to its end
    needs: tuple[tuple[int, int], ...]  # (steps of the program back, number in it)
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
    sum_drains, drains, macs, uses = (defaultdict(list) for _ in range(4))
    named, loads, drained_before, last_mac = {}, {}, {}, {}
    for n, i in enumerate(program):
        if i.kind == "mac":
            # The latest entry of the same bank that is drained before this; negative: of an earlier step.
            latest = len(drains[i.region]) - 1
            drained_before[n] = latest - (latest - i.entry) % banks
            macs[i.region].append(n)
            if i.chunk >= 0:
                uses[i.region, i.chunk].append(n)
        elif i.kind == "drain":
            sum_drains[i.item, i.sum].append(n)
            drains[i.region].append(n)
            last_mac[n] = next(m for m in reversed(macs[i.region]) if (program[m].entry - i.entry) % banks == 0)
        elif i.kind == "load":
            loads[i.region, i.chunk] = n
        else:
            named[i.item, i.name] = n

    def since(i, m, steps=0):
        """What program[m] did for the same step of the sequence as i, or some steps before."""
        return steps + i.lag - program[m].lag, m

    def needs(n, i):
        if i.kind == "mac":
            steps, name = ARRIVES[i.parts[0]]
            yield since(i, named[i.item, name], steps)
            back, entry = divmod(drained_before[n], len(drains[i.region]))
            yield -back, drains[i.region][entry]
            if i.chunk >= 0:
                yield 0, loads[i.region, i.chunk]
        elif i.kind == "load":  # double buffer: the chunk before the last must be used up
            back, chunk = divmod(i.chunk - 2, sum(region == i.region for region, _ in loads))
            yield -back, uses[i.region, chunk][-1]
        elif i.kind == "drain":
            yield 0, last_mac[n]  # of its bank: all earlier ones end before
        elif i.name == "x to PEs":  # its place in the double buffer is free once the former h has passed on the same network
            return
        else:
            yield from (since(i, m) for m in (sum_drains[i.item, i.sum] if i.sum else ()))
            yield from (since(i, named[i.item, name]) for name in i.takes)

    return [tuple(needs(n, i)) for n, i in enumerate(program)]


def _run(timed, program, config_end, steps):
    """Starts (steps of the program, n) of all operations, those of step -1 first, and the period (steps, cycles) into which
    they fall."""
    depth, lags = max(back for op in timed for back, _ in op.needs), [i.lag for i in program]
    resources, whole = [i.resource for i in program], 1 + max(lags)  # rows before which some instructions have no step yet

    def run_step(past, free, end):
        # past: the rows before, latest last; end: of the steps of the sequence
        row, step = [], len(past) - 1
        for n, op in enumerate(timed):
            if not 0 <= step - lags[n] < end:
                row.append(ABSENT)
                continue
            start = free[resources[n]]
            for back, m in op.needs:
                needed = (past[-back][m] if back else row[m]) if back <= len(past) else ABSENT
                if needed != ABSENT:  # else it is in place
                    start = max(start, needed + timed[m].busy + timed[m].latency)
            row.append(start)
            free[resources[n]] = start + op.busy
        return row

    rows, frees, period = [], [dict.fromkeys(resources, config_end)], None
    while period is None:
        if len(rows) == whole + MAX_TRANSIENT:
            raise RuntimeError(f"the schedule is not periodic after {MAX_TRANSIENT} steps")
        frees.append(dict(frees[-1]))
        rows.append(run_step(rows, frees[-1], float("inf")))
        period = _period(rows[whole:], depth)
    length, advance = period
    until = steps + 1 + min(lags)  # rows in which no instruction is beyond its last step
    while len(rows) < until:  # the past that matters repeats, so everything repeats
        rows.append([start + advance for start in rows[-length]])
        frees.append({resource: free + advance for resource, free in frees[-length].items()})
    rows, free = rows[:until], frees[until]
    while len(rows) < steps + whole:
        rows.append(run_step(rows, free, steps))
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
    rows: np.ndarray  # (1 + steps of the program, instructions) starts in cycles, of step -1 first; ABSENT where there is none
    period: tuple[int, int]  # (steps, cycles) once periodic
    candidates: tuple[dict, ...] = ()

    @property
    def starts(self) -> np.ndarray:
        """(steps of the program, instructions) cycles; -1 where there is none: the last step has no next x."""
        return self.rows[1:]

    @cached_property
    def ends(self) -> np.ndarray:
        """(steps of the program, instructions) cycles."""
        return self._ends[1:]

    @cached_property
    def _ends(self):
        ends = self.rows + np.array([op.busy + op.latency for op in self.timed])
        return np.where(self.rows == ABSENT, ABSENT, ends)

    @property
    def cycles(self) -> int:
        """Of the whole sequence, configuration included: the last end."""
        return int(self.ends.max())

    @property
    def steady_state_cycles(self) -> float:
        """Cycles from one step's h in the PEs, of all items, to the next step's, once periodic (mean over a period of several
        steps)."""
        return self.period[1] / self.period[0]

    @property
    def cycles_per_item(self) -> float:
        """Steady-state cycles by which one more step of one item costs; the latency of a step is longer in a batch."""
        return self.steady_state_cycles / self.mapping.batch

    @property
    def first_step_latency(self) -> int:
        """Cycles from the start, configuration and first x included, until the first h of all items is in the PEs."""
        return int(self.ends[0, -1])

    @property
    def initial_load_cycles(self) -> int:
        """Cycles that the loader takes once, before the sequence, for the resident weights; in no other figure."""
        return ceil_div(self.mapping.initial_bits, self.mapping.spec.load_bits_per_cycle)

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """All operations: configuration, the first x, then step by step in program order."""
        found = [Operation("configuration", "config", "", -1, -1, "config", 0, self.mapping.spec.config_cycles, (), {})]
        numbers = {}  # (row, number in the program) -> number of the operation
        for row, starts in enumerate(self.rows.tolist()):
            for n, (i, op, start) in enumerate(zip(self.mapping.program, self.timed, starts, strict=True)):
                if start != ABSENT:
                    after = {numbers.get((row - back, m), 0) for back, m in op.needs} or ({0} if row == 0 else ())
                    numbers[row, n] = len(found)
                    found.append(Operation(i.name, i.kind, i.gate, i.region, row - 1, i.resource, start,
                                           int(self._ends[row, n]), tuple(sorted(after)), op.counts, i.item))
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
        place = tuple(int(v) for v in np.unravel_index(self._ends.argmax(), self._ends.shape))
        boundary = self.cycles
        while place is not None:
            n, start = place[1], int(self.rows[place])
            kind, cycles = self.mapping.program[n].kind, boundary - start
            if kind == "mac":
                split["multiply"] += self.timed[n].multiply
                split["stall"] += cycles - self.timed[n].multiply
            else:
                split["activation" if kind == "elementwise" else kind] += cycles
            boundary, place = start, self._released_by(*place)
        split["config"] += boundary
        return split

    def _released_by(self, row, n):
        """(row, number) of the operation whose end, or whose leaving the resource, let this one start; None: the
        configuration."""
        start = self.rows[row, n]
        for back, m in self.timed[n].needs:
            if back <= row and self._ends[row - back, m] == start:
                return row - back, m
        program = self.mapping.program
        same = [m for m, i in enumerate(program) if i.resource == program[n].resource]
        earlier = [(row, m) for m in same if m < n] + [(row - 1, m) for m in same if row]
        return next((place for place in earlier if self.rows[place] != ABSENT
                     and self.rows[place] + self.timed[place[1]].busy == start), None)

    @property
    def bound(self) -> str:
        """What the sequence's cycles mostly wait for: compute, memory (the loader), links (drain, multicast) or activation."""
        split = self.split()
        return max(BOUND_BY, key=lambda name: sum(split[kind] for kind in BOUND_BY[name]))

    def utilisation(self) -> np.ndarray:
        """(rows, cols): multiply-accumulates that each PE issues per cycle, those of padding included."""
        return self.mapping.macs * self.mapping.batch * self.steps / self.cycles


def schedule_mapping(mapping: LayerMapping, steps: int) -> Schedule:
    """The schedule of one mapping over `steps` time steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"a schedule needs a whole number of steps, at least 1, got {steps!r}")
    timed = _time_program(mapping)
    rows, period = _run(timed, mapping.program, mapping.spec.config_cycles, steps)
    return Schedule(mapping, steps, timed, rows, period)


def schedule_layer(layer: PackedLayer, spec: ArraySpec, steps: int, layout: Layout | None = None,
                   batch: int = 1) -> Schedule:
    """Schedule one layer over `steps` time steps of `batch` sequences side by side.

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
        bound = batch * least_cycles(layer, spec, candidate)
        if best is not None and bound >= best.steady_state_cycles:
            rows.append({"layout": candidate.name, "least_cycles": bound})
            continue
        for mapping in ([map_layer(layer, spec, layout, batch=batch)] if layout is not None
                        else fitting_mappings(layer, spec, candidate, batch)):
            schedule = schedule_mapping(mapping, steps)
            rows.append({"layout": mapping.layout.name, "least_cycles": bound, "cr_chip": mapping.cr_chip,
                         "steady_state_cycles": schedule.steady_state_cycles})
            if best is None or schedule.steady_state_cycles < best.steady_state_cycles:
                best = schedule
    return replace(best, candidates=tuple(rows))


def schedule_layers(layers: dict[str, PackedLayer], spec: ArraySpec, steps: int) -> dict[str, Schedule]:
    """Label -> schedule_layer of that layer, each with its own best layout."""
    return {label: schedule_layer(layer, spec, steps) for label, layer in layers.items()}
