"""Studies: dense models, their compressed versions and the controls, over several seeds, on as many processes.

compare: the hybrid plan and its rivals at one compression ratio; tradeoff: every method at several.

Every training runs single-threaded in a process of its own, so on a processor results do not depend on the number of workers.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import operator
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from workbench import budget, models, schedules, train
from workbench.allocation import choices_to_measure, search_allocation
from workbench.array import ArraySpec, schedule_layer
from workbench.array.cost import BASELINE
from workbench.budget import OutOfReach, bits_within, check_bits, check_target, first_uniform, uniform_plan
from workbench.checks import check_whole
from workbench.constrain import attach, bake, constrained_code, pack
from workbench.emulation import attach_emulated
from workbench.gates import blocks, cell_name, dense_weights, rnns, weight
from workbench.methods import METHODS, BlockCirculant, Dense, Method, TopK, method_label
from workbench.packed import GATES, PackedLayer, PackedModel
from workbench.pareto import pareto_front
from workbench.plan import Plan, plan_block, uncompressed, uniform
from workbench.quantise import calibrate
from workbench.sensitivity import (
    Loop,
    Strength,
    calibration_batches,
    classify,
    hybrid_plan,
    search_hybrid,
    sensitive_gates,
    sensitivity_table,
    strengths,
)
from workbench.tasks import Task
from workbench.train import evaluate, fit, paired_interval, t_interval
from workbench.units import remove_units

CONTROL_BITS = 8  # weights of the small dense control
DENSE = "dense control"
DENSE_ONCE = "dense, trained once"  # where retraining makes the dense control worse, this shows it
HYBRID = "hybrid"
ALLOCATION = "allocation"
ALLOCATION_BITS = [4, 6]  # widths of the choices that are measured for it
UNITS = "hidden units"
SMALL = "small dense"
UNIFORM_TOPK = "uniform Top-k"
UNIFORM_CIRCULANT = "uniform circulant"
UNIFORM = {UNIFORM_TOPK: TopK, UNIFORM_CIRCULANT: BlockCirculant}  # the hybrid plan's own methods, each alone
VARIANTS = (DENSE, DENSE_ONCE, HYBRID, SMALL, *UNIFORM)
ITERATIVE = "iterative"
CHOSEN = "chosen alone"  # of the methods alone, what a choice on the validation split takes
NOT_ALONE = (HYBRID, ALLOCATION, SMALL, CHOSEN)  # of a tradeoff's rows those that are not of one method
TRADEOFF_METHODS = (*METHODS, UNITS, HYBRID, ALLOCATION, SMALL)
VARIED = ("methods", "target_cr_disks", "seed", "seeds", "workers", "checkpoints")  # parameters that make no setting
RESULT_COLUMNS = [
    "method", "target_cr_disk", "seed", "hidden_size", "strength", "bits", "cr_params", "cr_bits", "cr_disk", "cr_model",
    "rnn_bytes", "valid_accuracy_before", "valid_accuracy", "valid_loss", "test_accuracy", "test_loss", "loss_points",
]  # fmt: skip
SUMMARY_COLUMNS = [
    "method", "target_cr_disk", "units", "strength", "bits", "cr_params", "cr_bits", "cr_disk", "cr_model", "accuracy %",
    "accuracy std", "seeds", "loss (points)", "low", "high", "loss std", "vs_small", "vs_small_low", "vs_small_high",
    "chosen", "vs_chosen", "vs_chosen_low", "vs_chosen_high", "valid_loss", "cross-entropy",
]  # fmt: skip


def _iterative(model, plan):
    """A hybrid plan's circulant gates first, then those of Top-k; at once where it has only one of them."""
    kinds = {BlockCirculant: [], TopK: []}
    for name, block in blocks(model).items():
        gates_of = kinds[type(plan.blocks[name].method)]
        gates_of += [block.gate] * (block.gate not in gates_of)
    groups = [gates_of for gates_of in kinds.values() if gates_of]
    return schedules.iterative(model, plan, groups) if len(groups) > 1 else schedules.one_shot(model, plan)


SCHEDULES = {"one-shot": schedules.one_shot, "gradual": schedules.gradual, "ADMM": schedules.admm, ITERATIVE: _iterative}


