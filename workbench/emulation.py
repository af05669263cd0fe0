"""Quantisation-aware training: nn.LSTM and nn.GRU that round every internal signal exactly where the integer engine does.

In float64 every sum and product before a rounding is exact, so the outputs are the engine's, bit for bit. In float32 they are
as long as the sums fit 24 bits, which the weights decide: 300 weights of 8 bits can bring signals of 12 bits to 27. Beyond,
some fall on the other side of a rounding boundary: mismatch_rate says how often. Gradients pass straight through every rounding
and stop where its result saturates (Bengio 2013, arXiv 1308.3432); that of a table is the slope of its function at the rounded
input, also where few output bits cut its values off, so that a gate comes back from there.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from workbench.constrain import IntegerRNN, attach, bake, check_packed, constrain_weights, pack
from workbench.engine import StackEngine
from workbench.fixedpoint import FUNCTIONS, HardTable, QFormat
from workbench.gates import cell_name, layers, layers_of, merged_bias, parts_of, rnns
from workbench.methods.base import fake_quantise
from workbench.packed import PARTS, PROJECTION, PackedLayer, PackedModel
from workbench.plan import Plan
from workbench.quantise import as_given, batches_of_arguments, cast, quantised_states, recurrent_calls, time_first

MAX_TABLE_BITS = 20  # of a table's input: the emulation holds one entry for every code
# What a sum takes with it, in units of the last place of what it is rounded to, so that its floor rounds half up. Sums have at
# most 48 bits: in float64 it is either exact, or lost where the sum has no fraction bits anyway.
HALF = 0.5


@dataclass(frozen=True)
class Rounding:
    """How one layer and direction rounds: what a PackedLayer says, without its weights. bias_fracs: bias -> fraction bits."""

    signals: dict[str, QFormat]
    tables: dict[str, object]
    bias_fracs: dict[str, int]
    projected: bool
    _constants: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, layer: PackedLayer) -> "Rounding":
        """ValueError where a table would need too many entries, for delta thresholds and for blocks on the fft datapath."""
        if layer.spectral_blocks:
            raise ValueError("the emulation multiplies circulant blocks exactly, as the datapath time does, not fft: train "
                             f"with the one and pack with the other, got fft for {', '.join(layer.spectral_blocks)}")
        if layer.delta:
            raise ValueError("the emulation sends every signal whole in every step: train without delta thresholds and pack "
                             f"with them, got {layer.delta}")
        for name in {"pre", "cell"} & set(layer.signals):
            if layer.signals[name].bits > MAX_TABLE_BITS:
                raise ValueError(f"the emulation holds a table of every code of {name} and needs at most {MAX_TABLE_BITS} "
                                 f"bits, got {layer.signals[name]}")
        return cls(layer.signals, layer.tables, layer.bias_fracs, layer.projected)

    def constants(self, build, like: torch.Tensor) -> SimpleNamespace:
        """The tensors that build(self) computes, in the dtype and on the device of `like`; computed once for each."""
        key = like.dtype, like.device
        if key not in self._constants:
            self._constants[key] = SimpleNamespace(**{
                name: torch.as_tensor(value, dtype=torch.int32 if name == "offsets" else like.dtype, device=like.device)
                for name, value in build(self).items()})
        return self._constants[key]

    def table(self, function, source, target) -> tuple[np.ndarray, np.ndarray]:
        """(values, slopes) for every code of the signal `source`, with one more entry for what saturates at either end: its
        value is that of the last code, its slope 0. Both in units of the target's last place over those of the source's."""
        in_fmt, out_fmt, table = self.signals[source], self.signals[target], self.tables[function]
        codes = np.arange(in_fmt.min - 1, in_fmt.max + 2)
        stored = np.clip(codes, in_fmt.min, in_fmt.max)
        slopes = np.where(codes == stored, _slope(table, in_fmt.dequantise(stored)), 0.0)
        return table.lookup(stored, in_fmt, out_fmt), np.ldexp(slopes, out_fmt.frac - in_fmt.frac)


def _slope(table, x):
    """Derivative at x of the function that the table stands for."""
    if isinstance(table, HardTable):
        # The ends belong to it: the code at an end also stands for values just inside.
        return np.where(np.abs(x) <= 2, 0.25, 0.0) if table.function == "sigmoid" else np.where(np.abs(x) <= 1, 1.0, 0.0)
    y = FUNCTIONS[table.function](x)
    return y * (1 - y) if table.function == "sigmoid" else 1 - y * y


def _look_up(sums, fmt, offsets, values, index, out):
    """Sums in units of fmt's last place, the half included -> entries of a table; index keeps which. sums is overwritten and
    may be out."""
    index.copy_(sums.clamp_(fmt.min - 1, fmt.max + 1).floor_()).add_(offsets)
    torch.index_select(values, 0, index.view(-1), out=out.view(-1))


def _round(sums, fmt, out, inside):
    """Sums in units of fmt's last place, the half included -> out, integers of fmt; inside: 1 where they did not saturate."""
    torch.clamp(sums.floor_(), fmt.min, fmt.max, out=out)
    torch.eq(sums, out, out=inside)


