"""The design space: every figure that of the scheduler, infeasible points with their reason, the smallest array."""

from collections import Counter
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_array import COARSE, SIGNALS, SMALL, circulant, dense, dense_layer, hybrid_layer, layer_of, pruned, sparse, tiny_cases
from test_array_forms import low_rank, spectral

from workbench.array import (
    ArraySpec,
    Layout,
    Region,
    faster_part,
    grid_points,
    map_block,
    scaled_points,
    schedule_layer,
    schedule_stack,
    smallest_array,
    sweep_space,
    with_weight_bits,
)
from workbench.array.cost import energy, resources
from workbench.array.mapping import (
    candidate_layouts,
    fitting_mappings,
    least_cycles,
    least_loaded_bits,
    map_blocks,
    takes_multicast,
)
from workbench.array.schedule import schedule_mapping
from workbench.array.space import FIGURES
from workbench.methods import BlockCirculant, TopK
from workbench.pareto import pareto_points
from workbench.plots import space_figure
from workbench.tables import smallest_array_table, space_table


def expected(layer, space, n, steps, spec):
    """Figures and layout of one point as the scheduler gives them, or the message with which it refuses."""
    changes = {f.name: int(space[f.name][n]) for f in fields(ArraySpec) if f.name in space}
    try:
        spec = spec.with_(**changes)
        if "weight_bits" in space:
            layer = with_weight_bits(layer, int(space["weight_bits"][n]))
        schedule = schedule_layer(layer, spec, steps)
    except ValueError as error:
        return str(error)
    used, spent = resources(schedule.mapping), energy(schedule.counts())
    return (schedule.steady_state_cycles, schedule.first_step_latency, schedule.cycles, spent.low_pj / 1000,
            spent.high_pj / 1000, used.dsp, used.bram36, *used.lut, *used.ff, schedule.mapping.layout.name)


def check(layer, space, numbers, steps, spec):
    """How many of these points fit without and with streaming, and how many do not."""
    found = Counter()
    for n in numbers:
        wanted = expected(layer, space, n, steps, spec)
        if isinstance(wanted, str):
            assert space["reason"][n] == wanted and not space["fits"][n]
            assert all(np.isnan(space[name][n]) for name in (*FIGURES, "step_us"))
            found["refused"] += 1
        else:
            assert tuple(space[name][n] for name in (*FIGURES, "layout")) == wanted, (n, space["layout"][n])
            assert space["fits"][n] and space["reason"][n] == ""
            assert space["step_us"][n] == wanted[0] / space.get("clock_mhz", np.full(n + 1, spec.clock_mhz))[n]
            found["streamed" if "streaming" in wanted[-1] else "resident"] += 1
    return found


def of_forms(forms, hidden, inputs, seed, **kind):
    makers = {"dense": dense, "sparse": sparse, "circulant": circulant,
              "low rank": lambda shape, rng: low_rank(shape, rng, min(2, *shape)),
              "fft": lambda shape, rng: spectral(shape, rng, 4, 7)}
    return layer_of(lambda part, gate, shape, rng: makers[forms[gate]](shape, rng), hidden, inputs, seed, **kind)


@st.composite
def tiny_spaces(draw):
    """A layer of mixed forms and a few points of random values in every field."""

    def some(*values):
        return np.array(draw(st.lists(st.sampled_from(values), min_size=number, max_size=number)))

    number = draw(st.integers(1, 6))
    forms = {gate: draw(st.sampled_from(["dense", "sparse", "circulant", "low rank", "fft"])) for gate in "ifgorznp"}
    layer = of_forms(forms, draw(st.sampled_from([8, 16])), draw(st.sampled_from([1, 3, 8])), draw(st.integers(0, 99)),
                     signals=draw(st.sampled_from([SIGNALS, COARSE])),
                     **draw(st.sampled_from([{}, {"proj": 4}, {"cell": "GRU"}])))
    points = {
        "rows": some(4, 8, 12, 6), "cols": some(4, 8, 12), "clock_mhz": some(100, 200), "mac_latency": some(0, 1, 4),
        "mac_ii": some(1, 2), "acc_depth": some(4, 6, 64), "acc_banks": some(1, 2, 3), "link_cycles": some(1, 2, 3),
        "h_words_per_cycle": some(1, 3, 8), "act_units": some(1, 3, 4), "act_latency": some(0, 2), "act_ii": some(1, 2),
        "weight_words": some(2048, 24, 12, 2), "weight_word_bits": some(18, 8), "data_words": some(512, 9, 5),
        "load_bits_per_cycle": some(7, 64), "config_cycles": some(0, 5), "weight_bits": some(4, 8, 10, 17)}
    names = draw(st.lists(st.sampled_from(sorted(points)), min_size=1, unique=True))
    return layer, {name: points[name] for name in names}, draw(st.sampled_from([1, 2, 5, 30]))


