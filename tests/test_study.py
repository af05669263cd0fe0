"""Studies over seeds: the variants, the controls, their sizes and what is read when."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from workbench import budget, models, plots, runs, sensitivity, study, tables
from workbench.allocation import search_allocation
from workbench.array import preset, schedule_layer, schedule_layers
from workbench.array.cost import BASELINE
from workbench.constrain import attach, bake
from workbench.gates import blocks, dense_weights
from workbench.methods import BlockCirculant, Dense, TopK, method_label
from workbench.plan import Unpackable
from workbench.sensitivity import Strength, classify
from workbench.train import evaluate, fit, paired_interval
from workbench.units import remove_units

TARGET = 10.0
STRENGTH = Strength(block=4, circulant_bits=6, topk_bits=6)


@pytest.fixture(scope="module")
def dense(tiny_task):
    return study.train_dense(tiny_task, 16, [0, 1], epochs=2, workers=2)


@pytest.fixture(scope="module")
def comparison(tiny_task, dense):
    return study.compare(tiny_task, dense, ["g"], STRENGTH, TARGET, variants=study.variants(True), dense_epochs=2, epochs=2,
                         distillation_weight=0.5, workers=2)


def test_processes_give_the_same_models_as_this_one(tiny_task, dense):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    again = models.build_classifier(tiny_task, 16, seed=1)
    study.fit(again, tiny_task, seed=1, epochs=2, progress=False)
    torch.set_num_threads(threads)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, dense[1].state_dict()[name]), name


def test_checkpoints_are_found_again(tiny_task, tmp_path):
    first = study.train_dense(tiny_task, 8, [5], epochs=1, workers=1, checkpoints=tmp_path)
    (written,) = tmp_path.glob("*.safetensors")
    stamp = written.stat().st_mtime_ns
    second = study.train_dense(tiny_task, 8, [5], epochs=1, workers=1, checkpoints=tmp_path)
    assert written.stat().st_mtime_ns == stamp and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(first[5].lstm.weight_hh_l0, second[5].lstm.weight_hh_l0)
    study.train_dense(tiny_task, 8, [5], epochs=2, workers=1, checkpoints=tmp_path)  # another training, another file
    assert len(list(tmp_path.iterdir())) == 2


def test_a_comparison_resumes_from_its_checkpoints(tiny_task, dense, tmp_path):
    def compare():
        return study.compare(tiny_task, {0: dense[0]}, ["g"], STRENGTH, TARGET, variants=study.variants(True),
                             dense_epochs=1, epochs=1, distillation_weight=0.0, workers=2, checkpoints=tmp_path)

    first = compare()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == 6  # dense control, hybrid, both uniform plans, the small control before and in 8 bits
    second = compare()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    assert first.results.equals(second.results)


def test_every_variant_and_seed_has_one_row(comparison):
    rows = comparison.results
    assert len(rows) == 12 and set(rows["variant"]) == set(study.VARIANTS)
    assert all(seeds == [0, 1] for seeds in rows.groupby("variant")["seed"].apply(list))
    floats = rows["variant"].isin([study.DENSE, study.DENSE_ONCE])
    assert (rows.loc[floats, "arithmetic"] == "float").all()
    assert (rows.loc[~floats, "arithmetic"] == "integers").all()


def test_compressed_variants_meet_the_target(comparison):
    rows = comparison.results.set_index("variant")
    for variant in (study.HYBRID, study.UNIFORM_TOPK, study.UNIFORM_CIRCULANT):
        assert (rows.loc[variant, "cr_disk"] >= TARGET).all(), variant


def test_the_hybrid_accuracy_is_that_of_the_packed_integers(comparison, dense, tiny_task):
    """The packed model, attached to a model with the retrained classifier, classifies exactly as recorded: the engine
    decides, not the float model. Here the classifier is the dense one's, so only the recurrent layer is compared."""
    packed = comparison.packed[study.HYBRID][0]
    attached = attach(bake(dense[0]), packed)
    x = torch.from_numpy(tiny_task.splits["test"].x)
    out, _ = attached.lstm(x)
    hidden = packed.layers["lstm.l0"].signals["hidden"]
    assert torch.equal(out * 2.0**hidden.frac, (out * 2.0**hidden.frac).round())
    row = comparison.results.query("variant == 'hybrid' and seed == 0").iloc[0]
    assert row["test_accuracy"] == pytest.approx(100 * comparison.correct[study.HYBRID][0].mean())
    assert row["rnn_bytes"] == packed.storage_bits // 8


def test_every_ratio_is_against_the_dense_model(comparison, dense):
    weights = 4 * 16 * (3 + 16)
    total = sum(p.numel() for p in dense[0].parameters()) - 4 * 16  # b_ih and b_hh merged
    for variant, packed in comparison.packed.items():
        row = comparison.results.query(f"variant == '{variant}' and seed == 0").iloc[0]
        stored = sum(block.stored_values for block in packed[0].blocks.values())
        units, bits = row["hidden_size"], packed[0].storage_bits
        rest = 4 * units + 2 * units + 2  # merged biases and the classifier
        assert row["cr_params"] == pytest.approx(weights / stored)
        assert row["cr_bits"] == pytest.approx(32 * weights / packed[0].value_bits)
        assert row["cr_disk"] == pytest.approx(32 * weights / bits)
        assert row["cr_model"] == pytest.approx(32 * total / (bits + 32 * rest))


def test_of_the_dense_controls_one_is_retrained(comparison, dense, tiny_task):
    for seed in (0, 1):
        once, again = (comparison.results.query(f"variant == '{v}' and seed == {seed}").iloc[0]
                       for v in (study.DENSE_ONCE, study.DENSE))
        before = evaluate(dense[seed], tiny_task, "test").loss
        assert once["test_loss"] == pytest.approx(before, abs=1e-6)
        assert again["test_loss"] != pytest.approx(before, abs=1e-4)


def test_the_small_control_takes_at_least_the_budget():
    assert study.small_hidden_size(40, 1) == 1
    size = study.small_hidden_size(12, 59733)
    assert 4 * size * (12 + size) * 8 >= 59733 > 4 * (size - 1) * (12 + size - 1) * 8


def test_summary_gives_mean_spread_and_the_paired_loss(comparison):
    summary = comparison.summary().set_index("variant")
    rows = comparison.results[comparison.results["variant"] == study.HYBRID]["test_accuracy"]
    assert summary.loc[study.HYBRID, "accuracy %"] == pytest.approx(rows.mean())
    assert summary.loc[study.HYBRID, "accuracy std"] == pytest.approx(np.std(rows, ddof=1))
    dense_rows = comparison.results[comparison.results["variant"] == study.DENSE]["test_accuracy"]
    assert summary.loc[study.HYBRID, "loss (points)"] == pytest.approx(dense_rows.mean() - rows.mean())
    assert summary.loc[study.DENSE, ["loss (points)", "low", "high"]].tolist() == [0, 0, 0]


def test_one_seed_has_no_interval(comparison):
    one = replace(comparison, results=comparison.results[comparison.results["seed"] == 0],
                  correct={variant: right[:1] for variant, right in comparison.correct.items()})
    summary = one.summary().set_index("variant")
    assert summary[["low", "high", "accuracy std"]].isna().all(axis=None) and summary["loss (points)"].notna().all()
    schedule = schedule_layer(comparison.packed[study.HYBRID][0].layers["lstm.l0"], preset("group4x4"), 3)
    schedules = {BASELINE: schedule, study.HYBRID: schedule}
    text = tables.verdict(one, schedules).data
    assert f"{study.HYBRID} {summary.loc[study.HYBRID, 'loss (points)']:.2f} at" in text
    assert "One seed does not tell the hybrid plan from small dense, uniform Top-k, uniform circulant." in text
    recorded = tables.record_study(one, schedules, pd.DataFrame(), pd.DataFrame({"strength": [STRENGTH]}))  # takes no NaN
    assert {row["low"] for row in recorded["summary"]} == {None}


