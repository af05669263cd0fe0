"""Hidden units: removed whole, from every matrix that makes or takes them, so that the layer really gets smaller.

After ISS, "Learning intrinsic sparse structures within long short-term memory" (Wen et al. 2018, arXiv 1709.05027): to a unit
belong its row of every gate in W_ih and W_hh, its biases, and its column of everything that takes its h: W_hh, the projection
W_hr or else the next layer's W_ih, and what reads the output. A transform of the model, done before a plan.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from workbench.checks import check_whole
from workbench.constrain import bake
from workbench.gates import evaluating, layers, layers_of, rnns
from workbench.quantise import batches_of_arguments

Consumers = dict[str, list[str]]
SAME = 1000  # units in the last place that outputs of one network, added up in another order, may differ by


class _Taker(NamedTuple):
    """A matrix that takes the h of a layer and direction: a module's parameter, and the column that unit 0 has in it."""

    module: nn.Module
    parameter: str
    first: int


def unit_scores(model: nn.Module, consumers: Consumers | None = None) -> dict[str, torch.Tensor]:
    """Layer name -> (hidden_size,) L2 norm of all weights that belong to each unit, biases apart. consumers: see
    remove_units."""
    model = bake(model)
    return _scores(model, _takers(model, consumers, rnns(model)))


def remove_units(model: nn.Module, keep: int | dict[str, Iterable[int]], consumers: Consumers | None = None,
                 batches: Iterable | None = None) -> nn.Module:
    """A smaller copy of the model that computes what the full one would if the removed units were silent, h and c zero.

    keep: how many units of every layer and direction stay, those of the largest unit_scores; or layer name -> the units that
    stay, for every layer of the recurrent modules that are to shrink. All layers of one module must keep equally many.
    consumers: path of a recurrent module -> paths of the modules that take its output (or last state, directions side by side
    as torch gives them): nn.Linear, nn.LSTM or nn.GRU. A module that bears an attribute `consumers` of that form, as
    SequenceClassifier does, need not name them; with a projection nothing outside changes, so none is needed. A compressed
    model is baked first. Ratios of the smaller model count against the full one with pack(..., original=model).

    Code between h and a consumer is not seen here: a norm over the units, another order or another layer's state, a slice at
    the former size, a state that is handed to a module which keeps other units. batches, each the model's arguments as
    calibrate takes them, show it: ValueError where the outputs of the smaller model are not those of the full one with silent
    units.
    """
    original, model = model, bake(model)
    known = layers(model)
    shrinking = {known[name].rnn for name in keep if name in known} if isinstance(keep, dict) else rnns(model)
    takers = _takers(model, consumers, shrinking)
    kept = _kept(model, keep, takers)
    rows, columns = {}, {}  # (module, parameter) -> those that stay
    for name, units in kept.items():
        rnn, suffix = rnns(model)[known[name].rnn], known[name].suffix
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if rnn.bias else 2]:
            gates = len(getattr(rnn, f"{part}_{suffix}")) // rnn.hidden_size
            rows[rnn, f"{part}_{suffix}"] = torch.cat([gate * rnn.hidden_size + units for gate in range(gates)])
        for module, parameter, first in takers[name]:
            columns.setdefault((module, parameter), []).append(first + units)
    _check_not_shared(model, columns)  # rnns refuses recurrent weights that are
    for module, parameter in rows | columns:
        w = getattr(module, parameter)
        smaller = w.detach()
        if (module, parameter) in rows:
            smaller = smaller[rows[module, parameter].to(w.device)]
        if (module, parameter) in columns:
            smaller = smaller[:, torch.cat(columns[module, parameter]).to(w.device)]
        setattr(module, parameter, nn.Parameter(smaller.clone(), w.requires_grad))
    for rnn in rnns(model).values():  # sizes last: above they tell where things lie
        rnn.hidden_size = rnn.weight_hh_l0.shape[0] // (4 if isinstance(rnn, nn.LSTM) else 3)
        rnn.input_size = rnn.weight_ih_l0.shape[1]
        rnn._init_flat_weights()
    for module, parameter in columns:
        if isinstance(module, nn.Linear):
            module.in_features = getattr(module, parameter).shape[1]
    if batches is not None:
        _check_same(_silenced(bake(original), kept), bake(model), batches)  # a copy, for models that keep a state
    return model


def _silenced(model, kept):
    """The model, changed: units that do not stay have h and c of zero, as the gate is that makes what they hold."""
    for name, units in kept.items():
        layer = layers(model)[name]
        rnn = rnns(model)[layer.rnn]
        silent = torch.ones(rnn.hidden_size, dtype=torch.bool)
        silent[units] = False
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if rnn.bias else 2]:
            # In torch's order of gates g of an LSTM and n of a GRU are the third.
            getattr(rnn, f"{part}_{layer.suffix}").detach()[2 * rnn.hidden_size : 3 * rnn.hidden_size][silent] = 0
    return model


