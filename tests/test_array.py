"""The array processor: hand numbers, the literal interpreter as oracle, the engine as oracle, messages."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.array import (
    PRESETS,
    ArraySpec,
    Layout,
    Region,
    execute_layer,
    execute_stack,
    map_block,
    map_layer,
    preset,
    schedule_layer,
)
from workbench.array.interpreter import interpret
from workbench.array.mapping import candidate_layouts, fitting_mappings, least_cycles, place_units, tile_unit
from workbench.array.schedule import _period, schedule_mapping
from workbench.constrain import compress, pack
from workbench.engine import StackEngine, run_layer
from workbench.fixedpoint import TABLES, QFormat
from workbench.methods import BankBalanced, BlockCirculant, BlockSparse, Dense, RowBalanced, Structured, TopK
from workbench.packed import (
    GATES,
    PackedCirculant,
    PackedDense,
    PackedLayer,
    PackedSparse,
    signals_of,
    table_uses,
)
from workbench.plan import uniform
from workbench.quantise import calibrate

SIGNALS = {"input": QFormat(16, 12), "pre": QFormat(16, 12), "sigmoid": QFormat(16, 16, signed=False), "tanh": QFormat(16, 15),
           "cell": QFormat(16, 12), "hidden": QFormat(16, 12), "hidden_product": QFormat(16, 11),
           "unprojected": QFormat(16, 14)}
# Fractions so short that a GRU's r * s is shifted to join W_in x, and the other way about with SIGNALS.
COARSE = SIGNALS | {"sigmoid": QFormat(7, 7, signed=False), "hidden_product": QFormat(10, 5), "tanh": QFormat(8, 7),
                    "unprojected": QFormat(12, 11), "cell": QFormat(12, 9), "pre": QFormat(12, 14)}
KINDS = {"LSTM": {}, "projected": {"proj": 4}, "GRU": {"cell": "GRU"}}  # of layers
SMALL = preset("group4x4").with_(config_cycles=0)


def dense(shape, rng, bits=8, frac=7):
    return PackedDense(rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape), QFormat(bits, frac))


def sparse(shape, rng, density=0.3, frac=7):
    return PackedSparse.from_dense(rng.integers(1, 128, shape) * (rng.random(shape) < density), QFormat(8, frac))


def circulant(shape, rng, block=4, frac=7):
    vectors = rng.integers(-128, 128, (shape[0] // block, -(-shape[1] // block), block))
    return PackedCirculant(shape, QFormat(8, frac), block, vectors)


def pruned(method, shape, rng, frac=7):
    w = method.project(torch.from_numpy(rng.integers(-128, 128, shape)) / 2.0**frac)
    return method.pack(w, QFormat(8, frac))


def layer_of(make, hidden, inputs, seed=0, cell="LSTM", proj=0, signals=SIGNALS, tables="linear"):
    """make(part, gate, shape, rng) -> packed block; proj: outputs of a projection; tables: their kind."""
    rng, gates = np.random.default_rng(seed), GATES[cell]
    blocks = {f"rnn.weight_{part}_l0.{gate}": make(part, gate, (hidden, columns), rng)
              for part, columns in (("ih", inputs), ("hh", proj or hidden)) for gate in gates}
    if proj:
        blocks["rnn.weight_hr_l0.p"] = make("hr", "p", (proj, hidden), rng)
    signals = {name: signals[name] for name in signals_of(cell, bool(proj))}
    built = {name: TABLES[tables].build(name, uses) for name, uses in table_uses(cell, signals).items()}
    biases = [*gates, "hn"] if cell == "GRU" else gates
    return PackedLayer(cell, blocks, {bias: rng.integers(-5000, 5000, hidden) for bias in biases}, signals, built)


def dense_layer(hidden=8, inputs=4, bits=8, hidden_frac=7, **kind):
    return layer_of(lambda part, gate, shape, rng: dense(shape, rng, bits, hidden_frac if part == "hh" else 7), hidden, inputs,
                    **kind)


def hybrid_layer(hidden=16, inputs=6, block=4, **kind):
    """Sparse: i and f, r and z, the projection."""
    return layer_of(lambda part, gate, shape, rng: sparse(shape, rng) if gate in "ifrzp" else circulant(shape, rng, block),
                    hidden, inputs, **kind)


def one_region(spec):
    return Layout((Region(0, 0, spec.rows, spec.cols),))


# Mapping.


@pytest.mark.parametrize("packed", [
    dense((10, 7), np.random.default_rng(0)),
    sparse((10, 7), np.random.default_rng(1)), sparse((9, 3), np.random.default_rng(2), 0),
    circulant((12, 7), np.random.default_rng(3)), circulant((12, 7), np.random.default_rng(4), 6)],
    ids=["dense", "sparse", "sparse, empty", "circulant 4", "circulant 6"])
def test_words_rebuild_the_block(packed):
    units = [u for u in (1, 2, 3, 4, 6) if isinstance(packed, PackedCirculant) and packed.block % u == 0] or [1]
    for unit in units:
        mapping = map_block(packed, 4, 8, unit)
        np.testing.assert_array_equal(mapping.dense(), packed.dense())
        assert mapping.weight_words.sum() == mapping.values.size
        assert mapping.local_rows.sum() == packed.shape[0]


def test_dense_words_by_hand():
    mapping = map_block(dense((8, 6), np.random.default_rng(0)), 4, 4)
    assert mapping.macs.tolist() == [[4, 4, 2, 2]] * 4  # two rows each; six columns over four PE columns
    assert mapping.pe_row_of_row.tolist() == [0, 1, 2, 3] * 2
    assert (mapping.word_bits, mapping.on_chip_bits) == (8, 48 * 8)


def test_sparse_padding_words_by_hand():
    values = np.zeros((4, 8), dtype=np.int64)
    values[2, [0, 4, 5]] = 7, 8, 9  # columns 0 and 4 share a PE, column 5 goes to the next
    mapping = map_block(PackedSparse.from_dense(values, QFormat(8, 7)), 4, 4)
    assert mapping.word_bits == 8 + 1 + 1  # value, one of two local columns, end of row
    assert sorted(mapping.weight_words.sum(axis=1)) == [4, 4, 4, 5]
    assert mapping.padding.sum() == 17 - 3
    assert mapping.on_chip_bits == 17 * 10


def test_circulant_tiles_by_hand():
    packed = circulant((4, 4), np.random.default_rng(0))
    whole = map_block(packed, 4, 4)
    assert (whole.weight_words.max(), whole.macs.max(), whole.macs.sum()) == (4, 16, 16)  # one PE does it all
    split = map_block(packed, 4, 4, unit=2)
    assert (split.weight_words.sum(), split.macs.max(), split.macs.sum()) == (12, 4, 16)  # 4 pieces of 3 words and 4 products


@pytest.mark.parametrize("shape, side, acc_depth, split, unit", [
    ((128, 128), 4, 64, True, 16),  # 8 x 8 tiles keep 4 x 4 PEs busy: nothing is won by cutting
    ((128, 128), 16, 64, True, 8),  # 16 x 16 pieces for 16 x 16 PEs: 64 products + 15 words; whole tiles 256 + 16
    ((128, 40), 16, 64, True, 4),  # 2 pieces of 16 products and 7 words; of 8 x 8 one with 64 and 15
    ((128, 128), 16, 64, False, 16), ((128, 128), 16, 8, False, 8),  # a tile never outgrows the accumulators
])
def test_tile_unit_by_hand(shape, side, acc_depth, split, unit):
    packed = circulant(shape, np.random.default_rng(0), 16)
    assert tile_unit(packed, Region(0, 0, side, side), acc_depth, split) == unit


def test_circulant_padding_is_counted():
    mapping = map_block(circulant((4, 5), np.random.default_rng(0)), 4, 4)
    assert mapping.macs.sum() == 32 and mapping.padding.sum() == 4 * 3
    pieces = map_block(circulant((4, 5), np.random.default_rng(0)), 4, 4, unit=1)  # a piece with padding only is left out
    assert pieces.macs.sum() == 20 and pieces.padding.sum() == 0


def test_place_units_by_hand():
    loads = np.array([[1, 0], [5, 0], [0, 4], [4, 1]])
    # Shares (5, 2.5). 5+0 first; 4+1 to the other PE row; 0+4 where it adds 4 * (0 - 2.5), not 4 * (1 - 2.5); 1+0 last.
    assert [place.tolist() for place in place_units(loads, 2)] == [[1, 0, 0, 1], [0, 0, 1, 1]]
    assert [place.tolist() for place in place_units(np.ones((5, 2), dtype=int), 2)] == [[0, 1, 0, 1, 0], [0, 0, 1, 1, 2]]


def test_every_pass_of_a_placement_has_its_share():
    # One PE row, two passes of two units, shares (4, 4). 1+4 to the first pass (a tie); 4+0 to the second, which adds
    # 4 * (0 - 4), not 4 * (1 - 4); 0+4 to the second again, 4 * (0 - 4) against 4 * (4 - 4); 3+0 has no choice.
    pe_row, local = place_units(np.array([[4, 0], [3, 0], [0, 4], [1, 4]]), 1, depth=2)
    assert pe_row.tolist() == [0] * 4 and local.tolist() == [2, 0, 3, 1]
    # Five units on two PE rows in passes of two: the first PE row has a unit more, in its second pass.
    pe_row, local = place_units(np.ones((5, 1), dtype=int), 2, depth=2)
    assert sorted(zip(pe_row.tolist(), local.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_blocks_that_share_accumulators_are_balanced_each_for_itself():
    """Rows that are heavy in W_ih and light in W_hh, and the other way round, by turns: all have one common load."""
    heavy, light = np.ones(16, dtype=np.int64), np.repeat([1, 0], 8)
    rows = {"ih": np.vstack([heavy, light] * 8), "hh": np.vstack([light, heavy] * 8)}
    layer = layer_of(lambda part, *_: PackedSparse.from_dense(rows[part], QFormat(8, 7)), 16, 16)
    mapping = map_layer(layer, PRESETS["group4x4"], one_region(PRESETS["group4x4"]))
    assert all((block.macs == 4 * 3).all() for block in mapping.blocks.values())  # of four rows two of 4 words, two of 2


def test_every_pass_of_a_block_is_balanced():
    """16 heavy rows, then 16 light ones: in the order of the rows the first pass of four would be all heavy."""
    rows = np.vstack([np.ones((16, 32), dtype=np.int64), np.repeat([[1, 0]], 16, axis=1).repeat(16, axis=0)])  # (32, 32)
    layer, spec = layer_of(lambda part, *_: PackedSparse.from_dense(rows, QFormat(8, 7)), 32, 32), PRESETS["group4x4"]
    mapping = map_layer(layer, spec.with_(acc_depth=4), one_region(spec))
    for block in mapping.blocks.values():
        assert (block.words_between(0, 4) == 2 * 8 + 2 * 4).all() and (block.words_between(4, 8) == 2 * 8 + 2 * 4).all()


def test_placement_balances_better_than_dealing_in_turn():
    packed = sparse((64, 32), np.random.default_rng(5), 0.2)
    greedy, in_turn = map_block(packed, 4, 4), map_block(packed, 4, 4, pe_row_of_unit=np.arange(64) % 4)
    assert greedy.macs.max() < in_turn.macs.max()
    assert greedy.local_rows.max() == 16


@pytest.mark.parametrize(("method", "side", "columns"), [
    (Structured(8), 4, 128), (Structured(8), 16, 128), (Structured(4), 8, 32), (BankBalanced(1 / 8, 16), 16, 128),
    (BankBalanced(1 / 8, 16), 4, 128), (BankBalanced(0.5, 4), 4, 12)], ids=str)  # fmt: skip
def test_balanced_patterns_give_every_pe_equal_work(method, side, columns):
    w = method.project(torch.randn(128, columns, generator=torch.Generator().manual_seed(0)))
    mapping = map_block(method.pack(w, QFormat(24, 20)), side, side)  # so fine that no weight becomes zero
    assert mapping.padding.sum() == 0 and mapping.macs.min() == mapping.macs.max() == int((w != 0).sum()) // side**2
    assert mapping.local_rows.tolist() == [128 // side] * side


def test_dense_baseline_needs_5376_words_on_one_group():
    layer = dense_layer(128, 40, bits=16)
    mapping = fitting_mappings(layer, PRESETS["group4x4"], one_region(PRESETS["group4x4"]))[0]
    assert mapping.memory_words.max() == 5376
    assert mapping.macs.sum() == 4 * 128 * 168
    for m in fitting_mappings(layer, PRESETS["group4x4"], one_region(PRESETS["group4x4"])):
        assert m.resident_words.max() + 2 * m.layout.stream_words <= 2048
        resident_bits = m.on_chip_bits - m.streamed_bits
        assert resident_bits == m.resident_words.sum() * 16


# Cycles by hand.


def spans(schedule, step=0):
    return {op.name: (op.start, op.end) for op in schedule.operations if op.step == step}


def test_one_block_by_hand():
    """8 x 8 on 4 x 4 PEs: 4 multiply-accumulates, 4 cycles of pipeline, 2 rows, 3 hops = 13 cycles."""
    found = spans(schedule_layer(dense_layer(hidden_frac=6), SMALL, 1))
    assert found["drain i hh"][1] - found["mac i hh"][0] == 13


def test_one_step_by_hand():
    schedule = schedule_layer(dense_layer(hidden=8, inputs=4), SMALL, 1)
    assert spans(schedule, -1)["x to PEs"] == (0, 4)  # one word per cycle
    assert spans(schedule) == {
        "mac i ih": (4, 10), "mac f ih": (6, 12),  # 2 rows x 1 column, then 4 cycles of pipeline
        "mac g ih": (8, 14), "mac o ih": (10, 16),
        "mac i hh": (12, 20), "mac f hh": (16, 24),  # 2 rows x 2 columns
        "drain i ih+hh": (20, 25), "drain f ih+hh": (24, 29),  # 2 rows, 3 hops
        "mac g hh": (25, 33), "mac o hh": (29, 37),  # g waits for the drain of i, in the same bank; o for that of f
        "drain g ih+hh": (33, 38), "drain o ih+hh": (37, 42),
        "act i": (25, 31), "act f": (29, 35), "act g": (38, 44),  # 8 values on 4 units: 2 cycles, then 4 of latency
        "cell": (44, 52), "tanh c": (52, 58), "act o": (54, 60), "h": (60, 66), "h to PEs": (66, 74),
    }
    assert schedule.cycles == schedule.first_step_latency == 74
    # Back from the end: h to PEs 8, h 6, act o 6, tanh c 2 (act o waited for the units), cell 8, act g 6, drain g 5,
    # W_hh of g 4 + 4 of pipeline, drain i 5, W_hh of i 4 + 4 of pipeline, four W_ih of 2 each, x 4.
    assert schedule.split() == {
        "multiply": 16, "stall": 8, "drain": 10, "activation": 28, "multicast": 12, "load": 0, "config": 0}


def test_what_binds_each_product_by_hand():
    """Of the step above: 2 rows x 1 and x 2 columns, 2 rows drained. With 4 words of memory all but a few weights come in every
    step, 8 bits a cycle."""
    expected = {"layer": "", "region": 0, "compute": 2 + 4, "memory": 0, "links": 2, "bound": "compute"}
    assert schedule_layer(dense_layer(8, 4), SMALL, 2).products() == [{"sum": gate} | expected for gate in "ifgo"]
    spec = SMALL.with_(weight_words=4, load_bits_per_cycle=8)
    streamed = schedule_layer(dense_layer(8, 4), spec, 2)
    rows = streamed.products()
    assert {row["bound"] for row in rows} == {"memory"} and [row["compute"] for row in rows] == [6] * 4
    assert sum(row["memory"] for row in rows) == streamed.mapping.streamed_bits / 8
    wide = schedule_layer(dense_layer(8, 4), SMALL.with_(cols=32), 2)  # 2 rows x 1 column, of x and of h
    assert [(row["compute"], row["links"]) for row in wide.products()] == [(4, 2)] * 4


def test_one_gru_step_by_hand():
    """n's inputs are drained apart, as W_hn h is rounded first. z waits on the units behind n, for 2 cycles here."""
    schedule = schedule_layer(dense_layer(hidden=8, inputs=4, cell="GRU"), SMALL, 1)
    assert spans(schedule) == {
        "mac n ih": (4, 10), "drain n ih": (10, 15),  # x is there at 4; 2 rows x 1 column, 4 of pipeline; 2 rows, 3 hops
        "mac r ih": (6, 12), "mac z ih": (8, 14),
        "mac r hh": (10, 18), "drain r ih+hh": (18, 23), "act r": (23, 29),  # 2 rows x 2 columns; 8 values on 4 units
        "mac n hh": (15, 23), "drain n hh": (23, 28),  # in the bank of n's inputs, which are drained at 15
        "s": (28, 34), "r*s": (34, 40), "act n": (40, 46),  # each 2 cycles, then 4 of latency
        "mac z hh": (23, 31), "drain z ih+hh": (31, 36), "act z": (42, 48),  # in the bank of r; the units are busy with n
        "h": (48, 56), "h to PEs": (56, 64),  # two products an element; one word per cycle
    }
    assert schedule.cycles == schedule.first_step_latency == 64
    # Back from the end: h to PEs 8, h 8, act z 6, act n 2 (act z waited for the units), r*s 6, s 6, drain of W_hn h 5,
    # W_hn h 4 + 4 of pipeline, drain of n's inputs 5, W_in x 2 + 4 of pipeline, x 4.
    assert schedule.split() == {
        "multiply": 6, "stall": 8, "drain": 10, "activation": 28, "multicast": 12, "load": 0, "config": 0}


