"""Which PE stores and computes what, and in which order: blocks -> words per PE, a layer -> one step's program.

Nothing here knows a cycle; schedule.py says when, interpreter.py executes literally.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise, product, zip_longest
from typing import NamedTuple

import numpy as np

from workbench.array.spec import DSP_BITS, GROUP, ArraySpec, ceil_div
from workbench.checks import check_whole, plain_numbers
from workbench.fixedpoint import ExactMatrix, QFormat
from workbench.packed import PARTS, PackedCirculant, PackedDense, PackedLayer, PackedLowRank, PackedSparse
from workbench.spectrum import OPERAND_BITS, TWIDDLE_BITS, SpectralProduct, real_operations

STREAM_SHARES = (2, 4, 8, 16, 32, 64)  # one half of the streaming double buffer takes 1/n of the weight memory
COPIES = {"ih": 2, "hh": 1, "hr": 1}  # of the vector that a part multiplies, in a PE's data memory: x comes one step ahead


@dataclass(frozen=True)
class Region:
    """A rectangle of whole 4 x 4 groups: first PE row and column, height and width in PEs."""

    row: int
    col: int
    rows: int
    cols: int

    def __post_init__(self):
        plain_numbers(self)
        sides = (self.row, self.col, self.rows, self.cols)
        if any(side % GROUP for side in sides) or min(sides) < 0 or min(self.rows, self.cols) < GROUP:
            raise ValueError(f"{self} needs whole groups of {GROUP} x {GROUP} PEs")

    @property
    def window(self) -> tuple[slice, slice]:
        """Its place in an array of the grid's shape (rows, cols)."""
        return slice(self.row, self.row + self.rows), slice(self.col, self.col + self.cols)


@dataclass(frozen=True)
class Layout:
    """One region for all blocks, or two side by side: sparse blocks in the first, the others in the second.

    stream_words: memory words of one half of the streaming double buffer in each PE of a region whose weights do not
    fit; 0: everything must be resident. split_tiles: circulant tiles may be cut into pieces for several PEs, which
    balances the load and stores some weights more than once (see tile_unit).
    """

    regions: tuple[Region, ...]
    stream_words: int = 0
    split_tiles: bool = False

    def __post_init__(self):
        plain_numbers(self)
        if len(self.regions) not in (1, 2):
            raise ValueError(f"Layout needs one region or two, got {len(self.regions)}")
        if self.stream_words < 0:
            raise ValueError(f"Layout needs stream_words of at least 0, got {self.stream_words}")

    def region_of(self, packed) -> int:
        """Number of the region that takes a packed block."""
        return 0 if len(self.regions) == 1 or isinstance(packed, PackedSparse) else 1

    @property
    def name(self) -> str:
        parts = zip(("all",) if len(self.regions) == 1 else ("sparse", "others"), self.regions, strict=True)
        notes = [", split tiles"] * self.split_tiles + [f", streaming {self.stream_words} words"] * (self.stream_words > 0)
        return " + ".join(f"{what} on {r.rows}x{r.cols}" for what, r in parts) + "".join(notes)


@dataclass(frozen=True)
class _Words:
    """A block as stored words, before they have a place. A word feeds up to m multiply-accumulates."""

    values: np.ndarray  # (words,)
    rows: np.ndarray  # (words, m) block rows that its products add to
    cols: np.ndarray  # (words, m) block columns that it multiplies; from `in` on they are padding zeros
    used: np.ndarray  # (words, m) bool: which of the m there are
    padding: np.ndarray  # (words,) multiply-accumulates that only padding causes
    first_row: np.ndarray  # (words,) of the unit x unit piece that the word belongs to
    first_col: np.ndarray  # (words,)
    word_bits: int


def _single(values, rows, cols, padding, word_bits):
    """Words that feed one multiply-accumulate each."""
    used = np.ones((values.size, 1), dtype=bool)
    return _Words(values, rows[:, None], cols[:, None], used, padding, rows, cols, word_bits)


def _dense_words(packed, pe_cols, unit):
    rows, cols = np.indices(packed.shape).reshape(2, -1)
    return _single(packed.values.ravel(), rows, cols, np.zeros(rows.size, dtype=np.int64), packed.fmt.bits)


def _sparse_words(packed, pe_cols, unit):
    """A word is a value, its local column and an end-of-row flag, so a PE's row without weights costs a padding word."""
    rows, columns = packed.shape
    empty = np.ones((rows, min(pe_cols, columns)), dtype=bool)  # (row, PE column that has any column)
    empty[packed.rows, packed.cols % pe_cols] = False
    pad_rows, pad_cols = np.nonzero(empty)  # the first column of PE column c is column c
    values = np.concatenate([packed.values, np.zeros(pad_rows.size, dtype=np.int64)])
    index_bits = (ceil_div(columns, pe_cols) - 1).bit_length()
    return _single(values, np.concatenate([packed.rows, pad_rows]), np.concatenate([packed.cols, pad_cols]),
                   np.repeat([0, 1], [packed.values.size, pad_rows.size]), packed.fmt.bits + index_bits + 1)