def test_bad_input_is_refused_before_any_training(tiny_task, dense):
    def compare(**changes):
        arguments = {"variants": study.variants(False), "dense_epochs": 1, "epochs": 1, "distillation_weight": 0.0,
                     "workers": 1}
        target = changes.pop("target", TARGET)
        return study.compare(tiny_task, dense, ["g"], STRENGTH, target, **(arguments | changes))

    with pytest.raises(ValueError, match="compare knows the variants .*, got wrong"):
        compare(variants=[study.DENSE, "wrong"])
    with pytest.raises(ValueError, match="needs the variant 'dense control'"):
        compare(variants=[study.HYBRID])
    with pytest.raises(ValueError, match="at least 1, got 0.5"):
        compare(target=0.5)
    with pytest.raises(ValueError, match="at least 1 worker, got 0"):
        compare(workers=0)
    for seeds, message in (([], "list of different"), ([0, 0], "list of different"), (3, "list of different"),
                           ([0, -1], "whole seed of at least 0, got -1"), ([0.5], "whole seed of at least 0, got 0.5")):
        with pytest.raises(ValueError, match=f"a study needs a {message}"):
            study.train_dense(tiny_task, 8, seeds, epochs=1, workers=1)
    with pytest.raises(ValueError, match="hidden_size of at least 1, got -8"):
        study.train_dense(tiny_task, -8, [0], epochs=1, workers=1)


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": -8}, "positive hidden_size that 8 divides, got -8"),
    ({"hidden_size": 12}, "that 8 divides, got 12"),
    ({"target_cr_disk": 0.9}, "at least 1, got 0.9"),
    ({"seeds": [1, 1]}, "different seeds"),
    ({"epochs": 0}, "epochs of at least 1, got 0"),
    ({"retrain_epochs": -1}, "epochs of at least 1, got -1"),
    ({"sensitivity_epochs": -1}, "sensitivity_epochs of at least 0, got -1"),
    ({"search_epochs": -1}, "search_epochs of at least 0, got -1"),
    ({"distillation_weight": 1.5}, r"distillation_weight in \[0, 1\], got 1.5"),
    ({"steps": 0}, "at least 1 step, got 0"),
    ({"workers": 0}, "at least 1 worker, got 0"),
    ({"target_cr_disk": 400.0}, "no strength of a hybrid plan of 16 units reaches cr_disk 400.0, whichever gate is sensitive"),
    ({"spec": preset("group4x4").with_(data_words=4)}, "the array does not take the dense model of 16 units: a PE needs"),
])
def test_a_study_is_checked_before_training(tiny_task, change, message):
    good = {"hidden_size": 16, "target_cr_disk": 10.0, "seeds": [0], "epochs": 1, "retrain_epochs": 1,
            "sensitivity_epochs": 0, "search_epochs": 0, "distillation_weight": 0.0, "spec": preset("group4x4"), "steps": 1,
            "workers": 1}
    study.check_study(tiny_task, **good)
    with pytest.raises(ValueError, match=message):
        study.check_study(tiny_task, **(good | change))


def test_a_language_task_is_refused_by_name(tiny_language_task):
    with pytest.raises(ValueError, match="needs a task with classes, got the language task tiny_language"):
        study.check_tradeoff(tiny_language_task, hidden_size=8, methods=["TopK"], target_cr_disks=[6.0], seeds=[0], epochs=1,
                             bits=6, retrain_epochs=1, search_epochs=0, distillation_weight=0.0, workers=1)


def test_tables_and_figures_of_a_study(comparison, dense, tiny_task):
    sensitivity = study.sensitivity_over_seeds(tiny_task, dense, [TopK(0.25), BlockCirculant(4)], bits=8, epochs=0, workers=2)
    assert len(sensitivity) == 2 * 2 * 8
    classes = classify(sensitivity)
    layers = study.array_layers(dense[0], tiny_task, comparison, 0, STRENGTH, TARGET)
    assert set(layers) == {BASELINE, study.SMALL, study.UNIFORM_TOPK, study.UNIFORM_CIRCULANT, study.HYBRID}
    schedules = schedule_layers(layers, preset("group4x4"), 5)
    assert (tables.split_table(schedules).loc["total"] == [s.cycles for s in schedules.values()]).all()
    assert len(tables.plan_table(comparison, 0)) == 8
    assert tables.plan_table(comparison, 0)["index bits"].sum() == comparison.packed[study.HYBRID][0].index_bits
    signals = tables.signal_table(comparison.packed[study.HYBRID][0]).set_index("signal")
    assert signals["table error (last places)"].notna().to_dict() == {
        "input": False, "pre": False, "sigmoid": True, "tanh": True, "cell": False, "hidden": False}
    assert len(tables.task_table(tiny_task)) == 3 and len(tables.accuracy_table(dense, tiny_task)) == 2
    assert tables.hardware_table(schedules).loc["acceleration", BASELINE] == 1
    assert list(tables.energy_table(schedules)) == list(schedules)
    prices = tables.price_table().set_index("event")
    assert set(prices.index) == set(tables.count_table(schedules).index)
    assert "Horowitz" in prices.loc["macs", "source"] and "not priced" in prices.loc["link_words", "source"]
    assert len(tables.sensitivity_summary(sensitivity)) == 16 and len(comparison.by_seed()) == 12
    assert not tables.layout_table(schedules[study.HYBRID]).empty and not tables.spec_table(preset("vu440")).empty
    assert "partial sum" in tables.energy_note().data and len(tables.assumption_table()) > 5
    assert "hybrid" in tables.verdict(comparison, schedules).data
    recorded = tables.record_study(comparison, schedules, classes, tables.task_table(tiny_task).assign(strength=STRENGTH))
    assert len(recorded["results"]) == 12
    for figure in (plots.sensitivity_figure(sensitivity, classes), plots.accuracy_figure(comparison.results),
                   plots.gantt_figure(schedules[study.HYBRID], 2), plots.utilisation_figure(schedules)):
        assert figure.axes
        for axis in figure.axes:
            assert axis.get_xlabel() or axis.get_ylabel() or axis.get_title()


def test_only_the_final_measurement_reads_the_test_split(monkeypatch, tiny_task, dense):
    read = []
    monkeypatch.setattr(study, "evaluate", lambda model, task, split: read.append(split) or evaluate(model, task, split))
    retraining = study.Retraining(dense_epochs=1, epochs=1, distillation_weight=0.0, checkpoints=None)
    plan = study._plans(dense[0], tiny_task, ["g"], STRENGTH, TARGET, [study.HYBRID])[study.HYBRID]
    study._compressed(tiny_task, dense[0], dense[0], plan, study.HYBRID, 0, retraining)
    study.dense_control(tiny_task, dense[0], study.DENSE, 0, retraining)
    study.small_control(tiny_task, dense[0], TARGET, 0, retraining)
    assert read == 3 * ["valid", "valid", "test"]


def one_after_another(function, jobs, workers, description):
    """For study.parallel: no processes, each of which takes seconds to start; what they give is tested above."""
    return [function(*job) for job in jobs]


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(study, "parallel", one_after_another)


def test_the_array_shows_what_was_retrained_and_else_the_plan_one_shot(tiny_task, dense, in_process):
    """A comparison without the uniform plans: only those are made for the array, and they meet the target."""
    comparison = study.compare(tiny_task, {0: dense[0]}, ["g"], STRENGTH, TARGET, variants=study.variants(False),
                               dense_epochs=1, epochs=1, distillation_weight=0.0, workers=1)
    layers = study.array_layers(dense[0], tiny_task, comparison, 0, STRENGTH, TARGET)
    assert list(layers) == [BASELINE, study.SMALL, study.UNIFORM_TOPK, study.UNIFORM_CIRCULANT, study.HYBRID]
    assert layers[study.HYBRID] is comparison.packed[study.HYBRID][0].layers["lstm.l0"]
    for variant in study.UNIFORM:
        assert sum(block.storage_bits for block in layers[variant].blocks.values()) <= 32 * 4 * 16 * (3 + 16) / TARGET


def test_a_plan_that_was_retrained_is_not_made_again_for_the_array(tiny_task, dense, comparison, monkeypatch):
    monkeypatch.setattr(study, "uniform_plan", lambda *_: pytest.fail("planned again"))
    layers = study.array_layers(dense[0], tiny_task, comparison, 0, STRENGTH, TARGET)
    for variant in study.UNIFORM:
        assert layers[variant] is comparison.packed[variant][0].layers["lstm.l0"]


# --- compression ratio against accuracy

METHODS_OF_TRADEOFF = ["TopK", "Dense", study.HYBRID, study.SMALL]
SEARCHED = [study.UNITS, study.ALLOCATION]
ARGUMENTS = {"bits": 6, "dense_epochs": 1, "epochs": 1, "search_epochs": 0, "distillation_weight": 0.0, "workers": 2}


@pytest.fixture(scope="module")
def tradeoff(tiny_task, dense):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "parallel", one_after_another)
        return study.tradeoff(tiny_task, dense, METHODS_OF_TRADEOFF, [30.0, 6.0], **ARGUMENTS)


def test_a_tradeoff_has_one_row_per_method_target_and_seed_or_says_why_not(tradeoff):
    points = [(m, t, s) for m in METHODS_OF_TRADEOFF for t in (30.0, 6.0) for s in (0, 1)]
    reached = list(tradeoff.results[["method", "target_cr_disk", "seed"]].itertuples(index=False, name=None))
    missing = list(tradeoff.unreachable[["method", "target_cr_disk", "seed"]].itertuples(index=False, name=None))
    assert missing == [("Dense", 30.0, 0), ("Dense", 30.0, 1)]
    assert reached == [point for point in points if point not in missing]
    assert tradeoff.unreachable["reason"].tolist() == 2 * ["no uniform Dense of 2 to 8 bits meets cr_disk 30.0"]
    rows = tradeoff.results[tradeoff.results["method"] != study.SMALL]
    assert (rows["cr_disk"] >= rows["target_cr_disk"]).all()
    assert (tradeoff.results.query("method == 'TopK'")["bits"] == 6).all()
    small = tradeoff.results[tradeoff.results["method"] == study.SMALL]
    assert (small["bits"] == 8).all() and (small["hidden_size"] < 16).all()
    assert (small["cr_disk"] <= small["target_cr_disk"]).all()
    assert tradeoff.results.query("method == 'hybrid'")["strength"].str.contains("TopK|BlockCirculant").all()