def test_one_projected_step_by_hand():
    """8 units, 4 outputs: W_hh has one column per PE, W_hr one row and two columns."""
    schedule = schedule_layer(dense_layer(hidden=8, inputs=4, proj=4), SMALL, 1)
    assert spans(schedule, -1) | spans(schedule) == spans(schedule, -1) | {  # W_ih x of i and f: ahead, in step -1
        "mac i ih": (4, 10), "mac f ih": (6, 12), "mac g ih": (8, 14), "mac o ih": (10, 16),
        "mac i hh": (12, 18), "mac f hh": (14, 20),  # 2 rows x 1 column
        "drain i ih+hh": (18, 23), "drain f ih+hh": (20, 25),
        "mac g hh": (23, 29), "mac o hh": (25, 31),  # behind the drains of i and f in the same banks
        "drain g ih+hh": (29, 34), "drain o ih+hh": (31, 36),
        "act i": (23, 29), "act f": (25, 31), "act g": (34, 40), "cell": (40, 48), "tanh c": (48, 54), "act o": (50, 56),
        "m": (56, 62), "m to PEs": (62, 70),  # 8 words
        "mac p hr": (70, 76), "drain p hr": (76, 80),  # 1 row x 2 columns; 1 row, 3 hops
        "h": (80, 85), "h to PEs": (85, 89),  # 4 values on 4 units: 1 cycle, then 4 of latency; 4 words
    }
    assert schedule.cycles == 89
    # Back from the end: h to PEs 4, h 5, drain p 4, W_hr 2 + 4, m to PEs 8, m 6, act o 6, tanh c 2, cell 8, act g 6,
    # drain g 5, W_hh of g 2 + 4, drain i 5, W_hh of i 2 + 4, four W_ih of 2 each, x 4.
    assert schedule.split() == {
        "multiply": 14, "stall": 12, "drain": 14, "activation": 33, "multicast": 16, "load": 0, "config": 0}


