"""Acceleration studies: trained models, and random matrices, on the array processor against a dense one.

train_points trains, accelerate schedules what was trained, speed_up schedules random matrices of every kept fraction.
"""

import math
import operator
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch

from workbench import study
from workbench.array import PRESETS, ArraySpec, Schedule, schedule_hoisted, schedule_layer, schedule_stack
from workbench.array.cost import BASELINE, DEVICES, compare
from workbench.array.mapping import constants_kept, words_taken
from workbench.array.schedule import COUNTED_AS, schedule_mapping
from workbench.array.spec import ceil_div
from workbench.array.stack import FORMS as FORMS_OF_STACK
from workbench.budget import OutOfReach, pack_within_reach
from workbench.constrain import attach, bake, pack
from workbench.fixedpoint import TABLES, QFormat
from workbench.methods import (
    BankBalanced,
    BlockCirculant,
    BlockSparse,
    Dense,
    LowRank,
    RowBalanced,
    Structured,
    TopK,
    method_label,
)
from workbench.packed import GATES, Bitmap, PackedLayer, PackedLowRank, PackedModel, PackedSparse, signals_of, table_uses
from workbench.plan import Plan, uncompressed
from workbench.quantise import calibrate
from workbench.runs import listed
from workbench.sensitivity import calibration_batches
from workbench.study import DENSE, HYBRID, SMALL
from workbench.tasks import Task
from workbench.train import evaluate, paired_interval

STREAM_BUFFERS = (1, 2, 4, 8)  # stored words in one half of the double buffer, of which the best counts
BY_FFT = ", FFT"  # behind the name of a method whose circulant blocks are multiplied by FFT
MODEL_COLUMNS = [
    "label", "target_cr_disk", "seed", "method", "strength", "bits", "hidden_size", "cr_params", "cr_bits", "cr_disk",
    "cr_model", "valid_loss", "valid_accuracy", "test_accuracy", "test_loss", "valid_loss_above", "loss_points",
]  # fmt: skip
ARRAY_MEANS = ["steady_state_cycles", "cycles", "acceleration", "acceleration_sequence", "acceleration_multiply",
               "acceleration_load", "acceleration_resident", "acceleration_streamed", "cr_chip", "words_per_pe", "bram36",
               "energy_low_nj", "energy_high_nj"]  # fmt: skip


@dataclass(frozen=True)
class TrainedPoints:
    """Trained models for the array. results: a row per label, target and seed (MODEL_COLUMNS; losses against the dense control
    of the seed); packed and correct: (label, target) -> seed -> PackedModel, or which test items are right; reference: seed ->
    the same of the dense control; hybrids: (target, seed) -> the hybrid model with plain weights, and its plan; unreachable:
    the points that no plan reaches, and why.

    label: BASELINE (target 1), a method, or one with BY_FFT: the same integers, multiplied by FFT."""

    results: pd.DataFrame
    packed: dict[tuple[str, float], dict[int, PackedModel]]
    correct: dict[tuple[str, float], dict[int, np.ndarray]]
    reference: dict[int, np.ndarray]
    hybrids: dict[tuple[float, int], tuple[torch.nn.Module, Plan]]
    unreachable: pd.DataFrame

    def first(self, label: str, target: float) -> PackedModel:
        """The packed model of the first seed; ValueError says why there is none."""
        if (label, target) in self.packed:
            return next(iter(self.packed[label, target].values()))
        missing = self.unreachable[(self.unreachable["label"] == label) & (self.unreachable["target_cr_disk"] == target)]
        raise ValueError(f"there is no plan {plan_name(label, target)}: {listed(missing['reason'].unique())}")


