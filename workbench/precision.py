"""Studies of fixed point: bits of weights and signals against quality, after training and in training, over cells and seeds.

Quality is accuracy in percent, of a language model perplexity; both are read on the integer engine. Losses are against the
float model of the same cell and seed: points of accuracy, or percent of its perplexity.
"""

import copy
import hashlib
import json
import operator
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from workbench import emulation
from workbench.allocation import Allocation, allocate
from workbench.budget import WIDTHS, OutOfReach, bits_within, check_target, full_bits
from workbench.constrain import attach, constrained_code, pack
from workbench.emulation import emulate, mismatch_rate
from workbench.fixedpoint import MAX_EXACT_BITS, TABLES, QFormat
from workbench.gates import blocks, dense_weights, layers, weights
from workbench.methods import method_from_label, method_label
from workbench.models import build_classifier, build_language_model
from workbench.packed import GATES, PackedModel, signals_of, table_uses
from workbench.plan import LOSSLESS_BITS, Plan, uniform
from workbench.quantise import CLIPPINGS, Observation, observe
from workbench.runs import replace_file
from workbench.sensitivity import calibration_batches, check_sensitivity, sample_batch, sensitivity_table
from workbench.signals import signal_errors
from workbench.study import check_seeds, parallel
from workbench.tasks import LanguageTask, Task
from workbench.train import baseline, checkpoint_folder, code_digest, evaluate, fingerprint, fit, paired_interval

FLOAT, AFTER, IN = "float", "after training", "in training"
AS_TRAINED, TRAINED_ON = "as trained", "trained on"  # the float models: once, and for the epochs of those trained in integers
CELLS = tuple(GATES)
ALL_SIGNALS = {signal for cell in CELLS for signal in signals_of(cell)}
SWEEP_WIDTHS = range(2, 17)  # bits of weights and signals
POINT = ("cell", "when", "method", "weight_bits", "activation_bits")  # what tells points apart
COLUMNS = ["cell", "seed", "when", "method", "weight_bits", "activation_bits", "cr_disk", "cr_model", "rnn_bytes", "valid",
           "test", "valid_loss", "test_loss", "control", "valid_lost", "lost", "cell_bits", "mismatches %",
           "refused"]  # fmt: skip


@dataclass(frozen=True)
class Arithmetic:
    """What all points of a study share. method: label of the weights' method ("Dense", "Structured 4"); clip: how the formats
    of the signals follow from their magnitudes; activation: kind of the activation tables; cell_bits: least width of an LSTM's
    cell state, whose sum over the steps needs more bits than what is computed from it."""

    method: str = "Dense"
    clip: str = "mse"
    activation: str = "linear"
    cell_bits: int = 12

    def __post_init__(self):
        method_from_label(self.method)
        for name, value, known in (("clip", self.clip, CLIPPINGS), ("activation", self.activation, TABLES)):
            if value not in known:
                raise ValueError(f"a study of fixed point knows as {name} {', '.join(known)}, got {value!r}")
        if self.cell_bits not in SWEEP_WIDTHS:
            raise ValueError(f"a study of fixed point needs cell_bits from {SWEEP_WIDTHS[0]} to {SWEEP_WIDTHS[-1]}, got "
                             f"{self.cell_bits}")

    def signals(self, observation: Observation, bits: int) -> dict:
        """Formats of all signals at that width, a cell state at cell_bits at least."""
        return observation.formats(dict.fromkeys(ALL_SIGNALS, bits) | {"cell": max(bits, self.cell_bits)}, self.clip)


@dataclass(frozen=True)
class Tuning:
    """Training inside the number formats. epochs: 0 trains nothing; lr: peak of the one-cycle schedule."""

    epochs: int
    lr: float
    device: str = "cpu"
    checkpoints: str = "checkpoints"


