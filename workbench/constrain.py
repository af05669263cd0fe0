"""A torch model and its plan: compress (train inside the plan), bake, pack to integers, attach the integer engine."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from workbench import fixedpoint, gates, methods, quantise
from workbench import packed as packed_module
from workbench import plan as plan_module
from workbench.engine import StackEngine
from workbench.gates import (
    blocks,
    cell_name,
    dense_weights,
    get_block,
    layers,
    layers_of,
    merged_bias,
    parameters_of,
    rnns,
    weight,
    weights,
)
from workbench.methods import LowRank, method_label
from workbench.packed import GATES, PROJECTION, PackedModel
from workbench.plan import Plan, naming_block, pack_block
from workbench.quantise import as_given, time_first

MOVED = 0.01  # of a block's norm: more than rounding does, 0.1 % of a low-rank product in bfloat16


def constrained_code() -> list[str]:
    """The files whose code takes part in a training inside a plan, for train.code_digest."""
    return [__file__, *(module.__file__ for module in (plan_module, quantise, gates, fixedpoint, packed_module)),
            *map(str, sorted(Path(methods.__file__).parent.glob("*.py")))]


class _GateWeights(nn.Module):
    """The one parametrization of a weight matrix: one constrained module per gate, stacked in torch's order.

    One tuple-valued parametrization per weight, because torch allows a tuple-valued one only as the first.
    """

    def __init__(self, gates):
        super().__init__()
        self.gates = nn.ModuleList(gates)

    def right_inverse(self, w):
        return tuple(gate.right_inverse(part) for gate, part in zip(self.gates, w.chunk(len(self.gates)), strict=True))

    def forward(self, *stored):
        return torch.cat([gate(values) for gate, values in zip(self.gates, stored, strict=True)])  # (gates * hidden_size, in)


def _parametrized(rnn) -> list[str]:
    return [name for name in parameters_of(rnn) if parametrize.is_parametrized(rnn, name)]


def _shown(rnn, name) -> dict[str, torch.Tensor]:
    """Of a constrained weight matrix, for each gate that is a product: its block ("weight_ih_l0.i") -> the factors."""
    constraint = rnn.parametrizations[name]
    return {block: module.shown(getattr(constraint, f"original{n}")).detach()
            for n, (block, module) in enumerate(zip(_blocks_of(rnn, name), constraint[0].gates, strict=True))
            if hasattr(module, "shown")}


def _blocks_of(rnn, name) -> list[str]:
    """Names of the blocks of a weight matrix within the module, "weight_ih_l0.i"."""
    return [f"{name}.{gate}" for gate in (PROJECTION if name.startswith("weight_hr") else GATES[cell_name(rnn)])]


def trained_factors(model: nn.Module, name: str, method) -> dict[str, torch.Tensor]:
    """What a method is told beside the weights of a block of a baked model: where it is a product, its factors as they were
    trained. A product does not give them back, and others would round to another product."""
    if not isinstance(method, LowRank):
        return {}
    block = get_block(model, name)
    factors = getattr(model.get_submodule(block.rnn), "factors", {}).get(f"{block.parameter}.{block.gate}")
    return {} if factors is None else {"stored": factors}


def bake(model: nn.Module) -> nn.Module:
    """A copy of the model whose recurrent weights are plain parameters with the constrained values.

    Low-rank blocks keep their factors beside them (trained_factors), which a state_dict loses. ValueError for a constrained
    model inside torch.nn.utils.parametrize.cached(), unless under torch.no_grad().
    """
    rnns(model)  # what the workbench takes
    # deepcopy refuses tensors with a graph, such as a state kept from the last forward: they are copied without it.
    values = {id(t): t.detach().clone() for module in model.modules() for t in _computed(vars(module))}
    try:
        model = copy.deepcopy(model, values)
    except RuntimeError as error:
        if "deepcopy protocol" not in str(error):
            raise
        raise ValueError("torch cannot copy a model that keeps a computed tensor inside an object of its own: detach it, or "
                         f"delete it: {error}") from error
    make_plain(model)
    return model


def _computed(held, seen=()) -> Iterator[torch.Tensor]:
    """Tensors with a graph in containers, however deep."""
    for value in held.values() if isinstance(held, dict) else held:
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            yield value
        elif isinstance(value, dict | list | tuple | set) and not any(value is outer for outer in seen):
            yield from _computed(value, (*seen, value))


def _check_not_cached():
    if parametrize._cache_enabled and torch.is_grad_enabled():
        raise ValueError("a constrained model cannot be copied or constrained anew inside torch.nn.utils.parametrize.cached(), "
                         "which keeps weights of before, with or without their gradients: do it outside")


def make_plain(model: nn.Module) -> None:
    """What bake does, in place."""
    for path, rnn in rnns(model).items():  # all that is refused before anything is changed
        for name in _parametrized(rnn):
            for block, module in zip(_blocks_of(rnn, name), rnn.parametrizations[name][0].gates, strict=True):
                if hasattr(module, "check_positions"):
                    module.check_positions(f"{path}.{block}".lstrip("."))
    for rnn in rnns(model).values():
        if names := _parametrized(rnn):
            _check_not_cached()
            # A deepcopy shares its class with the original; removing a parametrization there would strip both.
            cls = type(rnn)
            rnn.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
            rnn.factors = {block: factors for name in names for block, factors in _shown(rnn, name).items()}
            for name in names:
                trained = any(stored.requires_grad for stored in rnn.parametrizations[name].parameters())
                parametrize.remove_parametrizations(rnn, name, leave_parametrized=True)
                values = getattr(rnn, name).detach()
                delattr(rnn, name)  # torch leaves a buffer of a frozen weight, and of any without gradients
                setattr(rnn, name, nn.Parameter(values, trained))
            rnn._init_flat_weights()
        if hasattr(rnn, "unquantise"):  # of an emulated model
            rnn.unquantise()


def compress(model: nn.Module, plan) -> nn.Module:
    """A copy of the model whose recurrent weights are constrained to the plan; any training loop retrains it.

    The support of every block is chosen from the model's weights now. Stored values pass through their number format
    with a straight-through gradient. A compressed model may be compressed again (it is baked first; its optimizer must
    be made anew). Training loops should run each forward inside torch.nn.utils.parametrize.cached(), which otherwise
    evaluates the constraint twice. ValueError for layers that are not supported, plans that do not fit, and formats that
    `pack` would refuse whatever the weights.
    """
    plan = Plan.read(plan)
    model = bake(model)
    plan.check(model)
    constrain_weights(model, plan)
    return model


def constrain_weights(model: nn.Module, plan: Plan) -> None:
    """Register the plan's constraints on a model with plain weights, in place."""
    gates = {}  # (module path, parameter) -> one constrained module per gate
    known = blocks(model)
    for name, w in weights(model).items():
        block, entry = known[name], plan.blocks[name]
        constrained = entry.method.constrain(w, entry.format, **trained_factors(model, name, entry.method))
        gates.setdefault((block.rnn, block.parameter), []).append(constrained)
    for (path, parameter), modules in gates.items():
        parametrize.register_parametrization(model.get_submodule(path), parameter, _GateWeights(modules))
    for path in {path for path, _ in gates}:
        _make_copyable(model.get_submodule(path))