@settings(max_examples=40, deadline=None)
@given(tiny_spaces())
def test_a_sweep_equals_the_scheduler(case):
    layer, points, steps = case
    spec = ArraySpec(rows=8, cols=4, h_words_per_cycle=2, act_units=5)
    space = sweep_space(layer, points, spec, steps)
    check(layer, space, range(len(space["fits"])), steps, spec)


def test_ten_thousand_points_of_a_pruned_layer_equal_the_scheduler():
    """Hybrid: Top-k 1/8 for i and f, circulant 8 for g and o; 20 points drawn at random."""
    layer = layer_of(lambda part, gate, shape, rng: pruned(TopK(1 / 8) if gate in "if" else BlockCirculant(8), shape, rng),
                     64, 24)
    points = grid_points(
        rows=[4, 8], cols=[4, 8], weight_words=[48, 2048], mac_latency=[1, 4], clock_mhz=range(100, 350, 50),
        load_bits_per_cycle=[16, 32, 64, 128, 256], h_words_per_cycle=[1, 2, 4, 8, 16], act_units=[2, 4, 8, 16, 32])
    assert len(points["rows"]) == 10_000
    space = sweep_space(layer, points)
    assert space["fits"].all()
    found = check(layer, space, np.random.default_rng(0).integers(0, 10_000, 20), 100, ArraySpec())
    assert min(found["streamed"], found["resident"]) > 3


def test_points_are_kept_in_order_and_the_infeasible_have_their_reason():
    space = sweep_space(dense_layer(), {"rows": [4, 6, 4, 8], "weight_words": [2048, 2048, 1, 2048],
                                        "data_words": [512, 512, 512, 3], "weight_bits": [8, 8, 8, 8]}, SMALL, 3)
    assert space["fits"].tolist() == [True, False, False, False]
    assert space["rows"].tolist() == [4, 6, 4, 8] and np.isnan(space["cycles"][1:]).all()
    for reason, part in zip(space["reason"], ("", "ArraySpec needs rows and cols in multiples of 4", "the array has 1 (weight_",
                                              "a PE needs 4 data words (x twice, h once), the array has 3"), strict=True):
        assert reason.startswith(part) if part.startswith(("A", "a")) else part in reason
    wide = sweep_space(dense_layer(), {"weight_bits": [8, 17, 33]}, SMALL, 3)
    assert wide["fits"].tolist() == [True, False, False]
    assert "the array has words of 16 bits" in wide["reason"][1] and "33" in wide["reason"][2]


def test_a_point_with_too_few_accumulators_for_a_transform_has_its_reason():
    layer, points = layer_of(lambda part, gate, shape, rng: spectral(shape, rng, 16), 16, 16), grid_points(acc_depth=[8, 64])
    space = sweep_space(layer, points, SMALL, 3)
    assert space["reason"].tolist() == [
        "a tile of the fft datapath needs 16 accumulators of one PE, the array has 8 (acc_depth)", ""]
    assert space["cycles"][1] == schedule_layer(layer, SMALL.with_(acc_depth=64), 3).cycles
    for limit in (1e-6, 1e6):
        (row,) = smallest_array({"fft": layer}, limit, points=points, spec=SMALL, steps=3)
        assert row["acc_depth"] == 64 and row["meets"] == (limit > 1)