# Inside both functions every rounded signal is a float that holds the integer of its format, so that a rounding is a floor;
# gate outputs are values. The weights and biases that come in are scaled so that their sums are in units of the last place of
# what they are rounded to. What does not wait for another step is done for all steps at once.


def _lstm_constants(a):
    s, m = a.signals, "unprojected" if a.projected else "hidden"
    sigmoid, sigmoid_slopes = a.table("sigmoid", "pre", "sigmoid")
    tanh, tanh_slopes = a.table("tanh", "pre", "tanh")
    cell, cell_slopes = a.table("tanh", "cell", "tanh")
    # g is in units of the cell's last place, so that f*c + i*g is one sum of those, and tanh(c) in those of its product.
    to_value, to_cell, to_m = (2.0**exponent for exponent in (
        -s["sigmoid"].frac, s["cell"].frac - s["tanh"].frac, s[m].frac - s["tanh"].frac))
    first = 1 - s["pre"].min
    return {
        "values": np.concatenate([sigmoid * to_value, tanh * to_cell]),
        "slopes": np.concatenate([sigmoid_slopes * to_value, tanh_slopes * to_cell]),
        "offsets": [first, first, first + len(sigmoid), first],
        "cell_values": cell * to_m,
        "cell_slopes": cell_slopes * to_m,
        "half": HALF,
    }