def check_acceleration(task: Task, *, hidden_size: int, methods: list[str], target_cr_disks: list[float], bits: int,
                       seeds: list[int], epochs: int, retrain_epochs: int, search_epochs: int, loss_limit: float,
                       spec: ArraySpec, steps: int, batches: list[int], windows: list[int], sequences: int,
                       thresholds: list[float], lookaheads: list[int], delta_loss: float, crossover_units: int,
                       densities: list[float], latencies: list[float], curve_units: int, curve_bits: int,
                       curve_spec: ArraySpec, fractions: list[float], looked_at: float, workers: int) -> None:
    """Refuse the bad values of an acceleration study before any training: as check_tradeoff does, also a headline ratio that no
    hybrid plan reaches and an array that does not hold the dense model. densities: of weights and inputs of the crossover."""
    study.check_tradeoff(task, hidden_size=hidden_size, methods=methods, target_cr_disks=target_cr_disks, bits=bits,
                         seeds=seeds, epochs=epochs, retrain_epochs=retrain_epochs, search_epochs=search_epochs,
                         distillation_weight=0.0, workers=workers)
    if missing := [method for method in (HYBRID, "TopK") if method not in methods]:
        raise ValueError(f"an acceleration study needs the methods {HYBRID} and TopK, got {', '.join(methods)}: "
                         f"{listed(missing)} missing")
    if not loss_limit >= 0:
        raise ValueError(f"an acceleration study needs a loss_limit of at least 0 nats, got {loss_limit}")
    for low, high, asked in (
            (1, math.inf, {"steps": [steps], "batches": batches, "sequences": [sequences], "lookaheads": lookaheads,
                           "crossover_units": [crossover_units]}),
            (0, math.inf, {"windows": windows, "thresholds": thresholds, "delta_loss": [delta_loss], "latencies": latencies}),
            (0, 1, {"densities": densities})):
        for name, values in asked.items():
            if not values or not all(low <= value <= high for value in values):
                raise ValueError(f"an acceleration study needs {name} from {low} to {high}, got {values}")
    study.check_hybrid(task, hidden_size, target_cr_disks[0])
    study.check_array(task, hidden_size, spec)
    _check_curve(curve_units, curve_spec, fractions, curve_bits)
    if looked_at not in fractions:
        raise ValueError(f"an acceleration study needs as looked_at one of its fractions {fractions}, got {looked_at}")


def train_points(task: Task, dense: dict[int, torch.nn.Module], methods: list[str], target_cr_disks: list[float], *, bits: int,
                 dense_epochs: int, epochs: int, search_epochs: int, workers: int, checkpoints=None) -> TrainedPoints:
    """Retrain every method at every target from the dense model of each seed, and the dense model in 16-bit integers
    (BASELINE) and in float (the dense control), all for the same epochs; read the test split once for each.

    methods as tradeoff takes them. What has circulant blocks is measured a second time with them multiplied by FFT: its
    integers are the same, its roundings are not.
    """
    retraining = study.Retraining(dense_epochs, epochs, 0.0, checkpoints)
    searched = study.search_plans(task, dense, methods, target_cr_disks, bits, search_epochs, workers)
    jobs = [(_trained, task, model, method, target, seed, bits, searched.get(method, {}).get(target), retraining)
            for method in sorted(methods, key=lambda method: method != SMALL)  # the longest first
            for target in target_cr_disks for seed, model in dense.items()]
    jobs += [(_baseline, task, model, seed, retraining) for seed, model in dense.items()]
    jobs += [(study.dense_control, task, model, DENSE, seed, retraining) for seed, model in dense.items()]
    found = study.parallel(operator.call, jobs, workers, "retraining")
    controls = {row["seed"]: row for row in found[-len(dense):]}
    points = [row for rows in found[:-len(dense)] for row in rows]
    order = [BASELINE, *(name for method in methods for name in (method, method + BY_FFT))]
    points.sort(key=lambda row: (row["target_cr_disk"], order.index(row["label"])))  # stable: seeds stay in order
    rows, packed, correct = [], defaultdict(dict), defaultdict(dict)
    for row in points:
        if "reason" not in row:
            control, key = controls[row["seed"]], (row["label"], row["target_cr_disk"])
            rows.append(row | {"valid_loss_above": row["valid_loss"] - control["valid_loss"],
                               "loss_points": control["test_accuracy"] - row["test_accuracy"]})
            packed[key][row["seed"]], correct[key][row["seed"]] = row["packed"], row["correct"]
    return TrainedPoints(
        pd.DataFrame(rows, columns=MODEL_COLUMNS), dict(packed), dict(correct),
        {seed: row["correct"] for seed, row in controls.items()},
        {(row["target_cr_disk"], row["seed"]): (row["model"], row["plan"]) for row in points if "model" in row},
        pd.DataFrame([row for row in points if "reason" in row], columns=["label", "target_cr_disk", "seed", "reason"]))