def _make_copyable(rnn):
    """After a training forward an LSTM holds weights with their graph, which deepcopy refuses: a copy begins without."""
    cls = type(rnn)  # torch makes one for each parametrized module
    copied = cls.__deepcopy__

    def __deepcopy__(self, memo):
        _check_not_cached()
        with torch.no_grad():
            self._init_flat_weights()
        return copied(self, memo)

    cls.__deepcopy__ = __deepcopy__


def pack(model: nn.Module, plan, original: nn.Module | None = None) -> PackedModel:
    """The integers of a model under a plan. A model that is not constrained is projected first (one-shot); a constrained one
    must lie in the sets of this plan, whatever its formats and up to 1 % of a block's norm, or a projection would undo its
    training unseen: else ValueError.

    original: the model before remove_units; compression ratios then start from its weights, in the file too. One with other
    layers, whose blocks are not at least as large, or of a single module with another input size, is a ValueError. Overflow is
    decided here: a row that could leave the accumulator, or a bias that does not fit 32 bits, is Unpackable, a ValueError.
    """
    plan = Plan.read(plan)
    constrained = [path for path, rnn in rnns(model).items() if _parametrized(rnn)]
    model = bake(model)
    plan.check_fit(model)
    if original is not None:
        _check_original(model, original)
    known, packed, rnn_bias_params = blocks(model), {}, 0
    _check_members(plan, {name: weight(model, name) for name, block in known.items() if block.rnn in constrained})
    for name, layer in layers(model).items():
        mine = {b.name: _packed_block(model, plan, b.name) for b in known.values() if b.layer == layer}
        packed[name] = plan.pack_layer(model, name, mine)
        rnn_bias_params += sum(b.size for b in packed[name].bias.values()) if rnns(model)[layer.rnn].bias else 0
    packed = PackedModel(packed, rnn_bias_params, _other_params(model))
    if original is None:
        return packed
    biases = sum(b.numel() for name, layer in layers(original).items() if rnns(original)[layer.rnn].bias
                 for b in merged_bias(rnns(original)[layer.rnn], layer.suffix).values())
    return packed.with_original(dense_weights(blocks(original)), biases + _other_params(original))