def test_a_projection_waits_while_the_next_inputs_are_multiplied():
    """W_ih x of the next step's i and f, 8 of 8 + 4 parts of four gates, runs while m is computed and sent, from 31 to 70."""
    schedule = schedule_layer(dense_layer(hidden=8, inputs=4, proj=4), SMALL, 2)
    assert spans(schedule, -1) == {"configuration": (0, 0), "x to PEs": (0, 4), "mac i ih": (4, 10), "mac f ih": (6, 12)}
    found = {(op.sequence_step, op.name): (op.start, op.end) for op in schedule.operations}
    # i takes the bank of o, drained at 36 (five sums a step: p is the fifth); f that of g.
    assert found[1, "mac i ih"] == (36, 42) and found[1, "mac f ih"] == (38, 44)
    assert found[0, "mac p hr"] == (70, 76) and found[0, "drain p hr"] == (76, 80)
    assert found[1, "mac g ih"] == (72, 78) and found[1, "mac o ih"] == (80, 86)  # o takes the bank of p
    assert found[1, "mac i hh"] == (89, 95)  # h is in the PEs


def test_nothing_begins_ahead_that_the_accumulators_do_not_hold():
    """8 rows of each gate in passes of 5 and 3, 7 of the projection in two of 5 and 2: then i is summed in the bank of p."""
    layer, ahead = dense_layer(hidden=32, inputs=4, proj=28), []
    for depth in (5, 10):
        mapping = map_layer(layer, SMALL.with_(acc_depth=depth), one_region(SMALL))
        ahead.append([i.name for i in mapping.program if i.kind == "mac" and i.lag < 0])
        check_against_interpreter(mapping, 2, seed=0)
    assert ahead == [[], ["mac i ih"]]


