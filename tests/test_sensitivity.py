"""The sensitivity table, the classes and the hybrid plan."""

import numpy as np
import pandas as pd
import pytest
import torch

from workbench import models, sensitivity
from workbench.constrain import compress, pack
from workbench.gates import weight
from workbench.methods import BlockCirculant, TopK
from workbench.quantise import calibrate
from workbench.sensitivity import Strength, classify, hybrid_plan, search_hybrid, sensitivity_table


@pytest.fixture(scope="module")
def model(tiny_task):
    return models.build_classifier(tiny_task, 16, seed=0)


@pytest.fixture(scope="module")
def signals(model, tiny_task):
    return calibrate(model, sensitivity.calibration_batches(tiny_task))


def rows(scores, methods=("a", "b")):
    """A table in which gate g's two blocks have scores[g] / 2 as excess loss under every method."""
    return pd.DataFrame([
        {"block": f"lstm.weight_{part}_l0.{gate}", "gate": gate, "method": method, "excess_loss": score / 2}
        for gate, score in scores.items() for part in ("ih", "hh") for method in methods
    ])


def test_a_gate_above_the_mean_is_sensitive():
    classes = classify(rows({"i": 0.1, "f": 0.2, "g": 1.0, "o": 0.3})).set_index("gate")
    assert classes["score"].to_dict() == pytest.approx({"i": 0.1, "f": 0.2, "g": 1.0, "o": 0.3})
    assert classes["mean of gates"].iloc[0] == pytest.approx(0.4)
    assert classes["class"].to_dict() == {"i": "insensitive", "f": "insensitive", "g": "sensitive", "o": "insensitive"}
    assert "1.0000 is above the mean of the gates, 0.4000" in classes.loc["g", "reason"]


def test_seeds_are_averaged():
    table = pd.concat([rows({"i": 0.0, "f": 0.0, "g": 1.0, "o": 0.0}), rows({"i": 0.0, "f": 0.0, "g": 0.0, "o": 0.5})])
    assert classify(table).set_index("gate")["score"].to_dict() == pytest.approx({"i": 0, "f": 0, "g": 0.5, "o": 0.25})


@pytest.mark.parametrize("scores", [
    {"i": 0.3, "f": 0.3, "g": 0.3, "o": 0.3},
    {"i": -0.3, "f": -0.1, "g": -0.2, "o": -0.3},
])
def test_no_gate_is_sensitive_where_none_stands_out_or_hurts(scores):
    assert set(classify(rows(scores))["class"]) == {"insensitive"}


def test_one_shot_table_equals_a_measurement_by_hand(model, tiny_task):
    """The excess of one block is the validation loss with that block's projected weights put in by hand."""
    table = sensitivity_table(model, tiny_task, [TopK(0.25)], bits=16).set_index("block")
    assert len(table) == 8 and set(table["loss_before"] - table["loss_after"]) == {0}
    assert table["recovered"].isna().all() and table["recovery_epochs"].isna().all()
    name = "lstm.weight_hh_l0.g"
    changed = models.build_classifier(tiny_task, 16, seed=0)
    with torch.no_grad():
        changed.lstm.weight_hh_l0[32:48] = TopK(0.25).project(weight(model, name))
    from workbench.train import evaluate
    by_hand = evaluate(changed, tiny_task, "valid").loss - evaluate(model, tiny_task, "valid").loss
    assert table.loc[name, "excess_loss"] == pytest.approx(by_hand, abs=2e-4)  # 16-bit weights on one side only


def test_retrained_table_averages_over_epochs_against_the_retrained_reference(model, tiny_task):
    epochs = 2
    table = sensitivity_table(model, tiny_task, [BlockCirculant(4)], epochs=epochs, seed=3)
    assert (table["loss_after"] != table["loss_before"]).all()
    lost = table["loss_before"] > sensitivity_table(model, tiny_task, [BlockCirculant(4)])["loss_dense"]
    assert table["recovered"].notna().tolist() == lost.tolist()
    recovery = table["recovery_epochs"].dropna()
    assert recovery.between(0, epochs).all()


