"""The models that the experiments train, a classifier of sequences and a language model, and their seeded construction."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from workbench.tasks import LanguageTask, Task

POOLINGS = ("mean", "last")
CELLS = {"LSTM": nn.LSTM, "GRU": nn.GRU}


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
    """Recurrent layers, pooled over the real frames, dropout, a linear classifier; in front of tokens an embedding.

    The recurrent module is the attribute `lstm` or `gru`, after its cell, and `rnn` in both cases.

    Args:
        num_features: features per frame; of tokens the width of their embedding.
        hidden_size: units of each recurrent layer.
        num_classes: classes.
        dropout: probability, applied to the pooled state, behind the embedding and between recurrent layers.
        pooling: "mean" of the outputs over the real frames or "last" real output (of a reverse direction the first).
        cell: "LSTM" or "GRU".
        proj_size: width to which an LSTM projects its hidden state; 0: it does not.
        vocab_size: the sequences are tokens below this number, 0 being padding; None: they are features.
    """

    def __init__(
        self, num_features: int, hidden_size: int, num_classes: int, dropout: float = 0.3, pooling: str = "mean", *,
        cell: str = "LSTM", num_layers: int = 1, bidirectional: bool = False, proj_size: int = 0, vocab_size: int | None = None,
    ):  # fmt: skip
        super().__init__()
        _check(self, dropout, cell, num_features=num_features, hidden_size=hidden_size, num_classes=num_classes,
               num_layers=num_layers, **({} if vocab_size is None else {"vocab_size": vocab_size}))  # fmt: skip
        if pooling not in POOLINGS:
            raise ValueError(f"SequenceClassifier needs a pooling out of {', '.join(POOLINGS)}, got {pooling!r}")
        if proj_size and cell != "LSTM":
            raise ValueError(f"SequenceClassifier needs proj_size 0 with a {cell}, got {proj_size}")
        self.pooling, self.cell, self.bidirectional = pooling, cell, bidirectional
        self.embedding = None if vocab_size is None else _embedding(vocab_size, num_features, padding_idx=0)
        rnn = CELLS[cell](num_features, hidden_size, num_layers, batch_first=True, bidirectional=bidirectional,
                          dropout=dropout if num_layers > 1 else 0.0,
                          **({"proj_size": proj_size} if cell == "LSTM" else {}))  # nn.GRU refuses even a 0 # fmt: skip
        self.add_module(cell.lower(), rnn)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear((proj_size or hidden_size) * (1 + bidirectional), num_classes)
        _remember(rnn)

    @property
    def rnn(self) -> nn.Module:
        return getattr(self, self.cell.lower())

    @property
    def consumers(self) -> dict[str, list[str]]:
        """What takes the output of the recurrent module, for remove_units."""
        return {self.cell.lower(): ["classifier"]}

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of the padded sequences `x`, (B, T, F) or tokens (B, T), of `lengths` (B,) frames; padding
        has no influence."""
        if self.embedding is not None:
            x = self.dropout(self.embedding(x))  # (B, T, F)
        if self.bidirectional:  # forwards, padding comes after all real frames; backwards it would come first
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        else:
            out, _ = self.rnn(x)  # (B, T, H)
        if self.pooling == "last":
            pooled = out[torch.arange(len(out), device=out.device), lengths - 1]  # (B, H)
            if self.bidirectional:
                half = out.shape[2] // 2
                pooled = torch.cat([pooled[:, :half], out[:, 0, half:]], 1)
        else:
            padding = torch.arange(out.shape[1], device=out.device) >= lengths[:, None]  # (B, T)
            pooled = out.masked_fill(padding[:, :, None], 0).sum(1) / lengths[:, None]  # (B, H)
        return self.classifier(self.dropout(pooled))


