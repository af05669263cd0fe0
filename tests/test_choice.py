"""Sparse or dense operation: hand numbers, predictions against schedules, every choice of a layer, messages."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_array import KINDS, SMALL, hybrid_layer, layer_of, one_region

from workbench import plots
from workbench.array import PRESETS, compare_operations, crossover, map_block, multiplied, schedule_layer, with_operations
from workbench.array.choice import OPERATIONS, block_cycles, border, cycles_per_word, predicted_cycles
from workbench.array.mapping import fitting_mappings
from workbench.array.schedule import schedule_mapping
from workbench.array.skipping import work_of
from workbench.engine import run_layer
from workbench.fixedpoint import QFormat
from workbench.packed import PackedDense, PackedSparse

ROOMY = SMALL.with_(lookahead=4, word_bits=17, weight_words=8192)


def mixed_layer(hidden, inputs, kind="LSTM", seed=0):
    """Blocks of many densities, all stored sparse, of 16 bits: with the column and the end of row two memory words each."""
    densities = itertools.cycle([0.05, 0.2, 0.35, 0.45, 0.55, 0.7, 0.85, 0.95, 0.5])

    def make(part, gate, shape, rng):
        weights = rng.integers(-2000, 2000, shape) * (rng.random(shape) < next(densities))
        return PackedSparse.from_dense(weights, QFormat(16, 15))

    return layer_of(make, hidden, inputs, seed, **KINDS[kind])


def sequences(layer, count, steps, density, seed=1):
    rng, shape = np.random.default_rng(seed), (steps, 1, layer.input_size)
    return [rng.integers(-4000, 4000, shape) * (rng.random(shape) < density) for _ in range(count)]


@pytest.mark.parametrize(("share", "hold", "lookahead", "cycles"), [
    (0.3, 2, 1, 2),  # nothing is skipped
    (1, 2, 4, 2), (0, 2, 4, 1 / 4),
    (0.5, 1, 4, 0.5 * (1 + 0.0625 / 0.9375)),  # four zeros in a row: 1/16
    (0.1, 2, 2, 0.1 * (2 + 0.81 / 0.19)),
])
def test_cycles_per_word_by_hand(share, hold, lookahead, cycles):
    assert float(cycles_per_word(share, hold, lookahead)) == pytest.approx(cycles)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("lookahead", [2, 4, 8])
def test_cycles_per_word_of_a_long_list(share, lookahead):
    block = map_block(PackedDense(np.ones((4, 160_000), dtype=np.int64), QFormat(8, 0)), 4, 4)
    inputs = (np.random.default_rng(0).random((1, 160_000)) < share).astype(np.int64)
    work = work_of(block, (0, 1), (0, 40_000), inputs, SMALL.with_(lookahead=lookahead))
    assert work.busy[0] / 40_000 == pytest.approx(cycles_per_word(share, 1, lookahead), rel=0.04)


def test_the_border_moves_from_a_half_to_one_as_inputs_become_sparse():
    """Sparse words of two memory words: with every input there they pay below half of the weights; with hardly any the zeros
    that are passed over take the time, a word of either kind as long."""
    assert border(1.0, 4) == 0.5 and border(0.0, 4) == 1
    assert float(border(0.1, 2)) == pytest.approx((1 + 0.81 / 0.19) / (2 + 0.81 / 0.19))
    assert np.all(np.diff(border(np.linspace(0, 1, 20), 4)) < 0)
    assert border(0.3, 1) == 0.5  # a lookahead of 1 skips nothing


@pytest.mark.parametrize("kind", KINDS)
def test_an_operation_changes_no_integer(kind):
    layer = mixed_layer(8, 6, kind)
    x = sequences(layer, 1, 5, 0.5)[0]
    for operations in itertools.product(OPERATIONS, repeat=2):
        chosen = dict(zip(layer.products, itertools.cycle(operations)))
        other = with_operations(layer, chosen)
        np.testing.assert_array_equal(run_layer(other, x).output, run_layer(layer, x).output)
        for block, operation in chosen.items():
            assert isinstance(other.block(*block), OPERATIONS[operation])
            np.testing.assert_array_equal(other.block(*block).dense(), layer.block(*block).dense())
    assert with_operations(layer, dict.fromkeys(layer.products, "sparse")).blocks == layer.blocks  # they keep their encodings


@pytest.mark.parametrize("spec", [ROOMY.with_(lookahead=1), ROOMY.with_(lookahead=1, acc_depth=4, mac_ii=2)])
def test_without_skipping_the_prediction_is_exact(spec):
    layer = mixed_layer(24, 10)
    for operation in OPERATIONS:
        schedule = schedule_layer(with_operations(layer, dict.fromkeys(layer.products, operation)), spec, 3, one_region(spec))
        inputs = {part: values[:, 0] for part, values in multiplied(layer, sequences(layer, 1, 3, 0.3)[0]).items()}
        for block, cycles in block_cycles(schedule).items():
            assert predicted_cycles(schedule.mapping, *block, inputs[block[0]]) == cycles


@pytest.mark.parametrize(("hidden", "inputs", "density"), [(16, 12, 0.3), (32, 32, 0.3), (32, 32, 0.05)])
def test_the_chosen_operations_are_the_best_of_all(hidden, inputs, density):
    """A GRU's 6 blocks: all 64 choices are scheduled."""
    layer = replace(mixed_layer(hidden, inputs, "GRU"), delta={"hidden": 300})
    xs = sequences(layer, 2, 10, density)
    choice = compare_operations(layer, ROOMY, xs)
    found = [multiplied(layer, x) for x in xs]
    every = {}
    for operations in itertools.product(OPERATIONS, repeat=6):
        stored = with_operations(layer, dict(zip(choice.operations, operations, strict=True)))
        (mapping,) = fitting_mappings(stored, ROOMY, one_region(ROOMY))
        every[operations] = sum(schedule_mapping(mapping, 10, inputs).cycles for inputs in found)
    assert choice.cycles["chosen"] == every[tuple(choice.operations.values())] == min(every.values()) < max(every.values())
    assert [choice.cycles[o] for o in OPERATIONS] == [every[(o,) * 6] for o in OPERATIONS]
    assert all(row["best"] and row["lost"] == 0 for row in choice.rows)


