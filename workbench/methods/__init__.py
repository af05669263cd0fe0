"""Compression methods: METHODS is the one table of them."""

from dataclasses import asdict, fields

from workbench.methods.base import Method
from workbench.methods.circulant import BlockCirculant
from workbench.methods.dense import Dense
from workbench.methods.sparse import TopK

__all__ = ["METHODS", "BlockCirculant", "Dense", "Method", "TopK", "method_from_json", "method_label", "method_to_json"]

METHODS = {
    "Dense": Dense,
    "TopK": TopK,
    "BlockCirculant": BlockCirculant,
}


def method_to_json(method: Method) -> dict:
    return {"name": type(method).__name__} | asdict(method)


def method_label(method: Method) -> str:
    """Short text for tables and legends, for example "TopK 0.1694" or "BlockCirculant 8 time"."""
    values = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in asdict(method).values())
    return " ".join((type(method).__name__, *values))


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
