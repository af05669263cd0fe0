"""Which gates tolerate compression: the sensitivity table, the two classes, and the hybrid plan built on them.

In the manner of Wu 2026 (DOI 10.20079/j.issn.1001-893x.240926004): compress one gate's block alone, retrain, and watch
how much accuracy comes back and how fast. Everything here looks at the validation split only.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn.utils import parametrize

from workbench.budget import OutOfReach, bits_within, check_target, largest_member, pack_anew
from workbench.checks import check_whole
from workbench.constrain import compress
from workbench.gates import blocks, check_gates, dense_weights, evaluating, weight, weights
from workbench.methods import BlockCirculant, Method, TopK, check_method, method_from_label, method_label
from workbench.models import seeded
from workbench.plan import LOSSLESS_BITS, Plan, pack_block, plan_block, plan_blocks, uncompressed
from workbench.quantise import calibrate
from workbench.tasks import LanguageTask, Task
from workbench.train import check_device, device_of, evaluate, fit, move

CALIBRATION_STEPS = 100_000  # time steps that are enough to see how large signals become
PIECE = 100  # words of a text that are read from a fresh state
RECOVERED = 0.9  # a block has recovered when this share of the lost validation loss is back


@dataclass(frozen=True)
class Loop:
    """A user's own data, metric and training, where sensitivity_table and search_hybrid otherwise take a task.

    evaluate: model -> one number, the lower the better; called in evaluation mode, without gradients. batches: the model's
    arguments, as `calibrate` takes them. train: trains a model in place; called in training mode, each call is one epoch.
    losses: model -> the training loss of a few batches, one after another, each with its graph; only cheap_sensitivity asks
    for it, and for nothing else but batches. All functions draw from the seed of the measurement. Without `train` only epochs 0
    can be measured.
    """

    evaluate: Callable[[torch.nn.Module], float] | None
    batches: Iterable
    train: Callable[[torch.nn.Module], None] | None = None
    losses: Callable[[torch.nn.Module], Iterable[torch.Tensor]] | None = None

    def __post_init__(self):
        for name in ("evaluate", "train", "losses"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"Loop needs a function of a model as {name}, got {function!r}")


def batches_of(model: torch.nn.Module, task: Task | LanguageTask | Loop, epochs: int):
    """What signals are calibrated on, of a task on the model's device; refuses what cannot be measured for that many epochs."""
    if isinstance(task, Loop):
        if epochs and task.train is None:
            raise ValueError(f"{epochs} epochs of retraining need a Loop with the function train, got one without")
        return task.batches
    if not isinstance(task, (Task, LanguageTask)):
        raise TypeError(f"a measurement needs a task, or a Loop of your own functions, got {type(task).__name__}")
    device = device_of(model)
    return (tuple(part.to(device) for part in batch) for batch in calibration_batches(task))