@pytest.mark.parametrize(("frac", "cycles", "idle_before"), [(7, 2382, 2555), (6, 2304, 2555)])
def test_a_projected_step_is_hardly_longer_than_its_multiplications(frac, cycles, idle_before):
    """512 units, 128 outputs, 128 inputs: 2304 multiply-accumulates a PE. Sums that are drained apart leave no bank waiting."""
    layer, spec = dense_layer(512, 128, proj=128, hidden_frac=frac), PRESETS["array16x16"].with_(weight_words=8192)
    schedule = schedule_layer(layer, spec, 20)
    assert schedule.steady_state_cycles == cycles and schedule.mapping.macs.max() == 2304
    in_order = map_layer(layer, spec, one_region(spec), ahead=False)
    assert schedule_mapping(in_order, 20).steady_state_cycles == idle_before


@pytest.mark.parametrize(("kind", "per_step"), [
    # 6 blocks, and n's two sums are drained apart: 4 drains of 8 rows. Look-ups: r, n, z; products: r*s, two for h.
    ("GRU", {"macs": 288, "acc_reads": 16 * 2 * 6 + 128, "link_words": 128, "activation_lookups": 24,
             "elementwise_multiplies": 24, "roundings": 8, "multicast_words": 12, "data_writes": 48}),
    # 8 blocks of 8 x 4 and one of 4 x 8; m goes to the PEs, too.
    ("projected", {"macs": 288, "acc_reads": 16 * (2 * 8 + 1) + 144, "link_words": 144, "activation_lookups": 40,
                   "elementwise_multiplies": 24, "roundings": 4, "multicast_words": 16, "data_writes": 16 + 32 + 16})])
def test_events_of_other_cells_by_hand(kind, per_step):
    counts = schedule_layer(dense_layer(hidden=8, inputs=4, **KINDS[kind]), SMALL, 3).counts()
    assert {event: counts[event] for event in per_step} == {event: 3 * count for event, count in per_step.items()}


def test_events_by_hand():
    counts = schedule_layer(dense_layer(hidden=8, inputs=4), SMALL, 3).counts()
    # A PE turns to 2 rows in each of 8 blocks, and 8 rows of 4 gates are drained over 4 PE columns.
    per_step = {"macs": 384, "padding_macs": 0, "weight_reads": 384, "data_reads": 384, "acc_reads": 16 * 2 * 8 + 128,
                "acc_writes": 16 * 2 * 8, "link_words": 128, "activation_lookups": 40, "elementwise_multiplies": 24,
                    "roundings": 0, "multicast_words": 12, "data_writes": 4 * 4 + 8 * 4,
                "loaded_bits": 0, "weight_writes": 0, "skipped_macs": 0, "transform_operations": 0}
    assert counts == {event: 3 * count for event, count in per_step.items()}


def test_circulant_reads_each_weight_once():
    layer = layer_of(lambda part, gate, shape, rng: circulant(shape, rng), 8, 4)
    counts = schedule_layer(layer, SMALL, 1, one_region(SMALL)).counts()
    assert counts["macs"] == 384 and counts["weight_reads"] == 384 // 4
    # Word d of a 4 x 4 tile adds to the rows d, d+1, d+2, d+3 (mod 4) in turn: every product turns to another row.
    assert counts["acc_writes"] == 384


