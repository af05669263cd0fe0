"""Compression methods: METHODS is the one table of them."""

import difflib
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import get_type_hints

from workbench.methods.balanced import BankBalanced, RowBalanced
from workbench.methods.base import Method
from workbench.methods.blocksparse import BlockSparse
from workbench.methods.circulant import BlockCirculant
from workbench.methods.dense import Dense
from workbench.methods.lowrank import LowRank
from workbench.methods.sparse import TopK
from workbench.methods.structured import Structured

__all__ = ["METHODS", "BankBalanced", "BlockCirculant", "BlockSparse", "Dense", "LowRank", "Method", "RowBalanced",
           "Structured", "TopK", "check_family", "check_method", "method_from_json", "method_from_label", "method_label",
           "method_to_json"]

METHODS = {
    "Dense": Dense,
    "TopK": TopK,
    "RowBalanced": RowBalanced,
    "BankBalanced": BankBalanced,
    "BlockSparse": BlockSparse,
    "Structured": Structured,
    "BlockCirculant": BlockCirculant,
    "LowRank": LowRank,
}

READ = {int: int, float: float, str: str, bool: {"True": True, "False": False}.__getitem__}  # kind of parameter -> from a label


def check_method(who: str, method) -> None:
    if not is_dataclass(method) or isinstance(method, type):
        raise ValueError(f"{who} needs methods, such as TopK(0.5), got {method!r}")


def check_family(who: str, family) -> None:
    if not isinstance(family, type) or not is_dataclass(family):
        raise ValueError(f"{who} needs a family of methods, such as TopK without parameters, got {family!r}")


def method_to_json(method: Method) -> dict:
    return {"name": type(method).__name__} | asdict(method)


def method_label(method: Method, exact: bool = False) -> str:
    """Short text for tables and legends, for example "TopK 0.1694" or "BlockCirculant 8": the name and its parameters,
    numbers with four significant digits or all (exact), without the trailing parameters that have their default."""
    shown = list(fields(method))
    while shown and getattr(method, shown[-1].name) == shown[-1].default:
        shown.pop()
    return " ".join([type(method).__name__, *(_number(getattr(method, f.name), exact) for f in shown)])


def _number(value, exact):
    if not isinstance(value, float):
        return str(value)
    short = f"{value:.4g}"
    return repr(float(value)) if exact and float(short) != value else short


def method_from_label(label: str) -> Method:
    """Inverse of method_label, but for the digits that it rounds; every parameter that has a default may be left out at the
    end. ValueError names the rule."""
    if not isinstance(label, str):
        raise TypeError(f'a method label is a text like "TopK 0.25", got {label!r}')
    name, _, rest = label.strip().partition(" ")
    if name not in METHODS:
        lower = {known.lower(): known for known in METHODS}
        close = difflib.get_close_matches(name.lower(), lower, n=1)
        hint = f"; did you mean {lower[close[0]]!r}?" if close else ""
        raise ValueError(f"a method label begins with one of {', '.join(METHODS)}, got {label!r}{hint}")
    known, texts = fields(METHODS[name]), rest.split()
    if not sum(f.default is MISSING for f in known) <= len(texts) <= len(known):
        usage = " ".join([name, *(f.name if f.default is MISSING else f"[{f.name}]" for f in known)])
        raise ValueError(f"a {name} label reads {usage!r}, got {label!r}")
    arguments, types = {}, get_type_hints(METHODS[name])  # hints, as a type may be written as a text
    for f, text in zip(known, texts, strict=False):  # what is left out has a default
        kind = types[f.name]
        if kind not in READ:
            raise ValueError(f"labels hold parameters of {', '.join(one.__name__ for one in READ)}, and {f.name} of {name} is "
                             f"{kind}")
        try:
            arguments[f.name] = READ[kind](text)
        except (ValueError, KeyError):
            raise ValueError(f"{name} needs {f.name} as {kind.__name__}, got {text!r} in the label {label!r}") from None
    return METHODS[name](**arguments)


def method_from_json(data) -> Method:
    """{"name": ..., fields...} -> method; unknown names and fields raise ValueError."""
    if not isinstance(data, dict) or "name" not in data:
        raise ValueError(f'a method needs {{"name": ..., parameters}}, got {data!r}')
    arguments = {key: value for key, value in data.items() if key != "name"}
    if data["name"] not in list(METHODS):  # of a list, so that a name that cannot be hashed is refused likewise
        raise ValueError(f"the methods are {', '.join(METHODS)}, got {data['name']!r}")
    cls = METHODS[data["name"]]
    known = [f.name for f in fields(cls)]
    if unknown := set(arguments) - set(known):
        raise ValueError(f"{data['name']} has the parameters {', '.join(known) or 'none'}, got {', '.join(sorted(unknown))}")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{data['name']} needs {', '.join(known)}, got {arguments}") from error