def parallel(function, jobs: list[tuple], workers: int, description: str) -> list:
    """function(*job) for every job, in spawned single-threaded processes; results in the order of the jobs."""
    if workers < 1:
        raise ValueError(f"a study needs at least 1 worker, got {workers}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for done in tqdm(as_completed(futures), total=len(futures), desc=description, unit="job"):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def check_seeds(seeds: list[int]) -> None:
    if not isinstance(seeds, (list, tuple)) or not seeds or any(seed in seeds[:place] for place, seed in enumerate(seeds)):
        raise ValueError(f"a study needs a list of different seeds, got {seeds!r}")
    for seed in seeds:
        check_whole("a study", "seed", seed, 0)


def check_study(task: Task, *, hidden_size: int, target_cr_disk: float, seeds: list[int], epochs: int, retrain_epochs: int,
                sensitivity_epochs: int, search_epochs: int, distillation_weight: float, spec: ArraySpec, steps: int,
                workers: int) -> None:
    """Refuse the bad values of a comparison before any training, also a ratio that no hybrid plan reaches and an array that
    does not hold the dense model."""
    _check_training(task, seeds, epochs, retrain_epochs, distillation_weight)
    _check_counts(step=steps, worker=workers)
    check_whole("a study", "number of sensitivity_epochs", sensitivity_epochs, 0)
    check_whole("a study", "number of search_epochs", search_epochs, 0)
    check_hybrid(task, hidden_size, target_cr_disk)
    check_array(task, hidden_size, spec)


def check_hybrid(task: Task, hidden_size: int, target_cr_disk: float) -> None:
    """Refuse a ratio that no strength of a hybrid plan reaches, whether no gate or any one of them is sensitive."""
    candidates = strengths(hidden_size)
    model = models.build_classifier(task, hidden_size, seed=0)
    for sensitive in ([], *([gate] for gate in GATES[cell_name(next(iter(rnns(model).values())))])):
        for strength in candidates:
            with contextlib.suppress(OutOfReach):
                hybrid_plan(model, sensitive, strength, target_cr_disk, {})
                return
    raise OutOfReach(f"no strength of a hybrid plan of {hidden_size} units reaches cr_disk {target_cr_disk}, whichever gate is "
                     "sensitive")


def check_array(task: Task, hidden_size: int, spec: ArraySpec) -> None:
    """Refuse an array that does not take the dense 16-bit model (BASELINE), against which accelerations are."""
    model = models.build_classifier(task, hidden_size, seed=0)
    packed = pack(model, uncompressed(model, calibrate(model, calibration_batches(task))))
    try:
        schedule_layer(next(iter(packed.layers.values())), spec, 1)
    except ValueError as error:
        raise ValueError(f"the array does not take the dense model of {hidden_size} units: {error}") from error


def check_tradeoff(task: Task, *, hidden_size: int, methods: list[str], target_cr_disks: list[float], bits: int,
                   seeds: list[int], epochs: int, retrain_epochs: int, search_epochs: int, distillation_weight: float,
                   workers: int, schedule: str = "one-shot", device: str = "cpu", retrain_lr: float | None = None,
                   keep_start: bool = False) -> None:
    """Refuse the bad values of a tradeoff before any training."""
    _check_points(task, methods, target_cr_disks, bits, search_epochs, schedule, device, retrain_lr, keep_start)
    if HYBRID in methods:
        strengths(hidden_size)
    _check_training(task, seeds, epochs, retrain_epochs, distillation_weight)
    _check_counts(unit=hidden_size, worker=workers)


def _check_points(task, methods, target_cr_disks, bits, search_epochs, schedule, device, retrain_lr, keep_start):
    train.check_device(device, "a tradeoff")
    if schedule not in SCHEDULES:
        raise ValueError(f"a tradeoff knows the schedules {', '.join(SCHEDULES)}, got {schedule!r}")
    if unknown := [method for method in methods if method not in TRADEOFF_METHODS]:
        raise ValueError(f"a tradeoff knows the methods {', '.join(TRADEOFF_METHODS)}, got {', '.join(map(str, unknown))}")
    if schedule == ITERATIVE and methods != [HYBRID]:
        raise ValueError(f'the schedule "{ITERATIVE}" compresses the gates of one method before those of the other: a tradeoff '
                         f'needs methods=["{HYBRID}"] for it, got {methods}')
    if schedule != "one-shot" and task.recipe.select_after < schedules.UNTIL:
        raise ValueError(f"the schedule {schedule!r} is done after {schedules.UNTIL} of the steps: a tradeoff needs a task for "
                         f"it whose select_after is not before, {task.name} has {task.recipe.select_after}")
    if schedule != "one-shot" and keep_start:
        raise ValueError(f'keep_start needs the schedule "one-shot", got {schedule!r}, which starts outside the plan')
    for target in target_cr_disks:
        check_target(target)
    for what, values in (("methods", methods), ("target_cr_disks", target_cr_disks)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"a tradeoff needs different {what}, at least one, got {values}")
    check_bits(bits)
    check_whole("a tradeoff", "number of search_epochs", search_epochs, 0)
    if retrain_lr is not None and not 0 < retrain_lr < math.inf:
        raise ValueError(f"a tradeoff needs a retrain_lr above 0, or none for the task's own, got {retrain_lr}")


def _check_training(task, seeds, epochs, retrain_epochs, distillation_weight):
    if not isinstance(task, Task):
        raise ValueError(f"a study of trained classifiers needs a task with classes, got the language task {task.name}")
    check_seeds(seeds)
    for count in (epochs, retrain_epochs):
        replace(task.recipe, epochs=count)
    if not 0 <= distillation_weight <= 1:
        raise ValueError(f"a study needs a distillation_weight in [0, 1], got {distillation_weight}")


def _check_counts(**counts):
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"a study needs at least 1 {name}, got {count}")


def train_dense(task: Task, hidden_size: int, seeds: list[int], *, epochs: int, workers: int,
                checkpoints: str | Path | None = None, device: str = "cpu") -> dict[int, torch.nn.Module]:
    """Seed -> trained dense classifier.

    checkpoints: a directory where finished trainings are kept and found again; in a run, a relative one lies below results/.
    device: "cpu" or "cuda", where is trained.
    """
    check_seeds(seeds)
    train.check_device(device, "train_dense")
    models.build_classifier(task, hidden_size, seed=seeds[0])  # refuses a bad size before any process starts
    jobs = [(task, hidden_size, seed, epochs, checkpoints, device) for seed in seeds]
    return dict(zip(seeds, parallel(_train_dense, jobs, workers, "dense models"), strict=True))


def _train_dense(task, hidden_size, seed, epochs, checkpoints, device):
    model = models.build_classifier(task, hidden_size, seed=seed)
    key = f"dense {hidden_size} {seed} {epochs} {device}"
    return _once(model, task, key, checkpoints,
                 lambda: fit(model, task, seed=seed, epochs=epochs, device=device, progress=False))


def _once(model, task, key, checkpoints, training, constraints=(), schedule=None):
    """Run the training, or load what an earlier run of the same training left in the directory. constraints: files whose
    code takes part in it; schedule: that of the training, of which a file holds the end."""
    if checkpoints is None:
        training()
        return model
    # What decides the result: the task's data and recipe, the arguments, and the code that trains.
    about = f"{task.digest} {task.split} {task.recipe} {key} {train.code_digest(*constraints)}"
    name = hashlib.sha256(about.encode()).hexdigest()[:16]
    path = train.checkpoint_folder(checkpoints) / f"{name}.safetensors"
    if path.is_file():
        if schedule is not None:
            schedule.step(1.0)
        train.load_checkpoint(model, path)
    else:
        training()
        train.save_checkpoint(model, path, {"task": task.name, "split": task.split, "training": key})
    return model


def sensitivity_over_seeds(task: Task, dense: dict[int, torch.nn.Module], methods: list[Method], *,
                           bits: int | list[int], epochs: int, workers: int, device: str | None = None) -> pd.DataFrame:
    """sensitivity_table of every seed's model, one below the other, with the seed as a column. ValueError for a Loop."""
    if isinstance(task, Loop):
        raise ValueError("sensitivity_over_seeds measures in processes of its own, to which the functions of a Loop cannot be "
                         "sent: call sensitivity_table for each seed's model and give pandas.concat the tables, each with "
                         ".assign(seed=...)")
    jobs = [(model, task, methods, bits, epochs, seed, device) for seed, model in dense.items()]
    tables = parallel(_sensitivity, jobs, workers, "sensitivity")
    return pd.concat([table.assign(seed=seed) for seed, table in zip(dense, tables, strict=True)], ignore_index=True)