def test_wide_words_take_several_memory_words():
    """16-bit values with 2 of 8 columns per PE: 16 + 1 + 1 bits, one memory word of 18 or two of 9."""
    layer = layer_of(lambda part, gate, shape, rng: PackedSparse.from_dense(
        rng.integers(200, 30000, shape) * (rng.random(shape) < 0.5), QFormat(16, 7)), 8, 8)
    one, two = (schedule_layer(layer, SMALL.with_(weight_word_bits=bits), 1) for bits in (18, 9))
    assert two.counts()["weight_reads"] == 2 * one.counts()["weight_reads"] == 2 * one.counts()["macs"]
    macs = {name: span for name, span in spans(one).items() if name.startswith("mac")}
    for name, (start, end) in macs.items():
        other = spans(two)[name]
        assert other[1] - other[0] - 4 == 2 * (end - start - 4)  # 4 cycles of pipeline either way
    assert {name: two.counts()[name] for name in ("macs", "acc_reads", "data_reads")} == {
        name: one.counts()[name] for name in ("macs", "acc_reads", "data_reads")}
    narrow = SMALL.with_(weight_words=24, weight_word_bits=9, load_bits_per_cycle=18)
    streamed = schedule_layer(layer, narrow, 1)
    assert streamed.counts()["weight_writes"] == 2 * streamed.counts()["loaded_bits"] // 18 > 0


def test_one_bank_multiplies_or_drains():
    """As above, but each W_hh waits for the drain before it: 4 cycles, 4 of pipeline, then 2 rows and 3 hops."""
    schedule = schedule_layer(dense_layer(hidden=8, inputs=4), SMALL.with_(acc_banks=1), 1)
    found = {name: span for name, span in spans(schedule).items() if "hh" in name}
    assert found == {"mac i hh": (12, 20), "drain i ih+hh": (20, 25), "mac f hh": (25, 33), "drain f ih+hh": (33, 38),
                     "mac g hh": (38, 46), "drain g ih+hh": (46, 51), "mac o hh": (51, 59), "drain o ih+hh": (59, 64)}


@pytest.mark.parametrize("name", ["group4x4", "array16x16"])
def test_second_bank_hides_the_drain(name):
    spec = preset(name).with_(weight_words=8192)  # nothing is streamed: the loader would hide the drains
    one, two = (schedule_layer(dense_layer(128, 12), spec.with_(acc_banks=n), 4).steady_state_cycles for n in (1, 2))
    assert two < one


def test_interpreter_sees_a_bank_written_and_drained_at_once(monkeypatch):
    layer = dense_layer()
    mapping, x = map_layer(layer, SMALL, one_region(SMALL)), np.zeros((2, 4), dtype=int)
    interpret(mapping, x)
    monkeypatch.setattr("workbench.array.interpreter._Machine._has_bank", lambda *_: True)
    with pytest.raises(RuntimeError, match="hazard: .* bank"):
        interpret(mapping, x)


def test_unequal_product_fractions_drain_apart():
    together, apart = (schedule_layer(dense_layer(hidden_frac=frac), SMALL, 1) for frac in (7, 6))
    assert sum(op.kind == "drain" for op in together.operations) == 4
    assert sum(op.kind == "drain" for op in apart.operations) == 8


def test_streaming_is_bound_by_the_loader():
    spec = PRESETS["group4x4"]
    schedule = schedule_layer(dense_layer(128, 40, bits=16), spec, 20)
    assert schedule.bound == "memory"
    assert schedule.steady_state_cycles >= schedule.mapping.streamed_bits / spec.load_bits_per_cycle
    assert schedule.counts()["loaded_bits"] == 20 * schedule.mapping.streamed_bits
    assert schedule_layer(dense_layer(128, 40, bits=16), spec.with_(weight_words=5376), 20).bound == "compute"


def test_input_weights_are_streamed_first():
    """Words per PE: W_hh 4 x 4 x 1, W_hr 1 x 4, W_ih 4 x 4 x 4; beside two buffers of 10 words, 20 of 40 are left."""
    layout = Layout((Region(0, 0, 4, 4),), stream_words=10)
    mapping = map_layer(dense_layer(16, 16, proj=4), SMALL.with_(weight_words=40), layout)
    assert {i.parts for i in mapping.program if i.kind == "load"} == {("ih",)}
    assert mapping.streamed_bits == 4 * 16 * 16 * 8


@pytest.mark.parametrize("hidden_frac", [7, 6], ids=["shared accumulators", "drained apart"])
@pytest.mark.parametrize("inputs", [12, 40])
def test_streaming_never_starves_the_loader(inputs, hidden_frac):
    spec = PRESETS["group4x4"]
    schedule = schedule_layer(dense_layer(128, inputs, 16, hidden_frac), spec, 20)
    assert schedule.steady_state_cycles == schedule.mapping.streamed_bits / spec.load_bits_per_cycle


def test_padding_and_slow_multiplication_are_told_apart():
    """Empty sparse blocks: every multiply-accumulate is padding, so nothing is multiply; two cycles each count twice."""
    empty = layer_of(lambda part, gate, shape, rng: sparse(shape, rng, 0), 8, 8)
    assert schedule_layer(empty, SMALL, 3).split()["multiply"] == 0
    one, two = (schedule_layer(dense_layer(hidden_frac=6), SMALL.with_(mac_ii=ii), 1) for ii in (1, 2))
    assert [op.multiply for op in two.timed] == [2 * op.multiply for op in one.timed]