def _check_same(silenced, smaller, batches):
    """Refuse a smaller model whose outputs differ; states, which are smaller, do not count."""

    def outputs(model, arguments):
        with torch.random.fork_rng(), torch.no_grad(), evaluating(model):  # code that draws does so alike for both
            return list(_tensors(model(*arguments)))

    compared = 0
    for arguments in batches_of_arguments("remove_units", batches):
        expected = outputs(silenced, arguments)
        try:
            found = outputs(smaller, arguments)
        except Exception as error:  # whatever the user's code raises where it meets another size
            raise ValueError("remove_units needs a model that runs with fewer units, and it does not once they are removed: "
                             f"{error}") from error
        for one, other in zip(expected, found, strict=True):
            if one.shape == other.shape and one.is_floating_point() and one.numel():
                off, largest = (one - other).abs().max().item(), one.abs().max().item()
                if not off <= SAME * torch.finfo(one.dtype).eps * largest:
                    raise ValueError("remove_units needs a model in which nothing but the consumers depends on the units that "
                                     f"go: without them an output of magnitude {largest:.3g} changes by {off:.3g}")
                compared += 1
    if not compared:
        raise ValueError("remove_units needs batches whose outputs do not have the size of the units, got none to compare")


def _tensors(found):
    if isinstance(found, PackedSequence):
        yield found.data
    elif isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, dict | list | tuple):
        for value in found.values() if isinstance(found, dict) else found:
            yield from _tensors(value)


def _takers(model, consumers, shrinking) -> dict[str, list[_Taker]]:
    """Layer name -> everything that takes the h of its units, for the layers of the modules that shrink."""
    outside = _consumers(model, getattr(model, "consumers", None) if consumers is None else consumers, shrinking)
    takers = {}
    for path in shrinking:
        rnn = rnns(model)[path]
        for layer in layers_of(rnn, path):
            if rnn.proj_size:
                takers[layer.name] = [_Taker(rnn, f"weight_hr_{layer.suffix}", 0)]
                continue
            first = rnn.hidden_size * layer.reverse  # both directions are taken side by side
            inside = [_Taker(rnn, f"weight_ih_{above.suffix}", first) for above in layers_of(rnn)
                      if above.index == layer.index + 1]
            takers[layer.name] = [_Taker(rnn, f"weight_hh_{layer.suffix}", 0), *inside]
            if not inside:
                takers[layer.name] += [_Taker(module, parameter, first) for module, parameter in outside.get(path, ())]
    return takers


def _consumers(model, named, shrinking) -> dict[str, list[tuple[nn.Module, str]]]:
    """Path of a recurrent module -> (module, weight) of everything outside that takes its output."""
    known, modules, found = rnns(model), dict(model.named_modules(remove_duplicate=False)), {}
    named = {} if named is None else named
    if not isinstance(named, dict) or not all(
            isinstance(paths, list | tuple) and all(isinstance(path, str) for path in paths) for paths in named.values()):
        raise ValueError(f"remove_units needs consumers as {{module path: [module paths]}}, got {named!r}")
    if unknown := [path for path in named if path not in known]:
        raise ValueError(f"remove_units needs consumers of the recurrent modules {', '.join(known)}, got those of "
                         f"{', '.join(map(str, unknown))}")
    first = {}  # module -> the path by which it is named first
    for path in (path for paths in named.values() for path in paths):
        if (module := modules.get(path)) is None:  # refused below
            continue
        if module in first:
            also = f"as {first[module]!r} and as {path!r}" if path != first[module] else "twice"
            raise ValueError(f"remove_units needs each consumer once, got {path!r} {also}")
        first[module] = path
    for path in shrinking:
        rnn = known[path]
        if rnn.proj_size or not path:  # nothing outside changes, or there is no outside
            continue
        width = rnn.hidden_size * (1 + rnn.bidirectional)
        if path not in named:
            fitting = [name for name, m in modules.items() if isinstance(m, nn.Linear) and m.in_features == width]
            raise ValueError(f"remove_units needs to know what takes the output of {path!r}: give consumers={{{path!r}: "
                             f"[...]}}; nn.Linear of {width} features are {', '.join(fitting) or 'none'}")
        found[path] = [weight for name in named[path] for weight in _weights_of(modules, path, name, width)]
    return found


