"""Training, evaluation and checkpoints of classifiers and language models, and the interval that compares two of them.

Validation decides which epoch is kept; the test split is read by nothing but `evaluate(model, task, "test")`.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from tqdm import tqdm

from workbench import models
from workbench.container import read_tensors, write_tensors
from workbench.gates import evaluating, keeping_modes
from workbench.models import build_classifier, build_language_model, seeded
from workbench.quantise import cast
from workbench.schedules import RetrainingSchedule
from workbench.tasks import LanguageTask, Recipe, Split, Task

CHECKPOINT = "checkpoint"
TRAINING = "training"
POOL_BATCHES = 10  # batches drawn at random together, then cut by length
ANNEAL = 4  # what "sgd" divides the learning rate by
EVALUATION_STREAMS = 10  # in which a language model reads a split side by side
LOSS_ROWS = 64  # tokens whose logits are turned into a loss at a time
EVALUATION_TOKENS = 100  # of each stream, read at a time: only the logits of these are held


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
    """Quality of a model on one split; the arrays are in the order of the split's items.

    Of a language model the items are tokens: all but the first of each of the streams in which the split is read.
    """

    loss: float  # mean cross-entropy, nats
    accuracy: float  # percent
    losses: np.ndarray  # (N,) float64
    correct: np.ndarray  # (N,) bool

    @property
    def perplexity(self) -> float:
        """exp(loss)"""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """exp of a cross-entropy (nats), infinite where a float holds none that large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Interval(NamedTuple):
    """95 % interval and mean of a quantity, in its unit."""

    low: float
    mean: float
    high: float