def test_the_hybrid_plan_meets_its_target_and_wastes_nothing(model, signals):
    strength = Strength(block=8, circulant_bits=6, topk_bits=6)
    plan = hybrid_plan(model, ["g"], strength, 20.0, signals)
    kinds = {name: type(entry.method) for name, entry in plan.blocks.items()}
    assert all(kind is (TopK if name.endswith(".g") else BlockCirculant) for name, kind in kinds.items())
    packed = pack(model, plan)
    assert packed.cr_disk >= 20.0
    # One weight more in the larger block would miss the target.
    keep = next(entry.method.keep for entry in plan.blocks.values() if isinstance(entry.method, TopK))
    more = TopK(keep + 2 / 256)
    blocks = {name: type(entry)(more, entry.format) if isinstance(entry.method, TopK) else entry
              for name, entry in plan.blocks.items()}
    assert pack(model, type(plan)(blocks, signals)).cr_disk < 20.0


def test_retraining_cannot_push_the_ratio_under_the_target(model, signals):
    """Even when every kept weight of the retrained model is non-zero."""
    plan = hybrid_plan(model, ["g", "o"], Strength(8, 4, 4), 20.0, signals)
    compressed = compress(model, plan)
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter[parameter == 0] = 0.1
        for stored in compressed.lstm.parametrizations.parameters():
            stored.copy_(torch.sign(stored + 1e-9) * 0.2)
    assert pack(compressed, plan).cr_disk >= 20.0


def test_unreachable_targets_are_refused_with_the_numbers(model, signals, tiny_task):
    with pytest.raises(ValueError, match=r"cannot reach cr_disk 200.0 with block 2.*circulant gates take \d+ of \d+ bits"):
        hybrid_plan(model, ["g"], Strength(2, 8, 8), 200.0, signals)
    with pytest.raises(ValueError, match="no sensitive gate"):
        hybrid_plan(model, [], Strength(2, 8, 8), 200.0, signals)
    with pytest.raises(ValueError, match="no hybrid plan meets cr_disk 200"):
        search_hybrid(model, tiny_task, ["g"], 200.0, [Strength(2, 8, 8)], epochs=0, seed=0)
    for target in (0.5, float("nan"), True, "38"):
        with pytest.raises(ValueError, match="a target cr_disk must be a number of at least 1"):
            hybrid_plan(model, ["g"], Strength(2, 8, 8), target, signals)


def test_the_search_sorts_by_validation_loss(model, tiny_task):
    found = search_hybrid(model, tiny_task, ["g"], 12.0, [Strength(4, 4, 6), Strength(8, 4, 6), Strength(8, 6, 6)],
                          epochs=1, seed=0)
    assert len(found) == 3 and found["valid_loss"].is_monotonic_increasing
    assert (found["cr_disk"] >= 12.0).all()


def test_uniform_plans_at_equal_size(model, signals):
    topk = sensitivity.uniform_topk(model, 6, 12.0, signals)
    assert {type(entry.method) for entry in topk.blocks.values()} == {TopK}
    assert 12.0 <= pack(model, topk).cr_disk < 12.5
    sizes = [BlockCirculant(k) for k in (2, 4, 8, 16)]
    circulant = sensitivity.nearest_uniform(model, sizes, [6], 12.0, signals)
    assert {entry.method for entry in circulant.blocks.values()} == {BlockCirculant(4)}
    # 4 at 8 bits and 8 at 16 bits take about the same bytes: 3 columns are padded to 4 or to 8.
    wider = sensitivity.nearest_uniform(model, sizes, [4, 8], 12.0, signals)
    assert pack(model, wider).cr_disk <= pack(model, circulant).cr_disk
    with pytest.raises(ValueError, match="meets cr_disk 500"):
        sensitivity.nearest_uniform(model, [BlockCirculant(2)], [6], 500.0, signals)


def test_calibration_batches_hold_every_training_sequence_once(tiny_task):
    batches = list(sensitivity.calibration_batches(tiny_task, size=7))
    lengths = np.concatenate([lengths.numpy() for _, lengths in batches])
    assert sorted(lengths) == sorted(tiny_task.splits["train"].lengths)
    assert all(x.shape[1] == lengths.max() for x, lengths in batches)