def test_the_smallest_array_passes_over_what_is_no_array():
    layer, points = dense_layer(), {"rows": [4, 6], "cols": [4, 4]}
    (row,) = smallest_array({"a": layer}, 1e-6, points=points, spec=SMALL, steps=3)
    assert not row["meets"] and row["rows"] == 4
    with pytest.raises(ValueError, match="a fits none of 1 arrays: ArraySpec needs rows and cols in multiples of 4"):
        smallest_array({"a": layer}, 1e-6, points={"rows": [6], "cols": [4]}, spec=SMALL, steps=3)


@pytest.mark.parametrize(("axes", "message"), [
    ({}, "grid_points needs the values of one axis at least, got none"),
    ({"load_bits_per_cycle": [64.7]}, "grid_points needs whole numbers, got float64 for load_bits_per_cycle"),
    ({"cols": [4], "rows": [True]}, "grid_points needs whole numbers, got bool for rows")])
def test_a_grid_refuses(axes, message):
    with pytest.raises(ValueError, match=message):
        grid_points(**axes)


def test_a_layout_that_does_not_fit_is_passed_over():
    """Two regions of 8 x 4 PEs keep twice as many columns in a PE as one of 8 x 8."""
    layer = hybrid_layer(16, 8, 8)
    spec = ArraySpec(rows=8, cols=8, data_words=4)
    schedule = schedule_layer(layer, spec, 3)
    assert {region.cols for region in schedule.mapping.layout.regions} == {8}
    refused = [row for row in schedule.candidates if "refused" in row]
    assert refused and all("the array has 4 (data_words)" in row["refused"] for row in refused)
    space = sweep_space(layer, {"data_words": [4, 512]}, spec, 3)
    assert check(layer, space, range(2), 3, spec)["resident"] == 2


def test_layouts_of_equal_regions_and_units_are_scheduled_once():
    schedule = schedule_layer(hybrid_layer(128, 8, 4), ArraySpec(rows=4, cols=4), 2)
    whole, split = schedule.candidates
    assert "steady_state_cycles" in whole and "steady_state_cycles" not in split


def test_a_slow_loop_that_binds_late_is_still_found():
    """A loop of loads takes a cycle more per step than the way from h to h, but is hundreds of cycles ahead at first."""
    spec = ArraySpec(cols=24, acc_banks=1, h_words_per_cycle=2, act_units=8, weight_words=512, load_bits_per_cycle=256)
    layout = Layout((Region(0, 0, 8, 24), Region(8, 0, 8, 24)), stream_words=32)
    schedule = schedule_layer(hybrid_layer(512, 160, 16), spec, 100, layout)
    assert schedule.ends[99, -1] - schedule.ends[98, -1] == 6325 < schedule.steady_state_cycles == 6326


def test_weight_bits_keep_the_support_and_the_range():
    layer = hybrid_layer(16, 6)
    for bits in (4, 12):
        other = with_weight_bits(layer, bits)
        for name, block in layer.blocks.items():
            moved = other.blocks[name]
            assert (moved.fmt.bits, moved.fmt.frac) == (bits, block.fmt.frac + bits - 8)
            if hasattr(block, "rows"):
                np.testing.assert_array_equal(moved.rows, block.rows)
                np.testing.assert_array_equal(np.sign(moved.values), np.sign(block.values))
            error = np.abs(moved.fmt.dequantise(moved.dense()) - block.fmt.dequantise(block.dense())).max()
            assert error <= 2.0**-moved.fmt.frac if bits < 8 else error == 0
        for gate, bias in layer.bias.items():
            np.testing.assert_allclose(other.bias[gate] * 2.0 ** -other.bias_fracs[gate], bias * 2.0 ** -layer.bias_fracs[gate],
                                       atol=2.0 ** -(1 + other.bias_fracs[gate]))


@pytest.mark.parametrize(("points", "message"), [
    ({"pes": [4]}, "sweep_space knows the fields rows, cols, clock_mhz"), ({}, "needs columns of one length, got none"),
    ({"rows": [4, 8], "cols": [4]}, r"one length, got rows \(2,\), cols \(1,\)"), ({"rows": 4}, r"one length, got rows \(\)"),
    ({"rows": [4.0]}, "needs whole numbers, got float64 for rows")])  # fmt: skip
