"""Number formats from data: for weights by least squared error, for the signals of a layer by calibration."""

import inspect
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from workbench.checks import check_whole
from workbench.fixedpoint import QFormat
from workbench.gates import Layer, cell_name, evaluating, layers, layers_of, own_calls_only, rnns
from workbench.packed import SIGNALS, PackedLayer, signals_of

# Finest weight and finest signal: with a 16-bit hidden state (15 fraction bits) the 32-bit bias then still reaches 4.
MAX_WEIGHT_FRAC = 14
MAX_SIGNAL_FRAC = 15
MAX_PRODUCT_FRAC = MAX_WEIGHT_FRAC + MAX_SIGNAL_FRAC
CLIPPINGS = ("max", "percentile", "mse")
PERCENTILE = 99.9  # of the magnitudes, where the rule is "percentile"
BINS_PER_OCTAVE = 16  # of the histogram of magnitudes
MOST_BINNED = 1 << 20  # values of one signal and batch that go into its histogram
MOST_OCTAVES = 64  # magnitudes from 2**-64 to 2**64 are told apart
BINS = 2 * MOST_OCTAVES * BINS_PER_OCTAVE + 1
TABLE_RANGE = 8.0  # magnitudes of pre-activations beyond it make no difference: there the linear table ends


def weight_format(w: torch.Tensor, bits: int, factors: int = 1) -> QFormat:
    """The signed format of that width with the least squared error over the non-zero entries of w, the values to store.

    Candidates: the finest format that holds the power of two at or above the largest magnitude, and four finer ones
    (of equal ones the finest is taken); none is finer than MAX_WEIGHT_FRAC, because the bias is stored in 32 bits at the
    fraction bits of the products. factors: stored values that make up a weight as their product, whose fraction bits count.
    """
    QFormat(bits, 0)  # refuses what is no width
    finest = MAX_WEIGHT_FRAC // factors
    values = w.detach().double()
    values = values[values != 0].cpu().numpy()
    if values.size == 0:
        return QFormat(bits, min(bits - 1, finest))
    first = bits - 2 - math.ceil(math.log2(abs(values).max()))
    candidates = [QFormat(bits, min(frac, finest)) for frac in range(first + 4, first - 1, -1)]
    return min(candidates, key=lambda fmt: float(((fmt.dequantise(fmt.quantise(values)) - values) ** 2).sum()))