def fit(
    model: nn.Module,
    task: Task | LanguageTask,
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
    optimizer: str | None = None,
    teacher: nn.Module | None = None,
    distillation_weight: float = 0.5,
    distillation_temperature: float = 2.0,
    retraining: RetrainingSchedule | None = None,
    callback: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> History:
    """Train `model` in place and leave it with the weights of the epoch of least validation loss (the first of equals).

    AdamW with a one-cycle schedule (15 % warm-up), or SGD whose rate is divided by 4 after every epoch that does not improve
    on the least validation loss; gradients are clipped. A language model learns by truncated back-propagation: its state
    goes on from one piece of the text to the next. What is not given is taken from `task.recipe` (see `Recipe`). The same
    seed gives the same weights on the same machine; the caller's random state is untouched.

    Args:
        model: takes (x (B, T, F) or tokens (B, T), lengths (B,)) and gives logits (B, classes); for a LanguageTask takes
            (tokens (T, B), state or None) and gives (logits (T, B, words), state). May carry torch parametrizations.
        teacher: its logits on the clean training split are distilled into the model.
        distillation_weight: share of the teacher's term in the loss, 0 to 1.
        distillation_temperature: divides the logits of both in that term.
        retraining: a fresh schedule whose `model` is the one that is trained; it must be done after `select_after` of the
            steps, so that the epoch that is kept lies inside the plan.
        callback: called with (step, total steps) before each training step, for example to tighten a mask; it must be
            done with changing the model after `select_after` of them.
        on_epoch: called with each row of the history when its epoch is done, and with those that a checkpoint brings.
        checkpoint: file written after every epoch. Where it exists, training goes on from there, with the same arguments
            and the same fresh model, and on a processor ends with the very weights of an uninterrupted one (kernels of a
            GPU may differ in the last bits between any two runs); where it is finished, nothing is trained.
        device: "cpu" or "cuda"; the model is returned to where it came from.
        progress: show a bar.

    Raises:
        FloatingPointError: the loss is no longer finite.
        ValueError: the checkpoint is damaged, or of other arguments or another model; the message says what differs.
    """
    given = {
        "epochs": epochs, "lr": lr, "batch_size": batch_size, "weight_decay": weight_decay,
        "feature_noise": feature_noise, "time_mask": time_mask, "feature_mask": feature_mask,
        "select_after": select_after, "optimizer": optimizer,
    }  # fmt: skip
    recipe = replace(task.recipe, **{name: value for name, value in given.items() if value is not None})
    task = replace(task, recipe=recipe)  # checked against the kind of task here
    if not 0 <= distillation_weight <= 1 or not distillation_temperature > 0:
        raise ValueError(
            f"fit needs a distillation_weight in [0, 1] and a distillation_temperature above 0, "
            f"got {distillation_weight} and {distillation_temperature}"
        )
    if retraining is not None and (retraining.model is not model or retraining.entered):
        raise ValueError("fit needs a fresh retraining schedule of the model that it trains, got a used one or that of another "
                         "model")
    if retraining is not None and retraining.until > recipe.select_after:
        raise ValueError(f"fit needs a retraining schedule that is done after select_after, {recipe.select_after} of the "
                         f"steps, got one until {retraining.until}")
    check_device(device, "fit")

    file = None
    if checkpoint is not None:
        distillation = teacher and [fingerprint(teacher), distillation_weight, distillation_temperature]
        about = {"task": task.name, "split": task.split, "data": task.digest, "seed": seed, "distillation": distillation}
        about |= {"model": build_digest(model)} | ({} if retraining is None else {"retraining": retraining.digest})
        file = _File(Path(checkpoint), about | asdict(recipe) | {"initial weights": fingerprint(model)}, device, retraining)
        if history := file.finished(model):
            for row in history.epochs if on_epoch else ():
                on_epoch(row)
            return history
    with _placed(model, device), _placed(teacher, device), seeded(seed, device):
        distil = None if teacher is None else _Distillation(teacher, distillation_weight, distillation_temperature)
        data = _kind(task)(task, device, distil)
        return _fit(model, task, data, retraining, callback, on_epoch, file, progress)


def check_device(device: str, who: str) -> None:
    """Refuse what is not "cpu" or "cuda", and "cuda" where there is none."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f'{who} needs "cpu" or "cuda" as device, got {device!r}')
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'{who} cannot use device="cuda": torch finds no CUDA device')


def _fit(model, task, data, retraining, callback, on_epoch, file, progress):
    recipe = task.recipe
    total_steps = recipe.epochs * data.steps_per_epoch
    optimizer, schedule = _optimizer(model, recipe, total_steps)
    history, best, weights = (file and file.resume(model, optimizer, schedule, data.steps_per_epoch)) or ([], None, None)
    for row in history if on_epoch else ():
        on_epoch(row)
    step = len(history) * data.steps_per_epoch
    bar = tqdm(range(len(history) + 1, recipe.epochs + 1), desc=f"training on {task.name}", unit="epoch", mininterval=1,
               initial=len(history), total=recipe.epochs, disable=not progress)  # fmt: skip
    for epoch in bar:
        start, lr, total_loss = time.perf_counter(), optimizer.param_groups[0]["lr"], 0.0
        model.train()
        for batch in data.batches():
            if callback is not None:
                callback(step, total_steps)
            if retraining is not None:
                retraining.step(step / total_steps, optimizer)
            loss, share = data.loss(model, batch)
            optimizer.zero_grad()
            (loss if retraining is None else loss + retraining.penalty()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            total_loss += loss.detach() * share  # on the device: nothing waits for it before the epoch's end
            step += 1
        valid = evaluate(model, task, "valid")
        row = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": float(total_loss),
            "valid_loss": valid.loss,
            "valid_accuracy": valid.accuracy,
            "seconds": time.perf_counter() - start,
        }
        if not np.isfinite([row["train_loss"], row["valid_loss"]]).all():
            raise FloatingPointError(
                f"fit: the loss is not finite after epoch {epoch} of {recipe.epochs} (train {row['train_loss']}, "
                f"validation {row['valid_loss']}); the learning rate was {lr:g}, its peak is {recipe.lr:g}: lower lr"
            )
        if schedule is None and valid.loss >= min((earlier["valid_loss"] for earlier in history), default=math.inf):
            for group in optimizer.param_groups:
                group["lr"] /= ANNEAL
        history.append(row)
        # The last step of this epoch was at (step - 1) / total_steps: there a retraining schedule must have been done.
        late = step - 1 >= recipe.select_after * total_steps or epoch == recipe.epochs
        if late and (best is None or valid.loss < history[best - 1]["valid_loss"]):
            best, weights = epoch, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if file is not None and epoch < recipe.epochs:
            file.write(model, optimizer, schedule, history, best, weights)
        if on_epoch is not None:
            on_epoch(row)
        bar.set_postfix_str(f"valid loss {valid.loss:.3f}, {valid.accuracy:.1f} %")
    model.load_state_dict(weights)
    if file is not None:
        file.write_finished(model, history, best)
    return History(tuple(history), best)


def _optimizer(model, recipe, total_steps):
    """The optimizer, and the schedule that is stepped with it; None where validation decides."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay), None
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps + 1, pct_start=0.15)


