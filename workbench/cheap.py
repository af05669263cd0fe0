"""Cheap sensitivity: what a compression of a block will cost, guessed from gradients, activations or the weights alone.

A few batches, no retraining, not one evaluation of a compressed model. Such scores rank, they are no losses; cheap_agreement
says how well they rank what was measured, so that one knows when to trust them.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch

from workbench.checks import check_whole
from workbench.constrain import bake
from workbench.gates import blocks, evaluating, rnns, weights
from workbench.methods import Method, method_label
from workbench.models import seeded
from workbench.packed import PARTS
from workbench.plan import pack_block, plan_block
from workbench.quantise import check_called, float_signals, recurrent_calls
from workbench.sensitivity import Loop, asked_widths, batches_of, check_sensitivity, check_table, with_seed
from workbench.tasks import LanguageTask, Task
from workbench.train import batch_losses, device_of, no_cudnn, t_interval

SCORES = ("magnitude", "activation", "gradient", "fisher")
ALL = "all choices"


def cheap_sensitivity(model: torch.nn.Module, task: Task | LanguageTask | Loop, methods: list[Method], *,
                      bits: int | list[int] = 8, batches: int = 8, seed: int = 0) -> pd.DataFrame:
    """One row per block, method and width, as sensitivity_table has them, with four scores of that block's compression alone.

    d is what each weight moves by: its compressed and quantised value minus its own. magnitude: |d|^2. activation: |d| times
    the root mean square of what the weight is multiplied with, summed (|w| ||x|| of Wanda, arXiv 2306.11695; of the output at
    the same step for the recurrent weights). gradient: |g d| summed, g the mean gradient of the training loss (Molchanov 2019,
    arXiv 1906.10771). fisher: half of g^2 d^2, g^2 averaged over the batches (Fisher information as the curvature; optimal
    brain damage, Theis 2018, arXiv 1801.05787). batches: how many are looked at, of a task's training split; a Loop gives its
    own `losses`. Columns: block, gate, method, bits, compression, and the scores. ValueError as check_sensitivity.
    """
    check_sensitivity(model, methods, bits, 0)
    batches = check_whole("cheap_sensitivity", "number of batches", batches, 1)
    model = bake(model)
    sizes, known, rows = _sizes(model, task, batches), blocks(model), []
    gradients, squares = _gradients(model, task, batches, seed)
    for name, w in weights(model).items():
        block, w = known[name], w.double()
        for method, width in itertools.product(methods, asked_widths(bits)):
            entry, label = plan_block(w, method, width), method_label(method, exact=True)
            packed = pack_block(w, entry)  # of a product of factors finer than their format
            d = torch.from_numpy(packed.dense() * 2.0**-packed.frac).to(w) - w
            rows.append({
                "block": name, "gate": block.gate, "method": label, "bits": width,
                "compression": f"{label} at {width} bits",
                "magnitude": d.square().sum().item(),
                "activation": (d.abs() @ sizes[block.layer.name, block.part]).sum().item(),
                "gradient": (gradients[name] * d).abs().sum().item(),
                "fisher": (squares[name] * d.square()).sum().item() / 2,
            })
    return pd.DataFrame(rows)


def _gradients(model, task, count, seed):
    """Block -> mean gradient of the losses, block -> mean of its squares, (out, in) float64."""
    known, rnn = blocks(model), rnns(model)
    wanted = {(block.rnn, block.parameter): getattr(rnn[block.rnn], block.parameter) for block in known.values()}
    for parameter in wanted.values():
        parameter.requires_grad_()  # of a frozen layer too
    sums, squares, seen = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0), 0
    with torch.enable_grad():
        for loss in itertools.islice(_losses(model, task, count, seed), count):
            _check_loss(loss)
            found = (torch.autograd.grad(loss, list(wanted.values()), allow_unused=True) if loss.requires_grad
                     else [None] * len(wanted))
            for (path, name), gradient in zip(wanted, found, strict=True):
                if gradient is None:
                    raise ValueError("cheap_sensitivity needs losses that depend on every recurrent weight, got one that does "
                                     f"not depend on {name} of {path!r}")
                sums[path, name] += gradient.double()
                squares[path, name] += gradient.double().square()
            seen += 1
    if not seen:
        raise ValueError("cheap_sensitivity needs at least one loss, got none")
    return ({name: totals[block.rnn, block.parameter][block.rows] / seen for name, block in known.items()}
            for totals in (sums, squares))


def _check_loss(loss):
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"one of {loss.dtype} and shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise ValueError(f"cheap_sensitivity needs losses of one real number each, got {got}")
    if not loss.isfinite():
        raise ValueError(f"cheap_sensitivity needs finite losses, got {loss.item()}")


def _losses(model, task, count, seed) -> Iterator[torch.Tensor]:
    if not isinstance(task, Loop):
        return batch_losses(model, task, count, seed)
    if task.losses is None:
        raise ValueError("cheap_sensitivity needs a Loop with the function losses, got one without")
    return _own_losses(model, task, seed)


def _own_losses(model, loop, seed):
    with seeded(seed, device_of(model)), evaluating(model), no_cudnn():
        losses = loop.losses(model)
        if isinstance(losses, torch.Tensor) or not isinstance(losses, Iterable):
            raise ValueError(f"cheap_sensitivity needs several losses from the Loop's losses, got a {type(losses).__name__}")
        yield from losses


def _sizes(model, task, count) -> dict[tuple[str, str], torch.Tensor]:
    """(layer, part) -> (in,) root mean square of every value that its matrix takes, over the steps of `count` batches."""
    batches = batches_of(model, task, epochs=0)
    squares, steps, called = defaultdict(float), defaultdict(int), set()
    for path, call in recurrent_calls("cheap_sensitivity", model, itertools.islice(batches, count)):
        called.add(path)
        for layer, signals, alive, _ in float_signals(rnns(model)[path], *call, path=path):
            for part, signal in PARTS.items():
                if signal in signals:
                    squares[layer.name, part] += signals[signal][alive].double().square().sum(0)
                    steps[layer.name, part] += int(alive.sum())
    check_called("cheap_sensitivity", model, called)
    return {key: (total / steps[key]).sqrt() for key, total in squares.items()}


def cheap_over_seeds(task: Task | LanguageTask | Loop, dense: dict[int, torch.nn.Module], methods: list[Method], *,
                     bits: int | list[int]) -> pd.DataFrame:
    """cheap_sensitivity of every seed's model, one below the other, with the seed as a column."""
    return pd.concat([cheap_sensitivity(model, task, methods, bits=bits, seed=seed).assign(seed=seed)
                      for seed, model in dense.items()], ignore_index=True)


