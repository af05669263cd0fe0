"""The LSTM classifier that the experiments train, and its seeded construction."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from workbench.tasks import Task

POOLINGS = ("mean", "last")


@contextlib.contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Inside, torch draws from `seed` on the processor and on `device`; afterwards its random state is as before."""
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every CUDA device too
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


class SequenceClassifier(nn.Module):
    """One unidirectional LSTM layer, pooled over the real frames, dropout, a linear classifier.

    Args:
        num_features: features per frame.
        hidden_size: units of the LSTM.
        num_classes: classes.
        dropout: probability, applied to the pooled state.
        pooling: "mean" of the outputs over the real frames or "last" real output.
    """

    def __init__(self, num_features: int, hidden_size: int, num_classes: int, dropout: float = 0.3, pooling: str = "mean"):
        super().__init__()
        for name, size in (("num_features", num_features), ("hidden_size", hidden_size), ("num_classes", num_classes)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"SequenceClassifier needs an int as {name}, got {size!r}")
            if size < 1:
                raise ValueError(f"SequenceClassifier needs {name} of at least 1, got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"SequenceClassifier needs a dropout in [0, 1), got {dropout}")
        if pooling not in POOLINGS:
            raise ValueError(f"SequenceClassifier needs a pooling out of {', '.join(POOLINGS)}, got {pooling!r}")
        self.pooling = pooling
        self.lstm = nn.LSTM(num_features, hidden_size, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_classes)
        with torch.no_grad():
            # Remember by default. torch adds two biases, so only one of them carries the 1. Gate order i f g o.
            self.lstm.bias_ih_l0[hidden_size : 2 * hidden_size] = 1
            self.lstm.bias_hh_l0[hidden_size : 2 * hidden_size] = 0

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of the padded sequences `x` (B, T, F) of `lengths` (B,) frames; padding has no influence."""
        out, _ = self.lstm(x)  # (B, T, H)
        if self.pooling == "last":
            pooled = out[torch.arange(len(out), device=out.device), lengths - 1]  # (B, H)
        else:
            padding = torch.arange(out.shape[1], device=out.device) >= lengths[:, None]  # (B, T)
            pooled = out.masked_fill(padding[:, :, None], 0).sum(1) / lengths[:, None]  # (B, H)
        return self.classifier(self.dropout(pooled))


def build_classifier(
    task: Task, hidden_size: int, *, seed: int, dropout: float | None = None, pooling: str | None = None
) -> SequenceClassifier:
    """Fresh classifier for `task`, the same for the same `seed`; the caller's random state is left as it was.

    `dropout` and `pooling` are those of `task.recipe` unless given.
    """
    with seeded(seed):
        return SequenceClassifier(
            task.num_features,
            hidden_size,
            task.num_classes,
            task.recipe.dropout if dropout is None else dropout,
            task.recipe.pooling if pooling is None else pooling,
        )