def test_a_tradeoff_measures_what_a_comparison_measures(tiny_task, dense, tradeoff, in_process):
    """The same plan of the same seed, retrained alike, gives the same row; the loss is against that seed's control."""
    comparison = study.compare(tiny_task, {1: dense[1]}, ["g"], STRENGTH, 30.0, variants=[study.DENSE, study.UNIFORM_TOPK],
                               dense_epochs=1, epochs=1, distillation_weight=0.0, workers=1)
    row = tradeoff.results.query("method == 'TopK' and target_cr_disk == 30 and seed == 1").iloc[0]
    control, topk = comparison.results.iloc[0], comparison.results.iloc[1]
    for name in ("cr_params", "cr_bits", "cr_disk", "cr_model", "rnn_bytes", "valid_loss", "test_accuracy", "test_loss"):
        assert row[name] == topk[name], name
    assert row["loss_points"] == pytest.approx(control["test_accuracy"] - topk["test_accuracy"])


def test_the_summary_of_a_tradeoff(tradeoff):
    assert len(tradeoff.summary) == 7
    row = tradeoff.summary.query("method == 'TopK' and target_cr_disk == 6").iloc[0]
    seeds = tradeoff.results.query("method == 'TopK' and target_cr_disk == 6")
    assert row["accuracy %"] == pytest.approx(seeds["test_accuracy"].mean())
    assert row["accuracy std"] == pytest.approx(np.std(seeds["test_accuracy"], ddof=1)) and row["seeds"] == 2
    assert row["loss (points)"] == pytest.approx(seeds["loss_points"].mean())
    assert row["loss std"] == pytest.approx(np.std(seeds["loss_points"], ddof=1))
    assert row["low"] <= row["loss (points)"] <= row["high"]
    assert row["cr_model"] == pytest.approx(seeds["cr_model"].mean())
    assert row["cr_disk"] == pytest.approx(seeds["cr_disk"].mean()) and row["strength"] == seeds["strength"].iloc[0]
    best = tradeoff.summary.sort_values(["cr_disk", "loss (points)"], ascending=[False, True]).iloc[0]
    assert best["front"], "the point of the largest ratio is on the front"
    assert tradeoff.controls["variant"].tolist() == 2 * [study.DENSE] + 2 * [study.DENSE_ONCE]


def summary_of(points):
    """points: (method, target, ratio, items lost by the seeds, None where out of reach); every control has 8 of 8 right.
    The validation loss ranks them the other way round: who chooses by the test is found out."""
    rows = []
    for method, target, ratio, losses in points:
        for seed, loss in enumerate(losses):
            if loss is None:
                continue
            correct = np.arange(8) >= loss
            rows.append({"method": method, "target_cr_disk": target, "seed": seed, "hidden_size": 4, "strength": f"s{seed}",
                         "bits": 6.0, "cr_params": ratio, "cr_bits": ratio, "cr_disk": ratio, "cr_model": ratio / 2,
                         "valid_loss": 1 - 0.1 * loss, "test_loss": 0.5, "test_accuracy": 100 * correct.mean(),
                         "loss_points": 12.5 * loss, "correct": correct})
    reference = {seed: {"correct": np.ones(8, bool)} for seed in range(3)}
    return pd.DataFrame(rows), study._summary(rows, reference)


def test_the_front_of_the_means_by_hand():
    _, summary = summary_of([
        ("a", 10, 10.0, (0, 2)),  # mean 12.5
        ("b", 10, 10.0, (1, 1)),  # the same point: they stand together
        ("c", 10, 9.0, (1, 1)),   # beaten in the ratio
        ("d", 10, 10.0, (2, 2)),  # beaten in the loss
        ("e", 40, 40.0, (4, 4)),
        ("f", 40, 41.0, (4, 4)),  # beats e
        ("g", 80, 80.0, (3, 3)),  # beats both
    ])
    assert summary.loc[summary["front"], "method"].tolist() == ["a", "b", "g"]
    assert summary["loss (points)"].tolist() == [12.5, 12.5, 12.5, 25, 50, 50, 37.5]
    assert summary["loss std"].iloc[0] == pytest.approx(12.5 * np.sqrt(2))
    assert summary["cr_model"].tolist() == [5, 5, 4.5, 5, 20, 20.5, 40]
    assert summary["vs_small"].isna().all()  # nobody asked for the small network


def test_the_loss_against_the_small_network_by_hand():
    _, summary = summary_of([
        (study.SMALL, 10, 9.75, (1, 2, 4)), ("TopK", 10, 10.0, (0, 2, None)), ("Dense", 10, 10.0, (1, None, None)),
        ("BlockCirculant", 10, 10.0, (5, 6, 8)), ("TopK", 40, 40.0, (8, 8, 8)),
    ])
    by_method = summary.set_index(["method", "target_cr_disk"])
    # Items lost against the small network: TopK -1 and 0 of 8, on the two seeds that both have; Dense 0 on one.
    assert by_method["vs_small"].fillna(-1).tolist() == [-1, -100 / 16, 0, 50, -1]
    control = np.array([np.arange(8) >= loss for loss in (1, 2, 4)])
    circulant = np.array([np.arange(8) >= loss for loss in (5, 6, 8)])
    low, _, high = paired_interval(control, circulant, seed=0)
    found = by_method.loc[("BlockCirculant", 10), ["vs_small_low", "vs_small_high"]]
    assert found.tolist() == [low, high] and low > 0
    for name in ("vs_small_low", "vs_small_high"):
        assert by_method[name].isna().tolist() == [True, False, True, False, True]


def test_the_loss_against_the_method_that_validation_takes_by_hand():
    _, summary = summary_of([
        ("TopK", 10, 10.0, (7, 7, None)),  # the least validation loss of all, but one seed is out of reach
        ("Dense", 10, 10.0, (1, 2, 3)), ("LowRank", 10, 10.0, (0, 1, 8)),  # 0.8 and, by one seed, 0.7
        (study.HYBRID, 10, 10.0, (8, 8, 8)), (study.ALLOCATION, 10, 10.0, (7, 8, 8)), (study.SMALL, 10, 9.0, (8, 8, 6)),
        (study.HYBRID, 40, 40.0, (8, 8, 8)),
        (study.UNITS, 80, 80.0, (8,)), ("LowRank", 80, 80.0, (2,)), (study.HYBRID, 80, 80.0, (3,)),
        ("TopK", 160, 160.0, (8, 8)), ("Dense", 160, 160.0, (7, 7)), (study.SMALL, 160, 160.0, (0, 0, 0)),
    ])
    chosen = ["LowRank"] * 6 + ["none"] + [study.UNITS] * 3 + ["none"] * 3
    assert summary["chosen"].fillna("none").tolist() == chosen
    lost = [1300 / 16, -300 / 24, None, 1500 / 24, 1400 / 24, 1300 / 24, None, None, -75, -62.5, None, None, None]
    assert summary["vs_chosen"].fillna(-1).tolist() == pytest.approx([-1 if loss is None else loss for loss in lost])
    assert summary["valid_loss"].tolist()[:3] == pytest.approx([0.3, 0.8, 0.7])
    rival, alone = (np.array([np.arange(8) >= loss for loss in losses]) for losses in ((7, 8, 8), (0, 1, 8)))
    low, _, high = paired_interval(alone, rival, seed=0)
    assert summary.loc[4, ["vs_chosen_low", "vs_chosen_high"]].tolist() == [low, high]
    assert summary["vs_chosen_low"].notna().tolist() == [True, True, False, True, True, True] + 7 * [False]


def test_the_method_that_validation_takes_in_every_fold_by_hand():
    """By the test split LowRank would be taken in fold b and Top-k in fold a."""
    columns = ["p_split", "m_method", "m_target_cr_disk", "m_seed", "m_valid_loss", "m_cr_disk", "m_test_accuracy",
               "m_test_loss", "m_loss_points"]
    rows = pd.DataFrame([
        ("a", "TopK", 10, 0, 0.1, 10.0, 90, 0.1, 1.0), ("a", "TopK", 10, 1, 0.4, 10.0, 92, 0.3, 3.0),
        ("a", "LowRank", 10, 0, 0.2, 12.0, 85, 0.9, 6.0), ("a", "LowRank", 10, 1, 0.2, 12.0, 85, 0.9, 6.0),  # less in the mean
        ("b", "TopK", 10, 0, 0.3, 10.0, 80, 0.6, 4.0), ("b", "LowRank", 10, 0, 0.4, 12.0, 90, 0.5, 2.0),
        ("a", study.ALLOCATION, 10, 0, 0.0, 12.0, 96, 0.0, 0.0), ("a", study.ALLOCATION, 10, 1, 0.0, 12.0, 96, 0.0, 0.0),
        ("b", study.SMALL, 10, 0, 0.0, 12.0, 84, 0.4, 0.0), ("b", study.HYBRID, 10, 0, 0.0, 12.0, 84, 0.4, 0.0),
        ("b", "TopK", 20, 0, np.nan, 20.0, 99, 0.0, 0.0), ("b", "LowRank", 20, 0, 0.4, 20.0, 70, 0.6, 9.0),
        ("a", "TopK", 40, 0, 0.5, 40.0, 90, 0.5, 0.0), ("a", "Dense", 40, 0, 0.5, 40.0, 90, 0.4, 0.0),  # of equals the first
        ("a", "TopK", 80, 0, 0.5, 40.0, 90, 0.5, 0.0), ("a", study.SMALL, 80, 1, 0.5, 40.0, 90, 0.5, 0.0),  # it lacks a seed
        ("b", "TopK", 20, 1, 0.1, 20.0, 99, 0.0, 0.0), ("b", "LowRank", 20, 1, 0.4, 20.0, 70, 0.6, 9.0),  # one is no number
    ], columns=columns, index=[0] * 18)  # an index of pieces put together
    found = study.with_chosen(rows)
    pd.testing.assert_frame_equal(found[:18], rows.reset_index(drop=True))
    copies, rest = found[18:], [name for name in columns if name != "m_method"]
    assert (copies["m_method"] == study.CHOSEN).all()
    taken = rows.iloc[[2, 3, 12, 4, 11, 17]][rest]  # by fold, then by target
    assert copies[rest].values.tolist() == taken.values.tolist()
    table = study.over_folds(found).set_index(["method", "target_cr_disk"])
    assert table.loc[(study.CHOSEN, 10), ["loss (points)", "vs_small"]].tolist() == [5, 4]  # of folds a and b, and of b
    assert table.loc[("LowRank", 10), "loss (points)"] == 4
    with pytest.raises(ValueError, match="with_chosen needs one row for each method, target, split and seed, got several"):
        study.with_chosen(pd.concat([rows, rows]))
    with pytest.raises(ValueError, match="with_chosen needs the rows of .*, got some without m_valid_loss"):
        study.with_chosen(rows.drop(columns="m_valid_loss"))


