"""A torch model and its plan: compress (train inside the plan), bake, pack to integers, attach the integer engine."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from workbench.engine import LayerEngine
from workbench.fixedpoint import ActivationTable
from workbench.gates import blocks, cell_name, check_supported, gates_of, parameters_of, rnns, weight
from workbench.packed import PackedLayer, PackedModel
from workbench.plan import Plan, pack_block
from workbench.quantise import layer_name


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


def bake(model: nn.Module) -> nn.Module:
    """A copy of the model whose recurrent weights are plain parameters with the constrained values."""
    constrained = [rnn for rnn in rnns(model).values() if _parametrized(rnn)]
    for rnn in constrained:
        with torch.no_grad():
            rnn._init_flat_weights()  # after a training forward it holds non-leaf tensors, which deepcopy refuses
    model = copy.deepcopy(model)
    for rnn in rnns(model).values():
        if names := _parametrized(rnn):
            # A deepcopy shares its class with the original; removing a parametrization there would strip both.
            cls = type(rnn)
            rnn.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
            for name in names:
                parametrize.remove_parametrizations(rnn, name, leave_parametrized=True)
            rnn._init_flat_weights()
    return model


def compress(model: nn.Module, plan) -> nn.Module:
    """A copy of the model whose recurrent weights are constrained to the plan; any training loop retrains it.

    The support of every block is chosen from the model's weights now. Stored values pass through their number format
    with a straight-through gradient. A compressed model may be compressed again (it is baked first; its optimizer must
    be made anew). Training loops should run each forward inside torch.nn.utils.parametrize.cached(), which otherwise
    evaluates the constraint twice. ValueError for layers that are not supported and plans that do not fit.
    """
    plan = Plan.read(plan)
    check_supported(model)
    plan.check(model)
    model = bake(model)
    for path, rnn in rnns(model).items():
        for parameter in parameters_of(rnn):
            parts = [block for block in blocks(model).values() if (block.rnn, block.parameter) == (path, parameter)]
            gates = [plan.blocks[b.name].method.constrain(weight(model, b.name), plan.blocks[b.name].format) for b in parts]
            parametrize.register_parametrization(rnn, parameter, _GateWeights(gates))
    return model


def pack(model: nn.Module, plan) -> PackedModel:
    """The integers of a model under a plan. A model that is not constrained is projected first (one-shot).

    Overflow is decided here: a row that could leave the accumulator, or a bias that does not fit 32 bits, is refused.
    """
    plan = Plan.read(plan)
    check_supported(model)
    plan.check(model)
    model = bake(model)
    known, layers, rnn_bias_params = blocks(model), {}, 0
    for path, rnn in rnns(model).items():
        packed = {name: pack_block(weight(model, name), plan.blocks[name]) for name, b in known.items() if b.rnn == path}
        signals = plan.signals[layer_name(path)]
        tables = {function: ActivationTable.build(function) for function in ("sigmoid", "tanh")}
        layers[layer_name(path)] = PackedLayer.from_float_bias(cell_name(rnn), packed, _merged_bias(rnn), signals, tables)
        rnn_bias_params += len(gates_of(rnn, "weight_ih_l0")) * rnn.hidden_size if rnn.bias else 0
    recurrent = {id(p) for rnn in rnns(model).values() for p in rnn.parameters()}
    other_params = sum(p.numel() for p in model.parameters() if id(p) not in recurrent)
    return PackedModel(layers, rnn_bias_params, other_params)


def _merged_bias(rnn):
    """gate -> (hidden_size,) float64 b_ih + b_hh; zeros without biases."""
    gates = gates_of(rnn, "weight_ih_l0")
    zeros = torch.zeros(len(gates) * rnn.hidden_size)
    b_ih, b_hh = (rnn.bias_ih_l0, rnn.bias_hh_l0) if rnn.bias else (zeros, zeros)
    merged = b_ih.detach().cpu().double() + b_hh.detach().cpu().double()
    return dict(zip(gates, merged.view(len(gates), -1).numpy(), strict=True))


def attach(model: nn.Module, packed: PackedModel) -> nn.Module:
    """A copy of the model whose recurrent layers run the integer engine: float tensors in and out, integers within.

    Takes what nn.LSTM takes: batch_first or not, a single unbatched sequence, initial states, packed sequences. No gradient.
    """
    check_supported(model)
    model = bake(model)
    if sorted(packed.layers) != sorted(layer_name(path) for path in rnns(model)):
        raise ValueError(f"attach needs a packed model with the layers {', '.join(map(layer_name, rnns(model)))}, "
                         f"got {', '.join(packed.layers)}")
    for path, rnn in rnns(model).items():
        layer = packed.layers[layer_name(path)]
        if (layer.input_size, layer.hidden_size) != (rnn.input_size, rnn.hidden_size):
            raise ValueError(f"attach needs input and hidden sizes {(rnn.input_size, rnn.hidden_size)} for {path!r}, "
                             f"got {(layer.input_size, layer.hidden_size)}")
        integer = IntegerLSTM(layer, rnn.batch_first)
        if not path:
            return integer
        # Under every name that the model has for it: under another one the float layer would go on running.
        for alias in [name for name, module in model.named_modules(remove_duplicate=False) if module is rnn]:
            parent, _, name = alias.rpartition(".")
            setattr(model.get_submodule(parent), name, integer)
    return model


class IntegerLSTM(nn.Module):
    """Stands where an nn.LSTM stood and computes it with the integer engine.

    It has the sizes that the module around it may ask for, for example to make an initial state.
    """

    num_layers, bidirectional, proj_size = 1, False, 0

    def __init__(self, layer: PackedLayer, batch_first: bool):
        super().__init__()
        self.layer, self.batch_first = layer, batch_first
        self.input_size, self.hidden_size = layer.input_size, layer.hidden_size
        self.engine = LayerEngine(layer)

    def flatten_parameters(self):
        """What nn.LSTM offers and modules call; there is nothing to flatten."""

    def forward(self, input, hx=None):
        """input and hx as nn.LSTM takes and names them; returns (output, (h, c)) in input's shape conventions and dtype."""
        if isinstance(input, PackedSequence):
            padded, lengths = pad_packed_sequence(input)  # (T, B, input_size); sorted back to the caller's order
            output, hx = self._run(padded, hx, lengths.numpy())
            order = torch.arange(len(lengths)) if input.sorted_indices is None else input.sorted_indices.cpu()
            packed = pack_padded_sequence(output[:, order.to(output.device)], lengths[order])
            return PackedSequence(packed.data, input.batch_sizes, input.sorted_indices, input.unsorted_indices), hx
        if input.ndim == 2:
            hx = hx and tuple(s.unsqueeze(1) for s in hx)
            output, (h, c) = self._run(input.unsqueeze(1), hx, None)
            return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
        output, hx = self._run(input.transpose(0, 1) if self.batch_first else input, hx, None)
        return output.transpose(0, 1) if self.batch_first else output, hx

    def _run(self, x, state, lengths):
        signals = self.layer.signals
        h, c = (None, None) if state is None else (
            signals[name].quantise(s[0].detach().cpu()) for name, s in zip(("hidden", "cell"), state, strict=True))
        result = self.engine.run(signals["input"].quantise(x.detach().cpu()), h, c, lengths)

        def floats(values, name):
            return torch.from_numpy(signals[name].dequantise(values)).to(x)

        return floats(result.output, "hidden"), (floats(result.h, "hidden")[None], floats(result.c, "cell")[None])