def calibration_batches(task: Task | LanguageTask, size: int = 256):
    """The model's arguments on the training split, at most about CALIBRATION_STEPS time steps, spread over the whole split:
    (x (B, T, F) or tokens (B, T), lengths (B,)), or of a language task (tokens (T, B),)."""
    split = task.splits["train"]
    if isinstance(task, LanguageTask):
        pieces = torch.from_numpy(split)[: len(split) // PIECE * PIECE].view(-1, PIECE)  # (pieces, PIECE)
        chosen = _spread(len(pieces), CALIBRATION_STEPS / PIECE)
        yield from ((batch.T,) for batch in pieces[chosen].split(size))
        return
    chosen = _spread(len(split.lengths), CALIBRATION_STEPS / split.lengths.mean())
    x, lengths = torch.from_numpy(split.x[chosen]), torch.from_numpy(split.lengths[chosen])
    for batch in lengths.argsort(stable=True).split(size):
        yield x[batch, : lengths[batch].max()], lengths[batch]


def sample_batch(task: Task | LanguageTask, items: int = 32) -> tuple:
    """The model's arguments for some sequences of the training split, spread over it, as long as its median and cut there, so
    that nothing is padded; of a language task pieces of its text."""
    split = task.splits["train"]
    if isinstance(task, LanguageTask):
        pieces = torch.from_numpy(split)[: len(split) // PIECE * PIECE].view(-1, PIECE)  # (pieces, PIECE)
        return (pieces[_spread(len(pieces), items)].T,)
    length = int(np.median(split.lengths))
    long = np.flatnonzero(split.lengths >= length)
    x = torch.from_numpy(split.x[long[_spread(len(long), items)], :length])
    return x, torch.full((len(x),), length)


def _spread(count, most):
    """At most `most` of the numbers from 0 to count - 1, at equal distances."""
    return np.arange(0, count, max(1, math.ceil(count / most)))


def check_sensitivity(model: torch.nn.Module, methods: list[Method], bits: int | list[int], epochs: int) -> None:
    """Refuse methods, widths and epochs that sensitivity_table cannot measure on a model of this shape. No training."""
    if not isinstance(methods, (list, tuple)):
        raise ValueError(f"a sensitivity measurement needs a list of methods, got {methods!r}")
    for method in methods:
        check_method("a sensitivity measurement", method)
    labels, widths = [method_label(method, exact=True) for method in methods], asked_widths(bits)
    for label in labels:
        method_from_label(label)  # the table holds labels, of which allocate makes the very methods again
    for what, asked in (("methods", labels), ("widths in bits", widths)):
        if not asked or len(set(asked)) != len(asked):
            raise ValueError(f"a sensitivity measurement needs different {what}, got {', '.join(map(str, asked)) or 'none'}")
    check_whole("a sensitivity measurement", "number of epochs", epochs, 0)
    for name, w in weights(model).items():
        for method in methods:
            for width in widths:
                try:
                    plan_block(w, method, width)
                except ValueError as error:
                    raise ValueError(f"block {name} at {width} bits: {error}") from error


def check_table(who: str, table: pd.DataFrame, columns, source: str = "sensitivity_table") -> None:
    """Refuse what is no table with these columns and a row at least. source: the function that gives such a table."""
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"{who} needs a table, as {source} gives it, got a {type(table).__name__}")
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{who} needs a table with the columns {', '.join(columns)}, got none named {', '.join(missing)}")
    if table.empty:
        raise ValueError(f"{who} needs a table with a row at least, got none")


def check_measured(task: Task | LanguageTask | Loop, device: str | None, seed: int) -> None:
    """Refuse a Loop without a metric, a device that is none, one for a Loop, whose functions bring their own batches, and a
    seed that is none."""
    check_whole("a measurement", "seed", seed, 0)
    if isinstance(task, Loop) and task.evaluate is None:
        raise ValueError("a measurement needs a Loop with the function evaluate, got one without")
    if device is not None:
        check_device(device, "a measurement")
        if isinstance(task, Loop):
            raise ValueError(f"a measurement with a Loop runs where its model is, got the device {device!r}")


def asked_widths(bits: int | list[int]) -> list[int]:
    return list(bits) if isinstance(bits, (list, tuple)) else [bits]


def sensitivity_table(model: torch.nn.Module, task: Task | LanguageTask | Loop, methods: list[Method], *,
                      bits: int | list[int] = 8, epochs: int = 0, seed: int = 0, device: str | None = None) -> pd.DataFrame:
    """One row per block, method and width: that block alone compressed, the others left at 16 bits.

    epochs 0 is the one-shot mode. Otherwise the model is retrained for that many epochs, and so is the uncompressed one,
    whose loss of the same epoch is the reference. Columns: block, gate, method (its exact label), bits, compression (both as
    text), cr_disk (of this block alone, packed before retraining), loss_dense, accuracy_dense (percent),
    loss_before, accuracy_before, loss_after, accuracy_after, recovered (share of the excess loss that came back, None
    where none was lost or nothing was retrained), recovery_epochs (first epoch with 90 % back, None if never or none was lost),
    excess_loss: the validation loss above the reference in nats, averaged over the epochs 0 (before retraining) to
    `epochs`, so that slow and incomplete recovery both raise it. With a Loop the losses are in the unit of its metric and the
    accuracies NaN. device: "cpu" or "cuda", where a task is trained and measured, by default where the model is. ValueError as
    check_sensitivity, and for a loss that is not finite.
    """
    check_sensitivity(model, methods, bits, epochs)
    check_measured(task, device, seed)
    signals = calibrate(model, batches_of(model, task, epochs))
    reference = uncompressed(model, signals)
    dense = retraining_curve(model, reference, task, epochs, seed, f"all blocks at {LOSSLESS_BITS} bits", device)
    rows, known = [], blocks(model)
    for name, w in weights(model).items():
        block = known[name]
        for method, width in itertools.product(methods, asked_widths(bits)):
            entry, label = plan_block(w, method, width), method_label(method, exact=True)
            compression = f"{label} at {width} bits"
            plan = Plan(reference.blocks | {name: entry}, signals)
            curve = retraining_curve(model, plan, task, epochs, seed, f"{name}, {compression}", device)
            excess = curve["loss"] - dense["loss"]  # (epochs + 1,)
            recovered, recovery_epochs = _recovery(excess) if epochs else (None, None)
            rows.append({
                "block": name, "gate": block.gate, "method": label, "bits": width,
                "compression": compression, "cr_disk": pack_block(w, entry).cr_disk,
                "loss_dense": dense["loss"].iloc[-1], "accuracy_dense": dense["accuracy"].iloc[-1],
                "loss_before": curve["loss"].iloc[0], "accuracy_before": curve["accuracy"].iloc[0],
                "loss_after": curve["loss"].iloc[-1], "accuracy_after": curve["accuracy"].iloc[-1],
                "recovered": recovered, "recovery_epochs": recovery_epochs, "excess_loss": float(excess.mean()),
            })
    return pd.DataFrame(rows)


def _recovery(excess):
    """(epochs + 1,) excess losses -> share of the first that came back, and the first epoch with 90 % of it back."""
    if excess.iloc[0] <= 0:  # nothing was lost
        return None, None
    back = 1 - excess / excess.iloc[0]
    recovered_at = back.index[back >= RECOVERED]
    return float(back.iloc[-1]), int(recovered_at[0]) if len(recovered_at) else None


def retraining_curve(model, plan, task, epochs, seed, what, device=None) -> pd.DataFrame:
    """Validation loss and accuracy of the compressed model, before (epoch 0) and after each epoch of retraining. what: the
    compression, for the message. device: where it is trained and measured, by default where the model is."""
    compressed, rows = compress(model, plan), []
    move(compressed, device or device_of(model))
    with seeded(seed, device_of(compressed)):
        for loss, accuracy in (_own_curve if isinstance(task, Loop) else _task_curve)(compressed, task, epochs, seed):
            if not math.isfinite(loss):
                when = f"after epoch {len(rows)} of retraining" if rows else "before any retraining"
                raise ValueError(f"a measurement needs finite losses, got {loss} {when} ({what})")
            rows.append((loss, accuracy))
    return pd.DataFrame(rows, columns=["loss", "accuracy"])


def check_keep_start(who: str, keep_start: bool) -> None:
    if not isinstance(keep_start, bool):
        raise ValueError(f"{who} needs keep_start to be True or False, got {keep_start!r}")


def outcome(curve: pd.DataFrame, keep_start: bool) -> pd.Series:
    """What a search judges a candidate by: the last row of its retraining_curve, or with keep_start the first, where that has
    no more loss."""
    first, last = curve.iloc[0], curve.iloc[-1]
    return first if keep_start and first["loss"] <= last["loss"] else last


def _task_curve(model, task, epochs, seed):
    before = evaluate(model, task, "valid")
    yield before.loss, before.accuracy
    if epochs:
        history = fit(model, task, seed=seed, epochs=epochs, device=device_of(model).type, progress=False)
        yield from ((row["valid_loss"], row["valid_accuracy"]) for row in history.epochs)


def _own_curve(model, loop, epochs, _):
    for epoch in range(epochs + 1):
        if epoch:
            model.train()
            before = [parameter.detach().clone() for parameter in model.parameters()] if epoch == 1 else []
            loop.train(model)
            if epoch == 1 and all(map(torch.equal, before, model.parameters())):
                raise ValueError("a measurement needs a Loop whose train changes the model that it is given, and no parameter "
                                 "of it moved: make the optimizer and the loss of that model")
        with torch.no_grad(), evaluating(model), parametrize.cached():
            found = loop.evaluate(model)
        try:
            loss = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else repr(found)
            raise TypeError(f"a measurement needs one number from the Loop's evaluate, got {what}") from error
        yield loss, math.nan


def classify(table: pd.DataFrame) -> pd.DataFrame:
    """Gates -> sensitive or insensitive, one row a gate with the numbers and the reason.

    Rule: a gate's score is its excess validation loss, summed over its blocks and averaged over the methods (and seeds,
    where the table has several). A gate is sensitive when its score is positive and above the mean score of the gates.
    """
    check_table("classify", table, ("block", "gate", "excess_loss"))
    rows = table.groupby("block").size()
    finite = np.isfinite(pd.to_numeric(table["excess_loss"], errors="coerce"))
    if rows.nunique() > 1 or not finite.all():
        raise ValueError("classify needs every block measured equally often, each time with a finite loss, got "
                         f"{rows.min()} to {rows.max()} rows a block, {(~finite).sum()} without such a loss")
    scores = table.groupby("gate", sort=False)["excess_loss"].sum() / rows.iloc[0]
    threshold = scores.mean()
    rows = []
    for gate, score in scores.items():
        sensitive = bool(score > max(threshold, 0))
        rows.append({
            "gate": gate, "score": score, "mean of gates": threshold,
            "class": "sensitive" if sensitive else "insensitive",
            "reason": f"excess validation loss {score:.4f} is {'above' if score > threshold else 'not above'} "
                      f"the mean of the gates, {threshold:.4f}" + ("" if score > 0 or sensitive else ", and not positive"),
        })
    return pd.DataFrame(rows)


def sensitive_gates(classes: pd.DataFrame) -> list[str]:
    """The gates that `classify` calls sensitive."""
    check_table("sensitive_gates", classes, ("gate", "class"), source="classify")
    return classes.loc[classes["class"] == "sensitive", "gate"].tolist()


def with_seed(table: pd.DataFrame) -> pd.DataFrame:
    """A table of one model, which has no column `seed`, as one of several with a single seed."""
    return table if "seed" in table else table.assign(seed=0)


def class_stability(table: pd.DataFrame) -> pd.DataFrame:
    """How the classes hold when less is looked at; table: as sensitivity_over_seeds or sensitivity_table gives it.

    One row a gate: its class from everything, from each seed alone (columns `seed N`), in how many seeds it is sensitive,
    and in how many compressions, each taken alone over all seeds.
    """
    table = with_seed(table)

    def class_of(rows):
        return classify(rows).set_index("gate")["class"]

    stability = class_of(table).to_frame()
    by_seed = pd.DataFrame({f"seed {seed}": class_of(rows) for seed, rows in table.groupby("seed", sort=False)})
    alone = pd.DataFrame({name: class_of(rows) for name, rows in table.groupby("compression", sort=False)})
    stability[by_seed.columns] = by_seed
    stability["seeds"], stability["sensitive in seeds"] = by_seed.shape[1], (by_seed == "sensitive").sum(axis=1)
    stability["compressions"], stability["sensitive in compressions"] = alone.shape[1], (alone == "sensitive").sum(axis=1)
    return stability.reset_index()


def rank_blocks(table: pd.DataFrame) -> pd.DataFrame:
    """Every block's rank in each ranking; table: as sensitivity_over_seeds or sensitivity_table gives it.

    A ranking is one compression on one seed's model; rank 1 has the largest excess loss, equal ones share the mean of
    their ranks. Columns: method, bits, compression, seed, block, gate, excess_loss, rank, top_quarter (bool; where less
    than four blocks are ranked it holds the first one; blocks that share a rank below it are outside all together).
    """
    columns = ["method", "bits", "compression", "seed", "block", "gate", "excess_loss"]
    check_table("rank_blocks", table, [name for name in columns if name != "seed"])
    ranks = with_seed(table)[columns].copy()
    ranks["rank"] = ranks.groupby(["compression", "seed"])["excess_loss"].rank(ascending=False)
    ranks["top_quarter"] = ranks["rank"] <= max(1, ranks["block"].nunique() / 4)
    return ranks


def seed_agreement(ranks: pd.DataFrame) -> pd.DataFrame:
    """One row a compression: Spearman's correlation between the rankings of two seeds, over the pairs of seeds.

    Columns: compression, excess_loss (mean over blocks and seeds), pairs of seeds that could be compared (a ranking without
    any difference cannot), within_mean and within_least: the gates of one matrix ranked among themselves, mean over the
    matrices; pooled_mean: all blocks in one ranking, which also repeats where only the matrices differ (NaN without a pair).
    """
    rows = []
    for name, group in ranks.groupby("compression", sort=False):
        within = _pairs(_within_matrices(group, "seed"))
        rows.append({"compression": name, "excess_loss": group["excess_loss"].mean(), "pairs": len(within),
                     "within_mean": within.mean(), "within_least": within.min(),
                     "pooled_mean": _pairs(_spearman(group, "seed")).mean()})
    return pd.DataFrame(rows)


def _pairs(correlations):
    """What a symmetric frame holds above its diagonal, where there is a value."""
    return pd.Series(correlations.to_numpy()[np.triu_indices(len(correlations), 1)]).dropna()


def _spearman(rows, columns):
    return rows.pivot(index="block", columns=columns, values="excess_loss").corr(method="spearman")


def _within_matrices(rows, columns):
    """_spearman over the gates of one weight matrix, mean over the matrices that have a difference to rank."""
    matrices = rows.groupby(rows["block"].str.rsplit(".", n=1).str[0])
    return pd.concat([_spearman(group, columns) for _, group in matrices]).groupby(level=0).mean()


def method_agreement(ranks: pd.DataFrame) -> pd.DataFrame:
    """(compressions, compressions): Spearman's correlation between two compressions' rankings of the gates of one matrix of
    the same seed, mean over matrices and seeds; NaN where a ranking has no difference."""
    names = list(ranks["compression"].unique())
    by_seed = [_within_matrices(group, "compression").loc[names, names] for _, group in ranks.groupby("seed")]
    return pd.concat(by_seed).groupby(level=0).mean().loc[names]


@dataclass(frozen=True)
class Strength:
    """The discrete choices of a hybrid plan; the kept fraction of Top-k follows from the budget."""

    block: int  # block size of the circulant gates
    circulant_bits: int
    topk_bits: int

    def __str__(self) -> str:
        return f"block {self.block}, circulant {self.circulant_bits} bits, Top-k {self.topk_bits} bits"


def hybrid_plan(model: torch.nn.Module, sensitive: list[str], strength: Strength, target_cr_disk: float, signals) -> Plan:
    """Sensitive gates Top-k, the others block-circulant, with the largest kept fraction that meets target_cr_disk.

    The size is taken with every kept weight non-zero, as in uniform_plan. OutOfReach when no kept fraction meets it.
    """
    check_target(target_cr_disk)
    check_gates("hybrid_plan", model, sensitive)
    known = blocks(model)
    dense_bits = 32 * dense_weights(known)
    if not isinstance(strength, Strength):
        raise ValueError(f"hybrid_plan needs a Strength, got {strength!r}")
    circulant = plan_blocks({name: weight(model, name) for name, b in known.items() if b.gate not in sensitive},
                            BlockCirculant(strength.block), strength.circulant_bits)
    fixed_bits = sum(pack_block(weight(model, name), entry).storage_bits for name, entry in circulant.items())
    kept = {name: weight(model, name) for name, b in known.items() if b.gate in sensitive}
    budget_bits = bits_within(target_cr_disk, known) - fixed_bits
    sparse = {}
    if kept:
        try:
            topk, _ = largest_member(list(kept.values()), TopK, strength.topk_bits, budget_bits)
        except OutOfReach as error:
            raise OutOfReach(f"hybrid_plan cannot reach cr_disk {target_cr_disk} with {strength}: the circulant gates take "
                             f"{fixed_bits} of {dense_bits / target_cr_disk:.0f} bits") from error
        sparse = plan_blocks(kept, topk, strength.topk_bits)
    elif budget_bits < 0:
        raise OutOfReach(f"hybrid_plan cannot reach cr_disk {target_cr_disk} with {strength} and no sensitive gate: they reach "
                         f"{dense_bits / fixed_bits:.1f}")
    return Plan({name: (circulant | sparse)[name] for name in known}, signals)


def search_hybrid(model: torch.nn.Module, task: Task | LanguageTask | Loop, sensitive: list[str], target_cr_disk: float,
                  strengths: list[Strength], *, epochs: int, seed: int, device: str | None = None,
                  keep_start: bool = False) -> pd.DataFrame:
    """Every strength that meets the target, with its validation loss after `epochs` of retraining, best first.

    Columns: strength, keep (fraction of the sensitive gates, None without one), cr_disk, valid_loss, valid_accuracy.
    device: as of sensitivity_table. keep_start: a candidate that retraining makes worse counts as it was before. OutOfReach
    when none meets it.
    """
    check_target(target_cr_disk)
    check_measured(task, device, seed)
    check_whole("search_hybrid", "number of epochs", epochs, 0)
    check_keep_start("search_hybrid", keep_start)
    if not isinstance(strengths, list | tuple) or not strengths or not all(isinstance(s, Strength) for s in strengths):
        raise ValueError(f"search_hybrid needs a list of at least one Strength, got {strengths!r}")
    signals = calibrate(model, batches_of(model, task, epochs))
    plans, refused = [], []  # every plan before any retraining: a strength that fits no block is refused here
    for strength in strengths:
        try:
            plan = hybrid_plan(model, sensitive, strength, target_cr_disk, signals)
            plans.append((strength, plan, pack_anew(model, plan).cr_disk))
        except OutOfReach as error:
            refused.append(str(error))
    rows = []
    for strength, plan, cr_disk in plans:
        found = outcome(retraining_curve(model, plan, task, epochs, seed, str(strength), device), keep_start)
        keeps = [e.method.keep for e in plan.blocks.values() if isinstance(e.method, TopK)]
        rows.append({"strength": strength, "keep": keeps[0] if keeps else None, "cr_disk": cr_disk,
                     "valid_loss": found["loss"], "valid_accuracy": found["accuracy"]})
    if not rows:
        raise OutOfReach(f"no hybrid plan meets cr_disk {target_cr_disk}: " + "; ".join(refused))
    return pd.DataFrame(rows).sort_values("valid_loss", kind="stable", ignore_index=True)


def strengths(hidden_size: int) -> list[Strength]:
    """The candidates of search_hybrid: power-of-two blocks that divide the hidden size, 4 to 6 bits, Top-k at 6 bits.

    ValueError for a hidden size that 8, the block of the sensitivity measurement, does not divide.
    """
    if hidden_size < 1 or hidden_size % 8:
        raise ValueError(f"a hybrid study needs a positive hidden_size that 8 divides, got {hidden_size}")
    return [Strength(block, bits, topk_bits=6) for block in (4, 8, 16, 32) if hidden_size % block == 0 for bits in (4, 5, 6)]