def cheap_agreement(cheap: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """How well the cheap scores rank what was measured: one row per compression, score and truth.

    cheap: as cheap_over_seeds or cheap_sensitivity gives it; measured: as sensitivity_over_seeds or sensitivity_table, of the
    same blocks, compressions and seeds.
    compression: the blocks of one compression ranked, or "all choices": every block under every compression, which is what an
    allocation chooses from. truth: the validation loss "one-shot" and, where the measurement retrained, "retrained". Columns:
    compression, score, truth, seeds, ranked (how many of each seed; the interval says nothing of others), and spearman and
    kendall (tau-b): mean over the seeds with the ends of its 95 % interval (Student's t; none from one seed) as _low and _high.
    The seeds count those whose rankings have a difference.
    """
    keys, losses = ["seed", "block", "compression"], ["loss_before", "loss_after"]
    for table, columns in ((cheap, SCORES), (measured, losses)):
        check_table("cheap_agreement", table, (*keys[1:], *columns))
        if (empty := table[list(columns)].isna().any()).any():
            raise ValueError(f"cheap_agreement needs numbers to rank, got NaN in the column {empty.idxmax()}")
    cheap, measured = with_seed(cheap), with_seed(measured)
    if any(table.duplicated(keys).any() for table in (cheap, measured)):
        raise ValueError("cheap_agreement needs every seed, block and compression once, got one more often")
    both = cheap.merge(measured[keys + losses], on=keys)
    if not len(cheap) == len(measured) == len(both):
        raise ValueError(f"cheap_agreement needs the same seeds, blocks and compressions in both tables, got {len(cheap)} and "
                         f"{len(measured)} rows, {len(both)} of them in both")
    truths = {"one-shot": "loss_before"}
    if not (both["loss_before"] == both["loss_after"]).all():
        truths["retrained"] = "loss_after"
    rows = []
    for compression, group in [(ALL, both), *both.groupby("compression", sort=False)]:
        for (truth, column), score in itertools.product(truths.items(), SCORES):
            found = [_correlations(one[score], one[column]) for _, one in group.groupby("seed", sort=False)]
            found = pd.DataFrame(found).dropna()
            row = {"compression": compression, "score": score, "truth": truth, "seeds": len(found),
                   "ranked": group.groupby("seed").size().min()}
            for name in found:
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), _interval(found[name].to_numpy()), strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


def _interval(values) -> tuple[float, float, float]:
    """Mean of correlations and its 95 % interval, within [-1, 1]."""
    low, mean, high = t_interval(values)
    return mean, max(low, -1.0), min(high, 1.0)


def _correlations(a, b) -> dict[str, float]:
    """Spearman's rho and Kendall's tau-b; NaN where one of both has no difference."""
    a, b = a.rank(), b.rank()  # of infinite values too
    signs = [np.sign(np.subtract.outer(values.to_numpy(), values.to_numpy())) for values in (a, b)]
    pairs = math.sqrt(math.prod(np.abs(sign).sum() for sign in signs))
    if not pairs:
        return {"spearman": math.nan, "kendall": math.nan}
    return {"spearman": a.corr(b), "kendall": (signs[0] * signs[1]).sum() / pairs}