class _LSTM(torch.autograd.Function):
    """h (T, B, output_size) and c (T, B, hidden_size) of every step from x (T, B, input_size), h (B, output_size) and
    c (B, hidden_size)."""

    @staticmethod
    def forward(ctx, x, h, c, w_ih, w_hh, w_hr, bias, a):
        k, s = a.constants(_lstm_constants, x), a.signals
        (steps, batch, _), size = x.shape, c.shape[1]
        offsets = k.offsets.repeat_interleave(size)
        # The sums of all gates; once a step has looked them up, its gate outputs stand there.
        gates = torch.addmm(bias + HALF, x.flatten(0, 1), w_ih.t())
        gates = gates.unflatten(0, (steps, batch))  # (T, B, 4 * hidden_size)
        indices = torch.empty_like(gates, dtype=torch.int32)
        cells, outputs = x.new_empty(steps + 1, *c.shape), x.new_empty(steps + 1, *h.shape)
        cells[0], outputs[0] = c, h
        tanh, c_inside, m_inside = (torch.empty_like(cells[1:]) for _ in range(3))
        tanh_indices, sums = torch.empty_like(tanh, dtype=torch.int32), torch.empty_like(c)
        # m is what a projection takes, or h itself.
        ms, h_inside = (torch.empty_like(tanh), torch.empty_like(outputs[1:])) if a.projected else (outputs[1:], m_inside)
        m_fmt, from_h, from_m = s["unprojected" if a.projected else "hidden"], w_hh.t(), w_hr.t() if a.projected else None
        h, c = outputs[0], cells[0]
        for gate, index, new_c, c_in, tanh_index, tanh_c, m, m_in, new_h, h_in in zip(
                gates, indices, cells[1:], c_inside, tanh_indices, tanh, ms, m_inside, outputs[1:], h_inside, strict=True):
            _look_up(gate.addmm_(h, from_h), s["pre"], offsets, k.values, index, gate)
            i, f, g, o = gate.view(batch, 4, size).unbind(1)
            torch.addcmul(k.half, i, g, out=sums).addcmul_(f, c)
            _round(sums, s["cell"], new_c, c_in)
            _look_up(sums, s["cell"], 1 - s["cell"].min, k.cell_values, tanh_index, tanh_c)
            _round(torch.addcmul(k.half, o, tanh_c, out=sums), m_fmt, m, m_in)
            if a.projected:
                _round(torch.addmm(k.half, m, from_m), s["hidden"], new_h, h_in)
            h, c = new_h, new_c
        projection = (w_hr, ms, h_inside) if a.projected else ()
        ctx.save_for_backward(x, w_ih, w_hh, gates, indices, cells, outputs, tanh, tanh_indices, c_inside, m_inside,
                              *projection)
        ctx.constants = k
        ctx.set_materialize_grads(False)
        return outputs[1:], cells[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs, d_cells):
        x, w_ih, w_hh, gates, indices, cells, outputs, tanh, tanh_indices, c_inside, m_inside, *projection = ctx.saved_tensors
        k, (steps, batch, size) = ctx.constants, tanh.shape
        if d_outputs is None:
            d_outputs = torch.zeros_like(outputs[1:])
        i, f, g, o = gates.view(steps, batch, 4, size).unbind(2)
        d_gates = torch.index_select(k.slopes, 0, indices.view(-1)).view(steps, batch, 4, size)
        for d, factor in zip(d_gates.unbind(2), (g, cells[:-1], i, tanh), strict=True):
            d *= factor
        through = torch.index_select(k.cell_slopes, 0, tanh_indices.view(-1)).view_as(tanh).mul_(o)
        if projection:
            w_hr, ms, h_inside = projection
            d_projected = torch.empty_like(h_inside)
        flat, later, d_c = d_gates.flatten(2), None, torch.zeros_like(cells[0])
        for t in reversed(range(steps)):
            d_h = d_outputs[t] if later is None else torch.addmm(d_outputs[t], later, w_hh)
            if projection:
                d_h = torch.mul(d_h, h_inside[t], out=d_projected[t]) @ w_hr
            d_m = d_h * m_inside[t]
            d_c.addcmul_(d_m, through[t])
            if d_cells is not None:
                d_c += d_cells[t]
            d_c *= c_inside[t]
            d_gates[t, :, :3] *= d_c[:, None]  # i, f and g make c'
            d_gates[t, :, 3] *= d_m
            d_c *= f[t]
            later = flat[t]
        flat = flat.flatten(0, 1)
        d_x = (flat @ w_ih).view_as(x) if ctx.needs_input_grad[0] else None
        d_w_ih = flat.t() @ x.flatten(0, 1)
        d_w_hh = flat.t() @ outputs[:-1].flatten(0, 1)
        d_w_hr = d_projected.flatten(0, 1).t() @ ms.flatten(0, 1) if projection else None
        return d_x, later @ w_hh, d_c, d_w_ih, d_w_hh, d_w_hr, flat.sum(0), None


def _gru_constants(a):
    s = a.signals
    sigmoid, sigmoid_slopes = a.table("sigmoid", "pre", "sigmoid")
    tanh, tanh_slopes = a.table("tanh", "pre", "hidden")
    to_value = 2.0 ** -s["sigmoid"].frac
    return {
        "values": sigmoid * to_value,
        "slopes": sigmoid_slopes * to_value,
        "n_values": tanh,
        "n_slopes": tanh_slopes,
    }


