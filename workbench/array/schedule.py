"""When everything runs: a step's program -> operations with start and end. Cycles are read off the schedule, nowhere else.

Model: an operation starts when all that it needs has ended and its resource is free; a resource serves in program order.
Resources are pipelined: an operation holds its resource for `busy` cycles and its result is there `latency` cycles later.
Sums lie in accumulator banks, which entries (see Instruction) take in turn. A bank serves multiplications or a drain, never
both in one cycle, and changes over in program order: each waits for the end of all earlier ones of the other kind.
A PE keeps the sum of the row it works on in its DSP: it reads an accumulator when it turns to a row (the first time, too)
and writes it back when it turns to the next, or at the end of the operation.
Assumed: a barrier per region between operations (the fullest PE counts); a drain takes one row per cycle from every PE row,
each PE column adding its sum on the way; a gather (fft datapath) does so from both ends to one PE column, and what is sent
from there leaves so late that no two words meet on a link; alignment, bias and rounding belong to the activation latency;
every activation unit owns a multiplier and keeps its part of c, or of a GRU's h; a sum that is rounded without a look-up
passes the activation units as a look-up does; resident weights and the first h are in place at the start.
"""

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property

import numpy as np

from workbench.array.mapping import (
    COPIES,
    LayerMapping,
    Layout,
    SideBySide,
    candidate_layouts,
    check_batch,
    check_layer,
    constant_taken,
    inverse_columns,
    is_transformed,
    kept_at_edge,
    least_cycles,
    least_loaded_bits,
    map_blocks,
    map_layer,
    memories_of,
    multicast_cycles,
    network_words,
    part_of,
    sized_layouts,
    takers,
    takes_multicast,
    transform_cycles,
    transformed_tiles,
    units_of,
    words_taken,
)
from workbench.array.skipping import work_of
from workbench.array.spec import ArraySpec, ceil_div
from workbench.checks import check_whole
from workbench.packed import PackedLayer
from workbench.spectrum import real_operations

MAX_TRANSIENT = 8192  # steps within which a schedule must have become periodic
MAX_PERIOD = 12  # steps per period that are looked for
SPLIT = ("multiply", "stall", "drain", "activation", "multicast", "load", "config")
BOUND_BY = {"compute": ("multiply", "stall"), "memory": ("load",), "links": ("drain", "multicast"),
            "activation": ("activation",)}
EVENTS = ("macs", "padding_macs", "weight_reads", "data_reads", "acc_reads", "acc_writes", "link_words", "activation_lookups",
          "elementwise_multiplies", "roundings", "multicast_words", "data_writes", "loaded_bits", "weight_writes",
          "skipped_macs", "transform_operations")
# What other kinds of operation count as in the split.
COUNTED_AS = {"elementwise": "activation", "transform": "mac", "inverse": "mac", "gather": "drain", "send": "drain"}
PRODUCT_BOUND_BY = {"mac": "compute", "load": "memory", "drain": "links"}  # kind, as counted -> what a product is bound by
ABSENT = -1  # the start of an instruction whose step of the sequence does not exist
# Part -> (steps of the sequence back, multicast) of what it multiplies; what V of a low-rank block gives is of the same step.
ARRIVES = {"ih": (0, "x to PEs"), "hh": (1, "h to PEs"), "hr": (0, "m to PEs")}


@dataclass(frozen=True)
class Operation:
    """One operation. step: of the program; -1 holds the configuration and the first x. start, end: cycles, end excluded;
    after: numbers of the operations whose end it waits for. item: sequence of the batch; layer: its name in a stack;
    sequence_step: step of the sequence that it works for; stage: of stages in turn."""

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
    layer: str = ""
    sequence_step: int = -1
    stage: int = 0


@dataclass(frozen=True)
class Timed:
    """What the schedule adds to an instruction: cycles, events and what it needs beyond the order of its resource."""

    busy: int  # cycles for which it holds its resource
    latency: int  # cycles from then to its end
    needs: tuple[tuple[int, int], ...]  # (steps of the program back, number in it)
    counts: dict[str, int]
    multiply: int = 0  # cycles in which the mean PE of its region multiplies what is no padding

    @cached_property
    def took(self) -> int:
        """Cycles from its start to its end."""
        return self.busy + self.latency


