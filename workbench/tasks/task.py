"""What a task is: labelled sequences in three splits, and the recipe that trains a classifier on them."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Recipe:
    """Training settings that suit a task; `fit` and `build_classifier` take them where the caller names nothing else."""

    epochs: int = 100
    lr: float = 6e-3  # peak of the one-cycle schedule
    batch_size: int = 32
    weight_decay: float = 1e-2
    dropout: float = 0.3  # before the classifier
    pooling: str = "mean"  # "mean" over the frames or "last" state
    feature_noise: float = 0.2  # standard deviation of the noise added to the standardised features
    time_mask: float = 0.0  # largest fraction of a sequence's frames blanked in one training example
    feature_mask: float = 0.0  # largest fraction of the features blanked in one training example
    select_after: float = 0.75  # only epochs that end behind this fraction of the steps, where lr is low, can be kept

    def __post_init__(self):
        for name, least in (("epochs", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Recipe needs an int as {name}, got {value!r}")
            if value < least:
                raise ValueError(f"Recipe needs {name} of at least {least}, got {value}")
        if not self.lr > 0:
            raise ValueError(f"Recipe needs a learning rate lr above 0, got {self.lr}")
        if not 0 <= self.select_after < 1:
            raise ValueError(f"Recipe needs select_after in [0, 1), got {self.select_after}")
        for name, most in (("weight_decay", np.inf), ("feature_noise", np.inf), ("time_mask", 1), ("feature_mask", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"Recipe needs {name} from 0 to {most}, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Split:
    """Sequences of one split: features zero padded behind `lengths`, one label and one identifier each."""

    x: np.ndarray  # (N, T, F) float32
    lengths: np.ndarray  # (N,) int64, real frames
    labels: np.ndarray  # (N,) int64
    items: tuple[str, ...]  # N identifiers

    def __post_init__(self):
        if self.x.ndim != 3 or self.x.dtype != np.float32:
            raise ValueError(f"Split needs x as (N, T, F) float32, got {self.x.shape} {self.x.dtype}")
        count, frames, _ = self.x.shape
        if not len(self.lengths) == len(self.labels) == len(self.items) == count:
            raise ValueError(
                f"Split needs one length, label and item per sequence, got {count} sequences, {len(self.lengths)} "
                f"lengths, {len(self.labels)} labels, {len(self.items)} items"
            )
        if count == 0 or self.lengths.min() < 1 or self.lengths.max() > frames:
            raise ValueError(f"Split needs sequences of 1 to {frames} frames, got lengths {self.lengths}")


@dataclass(frozen=True, eq=False)
class Task:
    """A sequence classification task; `splits` holds "train", "valid" and "test"."""

    name: str
    split: str  # how the data were divided, "official" or for example "speaker:theo"
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    digest: str  # SHA-256 over the source bytes and the version of the features
    description: str
    source: str
    licence: str
    recipe: Recipe

    @property
    def num_features(self) -> int:
        return self.splits["train"].x.shape[2]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def data_folders(name: str) -> list[Path]:
    """Folders where the files of data set `name` may lie, in the order of the search."""
    folders = [Path(__file__).parents[2] / "data" / name]
    if "WORKBENCH_DATA" in os.environ:
        folders.insert(0, Path(os.environ["WORKBENCH_DATA"]) / name)
    return folders


def pad(sequences: list[np.ndarray], labels: list[int], items: list[str]) -> Split:
    """Split of the `sequences`, each (T_n, F), padded with zeros to the longest."""
    lengths = np.array([len(sequence) for sequence in sequences])
    x = np.zeros((len(sequences), lengths.max(), sequences[0].shape[1]), np.float32)  # (N, T, F)
    for row, sequence in zip(x, sequences, strict=True):
        row[: len(sequence)] = sequence
    return Split(x, lengths, np.array(labels), tuple(items))


def standardise(sequences: list[np.ndarray], train: list[int], power: float = 1.0) -> list[np.ndarray]:
    """Features with mean 0 and mean variance 1 over the frames of the `train` sequences; nothing else is looked at.

    power: each feature is divided by its deviation to this power. 1 makes all equally large; less leaves small features
    smaller, which suits features whose small components are mostly noise.
    """
    frames = np.concatenate([sequences[n] for n in train])  # (frames, F)
    mean, deviation = frames.mean(0), frames.std(0)
    scale = deviation**power * np.sqrt((deviation ** (2 - 2 * power)).mean())
    return [((sequence - mean) / scale).astype(np.float32) for sequence in sequences]