class LanguageModel(nn.Module):
    """Embedding, recurrent layers and a decoder that shares the embedding's weights, dropout between them all.

    The recurrent module is the attribute `lstm` or `gru`, after its cell, and `rnn` in both cases. Sharing: Press and Wolf
    2017, arXiv:1608.05859; the embedding is therefore as wide as a layer has units.

    Args:
        decoder_bfloat16: in training the decoder multiplies in bfloat16 and adds up in float32; its weights and all the rest
            are float32. Most of the work of a step lies there.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, cell: str = "LSTM", num_layers: int = 1, dropout: float = 0.5,
                 decoder_bfloat16: bool = False):  # fmt: skip
        super().__init__()
        _check(self, dropout, cell, vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers)
        self.cell, self.decoder_bfloat16 = cell, decoder_bfloat16
        self.embedding = _embedding(vocab_size, hidden_size)
        rnn = CELLS[cell](hidden_size, hidden_size, num_layers, dropout=dropout if num_layers > 1 else 0.0)
        self.add_module(cell.lower(), rnn)
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(vocab_size))  # of the decoder
        _remember(rnn)

    @property
    def rnn(self) -> nn.Module:
        return getattr(self, self.cell.lower())

    @property
    def consumers(self) -> dict[str, list[str]]:
        """What takes the output of the recurrent module; remove_units refuses it: a unit is a feature of every word too."""
        return {self.cell.lower(): ["embedding"]}

    def forward(self, tokens: torch.Tensor, state=None):
        """(logits (T, B, vocab) of the tokens after each of `tokens` (T, B), state of the recurrent layers)."""
        out, state = self.rnn(self.dropout(self.embedding(tokens)), state)  # (T, B, H)
        rough = self.decoder_bfloat16 and self.training
        with torch.autocast(out.device.type, torch.bfloat16) if rough else contextlib.nullcontext():
            return nn.functional.linear(self.dropout(out), self.embedding.weight, self.bias), state


def _check(model, dropout, cell, **sizes):
    who = type(model).__name__
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{who} needs an int as {name}, got {size!r}")
        if size < 1:
            raise ValueError(f"{who} needs {name} of at least 1, got {size}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{who} needs a dropout in [0, 1), got {dropout}")
    if cell not in CELLS:
        raise ValueError(f"{who} needs a cell out of {', '.join(CELLS)}, got {cell!r}")


def _embedding(vocab_size, width, padding_idx=None):
    embedding = nn.Embedding(vocab_size, width, padding_idx=padding_idx)
    with torch.no_grad():
        embedding.weight.uniform_(-0.1, 0.1)  # torch's own, of deviation 1, is far too large for a decoder
        if padding_idx is not None:
            embedding.weight[padding_idx] = 0
    return embedding


def _remember(rnn):
    """Let an LSTM remember by default: forget bias 1. torch adds two biases, so only one of them carries the 1."""
    if isinstance(rnn, nn.LSTM):
        forget = slice(rnn.hidden_size, 2 * rnn.hidden_size)  # gate order i f g o
        with torch.no_grad():
            for name, parameter in rnn.named_parameters():
                if name.startswith("bias"):
                    parameter[forget] = float(name.startswith("bias_ih"))


def build_classifier(
    task: Task, hidden_size: int, *, seed: int, dropout: float | None = None, pooling: str | None = None, cell: str = "LSTM",
    num_layers: int = 1, bidirectional: bool = False, proj_size: int = 0,
) -> SequenceClassifier:  # fmt: skip
    """Fresh classifier for `task`, the same for the same `seed`; the caller's random state is left as it was.

    `dropout` and `pooling` are those of `task.recipe` unless given; the rest as SequenceClassifier takes it. ValueError for a
    language task.
    """
    if isinstance(task, LanguageTask):
        raise ValueError(f"build_classifier needs a task of labelled sequences, got the language task {task.name}")
    with seeded(seed):
        return SequenceClassifier(
            task.num_features,
            hidden_size,
            task.num_classes,
            task.recipe.dropout if dropout is None else dropout,
            task.recipe.pooling if pooling is None else pooling,
            cell=cell,
            num_layers=num_layers,
            bidirectional=bidirectional,
            proj_size=proj_size,
            vocab_size=None if task.vocabulary is None else len(task.vocabulary),
        )


def build_language_model(
    task: LanguageTask, hidden_size: int, *, seed: int, dropout: float | None = None, cell: str = "LSTM", num_layers: int = 1
) -> LanguageModel:
    """Fresh language model for `task`, the same for the same `seed`; the caller's random state is left as it was.

    `dropout` is that of `task.recipe` unless given.
    """
    dropout = task.recipe.dropout if dropout is None else dropout
    with seeded(seed):
        return LanguageModel(len(task.vocabulary), hidden_size, cell=cell, num_layers=num_layers, dropout=dropout,
                             decoder_bfloat16=task.recipe.decoder_bfloat16)
