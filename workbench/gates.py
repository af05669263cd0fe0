"""Gates of torch recurrent layers: block names and views of their weights."""

from dataclasses import dataclass

import torch
from torch import nn

from workbench.packed import GATES


@dataclass(frozen=True)
class Block:
    """One gate of one weight matrix. rnn: module path; parameter: torch's name; rows: its rows in that matrix."""

    rnn: str
    parameter: str
    gate: str
    rows: slice
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{_prefix(self.rnn)}{self.parameter}.{self.gate}"


def _prefix(rnn: str) -> str:
    return f"{rnn}." if rnn else ""


def rnns(model: nn.Module) -> dict[str, nn.RNNBase]:
    """Module path -> nn.LSTM or nn.GRU ("" when the model itself is one). A model without one raises ValueError."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, (nn.LSTM, nn.GRU))}
    if not found:
        raise ValueError(f"the workbench compresses nn.LSTM and nn.GRU, and found neither in {type(model).__name__}")
    return found


def cell_name(rnn: nn.RNNBase) -> str:
    return "LSTM" if isinstance(rnn, nn.LSTM) else "GRU"


def check_supported(model: nn.Module) -> None:
    """Refuse by name what compression and the integer engine do not take yet."""
    for name, rnn in rnns(model).items():
        who = f"{cell_name(rnn)} {name!r}"
        if cell_name(rnn) != "LSTM":
            raise ValueError(f"{who}: one-layer nn.LSTM is supported so far, got nn.GRU")
        for rule, value, allowed in (("num_layers", rnn.num_layers, 1), ("bidirectional", rnn.bidirectional, False),
                                     ("proj_size", rnn.proj_size, 0)):
            if value != allowed:
                raise ValueError(f"{who} needs {rule}={allowed} so far, got {rule}={value}")


def parameters_of(rnn: nn.RNNBase) -> list[str]:
    """Names of the weight matrices of a recurrent layer, in torch's order: weight_ih_l0, weight_hh_l0, ..."""
    names = []
    for layer in range(rnn.num_layers):
        for suffix in ("", "_reverse") if rnn.bidirectional else ("",):
            names += [f"weight_{part}_l{layer}{suffix}" for part in (("ih", "hh", "hr") if rnn.proj_size else ("ih", "hh"))]
    return names


def gates_of(rnn: nn.RNNBase, parameter: str) -> tuple[str, ...]:
    """Gates stacked in one weight matrix; the projection weight_hr is one block, gate p."""
    return ("p",) if parameter.startswith("weight_hr") else GATES[cell_name(rnn)]


def blocks(model: nn.Module) -> dict[str, Block]:
    """Block name -> Block, for every recurrent layer of the model, in torch's order."""
    found = {}
    for path, rnn in rnns(model).items():
        for parameter in parameters_of(rnn):
            rows, columns = getattr(rnn, parameter).shape
            gates = gates_of(rnn, parameter)
            size = rows // len(gates)
            for n, gate in enumerate(gates):
                block = Block(path, parameter, gate, slice(n * size, (n + 1) * size), (size, columns))
                found[block.name] = block
    return found


def dense_weights(known: dict[str, Block]) -> int:
    """Weights of these blocks (as `blocks` gives them) before any compression: what every compression ratio starts from."""
    return sum(block.shape[0] * block.shape[1] for block in known.values())


def get_block(model: nn.Module, name: str) -> Block:
    """The block of that name; an unknown name raises ValueError that lists the known ones."""
    known = blocks(model)
    if name not in known:
        raise ValueError(f"{type(model).__name__} has the blocks {', '.join(known)}, none named {name!r}")
    return known[name]


def weight(model: nn.Module, name: str) -> torch.Tensor:
    """(out, in) values of one block, detached from the model."""
    block = get_block(model, name)
    return getattr(model.get_submodule(block.rnn), block.parameter).detach()[block.rows]