def test_a_sweep_refuses(points, message):
    with pytest.raises(ValueError, match=message):
        sweep_space(dense_layer(), points)


def test_no_region_is_narrower_than_the_multicast():
    """A PE writes a word per cycle, so that 4 PE columns cannot take 8 words of a cycle, but the whole array is as it is."""
    assert takes_multicast((Region(0, 0, 4, 4),), 8) and takes_multicast((Region(0, 0, 4, 8), Region(0, 8, 4, 8)), 8)
    assert not takes_multicast((Region(0, 0, 4, 4), Region(0, 4, 4, 12)), 8)
    layer, spec = hybrid_layer(32, 6, 8), ArraySpec(rows=8, cols=16)
    words = [1, 4, 5, 8, 9]
    space = sweep_space(layer, {"h_words_per_cycle": words}, spec, 5)
    for n, each in enumerate(words):
        schedule = schedule_layer(layer, spec.with_(h_words_per_cycle=each), 5)
        assert (space["cycles"][n], space["layout"][n]) == (schedule.cycles, schedule.mapping.layout.name)
        narrow = [row for row in schedule.candidates if "16x4" in row["layout"] or "8x4" in row["layout"]]
        assert bool(narrow) == (each <= 4)


def test_a_sweep_needs_steps():
    for steps in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"sweep_space needs a whole number of steps of at least 1, got {steps}"):
            sweep_space(dense_layer(), {"rows": [4]}, steps=steps)


def test_the_pareto_front_of_three_figures_by_hand():
    table = {"a": [1, 2, 2, 3, 1, 9], "b": [5, 4, 4, 4, 5, np.nan], "c": [3, 3, 3, 1, 4, 0]}
    # 2 and 3 are equal; 4 is beaten in a only; 5 by 1, in c; 6 has no b.
    assert pareto_points(table, ["a", "b", "c"]).tolist() == [True, True, True, True, False, False]
    assert pareto_points(table, ["b", "c"]).tolist() == [False, False, False, True, False, False]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4) for _ in range(3)]), min_size=1, max_size=30))
def test_no_point_beats_one_on_the_front(rows):
    costs = np.array(rows)
    beaten = [any((other <= mine).all() and (other < mine).any() for other in costs) for mine in costs]
    assert pareto_points(dict(zip("abc", costs.T, strict=True)), "abc").tolist() == [not b for b in beaten]


def test_the_smallest_array_by_exhaustion():
    layers = {"dense 16-bit": dense_layer(32, 12, bits=16), "hybrid": hybrid_layer(32, 12, 8)}
    points = scaled_points(12, weight_words=[64, 2048])
    spaces = {label: sweep_space(layer, points) for label, layer in layers.items()}
    for figure, at_most in (("step_us", 1.2), ("cycles", 22_000), ("first_step_latency", 290)):
        rows = smallest_array(layers, at_most, figure, points)
        assert [row["label"] for row in rows] == list(layers)
        for row in rows:
            space = spaces[row["label"]]
            meets = np.flatnonzero(space[figure] <= at_most)
            assert row["meets"] and 0 < meets.size < space["fits"].size
            assert min((space["rows"][n] * space["cols"][n], space["bram36"][n], space[figure][n]) for n in meets) == (
                row["pes"], row["bram36"], row[figure])
    assert rows[0]["act_units"] == rows[0]["rows"] and rows[0]["h_words_per_cycle"] == rows[0]["cols"] // 4
    (never,) = smallest_array({"dense": layers["dense 16-bit"]}, 0.001, points=points)
    assert not never["meets"] and never["step_us"] == spaces["dense 16-bit"]["step_us"].min()
    table = smallest_array_table(rows)
    assert table.columns.tolist() == list(layers) and table.loc["pes", "hybrid"] == rows[1]["pes"]