class _Magnitudes:
    """How large the values of a signal are, zeros apart: the largest magnitude, and a histogram of bins of equal ratio.

    counts, sums: (2, BINS), how many magnitudes a bin has and what they add up to; positive values first, then negative ones,
    because a format reaches one step further there.
    """

    def __init__(self):
        self.largest, self.values = 0.0, 0  # values: those that the histogram stands for, zeros with them
        self.counts, self.sums = np.zeros((2, BINS), dtype=np.int64), np.zeros((2, BINS))

    def add(self, values: torch.Tensor, binned: bool = True) -> None:
        """values: (..., width). Where one is not finite the largest is infinite. binned: whether the histogram is wanted; the
        rule "max" takes the largest alone."""
        width, seen, values = values.shape[-1], values.numel(), values.detach().reshape(-1)
        if not seen:
            return
        ends = (end.item() for end in torch.aminmax(values))  # of all, while the histogram may be a sample
        self.largest = max(self.largest, *(math.inf if math.isnan(end) else abs(end) for end in ends))
        if not binned or self.largest == math.inf:
            return
        if values.count_nonzero() < seen:  # a selection takes much longer than a count
            values = values[values != 0]
        if not values.numel():
            self.values += seen
            return
        step = math.ceil(values.numel() / MOST_BINNED)
        while math.gcd(step, width) > 1:  # it would leave units out
            step += 1
        sample = values[::step].double()
        self.values += seen * sample.numel() / values.numel()
        values, magnitudes = sample, sample.abs()
        octave = magnitudes.log2().clamp(-MOST_OCTAVES, MOST_OCTAVES)
        bins = ((octave + MOST_OCTAVES) * BINS_PER_OCTAVE).long() + BINS * (values < 0)
        self.counts += torch.bincount(bins, minlength=2 * BINS).view(2, BINS).cpu().numpy()
        self.sums += torch.bincount(bins, magnitudes, minlength=2 * BINS).view(2, BINS).cpu().numpy()

    def share_beyond(self, fmt: QFormat) -> float:
        """Share of the values that lie beyond the ends of a format, as far as the bins tell."""
        ends = fmt.dequantise([[fmt.max], [-fmt.min]])
        return float(self.counts[self.sums / np.maximum(self.counts, 1) > ends].sum() / max(self.values, 1))

    def format(self, bits: int, clip: str, signed: bool, finest: int, most: float) -> QFormat:
        """The format of that width, with at most `finest` fraction bits, that the rule chooses; magnitudes above `most` count
        as `most`, and "max" keeps its headroom below it."""
        integer = bits - signed  # bits that the magnitude has

        def with_frac(frac):
            return QFormat(bits, min(frac, finest), signed)

        if not self.largest:
            return with_frac(integer)
        if clip == "max":
            # One bit of headroom: unseen data may go beyond what was seen, and saturation costs more than half a bit.
            return with_frac(integer - 1 - math.ceil(math.log2(min(self.largest, most / 2))))
        if clip == "percentile":
            counts = self.counts.sum(0)
            seen = np.searchsorted(counts.cumsum(), counts.sum() * PERCENTILE / 100)
            return with_frac(integer - math.ceil(math.log2(min(self.sums.sum(0)[seen] / counts[seen], most))))
        means = np.minimum(self.sums / np.maximum(self.counts, 1), most)
        whole = integer - math.ceil(math.log2(min(self.largest, most)))  # holds everything; the finer ones clip more and more
        candidates = [with_frac(frac) for frac in range(whole - 1, whole + bits + 1)]

        def squared_error(fmt):
            step, ends = fmt.dequantise(1), fmt.dequantise([[fmt.max], [-fmt.min]])
            # A bin below 8 steps is narrower than half a step and rounds as its mean does; wider ones lose the average.
            inside = np.where(means < 8 * step, ((means + step / 2) // step * step - means) ** 2, step**2 / 12)
            return float((self.counts * np.where(means > ends, (means - ends) ** 2, inside)).sum())

        return min(candidates, key=squared_error)


def calibrate(model: nn.Module, batches, bits: int | dict[str, int] = 16, clip: str = "max") -> dict[str, dict[str, QFormat]]:
    """Signal formats of every layer from data: layer name -> {signal -> QFormat}, the signals of packed.signals_of.

    batches: iterable of the model's arguments, each a tuple, one tensor or one packed sequence. bits, clip: see
    Observation.formats. The model runs in evaluation mode, and its weights and modes are left as they were; a state of its own
    that it carries from call to call goes on. No batch, a recurrent module that no batch calls or that gets no value and values
    that are not finite raise ValueError.
    """
    _check_clip(clip)
    _check_bits(bits)
    return _observe(model, batches, binned=clip != "max").formats(bits, clip)


def _check_clip(clip):
    if clip not in CLIPPINGS:
        raise ValueError(f"calibrate knows the clipping rules {', '.join(CLIPPINGS)}, got {clip!r}")


def _check_bits(bits):
    for name, width in bits.items() if isinstance(bits, dict) else [("every signal", bits)]:
        check_whole("calibrate", f"number of bits for {name}", width, 1, 32)


def observe(model: nn.Module, batches) -> "Observation":
    """How large every signal of every layer becomes on the batches: what calibrate chooses formats from, for any widths."""
    return _observe(model, batches, binned=True)


def _observe(model, batches, binned):
    seen, given, modules = defaultdict(_Magnitudes), Counter(), rnns(model)  # given: numbers of input values
    for path, call in recurrent_calls("calibrate", model, batches):
        given[path] += call[0].numel()
        for layer, signals, alive, first in float_signals(modules[path], *call, path=path):
            if not alive.all():  # a selection copies all that it leaves
                signals = {name: values[alive] for name, values in signals.items()}
            for name, values in (*signals.items(), *first.items()):
                magnitudes = seen[_group(layer, format_of(name))]
                magnitudes.add(values, binned)
                if magnitudes.largest == math.inf:
                    bad = values[~torch.isfinite(values)]
                    raise ValueError(f"calibrate needs finite values, got {bad[0].item()} in {name} of layer {layer.name}")
    check_called("calibrate", model, given)
    if empty := [repr(path) for path in modules if not given[path]]:
        raise ValueError(f"calibrate needs batches that hold values, got only empty ones for {', '.join(empty)}")
    cells = {layer: (cell_name(modules[layer.rnn]), bool(modules[layer.rnn].proj_size))
             for layer in layers(model).values()}
    return Observation(cells, seen)


@dataclass(frozen=True)
class Observation:
    """cells: layer -> (cell, whether it is projected); magnitudes: what shares a format -> how large it became."""

    cells: dict[Layer, tuple[str, bool]]
    magnitudes: dict[tuple, _Magnitudes]

    def formats(self, bits: int | dict[str, int] = 16, clip: str = "max") -> dict[str, dict[str, QFormat]]:
        """Layer name -> {signal -> QFormat}. bits: one width for all signals, or one for each.

        clip: how a range follows from the magnitudes seen, zeros apart: "max", the largest and one bit of headroom (gate
        outputs, tanh and the h of a layer without projection take the ranges that they have by definition unless a given
        state goes beyond); "percentile", what holds 99.9 % of them; "mse", the least squared error of clipping and rounding
        together. Pre-activations beyond 8, where the linear table ends, count as 8. Both directions of a layer share their
        hidden format, and the next layer takes it as its input format. However small the values, no format is so fine that
        for its sake a bias would not fit its 32 bits or a sum its accumulator. Values beyond every format raise ValueError.
        """
        _check_clip(clip)
        _check_bits(bits)
        formats = {}
        for layer, (cell, projected) in self.cells.items():
            names = signals_of(cell, projected)
            if isinstance(bits, dict) and (unknown := set(bits) - {s for cell in SIGNALS for s in signals_of(cell, True)}):
                raise ValueError(f"calibrate knows no signals {', '.join(sorted(unknown))}")
            if isinstance(bits, dict) and (missing := [name for name in names if name not in bits]):
                raise ValueError(f"calibrate needs bits for every signal of {layer.name}, got none for {', '.join(missing)}")
            widths = bits if isinstance(bits, dict) else dict.fromkeys(names, bits)
            mine = formats[layer.name] = {}
            for name in names:
                magnitudes = self.magnitudes[_group(layer, name)]
                try:
                    mine[name] = _signal_format(projected, name, widths, clip, magnitudes)
                except ValueError as error:
                    raise ValueError(f"{name} of layer {layer.name}, up to {magnitudes.largest:.4g}: {error}") from error
            if layer.index:  # nothing is rounded between layers
                mine["input"] = formats[Layer(layer.rnn, layer.index - 1, False).name]["hidden"]
        return formats

    def explain(self, formats: dict[str, dict[str, QFormat]]) -> list[dict]:
        """One row per layer and signal: format and range, beside the largest magnitude seen and the share beyond the range."""
        rows = []
        for layer in self.cells:
            for name, fmt in formats[layer.name].items():
                seen = self.magnitudes[_group(layer, name)]
                rows.append({"layer": layer.name, "signal": name, "bits": fmt.bits, "fraction bits": fmt.frac,
                             "signed": fmt.signed, "smallest": float(fmt.dequantise(fmt.min)),
                             "largest": float(fmt.dequantise(fmt.max)), "largest seen": seen.largest,
                             "beyond the range %": 100 * seen.share_beyond(fmt)})
        return rows


def _signal_format(projected, name, widths, clip, magnitudes) -> QFormat:
    bits, finest = widths[name], _finest(name, widths)
    if name == "sigmoid" and clip == "max":
        return QFormat(bits, bits, signed=False)  # outputs lie in (0, 1): no sign bit, no integer bit
    bounded = name in ("tanh", "unprojected") or (name == "hidden" and not projected)
    if clip == "max" and bounded and magnitudes.largest <= 1:
        return QFormat(bits, min(bits - 1, finest))  # within (-1, 1)
    most = TABLE_RANGE if name == "pre" else math.inf
    return magnitudes.format(bits, clip, signed=name != "sigmoid", finest=finest, most=most)


def _finest(name, widths) -> int:
    """Most fraction bits of a signal, however small its values."""
    return {
        "pre": MAX_PRODUCT_FRAC,  # rounded from sums of products
        "hidden_product": MAX_PRODUCT_FRAC - widths["sigmoid"],  # r * s joins such a sum
        "cell": PackedLayer.acc_bits - 2 - widths["sigmoid"],  # i * g reaches 1 in the accumulator of f*c + i*g
        "sigmoid": widths["sigmoid"],  # one more would cut off the gates near 1
        "tanh": max(MAX_SIGNAL_FRAC, widths.get("tanh", 0) - 1),  # no bias lies at its products
    }.get(name, MAX_SIGNAL_FRAC)


def _group(layer, signal):
    """What shares a format: both directions' hidden, which is also the next layer's input; everything else is alone."""
    if signal == "hidden":
        return layer.rnn, layer.index, "hidden"
    if signal == "input" and layer.index:
        return layer.rnn, layer.index - 1, "hidden"
    return layer.name, signal


def format_of(name: str) -> str:
    """The signal whose format a traced value has."""
    if name in ("i", "f", "o", "r", "z"):
        return "sigmoid"
    if name == "n":
        return "hidden"
    return "tanh" if name in ("g", "tanh c") else name


def check_called(who: str, model: nn.Module, called) -> None:
    """Refuse batches that left a recurrent module out. called: the paths of those of which recurrent_calls gave a call."""
    if silent := [repr(path) for path in rnns(model) if path not in called]:
        raise ValueError(f"{who} needs batches on which the model, in evaluation mode, calls every recurrent module (as "
                         f"module(x), not module.forward(x)), got no call of {', '.join(silent)}")


def recurrent_calls(who: str, model, batches) -> Iterator[tuple[str, tuple]]:
    """(module path, (x (T, B, input_size), state or None, lengths or None)) of every call of a recurrent module while the
    model, in evaluation mode, runs over the batches. ValueError where one is called that is none of the model's modules."""
    calls = []

    def hook(rnn, args, kwargs, path):
        arguments = dict(zip(("input", "hx"), args, strict=False)) | kwargs  # the names of nn.LSTM.forward
        calls.append((path, time_first(rnn, arguments["input"], arguments.get("hx"))))

    hooks = [rnn.register_forward_pre_hook(lambda rnn, args, kwargs, path=path: hook(rnn, args, kwargs, path), with_kwargs=True)
             for path, rnn in rnns(model).items()]
    try:
        with torch.no_grad(), evaluating(model):
            for arguments in batches_of_arguments(who, batches):
                try:
                    with own_calls_only(model):
                        model(*arguments)
                except TypeError as error:
                    _check_arguments(who, model, arguments, error)
                    raise
                yield from calls
                calls.clear()
    finally:
        for handle in hooks:
            handle.remove()


def batches_of_arguments(who: str, batches) -> Iterator[tuple | list]:
    """The model's arguments of every batch, of which one argument may stand for itself. ValueError where there is no batch."""
    if isinstance(batches, (torch.Tensor, PackedSequence)):  # it would be read step by step
        raise ValueError(f"{who} needs several batches, each the model's arguments, got one {type(batches).__name__}: give it "
                         "in a list")
    try:
        batches = iter(batches)
    except TypeError as error:
        raise ValueError(f"{who} needs batches, each the model's arguments, got {batches!r}") from error
    seen = 0
    for batch in batches:
        yield batch if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence) else (batch,)
        seen += 1
    if not seen:
        raise ValueError(f"{who} needs at least one batch, got none: empty, or a generator used before")


def _check_arguments(who, model, arguments, error):
    """Say so where the arguments do not fit, rather than something within the model."""
    try:
        inspect.signature(model.forward).bind(*arguments)
    except TypeError:
        raise ValueError(f"{who} needs batches of the model's arguments, without targets, got one of {len(arguments)} for "
                         f"{type(model).__name__}.forward{inspect.signature(model.forward)}: {error}") from error


def time_first(rnn: nn.RNNBase, x, state):
    """Arguments of a recurrent module in any of torch's forms -> (x (T, B, input_size), state, lengths (B,) or None).
    ValueError where it is given no time step."""
    state = tuple(state) if isinstance(state, list) else state  # torch takes h and c in either
    if isinstance(x, PackedSequence):
        x, lengths = pad_packed_sequence(x)  # sorted back to the caller's order
        return x, state, lengths
    single = x.ndim == 2
    if not x.shape[not single and rnn.batch_first]:
        raise ValueError(f"a recurrent layer needs at least 1 time step, got an input of shape {tuple(x.shape)}")
    if single:
        if state is not None:
            state = tuple(s.unsqueeze(1) for s in state) if isinstance(state, tuple) else state.unsqueeze(1)
        return x.unsqueeze(1), state, None
    return x.transpose(0, 1) if rnn.batch_first else x, state, None


def cast(batch, dtype: torch.dtype):
    """The floats of a batch, a tensor or packed sequence or nested tuples or lists of them, in that dtype."""
    if isinstance(batch, (torch.Tensor, PackedSequence)):
        return batch.to(dtype) if batch.data.is_floating_point() else batch
    return tuple(cast(item, dtype) for item in batch) if isinstance(batch, (tuple, list)) else batch


def as_given(rnn, input, output, hx, lengths):
    """(output, state) of a recurrent module in the form of its input, the inverse of time_first. output: (T, B, ...)."""
    if isinstance(input, PackedSequence):
        order = torch.arange(len(lengths)) if input.sorted_indices is None else input.sorted_indices.cpu()
        packed = pack_padded_sequence(output[:, order.to(output.device)], lengths[order])
        return PackedSequence(packed.data, input.batch_sizes, input.sorted_indices, input.unsorted_indices), hx
    if input.ndim == 2:
        return output.squeeze(1), tuple(s.squeeze(1) for s in hx) if isinstance(hx, tuple) else hx.squeeze(1)
    return output.transpose(0, 1) if rnn.batch_first else output, hx


def quantised_states(layers, state) -> list:
    """torch's hx in integers: [], [h] or [h, c], each one array for each of the packed layers, in torch's order."""
    states = () if state is None else state if isinstance(state, tuple) else (state,)
    return [[layer.signals[name].quantise(s.cpu()) for layer, s in zip(layers, values, strict=True)]
            for name, values in zip(("hidden", "cell"), states, strict=False)]


def float_signals(rnn: nn.RNNBase, x, state=None, lengths=None, path: str = ""):
    """Every signal of a recurrent module in float, layer by layer, as torch computes them: (Layer, signals, alive, first).

    signals: name -> (T, B, width): input, pre (all gates that are rounded to it), the gates under their own names, tanh c,
    cell, unprojected, hidden, hidden_product, in the order in which the direction takes the steps. alive: (T, B) bool, steps
    that a sequence has; first: the states of this layer that were given. x: (T, B, input_size), state: as torch's hx,
    lengths: (B,).
    """
    steps, batch, _ = x.shape
    step = torch.arange(steps)[:, None]  # (T, B) below
    last = torch.full((batch,), steps) if lengths is None else lengths
    x, state = cast((x, state), next(rnn.parameters()).dtype)  # under autocast another module may have given them
    alive = (step < last).to(x.device)
    order, outputs = torch.where(step < last, last - 1 - step, step).to(x.device)[:, :, None], []
    with torch.no_grad():
        for number, layer in enumerate(layers_of(rnn, path)):
            if layer.index and not layer.reverse:
                x, outputs = torch.cat(outputs, -1), []
            states = () if state is None else state if isinstance(state, tuple) else (state,)
            first = {name: s[number] for name, s in zip(("hidden", "cell"), states, strict=False)}
            mine = torch.take_along_dim(x, order, 0) if layer.reverse else x
            signals = {"input": mine} | _layer_signals(rnn, layer.suffix, mine, first, alive)
            yield layer, signals, alive, first
            h = signals["hidden"] * alive[:, :, None]
            outputs.append(torch.take_along_dim(h, order, 0) if layer.reverse else h)


def _layer_signals(rnn, suffix, x, first, alive):
    def parameter(part):
        return getattr(rnn, f"{part}_{suffix}")

    w_ih, w_hh = parameter("weight_ih").T, parameter("weight_hh").T
    b_ih, b_hh = (parameter("bias_ih"), parameter("bias_hh")) if rnn.bias else (0, 0)
    lstm, found = isinstance(rnn, nn.LSTM), defaultdict(list)
    h = first.get("hidden", x.new_zeros(x.shape[1], rnn.proj_size or rnn.hidden_size))
    c = first.get("cell", x.new_zeros(x.shape[1], rnn.hidden_size))
    for t, from_input in enumerate(x @ w_ih + b_ih):
        from_hidden = h @ w_hh + b_hh
        if lstm:
            pre = from_input + from_hidden
            i, f, g, o = (gate.tanh() if n == 2 else gate.sigmoid() for n, gate in enumerate(pre.chunk(4, 1)))
            new_c = f * c + i * g
            tanh_c = new_c.tanh()
            m = new_h = o * tanh_c
            stored = {"pre": pre, "i": i, "f": f, "g": g, "o": o, "cell": new_c, "tanh c": tanh_c}
            if rnn.proj_size:
                stored["unprojected"], new_h = m, m @ parameter("weight_hr").T
            c = torch.where(alive[t][:, None], new_c, c)
        else:
            inputs, s = from_input.chunk(3, 1), from_hidden.chunk(3, 1)
            r, z = ((a + b).sigmoid() for a, b in zip(inputs[:2], s[:2], strict=True))
            pre_n = inputs[2] + r * s[2]
            n = pre_n.tanh()
            new_h = (1 - z) * n + z * h
            pre = torch.cat([inputs[0] + s[0], inputs[1] + s[1], pre_n], 1)
            stored = {"pre": pre, "r": r, "z": z, "hidden_product": s[2], "n": n}
        h = torch.where(alive[t][:, None], new_h, h)
        for name, values in (stored | {"hidden": new_h}).items():
            found[name].append(values)
    return {name: torch.stack(values) for name, values in found.items()}