class _GRU(torch.autograd.Function):
    """h of every step (T, B, hidden_size) from x (T, B, input_size) and h (B, hidden_size). w_ih: rows of n, z
    and r; w_hh: rows of z, r and the hidden product; bias: of all four."""

    @staticmethod
    def forward(ctx, x, h, w_ih, w_hh, bias, a):
        k, s = a.constants(_gru_constants, x), a.signals
        (steps, batch, _), size = x.shape, h.shape[1]
        first, to_pre = 1 - s["pre"].min, 2.0 ** (s["pre"].frac - s["hidden_product"].frac)
        bias = bias + HALF
        # n, z, r and the hidden product side by side: the first three have inputs, the last three take h.
        sums = x.new_empty(steps, batch, 4 * size)
        sums[:, :, : 3 * size] = torch.addmm(bias[: 3 * size], x.flatten(0, 1), w_ih.t()).unflatten(0, (steps, batch))
        sums[:, :, 3 * size :] = bias[3 * size :]
        outputs = x.new_empty(steps + 1, *h.shape)
        outputs[0] = h
        gates = x.new_empty(steps, batch, 2 * size)  # z, r
        candidates, products, inside = (torch.empty_like(outputs[1:]) for _ in range(3))
        indices, n_indices = (torch.empty_like(values, dtype=torch.int32) for values in (gates, candidates))
        for t in range(steps):
            sums[t, :, size:].addmm_(outputs[t], w_hh.t())
            n, zr, product = sums[t].split((size, 2 * size, size), 1)
            _look_up(zr, s["pre"], first, k.values, indices[t], gates[t])
            z, r = gates[t].view(batch, 2, size).unbind(1)
            _round(product, s["hidden_product"], products[t], inside[t])
            n.addcmul_(r, products[t], value=to_pre)
            _look_up(n, s["pre"], first, k.n_values, n_indices[t], candidates[t])
            # (1 - z) * n + z * h; a mean of two integers of a format does not saturate it.
            torch.lerp(candidates[t], outputs[t], z, out=outputs[t + 1]).add_(HALF).floor_()
        ctx.save_for_backward(x, w_ih, w_hh, gates, indices, candidates, n_indices, products, inside, outputs)
        ctx.constants, ctx.to_pre = k, to_pre
        return outputs[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs):
        x, w_ih, w_hh, gates, indices, candidates, n_indices, products, inside, outputs = ctx.saved_tensors
        k, (steps, batch, size) = ctx.constants, products.shape
        z, r = gates.chunk(2, 2)
        d_z, d_r = torch.index_select(k.slopes, 0, indices.view(-1)).view_as(gates).chunk(2, 2)
        d_n = torch.index_select(k.n_slopes, 0, n_indices.view(-1)).view_as(candidates)
        # n, z, r and the hidden product: the first two times the gradient of h', the last two times that of the first.
        d_sums = torch.empty(steps, batch, 4, size, dtype=x.dtype, device=x.device)
        torch.mul(d_n, 1 - z, out=d_sums[:, :, 0])
        torch.mul(d_z, outputs[:-1] - candidates, out=d_sums[:, :, 1])
        torch.mul(d_r, products, out=d_sums[:, :, 2]).mul_(ctx.to_pre)
        torch.mul(r, inside, out=d_sums[:, :, 3]).mul_(ctx.to_pre)
        flat, d_h = d_sums.flatten(2), d_outputs[-1]
        for t in reversed(range(steps)):
            d_sums[t, :, :2] *= d_h[:, None]
            d_sums[t, :, 2:] *= d_sums[t, :, :1]
            d_h = torch.addmm(d_h * z[t], flat[t, :, size:], w_hh)
            if t:
                d_h += d_outputs[t - 1]
        flat = flat.flatten(0, 1)
        from_input, from_hidden = flat[:, : 3 * size], flat[:, size:]
        d_x = (from_input @ w_ih).view_as(x) if ctx.needs_input_grad[0] else None
        d_w_ih = from_input.t() @ x.flatten(0, 1)
        d_w_hh = from_hidden.t() @ outputs[:-1].flatten(0, 1)
        return d_x, d_h, d_w_ih, d_w_hh, flat.sum(0), None


