"""Integer-only inference of packed layers: bit for bit what the hardware computes.

Every rounding is defined in gate_values, cell_update, project, hidden_product, candidate and gru_update, which the array's
execution shares; the fast path on floats is tested against them.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import numpy as np

from workbench.fixedpoint import exact_float, largest_row_sum, requantise
from workbench.packed import PARTS, PackedLayer


def gate_values(layer: PackedLayer, gate: str, acc) -> np.ndarray:
    """Exact aligned sums of one gate, bias included -> its values: one rounding to `pre`, then the table. Not a GRU's n.

    acc: (..., hidden_size) int64 at layer.alignment(gate)[0] fraction bits.
    """
    pre = requantise(acc, layer.alignment(gate)[0], layer.signals["pre"])
    function = "tanh" if gate == "g" else "sigmoid"
    return layer.tables[function].lookup(pre, layer.signals["pre"], layer.signals[function])


def cell_update(layer: PackedLayer, i, f, g, o, c) -> tuple[np.ndarray, np.ndarray]:
    """c' = f*c + i*g exactly, one rounding; o * tanh(stored c'), one rounding: to h, or with a projection to what it takes.
    Returns (o * tanh(c'), c'), each (..., hidden_size)."""
    s = layer.signals
    kept, new = s["sigmoid"].frac + s["cell"].frac, s["sigmoid"].frac + s["tanh"].frac
    frac = max(kept, new)
    c = requantise(((f * c) << (frac - kept)) + ((i * g) << (frac - new)), frac, s["cell"])
    tanh_c = layer.tables["tanh"].lookup(c, s["cell"], s["tanh"])
    return requantise(o * tanh_c, s["sigmoid"].frac + s["tanh"].frac, s["unprojected" if layer.projected else "hidden"]), c


def project(layer: PackedLayer, acc) -> np.ndarray:
    """Exact sums W_hr (o * tanh(c')) -> h, one rounding. acc: (..., output_size) at product_frac("hr", "p") fraction bits."""
    return requantise(acc, layer.product_frac("hr", "p"), layer.signals["hidden"])


def hidden_product(layer: PackedLayer, acc) -> np.ndarray:
    """Exact sums W_hn h + b_hn of a GRU -> one rounding. acc: (..., hidden_size) at product_frac("hh", "n") fraction bits."""
    return requantise(acc, layer.product_frac("hh", "n"), layer.signals["hidden_product"])


def candidate(layer: PackedLayer, r, s, acc) -> np.ndarray:
    """n of a GRU: r * s joins the exact aligned sum W_in x + b_in, one rounding to `pre`, then tanh in the hidden format.

    r, s: gate and rounded hidden product; acc: (..., hidden_size) at alignment("n")[0] fraction bits.
    """
    frac, _, shift = layer.alignment("n")
    pre = requantise(acc + ((r * s) << shift), frac, layer.signals["pre"])
    return layer.tables["tanh"].lookup(pre, layer.signals["pre"], layer.signals["hidden"])


def gru_update(layer: PackedLayer, z, n, h) -> np.ndarray:
    """h' = (1 - z) * n + z * h exactly, one rounding; n and h share the hidden format."""
    s = layer.signals
    return requantise((layer.one - z) * n + z * h, s["sigmoid"].frac + s["hidden"].frac, s["hidden"])


def sent_again(values, sent, threshold: int) -> np.ndarray:
    """What has been sent of a signal after a step: elements that moved by more than the threshold since they were last sent are
    sent again. values, sent: integers of one format; nothing (0) is sent before the first step."""
    return np.where(np.abs(values - sent) > threshold, values, sent)


def sent_steps(x, threshold: int) -> np.ndarray:
    """sent_again over all steps of x (T, ...)."""
    sent, steps = np.zeros(x.shape[1:], x.dtype), np.empty_like(x)
    for t, values in enumerate(x):
        steps[t] = sent = sent_again(values, sent, threshold)
    return steps


def sender(layer, name, shape, dtype):
    """A function (a signal's values in a step) -> what weights multiply: the values, or with a delta threshold what has been
    sent of them. Hardware adds W times what changed to sums that it keeps; being exact, they are W times what was sent."""
    if name not in layer.delta:
        return lambda values: values
    sent, threshold = np.zeros(shape, dtype), layer.delta[name]

    def send(values):
        nonlocal sent
        sent = sent_again(values, sent, threshold)
        return sent

    return send


@dataclass(frozen=True)
class LayerResult:
    output: np.ndarray  # (T, B, output_size) int64 in the hidden format
    h: np.ndarray  # (B, output_size) int64
    c: np.ndarray | None  # (B, hidden_size) int64 in the cell format; None for a GRU


def _integers(name, values, shape, fmt):
    values = np.asarray(values)
    # A letter in the expected shape stands for any size.
    if values.ndim != len(shape) or any(isinstance(n, int) and n != m for n, m in zip(shape, values.shape, strict=True)):
        raise ValueError(f"the engine needs {name} of shape ({', '.join(map(str, shape))}), got {values.shape}")
    if values.dtype.kind not in "iu":
        raise ValueError(f"the engine needs integers as {name}, got {values.dtype}")
    if values.size and (values.min() < fmt.min or values.max() > fmt.max):
        raise ValueError(f"the engine needs {name} in {fmt}, got {values.min()} to {values.max()}")
    return values.astype(np.int64, copy=False)


def _checked_lengths(lengths, steps, batch):
    lengths = np.asarray(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"the engine needs lengths of shape ({batch},), got {lengths.shape}")
    if lengths.dtype.kind not in "iu":
        raise ValueError(f"the engine needs integers as lengths, got {lengths.dtype}")
    if batch and (lengths.min() < 0 or lengths.max() > steps):
        raise ValueError(f"the engine needs lengths from 0 to the {steps} steps of x, got {lengths.min()} to {lengths.max()}")
    return lengths.astype(np.int64, copy=False)


class _Integers:
    """The steps of a layer in int64, by the functions above: the definition."""

    dtype = np.int64

    def __init__(self, layer: PackedLayer, trace=None):
        self.layer, self.trace = layer, trace
        self.products = {(part, gate): layer.block(part, gate).multiplication(layer.signals[PARTS[part]].magnitude)
                         for part, gate in layer.products}

    def from_input(self, x):
        """(T, B, input_size) -> for each step gate -> (B, hidden_size), its aligned sums of input and bias."""
        layer = self.layer
        sums = {gate: (self.products["ih", gate](x) << layer.alignment(gate)[1]) + layer.bias[gate] for gate in layer.gates}
        return [{gate: values[t] for gate, values in sums.items()} for t in range(len(x))]

    def stepper(self, h, c):
        """A function (what from_input gives for a step, array for the new h) -> the new c."""
        layer, products, steps = self.layer, self.products, itertools.count()
        send_h = sender(layer, "hidden", h.shape, h.dtype)
        send_m = sender(layer, "unprojected", c.shape, c.dtype) if layer.projected else None

        def gate(name, from_input, sent):
            return gate_values(layer, name, from_input[name] + (products["hh", name](sent) << layer.alignment(name)[2]))

        def lstm(from_input, sent):
            gates = {name: gate(name, from_input, sent) for name in layer.gates}
            new_h, new_c = cell_update(layer, *gates.values(), c)
            if not layer.projected:
                return gates | {"cell": new_c, "hidden": new_h}
            return gates | {"cell": new_c, "unprojected": new_h, "hidden": project(layer, products["hr", "p"](send_m(new_h)))}

        def gru(from_input, sent):
            r, z = gate("r", from_input, sent), gate("z", from_input, sent)
            s = hidden_product(layer, products["hh", "n"](sent) + layer.bias["hn"])
            n = candidate(layer, r, s, from_input["n"])
            return {"r": r, "z": z, "hidden_product": s, "n": n, "hidden": gru_update(layer, z, n, h)}

        def step(from_input, out):
            nonlocal h, c
            signals = (lstm if layer.cell == "LSTM" else gru)(from_input, send_h(h))
            out[...] = h = signals["hidden"]
            c = signals.get("cell")
            t = next(steps)
            for name, values in signals.items() if self.trace else ():
                self.trace(t, name, values)
            return c

        return step


# Weights of all gates that _Floats multiplies at once. Measured with 128 to 1024 units: up to 128 in float32, calls take longer
# than what they compute; beyond, a product a gate takes up to a quarter less.
SIDE_BY_SIDE_BYTES = 3 << 17
MAX_LISTED_BITS = 16  # of the formats to which _Floats rounds: it lists what stands at every code


def _float_types(layer: PackedLayer) -> dict[str, type] | None:
    """The smallest float types in which _Floats computes this layer exactly, or None: of the products of each part, of the
    `sums` of a gate, of the `cell`.

    All numbers there are integers times powers of two, and powers of two scale a float without rounding it. So a type is exact
    for a sum, in any order, as long as the largest integer that may occur fits its mantissa.
    """
    if layer.spectral_blocks:  # they round inside their products
        return None
    s, bounds = layer.signals, layer.row_bounds()
    one, hidden = s["sigmoid"].frac, s["hidden"]
    inner = s["unprojected"] if layer.projected else hidden
    # What is rounded: (largest |integer|, its fraction bits, the format that takes it).
    sums = [(bounds[gate], layer.alignment(gate)[0], s["pre"]) for gate in layer.gates]
    if layer.cell == "LSTM":
        frac = max(s["cell"].frac, s["tanh"].frac)
        terms = sum(s[name].magnitude << (frac - s[name].frac) for name in ("cell", "tanh"))
        cell = [(s["sigmoid"].magnitude * terms, one + frac, s["cell"]),
                (s["sigmoid"].magnitude * s["tanh"].magnitude, one + s["tanh"].frac, inner)]
    else:
        sums.append((bounds["hn"], layer.product_frac("hh", "n"), s["hidden_product"]))
        # n + z * (h - n): h - n may be twice as large as h.
        cell = [sums[2], ((2 * s["sigmoid"].magnitude + layer.one) * hidden.magnitude, one + hidden.frac, hidden)]
    if layer.projected:
        sums.append((bounds["p"], layer.product_frac("hr", "p"), hidden))
    types = {"sums": _type_for(sums), "cell": _type_for(cell)}
    for part in {part for part, _ in layer.products}:
        rows = max(largest_row_sum(layer.block(p, gate).dense()) for p, gate in layer.products if p == part)
        types[part] = exact_float(rows * s[PARTS[part]].magnitude)
    return None if None in types.values() else types


def _type_for(rounded):
    largest = 0
    for bound, frac, fmt in rounded:
        shift = frac - fmt.frac
        if fmt.bits > MAX_LISTED_BITS or abs(shift) > 60:  # beyond 60 bits float32 could leave its exponents
            return None
        # With the offset of the rounding (_offset) added, in units of the finer of the sum's last place and 1/2.
        fine = max(shift, 1)
        total = (bound << (fine - shift)) + ((1 - 2 * fmt.min) << (fine - 1))
        if total >> fine >= 1 << 62:  # it becomes an index
            return None
        largest = max(largest, total)
    return exact_float(largest)


def _offset(fmt):
    """What _Floats adds to a sum in units of fmt's last place. Truncated, the result is the half-up code of the sum, counted
    from fmt.min: it is positive wherever the sum does not saturate, so that truncating is rounding down. A negative index and
    one beyond the last code saturate in `take`."""
    return 0.5 - fmt.min


class _Floats:
    """The same steps on preallocated float arrays of exact numbers; types: what _float_types gives.

    A sum comes in units of the last place of the format that takes it (the weights hold the scale) and becomes the index of a
    list, which holds for each code what is multiplied next: the value of a table or the code itself. Sums are brought into the
    order (gates, B, hidden_size), the sigmoids side by side, so that what follows runs through contiguous memory.
    """

    def __init__(self, layer: PackedLayer, types):
        self.layer, self.types, self.dtype = layer, types, types["hh"]
        s, lstm = layer.signals, layer.cell == "LSTM"
        pre, hidden, inner = s["pre"], s["hidden"], s["unprojected" if layer.projected else "hidden"]
        self.order = "fiog" if lstm else "rzn"  # f and i lie as the c and g that they multiply
        taken = dict.fromkeys(self.order, pre)  # gate -> the format that takes its sum
        self.weights = {"ih": self._matrix("ih", taken),
                        "hh": self._matrix("hh", taken if lstm else taken | {"n": s["hidden_product"]})}
        self.bias = np.stack([self._bias(gate, pre) for gate in self.order])  # (gates, hidden_size)
        self.lists = {"sigmoid": self._table("sigmoid", pre, s["sigmoid"], 0), "hidden": _codes(hidden, types["hh"])}
        if lstm:
            self.lists |= {"tanh": self._table("tanh", pre, s["tanh"], s["cell"].frac),
                           "cell": _codes(s["cell"], types["cell"]),
                           "tanh_cell": self._table("tanh", s["cell"], s["tanh"], inner.frac)}
        else:
            product = s["hidden_product"]
            self.hidden_bias = self._bias("hn", product)  # (hidden_size,)
            self.lists |= {"tanh": self._table("tanh", pre, hidden, hidden.frac),
                           "hidden_product": _codes(product, types["cell"]) * 2.0 ** (pre.frac - product.frac)}
        if layer.projected:
            self.weights["hr"] = self._matrix("hr", {"p": hidden})
            self.lists["unprojected"] = _codes(inner, types["hr"])

    def _matrix(self, part, taken):
        """The blocks, their products in units of the formats that take them: (gates, inputs, rows), as BLAS is faster at one
        product a gate; small ones side by side, (inputs, gates * rows), as there a call costs more."""
        rows, inputs = self.layer.block(part, next(iter(taken))).shape
        matrix = np.empty((len(taken), inputs, rows), dtype=self.types[part])
        for n, (gate, fmt) in enumerate(taken.items()):
            scale = 2.0 ** (fmt.frac - self.layer.product_frac(part, gate))
            np.multiply(self.layer.block(part, gate).dense().T, scale, out=matrix[n])
        return matrix if matrix.nbytes > SIDE_BY_SIDE_BYTES else matrix.swapaxes(0, 1).reshape(inputs, -1)

    def _bias(self, name, fmt):
        scaled = np.ldexp(self.layer.bias[name], fmt.frac - self.layer.bias_fracs[name])
        return (scaled + _offset(fmt)).astype(self.types["sums"])

    def _table(self, function, in_fmt, out_fmt, frac):
        """What the table gives for every code of in_fmt, in units of 2**-frac."""
        values = self.layer.tables[function].lookup(np.arange(in_fmt.min, in_fmt.max + 1), in_fmt, out_fmt)
        return np.ldexp(values, frac - out_fmt.frac).astype(self.types["cell"])

    def from_input(self, x):
        """(T, B, input_size) -> (T, gates, B, hidden_size): what input and bias add to each sum, the offset included."""
        steps, batch, inputs = x.shape
        products = x.reshape(steps * batch, inputs).astype(self.types["ih"]) @ self.weights["ih"]
        sums = self._by_gate(products.astype(self.types["sums"], copy=False))  # (gates, T * B, hidden_size)
        sums += self.bias[:, None]
        return sums.reshape(len(sums), steps, batch, self.layer.hidden_size).swapaxes(0, 1)

    def _by_gate(self, products):
        """What a matrix of _matrix gives, as (gates, ..., hidden_size), without a copy."""
        if products.ndim == 3:
            return products
        return products.reshape(len(products), len(self.order), self.layer.hidden_size).swapaxes(0, 1)

    def _recurrent(self):
        """W_hh, and what multiplies by it: np.matmul takes every shape, np.dot half a microsecond less."""
        hh = self.weights["hh"]
        return hh, np.matmul if hh.ndim == 3 else np.dot

    def stepper(self, h, c):
        """A function (what from_input gives for a step, array for the new h) -> the new c.

        A rounding is three moves there: add the offset (and what else is missing) to the sums, cast them to indices, take from
        a list in the mode "clip".
        """
        batch, size, gates = len(h), self.layer.hidden_size, len(self.order)
        products = np.empty((*self.weights["hh"].shape[:-2], batch, self.weights["hh"].shape[-1]), self.dtype)
        sums, index = (np.empty((gates, batch, size), dtype) for dtype in (self.types["sums"], np.intp))
        cell = self._lstm if self.layer.cell == "LSTM" else self._gru
        return cell(h.astype(self.dtype), c, products, self._by_gate(products), sums, index)

    def _lstm(self, h, c, recurrent, by_gate, sums, index):
        hh, product = self._recurrent()
        types, weights, signals, projected = self.types, self.weights, self.layer.signals, self.layer.projected
        take = {name: values.take for name, values in self.lists.items()}
        sigmoid, tanh, cells, tanh_cell, hidden = (take[name] for name in ("sigmoid", "tanh", "cell", "tanh_cell", "hidden"))
        fio, state, terms = (np.empty((n, *c.shape), types["cell"]) for n in (3, 2, 2))
        fi, o, (cell, g), (kept, new) = fio[:2], fio[2], state, terms
        fio_index, g_index, code = index[:3], index[3], np.empty(c.shape, np.intp)
        total, tanh_c = (np.empty(c.shape, types["cell"]) for _ in range(2))
        cell_offset, offset = (np.array(_offset(signals[name]), types["cell"])
                               for name in ("cell", "unprojected" if projected else "hidden"))
        cell[...] = c
        if projected:
            m, products = np.empty(c.shape, types["hr"]), np.empty(h.shape, types["hr"])
            projection = weights["hr"].reshape(c.shape[1], -1)
            h_sums, h_code = np.empty(h.shape, types["sums"]), np.empty(h.shape, np.intp)
            h_offset = np.array(_offset(signals["hidden"]), types["sums"])
            send_m = sender(self.layer, "unprojected", c.shape, types["hr"])
        send_h = sender(self.layer, "hidden", h.shape, self.dtype)
        add, multiply = np.add, np.multiply  # looked up once: a step of a small layer takes 8 microseconds

        def step(from_input, out):
            nonlocal h
            product(send_h(h), hh, recurrent)
            add(by_gate, from_input, sums)
            index[...] = sums
            sigmoid(fio_index, None, fio, "clip")
            tanh(g_index, None, g, "clip")
            multiply(fi, state, terms)  # f * c and i * g
            add(kept, new, total)
            add(total, cell_offset, total)
            code[...] = total
            cells(code, None, cell, "clip")
            tanh_cell(code, None, tanh_c, "clip")
            multiply(o, tanh_c, total)
            add(total, offset, total)
            code[...] = total
            if projected:
                take["unprojected"](code, None, m, "clip")
                send_m(m).dot(projection, products)
                add(products, h_offset, h_sums)
                h_code[...] = h_sums
                hidden(h_code, None, out, "clip")
            else:
                hidden(code, None, out, "clip")
            h = out
            return cell

        return step

    def _gru(self, h, _, recurrent, by_gate, sums, index):
        hh, product = self._recurrent()
        types, hidden_bias = self.types, self.hidden_bias
        sigmoid, products, tanh, hidden = (
            self.lists[name].take for name in ("sigmoid", "hidden_product", "tanh", "hidden"))
        rz, rz_index, s_index, code = np.empty((2, *h.shape), types["cell"]), index[:2], index[2], np.empty(h.shape, np.intp)
        (r, z), (rz_products, s_products), (rz_sums, s_sums) = rz, (by_gate[:2], by_gate[2]), (sums[:2], sums[2])
        s, n, total = (np.empty(h.shape, types["cell"]) for _ in range(3))
        n_sums = np.empty(h.shape, np.promote_types(types["sums"], types["cell"]))
        offset = np.array(_offset(self.layer.signals["hidden"]), types["cell"])
        send_h = sender(self.layer, "hidden", h.shape, self.dtype)

        def step(from_input, out):
            nonlocal h
            product(send_h(h), hh, recurrent)
            np.add(rz_products, from_input[:2], rz_sums)
            np.add(s_products, hidden_bias, s_sums)
            index[...] = sums
            sigmoid(rz_index, None, rz, "clip")
            products(s_index, None, s, "clip")
            np.multiply(r, s, total)
            np.add(total, from_input[2], n_sums)
            code[...] = n_sums
            tanh(code, None, n, "clip")
            np.subtract(h, n, total)  # (1 - z) * n + z * h = n + z * (h - n)
            np.multiply(z, total, total)
            np.add(n, total, total)
            np.add(total, offset, total)
            code[...] = total
            hidden(code, None, out, "clip")
            h = out

        return step


def _codes(fmt, dtype):
    return np.arange(fmt.min, fmt.max + 1).astype(dtype)


CHUNK_VALUES = 1 << 18  # sums of the input that are held at a time


class LayerEngine:
    """Runs one packed layer: on floats where their arithmetic is provably exact, with the same results in int64 otherwise."""

    def __init__(self, layer: PackedLayer):
        self.layer = layer
        types = _float_types(layer)
        self.steps = _Floats(layer, types) if types else _Integers(layer)

    def run(self, x, h=None, c=None, lengths=None, trace=None) -> LayerResult:
        """x: (T, B, input_size) integers in the input format; h (B, output_size) and, for an LSTM, c (B, hidden_size) in
        their formats, zero by default; lengths: (B,), 0 to T, the steps after which each sequence keeps its state (output 0
        from there on). trace: called with (step, signal, integers) for every signal that a step stores, gates under their own
        names, padding included; such a run takes int64. Other shapes, floats and integers outside their format raise
        ValueError."""
        layer, steps = self.layer, _Integers(self.layer, trace) if trace else self.steps
        x = _integers("x", x, ("T", "B", layer.input_size), layer.signals["input"])
        x = sent_steps(x, layer.delta["input"]) if "input" in layer.delta else x
        length, batch, _ = x.shape
        h = np.zeros((batch, layer.output_size), dtype=np.int64) if h is None else h
        h = _integers("h", h, (batch, layer.output_size), layer.signals["hidden"])
        if layer.cell == "LSTM":
            c = np.zeros((batch, layer.hidden_size), dtype=np.int64) if c is None else c
            c = _integers("c", c, (batch, layer.hidden_size), layer.signals["cell"])
        elif c is not None:
            raise ValueError("the engine needs no c for a GRU, got one")
        lengths = np.full(batch, length) if lengths is None else _checked_lengths(lengths, length, batch)
        ends = {end: np.flatnonzero(lengths == end) for end in set(lengths.tolist())}
        output = np.zeros((length, batch, layer.output_size), dtype=np.int64)
        last_c = None if c is None else c.copy()
        step = steps.stepper(h, c)
        chunk = max(1, CHUNK_VALUES // max(1, batch * len(layer.gates) * layer.hidden_size))
        for start in range(0, length, chunk):
            piece = x[start : start + chunk]
            hidden = np.empty((len(piece), batch, layer.output_size), steps.dtype)
            for t, from_input, out in zip(itertools.count(start + 1), steps.from_input(piece), hidden, strict=False):
                new_c = step(from_input, out)
                if t in ends and c is not None:
                    last_c[ends[t]] = new_c[ends[t]]
            output[start : start + chunk] = hidden
        ran, last_h = np.flatnonzero(lengths), h.copy()
        last_h[ran] = output[lengths[ran] - 1, ran]
        output[np.arange(length)[:, None] >= lengths] = 0
        return LayerResult(output, last_h, last_c)


def run_layer(layer: PackedLayer, x, h=None, c=None, lengths=None) -> LayerResult:
    """One layer over a batch of integer sequences: LayerEngine.run, for a single call."""
    return LayerEngine(layer).run(x, h, c, lengths)


@dataclass(frozen=True)
class StackResult:
    output: np.ndarray  # (T, B, directions * output_size) int64 of the last layer
    h: np.ndarray  # (layers * directions, B, output_size) int64
    c: np.ndarray | None  # (layers * directions, B, hidden_size) int64; None for a GRU


class StackEngine:
    """Runs all layers and directions of one recurrent module, in torch's order. stack: as PackedModel.stack gives it."""

    def __init__(self, stack):
        self.engines = [tuple(map(LayerEngine, directions)) for directions in stack]

    def run(self, x, h=None, c=None, lengths=None, trace=None) -> StackResult:
        """x: (T, B, input_size); h, c: (layers * directions, B, ...) integers or None; lengths as LayerEngine.run. A reverse
        direction begins at the last step of each sequence. trace: as of LayerEngine.run, with the number of the layer and
        direction, in torch's order, in front."""
        count = sum(map(len, self.engines))
        for name, states in (("h", h), ("c", c)):
            if states is not None and len(states) != count:
                raise ValueError(f"the engine needs {name} for {count} layers and directions, got {len(states)}")
        results, x = [], np.asarray(x)
        for directions in self.engines:
            outputs = []
            for reverse, engine in enumerate(directions):
                place = len(results)
                states = (None if states is None else states[place] for states in (h, c))
                result = engine.run(reversed_steps(x, lengths) if reverse else x, *states, lengths,
                                    partial(trace, place) if trace else None)
                outputs.append(reversed_steps(result.output, lengths) if reverse else result.output)
                results.append(result)
            x = np.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]
        c = None if results[0].c is None else np.stack([result.c for result in results])
        return StackResult(x, np.stack([result.h for result in results]), c)


def reversed_steps(x, lengths):
    """(T, B, ...) with the steps of each sequence in reverse; steps beyond its length stay where they are."""
    if lengths is None:
        return x[::-1]
    step = np.arange(len(x))[:, None]  # (T, B) below
    order = np.where(step < np.asarray(lengths), np.asarray(lengths) - 1 - step, step)
    return np.take_along_axis(x, order[:, :, None], axis=0)
