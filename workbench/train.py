"""Training, evaluation and checkpoints of sequence classifiers, and the interval that compares two of them.

Validation decides which epoch is kept; the test split is read by nothing but `evaluate(model, task, "test")`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from tqdm import tqdm

from workbench.container import read_tensors, write_tensors
from workbench.models import seeded
from workbench.tasks import Recipe, Split, Task

CHECKPOINT = "checkpoint"
POOL_BATCHES = 10  # batches drawn at random together, then cut by length
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class History:
    """What a training did: one dict per epoch, and the epoch (from 1) whose weights were kept."""

    epochs: tuple[dict, ...]  # epoch, lr, train_loss, valid_loss, valid_accuracy (percent), seconds
    best_epoch: int

    @property
    def frame(self):
        """The epochs as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.epochs)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Quality of a model on one split; the arrays are in the order of the split's items."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # percent
    losses: np.ndarray  # (N,) float64
    correct: np.ndarray  # (N,) bool


class Interval(NamedTuple):
    """95 % interval and mean of a difference, in percentage points."""

    low: float
    mean: float
    high: float


def fit(
    model: nn.Module,
    task: Task,
    *,
    seed: int,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    weight_decay: float | None = None,
    feature_noise: float | None = None,
    time_mask: float | None = None,
    feature_mask: float | None = None,
    select_after: float | None = None,
    teacher: nn.Module | None = None,
    distillation_weight: float = 0.5,
    distillation_temperature: float = 2.0,
    callback: Callable[[int, int], None] | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> History:
    """Train `model` in place and leave it with the weights of the epoch of least validation loss (the first of equals).

    AdamW with gradient clipping and a one-cycle schedule (15 % warm-up). What is not given is taken from `task.recipe`
    (see `Recipe`). The same seed gives the same weights on the same machine; the caller's random state is untouched.

    Args:
        model: takes (x (B, T, F), lengths (B,)) and gives logits (B, classes); may carry torch parametrizations.
        teacher: its logits on the clean training split are distilled into the model.
        distillation_weight: share of the teacher's term in the loss, 0 to 1.
        distillation_temperature: divides the logits of both in that term.
        callback: called with (step, total steps) before each training step, for example to tighten a mask; it must be
            done with changing the model after `select_after` of them.
        device: "cpu" or "cuda"; the model is returned to where it came from.
        progress: show a bar.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    given = {
        "epochs": epochs, "lr": lr, "batch_size": batch_size, "weight_decay": weight_decay,
        "feature_noise": feature_noise, "time_mask": time_mask, "feature_mask": feature_mask,
        "select_after": select_after,
    }  # fmt: skip
    recipe = replace(task.recipe, **{name: value for name, value in given.items() if value is not None})
    if not 0 <= distillation_weight <= 1 or not distillation_temperature > 0:
        raise ValueError(
            f"fit needs a distillation_weight in [0, 1] and a distillation_temperature above 0, "
            f"got {distillation_weight} and {distillation_temperature}"
        )
    if device not in ("cpu", "cuda"):
        raise ValueError(f'fit needs "cpu" or "cuda" as device, got {device!r}')
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('fit cannot train on device="cuda": torch finds no CUDA device')

    home = _device(model)
    _move(model, device)
    try:
        with seeded(seed, device):
            targets = None
            if teacher is not None:
                logits, _ = _logits(teacher, task.splits["train"], batch_size=256)
                targets = (logits / distillation_temperature).softmax(1).to(device)  # (N, classes)
            loss = _Loss(targets, distillation_weight, distillation_temperature)
            return _fit(model, task, recipe, loss, callback, progress)
    finally:
        _move(model, home)


def _fit(model, task, recipe, loss_of, callback, progress):
    device = _device(model)
    x, lengths, labels = (tensor.to(device) for tensor in _tensors(task.splits["train"]))
    steps_per_epoch = -(-len(labels) // recipe.batch_size)
    total_steps = recipe.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps + 1, pct_start=0.15)
    was_training = model.training
    history, best, step = [], None, 0
    bar = tqdm(range(1, recipe.epochs + 1), desc=f"training on {task.name}", unit="epoch", mininterval=1, disable=not progress)
    for epoch in bar:
        start, lr, total_loss = time.perf_counter(), schedule.get_last_lr()[0], 0.0
        model.train()
        for batch in bucketed_batches(task.splits["train"].lengths, recipe.batch_size):
            if callback is not None:
                callback(step, total_steps)
            longest = int(task.splits["train"].lengths[batch].max())
            batch = batch.to(device)
            frames = augment(x[batch, :longest], lengths[batch], recipe)
            # One cache per forward: a constrained weight is evaluated once, and again after the step changed it.
            with parametrize.cached():
                logits = model(frames, lengths[batch])
            loss = loss_of(logits, labels[batch], batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            total_loss += loss.detach() * len(batch)
            step += 1
        valid = evaluate(model, task, "valid")
        row = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": float(total_loss) / len(labels),
            "valid_loss": valid.loss,
            "valid_accuracy": valid.accuracy,
            "seconds": time.perf_counter() - start,
        }
        if not np.isfinite([row["train_loss"], row["valid_loss"]]).all():
            raise FloatingPointError(
                f"fit: the loss is not finite after epoch {epoch} of {recipe.epochs} (train {row['train_loss']}, "
                f"validation {row['valid_loss']}); the learning rate was {lr:g}, its peak is {recipe.lr:g}: lower lr"
            )
        history.append(row)
        if step > recipe.select_after * total_steps and (best is None or valid.loss < history[best - 1]["valid_loss"]):
            best, weights = epoch, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        bar.set_postfix_str(f"valid loss {valid.loss:.3f}, {valid.accuracy:.1f} %")
    model.load_state_dict(weights)
    model.train(was_training)
    return History(tuple(history), best)


class _Loss(NamedTuple):
    """Cross-entropy, mixed with the divergence from the teacher's soft targets where there are some."""

    targets: torch.Tensor | None  # (N, classes) probabilities
    weight: float
    temperature: float

    def __call__(self, logits, labels, batch):
        loss = functional.cross_entropy(logits, labels)
        if self.targets is None:
            return loss
        soft = functional.log_softmax(logits / self.temperature, 1)
        # The squared temperature keeps the gradient's size (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).
        divergence = functional.kl_div(soft, self.targets[batch], reduction="batchmean") * self.temperature**2
        return (1 - self.weight) * loss + self.weight * divergence


def bucketed_batches(lengths: np.ndarray, batch_size: int) -> list[torch.Tensor]:
    """Random batches of indices in which sequences are of similar length; drawn from torch's random state.

    Pools of ten batches are drawn at random and cut by length, so that little of a batch is padding.
    """
    pools = torch.randperm(len(lengths)).split(POOL_BATCHES * batch_size)
    lengths = torch.from_numpy(lengths)
    batches = [batch for pool in pools for batch in pool[lengths[pool].argsort(stable=True)].split(batch_size)]
    return [batches[n] for n in torch.randperm(len(batches))]


def augment(x: torch.Tensor, lengths: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The sequences `x` (B, T, F) with noise, and one stretch of time and one of features blanked in each."""
    frames, features = x.shape[1:]
    if recipe.feature_noise:
        x = x + recipe.feature_noise * torch.randn_like(x)
    if recipe.time_mask:
        blank = _stretch(recipe.time_mask, lengths, frames)  # (B, T)
        x = x.masked_fill(blank[:, :, None], 0)  # 0 is the mean of every feature
    if recipe.feature_mask:
        blank = _stretch(recipe.feature_mask, torch.full_like(lengths, features), features)  # (B, F)
        x = x.masked_fill(blank[:, None, :], 0)
    return x


def _stretch(most, lengths, size):
    """One stretch per row, of up to `most` of the row's length, within that length: (B, size) bool."""
    width, place = torch.rand(2, len(lengths), 1, device=lengths.device)
    width = (width * most * (lengths[:, None] + 1)).floor()
    start = (place * (lengths[:, None] - width + 1)).floor()
    position = torch.arange(size, device=lengths.device)
    return (position >= start) & (position < start + width)


def evaluate(model: nn.Module, task: Task, split: str, batch_size: int = 256) -> Evaluation:
    """Loss and accuracy of `model` on the `split` "train", "valid" or "test" of `task`; the model is left as it was."""
    if split not in task.splits:
        raise ValueError(f"evaluate knows the splits {', '.join(task.splits)} of {task.name}, got {split!r}")
    logits, labels = _logits(model, task.splits[split], batch_size)
    losses = functional.cross_entropy(logits.double(), labels, reduction="none").numpy()
    correct = (logits.argmax(1) == labels).numpy()
    return Evaluation(float(losses.mean()), 100 * float(correct.mean()), losses, correct)


def _logits(model, split, batch_size):
    """Logits (N, classes) and labels (N,) of a split, on the processor."""
    x, lengths, labels = _tensors(split)
    device, was_training = _device(model), model.training
    model.eval()
    try:
        with torch.no_grad(), parametrize.cached():
            # Sorted by length, so that little of a batch is padding.
            batches = lengths.argsort(stable=True).split(batch_size)
            logits = [model(x[batch, : lengths[batch].max()].to(device), lengths[batch].to(device)).cpu() for batch in batches]
    finally:
        model.train(was_training)
    order = torch.cat(batches).argsort()
    return torch.cat(logits)[order], labels


def _tensors(split: Split):
    return torch.from_numpy(split.x), torch.from_numpy(split.lengths), torch.from_numpy(split.labels)


def _device(model):
    return next(model.parameters(), torch.empty(0)).device


def _move(model, device):
    if _device(model) != torch.device(device):
        with torch.no_grad():  # an LSTM evaluates its constrained weights here; a graph would forbid deepcopy
            model.to(device)


def save_checkpoint(model: nn.Module, path: str | Path, metadata: dict) -> Path:
    """Write the state of `model` and JSON `metadata` to one file (see container.py), whole or not at all."""
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    return write_tensors(path, tensors, who="save_checkpoint", what=CHECKPOINT, version=1, about=metadata)


def load_checkpoint(model: nn.Module, path: str | Path) -> dict:
    """Load the state at `path` into `model`, return its metadata; ValueError where it is damaged or of another model."""
    metadata, tensors = read_tensors(path, who="load_checkpoint", what=CHECKPOINT, version=1)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        differing = dict(sorted(expected.items() ^ found.items()))
        raise ValueError(f"load_checkpoint needs the state of this very model, got {path}, which differs in {differing}")
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    return metadata


def paired_interval(correct_a: np.ndarray, correct_b: np.ndarray, seed: int, resamples: int = 10_000) -> Interval:
    """95 % bootstrap interval of accuracy a minus accuracy b in percentage points, paired by seed and test item.

    Seeds and items are resampled independently (percentile bootstrap).

    Args:
        correct_a, correct_b: (seeds, items) bool, row by row and item by item the same seeds and items.
        seed: of the resampling.
    """
    correct_a, correct_b = np.asarray(correct_a), np.asarray(correct_b)
    if correct_a.ndim != 2 or correct_a.shape != correct_b.shape or not correct_a.size:
        raise ValueError(f"paired_interval needs two equal (seeds, items) arrays, got {correct_a.shape} and {correct_b.shape}")
    if correct_a.dtype != bool or correct_b.dtype != bool:
        raise TypeError(f"paired_interval needs arrays of bool, got {correct_a.dtype} and {correct_b.dtype}")
    difference = 100.0 * (correct_a.astype(float) - correct_b)  # (S, N)
    seeds, items = difference.shape
    generator = np.random.default_rng(seed)
    # How often each seed and each item is drawn; two products then give every resampled mean.
    seed_counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)  # (R, S)
    item_counts = generator.multinomial(items, np.full(items, 1 / items), resamples)  # (R, N)
    means = (seed_counts @ difference * item_counts).sum(1) / difference.size  # (R,)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(difference.mean()), float(high))