@pytest.mark.parametrize("kind", KINDS)
def test_regions_run_side_by_side_and_the_best_layout_wins(kind):
    layer, spec = hybrid_layer(32, 8, 8, **KINDS[kind]), ArraySpec(rows=8, cols=8, h_words_per_cycle=2, act_units=8)
    best = schedule_layer(layer, spec, 6)
    every = [schedule_mapping(m, 6) for layout in candidate_layouts(layer, spec) for m in fitting_mappings(layer, spec, layout)]
    assert len(every) == 6
    assert best.steady_state_cycles == min(s.steady_state_cycles for s in every)
    for schedule in every:
        assert schedule.steady_state_cycles >= least_cycles(layer, spec, schedule.mapping.layout)
    skipped = [row for row in best.candidates if "steady_state_cycles" not in row]
    assert len(best.candidates) == 6 and skipped
    assert all(row["least_cycles"] >= best.steady_state_cycles for row in skipped)
    two = next(s for s in every if len(s.mapping.layout.regions) == 2)
    macs = [op for op in two.operations if op.kind == "mac" and op.step == 0]
    assert {op.region for op in macs} == {0, 1}
    assert any(a.region != b.region and a.start < b.end and b.start < a.end for a in macs for b in macs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_split_utilisation_and_ends_add_up(steps, kind):
    schedule = schedule_layer(hybrid_layer(**KINDS[kind]), PRESETS["array16x16"], steps)
    assert sum(schedule.split().values()) == schedule.cycles == max(op.end for op in schedule.operations)
    assert round(schedule.utilisation().sum() * schedule.cycles) == schedule.counts()["macs"]
    assert all(schedule.operations[n].end <= op.start for op in schedule.operations for n in op.after)
    assert [op["name"] for op in json.loads(schedule.to_json())["operations"]] == [op.name for op in schedule.operations]
    for resource in {op.resource for op in schedule.operations}:
        starts = [op.start for op in schedule.operations if op.resource == resource]
        assert starts == sorted(starts)


def test_steady_state_is_the_distance_of_late_steps():
    schedule = schedule_layer(hybrid_layer(), SMALL, 60)
    length, cycles = schedule.period
    assert schedule.ends[50, -1] - schedule.ends[50 - length, -1] == cycles
    assert schedule.steady_state_cycles == cycles / length


# Batches.


def test_one_step_of_two_items_by_hand():
    """The second item is multiplied while the first is activated; it takes the banks of g and o once they are drained."""
    schedule = schedule_layer(dense_layer(hidden=8, inputs=4), SMALL, 1, batch=2)
    x, alone = spans(schedule, -1), spans(schedule_layer(dense_layer(hidden=8, inputs=4), SMALL, 1))
    assert x["x to PEs"] == (4, 8)  # of the second, behind the first: one word per cycle
    first, second = ({op.name: (op.start, op.end) for op in schedule.operations if (op.step, op.item) == (0, n)}
                     for n in (0, 1))
    assert first == alone
    assert second == {
        "mac i ih": (38, 44), "mac f ih": (42, 48),  # g of the first item is drained at 38, o at 42
        "mac g ih": (44, 50), "mac o ih": (46, 52), "mac i hh": (48, 56), "mac f hh": (52, 60),
        "drain i ih+hh": (56, 61), "drain f ih+hh": (60, 65), "mac g hh": (61, 69), "mac o hh": (65, 73),
        "drain g ih+hh": (69, 74), "drain o ih+hh": (73, 78),
        "act i": (62, 68), "act f": (65, 71),  # the units are busy with h of the first item until 62
        "act g": (74, 80), "cell": (80, 88), "tanh c": (88, 94), "act o": (90, 96), "h": (96, 102), "h to PEs": (102, 110)}
    assert schedule.cycles == schedule.first_step_latency == 110 == sum(schedule.split().values())  # one alone takes 74
    counts, one = (schedule_layer(dense_layer(), SMALL, 3, batch=batch).counts() for batch in (2, 1))
    assert counts == {event: 2 * count for event, count in one.items()}


@pytest.mark.parametrize(("acc_depth", "loads"), [
    (64, 1), (2, 1),  # 4 items in two banks: one row of each PE row at a time
    (1, 2)])  # only two items have a row in the accumulators: the second pair needs every chunk again
def test_streamed_chunks_serve_as_many_items_as_the_accumulators_hold(acc_depth, loads):
    spec = SMALL.with_(weight_words=12, acc_depth=acc_depth)  # of 24
    one, four = (schedule_layer(dense_layer(8, 4), spec, 3, batch=batch) for batch in (1, 4))
    unique = four.mapping.on_chip_bits - 8 * four.mapping.resident_words.sum()
    assert four.counts()["loaded_bits"] == 3 * loads * unique == 3 * four.mapping.streamed_bits > 0
    assert four.initial_load_cycles == -(-8 * four.mapping.resident_words.sum() // spec.load_bits_per_cycle)
    assert four.counts()["macs"] == 4 * one.counts()["macs"]
    check_against_interpreter(four.mapping, 3, seed=0)


def test_a_batch_shares_the_loader_and_hides_the_activations():
    streamed, resident = ([schedule_layer(layer, preset(name), 20, batch=batch) for batch in (1, 4)] for layer, name in (
        (dense_layer(128, 40, bits=16), "group4x4"), (dense_layer(128, 4), "array16x16")))
    assert (streamed[0].bound, streamed[1].bound) == ("memory", "compute")  # the loader serves four as it does one
    assert streamed[1].cycles_per_item < 1.02 * streamed[1].mapping.macs.max() < 0.41 * streamed[0].steady_state_cycles
    assert resident[1].cycles_per_item < 0.91 * resident[0].cycles_per_item
    assert resident[1].first_step_latency > resident[0].first_step_latency
    least = resident[1].mapping.macs.max()
    assert least <= resident[1].cycles_per_item < 1.1 * least
    for schedule in (streamed[1], resident[1]):
        assert sum(schedule.split().values()) == schedule.cycles
        assert round(schedule.utilisation().sum() * schedule.cycles) == schedule.counts()["macs"]


# The interpreter and the engine as oracles.


def test_period_needs_the_whole_past_that_matters():
    assert _period([[0, 0], [5, 3], [10, 8]], depth=2) is None
    assert _period([[0, 0], [5, 3], [10, 8], [15, 13]], depth=2) == (1, 5)
    assert _period([[0, 0], [4, 5], [10, 10], [14, 15], [20, 20]], depth=1) == (2, 10)


def check_against_interpreter(mapping, steps, seed):
    layer = mapping.layer
    x = np.random.default_rng(seed).integers(-4096, 4096, (steps, mapping.batch, layer.input_size))
    literal, schedule = interpret(mapping, x), schedule_mapping(mapping, steps)
    engine, executed = run_layer(layer, x), execute_layer(layer, mapping.spec, x, mapping.layout)
    np.testing.assert_array_equal(np.array(literal.output), engine.output)
    np.testing.assert_array_equal(executed.output, engine.output)
    assert literal.c == (None if engine.c is None else engine.c.tolist())
    assert literal.cycles == schedule.cycles == executed.schedule.cycles
    assert len(literal.spans) == steps * len(mapping.program)
    for (step, n), span in literal.spans.items():
        if step >= 0:
            assert (schedule.starts[step, n], schedule.ends[step, n]) == span, mapping.program[n]
    assert literal.counts == {event: count for event, count in schedule.counts().items() if count}


@st.composite
def tiny_cases(draw):
    hidden, inputs = draw(st.sampled_from([4, 6, 8, 12])), draw(st.sampled_from([1, 3, 5, 8]))

    def block(part, gate, shape, rng):
        frac = draw(st.sampled_from([7, 6]))
        form = draw(st.sampled_from(["dense", "sparse", "circulant"]))
        if form == "sparse":
            return sparse(shape, rng, draw(st.sampled_from([0, 0.2, 0.6])), frac)
        if form == "circulant":
            return circulant(shape, rng, draw(st.sampled_from([k for k in (2, 3, 4) if shape[0] % k == 0])), frac)
        return dense(shape, rng, frac=frac)

    def choose(*values):
        return draw(st.sampled_from(values))

    seed = draw(st.integers(0, 1000))
    kind = choose({}, {"proj": 2}, {"proj": 3}, {"proj": 4}, {"cell": "GRU"}, {"cell": "GRU"})
    layer = layer_of(block, hidden, inputs, seed, signals=choose(SIGNALS, COARSE), tables=choose(*TABLES), **kind)
    spec = ArraySpec(
        rows=choose(4, 8), cols=choose(4, 8), mac_latency=choose(0, 1, 4), mac_ii=choose(1, 2), acc_depth=choose(4, 6, 64),
        acc_banks=choose(1, 2, 3), link_cycles=choose(1, 2, 3), h_words_per_cycle=choose(1, 3, 8), act_units=choose(1, 3, 4),
        act_latency=choose(0, 2), act_ii=choose(1, 2), weight_words=choose(2048, 24, 12), weight_word_bits=choose(18, 8),
        load_bits_per_cycle=choose(7, 64), config_cycles=choose(0, 5))
    layout = draw(st.sampled_from(candidate_layouts(layer, spec)))
    mapping = draw(st.sampled_from(fitting_mappings(layer, spec, layout, choose(1, 1, 2, 3))))
    return mapping, draw(st.sampled_from([1, 2, 4])), seed


@settings(max_examples=200, deadline=None)
@given(tiny_cases())
def test_schedule_equals_the_literal_interpreter(case):
    check_against_interpreter(*case)


@pytest.mark.parametrize("method", [RowBalanced(0.3), BankBalanced(0.3, 4), BlockSparse(0.3, 4), Structured(4)], ids=str)
@pytest.mark.parametrize(("frac", "kind"), [(7, "LSTM"), (6, "LSTM"), (7, "projected"), (6, "GRU")])
def test_pruned_layers_equal_the_literal_interpreter(method, frac, kind):
    layer = layer_of(lambda part, gate, shape, rng: pruned(method, shape, rng, frac if part == "hh" else 7), 16, 5,
                     **KINDS[kind])
    for layout in candidate_layouts(layer, SMALL):
        for mapping in fitting_mappings(layer, SMALL, layout):
            check_against_interpreter(mapping, 3, seed=1)


@pytest.mark.parametrize("changes", [{}, {"weight_words": 24, "load_bits_per_cycle": 5}, {"acc_depth": 4, "acc_banks": 1}])
@pytest.mark.parametrize("kind", KINDS)
def test_interpreter_agrees_beyond_the_transient(changes, kind):
    spec = SMALL.with_(**changes)
    for layer in (dense_layer(**KINDS[kind]), hybrid_layer(8, 3, **KINDS[kind])):
        mapping = schedule_layer(layer, spec, 1).mapping
        check_against_interpreter(mapping, 12, seed=3)


def test_passes_keep_whole_pieces():
    layer = layer_of(lambda part, gate, shape, rng: circulant(shape, rng, 3), 24, 2)
    mapping = map_layer(layer, SMALL.with_(acc_depth=4), one_region(SMALL))  # 6 local rows in two passes of 3, not 4 + 2
    check_against_interpreter(mapping, 2, seed=0)


@pytest.mark.parametrize("make", [dense_layer, hybrid_layer])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "tables", "signals"), [
    ("group4x4", "linear", SIGNALS), ("array16x16", "exact", COARSE), ("vu440", "hard", SIGNALS)])