def _circulant_words(packed, pe_cols, unit):
    """Pieces of unit x unit: each diagonal is one word, read once and multiplied with its inputs in turn. A whole tile
    (unit = k) has k wrapped diagonals, a smaller piece 2 * unit - 1, so that pieces of a tile hold some weights twice."""
    k, columns = packed.block, packed.shape[1]
    diagonals, i = _diagonals(k, unit)
    pieces = np.arange(packed.shape[0] // unit), np.arange(ceil_div(columns, unit))
    piece_row, piece_col, n = (axis.ravel() for axis in np.meshgrid(*pieces, np.arange(diagonals.size), indexing="ij"))
    first_row, first_col = piece_row * unit, piece_col * unit
    used = (i < unit)[n]
    cols = first_col[:, None] + np.arange(unit)
    values = packed.vectors[first_row // k, first_col // k, (first_row - first_col + diagonals[n]) % k]
    return _Words(values, first_row[:, None] + np.where(i < unit, i, 0)[n], cols, used, (used & (cols >= columns)).sum(axis=1),
                  first_row, first_col, packed.fmt.bits)


def _diagonals(k, unit):
    """Numbers of a piece's diagonals (n,), and (n, unit) the row in which each meets the columns of the piece; from `unit`
    on there is none."""
    diagonals = np.arange(k) if unit == k else np.arange(1 - unit, unit)
    return diagonals, (np.arange(unit) + diagonals[:, None]) % k


def _spectral_words(packed, pe_cols, unit):
    """Whole tiles of the fft datapath: a word of a bin's real or imaginary part multiplies both parts of the inputs' bin, those
    of the bins 0 and k/2 the real one only. Rows and columns are those of the spectra's words; a tile's are its own."""
    k, bins = packed.block, packed.block // 2 + 1
    rows, cols, word = (axis.ravel() for axis in np.indices(packed.spectrum.shape))
    real = word < bins
    other = np.where(real, word + bins - 1, word - bins + 1)  # the bin's other part
    used = np.stack([np.ones(word.size, dtype=bool), (word % (bins - 1) != 0) | ~real], axis=1)
    other = np.where(used[:, 1], other, word)
    # Real with real to real, then with imaginary to imaginary; imaginary with imaginary to real, then with real to imaginary.
    to = np.stack([np.where(real, word, other), np.where(real, other, word)], axis=1)
    times = np.stack([word, other], axis=1)
    return _Words(packed.spectrum.ravel(), rows[:, None] * k + to, cols[:, None] * k + times, used,
                  np.zeros(word.size, dtype=np.int64), rows * k, cols * k, packed.spectrum_bits)


FORMS = {PackedDense: _dense_words, PackedSparse: _sparse_words, PackedCirculant: _circulant_words}


def is_spectral(packed) -> bool:
    """Whether a block is multiplied in the frequency domain."""
    return isinstance(packed, PackedCirculant) and packed.spectral


def _stored_words(packed, pe_cols, unit):
    if type(packed) not in FORMS:
        raise ValueError(f"the array maps {', '.join(form.__name__ for form in FORMS)} so far, got {type(packed).__name__}")
    return (_spectral_words if is_spectral(packed) else FORMS[type(packed)])(packed, pe_cols, unit)


def _alike(packed) -> bool:
    """Whether a block is cut into pieces of unit x unit with alike words; a dense block's pieces are its weights."""
    return isinstance(packed, PackedDense) or (isinstance(packed, PackedCirculant) and packed.datapath == "time")


def _unit_loads(packed, pe_cols, unit):
    """(units, pe_cols): multiply-accumulates of each unit of rows in each PE column."""
    if _alike(packed):
        return np.tile(unit * unit * _dealt(ceil_div(packed.shape[1], unit), pe_cols), (packed.shape[0] // unit, 1))
    words, units = _stored_words(packed, pe_cols, unit), ceil_div(packed.shape[0], unit)
    place = words.first_row // unit * pe_cols + words.first_col // unit % pe_cols
    loads = np.bincount(place, weights=words.used.sum(axis=1), minlength=units * pe_cols)
    return loads.astype(np.int64).reshape(units, pe_cols)


def tile_unit(packed, region: Region, acc_depth: int, split_tiles: bool) -> int:
    """Rows and columns of a block that stay together on one PE: 1, or of a circulant tile the largest divisor that the
    accumulators hold; with split_tiles the divisor with the fewest multiply-accumulates plus words in the fullest PE."""
    if not isinstance(packed, PackedCirculant):
        return 1
    k, (rows, cols) = packed.block, packed.shape
    if packed.spectral:
        if k > acc_depth:
            raise ValueError(f"a tile of the fft datapath needs {k} accumulators of one PE, the array has {acc_depth} "
                             "(acc_depth)")
        return k
    units = [u for u in range(min(k, acc_depth), 0, -1) if k % u == 0]

    def fullest_pe(unit):
        words = k if unit == k else 2 * unit - 1
        return _pieces_of_fullest_pe(rows, cols, unit, region) * (unit * unit + words)

    return min(units, key=fullest_pe) if split_tiles else units[0]


def _pieces_of_fullest_pe(rows, cols, unit, region):
    return ceil_div(ceil_div(rows, unit), region.rows) * ceil_div(ceil_div(cols, unit), region.cols)


def place_units(loads, pe_rows: int, depth: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Greedy placement: loads (units, n) -> PE row of each unit and its number there, both (units,).

    The n loads of a unit are those to be even over the PE rows each for itself: one a PE column, and where blocks share
    accumulators one a block and PE column. depth: units that the accumulators of a PE hold (None: all); so many are a pass,
    with a barrier at its end, so each pass is to have its share of every load. Heaviest unit first, to the PE row and pass
    with room where it adds least to the sum of the squares of what the loads are above their shares (ties: the first).
    Equal loads are dealt in turn; every PE row gets as many units as that gives it.
    """
    units = len(loads)
    if (loads == loads[0]).all():
        return np.arange(units) % pe_rows, np.arange(units) // pe_rows
    counts = units // pe_rows + (np.arange(pe_rows) < units % pe_rows)
    lows = np.arange(0, counts[0], depth or units)  # of the passes
    room = np.clip(counts - lows[:, None], 0, depth).ravel()  # (passes * pe_rows,)
    share = np.repeat(room[::pe_rows], pe_rows)  # the same for all PE rows, also for those with a unit less
    above = -np.outer(share, loads.sum(axis=0))  # times `units`, so that all is whole
    place = np.empty(units, dtype=np.int64)
    never = np.iinfo(np.int64).max
    for unit in np.argsort(-loads.sum(axis=1), kind="stable").tolist():
        best = np.argmin(np.where(room > 0, above @ loads[unit], never))
        place[unit] = best
        above[best] += units * loads[unit]
        room[best] -= 1
    pe_row = place % pe_rows
    return pe_row, _number(pe_row, place)


def _number(pe_row, order=0):
    """(units,) numbers from 0 on in each PE row, by `order`, then as the units come."""
    sorted_units = np.lexsort((np.broadcast_to(order, pe_row.shape), pe_row))  # stable
    local = np.empty_like(pe_row)
    local[sorted_units] = np.arange(pe_row.size) - np.searchsorted(pe_row[sorted_units], pe_row[sorted_units])
    return local


class PlacedWords(NamedTuple):
    """All words of a block, ordered by PE, then by the order in which the PE uses them; each feeds up to m
    multiply-accumulates."""

    pe: np.ndarray  # (words,) pe_row * pe_cols + pe_col
    local_row: np.ndarray  # (words,) the first local row of the word's unit
    values: np.ndarray  # (words,)
    rows: np.ndarray  # (words, m) block rows
    cols: np.ndarray  # (words, m) block columns, padding included
    used: np.ndarray  # (words, m) bool: which of the m there are
    padding: np.ndarray  # (words,) multiply-accumulates that only padding causes
    word_bits: int


def _of_words(name):
    return property(lambda block: getattr(block.words, name), doc=f"{name} of PlacedWords")


@dataclass(frozen=True)
class BlockMapping:
    """The words of one block in the PEs of one region, ordered by PE, then by the order in which the PE uses them.

    Lists of words are written out when they are asked for; how many words, multiply-accumulates and so on lie in a part of
    each list is read off sums along the lists (_WrittenLists), in closed form where all pieces of a block are alike
    (_PieceLists).
    Time of the block alone = multiply-accumulates of the fullest PE + mac_latency + local rows + (pe_cols - 1) * link_cycles.
    """

    packed: object
    pe_rows: int
    pe_cols: int
    unit: int  # rows and columns that stay together on one PE
    pe_row_of_row: np.ndarray  # (out,)
    local_of_row: np.ndarray  # (out,) accumulator number within the PE row

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def fmt(self) -> QFormat:
        return self.packed.fmt

    @property
    def word_bits(self) -> int:
        """Of a value, and for sparse words local column and end-of-row flag."""
        return self._lists.word_bits

    @cached_property
    def _lists(self):
        return _PieceLists(self) if _alike(self.packed) else _WrittenLists(self)

    def written_out(self) -> PlacedWords:
        """Every word with its place, anew (a large block's words take much memory; `words` keeps them)."""
        words = _stored_words(self.packed, self.pe_cols, self.unit)
        pe = self.pe_row_of_row[words.first_row] * self.pe_cols + words.first_col // self.unit % self.pe_cols
        local_row = self.local_of_row[words.first_row]
        place = (pe * self.shape[0] + local_row) * self.shape[1] + words.first_col  # of single words each once
        order = np.argsort(place, kind="stable" if self.unit > 1 else None)
        return PlacedWords(pe[order], local_row[order], words.values[order], words.rows[order], words.cols[order],
                           words.used[order], words.padding[order], words.word_bits)

    @cached_property
    def words(self) -> PlacedWords:
        return self.written_out()

    pe, local_row, values, rows, cols, used, padding = map(_of_words, PlacedWords._fields[:-1])

    @cached_property
    def weight_words(self) -> np.ndarray:
        """(pe_rows, pe_cols) words stored in each PE, padding words included."""
        return self.words_between(0, self.shape[0])

    @cached_property
    def macs(self) -> np.ndarray:
        """(pe_rows, pe_cols) multiply-accumulates of each PE, those of padding included."""
        all_words = np.array([int(self.weight_words.max())])
        return self.slice_counts(0, self.shape[0], 0 * all_words, all_words)[1].reshape(self.pe_rows, self.pe_cols)

    @cached_property
    def local_rows(self) -> np.ndarray:
        """(pe_rows,) rows accumulated in each PE row."""
        return np.bincount(self.pe_row_of_row, minlength=self.pe_rows)

    def rows_between(self, low: int, high: int) -> int:
        """Rows of all PE rows that have the local numbers [low, high)."""
        return int(np.clip(self.local_rows - low, 0, high - low).sum())

    @property
    def on_chip_bits(self) -> int:
        """Bits of the words that the array stores, padding words included."""
        return int(self.weight_words.sum()) * self.word_bits

    def dense(self) -> np.ndarray:
        """(out, in) int64 rebuilt from the mapped words, so that a lost or doubled word shows."""
        words = self.written_out()
        out = np.zeros((self.shape[0], max(self.shape[1], int(words.cols.max()) + 1)), dtype=np.int64)
        np.add.at(out, (words.rows, words.cols), words.values[:, None] * words.used)
        return out[:, : self.shape[1]]

    def spectrum(self) -> np.ndarray:
        """(out // k, ceil(in / k), k) words of a block of the fft datapath, rebuilt likewise."""
        words, out = self.written_out(), np.zeros(self.packed.spectrum.shape, dtype=np.int64)
        (tile_row, _), (tile_col, word) = (np.divmod(places[:, 0], self.unit) for places in (words.rows, words.cols))
        np.add.at(out, (tile_row, tile_col, word), words.values)
        return out

    def data_columns(self) -> np.ndarray:
        """(pe_cols, columns) bool: the inputs that each PE column keeps, padding zeros included."""
        columns = ceil_div(self.shape[1], self.unit) * self.unit
        return (np.arange(columns) // self.unit % self.pe_cols) == np.arange(self.pe_cols)[:, None]

    def words_between(self, low: int, high: int) -> np.ndarray:
        """(pe_rows, pe_cols) words for the local rows [low, high)."""
        return self._lists.count(low, high).reshape(self.pe_rows, self.pe_cols)

    def slice_counts(self, low: int, high: int, first, end) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the slices [first, end), both (n,), of each PE's list for the local rows [low, high): words and
        multiply-accumulates, both (n, PEs), the multiply-accumulates that only padding causes (n,), and the runs of
        multiply-accumulates of one PE on one row (n,)."""
        count = self._lists.count(low, high)
        first, end = (np.minimum(bound[:, None], count) for bound in (first, end))
        macs, padding, runs = self._lists.sums(low, first, end)
        return end - first, macs, padding.sum(axis=1), runs.sum(axis=1)


class _WrittenLists:
    """Sums along the lists of all PEs, one behind the other."""

    def __init__(self, block):
        words = block.written_out()
        self.word_bits, self.rows, self.pes = words.word_bits, block.shape[0], np.arange(block.pe_rows * block.pe_cols)
        self.place = words.pe * self.rows + words.local_row  # ascending
        macs = words.used.sum(axis=1)
        self.macs, self.padding = (_running(values) for values in (macs, words.padding))
        row, pe = words.rows[words.used], np.repeat(words.pe, macs)
        turns = np.cumsum(np.concatenate([[0, 0], (np.diff(row) != 0) | (np.diff(pe) != 0)]))  # to a row, until each
        self.turns, self.turned = turns[self.macs], turns[np.minimum(self.macs + 1, row.size)]

    def _begin(self, local_row):
        return np.searchsorted(self.place, self.pes * self.rows + local_row)

    def count(self, low, high):
        """(PEs,) words for the local rows [low, high)."""
        return self._begin(min(high, self.rows)) - self._begin(low)

    def sums(self, low, first, end):
        """first, end: (n, PEs) places in each PE's list from local row `low` on. Multiply-accumulates, those of padding and
        runs on a row, all (n, PEs)."""
        first, end = self._begin(low) + first, self._begin(low) + end
        macs = self.macs[end] - self.macs[first]
        return macs, self.padding[end] - self.padding[first], (macs > 0) * (1 + self.turns[end] - self.turned[first])


class _PieceLists:
    """The same in closed form where a block is cut into pieces of unit x unit with alike words (one word where it is dense):
    a PE takes its pieces of a row of pieces one after the other, then those of its next row."""

    def __init__(self, block):
        packed, unit, pieces = block.packed, block.unit, ceil_div(block.shape[1], block.unit)
        row = _diagonals(packed.block, unit)[1] if isinstance(packed, PackedCirculant) else np.zeros((1, 1), dtype=np.int64)
        used = row < unit
        rows = [row[word, of_word] for word, of_word in enumerate(used)]  # of each word, in the order of its products
        turned = [word > 0 and rows[word][0] != rows[word - 1][-1] for word in range(len(rows))]
        self.word_bits, self.unit, self.local_rows = block.fmt.bits, unit, block.local_rows
        self.pieces = np.tile(_dealt(pieces, block.pe_cols), block.pe_rows)  # (PEs,) in a row of pieces
        self.last = np.arange(self.pieces.size) % block.pe_cols == (pieces - 1) % block.pe_cols  # PEs with the last of a row
        # Of a piece's words: multiply-accumulates, those of padding in the last piece of a row, turns to another row.
        self.macs = _running(used.sum(axis=1))
        self.padding = _running(used[:, block.shape[1] - (pieces - 1) * unit :].sum(axis=1))
        self.turns = _running(used.sum(axis=1) - 1 + turned)
        self.turned, self.turned_again = np.array(turned), rows[0][0] != rows[-1][-1]  # at the next piece of the same row

    def count(self, low, high):
        rows = np.clip(self.local_rows - low, 0, high - low) // self.unit
        return np.repeat(rows, self.pieces.size // rows.size) * self.pieces * self.turned.size

    def sums(self, low, first, end):
        across = np.maximum(self.pieces, 1)

        def place(at):
            piece, word = np.divmod(at, self.turned.size)
            return piece, word, *np.divmod(piece, across)

        def until(at):
            piece, word, rows, in_row = place(at)
            begun = piece + (word > 0)
            turns = np.where(self.turned_again, begun, -(-begun // across))
            return (piece * self.macs[-1] + self.macs[word],
                    self.last * (rows * self.padding[-1] + (in_row == across - 1) * self.padding[word]),
                    piece * self.turns[-1] + self.turns[word] + turns)

        macs, padding, turns = (b - a for a, b in zip(until(first), until(end), strict=True))
        _, word, _, in_row = place(first)
        turned = np.where(word > 0, self.turned[word], self.turned_again | (in_row == 0))
        return macs, padding, (macs > 0) * (1 - turned + turns)


def _running(values):
    """Sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0], np.cumsum(values)])


def _dealt(number, pe_cols):
    """(pe_cols,) how many each PE column gets of columns, or of pieces, that go round the PE columns."""
    return (number + np.arange(pe_cols)[::-1]) // pe_cols


def map_block(packed, pe_rows: int, pe_cols: int, unit: int | None = None, pe_row_of_unit=None,
              local_of_unit=None) -> BlockMapping:
    """Deal one packed block over a region of pe_rows x pe_cols PEs, in pieces of unit x unit (default: whole tiles).

    Columns go round the PE columns, rows where place_units says or pe_row_of_unit (units,) asks, there in the order of the
    rows or that of local_of_unit (units,). An unknown stored form raises ValueError.
    """
    if unit is None:
        unit = packed.block if isinstance(packed, PackedCirculant) else 1
    if pe_row_of_unit is None:
        pe_row_of_unit, local_of_unit = place_units(_unit_loads(packed, pe_cols, unit), pe_rows)
    elif local_of_unit is None:
        local_of_unit = _number(pe_row_of_unit)
    pe_row_of_row = np.repeat(pe_row_of_unit, unit)
    local_of_row = np.repeat(local_of_unit * unit, unit) + np.arange(pe_row_of_row.size) % unit
    return BlockMapping(packed, pe_rows, pe_cols, unit, pe_row_of_row, local_of_row)


# A GRU: r first and z last, as the way from r and W_hn h to n is the longest.
COMPUTED = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "n", "z")}


def sums_of(layer: PackedLayer) -> dict[str, tuple[tuple[str, str], ...]]:
    """Sum -> the (part, gate) of the blocks that add up to it, in the order in which the PEs take them (COMPUTED).

    A sum has its gate's name. A GRU's W_hn h + b_hn is rounded before it joins n, so it is a sum of its own, `hn`, as its bias
    is. `p`, the projection, comes last: it needs all others.
    """
    sums = {}
    for gate in COMPUTED[layer.cell]:
        ih, hh = ("ih", gate), ("hh", gate)
        sums |= {"n": (ih,), "hn": (hh,)} if gate == "n" else {gate: (ih, hh)}
    return sums | ({"p": (("hr", "p"),)} if layer.projected else {})


def part_of(part: str) -> str:
    """The part of the layer to which a part on the array belongs. An inner part "ih.i" is what V of the low-rank block
    ("ih", "i") makes of x, and what U multiplies; "ih.fft8" are the spectra of x for blocks of 8 of the fft datapath."""
    return part.split(".")[0]


def is_transformed(part: str) -> bool:
    """Whether an inner part is made by a transform in the PEs, so that it never passes the network."""
    return ".fft" in part


def block_of(part: str) -> int:
    """k of the spectra "ih.fft8"."""
    return int(part.split(".fft")[1])


def array_blocks(layer: PackedLayer, parts=None) -> dict[tuple[str, str], object]:
    """(part, gate) -> what the array stores and multiplies: the layer's blocks, of all its parts or some, those of the fft
    datapath under the inner part of their spectra; of a low-rank block V, and under an inner part of its own U."""
    stored = {}
    for part, gate in (p for p in layer.products if p[0] in (parts or PARTS)):
        block = layer.block(part, gate)
        v, *u = stored_forms(block)
        stored[f"{part}.fft{block.block}" if is_spectral(block) else part, gate] = v
        stored |= {(f"{part}.{gate}", gate): form for form in u}
    return stored


def stored_forms(block) -> list:
    """What the array stores and multiplies for a packed block, one after the other: of a low-rank one V, then U."""
    if isinstance(block, PackedLowRank):
        return [PackedDense(block.right, block.fmt), PackedDense(block.left, block.fmt)]
    return [block]


def array_sums(layer: PackedLayer) -> dict[str, tuple[tuple[str, str], ...]]:
    """sums_of on the array: U of a low-rank block stands in the sum, what V gives is a sum before it, named after the inner
    part: those of all gates first, so that they are on their way to the PEs when U is due; that of a projection before it."""
    stored = array_blocks(layer)
    inner = {part: ((part_of(part), gate),) for part, gate in stored if part != part_of(part) and not is_transformed(part)}
    added = {(part_of(part), gate): (part, gate) for part, gate in stored}  # of a low-rank block the last, U
    sums = {name: tuple(added[p] for p in products) for name, products in sums_of(layer).items()}
    last = {name: products for name, products in (inner | sums).items() if name in ("hr.p", "p")}
    return {name: products for name, products in (inner | sums).items() if name not in last} | last


def kept_at_edge(layer: PackedLayer, i) -> bool:
    """Whether what a drain brings is what a sum moved by, to be added to what is kept at the edge: behind a delta threshold,
    but not what V of a low-rank block gives, which goes on to U as it is."""
    return PARTS[part_of(i.parts[0])] in layer.delta and "." not in i.sum


def operand_bits(layer: PackedLayer, part: str) -> int:
    """Width of what a part on the array multiplies: of a signal, of the sums of V x, or of what a transform takes and gives."""
    fmt = layer.operand(part_of(part))
    if is_transformed(part):
        return OPERAND_BITS
    return fmt.bits if part == part_of(part) else layer.block(*part.split(".")).inner_bits(fmt.magnitude)


def network_words(layer: PackedLayer, spec: ArraySpec, part: str) -> int:
    """Words of the multicast network that such a value takes; a data memory is as wide as the widest of them."""
    return ceil_div(operand_bits(layer, part), spec.word_bits)


def _sums_here(layer, products) -> dict[str, tuple[tuple[str, str], ...]]:
    """Sum -> which of these (part, gate) add up to it; sums of which none does are left out."""
    here = {name: tuple(p for p in of if p in products) for name, of in array_sums(layer).items()}
    return {name: some for name, some in here.items() if some}


def map_blocks(
    layer: PackedLayer, spec: ArraySpec, layout: Layout, parts=None, known=None
) -> dict[tuple[str, str], BlockMapping]:
    """(part, gate) -> BlockMapping, of all parts of the layer or some. Blocks of a sum that share accumulators are placed
    together, so that each is balanced: they are multiplied one after the other, with a barrier between. known: what other
    layouts gave, taken where regions of the same size and units make it the same; new blocks are added to it."""
    mapped, stored, known = {}, array_blocks(layer, parts), {} if known is None else known
    for products in _sums_here(layer, stored).values():
        blocks = {p: stored[p] for p in products}
        region = {p: layout.regions[layout.region_of(block)] for p, block in blocks.items()}
        unit = {p: tile_unit(block, region[p], spec.acc_depth, layout.split_tiles) for p, block in blocks.items()}
        together = _share_accumulators(layer, layout, products, unit)
        for some in [products] if together else [[p] for p in products]:
            rows, cols = region[some[0]].rows, region[some[0]].cols
            alike = some[0], len(some), rows, cols, unit[some[0]]
            if alike in known:
                mapped |= known[alike]
                continue
            loads = np.hstack([_unit_loads(blocks[p], cols, unit[p]) for p in some])
            placement = place_units(loads, rows, spec.acc_depth // unit[some[0]])
            known[alike] = {p: map_block(blocks[p], rows, cols, unit[p], *placement) for p in some}
            mapped |= known[alike]
    return mapped


def _share_accumulators(layer, layout, products, unit) -> bool:
    """W_ih and W_hh of a gate add up in the same accumulators if their products have the same fraction, they lie in the
    same region, their rows are dealt in units of the same size and both or neither have a delta threshold; else each sum is
    drained and shifted at the edge, as what an inverse transform gives always is. products: of one sum; unit: (part, gate) ->
    rows per unit."""
    if len(products) == 1:
        return False
    if len({PARTS[part_of(part)] in layer.delta for part, _ in products}) > 1:
        return False  # one of them is added to sums that are kept, the other is not
    _, *shifts = layer.alignment(products[0][1])
    stored = array_blocks(layer)
    if any(is_spectral(stored[p]) for p in products):
        return False
    regions = {layout.region_of(stored[p]) for p in products}
    return shifts == [0, 0] and len(regions) == len({unit[p] for p in products}) == 1


@dataclass(frozen=True)
class Instruction:
    """One entry of a step's program. It says what is done, by which resource; never when.

    kind: mac, drain, activation, elementwise, multicast or load; of the fft datapath transform (forward), gather (drained sums
    meet in the PE that has their inverse), inverse, and send (what it gives goes to the edge). parts: of the blocks, or of
    those that a multicast is for. rows: local rows [low, high) of the pass. words: slice of each PE's words for those rows.
    entry: number of what is summed and drained (or gathered) together, in its region, in the order of the drains from the first
    of this program step on; the accumulator banks take the entries in turn, over all steps. chunk: number of the streamed chunk
    in its region and step, or -1. sum: (sums_of) that it adds to, drains, or takes off the edge. takes: names of those whose
    values it takes. values: that activation units compute, each counted as `event`, or words of a multicast. item: sequence of
    the batch. lag: step s of the program does this for step s - lag of the sequence, so that -1 is one step ahead. layer:
    number among the layers that run side by side.
    """

    name: str
    kind: str
    resource: str
    gate: str = ""
    parts: tuple[str, ...] = ()
    region: int = -1
    rows: tuple[int, int] = (0, 0)
    words: tuple[int, int] = (0, 0)
    entry: int = -1
    chunk: int = -1
    sum: str = ""
    takes: tuple[str, ...] = ()
    values: int = 0
    event: str = ""
    item: int = 0
    lag: int = 0
    layer: int = 0


@dataclass(frozen=True)
class _Entry:
    """What is accumulated together and drained once per item: a sum or one of its parts, local rows [low, high)."""

    sum: str
    gate: str
    parts: tuple[str, ...]
    low: int
    high: int


@dataclass(frozen=True)
class LayerMapping:
    """A layer on the array: its words in the PEs and the program of one time step, in the order the resources serve it.

    batch: sequences side by side. passes: groups of them; those of one share each load of a streamed chunk, which the next
    loads again. name: of the layer in its stack.
    """

    pipelined, edge_words = False, 0

    layer: PackedLayer
    spec: ArraySpec
    layout: Layout
    blocks: dict[tuple[str, str], BlockMapping]  # (part, gate)
    program: tuple[Instruction, ...]
    resident_words: np.ndarray  # (rows, cols) memory words of weights that stay in each PE of the array
    streamed_bits: int  # bits that the loader brings in every step
    batch: int = 1
    passes: int = 1
    name: str = ""

    @property
    def parts(self) -> set[str]:
        """Those of the layer that are multiplied here: all, or of hoisted input products "ih" or all others."""
        return {part_of(part) for part, _ in self.blocks}

    @property
    def fills_edge(self) -> bool:
        """Whether it computes input products ahead of the recurrence, which wait at the edge."""
        return self.parts == {"ih"}

    @property
    def hoisted_words(self) -> int:
        """Sums of input products that an activation unit keeps for a step of all items, ahead of the recurrence."""
        rows = len(self.layer.gates) * ceil_div(self.layer.hidden_size, self.spec.act_units)
        return 0 if "ih" in self.parts else self.batch * rows

    @property
    def layers(self) -> tuple["LayerMapping", ...]:
        """Those that run side by side: itself."""
        return (self,)

    @property
    def layout_name(self) -> str:
        return self.layout.name

    @property
    def data_words(self) -> int:
        """Data words that the fullest PE needs."""
        return self.batch * max(int(words.max()) for words in data_words_kept(self.layer, self.layout, self.blocks))

    @property
    def weight_depth(self) -> int:
        """Memory words of weights in the fullest PE, streaming buffers included."""
        streaming = {i.region for i in self.program if i.kind == "load"}
        return max(int(self.resident_words[region.window].max()) + 2 * self.layout.stream_words * (n in streaming)
                   for n, region in enumerate(self.layout.regions))

    @property
    def pass_items(self) -> int:
        """Items of a pass; the last may have fewer."""
        return ceil_div(self.batch, self.passes)

    @property
    def dense_weights(self) -> int:
        """Weights of the layer's blocks that are multiplied here, as if they were dense."""
        blocks = (self.layer.block(*p) for p in {(part_of(part), gate) for part, gate in self.blocks})
        return sum(block.shape[0] * block.shape[1] for block in blocks)

    @property
    def initial_bits(self) -> int:
        """Bits of the words that are in place at the start: those that stay."""
        return self.on_chip_bits - self.streamed_bits // self.passes

    @property
    def load_cycles(self) -> int:
        """Cycles that the loader is busy in every step, at least."""
        return ceil_div(self.streamed_bits, self.spec.load_bits_per_cycle)

    @property
    def on_chip_bits(self) -> int:
        """Bits of all words as the array stores them (streamed words included: the form is the same)."""
        return sum(block.on_chip_bits for block in self.blocks.values())

    @property
    def cr_chip(self) -> float:
        """32 * dense weights / on_chip_bits."""
        return 32 * self.dense_weights / self.on_chip_bits

    def per_pe(self, count) -> np.ndarray:
        """(rows, cols) of the array: the sum over the blocks of count(block), a (pe_rows, pe_cols) array."""
        total = np.zeros((self.spec.rows, self.spec.cols), dtype=np.int64)
        for block in self.blocks.values():
            region = self.layout.regions[self.layout.region_of(block.packed)]
            total[region.window] += count(block)
        return total

    @property
    def memory_words(self) -> np.ndarray:
        """(rows, cols) memory words that all weights of each PE take, resident or streamed."""
        return self.per_pe(lambda block: block.weight_words * words_taken(block, self.spec))

    @property
    def macs(self) -> np.ndarray:
        """(rows, cols) multiply-accumulates of each PE in one time step of one item."""
        return self.per_pe(lambda block: block.macs)

    @property
    def working_cycles(self) -> np.ndarray:
        """(rows, cols) cycles that each PE takes in one time step of one item to multiply, and to add and multiply in its
        transforms, if it never waits, nor for further memory words."""
        operations, spectra = self.macs, {part for part, _ in self.blocks if is_transformed(part)}
        for part in spectra | {part_of(part) for part in spectra}:
            for k, tiles in transformed_tiles(self, part):
                operations[self.layout.regions[-1].window] += tiles * sum(real_operations(k, not is_transformed(part)))
        return operations * self.spec.mac_ii


ADDED_UP = ("dense_weights", "on_chip_bits", "streamed_bits", "initial_bits", "memory_words", "resident_words", "macs",
            "working_cycles")


def _added_up(name):
    return property(lambda self: sum(getattr(mapping, name) for mapping in self.layers), doc=f"{name}, added up")


@dataclass(frozen=True)
class SideBySide:
    """Layers at the same time on regions of their own, numbered through; they share activation units, multicast and loader.

    pipelined: each layer takes the h of the layer before one step of the program later, and that layer's multicast of h brings
    it. Else all of them, the two directions of one layer, take an x of their own in every step.
    """

    layers: tuple[LayerMapping, ...]
    pipelined: bool
    program: tuple[Instruction, ...]
    edge_words = 0

    @property
    def spec(self) -> ArraySpec:
        return self.layers[0].spec

    @property
    def batch(self) -> int:
        return self.layers[0].batch

    @property
    def layout_name(self) -> str:
        return " | ".join(f"{m.name}: {m.layout.name}" for m in self.layers)

    @property
    def data_words(self) -> int:
        return max(m.data_words for m in self.layers)

    @property
    def weight_depth(self) -> int:
        return max(m.weight_depth for m in self.layers)

    (dense_weights, on_chip_bits, streamed_bits, initial_bits, memory_words, resident_words, macs,
     working_cycles) = map(_added_up, ADDED_UP)


@dataclass(frozen=True)
class InTurn:
    """Mappings of which each has the whole array, one after the other."""

    stages: tuple[LayerMapping | SideBySide, ...]
    edge_words: int = 0  # sums that an activation unit keeps ahead of the recurrence

    @property
    def layers(self) -> tuple[LayerMapping, ...]:
        return tuple(mapping for stage in self.stages for mapping in stage.layers)

    @property
    def spec(self) -> ArraySpec:
        return self.stages[0].spec

    @property
    def batch(self) -> int:
        return self.stages[-1].batch  # of hoisted input products several steps are items

    @property
    def layout_name(self) -> str:
        return "; then ".join(stage.layout_name for stage in self.stages)

    @property
    def data_words(self) -> int:
        return max(stage.data_words for stage in self.stages)

    @property
    def all_fit(self) -> bool:
        """Whether the weights of all stages are in the PEs together."""
        return sum(stage.weight_depth for stage in self.stages) <= self.spec.weight_words

    @property
    def weight_depth(self) -> int:
        return (sum if self.all_fit else max)(stage.weight_depth for stage in self.stages)

    (dense_weights, on_chip_bits, streamed_bits, initial_bits, memory_words, resident_words, macs,
     working_cycles) = map(_added_up, ADDED_UP)


def programs_side_by_side(layers, pipelined: bool) -> list[list[Instruction]]:
    """The programs of layers that run at the same time, with regions numbered through; pipelined: layer n, n steps behind."""
    programs, first = [], 0
    for below, above in pairwise(layers) if pipelined else ():
        if "hidden" in below.layer.delta or "input" in above.layer.delta:
            raise ValueError(f"a pipeline sends h once for two layers, so that it takes no delta threshold of it, got "
                             f"{below.layer.delta} below and {above.layer.delta} above")
    for n, mapping in enumerate(layers):
        program = [i for i in mapping.program if not (pipelined and n and i.kind == "multicast" and i.parts == ("ih",))]
        programs.append([_renumbered(i, n, first, n * pipelined) for i in program])
        first += len(mapping.layout.regions)
    return programs


def _renumbered(i, layer, first_region, lag):
    i = replace(i, layer=layer, lag=i.lag + lag)
    if i.region < 0:
        return i
    resource = i.resource if i.kind == "load" else f"{i.resource.split()[0]} {i.region + first_region}"
    return replace(i, region=i.region + first_region, resource=resource)


def multiplication(layer: PackedLayer, blocks, part: str, gate: str):
    """What a block of a layer does to vectors, from its words as they lie in the PEs (blocks: what map_blocks gives)."""
    packed, magnitude = layer.block(part, gate), layer.signals[PARTS[part]].magnitude
    if is_spectral(packed):
        return SpectralProduct(blocks[f"{part}.fft{packed.block}", gate].spectrum(), packed.shape[1], magnitude)
    weights = blocks[part, gate].dense()
    if (inner := (f"{part}.{gate}", gate)) in blocks:
        weights = blocks[inner].dense() @ weights
    return ExactMatrix(weights, magnitude)


def words_taken(block: BlockMapping, spec: ArraySpec) -> int:
    """Memory words of one stored word: wider words take several, read in as many cycles; narrower ones are not packed
    together."""
    return ceil_div(block.word_bits, spec.weight_word_bits)


def map_layer(layer: PackedLayer, spec: ArraySpec, layout: Layout, blocks=None, *, batch: int = 1, parts=None,
              ahead: bool = True, pass_items: int = 0) -> LayerMapping:
    """Map a layer for `batch` sequences side by side; blocks: what map_blocks gave for this layout and these parts, if at hand;
    ahead: whether PEs that wait for a projection's operands begin what needs only the next x; pass_items: those of another
    mapping of this layout and these parts, among which the accumulators are then shared out as there, so that the same words
    stay resident. What does not fit raises ValueError."""
    check_layer(layer, spec)
    batch = check_batch(batch)
    used = np.zeros((spec.rows, spec.cols), dtype=np.int64)
    for region in layout.regions:
        used[region.window] += 1
    if used.max() > 1 or used.sum() != sum(region.rows * region.cols for region in layout.regions):
        raise ValueError(f"{layout} needs regions that do not overlap, inside {spec.rows} x {spec.cols} PEs")
    blocks = map_blocks(layer, spec, layout, parts) if blocks is None else blocks
    if 2 * layout.stream_words + (constants := constants_kept(spec, layout, blocks)) > spec.weight_words:
        beside = f" beside {constants} words of constants" * (constants > 0)
        raise ValueError(f"{layout} needs two buffers of {layout.stream_words} words per PE{beside}, the array has "
                         f"{spec.weight_words} (weight_words)")
    builder = _ProgramBuilder(layer, spec, layout, blocks, batch, ahead, pass_items)
    mapping = LayerMapping(layer, spec, layout, blocks, builder.program(), builder.resident, builder.streamed_bits, batch,
                           len(builder.passes))
    if mapping.data_words > spec.data_words:
        kept = "x twice, h once" + ", o * tanh(c) once" * layer.projected
        kept += ", spectra and inverse transforms" * bool(layer.spectral_blocks) + f", for each of {batch} items" * (batch > 1)
        raise ValueError(f"a PE needs {mapping.data_words} data words ({kept}), the array has {spec.data_words} (data_words)")
    return mapping


def candidate_layouts(layer: PackedLayer, spec: ArraySpec, within: Region | None = None) -> list[Layout]:
    """Every arrangement of regions on the array, or within a part of it, with whole and with split circulant tiles; where
    sparse and other blocks meet, the array is also split in two by group columns or by group rows."""
    stored = array_blocks(layer).values()
    cut = any(isinstance(block, PackedCirculant) and not block.spectral for block in stored)
    kinds, place = {type(block) for block in stored}, within or Region(0, 0, spec.rows, spec.cols)
    arrangements = [(place,)]
    if PackedSparse in kinds and len(kinds) > 1:
        arrangements += strips(place, 2)
    return [Layout(regions, split_tiles=split)
            for regions, split in product(arrangements, (False, True) if cut else (False,))]


def takes_multicast(regions, words):
    """Whether regions side by side are so wide that the words of the multicast in a cycle, one a PE column, find as many
    memories. words: per cycle, a number or an array (points,). The whole array is as it is: its multicast takes longer."""
    return (len(regions) == 1) | (min(region.cols for region in regions) >= words)


def strips(place: Region, count: int) -> list[tuple[Region, ...]]:
    """Every way to cut a region into so many strips of whole groups: side by side first, then one below the other."""
    cuts = []
    for cols in combinations(range(GROUP, place.cols, GROUP), count - 1):
        cuts.append(tuple(Region(place.row, place.col + low, place.rows, high - low)
                          for low, high in pairwise((0, *cols, place.cols))))
    for rows in combinations(range(GROUP, place.rows, GROUP), count - 1):
        cuts.append(tuple(Region(place.row + low, place.col, high - low, place.cols)
                          for low, high in pairwise((0, *rows, place.rows))))
    return cuts


def least_cycles(layer: PackedLayer, spec: ArraySpec, layout: Layout, parts=None) -> int:
    """A bound that no step of this layout can beat: the multiply-accumulates of the busier region, perfectly balanced
    where they are sparse."""
    busy = [0] * len(layout.regions)
    for block in array_blocks(layer, parts).values():
        number = layout.region_of(block)
        region, (rows, cols) = layout.regions[number], block.shape
        if isinstance(block, PackedSparse):
            busy[number] += max(ceil_div(block.values.size, region.rows * region.cols), ceil_div(rows, region.rows))
        else:
            unit = tile_unit(block, region, spec.acc_depth, layout.split_tiles)
            macs = 2 * unit - 2 if is_spectral(block) else unit * unit
            busy[number] += _pieces_of_fullest_pe(rows, cols, unit, region) * macs
    return max(busy) * spec.mac_ii


def units_of(layer: PackedLayer, spec: ArraySpec, layout: Layout) -> tuple:
    """What the places of a layer's words in a layout depend on: layouts of equal regions and units give equal mappings."""
    return layout.regions, tuple(tile_unit(block, layout.regions[layout.region_of(block)], spec.acc_depth, layout.split_tiles)
                                 for block in layer.blocks.values())


def sized_layouts(layer: PackedLayer, spec: ArraySpec, layout: Layout, blocks) -> list[Layout]:
    """The layout itself or, if the weights do not fit, one layout for each size of the streaming buffers."""
    if _fits(layer, spec, layout, blocks):
        return [layout]
    widest = max(words_taken(block, spec) for block in blocks.values())
    room = spec.weight_words - constants_kept(spec, layout, blocks)
    sizes = [room // n for n in STREAM_SHARES if room // n >= widest] or [0]
    return [replace(layout, stream_words=size) for size in sizes]


def least_loaded_bits(layer: PackedLayer, spec: ArraySpec, layout: Layout, blocks) -> int:
    """A bound of the bits that the loader brings in every step: all words beyond what stays in their PE beside the buffers."""
    bits = 0
    for region in range(len(layout.regions)):
        words = _region_words(layer, spec, layout, blocks, region)
        if words.max() > spec.weight_words:
            fewest = min(block.word_bits / words_taken(block, spec) for block in blocks.values())
            bits += int(fewest * np.maximum(words - (spec.weight_words - 2 * layout.stream_words), 0).sum())
    return bits


def fitting_mappings(layer: PackedLayer, spec: ArraySpec, layout: Layout, batch: int = 1, parts=None) -> list[LayerMapping]:
    """The mapping of a layout; if its weights do not fit, one mapping for each size of the streaming buffers."""
    check_layer(layer, spec)
    blocks = map_blocks(layer, spec, layout, parts)
    return [map_layer(layer, spec, sized, blocks, batch=batch, parts=parts)
            for sized in sized_layouts(layer, spec, layout, blocks)]


def check_batch(batch) -> int:
    """The number of sequences side by side as a Python int; ValueError for what is none."""
    return check_whole("the array", "number of sequences side by side (batch)", batch, 1)


def check_layer(layer, spec):
    """Refuse a layer whose words or sums are wider than the array's."""
    if layer.spectral_blocks and spec.lookahead > 1:
        raise ValueError(f"the array skips no zeros (lookahead {spec.lookahead}) in layers on the datapath fft, got "
                         f"{', '.join(layer.spectral_blocks)}")
    words = {f"{PARTS[part]}{', whose differences take a bit more' * (PARTS[part] in layer.delta)}": layer.operand(part)
             for part in dict(layer.products)} | {name: block.fmt for name, block in layer.blocks.items()}
    name, widest = max(words.items(), key=lambda word: word[1].bits)
    if widest.bits > spec.word_bits:
        raise ValueError(f"the array has words of {spec.word_bits} bits (word_bits), got {widest} for {name}: give that fewer "
                         f"bits (calibrate, the plan), or the array wider words, of at most {DSP_BITS}")
    if layer.acc_bits > spec.acc_bits:
        raise ValueError(f"the array has accumulators of {spec.acc_bits} bits (acc_bits), the layer needs {layer.acc_bits}")


def parts_of(layer: PackedLayer) -> tuple[str, ...]:
    """Its parts on the array: what each multiplies is kept by the PEs."""
    return tuple(dict.fromkeys(p for part, _ in array_blocks(layer) for p in (part_of(part), part)))


def data_words_kept(layer, layout: Layout, blocks) -> list[np.ndarray]:
    """Per region (pe_cols,): data words of each PE for an item, its columns of x twice (one step ahead), of all else once
    (COPIES), and of the fft datapath the sums that an inverse takes and what it gives in the same places."""
    kept = [sum(COPIES.get(part, 1) * columns_kept(layer, layout, blocks, part, n).sum(axis=1) for part in parts_of(layer))
            for n in range(len(layout.regions))]
    for part in PARTS:
        for (k, region), tiles in inverse_tiles(layout, blocks, part).items():
            kept[region] = kept[region] + k * tiles.max(axis=0)
    return kept


def columns_kept(layer, layout, blocks, part: str, region: int) -> np.ndarray:
    """(pe_cols, columns) bool: columns of what a part multiplies that the PE columns of a region keep."""
    mine = [block.data_columns() for (p, _), block in blocks.items()
            if part in (p, part_of(p) if is_transformed(p) else p) and layout.region_of(block.packed) == region]
    kept = np.zeros((layout.regions[region].cols, max((m.shape[1] for m in mine), default=0)), dtype=bool)
    for m in mine:
        kept[:, : m.shape[1]] |= m
    return kept


def takers(mapping, i) -> list[tuple[Region, np.ndarray]]:
    """Per region that a multicast reaches, (pe_cols, values) bool: which PE columns keep each of its values. h of a pipelined
    layer is the x of the next, too."""
    above = mapping.pipelined and i.parts == ("hh",)
    found = []
    for m, part in zip(mapping.layers[i.layer : i.layer + 1 + above], (i.parts[0], "ih"), strict=False):
        for n, region in enumerate(m.layout.regions):
            kept = columns_kept(m.layer, m.layout, m.blocks, part, n)[:, : i.values]
            found.append((region, np.pad(kept, ((0, 0), (0, i.values - kept.shape[1])))))
    return found


def memories_of(mapping, i) -> np.ndarray:
    """(PE columns of all its regions, words) bool: whose data memories write each word of a multicast, those of a PE column
    alike. The words are the first ones of all values, then the second ones of values that take several (network_words)."""
    words = network_words(mapping.layers[i.layer].layer, mapping.spec, i.parts[0])
    return np.tile(np.vstack([kept for _, kept in takers(mapping, i)]), words)


def multicast_groups(memories, each: int) -> list[list[int]]:
    """The words (memories_of) that a multicast brings in each of its cycles: at most `each`, and one into any memory.

    As they come where that leaves no memory two of a cycle. Else those before which most others of one memory still wait go
    first, each in the first cycle with room: where each word has one memory, no order takes fewer cycles (multicast_cycles;
    Hu's rule for chains of unit jobs), where words have several it is a greedy order.
    """
    words = memories.shape[1]
    firsts = range(0, words, each)
    if np.add.reduceat(memories, firsts, axis=1, dtype=np.int64).max() <= 1:
        return [list(range(first, min(first + each, words))) for first in firsts]
    wait = (memories[:, ::-1].cumsum(axis=1)[:, ::-1] * memories).max(axis=0)  # words of one memory from this one on
    groups, full, busy = [], 0, [0] * len(memories)  # bit n: cycle n has all its words, or one for this memory
    for word in np.argsort(-wait, kind="stable").tolist():
        mine, taken = np.flatnonzero(memories[:, word]).tolist(), full
        for memory in mine:
            taken |= busy[memory]
        cycle = (~taken & (taken + 1)).bit_length() - 1  # the lowest bit that is 0
        if cycle == len(groups):
            groups.append([])
        groups[cycle].append(word)
        full |= (len(groups[cycle]) == each) << cycle
        for memory in mine:
            busy[memory] |= 1 << cycle
    return groups


def multicast_cycles(memories, each):
    """Number of multicast_groups; each: a number or an array (points,). Where no word has two memories: the most words of one
    memory, or as many as the network needs for all of them."""
    if memories.sum(axis=0).max() <= 1:
        most, least = int(memories.sum(axis=1).max()), ceil_div(memories.shape[1], each)
        return np.maximum(most, least) if isinstance(each, np.ndarray) else max(most, least)
    if isinstance(each, np.ndarray):
        some, place = np.unique(each, return_inverse=True)
        return np.array([multicast_cycles(memories, one) for one in some.tolist()])[place]
    return len(multicast_groups(memories, each))


def _fits(layer, spec, layout, blocks) -> bool:
    needed = (_region_words(layer, spec, layout, blocks, n) for n in range(len(layout.regions)))
    return all(words.max() <= spec.weight_words for words in needed)


def _region_words(layer, spec, layout, blocks, region):
    """(pe_rows, pe_cols) memory words of all blocks of a region."""
    r = layout.regions[region]
    return sum((block.weight_words * words_taken(block, spec) for block in blocks.values()
                if layout.region_of(block.packed) == region),
               np.full((r.rows, r.cols), _constant_words(spec, layout, blocks, region)))


def _constant_words(spec, layout, blocks, region) -> int:
    """Memory words of the constants of transforms in each PE of a region: k/4 - 1 cosines, for every size up to the largest k;
    the sines are the same in reverse."""
    largest = max((block.unit for block in blocks.values() if is_spectral(block.packed)
                   and layout.region_of(block.packed) == region), default=0)
    return max(largest // 4 - 1, 0) * constant_taken(spec)


def constants_kept(spec, layout, blocks) -> int:
    """Of the region that needs the most."""
    return max(_constant_words(spec, layout, blocks, n) for n in range(len(layout.regions)))


def constant_taken(spec: ArraySpec) -> int:
    """Memory words of one constant of a transform."""
    return ceil_div(TWIDDLE_BITS, spec.weight_word_bits)


def transform_cycles(k: int, back: bool, spec: ArraySpec) -> int:
    """Cycles for which one transform of k holds its PE: each addition and each multiply-accumulate mac_ii, each further memory
    word of a constant one."""
    adds, macs = real_operations(k, back)
    return (adds + macs) * spec.mac_ii + macs * (constant_taken(spec) - 1)


def inverse_columns(blocks, part: str, gate: str) -> np.ndarray:
    """(out,) PE column that has the inverse transform of each row's tile: tiles of a PE row go round its PE columns, those of
    one gate after those of the other. part: ("ih.fft8") of the block."""
    first = 0
    for (other, of_gate), block in blocks.items():
        if is_transformed(other) and part_of(other) == part_of(part):
            if (other, of_gate) == (part, gate):
                return (first + block.local_of_row // block.unit) % block.pe_cols
            first += int(block.local_rows.max()) // block.unit
    raise KeyError((part, gate))


def inverse_tiles(layout: Layout, blocks, part: str) -> dict[tuple[int, int], np.ndarray]:
    """(k, region) -> (pe_rows, pe_cols) inverse transforms of each PE in one step, for the blocks of a part of the layer."""
    found = {}
    for (other, gate), block in blocks.items():
        if is_transformed(other) and part_of(other) == part:
            key = block.unit, layout.region_of(block.packed)
            tiles = found.setdefault(key, np.zeros((block.pe_rows, block.pe_cols), dtype=np.int64))
            np.add.at(tiles, (block.pe_row_of_row[:: block.unit], inverse_columns(blocks, other, gate)[:: block.unit]), 1)
    return found


def transformed_tiles(mapping: LayerMapping, part: str) -> list[tuple[int, np.ndarray]]:
    """(k, (pe_rows, pe_cols) tiles that each PE of the last region, where they lie, transforms in a step of one item), an entry
    for each k: forward for the spectra "ih.fft8", back for the sums of a part "ih"."""
    layer, layout, blocks = mapping.layer, mapping.layout, mapping.blocks
    if not is_transformed(part):
        return [(k, tiles) for (k, _), tiles in inverse_tiles(layout, blocks, part).items()]
    k, number = block_of(part), len(layout.regions) - 1
    kept = columns_kept(layer, layout, blocks, part, number)
    return [(k, np.tile(kept.sum(axis=1) // k, (layout.regions[number].rows, 1)))]


def _phases(layer) -> list[list[Instruction]]:
    """What a step does beside the PEs. A phase begins after the one before; within one, the order is that of the drains."""
    hidden = layer.hidden_size

    def act(gate, takes=()):
        return Instruction(f"act {gate}", "activation", "activation", gate, sum=gate, takes=takes, values=hidden,
                           event="activation_lookups")

    def multiply(name, takes, products=1):
        return Instruction(name, "elementwise", "activation", takes=takes, values=products * hidden,
                           event="elementwise_multiplies")

    def rounding(name, gate, of, values):  # without a look-up
        return Instruction(name, "activation", "activation", gate, sum=of, values=values, event="roundings")

    def to_pes(name, part, values):
        return [Instruction(f"{name} to PEs", "multicast", "network", parts=(part,), takes=(name,), values=values)]

    if layer.cell == "GRU":
        # z last on the activation units, so that a late drain of z never holds up n; an early z could begin before n and would
        # save at most act_latency cycles.
        return [[act("r"), rounding("s", "n", "hn", hidden)], [multiply("r*s", ("act r", "s"))], [act("n", ("r*s",))],
                [act("z")], [multiply("h", ("act n", "act z"), 2)], to_pes("h", "hh", hidden)]
    # The cell update begins while o is still summed; o last on the activation units, so that its late drain holds up nothing.
    phases = [[act("i"), act("f"), act("g")], [multiply("cell", ("act i", "act f", "act g"), 2)],
              [Instruction("tanh c", "activation", "activation", takes=("cell",), values=hidden, event="activation_lookups")],
              [act("o")]]
    if layer.projected:
        phases += [[multiply("m", ("tanh c", "act o"))], to_pes("m", "hr", hidden),
                   [rounding("h", "p", "p", layer.output_size)]]
    else:
        phases.append([multiply("h", ("tanh c", "act o"))])
    return [*phases, to_pes("h", "hh", layer.output_size)]


class _ProgramBuilder:
    """Builds the program of one step and notes what stays resident and what is streamed."""

    def __init__(self, layer, spec, layout, blocks, batch, ahead, pass_items):
        self.layer, self.spec, self.layout, self.blocks, self.batch, self.ahead = layer, spec, layout, blocks, batch, ahead
        self.resident = np.zeros((spec.rows, spec.cols), dtype=np.int64)
        self.streamed_bits = 0
        self.chunks, self.drains = ([0] * len(layout.regions) for _ in range(2))  # so far in the program, per region
        self.passes, self.parts = self._passes(pass_items), parts_of(layer)
        self.share = ceil_div(pass_items or len(self.passes[0]), spec.acc_banks)  # items that share a bank

    def _passes(self, pass_items):
        """The items in groups. Resident words serve one item after the other, so that the PEs multiply for one while another's
        sums are activated. Streamed words serve as many items at a time as the accumulators hold a unit of rows for."""
        shared = pass_items or 1
        if not pass_items and not _fits(self.layer, self.spec, self.layout, self.blocks):
            shared = self.spec.acc_banks * (self.spec.acc_depth // max(block.unit for block in self.blocks.values()))
        size = ceil_div(self.batch, ceil_div(self.batch, shared))
        return [range(low, min(low + size, self.batch)) for low in range(0, self.batch, size)]

    def program(self) -> tuple[Instruction, ...]:
        """x of the next step first; then pass by pass the regions' sums in turn, and after each segment all that its drain
        makes due; h back to the PEs at the end. A projection stands behind all gates, and before it what its PEs begin of the
        next pass, after the last pass of the next step (_entries_ahead)."""
        x = Instruction("x to PEs", "multicast", "network", parts=("ih",), values=self.layer.input_size, lag=-1)
        parts = {part_of(part) for part, _ in self.blocks}
        steps = [replace(x, item=item) for item in range(self.batch) if "ih" in parts]
        entries = [list(self._entries(n)) for n in range(len(self.layout.regions))]
        resident = [self._resident_slices(n, entries[n]) for n in range(len(self.layout.regions))]
        built = [[self._region_segments(n, entries[n], resident[n], number) for n in range(len(self.layout.regions))]
                 for number in range(len(self.passes))]
        for number, items in enumerate(self.passes):
            segments = [segment for turn in zip_longest(*(rest for _, rest in built[number])) for segment in turn if segment]
            # Stable; the projection needs the gates of every region.
            segments.sort(key=lambda segment: segment[-1].sum in PROJECTION)
            last = number + 1 == len(self.passes)
            ahead = [replace(i, lag=i.lag - last) for some, _ in built[(number + 1) % len(self.passes)] for i in some]
            if ahead:
                place = next(n for n, segment in enumerate(segments) if segment[-1].sum in PROJECTION)
                segments[place] = ahead + segments[place]
            last_drain = {(segment[-1].sum, segment[-1].item): n for n, segment in enumerate(segments)}
            waiting = {item: [[replace(i, item=item) for i in phase] for phase in _phases(self.layer) if "hh" in parts]
                       for item in items}
            for n, segment in enumerate(segments):
                steps += segment
                for item, phases in waiting.items():
                    while phases:
                        due = [i for i in phases[0] if not i.sum or last_drain.get((i.sum, item), -1) <= n]
                        steps += due
                        phases[0] = [i for i in phases[0] if i not in due]
                        if phases[0]:
                            break
                        phases.pop(0)
        return _numbered(steps) if self.layer.projected else tuple(steps)

    def _entries(self, region):
        """In the order in which they are drained: first the sums of inputs alone, which may run before h is back."""
        entries = []
        for name, products in _sums_here(self.layer, self.blocks).items():
            here = [p for p in products if self.layout.region_of(self.blocks[p].packed) == region]
            together = _share_accumulators(self.layer, self.layout, products, {p: self.blocks[p].unit for p in products})
            for some in ([here] if together and here else [[p] for p in here]):
                block = self.blocks[some[0]]
                rows, size = int(block.local_rows.max()), self.spec.acc_depth // self.share // block.unit * block.unit
                for low in range(0, rows, size):
                    entries.append(_Entry(name, some[0][1], tuple(part for part, _ in some), low, min(low + size, rows)))
        return sorted(entries, key=lambda e: not _needs_x_only(e))  # stable

    def _region_segments(self, region, entries, resident, number):
        """Of a pass what the PEs do ahead, before the projection of the pass before; and lists of instructions, each ending
        with a drain. In each accumulation group the input parts come first, as they need only x."""
        items, ahead, segments, transformed = self.passes[number], [], [], set()
        spectral = {part: [e for e in entries if is_transformed(e.parts[0]) and part_of(e.parts[0]) == part] for part in PARTS}
        groups = _groups(entries, self.spec, self.drains[region], len(items))
        left = self._entries_ahead(groups, len(items), len(self.passes[number - 1]))
        for group in groups:
            pending = []
            for n, e in group:
                products = [i for part in e.parts if part_of(part) == "ih"
                            for i in self._products(region, n, e, part, resident, items, transformed)]
                taken = ahead if left and products and not _needs_x_only(e) else pending
                taken += products
                left -= taken is ahead
            for n, e in group:
                for part in e.parts:
                    if part_of(part) != "ih":
                        pending += self._products(region, n, e, part, resident, items, transformed)
                kind, made = "gather" if is_transformed(e.parts[0]) else "drain", []
                for place, item in enumerate(items):
                    pending.append(Instruction(f"{kind} {e.gate} {'+'.join(e.parts)}", kind, f"links {region}", e.gate,
                                               e.parts, region, (e.low, e.high), entry=n + place, sum=e.sum, item=item))
                    made.append(pending)
                    pending = []
                    if e.sum in self.parts and e.high == int(self.blocks[e.parts[0], e.gate].local_rows.max()):
                        # What V gives goes back to the PEs once all of it is there.
                        made.append([Instruction(f"{e.sum} to PEs", "multicast", "network", parts=(e.sum,), sum=e.sum,
                                                 values=self.blocks[e.parts[0], e.gate].shape[0], item=item)])
                if kind == "gather" and e is spectral[part_of(e.parts[0])][-1]:
                    made += self._inverses(region, spectral[part_of(e.parts[0])], items)
                if left and _needs_x_only(e):
                    ahead += [i for segment in made for i in segment]
                    left -= 1
                else:
                    segments += made
        self.drains[region] += len(entries) * len(items)
        return ahead, segments

    def _entries_ahead(self, groups, items, items_before) -> int:
        """How many entries the PEs of a projection begin before it, as far as x alone lets them: those of inputs alone whole,
        of the first accumulation group the input parts as far as the accumulators hold them beside the projection.

        While they wait for m, and again while they wait for h, PEs have nothing else to do; m and h take about as long as they
        have words. So the entries are shared out between the two waits as hidden_size to output_size."""
        projection = [e for group in groups for _, e in group if e.sum in PROJECTION]
        if not projection or not self.ahead or any(is_transformed(e.parts[0]) for group in groups for _, e in group):
            return 0  # transforms stay in their place
        alone = sum(_needs_x_only(e) for group in groups for _, e in group)
        shared = [e for _, e in groups[alone] if "ih" in map(part_of, e.parts)]
        count = (alone + len(shared)) * self.layer.hidden_size // (self.layer.hidden_size + self.layer.output_size)
        first = len(projection) * items_before  # drains of the projection come before those of the group
        while count > alone:
            held = sum(_held(self.spec, first + n * items, items, e) for n, e in enumerate(shared[: count - alone]))
            most = max((held + _held(self.spec, n * items_before, items_before, e)).max() for n, e in enumerate(projection))
            if most <= self.spec.acc_depth:
                break
            count -= 1
        return count

    def _products(self, region, number, entry, part, resident, items, transformed):
        """The multiplications of an entry; before the first that takes the spectra of a vector, the transform makes them."""
        made = []
        if is_transformed(part) and part not in transformed:
            transformed.add(part)
            made = [Instruction(f"forward {part}", "transform", f"PEs {region}", parts=(part,), region=region, item=item)
                    for item in items]
        return made + self._macs(region, number, entry, part, resident, items)

    def _inverses(self, region, entries, items):
        """Once all sums of spectrum products of a part are in their PEs: the inverse transforms, then what they give to the
        edge, gate by gate. entries: of the part, several of a gate where its rows take several passes."""
        segments, part = [], part_of(entries[0].parts[0])
        for item in items:
            pending = [Instruction(f"inverse {part}", "inverse", f"PEs {region}", parts=(part,), region=region, item=item)]
            for e in {e.gate: e for e in entries}.values():
                pending.append(Instruction(f"send {e.gate} {part}", "send", f"links {region}", e.gate, e.parts, region,
                                           (0, e.high), sum=e.sum, item=item))
                segments.append(pending)
                pending = []
        return segments

    def _resident_slices(self, region, entries):
        """(entry, part) -> how many words of its fullest PE stay resident; input parts last, as the others are urgent. Entries
        share in proportion to their size: after a long resident stretch the loader would wait for a free buffer."""
        used = _region_words(self.layer, self.spec, self.layout, self.blocks, region)
        all_fit = used.max() <= self.spec.weight_words
        if not all_fit and not self.layout.stream_words:
            raise ValueError(f"the weights of a region take {used.max()} words in its fullest PE, the array has "
                             f"{self.spec.weight_words} (weight_words) and the layout has no streaming buffer")
        constants = _constant_words(self.spec, self.layout, self.blocks, region)
        self.resident[self.layout.regions[region].window] += constants
        left, kept = self.spec.weight_words - 2 * self.layout.stream_words - constants, {}
        for part in sorted(self.parts, key=lambda part: part_of(part) == "ih"):  # stable: hh, hr, ih
            blocks = {e: self.blocks[part, e.gate] for e in entries if part in e.parts}
            counts = {e: block.words_between(e.low, e.high) for e, block in blocks.items()}
            taken = {e: words_taken(block, self.spec) for e, block in blocks.items()}
            wanted, room = sum(int(counts[e].max()) * taken[e] for e in blocks), left
            for e in blocks:
                most = int(counts[e].max())
                kept[e, part] = most if all_fit or wanted <= room else room * most // wanted
                left -= kept[e, part] * taken[e]
                self.resident[self.layout.regions[region].window] += np.minimum(counts[e], kept[e, part]) * taken[e]
        return kept

    def _macs(self, region, number, entry, part, resident, items):
        """The streamed words chunk by chunk, each after its load; a share of the resident words before each, so that the
        loader does not wait long for a free buffer. number: of the entry's first item."""
        block, rows = self.blocks[part, entry.gate], (entry.low, entry.high)
        counts, kept = block.words_between(*rows), resident[entry, part]
        most, size = int(counts.max()), self.layout.stream_words // words_taken(block, self.spec)

        def macs(words, chunk=-1):
            return [Instruction(f"mac {entry.gate} {part}", "mac", f"PEs {region}", entry.gate, (part,), region, rows, words,
                                number + place, chunk, entry.sum, item=item) for place, item in enumerate(items)]

        if kept == most:
            return macs((0, most))
        if not size:
            raise ValueError(f"a streaming buffer of {self.layout.stream_words} words cannot hold one word of "
                             f"{entry.gate} {part} ({block.word_bits} bits)")
        made, streamed = [], range(kept, most, size)
        for n, low in enumerate(streamed):
            share = kept * n // len(streamed), kept * (n + 1) // len(streamed)
            words, chunk = (low, min(low + size, most)), self.chunks[region]
            self.chunks[region] += 1
            self.streamed_bits += int((np.minimum(counts, words[1]) - np.minimum(counts, low)).sum()) * block.word_bits
            made += macs(share) if share[0] < share[1] else []
            made.append(Instruction(f"load {entry.gate} {part}", "load", "loader", entry.gate, (part,), region, rows, words,
                                    chunk=chunk, sum=entry.sum, item=items[0]))
            made += macs(words, chunk)
        return made


PROJECTION = ("hr.p", "p")  # sums of a projection


def _needs_x_only(entry) -> bool:
    return set(map(part_of, entry.parts)) == {"ih"}


def _numbered(program) -> tuple[Instruction, ...]:
    """A program with its entries and chunks numbered as it drains and loads them."""
    drains, loads, counts = {}, {}, Counter()
    for i in program:
        if i.kind in ("drain", "gather", "load"):
            numbers, key = (loads, i.chunk) if i.kind == "load" else (drains, i.entry)
            numbers[i.region, key] = counts[i.kind == "load", i.region], i.lag
            counts[i.kind == "load", i.region] += 1
    made = []
    for i in program:
        if i.entry >= 0:
            number, lag = drains[i.region, i.entry]
            i = replace(i, entry=number + (lag - i.lag) * counts[False, i.region])
        made.append(replace(i, chunk=loads[i.region, i.chunk][0]) if i.chunk >= 0 else i)
    return tuple(made)


def _held(spec, number, items, entry):
    """(acc_banks,) accumulators that an entry takes for so many items, from this number on."""
    return np.bincount(np.arange(number, number + items) % spec.acc_banks, minlength=spec.acc_banks) * (entry.high - entry.low)


def _groups(entries, spec, first, items):
    """Accumulation groups of (number, entry): consecutive entries that the accumulators hold together for all items of a pass,
    which the banks take in turn. first: number of the first item of the first entry. Entries of inputs alone and of a
    projection are drained at once, each a group of its own."""
    groups, held = [], np.zeros(spec.acc_banks, dtype=np.int64)
    for number, e in zip(range(first, first + len(entries) * items, items), entries, strict=True):
        rows = _held(spec, number, items, e)
        recurrent = groups and all("hh" in map(part_of, some.parts) for some in (e, groups[-1][-1][1]))
        if not recurrent or (held + rows).max() > spec.acc_depth:
            groups.append([])
            held[:] = 0
        groups[-1].append((number, e))
        held += rows
    return groups