def check_precision(task: Task | LanguageTask, *, cells: list[str], hidden_size: int, seeds: list[int], epochs: int | None,
                    weight_bits: list[int], activation_bits: list[int], trained: list[str], look_into: str, low_bits: int,
                    target_cr_disks: list[float], mixed_bits: int, arithmetic: Arithmetic, tuning: Tuning,
                    workers: int) -> None:
    """Refuse the bad values of a study of fixed point before any training: also a method that does not fit the layers and a
    ratio that it cannot reach."""
    check_seeds(seeds)
    if not cells or len(set(cells)) != len(cells) or not set(cells) <= set(CELLS):
        raise ValueError(f"a study of fixed point needs different cells of {', '.join(CELLS)}, got {cells}")
    for name, widths in (("weight_bits", weight_bits), ("activation_bits", activation_bits), ("low_bits", [low_bits]),
                         ("mixed_bits", [mixed_bits])):
        if not widths or len(set(widths)) != len(widths) or not set(widths) <= set(SWEEP_WIDTHS):
            raise ValueError(f"a study of fixed point needs different {name} from {SWEEP_WIDTHS[0]} to {SWEEP_WIDTHS[-1]}, "
                             f"got {widths}")
    widths_of(look_into)
    if len(set(map(widths_of, trained))) != len(trained):
        raise ValueError(f"a study of fixed point needs different pairs of widths as trained, got {trained}")
    for name, value in (("hidden_size", hidden_size), ("workers", workers)):
        if value < 1:
            raise ValueError(f"a study of fixed point needs {name} of at least 1, got {value}")
    if epochs is not None:
        replace(task.recipe, epochs=epochs)
    if tuning.epochs:
        replace(task.recipe, epochs=tuning.epochs, lr=tuning.lr)
    for target in target_cr_disks:
        check_target(target)
    if len(set(target_cr_disks)) != len(target_cr_disks):
        raise ValueError(f"a study of fixed point needs different target_cr_disks, got {target_cr_disks}")
    build, method = build_language_model if is_language(task) else build_classifier, method_from_label(arithmetic.method)
    for cell in cells:
        model = build(task, hidden_size, seed=0, cell=cell)
        check_sensitivity(model, [method], weight_bits, 0)
        smallest = pd.DataFrame([{"block": name, "method": arithmetic.method, "bits": WIDTHS[0], "excess_loss": 0.0}
                                 for name in blocks(model)])
        signals = {name: dict.fromkeys(signals_of(cell, False), QFormat(WIDTHS[-1], 0)) for name in layers(model)}
        for target in target_cr_disks:
            allocate(model, smallest, target, signals)
            _widest(model, method, target)


def widths_of(pair: str) -> tuple[int, int]:
    """ "4/6" -> 4-bit weights with 6-bit signals."""
    found = re.fullmatch(r"(\d+)/(\d+)", pair) if isinstance(pair, str) else None
    if not found or not {int(found[1]), int(found[2])} <= set(SWEEP_WIDTHS):
        raise ValueError(f'a study of fixed point names pairs of widths like "4/6", weights/signals, from {SWEEP_WIDTHS[0]} to '
                         f"{SWEEP_WIDTHS[-1]} bits, got {pair!r}")
    return int(found[1]), int(found[2])


def train_baselines(task: Task | LanguageTask, cells: list[str], hidden_size: int, seeds: list[int], *, epochs: int | None,
                    device: str, checkpoints: str, workers: int) -> dict[tuple[str, int], torch.nn.Module]:
    """(cell, seed) -> trained float model; epochs None takes the task's recipe. Finished ones in `checkpoints` are loaded."""
    jobs = [(task, cell, hidden_size, seed, epochs, device, checkpoints) for cell in cells for seed in seeds]
    return dict(zip(((cell, seed) for cell in cells for seed in seeds), parallel(_baseline, jobs, workers, "float models"),
                    strict=True))


def _baseline(task, cell, hidden_size, seed, epochs, device, checkpoints):
    return baseline(task, cell=cell, hidden_size=hidden_size, seed=seed, epochs=epochs, device=device, checkpoints=checkpoints,
                    progress=False)[0]


def observe_models(task: Task | LanguageTask, models: dict[tuple[str, int], torch.nn.Module], *,
                   workers: int) -> dict[tuple[str, int], Observation]:
    """(cell, seed) -> how large the signals of that model become on the training split: what every format is chosen from."""
    jobs = [(task, model) for model in models.values()]
    return dict(zip(models, parallel(_observe, jobs, workers, "calibration"), strict=True))


def _observe(task, model):
    return observe(model, calibration_batches(task))


def is_language(task) -> bool:
    return isinstance(task, LanguageTask)