def test_the_smallest_array_refuses():
    with pytest.raises(ValueError, match="smallest_array knows the figures steady_state_cycles, .*, got 'speed'"):
        smallest_array({"dense": dense_layer()}, 1, "speed")
    for limit in (0, float("nan")):
        with pytest.raises(ValueError, match=f"smallest_array needs a limit above 0 for step_us, got {limit}"):
            smallest_array({"dense": dense_layer()}, limit)
    with pytest.raises(ValueError, match=r"dense fits none of 2 arrays: a PE needs 4 data words .*, the array has 3"):
        smallest_array({"dense": dense_layer()}, 1, points={"rows": [4, 8], "cols": [4, 4]}, spec=SMALL.with_(data_words=3))


def test_the_picture_of_a_design_space():
    points = grid_points(rows=[4, 8, 16], cols=[4, 8], weight_words=[1, 2048], load_bits_per_cycle=[16, 512])
    space = space_table(sweep_space(dense_layer(32, 12), points, steps=5))
    assert space["front"].sum() and not space["front"][~space["fits"]].any() and 0 < space["fits"].sum() < len(space)
    figure = space_figure(space)
    axis, scale = figure.axes
    assert axis.get_xlabel() == "time of a step (us)  (less is better)" and "BRAM36" in axis.get_ylabel()
    assert "energy" in scale.get_ylabel()
    others, front = axis.collections
    assert len(front.get_offsets()) == space["front"].sum()
    assert len(others.get_offsets()) == space["fits"].sum() - space["front"].sum()
    assert f"{(~space['fits']).sum()} cannot hold the layer" in axis.get_title()
    figure.canvas.draw()


def test_the_depth_of_the_accumulators_decides_the_places():
    layer = layer_of(lambda part, gate, shape, rng: sparse(shape, rng), 64, 12)
    points = {"acc_depth": [64, 4, 2, 16]}
    space = sweep_space(layer, points, SMALL, 3)
    assert check(layer, space, range(4), 3, SMALL)["resident"] == 4 and len(set(space["cycles"])) == 4


@settings(max_examples=60, deadline=None)
@given(tiny_cases())
def test_bounds_are_never_beaten(case):
    mapping, steps, _ = case
    schedule = schedule_mapping(mapping, steps)
    loaded = least_loaded_bits(mapping.layer, mapping.spec, mapping.layout, mapping.blocks)
    assert loaded <= mapping.streamed_bits and (loaded > 0) <= (mapping.streamed_bits > 0)
    least = max(mapping.load_cycles, mapping.batch * least_cycles(mapping.layer, mapping.spec, mapping.layout))
    assert least <= schedule.steady_state_cycles


def test_blocks_known_from_other_layouts_are_those_of_the_layout():
    makers = {"i": sparse, "f": sparse}  # W_ih and W_hh have accumulators of their own, for whole and for split tiles
    layer = layer_of(lambda part, gate, shape, rng: makers.get(gate, partial(circulant, block=16))(
        shape, rng, frac=6 if part == "hh" else 7), 64, 12)
    spec, known = ArraySpec(rows=8, cols=8), {}
    for layout in candidate_layouts(layer, spec):
        shared, own = map_blocks(layer, spec, layout, known=known), map_blocks(layer, spec, layout)
        assert shared.keys() == own.keys()
        for product, block in own.items():
            assert (shared[product].unit, shared[product].pe_rows, shared[product].pe_cols) == (
                block.unit, block.pe_rows, block.pe_cols)
            np.testing.assert_array_equal(shared[product].pe_row_of_row, block.pe_row_of_row)
            np.testing.assert_array_equal(shared[product].local_of_row, block.local_of_row)
    assert {block.unit for blocks in known.values() for block in blocks.values()} == {1, 2, 4, 8, 16}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_slices_of_the_lists_are_counted_as_the_words_lie(data):
    """In closed form, or by sums along the lists: against the words themselves."""

    def some(*values):
        return data.draw(st.sampled_from(values))

    shape, rng = (some(8, 16, 24), some(1, 3, 5, 8, 13)), np.random.default_rng(some(*range(20)))
    form, unit = some(("dense", 1), ("sparse", 1), ("circulant", 1), ("circulant", 2), ("circulant", 4))
    packed = {"dense": dense, "sparse": sparse, "circulant": circulant}[form](shape, rng)
    block = map_block(packed, some(4, 8), some(4, 8), unit)
    low = some(0, 1, 2) * unit
    high, first = low + some(1, 2, 3) * unit, np.array([0, 1, 2, 5])
    end = first + np.array([some(0, 1, 2, 3, 9) for _ in first])
    words, macs, padding, runs = block.slice_counts(low, high, first, end)
    for n, chosen in enumerate(zip(first, end, strict=True)):
        pads = turns = 0
        for pe in range(block.pe_rows * block.pe_cols):
            mine = np.flatnonzero((block.pe == pe) & (block.local_row >= low) & (block.local_row < high))[slice(*chosen)]
            rows = block.rows[mine][block.used[mine]]
            assert (words[n, pe], macs[n, pe]) == (mine.size, rows.size)
            pads, turns = pads + block.padding[mine].sum(), turns + (rows.size > 0) + (np.diff(rows) != 0).sum()
        assert (padding[n], runs[n]) == (pads, turns)


