"""Packed blocks, layers and models: the integers that hardware stores, their bits on disk, save and load.

A block's storage is counted from the byte arrays that are really written. Nothing here needs torch.
"""

import itertools
import math
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from workbench.checks import check_whole
from workbench.container import read_tensors, write_tensors
from workbench.fixedpoint import TABLES, ExactMatrix, QFormat
from workbench.spectrum import OPERAND_BITS, WORD_BITS, SpectralProduct, forward_bounds, weight_spectra, word_bits

GATES = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n")}  # torch's order of the gates in a weight matrix
PROJECTION = ("p",)  # the only gate of a projection matrix
# Signals with a number format. GRU: hidden_product is W_hn h + b_hn; its candidate n has the hidden format. A projected LSTM
# has `unprojected` besides, o * tanh(c) before W_hr.
SIGNALS = {"LSTM": ("input", "pre", "sigmoid", "tanh", "cell", "hidden"),
           "GRU": ("input", "pre", "hidden_product", "sigmoid", "hidden")}
PARTS = {"ih": "input", "hh": "hidden", "hr": "unprojected"}  # part of a gate -> the signal that it multiplies
MOST_WEIGHTS = 1 << 27  # of a block that is read from a file: its description alone must not take all memory
FILE_KIND = "packed model"
FILE_VERSION = 5
OLDER_VERSIONS = (4,)  # that are read too: 5 has the encoding Whole besides


def signals_of(cell: str, projected: bool = False) -> tuple[str, ...]:
    """The signals of a layer that have number formats."""
    return SIGNALS[cell] + ("unprojected",) * projected


def table_uses(cell: str, signals: dict[str, QFormat]) -> dict[str, list[tuple[QFormat, QFormat]]]:
    """function -> the (input format, output format) pairs in which a layer looks it up."""
    tanh = [("pre", "tanh"), ("cell", "tanh")] if cell == "LSTM" else [("pre", "hidden")]
    return {"sigmoid": [(signals["pre"], signals["sigmoid"])], "tanh": [(signals[a], signals[b]) for a, b in tanh]}


def pack_bits(values, bits: int) -> np.ndarray:
    """(n,) integers -> uint8 bytes, `bits` bits each in two's complement, most significant first, padded to a byte."""
    values = np.asarray(values, dtype=np.int64).ravel()
    planes = (values[:, None] >> np.arange(bits - 1, -1, -1)) & 1  # (n, bits)
    return np.packbits(planes.astype(np.uint8).ravel())


def unpack_bits(data, bits: int, count: int, signed: bool) -> np.ndarray:
    """The inverse of pack_bits: (count,) int64. Bytes that are not of that count raise ValueError."""
    if data.size != -(-bits * count // 8):
        raise ValueError(f"unpack_bits needs {-(-bits * count // 8)} bytes for {count} words of {bits} bits, got {data.size}")
    planes = np.unpackbits(data, count=bits * count).reshape(count, bits).astype(np.int64)
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    if signed:
        weights[0] = -weights[0]
    return planes @ weights


def _check_values(who, values, fmt):
    if values.dtype != np.int64:
        raise ValueError(f"{who} needs integers of {fmt} as int64, got {values.dtype}")
    if values.size and (values.min() < fmt.min or values.max() > fmt.max):
        raise ValueError(f"{who} needs integers of {fmt}, got {values.min()} to {values.max()}")


def _ratio(dense, stored) -> float:
    return dense / stored if stored else math.inf  # a block that is all zero may store nothing


def _check_product(who, *formats):
    # The multiplier is signed: an unsigned operand takes one bit more.
    widths = sorted(fmt.bits + (not fmt.signed) for fmt in formats)
    if widths[0] > 18 or widths[1] > 27:
        raise ValueError(f"{who} needs operands of 18 x 27 bits (DSP48E2), got {formats[0]} x {formats[1]}")


class _Stored:
    """What every stored form counts, from its own byte arrays."""

    @property
    def frac(self) -> int:
        """Fraction bits of the integers of dense()."""
        return self.fmt.frac

    def multiplication(self, magnitude: int):
        """A function (..., in) integers -> (..., out) int64, their sums at sum_frac; magnitude: largest |integer| taken."""
        return ExactMatrix(self.dense(), magnitude)

    def sum_frac(self, signal: QFormat) -> int:
        """Fraction bits of its sums; signal: the format of what it multiplies."""
        return self.frac + signal.frac

    def row_bounds(self, magnitude: int) -> list[int]:
        """Of each row the largest magnitude that its sum could reach, in whatever order it is added up; magnitude: largest
        |integer| of what the block multiplies."""
        return [int(total) * magnitude for total in np.abs(self.dense()).sum(axis=1)]

    def check_operands(self, name: str, signal: QFormat, acc_bits: int) -> None:
        """Refuse a multiplication wider than the array's; name: of the block; signal: the format of what it multiplies."""
        _check_product(name, self.fmt, signal)

    @property
    def value_bits(self) -> int:
        """Bits of the stored weights themselves."""
        return self.stored_values * self.fmt.bits

    @property
    def index_bits(self) -> int:
        """All other bits on disk: indices, padding words and the padding of each array to a whole byte."""
        return self.storage_bits - self.value_bits

    @property
    def storage_bits(self) -> int:
        return 8 * sum(a.nbytes for a in self.arrays.values())

    @property
    def cr_disk(self) -> float:
        """32 * weights of the block / every bit written for it."""
        return _ratio(32 * self.shape[0] * self.shape[1], self.storage_bits)


@dataclass(frozen=True)
class PackedDense(_Stored):
    """Every weight stored. values: (out, in) int64."""

    values: np.ndarray  # (out, in)
    fmt: QFormat

    def __post_init__(self):
        _check_values("PackedDense", self.values, self.fmt)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    @property
    def stored_values(self) -> int:
        return self.values.size

    def dense(self) -> np.ndarray:
        return self.values

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"values": pack_bits(self.values, self.fmt.bits)}

    def describe(self) -> dict:
        return {}

    @classmethod
    def restore(cls, arrays, shape, fmt, about) -> "PackedDense":
        count = shape[0] * shape[1]
        return cls(unpack_bits(arrays["values"], fmt.bits, count, fmt.signed).reshape(shape), fmt)


