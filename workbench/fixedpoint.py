"""Fixed point: number formats, the one rounding rule, exact integer products and activation tables.

The rounding rule of the workbench (half up, saturating) is defined here. What rounds floats for speed, in training and in
the engine, is tested against it bit for bit.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from workbench.checks import plain_numbers

PIECE = 1 << 15  # values that are quantised at a time


@dataclass(frozen=True)
class QFormat:
    """Two's complement number format: value = integer * 2**-frac.

    bits: width, 1 to 32 (signed formats at least 2); frac: fraction bits, may be negative or exceed the width.
    """

    bits: int
    frac: int
    signed: bool = True

    def __post_init__(self):
        plain_numbers(self)
        for name in ("bits", "frac"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"QFormat needs a whole number for {name}, got {value!r}")
        if not isinstance(self.signed, bool):
            raise TypeError(f"QFormat needs True or False for signed, got {self.signed!r}")
        if not (2 if self.signed else 1) <= self.bits <= 32:
            raise ValueError(f"{self} needs 2 to 32 bits when signed and 1 to 32 when unsigned, got {self.bits}")
        if not -64 <= self.frac <= 64:
            raise ValueError(f"{self} needs frac from -64 to 64, got {self.frac}")

    @property
    def min(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def max(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def magnitude(self) -> int:
        """Largest |integer| of the format."""
        return max(-self.min, self.max)

    def quantise(self, x) -> np.ndarray:
        """Real numbers -> int64 integers of this format, half up, saturating. NaN raises ValueError."""
        x = x if isinstance(x, np.ndarray) else np.asarray(x, dtype=np.float64)
        codes = np.empty(x.shape, np.int64)
        if x.ndim < 2 or x.flags.c_contiguous:
            whole, flat = x.reshape(-1), codes.reshape(-1)
            pieces = [slice(start, start + PIECE) for start in range(0, x.size, PIECE)]
        else:
            whole, flat, step = x, codes, max(1, PIECE * len(x) // max(1, x.size))
            pieces = [slice(start, start + step) for start in range(0, len(x), step)]
        for piece in pieces:  # most of them stay in the processor's cache
            self._quantise(whole[piece], flat[piece], x)
        return codes

    def _quantise(self, values, codes, whole):
        # Saturating before scaling keeps infinities and overflow out. Half up through floor: adding 0.5 first would
        # round 0.49999999999999994 up.
        t = np.clip(np.asarray(values, dtype=np.float64), self.dequantise(self.min), self.dequantise(self.max))
        if np.isnan(t.sum()):  # what is saturated has a sum, unless NaN is in it
            wrong = np.isnan(np.asarray(whole, dtype=np.float64))
            raise ValueError(f"{self} cannot hold NaN: {int(wrong.sum())} of {wrong.size} values are NaN")
        t = t * 2.0**self.frac
        floor = np.floor(t)
        floor += t - floor >= 0.5
        codes[...] = floor

    def dequantise(self, q) -> np.ndarray:
        """Integers -> float64 values (exact)."""
        return np.asarray(q, dtype=np.float64) * 2.0**-self.frac

    def to_json(self) -> dict:
        return {"bits": self.bits, "frac": self.frac, "signed": self.signed}

    @classmethod
    def from_json(cls, data) -> "QFormat":
        if not isinstance(data, dict) or set(data) != {"bits", "frac", "signed"}:
            raise ValueError(f"QFormat needs exactly the keys bits, frac and signed, got {data!r}")
        return cls(**data)


def requantise(a, frac: int, fmt: QFormat) -> np.ndarray:
    """int64 accumulators with `frac` fraction bits -> integers of fmt: one half-up rounding, then saturation.

    a must stay below 2**61 in magnitude; accumulators are at most 62 bits wide.
    """
    a = np.asarray(a, dtype=np.int64)
    shift = frac - fmt.frac
    if shift > 0:
        shift = min(shift, 62)  # beyond this every |a| < 2**61 rounds to zero all the same
        a = (a + (1 << (shift - 1))) >> shift
    elif shift < 0:
        # Values that saturate anyway are cut before the shift, so that it cannot leave int64.
        shift = min(-shift, 34)
        limit = ((1 << 32) >> shift) + 1
        a = np.clip(a, -limit, limit) << shift
    return np.clip(a, fmt.min, fmt.max)


def exact_float(bound: int) -> type | None:
    """The smaller float type that holds every integer of magnitude up to bound, or None."""
    return np.float32 if bound < 1 << 24 else np.float64 if bound < 1 << 53 else None


def largest_row_sum(weights) -> int:
    """(out, in) int64 -> the largest row sum of |weights|."""
    return int(np.abs(weights).sum(axis=1).max(initial=0))


class ExactMatrix:
    """An integer matrix whose products with bounded integer vectors are exact.

    weights: (out, in) int64; magnitude: largest |integer| of the vectors. While the largest row sum of
    |weights| * magnitude stays under 2**24 (2**53) every partial sum is an integer that float32 (float64) holds exactly,
    so BLAS may be used; beyond that the product runs in int64, and beyond 2**63 it is refused.
    """

    def __init__(self, weights, magnitude: int):
        bound = largest_row_sum(weights) * magnitude
        if bound >= 1 << 63:
            raise ValueError(f"ExactMatrix needs row sums under 2**63, got a bound of {bound}")
        self.dtype = exact_float(bound) or np.int64
        self.transposed = np.ascontiguousarray(weights.T, dtype=self.dtype)  # (in, out)

    def __call__(self, x) -> np.ndarray:
        """x: (..., in) integers -> (..., out) int64, exact."""
        return (x.astype(self.dtype) @ self.transposed).astype(np.int64)


TABLE_RANGE_LOG2 = 3  # the linear table covers |x| in [0, 8); beyond it the last knot holds
TABLE_SEGMENTS_LOG2 = 8  # 256 segments
KNOT_BITS, KNOT_FRAC = 16, 15  # knots are unsigned words, with fraction bits such that 1.0 is one of them
MAX_LOOKUP_FRAC = 48  # of a table's input: interpolation at more fraction bits would leave 64-bit integers
MAX_EXACT_BITS = 16  # of an exact table's input
MAX_WALK_BITS = 20  # of an input whose every code is walked to find the largest error


class _Table:
    """What all activation tables share. lookup(q, in_fmt, out_fmt): integers of in_fmt -> integers of out_fmt."""

    def __post_init__(self):
        if self.function not in FUNCTIONS:
            raise ValueError(f"{type(self).__name__} knows {', '.join(FUNCTIONS)}, got {self.function!r}")

    def max_error_ulp(self, in_fmt: QFormat, out_fmt: QFormat) -> float:
        """Largest |table - function| over every input code, in units of the last place of out_fmt."""
        if in_fmt.bits > MAX_WALK_BITS:
            raise ValueError(f"max_error_ulp walks every input code and needs at most {MAX_WALK_BITS} bits, got {in_fmt}")
        q = np.arange(in_fmt.min, in_fmt.max + 1)
        exact = FUNCTIONS[self.function](in_fmt.dequantise(q))
        return float(np.abs(out_fmt.dequantise(self.lookup(q, in_fmt, out_fmt)) - exact).max() * 2.0**out_fmt.frac)

    def check(self, in_fmt: QFormat, out_fmt: QFormat) -> None:
        """Refuse formats that cannot be looked up."""
        if in_fmt.frac > MAX_LOOKUP_FRAC:
            raise ValueError(f"{type(self).__name__} needs inputs of at most {MAX_LOOKUP_FRAC} fraction bits, got {in_fmt}")


@dataclass(frozen=True)
class LinearTable(_Table):
    """sigmoid or tanh as 256 segments on [0, 8), symmetric, integer linear interpolation, one rounding.

    knots: (257,) int64 with KNOT_FRAC fraction bits; for sigmoid they run from 0.5 to sigmoid(8).
    """

    function: str
    knots: np.ndarray  # (257,)

    def __post_init__(self):
        super().__post_init__()
        if self.knots.shape != ((1 << TABLE_SEGMENTS_LOG2) + 1,) or self.knots.min() < 0 or self.knots.max() >= 1 << KNOT_BITS:
            raise ValueError(f"LinearTable needs 257 knots of 16 bits, got shape {self.knots.shape}")

    @classmethod
    def build(cls, function: str, uses=()) -> "LinearTable":
        """The same knots for every use."""
        x = np.arange((1 << TABLE_SEGMENTS_LOG2) + 1) * 2.0 ** (TABLE_RANGE_LOG2 - TABLE_SEGMENTS_LOG2)
        return cls(function, QFormat(KNOT_BITS, KNOT_FRAC, signed=False).quantise(_function("LinearTable", function)(x)))

    @cached_property
    def _segments(self):
        return self.knots[:-1], np.diff(self.knots)

    def lookup(self, q, in_fmt: QFormat, out_fmt: QFormat) -> np.ndarray:
        """Integers of in_fmt (at most MAX_LOOKUP_FRAC fraction bits) -> integers of out_fmt, the same shape."""
        self.check(in_fmt, out_fmt)
        q = np.asarray(q, dtype=np.int64)
        # Position = segment + remainder / 2**rest; a coarse input format falls on the knots themselves.
        rest = max(in_fmt.frac - (TABLE_SEGMENTS_LOG2 - TABLE_RANGE_LOG2), 0)
        # With steps of 8 and more every code but 0 lies at or beyond the last knot, as it does with steps of 8.
        coarse = min(max((TABLE_SEGMENTS_LOG2 - TABLE_RANGE_LOG2) - in_fmt.frac, 0), TABLE_SEGMENTS_LOG2)
        end = 1 << TABLE_SEGMENTS_LOG2
        magnitude = np.minimum(np.abs(q), (end << rest) >> coarse) << coarse
        segment = np.minimum(magnitude >> rest, end - 1)
        start, slope = self._segments
        value = (start[segment] << rest) + slope[segment] * (magnitude - (segment << rest))  # KNOT_FRAC + rest bits
        mirrored = -value if self.function == "tanh" else (1 << (KNOT_FRAC + rest)) - value
        return requantise(np.where(q < 0, mirrored, value), KNOT_FRAC + rest, out_fmt)

    def describe(self) -> dict:
        return {}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored of it."""
        return {"knots": self.knots.astype(np.uint16)}

    @classmethod
    def restore(cls, function, arrays, about) -> "LinearTable":
        return cls(function, arrays["knots"].astype(np.int64))