def quality_name(task) -> str:
    """What is measured, with its unit."""
    return "perplexity" if is_language(task) else "accuracy %"


def lost_name(task) -> str:
    """In what losses are given."""
    return "perplexity above float %" if is_language(task) else "accuracy lost (points)"


@dataclass(frozen=True)
class Precision:
    """results: one row per point and seed (COLUMNS), the float models first; refused says why a point has no integers.
    correct: point (POINT) -> seed -> (test items,) bool."""

    task: Task | LanguageTask
    results: pd.DataFrame
    correct: dict[tuple, dict[int, np.ndarray]]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row a point: mean and standard deviation over the seeds; of accuracies the loss with its 95 % interval, paired
        by seed and test item. control: the float model that the loss is against, or both where the seeds differ."""
        rows, reached = [], self.results[self.results["refused"].isna()]
        for key, group in reached.groupby(list(POINT), sort=False):
            row = dict(zip(POINT, key, strict=True))
            row |= {name: group[name].mean()
                    for name in ("cr_disk", "cr_model", "rnn_bytes", "valid", "test", "valid_lost", "lost")}
            row |= {"test std": group["test"].std(ddof=1), "lost std": group["lost"].std(ddof=1), "seeds": len(group),
                    "control": " or ".join(sorted(set(group["control"]))), "cell_bits": group["cell_bits"].iloc[0],
                    "mismatches %": group["mismatches %"].mean()}
            if not is_language(self.task) and row["when"] != FLOAT and len(group) > 1:
                pairs = [(self.correct[row["cell"], FLOAT, control, 32, 32][seed], self.correct[key][seed])
                         for seed, control in zip(group["seed"], group["control"], strict=True)]
                row["low"], _, row["high"] = paired_interval(*map(np.array, zip(*pairs, strict=True)), seed=0)
            rows.append(row)
        return pd.DataFrame(rows)

    def refused(self) -> pd.DataFrame:
        """The points without integers, and why."""
        rows = self.results[self.results["refused"].notna()]
        return rows[["cell", "seed", "when", "weight_bits", "activation_bits", "refused"]]


def measure_precision(task: Task | LanguageTask, models: dict[tuple[str, int], torch.nn.Module],
                      observations: dict[tuple[str, int], Observation], weight_bits: list[int], activation_bits: list[int],
                      trained: list[str], *, arithmetic: Arithmetic, tuning: Tuning, workers: int) -> Precision:
    """Every pair of widths after training, those of `trained` ("3/4") also after training inside them; and the float models,
    once as they are and once trained on for the same epochs.

    Losses are against the float model as it was trained; of what was trained on in its formats against that of the two
    float models that has the lower validation loss, so that neither too little nor too much training of the control flatters.
    The test split is read once per point and decides nothing.
    """
    jobs = [(_float_point, task, *place, model, tuning, further) for place, model in models.items()
            for further in ((False, True) if tuning.epochs and trained else (False,))]
    jobs += [(_trained_point, task, *place, model, observations[place], arithmetic, tuning, *widths_of(pair))
             for pair in trained for place, model in models.items() if tuning.epochs]
    jobs += [(_after_point, task, *place, model, observations[place], arithmetic, tuning, weights, signals)
             for place, model in models.items() for signals in activation_bits for weights in weight_bits]
    rows = parallel(operator.call, jobs, workers, "points")
    controls = {}  # (cell, seed) -> its float models, as trained first
    for row in rows:
        if row["when"] == FLOAT:
            controls.setdefault((row["cell"], row["seed"]), []).append(row)
    correct = {}
    for row in rows:
        if (found := row.pop("correct", None)) is not None:
            correct.setdefault(tuple(row[name] for name in POINT), {})[row["seed"]] = found
            floats = controls[row["cell"], row["seed"]]
            control = min(floats, key=lambda one: one["valid_loss"]) if row["when"] == IN else floats[0]
            row |= {"control": control["method"]} | {name: _lost(task, control[split], row[split])
                                                     for name, split in (("valid_lost", "valid"), ("lost", "test"))}
    return Precision(task, pd.DataFrame(rows, columns=COLUMNS), correct)


def _lost(task, control, quality):
    return 100 * (quality / control - 1) if is_language(task) else control - quality


def _quality(task, evaluation):
    return evaluation.perplexity if is_language(task) else evaluation.accuracy


def _measured(task, model, device) -> dict:
    """The only place of this study that reads the test split. device: of the layers that stay in float."""
    model = model.to(device)
    valid, test = evaluate(model, task, "valid"), evaluate(model, task, "test")
    return {"valid": _quality(task, valid), "test": _quality(task, test), "valid_loss": valid.loss, "test_loss": test.loss,
            "correct": test.correct}


def _float_point(task, cell, seed, model, tuning, further) -> dict:
    """The float model as it was trained, or trained on as long as the quantised ones."""
    if further:
        model = _tuned(task, copy.deepcopy(model), tuning, seed, _checkpoint(task, model, tuning, seed, f"{cell} float"))
    row = {"cell": cell, "seed": seed, "when": FLOAT, "method": TRAINED_ON if further else AS_TRAINED, "cr_disk": 1.0,
           "cr_model": 1.0, "rnn_bytes": 4 * dense_weights(blocks(model)), "weight_bits": 32, "activation_bits": 32}
    return row | _measured(task, model, tuning.device)


def _after_point(task, cell, seed, model, observation, arithmetic, tuning, weight_bits, activation_bits) -> dict:
    """Post-training quantisation."""
    row = _place(cell, seed, AFTER, arithmetic, weight_bits, activation_bits)
    try:
        packed = pack(model, _plan(model, arithmetic, weight_bits, arithmetic.signals(observation, activation_bits)))
    except ValueError as error:
        return row | {"refused": str(error)}
    return row | _sizes(packed) | _measured(task, attach(model, packed), tuning.device)


def _trained_point(task, cell, seed, model, observation, arithmetic, tuning, weight_bits, activation_bits) -> dict:
    """Quantisation-aware training of weights and every internal signal, inside formats that do not change any more."""
    row = _place(cell, seed, IN, arithmetic, weight_bits, activation_bits)
    try:
        emulated, plan, file = _emulated(task, model, observation, weight_bits, activation_bits, arithmetic, tuning, seed, cell)
    except ValueError as error:
        return row | {"refused": str(error)}
    trained = _tuned(task, emulated, tuning, seed, file)  # what is wrong here says nothing of the formats
    try:
        packed = pack(trained, plan)
    except ValueError as error:
        return row | {"refused": str(error)}
    row["mismatches %"] = max(found["mismatches %"] for found in mismatch_rate(trained, packed, [sample_batch(task)]))
    return row | _sizes(packed) | _measured(task, attach(trained, packed), tuning.device)


def quantised_training(task: Task | LanguageTask, model: torch.nn.Module, observation: Observation, weight_bits: int,
                       activation_bits: int, *, arithmetic: Arithmetic, tuning: Tuning, seed: int,
                       name: str) -> tuple[torch.nn.Module, Plan]:
    """The model trained inside its plan: the emulated model, and the plan, with which `pack` gives its integers.

    name: of the model, in the names of files. A plan that an earlier call with the same model and arguments left among the
    checkpoints is used again, whatever the observation, and so is its training.
    """
    emulated, plan, file = _emulated(task, model, observation, weight_bits, activation_bits, arithmetic, tuning, seed, name)
    return _tuned(task, emulated, tuning, seed, file), plan


def _emulated(task, model, observation, weight_bits, activation_bits, arithmetic, tuning, seed, name):
    """The emulated model before its training, its plan, and the file of the training."""
    key = (f"{name} {arithmetic.method} {weight_bits}-{activation_bits} {arithmetic.clip} {arithmetic.activation} "
           f"cell {arithmetic.cell_bits}")
    file = _checkpoint(task, model, tuning, seed, key)
    stored = file.with_suffix(".plan.json")
    if stored.is_file():
        plan = Plan.read(json.loads(stored.read_text()))
    else:
        plan = _plan(model, arithmetic, weight_bits, arithmetic.signals(observation, activation_bits))
        replace_file(stored, json.dumps(plan.to_json()).encode())
    return emulate(model, plan), plan, file


def _tuned(task, model, tuning, seed, file):
    fit(model, task, seed=seed, epochs=tuning.epochs, lr=tuning.lr, optimizer="adamw", device=tuning.device, progress=False,
        checkpoint=file)
    return model


def _checkpoint(task, model, tuning, seed, key) -> Path:
    """File of a training inside the checkpoints, named after what decides it; model: the float one that it starts from."""
    code = code_digest(*constrained_code(), emulation.__file__)
    about = f"{task.digest} {task.split} {task.recipe} {seed} {key} {tuning.epochs} {tuning.lr} {fingerprint(model)} {code}"
    words = re.sub(r"[^\w.]+", "-", key)
    name = f"{task.name}-{words}-seed{seed}-{hashlib.sha256(about.encode()).hexdigest()[:8]}.safetensors"
    return checkpoint_folder(tuning.checkpoints) / name


def _plan(model, arithmetic, bits, signals) -> Plan:
    plan = uniform(model, method_from_label(arithmetic.method), bits, signals)
    return replace(plan, activation=arithmetic.activation)


def _place(cell, seed, when, arithmetic, weight_bits, activation_bits) -> dict:
    return {"cell": cell, "seed": seed, "when": when, "method": arithmetic.method, "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "cell_bits": max(activation_bits, arithmetic.cell_bits) if cell == "LSTM" else None}


def _sizes(packed: PackedModel) -> dict:
    return {"cr_disk": packed.cr_disk, "cr_model": packed.cr_model, "rnn_bytes": packed.storage_bits // 8}


def one_signal_at_a_time(task: Task | LanguageTask, models: dict[tuple[str, int], torch.nn.Module],
                         observations: dict[tuple[str, int], Observation], *, low_bits: int, arithmetic: Arithmetic,
                         tuning: Tuning, workers: int) -> pd.DataFrame:
    """Which signal needs its bits: every signal alone at low_bits, all others and the weights at 16 bits.

    One row per cell, seed and signal: valid_loss, and excess_loss, above that of the model with 16 bits everywhere (nats).
    """
    jobs = [(task, *place, model, observations[place], signal, low_bits, arithmetic, tuning.device)
            for place, model in models.items() for signal in (None, *signals_of(place[0]))]
    rows = pd.DataFrame(parallel(_one_signal, jobs, workers, "signals"))
    reference = rows[rows["signal"].isna()].set_index(["cell", "seed"])["valid_loss"]
    rows = rows[rows["signal"].notna()]
    places = pd.MultiIndex.from_frame(rows[["cell", "seed"]])
    return rows.assign(excess_loss=rows["valid_loss"].to_numpy() - reference.loc[places].to_numpy()).reset_index(drop=True)


def _one_signal(task, cell, seed, model, observation, signal, low_bits, arithmetic, device) -> dict:
    bits = dict.fromkeys(signals_of(cell), LOSSLESS_BITS) | ({signal: low_bits} if signal else {})
    packed = pack(model, _plan(model, arithmetic, LOSSLESS_BITS, observation.formats(bits, arithmetic.clip)))
    return {"cell": cell, "seed": seed, "signal": signal, "bits": low_bits,
            "valid_loss": evaluate(attach(model, packed).to(device), task, "valid").loss}


@dataclass(frozen=True)
class Mixture:
    """results: a row per cell, seed, target and kind ("mixed", "uniform"); allocations: (cell, seed, target) -> Allocation."""

    results: pd.DataFrame
    allocations: dict[tuple, Allocation]

    def last(self) -> pd.DataFrame:
        """What the last allocation chose and by what, a row a block; empty without one."""
        return list(self.allocations.values())[-1].chosen if self.allocations else pd.DataFrame()


def mix_precision(task: Task | LanguageTask, models: dict[tuple[str, int], torch.nn.Module],
                  observations: dict[tuple[str, int], Observation], target_cr_disks: list[float], activation_bits: int, *,
                  arithmetic: Arithmetic, tuning: Tuning, workers: int) -> Mixture:
    """Mixed precision after training: one width for each block, allocated by a one-shot sensitivity table of every width from 2
    to 8 bits (with signals in float), beside the widest uniform width of the method within the same budget.

    Columns: cell, seed, target_cr_disk, kind, bits (of a weight, mean), cr_disk, valid and test quality, lost.
    """
    jobs = [(task, *place, model, observations[place], target_cr_disks, activation_bits, arithmetic, tuning.device)
            for place, model in models.items()]
    done = parallel(_mixed_points, jobs, workers, "mixed precision") if target_cr_disks else []
    columns = ["cell", "seed", "target_cr_disk", "kind", "bits", "cr_disk", "valid", "test", "lost"]
    return Mixture(pd.DataFrame([row for rows, _ in done for row in rows], columns=columns),
                   {key: found for _, allocations in done for key, found in allocations.items()})


def _mixed_points(task, cell, seed, model, observation, target_cr_disks, activation_bits, arithmetic, device):
    method = method_from_label(arithmetic.method)
    table = sensitivity_table(model, task, [method], bits=list(WIDTHS), seed=seed)
    signals = arithmetic.signals(observation, activation_bits)
    control, rows, allocations = _measured(task, copy.deepcopy(model), device), [], {}
    for target in target_cr_disks:
        allocations[cell, seed, target] = found = allocate(model, table, target, signals)
        plans = {"mixed": found.plan, "uniform": uniform(model, method, _widest(model, method, target), signals)}
        for kind, plan in plans.items():
            packed = pack(model, replace(plan, activation=arithmetic.activation))
            measured = _measured(task, attach(model, packed), device)
            rows.append({"cell": cell, "seed": seed, "target_cr_disk": target, "kind": kind,
                         "bits": packed.value_bits / sum(block.stored_values for block in packed.blocks.values()),
                         "cr_disk": packed.cr_disk, "valid": measured["valid"], "test": measured["test"],
                         "lost": _lost(task, control["test"], measured["test"])})
    return rows, allocations


def _widest(model, method, target_cr_disk) -> int:
    """The widest uniform width of the method that meets the ratio."""
    budget_bits = bits_within(target_cr_disk, blocks(model))
    fitting = [bits for bits in WIDTHS if sum(full_bits(w, method, bits) for w in weights(model).values()) <= budget_bits]
    if not fitting:
        raise OutOfReach(f"no width of {method_label(method)} meets cr_disk {target_cr_disk}")
    return fitting[-1]


@dataclass(frozen=True)
class Anatomy:
    """One model turned into integers after training, looked into. formats: of every signal, and why (Observation.explain);
    blocks: of every block; errors: see signal_errors; mismatches: see mismatch_rate, in float32 and in float64; tables: see
    table_errors."""

    packed: PackedModel
    formats: pd.DataFrame
    blocks: pd.DataFrame
    errors: pd.DataFrame
    mismatches: pd.DataFrame
    tables: pd.DataFrame


def anatomy(task: Task | LanguageTask, model: torch.nn.Module, observation: Observation, pair: str, *,
            arithmetic: Arithmetic) -> Anatomy:
    """Where the error of one pair of widths ("4/6") arises, on sample_batch of the training split."""
    weight_bits, activation_bits = widths_of(pair)
    batch = [sample_batch(task)]
    signals = arithmetic.signals(observation, activation_bits)
    plan = _plan(model, arithmetic, weight_bits, signals)
    packed = pack(model, plan)
    emulated = emulate(model, plan)
    mismatches = [{"emulation": name} | row for name, cast in (("float32", emulated.float), ("float64", emulated.double))
                  for row in mismatch_rate(cast(), packed, batch)]
    return Anatomy(packed, pd.DataFrame(observation.explain(signals)), pd.DataFrame(plan.table(packed)),
                   signal_errors(model, packed, batch), pd.DataFrame(mismatches), table_errors(packed))


def table_errors(packed: PackedModel) -> pd.DataFrame:
    """Largest error of every kind of activation table, over every input code, in units in the last place of what it writes; the
    row of the kind that the model has is marked."""
    rows = []
    for name, layer in packed.layers.items():
        for function, uses in table_uses(layer.cell, layer.signals).items():
            for kind, table in TABLES.items():
                for use in uses:
                    error = table.build(function, [use]).max_error_ulp(*use) if use[0].bits <= MAX_EXACT_BITS else None
                    rows.append({"layer": name, "function": function, "kind": kind, "from": str(use[0]), "to": str(use[1]),
                                 "largest error (last places)": error, "used": kind == layer.table_kind})
    return pd.DataFrame(rows)
