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

    Candidates: the finest format that saturates nothing, and three finer ones that clip the largest values; none is
    finer than MAX_WEIGHT_FRAC, because the bias is stored in 32 bits at the fraction bits of the products.
    """
    values = w.detach().double()
    values = values[values != 0].cpu().numpy()
    if values.size == 0:
        return QFormat(bits, min(bits - 1, MAX_WEIGHT_FRAC))
    first = bits - 1 - math.ceil(math.log2(abs(values).max()))
    candidates = [QFormat(bits, min(frac, MAX_WEIGHT_FRAC)) for frac in range(first, first + 4)]
    return min(candidates, key=lambda fmt: float(((fmt.dequantise(fmt.quantise(values)) - values) ** 2).sum()))


def _range_format(largest: float, bits: int) -> QFormat:
    # One bit of headroom over the calibrated range: unseen data may go beyond it, and saturation is costlier than half a bit.
    return QFormat(bits, bits - 2 - math.ceil(math.log2(largest)) if largest > 0 else bits - 1)


def calibrate(model: torch.nn.Module, batches, bits: int = 16) -> dict[str, dict[str, QFormat]]:
    """Signal formats of every layer from data: layer name -> {input, pre, sigmoid, tanh, cell, hidden -> QFormat}.

    batches: iterable of the model's arguments, each a tuple or one tensor. Ranges of input, pre-activations and cell
    are the largest magnitudes seen, plus one bit of headroom; pre-activations need no range beyond the tables' 8.
    """
    check_supported(model)
    ranges = {name: {"input": 0.0, "pre": 0.0, "cell": 0.0} for name in rnns(model)}
    hooks = [rnn.register_forward_pre_hook(lambda rnn, args, name=name: _record(rnn, args, ranges[name]))
             for name, rnn in rnns(model).items()]
    training, seen = model.training, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
                seen += 1
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
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


def _record(lstm, args, largest):
    x, *state = args
    if isinstance(x, PackedSequence):
        x, _ = pad_packed_sequence(x, batch_first=lstm.batch_first)
    if lstm.batch_first:
        x = x.transpose(0, 1)  # (T, B, input_size)
    batch = x.shape[1]
    h, c = (s[0] for s in state[0]) if state and state[0] is not None else [x.new_zeros(batch, lstm.hidden_size)] * 2
    bias = lstm.bias_ih_l0 + lstm.bias_hh_l0 if lstm.bias else x.new_zeros(4 * lstm.hidden_size)
    from_input = x @ lstm.weight_ih_l0.T + bias  # (T, B, 4 * hidden_size)
    w_hh = lstm.weight_hh_l0.T
    for step in from_input:
        pre = step + h @ w_hh
        i, f, g, o = pre.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        largest["pre"] = max(largest["pre"], pre.abs().max().item())
        largest["cell"] = max(largest["cell"], c.abs().max().item())
    largest["input"] = max(largest["input"], x.abs().max().item())