def test_rows_say_what_was_predicted_and_scheduled():
    layer = mixed_layer(32, 32)
    spec = PRESETS["array16x16"].with_(lookahead=4)
    choice = compare_operations(layer, spec, sequences(layer, 2, 8, 0.2))
    assert set(choice.operations.values()) == {"dense", "sparse"}
    for row in choice.rows:
        block = row["part"], row["gate"]
        assert row["choice"] == choice.operations[block]
        assert row[f"predicted {row['choice']}"] == min(row[f"predicted {o}"] for o in OPERATIONS)
        weights = layer.block(*block).dense()
        assert row["weight density"] == (weights != 0).mean()
        assert row["input density"] == pytest.approx(0.2, abs=0.05) or row["part"] == "hh"
        for operation in OPERATIONS:
            assert row[f"predicted {operation}"] == pytest.approx(row[f"scheduled {operation}"], rel=0.25)
        assert row[f"sequences {row['choice']}"] == choice.cycles["chosen"]
        assert row["lost"] == 0 or not row["best"]
        assert row["bits dense"] == weights.size * 16
        assert row["bits sparse"] >= (weights != 0).sum() * (16 + 1 + 1)  # one of two local columns, the end of a row
    by_form = {label: some[0].mapping.on_chip_bits for label, some in choice.schedules.items()}
    assert by_form["chosen"] == sum(choice.schedules[o][0].mapping.blocks[block].on_chip_bits
                                    for block, o in choice.operations.items()) < max(by_form.values())