def test_the_verdict_of_a_choice_by_hand():
    def verdict(*points):
        results, summary = summary_of([(method, 10, 10.0, losses) for method, *losses in points])
        missing = pd.DataFrame(columns=["method", "target_cr_disk", "seed", "reason"])
        controls = pd.DataFrame({"variant": [study.DENSE, study.DENSE_ONCE], "valid_loss": 0.1, "test_accuracy": 90.0})
        return tables.tradeoff_verdict(study.Tradeoff(results, summary, controls, missing)).data.split("\n\n")[0]

    alone = [("TopK", 0, 0), ("Dense", 6, 6), ("LowRank", 7)]
    said = (" Of the methods alone the validation split takes Dense (0.400 nats there, next TopK 1.000); its test loss, 75.00 "
            "(37.50 to 100.00), was not picked after the test.")
    assert verdict(*alone).endswith(said)
    text = verdict(*alone, (study.HYBRID, 2, 2), (study.ALLOCATION, 8), (study.SMALL, 4, 4))
    found = re.search(re.escape(said) + r" Lost against it, in points, this choice taken as given: hybrid -50\.00 \(-[\d.]+ to "
                      r"-[\d.]+\); small dense -25\.00 \(-[\d.]+ to -?[\d.]+\); allocation 25\.00\.$", text)
    assert found, text
    for few in ([("TopK", 0, 0), (study.SMALL, 4, 4)], [("TopK", 0, 0), ("Dense", 4), (study.SMALL, 4, 4)],
                [("TopK", 0), ("Dense", 4), (study.SMALL, 4, 4)]):
        assert "validation" not in verdict(*few)


def test_losses_over_folds_by_hand():
    """Two folds: a fold counts once however many seeds it has, and t of one degree of freedom is 12.706."""
    columns = ["p_split", "m_method", "m_target_cr_disk", "m_seed", "m_cr_disk", "m_test_accuracy", "m_test_loss",
               "m_loss_points"]
    rows = pd.DataFrame([
        ("a", "TopK", 10, 0, 10.0, 90, 0.1, 1.0), ("a", "TopK", 10, 1, 12.0, 92, 0.3, 3.0),
        ("b", "TopK", 10, 0, 13.0, 80, 0.6, 4.0),
        ("a", study.SMALL, 10, 0, 9.0, 89, 0.4, 2.0), ("b", study.SMALL, 10, 0, 9.0, 84, 0.4, 0.0),
        ("b", "Dense", 20, 0, 20.0, 80, 0.6, 4.0),
    ], columns=columns)  # fmt: skip
    top, small, lone = study.over_folds(rows).to_dict("records")
    assert (top["method"], top["folds"], top["seeds"], top["cr_disk"]) == ("TopK", 2, 1, 12.0)
    assert top["cross-entropy"] == pytest.approx(0.4) and top["accuracy %"] == 85.5
    half = 12.7062 * np.std([2, 4], ddof=1) / np.sqrt(2)
    assert [top["low"], top["loss (points)"], top["high"]] == pytest.approx([3 - half, 3, 3 + half], rel=1e-5)
    half = 12.7062 * np.std([-1, 4], ddof=1) / np.sqrt(2)  # seed 1 of fold a has no small network beside it
    against = [top["vs_small_low"], top["vs_small"], top["vs_small_high"]]
    assert against == pytest.approx([1.5 - half, 1.5, 1.5 + half], rel=1e-5)
    assert np.isnan([small["vs_small"], lone["vs_small"], lone["low"], lone["high"]]).all() and lone["loss (points)"] == 4
    grid = tables.tradeoff_grid(study.over_folds(rows)).set_index("method")
    assert grid.loc["TopK"].tolist() == ["3.00 (-9.71 to 15.71) at 12.0x, 0.400 nats", "out of reach"]
    fewer = tables.tradeoff_grid(study.over_folds(rows).assign(seeds=[2, 1, 2])).set_index("method")
    assert fewer.loc[study.SMALL].iloc[0].endswith(" nats, 1 seeds a fold at least")
    assert fewer.loc["TopK"].iloc[0].endswith(" nats")
    assert grid.loc["Dense"].tolist() == ["out of reach", "4.00 at 20.0x, 0.600 nats, 1 folds only"]
    alone = pd.concat([rows, rows.iloc[:1].assign(p_split="c")])  # a fold in which no small network stands beside
    assert study.over_folds(alone)["vs_small"].iloc[0] == 1.5
    with pytest.raises(ValueError, match="one row for each method, target, split and seed, got several"):
        study.over_folds(pd.concat([rows, rows]).assign(p_hidden_size=64))
    for verb in (study.over_folds, study.pairs_over_folds):
        with pytest.raises(ValueError, match=f"{verb.__name__} needs the rows of results.*, got some without m_seed, p_split"):
            verb(rows.drop(columns=["p_split", "m_seed"]))
    with pytest.raises(ValueError, match="over_folds needs rows that differ in .* split and seed alone, got .* hidden_size"):
        study.over_folds(rows.assign(p_hidden_size=[64, 64, 64, 32, 32, 32], p_target_cr_disks=["[10]"] * 5 + ["[20]"]))


def test_pairs_over_folds_by_hand():
    """A fold counts once, by the seeds that both have: fold a has seed 1 of Top-k alone."""
    rows = pd.DataFrame([
        ("a", "TopK", 10, 0, 90, 0.1), ("a", "TopK", 10, 1, 92, 0.3), ("b", "TopK", 10, 0, 80, 0.6),
        ("a", "LowRank", 10, 0, 89, 0.4), ("b", "LowRank", 10, 0, 84, 0.5), ("a", "LowRank", 20, 0, 70, 0.9),
    ], columns=["p_split", "m_method", "m_target_cr_disk", "m_seed", "m_test_accuracy", "m_test_loss"])  # fmt: skip
    (pair,) = study.pairs_over_folds(rows).to_dict("records")
    assert [pair[name] for name in ("target_cr_disk", "method", "other", "folds", "seeds")] == [10, "TopK", "LowRank", 2, 1]
    half = 12.7062 * np.std([1, -4], ddof=1) / np.sqrt(2)
    assert [pair["better_low"], pair["better"], pair["better_high"]] == pytest.approx([-1.5 - half, -1.5, half - 1.5], rel=1e-5)
    half = 12.7062 * np.std([-0.3, 0.1], ddof=1) / np.sqrt(2)
    assert [pair["added_low"], pair["added"], pair["added_high"]] == pytest.approx([-0.1 - half, -0.1, half - 0.1], rel=1e-5)

    dense = pd.DataFrame([("a", 0, study.DENSE, 95, 0.2), ("b", 0, study.DENSE, 90, 0.2)],
                         columns=["p_split", "m_seed", "m_variant", "m_test_accuracy", "m_test_loss"])
    pairs = study.pairs_over_folds(rows, pd.concat([dense, dense]))  # of two runs that share them
    found = pairs.set_index(["target_cr_disk", "method", "other"])["better"].to_dict()
    assert found == {(10, "TopK", "LowRank"): -1.5, (10, "TopK", study.DENSE): -7.5, (10, "LowRank", study.DENSE): -6,
                     (20, "LowRank", study.DENSE): -25}
    assert pairs["better_low"].isna().tolist() == [False, False, False, True]  # of one fold
    more = pd.concat([rows, rows.iloc[3:4].assign(m_seed=1)])  # both have seed 1 of fold a now, in fold b there is one
    assert study.pairs_over_folds(more)["seeds"].tolist() == [1]
    lost = rows.assign(m_test_loss=rows["m_test_loss"].where(rows["p_split"] != "b"))  # both figures are of the same folds
    assert study.pairs_over_folds(lost)[["folds", "better"]].values.tolist() == [[1, 1]]
    apart = study.pairs_over_folds(pd.concat([rows.iloc[::-1], rows.iloc[:1].assign(p_split="c", m_target_cr_disk=20)]))
    assert apart["target_cr_disk"].tolist() == [20, 10] and apart["folds"].tolist() == [0, 2]  # in the order of the rows
    with pytest.raises(ValueError, match="pairs_over_folds needs one row for each method, target, split and seed, got several"):
        study.pairs_over_folds(pd.concat([rows, rows]))
    with pytest.raises(ValueError, match="the controls of one sweep, got several results of one seed"):
        study.pairs_over_folds(rows, pd.concat([dense, dense.assign(m_test_loss=0.3)]))