def time_program(mapping) -> tuple[Timed, ...]:
    """Cycles and events of every instruction."""
    spec = mapping.spec
    needs, counted = _needs(mapping), _slice_counts(mapping)

    @cache
    def multicast(i):
        """Cycles and data words written of a multicast, the same for all items."""
        return (multicast_cycles(memories_of(mapping, i), spec.h_words_per_cycle),
                sum(int(kept.sum()) * region.rows for region, kept in takers(mapping, i)))

    def timed(n, i, needs):
        layer = mapping.layers[i.layer]
        if i.kind in ("mac", "load"):
            block = layer.blocks[i.parts[0], i.gate]
            words, macs, padding, runs, fullest = counted[n]
            accesses = words * words_taken(block, spec)
            if i.kind == "load":
                bits = words * block.word_bits
                return Timed(ceil_div(bits, spec.load_bits_per_cycle), 0, needs,
                             {"loaded_bits": bits, "weight_writes": accesses})
            counts = {"macs": macs, "padding_macs": padding, "weight_reads": accesses, "data_reads": macs, "acc_reads": runs,
                      "acc_writes": runs}
            return Timed(fullest, spec.mac_latency, needs, counts,
                         (macs - padding) * spec.mac_ii // (block.pe_rows * block.pe_cols))
        if i.kind == "drain":
            block, (low, high) = layer.blocks[i.parts[0], i.gate], i.rows
            rows = block.rows_between(low, high)
            words = rows * block.pe_cols
            kept = rows * kept_at_edge(layer.layer, i)
            hoisted = rows * (layer.fills_edge and i.sum in layer.layer.gates)
            return Timed(high - low, (block.pe_cols - 1) * spec.link_cycles, needs,
                         {"acc_reads": words + kept, "acc_writes": kept + hoisted, "link_words": words})
        if i.kind in ("transform", "inverse"):
            back, region = i.kind == "inverse", layer.layout.regions[-1]
            counted_tiles = transformed_tiles(layer, i.parts[0])
            operations = np.array([real_operations(k, back) for k, _ in counted_tiles])
            adds, macs = (int(total) for total in np.array([number.sum() for _, number in counted_tiles]) @ operations)
            busy = int(sum(number * transform_cycles(k, back, spec) for k, number in counted_tiles).max())
            return Timed(busy, spec.mac_latency, needs, {
                "transform_operations": adds + macs, "data_reads": 2 * adds + macs, "data_writes": adds + macs // 2,
                "weight_reads": macs * constant_taken(spec)}, (adds + macs) * spec.mac_ii // (region.rows * region.cols))
        if i.kind == "gather":
            block, (low, high) = layer.blocks[i.parts[0], i.gate], i.rows
            columns, rows = inverse_columns(layer.blocks, i.parts[0], i.gate), block.rows_between(low, high)
            inside = (block.local_of_row >= low) & (block.local_of_row < high)
            hops = np.maximum(columns, block.pe_cols - 1 - columns)[inside]
            last = (block.local_of_row[inside] - low + np.multiply.outer(spec.link_cycles, hops)).max(axis=-1)  # points or none
            last = last if last.ndim else int(last)
            return Timed(high - low, last + 1 - (high - low), needs, {
                "acc_reads": rows * block.pe_cols, "link_words": rows * (block.pe_cols - 1), "data_writes": rows})
        if i.kind == "send":
            block = layer.blocks[i.parts[0], i.gate]
            words = int((block.pe_cols - inverse_columns(layer.blocks, i.parts[0], i.gate)).sum())
            return Timed(i.rows[1], (block.pe_cols - 1) * spec.link_cycles, needs, {
                "data_reads": block.shape[0], "link_words": words, "acc_writes": block.shape[0] * layer.fills_edge})
        if i.kind == "multicast":
            cycles, writes = multicast(replace(i, item=0))
            words = i.values * network_words(layer.layer, spec, i.parts[0])
            return Timed(cycles, 0, needs, {"multicast_words": words, "data_writes": writes})
        counts = {i.event: i.values}
        if layer.hoisted_words and i.sum in layer.layer.gates:  # the input's part is read at the edge
            counts["acc_reads"] = i.values
        return Timed(ceil_div(i.values, spec.act_units) * spec.act_ii, spec.act_latency, needs, counts)

    return tuple(timed(n, i, needed) for n, (i, needed) in enumerate(zip(mapping.program, needs, strict=True)))


def _time_rows(mapping, timed, inputs, steps) -> tuple[tuple[tuple[Timed, ...], ...], np.ndarray]:
    """What the program takes in each of its steps, that of step -1 first, where zeros in what is multiplied are skipped; and
    the multiply-accumulates that each PE of the array (rows, cols) then issues in all steps."""
    program, issued = mapping.program, np.zeros((mapping.spec.rows, mapping.spec.cols), dtype=np.int64)
    rows = [list(timed) for _ in range(steps + 1 + max(i.lag for i in program))]
    for n, i in enumerate(program):
        if i.kind == "mac":
            block, layout = mapping.layers[i.layer].blocks[i.parts[0], i.gate], mapping.layers[i.layer].layout
            work = work_of(block, i.rows, i.words, inputs[i.layer][i.parts[0]][:, i.item], mapping.spec)
            issued[layout.regions[layout.region_of(block.packed)].window] += work.pe_macs
            for step in range(steps):
                counts = {event: int(count[step]) for event, count in work.events.items()}
                rows[1 + step + i.lag][n] = replace(timed[n], busy=int(work.busy[step]), multiply=int(work.multiply[step]),
                                                    counts=counts)
    return tuple(map(tuple, rows)), issued


def _slice_counts(mapping):
    """Number of each mac and load -> its words, multiply-accumulates, those of padding, runs on a row (all PEs together), and
    the cycles for which the fullest PE multiplies."""
    slices, counted = defaultdict(list), {}
    for n, i in enumerate(mapping.program):
        if i.kind in ("mac", "load"):
            slices[i.layer, i.parts[0], i.gate, i.rows].append(n)
    for (layer, part, gate, rows), numbers in slices.items():
        block, bounds = mapping.layers[layer].blocks[part, gate], np.array([mapping.program[n].words for n in numbers])
        words, macs, padding, runs = block.slice_counts(*rows, bounds[:, 0], bounds[:, 1])
        # A word is used once it is whole: each memory word after its first holds the PE for a cycle.
        fullest = (macs * mapping.spec.mac_ii + words * (words_taken(block, mapping.spec) - 1)).max(axis=1)
        columns = (words.sum(axis=1), macs.sum(axis=1), padding, runs, fullest)
        counted |= dict(zip(numbers, zip(*(column.tolist() for column in columns), strict=True), strict=True))
    return counted


def _needs(mapping):
    """Per instruction the (steps back, number) of those whose end it waits for. In-order resources spare all but the last
    of several that end in order."""
    program, banks = mapping.program, mapping.spec.acc_banks
    sum_drains, drains, gathers, macs, uses = (defaultdict(list) for _ in range(5))
    named, loads, drained_before, last_mac, readers = {}, {}, {}, {}, defaultdict(dict)
    chunks = Counter(i.region for i in program if i.kind == "load")
    for n, i in enumerate(program):
        if i.kind == "mac":
            # The latest entry of the same bank that is drained before this; negative: of an earlier step.
            latest = len(drains[i.region]) - 1
            drained_before[n] = latest - (latest - i.entry) % banks
            macs[i.region].append(n)
            if i.parts == ("ih",):
                readers[i.layer, i.item][i.region] = n  # the last of each region
            if i.chunk >= 0:
                uses[i.region, i.chunk].append(n)
        elif i.kind in ("drain", "gather"):
            if i.kind == "drain":
                sum_drains[i.layer, i.item, i.sum].append(n)
            else:
                gathers[i.layer, i.item, part_of(i.parts[0])].append(n)
            drains[i.region].append(n)
            last_mac[n] = next(m for m in reversed(macs[i.region]) if (program[m].entry - i.entry) % banks == 0)
        elif i.kind == "send":
            sum_drains[i.layer, i.item, i.sum].append(n)
        elif i.kind == "load":
            loads[i.region, i.chunk] = n
        else:
            if i.kind == "transform" and part_of(i.parts[0]) == "ih":
                readers[i.layer, i.item][i.region] = n
            named[i.layer, i.item, i.name] = n

    def since(i, m, steps=0):
        """What program[m] did for the same step of the sequence as i, or some steps before."""
        return steps + i.lag - program[m].lag, m

    def arrival(i, part):
        """What a part multiplies is in the PEs: its multicast, or the transform that makes it."""
        steps, name = ARRIVES.get(part, (0, f"forward {part}" if is_transformed(part) else f"{part} to PEs"))
        below = mapping.pipelined and i.layer and part == "ih"
        return since(i, named[(i.layer - 1, i.item, "h to PEs") if below else (i.layer, i.item, name)], steps)

    def latest(number, apart, numbers):
        """The last that has this number, counted from the first of the step on, or one a multiple of `apart` before; and of
        those with another lag the last, too, as the first and last steps of a program lack some."""
        lags = {program[m].lag for m in numbers}
        for at in range(number, number - apart * len(numbers), -apart):
            back, place = divmod(at, len(numbers))
            if (lag := program[numbers[place]].lag) in lags:
                lags.discard(lag)
                yield -back, numbers[place]

    def needs(n, i):
        if i.kind == "mac":
            yield arrival(i, i.parts[0])
            yield from latest(drained_before[n], banks, drains[i.region])
            if i.chunk >= 0:
                yield 0, loads[i.region, i.chunk]
        elif i.kind == "load":  # double buffer: the chunk before the last must be used up
            yield from latest(i.chunk - 2, 2, [uses[i.region, chunk][-1] for chunk in range(chunks[i.region])])
        elif i.kind == "transform":
            yield arrival(i, part_of(i.parts[0]))
        elif i.kind == "inverse":
            yield from ((0, m) for m in gathers[i.layer, i.item, i.parts[0]])
        elif i.kind == "send":
            yield since(i, named[i.layer, i.item, f"inverse {part_of(i.parts[0])}"])
        elif i.kind in ("drain", "gather"):
            yield 0, last_mac[n]  # of its bank: all earlier ones end before
        elif i.name == "x to PEs":
            # Its place in the double buffer (or that of an h that is the x of the layer above) is free once the h made of what
            # lay there has passed on the same network; where no h is made:
            if mapping.layers[i.layer].fills_edge:
                yield from (since(i, m, COPIES["ih"]) for m in readers[i.layer, i.item].values())
        else:
            yield from (since(i, m) for m in (sum_drains[i.layer, i.item, i.sum] if i.sum else ()))
            yield from (since(i, named[i.layer, i.item, name]) for name in i.takes)

    return [tuple(needs(n, i)) for n, i in enumerate(program)]


def _run_step(timed, program, past, free, end, latest=max, before=()):
    """Starts of the operations of one row, None where there is none. past: the rows before, latest last; free: resource ->
    cycle, which moves on; end: of the steps of the sequence. Cycles are integers, or arrays with latest=np.maximum. before:
    what the program took in the rows before, if not what it takes now."""
    row, step = [], len(past) - 1
    for i, op in zip(program, timed, strict=True):
        if not 0 <= step - i.lag < end:
            row.append(None)
            continue
        start = free[i.resource]
        for back, m in op.needs:
            needed = (past[-back][m] if back else row[m]) if back <= len(past) else None
            if needed is not None:  # else it is in place
                start = latest(start, needed + (before[-back] if before and back else timed)[m].took)
        row.append(start)
        free[i.resource] = start + op.busy
    return row


def _run(timed, program, config_end, steps, by_row=()):
    """Starts (steps of the program, n) of all operations, those of step -1 first, and the period (steps, cycles) into which
    they fall; by_row: what the program takes in each of these steps, if they differ, so that there is no period (None)."""
    depth, lags = max(back for op in timed for back, _ in op.needs), [i.lag for i in program]
    whole = 1 + max(lags)  # rows before which some instructions have no step yet
    rows, frees, period = [], [dict.fromkeys((i.resource for i in program), config_end)], None
    for row, taken in enumerate(by_row):
        rows.append(_run_step(taken, program, rows, frees[0], steps, before=by_row[:row]))
    if by_row:
        return np.array([[ABSENT if start is None else start for start in row] for row in rows]), None
    while period is None:
        if len(rows) == whole + MAX_TRANSIENT:
            raise RuntimeError(f"the schedule is not periodic after {MAX_TRANSIENT} steps")
        frees.append(dict(frees[-1]))
        rows.append(_run_step(timed, program, rows, frees[-1], float("inf")))
        period = _period(rows[whole:], depth)
    length, advance = period
    until = steps + 1 + min(lags)  # rows in which no instruction is beyond its last step
    while len(rows) < until:  # the past that matters repeats, so everything repeats
        rows.append([start + advance for start in rows[-length]])
        frees.append({resource: free + advance for resource, free in frees[-length].items()})
    rows, free = rows[:until], frees[until]
    while len(rows) < steps + whole:
        rows.append(_run_step(timed, program, rows, free, steps))
    return np.array([[ABSENT if start is None else start for start in row] for row in rows]), period


def run_points(timed, mapping, points, steps):
    """What _run and Schedule find for `points` points at once: fields of mapping.spec may be arrays (points,). Returns
    steady-state cycles, latency of the first step and cycles of the sequence, each (points,)."""
    program = mapping.program
    depth, lags = max(back for op in timed for back, _ in op.needs), [i.lag for i in program]
    whole, until = 1 + max(lags), steps + 1 + min(lags)
    rows, frees = [], [dict.fromkeys((i.resource for i in program), mapping.spec.config_cycles)]
    steady, first, cycles = (np.full(points, -1.0) for _ in range(3))
    while (steady < 0).any():
        if len(rows) == whole + MAX_TRANSIENT:
            raise RuntimeError(f"the schedule is not periodic after {MAX_TRANSIENT} steps")
        frees.append(dict(frees[-1]))
        rows.append(_run_step(timed, program, rows, frees[-1], float("inf"), np.maximum))
        old = len(rows) - 2 - MAX_PERIOD - depth  # what neither a period nor the rows from `until` on look back to
        if old > 1 and not until - depth <= old <= until:
            rows[old] = frees[old] = None
        length, advance = _periods(rows[whole:], depth, steady < 0)
        for some in np.unique(length[length > 0]).tolist():
            settled = length == some

            def at(known, n, some=some, advance=advance):
                """Row n, or what is free before it: known, or from the known ones on repeated and moved."""
                times, after = divmod(n - len(known), some) if n >= len(known) else (-1, n - len(known) + some)
                return known[len(known) - some + after], (times + 1) * advance

            past = [None] * until
            for n in {1, *range(max(until - depth, 0), until)}:
                if n < until:
                    row, moved = at(rows, n)
                    past[n] = [start if start is None else start + moved for start in row]
            free, moved = at(frees, until)
            free = {resource: cycle + moved for resource, cycle in free.items()}
            while len(past) < steps + whole:
                past.append(_run_step(timed, program, past, free, steps, np.maximum))
            last = [start + op.took for row in past[until:] for start, op in zip(row, timed, strict=True) if start is not None]
            steady[settled] = advance[settled] / some
            first[settled] = np.broadcast_to(past[1][-1] + timed[-1].took, points)[settled]
            cycles[settled] = np.maximum.reduce(np.broadcast_arrays(*last, steady)[:-1])[settled]
    return steady, first, cycles


def _periods(rows, depth, wanted):
    """As _period for many points: (points,) steps, 0 where there is no period yet or it is not wanted, and cycles."""
    length, advance = np.zeros((2, wanted.size), dtype=np.int64)
    for n in range(1, min(MAX_PERIOD, len(rows) - depth) + 1):
        moved, alike = rows[-1][-1] - rows[-1 - n][-1], wanted & (length == 0)
        for late, early in ((rows[-1 - k], rows[-1 - k - n]) for k in range(depth)):
            for quick in (slice(None, None, 64), slice(None)):  # a few of the operations first
                if alike.any():
                    for now, before in zip(late[quick], early[quick], strict=True):
                        alike = alike & (now - before == moved)
        length[alike], advance[alike] = n, np.broadcast_to(moved, wanted.size)[alike]
    return length, advance


def _period(rows, depth):
    """(steps, cycles) if the last `depth` rows repeat earlier ones, all moved by the same number of cycles."""
    for length in range(1, min(MAX_PERIOD, len(rows) - depth) + 1):
        moved = np.subtract(rows[-depth:], rows[len(rows) - depth - length : len(rows) - length])
        if (moved == moved[0, 0]).all():
            return length, int(moved[0, 0])
    return None


class Readings:
    """What is read alike off the operations of one stage or of several in turn."""

    def __repr__(self):
        return (f"<{type(self).__name__} of {self.steps} steps, batch {self.mapping.batch}: {self.steady_state_cycles:,.10g} "
                f"cycles a step, {self.cycles:,} in all, most of all for {self.bound}>")

    @property
    def step_us(self) -> float:
        """Microseconds of a step in the steady state, at the clock that the spec assumes."""
        return self.steady_state_cycles / self.mapping.spec.clock_mhz

    @property
    def cycles_per_item(self) -> float:
        """Steady-state cycles by which one more step of one item costs; the latency of a step is longer in a batch."""
        return self.steady_state_cycles / self.mapping.batch

    def table(self, step: int | None = None) -> list[dict]:
        """The operations as rows, all or those of one step; step -1 holds the configuration and the first x."""
        return [asdict(op) for op in self.operations if step is None or op.step == step]

    def to_json(self) -> str:
        """Everything: spec, layouts, steps, batch, figures and the operations as `table` lists them."""
        mapping = self.mapping
        return json.dumps({
            "spec": asdict(mapping.spec), "layout": mapping.layout_name,
            "layers": [{"name": m.name, "parts": sorted(m.parts), "layout": asdict(m.layout)} for m in mapping.layers],
            "steps": self.steps,
            "batch": mapping.batch, "whole_sequence": self.whole_sequence, "cycles": self.cycles,
            "steady_state_cycles": self.steady_state_cycles, "first_step_latency": self.first_step_latency,
            "initial_load_cycles": self.initial_load_cycles, "split": self.split(), "counts": self.counts(),
            "operations": self.table()})

    @property
    def bound(self) -> str:
        """What the sequence waits for most of all: compute, memory (the loader), links (drain, multicast) or activation."""
        split = self.split()
        return max(BOUND_BY, key=lambda name: sum(split[kind] for kind in BOUND_BY[name]))


@dataclass(frozen=True, repr=False)
class Schedule(Readings):
    """The operations of a sequence. candidates: what the scheduler compared, a row each: layout, least_cycles (bound by
    multiplications and loads), and steady_state_cycles and cr_chip where it was scheduled, or why it was refused. by_row:
    what the program takes in the step of each row, where the zeros of a real sequence are skipped and steps differ."""

    mapping: LayerMapping | SideBySide
    steps: int
    timed: tuple[Timed, ...]
    rows: np.ndarray  # (1 + steps of the program, instructions) starts in cycles, of step -1 first; ABSENT where there is none
    period: tuple[int, int] | None  # (steps, cycles) once periodic; None where steps differ
    candidates: tuple[dict, ...] = ()
    by_row: tuple[tuple[Timed, ...], ...] = ()
    issued: np.ndarray | None = None  # (rows, cols) multiply-accumulates of each PE where zeros are skipped

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
        ends = self.rows + self._of_operations("took")
        return np.where(self.rows == ABSENT, ABSENT, ends)

    def _of_operations(self, name):
        """A field of Timed for every operation (rows, instructions), or (1, instructions) if steps do not differ."""
        return np.array([[getattr(op, name) for op in taken] for taken in self.by_row or [self.timed]])

    @property
    def cycles(self) -> int:
        """Of the whole sequence, configuration included: the last end."""
        return int(self.ends.max())

    @property
    def steady_state_cycles(self) -> float:
        """Cycles from one step's h in the PEs, of all items, to the next step's, once periodic (mean over a period of several
        steps); where steps differ the mean of all after the first."""
        if self.period is None:
            return float(self.step_cycles[min(1, self.steps - 1) :].mean())
        return self.period[1] / self.period[0]

    @property
    def step_cycles(self) -> np.ndarray:
        """(steps,) cycles from one step's h in the PEs, of all items and layers, to the next step's; the first step's from the
        start."""
        lags = np.array([i.lag for i in self.mapping.program])
        return np.diff(self.ends[lags.max() :, lags == lags.max()].max(axis=1), prepend=0)

    @property
    def first_step_latency(self) -> int:
        """Cycles from the start, configuration and first x included, until the first h of the last layer, of all items, is in
        the PEs."""
        return int(self.step_cycles[0])

    @property
    def whole_sequence(self) -> bool:
        """Whether it needs the whole sequence before it can give its first result, as two directions do."""
        return len(self.mapping.layers) > 1 and not self.mapping.pipelined

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
            taken = self.by_row[row] if self.by_row else self.timed
            for n, (i, op, start) in enumerate(zip(self.mapping.program, taken, starts, strict=True)):
                if start != ABSENT:
                    after = {numbers.get((row - back, m), 0) for back, m in op.needs} or ({0} if row == 0 else ())
                    numbers[row, n] = len(found)
                    found.append(Operation(
                        i.name, i.kind, i.gate, i.region, row - 1, i.resource, start, int(self._ends[row, n]),
                        tuple(sorted(after)), op.counts, i.item, self.mapping.layers[i.layer].name, row - 1 - i.lag))
        return tuple(found)

    def counts(self) -> dict[str, int]:
        """Events of the whole sequence (EVENTS)."""
        if not self.by_row:
            return events(self.timed, self.steps)
        return events((self.by_row[row][n] for row, n in np.argwhere(self.rows != ABSENT)), 1)

    def split(self) -> dict[str, int]:
        """The total's cycles by what the critical path waits for, walked back from the last end; sums to `cycles`.

        A mac operation's cycles are multiply as far as the mean PE of its region multiplies what is no padding, stall beyond
        (imbalance, padding, further memory words, pipeline latency). Other kinds count as COUNTED_AS says.
        """
        split = dict.fromkeys(SPLIT, 0)
        multiply = np.broadcast_to(self._of_operations("multiply"), self.rows.shape)
        for row, n, start, until in self.critical_path():
            kind = COUNTED_AS.get(kind := self.mapping.program[n].kind, kind)
            if kind == "mac":
                split["multiply"] += int(multiply[row, n])
                split["stall"] += until - start - int(multiply[row, n])
            else:
                split[kind] += until - start
        split["config"] += self.cycles - sum(split.values())
        return split

    def products(self) -> list[dict]:
        """A row for each sum of matrix products and region, and one for the transforms that such sums have in common, under the
        name of the operation: cycles of a step, all items, for which it holds its PEs (compute: multiplications, or
        transforms), the loader (memory) and the links that drain it; bound: by which of these it is, which work side by side.
        Zeros that are skipped count as multiplied."""
        found = {}
        for i, op in zip(self.mapping.program, self.timed, strict=True):
            kind = COUNTED_AS.get(i.kind, i.kind)
            if kind in PRODUCT_BOUND_BY:
                key = self.mapping.layers[i.layer].name, i.sum or i.name, i.region
                row = found.setdefault(key, dict.fromkeys(PRODUCT_BOUND_BY.values(), 0))
                row[PRODUCT_BOUND_BY[kind]] += op.busy
        return [dict(zip(("layer", "sum", "region"), key, strict=True)) | row | {"bound": max(row, key=row.get)}
                for key, row in found.items()]

    def critical_path(self) -> list[tuple[int, int, int, int]]:
        """(row, number in the program, start, until) of the operations that the end waits for, the last first: each until the
        start of the one before it in this list. Nothing but the configuration comes before the last of them."""
        width, starts, released_by = len(self.timed), self.rows.ravel().tolist(), self._released_by().ravel().tolist()
        place, until, path = int(self._ends.argmax()), self.cycles, []
        while place >= 0:
            path.append((*divmod(place, width), starts[place], until))
            until, place = starts[place], released_by[place]
        return path

    def _released_by(self):
        """Of every operation (row, number) the one (row * instructions + number) whose end, or whose leaving the resource, let
        it start; -1: the configuration."""
        present, width, by_resource = self.rows != ABSENT, len(self.timed), defaultdict(list)
        for n, i in enumerate(self.mapping.program):
            by_resource[i.resource].append(n)
        place = np.arange(present.size).reshape(present.shape)
        before = np.empty_like(place)  # what the resource served last
        for mine in by_resource.values():
            served = np.maximum.accumulate(np.where(present[:, mine], place[:, mine], -1).ravel())
            before[:, mine] = np.concatenate([[-1], served[:-1]]).reshape(-1, len(mine))
        left = self.rows + self._of_operations("busy")
        released_by = np.where((before >= 0) & (left.ravel()[before] == self.rows), before, -1)
        for nth in reversed(range(max(len(op.needs) for op in self.timed))):  # the first need that fits counts
            some = [n for n, op in enumerate(self.timed) if len(op.needs) > nth]
            back, m = np.array([self.timed[n].needs[nth] for n in some]).T
            row = np.arange(len(present))[:, None] - back
            fits = (row >= 0) & (self._ends[np.maximum(row, 0), m] == self.rows[:, some])
            released_by[:, some] = np.where(fits, row * width + m, released_by[:, some])
        return released_by

    def utilisation(self) -> np.ndarray:
        """(rows, cols): multiply-accumulates that each PE issues per cycle, those of padding included."""
        return (self.mapping.macs * self.mapping.batch * self.steps if self.issued is None else self.issued) / self.cycles


def schedule_mapping(mapping: LayerMapping | SideBySide, steps: int, inputs=None) -> Schedule:
    """The schedule of one mapping over `steps` time steps. inputs: what the weights multiply in them (skipping.multiplied), of
    layers side by side a list, whose zeros an array with a lookahead above 1 skips; without them none is taken to be zero."""
    steps = check_whole("a schedule", "number of steps", steps, 1)
    timed, by_row, issued = time_program(mapping), (), None
    if inputs is not None and mapping.spec.lookahead > 1:
        inputs = [inputs] if isinstance(mapping, LayerMapping) else inputs
        for one, of in zip(inputs, mapping.layers, strict=True):
            if (got := one["ih"].shape) != (expected := (steps, mapping.batch, of.layer.input_size)):
                raise ValueError(f"a schedule of {steps} steps needs inputs of shape {expected}, got {got}")
        by_row, issued = _time_rows(mapping, timed, inputs, steps)
    rows, period = _run(timed, mapping.program, mapping.spec.config_cycles, steps, by_row)
    return Schedule(mapping, steps, timed, rows, period, by_row=by_row, issued=issued)


def events(timed, times: int) -> dict[str, int]:
    """Events of operations that run so many times each."""
    total = dict.fromkeys(EVENTS, 0)
    for op in timed:
        for event, count in op.counts.items():
            total[event] += count * times
    return total


def beats(cycles, fewest, before):
    """Whether cycles of a step win over the fewest so far; equal ones do where their candidate stands before that one. Numbers,
    or arrays (points,)."""
    return (cycles < fewest) | (before & (cycles == fewest))


def schedule_layer(layer: PackedLayer, spec: ArraySpec, steps: int, layout: Layout | None = None,
                   batch: int = 1, inputs=None, parts=None) -> Schedule:
    """Schedule one layer over `steps` time steps of `batch` sequences side by side; inputs: as schedule_mapping; parts: those
    whose blocks are multiplied, if not all (schedule_hoisted).

    Without a layout the candidate with the fewest steady-state cycles is taken, of equal ones the first; one with a region
    narrower than the multicast is none, one whose
    multiplications (unless zeros are skipped) or loads alone take too long to win is not scheduled, one that the array cannot
    hold is passed over. What no candidate holds or maps raises ValueError with the numbers.
    """
    if not isinstance(layer, PackedLayer) or not isinstance(spec, ArraySpec):
        raise TypeError("schedule_layer needs a PackedLayer and an ArraySpec, got "
                        f"{type(layer).__name__} and {type(spec).__name__}")
    batch = check_batch(batch)
    layouts = [layout] if layout is not None else sorted(
        (candidate for candidate in candidate_layouts(layer, spec)
         if takes_multicast(candidate.regions, spec.h_words_per_cycle)),
        key=lambda candidate: least_cycles(layer, spec, candidate, parts))
    check_layer(layer, spec)
    best, fewest, best_place, rows, refusals = None, float("inf"), (), [], []
    skips, tried, known = inputs is not None and spec.lookahead > 1, set(), {}
    for number, candidate in enumerate(layouts):
        bound, alike = 0 if skips else batch * least_cycles(layer, spec, candidate, parts), units_of(layer, spec, candidate)
        if alike in tried or not beats(bound, fewest, False):
            rows.append({"layout": candidate.name, "least_cycles": bound})
            continue
        tried.add(alike)
        blocks = map_blocks(layer, spec, candidate, parts, known)
        sized = [candidate] if layout is not None else sized_layouts(layer, spec, candidate, blocks)
        of_candidate = [{"layout": at.name, "least_cycles": max(bound, ceil_div(least_loaded_bits(layer, spec, at, blocks),
                                                                                spec.load_bits_per_cycle))} for at in sized]
        for n in sorted(range(len(sized)), key=lambda n: of_candidate[n]["least_cycles"]):  # what streams less first
            row, before = of_candidate[n], (number, n) < best_place
            if not beats(row["least_cycles"], fewest, before):
                continue
            try:
                mapping = map_layer(layer, spec, sized[n], blocks, batch=batch, parts=parts)
            except ValueError as error:
                refusals.append(error)
                row["refused"] = str(error)
                continue
            schedule = schedule_mapping(mapping, steps, inputs)
            row |= {"cr_chip": mapping.cr_chip, "steady_state_cycles": schedule.steady_state_cycles}
            if beats(schedule.steady_state_cycles, fewest, before):
                best, fewest, best_place = schedule, schedule.steady_state_cycles, (number, n)
        rows += of_candidate
    if best is None:
        raise refusals[0]
    return replace(best, candidates=tuple(rows))


def schedule_layers(layers: dict[str, PackedLayer], spec: ArraySpec, steps: int) -> dict[str, Schedule]:
    """Label -> schedule_layer of that layer, each with its own best layout. layers: as of PackedModel.layers."""
    if not isinstance(layers, dict):
        raise TypeError("schedule_layers needs a dict of PackedLayers, as PackedModel.layers is, got a "
                        f"{type(layers).__name__}")
    return {label: schedule_layer(layer, spec, steps) for label, layer in layers.items()}