def test_streamed_weights_count_by_what_they_load():
    """On one group 16-bit sparse words load 22 bits where dense ones load 16, but take two memory words: between a half and
    three quarters of the weights what counts is the loads."""
    layer = mixed_layer(96, 24, "GRU")
    spec = PRESETS["group4x4"].with_(lookahead=4, weight_words=1024)
    choice = compare_operations(layer, spec, sequences(layer, 1, 4, 0.3))
    assert choice.schedules["chosen"][0].mapping.streamed_bits
    assert set(choice.operations.values()) == {"dense", "sparse"}
    assert all(row["best"] for row in choice.rows)
    assert choice.cycles["chosen"] < min(choice.cycles[o] for o in OPERATIONS)


def test_crossover():
    rows = crossover(PRESETS["array16x16"], (0.2, 0.45, 0.55, 0.8), (0.05, 0.3, 1.0), (1, 4), shape=(128, 128), steps=6)
    assert len(rows) == 4 * 3 * 2
    for row in rows:
        counted = {o: row[f"counted {o}"] for o in OPERATIONS}
        assert counted[row["best"]] == min(counted.values())
        assert row["right"] == (row["lost"] == 0) and row["lost"] < 0.1
        for operation in OPERATIONS:
            assert row[f"predicted {operation}"] == pytest.approx(counted[operation], rel=0.25)
    assert np.mean([row["right"] for row in rows]) > 0.9
    assert {row["best"] for row in rows if row["weight density"] == 0.2} == {"sparse"}
    assert {row["best"] for row in rows if row["weight density"] == 0.8 and row["input density"] == 1} == {"dense"}
    borders = {(row["lookahead"], row["input density"]): (row["border"], row["ideal border"]) for row in rows}
    assert borders[1, 0.05] == borders[1, 1.0] and 0.4 < borders[1, 1.0][0] < 0.55 and borders[1, 1.0][1] == 0.5
    assert borders[4, 0.05][1] > borders[4, 0.3][1] > borders[4, 1.0][1] == 0.5
    for row in rows:  # it parts what was predicted dense from what was predicted sparse
        assert (row["weight density"] < row["border"]) == (row["choice"] == "sparse")
    only_sparse = crossover(PRESETS["array16x16"], (0.1, 0.2), (1.0,), (4,), shape=(64, 64), steps=2)
    assert all(np.isnan(row["border"]) for row in only_sparse)
    blocks = pd.DataFrame([{"lookahead": 4, "input density": 0.3, "weight density": 0.4, "choice": "sparse"}])
    figure = plots.crossover_figure(pd.DataFrame(rows), blocks)
    assert [axis.get_title() for axis in figure.axes] == ["lookahead 1", "lookahead 4"]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"dense is better", "sparse is better", "predicted wrongly", "predicted border",
                      "predicted ideal border", "real block, sparse chosen"}


def test_bad_operations_are_refused():
    layer = hybrid_layer()
    for bad, got in (([], "none"), ([np.zeros((3, 2, 6), dtype=int)], r"\(3, 2, 6\)")):
        with pytest.raises(ValueError, match=rf"needs sequences of shape \(T, 1, 6\), one at least, got {got}"):
            compare_operations(layer, SMALL, bad)
    with pytest.raises(ValueError, match="as dense or sparse, got 'dense' for the PackedCirculant rnn.weight_hh_l0.g"):
        with_operations(layer, {("hh", "g"): "dense"})
    with pytest.raises(ValueError, match="as dense or sparse, got 'tiles' for the PackedSparse rnn.weight_hh_l0.i"):
        with_operations(layer, {("hh", "i"): "tiles"})
    with pytest.raises(ValueError, match="none of part 'hr', gate 'p'"):
        with_operations(layer, {("hr", "p"): "dense"})
    with pytest.raises(ValueError, match=r"crossover needs densities from 0 to 1, got \[0.5\] of weights and \[1.5\]"):
        crossover(SMALL, [0.5], [1.5], [1])
    assert set(compare_operations(layer, SMALL, sequences(layer, 1, 2, 0.5)).operations) == {
        (part, gate) for part in ("ih", "hh") for gate in "if"}  # circulant blocks have no choice