def test_what_settings_change_by_hand():
    """Paired by seed; what the reference lacks counts in no difference, and in no mean beside one."""
    columns = ["p_schedule", "p_lr", "p_methods", "m_method", "m_target_cr_disk", "m_seed", "m_cr_disk", "m_test_accuracy",
               "m_test_loss"]
    rows = pd.DataFrame([
        ("slow", 0.5, "[1]", "LowRank", 10, 0, 11.0, 80, 0.50),
        ("slow", 0.5, "[1]", "TopK", 10, 0, 10.0, 91, 0.30), ("slow", 0.5, "[1]", "TopK", 10, 1, 10.0, 93, 0.35),
        ("slow", 0.5, "[1]", "TopK", 10, 2, 10.0, 95, 0.70),
        ("fast", None, "[2]", "TopK", 10, 1, 10.0, 90, 0.40), ("fast", None, "[2]", "TopK", 10, 0, 10.0, 90, 0.40),
    ], columns=columns)  # fmt: skip
    table = study.over_settings(rows, schedule="fast", lr=None)
    fast, lone, slow = table.to_dict("records")
    assert (slow["setting"], slow["seeds"], slow["accuracy %"], slow["cr_disk"]) == ("schedule slow, lr 0.5", 2, 92, 10)
    assert slow["cross-entropy"] == pytest.approx(0.325)
    half = 12.7062 * np.std([1, 3], ddof=1) / np.sqrt(2)
    assert [slow["gained_low"], slow["gained"], slow["gained_high"]] == pytest.approx([2 - half, 2, 2 + half], rel=1e-5)
    half = 12.7062 * np.std([-0.1, -0.05], ddof=1) / np.sqrt(2)
    assert [slow["added_low"], slow["added"], slow["added_high"]] == pytest.approx([-half - 0.075, -0.075, half - 0.075], 1e-5)
    assert [row["reference"] for row in (fast, lone, slow)] == [True, False, False] and (fast["seeds"], lone["seeds"]) == (2, 1)
    assert np.isnan([fast["gained"], fast["added"], lone["gained"], lone["added_low"]]).all()
    grid = tables.settings_grid(table).set_index("method")
    assert list(grid) == ["schedule fast, lr None", "schedule slow, lr 0.5"]
    assert grid.loc["TopK, 10x"].tolist() == ["0.400", "0.325 (-0.075, -0.393 to +0.243)"]
    assert grid.loc["LowRank, 10x"].tolist() == ["no result", "0.500, 1 seeds only"]
    one = study.over_settings(rows[rows["m_seed"] == 0], schedule="fast", lr=None)
    assert tables.settings_grid(one).set_index("method").loc["TopK, 10x"].iloc[1] == "0.300 (-0.100)"
    (top,) = study.over_settings(rows[rows["p_schedule"] == "fast"], methods=[2])["setting"]
    assert top == "methods [2]"
    whole = rows.assign(p_lr=[1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert study.over_settings(whole, schedule="fast", lr=0).equals(study.over_settings(whole, schedule="fast", lr=0.0))


def test_settings_that_cannot_be_compared_are_refused():
    rows = pd.DataFrame({"p_schedule": ["slow", "fast"], "p_lr": [0.5, 1.0], "m_method": "TopK", "m_target_cr_disk": 10.0,
                         "m_seed": 0, "m_cr_disk": 10.0, "m_test_accuracy": [90.0, 91.0], "m_test_loss": [0.2, 0.1]})
    for table, reference, message in (
        (rows, {}, "parameters of the rows, got none"),
        (rows, {"schedule": "fast", "speed": 1}, "parameters of the rows, got speed"),
        (rows, {"schedule": "fast"}, "differ in schedule alone, got several values of lr: name it"),
        (rows, {"schedule": "idle", "lr": 1.0}, "no row with schedule idle, lr 1.0, got schedule slow, lr 0.5; schedule fast"),
        (pd.concat([rows, rows]), {"schedule": "fast", "lr": 1.0}, "one row for each method, target, seed and setting, got"),
        (rows.drop(columns="m_method"), {"schedule": "fast"}, "without m_method"),
    ):
        with pytest.raises(ValueError, match=message):
            study.over_settings(table, **reference)


def test_the_verdict_of_a_comparison_pairs_each_rival_with_the_hybrid_plan(comparison):
    right = {variant: np.ones((2, 40), bool) for variant in comparison.correct}
    right[study.SMALL][:, :10] = False
    right[study.HYBRID][:, :20] = False
    right[study.UNIFORM_TOPK][:, :30] = False
    right[study.UNIFORM_CIRCULANT][:, 20:] = False  # as many wrong, other items
    schedule = schedule_layer(comparison.packed[study.HYBRID][0].layers["lstm.l0"], preset("group4x4"), 3)
    text = tables.verdict(replace(comparison, correct=right), {BASELINE: schedule, study.HYBRID: schedule}).data
    assert re.search(r"better: small dense \(1\d\.\d+ to \d+\.\d+ points\); worse: uniform Top-k \(-\d+\.\d+ to -1\d\.\d+ "
                     r"points\); not told apart: uniform circulant \(-[\d.]+ to [\d.]+ points\)\.", text)


def test_the_verdict_of_a_tradeoff_by_hand():
    """The control has 8 of 8 items right, the small network 4; every item of the rest differs where the interval must not
    hold zero, and one seed of two where it must."""
    points = [
        ("TopK", 10, 10.25, (0, 0)), (study.SMALL, 10, 9.75, (4, 4)), ("Dense", 10, 10.5, (3, 5)),
        ("BlockCirculant", 10, 11.0, (8, 8)), ("TopK", 40, 40.0, (8, 8)), (study.SMALL, 40, 38.0, (0, 0)),
        ("hybrid", 80, 81.0, (1, 1)),
    ]
    results, summary = summary_of(points)
    missing = pd.DataFrame([{"method": "Dense", "target_cr_disk": target, "seed": seed, "reason": "too large"}
                            for target in (40, 80, 160) for seed in (0, 1)])
    controls = pd.DataFrame({"variant": [study.DENSE, study.DENSE_ONCE] * 2, "seed": [0, 0, 1, 1],
                             "valid_loss": [0.30, 0.25, 0.20, 0.10], "test_accuracy": [90.0, 91.0, 92.0, 94.0]})
    text = tables.tradeoff_verdict(study.Tradeoff(results, summary, controls, missing)).data
    first, second, third, fourth, front, harm = text.split("\n\n")
    assert first.startswith("**Asked for 10x, the least mean loss: TopK.** Loss in points, least first: "
                            "TopK 0.00 (0.00 to 0.00) at 10.2x; small dense 50.00 (")
    assert ("The 95 % interval (2 seeds, not corrected for the number of comparisons, all against the same controls) lies "
            "above zero for: small dense, Dense, BlockCirculant; below zero for: none.") in first
    assert ("Against the 8-bit small network (102.6 % of the bytes asked for), by the interval of the difference, better: TopK"
            "; worse: BlockCirculant; not told apart: Dense.") in first and "Out of reach" not in first
    assert first.endswith(
        " Of the methods alone the validation split takes BlockCirculant (0.200 nats there, next Dense 0.600); its test loss, "
        "100.00 (100.00 to 100.00), was not picked after the test. Lost against it, in points, this choice taken as given: "
        "small dense -50.00 (-87.50 to -12.50).")
    assert "validation" not in second + third  # there is one method alone, and none
    assert "least mean loss: small dense.**" in second and "better: none; worse: TopK; not told apart: none." in second
    assert second.endswith(" Out of reach: Dense (seeds 0, 1).")
    assert third.startswith("**Asked for 80x.** Loss in points") and "small network" not in third
    assert fourth == "**Asked for 160x.** Out of reach: Dense (seeds 0, 1)."
    assert front == "**On the front of the means:** small dense at 38.0x, hybrid at 81.0x."
    assert "0.175 nats before and 0.250 after it" in harm
    assert "trained once every mean loss of all seeds is 1.50 points larger" in harm
    swapped = controls.assign(valid_loss=controls["valid_loss"].to_numpy()[[1, 0, 3, 2]])
    assert tables.tradeoff_verdict(study.Tradeoff(results, summary, swapped, missing)).data == text[:text.index("\n\n" + harm)]


@pytest.mark.parametrize(("losses", "said"), [
    ({"TopK": (0,), study.SMALL: (8,)}, "One seed gives no interval."),
    ({"TopK": (0,), "Dense": (0, 8), study.SMALL: (8, 0)}, "better: none; worse: none; not told apart: Dense."),
])
def test_a_single_seed_tells_no_method_from_the_small_network(losses, said):
    results, summary = summary_of([(method, 10, 10.0, losses[method]) for method in losses])
    missing = pd.DataFrame(columns=["method", "target_cr_disk", "seed", "reason"])
    controls = pd.DataFrame({"variant": [study.DENSE, study.DENSE_ONCE], "valid_loss": 0.1, "test_accuracy": 90.0})
    text = tables.tradeoff_verdict(study.Tradeoff(results, summary, controls, missing)).data
    assert said in text and ("small network" in text) == (len(losses) > 2)


def test_one_seed_method_and_target_leave_spread_and_interval_empty(tiny_task, dense, tmp_path, in_process):
    def run():
        return study.tradeoff(tiny_task, {1: dense[1]}, ["BlockCirculant"], [10.0], **ARGUMENTS | {"checkpoints": tmp_path})

    tradeoff = run()
    (row,) = tradeoff.summary.to_dict("records")
    assert row["seeds"] == 1 and row["front"]
    assert all(pd.isna(row[name]) for name in ("accuracy std", "low", "high", "loss std"))
    recorded = tables.record_tradeoff(tradeoff)
    assert recorded["summary"][0]["accuracy std"] is None and recorded["summary"][0]["low"] is None
    assert recorded["results"][0]["method"] == "BlockCirculant" and recorded["unreachable"] == []
    text = tables.tradeoff_verdict(tradeoff).data
    assert text.startswith("**Asked for 10x.** Loss") and "One seed gives no interval." in text and "small network" not in text
    assert "(" not in text.split("least first: ")[1].split(" at ")[0]
    assert tables.tradeoff_table(tradeoff)["95 % interval"].tolist() == ["", "", ""]
    figure = plots.tradeoff_figure(tradeoff.results, tradeoff.summary, tables.published_table())
    assert "published" not in " ".join(text.get_text() for text in figure.legends[0].get_texts())
    axis, reached = figure.axes[0], tradeoff.results["cr_disk"].iloc[0]
    assert axis.get_xlim()[0] > 0.8 * reached and axis.get_xlim()[1] < 1.2 * reached  # no star far away widens it
    assert "std" not in axis.get_ylabel() and "linear up to 2" in axis.get_ylabel()
    # What a sweep relies on: the next run with the same directory trains nothing again.
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == 2 and run().results.equals(tradeoff.results)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


def test_the_allocation_and_the_hidden_units_of_a_tradeoff(tiny_task, dense, in_process, monkeypatch):
    """16 units of 3 features: 1,216 weights. At 6x 810 bytes: of 8 bits 12 units take 720, 13 take 832; at 400x not one."""
    searched = []
    monkeypatch.setattr(study, "choices_to_measure", lambda model, families: [m for m in (TopK(0.25), BlockCirculant(4))
                                                                              if type(m) in families])
    monkeypatch.setattr(study, "search_allocation",
                        lambda *a, **k: searched.append((a[0], search_allocation(*a, **k))) or searched[-1][1])
    tradeoff = study.tradeoff(tiny_task, dense, SEARCHED, [6.0, 400.0], **ARGUMENTS | {"schedule": "gradual"})
    reached = tradeoff.results.set_index(["method", "seed"])
    assert sorted(reached.index) == [(method, seed) for method in sorted(SEARCHED) for seed in (0, 1)]
    units = reached.loc[study.UNITS]
    assert (units["hidden_size"] == 12).all() and units["cr_disk"].tolist() == 2 * [4 * 1216 / 720]
    assert units["strength"].tolist() == ["Dense", "Dense"] and (units["bits"] == 8).all()
    allocated = reached.loc[study.ALLOCATION]
    assert (allocated["hidden_size"] == 16).all() and (allocated["cr_disk"] >= 6).all()
    ((model, found),) = searched  # with the first seed, for all of them
    assert model is dense[0]
    labels = {method_label(entry.method) for entry in found["plan"].iloc[0].blocks.values()}
    assert all(set(strength.split(", ")) == labels for strength in allocated["strength"])
    reasons = tradeoff.unreachable.set_index("method")["reason"]
    assert set(reasons[study.UNITS]) == {"no whole unit of 8 bits fits cr_disk 400.0"}
    assert "no allocation meets cr_disk 400.0: allocate cannot reach" in reasons[study.ALLOCATION].iloc[0]


def test_every_retraining_of_a_tradeoff_has_the_rate_that_was_asked_for(tiny_task, dense, tmp_path, in_process, monkeypatch):
    """The searches' and the control's too; a small network is trained from scratch at the task's own. Files of one rate do not
    stand for those of another."""
    rates = {"here": [], "in a search": []}
    for where, module in (("here", study), ("in a search", sensitivity)):
        def noted(model, task, *, rates=rates[where], **settings):
            rates.append(task.recipe.lr)
            return fit(model, task, **settings)
        monkeypatch.setattr(module, "fit", noted)
    monkeypatch.setattr(study, "choices_to_measure", lambda model, families: [TopK(0.25)] if TopK in families else [])
    monkeypatch.setattr(study, "strengths", lambda units: [STRENGTH])
    arguments = ARGUMENTS | {"search_epochs": 1, "checkpoints": tmp_path}
    for retrain_lr in (1e-3, 2e-3):
        study.tradeoff(tiny_task, {0: dense[0]}, ["hybrid", "allocation", "small dense"], [6.0],
                       **arguments | {"retrain_lr": retrain_lr})
    assert tiny_task.recipe.lr not in (1e-3, 2e-3)
    # The small network from scratch, once for both; then it in 8 bits, both plans and the dense control.
    assert rates["here"] == [tiny_task.recipe.lr] + 4 * [1e-3] + 4 * [2e-3]
    # The hybrid's strength; the allocation's two candidates: that of Top-k, the one family, and its uniform plan.
    assert rates["in a search"] == 3 * [1e-3] + 3 * [2e-3]


@pytest.mark.filterwarnings("ignore:a retraining schedule passed over")  # of an epoch of few steps
@pytest.mark.parametrize(("schedule", "stages"), [("one-shot", 1), ("gradual", 4), ("ADMM", 2)])  # dense, blocks of 2, 4 and 8
def test_a_schedule_of_retraining_is_loaded_where_it_is_finished(tiny_task, dense, tmp_path, in_process, schedule, stages,
                                                                 monkeypatch):
    followed = []
    monkeypatch.setattr(study, "fit", lambda *a, **k: followed.append(k.get("retraining")) or fit(*a, **k))

    def run():
        arguments = ARGUMENTS | {"epochs": 2, "checkpoints": tmp_path, "schedule": schedule}
        return study.tradeoff(tiny_task, {0: dense[0]}, ["BlockCirculant"], [40.0], **arguments)

    first, files = run(), sorted(tmp_path.iterdir())
    assert [len(way.stages) for way in followed if way] == [stages]  # the dense control follows none
    assert len(files) == 2 and run().results.equals(first.results) and sorted(tmp_path.iterdir()) == files


def test_a_retraining_that_does_harm_is_not_kept_where_so_asked(tiny_task, dense, in_process, tmp_path):
    """At a rate that destroys whatever it trains; at a good one what was retrained is kept."""
    def run(**more):
        arguments = ARGUMENTS | {"epochs": 3, "checkpoints": tmp_path}
        return study.tradeoff(tiny_task, {0: dense[0]}, ["BlockCirculant"], [10.0], **arguments | more)

    harmful, kept = (run(retrain_lr=10.0, keep_start=keep) for keep in (False, True))
    once = harmful.controls.set_index("variant").loc[study.DENSE_ONCE].drop("seed")
    control, kept_control = (found.controls.set_index("variant").loc[study.DENSE].drop("seed") for found in (harmful, kept))
    assert control["valid_loss"] > once["valid_loss"] and kept_control.to_list() == once.to_list()
    (row,), (kept_row,) = (found.results.to_dict("records") for found in (harmful, kept))
    assert row["valid_loss"] > kept_row["valid_loss"] and kept_row["valid_accuracy"] == kept_row["valid_accuracy_before"]
    good, kept = (run(keep_start=keep) for keep in (False, True))
    assert good.results["valid_loss"][0] < kept_row["valid_loss"] and kept.results.equals(good.results)


def test_the_searches_of_a_tradeoff_judge_a_candidate_as_it_would_be_kept(tiny_task, dense, in_process, monkeypatch):
    """Where retraining harms, by the losses before it; where it helps, by those after it."""
    monkeypatch.setattr(study, "choices_to_measure", lambda model, families: [TopK(0.25)] if TopK in families else [])
    monkeypatch.setattr(study, "strengths", lambda units: [STRENGTH, replace(STRENGTH, circulant_bits=5)])

    def losses(**more):
        found = {}
        with monkeypatch.context() as patch:
            for name, search in (("search_hybrid", study.search_hybrid), ("search_allocation", study.search_allocation)):
                patch.setattr(study, name, lambda *a, search=search, name=name, **k: found.setdefault(name, search(*a, **k)))
            study.tradeoff(tiny_task, {0: dense[0]}, ["hybrid", "allocation"], [6.0], **ARGUMENTS | {"search_epochs": 1} | more)
        return {name: sorted(table["valid_loss"]) for name, table in found.items()}

    start, harmed = losses(search_epochs=0), losses(retrain_lr=10.0)
    assert start.keys() == {"search_hybrid", "search_allocation"} and len(start["search_hybrid"]) == 2
    assert all(b < a for name in start for a, b in zip(harmed[name], start[name], strict=True))
    assert losses(retrain_lr=10.0, keep_start=True) == start
    helped = losses()
    assert all(b > a for name in start for a, b in zip(helped[name], start[name], strict=True))
    assert losses(keep_start=True) == helped


def test_an_iterative_hybrid_compresses_its_circulant_gates_first(tiny_task, dense, in_process, monkeypatch):
    followed = []
    monkeypatch.setattr(study, "fit", lambda *a, **k: followed.append(k.get("retraining")) or fit(*a, **k))
    monkeypatch.setattr(study, "sensitive_gates", lambda classes: ["g", "o"])
    study.tradeoff(tiny_task, {0: dense[0]}, [study.HYBRID], [10.0], **ARGUMENTS | {"epochs": 2, "schedule": "iterative"})
    ((start, first), (end, last)), = (way.stages for way in followed if way)
    assert (start, end) == (0.0, 0.25)
    for name, entry in last.blocks.items():
        kept = name.endswith((".g", ".o"))
        assert type(entry.method) is (TopK if kept else BlockCirculant)
        assert first.blocks[name].method == Dense() if kept else first.blocks[name] == entry
    # Where no gate is sensitive there is nothing to wait for.
    plan = replace(last, blocks={name: first.blocks[name.replace(".g", ".i").replace(".o", ".i")] for name in last.blocks})
    assert [stage for stage, _ in study.SCHEDULES["iterative"](dense[0], plan).stages] == [0.0]


def test_every_plan_has_a_checkpoint_of_its_own(tiny_task, dense, tmp_path, in_process):
    study.tradeoff(tiny_task, {0: dense[0]}, ["TopK"], [6.0, 30.0], **ARGUMENTS | {"checkpoints": tmp_path})
    assert len(list(tmp_path.iterdir())) == 3  # the dense control, one for each ratio


def test_a_point_out_of_reach_alone_is_a_result(tiny_task, dense, in_process):
    tradeoff = study.tradeoff(tiny_task, {0: dense[0]}, ["Dense", study.HYBRID], [400.0], **ARGUMENTS | {"workers": 1})
    assert tradeoff.results.empty and tradeoff.summary.empty and len(tradeoff.controls) == 2
    listed = tables.unreachable_table(tradeoff)
    assert listed["method"].tolist() == ["Dense", study.HYBRID] and listed["seeds"].tolist() == ["0", "0"]
    assert "no hybrid plan meets cr_disk 400" in listed["reason"].iloc[1]
    assert len(tables.tradeoff_table(tradeoff)) == 2 and tradeoff.by_seed().empty
    assert tables.tradeoff_verdict(replace(tradeoff, controls=tradeoff.controls.assign(valid_loss=0.1))).data == (
        "**Asked for 400x.** Out of reach: Dense (seeds 0), hybrid (seeds 0).\n\n**On the front of the means:** none.")
    assert plots.tradeoff_figure(tradeoff.results, tradeoff.summary, tables.published_table()).axes
    assert plots.interval_figure(tradeoff.results, tradeoff.summary).axes
    assert tables.record_tradeoff(tradeoff)["results"] == []


def test_tables_and_figure_of_a_tradeoff(tradeoff):
    table = tables.tradeoff_table(tradeoff)
    assert table["method"].tolist()[:3] == [study.DENSE, study.DENSE_ONCE, "TopK"] and len(table) == 9
    grid = tables.tradeoff_grid(tradeoff.summary)
    assert list(grid) == ["method", "asked 6x", "asked 30x"]
    assert grid.set_index("method").loc["Dense", "asked 30x"] == "out of reach"
    assert (table["front"] == "yes").sum() == tradeoff.summary["front"].sum()
    assert table["loss std"][2:].tolist() == tradeoff.summary["loss std"].tolist() and table["loss std"][:2].isna().all()
    empty = table["vs small dense"] == ""
    assert table.loc[empty, "method"].tolist() == [study.DENSE, study.DENSE_ONCE, study.SMALL, study.SMALL]
    listed = tables.unreachable_table(tradeoff)
    assert listed[["method", "target_cr_disk", "seeds"]].values.tolist() == [["Dense", 30.0, "0, 1"]]
    published = tables.published_table()
    assert published[["ratio", "loss (%)"]].values.tolist() == [[38.4, 1.7], [32.8, 1.896]]
    assert published["source"].str.contains("DOI 10.").all()
    figure = plots.tradeoff_figure(tradeoff.results, tradeoff.summary, published)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(METHODS_OF_TRADEOFF) < set(labels) and "dense control" in labels
    assert "published; data and\ncounting not stated" in labels
    assert "mean ± std over seeds; linear up to 2" in figure.axes[0].get_ylabel()
    low, high = figure.axes[0].get_ylim()
    assert low > high, "less loss is further up"
    losses = [*tradeoff.results["loss_points"], 1.7, 0]
    assert low > max(losses) and high < min(losses)
    colours = {handle.get_color() + handle.get_marker() for handle in figure.legends[0].legend_handles[2:6]}
    assert len(colours) == 4
    assert len(tradeoff.by_seed()) == 14 and len(tradeoff.plans()) == 7
    low_ratio, high_ratio = plots.interval_figure(tradeoff.results, tradeoff.summary).axes
    assert [axis.get_title() for axis in (low_ratio, high_ratio)] == ["asked for 6x", "asked for 30x"]
    assert [label.get_text() for label in low_ratio.get_yticklabels()] == METHODS_OF_TRADEOFF
    for axis, target in ((low_ratio, 6.0), (high_ratio, 30.0)):
        rows = tradeoff.summary[tradeoff.summary["target_cr_disk"] == target].set_index("method")
        drawn = {METHODS_OF_TRADEOFF[int(y)]: segment[:, 0].tolist()
                 for lines in axis.collections for segment in lines.get_segments() for y in segment[:1, 1]}
        assert drawn == {method: [row["low"], row["high"]] for method, row in rows.iterrows()}
        points = [(x, y) for line in axis.get_lines()[1:] for x, y in zip(*line.get_data(), strict=True)]
        means = {METHODS_OF_TRADEOFF[y]: x for x, y in points if y == int(y)}
        assert means == rows["loss (points)"].to_dict() and len(points) == 3 * len(rows)  # two seeds below each mean
    assert tradeoff.by_seed()["cr_model"].tolist() == tradeoff.results["cr_model"].tolist()
    assert tradeoff.plans()["cr_model"].tolist() == tradeoff.summary["cr_model"].tolist()


@pytest.mark.parametrize(("change", "message"), [
    ({"methods": ["TopK", "Topk"]}, "a tradeoff knows the methods Dense, TopK, .*hybrid, allocation, small dense, got Topk"),
    ({"methods": []}, r"needs different methods, at least one, got \[\]"),
    ({"methods": ["TopK", "TopK"]}, "needs different methods"),
    ({"target_cr_disks": []}, "needs different target_cr_disks"),
    ({"target_cr_disks": [10, 10.0]}, "needs different target_cr_disks"),
    ({"target_cr_disks": [10, 0.5]}, "at least 1, got 0.5"),
    ({"bits": 9}, "2 to 8 bits, got 9"),
    ({"search_epochs": -1}, "search_epochs of at least 0, got -1"),
    ({"schedule": "fast"}, "a tradeoff knows the schedules one-shot, gradual, ADMM, iterative, got 'fast'"),
    ({"schedule": "iterative"}, r'needs methods=\["hybrid"\] for it, got \[.Dense'),
    ({"hidden_size": 12}, "that 8 divides, got 12"),
    ({"hidden_size": 0, "methods": ["TopK"]}, "at least 1 unit, got 0"),
    ({"seeds": [0, 0]}, "different seeds"),
    ({"retrain_epochs": 0}, "epochs of at least 1, got 0"),
    ({"retrain_lr": 0.0}, "a tradeoff needs a retrain_lr above 0, .*, got 0.0"),
    ({"retrain_lr": float("nan")}, "retrain_lr above 0, .*, got nan"),
    ({"distillation_weight": 2}, r"distillation_weight in \[0, 1\], got 2"),
    ({"workers": 0}, "at least 1 worker, got 0"),
    ({"schedule": "gradual", "keep_start": True}, "keep_start needs the schedule \"one-shot\", got 'gradual'"),
    ({"device": "tpu"}, "a tradeoff needs \"cpu\" or \"cuda\" as device, got 'tpu'"),
])
def test_a_tradeoff_is_checked_before_training(tiny_task, change, message):
    good = {"hidden_size": 16, "methods": list(study.TRADEOFF_METHODS), "target_cr_disks": [10.0, 40], "bits": 6, "seeds": [0],
            "epochs": 1, "retrain_epochs": 1, "search_epochs": 0, "distillation_weight": 0.0, "workers": 1}
    study.check_tradeoff(tiny_task, **good)
    study.check_tradeoff(tiny_task, **good | {"hidden_size": 12, "methods": ["TopK"]})  # 8 is the hybrid plan's rule only
    with pytest.raises(ValueError, match=message):
        study.check_tradeoff(tiny_task, **good | change)
    early = replace(tiny_task, recipe=replace(tiny_task.recipe, select_after=0.2))
    study.check_tradeoff(early, **good)
    with pytest.raises(ValueError, match="schedule 'gradual' is done after 0.25 of the steps: .* select_after .* has 0.2"):
        study.check_tradeoff(early, **good | {"schedule": "gradual"})


def test_a_tradeoff_refuses_before_training_also_without_its_check(tiny_task, dense, monkeypatch):
    monkeypatch.setattr(study, "parallel", lambda *_: pytest.fail("something was started"))
    with pytest.raises(ValueError, match="a tradeoff knows the methods"):
        study.tradeoff(tiny_task, dense, ["Topk"], [10.0], **ARGUMENTS)
    with pytest.raises(ValueError, match="at least 1, got 0.5"):
        study.tradeoff(tiny_task, dense, ["TopK"], [0.5], **ARGUMENTS)
    with pytest.raises(ValueError, match="as device, got 'tpu'"):
        study.tradeoff(tiny_task, dense, ["TopK"], [6.0], **ARGUMENTS, device="tpu")


@pytest.mark.parametrize("method", ["TopK", study.SMALL])
@pytest.mark.parametrize("trained", [False, True])
def test_a_point_that_cannot_be_packed_is_listed(tiny_task, dense, monkeypatch, method, trained):
    """Weights differ by seed and training moves them; the other points of a study must not be lost for it."""
    def refuse(model, plan, original, pack=budget.pack):
        if (original is not None) == trained:
            raise Unpackable("layer lstm.l0: too wide a sum")
        return pack(model, plan, original)

    monkeypatch.setattr(budget, "pack", refuse)
    row = study._point(tiny_task, dense[0], method, 6.0, 0, 6, None, study.Retraining(1, 1, 0.0, None))
    assert row["reason"].endswith("the plan cannot be packed: layer lstm.l0: too wide a sum")
    assert {name: row[name] for name in ("method", "target_cr_disk", "seed")} == {"method": method, "target_cr_disk": 6.0,
                                                                                  "seed": 0} and len(row) == 4


def test_a_width_that_cannot_be_packed_when_it_is_trained_gives_way_to_the_next(tiny_task, dense, monkeypatch):
    def refuse(model, plan, original, pack=budget.pack):
        if original is not None and {entry.format.bits for entry in plan.blocks.values()} == {6}:
            raise Unpackable("layer lstm.l0: too wide a sum")
        return pack(model, plan, original)

    signals = study.calibrate(dense[0], study.calibration_batches(tiny_task))
    widths = []

    def passed_over(plan):
        widths.append({entry.format.bits for entry in plan.blocks.values()})
        raise budget.OutOfReach("the next one")

    with pytest.raises(budget.OutOfReach):
        budget.first_uniform(dense[0], TopK, 6, 6.0, signals, passed_over)
    first, second, *_ = widths
    assert first == {6}
    monkeypatch.setattr(budget, "pack", refuse)
    row = study._point(tiny_task, dense[0], "TopK", 6.0, 0, 6, None, study.Retraining(1, 1, 0.0, None))
    assert {row["bits"]} == second and row["cr_disk"] >= 6


def test_the_device_reaches_every_training_and_measurement(tiny_task, dense, monkeypatch):
    """And what the emulation measures there is what the engine measures."""
    places, chosen = [], ["TopK", study.HYBRID, study.ALLOCATION, study.UNITS, study.SMALL]

    def noted(function):
        def call(*args, device, **more):
            places.append(device)
            return function(*args, **more)

        return call

    monkeypatch.setattr(study, "parallel", one_after_another)
    expected = study.tradeoff(tiny_task, dense, chosen, [6.0], **ARGUMENTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, place: (places.append(place), model)[1])
    monkeypatch.setattr(sensitivity, "move", lambda model, place: places.append(place))
    monkeypatch.setattr(study, "fit", noted(study.fit))
    monkeypatch.setattr(study, "attach", lambda *_: pytest.fail("on the engine"))
    found = study.tradeoff(tiny_task, dense, chosen, [6.0], **ARGUMENTS, device="cuda")
    assert set(places) == {"cuda"} and len(places) > 50
    pd.testing.assert_frame_equal(found.results, expected.results, check_exact=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_cuda(tiny_task, dense):
    found = study.tradeoff(tiny_task, dense, METHODS_OF_TRADEOFF, [6.0], **ARGUMENTS, device="cuda")
    assert set(found.results["method"]) == set(METHODS_OF_TRADEOFF) and (found.results["test_accuracy"] > 0).all()


def test_the_notebook_compares_every_method_by_default():
    methods = runs.read_parameters("tradeoff")["methods"].default
    assert methods == list(study.TRADEOFF_METHODS)


class Own(torch.nn.Module):
    """A user's module, whose recurrent layer has a name of its own."""

    def __init__(self, rnn):
        super().__init__()
        self.encoder, self.consumers = rnn, {"encoder": ["head"]}
        self.head = torch.nn.Linear((rnn.proj_size or rnn.hidden_size) * (1 + rnn.bidirectional), 2)


@pytest.mark.parametrize("cell, form", [
    ("LSTM", {}), ("GRU", {}), ("LSTM", {"bidirectional": True}), ("LSTM", {"num_layers": 2}), ("LSTM", {"proj_size": 2}),
], ids=str)
@pytest.mark.parametrize("target", [2.0, 3.9, 6.0, 10.0])
def test_hidden_units_fill_the_bytes_of_any_model(cell, form, target):
    """At 8 bits, and with no more units than there are, however small the ratio."""
    model = Own(getattr(torch.nn, cell)(3, 16, **form))

    def ratio(units):
        return 4 * dense_weights(blocks(model)) / dense_weights(blocks(remove_units(model, units)))

    units = study.point_start(model, study.UNITS, target).encoder.hidden_size
    assert ratio(units) >= target or units == 16
    assert units == 16 or ratio(units + 1) < target


def test_no_unit_of_a_projected_layer_fits():
    """torch wants more units than are projected to: 7 of 16 at 8 bits reach 4 * 16 / 7 = 9.1x."""
    model = Own(torch.nn.LSTM(3, 16, proj_size=6))
    assert study.point_start(model, study.UNITS, 9.1).encoder.hidden_size == 7
    with pytest.raises(budget.OutOfReach, match="no whole unit of 8 bits fits cr_disk 9.2"):
        study.point_start(model, study.UNITS, 9.2)


def test_checkpoints_of_one_dense_model_do_not_stand_for_another(tiny_task, dense, tmp_path):
    """Two models of one shape and seed: the control of each, and the small network that is taught by each."""
    def measured(model, checkpoints):
        retraining = study.Retraining(dense_epochs=1, epochs=1, distillation_weight=0.9, checkpoints=checkpoints)
        return (study.dense_control(tiny_task, model, study.DENSE, 0, retraining)["valid_loss"],
                study.small_control(tiny_task, model, 10.0, 0, retraining)["valid_loss"])

    other = models.build_classifier(tiny_task, 16, seed=7)
    fresh, found = [measured(model, None) for model in (dense[0], other)], []
    for _ in range(2):
        found += [measured(model, tmp_path) for model in (dense[0], other)]
    assert found == 2 * fresh and fresh[0][0] != fresh[1][0] and fresh[0][1] != fresh[1][1]


def test_a_model_whose_units_cannot_be_removed_is_refused_before_any_work(tiny_task, dense, monkeypatch):
    monkeypatch.setattr(study, "parallel", None)
    model = Own(torch.nn.LSTM(3, 16))
    model.consumers = None
    with pytest.raises(ValueError, match="remove_units needs to know what takes the output of 'encoder'"):
        study.tradeoff(tiny_task, dense | {1: model}, ["allocation", study.UNITS], [6.0], **ARGUMENTS)


@pytest.mark.parametrize("bad, message", [
    ({"dense": {}}, r"a study needs a list of different seeds, got \[\]"),
    ({"epochs": 0}, "Recipe needs epochs of at least 1, got 0"),
    ({"dense_epochs": 0}, "Recipe needs epochs of at least 1, got 0"),
    ({"distillation_weight": 2.0}, r"a study needs a distillation_weight in \[0, 1\], got 2.0"),
    ({"workers": 0}, "a study needs at least 1 worker, got 0"),
], ids=str)
@pytest.mark.parametrize("verb", ["tradeoff", "compare"])
def test_bad_values_are_refused_before_any_work(tiny_task, dense, monkeypatch, verb, bad, message):
    monkeypatch.setattr(study, "parallel", None)
    monkeypatch.setattr(study, "_plans", None)
    arguments = ARGUMENTS | {"dense": dense} | bad
    models_ = arguments.pop("dense")
    with pytest.raises(ValueError, match=message):
        if verb == "tradeoff":
            study.tradeoff(tiny_task, models_, ["hybrid", "TopK"], [6.0], **arguments)
        else:
            del arguments["bits"], arguments["search_epochs"]
            study.compare(tiny_task, models_, ["g"], STRENGTH, TARGET, variants=study.variants(True), **arguments)