def _check_finite(suffix, tensors):
    """Beyond this no index into a table may be NaN. Where all is well it takes one transfer to the host."""
    if not torch.isfinite(torch.stack([values.detach().sum() for values in tensors.values()]).sum()):
        wrong = ", ".join(name for name, values in tensors.items() if not torch.isfinite(values).all())
        raise ValueError(f"the emulation of layer {suffix} needs finite values, got others in {wrong}")


def _run_layer(rnn, suffix, x, h, c, last):
    """One layer and direction: (h of every step (T, B, output_size), h and c after each sequence's last step (B, ...)), as
    values. h, c: before the first step; c is None for a GRU. last: of the steps (T, B, ...) the last of each sequence."""
    a, s = rnn.rounding[suffix], rnn.rounding[suffix].signals
    pre, hidden = s["pre"].frac, s["hidden"].frac
    weights = {part: getattr(rnn, f"weight_{part}_{suffix}") for part in parts_of(rnn)}
    bias = {name: fake_quantise(b, QFormat(32, a.bias_fracs[name])) for name, b in merged_bias(rnn, suffix).items()}
    given = {"input": x, "hidden": h} | ({} if c is None else {"cell": c})
    given = {name: fake_quantise(values, s[name]) for name, values in given.items()}  # infinities saturate
    _check_finite(suffix, given | weights | {f"bias {name}": b for name, b in bias.items()})
    x, h, *c = given.values()
    if c:
        cell = s["cell"].frac
        w_hr = weights["hr"] * 2.0 ** (hidden - s["unprojected"].frac) if a.projected else None
        outputs, cells = _LSTM.apply(
            x, h * 2.0**hidden, c[0] * 2.0**cell, weights["ih"] * 2.0**pre, weights["hh"] * 2.0 ** (pre - hidden), w_hr,
            torch.cat([bias[gate] for gate in "ifgo"]) * 2.0**pre, a)
        c = [last(cells) * 2.0**-cell]
    else:
        product = s["hidden_product"].frac
        (ih_r, ih_z, ih_n), (hh_r, hh_z, hh_n) = (weights[part].chunk(3) for part in ("ih", "hh"))
        outputs = _GRU.apply(
            x, h * 2.0**hidden, torch.cat([ih_n, ih_z, ih_r]) * 2.0**pre,
            torch.cat([hh_z, hh_r, hh_n * 2.0 ** (product - pre)]) * 2.0 ** (pre - hidden),
            torch.cat([*(bias[gate] * 2.0**pre for gate in "nzr"), bias["hn"] * 2.0**product]), a)
    outputs = outputs * 2.0**-hidden
    return outputs, (last(outputs), *c)


