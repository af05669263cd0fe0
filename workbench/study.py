"""One study: dense models, their compressed versions and the controls, over several seeds, on as many processes.

Every training runs single-threaded in a process of its own, so results do not depend on the number of workers.
"""

import hashlib
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from workbench import constrain, models, train
from workbench.constrain import attach, bake, compress, pack
from workbench.gates import blocks
from workbench.methods import BlockCirculant, Dense, Method, base, circulant, sparse
from workbench.methods import dense as dense_method
from workbench.packed import PackedLayer, PackedModel
from workbench.plan import Plan, uniform
from workbench.quantise import calibrate
from workbench.sensitivity import (
    LOSSLESS_BITS,
    Strength,
    calibration_batches,
    check_target,
    hybrid_plan,
    nearest_uniform,
    sensitivity_table,
    strengths,
    uniform_topk,
)
from workbench.tasks import Task
from workbench.train import evaluate, fit, paired_interval

CONTROL_BITS = 8  # weights of the small dense control
DENSE = "dense control"
DENSE_ONCE = "dense, trained once"  # where retraining makes the dense control worse, this shows it
HYBRID = "hybrid"
SMALL = "small dense 8-bit"
UNIFORM_TOPK = "uniform Top-k"
UNIFORM_CIRCULANT = "uniform circulant"
DENSE_16 = "dense 16-bit"  # the array's baseline
VARIANTS = (DENSE, DENSE_ONCE, HYBRID, SMALL, UNIFORM_TOPK, UNIFORM_CIRCULANT)


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
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"a study needs different seeds of at least 0, got {seeds}")


def check_study(task: Task, *, hidden_size: int, target_cr_disk: float, seeds: list[int], epochs: int, retrain_epochs: int,
                distillation_weight: float, steps: int, workers: int) -> None:
    """Refuse bad values before any training."""
    strengths(hidden_size)
    check_target(target_cr_disk)
    check_seeds(seeds)
    for count in (epochs, retrain_epochs):
        replace(task.recipe, epochs=count)
    if not 0 <= distillation_weight <= 1:
        raise ValueError(f"a study needs a distillation_weight in [0, 1], got {distillation_weight}")
    for name, count in (("step", steps), ("worker", workers)):
        if count < 1:
            raise ValueError(f"a study needs at least 1 {name}, got {count}")


def train_dense(task: Task, hidden_size: int, seeds: list[int], *, epochs: int, workers: int,
                checkpoints: str | Path | None = None) -> dict[int, torch.nn.Module]:
    """Seed -> trained dense classifier. checkpoints: a directory where finished trainings are kept and found again."""
    check_seeds(seeds)
    models.build_classifier(task, hidden_size, seed=seeds[0])  # refuses a bad size before any process starts
    jobs = [(task, hidden_size, seed, epochs, checkpoints) for seed in seeds]
    return dict(zip(seeds, parallel(_train_dense, jobs, workers, "dense models"), strict=True))


def _train_dense(task, hidden_size, seed, epochs, checkpoints):
    model = models.build_classifier(task, hidden_size, seed=seed)
    key = f"dense {hidden_size} {seed} {epochs}"
    return _once(model, task, key, checkpoints, lambda: fit(model, task, seed=seed, epochs=epochs, progress=False))


def _once(model, task, key, checkpoints, training, constraints=()):
    """Run the training, or load what an earlier run of the same training left in the directory."""
    if checkpoints is None:
        training()
        return model
    # What decides the result: the task's data and recipe, the arguments, and the code that trains.
    code = b"".join(Path(module.__file__).read_bytes() for module in (models, train, *constraints))
    name = hashlib.sha256(f"{task.digest} {task.split} {task.recipe} {key} ".encode() + code).hexdigest()[:16]
    path = Path(checkpoints) / f"{name}.safetensors"
    if path.is_file():
        train.load_checkpoint(model, path)
    else:
        training()
        path.parent.mkdir(parents=True, exist_ok=True)
        train.save_checkpoint(model, path, {"task": task.name, "split": task.split, "training": key})
    return model