def _trained(task, dense, method, target_cr_disk, seed, bits, searched, retraining) -> list[dict]:
    """A method at a target: its rows, one a datapath, or the reason why it is out of reach."""
    point = {"method": method, "target_cr_disk": target_cr_disk, "seed": seed}
    try:
        return _reached(task, dense, method, target_cr_disk, seed, bits, searched, retraining, point)
    except OutOfReach as error:
        return [point | {"label": method, "reason": str(error)}]


def _reached(task, dense, method, target_cr_disk, seed, bits, searched, retraining, point):
    if method == SMALL:
        row = study.small_control(task, dense, target_cr_disk, seed, retraining)
        return [row | point | study.strength_of(row) | {"label": method}]
    start = study.point_start(dense, method, target_cr_disk)
    return study.made_point(task, start, method, target_cr_disk, bits, searched,
                            lambda plan: _rows(task, dense, method, start, plan, seed, retraining, point))


def _rows(task, dense, method, start, plan, seed, retraining, point):
    before = evaluate(attach(start, pack_within_reach(start, plan)), task, "valid")
    compressed, rows = study.retrained(task, dense, start, plan, seed, retraining), []
    for label, same in ((method, plan), (method + BY_FFT, by_fft(plan))):
        if same is not None:
            row = study.measured(task, dense, start, compressed, same, label, seed, before)
            rows.append(row | point | study.strength_of(row) | {"label": label})
    if method == HYBRID:
        rows[0]["model"] = bake(compressed)
    return rows


def _baseline(task, dense, seed, retraining) -> list[dict]:
    plan = uncompressed(dense, calibrate(dense, calibration_batches(task)))
    before = evaluate(attach(dense, pack(dense, plan)), task, "valid")
    compressed = study.retrained(task, dense, dense, plan, seed, retraining)
    row = study.measured(task, dense, dense, compressed, plan, BASELINE, seed, before)
    return [row | study.strength_of(row) | {"label": BASELINE, "method": BASELINE, "target_cr_disk": 1.0}]


def by_fft(plan: Plan) -> Plan | None:
    """The plan with its circulant blocks multiplied by FFT; None where it has none, or one whose size is no power of two."""
    circulant = {name: entry for name, entry in plan.blocks.items() if isinstance(entry.method, BlockCirculant)}
    if not circulant or any(entry.method.block & (entry.method.block - 1) for entry in circulant.values()):
        return None
    return replace(plan, blocks=plan.blocks | {
        name: replace(entry, method=replace(entry.method, datapath="fft")) for name, entry in circulant.items()})


@dataclass(frozen=True)
class Acceleration:
    """Trained models on one array. results: a row per label, target and seed; summary: a row per label and target, means over
    the seeds, accuracy loss in points with its 95 % interval (paired by seed and test item; none of a single seed). A plan that
    the array refuses for one seed has no figures of the array, and the reasons under "refused".

    acceleration: dense 16-bit cycles of a step / its own, all overhead included; _sequence: of all steps; _multiply and _load:
    of the multiplications and transforms of the fullest PE alone, and of the loader alone if it brought all weights every
    step; _resident and _streamed: scheduled with all weights in the PEs, and with all of them through the loader every step.
    """

    points: TrainedPoints
    spec: ArraySpec
    steps: int
    results: pd.DataFrame
    summary: pd.DataFrame

    def schedule(self, label: str, target: float) -> Schedule:
        """Of the first seed's model."""
        return schedule_layer(_layer(self.points.first(label, target)), self.spec, self.steps)

    @property
    def block_rams(self) -> float:
        """BRAM36 of the device whose preset the array is; without a bound where it is none's."""
        return next((totals["bram36"].count for device, totals in DEVICES.items() if PRESETS[device] == self.spec), math.inf)

    def fastest(self, loss_limit: float, hybrid: bool, target: float | None = None):
        """The row of the summary with the fewest cycles a step among the hybrid plans, or among the uniform ones, of any target
        or of one: only rows of all seeds with a validation loss at most loss_limit above the dense control's, and with no more
        BRAM36 than block_rams. None where there is none."""
        rows = self.summary[self.summary["steady_state_cycles"].notna() & ~self.summary["method"].isin([BASELINE, SMALL])]
        rows = rows[rows["seeds"] == len(self.points.reference)]  # a mean over fewer is another mean
        rows = rows[((rows["method"] == HYBRID) == hybrid) & (rows["valid_loss_above"] <= loss_limit)]
        rows = rows[rows["bram36"] <= self.block_rams]
        rows = rows if target is None else rows[rows["target_cr_disk"] == target]
        return rows.loc[rows["steady_state_cycles"].idxmin()] if len(rows) else None

    def accuracy_lost(self, row, rival) -> dict:
        """Accuracy of the rival's row of the summary minus the row's: "loss (points)" with its 95 % interval "low", "high"."""
        return _lost(*(self.points.correct[plan["label"], plan["target_cr_disk"]] for plan in (rival, row)))


