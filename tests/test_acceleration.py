"""Acceleration studies: trained points, where cycles go, speed-up curves of random matrices."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench import acceleration, study, tables
from workbench.acceleration import (
    FORMS,
    STALLS,
    accelerate,
    by_fft,
    check_acceleration,
    headline_schedules,
    random_layer,
    speed_up,
    stalls,
    train_points,
)
from workbench.array import Layout, Region, execute_layer, grid_points, preset, schedule_hoisted, schedule_layer, sweep_space
from workbench.array.cost import BASELINE
from workbench.constrain import pack
from workbench.methods import BlockCirculant, Dense, Structured, TopK
from workbench.packed import PackedSparse
from workbench.plan import uniform
from workbench.quantise import calibrate
from workbench.sensitivity import calibration_batches
from workbench.study import HYBRID, SMALL
from workbench.train import paired_interval

SPEC, METHODS, TARGETS = preset("group4x4"), [HYBRID, "TopK", "BlockCirculant", "Dense", SMALL], [6.0, 17.0]


@pytest.fixture(scope="module")
def in_process():
    """Jobs one after the other in this process: no spawned ones to wait for."""
    patch = pytest.MonkeyPatch()
    patch.setattr(study, "parallel", lambda function, jobs, workers, description: [function(*job) for job in jobs])
    yield
    patch.undo()


@pytest.fixture(scope="module")
def points(in_process, tiny_task):
    dense = study.train_dense(tiny_task, 8, [0, 1], epochs=3, workers=1)
    return train_points(tiny_task, dense, METHODS, TARGETS, bits=6, dense_epochs=3, epochs=2, search_epochs=0, workers=1)


@pytest.fixture(scope="module")
def accelerated(points):
    return accelerate(points, SPEC, 6)


def test_every_point_is_trained_or_out_of_reach(points):
    found = {*points.results[["method", "target_cr_disk", "seed"]].itertuples(index=False, name=None),
             *points.unreachable[["label", "target_cr_disk", "seed"]].itertuples(index=False, name=None)}
    assert found == {(method, target, seed) for method in METHODS for target in TARGETS for seed in (0, 1)} | {
        (BASELINE, 1.0, 0), (BASELINE, 1.0, 1)}
    plans = points.results[~points.results["method"].isin([BASELINE, SMALL])]
    assert (plans["cr_disk"] >= plans["target_cr_disk"]).all()
    assert (points.results.loc[points.results["method"] == BASELINE, "cr_disk"] == 2).all()


def test_losses_are_against_the_dense_control_of_the_seed(points, tiny_task):
    for row in points.results.itertuples():
        right = points.correct[row.label, row.target_cr_disk][row.seed]
        assert row.loss_points == pytest.approx(100 * (points.reference[row.seed].mean() - right.mean()))
    baseline = points.results[points.results["label"] == BASELINE]
    assert baseline["valid_loss_above"].abs().max() < 0.01  # 16 bits and the same epochs: the control itself


def test_a_datapath_changes_roundings_and_no_integers(points):
    for (label, target), by_seed in points.packed.items():
        if label.endswith(acceleration.BY_FFT):
            for seed, packed in by_seed.items():
                twin = points.packed[label.removesuffix(acceleration.BY_FFT), target][seed]
                assert packed.cr_disk == twin.cr_disk
                assert all((a.dense() == b.dense()).all() for a, b in
                           zip(packed.blocks.values(), twin.blocks.values(), strict=True))
    assert any(label.endswith(acceleration.BY_FFT) for label, _ in points.packed)


def test_by_fft_needs_circulant_blocks_of_a_power_of_two(tiny_task):
    model = study.models.build_classifier(tiny_task, 12, seed=0)
    signals = calibrate(model, calibration_batches(tiny_task))
    assert by_fft(uniform(model, TopK(0.5), 8, signals)) is None
    assert by_fft(uniform(model, BlockCirculant(3), 8, signals)) is None
    switched = by_fft(uniform(model, BlockCirculant(4), 8, signals))
    assert {entry.method for entry in switched.blocks.values()} == {BlockCirculant(4, "fft")}


def test_accelerations_are_ratios_of_cycles(accelerated, points):
    rows = accelerated.results[accelerated.results["acceleration"].notna()]
    for seed, mine in rows.groupby("seed"):
        base = schedule_layer(next(iter(points.packed[BASELINE, 1.0][seed].layers.values())), SPEC, 6)
        assert (mine["acceleration"] * mine["steady_state_cycles"]).to_numpy() == pytest.approx(base.steady_state_cycles)
        assert (mine["acceleration_sequence"] * mine["cycles"]).to_numpy() == pytest.approx(base.cycles)
    ones = ["acceleration", "acceleration_sequence", "acceleration_multiply", "acceleration_load", "acceleration_resident",
            "acceleration_streamed"]
    assert (rows.loc[rows["label"] == BASELINE, ones] == 1).all(axis=None)
    # Of so few weights all are resident in the preset, and what is stored decides what the loader brings.
    assert (rows["acceleration_resident"] == rows["acceleration"]).all()
    circulant = rows[rows["label"] == "BlockCirculant"]
    assert (circulant["acceleration_load"] > 2).all() and (circulant["acceleration_streamed"] > circulant["acceleration"]).all()


def test_a_baseline_that_streams_is_compared_resident_too(points):
    """32 dense words in a PE and room for 20: the rest comes over the loader every step."""
    spec = SPEC.with_(weight_words=20, load_bits_per_cycle=8)
    rows = accelerate(points, spec, 6).results
    dense, circulant = (rows[(rows["label"] == label) & (rows["seed"] == 0)].iloc[-1] for label in (BASELINE, "BlockCirculant"))
    assert dense["bound"] == "memory" and circulant["bound"] != "memory"
    assert circulant["acceleration"] > circulant["acceleration_resident"]


def test_an_fft_plan_that_streams_is_compared_resident_too():
    """8 tiles of 8 words in each PE and a word of constants beside them; room for 40."""
    layer, spec = random_layer(BlockCirculant(8, "fft"), 32, 8), SPEC.with_(load_bits_per_cycle=1)
    schedule, resident, streamed = acceleration._figures(layer, spec.with_(weight_words=40), 4)
    assert schedule.mapping.streamed_bits and schedule.mapping.memory_words.max() == 64
    assert resident == schedule_layer(layer, spec.with_(weight_words=65), 4).steady_state_cycles
    assert resident < schedule.steady_state_cycles < streamed


def test_the_fastest_plan_meets_the_limit(accelerated):
    summary = accelerated.summary
    uniform_rows = summary[summary["method"].isin(["TopK", "BlockCirculant", "Dense"]) & summary["acceleration"].notna()]
    assert accelerated.fastest(np.inf, hybrid=False)["steady_state_cycles"] == uniform_rows["steady_state_cycles"].min()
    limit = uniform_rows["valid_loss_above"].median()
    found = accelerated.fastest(limit, hybrid=False)
    within = uniform_rows[uniform_rows["valid_loss_above"] <= limit]
    assert found["steady_state_cycles"] == within["steady_state_cycles"].min() and found["valid_loss_above"] <= limit
    assert accelerated.fastest(-np.inf, hybrid=True) is None
    assert accelerated.fastest(np.inf, hybrid=True)["method"] == HYBRID
    assert accelerated.fastest(np.inf, hybrid=False, target=6.0)["target_cr_disk"] == 6.0


def test_a_plan_that_is_refused_for_one_seed_has_no_figures(points, monkeypatch):
    figures, refused = acceleration._figures, acceleration._layer(points.packed["TopK", 6.0][1])

    def refuse_one(layer, spec, steps):
        if layer is refused:
            raise ValueError("the array has no room for it")
        return figures(layer, spec, steps)

    monkeypatch.setattr(acceleration, "_figures", refuse_one)
    found = accelerate(points, SPEC, 6)
    row = found.summary.set_index(["label", "target_cr_disk"]).loc["TopK", 6.0]
    assert row["refused"] == "the array has no room for it" and row[["layout", "bound"]].isna().all()
    assert row[acceleration.ARRAY_MEANS].isna().all() and (row["seeds"], row["accuracy %"] > 0) == (2, True)
    assert found.results["refused"].notna().sum() == 1 and found.summary["refused"].notna().sum() == 1
    assert found.fastest(np.inf, hybrid=False, target=6.0)["label"] != "TopK"
    assert "- TopK, 6x: the array has no room for it" in tables.refusal_note(
        found, acceleration.overlap_study({}, [], []).assign(refused=[]), found.results[:0]).data


def test_a_mean_over_fewer_seeds_is_not_the_fastest(accelerated):
    best = accelerated.fastest(np.inf, hybrid=False)
    summary = accelerated.summary.copy()
    summary.loc[best.name, "seeds"] = 1
    assert replace(accelerated, summary=summary).fastest(np.inf, hybrid=False).name != best.name


def test_what_does_not_fit_the_device_is_no_fastest_plan(accelerated):
    assert accelerated.block_rams == np.inf  # SPEC is no device's preset
    best, summary = accelerated.fastest(np.inf, hybrid=True), accelerated.summary.copy()
    summary.loc[best.name, "bram36"] = 145
    small = replace(accelerated, summary=summary, spec=preset("k26"))
    assert small.block_rams == 144 and small.fastest(np.inf, hybrid=True).name != best.name
    text = tables.acceleration_verdict(small, best["target_cr_disk"], np.inf).data
    assert f"**No design for the device**, which has 144 BRAM36: as modelled {best['label']} 145 of them are taken." in text
    summary.loc[best.name, "bram36"] = 144
    assert small.fastest(np.inf, hybrid=True).name == best.name
    assert "No design" not in tables.acceleration_verdict(small, best["target_cr_disk"], np.inf).data


def test_the_loss_between_two_plans_is_paired(accelerated, points):
    summary = accelerated.summary.set_index(["label", "target_cr_disk"], drop=False)
    hybrid, rival = summary.loc[HYBRID, 6.0], summary.loc["TopK", 17.0]
    lost = accelerated.accuracy_lost(hybrid, rival)
    right = [np.array(list(points.correct[key].values())) for key in (("TopK", 17.0), (HYBRID, 6.0))]
    assert tuple(lost.values()) == (lambda i: (i.mean, i.low, i.high))(paired_interval(*right, seed=0))
    assert lost["loss (points)"] == pytest.approx(rival["accuracy %"] - hybrid["accuracy %"])
    assert set(accelerated.accuracy_lost(hybrid, hybrid).values()) == {0.0}
    limit = accelerated.summary["valid_loss_above"].max()
    mine, other = accelerated.fastest(limit, hybrid=True), accelerated.fastest(limit, hybrid=False)
    lost, text = accelerated.accuracy_lost(mine, other), tables.acceleration_verdict(accelerated, 6.0, limit).data
    assert f"In accuracy it loses {lost['loss (points)']:.2f} points ({lost['low']:.2f} to {lost['high']:.2f}) to" in text
    assert ("not told apart" in text) == (lost["low"] <= 0 <= lost["high"])
    tried = accelerated.summary[~accelerated.summary["label"].isin([BASELINE, SMALL])]
    assert f"of {sum(tried['method'] != HYBRID)} uniform and {sum(tried['method'] == HYBRID)} hybrid plans" in text


def test_tables_and_verdict_say_what_the_figures_say(accelerated):
    schedules = headline_schedules(accelerated, 6.0, np.inf)
    assert list(schedules)[:2] == [BASELINE, "hybrid, 6x"] and "small dense, 6x" in schedules
    split = tables.stall_table(schedules)
    assert split.loc["total"].to_numpy() == pytest.approx([s.steady_state_cycles for s in schedules.values()])
    regions = tables.region_table(schedules)
    assert regions.loc[regions["plan"] == BASELINE, "blocks"].item().count("hh") == 4
    text = tables.acceleration_verdict(accelerated, 6.0, np.inf).data
    hybrid = accelerated.summary.set_index(["label", "target_cr_disk"]).loc[HYBRID, 6.0]
    assert f"{hybrid['acceleration']:.2f} times as fast as dense 16-bit" in text
    assert f"is {'reached' if round(hybrid['acceleration'], 2) >= 1.41 else 'missed'}" in text
    small = accelerated.summary.set_index(["label", "target_cr_disk"]).loc[SMALL, 6.0]
    assert f"small dense network of that ratio: {small['acceleration']:.2f}x, for {small['loss (points)']:.2f} points" in text
    nothing = tables.acceleration_verdict(accelerated, 6.0, -np.inf).data
    none = "none of the uniform plans that all seeds have; none of the hybrid plans that all seeds have"
    assert none in nothing and "So the hybrid plan" not in nothing
    assert "In cycles it **" in text
    table = tables.acceleration_table(accelerated, -np.inf)
    above = accelerated.results.groupby(["label", "target_cr_disk"], sort=False)["valid_loss_above"]
    assert table["std above"].tolist() == pytest.approx(above.std().tolist()) and set(table["seeds"]) == {2}
    assert set(table["within the limit"]) == {"no"}
    assert len(table) == len(accelerated.summary)
    assert len(tables.acceleration_parts_table(accelerated)) == accelerated.summary["refused"].isna().sum()


def test_the_trained_hybrid_models_are_kept(points, tiny_task):
    model, plan = points.hybrids[6.0, 0]
    packed = pack(model, plan)
    assert all((block.dense() == points.packed[HYBRID, 6.0][0].blocks[name].dense()).all()
               for name, block in packed.blocks.items())
    assert set(points.hybrids) == {(target, seed) for target in TARGETS for seed in (0, 1)}


def test_a_point_out_of_reach_says_why(points):
    assert points.first(HYBRID, 6.0) is points.packed[HYBRID, 6.0][0]
    with pytest.raises(ValueError, match="there is no plan Dense, 17x: no uniform Dense .* meets cr_disk 17.0"):
        points.first("Dense", 17.0)


def test_what_overlaps_is_scheduled(accelerated):
    schedule = accelerated.schedule(BASELINE, 1.0)
    table = acceleration.overlap_study({BASELINE: schedule}, [1, 2], [2, 0]).set_index("schedule")
    layer = schedule.mapping.layer
    assert table.loc["batch of 1", "cycles"] == schedule.cycles and table.loc["batch of 1", "per_step"] == schedule.cycles / 6
    assert table.loc["batch of 2", "per_step"] == schedule_layer(layer, SPEC, 6, batch=2).cycles / 12
    assert table.loc["hoisted, 2 steps at a time", "cycles"] == schedule_hoisted(layer, SPEC, 6, window=2).cycles
    assert table.loc["two layers in turn", "cycles"] > schedule.cycles
    assert "no strips of whole groups" in table.loc["two layers side by side", "refused"]  # one group only
    rows = tables.overlap_table(table.reset_index())
    assert "two layers in turn" in set(rows["schedule"]) and "two layers side by side" not in set(rows["schedule"])


def test_smaller_arrays_suffice_after_compression(accelerated):
    schedules = {label: accelerated.schedule(label, target) for label, target in ((BASELINE, 1.0), ("TopK", 6.0))}
    table = tables.smallest_table(schedules, [1000.0, 1e-6])
    assert list(table["plan"]) == [BASELINE, "TopK"] * 2 and list(table["at most (us)"]) == [1000.0, 1000.0, 1e-6, 1e-6]
    assert list(table["met"]) == ["yes"] * 2 + ["no, this comes nearest"] * 2 and set(table["PEs"][:2]) == {"4 x 4"}
    assert table["us a step"].tolist() == pytest.approx((table["cycles a step"] / SPEC.clock_mhz).tolist())


def test_a_front_is_thinned(accelerated):
    axes = grid_points(rows=[4, 8], cols=[4, 8], act_units=[1, 4], weight_bits=[4, 8])
    space = tables.space_table(sweep_space(accelerated.schedule("TopK", 6.0).mapping.layer, axes, SPEC, 6))
    table = tables.front_table(space, axes, most=2)
    front = space[space["front"]]
    assert len(tables.front_table(space, axes)) == len(front[["step_us", "energy_high_nj", "bram36"]].drop_duplicates())
    assert table["step_us"].tolist() == [front["step_us"].min(), front["step_us"].max()] and {*axes} <= {*table}


@pytest.mark.parametrize(("changes", "message"), [
    ({"methods": ["TopK"]}, "an acceleration study needs the methods hybrid and TopK, got TopK: hybrid missing"),
    ({"methods": [HYBRID, "Dense"]}, "needs the methods hybrid and TopK, got hybrid, Dense: TopK missing"),
    ({"loss_limit": -0.1}, "an acceleration study needs a loss_limit of at least 0 nats, got -0.1"),
    ({"loss_limit": float("nan")}, "an acceleration study needs a loss_limit of at least 0 nats, got nan"),
    ({"steps": 0}, r"an acceleration study needs steps from 1 to inf, got \[0\]"),
    ({"curve_units": 18}, "a speed-up curve needs units of at least 16, a multiple of 4, got 18"),
    ({"curve_bits": 1}, "a speed-up curve needs 2 to 16 bits, got 1"),
    ({"fractions": [0.3]}, r"a speed-up curve needs fractions 1/2, 1/4, 1/8 and so on, at least one, got \[0.3\]"),
    ({"fractions": []}, r"a speed-up curve needs fractions 1/2, 1/4, 1/8 and so on, at least one, got \[\]"),
    ({"fractions": [1.0]}, "a speed-up curve needs fractions"),
    ({"curve_spec": SPEC.with_(data_words=11)}, "a speed-up curve needs an array that takes 16 dense units: a PE needs"),
    ({"target_cr_disks": [0.5]}, "target cr_disk"),
    ({"target_cr_disks": [400.0]}, "no strength of a hybrid plan of 8 units reaches cr_disk 400.0"),
    ({"spec": SPEC.with_(data_words=2)}, "the array does not take the dense model of 8 units: a PE needs"),
    ({"sequences": 0}, r"needs sequences from 1 to inf, got \[0\]"),
    ({"thresholds": []}, r"thresholds from 0 to inf, got \[\]"),
    ({"densities": [0.5, 1.5]}, r"densities from 0 to 1, got \[0.5, 1.5\]"),
    ({"looked_at": 0.125}, r"needs as looked_at one of its fractions \[0.5\], got 0.125"),
], ids=str)  # fmt: skip
def test_bad_values_are_refused(tiny_task, changes, message):
    good = {"hidden_size": 8, "methods": [HYBRID, "TopK"], "target_cr_disks": [6.0], "bits": 6, "seeds": [0], "epochs": 1,
            "retrain_epochs": 1, "search_epochs": 0, "loss_limit": 0.0, "spec": SPEC, "steps": 1, "batches": [1],
            "windows": [0],
            "sequences": 1, "thresholds": [0.1], "lookaheads": [1], "delta_loss": 0.0, "crossover_units": 8,
            "densities": [0.5], "latencies": [1.0], "curve_units": 16, "curve_bits": 8, "curve_spec": SPEC,
            "fractions": [0.5], "looked_at": 0.5, "workers": 1}
    check_acceleration(tiny_task, **good)
    with pytest.raises(ValueError, match=message):
        check_acceleration(tiny_task, **good | changes)


# Where the cycles go.


def test_stalls_by_hand():
    """16 x 16 on 4 x 4 PEs, dense: each of the eight blocks takes every PE 4 rows of 4 columns, 16 cycles."""
    layer = random_layer(Dense(), 16, 8)
    assert stalls(schedule_layer(layer, SPEC, 4)) == dict.fromkeys(STALLS, 0) | {"multiply": 128}
    # An activation takes 4 + 104 cycles for 16 values on 4 units, an element-wise operation of two products 8 + 104. The PEs
    # multiply from h's arrival to 52 for i, f and g, 16 more for o, then 64 for the next W_ih x, and wait from 128 on. g leaves
    # them at 59; act g ends at 167, cell at 279, tanh c at 387, act o four cycles behind it at 391, h = o * tanh(c), one
    # product, at 499; then h comes back, 16 words in 16 cycles.
    found = stalls(schedule_layer(layer, SPEC.with_(act_latency=104), 4))
    assert found == dict.fromkeys(STALLS, 0) | {"multiply": 128, "activation": 499 - 128, "multicast": 16}


def test_padding_and_imbalance_are_counted():
    """One row of 16 has all its weights, the others none: its PE row multiplies 4 words, and the padding of 3 rows more."""
    layer = random_layer(TopK(0.5), 16, 8)
    values = np.zeros((16, 16), dtype=np.int64)
    values[0] = 1
    fmt = next(iter(layer.blocks.values())).fmt
    layer = replace(layer, blocks={name: PackedSparse.from_dense(values, fmt) for name in layer.blocks})
    found = stalls(schedule_layer(layer, SPEC, 4))
    # Per block 16 weights and 15 * 4 paddings over 16 PEs; the fullest PE takes 4 + 3.
    assert (found["multiply"], found["padding"], found["imbalance"]) == (8 * 1.0, 8 * 3.75, 8 * (7 - 4.75))


def test_wide_words_hold_a_pe():
    """16 bits, a local column of 2 bits and the end of a row make 19: two memory words."""
    layer = random_layer(Structured(2), 16, 16)
    found = stalls(schedule_layer(layer, SPEC, 4))
    assert found["multiply"] == found["further words"] == 64
    assert stalls(schedule_layer(random_layer(Structured(2), 16, 15), SPEC, 4))["further words"] == 0


def test_stalls_refuse_what_has_no_steady_step():
    layer = random_layer(TopK(0.25), 16, 8)
    skipping = execute_layer(layer, SPEC.with_(lookahead=2), np.zeros((3, 1, 16), dtype=int)).schedule
    for schedule in (skipping, schedule_hoisted(layer, SPEC, 3)):
        with pytest.raises(ValueError, match="stalls needs the schedule of one layer without skipped zeros, got"):
            stalls(schedule)


def test_streamed_weights_do_not_wait_for_the_latency_of_a_multiplication():
    """16 PEs and 4 bits of loader a PE and cycle: of 16-bit weights 4 cycles a word. With chunks of one word in each PE the
    latency binds, with larger ones the loader."""
    layer, spec = random_layer(Dense(), 32, 16), SPEC.with_(load_bits_per_cycle=64)
    streamed = acceleration._figures(layer, spec, 4)[2]
    words = sum(block.values.size for block in layer.blocks.values())
    assert words / 16 * 4 == 4 * 512 and streamed == pytest.approx(4 * 512, rel=0.1)
    one_word = schedule_layer(layer, spec.with_(weight_words=2), 4, Layout((Region(0, 0, 4, 4),), 1)).steady_state_cycles
    assert one_word > 1.1 * streamed


def test_stalls_sum_up_over_two_regions_and_streams():
    sparse, circulant = random_layer(TopK(0.25), 32, 8), random_layer(BlockCirculant(4), 32, 8)
    blocks = {name: (sparse if name.endswith(("i", "g")) else circulant).blocks[name] for name in sparse.blocks}
    layer, spec = replace(sparse, blocks=blocks), SPEC.with_(cols=8)
    regions = Layout((Region(0, 0, 4, 4), Region(0, 4, 4, 4)))
    two = schedule_layer(layer, spec, 5, regions)
    assert sum(stalls(two).values()) == pytest.approx(two.steady_state_cycles)
    # Four sparse blocks of 256 weights, four circulant ones of 1,024 multiplications, on 32 PEs.
    assert stalls(two)["multiply"] == 4 * (256 + 1024) / 32 and stalls(two)["other region"] > 0
    streamed = schedule_layer(layer, spec.with_(weight_words=8, load_bits_per_cycle=8), 5, replace(regions, stream_words=2))
    found = stalls(streamed)
    assert sum(found.values()) == pytest.approx(streamed.steady_state_cycles) and found["load"] > 0


def test_stalls_of_a_period_of_two_steps_are_those_of_their_mean():
    spec = SPEC.with_(rows=8, acc_banks=3, acc_depth=8, link_cycles=30, weight_words=20, act_latency=0, h_words_per_cycle=4,
                      act_units=1)
    schedule = schedule_layer(random_layer(BlockCirculant(4), 16, 8), spec, 4)
    assert schedule.period == (2, 496)
    assert sum(stalls(schedule).values()) == 248


# Speed-up curves.


@pytest.fixture(scope="module")
def curves(in_process):
    return speed_up(64, SPEC.with_(weight_words=4096), [0.5, 0.25], 8, 1)


def test_curves_have_every_form_and_sum_up(curves):
    assert list(curves["form"]) == ["Dense", *FORMS, *FORMS]
    known = curves[curves["step_cycles"].notna()]
    assert known[list(STALLS)].sum(axis=1).to_numpy() == pytest.approx(known["step_cycles"].to_numpy())
    assert (known["matvec_cycles"] <= known["step_cycles"]).all() and (known["efficiency_matvec"] <= 1).all()
    assert known.loc[known["form"] == "Dense", ["speedup_matvec", "speedup_step", "ideal"]].to_numpy().tolist() == [[1, 1, 1]]
    assert set(curves["ideal"].round(6)) >= {1, 2, 4}


def test_structured_pruning_is_ideal_where_it_divides(curves):
    """64 columns, 4 PE columns: both 32 and 16 classes divide, so every PE has equally many weights of every row."""
    rows = curves[curves["form"] == "Structured"].set_index("kept")
    assert rows["efficiency_matvec"].tolist() == [1, 1] and (rows[["padding", "imbalance"]] == 0).all(axis=None)
    top = curves[curves["form"] == "TopK"].set_index("kept")
    assert (top["efficiency_matvec"] < 1).all() and (top["imbalance"] > 0).all()


def test_what_is_ideal_counts_the_weights_of_the_dense_model_beside():
    """A circulant block of 8 makes 24 units of 20: 8 * 20 * 20 dense weights against 8 * 24 * 24 / 8 stored ones."""
    table = speed_up(20, SPEC.with_(weight_words=4096), [0.125], 8, 1).set_index("form").loc["BlockCirculant"]
    assert table["units"] == 24 and table["ideal"] == pytest.approx(3200 / 576)
    assert table["efficiency_matvec"] == pytest.approx(table["speedup_matvec"] * 576 / 3200)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_second_layer_takes_what_a_projection_gives():
    model = torch.nn.LSTM(8, 12, proj_size=8)
    packed = pack(model, uniform(model, Dense(), 8, calibrate(model, [torch.randn(5, 2, 8)])))
    table = acceleration.overlap_study({BASELINE: schedule_layer(packed.layers["l0"], SPEC, 4)}, [], [])
    in_turn = table.set_index("schedule").loc["two layers in turn"]
    assert in_turn["cycles"] > 0  # not refused


def test_time_domain_circulant_saves_no_multiplication(curves):
    rows = curves[curves["form"] == "BlockCirculant"]
    assert (rows["speedup_matvec"] == 1).all() and rows["ideal"].tolist() == [4, 2]


def test_an_fft_multiplies_less_and_transforms(curves):
    """Per tile of block k 2k - 2 products in place of k * k: at k = 4 with 64 x 64 weights, 16 * 16 tiles of 6 on 16 PEs."""
    rows = curves[curves["form"] == "BlockCirculant, FFT"].set_index("kept")
    assert rows.loc[0.25, "multiply"] == 8 * 16 * 16 * 6 / 16
    assert (rows["transform"] > 0).all() and (curves.loc[curves["form"] != "BlockCirculant, FFT", "transform"] == 0).all()


def test_curves_in_words(curves):
    text = tables.speed_up_verdict(curves, 0.25).data
    assert "**Structured**: 4.00 times as fast in the matrix-vector phase (100.0 % of the ideal 4.00)" in text
    assert "Multiplications for each stored weight: 4.00" in text.split("**BlockCirculant**")[1].splitlines()[0]
    assert len(tables.speed_up_table(curves)) == curves["refused"].isna().sum()
    # 7.82 is a rounded figure: 7.8195 of 8 is as much, 7.81 is not.
    near = curves.assign(efficiency_step=np.where(curves["form"] == "TopK", 7.8195, 7.81) / 8)
    text = tables.speed_up_verdict(near, 0.25).data
    assert "that share or more in the whole step: TopK. (" in text and "one random draw" in text


def test_what_was_refused_is_said_once(accelerated, curves):
    overlap = acceleration.overlap_study({BASELINE: accelerated.schedule(BASELINE, 1.0)}, [], [])
    text = tables.refusal_note(accelerated, overlap, curves).data
    assert text.count("no strips of whole groups") == 1 and f"{BASELINE}, two layers side by side: 4 x 4 PEs" in text
    assert "Dense, 17x: no uniform Dense" in text
    nothing = tables.refusal_note(
        replace(accelerated, points=replace(accelerated.points, unreachable=accelerated.points.unreachable[:0]),
                summary=accelerated.summary[accelerated.summary["refused"].isna()]),
        overlap[overlap["refused"].isna()], curves[curves["refused"].isna()]).data
    assert nothing == "Everything that was asked was within reach, and the array refused nothing."


def test_a_pattern_is_cut_where_its_period_does_not_divide_the_rows():
    layer = random_layer(Structured(8), 20, 8)
    block = next(iter(layer.blocks.values()))
    assert block.shape == (20, 20)
    kept = block.dense() != 0
    assert (kept[:8].sum(axis=0) == 1).all() and (kept[8:16].sum(axis=0) == 1).all() and (kept[16:].sum(axis=0) <= 1).all()


def test_structured_pruning_to_an_eighth_reaches_the_published_share():
    """1500 inputs and units on 16 x 16 PEs, the whole step: Wang S. 2019 has 7.82 of 8."""
    spec = preset("array16x16").with_(weight_words=1 << 17, acc_depth=128)
    dense, pruned = (schedule_layer(random_layer(method, 1500, 8), spec, 4) for method in (Dense(), Structured(8)))
    assert dense.steady_state_cycles == 8 * 94 * 94
    assert dense.steady_state_cycles / pruned.steady_state_cycles > 7.82
