"""Which gates tolerate compression: the sensitivity table, the two classes, and the hybrid plan built on them.

In the manner of Wu 2026 (DOI 10.20079/j.issn.1001-893x.240926004): compress one gate's block alone, retrain, and watch
how much accuracy comes back and how fast. Everything here looks at the validation split only.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch

from workbench.constrain import compress, pack
from workbench.fixedpoint import QFormat
from workbench.gates import blocks, weight
from workbench.methods import BlockCirculant, Dense, Method, TopK, method_label
from workbench.plan import Plan, pack_block, plan_block, uniform
from workbench.quantise import calibrate
from workbench.tasks import Task
from workbench.train import evaluate, fit

LOSSLESS_BITS = 16  # width of the blocks that a measurement leaves alone
RECOVERED = 0.9  # a block has recovered when this share of the lost validation loss is back


def calibration_batches(task: Task, size: int = 256):
    """The training split as (x (B, T, F), lengths (B,)) batches."""
    split = task.splits["train"]
    x, lengths = torch.from_numpy(split.x), torch.from_numpy(split.lengths)
    for batch in lengths.argsort(stable=True).split(size):
        yield x[batch, : lengths[batch].max()], lengths[batch]


def sensitivity_table(model: torch.nn.Module, task: Task, methods: list[Method], *, bits: int = 8, epochs: int = 0,
                      seed: int = 0) -> pd.DataFrame:
    """One row per block and method: that block alone compressed, the others left at 16 bits.

    epochs 0 is the one-shot mode. Otherwise the model is retrained for that many epochs, and so is the uncompressed one,
    whose loss of the same epoch is the reference. Columns: block, gate, method, loss_dense, accuracy_dense (percent),
    loss_before, accuracy_before, loss_after, accuracy_after, recovered (share of the excess loss that came back, None
    where none was lost or nothing was retrained), recovery_epochs (first epoch with 90 % back, None if never),
    excess_loss: the validation loss above the reference, averaged over the epochs 0 (before retraining) to `epochs`, so
    that slow and incomplete recovery both raise it.
    """
    signals = calibrate(model, calibration_batches(task))
    reference = uniform(model, Dense(), LOSSLESS_BITS, signals)
    dense = _curve(model, reference, task, epochs, seed)
    rows = []
    for name, block in blocks(model).items():
        for method in methods:
            entry = plan_block(weight(model, name), method, bits)
            curve = _curve(model, Plan(reference.blocks | {name: entry}, signals), task, epochs, seed)
            excess = curve["loss"] - dense["loss"]  # (epochs + 1,)
            back = 1 - excess / excess.iloc[0] if excess.iloc[0] > 0 else excess * 0 + 1
            recovered_at = back.index[back >= RECOVERED]
            rows.append({
                "block": name, "gate": block.gate, "method": method_label(method),
                "loss_dense": dense["loss"].iloc[-1], "accuracy_dense": dense["accuracy"].iloc[-1],
                "loss_before": curve["loss"].iloc[0], "accuracy_before": curve["accuracy"].iloc[0],
                "loss_after": curve["loss"].iloc[-1], "accuracy_after": curve["accuracy"].iloc[-1],
                "recovered": float(back.iloc[-1]) if epochs and excess.iloc[0] > 0 else None,
                "recovery_epochs": int(recovered_at[0]) if epochs and len(recovered_at) else None,
                "excess_loss": float(excess.mean()),
            })
    return pd.DataFrame(rows)


def _curve(model, plan, task, epochs, seed):
    """Validation loss and accuracy of the compressed model, before (epoch 0) and after each epoch of retraining."""
    compressed = compress(model, plan)
    before = evaluate(compressed, task, "valid")
    rows = [(before.loss, before.accuracy)]
    if epochs:
        history = fit(compressed, task, seed=seed, epochs=epochs, progress=False)
        rows += [(row["valid_loss"], row["valid_accuracy"]) for row in history.epochs]
    return pd.DataFrame(rows, columns=["loss", "accuracy"])


def classify(table: pd.DataFrame) -> pd.DataFrame:
    """Gates -> sensitive or insensitive, one row a gate with the numbers and the reason.

    Rule: a gate's score is its excess validation loss, summed over its blocks and averaged over the methods (and seeds,
    where the table has several). A gate is sensitive when its score is positive and above the mean score of the gates.
    """
    repetitions = table.groupby("block").size().iloc[0]
    scores = table.groupby("gate", sort=False)["excess_loss"].sum() / repetitions
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
    return classes.loc[classes["class"] == "sensitive", "gate"].tolist()


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

    The size is taken with every kept weight non-zero, so that retraining cannot push the ratio under the target.
    ValueError when no kept fraction meets it.
    """
    check_target(target_cr_disk)
    known = blocks(model)
    dense_bits = 32 * sum(b.shape[0] * b.shape[1] for b in known.values())
    circulant = {name: plan_block(weight(model, name), BlockCirculant(strength.block), strength.circulant_bits)
                 for name, b in known.items() if b.gate not in sensitive}
    fixed_bits = sum(pack_block(weight(model, name), entry).storage_bits for name, entry in circulant.items())
    kept = {name: weight(model, name) for name, b in known.items() if b.gate in sensitive}
    budget = dense_bits / target_cr_disk - fixed_bits
    largest = max((w.numel() for w in kept.values()), default=1)

    def sparse_bits(keep):
        pattern = QFormat(strength.topk_bits, 0)
        return sum(TopK(keep).pack((TopK(keep).project(w) != 0).double(), pattern).storage_bits for w in kept.values())

    if kept:
        # Bisection over whole numbers of weights of the largest block.
        low, high = 0, largest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if sparse_bits(middle / largest) <= budget else (low, middle - 1)
        if low == 0:
            raise ValueError(f"hybrid_plan cannot reach cr_disk {target_cr_disk} with {strength}: the circulant gates take "
                             f"{fixed_bits} of {dense_bits / target_cr_disk:.0f} bits")
        keep = low / largest
    elif budget < 0:
        raise ValueError(f"hybrid_plan cannot reach cr_disk {target_cr_disk} with {strength} and no sensitive gate")
    sparse = {name: plan_block(w, TopK(keep), strength.topk_bits) for name, w in kept.items()}
    return Plan({name: (circulant | sparse)[name] for name in known}, signals)


