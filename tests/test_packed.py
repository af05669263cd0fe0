"""Packed blocks and files: hand-counted bits, an independent decoder, payload bytes, damaged files, messages."""

import json
import os
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import circulant

from workbench import container
from workbench.container import read_tensors, write_tensors
from workbench.fixedpoint import TABLES, ExactTable, LinearTable, QFormat
from workbench.packed import (
    ENCODINGS,
    FILE_VERSION,
    FORMS,
    GATES,
    Banks,
    Bitmap,
    Diagonals,
    PackedCirculant,
    PackedDense,
    PackedLayer,
    PackedLowRank,
    PackedModel,
    PackedSparse,
    Relative,
    Whole,
    load,
    pack_bits,
    signals_of,
    table_uses,
    tile_encodings,
    unpack_bits,
)

SIGNALS = {"input": QFormat(16, 12), "pre": QFormat(16, 12), "sigmoid": QFormat(16, 16, signed=False), "tanh": QFormat(16, 15),
           "cell": QFormat(16, 12), "hidden": QFormat(16, 15)}
OTHER_SIGNALS = {"unprojected": QFormat(16, 14), "hidden_product": QFormat(16, 13)}
LINEAR = {name: LinearTable.build(name) for name in ("sigmoid", "tanh")}
INT4, INT5, INT6, INT8 = QFormat(4, 3), QFormat(5, 4), QFormat(6, 5), QFormat(8, 7)


def dense(shape, rng, fmt=INT8):
    return PackedDense(rng.integers(fmt.min, fmt.max + 1, shape), fmt)


def sparse(shape, rng, density=0.2, fmt=INT6):
    return PackedSparse.from_dense(rng.integers(1, fmt.max + 1, shape) * (rng.random(shape) < density), fmt)


