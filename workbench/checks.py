"""What numbers that a caller gives must be, and the Python numbers that they become."""

import math
from dataclasses import fields

import numpy as np


def check_whole(who: str, name: str, value, least: int, most: float = math.inf) -> int:
    """The whole number as a Python int, of NumPy and pandas too; ValueError for what is none or not within [least, most]."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{who} needs a whole {name} {bounds}, got {value!r}")
    return int(value)


def plain_numbers(record) -> None:
    """Make the NumPy scalars among the fields of a frozen dataclass Python's, which JSON takes and which do not overflow."""
    for field in fields(record):
        if isinstance(value := getattr(record, field.name), np.generic):
            object.__setattr__(record, field.name, value.item())