def _check_original(model, original):
    small, large = ({name: tuple(w.shape) for name, w in weights(m).items()} for m in (model, original))
    if small.keys() != large.keys():
        raise ValueError("pack needs as original the model before remove_units, with the same layers, got one with the blocks "
                         f"{', '.join(large)} for {', '.join(small)}")
    (first, *others), (its, *_) = rnns(model).values(), rnns(original).values()
    if not others and first.input_size != its.input_size:  # with others, units of one may have been inputs of another
        raise ValueError("pack needs as original the model before remove_units, which takes the same inputs, got "
                         f"{its.input_size} for {first.input_size}")
    for name, shape in small.items():
        if shape[0] > large[name][0] or shape[1] > large[name][1]:
            raise ValueError("pack needs as original the model before remove_units, which has blocks at least as large, got "
                             f"{large[name]} for the {shape} of {name}")


def _check_members(plan, ws):
    """Refuse weights, block -> (out, in), that the plan's projection would move."""
    moved = {}
    for name, w in ws.items():
        w, method = w.detach().double(), plan.blocks[name].method
        lost = (method.project(w) - w).norm() / w.norm()
        if lost > MOVED:
            moved[name] = f"{name}, which {method_label(method)} would move by {100 * lost:.3g} %"
    if moved:
        raise ValueError(f"pack needs a constrained model in the sets of its plan, got {len(moved)} blocks that are not, first "
                         f"{next(iter(moved.values()))}: end a retraining schedule with step(1.0), or give the plan that the "
                         "model was compressed to; bake(model) first to have it projected all the same")


def _other_params(model):
    recurrent = {id(p) for rnn in rnns(model).values() for p in rnn.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in recurrent)


def _packed_block(model, plan, name):
    with naming_block(name):
        return pack_block(weight(model, name), plan.blocks[name], **trained_factors(model, name, plan.blocks[name].method))


def check_packed(who: str, model: nn.Module, packed: PackedModel) -> None:
    """Refuse what is no packed model, or has not the layers, cells and sizes of the model."""
    if not isinstance(packed, PackedModel):
        raise ValueError(f"{who} needs a model and its PackedModel, got a {type(packed).__name__} as the second")
    if sorted(packed.layers) != sorted(layers(model)):
        raise ValueError(f"{who} needs a packed model with the layers {', '.join(layers(model))}, "
                         f"got {', '.join(packed.layers)}")
    for path, rnn in rnns(model).items():
        for layer in layers_of(rnn, path):
            found, w_ih = packed.layers[layer.name], getattr(rnn, f"weight_ih_{layer.suffix}")
            expected = cell_name(rnn), w_ih.shape[1], rnn.hidden_size, rnn.proj_size or rnn.hidden_size
            if expected != (sizes := (found.cell, found.input_size, found.hidden_size, found.output_size)):
                raise ValueError(f"{who} needs cell, input, hidden and output sizes {expected} for {layer.name}, got {sizes}")


def attach(model: nn.Module, packed: PackedModel, layers_as: type["IntegerRNN"] | None = None) -> nn.Module:
    """A copy of the model whose recurrent layers run the integer engine: float tensors in and out, integers within.

    Takes what nn.LSTM and nn.GRU take: batch_first or not, a single unbatched sequence, initial states, packed sequences. No
    gradient. layers_as: what stands for a recurrent module, IntegerRNN by default.
    """
    check_packed("attach", model, packed)
    model = bake(model)
    for path, rnn in rnns(model).items():
        if rnn._forward_hooks or rnn._forward_pre_hooks:
            raise ValueError(f"attach replaces {path!r}, which has forward hooks: remove them, and register them on what "
                             "stands in its place")
        integer = (layers_as or IntegerRNN)(packed.stack(path), rnn, path)
        if not path:
            return integer
        # Under every name that the model has for it: under another one the float layer would go on running.
        for alias in [name for name, module in model.named_modules(remove_duplicate=False) if module is rnn]:
            parent, _, name = alias.rpartition(".")
            setattr(model.get_submodule(parent), name, integer)
        rnn.forward = functools.partial(_replaced, path)  # of the copy, where the model holds it otherwise
    return model


