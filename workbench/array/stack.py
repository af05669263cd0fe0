"""Layers and directions of a recurrent module on one array: which run side by side, which in turn, on which regions.

Layers of one direction are pipelined over time steps: a layer does step t while the one below does step t + 1. A reverse
direction begins with the last step of the layer below, so that a bidirectional layer waits for the whole sequence below it:
such layers run in turn, the two directions side by side on regions of their own or in turn on the whole array.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from workbench.array.mapping import (
    InTurn,
    LayerMapping,
    Region,
    SideBySide,
    candidate_layouts,
    check_batch,
    fitting_mappings,
    least_cycles,
    map_layer,
    part_of,
    parts_of,
    programs_side_by_side,
    strips,
    takes_multicast,
)
from workbench.array.schedule import Operation, Readings, Schedule, schedule_layer, schedule_mapping
from workbench.array.spec import ArraySpec, ceil_div
from workbench.checks import check_whole
from workbench.packed import PackedLayer


@dataclass(frozen=True, repr=False)
class StagedSchedule(Readings):
    """Schedules in turn, each a stage with a configuration of its own that begins when the one before has ended.

    Where the weights of all stages do not fit the PEs' memories together, a stage begins with the load of its resident words,
    unless they are those of the stage before (the first stage's are in place). steps: of the sequence. candidates: what the
    scheduler compared, a row each. window: steps whose input products are hoisted together, 0 if none are.
    """

    stages: tuple[Schedule, ...]
    steps: int
    candidates: tuple[dict, ...] = ()
    window: int = 0

    @cached_property
    def mapping(self) -> InTurn:
        """Of the stages; those with the same weights count once."""
        found = {}
        for stage in self.stages:
            found.setdefault(_weights_of(stage), stage.mapping)
        return InTurn(tuple(found.values()), self.window * max(m.hoisted_words for stage in self.stages
                                                               for m in stage.mapping.layers))

    @cached_property
    def loads(self) -> tuple[int, ...]:
        """Cycles of the load that each stage begins with."""
        held = [_weights_of(self.stages[0]), *(_weights_of(stage) for stage in self.stages)]
        return tuple(stage.initial_load_cycles * (now != before and not self.mapping.all_fit)
                     for stage, now, before in zip(self.stages, held[1:], held, strict=False))

    @property
    def initial_load_cycles(self) -> int:
        """Cycles that the loader takes once, before the sequence, for the resident weights; in no other figure."""
        held = {_weights_of(stage): stage.initial_load_cycles for stage in self.stages}
        return sum(held.values()) if self.mapping.all_fit else self.stages[0].initial_load_cycles

    @property
    def cycles(self) -> int:
        """Of the whole sequence, configurations and loads between stages included."""
        return sum(stage.cycles for stage in self.stages) + sum(self.loads)

    @property
    def steady_state_cycles(self) -> float:
        """Cycles that one more step of the sequence costs, the sum over the stages; where input products are hoisted window by
        window the mean over all steps, as each window has its configurations and loads."""
        if 0 < self.window < self.steps:
            return self.cycles / self.steps
        return sum(stage.steady_state_cycles * stage.steps for stage in self.stages) / self.steps

    @property
    def first_step_latency(self) -> int:
        """Cycles from the start until the first h of the last layer is in the PEs."""
        first = next(n for n, stage in enumerate(self.stages) if stage.mapping.layers[-1].name == self.mapping.layers[-1].name
                     and not stage.mapping.layers[0].fills_edge)
        return sum(stage.cycles for stage in self.stages[:first]) + sum(self.loads[: first + 1]) + (
            self.stages[first].first_step_latency)

    @property
    def whole_sequence(self) -> bool:
        """Whether it needs the whole sequence before it can give its first result."""
        return len(self.stages) > 1 or self.stages[0].whole_sequence

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """The operations of all stages; the first of a stage wait for the last of the one before."""
        found, offset = [], 0
        for n, (stage, load) in enumerate(zip(self.stages, self.loads, strict=True)):
            before, begin = len(found), offset + load
            if load:
                found.append(Operation("load of the stage", "load", "", -1, -1, "loader", offset, begin, (before - 1,),
                                       _load_counts(stage.mapping), stage=n))
            first = len(found)
            for op in stage.operations:
                after = tuple(first + m for m in op.after) or (first - 1,) * (first > 0)
                found.append(replace(op, start=op.start + begin, end=op.end + begin, after=after, stage=n))
            offset = begin + stage.cycles
        return tuple(found)

    def counts(self) -> dict[str, int]:
        """Events of the whole sequence (EVENTS)."""
        parts = [stage.counts() for stage in self.stages]
        parts += [_load_counts(stage.mapping) for stage, load in zip(self.stages, self.loads, strict=True) if load]
        return {event: sum(part.get(event, 0) for part in parts) for event in parts[0]}

    def split(self) -> dict[str, int]:
        """The total's cycles by what the critical path waits for; sums to `cycles`."""
        parts = [stage.split() for stage in self.stages]
        return {kind: sum(part[kind] for part in parts) + (sum(self.loads) if kind == "load" else 0) for kind in parts[0]}

    def utilisation(self) -> np.ndarray:
        """(rows, cols): multiply-accumulates that each PE issues per cycle, those of padding included."""
        return sum(stage.utilisation() * stage.cycles for stage in self.stages) / self.cycles


def _weights_of(stage):
    return tuple((mapping.name, *sorted(mapping.parts)) for mapping in stage.mapping.layers)


def _load_counts(mapping):
    return {"loaded_bits": mapping.initial_bits, "weight_writes": int(mapping.resident_words.sum())}


def schedule_hoisted(layer: PackedLayer, spec: ArraySpec, steps: int, batch: int = 1, window: int = 0,
                     inputs=None) -> StagedSchedule:
    """Schedule one layer with its input products W_ih x hoisted ahead of the recurrence, for all steps or window by window.

    The products of a window come first, as stages of their own, and wait in the memories of the activation units (edge_words);
    the recurrence then multiplies h only. Where W_ih has to be streamed, as many steps as the PEs' data memories hold use each
    chunk, as items of a batch do. Nothing is rounded elsewhere than without hoisting, but the first h needs the x of the whole
    window. inputs: as schedule_layer. A delta threshold of x, too many sums and what the array cannot hold raise ValueError.
    """
    steps, batch = check_whole("a schedule", "number of steps", steps, 1), check_batch(batch)
    window = check_whole("hoisting", "number of steps at a time, 0 for all,", window, 0)
    window = min(window or steps, steps)
    if "input" in layer.delta:
        raise ValueError(f"hoisting takes no delta threshold of x, whose sums move from step to step, got {layer.delta}")
    if inputs is not None and (got := len(inputs["ih"])) != steps:
        raise ValueError(f"a schedule of {steps} steps needs inputs of as many, got {got}")
    recurrence = _recurrence(layer, spec, window, batch, inputs, 0, None)
    words = window * recurrence.mapping.hoisted_words
    if words > spec.edge_words:
        raise ValueError(f"an activation unit has to keep {words} sums of {spec.acc_bits} bits (input products of {window} "
                         f"steps, batch of {batch}), the array has {spec.edge_words} (edge_words)")
    products = _input_products(layer, spec, window, batch, inputs, 0, None)
    stages = [*products, recurrence]
    for done in range(window, steps, window):  # on the same regions
        some = min(window, steps - done)
        if some < window or inputs is not None:
            products = _input_products(layer, spec, some, batch, inputs, done, products[0].mapping)
            recurrence = _recurrence(layer, spec, some, batch, inputs, done, recurrence.mapping.layout)
        stages += [*products, recurrence]
    return StagedSchedule(tuple(stages), steps, window=window)


def _recurrence(layer, spec, steps, batch, inputs, start, layout):
    inputs = inputs and {part: values[start : start + steps] for part, values in inputs.items()}
    parts = [part for part in parts_of(layer) if part != "ih"]
    return schedule_layer(layer, spec, steps, layout, batch, inputs, parts)


def _input_products(layer, spec, steps, batch, inputs, start, like):
    """Stages that compute the input products of some steps. like: the mapping of such a stage that came before, if any: its
    resident words are those that are in the PEs."""
    def schedule(first, rows, together, like):
        """In so many rows of the program, each for some steps together."""
        x = None
        if inputs is not None:
            taken = slice(start + first, start + first + rows * together)
            x = {part: values[taken].reshape(rows, together * batch, -1)
                 for part, values in inputs.items() if part_of(part) == "ih"}
        if like is None:
            return schedule_layer(layer, spec, rows, None, together * batch, x, ("ih",))
        return schedule_mapping(map_layer(layer, spec, like.layout, like.blocks, batch=together * batch, parts=("ih",),
                                          pass_items=like.pass_items), rows, x)

    alone = schedule(0, steps, 1, like)
    together = min(spec.data_words // (alone.mapping.data_words // batch) // batch, steps) if alone.mapping.streamed_bits else 1
    if together <= 1:
        return [alone]
    together = ceil_div(steps, ceil_div(steps, together))
    whole, rest = divmod(steps, together)
    found = [schedule(0, whole, together, like)]
    if rest:
        found.append(schedule(whole * together, 1, rest, found[0].mapping))
    return found


SETTLED = 8  # step of a layer alone by which it has found its pace
PHASES = 8  # shares of a step by which each layer is thought to begin after the one before, when the order is chosen


def side_by_side(layers: tuple[LayerMapping, ...], pipelined: bool, steps: int, inputs=None) -> Schedule:
    """The schedule of mappings on regions that do not overlap; inputs: their names -> what schedule_layer takes.

    Shared resources serve their instructions in the order in which these would start if each layer ran alone, each some cycles
    behind the one before; of PHASES such delays the one with the fewest steady-state cycles is taken. No order beats the
    slowest layer alone, or the loader.
    """
    if pipelined:  # the x of the layers above is not there ahead of its step
        layers = (layers[0], *(replace(map_layer(m.layer, m.spec, m.layout, m.blocks, batch=m.batch, ahead=False), name=m.name)
                               for m in layers[1:]))
    programs, best = programs_side_by_side(layers, pipelined), None
    alone = [schedule_mapping(mapping, SETTLED + 2) for mapping in layers]
    slowest = max(schedule.steady_state_cycles for schedule in alone)
    began = []  # per layer and instruction, when an instruction and all before it have started, from the last h on
    for schedule, program in zip(alone, programs, strict=True):
        whole = schedule.mapping.program
        h = max(n for n, i in enumerate(whole) if i.parts == ("hh",) and i.kind == "multicast")
        starts = schedule.starts[SETTLED] - schedule.ends[SETTLED - 1, h]
        taken = [i.name != "x to PEs" for i in whole] if len(program) < len(whole) else [True] * len(whole)
        began.append(np.maximum.accumulate(starts[taken]))
    for phase in range(PHASES):
        order = sorted((start + n * phase * slowest / PHASES, n, m) for n, starts in enumerate(began)
                       for m, start in enumerate(starts.tolist()))
        program = tuple(programs[n][m] for _, n, m in order)
        schedule = schedule_mapping(SideBySide(tuple(layers), pipelined, program), steps,
                                    inputs and [inputs[mapping.name] for mapping in layers])
        if best is None or schedule.steady_state_cycles < best.steady_state_cycles:
            best = schedule
        if inputs is None and best.steady_state_cycles <= max(slowest, _load_cycles(layers)):
            break
    return best


FORMS = ("in turn", "side by side")


def layer_name(index: int, reverse: int) -> str:
    """As torch names the parameters of a layer and direction: "l0", "l1_reverse"."""
    return f"l{index}{'_reverse' * reverse}"


def checked_stack(who: str, stack) -> list[tuple[PackedLayer, ...]]:
    """The layers of a stack, each (forward,) or (forward, reverse); TypeError for what is none."""
    if not isinstance(stack, (tuple, list)) or not stack or not all(
            isinstance(directions, (tuple, list)) and directions and all(isinstance(layer, PackedLayer) for layer in directions)
            for directions in stack):
        raise TypeError(f"{who} needs layers of PackedLayers, as PackedModel.stack gives them")
    return [tuple(directions) for directions in stack]


def schedule_stack(stack, spec: ArraySpec, steps: int, batch: int = 1, form: str = "", inputs=None,
                   hoist: bool | int = False) -> StagedSchedule:
    """Schedule all layers and directions of one recurrent module (stack: as PackedModel.stack gives it) over `steps` time steps
    of `batch` sequences side by side; inputs: layer_name -> what schedule_layer takes.

    form: "side by side": layers of one direction in a pipeline, or both directions of each layer, on strips of the array;
    "in turn": each on the whole array; else that of the two which takes fewer cycles for the sequence. Strips are whole columns
    or rows of groups; of all widths the fewest steady-state cycles win (one whose multiplications or loads alone take as many
    as the best so far is not scheduled). Within a strip each layer takes the layout whose multiplications bound it least.
    hoist: True, or so many steps at a time: schedule_hoisted for every layer and direction, in turn. What the array cannot hold
    raises ValueError with the numbers.
    """
    stack, rows = checked_stack("schedule_stack", stack), []
    steps, batch = check_whole("a schedule", "number of steps", steps, 1), check_batch(batch)
    named = [{layer_name(index, reverse): layer for reverse, layer in enumerate(directions)}
             for index, directions in enumerate(stack)]
    for n, (below, layers) in enumerate(pairwise(stack), start=1):
        width = sum(layer.output_size for layer in below)
        if wrong := [layer.input_size for layer in layers if layer.input_size != width]:
            raise ValueError(f"schedule_stack needs layers that fit: layer {n} takes {wrong[0]} inputs, "
                             f"layer {n - 1} gives {width}")
    if form not in ("", *FORMS):
        raise ValueError(f"schedule_stack knows the forms {', '.join(FORMS)}, got {form!r}")
    if hoist:
        if form == "side by side":
            raise ValueError("schedule_stack hoists input products of layers in turn only: they need the layer below whole")
        stages, window = [], steps if hoist is True else hoist
        for name, layer in ((name, layer) for layers in named for name, layer in layers.items()):
            hoisted = schedule_hoisted(layer, spec, steps, batch, window, inputs and inputs[name])
            stages += [_named(stage, name) for stage in hoisted.stages]
        return StagedSchedule(tuple(stages), steps, window=hoisted.window)

    def compared(layers, pipelined):
        """The stages that the layers take."""
        found = {}
        if form != "side by side" or len(layers) == 1:
            found["in turn"] = [_alone(name, layer, spec, steps, batch, inputs) for name, layer in layers.items()]
        if form != "in turn" and len(layers) > 1:
            best = _best_side_by_side(layers, pipelined, spec, steps, batch, inputs, rows)
            found |= {"side by side": [best]} if best else {}
        if not found:
            why = rows[-1]["refused"] if rows else "too few groups, or none as wide as h_words_per_cycle"
            raise ValueError(f"{spec.rows} x {spec.cols} PEs have no strips of whole groups that hold {', '.join(layers)} side "
                             f"by side: {why}")
        found = {form: StagedSchedule(tuple(stages), steps) for form, stages in found.items()}
        rows.extend({"form": form, "layout": staged.mapping.layout_name, "cycles": staged.cycles,
                     "steady_state_cycles": staged.steady_state_cycles} for form, staged in found.items())
        return min(found.values(), key=lambda staged: staged.cycles).stages

    if all(len(layers) == 1 for layers in named):
        stages = compared({name: layer for layers in named for name, layer in layers.items()}, pipelined=True)
    else:
        stages = [stage for layers in named for stage in compared(layers, pipelined=False)]
    return StagedSchedule(tuple(stages), steps, tuple(rows))


def _alone(name, layer, spec, steps, batch, inputs):
    return _named(schedule_layer(layer, spec, steps, batch=batch, inputs=inputs and inputs[name]), name)


def _named(schedule, name):
    return replace(schedule, mapping=replace(schedule.mapping, name=name))


def _best_side_by_side(layers, pipelined, spec, steps, batch, inputs, rows):
    """The schedule with the fewest steady-state cycles over all strips, or None where no strips hold the layers."""
    options = []
    for regions in strips(Region(0, 0, spec.rows, spec.cols), len(layers)):
        if not takes_multicast(regions, spec.h_words_per_cycle):
            continue
        bounds, layouts = zip(*(
            min(((least_cycles(layer, spec, layout), layout) for layout in candidate_layouts(layer, spec, region)
                 if takes_multicast(layout.regions, spec.h_words_per_cycle)),
                key=lambda option: option[0]) for layer, region in zip(layers.values(), regions, strict=True)), strict=True)
        options.append((batch * max(bounds) * (inputs is None), layouts))
    best = None
    for bound, layouts in sorted(options, key=lambda option: option[0]):
        name = " | ".join(f"{name}: {layout.name}" for name, layout in zip(layers, layouts, strict=True))
        row = {"form": "side by side", "layout": name, "least_cycles": bound}
        rows.append(row)
        if best is not None and bound >= best.steady_state_cycles:
            continue
        try:
            fitting = [[replace(mapping, name=name) for mapping in fitting_mappings(layer, spec, layout, batch)]
                       for (name, layer), layout in zip(layers.items(), layouts, strict=True)]
            sized = [[some[min(n, len(some) - 1)] for some in fitting] for n in range(max(map(len, fitting)))]
            for mappings in sorted(sized, key=_load_cycles):  # sizes of streaming buffers, what streams less first
                if best is not None and _load_cycles(mappings) >= best.steady_state_cycles:
                    break
                schedule = side_by_side(tuple(mappings), pipelined, steps, inputs)
                row["steady_state_cycles"] = min(schedule.steady_state_cycles, row.get("steady_state_cycles", float("inf")))
                if best is None or schedule.steady_state_cycles < best.steady_state_cycles:
                    best = schedule
        except ValueError as error:
            row["refused"] = str(error)
    return best


def _load_cycles(mappings) -> int:
    """Cycles that the loader, which they share, is busy in every step, at least."""
    return ceil_div(sum(mapping.streamed_bits for mapping in mappings), mappings[0].spec.load_bits_per_cycle)