def headline_schedules(acceleration: Acceleration, target: float, loss_limit: float) -> dict[str, Schedule]:
    """Name -> schedule of the first seed's model: dense 16-bit; of the target the hybrid plan (also by FFT), the fastest
    uniform plan and the small dense network; and the fastest plans within the loss limit, uniform and hybrid."""
    summary = acceleration.summary
    there = {(row.label, row.target_cr_disk) for row in summary[summary["steady_state_cycles"].notna()].itertuples()}
    wanted = [(BASELINE, 1.0), (HYBRID, target), (HYBRID + BY_FFT, target), (SMALL, target)]
    rows = (acceleration.fastest(np.inf, hybrid=False, target=target), acceleration.fastest(loss_limit, hybrid=False),
            acceleration.fastest(loss_limit, hybrid=True))
    wanted += [(row["label"], row["target_cr_disk"]) for row in rows if row is not None]
    return {plan_name(*key): acceleration.schedule(*key) for key in dict.fromkeys(wanted) if key in there}


def plan_name(label: str, target: float) -> str:
    return label if label == BASELINE else f"{label}, {target:g}x"


def _layer(packed: PackedModel) -> PackedLayer:
    return next(iter(packed.layers.values()))


def accelerate(points: TrainedPoints, spec: ArraySpec, steps: int) -> Acceleration:
    """Schedule every trained model's first layer on the array, over `steps` time steps. What the array does not hold keeps
    its row, with the reason under "refused"."""
    rows, bases = [], {}
    for row in points.results.to_dict("records"):
        seed, key = row["seed"], (row["label"], row["target_cr_disk"])
        if seed not in bases:
            bases[seed] = _figures(_layer(points.packed[BASELINE, 1.0][seed]), spec, steps)
        try:
            rows.append(row | _against(bases[seed], _figures(_layer(points.packed[key][seed]), spec, steps)))
        except ValueError as error:
            rows.append(row | {"refused": str(error)})
    results = pd.DataFrame(rows)
    return Acceleration(points, spec, steps, results, _summary(points, results))


def _figures(layer, spec, steps):
    """(its schedule, the steady-state cycles with all weights resident, and with all of them streamed, through the best of
    some sizes of the double buffer: with the smallest a PE may wait for the latency of its multiplications)."""
    schedule = schedule_layer(layer, spec, steps)
    mapping = schedule.mapping
    constants, resident = constants_kept(spec, mapping.layout, mapping.blocks), schedule
    if mapping.streamed_bits:
        words = int(mapping.memory_words.max()) + constants
        resident = schedule_layer(layer, spec.with_(weight_words=words), steps, replace(mapping.layout, stream_words=0))
    widest, streamed = max(words_taken(block, spec) for block in mapping.blocks.values()), []
    for stored in STREAM_BUFFERS:
        words = stored * widest
        found = schedule_layer(layer, spec.with_(weight_words=2 * words + constants), steps,
                               replace(mapping.layout, stream_words=words))
        if streamed and found.mapping.streamed_bits < streamed[0].mapping.streamed_bits:  # some weights would stay
            break
        streamed.append(found)
    return schedule, resident.steady_state_cycles, min(found.steady_state_cycles for found in streamed)


def _against(base, mine) -> dict:
    """The row of the cost table of a schedule against the baseline's, with the accelerations where weights stay or stream."""
    (dense, dense_resident, dense_streamed), (schedule, resident, streamed) = base, mine
    row = compare({BASELINE: dense} | {"": schedule})[-1]
    del row["label"]
    load, dense_load = (ceil_div(s.mapping.on_chip_bits, s.mapping.spec.load_bits_per_cycle) for s in (schedule, dense))
    return row | {"acceleration_load": dense_load / load, "acceleration_resident": dense_resident / resident,
                  "acceleration_streamed": dense_streamed / streamed}


