"""Where a packed model's error arises: every signal that the integer engine stores beside the same signal in float.

Pre-activations and tanh(c), which go into a table or a product at once, are not among them.
"""

import numpy as np
import pandas as pd
import torch

from workbench.constrain import check_packed
from workbench.engine import StackEngine
from workbench.gates import layers_of, rnns
from workbench.packed import PackedModel
from workbench.quantise import float_signals, format_of, quantised_states, recurrent_calls


def signal_errors(model: torch.nn.Module, packed: PackedModel, batches) -> pd.DataFrame:
    """Signal-to-quantisation-noise ratio of every stored signal at every time step, and how it uses its number format.

    model: in float, uncompressed or as it was packed: what the integers are compared with. batches: as calibrate takes them;
    every recurrent module gets its float inputs, so that errors of one module do not reach the next, while those of a layer
    reach the layers above it and the steps after it.

    One row per layer, signal and step (in the order in which the direction takes them): sqnr_db, 10 log10 of the mean square
    of the float signal over that of the difference (inf without a difference); largest, the largest float magnitude; format;
    low, high: the range of the format; saturated: share of the integers that lie at an end of the range.
    """
    check_packed("signal_errors", model, packed)
    sums = {}
    engines = {path: StackEngine(packed.stack(path)) for path in packed.paths}
    for path, (x, state, lengths) in recurrent_calls("signal_errors", model, batches):
        rnn, found = rnns(model)[path], {}
        flat = [packed.layers[layer.name] for layer in layers_of(rnn, path)]
        inputs, ends = flat[0].signals["input"].quantise(x.cpu()), None if lengths is None else lengths.numpy()
        engines[path].run(inputs, *quantised_states(flat, state), lengths=ends,
                          trace=lambda place, step, name, values, found=found: found.__setitem__((place, step, name), values))
        for place, (layer, signals, alive, _) in enumerate(float_signals(rnn, x, state, lengths, path)):
            for (_, step, name), values in ((key, v) for key, v in found.items() if key[0] == place):
                fmt, mask = flat[place].signals[format_of(name)], alive[step].cpu().numpy()
                exact = signals[name][step].double().cpu().numpy()[mask]
                _add(sums.setdefault((layer.name, name, step, fmt), np.zeros(5)), exact, values[mask], fmt)
    return pd.DataFrame([_row(*key, *values) for key, values in sums.items()])


def _add(total, exact, values, fmt):
    ends = (values == fmt.min) | (values == fmt.max)
    if not fmt.signed:  # 0 is where an unsigned signal may well be
        ends = values == fmt.max
    largest = max(total[2], np.abs(exact).max(initial=0.0))
    total += (exact**2).sum(), ((fmt.dequantise(values) - exact) ** 2).sum(), 0, ends.sum(), exact.size
    total[2] = largest


def _row(layer, signal, step, fmt, power, noise, largest, saturated, count):
    with np.errstate(divide="ignore", invalid="ignore"):
        sqnr_db = 10 * np.log10(np.divide(power, noise)) if noise else np.inf
    return {"layer": layer, "signal": signal, "step": step, "sqnr_db": sqnr_db, "largest": largest,
            "format": f"{'' if fmt.signed else 'u'}{fmt.bits}.{fmt.frac}", "low": float(fmt.dequantise(fmt.min)),
            "high": float(fmt.dequantise(fmt.max)), "saturated": saturated / count if count else 0.0}