def check_target(target_cr_disk: float) -> None:
    if isinstance(target_cr_disk, bool) or not isinstance(target_cr_disk, (int, float)) or not target_cr_disk >= 1:
        raise ValueError(f"a target cr_disk must be a number of at least 1, got {target_cr_disk!r}")


def search_hybrid(model: torch.nn.Module, task: Task, sensitive: list[str], target_cr_disk: float,
                  strengths: list[Strength], *, epochs: int, seed: int) -> pd.DataFrame:
    """Every strength that meets the target, with its validation loss after `epochs` of retraining, best first.

    Columns: strength, keep (fraction of the sensitive gates, None without one), cr_disk, valid_loss, valid_accuracy.
    ValueError when none meets it.
    """
    check_target(target_cr_disk)
    signals = calibrate(model, calibration_batches(task))
    rows, refused = [], []
    for strength in strengths:
        try:
            plan = hybrid_plan(model, sensitive, strength, target_cr_disk, signals)
        except ValueError as error:
            refused.append(str(error))
            continue
        curve = _curve(model, plan, task, epochs, seed)
        keeps = [e.method.keep for e in plan.blocks.values() if isinstance(e.method, TopK)]
        rows.append({"strength": strength, "keep": keeps[0] if keeps else None, "cr_disk": pack(model, plan).cr_disk,
                     "valid_loss": curve["loss"].iloc[-1], "valid_accuracy": curve["accuracy"].iloc[-1]})
    if not rows:
        raise ValueError(f"no hybrid plan meets cr_disk {target_cr_disk}: " + "; ".join(refused))
    return pd.DataFrame(rows).sort_values("valid_loss", ignore_index=True)


def nearest_uniform(model: torch.nn.Module, methods: list[Method], bits: Iterable[int], target_cr_disk: float, signals) -> Plan:
    """Of the uniform plans of these methods and widths the largest that meets target_cr_disk: the fairest at equal size.
    Of equal sizes the widest numbers. ValueError when none meets it."""
    plans = [uniform(model, method, width, signals) for method in methods for width in bits]
    found = [(pack(model, plan).cr_disk, -next(iter(plan.blocks.values())).format.bits, n) for n, plan in enumerate(plans)]
    fitting = [row for row in found if row[0] >= target_cr_disk]
    if not fitting:
        raise ValueError(f"none of {', '.join(map(str, methods))} at {', '.join(map(str, bits))} bits meets cr_disk "
                         f"{target_cr_disk}")
    return plans[min(fitting)[2]]


def uniform_topk(model: torch.nn.Module, bits: int, target_cr_disk: float, signals) -> Plan:
    """Every gate Top-k with one kept fraction, the largest that meets target_cr_disk."""
    every_gate = sorted({b.gate for b in blocks(model).values()})
    return hybrid_plan(model, every_gate, Strength(block=2, circulant_bits=bits, topk_bits=bits), target_cr_disk, signals)


def strengths(hidden_size: int) -> list[Strength]:
    """The candidates of search_hybrid: power-of-two blocks that divide the hidden size, 4 to 6 bits, Top-k at 6 bits.

    ValueError for a hidden size that 8, the block of the sensitivity measurement, does not divide.
    """
    if hidden_size < 1 or hidden_size % 8:
        raise ValueError(f"a hybrid study needs a positive hidden_size that 8 divides, got {hidden_size}")
    return [Strength(block, bits, topk_bits=6) for block in (4, 8, 16, 32) if hidden_size % block == 0 for bits in (4, 5, 6)]
