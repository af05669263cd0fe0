"""Gates of torch recurrent layers: block names and views of their weights."""

import contextlib
import threading
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize

from workbench.packed import GATES, PROJECTION

RECURRENT = {"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"}  # names of torch's recurrent modules, in every namespace
OWN = ("torch", "workbench")  # whose kinds of nn.LSTM and nn.GRU are known


@dataclass(frozen=True)
class Layer:
    """One layer and one direction of a recurrent module. rnn: module path; index: from 0."""

    rnn: str
    index: int
    reverse: bool

    @property
    def suffix(self) -> str:
        """Of torch's parameter names: "l0", "l1_reverse"."""
        return f"l{self.index}{'_reverse' if self.reverse else ''}"

    @property
    def name(self) -> str:
        return f"{_prefix(self.rnn)}{self.suffix}"


@dataclass(frozen=True)
class Block:
    """One gate of one weight matrix. part: ih, hh or hr (the projection); rows: its rows in that matrix."""

    layer: Layer
    part: str
    gate: str
    rows: slice
    shape: tuple[int, int]

    @property
    def rnn(self) -> str:
        """Path of its module."""
        return self.layer.rnn

    @property
    def parameter(self) -> str:
        """torch's name of its matrix."""
        return f"weight_{self.part}_{self.layer.suffix}"

    @property
    def name(self) -> str:
        return f"{_prefix(self.rnn)}{self.parameter}.{self.gate}"


def _prefix(rnn: str) -> str:
    return f"{rnn}." if rnn else ""


def rnns(model: nn.Module) -> dict[str, nn.RNNBase]:
    """Module path -> nn.LSTM or nn.GRU ("" when the model itself is one).

    ValueError for a model without one, and for one with a recurrent module that the workbench does not take, by name, so that
    none is left out or replaced in silence: another kind, a subclass with parameters or methods of its own, compiled alone,
    weights that are not plain parameters (pruned, parametrized by others) or that another module has too.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the workbench takes a model that is a torch.nn.Module, got a {type(model).__name__}")
    found, owners = {}, {}  # owners: id of a parameter -> (whether of an nn.LSTM or nn.GRU, its name)
    for path, module in model.named_modules():
        recurrent = isinstance(module, (nn.LSTM, nn.GRU))
        if recurrent:
            _check_rnn(path, module)
            found[path] = module
        else:
            _check_other(path, module)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            mine = recurrent, f"{_prefix(path)}{name}"
            other = owners.setdefault(id(parameter), mine)
            if other is not mine and (recurrent or other[0]):
                raise ValueError(f"{mine[1]} and {other[1]} are one tied parameter: the workbench takes recurrent layers with "
                                 "weights of their own")
    if not found:
        raise ValueError(f"the workbench compresses nn.LSTM and nn.GRU, and found neither in {type(model).__name__}")
    return found


@contextlib.contextmanager
def own_calls_only(model: nn.Module):
    """Inside, ValueError where this thread calls a recurrent module that is none of the model's, before it is computed.

    Such a one is neither compressed nor counted. Only its call shows it: a list, a closure or a partial can keep it.
    """
    known, thread = {id(module) for module in model.modules()}, threading.get_ident()

    def check(module, arguments):
        if id(module) not in known and _recurrent_kind(module) and threading.get_ident() == thread:
            raise ValueError(f"{type(model).__name__} calls {module}, which is none of its modules, so neither compressed nor "
                             "counted: keep it as an attribute, in an nn.ModuleList or in an nn.ModuleDict; a function that "
                             "was made for another model, or before a copy, calls that one's")

    with contextlib.ExitStack() as stack:
        if any(path.rpartition(".")[2] == "_orig_mod" for path, _ in model.named_modules()):  # something in it is compiled
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # says that hooks may run twice: this may
        stack.callback(register_module_forward_pre_hook(check).remove)
        yield


def _recurrent_kind(module) -> str | None:
    """Name of torch's recurrent kind, in every namespace: those for quantisation and script are no relatives of nn.LSTM."""
    kind = getattr(module, "original_name", type(module).__name__)  # of a scripted module the first
    relative = isinstance(module, nn.RNNBase | nn.RNNCellBase)
    return kind if relative or (kind in RECURRENT and type(module).__module__.split(".")[0] == "torch") else None


def _check_other(path, module):
    if kind := _recurrent_kind(module):
        space = type(module).__module__
        name = f"an nn.{kind}" if space == "torch.nn.modules.rnn" else f"the {kind} of {space}"
        raise ValueError(f"{path!r} is {name}: the workbench takes nn.LSTM and nn.GRU")


def _check_rnn(path, rnn):
    if getattr(rnn, "in_integers", False):
        raise ValueError(f"{path!r} runs in integers, as attach makes it: the workbench takes the float model")
    plain = dict(rnn.named_parameters(recurse=False, remove_duplicate=False))
    biases = [f"bias_{part}_{layer.suffix}" for layer in layers_of(rnn) for part in ("ih", "hh") if rnn.bias]
    expected = parameters_of(rnn) + biases
    if rnn._compiled_call_impl is not None or path.rpartition(".")[2] == "_orig_mod":
        raise ValueError(f"{path!r} is compiled, which a copy would not be, or it would go on calling the original: compile "
                         "the whole model, or what the workbench returns")
    for name in expected:
        if parametrize.is_parametrized(rnn, name):
            for kind in map(type, rnn.parametrizations[name]):
                if kind.__module__.split(".")[0] != "workbench":
                    raise ValueError(f"{name} of {path!r} has the parametrization {kind.__name__}: the workbench takes plain "
                                     "parameters; remove it first (torch.nn.utils.parametrize.remove_parametrizations)")
        elif name not in plain:
            raise ValueError(f"{name} of {path!r} is no plain parameter, as of a pruned or weight-normalised module: make it "
                             "one first (torch.nn.utils.prune.remove, torch.nn.utils.remove_weight_norm)")
    if added := _added(rnn) + [name for name in plain if name not in expected]:
        raise ValueError(f"{path!r} is a {type(rnn).__name__} with {', '.join(added)} of its own, which integers would not "
                         f"have: the workbench takes what nn.{cell_name(rnn)} is; put the rest into a module around it")


