"""Number formats from data: for weights by least squared error, for the signals of a layer by calibration."""

import math

import torch
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from workbench.fixedpoint import QFormat
from workbench.gates import check_supported, rnns

# Finest weight: with a 16-bit hidden state (15 fraction bits) the 32-bit bias then still reaches 4.
MAX_WEIGHT_FRAC = 14


def weight_format(w: torch.Tensor, bits: int) -> QFormat:
    """The signed format of that width with the least squared error over the non-zero entries of w.

    Candidates: the finest format that holds the power of two at or above the largest magnitude, and four finer ones
    (of equal ones the finest is taken); none is finer than MAX_WEIGHT_FRAC, because the bias is stored in 32 bits at the
    fraction bits of the products.
    """
    values = w.detach().double()
    values = values[values != 0].cpu().numpy()
    if values.size == 0:
        return QFormat(bits, min(bits - 1, MAX_WEIGHT_FRAC))
    first = bits - 2 - math.ceil(math.log2(abs(values).max()))
    candidates = [QFormat(bits, min(frac, MAX_WEIGHT_FRAC)) for frac in range(first + 4, first - 1, -1)]
    return min(candidates, key=lambda fmt: float(((fmt.dequantise(fmt.quantise(values)) - values) ** 2).sum()))


def _range_format(largest: float, bits: int) -> QFormat:
    # One bit of headroom over the calibrated range: unseen data may go beyond it, and saturation is costlier than half a bit.
    return QFormat(bits, bits - 2 - math.ceil(math.log2(largest)) if largest > 0 else bits - 1)


def calibrate(model: torch.nn.Module, batches, bits: int = 16) -> dict[str, dict[str, QFormat]]:
    """Signal formats of every layer from data: layer name -> {input, pre, sigmoid, tanh, cell, hidden -> QFormat}.

    batches: iterable of the model's arguments, each a tuple, one tensor or one packed sequence. Ranges of input,
    pre-activations and cell are the largest magnitudes seen, plus one bit of headroom; pre-activations need no range
    beyond the tables' 8.
    The model runs in evaluation mode and is left as it was. No batch and values that are not finite raise ValueError.
    """
    check_supported(model)
    ranges = {name: {"input": 0.0, "pre": 0.0, "cell": 0.0} for name in rnns(model)}
    hooks = [rnn.register_forward_pre_hook(lambda rnn, args, kwargs, name=name: _record(rnn, args, kwargs, ranges[name]),
                                           with_kwargs=True)
             for name, rnn in rnns(model).items()]
    training, seen = {module: module.training for module in model.modules()}, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                several = isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence)
                model(*batch) if several else model(batch)
                seen += 1
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if not seen:
        raise ValueError("calibrate needs at least one batch, got none")
    return {layer_name(name): {
        "input": _range_format(largest["input"], bits),
        "pre": _range_format(min(largest["pre"], 4.0), bits),
        "sigmoid": QFormat(bits, bits, signed=False),  # outputs lie in (0, 1): no sign bit, no integer bit
        "tanh": QFormat(bits, bits - 1),
        "cell": _range_format(largest["cell"], bits),
        "hidden": QFormat(bits, bits - 1),
    } for name, largest in ranges.items()}


def layer_name(rnn: str) -> str:
    """Name of the (first) layer of a recurrent module: "lstm" -> "lstm.l0"."""
    return f"{rnn}.l0" if rnn else "l0"


def _record(lstm, args, kwargs, largest):
    arguments = dict(zip(("input", "hx"), args, strict=False)) | kwargs  # the names of nn.LSTM.forward
    x, state, lengths = arguments["input"], arguments.get("hx"), None
    if isinstance(x, PackedSequence):
        x, lengths = pad_packed_sequence(x)
    elif x.ndim == 2:
        x, state = x.unsqueeze(1), state and tuple(s.unsqueeze(1) for s in state)
    elif lstm.batch_first:
        x = x.transpose(0, 1)  # (T, B, input_size)
    h, c = [x.new_zeros(x.shape[1], lstm.hidden_size)] * 2 if state is None else (s[0] for s in state)
    bias = lstm.bias_ih_l0 + lstm.bias_hh_l0 if lstm.bias else x.new_zeros(4 * lstm.hidden_size)
    from_input = x @ lstm.weight_ih_l0.T + bias  # (T, B, 4 * hidden_size)
    w_hh = lstm.weight_hh_l0.T
    _widen(largest, "input", x)
    _widen(largest, "cell", c)
    for t, step in enumerate(from_input):
        pre = step + h @ w_hh
        i, f, g, o = pre.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        alive = slice(None) if lengths is None else t < lengths  # a packed sequence has no steps beyond its own
        _widen(largest, "pre", pre[alive])
        _widen(largest, "cell", c[alive])


def _widen(largest, name, values):
    value = values.abs().max().item()
    if not math.isfinite(value):
        raise ValueError(f"calibrate needs finite values, got {value} in {name}")
    largest[name] = max(largest[name], value)