def _sensitivity(model, task, methods, bits, epochs, seed, device):
    return sensitivity_table(model, task, methods, bits=bits, epochs=epochs, seed=seed, device=device)


@dataclass(frozen=True)
class Comparison:
    """results: one row per variant and seed; correct: variant -> (seeds, test items) bool; packed: variant -> seed ->
    PackedModel; plans: variant -> seed -> Plan."""

    results: pd.DataFrame
    correct: dict[str, np.ndarray]
    packed: dict[str, dict[int, PackedModel]]
    plans: dict[str, dict[int, Plan]]

    def by_seed(self) -> pd.DataFrame:
        """One row per variant and seed: ratio, validation before and after retraining, test (losses: cross-entropy)."""
        names = {"variant": "variant", "seed": "seed", "cr_disk": "cr_disk", "valid_accuracy_before": "validation before %",
                 "valid_accuracy": "after %", "valid_loss": "validation loss", "test_accuracy": "test %",
                 "test_loss": "test loss"}
        return self.results[list(names)].rename(columns=names)

    def ratios(self) -> pd.DataFrame:
        """One row a variant: every compression ratio, mean over the seeds; cr_model counts the whole model."""
        columns = ["cr_params", "cr_bits", "cr_disk", "cr_model", "rnn_bytes"]
        return self.results.groupby("variant", sort=False)[columns].mean().reset_index()

    def summary(self) -> pd.DataFrame:
        """One row a variant: mean and standard deviation over the seeds, and the accuracy loss against the dense control
        with its 95 % interval, paired by seed and test item (points; none of a single seed)."""
        rows = []
        for variant, group in self.results.groupby("variant", sort=False):
            rows.append({
                "variant": variant, "units": int(group["hidden_size"].iloc[0]), "arithmetic": group["arithmetic"].iloc[0],
                "cr_disk": group["cr_disk"].mean(),
            } | _statistics(group, self.correct[DENSE], self.correct[variant]))
        return pd.DataFrame(rows)


def _statistics(group, reference, correct) -> dict:
    """Over the seeds of one model: accuracy, and its loss against the reference with the paired interval (points)."""
    low, mean, high = paired_interval(reference, correct, seed=0)
    if len(group) == 1:  # one seed says nothing of the spread over seeds
        low = high = np.nan
    return {"accuracy %": group["test_accuracy"].mean(), "accuracy std": group["test_accuracy"].std(ddof=1),
            "cross-entropy": group["test_loss"].mean(), "loss (points)": mean, "low": low, "high": high, "seeds": len(group)}