def _replaced(path, *args, **kwargs):
    raise ValueError(f"attach has replaced {path!r}, but the model calls the float layer, which it holds outside of its "
                     "modules, as in a plain list or dict: call it by its name, or keep an nn.ModuleList or nn.ModuleDict")


class IntegerRNN(nn.Module):
    """Stands where an nn.LSTM or nn.GRU stood and computes it with the integer engine.

    To the code around it isinstance(...) says what the replaced module was, and it has that one's sizes, for example to make an
    initial state; float weights it has none.
    """

    in_integers = True  # what gates.rnns refuses it by

    def __init__(self, stack, rnn: nn.RNNBase, path: str = ""):
        super().__init__()
        self.path = path
        self.stack = stack
        self.mode = self.cell = cell_name(rnn)
        self.batch_first, self.bias, self.dropout = rnn.batch_first, rnn.bias, rnn.dropout
        self.input_size, self.hidden_size, self.proj_size = rnn.input_size, rnn.hidden_size, rnn.proj_size
        self.num_layers, self.bidirectional = rnn.num_layers, rnn.bidirectional

    @property
    def __class__(self):
        # A model that asks which cell it has must go the way that it went in float.
        return nn.LSTM if self.cell == "LSTM" else nn.GRU

    def _get_name(self):
        return type(self).__name__

    @functools.cached_property
    def engine(self) -> StackEngine:
        return StackEngine(self.stack)

    def flatten_parameters(self):
        """What nn.LSTM offers and modules call; there is nothing to flatten."""

    def forward(self, input, hx=None):
        """input and hx as the replaced module takes and names them; returns what it returns, in input's shapes and dtype."""
        self._check(input, hx)
        x, hx, lengths = time_first(self, input, hx)
        output, hx = self._run(x, hx, None if lengths is None else lengths.numpy())
        return as_given(self, input, output, hx, lengths)

    def _check(self, input, hx):
        def shown(value):
            return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__

        values = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(values, torch.Tensor) or not values.is_floating_point() or values.ndim not in (2, 3):
            raise ValueError(f"the integer engine of {self.path!r} needs floats of 2 or 3 dimensions or a packed sequence, got "
                             f"{shown(values)}")
        if hx is None:
            return
        states = [*hx] if self.cell == "LSTM" and isinstance(hx, tuple | list) else [hx]
        if len(states) != 1 + (self.cell == "LSTM") or not all(isinstance(state, torch.Tensor) for state in states):
            needed = "(h, c)" if self.cell == "LSTM" else "h"
            raise ValueError(f"the integer engine of {self.path!r} needs {needed} as its state, got "
                             f"{', '.join(map(shown, states))}")

    def _run(self, x, hx, lengths):
        flat = [layer for directions in self.stack for layer in directions]
        h, c = (None, None) if hx is None else hx if self.cell == "LSTM" else (hx, None)

        def integers(what, name, states):
            if states is None:
                return None
            if len(states) != len(flat):
                raise ValueError(f"the integer engine of {self.path!r} needs {what} of {len(flat)} layers and directions, "
                                 f"got {len(states)}")
            return [self._quantised(what, layer.signals[name], s) for layer, s in zip(flat, states, strict=True)]

        def floats(name, states):
            values = [layer.signals[name].dequantise(s) for layer, s in zip(flat, states, strict=True)]
            return torch.stack([torch.from_numpy(v) for v in values]).to(x)

        result = self.engine.run(self._quantised("the input", flat[0].signals["input"], x),
                                 integers("the hidden state", "hidden", h), integers("the cell state", "cell", c), lengths)
        output = torch.from_numpy(flat[-1].signals["hidden"].dequantise(result.output)).to(x)
        h = floats("hidden", result.h)
        return output, (h, floats("cell", result.c)) if self.cell == "LSTM" else h

    def _quantised(self, what, fmt, values):
        try:
            # NumPy knows no bfloat16.
            return fmt.quantise(values.detach().cpu().to(torch.promote_types(values.dtype, torch.float32)))
        except ValueError as error:
            raise ValueError(f"the integer engine of {self.path!r} cannot take {what}: {error}") from error