def sensitivity_over_seeds(task: Task, dense: dict[int, torch.nn.Module], methods: list[Method], *, bits: int, epochs: int,
                           workers: int) -> pd.DataFrame:
    """sensitivity_table of every seed's model, one below the other, with the seed as a column."""
    jobs = [(model, task, methods, bits, epochs, seed) for seed, model in dense.items()]
    tables = parallel(_sensitivity, jobs, workers, "sensitivity")
    return pd.concat([table.assign(seed=seed) for seed, table in zip(dense, tables, strict=True)], ignore_index=True)


def _sensitivity(model, task, methods, bits, epochs, seed):
    return sensitivity_table(model, task, methods, bits=bits, epochs=epochs, seed=seed)


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
        with its 95 % interval, paired by seed and test item (points)."""
        rows = []
        for variant, group in self.results.groupby("variant", sort=False):
            low, mean, high = paired_interval(self.correct[DENSE], self.correct[variant], seed=0)
            rows.append({
                "variant": variant, "units": int(group["hidden_size"].iloc[0]), "arithmetic": group["arithmetic"].iloc[0],
                "cr_disk": group["cr_disk"].mean(), "accuracy %": group["test_accuracy"].mean(),
                "std": group["test_accuracy"].std(ddof=1), "cross-entropy": group["test_loss"].mean(),
                "loss (points)": mean, "low": low, "high": high, "seeds": len(group),
            })
        return pd.DataFrame(rows)


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
    # The plans come first: a target out of reach is refused before any training.
    plans = {seed: _plans(model, task, sensitive, strength, target_cr_disk, variants) for seed, model in dense.items()}
    jobs = [(task, model, plans[seed].get(variant), variant, seed, dense_epochs, epochs, distillation_weight, checkpoints,
             target_cr_disk) for variant in sorted(variants, key=lambda v: v != SMALL) for seed, model in dense.items()]
    rows = parallel(_variant, jobs, workers, "retraining")
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
    makers = {
        HYBRID: lambda: hybrid_plan(model, sensitive, strength, target_cr_disk, signals),
        UNIFORM_TOPK: lambda: uniform_topk(model, strength.topk_bits, target_cr_disk, signals),
        UNIFORM_CIRCULANT: lambda: uniform_circulant(model, target_cr_disk, signals),
    }
    return {variant: make() for variant, make in makers.items() if variant in variants}


def array_layers(model: torch.nn.Module, task: Task, comparison: Comparison, seed: int, strength: Strength,
                 target_cr_disk: float) -> dict[str, PackedLayer]:
    """Label -> packed layer of one seed for the array: dense 16-bit, the small dense control, both uniform plans, hybrid.

    A variant that the comparison retrained is taken from there; a uniform plan that it did not is packed one-shot.
    """
    signals = calibrate(model, calibration_batches(task))
    packed = {DENSE_16: pack(model, uniform(model, Dense(), LOSSLESS_BITS, signals))}
    for variant, plan in _plans(model, task, [], strength, target_cr_disk, (UNIFORM_TOPK, UNIFORM_CIRCULANT)).items():
        retrained = comparison.packed.get(variant)
        packed[variant] = retrained[seed] if retrained else pack(model, plan)
    packed |= {variant: comparison.packed[variant][seed] for variant in (SMALL, HYBRID)}
    return {label: next(iter(p.layers.values())) for label, p in packed.items()}


def _stored_parameters(model) -> int:
    """Parameters of a dense classifier as it would be stored: the two biases of its LSTM merged into one."""
    merged = sum(p.numel() for name, p in model.named_parameters() if "bias_hh" in name)
    return sum(p.numel() for p in model.parameters()) - merged


def uniform_circulant(model, target_cr_disk: float, signals) -> Plan:
    """Every gate block-circulant: of all power-of-two blocks at 4 to 8 bits the plan whose size comes nearest to the budget."""
    hidden = {b.shape[0] for b in blocks(model).values()}
    sizes = [2**n for n in range(1, 11) if all(h % 2**n == 0 for h in hidden)]
    return nearest_uniform(model, [BlockCirculant(k) for k in sizes], range(4, 9), target_cr_disk, signals)


def small_hidden_size(num_features: int, payload_bits: int) -> int:
    """Units of the smallest 8-bit dense LSTM whose matrices take at least payload_bits (ties go to the control)."""
    hidden_size = 1
    while 4 * hidden_size * (num_features + hidden_size) * CONTROL_BITS < payload_bits:
        hidden_size += 1
    return hidden_size


def _variant(task, dense, plan, variant, seed, dense_epochs, epochs, distillation_weight, checkpoints, target_cr_disk):
    """Train one variant of one seed and measure it; the only place of a study that reads the test split."""
    settings = {"seed": seed, "epochs": epochs, "progress": False}
    if distillation_weight:
        settings |= {"teacher": dense, "distillation_weight": distillation_weight}
    hidden_size = next(iter(blocks(dense).values())).shape[0]
    dense_weights = sum(b.shape[0] * b.shape[1] for b in blocks(dense).values())
    start = dense
    if variant == SMALL:
        hidden_size = small_hidden_size(task.num_features, math.ceil(32 * dense_weights / target_cr_disk))
        start = _train_dense(task, hidden_size, seed, dense_epochs, checkpoints)
        plan = uniform(start, Dense(), CONTROL_BITS, calibrate(start, calibration_batches(task)))
    row = {"variant": variant, "seed": seed, "hidden_size": hidden_size, "plan": None, "packed": None}
    if variant in (DENSE, DENSE_ONCE):
        measured = bake(dense)
        before = evaluate(measured, task, "valid")
        if variant == DENSE:
            key = f"dense control {hidden_size} {seed} {dense_epochs} {epochs} {distillation_weight}"
            _once(measured, task, key, checkpoints, lambda: fit(measured, task, **settings))
        row |= {"arithmetic": "float", "cr_params": 1.0, "cr_bits": 1.0, "cr_disk": 1.0, "cr_model": 1.0,
                "rnn_bytes": 4 * dense_weights}
    else:
        before = evaluate(attach(start, pack(start, plan)), task, "valid")
        compressed = compress(start, plan)
        key = f"{variant} {hidden_size} {seed} {dense_epochs} {epochs} {distillation_weight} {json.dumps(plan.to_json())}"
        _once(compressed, task, key, checkpoints, lambda: fit(compressed, task, **settings),
              constraints=(constrain, base, circulant, dense_method, sparse))
        # Retraining moves the ranges of the signals, so their formats are calibrated on the model that is packed.
        plan = plan.with_signals(calibrate(compressed, calibration_batches(task)))
        packed = pack(compressed, plan)
        measured = attach(compressed, packed)
        # Every ratio is against the dense model, also that of the control with fewer units.
        dense_bits, stored = 32 * dense_weights, sum(block.stored_values for block in packed.blocks.values())
        rest = 32 * (packed.rnn_bias_params + packed.other_params)
        row |= {"arithmetic": "integers", "cr_params": dense_weights / stored,
                "cr_bits": dense_bits / packed.value_bits, "cr_disk": dense_bits / packed.storage_bits,
                "cr_model": 32 * _stored_parameters(dense) / (packed.storage_bits + rest),
                "rnn_bytes": packed.storage_bits // 8, "plan": plan, "packed": packed}
    valid, test = evaluate(measured, task, "valid"), evaluate(measured, task, "test")
    return row | {"valid_accuracy_before": before.accuracy, "valid_accuracy": valid.accuracy, "valid_loss": valid.loss,
                  "test_accuracy": test.accuracy, "test_loss": test.loss, "correct": test.correct}


def variants(uniform_controls: bool) -> list[str]:
    """The variants of a comparison: always the hybrid model and the two dense controls."""
    return [DENSE, DENSE_ONCE, HYBRID, SMALL] + [UNIFORM_TOPK, UNIFORM_CIRCULANT] * uniform_controls