class _Quantised:
    """What QuantisedLSTM and QuantisedGRU do instead of torch's forward. rounding: torch's suffix of a layer and direction
    ("l0", "l0_reverse", ...) -> Rounding."""

    rounding: dict[str, Rounding]

    def forward(self, input, hx=None):
        """input and hx as nn.LSTM and nn.GRU take and name them; returns what they return, under autocast too in the dtype of
        the weights: coarser products would not be the integers'."""
        device = input.data.device.type  # of a tensor, and of a PackedSequence its values
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(*cast((input, hx), next(self.parameters()).dtype))
        _check_dtype("an emulated layer", next(self.parameters()).dtype)
        x, hx, lengths = time_first(self, input, hx)  # (T, B, input_size)
        self.check_input(x, None)
        if hx is not None:
            self.check_forward_args(x.transpose(0, 1) if self.batch_first else x, hx, None)
        outputs, states = zip(*self.layer_outputs(x, hx, lengths), strict=True)
        output, states = outputs[-1], zip(*(state for directions in states for state in directions), strict=True)
        hx = tuple(map(torch.stack, states))  # h and c: (layers * directions, B, ...)
        return as_given(self, input, output, hx if isinstance(self, nn.LSTM) else hx[0], lengths)

    def layer_outputs(self, x, hx=None, lengths=None) -> Iterator[tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]]:
        """For each index of the stack: its outputs (T, B, directions * output_size) and each direction's last states, (h, c) or
        (h,) of (B, ...). x: (T, B, input_size); hx: as torch's, or None; lengths: (B,) or None. Outputs beyond the length of a
        sequence mean nothing."""
        steps, batch, _ = x.shape
        lengths = torch.full((batch,), steps) if lengths is None else lengths
        step = torch.arange(steps)[:, None]  # (T, B) below
        order = torch.where(step < lengths, lengths - 1 - step, step).to(x.device)
        ends, sequences = (lengths - 1).to(x.device), torch.arange(batch, device=x.device)
        known = layers_of(self)
        if hx is None:
            h, c = (x.new_zeros(len(known), batch, size) for size in (self.proj_size or self.hidden_size, self.hidden_size))
            hx = (h, c) if isinstance(self, nn.LSTM) else h
        h, c = hx if isinstance(self, nn.LSTM) else (hx, [None] * len(known))
        outputs, states = [], []
        for number, layer in enumerate(known):
            mine = x[order, sequences] if layer.reverse else x
            output, last = _run_layer(self, layer.suffix, mine, h[number], c[number], lambda values: values[ends, sequences])
            outputs.append(output[order, sequences] if layer.reverse else output)
            states.append(last)
            if layer.reverse or not self.bidirectional:
                x = torch.cat(outputs, -1) if self.bidirectional else output
                yield x, states
                x, outputs, states = functional.dropout(x, self.dropout, self.training), [], []

    def unquantise(self):
        """Make it the plain nn.LSTM or nn.GRU that it was."""
        del self.rounding
        self.__class__ = self.plain


class QuantisedLSTM(_Quantised, nn.LSTM):
    """An nn.LSTM that computes what the integer engine computes, with gradients."""

    plain = nn.LSTM


class QuantisedGRU(_Quantised, nn.GRU):
    """An nn.GRU that computes what the integer engine computes, with gradients."""

    plain = nn.GRU


def quantise_signals(rnn: nn.RNNBase, packed: dict[str, PackedLayer]) -> None:
    """Make an nn.LSTM or nn.GRU round as these layers do (torch's suffix -> layer), in place; its weights stay its own."""
    rnn.rounding = {suffix: Rounding.of(layer) for suffix, layer in packed.items()}
    rnn.__class__ = QuantisedLSTM if isinstance(rnn, nn.LSTM) else QuantisedGRU


def _check_dtype(who, dtype):
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{who} needs weights in float32 or float64, which hold the integers, got {dtype}: train in autocast, "
                         "or convert the model before")


def emulate(model: nn.Module, plan) -> nn.Module:
    """A copy of the model, constrained as by `compress`, whose recurrent layers also round every internal signal where the
    integer engine does: what training sees is what will run.

    Train it in float32 as any model (each forward inside torch.nn.utils.parametrize.cached()); `.double()` makes it equal to
    the engine bit for bit. What `pack` refuses is refused here, before the training.
    """
    plan = Plan.read(plan)
    for path, rnn in rnns(model).items():
        _check_dtype(f"emulate of {path!r}", next(rnn.parameters()).dtype)
    model = bake(model)
    packed = pack(model, plan)
    for path, rnn in rnns(model).items():
        quantise_signals(rnn, {layer.suffix: packed.layers[layer.name] for layer in layers_of(rnn, path)})
    constrain_weights(model, plan)
    return model


def attach_emulated(model: nn.Module, packed: PackedModel) -> nn.Module:
    """As `attach`, but the integers are computed in float64 on the device of the model: for a GPU, which the engine does not
    know. Bit for bit the same; ValueError for what the emulation does not do (see Rounding.of)."""
    return attach(model, packed, EmulatedRNN)