def test_as_many_points_as_rows_are_not_taken_for_rows():
    layer = of_forms(dict.fromkeys("ifgo", "fft"), 16, 8, 0)
    for number in (4, 16):
        space = sweep_space(layer, {"link_cycles": range(1, number + 1)}, SMALL, 3)
        assert check(layer, space, range(number), 3, SMALL)["resident"] == number


@pytest.mark.parametrize(("layer", "words", "bandwidth"), [
    (dense_layer(16, 8), 40, 16), (dense_layer(32, 12), 32, 16),  # buffers of 2 words tie with those of 1, tried before them
    (hybrid_layer(64, 8, 8), 64, 32), (hybrid_layer(32, 8, 8), 96, 256)])
def test_the_first_of_equally_good_candidates_wins(layer, words, bandwidth):
    spec = SMALL.with_(weight_words=words, load_bits_per_cycle=bandwidth)
    layouts = sorted(candidate_layouts(layer, spec), key=lambda layout: least_cycles(layer, spec, layout))
    every = [schedule_mapping(mapping, 2) for layout in layouts for mapping in fitting_mappings(layer, spec, layout)]
    best = min(every, key=lambda schedule: schedule.steady_state_cycles)  # the first of equal ones
    assert schedule_layer(layer, spec, 2).mapping.layout == best.mapping.layout


def test_an_array_is_halved_as_long_as_a_small_layer_gets_faster():
    layer, large = dense_layer(), SMALL.with_(rows=32, cols=32, h_words_per_cycle=8)
    whole = schedule_layer(layer, large, 12, batch=2)
    part = faster_part(whole)

    def cycles(rows, cols):
        halved = large.with_(rows=rows, cols=cols, h_words_per_cycle=min(8, cols))
        return schedule_layer(layer, halved, 12, batch=2).steady_state_cycles

    rows, cols = part.mapping.spec.rows, part.mapping.spec.cols
    assert part.steady_state_cycles == cycles(rows, cols) < whole.steady_state_cycles and rows * cols < 32 * 32
    halves = [sides for sides in ((rows, cols // 2), (rows // 2, cols)) if min(sides) >= 4]
    assert all(cycles(*sides) >= part.steady_state_cycles for sides in halves)
    assert (part.steps, part.mapping.batch) == (12, 2)
    assert faster_part(part) is None
    assert faster_part(schedule_layer(layer, SMALL.with_(rows=4, cols=4, h_words_per_cycle=1), 12)) is None


def test_what_has_no_faster_part_is_refused():
    layer, message = dense_layer(), "faster_part needs the schedule of one whole layer without skipped zeros, got <"
    inputs = {part: np.ones((4, 1, size), dtype=np.int64)
              for part, size in (("ih", layer.input_size), ("hh", layer.hidden_size))}
    for schedule in (schedule_stack([(layer,)], SMALL, 4), schedule_layer(layer, SMALL, 4, parts={"hh"}),
                     schedule_layer(layer, SMALL.with_(lookahead=2), 4, inputs=inputs)):
        with pytest.raises(ValueError, match=message):
            faster_part(schedule)
