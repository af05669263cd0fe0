"""Plan: which method and number format each block gets, and the formats of the signals. Plain data, JSON in and out."""

import contextlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short

import numpy as np
import torch

from workbench.fixedpoint import TABLES, QFormat
from workbench.gates import blocks, cell_name, layers, merged_bias, rnns, weight, weights
from workbench.methods import BlockCirculant, Dense, Method, check_method, method_from_json, method_label, method_to_json
from workbench.packed import PARTS, PackedCirculant, PackedDense, PackedLayer, PackedModel, signals_of, table_uses
from workbench.quantise import weight_format

ACTIVATIONS = tuple(TABLES)  # the kinds of activation table
LOSSLESS_BITS = 16  # width of blocks that are not compressed


@contextlib.contextmanager
def naming_block(name: str):
    """What is refused inside, with the name of the block that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"block {name}: {error}") from error


class Unpackable(ValueError):
    """A layer with sums, operands or biases that the arithmetic does not take."""


class _Zeros:
    """Of a block that stands for one of whatever values. The fraction bits of its sums may follow from those: here they are so
    few that no sum is moved up for their sake."""

    def sum_frac(self, signal):
        return -64  # the least of a QFormat


class _DenseZeros(_Zeros, PackedDense):
    pass


class _SpectralZeros(_Zeros, PackedCirculant):
    pass


def _zeros(name, shape, entry):
    """Stands for the block in the form in which the plan stores it, where the form has rules of its own for formats."""
    if not (isinstance(entry.method, BlockCirculant) and entry.method.datapath == "fft"):
        return _DenseZeros(np.zeros(shape, dtype=np.int64), entry.format)
    k = entry.method.block
    with naming_block(name):
        return _SpectralZeros(shape, entry.format, k, np.zeros((shape[0] // k, -(-shape[1] // k), k), dtype=np.int64),
                              entry.method.datapath)


@dataclass(frozen=True)
class BlockPlan:
    method: Method
    format: QFormat

    def __post_init__(self):
        check_method("BlockPlan", self.method)
        if not isinstance(self.format, QFormat):
            raise ValueError(f"BlockPlan needs the QFormat of its weights, got {self.format!r}")


@dataclass(frozen=True)
class Plan:
    """blocks: block name -> BlockPlan; signals: layer name -> {signal -> QFormat}; activation: table kind.

    delta: layer name -> {signal -> delta threshold}, in units of the signal's own values (`pack` turns it into integers): an
    element of what weights multiply, "input", "hidden" or "unprojected", is sent again only if it moved by more than this since
    it was last sent. What is not named is sent whole in every step.
    """

    blocks: dict[str, BlockPlan]
    signals: dict[str, dict[str, QFormat]]
    activation: str = "linear"
    delta: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Plan knows the activations {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not isinstance(self.blocks, dict) or not all(isinstance(entry, BlockPlan) for entry in self.blocks.values()):
            raise ValueError(f"Plan needs a BlockPlan for every block, got {short(self.blocks)}")
        signals = self.signals.values() if isinstance(self.signals, dict) else [None]
        if not all(isinstance(mine, dict) and all(isinstance(f, QFormat) for f in mine.values()) for mine in signals):
            raise ValueError(f"Plan needs the formats of every layer's signals, as calibrate gives them, got "
                             f"{short(self.signals)}")
        if not isinstance(self.delta, dict) or not all(isinstance(mine, dict) for mine in self.delta.values()):
            raise ValueError(f"Plan needs delta thresholds by layer and signal, got {self.delta!r}")
        for layer, mine in self.delta.items():
            for name, threshold in mine.items():
                number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
                if not number or not 0 <= threshold < math.inf:
                    raise ValueError(f"Plan needs a delta threshold of at least 0 for {name} of {layer}, got {threshold!r}")

    def check(self, model: torch.nn.Module) -> None:
        """Refuse a plan that does not fit the model (check_fit), or has formats that are Unpackable whatever the weights."""
        self.check_fit(model)
        self._check_formats(model)

    def check_fit(self, model: torch.nn.Module) -> None:
        """Refuse a plan that misses a block or layer of the model, names one it does not have, or does not fit a shape."""
        _check_names("block", self.blocks, blocks(model))
        self.check_signals(model)
        _check_names("layer", self.delta, layers(model), all_of_them=False)
        for name, thresholds in self.delta.items():
            multiplied = [signal for signal in PARTS.values() if signal in self.signals[name]]
            if unknown := set(thresholds) - set(multiplied):
                raise ValueError(f"Plan takes delta thresholds of {', '.join(multiplied)} of {name}, got "
                                 f"{', '.join(sorted(unknown))}")
        for name, w in weights(model).items():
            with naming_block(name):
                self.blocks[name].method.constrain(w, self.blocks[name].format)

    def check_signals(self, model: torch.nn.Module) -> None:
        """Refuse a plan that misses a layer of the model or a signal of one, or has formats of what the model has not."""
        _check_names("layer", self.signals, layers(model))
        for name, layer in layers(model).items():
            rnn, signals = rnns(model)[layer.rnn], self.signals[name]
            if set(signals) != set(expected := signals_of(cell_name(rnn), bool(rnn.proj_size))):
                raise ValueError(f"Plan needs the signals {', '.join(expected)} of {name}, got {', '.join(signals) or 'none'}")

    def _check_formats(self, model):
        # Packs a model that is all zero: what is refused then no training makes packable.
        packed = {}
        for name, layer in layers(model).items():
            zeros = {b.name: _zeros(b.name, b.shape, self.blocks[b.name]) for b in blocks(model).values() if b.layer == layer}
            bias = {gate: np.zeros(len(b)) for gate, b in merged_bias(rnns(model)[layer.rnn], layer.suffix).items()}
            packed[name] = self.pack_layer(model, name, zeros, bias)
        PackedModel(packed, 0, 0)

    def pack_layer(self, model: torch.nn.Module, name: str, packed_blocks: dict, bias: dict | None = None) -> PackedLayer:
        """The layer of that name. packed_blocks: block name -> its integers; bias: gate -> (hidden_size,) floats, by default
        the model's, merged in float64. Unpackable says which of them, or of the plan's formats, no integers take."""
        layer, signals = layers(model)[name], self.signals[name]
        rnn = rnns(model)[layer.rnn]
        cell = cell_name(rnn)
        if bias is None:
            bias = {gate: b.detach().cpu().numpy() for gate, b in merged_bias(rnn, layer.suffix, torch.float64).items()}
        try:
            tables = {function: TABLES[self.activation].build(function, uses)
                      for function, uses in table_uses(cell, signals).items()}
            return PackedLayer.from_float_bias(cell, packed_blocks, bias, signals, tables, delta=self.delta.get(name))
        except ValueError as error:
            raise Unpackable(f"layer {name}: {error}") from error

    def with_signals(self, signals) -> "Plan":
        return replace(self, signals=signals)

    def with_delta(self, **thresholds: float) -> "Plan":
        """The same delta thresholds for every layer, for example input=0.1, hidden=0.05; none: no delta."""
        return replace(self, delta={layer: dict(thresholds) for layer in self.signals} if thresholds else {})

    def to_json(self) -> dict:
        return {
            "blocks": {name: {"method": method_to_json(entry.method), "format": entry.format.to_json()}
                       for name, entry in self.blocks.items()},
            "signals": {layer: {name: fmt.to_json() for name, fmt in signals.items()}
                        for layer, signals in self.signals.items()},
            "activation": self.activation,
        } | ({"delta": self.delta} if self.delta else {})

    @classmethod
    def read(cls, source) -> "Plan":
        """A Plan, a dict, a JSON string or the path of a JSON file -> Plan."""
        if isinstance(source, Plan):
            return source
        if isinstance(source, (str, Path)):
            text = str(source)
            if not text.lstrip().startswith("{"):
                if not os.path.isfile(text):  # unlike Path.is_file, also for text too long for a path
                    raise ValueError(f"Plan.read needs a dict, a JSON object or the path of a file, got {text!r}")
                text = Path(text).read_text()
            try:
                source = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"Plan.read needs JSON, got text that is not: {error}") from error
        keys = {"blocks", "signals", "activation"}
        if not isinstance(source, dict) or set(source) - {"delta"} != keys:
            raise ValueError(f"a plan needs exactly the keys {', '.join(sorted(keys))} and, if any, delta, got {_keys(source)}")
        for key in ("blocks", "signals"):
            if not isinstance(source[key], dict):
                raise ValueError(f"a plan needs an object as {key}, got {source[key]!r}")
        planned, signals = {}, {}
        for name, entry in source["blocks"].items():
            if not isinstance(entry, dict) or set(entry) != {"method", "format"}:
                raise ValueError(f"block {name} of a plan needs exactly the keys method and format, got {_keys(entry)}")
            try:
                planned[name] = BlockPlan(method_from_json(entry["method"]), QFormat.from_json(entry["format"]))
            except (ValueError, TypeError) as error:  # numbers of a wrong type too
                raise ValueError(f"block {name}: {error}") from error
        for layer, formats in source["signals"].items():
            if not isinstance(formats, dict):
                raise ValueError(f"the signals of layer {layer} need an object, got {formats!r}")
            try:
                signals[layer] = {name: QFormat.from_json(fmt) for name, fmt in formats.items()}
            except (ValueError, TypeError) as error:
                raise ValueError(f"the signals of layer {layer}: {error}") from error
        return cls(planned, signals, source["activation"], source.get("delta", {}))

    def table(self, packed: PackedModel) -> list[dict]:
        """The rows of packed.table(), with the method of each block for how it is stored."""
        if not isinstance(packed, PackedModel) or set(packed.blocks) != set(self.blocks):
            got = ", ".join(packed.blocks) if isinstance(packed, PackedModel) else repr(packed)
            raise ValueError("Plan.table needs the model packed by this plan, with the blocks "
                             f"{', '.join(self.blocks)}, got {got}")
        rows = {row.pop("block"): row for row in packed.table()}
        return [{"block": name, "shape": rows[name].pop("shape"), "method": method_label(entry.method)}
                | {key: value for key, value in rows[name].items() if key != "stored as"}
                for name, entry in self.blocks.items()]


def _check_names(what, planned, known, all_of_them=True):
    if unknown := [name for name in planned if name not in known]:
        raise ValueError(f"the plan names the {what}s {', '.join(unknown)}, the model has {', '.join(known)}")
    if all_of_them and (missing := [name for name in known if name not in planned]):
        raise ValueError(f"the plan misses the {what}s {', '.join(missing)}")


def _keys(source):
    return ", ".join(source) if isinstance(source, dict) else short(source)


def pack_block(w: torch.Tensor, entry: BlockPlan, **known):
    """(out, in) weights -> the packed block: projected in float64, then quantised. known: what the method
    is told beside it (constrain.trained_factors)."""
    w = w.detach().double()
    return entry.method.pack(entry.method.project(w), entry.format, **known)


def plan_block(w: torch.Tensor, method: Method, bits: int) -> BlockPlan:
    """A method with the weight format of that width that suits the values it would store."""
    check_method("a plan", method)
    stored = method.constrain(w, None).right_inverse(w)
    return BlockPlan(method, weight_format(stored, bits, getattr(method, "factors", 1)))


def plan_blocks(known: dict[str, torch.Tensor], method: Method, bits: int) -> dict[str, BlockPlan]:
    """plan_block of every block, name -> weights; ValueError names the block that the method does not fit."""
    found = {}
    for name, w in known.items():
        with naming_block(name):
            found[name] = plan_block(w, method, bits)
    return found


def with_room(planned: dict[str, BlockPlan], packed: Callable[[dict[str, BlockPlan]], PackedLayer]):
    """(planned, packed(planned)): the plans of a layer's blocks with the fewest fraction bits less with which `packed` takes
    them: a bias shares those of the products that are added to it, and so has its range from them."""
    refused = []
    for fewer in range(LOSSLESS_BITS):
        roomier = {name: replace(entry, format=replace(entry.format, frac=entry.format.frac - fewer))
                   for name, entry in planned.items()}
        try:
            return roomier, packed(roomier)
        except ValueError as error:
            refused.append(error)
    raise refused[0]


def uncompressed(model: torch.nn.Module, signals) -> Plan:
    """Every block dense in LOSSLESS_BITS, what compressions are measured against; as with_room in each layer."""
    plan, found = uniform(model, Dense(), LOSSLESS_BITS, signals), {}
    plan.check_fit(model)
    for name, layer in layers(model).items():
        mine = {b.name: plan.blocks[b.name] for b in blocks(model).values() if b.layer == layer}
        found |= with_room(mine, lambda entries, name=name: plan.pack_layer(model, name, {
            block: pack_block(weight(model, block), entry) for block, entry in entries.items()}))[0]
    return replace(plan, blocks=found)


def uniform(model: torch.nn.Module, method: Method, bits: int, signals) -> Plan:
    """The same method and weight width for every block."""
    return Plan(plan_blocks(weights(model), method, bits), signals)