class EmulatedRNN(IntegerRNN):
    """Stands where an IntegerRNN stands and gives what it gives, computed in float64."""

    def __init__(self, stack, rnn: nn.RNNBase, path: str = ""):
        super().__init__(stack, rnn, path)
        self.rnn = copy.deepcopy(rnn).double().requires_grad_(False)
        self.rnn.dropout = 0.0
        packed = dict(zip((layer.suffix for layer in layers_of(rnn)), itertools.chain(*stack), strict=True))
        for suffix, layer in packed.items():
            for part in parts_of(rnn):
                self._set(f"weight_{part}_{suffix}", [
                    np.ldexp(layer.block(part, gate).dense(), layer.signals[PARTS[part]].frac - layer.product_frac(part, gate))
                    for gate in (PROJECTION if part == "hr" else layer.gates)])
            if rnn.bias:
                bias = {name: np.ldexp(integers, -layer.bias_fracs[name]) for name, integers in layer.bias.items()}
                zeros = np.zeros(rnn.hidden_size)
                self._set(f"bias_ih_{suffix}", [bias[gate] for gate in layer.gates])
                self._set(f"bias_hh_{suffix}", [*[zeros] * (len(layer.gates) - 1), bias.get("hn", zeros)])
        quantise_signals(self.rnn, packed)

    def _set(self, name, gates):
        with torch.no_grad():
            getattr(self.rnn, name).copy_(torch.from_numpy(np.concatenate(gates)))

    def forward(self, input, hx=None):
        """input and hx as the replaced module takes and names them; returns what it returns, in input's shapes and dtype."""
        self._check(input, hx)
        dtype = input.data.dtype
        return cast(self.rnn(cast(input, torch.float64), cast(hx, torch.float64)), dtype)


def mismatch_rate(model: nn.Module, packed: PackedModel, batches) -> list[dict]:
    """How often an emulated model, in the dtype that it has, differs from the integer engine: one row a layer and direction,
    with the share of its outputs that differ and the largest difference in units of the last place.

    packed: `pack` of the model. batches: as `calibrate` takes them. Each recurrent module is compared on the inputs that it
    gets inside the model; its own layers feed one another, so that a mismatch goes on.
    """
    check_packed("mismatch_rate", model, packed)
    _check_dtype("mismatch_rate", dtype := next(model.parameters()).dtype)
    counts = {name: [0, 0, 0] for name in layers(model)}  # outputs, mismatches, largest difference
    batches = (cast(arguments, dtype) for arguments in batches_of_arguments("mismatch_rate", batches))
    for path, (x, state, lengths) in recurrent_calls("mismatch_rate", model, batches):
        rnn, stack = rnns(model)[path], packed.stack(path)
        if not isinstance(rnn, _Quantised):
            raise ValueError(f"mismatch_rate needs a model from emulate, got a plain nn.{cell_name(rnn)} {path!r}")
        ends = None if lengths is None else lengths.numpy()
        alive = np.broadcast_to(np.arange(len(x))[:, None] < (len(x) if ends is None else ends), x.shape[:2])  # (T, B)
        flat, names = [layer for directions in stack for layer in directions], iter(layers_of(rnn, path))
        states = quantised_states(flat, state)
        inputs = flat[0].signals["input"].quantise(x.cpu())
        for depth, (output, _) in enumerate(rnn.layer_outputs(x, state, lengths), 1):
            directions = stack[depth - 1]
            first = [values[: depth * len(directions)] for values in states]
            expected = StackEngine(stack[:depth]).run(inputs, *first, lengths=ends).output
            difference = np.abs(directions[0].signals["hidden"].quantise(output.cpu()) - expected)
            for part in np.split(difference, len(directions), axis=-1):
                part, count = part[alive], counts[next(names).name]
                count[0] += part.size
                count[1] += int(np.count_nonzero(part))
                count[2] = max(count[2], part.max(initial=0))
    return [{"layer": name, "outputs": outputs, "mismatches %": 100 * wrong / max(outputs, 1), "largest ulp": int(largest)}
            for name, (outputs, wrong, largest) in counts.items()]