def test_execution_equals_the_engine(make, kind, name, tables, signals):
    layer = make(32, 12, tables=tables, signals=signals, **KINDS[kind])
    x = np.random.default_rng(1).integers(-9000, 9000, (10, 1, 12))
    executed, engine = execute_layer(layer, preset(name), x), run_layer(layer, x)
    np.testing.assert_array_equal(executed.output, engine.output)
    np.testing.assert_array_equal(executed.h, engine.h)
    np.testing.assert_array_equal(executed.c, engine.c)
    assert np.unique(engine.output).size > 8


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_stacks_run_layer_by_layer(kind, directions):
    width = 4 if kind == "projected" else 8
    stack = [tuple(hybrid_layer(8, inputs, seed=2 * index + reverse, **KINDS[kind]) for reverse in range(directions))
             for index, inputs in enumerate((3, directions * width, directions * width))]
    x = np.random.default_rng(1).integers(-9000, 9000, (5, 1, 3))
    executed, engine = execute_stack(stack, SMALL, x), StackEngine(stack).run(x)
    np.testing.assert_array_equal(executed.output, engine.output)
    np.testing.assert_array_equal([run.h for layer in executed.layers for run in layer], engine.h)
    assert executed.schedule.cycles == sum(schedule_layer(layer, SMALL, 5).cycles for layers in stack for layer in layers)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("method", "tables"), [
    (Dense(), "linear"), (TopK(0.3), "exact"), (BlockCirculant(4), "hard")], ids=str)
@pytest.mark.parametrize("make", [torch.nn.LSTM, partial(torch.nn.LSTM, proj_size=8), torch.nn.GRU],
                         ids=["LSTM", "projected", "GRU"])