def _summary(points, results):
    rows = []
    for (label, target), group in results.groupby(["label", "target_cr_disk"], sort=False):
        first, reasons = group.iloc[0], group["refused"].dropna() if "refused" in group else []
        rows.append({
            "label": label, "method": first["method"], "target_cr_disk": target, "strength": first["strength"],
            "bits": group["bits"].mean(), "cr_disk": group["cr_disk"].mean(), "seeds": len(group),
            "accuracy %": group["test_accuracy"].mean(), "valid_loss_above": group["valid_loss_above"].mean(),
            "valid_loss_above_std": group["valid_loss_above"].std(ddof=1),
            "layout": first.get("layout"), "bound": first.get("bound"), "refused": None,
        } | _lost(points.reference, points.correct[label, target])
            | ({"layout": None, "bound": None, "refused": "; ".join(dict.fromkeys(reasons))} if len(reasons) else {})
            | {name: group[name].mean(skipna=False) for name in ARRAY_MEANS})
    return pd.DataFrame(rows)


def _lost(reference, correct) -> dict:
    """Accuracy of the reference minus that of `correct`, both seed -> which test items are right, in points, with its 95 %
    interval, paired by seed and test item on the seeds that both have."""
    seeds = [seed for seed in correct if seed in reference]
    low, mean, high = paired_interval(*(np.array([right[seed] for seed in seeds]) for right in (reference, correct)), seed=0)
    if len(seeds) == 1:  # one seed says nothing of the spread over seeds
        low = high = np.nan
    return {"loss (points)": mean, "low": low, "high": high}


def overlap_study(schedules: dict[str, Schedule], batches: list[int], windows: list[int]) -> pd.DataFrame:
    """What more of a schedule's kind can overlap, for the layer and the array of each: a row per plan and schedule.

    Several sequences side by side (batches); the input products hoisted ahead of the recurrence, for so many steps together
    (windows; 0: for all, which needs the whole sequence at hand); and two layers, the second a random dense one of 8 bits and
    as many units as the first has outputs, in turn or pipelined over the time steps. cycles: of the whole sequence of every
    item; per_step: that divided by steps and items; first_step: latency until the first h. What the array refuses has the
    reason instead.
    """
    rows = []
    for plan, schedule in schedules.items():
        layer, spec, steps = schedule.mapping.layer, schedule.mapping.spec, schedule.steps
        stack = [(layer,), (random_layer(Dense(), layer.output_size, 8),)]
        kinds = {f"batch of {batch}": (1, batch, partial(schedule_layer, layer, spec, steps, batch=batch))
                 for batch in batches}
        kinds |= {f"hoisted, {f'{window} steps at a time' if window else 'whole sequence'}": (
            1, 1, partial(schedule_hoisted, layer, spec, steps, window=window)) for window in windows}
        kinds |= {f"two layers {form}": (2, 1, partial(schedule_stack, stack, spec, steps, form=form))
                  for form in FORMS_OF_STACK}
        for kind, (layers, items, schedule_kind) in kinds.items():
            row = {"plan": plan, "schedule": kind, "layers": layers, "items": items}
            try:
                found = schedule_kind()
            except ValueError as error:
                rows.append(row | {"refused": str(error)})
                continue
            rows.append(row | {"cycles": found.cycles, "per_step": found.cycles / steps / items,
                               "first_step": found.first_step_latency, "layout": found.mapping.layout_name, "refused": None})
    return pd.DataFrame(rows)