# Encodings of a sparse block. encode(block) gives its words (values in the order of storage, zero where a place stays
# empty) and its indices, places(shape, indices) the row and the column of every word; the counts size what a file must hold.


@dataclass(frozen=True)
class Relative:
    """Relative indices (ESE, arXiv 1612.00694, section 4): each stored tile says how many tiles it skips in row-major order.

    A tile is block x block words, 1 x 1 by default, zeros and padding columns included. A gap too long for `width` bits
    takes padding tiles of zeros: each spans 2**width tiles, those that it skips and itself.
    """

    width: int
    block: int = 1

    def __post_init__(self):
        check_whole("Relative", "width", self.width, 2, 8)
        check_whole("Relative", "block", self.block, 1)

    def encode(self, packed):
        tiles, words = _tiles(packed, self.block)
        gaps = np.diff(tiles, prepend=-1) - 1
        numbers = np.cumsum((gaps >> self.width) + 1) - 1  # where each tile stands among the stored ones
        count = numbers[-1] + 1 if numbers.size else 0
        padded = np.zeros((count, self.block**2), dtype=np.int64)
        indices = np.full(count, (1 << self.width) - 1, dtype=np.int64)
        padded[numbers], indices[numbers] = words, gaps & ((1 << self.width) - 1)
        return padded.ravel(), indices

    def padding(self, packed, words) -> int:
        """Those of the words that stand for no place of the pattern, only bridge a gap."""
        return words.size - _tiles(packed, self.block)[1].size

    def index_width(self, shape) -> int:
        return self.width

    def index_count(self, shape, words) -> int:
        return words // self.block**2

    def word_count(self, shape, indices) -> int:
        return indices.size * self.block**2

    def places(self, shape, indices):
        return _places(shape, self.block, np.cumsum(indices + 1) - 1)