@dataclass(frozen=True)
class ExactTable(_Table):
    """sigmoid or tanh with one stored entry for every input code: the function, rounded once.

    entries: (input format, output format) -> (2**bits,) int64 output codes, the smallest input code first.
    """

    function: str
    entries: dict[tuple[QFormat, QFormat], np.ndarray]

    def __post_init__(self):
        super().__post_init__()
        for (in_fmt, out_fmt), codes in self.entries.items():
            if in_fmt.bits > MAX_EXACT_BITS:
                raise ValueError(f"ExactTable needs inputs of at most {MAX_EXACT_BITS} bits, got {in_fmt}")
            if codes.shape != (1 << in_fmt.bits,) or codes.min() < out_fmt.min or codes.max() > out_fmt.max:
                raise ValueError(f"ExactTable needs {1 << in_fmt.bits} codes of {out_fmt}, got shape {codes.shape}")

    @classmethod
    def build(cls, function: str, uses=()) -> "ExactTable":
        """uses: the (input format, output format) pairs that will be looked up."""
        entries, exact = {}, _function("ExactTable", function)
        for in_fmt, out_fmt in uses:
            codes = np.arange(in_fmt.min, in_fmt.max + 1) if in_fmt.bits <= MAX_EXACT_BITS else np.zeros(0)
            entries[in_fmt, out_fmt] = out_fmt.quantise(exact(in_fmt.dequantise(codes)))
        return cls(function, entries)

    def check(self, in_fmt: QFormat, out_fmt: QFormat) -> None:
        if (in_fmt, out_fmt) not in self.entries:
            raise ValueError(f"ExactTable of {self.function} has no entries from {in_fmt} to {out_fmt}")

    def lookup(self, q, in_fmt: QFormat, out_fmt: QFormat) -> np.ndarray:
        """Integers of in_fmt -> integers of out_fmt, the same shape; formats it was not built for raise ValueError."""
        self.check(in_fmt, out_fmt)
        return self.entries[in_fmt, out_fmt][np.asarray(q, dtype=np.int64) - in_fmt.min]

    def describe(self) -> dict:
        return {"uses": [[in_fmt.to_json(), out_fmt.to_json()] for in_fmt, out_fmt in self.entries]}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored of it, in the narrowest integers that hold the output format."""
        return {f"codes{n}": codes.astype(f"{'i' if fmt.signed else 'u'}{1 if fmt.bits <= 8 else 2 if fmt.bits <= 16 else 4}")
                for n, ((_, fmt), codes) in enumerate(self.entries.items())}

    @classmethod
    def restore(cls, function, arrays, about) -> "ExactTable":
        uses = [tuple(map(QFormat.from_json, use)) for use in about["uses"]]
        return cls(function, {use: arrays[f"codes{n}"].astype(np.int64) for n, use in enumerate(uses)})


@dataclass(frozen=True)
class HardTable(_Table):
    """Without a table: sigmoid as clip(x / 4 + 1 / 2, 0, 1), tanh as clip(x, -1, 1), one rounding. Their slopes at 0 are
    those of the functions, and powers of two."""

    function: str

    @classmethod
    def build(cls, function: str, uses=()) -> "HardTable":
        return cls(function)

    def lookup(self, q, in_fmt: QFormat, out_fmt: QFormat) -> np.ndarray:
        """Integers of in_fmt (at most MAX_LOOKUP_FRAC fraction bits) -> integers of out_fmt, the same shape."""
        self.check(in_fmt, out_fmt)
        q, frac = np.asarray(q, dtype=np.int64), in_fmt.frac
        if frac < 0:  # every code but 0 is at least 2 in magnitude, where both functions have ended
            q, frac = 2 * np.sign(q), 0
        if self.function == "tanh":
            return requantise(np.clip(q, -(1 << frac), 1 << frac), frac, out_fmt)
        return requantise(np.clip(q + (2 << frac), 0, 4 << frac), frac + 2, out_fmt)

    def describe(self) -> dict:
        return {}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored of it: nothing."""
        return {}

    @classmethod
    def restore(cls, function, arrays, about) -> "HardTable":
        return cls(function)


def _sigmoid(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


FUNCTIONS = {"sigmoid": _sigmoid, "tanh": np.tanh}
TABLES = {"linear": LinearTable, "exact": ExactTable, "hard": HardTable}  # kind of activation table


def _function(who, name):
    if name not in FUNCTIONS:
        raise ValueError(f"{who} knows {', '.join(FUNCTIONS)}, got {name!r}")
    return FUNCTIONS[name]
