"""Studies over seeds: the variants, the controls, their sizes and what is read when."""

import numpy as np
import pytest
import torch

from workbench import models, plots, study, tables
from workbench.array import preset, schedule_layers
from workbench.constrain import attach, bake
from workbench.methods import BlockCirculant, TopK
from workbench.sensitivity import Strength, classify
from workbench.train import evaluate

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


def test_the_small_control_takes_at_least_the_budget():
    assert study.small_hidden_size(40, 1) == 1
    size = study.small_hidden_size(12, 59733)
    assert 4 * size * (12 + size) * 8 >= 59733 > 4 * (size - 1) * (12 + size - 1) * 8


def test_summary_gives_mean_spread_and_the_paired_loss(comparison):
    summary = comparison.summary().set_index("variant")
    rows = comparison.results[comparison.results["variant"] == study.HYBRID]["test_accuracy"]
    assert summary.loc[study.HYBRID, "accuracy %"] == pytest.approx(rows.mean())
    assert summary.loc[study.HYBRID, "std"] == pytest.approx(np.std(rows, ddof=1))
    dense_rows = comparison.results[comparison.results["variant"] == study.DENSE]["test_accuracy"]
    assert summary.loc[study.HYBRID, "loss (points)"] == pytest.approx(dense_rows.mean() - rows.mean())
    assert summary.loc[study.DENSE, ["loss (points)", "low", "high"]].tolist() == [0, 0, 0]


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
    for seeds in ([], [0, 0], [-1]):
        with pytest.raises(ValueError, match="different seeds of at least 0"):
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
    ({"distillation_weight": 1.5}, r"distillation_weight in \[0, 1\], got 1.5"),
    ({"steps": 0}, "at least 1 step, got 0"),
    ({"workers": 0}, "at least 1 worker, got 0"),
])
def test_a_study_is_checked_before_training(tiny_task, change, message):
    good = {"hidden_size": 16, "target_cr_disk": 10.0, "seeds": [0], "epochs": 1, "retrain_epochs": 1,
            "distillation_weight": 0.0, "steps": 1, "workers": 1}
    study.check_study(tiny_task, **good)
    with pytest.raises(ValueError, match=message):
        study.check_study(tiny_task, **(good | change))


def test_tables_and_figures_of_a_study(comparison, dense, tiny_task):
    sensitivity = study.sensitivity_over_seeds(tiny_task, dense, [TopK(0.25), BlockCirculant(4)], bits=8, epochs=0, workers=2)
    assert len(sensitivity) == 2 * 2 * 8
    classes = classify(sensitivity)
    layers = study.array_layers(dense[0], tiny_task, comparison, 0, STRENGTH, TARGET)
    assert set(layers) == {study.DENSE_16, study.SMALL, study.UNIFORM_TOPK, study.UNIFORM_CIRCULANT, study.HYBRID}
    schedules = schedule_layers(layers, preset("group4x4"), 5)
    assert (tables.split_table(schedules).loc["total"] == [s.cycles for s in schedules.values()]).all()
    assert len(tables.plan_table(comparison, 0)) == 8
    assert tables.plan_table(comparison, 0)["index bits"].sum() == comparison.packed[study.HYBRID][0].index_bits
    signals = tables.signal_table(comparison, 0).set_index("signal")
    assert signals["table error (last places)"].notna().to_dict() == {
        "input": False, "pre": False, "sigmoid": True, "tanh": True, "cell": False, "hidden": False}
    assert len(tables.task_table(tiny_task)) == 3 and len(tables.accuracy_table(dense, tiny_task)) == 2
    assert tables.hardware_table(schedules).loc["acceleration", study.DENSE_16] == 1
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
    plan = study._plans(dense[0], tiny_task, ["g"], STRENGTH, TARGET, [study.HYBRID])[study.HYBRID]
    study._variant(tiny_task, dense[0], plan, study.HYBRID, 0, 1, 1, 0.0, None, TARGET)
    assert read == ["valid", "valid", "test"]