@dataclass(frozen=True)
class Bitmap:
    """One bit a tile of block x block words, 1 x 1 by default, in row-major order: stored or not."""

    block: int = 1

    def __post_init__(self):
        check_whole("Bitmap", "block", self.block, 1)

    def encode(self, packed):
        tiles, words = _tiles(packed, self.block)
        present = np.zeros(self.index_count(packed.shape, words.size), dtype=np.int64)
        present[tiles] = 1
        return words.ravel(), present

    def index_width(self, shape) -> int:
        return 1

    def index_count(self, shape, words) -> int:
        return -(-shape[0] // self.block) * -(-shape[1] // self.block)

    def word_count(self, shape, indices) -> int:
        return int(indices.sum()) * self.block**2

    def places(self, shape, indices):
        return _places(shape, self.block, np.flatnonzero(indices))


def _tiles(packed, block):
    """The tiles of block x block that hold a weight: their numbers in row-major order (n,), their words (n, block**2)."""
    tiles = packed.rows // block * -(-packed.shape[1] // block) + packed.cols // block
    if block == 1:  # they are sorted and each once
        return tiles, packed.values[:, None]
    tiles, owner = np.unique(tiles, return_inverse=True)
    words = np.zeros((tiles.size, block**2), dtype=np.int64)
    words[owner, packed.rows % block * block + packed.cols % block] = packed.values
    return tiles, words


def _places(shape, block, tiles):
    tile, inside = np.divmod(np.arange(tiles.size * block**2), block**2)
    row, column = np.divmod(tiles[tile], -(-shape[1] // block))
    return row * block + inside // block, column * block + inside % block


@dataclass(frozen=True)
class Banks:
    """`count` words for each bank of each row, each with its place in the bank (compressed sparse banks of BBS,
    DOI 10.1145/3289602.3293898). Bank b has the columns b, b + banks, b + 2 * banks and so on; spare words are zero."""

    banks: int
    count: int

    def __post_init__(self):
        check_whole("Banks", "number of banks", self.banks, 1)
        check_whole("Banks", "count", self.count, 1)

    def encode(self, packed):
        bank = packed.rows * self.banks + packed.cols % self.banks
        order = np.argsort(bank, kind="stable")
        bank = bank[order]
        rank = np.arange(bank.size) - np.searchsorted(bank, bank)  # 0, 1, ... in each bank
        if rank.max(initial=0) >= self.count:
            raise ValueError(f"{self} needs at most {self.count} weights in a bank of a row, got {rank.max() + 1}")
        words = np.zeros(packed.shape[0] * self.banks * self.count, dtype=np.int64)
        indices = np.zeros_like(words)
        places = bank * self.count + rank
        words[places], indices[places] = packed.values[order], packed.cols[order] // self.banks
        return words, indices

    def index_width(self, shape) -> int:
        return (-(-shape[1] // self.banks) - 1).bit_length()

    def index_count(self, shape, words) -> int:
        return words

    def word_count(self, shape, indices) -> int:
        return shape[0] * self.banks * self.count

    def places(self, shape, indices):
        row, bank = np.divmod(np.arange(indices.size) // self.count, self.banks)
        return row, indices * self.banks + bank


@dataclass(frozen=True)
class Diagonals:
    """Permuted diagonals (PermDNN, arXiv 2004.10936): no index a weight, one offset a tile.

    A tile is `period` rows by the columns s, s + stride, s + 2 * stride and so on, at most `period` of them, with
    stride = ceil(in / period). The weight of its column b (counted within the tile) stands in its row (b - offset) % period.
    Words are stored by groups of `period` rows, in each one word a column.
    """

    period: int

    def __post_init__(self):
        check_whole("Diagonals", "period", self.period, 2)

    def encode(self, packed):
        rows, columns = packed.shape
        if rows % self.period:
            raise ValueError(f"{self} needs rows divisible by {self.period}, got {packed.shape}")
        stride = -(-columns // self.period)
        group, tile = packed.rows // self.period, packed.rows // self.period * stride + packed.cols % stride
        offsets = (packed.cols // stride - packed.rows) % self.period
        words = np.zeros(rows // self.period * columns, dtype=np.int64)
        indices = np.zeros(self.index_count(packed.shape, words.size), dtype=np.int64)
        words[group * columns + packed.cols], indices[tile] = packed.values, offsets
        if np.any(indices[tile] != offsets):
            raise ValueError(f"{self} needs the weights of each tile on one wrapped diagonal")
        return words, indices

    def index_width(self, shape) -> int:
        return (self.period - 1).bit_length()

    def index_count(self, shape, words) -> int:
        return shape[0] // self.period * -(-shape[1] // self.period)

    def word_count(self, shape, indices) -> int:
        return shape[0] // self.period * shape[1]

    def places(self, shape, indices):
        stride = -(-shape[1] // self.period)
        group, cols = np.divmod(np.arange(self.word_count(shape, indices)), shape[1])
        return group * self.period + (cols // stride - indices[group * stride + cols % stride]) % self.period, cols


@dataclass(frozen=True)
class Whole:
    """A word for every place in row-major order, zeros included: no index, the cheapest where few weights are zero."""

    def encode(self, packed):
        return packed.dense().ravel(), np.zeros(0, dtype=np.int64)

    def index_width(self, shape) -> int:
        return 0

    def index_count(self, shape, words) -> int:
        return 0

    def word_count(self, shape, indices) -> int:
        return shape[0] * shape[1]

    def places(self, shape, indices):
        return np.divmod(np.arange(shape[0] * shape[1]), shape[1])


def tile_encodings(block: int = 1) -> tuple:
    """What any block can be stored in by tiles of block x block."""
    return (*(Relative(width, block) for width in range(2, 9)), Bitmap(block))


ENCODINGS = {cls.__name__: cls for cls in (Relative, Bitmap, Banks, Diagonals, Whole)}


@dataclass(frozen=True)
class PackedSparse(_Stored):
    """Non-zero weights with their positions. rows, cols, values: (nnz,) int64, sorted row by row.

    On disk: the encoding that takes the fewest bytes (of equal ones the first). Stored values are the words that it writes,
    zeros at places of its pattern too; words that only bridge a long gap count as index bits. An encoding that the positions do
    not follow raises ValueError.
    """

    shape: tuple[int, int]
    fmt: QFormat
    rows: np.ndarray  # (nnz,)
    cols: np.ndarray  # (nnz,)
    values: np.ndarray  # (nnz,)
    encodings: tuple = field(default=(*tile_encodings(), Whole()), repr=False)  # those to choose from

    def __post_init__(self):
        _check_values("PackedSparse", self.values, self.fmt)
        if not self.rows.shape == self.cols.shape == self.values.shape or self.values.ndim != 1:
            raise ValueError("PackedSparse needs rows, cols and values of one length, got "
                             f"{self.rows.shape}, {self.cols.shape} and {self.values.shape}")
        positions = self.rows * self.shape[1] + self.cols
        if positions.size and (
            np.any(np.diff(positions) <= 0) or positions[0] < 0 or self.rows[-1] >= self.shape[0]
            or self.cols.min() < 0 or self.cols.max() >= self.shape[1]
        ):
            raise ValueError(f"PackedSparse needs positions inside {self.shape}, sorted row by row and each once")
        if np.any(self.values == 0):
            raise ValueError(f"PackedSparse stores no zeros, got {int(np.sum(self.values == 0))}")
        _ = self._encoded  # refuses an encoding that the positions do not follow

    @classmethod
    def from_dense(cls, values, fmt, *encodings) -> "PackedSparse":
        """values: (out, in) int64; zeros are left out. encodings: to choose from besides those that fit any block."""
        rows, cols = np.nonzero(values)
        return cls(values.shape, fmt, rows, cols, values[rows, cols], (*tile_encodings(), *encodings, Whole()))

    @property
    def stored_values(self) -> int:
        encoding, words, _ = self._encoded
        return words.size - (encoding.padding(self, words) if isinstance(encoding, Relative) else 0)

    def dense(self) -> np.ndarray:
        out = np.zeros(self.shape, dtype=np.int64)
        out[self.rows, self.cols] = self.values
        return out

    @cached_property
    def _encoded(self):
        """(encoding, words, indices) of the encoding that takes the fewest bytes."""

        def stored_bytes(encoded):
            encoding, words, indices = encoded
            return sum(-(-n * bits // 8) for n, bits in ((words.size, self.fmt.bits),
                                                         (indices.size, encoding.index_width(self.shape))))

        return min(((encoding, *encoding.encode(self)) for encoding in self.encodings), key=stored_bytes)

    @property
    def encoding(self):
        """The encoding that is written."""
        return self._encoded[0]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        encoding, words, indices = self._encoded
        return {"values": pack_bits(words, self.fmt.bits), "indices": pack_bits(indices, encoding.index_width(self.shape))}

    def describe(self) -> dict:
        encoding, words, _ = self._encoded
        return {"encoding": {"name": type(encoding).__name__} | asdict(encoding), "words": words.size}

    @classmethod
    def restore(cls, arrays, shape, fmt, about) -> "PackedSparse":
        fields = dict(about["encoding"])
        encoding = ENCODINGS[fields.pop("name")](**fields)
        words = unpack_bits(arrays["values"], fmt.bits, about["words"], fmt.signed)
        count, width = encoding.index_count(shape, words.size), encoding.index_width(shape)
        indices = unpack_bits(arrays["indices"], width, count, signed=False)
        if (expected := encoding.word_count(shape, indices)) != words.size:
            raise ValueError(f"{encoding} needs {expected} words for {tuple(shape)}, got {words.size}")
        rows, cols = encoding.places(shape, indices)
        kept = np.flatnonzero(words)
        kept = kept[np.lexsort((cols[kept], rows[kept]))]
        return cls(tuple(shape), fmt, rows[kept], cols[kept], words[kept], (encoding,))


DATAPATHS = ("time", "fft")  # of a circulant block


@dataclass(frozen=True)
class PackedCirculant(_Stored):
    """k x k circulant tiles, one vector of k weights each: W[i, j] = vectors[i // k, j // k, (i - j) % k].

    vectors: (out // k, ceil(in / k), k) int64, the first column of every tile. Columns that k does not divide are
    padded with zeros; the padding is stored and counted. datapath "time": plain multiply-accumulates. "fft": products in the
    frequency domain (spectrum.py), for k a power of two; stored are the same integers, the array holds their spectra.
    """

    shape: tuple[int, int]
    fmt: QFormat
    block: int
    vectors: np.ndarray  # (out // k, ceil(in / k), k)
    datapath: str = "time"

    def __post_init__(self):
        _check_values("PackedCirculant", self.vectors, self.fmt)
        if self.block < 1 or self.shape[0] % self.block:
            raise ValueError(f"PackedCirculant needs rows divisible by block {self.block}, got {self.shape}")
        expected = (self.shape[0] // self.block, -(-self.shape[1] // self.block), self.block)
        if self.vectors.shape != expected:
            raise ValueError(f"PackedCirculant needs vectors {expected}, got {self.vectors.shape}")
        if self.datapath not in DATAPATHS:
            raise ValueError(f"PackedCirculant has the datapaths {', '.join(DATAPATHS)}, got {self.datapath!r}")
        if self.spectral and (self.block < 2 or self.block & (self.block - 1)):
            raise ValueError(f"PackedCirculant needs a block that is a power of two for the fft datapath, got {self.block}")
        if self.spectral and self.fmt.bits + (not self.fmt.signed) > WORD_BITS:
            raise ValueError(f"PackedCirculant needs values of at most {WORD_BITS} bits for the fft datapath, got {self.fmt}")

    @property
    def spectral(self) -> bool:
        return self.datapath == "fft"

    @property
    def spectrum_bits(self) -> int:
        """Width of a spectrum's words: k times as large as the values, at most 18 bits."""
        return word_bits(self.fmt.bits + (not self.fmt.signed), self.block)

    @property
    def spectrum_frac(self) -> int:
        return self.fmt.frac - (self.fmt.bits + (not self.fmt.signed) + self.block.bit_length() - 1 - self.spectrum_bits)

    @cached_property
    def spectrum(self) -> np.ndarray:
        """(out // k, ceil(in / k), k) words that the array holds for the fft datapath."""
        return weight_spectra(self.vectors, self.fmt.bits + (not self.fmt.signed))

    @cached_property
    def _spectral_products(self):
        return {}

    def multiplication(self, magnitude):
        if not self.spectral:
            return super().multiplication(magnitude)
        known = self._spectral_products
        if magnitude not in known:
            known[magnitude] = SpectralProduct(self.spectrum, self.shape[1], magnitude)
        return known[magnitude]

    def sum_frac(self, signal):
        if not self.spectral:
            return super().sum_frac(signal)
        return self.spectrum_frac + signal.frac + self.multiplication(signal.magnitude).more_frac

    def row_bounds(self, magnitude):
        return self.multiplication(magnitude).row_bounds if self.spectral else super().row_bounds(magnitude)

    def check_operands(self, name, signal, acc_bits):
        super().check_operands(name, signal, acc_bits)
        if not self.spectral:
            return
        largest = int(np.max(forward_bounds(signal.magnitude, self.block)))
        if largest >= 1 << (OPERAND_BITS - 1):
            raise ValueError(f"{name} needs transforms of at most {OPERAND_BITS} bits (DSP48E2), but with block {self.block} "
                             f"and {signal} they could reach {largest} ({largest.bit_length() + 1} bits)")
        if (largest := self.multiplication(signal.magnitude).sum_bound) >= 1 << (acc_bits - 1):
            raise ValueError(f"{name} needs an accumulator under {acc_bits} bits, but a sum of spectrum products could reach "
                             f"{largest} ({largest.bit_length() + 1} bits) with {self.spectrum_bits}-bit spectra and {signal}")

    @property
    def stored_values(self) -> int:
        return self.vectors.size

    def dense(self) -> np.ndarray:
        k = np.arange(self.block)
        tiles = self.vectors[:, :, (k[:, None] - k) % self.block]  # (out // k, in tiles, k, k)
        return tiles.transpose(0, 2, 1, 3).reshape(self.shape[0], -1)[:, : self.shape[1]]  # (out, in)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"values": pack_bits(self.vectors, self.fmt.bits)}

    def describe(self) -> dict:
        return {"block": self.block, "datapath": self.datapath}

    @classmethod
    def restore(cls, arrays, shape, fmt, about) -> "PackedCirculant":
        k = about["block"]
        check_whole("PackedCirculant", "block", k, 1)
        vectors = (shape[0] // k, -(-shape[1] // k), k)
        if shape[0] * vectors[1] * k > MOST_WEIGHTS:  # a few stored values can stand for many
            raise ValueError(f"load takes blocks of at most {MOST_WEIGHTS} weights, padding included, got {list(shape)} in "
                             f"circulant blocks of {k}")
        values = unpack_bits(arrays["values"], fmt.bits, int(np.prod(vectors)), fmt.signed)
        return cls(tuple(shape), fmt, k, values.reshape(vectors), about["datapath"])


@dataclass(frozen=True)
class PackedLowRank(_Stored):
    """U V, both factors stored in integers of one format. left: U (out, rank), right: V (rank, in), both int64.

    A multiplication is two, U (V x), with nothing rounded between them: the sums V x are operands of the second.
    """

    fmt: QFormat
    left: np.ndarray  # (out, rank)
    right: np.ndarray  # (rank, in)

    def __post_init__(self):
        for factor in (self.left, self.right):
            _check_values("PackedLowRank", factor, self.fmt)
        if self.left.shape[1] != self.right.shape[0] or not 1 <= self.rank <= min(self.shape):
            raise ValueError("PackedLowRank needs factors (out, rank) and (rank, in) of a rank from 1 to the smaller side, got "
                             f"{self.left.shape} and {self.right.shape}")
        if self.rank * self.fmt.magnitude**2 >= 1 << 63:
            raise ValueError(f"PackedLowRank needs products under 2**63, got rank {self.rank} and {self.fmt}")

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def frac(self) -> int:
        return 2 * self.fmt.frac

    @property
    def stored_values(self) -> int:
        return self.left.size + self.right.size

    def dense(self) -> np.ndarray:
        return self.left @ self.right

    def inner_bounds(self, magnitude: int) -> list[int]:
        """Of each sum of V x the largest magnitude that it can reach."""
        return [int(total) * magnitude for total in np.abs(self.right).sum(axis=1)]

    def inner_bits(self, magnitude: int) -> int:
        """Width in which every sum of V x fits."""
        return max(self.inner_bounds(magnitude)).bit_length() + 1

    def row_bounds(self, magnitude):
        inner = self.inner_bounds(magnitude)
        return [sum(u * bound for u, bound in zip(row, inner, strict=True)) for row in np.abs(self.left).tolist()]

    def check_operands(self, name, signal, acc_bits):
        super().check_operands(name, signal, acc_bits)
        narrow, wide = sorted((self.fmt.bits + (not self.fmt.signed), self.inner_bits(signal.magnitude)))
        if narrow > 18 or wide > 27:
            raise ValueError(f"{name} needs sums V x that multiply {self.fmt} within 18 x 27 bits (DSP48E2), but with {signal} "
                             f"they could reach {max(self.inner_bounds(signal.magnitude))} "
                             f"({self.inner_bits(signal.magnitude)} bits); fewer bits in weights or signals make room")

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"left": pack_bits(self.left, self.fmt.bits), "right": pack_bits(self.right, self.fmt.bits)}

    def describe(self) -> dict:
        return {"rank": self.rank}

    @classmethod
    def restore(cls, arrays, shape, fmt, about) -> "PackedLowRank":
        rank = about["rank"]
        check_whole("PackedLowRank", "rank", rank, 1, min(shape))
        return cls(fmt, *(unpack_bits(arrays[name], fmt.bits, sides[0] * sides[1], fmt.signed).reshape(sides)
                          for name, sides in (("left", (shape[0], rank)), ("right", (rank, shape[1])))))


FORMS = {"dense": PackedDense, "sparse": PackedSparse, "circulant": PackedCirculant, "lowrank": PackedLowRank}


@dataclass(frozen=True, repr=False)
class PackedLayer:
    """One layer and direction of an LSTM or GRU in integers.

    blocks: block name -> packed block. bias: gate -> (hidden_size,) integers at the gate's aligned fraction bits; a GRU's n is
    that of the input product, and `hn`, at the fraction bits of the recurrent product, that of the hidden product.
    signals: signals_of -> QFormat; tables: sigmoid, tanh -> activation table, of one kind.
    delta: delta thresholds in units of the last place, of those signals that weights multiply (PARTS) and that are sent only
    where they changed: an element is sent again if it moved by more than this since it was last sent (delta networks, Neil et
    al. 2017, arXiv 1612.05571). Nothing (0) is sent before the first step of a run. A signal that is not named is sent whole in
    every step.
    Refused when an operand exceeds the 18 x 27 bits of a DSP48E2, a bias exceeds 32 bits or a sum could leave acc_bits.
    """

    cell: str
    blocks: dict[str, object]
    bias: dict[str, np.ndarray]
    signals: dict[str, QFormat]
    tables: dict[str, object]
    acc_bits: int = 48
    delta: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.cell not in GATES:
            raise ValueError(f"PackedLayer holds {', '.join(GATES)} layers, got {self.cell!r}")
        if not isinstance(self.acc_bits, int) or not 2 <= self.acc_bits <= 62:  # above 62 a rounding could leave int64
            raise ValueError(f"PackedLayer needs whole acc_bits from 2 to 62, got {self.acc_bits!r}")
        if self.projected and self.cell != "LSTM":
            raise ValueError(f"PackedLayer needs an LSTM for a projection, got {self.cell!r}")
        expected = signals_of(self.cell, self.projected)
        if set(self.signals) != set(expected):
            raise ValueError(f"PackedLayer needs the signals {', '.join(expected)}, got {', '.join(self.signals)}")
        multiplied = {PARTS[part] for part, _ in self.products}
        if not isinstance(self.delta, dict) or not set(self.delta) <= multiplied:
            raise ValueError(f"PackedLayer takes delta thresholds of what its weights multiply, "
                             f"{', '.join(sorted(multiplied))}, got {self.delta!r}")
        for name, threshold in self.delta.items():
            fmt = self.signals[name]
            check_whole("PackedLayer", f"delta threshold of {name}", threshold, 0, fmt.max - fmt.min)
        for part, gate in self.products:
            what = " with differences" * (PARTS[part] in self.delta)
            block = self.block(part, gate)
            if what and self.block_name(part, gate) in self.spectral_blocks:
                raise ValueError(f"{self.block_name(part, gate)}{what} needs the datapath time: transforms round, so that sums "
                                 "of what changed are not those of the values")
            block.check_operands(self.block_name(part, gate) + what, self.operand(part), self.acc_bits)
            shape = {"ih": (self.hidden_size, self.input_size), "hh": (self.hidden_size, self.output_size),
                     "hr": (self.output_size, self.hidden_size)}[part]
            if block.shape != shape:
                raise ValueError(f"{self.block_name(part, gate)} needs shape {shape}, got {block.shape}")
        if len(self.blocks) != len(self.products):
            raise ValueError(f"PackedLayer needs {len(self.products)} blocks, got {', '.join(self.blocks)}")
        if set(self.tables) != {"sigmoid", "tanh"} or len({type(table) for table in self.tables.values()}) > 1:
            raise ValueError(f"PackedLayer needs tables of sigmoid and tanh, of one kind, got {self.tables}")
        for function, uses in table_uses(self.cell, self.signals).items():
            if self.tables[function].function != function:
                raise ValueError(f"PackedLayer needs a table of {function}, got one of {self.tables[function].function}")
            for use in uses:
                self.tables[function].check(*use)
        if self.cell == "GRU" and self.signals["sigmoid"].frac < 0:
            raise ValueError(f"PackedLayer needs gate outputs of a GRU that hold 1 - z, got {self.signals['sigmoid']}")
        if set(self.bias) != set(self.bias_fracs):
            raise ValueError(f"PackedLayer needs the biases {', '.join(self.bias_fracs)}, got {', '.join(self.bias)}")
        self._check_cell()
        for gate, bias in self.bias.items():
            if bias.shape != (self.hidden_size,):
                raise ValueError(f"the bias of gate {gate} needs shape ({self.hidden_size},), got {bias.shape}")
            _check_values(f"the bias of gate {gate}", bias, QFormat(32, 0))
        for gate, bound in self.row_bounds().items():
            if bound >= 1 << (self.acc_bits - 1):
                raise ValueError(f"gate {gate} needs an accumulator under {self.acc_bits} bits, but a row could reach "
                                 f"{bound} ({bound.bit_length() + 1} bits) with {self._formats(gate)}")

    def _formats(self, gate):
        products = [(part, g) for part, g in self.products if g == gate[-1]]
        if self.cell == "GRU" and gate[-1] == "n":  # W_hn h + b_hn is a sum of its own
            products = [("ih" if gate == "n" else "hh", "n")]
        formats = [f"{self.block_name(*p)} {self.block(*p).fmt} and {PARTS[p[0]]} {self.signals[PARTS[p[0]]]}"
                   for p in products]
        if self.cell == "GRU" and gate == "n":
            formats.append(f"sigmoid {self.signals['sigmoid']} and hidden_product {self.signals['hidden_product']}")
        return ", ".join(formats)

    def _check_cell(self):
        s = self.signals
        if self.cell == "LSTM":
            _check_product("f*c", s["sigmoid"], s["cell"])
            _check_product("i*g and o*tanh(c)", s["sigmoid"], s["tanh"])
            what, terms = "f*c + i*g", ("cell", "tanh")
        else:
            _check_product("r*(W_hn h + b_hn)", s["sigmoid"], s["hidden_product"])
            # 1 - z reaches 1 itself, one code beyond the sigmoid's own format.
            one = QFormat(min(max(s["sigmoid"].bits, s["sigmoid"].frac + 1), 32), s["sigmoid"].frac, signed=False)
            _check_product("(1 - z)*n and z*h", one, s["hidden"])
            what, terms = "(1 - z)*n + z*h", ("hidden",)
        frac = max(s[name].frac for name in terms)
        # An LSTM's f and i may both be at their largest; a GRU's weights z and 1 - z add up to 1.
        weight = s["sigmoid"].magnitude if self.cell == "LSTM" else self.one + 2 * s["sigmoid"].magnitude
        bound = weight * sum(s[name].magnitude << (frac - s[name].frac) for name in terms)
        if bound >= 1 << (self.acc_bits - 1):
            formats = " and ".join(f"{name} {s[name]}" for name in terms)
            raise ValueError(f"{what} needs an accumulator under {self.acc_bits} bits, but could reach {bound} "
                             f"({bound.bit_length() + 1} bits) with {formats}")

    @classmethod
    def from_float_bias(cls, cell, blocks, bias, signals, tables, acc_bits=48, delta=None) -> "PackedLayer":
        """bias: gate -> (hidden_size,) floats, stored in 32 bits at the gate's aligned fraction bits or refused. delta: signal
        -> threshold in real units. Integers move by whole units, so cutting its fraction off changes nothing."""
        units = {name: math.floor(math.ldexp(min(threshold, 2.0**64), signals[name].frac)) if name in signals else threshold
                 for name, threshold in (delta or {}).items()}
        layer = cls(cell, blocks, {gate: np.zeros(len(b), dtype=np.int64) for gate, b in bias.items()}, signals, tables,
                    acc_bits, units)
        integers = {}
        for gate, values in bias.items():
            if not np.isfinite(values).all():
                raise ValueError(f"the bias of gate {gate} needs finite values, got {int((~np.isfinite(values)).sum())} "
                                 "that are not")
            frac = layer.bias_fracs[gate]
            if np.abs(np.ldexp(values, frac)).max(initial=0) >= (1 << 31) - 1:
                raise ValueError(f"the bias of gate {gate} needs 32 bits at {frac} fraction bits, got {np.abs(values).max()}"
                                 "; fewer fraction bits in weights or signals make room")
            integers[gate] = QFormat(32, frac).quantise(values)
        return replace(layer, bias=integers)

    @cached_property
    def _names(self) -> dict[tuple[str, str], str]:
        # "lstm.weight_ih_l0.i" -> ("ih", "i")
        return {(name.rsplit(".", 2)[-2].split("_")[1], name.rsplit(".", 1)[1]): name for name in self.blocks}

    @property
    def gates(self) -> tuple[str, ...]:
        return GATES[self.cell]

    @property
    def projected(self) -> bool:
        return ("hr", "p") in self._names

    @property
    def products(self) -> tuple[tuple[str, str], ...]:
        """(part, gate) of every block: those of the input, the recurrent ones, the projection."""
        return tuple((part, gate) for part in ("ih", "hh") for gate in self.gates) + (("hr", "p"),) * self.projected

    def block_name(self, part: str, gate: str) -> str:
        if (part, gate) not in self._names:
            raise ValueError(f"PackedLayer has the blocks {', '.join(self.blocks)}, none of part {part!r}, gate {gate!r}")
        return self._names[part, gate]

    def block(self, part: str, gate: str):
        """part: "ih", "hh" or "hr"."""
        return self.blocks[self.block_name(part, gate)]

    @property
    def spectral_blocks(self) -> list[str]:
        """Names of the circulant blocks on the fft datapath."""
        return [name for name, block in self.blocks.items() if isinstance(block, PackedCirculant) and block.spectral]

    def __repr__(self):
        bits = sum(block.storage_bits for block in self.blocks.values())
        return f"<PackedLayer, {self.cell}, {self.input_size} to {self.output_size}: {bits // 8:,} bytes of matrices>"

    @property
    def input_size(self) -> int:
        return self.block("ih", self.gates[0]).shape[1]

    @property
    def hidden_size(self) -> int:
        """Units of the cell."""
        return self.block("hh", self.gates[0]).shape[0]

    @property
    def output_size(self) -> int:
        """Width of h: hidden_size, or that of the projection."""
        return self.block("hh", self.gates[0]).shape[1]

    @property
    def one(self) -> int:
        """The integer 1.0 of the gate outputs' format, from which a GRU subtracts z."""
        return 1 << self.signals["sigmoid"].frac

    @property
    def table_kind(self) -> str:
        """Kind of its activation tables."""
        return next(kind for kind, cls in TABLES.items() if isinstance(self.tables["sigmoid"], cls))

    def operand(self, part: str) -> QFormat:
        """What the weights of a part multiply: its signal, or with a delta threshold the difference of two of its values."""
        fmt = self.signals[PARTS[part]]
        return QFormat(min(fmt.bits + 1, 32), fmt.frac) if PARTS[part] in self.delta else fmt

    def product_frac(self, part: str, gate: str) -> int:
        """Fraction bits of the products of a block."""
        return self.block(part, gate).sum_frac(self.signals[PARTS[part]])

    def alignment(self, gate: str) -> tuple[int, int, int]:
        """(F, left shift of the W_ih sum, left shift of the other term): F = the larger fraction of the two. The other term is
        the W_hh sum, or for the n of a GRU r * (W_hn h + b_hn)."""
        ih, other = self.product_frac("ih", gate), self.product_frac("hh", gate)
        if self.cell == "GRU" and gate == "n":
            other = self.signals["sigmoid"].frac + self.signals["hidden_product"].frac
        frac = max(ih, other)
        return frac, frac - ih, frac - other

    @property
    def bias_fracs(self) -> dict[str, int]:
        """Bias -> its fraction bits."""
        fracs = {gate: self.alignment(gate)[0] for gate in self.gates}
        return fracs | ({"hn": self.product_frac("hh", "n")} if self.cell == "GRU" else {})

    def _row_sums(self, part, gate, shift=0, bias=None) -> list[int]:
        sums = self.block(part, gate).row_bounds(self.operand(part).magnitude)
        biases = [0] * len(sums) if bias is None else [int(b) for b in np.abs(self.bias[bias])]
        return [b + (s << shift) for b, s in zip(biases, sums, strict=True)]

    def row_bounds(self) -> dict[str, int]:
        """Sum -> the largest magnitude that any of its rows can reach, aligned and bias included (exact Python integers)."""
        bounds = {}
        for gate in self.gates:
            _, ih, other = self.alignment(gate)
            if self.cell == "GRU" and gate == "n":
                bounds["hn"] = max(self._row_sums("hh", "n", bias="hn"))
                product = (self.signals["sigmoid"].magnitude * self.signals["hidden_product"].magnitude) << other
                bounds["n"] = max(self._row_sums("ih", "n", ih, "n")) + product
            else:
                rows = zip(self._row_sums("ih", gate, ih, gate), self._row_sums("hh", gate, other), strict=True)
                bounds[gate] = max(map(sum, rows))
        return bounds | ({"p": max(self._row_sums("hr", "p"))} if self.projected else {})


def _layer_place(name: str) -> tuple[str, int, bool]:
    """ "lstm.l1_reverse" -> ("lstm", 1, True)."""
    path, _, suffix = name.rpartition(".")
    found = re.fullmatch(r"l(\d+)(_reverse)?", suffix)
    if not found:
        raise ValueError(f'PackedModel needs layer names like "lstm.l0" or "lstm.l1_reverse", got {name!r}')
    return path, int(found[1]), bool(found[2])


@dataclass(frozen=True, repr=False)
class PackedModel:
    """All packed layers of a model. layers: layer name ("lstm.l0") -> PackedLayer.

    rnn_bias_params (b_ih and b_hh merged) and other_params: numbers of parameters outside the RNN weight matrices,
    reported apart from the ratios and never hidden.
    """

    layers: dict[str, PackedLayer]
    rnn_bias_params: int
    other_params: int
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("rnn_bias_params", "other_params"):
            check_whole("PackedModel", name, getattr(self, name), 0)
        original = self.metadata.get("original", [0, 0])
        if not isinstance(original, (list, tuple)) or len(original) != 2:
            raise ValueError(f"PackedModel needs as original the numbers of weights and other parameters, got {original!r}")
        for what, count in zip(("weights", "other parameters"), original, strict=True):
            check_whole("PackedModel", f"number of original {what}", count, 0)
        for name, layer in self.layers.items():
            path, index, reverse = _layer_place(name)
            start, suffix = f"{path}." * bool(path), f"l{index}{'_reverse' * reverse}"
            expected = {f"{start}weight_{part}_{suffix}.{gate}" for part, gate in layer.products}
            if set(layer.blocks) != expected:
                raise ValueError(f"PackedModel needs in layer {name} the blocks {', '.join(sorted(expected))}, got "
                                 f"{', '.join(layer.blocks)}")
        for path in self.paths:
            if len(cells := {layer.cell for directions in self.stack(path) for layer in directions}) > 1:
                raise ValueError(f"PackedModel needs one kind of cell in {path!r}, got {' and '.join(sorted(cells))}")
            # Below the first layer and above the last the directions must agree too: they have one input and one output.
            for below, above in itertools.pairwise([(), *self.stack(path), ()]):
                width = sum(layer.output_size for layer in below)
                formats = {layer.signals["hidden"] for layer in below} | {layer.signals["input"] for layer in above}
                if len(formats) > 1 or (below and any(layer.input_size != width for layer in above)):
                    raise ValueError(
                        f"PackedModel rounds nothing between the layers of {path!r}: the hidden formats of one layer and the "
                        f"input formats of the next must be the same, got {', '.join(map(str, formats))}; {width} values pass, "
                        f"{' and '.join(str(layer.input_size) for layer in above)} are taken")

    def __repr__(self):
        return (f"<PackedModel of {', '.join(self.layers)}: {self.storage_bits // 8:,} bytes of matrices, cr_disk "
                f"{self.cr_disk:.4g}, cr_model {self.cr_model:.4g}>")

    @property
    def paths(self) -> list[str]:
        """Paths of the recurrent modules."""
        return list(dict.fromkeys(_layer_place(name)[0] for name in self.layers))

    def stack(self, path: str) -> list[tuple[PackedLayer, ...]]:
        """The layers of one recurrent module from the first on, each (forward,) or (forward, reverse)."""
        places = {_layer_place(name): layer for name, layer in self.layers.items()}
        mine = [place for place in places if place[0] == path]
        if not mine:
            raise ValueError(f"PackedModel has the recurrent modules {', '.join(map(repr, self.paths))}, none at {path!r}")
        indices, directions = sorted({place[1] for place in mine}), sorted({place[2] for place in mine})
        whole = [(path, index, reverse) for index in range(len(indices)) for reverse in range(len(directions))]
        if sorted(mine) != whole:
            raise ValueError(f"PackedModel needs every layer and direction of {path!r}, got {', '.join(self.layers)}")
        return [tuple(places[path, index, reverse] for reverse in directions) for index in indices]

    @property
    def blocks(self) -> dict[str, object]:
        return {name: block for layer in self.layers.values() for name, block in layer.blocks.items()}

    def _sum(self, count) -> int:
        return sum(count(block) for block in self.blocks.values())

    @property
    def dense_weights(self) -> int:
        return self._sum(lambda b: b.shape[0] * b.shape[1])

    def with_original(self, weights: int, others: int) -> "PackedModel":
        """The same, its ratios counted from a larger model (of which whole units were removed): RNN weights, all others."""
        return replace(self, metadata=self.metadata | {"original": [weights, others]})

    @property
    def counted_weights(self) -> int:
        """Weights that the ratios start from: dense_weights, or those of the original."""
        return self.metadata.get("original", [self.dense_weights])[0]

    @property
    def stored_values(self) -> int:
        return self._sum(lambda b: b.stored_values)

    @property
    def value_bits(self) -> int:
        return self._sum(lambda b: b.value_bits)

    @property
    def mean_bits(self) -> float:
        """Width of a stored value, in the mean; 0 where none is stored."""
        return self.value_bits / self.stored_values if self.stored_values else 0.0

    @property
    def index_bits(self) -> int:
        return self._sum(lambda b: b.index_bits)

    @property
    def storage_bits(self) -> int:
        return self._sum(lambda b: b.storage_bits)

    @property
    def cr_params(self) -> float:
        """Dense weights / stored values."""
        return _ratio(self.counted_weights, self.stored_values)

    @property
    def cr_bits(self) -> float:
        """32 * dense weights / value bits."""
        return _ratio(32 * self.counted_weights, self.value_bits)

    @property
    def cr_disk(self) -> float:
        """32 * dense weights / every bit written for the RNN weight matrices."""
        return _ratio(32 * self.counted_weights, self.storage_bits)

    @property
    def cr_model(self) -> float:
        """The whole model: biases and all other parameters stay at 32 bits."""
        rest = self.rnn_bias_params + self.other_params
        _, before = self.metadata.get("original", [None, rest])
        return _ratio(32 * (self.counted_weights + before), self.storage_bits + 32 * rest)

    def table(self) -> list[dict]:
        """One row a block, for the eye: how it is stored, number format, stored values, bits on disk, its own ratio."""
        return [{"block": name, "shape": "x".join(map(str, block.shape)), "stored as": _form_text(block),
                 "bits": block.fmt.bits, "frac": block.fmt.frac, "stored values": block.stored_values,
                 "value bits": block.value_bits, "index bits": block.index_bits, "cr_disk": block.cr_disk}
                for name, block in self.blocks.items()]

    def save(self, path) -> Path:
        """Write one file (see container.py): bit-packed payload and a JSON manifest."""
        tensors, layers = {}, {}
        for layer_name, layer in self.layers.items():
            about = {}
            for name, block in layer.blocks.items():
                tensors |= {f"{name}/{key}": array for key, array in block.arrays.items()}
                about[name] = {"form": _form(block), "shape": list(block.shape), "format": block.fmt.to_json(),
                               **block.describe()}
            tensors |= {f"{layer_name}.bias/{gate}": b.astype(np.int32) for gate, b in layer.bias.items()}
            kind = layer.table_kind
            tables = {name: {"kind": kind} | table.describe() for name, table in layer.tables.items()}
            tensors |= {f"{layer_name}.table.{name}/{key}": array for name, table in layer.tables.items()
                        for key, array in table.arrays.items()}
            layers[layer_name] = {
                "cell": layer.cell, "acc_bits": layer.acc_bits, "blocks": about, "tables": tables,
                "signals": {name: fmt.to_json() for name, fmt in layer.signals.items()}, "delta": layer.delta,
            }
        about = {"layers": layers, "rnn_bias_params": self.rnn_bias_params, "other_params": self.other_params,
                 "metadata": self.metadata}
        return write_tensors(path, tensors, who="PackedModel.save", what=FILE_KIND, version=FILE_VERSION, about=about)


def _form(block) -> str:
    return next(form for form, cls in FORMS.items() if isinstance(block, cls))


def _form_text(block) -> str:
    """A stored form and what it is described by: "circulant, block 8, datapath time"."""
    sparse = isinstance(block, PackedSparse)
    fields = asdict(block.encoding) if sparse else block.describe()
    names = [_form(block), type(block.encoding).__name__] if sparse else [_form(block)]
    return ", ".join(names + [f"{key} {value}" for key, value in fields.items()])


def load(path) -> PackedModel:
    """Read a packed model. A missing, truncated, damaged or foreign file raises ValueError that says which."""
    manifest, tensors = read_tensors(path, who="load", what=FILE_KIND, version=FILE_VERSION, older=OLDER_VERSIONS)
    try:
        layers = {name: _restore_layer(name, about, tensors) for name, about in manifest["layers"].items()}
        return PackedModel(layers, manifest["rnn_bias_params"], manifest["other_params"], manifest["metadata"])
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"load found a packed model with a broken manifest in {path}: {error!r}") from error


def _restore_layer(layer_name, about, tensors) -> PackedLayer:
    blocks = {}
    for name, block in about["blocks"].items():
        fmt = QFormat.from_json(block["format"])
        for side in block["shape"]:
            check_whole(f"block {name}", "size", side, 1)
        if len(block["shape"]) != 2 or math.prod(block["shape"]) > MOST_WEIGHTS:
            raise ValueError(f"load takes blocks of two sides and at most {MOST_WEIGHTS} weights, got {block['shape']} of "
                             f"{name}")
        blocks[name] = FORMS[block["form"]].restore(_arrays(tensors, name), tuple(block["shape"]), fmt, block)
    kinds = {name: TABLES[table["kind"]] for name, table in about["tables"].items()}
    tables = {name: kind.restore(name, _arrays(tensors, f"{layer_name}.table.{name}"), about["tables"][name])
              for name, kind in kinds.items()}
    bias = {gate: array.astype(np.int64) for gate, array in _arrays(tensors, f"{layer_name}.bias").items()}
    signals = {name: QFormat.from_json(fmt) for name, fmt in about["signals"].items()}
    return PackedLayer(about["cell"], blocks, bias, signals, tables, about["acc_bits"], about["delta"])


def _arrays(tensors, name):
    """What is stored under name/: key -> array."""
    return {key.removeprefix(f"{name}/"): array for key, array in tensors.items() if key.startswith(f"{name}/")}