def stalls(schedule: Schedule) -> dict[str, float]:
    """Cycles of a step of the mean PE in the steady state, by what it does; they sum to the steady-state cycles.

    multiply: what is no padding; padding; further words: memory words of wide weights after the first; transform: additions
    and multiplications of an FFT; imbalance: until the fullest PE of the region ends. Of the cycles in which its region
    multiplies nothing, by what the critical path of the whole step does then: pipeline (the latency of a multiplication),
    drain, activation, multicast, load, other region.
    """
    if not isinstance(schedule, Schedule) or schedule.by_row:
        raise ValueError(f"stalls needs the schedule of one layer without skipped zeros, got {schedule!r}")
    length, advance = schedule.period
    steps = 2 * length + 2
    while True:  # until the transient is over
        steady = schedule_mapping(schedule.mapping, steps)
        row = steps - 1  # of the program; the last whole step
        before, last = steady.rows[row - length], steady.rows[row]
        if (last - before == advance).all():
            break
        steps *= 2
    mapping, spec, program = schedule.mapping, schedule.mapping.spec, schedule.mapping.program
    end, path = int(last[-1]) + steady.timed[-1].took, steady.critical_path()
    start, found = end - advance, dict.fromkeys(STALLS, 0.0)
    for region, place in enumerate(mapping.layout.regions):
        share, pes, resource = place.rows * place.cols / (spec.rows * spec.cols), place.rows * place.cols, f"PEs {region}"
        idle = np.ones(advance, dtype=bool)
        for n, (i, op) in enumerate(zip(program, steady.timed, strict=True)):
            if i.resource != resource:
                continue
            for starts in steady.rows[row - length + 1 : row + 1, n]:  # what crosses the border comes in again
                idle[(starts - start + np.arange(op.busy)) % advance] = False
            worked = {"transform": op.counts.get("transform_operations", 0) * spec.mac_ii / pes}
            if i.kind == "mac":
                macs, padding = (op.counts[event] * spec.mac_ii / pes for event in ("macs", "padding_macs"))
                memory_words = words_taken(mapping.blocks[i.parts[0], i.gate], spec)
                worked = {"multiply": macs - padding, "padding": padding,
                          "further words": op.counts["weight_reads"] * (1 - 1 / memory_words) / pes}
            for name, cycles in (worked | {"imbalance": op.busy - sum(worked.values())}).items():
                found[name] += share * cycles
        for _, n, begin, until in path:
            waits = share * idle[max(begin - start, 0) : max(until - start, 0)].sum() / length
            kind = COUNTED_AS.get(program[n].kind, program[n].kind)
            if kind == "mac":
                kind = "pipeline" if program[n].resource == resource else "other region"
            found[kind] += waits
    return found


def speed_up(units: int, spec: ArraySpec, fractions: list[float], bits: int, workers: int) -> pd.DataFrame:
    """An LSTM of `units` inputs and units with random matrices, pruned by every method of FORMS to every fraction, against the
    dense one, all of `bits` bits: a row each.

    matvec_cycles: those for which the PEs of the busier region multiply in a step, the fullest PE of every operation;
    step_cycles: of the whole step in the steady state; speedup_: against the dense model's; ideal: its weights / stored
    ones; efficiency_: the speed-up as a share of it; and the parts of stalls. What the array refuses has the reason instead.
    units: rounded up where a circulant block does not divide them.
    """
    _check_curve(units, spec, fractions, bits)
    jobs = [(units, spec, bits, "Dense", 1.0)]
    jobs += [(units, spec, bits, form, fraction) for fraction in sorted(fractions) for form in FORMS]
    table = pd.DataFrame(study.parallel(_speed_up, jobs[::-1], workers, "random matrices")[::-1])  # the slow ones first
    dense = table.iloc[0]
    for what in ("matvec", "step"):
        table[f"speedup_{what}"] = dense[f"{what}_cycles"] / table[f"{what}_cycles"]
        table[f"efficiency_{what}"] = table[f"speedup_{what}"] / table["ideal"]
    return table


# Form -> (kept fraction, units) -> method. The random support of each is what counts.
FORMS = {
    "Structured": lambda fraction, units: Structured(round(1 / fraction)),
    "BankBalanced": lambda fraction, units: BankBalanced(fraction, min(16, units)),
    "RowBalanced": lambda fraction, units: RowBalanced(fraction),
    "BlockSparse": lambda fraction, units: BlockSparse(fraction, 4),
    "TopK": lambda fraction, units: TopK(fraction),
    "BlockCirculant": lambda fraction, units: BlockCirculant(round(1 / fraction)),
    "BlockCirculant" + BY_FFT: lambda fraction, units: BlockCirculant(round(1 / fraction), "fft"),
    "LowRank": lambda fraction, units: LowRank(max(1, round(fraction * units / 2))),
}
STALLS = ("multiply", "transform", "padding", "further words", "imbalance", "pipeline", "drain", "activation", "multicast",
          "load", "other region")  # fmt: skip