@contextlib.contextmanager
def _placed(model, device):
    """Inside, the model (or None) is on the device; afterwards it is where and in the modes it was."""
    if model is None:
        yield
        return
    home = device_of(model)
    move(model, device)
    try:
        with keeping_modes(model):
            yield
    finally:
        move(model, home)


def _kind(task):
    """How this kind of task is trained and measured: the one place that tells classification from language."""
    return _Streams if isinstance(task, LanguageTask) else _Sequences


class _Sequences:
    """Labelled sequences: batches of similar length, in random order."""

    def __init__(self, task, device, distil):
        split = task.splits["train"]
        self.lengths, self.recipe, self.distil = split.lengths, task.recipe, distil
        self.tensors = [tensor.to(device) for tensor in _tensors(split)]
        self.soft = distil and distil.soft(_logits(distil.teacher, split, batch_size=256)[0].to(device))  # (N, classes)
        self.steps_per_epoch = -(-len(self.lengths) // self.recipe.batch_size)

    def batches(self):
        return bucketed_batches(self.lengths, self.recipe.batch_size)

    def loss(self, model, batch):
        """Loss of one batch, and its share in the epoch."""
        x, lengths, labels = self.tensors
        longest = int(self.lengths[batch].max())
        batch = batch.to(x.device)
        frames = augment(x[batch, :longest], lengths[batch], self.recipe)
        # One cache per forward: a constrained weight is evaluated once, and again after the step changed it.
        with parametrize.cached():
            logits = model(as_model(frames, model), lengths[batch])
        loss = functional.cross_entropy(logits, labels[batch])
        if self.distil:
            loss = self.distil.mixed(loss, logits, self.soft[batch])
        return loss, len(batch) / len(labels)

    @staticmethod
    def measure(model, split, batch_size):
        """Losses (N,) and correctness (N,)."""
        logits, labels = _logits(model, split, batch_size)
        return functional.cross_entropy(logits.double(), labels, reduction="none"), logits.argmax(1) == labels


class _Streams:
    """A text in streams of equal length side by side, read in pieces; each piece goes on where the last one ended."""

    def __init__(self, task, device, distil):
        recipe, tokens = task.recipe, task.splits["train"]
        if len(tokens) < 2 * recipe.batch_size:
            raise ValueError(f"fit needs at least 2 tokens for each of {recipe.batch_size} streams, got {len(tokens)} in all")
        length = len(tokens) // recipe.batch_size  # the fewer than batch_size last tokens are left out
        text = torch.from_numpy(tokens[: length * recipe.batch_size]).view(recipe.batch_size, length)
        self.text = text.T.contiguous().to(device)  # (length, B)
        self.bptt, self.distil = recipe.bptt, distil
        self.steps_per_epoch = -(-(length - 1) // self.bptt)

    def batches(self):
        self.state = self.teacher_state = None
        return range(0, len(self.text) - 1, self.bptt)

    def loss(self, model, start):
        """Mean loss of the tokens of one piece, and its share in the epoch."""
        piece = self.text[start : start + self.bptt + 1]  # (up to bptt + 1, B)
        with parametrize.cached():  # once per forward, as above
            logits, state = model(piece[:-1], self.state)
        self.state = _detached(state)
        logits = logits.flatten(0, 1)  # (up to bptt * B, words)
        loss = _WordLoss.apply(logits, piece[1:].flatten())
        if self.distil:
            with torch.no_grad(), evaluating(self.distil.teacher), parametrize.cached():
                soft, self.teacher_state = self.distil.teacher(piece[:-1], self.teacher_state)
            loss = self.distil.mixed(loss, logits, self.distil.soft(soft.flatten(0, 1)))
        return loss, (len(piece) - 1) / (len(self.text) - 1)

    @staticmethod
    def measure(model, tokens, batch_size):
        """Losses (N - streams,) and correctness of all tokens but the first of each stream, in the order of the text."""
        streams = torch.from_numpy(tokens).tensor_split(min(EVALUATION_STREAMS, len(tokens) // 2))
        text = nn.utils.rnn.pad_sequence(streams).to(device_of(model))  # (T, streams): lengths differ by at most one
        losses, correct, state = [], [], None
        with torch.no_grad(), evaluating(model), parametrize.cached():
            for start in range(0, len(text) - 1, EVALUATION_TOKENS):
                piece = text[start : start + EVALUATION_TOKENS + 1]
                logits, state = model(piece[:-1], state)
                losses.append(functional.cross_entropy(logits.transpose(1, 2), piece[1:], reduction="none"))  # (t, streams)
                correct.append(logits.argmax(2) == piece[1:])
        real = [len(stream) - 1 for stream in streams]
        return (torch.cat([column[:count] for column, count in zip(torch.cat(pieces).T.cpu(), real, strict=True)])
                for pieces in (losses, correct))  # fmt: skip


class _WordLoss(torch.autograd.Function):
    """Mean cross-entropy (nats) of logits (N, words), of any width, for words (N,).

    The logits of some hundred tokens do not fit a processor's cache: a few rows at a time are read once, for loss and gradient,
    which takes less than half the time of torch's.
    """

    @staticmethod
    def forward(ctx, logits, words):
        gradient, total = torch.empty_like(logits), 0.0
        rows = LOSS_ROWS if logits.device.type == "cpu" else len(logits)
        for part, out, target in zip(logits.split(rows), gradient.split(rows), words.split(rows), strict=True):
            # float32 at least: bfloat16 has 8 significant bits
            values = part.log_softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (rows, words)
            right = values.gather(1, target[:, None])
            total = total - right.sum()
            values.exp_().scatter_(1, target[:, None], right.expm1())
            out.copy_(values.div_(len(logits)))
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx, outer):
        if torch.is_grad_enabled():  # the gradient is a constant here: a derivative of it would be wrong
            raise RuntimeError("the loss of words can be differentiated once only, not with create_graph=True")
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None


def batch_losses(model: nn.Module, task: Task | LanguageTask, count: int, seed: int) -> Iterator[torch.Tensor]:
    """The training loss, with its graph, of each of `count` batches (at most those of one epoch), with the task's
    augmentation and without dropout."""
    device = device_of(model)
    with seeded(seed, device.type), evaluating(model):
        data = _kind(task)(task, device, None)
        for batch in itertools.islice(data.batches(), count):
            with no_cudnn():
                loss = data.loss(model, batch)[0]
            yield loss


def no_cudnn():
    """cuDNN gives no gradients of a recurrent module in evaluation mode; torch's own kernels do."""
    return torch.backends.cudnn.flags(enabled=False)


def _detached(state):
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


class _Distillation(NamedTuple):
    """Mixes the cross-entropy with the divergence from a teacher's soft targets."""

    teacher: nn.Module
    weight: float
    temperature: float

    def soft(self, logits):
        return (logits / self.temperature).softmax(1)  # (B, classes)

    def mixed(self, loss, logits, soft):
        exact = torch.promote_types(logits.dtype, torch.float32)  # of a decoder in bfloat16 too
        own = functional.log_softmax(logits.to(exact) / self.temperature, 1)
        # The squared temperature keeps the gradient's size (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).
        divergence = functional.kl_div(own, soft, reduction="batchmean") * self.temperature**2
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
    """The sequences `x` (B, T, F) with noise, and one stretch of time and one of features blanked in each; tokens, whose
    recipe asks for nothing, as they are."""
    if recipe.feature_noise:
        x = x + recipe.feature_noise * torch.randn_like(x)
    if recipe.time_mask:
        blank = _stretch(recipe.time_mask, lengths, x.shape[1])  # (B, T)
        x = x.masked_fill(blank[:, :, None], 0)  # 0 is the mean of every feature
    if recipe.feature_mask:
        features = x.shape[2]
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


def evaluate(model: nn.Module, task: Task | LanguageTask, split: str, batch_size: int = 256) -> Evaluation:
    """Loss and accuracy of `model` on the `split` "train", "valid" or "test" of `task`; the model is left as it was.

    batch_size: sequences at a time. A language model reads the whole split once, in 10 streams whose state it carries
    along, and its accuracy is that of the next token; only the first token of each stream is not predicted.
    """
    if split not in task.splits:
        raise ValueError(f"evaluate knows the splits {', '.join(task.splits)} of {task.name}, got {split!r}")
    losses, correct = (tensor.numpy() for tensor in _kind(task).measure(model, task.splits[split], batch_size))
    losses = losses.astype(np.float64)
    return Evaluation(float(losses.mean()), 100 * float(correct.mean()), losses, correct)


def _logits(model, split, batch_size):
    """Logits (N, classes) and labels (N,) of a split, on the processor."""
    x, lengths, labels = _tensors(split)
    device = device_of(model)
    with torch.no_grad(), evaluating(model), parametrize.cached():
        # Sorted by length, so that little of a batch is padding.
        batches = lengths.argsort(stable=True).split(batch_size)
        logits = [model(as_model(x[batch, : lengths[batch].max()].to(device), model), lengths[batch].to(device)).cpu()
                  for batch in batches]
    order = torch.cat(batches).argsort()
    return torch.cat(logits)[order], labels


def as_model(x: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Features in the one dtype of the model's parameters; tokens, and what a model of several gets, as they are."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return cast(x, *dtypes) if len(dtypes) == 1 else x


def _tensors(split: Split):
    return torch.from_numpy(split.x), torch.from_numpy(split.lengths), torch.from_numpy(split.labels)


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next(model.parameters(), torch.empty(0)).device


def move(model: nn.Module, device: str | torch.device) -> None:
    """Bring the model to the device, in place; a constrained one can still be copied afterwards."""
    if device_of(model) != torch.device(device):
        with torch.no_grad():  # an LSTM evaluates its constrained weights here; a graph would forbid deepcopy
            model.to(device)


class _File(NamedTuple):
    """The checkpoint file of one training. settings: everything that decides its result, the device apart."""

    path: Path
    settings: dict
    device: str
    retraining: RetrainingSchedule | None

    def finished(self, model) -> History | None:
        """Give the model the weights of a finished training, where the file holds one."""
        about, tensors = self._read()
        if about is None or not about["finished"]:
            return None
        if self.retraining is not None:
            self.retraining.step(1.0)
        model.load_state_dict(_part(tensors, "model"))
        return History(tuple(about["history"]), about["best_epoch"])

    def resume(self, model, optimizer, schedule, steps_per_epoch):
        """(history, best epoch, its weights) of an unfinished training, everything set to where it was; None without a file."""
        about, tensors = self._read()
        if about is None:
            return None
        if self.retraining is not None:  # first: it decides which parameters there are
            done, total = (epochs * steps_per_epoch for epochs in (len(about["history"]), self.settings["epochs"]))
            self.retraining.resume((done - 1) / total, optimizer, _part(tensors, "retraining"))
        model.load_state_dict(_part(tensors, "model"))
        states = {}
        for name, tensor in _part(tensors, "optimizer").items():
            number, _, what = name.partition("/")
            states.setdefault(int(number), {})[what] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": about["optimizer"]})
        if schedule is not None:
            schedule.load_state_dict(about["schedule"])
        torch.set_rng_state(torch.from_numpy(tensors["random/cpu"]))
        if self.device == "cuda":
            torch.cuda.set_rng_state(torch.from_numpy(tensors["random/cuda"]))
        device = device_of(model)
        weights = {name: tensor.to(device) for name, tensor in _part(tensors, "best").items()}
        return about["history"], about["best_epoch"], weights or None

    def write(self, model, optimizer, schedule, history, best, weights):
        state = optimizer.state_dict()
        tensors = _named("model", model.state_dict()) | _named("best", weights or {})
        for number, own in state["state"].items():
            tensors |= _named(f"optimizer/{number}", own)
        if self.retraining is not None:
            tensors |= _named("retraining", self.retraining.state_dict())
        tensors["random/cpu"] = torch.get_rng_state().numpy()
        if self.device == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state().numpy()
        about = {"finished": False, "device": self.device, "history": history, "best_epoch": best,
                 "optimizer": state["param_groups"], "schedule": schedule and schedule.state_dict()}  # fmt: skip
        self._write(tensors, about)

    def write_finished(self, model, history, best):
        self._write(_named("model", model.state_dict()), {"finished": True, "history": history, "best_epoch": best})

    def _write(self, tensors, about):
        write_tensors(self.path, tensors, who="fit", what=TRAINING, version=1, about={"settings": self.settings} | about)

    def _read(self):
        if not self.path.exists():
            if not self.path.parent.is_dir():
                raise ValueError(f"fit needs an existing directory for its checkpoint, got {self.path.parent}")
            return None, None
        about, tensors = read_tensors(self.path, who="fit", what=TRAINING, version=1)
        # A finished training is good on every device, an unfinished one cannot go on elsewhere with the same numbers.
        found, wanted = about["settings"], dict(self.settings)
        if not about["finished"]:
            found, wanted = found | {"device": about["device"]}, wanted | {"device": self.device}
        names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        if names:
            differing = "; ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} here" for name in names)
            raise ValueError(f"fit: {self.path} is the checkpoint of another training. {differing}")
        return about, tensors


def _named(part, tensors):
    return {f"{part}/{name}": tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def _part(tensors, part):
    return {name.removeprefix(f"{part}/"): torch.from_numpy(tensor) for name, tensor in tensors.items()
            if name.startswith(f"{part}/")}  # fmt: skip


def fingerprint(model) -> str:
    """Short digest of names, shapes and values of a model's state."""
    digest = hashlib.sha256()
    for name, array in _named("", model.state_dict()).items():
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def build_digest(model) -> str:
    """Short digest of what a model is beside its state: classes, plain attributes (sizes, dropout, number formats), and which
    parameters are trained."""
    about = [[name, type(module).__qualname__, sorted(f"{key}={value!r}" for key, value in vars(module).items()
                                                      if not key.startswith("_") and key != "training" and _is_plain(value))]
             for name, module in model.named_modules()]
    about.append([name for name, parameter in model.named_parameters() if parameter.requires_grad])
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _is_plain(value) -> bool:
    """Whether the text of a value says what it is."""
    if isinstance(value, (tuple, list, dict)):
        return all(map(_is_plain, (*value, *value.values()) if isinstance(value, dict) else value))
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, field.name)) for field in fields(value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def code_digest(*more: str | Path) -> str:
    """Digest of what beside its arguments decides a training: the code that trains, that of the `more` files whose code takes
    part in it, and torch. In the names of checkpoints it keeps those of older code from being taken for ones of today's."""
    digest = hashlib.sha256(torch.__version__.encode())
    for file in (models.__file__, __file__, *more):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]


def checkpoint_folder(checkpoints: str | Path) -> Path:
    """The directory of checkpoints, made where it is missing: a relative one below a run's results, elsewhere `results`."""
    folder = Path(os.environ.get("WB_RESULTS", "results")) / checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def baseline(
    task: Task | LanguageTask,
    *,
    hidden_size: int,
    seed: int,
    cell: str = "LSTM",
    num_layers: int = 1,
    epochs: int | None = None,
    device: str = "cpu",
    checkpoints: str | Path = "checkpoints",
    on_epoch: Callable[[dict], None] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, History]:
    """The float model that compressed ones start from and are compared with: trained, resumed, or loaded where finished.

    checkpoints: directory of one file per training, `<task>-<cell>-<units>-seed<seed>-<digest of all that decides it>`; a
    finished file serves on any device. In a run a relative directory lies below its results, elsewhere below `results`.
    """
    recipe = task.recipe if epochs is None else replace(task.recipe, epochs=epochs)
    build = build_language_model if isinstance(task, LanguageTask) else build_classifier
    model = build(task, hidden_size, seed=seed, cell=cell, num_layers=num_layers)
    about = [task.digest, task.split, asdict(recipe), cell, hidden_size, num_layers, seed, code_digest()]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    path = checkpoint_folder(checkpoints) / f"{task.name}-{cell}-{hidden_size}-seed{seed}-{digest}.safetensors"
    history = fit(model, replace(task, recipe=recipe), seed=seed, device=device, checkpoint=path, on_epoch=on_epoch,
                  progress=progress)  # fmt: skip
    return model, history


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

    Seeds and items are resampled independently (percentile bootstrap). Of few seeds that is too narrow: where items add
    nothing to what the seeds differ, intervals of 2, 3 and 5 normal ones hold the true mean in 50, 75 and 83 of 100 cases.

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
    # Items that differ alike in every seed are drawn as one kind (K of them): the same distribution, for less work.
    kinds, of_kind = np.unique(difference, axis=1, return_counts=True)  # (S, K), (K,)
    # How often each seed and each kind is drawn; two products then give every resampled mean.
    seed_counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)  # (R, S)
    item_counts = generator.multinomial(items, of_kind / items, resamples)  # (R, K)
    means = (seed_counts @ kinds * item_counts).sum(1) / difference.size  # (R,)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(difference.mean()), float(high))


def t_interval(values: np.ndarray) -> Interval:
    """95 % interval of the mean of `values` (N,) by Student's t, in their unit; NaN where there is none: a single value has no
    interval, and no value no mean."""
    from scipy import stats

    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(math.nan, float(values[0]) if len(values) else math.nan, math.nan)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(values.mean() - half), float(values.mean()), float(values.mean() + half))