def block_circulant(shape, rng, block=4, fmt=INT5):
    vectors = rng.integers(fmt.min, fmt.max + 1, (shape[0] // block, -(-shape[1] // block), block))
    return PackedCirculant(shape, fmt, block, vectors)


def low_rank(shape, rng, rank=2, fmt=INT5):
    return PackedLowRank(fmt, *(rng.integers(fmt.min, fmt.max + 1, sides) for sides in ((shape[0], rank), (rank, shape[1]))))


MAKERS = {"dense": dense, "sparse": sparse, "circulant": block_circulant, "lowrank": low_rank}


def layer_of(make=None, hidden=8, inputs=6, seed=0, signals=None, acc_bits=48, bias=None, cell="LSTM", projection=0,
             kind="linear", suffix="l0", path="lstm"):
    """make(part, gate, shape, rng) -> block; without it the forms alternate over the gates. signals: those that differ."""
    rng, gates, width = np.random.default_rng(seed), GATES[cell], projection or hidden
    forms = dict(zip("ifgorznp", ("dense", "sparse", "circulant", "lowrank") * 2, strict=True))
    make = make or (lambda part, gate, shape, rng: MAKERS[forms[gate]](shape, rng))
    known = SIGNALS | OTHER_SIGNALS | (signals or {})
    signals = {name: known[name] for name in signals_of(cell, bool(projection))}
    shapes = {("ih", gate): (hidden, inputs) for gate in gates} | {("hh", gate): (hidden, width) for gate in gates}
    shapes |= {("hr", "p"): (projection, hidden)} if projection else {}
    blocks = {f"{path}.weight_{part}_{suffix}.{gate}": make(part, gate, shape, rng) for (part, gate), shape in shapes.items()}
    bias = bias or {gate: rng.integers(-5000, 5000, hidden) for gate in (*gates, *["hn"] * (cell == "GRU"))}
    tables = {name: TABLES[kind].build(name, uses) for name, uses in table_uses(cell, signals).items()}
    return PackedLayer(cell, blocks, bias, signals, tables, acc_bits)


@pytest.fixture(scope="module")
def model():
    return PackedModel({"lstm.l0": layer_of()}, rnn_bias_params=32, other_params=18, metadata={"task": "tiny"})


# Bits.


def test_pack_bits_by_hand():
    assert pack_bits([5, -1, -8], 4).tolist() == [0b0101_1111, 0b1000_0000]
    assert pack_bits([1, 0, 1], 1).tolist() == [0b1010_0000]
    assert pack_bits([], 3).size == 0
    assert unpack_bits(np.array([0b0101_1111, 0b1000_0000], dtype=np.uint8), 4, 3, signed=True).tolist() == [5, -1, -8]
    assert unpack_bits(np.array([0b0101_1111, 0b1000_0000], dtype=np.uint8), 4, 3, signed=False).tolist() == [5, 15, 8]


@given(st.data(), st.integers(1, 32), st.booleans())
def test_bits_round_trip(data, bits, signed):
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    values = data.draw(st.lists(st.integers(low, high) | st.sampled_from([low, high]), max_size=30))
    packed = pack_bits(values, bits)
    assert packed.dtype == np.uint8 and packed.size == -(-bits * len(values) // 8)
    assert unpack_bits(packed, bits, len(values), signed).tolist() == values


def bit_words(data, bits):
    """The first words of a byte array, read from the text of its bits."""
    text = "".join(f"{byte:08b}" for byte in data.tolist())
    return [int(text[n : n + bits], 2) for n in range(0, len(text) - bits + 1, bits)]


def signed_word(word, bits):
    return word - (1 << bits) if word >> (bits - 1) else word


def decode_sparse(block):
    """A sparse block's bytes -> rows of a matrix, by a walk over the words; only shape, bits and what describe() says are
    taken from the block. A dictionary place -> word tells where each stands; words of value zero need no place."""
    (rows, columns), about = block.shape, block.describe()
    encoding = about["encoding"]
    words = [signed_word(w, block.fmt.bits) for w in bit_words(block.arrays["values"], block.fmt.bits)][: about["words"]]
    places = {"Relative": tile_places, "Bitmap": tile_places, "Banks": bank_places, "Diagonals": diagonal_places,
              "Whole": lambda block, encoding, count: [divmod(n, columns) for n in range(count)]}
    matrix = [[0] * columns for _ in range(rows)]
    for (row, column), word in zip(places[encoding["name"]](block, encoding, len(words)), words, strict=True):
        if word:
            matrix[row][column] = word
    return matrix


def tile_places(block, encoding, words):
    k, across, tiles = encoding["block"], -(-block.shape[1] // encoding["block"]), []
    if encoding["name"] == "Bitmap":
        tiles = [n for n, bit in enumerate(bit_words(block.arrays["indices"], 1)) if bit]
    else:
        for skip in bit_words(block.arrays["indices"], encoding["width"])[: words // k**2]:
            tiles.append((tiles[-1] + 1 if tiles else 0) + skip)
    return [(n // across * k + i, n % across * k + j) for n in tiles for i in range(k) for j in range(k)]


def bank_places(block, encoding, words):
    banks, places = encoding["banks"], []
    bits = (len(range(0, block.shape[1], banks)) - 1).bit_length()
    index = iter(bit_words(block.arrays["indices"], bits) if bits else [0] * words)
    for row in range(block.shape[0]):
        for bank in range(banks):
            places += [(row, bank + banks * next(index)) for _ in range(encoding["count"])]
    return places


def diagonal_places(block, encoding, words):
    (rows, columns), period, places = block.shape, encoding["period"], []
    stride, bits = -(-columns // period), (period - 1).bit_length()
    offsets = iter(bit_words(block.arrays["indices"], bits))
    for first in range(0, rows, period):
        offset = [next(offsets) for _ in range(stride)]
        for column in range(columns):
            (row,) = [i for i in range(period) if (i + offset[column % stride]) % period == column // stride]
            places.append((first + row, column))
    return places


# What each form stores.


def test_dense_bits_by_hand():
    block = PackedDense(np.array([[1, -2, 3], [4, -5, 6]]), INT4)
    assert (block.shape, block.stored_values) == ((2, 3), 6)
    assert (block.value_bits, block.index_bits, block.storage_bits) == (24, 0, 24)
    assert block.arrays["values"].tolist() == [0x1E, 0x34, 0xB6]
    odd = PackedDense(np.array([[1, 2, 3]]), QFormat(3, 0))
    assert (odd.value_bits, odd.index_bits) == (9, 7)  # 9 bits take 2 bytes: the padding counts as index bits


def test_relative_index_bits_by_hand():
    # 60 positions, weights at 0, 20 and 59: gaps of 0, 19 and 38 zeros. Words with 4 value bits, bytes of both arrays:
    # 2 index bits: 3 + 4 + 9 padding words -> 8 + 4; 3: 3 + 2 + 4 -> 5 + 4; 4: 3 + 1 + 2 -> 3 + 3; 5: 3 + 0 + 1 -> 2 + 3;
    # 6: 3 -> 2 + 3; bitmap: 2 + 8. Of the two with 5 bytes the first.
    values = np.zeros((6, 10), dtype=np.int64)
    values[0, 0], values[2, 0], values[5, 9] = 1, -2, 3
    block = PackedSparse.from_dense(values, INT4)
    assert block.encoding == Relative(5)
    assert (block.stored_values, block.value_bits) == (3, 12)
    assert {name: array.size for name, array in block.arrays.items()} == {"values": 2, "indices": 3}  # 16 and 20 bits
    assert (block.storage_bits, block.index_bits) == (40, 28)
    assert bit_words(block.arrays["indices"], 5)[:4] == [0, 19, 31, 6]
    assert [signed_word(w, 4) for w in bit_words(block.arrays["values"], 4)] == [1, -2, 0, 3]


def test_padding_words_by_hand():
    values = np.zeros((1, 1600), dtype=np.int64)
    values[0, 3:200:4] = 1  # 50 weights, 3 zeros before each
    values[0, 240] = 5  # 40 zeros before it; the zeros after it need nothing
    block = PackedSparse.from_dense(values, INT4)
    # Index bits 2: 51 + 10 padding words, 61 * 6 = 366; 3: 56 * 7 = 392; 4: 53 * 8 = 424; 5: 52 * 9 = 468; bitmap 1804.
    assert block.encoding == Relative(2)
    assert block.describe() == {"encoding": {"name": "Relative", "width": 2, "block": 1}, "words": 61}
    assert bit_words(block.arrays["indices"], 2)[:61] == [3] * 50 + [3] * 10 + [0]
    assert (block.stored_values, block.value_bits) == (51, 204)
    assert block.storage_bits == 8 * (31 + 16)  # 61 * 4 = 244 and 61 * 2 = 122 bits
    assert block.index_bits == 8 * 47 - 204
    assert np.array_equal(decode_sparse(block), values)


def test_bitmap_bits_by_hand():
    values = np.array([[1, 2, 0, 4, 5], [1, 2, 3, 0, 5], [1, 2, 3, 4, 5]])
    whole = PackedSparse.from_dense(values, INT4)  # 8 bytes; relative: 7 + 4 (13 * 2 bits of indices); bitmap: 7 + 2
    assert whole.encoding == Whole() and whole.describe()["words"] == 15 and whole.arrays["indices"].size == 0
    assert whole.arrays["values"].tolist() == [0x12, 0x04, 0x51, 0x23, 0x05, 0x12, 0x34, 0x50]
    assert (whole.stored_values, whole.value_bits, whole.index_bits) == (15, 60, 4)  # zeros are stored and counted
    block = stored_with(Bitmap(), whole)
    assert block.arrays["indices"].tolist() == [0b11011_111, 0b01_11111_0]
    assert (block.value_bits, block.index_bits) == (52, 4 + 16)
    assert np.array_equal(decode_sparse(block), values)


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 300), st.sampled_from([0, 0.003, 0.02, 0.1, 0.3, 0.8, 1]))
def test_sparse_bytes_against_an_independent_decoder(seed, rows, columns, density):
    rng = np.random.default_rng(seed)
    block = sparse((rows, columns), rng, density, QFormat(int(rng.integers(2, 17)), 1))
    assert np.array_equal(decode_sparse(block), block.dense())
    stored = block.dense().size if block.encoding == Whole() else np.count_nonzero(block.dense())
    assert block.value_bits == stored * block.fmt.bits
    assert block.value_bits + block.index_bits == 8 * sum(a.nbytes for a in block.arrays.values())


def test_the_cheapest_index_is_chosen():
    rng = np.random.default_rng(0)
    for density in (0.01, 0.03, 0.1, 0.2, 0.5, 0.9):
        block = sparse((64, 64), rng, density)
        gaps = np.diff(np.flatnonzero(block.dense()), prepend=-1) - 1
        words = {Relative(width): int(sum(1 + gap // 2**width for gap in gaps)) for width in range(2, 9)}
        sizes = {encoding: -(-6 * n // 8) + -(-encoding.width * n // 8) for encoding, n in words.items()}
        sizes[Bitmap()] = -(-6 * gaps.size // 8) + 512
        sizes[Whole()] = 6 * 64 * 64 // 8
        assert block.storage_bits == 8 * sizes[block.encoding] == 8 * min(sizes.values())


def stored_with(encoding, block):
    """The block in this encoding and no other."""
    return PackedSparse(block.shape, block.fmt, block.rows, block.cols, block.values, (encoding,))


def test_tile_bits_by_hand():
    # 4 x 5 in tiles of 2 x 2: three tiles in a row, the third half padding. The tiles 2 and 4 hold weights.
    values = np.array([[0, 0, 0, 0, 1], [0, 0, 0, 0, -2], [0, 0, 0, 3, 0], [0, 0, 4, 0, 0]])
    block = stored_with(Bitmap(2), PackedSparse.from_dense(values, INT4))
    assert block.arrays["values"].tolist() == [0x10, 0xE0, 0x03, 0x40]  # row by row of a tile, padding and zeros included
    assert block.arrays["indices"].tolist() == [0b001010_00]
    assert (block.stored_values, block.value_bits, block.index_bits) == (8, 32, 8)
    relative = stored_with(Relative(2, 2), block)
    assert bit_words(relative.arrays["indices"], 2)[:2] == [2, 1] and relative.storage_bits == 40
    assert decode_sparse(block) == decode_sparse(relative) == values.tolist()


def test_a_long_gap_between_tiles_takes_a_padding_tile():
    values = np.zeros((2, 20), dtype=np.int64)
    values[0, 12] = 5  # tile 6: 2 index bits skip at most 3, so that tile 3 is padding
    block = stored_with(Relative(2, 2), PackedSparse.from_dense(values, INT4))
    assert bit_words(block.arrays["indices"], 2)[:2] == [3, 2]
    assert block.describe()["words"] == 8 and decode_sparse(block) == values.tolist()


def test_bank_bits_by_hand():
    # Three banks: columns 0, 3, 6 and 1, 4 and 2, 5. Two words each, of which three are spare.
    values = np.array([[1, 0, 2, 3, 0, 0, 0], [0, 4, 0, 0, 5, 6, 7]])
    block = stored_with(Banks(3, 2), PackedSparse.from_dense(values, INT4))
    assert bit_words(block.arrays["values"], 4) == [1, 3, 0, 0, 2, 0, 7, 0, 4, 5, 6, 0]
    assert bit_words(block.arrays["indices"], 2) == [0, 1, 0, 0, 0, 0, 2, 0, 0, 1, 1, 0]
    assert (block.value_bits, block.index_bits) == (48, 24)  # spare words are stored and counted
    assert decode_sparse(block) == values.tolist()
    alone = stored_with(Banks(7, 1), PackedSparse.from_dense(values, INT4))  # banks of one column need no index
    assert alone.arrays["indices"].size == 0 and decode_sparse(alone) == values.tolist()


def test_diagonal_bits_by_hand():
    # Period 2, stride 2: the tiles are the columns 0 and 2, 1 and (absent) 3. Offset 0 keeps the first column in the first row.
    values = np.array([[1, 0, 0], [0, 2, 3], [0, 4, 5], [0, 0, 0]])
    block = stored_with(Diagonals(2), PackedSparse.from_dense(values, INT4))
    assert bit_words(block.arrays["indices"], 1) == [0, 1, 1, 0, 0, 0, 0, 0]
    assert bit_words(block.arrays["values"], 4) == [1, 2, 3, 0, 4, 5]  # a word a column: first rows 0 and 1, then 2 and 3
    assert (block.stored_values, block.value_bits, block.index_bits) == (6, 24, 8)
    assert decode_sparse(block) == values.tolist()


@pytest.mark.parametrize(("encoding", "message"), [
    (Banks(3, 1), "Banks(banks=3, count=1) needs at most 1 weights in a bank of a row, got 2"),
    (Diagonals(4), "Diagonals(period=4) needs rows divisible by 4, got (2, 7)"),
    (Diagonals(2), "Diagonals(period=2) needs the weights of each tile on one wrapped diagonal"),
])
def test_encodings_refuse_positions_that_do_not_follow(encoding, message):
    values = np.array([[1, 0, 2, 3, 0, 0, 0], [0, 4, 0, 0, 5, 6, 7]])
    with pytest.raises(ValueError) as caught:
        PackedSparse.from_dense(values, INT4, encoding)
    assert message in str(caught.value)


def in_pattern(encoding, shape, rng, density):
    """Random values whose positions an encoding takes."""
    values = rng.integers(1, 8, shape) * (rng.random(shape) < density)
    if isinstance(encoding, Banks):
        for bank in range(encoding.banks):
            part = values[:, bank :: encoding.banks]
            part[rng.random(part.shape).argsort(axis=1) >= encoding.count] = 0
    if isinstance(encoding, Diagonals):
        period, stride = encoding.period, -(-shape[1] // encoding.period)
        offsets = rng.integers(0, period, (shape[0] // period, stride))
        row, column = np.indices(shape)
        values *= (row + offsets[row // period, column % stride] - column // stride) % period == 0
    return values


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 30), st.integers(1, 5), st.sampled_from([0, 0.05, 0.5, 1]))
def test_every_encoding_against_an_independent_decoder(seed, groups, columns, n, density):
    rng = np.random.default_rng(seed)
    for encoding in (*tile_encodings(n), Whole(), Banks(n, 2), Banks(1, n), Diagonals(n + 1)):
        shape = (groups * (n + 1 if isinstance(encoding, Diagonals) else 1), columns)
        values = in_pattern(encoding, shape, rng, density)
        block = stored_with(encoding, PackedSparse.from_dense(values, INT4))
        assert decode_sparse(block) == block.dense().tolist() == values.tolist()
        assert block.storage_bits == 8 * sum(a.nbytes for a in block.arrays.values())
        again = PackedSparse.restore(block.arrays, shape, INT4, json.loads(json.dumps(block.describe())))
        assert again.encoding == encoding and again.storage_bits == block.storage_bits
        assert again.dense().tolist() == values.tolist()
        offered = PackedSparse.from_dense(values, INT4, encoding)
        assert offered.storage_bits <= min(block.storage_bits, PackedSparse.from_dense(values, INT4).storage_bits)


def test_circulant_bits_and_matrix_by_hand():
    block = PackedCirculant((2, 3), INT4, 2, np.array([[[1, 2], [3, 4]]]))
    assert block.dense().tolist() == [[1, 2, 3], [2, 1, 4]]  # the fourth column is padding
    assert (block.stored_values, block.value_bits, block.index_bits) == (4, 16, 0)  # padding stored and counted
    assert block.arrays["values"].tolist() == [0x12, 0x34]
    three = PackedCirculant((3, 3), INT4, 3, np.array([[[1, 2, 3]]]))
    assert three.dense().tolist() == [[1, 3, 2], [2, 1, 3], [3, 2, 1]]
    assert (three.value_bits, three.index_bits) == (12, 4)


@pytest.mark.parametrize(("shape", "block"), [((8, 8), 4), ((6, 7), 3), ((4, 3), 4), ((10, 11), 5), ((4, 6), 1), ((4, 9), 2)])
def test_circulant_against_scipy(shape, block):
    packed = block_circulant(shape, np.random.default_rng(1), block)
    tiles = [[circulant(vector) for vector in row] for row in packed.vectors]
    assert np.array_equal(packed.dense(), np.block(tiles)[:, : shape[1]])
    # The definition, element by element.
    assert all(packed.dense()[i, j] == packed.vectors[i // block, j // block, (i - j) % block] for i in range(shape[0])
               for j in range(shape[1]))


def test_low_rank_bits_and_matrix_by_hand():
    block = PackedLowRank(INT4, np.array([[1], [-2], [7]]), np.array([[3, -8]]))
    assert block.dense().tolist() == [[3, -8], [-6, 16], [21, -56]] and (block.shape, block.rank, block.frac) == ((3, 2), 1, 6)
    assert (block.stored_values, block.value_bits, block.index_bits) == (5, 20, 4)  # three values padded to two bytes
    assert [array.tolist() for array in block.arrays.values()] == [[0x1E, 0x70], [0x38]]


def test_low_rank_bounds_by_hand():
    """V x could reach 4 * 2 and 6 * 2, so a row of U V x (1 * 8 + 3 * 12) although the dense row is 0 everywhere."""
    block = PackedLowRank(INT4, np.array([[3, -1], [0, 1]]), np.array([[1, -3], [3, -3]]))
    assert block.dense().tolist() == [[0, -6], [3, -3]]
    assert (block.inner_bounds(2), block.row_bounds(2), block.inner_bits(2)) == ([8, 12], [36, 12], 5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fmt", [QFormat(2, 1), QFormat(5, 9), QFormat(16, 14), QFormat(3, 3, signed=False)], ids=str)
def test_restore_gives_the_same_block(form, fmt):
    block = MAKERS[form]((12, 10), np.random.default_rng(2), fmt=fmt)
    again = FORMS[form].restore(block.arrays, block.shape, fmt, block.describe())
    assert type(again) is FORMS[form] and again.fmt == fmt and again.shape == block.shape
    assert again.dense().dtype == np.int64 and np.array_equal(again.dense(), block.dense())
    assert (again.value_bits, again.index_bits) == (block.value_bits, block.index_bits)


def test_makers_cover_every_form():
    assert set(MAKERS) == set(FORMS)


# Layers.


def test_layer_names_sizes_and_alignment():
    fracs = {("ih", "i"): 7, ("hh", "i"): 3, ("ih", "f"): 2, ("hh", "f"): 7}
    layer = layer_of(lambda part, gate, shape, rng: dense(shape, rng, QFormat(8, fracs.get((part, gate), 7))))
    assert (layer.input_size, layer.hidden_size, layer.gates) == (6, 8, ("i", "f", "g", "o"))
    assert layer.block("hh", "f") is layer.blocks["lstm.weight_hh_l0.f"]
    # Product fracs: input has 12, hidden 15.
    assert layer.alignment("i") == (19, 0, 1)  # 7 + 12 = 19; 3 + 15 = 18
    assert layer.alignment("f") == (22, 8, 0)  # 2 + 12 = 14; 7 + 15 = 22
    assert layer.alignment("g") == (22, 3, 0)


def test_row_bound_by_hand():
    values = {"ih": np.array([[3, -4]]), "hh": np.array([[-2]])}
    bias = {gate: np.array([-7]) for gate in "ifgo"}
    layer = layer_of(lambda part, gate, shape, rng: PackedDense(values[part], QFormat(8, 7)), 1, 2, bias=bias)
    # |-2**15| of a 16-bit signal is the largest; the input's frac is 3 less.
    assert layer.row_bounds() == dict.fromkeys("ifgo", (7 * 2**15 << 3) + 2 * 2**15 + 7)


def test_row_bounds_of_a_gru_and_of_a_projection_by_hand():
    values = {"ih": np.array([[3, -4], [0, 0]]), "hh": np.array([[-2, 1], [1, 1]]), "hr": np.array([[5, -6]])}

    def make(part, gate, shape, rng):
        return PackedDense(values[part][:, : shape[1]], QFormat(8, 7))

    gru = layer_of(make, 2, 2, cell="GRU", bias={gate: np.array([-7, 9]) for gate in ("r", "z", "n", "hn")})
    assert [gru.bias_fracs[gate] for gate in ("r", "z", "n", "hn")] == [22, 22, 29, 22]
    # The product r * s has 16 + 13 fraction bits, W_in x has 7 + 12: the latter moves by 10.
    assert gru.alignment("n") == (29, 10, 0)
    assert gru.row_bounds() == {"r": (7 * 2**15 << 3) + 3 * 2**15 + 7, "z": (7 * 2**15 << 3) + 3 * 2**15 + 7,
                                "hn": 3 * 2**15 + 7, "n": (7 * 2**15 << 10) + 7 + 65535 * 2**15}
    projected = layer_of(make, 2, 2, projection=1, bias={gate: np.array([-7, 9]) for gate in "ifgo"})
    assert (projected.hidden_size, projected.output_size, projected.projected) == (2, 1, True)
    assert projected.row_bounds() == dict.fromkeys("ifgo", (7 * 2**15 << 3) + 2 * 2**15 + 7) | {"p": 11 * 2**15}
    assert projected.product_frac("hr", "p") == 7 + 14


def test_overflow_is_refused_at_the_very_bound():
    def layer(bias):
        return layer_of(lambda part, gate, shape, rng: PackedDense(np.full(shape, weight), QFormat(18, 17)), 1, 1,
                        bias={gate: np.array([bias]) for gate in "ifgo"}, acc_bits=36)

    weight = 116508  # the input's frac is 3 less: 116508 * 2**15 * (2**3 + 1) = 2**35 - 131072
    layer(131071)
    message = r"gate i needs an accumulator under 36 bits, but a row could reach 34359738368 \(37 bits\)"
    with pytest.raises(ValueError, match=message):
        layer(-131072)


def test_float_bias_is_stored_at_the_aligned_fraction_bits():
    rng = np.random.default_rng(0)
    bias = {gate: rng.normal(size=8) for gate in "ifgo"}
    blocks = layer_of().blocks
    layer = PackedLayer.from_float_bias("LSTM", blocks, bias, SIGNALS, LINEAR)
    for gate in "ifgo":
        frac = layer.alignment(gate)[0]
        assert layer.bias[gate].tolist() == [int(np.floor(b * 2**frac + 0.5)) for b in bias[gate]]
    bias["f"][3] = 2.0 ** (31 - layer.alignment("f")[0])
    with pytest.raises(ValueError, match="the bias of gate f needs 32 bits at 20 fraction bits, got 2048.0; fewer"):
        PackedLayer.from_float_bias("LSTM", blocks, bias, SIGNALS, LINEAR)
    with pytest.raises(ValueError, match="the bias of gate i needs finite values, got 2 that are not"):
        PackedLayer.from_float_bias("LSTM", blocks, bias | {"i": np.array([0, np.nan, np.inf, *[0] * 5])}, SIGNALS, LINEAR)
    gru = layer_of(cell="GRU")
    bias = {gate: rng.normal(size=8) for gate in ("r", "z", "n", "hn")}
    again = PackedLayer.from_float_bias("GRU", gru.blocks, bias, gru.signals, LINEAR)
    assert again.bias["hn"].tolist() == np.floor(bias["hn"] * 2**gru.product_frac("hh", "n") + 0.5).tolist()


# Ratios.


def test_ratios_by_hand():
    def make(part, gate, shape, rng):
        if gate == "i":
            return PackedDense(np.ones(shape, dtype=np.int64), QFormat(8, 7))
        if gate == "f":
            return PackedSparse.from_dense(np.eye(*shape, dtype=np.int64), QFormat(4, 3))
        return PackedCirculant(shape, QFormat(4, 3), 4, np.ones((1, 1, 4), dtype=np.int64))

    model = PackedModel({"lstm.l0": layer_of(make, hidden=4, inputs=3)}, rnn_bias_params=16, other_params=10)
    # Per gate 4 x 3 and 4 x 4. Stored: i 12 + 16, f 3 + 4, g and o 4 + 4 each; bits: i 96 + 128, f 12 + 16, g, o 16 + 16.
    assert model.dense_weights == 4 * 28
    assert model.value_bits == 224 + 28 + 2 * 32
    # f: the diagonal of 4 x 3 at 0, 4, 8 and of 4 x 4 at 0, 5, 10, 15: gaps of 3 and 4. Bytes: ih values 2, indices 1 (2 bits);
    # hh with 2-bit indices 4 + 3 words, 42 bits; 3-bit 4 words, 28 bits; bitmap 32 -> 3-bit: values 2, indices 2.
    assert model.blocks["lstm.weight_ih_l0.f"].index_bits == 8 * 3 - 12
    assert model.blocks["lstm.weight_hh_l0.f"].index_bits == 8 * 4 - 16
    assert model.index_bits == 28
    assert model.cr_params == 112 / (28 + 7 + 16)
    assert model.stored_values == 28 + 7 + 16 and model.mean_bits == model.value_bits / (28 + 7 + 16)
    assert model.cr_bits == 32 * 112 / 316
    assert model.cr_disk == 32 * 112 / 344
    assert model.cr_model == (32 * 112 + 32 * 26) / (344 + 32 * 26)


def file_header(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length])


def test_the_bytes_of_the_file_are_the_ratio(model, tmp_path):
    header = file_header(model.save(tmp_path / "model.safetensors"))
    about = {name: entry for name, entry in header.items() if name != "__metadata__"}
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in about.items()}
    weights = sum(size for name, size in sizes.items() if ".weight_" in name)
    assert weights * model.cr_disk == pytest.approx(4 * model.dense_weights, rel=1e-15)
    assert weights * 8 == model.value_bits + model.index_bits
    # Everything else is biases (32 bits) and tables (their knots: 16 bits).
    rest = {name: size for name, size in sizes.items() if ".weight_" not in name}
    assert rest == {f"lstm.l0.bias/{gate}": 4 * 8 for gate in "ifgo"} | {f"lstm.l0.table.{t}/knots": 2 * 257 for t in LINEAR}


# Files.


def test_save_and_load_round_trip(model, tmp_path):
    path = model.save(tmp_path / "model.safetensors")
    again = load(str(path))
    layer, loaded = model.layers["lstm.l0"], again.layers["lstm.l0"]
    assert list(again.layers) == ["lstm.l0"] and list(loaded.blocks) == list(layer.blocks)
    for name, block in layer.blocks.items():
        assert type(loaded.blocks[name]) is type(block) and loaded.blocks[name].fmt == block.fmt
        assert np.array_equal(loaded.blocks[name].dense(), block.dense())
    for gate in "ifgo":
        assert loaded.bias[gate].dtype == np.int64 and np.array_equal(loaded.bias[gate], layer.bias[gate])
    for name, table in layer.tables.items():
        assert np.array_equal(loaded.tables[name].knots, table.knots)
    assert (loaded.signals, loaded.cell, loaded.acc_bits) == (layer.signals, "LSTM", 48)
    assert (again.rnn_bias_params, again.other_params, again.metadata) == (32, 18, {"task": "tiny"})
    assert (again.cr_params, again.cr_bits, again.cr_disk) == (model.cr_params, model.cr_bits, model.cr_disk)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def layers_of_every_kind(kind="linear"):
    """Two directions of a projected LSTM below two plain ones, and a GRU."""
    below = {f"lstm.l0{end}": layer_of(projection=4, kind=kind, suffix=f"l0{end}") for end in ("", "_reverse")}
    signals = {"input": SIGNALS["hidden"]}
    above = {f"lstm.l1{end}": layer_of(kind=kind, suffix=f"l1{end}", inputs=8, signals=signals) for end in ("", "_reverse")}
    return below | above | {
        "decoder.gru.l0": layer_of(cell="GRU", kind=kind, signals={"hidden_product": QFormat(14, 9)}, path="decoder.gru")}


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_of_layer_and_table_survives_the_file(kind, tmp_path):
    model = PackedModel(layers_of_every_kind(kind), 32, 0)
    again = load(model.save(tmp_path / "model"))
    assert list(again.layers) == list(model.layers) and again.cr_disk == model.cr_disk
    for layer, loaded in zip(model.layers.values(), again.layers.values(), strict=True):
        assert (loaded.cell, loaded.signals, loaded.table_kind) == (layer.cell, layer.signals, kind)
        assert {name: b.tolist() for name, b in loaded.bias.items()} == {name: b.tolist() for name, b in layer.bias.items()}
        assert all(np.array_equal(loaded.blocks[name].dense(), block.dense()) for name, block in layer.blocks.items())
        for function, uses in table_uses(layer.cell, layer.signals).items():
            for in_fmt, out_fmt in uses:
                q = np.arange(in_fmt.min, in_fmt.max + 1, 13)
                assert np.array_equal(*(one.tables[function].lookup(q, in_fmt, out_fmt) for one in (layer, loaded)))
    about, tensors = read_tensors(tmp_path / "model", who="", what="packed model", version=FILE_VERSION)
    before = write_tensors(tmp_path / "before", tensors, who="", what="packed model", version=4, about=about)
    assert load(before).cr_disk == model.cr_disk  # a file of before the encoding Whole
    assert [[layer.output_size for layer in directions] for directions in again.stack("lstm")] == [[4, 4], [8, 8]]
    assert again.paths == ["lstm", "decoder.gru"] and len(again.stack("decoder.gru")) == 1
    with pytest.raises(ValueError, match="PackedModel has the recurrent modules 'lstm', 'decoder.gru', none at 'gru'"):
        again.stack("gru")
    assert repr(again).startswith("<PackedModel of lstm.l0, lstm.l0_reverse, ")
    assert f"cr_disk {again.cr_disk:.4g}, " in repr(again)
    layer = again.layers["lstm.l0"]
    assert repr(layer) == (f"<PackedLayer, LSTM, {layer.input_size} to {layer.output_size}: "
                           f"{sum(block.storage_bits for block in layer.blocks.values()) // 8:,} bytes of matrices>")


@pytest.mark.parametrize(("change", "message"), [
    ({"lstm.l1": None}, "PackedModel needs every layer and direction of 'lstm', got lstm.l0, lstm.l0_reverse, lstm.l1_reverse"),
    ({"lstm.l0": None, "lstm.l0_reverse": None}, "PackedModel needs every layer and direction of 'lstm'"),
    ({"lstm.2": layer_of()}, 'PackedModel needs layer names like "lstm.l0" or "lstm.l1_reverse", got \'lstm.2\''),
    ({"lstm.l1": layer_of(suffix="l1", inputs=8)}, "PackedModel rounds nothing between the layers of 'lstm'"),
    ({"lstm.l1": layer_of(suffix="l1", inputs=4, signals={"input": SIGNALS["hidden"]})}, "8 values pass, 4 and 8 are taken"),
])
def test_stacks_that_do_not_fit_are_refused(change, message):
    layers = {name: layer for name, layer in (layers_of_every_kind() | change).items() if layer}
    with pytest.raises(ValueError) as caught:
        PackedModel(layers, 0, 0)
    assert message in str(caught.value)


def test_a_block_of_zeros_survives_the_file(tmp_path):
    layer = layer_of(lambda part, gate, shape, rng: PackedSparse.from_dense(np.zeros(shape, dtype=np.int64), INT4))
    again = load(PackedModel({"lstm.l0": layer}, 32, 0).save(tmp_path / "zeros"))
    assert not again.layers["lstm.l0"].block("ih", "i").dense().any()


def test_every_changed_byte_is_noticed(model, tmp_path):
    raw = model.save(tmp_path / "model").read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    rng = np.random.default_rng(0)
    places = [*range(8), *rng.integers(8, header, 400).tolist(), *rng.integers(header, len(raw), 150).tolist(), len(raw) - 1]
    damaged = tmp_path / "damaged"
    for place in places:
        broken = bytearray(raw)
        broken[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(broken)
        with pytest.raises(ValueError, match="^load (needs|reads|found) "):
            load(damaged)


def test_a_changed_type_is_noticed(model, tmp_path):
    raw = model.save(tmp_path / "model").read_bytes()
    assert b'"dtype":"U8"' in raw
    (tmp_path / "damaged").write_bytes(raw.replace(b'"dtype":"U8"', b'"dtype":"I8"', 1))
    with pytest.raises(ValueError, match="load found damage in .*damaged"):
        load(tmp_path / "damaged")


def test_truncated_files_are_refused(model, tmp_path):
    raw = model.save(tmp_path / "model").read_bytes()
    for length in (0, 1, 7, 8, 100, len(raw) // 2, len(raw) - 1):
        (tmp_path / "short").write_bytes(raw[:length])
        with pytest.raises(ValueError, match="load needs a whole safetensors file, got "):
            load(tmp_path / "short")
    (tmp_path / "long").write_bytes(raw + b"x")
    with pytest.raises(ValueError, match="load needs a whole safetensors file, got "):
        load(tmp_path / "long")


def rewrite(source, target, change):
    """A file of the same tensors whose header `change` has altered in place: {"text": JSON text, "sha256": ...}."""
    header = json.loads(file_header(source)["__metadata__"]["workbench"])
    change(header)
    safetensors.numpy.save_file(safetensors.numpy.load_file(source), target, {"workbench": json.dumps(header)})
    return target


def test_foreign_files_are_refused(model, tmp_path):
    good = model.save(tmp_path / "model")
    pickled = tmp_path / "pickled"
    pickled.write_bytes(pickle.dumps({"weights": [1.0]}))
    plain = tmp_path / "plain"
    safetensors.numpy.save_file({"w": np.zeros(3)}, plain)
    for path, message in (
        (tmp_path / "missing", "load needs a packed model file, got .*missing, which is no file"),
        (tmp_path, "which is no file"),
        (pickled, "load needs a whole safetensors file"),
        (plain, "load needs a packed model, got .*plain, a safetensors file of another origin"),
        (rewrite(good, tmp_path / "no digest", lambda h: h.pop("sha256")), "load found damage in .*no digest"),
        (rewrite(good, tmp_path / "no text", lambda h: h.pop("text")), "load found damage in .*no text"),
        (rewrite(good, tmp_path / "forged", lambda h: h.update(text=h["text"].replace("LSTM", "GRUU"))),
         "load found damage in .*forged"),
        (write_tensors(tmp_path / "older", {}, who="", what="packed model", version=FILE_VERSION - 2, about={}),
         "load reads version 5 of a packed model, got version 3 in .*older"),
        (write_tensors(tmp_path / "other", {}, who="", what="checkpoint", version=FILE_VERSION, about={}),
         "load needs a packed model, got .*other, a checkpoint"),
        (write_tensors(tmp_path / "broken", {}, who="", what="packed model", version=FILE_VERSION, about={"layers": []}),
         "load found a packed model with a broken manifest in .*broken"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path)


def test_indices_that_place_other_words_are_refused():
    block = stored_with(Bitmap(), PackedSparse.from_dense(np.array([[1, 0, 2, 3]]), INT4))
    for bits, count in (([1, 1, 1, 1], 4), ([0, 0, 1, 1], 2)):
        with pytest.raises(ValueError, match=rf"Bitmap\(block=1\) needs {count} words for \(1, 4\), got 3"):
            PackedSparse.restore(block.arrays | {"indices": pack_bits(bits, 1)}, (1, 4), INT4, block.describe())


def hostile(about, rng):
    """The description of a block with one thing changed: a field left out, or a value of another type, sign or size."""
    target = about["encoding"] if "encoding" in about and rng.random() < 0.7 else about
    key = str(rng.choice(list(target)))
    strange = [None, "x", -1, 0, 1, 2, 3, 5, 7, 64, 1.5, True, 10**6, 2**70, [], {}, [3, 4], [-8, 8], [2**40, 2**40],
               *ENCODINGS, *FORMS]
    choice = int(rng.integers(len(strange) + 1))
    if choice == len(strange):
        del target[key]
    else:
        target[key] = strange[choice]


@pytest.mark.parametrize("encoding", [Relative(3), Relative(2, 2), Bitmap(), Bitmap(2), Banks(2, 4), Banks(8, 1), Diagonals(2),
                                      Diagonals(4), Whole()], ids=str)
def test_a_hostile_description_is_refused_or_harmless(encoding, tmp_path):
    """A file with a right digest whose description lies: ValueError, or a block of the right shape and integers."""
    def make(part, gate, shape, rng):
        return stored_with(encoding, PackedSparse.from_dense(in_pattern(encoding, shape, rng, 0.5), INT4))

    manifest, tensors = read_tensors(PackedModel({"lstm.l0": layer_of(make)}, 32, 0).save(tmp_path / "good"), who="",
                                     what="packed model", version=FILE_VERSION)
    rng, refused = np.random.default_rng(0), 0
    for n in range(150):
        about = json.loads(json.dumps(manifest))
        block = about["layers"]["lstm.l0"]["blocks"]["lstm.weight_hh_l0.f"]
        if n:
            hostile(block, rng)
        else:
            block["shape"] = [8, 2**70]
        path = write_tensors(tmp_path / "bad", tensors, who="", what="packed model", version=FILE_VERSION, about=about)
        try:
            block = load(path).blocks["lstm.weight_hh_l0.f"]
        except ValueError:
            refused += 1
        else:
            assert block.shape == (8, 8) and block.dense().shape == (8, 8) and block.dense().dtype == np.int64
    assert refused > 75


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = model.save(tmp_path / "model")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            model.save(path)
    with pytest.raises(TypeError):
        PackedModel(model.layers, 0, 0, {"not": {"json"}}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="PackedModel.save needs an existing directory, got .*nowhere"):
        model.save(tmp_path / "nowhere" / "model")
    with pytest.raises(ValueError, match="PackedModel.save needs the path of a file, got .*, a directory"):
        model.save(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


# Messages.


def arrays(*rows):
    return [np.array(row) for row in rows]


def spectral_layer(block, delta=None, **arguments):
    def make(part, gate, shape, rng):
        return replace(block_circulant(shape, rng, block), datapath="fft")

    layer = layer_of(make, **arguments)
    return layer if delta is None else replace(layer, delta=delta)


def test_transforms_fit_at_the_very_bound():
    spectral_layer(2, signals={"hidden": QFormat(25, 15)})  # sums of two values up to 2**24


@pytest.mark.parametrize("cell", GATES)
def test_the_spectra_are_not_on_disk(cell, tmp_path):
    """The same bytes as for the time domain, and the datapath comes back."""
    layer = spectral_layer(4, cell=cell)
    path = PackedModel({"lstm.l0": layer}, 32, 0).save(tmp_path / "fft")
    again = load(path).layers["lstm.l0"]
    assert again.spectral_blocks == list(layer.blocks) and again.row_bounds() == layer.row_bounds()
    time = replace(layer, blocks={name: replace(block, datapath="time") for name, block in layer.blocks.items()})
    assert PackedModel({"lstm.l0": time}, 32, 0).cr_disk == PackedModel({"lstm.l0": again}, 32, 0).cr_disk
    assert time.row_bounds() != layer.row_bounds() and time.spectral_blocks == []


def wide_inner_layer(row):
    """A layer of two inputs and units whose W_ih have the rank 1 with this V."""
    def make(part, gate, shape, rng):
        return PackedLowRank(QFormat(16, 14), np.ones((2, 1), dtype=np.int64), np.array([row if part == "ih" else [1, 1]]))
    return layer_of(make, hidden=2, inputs=2, signals={"input": QFormat(12, 9)})


def test_sums_of_low_rank_fit_at_the_very_bound():
    wide_inner_layer([(1 << 15) - 1, 0])  # 26 bits and the sign


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedDense(np.array([[8]]), INT4),
         "PackedDense needs integers of QFormat(bits=4, frac=3, signed=True), got 8 to 8"),
        (lambda: PackedDense(np.array([[1.0]]), INT4),
         "PackedDense needs integers of QFormat(bits=4, frac=3, signed=True) as int64, got float64"),
        (lambda: PackedDense(np.array([[1]], dtype=np.int8), INT4), "as int64, got int8"),
        (lambda: layer_of(bias={gate: np.zeros(8) for gate in "ifgo"}), "as int64, got float64"),
        (lambda: PackedSparse((2, 2), INT4, *arrays([0, 1], [1], [3, 3])),
         "PackedSparse needs rows, cols and values of one length, got (2,), (1,) and (2,)"),
        (lambda: PackedSparse((2, 2), INT4, *arrays([1, 0], [0, 0], [3, 3])), "sorted row by row and each once"),
        (lambda: PackedSparse((2, 2), INT4, *arrays([0, 0], [1, 1], [3, 3])), "sorted row by row and each once"),
        (lambda: PackedSparse((2, 2), INT4, *arrays([0, 2], [0, 0], [3, 3])), "PackedSparse needs positions inside (2, 2)"),
        (lambda: PackedSparse((2, 2), INT4, *arrays([0, 0], [0, 2], [3, 3])), "PackedSparse needs positions inside (2, 2)"),
        (lambda: PackedSparse((2, 2), INT4, *arrays([0, 0], [0, 1], [3, 0])), "PackedSparse stores no zeros, got 1"),
        (lambda: PackedSparse((2, 2), INT4, *arrays([0], [0], [-9])), "PackedSparse needs integers of"),
        (lambda: PackedLowRank(INT4, *arrays([[1]], [[8]])), "PackedLowRank needs integers of"),
        (lambda: PackedLowRank(INT4, *arrays([[1], [1]], [[1], [1]])),
         "PackedLowRank needs factors (out, rank) and (rank, in) of a rank from 1 to the smaller side, got (2, 1) and (2, 1)"),
        (lambda: PackedLowRank(INT4, *arrays([[1, 1]], [[1], [1]])), "got (1, 2) and (2, 1)"),  # rank 2 of a 1 x 1 block
        (lambda: PackedLowRank(QFormat(32, 0), *arrays([[1, 1]] * 2, [[1, 1]] * 2)),
         "PackedLowRank needs products under 2**63, got rank 2 and QFormat(bits=32"),
        # Row sums of |V|: 2**15 + 2**14, times 2**11 of a 12-bit signal: 27 bits and the sign.
        (lambda: wide_inner_layer([-(1 << 15), 1 << 14]),
         "lstm.weight_ih_l0.i needs sums V x that multiply QFormat(bits=16, frac=14, signed=True) within 18 x 27 bits "
         "(DSP48E2), but with QFormat(bits=12, frac=9, signed=True) they could reach 100663296 (28 bits)"),
        (lambda: Relative(9), "Relative needs a whole width from 2 to 8, got 9"),
        (lambda: Relative(4, 0), "Relative needs a whole block of at least 1, got 0"),
        (lambda: Bitmap("2"), "Bitmap needs a whole block of at least 1, got '2'"),
        (lambda: Banks(0, 1), "Banks needs a whole number of banks of at least 1, got 0"),
        (lambda: Banks(2, True), "Banks needs a whole count of at least 1, got True"),
        (lambda: Diagonals(1), "Diagonals needs a whole period of at least 2, got 1"),
        (lambda: PackedCirculant((6, 4), INT4, 4, np.zeros((1, 1, 4), dtype=np.int64)),
         "PackedCirculant needs rows divisible by block 4, got (6, 4)"),
        (lambda: PackedCirculant((4, 5), INT4, 4, np.zeros((1, 1, 4), dtype=np.int64)),
         "PackedCirculant needs vectors (1, 2, 4), got (1, 1, 4)"),
        (lambda: PackedCirculant((4, 4), INT4, 4, np.zeros((1, 1, 4), dtype=np.int64), "dct"),
         "PackedCirculant has the datapaths time, fft, got 'dct'"),
        (lambda: PackedCirculant((6, 6), INT4, 6, np.zeros((1, 1, 6), dtype=np.int64), "fft"),
         "PackedCirculant needs a block that is a power of two for the fft datapath, got 6"),
        (lambda: PackedCirculant((4, 4), INT4, 1, np.zeros((4, 4, 1), dtype=np.int64), "fft"), "the fft datapath, got 1"),
        (lambda: PackedCirculant((4, 4), QFormat(18, 0, False), 4, np.zeros((1, 1, 4), dtype=np.int64), "fft"),
         "PackedCirculant needs values of at most 18 bits for the fft datapath, got QFormat(bits=18, frac=0, signed=False)"),
        (lambda: spectral_layer(8, signals={"hidden": QFormat(25, 15)}),
         "lstm.weight_hh_l0.i needs transforms of at most 27 bits (DSP48E2), but with block 8 and QFormat(bits=25"),
        (lambda: spectral_layer(2, signals={"hidden": QFormat(26, 15)}), "they could reach 67108864 (28 bits)"),
        (lambda: spectral_layer(8, acc_bits=24),
         "needs an accumulator under 24 bits, but a sum of spectrum products could reach"),
        (lambda: spectral_layer(8, delta={"hidden": 3}),
         "lstm.weight_hh_l0.i with differences needs the datapath time: transforms round, so that sums of what changed"),
        (lambda: PackedCirculant((4, 4), INT4, 4, np.full((1, 1, 4), 9)), "PackedCirculant needs integers of"),
        (lambda: PackedLayer("LSTM", layer_of().blocks, {}, {k: v for k, v in SIGNALS.items() if k != "cell"}, LINEAR),
         "PackedLayer needs the signals input, pre, sigmoid, tanh, cell, hidden, got input, pre, sigmoid, tanh, hidden"),
        (lambda: layer_of(signals={"input": QFormat(28, 12)}),
         "lstm.weight_ih_l0.i needs operands of 18 x 27 bits (DSP48E2), got QFormat(bits=8"),
        (lambda: layer_of(lambda p, g, shape, rng: dense(shape, rng, QFormat(19, 12)),
                          signals={"hidden": QFormat(19, 12)}),
         "lstm.weight_hh_l0.i needs operands of 18 x 27 bits"),
        (lambda: layer_of(signals={"sigmoid": QFormat(18, 18, signed=False), "tanh": QFormat(19, 18)}),
         "i*g and o*tanh(c) needs operands of 18 x 27 bits"),
        (lambda: layer_of(signals={"cell": QFormat(16, -8)}),
         "f*c + i*g needs an accumulator under 48 bits, but could reach"),
        (lambda: layer_of(lambda p, g, shape, rng: dense((5, 6) if g == "f" else shape, rng)),
         "lstm.weight_ih_l0.f needs shape (8, 6), got (5, 6)"),
        (lambda: layer_of(bias={gate: np.zeros(3, dtype=np.int64) for gate in "ifgo"}),
         "the bias of gate i needs shape (8,), got (3,)"),
        (lambda: layer_of(bias={gate: np.full(8, 2**31) for gate in "ifgo"}),
         "the bias of gate i needs integers of QFormat(bits=32"),
        (lambda: layer_of(acc_bits=63), "PackedLayer needs whole acc_bits from 2 to 62, got 63"),
        (lambda: layer_of(acc_bits="48"), "PackedLayer needs whole acc_bits from 2 to 62, got '48'"),
        (lambda: layer_of().block("hr", "i"), "none of part 'hr', gate 'i'"),
        (lambda: PackedLayer("RNN", {}, {}, SIGNALS, LINEAR), "PackedLayer holds LSTM, GRU layers, got 'RNN'"),
        (lambda: PackedLayer("GRU", layer_of(projection=4).blocks, {}, SIGNALS, LINEAR),
         "PackedLayer needs an LSTM for a projection, got 'GRU'"),
        (lambda: PackedLayer("LSTM", layer_of().blocks | {"lstm.weight_hh_l0.x": dense((8, 8), np.random.default_rng(0))}, {},
                             SIGNALS, LINEAR), "PackedLayer needs 8 blocks, got lstm.weight_ih_l0.i, "),
        (lambda: PackedLayer("LSTM", layer_of().blocks, layer_of().bias, SIGNALS, LINEAR | {"tanh": ExactTable.build("tanh")}),
         "PackedLayer needs tables of sigmoid and tanh, of one kind, got"),
        (lambda: PackedLayer("LSTM", layer_of().blocks, layer_of().bias, SIGNALS, {"tanh": LINEAR["tanh"]}),
         "PackedLayer needs tables of sigmoid and tanh, of one kind, got"),
        (lambda: layer_of(cell="GRU", bias={gate: np.zeros(8, dtype=np.int64) for gate in "rzn"}),
         "PackedLayer needs the biases r, z, n, hn, got r, z, n"),
        (lambda: layer_of(cell="GRU", signals={"sigmoid": QFormat(2, -1, signed=False)}),
         "PackedLayer needs gate outputs of a GRU that hold 1 - z, got QFormat(bits=2, frac=-1, signed=False)"),
        (lambda: layer_of(cell="GRU", signals={"hidden_product": QFormat(28, 13)}),
         "r*(W_hn h + b_hn) needs operands of 18 x 27 bits (DSP48E2), got QFormat(bits=16"),
        (lambda: layer_of(cell="GRU", signals={"sigmoid": QFormat(18, 18, signed=False), "hidden": QFormat(19, 15)},
                          make=lambda p, g, shape, rng: dense(shape, rng)), "(1 - z)*n and z*h needs operands of 18 x 27 bits"),
        (lambda: layer_of(cell="GRU", acc_bits=33), "(1 - z)*n + z*h needs an accumulator under 33 bits, but could reach"),
        (lambda: layer_of(cell="GRU", signals={"hidden_product": QFormat(16, -8), "input": QFormat(16, 22)}),
         "gate n needs an accumulator under 48 bits"),
        (lambda: layer_of(projection=4, make=lambda p, g, shape, rng: dense((4, 9) if p == "hr" else shape, rng)),
         "lstm.weight_hr_l0.p needs shape (4, 8), got (4, 9)"),
        (lambda: layer_of(projection=4, signals={"unprojected": QFormat(28, 20)}),
         "lstm.weight_hr_l0.p needs operands of 18 x 27 bits"),
        (lambda: unpack_bits(np.zeros(2, dtype=np.uint8), 4, 5, signed=True), "needs 3 bytes for 5 words of 4 bits, got 2"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


def test_directions_without_a_neighbour_must_agree_too():
    """They have one input and one output: what differs there would be read with the wrong format."""
    finer = {"input": QFormat(16, 13)}
    for changed, format_name in ((finer, "input"), ({"hidden": QFormat(16, 14)}, "hidden")):
        layers = {"lstm.l0": layer_of(), "lstm.l0_reverse": layer_of(suffix="l0_reverse", signals=changed)}
        with pytest.raises(ValueError, match="formats of the next must be the same, got QFormat.*QFormat"):
            PackedModel(layers, 0, 0)
        assert SIGNALS[format_name] != changed[format_name]


def rewritten(path, change):
    """The packed file with a changed description under a right SHA-256, as a hostile hand would write it."""
    with safetensors.safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = json.loads(json.loads(file.metadata()["workbench"])["text"])
    text = change(text)
    text = text if isinstance(text, str) else json.dumps(text)
    header = {"workbench": json.dumps({"text": text, "sha256": container._digest(text, tensors)})}
    safetensors.numpy.save_file(tensors, path, metadata=header)


def changed(*keys, value):
    def change(text):
        place = text["about"]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return text

    return change


CIRCULANT = ("layers", "lstm.l0", "blocks", "lstm.weight_ih_l0.g")
SPARSE = ("layers", "lstm.l0", "blocks", "lstm.weight_ih_l0.f")


@pytest.mark.parametrize(("change", "message"), [
    (changed(*CIRCULANT, "block", value=0), "needs a whole block of at least 1, got 0"),
    (lambda text: changed(*CIRCULANT, "block", value=1 << 20)(changed(*CIRCULANT, "shape", value=[1 << 20, 1])(text)),
     r"at most 134217728 weights, padding included, got \[1048576, 1\] in circulant blocks of 1048576"),
    (changed(*SPARSE, "shape", value=[10**6, 10**6]), "at most 134217728 weights, got"),
    (changed(*SPARSE, "shape", value=[8, -6]), "needs a whole size of at least 1, got -6"),
    (changed("other_params", value="many"), "needs a whole other_params of at least 0, got 'many'"),
    (lambda text: [], "found damage"),
    (lambda text: {}, "found damage"),
    (lambda text: "[" * 100_000, "found damage"),
])  # fmt: skip
def test_hostile_files_are_refused_in_words(change, message, model, tmp_path):
    path = model.save(tmp_path / "model.safetensors")
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_tables_must_serve_the_layer():
    layer = layer_of(kind="exact")
    swapped = {"sigmoid": layer.tables["tanh"], "tanh": layer.tables["sigmoid"]}
    with pytest.raises(ValueError, match="needs a table of sigmoid, got one of tanh"):
        replace(layer, tables=swapped)
    empty = {name: TABLES["exact"](name, {}) for name in layer.tables}
    with pytest.raises(ValueError, match="ExactTable of sigmoid has no entries from"):
        replace(layer, tables=empty)
    with pytest.raises(ValueError, match="LinearTable needs inputs of at most 48 fraction bits"):
        layer_of(signals={"pre": QFormat(16, 49)})


def test_a_layer_s_blocks_bear_its_name():
    with pytest.raises(ValueError, match=r"needs in layer lstm\.l1 the blocks .*weight_hh_l1\.f.*, got .*weight_ih_l0\.i"):
        PackedModel({"lstm.l0": layer_of(), "lstm.l1": layer_of(inputs=8, signals={"input": SIGNALS["hidden"]})}, 0, 0)
    with pytest.raises(ValueError, match="PackedModel needs one kind of cell in 'lstm', got GRU and LSTM"):
        PackedModel({"lstm.l0": layer_of(), "lstm.l0_reverse": layer_of(cell="GRU", suffix="l0_reverse")}, 0, 0)


def test_an_exact_table_is_stored_in_the_narrowest_integers():
    arrays = layer_of(kind="exact").tables["sigmoid"].arrays
    assert {name: array.dtype for name, array in arrays.items()} == {"codes0": np.uint16}
