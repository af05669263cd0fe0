"""What a task is: labelled sequences or a stream of words, in three splits, and the recipe that trains a model on them."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OPTIMIZERS = ("adamw", "sgd")
PARTS = ("train", "valid", "test")
AUGMENTATIONS = ("feature_noise", "time_mask", "feature_mask")
STILL = 1e-6  # of the largest magnitude: what deviates by less is one value and its rounding


@dataclass(frozen=True)
class Recipe:
    """Training settings that suit a task; `fit`, `baseline` and others take them where the caller names nothing else."""

    epochs: int = 100
    lr: float = 6e-3  # peak of the one-cycle schedule of "adamw", start of the annealed one of "sgd"
    batch_size: int = 32  # sequences, or streams of words read side by side
    weight_decay: float = 1e-2
    dropout: float = 0.3  # before the classifier; of tokens also behind the embedding
    pooling: str = "mean"  # "mean" over the frames or "last" state
    feature_noise: float = 0.2  # standard deviation of the noise added to the standardised features
    time_mask: float = 0.0  # largest fraction of a sequence's frames blanked in one training example
    feature_mask: float = 0.0  # largest fraction of the features blanked in one training example
    select_after: float = 0.75  # only epochs that end behind this fraction of the steps, where lr is low, can be kept
    optimizer: str = "adamw"  # with one cycle of lr, or "sgd", its lr divided by 4 when the validation loss does not improve
    max_gradient_norm: float = 1.0  # a longer gradient is scaled down to this norm
    hidden_size: int = 128  # units of the baseline
    embedding_size: int = 128  # of a classifier of tokens
    bptt: int = 35  # tokens through which a language model's gradient runs back
    decoder_bfloat16: bool = False  # a language model's decoder multiplies in bfloat16 in training, see LanguageModel

    def __post_init__(self):
        for name in ("epochs", "batch_size", "hidden_size", "embedding_size", "bptt"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Recipe needs an int as {name}, got {value!r}")
            if value < 1:
                raise ValueError(f"Recipe needs {name} of at least 1, got {value}")
        if not isinstance(self.decoder_bfloat16, bool):
            raise TypeError(f"Recipe needs a bool as decoder_bfloat16, got {self.decoder_bfloat16!r}")
        if not self.lr > 0:
            raise ValueError(f"Recipe needs a learning rate lr above 0, got {self.lr}")
        if not self.max_gradient_norm > 0:
            raise ValueError(f"Recipe needs max_gradient_norm above 0, got {self.max_gradient_norm}")
        if not 0 <= self.select_after < 1:
            raise ValueError(f"Recipe needs select_after in [0, 1), got {self.select_after}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"Recipe needs an optimizer out of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        for name, most in (("weight_decay", np.inf), ("feature_noise", np.inf), ("time_mask", 1), ("feature_mask", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"Recipe needs {name} from 0 to {most}, got {getattr(self, name)}")

    def check_tokens(self, task: str) -> None:
        """Words have no features to blur: refuse augmentation settings for the task of that name."""
        if asked := [f"{name}={getattr(self, name)}" for name in AUGMENTATIONS if getattr(self, name)]:
            raise ValueError(f"{task} is a task of words: its recipe needs {', '.join(AUGMENTATIONS)} of 0, "
                             f"got {', '.join(asked)}")


@dataclass(frozen=True, eq=False)
class Split:
    """Sequences of one split: features or tokens zero padded behind `lengths`, one label and one identifier each."""

    x: np.ndarray  # (N, T, F) float32, or (N, T) int32 or int64 tokens
    lengths: np.ndarray  # (N,) int64, real frames
    labels: np.ndarray  # (N,) int64
    items: tuple[str, ...]  # N identifiers

    def __post_init__(self):
        features = self.x.ndim == 3 and self.x.dtype == np.float32
        if not features and not (self.tokens and self.x.dtype in (np.int32, np.int64)):
            raise ValueError(f"Split needs x as (N, T, F) float32 or (N, T) int32 or int64, got {self.x.shape} {self.x.dtype}")
        for name in ("lengths", "labels"):
            if (found := getattr(self, name)).dtype != np.int64:
                raise ValueError(f"Split needs {name} as int64, got {found.dtype}")
        if features and not (finite := np.isfinite(self.x)).all():
            raise ValueError(f"Split needs finite features, got {int((~finite).sum())} of {finite.size} that are not")
        count, frames = self.x.shape[:2]
        if not len(self.lengths) == len(self.labels) == len(self.items) == count:
            raise ValueError(
                f"Split needs one length, label and item per sequence, got {count} sequences, {len(self.lengths)} "
                f"lengths, {len(self.labels)} labels, {len(self.items)} items"
            )
        if count == 0 or self.lengths.min() < 1 or self.lengths.max() > frames:
            raise ValueError(f"Split needs sequences of 1 to {frames} frames, got lengths {self.lengths}")

    @property
    def tokens(self) -> bool:
        """Whether the sequences are tokens, not features."""
        return self.x.ndim == 2


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
    vocabulary: tuple[str, ...] | None = None  # the words of the tokens; None where the sequences are features

    def __post_init__(self):
        _check_parts("Task", self)
        for part, split in self.splits.items():
            if split.labels.min() < 0 or split.labels.max() >= self.num_classes:
                raise ValueError(f"Task {self.name} needs labels from 0 to {self.num_classes - 1}, one for each of its "
                                 f"class_names, got {split.labels.min()} to {split.labels.max()} in {part}")
            if split.tokens != (self.vocabulary is not None):
                raise ValueError(f"Task {self.name} needs a vocabulary exactly where its sequences are tokens; "
                                 f"{part} holds x {split.x.shape} {split.x.dtype}")
            if split.tokens:
                _check_tokens(self.name, part, split.x, self.vocabulary)
        if self.vocabulary is not None:
            self.recipe.check_tokens(self.name)

    @property
    def num_features(self) -> int:
        """Features per frame that a recurrent layer gets; of tokens the width of their embedding."""
        return self.splits["train"].x.shape[2] if self.vocabulary is None else self.recipe.embedding_size

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, eq=False)
class LanguageTask:
    """Next-word prediction; `splits` holds the tokens of "train", "valid" and "test", each (tokens,) int64."""

    name: str
    split: str  # how the data were divided
    vocabulary: tuple[str, ...]
    splits: dict[str, np.ndarray]
    digest: str  # SHA-256 over the source bytes and the version of the tokens
    description: str
    source: str
    licence: str
    recipe: Recipe

    def __post_init__(self):
        _check_parts("LanguageTask", self)
        for part, tokens in self.splits.items():
            if tokens.ndim != 1 or tokens.dtype != np.int64 or len(tokens) < 2:
                raise ValueError(f"LanguageTask {self.name} needs {part} as (tokens,) int64 of at least 2 tokens, "
                                 f"got {tokens.shape} {tokens.dtype}")
            _check_tokens(self.name, part, tokens, self.vocabulary)
        self.recipe.check_tokens(self.name)


def _check_parts(kind, task):
    if set(task.splits) != set(PARTS):
        raise ValueError(f"{kind} {task.name} needs the splits {', '.join(PARTS)}, got {', '.join(task.splits)}")


def _check_tokens(name, part, tokens, vocabulary):
    if tokens.min() < 0 or tokens.max() >= len(vocabulary):
        raise ValueError(f"{name}: {part} needs tokens from 0 to {len(vocabulary) - 1}, got {tokens.min()} to {tokens.max()}")


def check_published(what: str, files: dict[str, bytes], expected: str, source: str) -> None:
    """Refuse files, in the order given, whose SHA-256 over names and bytes is not the expected one. what: who and where."""
    total = hashlib.sha256()
    for name, content in files.items():
        total.update(name.encode() + content)
    if total.hexdigest() != expected:
        raise ValueError(f"{what} are not the published ones: SHA-256 over names and bytes {total.hexdigest()}, expected "
                         f"{expected}; source: {source}")


def data_folders(name: str) -> list[Path]:
    """Folders where the files of data set `name` may lie, in the order of the search."""
    folders = [Path(__file__).parents[2] / "data" / name]
    if "WORKBENCH_DATA" in os.environ:
        folders.insert(0, Path(os.environ["WORKBENCH_DATA"]) / name)
    return folders


def read_files(name: str, files: dict[str, str], address: str) -> dict[str, bytes] | None:
    """File name -> bytes from the first data folder of `name` that holds all of `files` (name -> SHA-256), or None.

    ValueError where one is not the published file; address: where that is.
    """
    for folder in data_folders(name):
        if all((folder / file).is_file() for file in files):
            found = {file: (folder / file).read_bytes() for file in files}
            for file, data in found.items():
                if (digest := hashlib.sha256(data).hexdigest()) != files[file]:
                    raise ValueError(f"{name}: {folder / file} is not the published file: SHA-256 {digest}, "
                                     f"expected {files[file]}; source: {address}")
            return found
    return None


def missing(name: str, forms: str, fetch: str) -> FileNotFoundError:
    """The error that says which `forms` of data set `name` were looked for and where, and what to `fetch`."""
    folders = " or ".join(str(folder) for folder in data_folders(name))
    return FileNotFoundError(f"{name}: found neither {forms} in {folders}. Fetch {fetch} into one of these, or set "
                             f"WORKBENCH_DATA to the folder that holds {name}")


def pad(sequences: list[np.ndarray], labels: list[int], items: list[str]) -> Split:
    """Split of the `sequences`, each (T_n, F) features or (T_n,) tokens, padded with zeros to the longest. ValueError for none,
    for floats that are no (T_n, F) and for labels that are no whole numbers."""
    if not len(sequences):
        raise ValueError("pad needs at least one sequence, got none")
    if sequences[0].ndim == 1 and sequences[0].dtype.kind not in "iu":
        raise ValueError(f"pad needs features as (T, F), (T, 1) where there is one, and tokens as integers, got "
                         f"{sequences[0].shape} {sequences[0].dtype}")
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iub":
        raise ValueError(f"pad needs labels that are whole numbers, got {labels.dtype}")
    lengths = np.array([len(sequence) for sequence in sequences])
    shape = (len(sequences), lengths.max(), *sequences[0].shape[1:])
    x = np.zeros(shape, np.float32 if sequences[0].ndim == 2 else np.int32)  # (N, T, F) or (N, T)
    for row, sequence in zip(x, sequences, strict=True):
        row[: len(sequence)] = sequence
    return Split(x, lengths, labels.astype(np.int64), tuple(items))


def standardise(sequences: list[np.ndarray], train: list[int], power: float = 1.0) -> list[np.ndarray]:
    """Features with mean 0 and mean variance 1 over the frames of the `train` sequences; nothing else is looked at.

    power: each feature is divided by its deviation to this power. 1 makes all equally large; less leaves small features
    smaller, which suits features whose small components are mostly noise. A feature that is the same in all those frames, but
    for rounding, says nothing: it is only shifted to 0.
    """
    frames = np.concatenate([sequences[n] for n in train]).astype(np.float64)  # (frames, F)
    mean, deviation = frames.mean(0), frames.std(0)
    moving, scale = deviation > STILL * np.abs(frames).max(0), np.ones_like(deviation)
    if moving.any():
        spread = deviation[moving]
        scale[moving] = spread**power * np.sqrt((spread ** (2 - 2 * power)).mean())
    return [((sequence - mean) / scale).astype(np.float32) for sequence in sequences]