def compare(task: Task, dense: dict[int, torch.nn.Module], sensitive: list[str], strength: Strength,
            target_cr_disk: float, *, variants: list[str], dense_epochs: int, epochs: int, distillation_weight: float,
            workers: int, checkpoints: str | Path | None = None) -> Comparison:
    """Retrain every variant from the dense model of each seed for the same epochs, and read the test split once.

    The dense control is the dense model, retrained alike, in float; beside it the dense model as it was. All others are
    measured on the integer engine. The small dense control has as many units as fill the target's bytes at 8 bits; it is
    trained from scratch for dense_epochs and then, in 8 bits, for epochs. distillation_weight > 0 distils
    the dense model into every variant.
    """
    check_target(target_cr_disk)
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise ValueError(f"compare knows the variants {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    if DENSE not in variants:
        raise ValueError(f"compare needs the variant {DENSE!r} as the reference, got {', '.join(variants)}")
    _check_training(task, list(dense), dense_epochs, epochs, distillation_weight)
    _check_counts(worker=workers)
    # The plans come first: a target out of reach is refused before any training.
    plans = {seed: _plans(model, task, sensitive, strength, target_cr_disk, variants) for seed, model in dense.items()}
    retraining = Retraining(dense_epochs, epochs, distillation_weight, checkpoints)
    jobs = []
    for variant in sorted(variants, key=lambda v: v != SMALL):  # the longest first
        for seed, model in dense.items():
            if variant == SMALL:
                jobs.append((small_control, task, model, target_cr_disk, seed, retraining))
            elif variant in (DENSE, DENSE_ONCE):
                jobs.append((dense_control, task, model, variant, seed, retraining))
            else:
                jobs.append((_compressed, task, model, model, plans[seed][variant], variant, seed, retraining))
    rows = parallel(operator.call, jobs, workers, "retraining")
    rows.sort(key=lambda row: variants.index(row["variant"]))
    by_variant = {v: [row for row in rows if row["variant"] == v] for v in variants}
    apart = ("correct", "packed", "plan")
    return Comparison(
        pd.DataFrame([{k: value for k, value in row.items() if k not in apart} for row in rows]),
        {v: np.array([row["correct"] for row in group]) for v, group in by_variant.items()},
        {v: {row["seed"]: row["packed"] for row in group} for v, group in by_variant.items() if group[0]["packed"]},
        {v: {row["seed"]: row["plan"] for row in group} for v, group in by_variant.items() if group[0]["plan"]},
    )


def _plans(model, task, sensitive, strength, target_cr_disk, variants):
    signals = calibrate(model, calibration_batches(task))
    plans = {}
    if HYBRID in variants:
        plans[HYBRID] = hybrid_plan(model, sensitive, strength, target_cr_disk, signals)
    for variant, bits in ((UNIFORM_TOPK, strength.topk_bits), (UNIFORM_CIRCULANT, strength.circulant_bits)):
        if variant in variants:
            plans[variant] = uniform_plan(model, UNIFORM[variant], bits, target_cr_disk, signals)
    return plans


def array_layers(model: torch.nn.Module, task: Task, comparison: Comparison, seed: int, strength: Strength,
                 target_cr_disk: float) -> dict[str, PackedLayer]:
    """Label -> packed layer of one seed for the array: dense 16-bit, the small dense control, both uniform plans, hybrid.

    A variant that the comparison retrained is taken from there; a uniform plan that it did not is packed one-shot.
    """
    signals = calibrate(model, calibration_batches(task))
    missing = [variant for variant in UNIFORM if variant not in comparison.packed]
    packed = {BASELINE: pack(model, uncompressed(model, signals))}
    packed |= {variant: pack(model, plan)
               for variant, plan in _plans(model, task, [], strength, target_cr_disk, missing).items()}
    packed |= {variant: by_seed[seed] for variant, by_seed in comparison.packed.items()}
    order = (BASELINE, SMALL, *UNIFORM, HYBRID)
    return {label: next(iter(packed[label].layers.values())) for label in order}


def small_hidden_size(num_features: int, payload_bits: float) -> int:
    """Units of the smallest 8-bit dense LSTM whose matrices take at least payload_bits (ties go to the control)."""
    hidden_size = 1
    while 4 * hidden_size * (num_features + hidden_size) * CONTROL_BITS < payload_bits:
        hidden_size += 1
    return hidden_size


@dataclass(frozen=True)
class Retraining:
    """dense_epochs: from scratch; epochs: of retraining; checkpoints: directory that keeps what is trained, or None; device:
    where is trained and measured; lr: peak of retraining's learning rate, None for that of the task's recipe; keep_start:
    whether a model stays as it was where that has the smaller validation loss."""

    dense_epochs: int
    epochs: int
    distillation_weight: float
    checkpoints: str | Path | None
    schedule: str = "one-shot"
    device: str = "cpu"
    lr: float | None = None
    keep_start: bool = False

    def run(self, model, task: Task, teacher, seed: int, what: str, constraints=(), schedule=None) -> None:
        """Retrain the model in place, for the same epochs whatever it is; `what` tells it from others of its seed."""
        settings = {"seed": seed, "epochs": self.epochs, "device": self.device, "progress": False}
        if self.distillation_weight:
            settings |= {"teacher": teacher, "distillation_weight": self.distillation_weight}
        distilled = f"{self.distillation_weight} {train.fingerprint(teacher)}" if self.distillation_weight else "0.0"
        key = f"{what} {_units(teacher)} {seed} {self.dense_epochs} {self.epochs} {distilled} {self.device}"
        settings["retraining"] = schedule
        task = _at_rate(task, self.lr)
        if self.keep_start:
            start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            before = evaluate(model, task, "valid").loss
        _once(model, task, key, self.checkpoints, lambda: fit(model, task, **settings), constraints, schedule)
        if self.keep_start and before <= evaluate(model, task, "valid").loss:
            model.load_state_dict(start)


def _at_rate(task: Task, lr: float | None) -> Task:
    """The task with this learning rate in its recipe, as it is for None."""
    return task if lr is None else replace(task, recipe=replace(task.recipe, lr=lr))


def _units(model) -> int:
    return next(iter(blocks(model).values())).shape[0]


def dense_control(task, dense, variant, seed, retraining) -> dict:
    """The dense model in float, retrained (DENSE) or as it was (DENSE_ONCE)."""
    measured = bake(dense).to(retraining.device)
    before = evaluate(measured, task, "valid")
    if variant == DENSE:
        retraining.run(measured, task, dense, seed, f"{DENSE} {train.fingerprint(measured)}")
    return _identity(variant, seed, dense) | {
        "arithmetic": "float", "cr_params": 1.0, "cr_bits": 1.0, "cr_disk": 1.0, "cr_model": 1.0,
        "rnn_bytes": 4 * dense_weights(blocks(dense))} | _measurement(measured, task, before)


def small_control(task, dense, target_cr_disk, seed, retraining) -> dict:
    """An LSTM with as many units as fill the target's bytes at 8 bits, trained from scratch and then in 8 bits."""
    payload_bits = math.ceil(bits_within(target_cr_disk, blocks(dense)))
    hidden_size = small_hidden_size(task.num_features, payload_bits)
    small = _train_dense(task, hidden_size, seed, retraining.dense_epochs, retraining.checkpoints, retraining.device)
    plan = uniform(small, Dense(), CONTROL_BITS, calibrate(small, calibration_batches(task)))
    return _compressed(task, dense, small, plan, SMALL, seed, retraining)


def _compressed(task, dense, start, plan, variant, seed, retraining) -> dict:
    """`start` retrained inside the plan, packed, and measured in integers. Ratios are against `dense`."""
    before = evaluate(_in_integers(start, budget.pack_within_reach(start, plan), retraining.device), task, "valid")
    compressed = retrained(task, dense, start, plan, seed, retraining)
    return measured(task, dense, start, compressed, plan, variant, seed, before, retraining.device)


def _in_integers(model, packed, device):
    """The model on the device, its recurrent layers in integers: on the engine, or on a GPU in the emulation in float64, which
    equals it bit for bit. The layers around them are float."""
    return attach(model, packed) if device == "cpu" else attach_emulated(model, packed).to(device)


def retrained(task: Task, dense, start, plan: Plan, seed: int, retraining: Retraining):
    """`start`, the dense model or a small one, retrained inside the plan."""
    schedule = SCHEDULES[retraining.schedule](start, plan)
    compressed = schedule.model
    constraints = [*constrained_code(), budget.__file__, schedules.__file__]
    retraining.run(compressed, task, dense, seed, f"{train.fingerprint(start)} {schedule.digest}", constraints, schedule)
    return compressed


def measured(task: Task, dense, start, compressed, plan: Plan, variant: str, seed: int, before, device: str = "cpu") -> dict:
    """What was retrained, packed under the plan and measured in integers: a study's row. before: Evaluation of the validation
    split before retraining."""
    # Retraining moves the ranges of the signals, so their formats are calibrated on the model that is packed.
    plan = plan.with_signals(calibrate(compressed, calibration_batches(task)))
    packed = budget.pack_within_reach(compressed, plan, original=dense)
    return _identity(variant, seed, start) | {
        "arithmetic": "integers", "cr_params": packed.cr_params, "cr_bits": packed.cr_bits, "cr_disk": packed.cr_disk,
        "cr_model": packed.cr_model,
        "rnn_bytes": packed.storage_bits // 8, "plan": plan, "packed": packed,
    } | _measurement(_in_integers(compressed, packed, device), task, before)


def _identity(variant, seed, model):
    return {"variant": variant, "seed": seed, "hidden_size": _units(model), "plan": None, "packed": None}


def _measurement(model, task, before) -> dict:
    """The only place of a study that reads the test split."""
    valid, test = evaluate(model, task, "valid"), evaluate(model, task, "test")
    return {"valid_accuracy_before": before.accuracy, "valid_accuracy": valid.accuracy, "valid_loss": valid.loss,
            "test_accuracy": test.accuracy, "test_loss": test.loss, "correct": test.correct}


def variants(uniform_controls: bool) -> list[str]:
    """The variants of a comparison: always the hybrid model and the two dense controls."""
    return [DENSE, DENSE_ONCE, HYBRID, SMALL] + [UNIFORM_TOPK, UNIFORM_CIRCULANT] * uniform_controls


@dataclass(frozen=True)
class Tradeoff:
    """Compression ratio against accuracy. results: one row per method, target and seed; summary: one row per method and
    target: means over the seeds, the strength of the first, whether the mean is on the front, and the accuracy lost against
    the small dense network of that target with its 95 % interval (vs_small, in points, on the seeds that both have; no
    interval from a single seed), and so against `chosen` (vs_chosen), the method alone that the validation split takes for
    that target, as with_chosen says; controls: the dense models per seed; unreachable: the points that no plan reaches, and
    why.
    """

    results: pd.DataFrame
    summary: pd.DataFrame
    controls: pd.DataFrame
    unreachable: pd.DataFrame

    def by_seed(self) -> pd.DataFrame:
        """The figures of every seed that tell models apart, one row per method, target and seed."""
        names = {"method": "method", "target_cr_disk": "target", "seed": "seed", "strength": "strength", "cr_disk": "cr_disk",
                 "cr_model": "cr_model", "valid_accuracy_before": "valid before", "valid_accuracy": "after",
                 "test_accuracy": "test %", "loss_points": "loss", "test_loss": "test loss"}
        return self.results[list(names)].rename(columns=names)

    def plans(self) -> pd.DataFrame:
        """One row per method and target: what was planned, and every compression ratio, mean over the seeds."""
        columns = ["method", "target_cr_disk", "units", "strength", "bits", "cr_params", "cr_bits", "cr_disk", "cr_model"]
        return self.summary[columns].rename(columns={"target_cr_disk": "target"})


def tradeoff(task: Task, dense: dict[int, torch.nn.Module], methods: list[str], target_cr_disks: list[float], *, bits: int,
             dense_epochs: int, epochs: int, search_epochs: int, distillation_weight: float, workers: int,
             checkpoints: str | Path | None = None, schedule: str = "one-shot", device: str = "cpu",
             retrain_lr: float | None = None, keep_start: bool = False) -> Tradeoff:
    """Retrain every method at every target from the dense model of each seed, for the same epochs, and measure it in integers:
    on the engine, or with device="cuda" by the emulation in float64, which equals it bit for bit.

    methods: a name of METHODS is its uniform plan (see uniform_plan) of about `bits` bits. "hybrid" is the hybrid plan:
    sensitive gates from a one-shot measurement of all seeds, the strength (with widths of its own, see strengths) from
    search_epochs of retraining on the first seed. "allocation" is what search_allocation finds on the first seed over one-shot
    losses of choices_to_measure, its candidates retrained as long. "hidden units" keeps the units of largest norm, as many as
    the target's bytes hold at 8 bits. "small dense" is the task's LSTM of one layer, whatever the dense model is, with as many
    units as fill the target's bytes at 8 bits; it is trained from scratch for dense_epochs and then, in 8 bits, for epochs.
    Losses are against the dense control, retrained alike once per seed. schedule: of SCHEDULES, how a model comes into its
    plan. retrain_lr: peak of the learning rate of every retraining, in searches and of the control too; None for that of the
    task's recipe. keep_start: where a model, the control included, has less validation loss before its retraining (in its
    plan, in float), it is measured as it was then; searches judge so too.
    Points that a method cannot reach are listed.
    """
    _check_points(task, methods, target_cr_disks, bits, search_epochs, schedule, device, retrain_lr, keep_start)
    _check_training(task, list(dense), dense_epochs, epochs, distillation_weight)
    _check_counts(worker=workers)
    if UNITS in methods:  # what takes a model's units must be known before any search
        for model in dense.values():
            remove_units(model, min(module.hidden_size for module in rnns(model).values()))
    retraining = Retraining(dense_epochs, epochs, distillation_weight, checkpoints, schedule, device, retrain_lr, keep_start)
    found = search_plans(_at_rate(task, retrain_lr), dense, methods, target_cr_disks, bits, search_epochs, workers, device,
                         keep_start)
    jobs = [(_point, task, model, method, target, seed, bits, found.get(method, {}).get(target), retraining)
            for method in sorted(methods, key=lambda method: method != SMALL)  # the longest first
            for target in target_cr_disks for seed, model in dense.items()]
    jobs += [(dense_control, task, model, variant, seed, retraining)
             for variant in (DENSE, DENSE_ONCE) for seed, model in dense.items()]
    rows = parallel(operator.call, jobs, workers, "retraining")
    points, controls = rows[:-2 * len(dense)], rows[-2 * len(dense):]
    points.sort(key=lambda row: (methods.index(row["method"]), target_cr_disks.index(row["target_cr_disk"])))
    reference = {row["seed"]: row for row in controls if row["variant"] == DENSE}
    reached = [row | {"loss_points": _loss_points(reference[row["seed"]], row)} for row in points if "reason" not in row]
    columns = ["variant", "seed", "valid_accuracy", "valid_loss", "test_accuracy", "test_loss"]
    return Tradeoff(
        pd.DataFrame(reached, columns=RESULT_COLUMNS),
        _summary(reached, reference),
        pd.DataFrame(controls)[columns],
        pd.DataFrame([row for row in points if "reason" in row], columns=["method", "target_cr_disk", "seed", "reason"]),
    )


def search_plans(task: Task, dense: dict, methods: list[str], target_cr_disks: list[float], bits: int, epochs: int,
                 workers: int, device: str = "cpu", keep_start: bool = False) -> dict[str, dict]:
    """Method -> target -> what made_point takes, for those of the methods whose plans are searched."""
    found = {}
    if HYBRID in methods:
        found[HYBRID] = search_hybrids(task, dense, target_cr_disks, epochs, workers, device, keep_start)
    if ALLOCATION in methods:
        found[ALLOCATION] = search_allocations(task, dense, target_cr_disks, bits, epochs, workers, device, keep_start)
    return found


def search_hybrids(task: Task, dense: dict, target_cr_disks: list[float], epochs: int, workers: int, device: str = "cpu",
                   keep_start: bool = False) -> dict:
    """Target -> (sensitive gates, Strength), found on the validation split, or the OutOfReach that says why none is."""
    table = sensitivity_over_seeds(task, dense, [TopK(0.125), BlockCirculant(8)], bits=8, epochs=0, workers=workers,
                                   device=device)
    sensitive = sensitive_gates(classify(table))
    seed, model = next(iter(dense.items()))
    jobs = [(task, model, sensitive, target, seed, epochs, device, keep_start) for target in target_cr_disks]
    return dict(zip(target_cr_disks, parallel(_search_hybrid, jobs, workers, "hybrid plans"), strict=True))


def _search_hybrid(task, model, sensitive, target_cr_disk, seed, epochs, device, keep_start):
    candidates = strengths(_units(model))
    try:
        found = search_hybrid(model, task, sensitive, target_cr_disk, candidates, epochs=epochs, seed=seed, device=device,
                              keep_start=keep_start)
    except OutOfReach as error:
        return error
    return sensitive, found["strength"].iloc[0]


def search_allocations(task: Task, dense: dict, target_cr_disks: list[float], bits: int, epochs: int, workers: int,
                       device: str = "cpu", keep_start: bool = False) -> dict:
    """Target -> {block: (method, width)}, found on the validation split with the first seed, or the OutOfReach that says why
    none is."""
    seed, model = next(iter(dense.items()))
    families = [choices_to_measure(model, [family]) for family in METHODS.values()]
    jobs = [(model, task, choices, ALLOCATION_BITS, 0, seed, device) for choices in families if choices]
    table = pd.concat(parallel(_sensitivity, jobs, workers, "choices"), ignore_index=True)
    jobs = [(task, model, table, target, bits, seed, epochs, device, keep_start) for target in target_cr_disks]
    return dict(zip(target_cr_disks, parallel(_search_allocation, jobs, workers, "allocations"), strict=True))


def _search_allocation(task, model, table, target_cr_disk, bits, seed, epochs, device, keep_start):
    try:
        found = search_allocation(model, task, table, target_cr_disk, bits=bits, epochs=epochs, seed=seed, device=device,
                                  keep_start=keep_start)
    except OutOfReach as error:
        return error
    return {name: (entry.method, entry.format.bits) for name, entry in found["plan"].iloc[0].blocks.items()}


def _point(task, dense, method, target_cr_disk, seed, bits, found, retraining) -> dict:
    """One method at one target: its row, or the reason why it is out of reach. found: by its search, where it has one."""
    point = {"method": method, "target_cr_disk": target_cr_disk, "seed": seed}
    try:
        if method == SMALL:
            row = small_control(task, dense, target_cr_disk, seed, retraining)
        else:
            start = point_start(dense, method, target_cr_disk)
            row = made_point(task, start, method, target_cr_disk, bits, found,
                             lambda plan: _compressed(task, dense, start, plan, method, seed, retraining))
    except OutOfReach as error:
        return point | {"reason": str(error)}
    return row | point | strength_of(row) | {"plan": None, "packed": None}


def point_start(dense, method: str, target_cr_disk: float):
    """The model that a method compresses: the dense one, or what it leaves of its units; OutOfReach where that is nothing."""
    return remove_units(dense, _units_within(dense, target_cr_disk)) if method == UNITS else dense


def made_point(task: Task, model, method: str, target_cr_disk: float, bits: int, found, make: Callable):
    """make(plan) of what a method's search found, of search_hybrids or search_allocations; of hidden units, removed before, of
    CONTROL_BITS for all; else of the method's uniform plan, of the next width where make finds it OutOfReach: that integers
    cannot be packed may show after retraining only. OutOfReach where there is none."""
    signals = calibrate(model, calibration_batches(task))
    if isinstance(found, OutOfReach):
        raise found
    if method == UNITS:
        return make(uniform(model, Dense(), CONTROL_BITS, signals))
    if method == HYBRID:
        return make(hybrid_plan(model, *found, target_cr_disk, signals))
    if method == ALLOCATION:
        return make(Plan({name: plan_block(weight(model, name), *choice) for name, choice in found.items()}, signals))
    return first_uniform(model, METHODS[method], bits, target_cr_disk, signals, make)


def _units_within(dense, target_cr_disk) -> int:
    """As many units of every layer as the target's bytes hold at CONTROL_BITS bits a weight, at most all of them."""
    payload_bits, rnn = bits_within(target_cr_disk, blocks(dense)), rnns(dense).values()
    fewest = max(module.proj_size for module in rnn) + 1  # torch wants more units than are projected to
    sizes = range(fewest, min(module.hidden_size for module in rnn) + 1)
    within = bisect.bisect_right(sizes, payload_bits,
                                 key=lambda units: CONTROL_BITS * dense_weights(blocks(remove_units(dense, units))))
    if not within:
        raise OutOfReach(f"no whole unit of {CONTROL_BITS} bits fits cr_disk {target_cr_disk}")
    return sizes[within - 1]


def strength_of(row: dict) -> dict:
    """What was planned, in a row's words: the methods' labels, and the mean bits of a stored value."""
    packed, labels = row["packed"], {method_label(entry.method): None for entry in row["plan"].blocks.values()}
    return {"strength": ", ".join(labels), "bits": packed.mean_bits}


def _loss_points(control, row) -> float:
    """Test accuracy lost, in points; from whole items, so that no loss is exactly 0."""
    return 100 * (int(control["correct"].sum()) - int(row["correct"].sum())) / len(row["correct"])


def _summary(rows, reference) -> pd.DataFrame:
    """reference: seed -> row of the dense control."""
    small = [row for row in rows if row["method"] == SMALL]
    chosen = _chosen(pd.DataFrame(rows, columns=[*RESULT_COLUMNS, "correct"])).to_dict("records")
    alone = {row["target_cr_disk"]: row["method"] for row in chosen}
    points = {}
    for row in rows:
        points.setdefault((row["method"], row["target_cr_disk"]), []).append(row)
    table = []
    for (method, target), group in points.items():
        frame = pd.DataFrame(group)
        found = _statistics(frame, np.array([reference[row["seed"]]["correct"] for row in group]),
                            np.array([row["correct"] for row in group]))
        table.append({
            "method": method, "target_cr_disk": target, "units": group[0]["hidden_size"],
            "strength": group[0]["strength"], "bits": frame["bits"].mean(),
            "loss std": frame["loss_points"].std(ddof=1), "chosen": alone.get(target),
        } | {name: frame[name].mean() for name in ("cr_params", "cr_bits", "cr_disk", "cr_model", "valid_loss")} | found
            | _against("vs_small", group, small) | _against("vs_chosen", group, chosen))
    summary = pd.DataFrame(table, columns=SUMMARY_COLUMNS)
    return summary.assign(front=pareto_front(summary["cr_disk"], summary["loss (points)"], lower_y=True))


def _against(name, group, rivals) -> dict:
    """Accuracy that a method loses against the rival of its target, paired by seed and test item (points). Empty where no seed
    has both, and for the rival itself."""
    rivals = {(row["target_cr_disk"], row["seed"]): row for row in rivals if row["method"] != group[0]["method"]}
    paired = [(rivals[key]["correct"], row["correct"]) for row in group
              if (key := (row["target_cr_disk"], row["seed"])) in rivals]
    if not paired:
        return {}
    low, mean, high = paired_interval(*map(np.array, zip(*paired, strict=True)), seed=0)
    return {name: mean} | ({f"{name}_low": low, f"{name}_high": high} if len(paired) > 1 else {})


def over_folds(rows: pd.DataFrame) -> pd.DataFrame:
    """What a method loses on speakers (or other folds of the data) that it has not heard: one row a method and target.

    rows: of the sweep of a tradeoff over `split`, as results(name, records="results") gives them. A fold counts once, by the
    mean of its seeds: intervals are Student's t over the folds (95 %), paired by fold; loss against the dense control and, as
    vs_small, against the small dense network of the target, in the folds that have both (points; cross-entropy in nats). Folds
    share most of their training data, so the intervals are approximate, rather too narrow, and they are not corrected for the
    number of comparisons. folds, seeds: how many reached the target, and the fewest models of any of them. ValueError for rows
    that differ in more than method, target, split and seed.
    """
    point = ["p_split", "m_target_cr_disk", "m_seed"]
    _check_folds("over_folds", rows)
    small = rows[rows["m_method"] == SMALL].set_index(point)["m_test_accuracy"]
    rows = rows.assign(vs_small=small.reindex(pd.MultiIndex.from_frame(rows[point])).to_numpy() - rows["m_test_accuracy"])
    rows.loc[rows["m_method"] == SMALL, "vs_small"] = np.nan
    table = []
    for (method, target), group in rows.groupby(["m_method", "m_target_cr_disk"], sort=False):
        by_fold = group.groupby("p_split")
        folds = by_fold[["m_loss_points", "vs_small", "m_cr_disk", "m_test_accuracy", "m_test_loss"]].mean()
        losses, against = t_interval(folds["m_loss_points"]), t_interval(folds["vs_small"].dropna())
        table.append({
            "method": method, "target_cr_disk": target, "folds": len(folds), "seeds": by_fold["m_seed"].nunique().min(),
            "cr_disk": folds["m_cr_disk"].mean(), "accuracy %": folds["m_test_accuracy"].mean(),
            "accuracy std": folds["m_test_accuracy"].std(ddof=1), "cross-entropy": folds["m_test_loss"].mean(),
            "loss (points)": losses.mean, "low": losses.low, "high": losses.high,
            "vs_small": against.mean, "vs_small_low": against.low, "vs_small_high": against.high,
        })
    return pd.DataFrame(table)


def with_chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a tradeoff's sweep, and once more, as the method CHOSEN, those of the method alone that the validation split
    takes for their fold and target: the least mean cross-entropy there, of equals the first, of the methods that have all seeds
    that any row of that fold and target has.

    rows: as of over_folds. over_folds and pairs_over_folds then say what a choice without a look at the test gives. It may
    differ from fold to fold, so the best method after the test, one for all folds, may lie on either side. Methods alone: all
    but the small dense network and the two that mix methods. Their searches know a short retraining of the first seed; this
    choice knows every seed retrained in full. Intervals take it as given. In a fold whose choice it was, a method differs from
    CHOSEN by 0.
    """
    _check_folds("with_chosen", rows, "m_valid_loss")
    rows = rows.reset_index(drop=True)
    names = {f"m_{name}": name for name in ("method", "target_cr_disk", "seed", "valid_loss")}
    chosen = rows.loc[_chosen(rows[["p_split", *names]].rename(columns=names), "p_split").index]
    return pd.concat([rows, chosen.assign(m_method=CHOSEN)], ignore_index=True)


def _chosen(rows, *fold) -> pd.DataFrame:
    """What with_chosen takes of rows with the columns method, target_cr_disk, seed, valid_loss and fold."""
    chosen = [rows.iloc[:0]]
    for _, group in rows.groupby([*fold, "target_cr_disk"]):
        by_method = group[~group["method"].isin(NOT_ALONE)].groupby("method", sort=False)
        losses = by_method["valid_loss"].agg(lambda values: values.mean(skipna=False))
        losses = losses[by_method["seed"].nunique() == group["seed"].nunique()].dropna()
        if len(losses):
            chosen.append(group[group["method"] == losses.idxmin()])
    return pd.concat(chosen)


def pairs_over_folds(rows: pd.DataFrame, controls: pd.DataFrame | None = None) -> pd.DataFrame:
    """By how much one method is better than another on speakers (or other folds) that were not heard: one row a target and
    pair, in the order of the rows.

    rows, how a fold counts, and what is refused: as of over_folds. controls: results(name, records="controls") of the same
    sweep; then the dense networks stand beside the methods at every target. better: test accuracy of `method` minus that of
    `other` (points); added: its test cross-entropy minus the other's (nats); both over the seeds that both have, with Student's
    t over the folds (95 %), approximate as in over_folds. folds, seeds: how many have both, and the fewest models of any fold.
    Pairs share networks and folds, and no interval is corrected for their number: one that is picked because it excludes 0 is
    rather too good. ValueError too for controls with several results of one seed.
    """
    _check_folds("pairs_over_folds", rows)
    measured, unit = {"better": "m_test_accuracy", "added": "m_test_loss"}, ["p_split", "m_seed"]
    if controls is not None:
        # Every run of a fold has the same networks, so their results are the same too.
        dense = controls[[*unit, "m_variant", *measured.values()]].drop_duplicates().rename(columns={"m_variant": "m_method"})
        if dense.duplicated([*unit, "m_method"]).any():
            raise ValueError("pairs_over_folds needs the controls of one sweep, got several results of one seed")
        targets = rows[["m_target_cr_disk"]].drop_duplicates()
        rows = pd.concat([rows, targets.merge(dense.sort_values("m_method"), how="cross")])
    table = []
    for target, group in rows.groupby("m_target_cr_disk", sort=False):
        wide = group.pivot(index=unit, columns="m_method", values=list(measured.values()))
        for method, other in itertools.combinations(group["m_method"].unique(), 2):
            by_fold = pd.DataFrame({name: wide[what, method] - wide[what, other]
                                    for name, what in measured.items()}).dropna().groupby("p_split")
            row = {"target_cr_disk": target, "method": method, "other": other, "folds": len(by_fold),
                   "seeds": by_fold.size().min() if len(by_fold) else 0}
            for name in measured:
                found = t_interval(by_fold[name].mean())
                row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
            table.append(row)
    return pd.DataFrame(table)


def _check_folds(who, rows, *more):
    needed = ["m_method", "m_target_cr_disk", "m_seed", "p_split", *more]
    if missing := [name for name in needed if name not in rows]:
        raise ValueError(f'{who} needs the rows of results(name, records="results") of a sweep over split, got some without '
                         f"{', '.join(missing)}")
    if rows.duplicated(["m_method", "p_split", "m_target_cr_disk", "m_seed"]).any():
        raise ValueError(f"{who} needs one row for each method, target, split and seed, got several of some: choose one "
                         "setting of what else the sweep varies")
    if other := _several(rows, ("split",)):
        raise ValueError(f"{who} needs rows that differ in method, target, split and seed alone, got several values of {other}")


def _several(rows, apart) -> str:
    """Parameters of a sweep's rows with several values, but for those named and those that make no setting."""
    same = {f"p_{name}" for name in (*apart, *VARIED)}
    return ", ".join(name.removeprefix("p_") for name in rows
                     if name.startswith("p_") and name not in same and rows[name].nunique(dropna=False) > 1)


def over_settings(rows: pd.DataFrame, **reference) -> pd.DataFrame:
    """What settings of a tradeoff's sweep do to its networks: one row for each method, target and setting, the reference first.

    rows: as results(name, records="results") gives them; reference: the setting that the others are compared with, by the names
    of all parameters that make one, as schedule="one-shot", distillation_weight=0.0. gained (test accuracy, points) and added
    (test cross-entropy, nats): means with 95 % intervals of Student's t over the seeds, paired by seed, for this test split:
    its items are not drawn anew, unlike in a Tradeoff's intervals. Not corrected for the number of comparisons; empty for the
    reference and where it has none of the seeds. Every mean is over the `seeds` that the reference has too, where it has one.
    ValueError for a parameter that the rows do not have, a setting that none of them has, and rows that differ in more.
    """
    if "m_method" not in rows:
        raise ValueError('over_settings needs the rows of results(name, records="results"), got some without m_method')
    unknown = [name for name in reference if f"p_{name}" not in rows]
    if unknown or not reference:
        raise ValueError(f"over_settings needs parameters of the rows, got {', '.join(unknown) or 'none'}")
    if other := _several(rows, reference):
        raise ValueError(f"over_settings needs rows that differ in {', '.join(reference)} alone, got several values of "
                         f"{other}: name it too, or choose one")
    point = ["m_method", "m_target_cr_disk", "m_seed"]
    given = rows[[f"p_{name}" for name in reference]].astype(object)
    settings = given.where(given.notna(), None).apply(lambda row: _setting(dict(zip(reference, row, strict=True))), axis=1)
    # As the rows have it: 0 where they say 0.0, 8 where a run without a value made 8.0 of it.
    alike = {name: given.loc[given[f"p_{name}"] == value, f"p_{name}"] for name, value in reference.items()
             if isinstance(value, (int, float))}
    first = _setting({name: alike[name].iloc[0] if len(alike.get(name, ())) else value for name, value in reference.items()})
    rows = rows.assign(setting=settings)
    if first not in set(settings):
        raise ValueError(f"over_settings finds no row with {first}, got {'; '.join(dict.fromkeys(settings))}")
    if rows.duplicated([*point, "setting"]).any():
        raise ValueError("over_settings needs one row for each method, target, seed and setting, got several of some")
    rows = rows.sort_values("setting", key=lambda column: column != first, kind="stable").set_index(point)
    base = rows[rows["setting"] == first]
    table = []
    for (method, target, setting), group in rows.groupby([*point[:2], "setting"], sort=False):
        paired = group[group.index.isin(base.index)]
        group = paired if len(paired) else group
        row = {"method": method, "target_cr_disk": target, "setting": setting, "reference": setting == first,
               "seeds": len(group), "cr_disk": group["m_cr_disk"].mean(), "accuracy %": group["m_test_accuracy"].mean(),
               "cross-entropy": group["m_test_loss"].mean()}
        for name, column in (("gained", "m_test_accuracy"), ("added", "m_test_loss")):
            change = (paired[column] - base[column].reindex(paired.index)).to_numpy()
            found = t_interval([] if row["reference"] else change)
            row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        table.append(row)
    return pd.DataFrame(table)


def _setting(values) -> str:
    """Parameters in words; lists as a sweep's table has them."""
    return ", ".join(f"{name} {json.dumps(value) if isinstance(value, list) else value}" for name, value in values.items())