def _weights_of(modules, path, name, width):
    module = modules.get(name)
    if not isinstance(module, (nn.Linear, nn.LSTM, nn.GRU)):
        what = "no module of the model" if module is None else f"an nn.{type(module).__name__}"
        raise ValueError(f"remove_units can take units from nn.Linear, nn.LSTM and nn.GRU, and the consumer {name!r} of "
                         f"{path!r} is {what}")
    linear = isinstance(module, nn.Linear)
    if parametrize.is_parametrized(module):
        raise ValueError(f"remove_units needs plain weights, and the consumer {name!r} of {path!r} is parametrized")
    if (size := module.in_features if linear else module.input_size) != width:
        raise ValueError(f"remove_units needs a consumer of the {width} features of {path!r}, {name!r} takes {size}")
    names = ["weight"] if linear else [f"weight_ih_{layer.suffix}" for layer in layers_of(module) if layer.index == 0]
    if odd := [parameter for parameter in names if module._parameters.get(parameter) is None]:
        raise ValueError(f"remove_units needs plain weights, and {odd[0]} of the consumer {name!r} of {path!r} is none, as of "
                         "a pruned or weight-normalised module")
    return [(module, parameter) for parameter in names]


def _check_not_shared(model, changed):
    """Refuse a weight that another module uses too: what the one loses the other would lose with it."""
    for module, parameter in changed:
        for name, other in model.named_modules():
            if other is not module and any(p is getattr(module, parameter) for p in other.parameters(recurse=False)):
                own = next(name for name, m in model.named_modules() if m is module)
                raise ValueError(f"remove_units needs weights of one module each, and {own!r} shares its {parameter} with "
                                 f"{name!r}")


def _scores(model, takers):
    scores = {}
    for name in takers:
        layer = layers(model)[name]
        rnn = rnns(model)[layer.rnn]
        ih, hh = (getattr(rnn, f"weight_{part}_{layer.suffix}").detach() for part in ("ih", "hh"))
        total = sum(w.view(-1, rnn.hidden_size, w.shape[1]).square().sum((0, 2)) for w in (ih, hh))
        for module, parameter, first in takers[name]:
            total += getattr(module, parameter).detach()[:, first : first + rnn.hidden_size].square().sum(0)
        if not rnn.proj_size:  # a unit's own weight is in its row and in its column of W_hh
            total -= hh.view(-1, rnn.hidden_size, rnn.hidden_size).diagonal(dim1=1, dim2=2).square().sum(0)
        scores[name] = total.sqrt()
    return scores


def _kept(model, keep, takers) -> dict[str, torch.Tensor]:
    """Layer name, in torch's order -> sorted units that stay, for the layers that shrink."""
    known = layers(model)
    if isinstance(keep, dict):
        if unknown := [name for name in keep if name not in known]:
            raise ValueError(f"remove_units knows the layers {', '.join(known)}, got {', '.join(map(str, unknown))}")
        kept = {name: _units(name, rnns(model)[known[name].rnn].hidden_size, units) for name, units in keep.items()}
    else:
        keep = check_whole("remove_units", "number of units to keep", keep, 1)
        kept = {}
        for name, score in _scores(model, takers).items():
            if not score.isfinite().all():
                raise ValueError(f"remove_units needs finite weights to choose units by, got others in {name}")
            if keep > len(score):
                raise ValueError(f"remove_units cannot keep {keep} units of {name}, which has {len(score)}")
            kept[name] = score.topk(keep).indices.sort().values
    for path, rnn in rnns(model).items():
        counts = {layer.name: len(kept.get(layer.name, ())) for layer in layers_of(rnn, path)}
        if len(set(counts.values())) > 1:
            raise ValueError(f"remove_units needs equally many units in every layer of {path!r}, which has one hidden size, "
                             "got " + ", ".join(f"{count} of {name}" for name, count in counts.items()))
        if rnn.proj_size and 0 < min(counts.values()) <= rnn.proj_size:
            raise ValueError(f"remove_units needs to keep more units of {path!r} than its proj_size {rnn.proj_size}, got "
                             f"{min(counts.values())}")
    return {name: kept[name] for name in known if name in kept}  # in torch's order, in which consumers take the directions


def _units(name, hidden_size, units):
    if not isinstance(units, Iterable):
        raise ValueError(f"remove_units needs a list of the units of {name} that stay, got {units!r}")
    units = [u.item() if isinstance(u, np.integer) or (isinstance(u, torch.Tensor) and u.ndim == 0) else u for u in units]
    wrong = [u for u in units if isinstance(u, bool) or not isinstance(u, int) or not 0 <= u < hidden_size]
    if wrong or not units or len(set(units)) != len(units):
        raise ValueError(f"remove_units needs different units of {name} from 0 to {hidden_size - 1}, at least one, got "
                         f"{wrong or units}")
    return torch.tensor(sorted(units))