def _added(rnn) -> list[str]:
    """Methods and modules that a recurrent module has beside torch's and the workbench's own."""
    methods = ["forward"] if "forward" in vars(rnn) else []
    for kind in type(rnn).__mro__:
        if kind.__module__.split(".")[0] not in (*OWN, "builtins"):
            methods += [name for name, value in vars(kind).items() if name != "__init__" and (
                callable(value) or isinstance(value, (property, staticmethod, classmethod)))]
    return list(dict.fromkeys(methods)) + [name for name, _ in rnn.named_children() if name != "parametrizations"]


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Inside, the model is in evaluation mode; afterwards every module of it is in the mode that it was in."""
    with keeping_modes(model):
        model.eval()
        yield


@contextlib.contextmanager
def keeping_modes(model: nn.Module):
    """Afterwards every module of the model is in the mode that it was in, and one that came new in that of the model."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode


def gate_names(model: nn.Module) -> list[str]:
    """The gates of the model's recurrent modules, each once."""
    return list(dict.fromkeys(block.gate for block in blocks(model).values()))


def check_gates(who: str, model: nn.Module, names) -> None:
    """Refuse what is no list of gates of the model's recurrent modules."""
    if not isinstance(names, list | tuple | set):
        raise ValueError(f"{who} needs a list of gates, got {names!r}")
    known = gate_names(model)
    if unknown := [gate for gate in names if gate not in known]:
        raise ValueError(f"{who} knows the gates {', '.join(known)}, got {', '.join(map(str, unknown))}")


def cell_name(rnn: nn.RNNBase) -> str:
    return "LSTM" if isinstance(rnn, nn.LSTM) else "GRU"


def layers_of(rnn: nn.RNNBase, path: str = "") -> list[Layer]:
    """The layers and directions of a recurrent module in torch's order: l0, l0_reverse, l1, ..."""
    directions = (False, True) if rnn.bidirectional else (False,)
    return [Layer(path, index, reverse) for index in range(rnn.num_layers) for reverse in directions]


def layers(model: nn.Module) -> dict[str, Layer]:
    """Layer name -> Layer, for every recurrent module of the model."""
    return {layer.name: layer for path, rnn in rnns(model).items() for layer in layers_of(rnn, path)}


def parts_of(rnn: nn.RNNBase) -> tuple[str, ...]:
    """Weight matrices of each layer: input, recurrent and, where there is one, projection."""
    return ("ih", "hh", "hr") if rnn.proj_size else ("ih", "hh")


def parameters_of(rnn: nn.RNNBase) -> list[str]:
    """Names of the weight matrices of a recurrent module, in torch's order: weight_ih_l0, weight_hh_l0, ..."""
    return [f"weight_{part}_{layer.suffix}" for layer in layers_of(rnn) for part in parts_of(rnn)]


def blocks(model: nn.Module) -> dict[str, Block]:
    """Block name -> Block, for every recurrent module of the model, in torch's order."""
    found = {}
    for path, rnn in rnns(model).items():
        for layer in layers_of(rnn, path):
            for part in parts_of(rnn):
                rows, columns = getattr(rnn, f"weight_{part}_{layer.suffix}").shape
                gates = PROJECTION if part == "hr" else GATES[cell_name(rnn)]
                size = rows // len(gates)
                for n, gate in enumerate(gates):
                    block = Block(layer, part, gate, slice(n * size, (n + 1) * size), (size, columns))
                    found[block.name] = block
    return found


def merged_bias(rnn: nn.RNNBase, suffix: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Bias -> (hidden_size,): b_ih + b_hh of each gate, added in dtype, their own by default; a GRU's n apart, as n and hn;
    zeros without biases. suffix: of the layer's parameters."""
    gates = GATES[cell_name(rnn)]
    zeros = getattr(rnn, f"weight_hh_{suffix}").new_zeros(len(gates) * rnn.hidden_size)
    both = [getattr(rnn, f"bias_{part}_{suffix}") if rnn.bias else zeros for part in ("ih", "hh")]
    b_ih, b_hh = (dict(zip(gates, b.to(dtype or b.dtype).chunk(len(gates)), strict=True)) for b in both)
    merged = {gate: b_ih[gate] + b_hh[gate] for gate in gates}
    return merged if cell_name(rnn) == "LSTM" else merged | {"n": b_ih["n"], "hn": b_hh["n"]}


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
    return _values(model, get_block(model, name))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Block name -> its values as `weight` gives them, for every block."""
    return {name: _values(model, block) for name, block in blocks(model).items()}


def _values(model, block):
    return getattr(model.get_submodule(block.rnn), block.parameter).detach()[block.rows]