def _check_curve(units, spec, fractions, bits):
    if units < 16 or units % 4:
        raise ValueError(f"a speed-up curve needs units of at least 16, a multiple of 4, got {units}")
    if bits not in range(2, 17):
        raise ValueError(f"a speed-up curve needs 2 to 16 bits, got {bits}")
    if not fractions or any(not 0 < fraction < 1 or 1 / fraction != 1 << round(1 / fraction).bit_length() - 1
                            for fraction in fractions):
        raise ValueError(f"a speed-up curve needs fractions 1/2, 1/4, 1/8 and so on, at least one, got {fractions}")
    if refused := _speed_up(units, spec, bits, "Dense", 1.0)["refused"]:
        raise ValueError(f"a speed-up curve needs an array that takes {units} dense units: {refused}")


def _speed_up(units, spec, bits, form, fraction) -> dict:
    method = Dense() if form == "Dense" else FORMS[form](fraction, units)
    block = getattr(method, "block", 1) if isinstance(method, BlockCirculant) else 1
    dense, units = 8 * units**2, ceil_div(units, block) * block
    row = {"form": form, "kept": fraction, "strength": method_label(method), "units": units}
    try:
        layer = random_layer(method, units, bits)
        row["ideal"] = dense / sum(block.stored_values for block in layer.blocks.values())
        schedule = schedule_layer(layer, spec, 4)
    except ValueError as error:
        return row | {"refused": str(error)}
    busy = defaultdict(int)
    for i, op in zip(schedule.mapping.program, schedule.timed, strict=True):
        busy[i.resource] += op.busy if i.resource.startswith("PEs") else 0
    return row | {"refused": None, "matvec_cycles": max(busy.values()), "step_cycles": schedule.steady_state_cycles,
                  "words_per_pe": int(schedule.mapping.memory_words.max())} | stalls(schedule)


def random_layer(method, units: int, bits: int) -> PackedLayer:
    """An LSTM of `units` inputs and units with random matrices of `bits` bits (seed 0) that the method has compressed.

    Rows that a sparse pattern does not divide are cut off the pattern of the next number that it does; factors of low rank
    are random themselves.
    """
    rng = torch.Generator().manual_seed(0)
    fmt, signals = QFormat(bits, bits - 1), {name: _SIGNALS[name] for name in signals_of("LSTM")}
    rows = ceil_div(units, getattr(method, "period", 1)) * getattr(method, "period", 1)

    def block():
        if isinstance(method, LowRank):
            left, right = (2 * torch.randint(2, shape, generator=rng).numpy() - 1  # small: the sums V x are operands
                           for shape in ((units, method.rank), (method.rank, units)))
            return PackedLowRank(fmt, left, right)
        w = torch.randn(rows, units, generator=rng, dtype=torch.float64)
        if isinstance(method, (Dense, BlockCirculant)):
            return method.pack(w.clamp(-3, 3) / 4, fmt)
        kept = torch.zeros(rows * units, dtype=torch.bool).index_fill_(0, method.support(w), True).view(rows, units)[:units]
        row, column = np.nonzero(kept.numpy())
        values = torch.randint(1, fmt.max + 1, (row.size,), generator=rng).numpy()
        return PackedSparse((units, units), fmt, row, column, values, (Bitmap(),))

    blocks = {f"weight_{part}_l0.{gate}": block() for part in ("ih", "hh") for gate in GATES["LSTM"]}
    tables = {name: TABLES["linear"].build(name, uses) for name, uses in table_uses("LSTM", signals).items()}
    return PackedLayer("LSTM", blocks, {gate: np.zeros(units, dtype=np.int64) for gate in GATES["LSTM"]}, signals, tables)


# Of random layers: 16 bits, input and hidden state with one fraction, so that both matrices add up in the same accumulators.
_SIGNALS = {"input": QFormat(16, 12), "pre": QFormat(16, 11), "sigmoid": QFormat(16, 16, signed=False), "tanh": QFormat(16, 15),
            "cell": QFormat(16, 11), "hidden": QFormat(16, 12)}