def test_trained_stacks_equal_the_engine(make, method, tables):
    torch.manual_seed(0)
    model, x = make(6, 16, num_layers=2, bidirectional=True), torch.randn(9, 8, 6)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        loss = (model(x)[0][..., :4] - x.cumsum(0)[..., :4].tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plan = replace(uniform(model, method, 8, calibrate(model, [x], 12)), activation=tables)
    stack = pack(compress(model, plan), plan).stack("")
    integers = stack[0][0].signals["input"].quantise(x[:, :1].numpy())
    executed, engine = execute_stack(stack, SMALL, integers), StackEngine(stack).run(integers)
    np.testing.assert_array_equal(executed.output, engine.output)
    assert np.unique(engine.output).size > 8


# Bad input.


@pytest.mark.parametrize("changes, message", [
    ({"rows": 0}, "ArraySpec needs rows of at least 1, got 0"),
    ({"cols": 6}, "multiples of 4 (groups of 4 x 4 PEs), got 4 x 6"),
    ({"acc_depth": -1}, "ArraySpec needs acc_depth of at least 1, got -1"),
    ({"rows": -4, "cols": 0}, "ArraySpec needs rows of at least 1, got -4"),
    ({"word_bits": 19}, "word_bits of at most 18 (one DSP48E2 multiplies 27 x 18 bits), got 19"),
    ({"acc_bits": 49}, "acc_bits of at most 48 (one DSP48E2 adds 48 bits), got 49"),
    ({"lookahead": 0}, "ArraySpec needs lookahead of at least 1, got 0"),
])
def test_spec_refuses(changes, message):
    with pytest.raises(ValueError) as error:
        SMALL.with_(**changes)
    assert message in str(error.value)


def test_a_field_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(TypeError, match="ArraySpec has the fields rows, cols, clock_mhz, .*, lookahead, got row"):
        SMALL.with_(row=8)


def test_numbers_of_numpy_are_python_s():
    spec = SMALL.with_(rows=np.int64(SMALL.rows), act_units=np.int8(SMALL.act_units))
    assert spec == SMALL and all(type(value) is int for value in vars(spec).values())


@pytest.mark.parametrize("value", [4.0, True, "4"])
def test_spec_refuses_types(value):
    with pytest.raises(TypeError, match="ArraySpec needs a whole number for act_units"):
        SMALL.with_(act_units=value)


@pytest.mark.parametrize("changes, message", [
    ({"data_words": 3}, "a PE needs 4 data words (x twice, h once), the array has 3 (data_words)"),
    ({"word_bits": 15}, "the array has words of 15 bits (word_bits), got QFormat(bits=16"),
    ({"acc_bits": 40}, "the array has accumulators of 40 bits (acc_bits), the layer needs 48"),
    ({"weight_words": 1}, "the array has 1 (weight_words)"),
])
def test_schedule_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError) as error:
        schedule_layer(dense_layer(), SMALL.with_(**changes), 3)
    assert message in str(error.value)


def test_words_too_wide_are_named_with_what_they_hold():
    layer = dense_layer()
    with pytest.raises(ValueError, match=r"^the array has words of 7 bits \(word_bits\), got .*bits=16, .* for input: "
                       r"give that fewer bits \(calibrate, the plan\), or the array wider words, of at most 18$"):
        schedule_layer(layer, SMALL.with_(word_bits=7), 3)
    layer = replace(layer, delta={"hidden": 1})
    with pytest.raises(ValueError, match=r"got QFormat\(bits=17, .*\) for hidden, whose differences take a bit more: give"):
        schedule_layer(layer, SMALL.with_(word_bits=16), 3)


def test_the_projection_takes_data_words():
    with pytest.raises(ValueError, match=r"needs 5 data words \(x twice, h once, o \* tanh\(c\) once\), the array has 4"):
        schedule_layer(dense_layer(proj=4), SMALL.with_(data_words=4), 3)


def test_batches_are_checked():
    with pytest.raises(ValueError, match=r"needs 8 data words \(x twice, h once, for each of 2 items\), the array has 7"):
        schedule_layer(dense_layer(), SMALL.with_(data_words=7), 3, batch=2)
    for batch in (0, 2.0, True):
        with pytest.raises(ValueError, match=r"a whole number of sequences side by side \(batch\) of at least 1, got"):
            schedule_layer(dense_layer(), SMALL, 3, batch=batch)


def test_weights_that_do_not_fit_a_layout_without_streaming():
    with pytest.raises(ValueError, match=r"take 5376 words in its fullest PE, the array has 2048 \(weight_words\)"):
        map_layer(dense_layer(128, 40, bits=16), PRESETS["group4x4"], one_region(PRESETS["group4x4"]))


def test_layouts_are_checked():
    with pytest.raises(ValueError, match="needs whole groups of 4 x 4 PEs"):
        Region(0, 2, 4, 4)
    with pytest.raises(ValueError, match="do not overlap, inside 4 x 4 PEs"):
        schedule_layer(dense_layer(), SMALL, 1, Layout((Region(0, 0, 4, 4), Region(0, 0, 4, 4))))
    with pytest.raises(ValueError, match="do not overlap, inside 4 x 4 PEs"):
        schedule_layer(dense_layer(), SMALL, 1, Layout((Region(0, 0, 8, 4),)))


def test_unknown_form_step_count_and_preset_are_refused():
    with pytest.raises(ValueError, match="the array maps PackedDense, PackedSparse, PackedCirculant so far, got list"):
        map_block([], 4, 4)
    for steps in (0, 2.0, True):
        with pytest.raises(ValueError, match="a whole number of steps of at least 1, got"):
            schedule_layer(dense_layer(), SMALL, steps)
    with pytest.raises(TypeError, match="needs a PackedLayer and an ArraySpec, got PackedLayer and str"):
        schedule_layer(dense_layer(), "group4x4", 1)
    with pytest.raises(ValueError, match="preset knows group4x4, array16x16, vu440, k26, got 'tpu'"):
        preset("tpu")


@pytest.mark.parametrize("x, message", [
    (np.zeros((2, 2, 3), dtype=int), "execute_layer needs x of shape"),
    (np.zeros((0, 1, 4), dtype=int), "T and B of at least 1"),
    (np.zeros((2, 0, 4), dtype=int), "T and B of at least 1"),
    (np.zeros((2, 1, 4)), "needs integers of"), (np.full((2, 1, 4), 40000), "needs integers of")])
def test_execute_refuses(x, message):
    with pytest.raises(ValueError, match=message):
        execute_layer(dense_layer(), SMALL, x)


def test_the_array_never_loads_torch():
    code = "import sys, workbench.array.cost, workbench.array.interpreter; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
