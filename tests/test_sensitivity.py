"""The sensitivity table, the classes, the rankings and the hybrid plan."""

import itertools
import re
from dataclasses import fields, make_dataclass, replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from workbench import models, plots, sensitivity, tables
from workbench.constrain import attach, compress, pack
from workbench.gates import blocks, dense_weights, weight
from workbench.methods import METHODS, BlockCirculant, Dense, TopK, method_from_label, method_label
from workbench.plan import BlockPlan, plan_block, uniform
from workbench.quantise import calibrate, weight_format
from workbench.sensitivity import (
    Loop,
    Strength,
    check_sensitivity,
    class_stability,
    classify,
    hybrid_plan,
    method_agreement,
    rank_blocks,
    search_hybrid,
    seed_agreement,
    sensitivity_table,
)
from workbench.study import sensitivity_over_seeds
from workbench.train import evaluate, fit


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


def test_what_are_no_classes_has_no_sensitive_gates():
    table = rows({"i": 0.1, "f": 0.2, "g": 1.0, "o": 0.3})
    assert sensitivity.sensitive_gates(classify(table)) == ["g"]
    with pytest.raises(ValueError, match="sensitive_gates needs a table with the columns gate, class, got none named class"):
        sensitivity.sensitive_gates(table)
    with pytest.raises(ValueError, match="sensitive_gates needs a table, as classify gives it, got a NoneType"):
        sensitivity.sensitive_gates(None)


@pytest.mark.parametrize(("change", "message"), [
    (lambda table: pd.concat([table, table[table["gate"] == "i"]]), "equally often, .* got 1 to 2 rows a block, 0 without"),
    (lambda table: table.assign(excess_loss=np.nan), "got 1 to 1 rows a block, 8 without such a loss"),
    (lambda table: table.assign(excess_loss=table["excess_loss"].replace(0.1, np.inf)), "finite loss, .*, 2 without such"),
    (lambda table: table.assign(excess_loss="much"), "got 1 to 1 rows a block, 8 without such a loss"),
    (lambda table: table.drop(columns="gate"), "with the columns block, gate, excess_loss, got none named gate"),
    (lambda table: table.iloc[:0], "classify needs a table with a row at least, got none"),
    (lambda table: None, "classify needs a table, as sensitivity_table gives it, got a NoneType"),
])
def test_classes_need_every_block_measured_alike(change, message):
    table = rows({"i": 0.1, "f": 0.2, "g": 1.0, "o": 0.3})
    with pytest.raises(ValueError, match=message):
        classify(change(table[table["method"] == table["method"].iloc[0]]))


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
    by_hand = evaluate(changed, tiny_task, "valid").loss - evaluate(model, tiny_task, "valid").loss
    assert table.loc[name, "excess_loss"] == pytest.approx(by_hand, abs=2e-4)  # 16-bit weights on one side only


def test_retrained_table_averages_over_epochs_against_the_retrained_reference(model, tiny_task, signals):
    epochs = 2
    table = sensitivity_table(model, tiny_task, [BlockCirculant(4)], epochs=epochs, seed=3)
    assert (table["loss_after"] != table["loss_before"]).all()
    lost = table["loss_before"] > sensitivity_table(model, tiny_task, [BlockCirculant(4)])["loss_dense"]
    assert table["recovered"].notna().tolist() == lost.tolist()
    recovery = table["recovery_epochs"].dropna()
    assert recovery.between(0, epochs).all()
    reference = uniform(model, Dense(), 16, signals)
    name, curves = "lstm.weight_hh_l0.g", []
    for entry in (plan_block(weight(model, name), BlockCirculant(4), 8), reference.blocks[name]):
        compressed = compress(model, replace(reference, blocks=reference.blocks | {name: entry}))
        before = evaluate(compressed, tiny_task, "valid").loss
        history = fit(compressed, tiny_task, seed=3, epochs=epochs, progress=False)
        curves.append(np.array([before, *(row["valid_loss"] for row in history.epochs)]))
    assert table.set_index("block").loc[name, "excess_loss"] == pytest.approx(np.mean(curves[0] - curves[1]), abs=1e-9)


def test_the_excess_by_hand():
    """Losses 2, 1.2 and 0.6 above a reference that itself falls, 1, 0.6 and 0.5: excess 1, 0.6, 0.1."""
    model = torch.nn.Sequential(torch.nn.GRU(2, 2))
    model.epochs = 0

    def evaluate(model):
        compressed = any((weight(model, name) == 0).any() for name in blocks(model))
        return ([2, 1.2, 0.6] if compressed else [1, 0.6, 0.5])[model.epochs]

    def train(model):
        model.epochs += 1
        model[0].bias_ih_l0.data += 1

    loop = Loop(evaluate, [torch.ones(3, 1, 2)], train)
    table = sensitivity_table(model, loop, [TopK(0.25)], epochs=2)
    assert len(table) == 6 and table["excess_loss"].tolist() == pytest.approx([1.7 / 3] * 6)
    assert set(table["recovery_epochs"]) == {2} and table["recovered"].tolist() == pytest.approx([0.9] * 6)
    assert table[["loss_dense", "loss_before", "loss_after"]].drop_duplicates().to_numpy().tolist() == [[0.5, 2, 0.6]]
    assert sensitivity_table(model, loop, [TopK(0.25)])["excess_loss"].tolist() == [1] * 6


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


@pytest.mark.parametrize(("name", "value"), [("evaluate", 3), ("train", "adam"), ("losses", [1.0])])
def test_a_loop_needs_functions(name, value):
    with pytest.raises(TypeError, match=re.escape(f"Loop needs a function of a model as {name}, got {value!r}")):
        Loop(**{"evaluate": lambda model: 0.0, "batches": [torch.zeros(3, 1, 4)], name: value})


def test_a_loop_without_a_metric_measures_nothing(model):
    with pytest.raises(ValueError, match="a measurement needs a Loop with the function evaluate, got one without"):
        sensitivity_table(model, Loop(None, [torch.zeros(3, 1, 4)]), [TopK(0.5)])


def test_a_loop_that_trains_another_model_is_refused():
    model = torch.nn.LSTM(4, 4)

    def train(_):
        with torch.no_grad():
            model.weight_ih_l0.add_(1)

    loop = Loop(lambda model: 0.0, [torch.zeros(3, 1, 4)], train)
    with pytest.raises(ValueError, match="a measurement needs a Loop whose train changes the model that it is given, and no "):
        sensitivity_table(model, loop, [TopK(0.5)], epochs=1)


def test_a_metric_of_several_numbers_is_refused_without_them():
    loop = Loop(lambda model: torch.zeros(3, 2), [torch.zeros(3, 1, 4)])
    with pytest.raises(TypeError, match=r"needs one number from the Loop's evaluate, got a tensor of shape \(3, 2\)$"):
        sensitivity_table(torch.nn.LSTM(4, 4), loop, [TopK(0.5)])


def test_a_hybrid_plan_needs_a_strength(model, signals):
    with pytest.raises(ValueError, match=r"hybrid_plan needs a Strength, got BlockCirculant\(block=8"):
        hybrid_plan(model, ["g"], BlockCirculant(8), 8, signals)


def test_unreachable_targets_are_refused_with_the_numbers(model, signals, tiny_task):
    with pytest.raises(ValueError, match=r"cannot reach cr_disk 200.0 with block 2.*circulant gates take \d+ of \d+ bits"):
        hybrid_plan(model, ["g"], Strength(2, 8, 8), 200.0, signals)
    with pytest.raises(ValueError, match="no sensitive gate"):
        hybrid_plan(model, [], Strength(2, 8, 8), 200.0, signals)
    with pytest.raises(ValueError, match="no hybrid plan meets cr_disk 200"):
        search_hybrid(model, tiny_task, ["g"], 200.0, [Strength(2, 8, 8)], epochs=0, seed=0)
    with pytest.raises(ValueError, match="search_hybrid needs a whole number of epochs of at least 0, got -1"):
        search_hybrid(model, tiny_task, ["g"], 12.0, [Strength(2, 8, 8)], epochs=-1, seed=0)
    for target in (0.5, float("nan"), True, "38"):
        with pytest.raises(ValueError, match="a target cr_disk must be a number of at least 1"):
            hybrid_plan(model, ["g"], Strength(2, 8, 8), target, signals)


def test_the_search_sorts_by_validation_loss(model, tiny_task):
    found = search_hybrid(model, tiny_task, ["g"], 12.0, [Strength(4, 4, 6), Strength(8, 4, 6), Strength(8, 6, 6)],
                          epochs=1, seed=0)
    assert len(found) == 3 and found["valid_loss"].is_monotonic_increasing
    assert (found["cr_disk"] >= 12.0).all()


def test_calibration_batches_hold_every_training_sequence_once(tiny_task):
    batches = list(sensitivity.calibration_batches(tiny_task, size=7))
    lengths = np.concatenate([lengths.numpy() for _, lengths in batches])
    assert sorted(lengths) == sorted(tiny_task.splits["train"].lengths)
    assert all(x.shape[1] == lengths.max() for x, lengths in batches)


# --- labels of methods ------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_label_reads_back_as_its_method(data):
    cls = METHODS[data.draw(st.sampled_from(list(METHODS)))]
    kinds = {float: st.integers(1, 9999).map(lambda n: n / 10_000), int: st.integers(1, 64)}
    drawn = {f.name: data.draw(kinds[f.type]) for f in fields(cls) if f.type in kinds}
    try:
        method = cls(**drawn)
    except ValueError:
        assume(False)
    assert method_from_label(method_label(method)) == method


def test_parameters_of_methods_are_of_types_that_a_text_gives():
    assert {f.type for cls in METHODS.values() for f in fields(cls)} <= {int, float, str}  # bool("False") is true


def test_labels_by_hand():
    assert method_from_label("Dense") == Dense()
    assert method_from_label(" TopK  0.125 ") == TopK(0.125)
    assert method_from_label("BlockCirculant 8") == method_from_label("BlockCirculant 8 time") == BlockCirculant(8, "time")


@pytest.mark.parametrize(("label", "message"), [
    ("topk 0.25", r"a method label begins with one of Dense, TopK, .*, got 'topk 0.25'; did you mean 'TopK'\?"),
    ("BlokCirculant 8", r"did you mean 'BlockCirculant'\?"),
    ("Zzz 8", "got 'Zzz 8'$"),
    ("", "got ''$"),
    ("TopK", "a TopK label reads 'TopK keep', got 'TopK'"),
    ("BlockCirculant 8 time 3", r"a BlockCirculant label reads 'BlockCirculant block \[datapath\]', got"),
    ("TopK a", "TopK needs keep as float, got 'a' in the label 'TopK a'"),
    ("BlockCirculant 8.0", "BlockCirculant needs block as int, got '8.0'"),
    ("BlockCirculant __import__('os')", "BlockCirculant needs block as int"),
    ("TopK 2", r"TopK needs keep in \(0, 1\], got 2.0"),
    ("TopK nan", r"TopK needs keep in \(0, 1\], got nan"),
])
def test_labels_that_name_no_method_are_refused(label, message):
    with pytest.raises(ValueError, match=message):
        method_from_label(label)


def test_a_label_is_a_text():
    with pytest.raises(TypeError, match="a method label is a text like .*, got 0.25"):
        method_from_label(0.25)


# --- the measurement --------------------------------------------------------------------------------------------------


def test_dense_weights_by_hand(model):
    assert dense_weights(blocks(model)) == 4 * (16 * 3 + 16 * 16)


def test_several_widths_are_measured_as_if_each_alone(model, tiny_task):
    methods = [TopK(0.25), Dense()]
    both = sensitivity_table(model, tiny_task, methods, bits=[16, 4])
    assert both["compression"].unique().tolist() == [
        "TopK 0.25 at 16 bits", "TopK 0.25 at 4 bits", "Dense at 16 bits", "Dense at 4 bits"]
    for bits in (16, 4):
        alone = sensitivity_table(model, tiny_task, methods, bits=bits)
        pd.testing.assert_frame_equal(both[both["bits"] == bits].reset_index(drop=True), alone)
    dense = both[both["method"] == "Dense"].set_index("bits")["excess_loss"]
    assert (dense[16] == 0).all() and (dense[4] != 0).all()  # 16 bits are the reference itself


def test_the_ratio_is_that_of_the_packed_block(model, tiny_task, signals):
    table = sensitivity_table(model, tiny_task, [TopK(0.25), BlockCirculant(4), Dense()], bits=[8])
    ratios = table.set_index(["method", "block"])["cr_disk"]
    name = "lstm.weight_hh_l0.f"
    assert ratios["Dense", name] == 32 / 8 and ratios["BlockCirculant 4", name] == 4 * 32 / 8
    plan = uniform(model, Dense(), 16, signals)
    kept = BlockPlan(TopK(0.25), weight_format(TopK(0.25).project(weight(model, name)), 8))
    packed = pack(model, type(plan)(plan.blocks | {name: kept}, signals))
    assert ratios["TopK 0.25", name] == packed.blocks[name].cr_disk


def test_every_seed_is_measured_as_if_alone(model, tiny_task):
    found = sensitivity_over_seeds(tiny_task, {5: model, 2: model}, [TopK(0.25)], bits=[4], epochs=1, workers=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [sensitivity_table(model, tiny_task, [TopK(0.25)], bits=[4], epochs=1, seed=seed).assign(seed=seed)
             for seed in (5, 2)]
    torch.set_num_threads(threads)
    pd.testing.assert_frame_equal(found, pd.concat(alone, ignore_index=True))


@pytest.mark.parametrize(("excess", "expected"), [
    ([1.0, 0.5, 0.05], (0.95, 2)),
    ([1.0, 0.1, 0.5], (0.5, 1)),
    ([1.0, 2.0], (-1.0, None)),
    ([-0.1, 0.3], (None, None)),  # nothing was lost
])
def test_recovery_by_hand(excess, expected):
    assert sensitivity._recovery(pd.Series(excess)) == pytest.approx(expected)


def test_the_summary_counts_who_recovered_of_those_that_lost():
    table = measured({("TopK 0.25", 4): {seed: [1.0] * 8 for seed in range(4)}})
    of_seed = table["seed"].map
    table["recovered"] = of_seed({0: 0.95, 1: 0.5, 2: None, 3: 1.0})  # seed 1 never came back, seed 2 lost nothing
    table["recovery_epochs"] = of_seed({0: 2, 1: None, 2: None, 3: 1})
    table["loss_after"] = table["accuracy_after"] = 1.0
    summary = tables.sensitivity_summary(table)
    assert set(summary["recovered in (seeds)"]) == {"2 of 3"}
    assert summary["recovered"].tolist() == pytest.approx([2.45 / 3] * 8) and set(summary["in epochs"]) == {1.5}


@pytest.mark.parametrize(("change", "message"), [
    ({"methods": []}, "needs different methods, got none"),
    ({"methods": [TopK(0.25), TopK(0.25)]}, "needs different methods, got TopK 0.25, TopK 0.25"),
    ({"bits": []}, "needs different widths in bits, got none"),
    ({"bits": [4, 4]}, "needs different widths in bits, got 4, 4"),
    ({"bits": [0]}, r"block lstm.weight_ih_l0.i at 0 bits: QFormat"),
    ({"methods": [BlockCirculant(5)]}, r"block lstm.weight_ih_l0.i at 8 bits: BlockCirculant.* rows divisible by 5"),
    ({"epochs": -1}, "needs a whole number of epochs of at least 0, got -1"),
    ({"epochs": True}, "needs a whole number of epochs of at least 0, got True"),
])
def test_a_measurement_is_checked_before_it_starts(model, tiny_task, monkeypatch, change, message):
    monkeypatch.setattr(sensitivity, "calibrate", lambda *_: pytest.fail("it has started"))
    arguments = {"methods": [TopK(0.25)], "bits": [8], "epochs": 0} | change
    with pytest.raises(ValueError, match=message):
        check_sensitivity(model, **arguments)
    with pytest.raises(ValueError, match=message):
        sensitivity_table(model, tiny_task, **arguments)


# --- rankings and their stability -------------------------------------------------------------------------------------

NAMES = [f"lstm.weight_{part}_l0.{gate}" for part in ("ih", "hh") for gate in "ifgo"]
PARTS = (slice(0, 4), slice(4, 8))  # of the losses: ih and hh


def measured(losses):
    """(method, bits) -> seed -> eight excess losses, i f g o of ih and of hh, as a table of several seeds."""
    return pd.DataFrame([
        {"method": method, "bits": bits, "compression": f"{method} at {bits} bits", "seed": seed, "block": block,
         "gate": block[-1], "excess_loss": loss, "cr_disk": 128.0 / bits, "recovered": None, "recovery_epochs": None,
         "loss_before": 1.0 + loss, "accuracy_before": 90.0}
        for (method, bits), by_seed in losses.items() for seed, values in by_seed.items()
        for block, loss in zip(NAMES, values, strict=True)])


STABLE = {0: [3, 1, 8, 2, 4, 5, 7, 6], 1: [3, 1, 9, 2, 4, 6, 7, 5]}
SHUFFLED = {0: [1, 2, 3, 4, 5, 6, 7, 8], 1: [8, 7, 6, 5, 4, 3, 2, 1]}
LOSSES = {("TopK 0.25", 4): STABLE, ("TopK 0.5", 4): SHUFFLED, ("BlockCirculant 4", 4): STABLE}


def test_ranks_by_hand():
    ranks = rank_blocks(measured({("TopK 0.5", 4): {0: [0.4, 0.1, 0.1, -0.2, 0.3, 0.3, 0.3, 0.5], 1: [0.0] * 8}}))
    first, level = (ranks[ranks["seed"] == seed] for seed in (0, 1))
    assert first["rank"].tolist() == [2, 6.5, 6.5, 8, 4, 4, 4, 1]
    assert first.loc[first["top_quarter"], "block"].tolist() == ["lstm.weight_ih_l0.i", "lstm.weight_hh_l0.o"]
    assert level["rank"].tolist() == [4.5] * 8 and not level["top_quarter"].any()


def test_agreement_of_the_seeds_by_hand():
    # STABLE: ih in the same order; hh 4 5 7 6 and 4 6 7 5: two ranks swapped by one, 1 - 6 * 2 / (4 * 15) = 0.8; all eight
    # together 1 - 6 * 2 / (8 * 63). SHUFFLED: reversed.
    agreement = seed_agreement(rank_blocks(measured(LOSSES))).set_index("compression")
    assert agreement["within_mean"].tolist() == agreement["within_least"].tolist() == pytest.approx([0.9, -1, 0.9])
    assert agreement["pooled_mean"].tolist() == pytest.approx([1 - 12 / 504, -1, 1 - 12 / 504])
    assert agreement["pairs"].tolist() == [1, 1, 1] and agreement["excess_loss"].iloc[1] == 4.5


@given(st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=3, max_size=3))
def test_agreement_equals_scipys_spearman(values):
    assume(all(len(set(row[part])) > 1 for row in values for part in PARTS))
    ranks = rank_blocks(measured({("TopK 0.5", 4): dict(enumerate(values))}))

    def spearman(a, b, part):
        return scipy.stats.spearmanr(values[a][part], values[b][part]).statistic

    pairs = [np.mean([spearman(a, b, part) for part in PARTS]) for a, b in ((0, 1), (0, 2), (1, 2))]
    pooled = [spearman(a, b, slice(None)) for a, b in ((0, 1), (0, 2), (1, 2))]
    (row,) = seed_agreement(ranks).to_dict("records")
    assert row["within_mean"] == pytest.approx(np.mean(pairs)) and row["within_least"] == pytest.approx(min(pairs))
    assert row["pooled_mean"] == pytest.approx(np.mean(pooled))


def test_what_gates_in_random_order_give():
    """What the notebook and the threshold say of chance: every order of four gates in each matrix, against one order."""
    orders = list(itertools.permutations(range(4)))
    within = {order: scipy.stats.spearmanr(order, range(4)).statistic for order in orders}
    means = [(within[a] + within[b]) / 2 for a in orders for b in orders]
    assert np.mean(means) == pytest.approx(0) and sum(mean >= tables.STABLE - 1e-9 for mean in means) == 32
    # The second matrix loses more under every gate.
    pooled = [1 - 6 * sum((n - m) ** 2 for n, m in zip((*a, *(4 + r for r in b)), range(8), strict=True)) / 504
              for a in orders for b in orders]
    assert np.mean(pooled) == pytest.approx(0.76, abs=0.005)


def test_a_larger_matrix_alone_is_no_stable_ranking():
    losses = {0: [1, 2, 3, 4, 11, 12, 13, 14], 1: [4, 3, 2, 1, 14, 13, 12, 11]}
    (row,) = seed_agreement(rank_blocks(measured({("TopK 0.5", 4): losses}))).to_dict("records")
    assert row["within_mean"] == pytest.approx(-1) and row["pooled_mean"] == pytest.approx(1 - 6 * 40 / 504)
    assert "Not stable: TopK 0.5 at 4 bits." in tables.sensitivity_verdict(measured({("TopK 0.5", 4): losses})).data


def test_a_shown_table_has_four_digits_and_no_remainder_of_rounding():
    zeros = [np.mean([0.1, 0.2, -0.3]), np.std([76.1, np.nextafter(76.1, 77)])]
    shown = tables.present(pd.DataFrame({"mean": [*zeros, 1e-9, 0.123456, 12345.6, np.nan, 2.0]}))
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", shown.to_html())
    assert cells == ["0", "0", "1e-09", "0.1235", "12,346", "", "2"]


def test_a_correlation_on_the_threshold_is_stable():
    # Pairs of seeds: 0.9, 0.5 and 0.7, whose mean in floating point is a little below 0.7.
    losses = {0: [1, 2, 3, 4, 1, 2, 3, 4], 1: [1, 2, 3, 4, 1, 2, 4, 3], 2: [2, 1, 4, 3, 1, 3, 4, 2]}
    (row,) = seed_agreement(rank_blocks(measured({("TopK 0.5", 4): losses}))).to_dict("records")
    assert row["within_mean"] == pytest.approx(0.7)
    assert "in 1 of 1 compressions" in tables.sensitivity_verdict(measured({("TopK 0.5", 4): losses})).data


def test_a_ranking_without_a_difference_is_compared_with_nothing():
    level = {0: [0.0] * 8, 1: STABLE[0], 2: STABLE[1]}
    (row,) = seed_agreement(rank_blocks(measured({("Dense", 16): level}))).to_dict("records")
    assert row["pairs"] == 1 and row["within_least"] == pytest.approx(0.9)
    (row,) = seed_agreement(rank_blocks(measured({("Dense", 16): {0: [0.0] * 8, 1: [0.0] * 8}}))).to_dict("records")
    assert row["pairs"] == 0 and np.isnan(row["within_mean"])


def test_agreement_of_the_compressions_by_hand():
    matrix = method_agreement(rank_blocks(measured(LOSSES)))
    names = ["TopK 0.25 at 4 bits", "TopK 0.5 at 4 bits", "BlockCirculant 4 at 4 bits"]
    assert matrix.index.tolist() == matrix.columns.tolist() == names
    assert matrix.loc[names[0], names[2]] == pytest.approx(1)
    by_seed = [scipy.stats.spearmanr(STABLE[seed][part], SHUFFLED[seed][part]).statistic for seed in (0, 1) for part in PARTS]
    assert matrix.loc[names[0], names[1]] == matrix.loc[names[1], names[0]] == pytest.approx(np.mean(by_seed))


def test_stability_of_the_classes_by_hand():
    loud, quiet = [0, 0, 5, 0] * 2, [0, 1, 0, 0] * 2  # g, and f alone
    stability = class_stability(measured({("TopK 0.25", 4): {0: loud, 7: loud}, ("TopK 0.5", 4): {0: quiet, 7: quiet},
                                          ("Dense", 4): {0: [0] * 8, 7: [3, 0, 0, 0] * 2}})).set_index("gate")
    # Seed 7: g scores 10 / 3, i 6 / 3, f 2 / 3, their mean 1.5; seed 0 has no i.
    assert stability["class"].to_dict() == {"i": "insensitive", "f": "insensitive", "g": "sensitive", "o": "insensitive"}
    assert stability["seed 7"].tolist() == ["sensitive", "insensitive", "sensitive", "insensitive"]
    assert stability["sensitive in seeds"].tolist() == [1, 0, 2, 0] and set(stability["seeds"]) == {2}
    assert stability["sensitive in compressions"].tolist() == [1, 1, 1, 0] and set(stability["compressions"]) == {3}


def test_a_table_of_one_model_counts_as_one_seed():
    of_one = measured({("TopK 0.25", 4): {0: [0, 0, 5, 0] * 2}})
    for verb in (class_stability, rank_blocks):
        pd.testing.assert_frame_equal(verb(of_one.drop(columns="seed")), verb(of_one), check_like=True)
    assert class_stability(of_one.drop(columns="seed"))["seeds"].tolist() == [1] * 4


def test_one_method_is_no_list():
    loop = Loop(evaluate=lambda model: 0.0, batches=[torch.zeros(3, 1, 4)])
    with pytest.raises(ValueError, match=r"a sensitivity measurement needs a list of methods, got TopK\(keep=0.5\)"):
        sensitivity_table(torch.nn.LSTM(4, 4), loop, TopK(0.5))


def test_a_loop_is_not_sent_to_other_processes():
    loop = Loop(evaluate=lambda model: 0.0, batches=[torch.zeros(3, 1, 4)])
    with pytest.raises(ValueError, match="processes of its own, to which the functions of a Loop cannot be sent"):
        sensitivity_over_seeds(loop, {0: torch.nn.LSTM(4, 4)}, [TopK(0.5)], bits=4, epochs=0, workers=1)


def test_the_tables_of_a_ranking_by_hand():
    ranks = rank_blocks(measured(LOSSES))
    table = tables.ranking_table(ranks).set_index("block")
    g = table.loc["lstm.weight_ih_l0.g"]  # rank 1 where stable, 6 and 3 where shuffled
    assert g.to_dict() == pytest.approx({
        "mean rank": 13 / 6, "mean under TopK": 11 / 4, "mean under BlockCirculant": 1, "best": 1, "worst": 6,
        "in the top quarter": 4, "of rankings": 6})
    assert table["mean rank"].is_monotonic_increasing
    stable, shuffled = tables.stability_table(ranks)["in the top quarter (seeds)"][:2]
    assert stable == "lstm.weight_hh_l0.g 2, lstm.weight_ih_l0.g 2"
    assert shuffled == ("lstm.weight_hh_l0.g 1, lstm.weight_hh_l0.o 1, lstm.weight_ih_l0.f 1, lstm.weight_ih_l0.i 1")
    level = tables.stability_table(rank_blocks(measured({("Dense", 16): {0: [0.0] * 8}})))
    assert level["in the top quarter (seeds)"].tolist() == ["none"]


def test_the_verdict_says_what_is_stable():
    text = tables.sensitivity_verdict(measured(LOSSES)).data
    assert "Within a matrix, two seeds' rankings of the gates correlate with 0.27 on average" in text
    assert "in 2 of 3 compressions with at least 0.7" in text
    assert "All blocks in one ranking correlate with 0.32, " in text
    assert "Not stable: TopK 0.5 at 4 bits." in text and "4.6 to 4.6 nats where it is stable and 4.5 to 4.5 nats" in text
    assert "All 2 seeds have the same blocks in the top quarter in 2 of 3 compressions." in text
    level = tables.sensitivity_verdict(measured(LOSSES | {("Dense", 16): {seed: [0.0] * 8 for seed in (0, 1)}})).data
    assert "in the top quarter in 2 of 4 compressions." in level  # where all are equal none is in it
    assert "Of the 6 rankings, in the top quarter: lstm.weight_hh_l0.g in 5, lstm.weight_ih_l0.g in 4, " in text
    assert "lstm.weight_ih_l0.o" not in text  # in none
    assert "where the method differs (least " in text
    # Scores of i f g o, times 3: 20 20 40 28 (mean 27) with seed 0, 26 24 40 20 (mean 27.5) with seed 1.
    assert "Sensitive by the rule: g. Gates whose class changes with the seed: o." in text


def test_one_seed_is_enough_for_all_but_the_stability(tmp_path, monkeypatch):
    monkeypatch.setenv("WB_RUN_DIR", str(tmp_path))
    table = measured({key: {0: by_seed[0]} for key, by_seed in LOSSES.items()})
    assert "needs at least two" in tables.sensitivity_verdict(table).data
    recorded = tables.record_sensitivity(table)
    assert set(recorded) == {"table", "ranking", "stability", "classes", "sensitive_gates"}
    assert recorded["stability"][0]["within_mean"] is None and recorded["sensitive_gates"] == "g, o"
    assert tables.sensitivity_verdict(measured({("Dense", 16): {0: [0.0] * 8}})).data.count("could be compared") == 1


def test_what_is_recorded(tmp_path, monkeypatch, model, tiny_task):
    monkeypatch.setenv("WB_RUN_DIR", str(tmp_path))
    found = [sensitivity_table(model, tiny_task, [TopK(0.25), BlockCirculant(4)], bits=[4], epochs=epochs) for epochs in (0, 1)]
    for table in found:
        both = pd.concat([table.assign(seed=0), table.assign(seed=3)], ignore_index=True)
        recorded = tables.record_sensitivity(both)
        assert len(recorded["table"]) == len(recorded["ranking"]) == 2 * 2 * 8
        assert recorded["rank_correlation"] == recorded["rank_correlation_pooled"] == pytest.approx(1)
        assert {"loss_before", "cr_disk", "bits", "seed"} <= set(recorded["table"][0])
        summary = tables.sensitivity_summary(both)
        assert len(summary) == 16 and ("in epochs" in summary) == (table is found[1])


@pytest.mark.parametrize("losses", [
    LOSSES, {("TopK 0.5", 4): {0: STABLE[0]}}, {("Dense", bits): STABLE for bits in (2, 4, 8)},
    {("Dense", 16): {0: [0.0] * 8}},
])  # fmt: skip
def test_figures(losses):
    table = measured(losses)
    ranks = rank_blocks(table)
    cells = plots.excess_loss_figure(table).axes[0]
    assert cells.texts[0].get_text() == f"{table['excess_loss'].groupby(table['seed']).first().mean():.3f}"
    assert len(cells.texts) == 8 * len(losses) and "nats" in cells.figure.axes[1].get_ylabel()
    curves = plots.excess_curve_figure(table)
    assert "nats" in curves.get_supylabel() and "cr_disk" in curves.get_supxlabel()
    assert {axis.get_title() for axis in curves.axes} == {
        "TopK, 4 bits" if name.startswith("TopK") and len(losses) > 1 else name for name, _ in losses}
    panels = plots.rank_figure(ranks).axes
    assert [panel.get_title() for panel in panels] == ranks["compression"].unique().tolist()
    assert panels[0].yaxis.get_inverted()  # the most sensitive block on top
    agreement = method_agreement(ranks)
    image = plots.agreement_figure(agreement).axes[0]
    assert len(image.texts) == agreement.notna().to_numpy().sum()
    for figure in (cells.figure, curves, panels[0].figure, image.figure):
        figure.canvas.draw()


def test_a_loop_may_measure_integers():
    torch.manual_seed(0)
    model, x = torch.nn.GRU(3, 4), torch.randn(5, 2, 3)
    signals = calibrate(model, [x])

    def in_integers(constrained):
        packed = pack(constrained, uniform(model, Dense(), 8, signals))
        return attach(constrained, packed)(x)[0].square().mean()

    table = sensitivity_table(model, Loop(in_integers, [x]), [TopK(0.5)], bits=8)
    assert table["loss_before"].gt(0).all() and table["loss_before"].nunique() > 1


@pytest.mark.parametrize("methods, message", [
    (["TopK 0.5"], r"needs methods, such as TopK\(0.5\), got 'TopK 0.5'"),
    ([TopK], r"needs methods, such as TopK\(0.5\), got <class"),
    ([make_dataclass("Unlisted", [("keep", float)], bases=(TopK,), frozen=True)(0.5)],
     "a method label begins with one of Dense, TopK, .*, got 'Unlisted 0.5'"),
], ids=str)
def test_what_is_no_method_is_refused(model, methods, message):
    with pytest.raises(ValueError, match=message):
        check_sensitivity(model, methods, 8, 0)


def test_gates_that_the_model_does_not_have_are_refused(model, signals, tiny_task):
    for verb in (lambda: hybrid_plan(model, ["f", "r"], Strength(8, 5, 6), 10, signals),
                 lambda: search_hybrid(model, tiny_task, ["f", "r"], 10, [Strength(8, 5, 6)], epochs=0, seed=0)):
        with pytest.raises(ValueError, match="hybrid_plan knows the gates i, f, g, o, got r"):
            verb()


@pytest.mark.parametrize(("change", "message"), [
    ({"sensitive": (gate for gate in "g")}, "hybrid_plan needs a list of gates, got <generator"),
    ({"sensitive": "ig"}, "hybrid_plan needs a list of gates, got 'ig'"),
    ({"strengths": []}, r"search_hybrid needs a list of at least one Strength, got \[\]"),
    ({"strengths": [(8, 5, 6)]}, r"search_hybrid needs a list of at least one Strength, got \[\(8, 5, 6\)\]"),
    ({"strengths": None}, "search_hybrid needs a list of at least one Strength, got None"),
    ({"seed": None}, "a measurement needs a whole seed of at least 0, got None"),
    ({"keep_start": "no"}, "search_hybrid needs keep_start to be True or False, got 'no'"),
])
def test_a_search_is_checked_before_it_starts(model, tiny_task, monkeypatch, change, message):
    monkeypatch.setattr(sensitivity, "retraining_curve", lambda *_: pytest.fail("it has started"))
    arguments = {"sensitive": ["g"], "target_cr_disk": 10, "strengths": [Strength(8, 5, 6)], "epochs": 0, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        search_hybrid(model, tiny_task, **arguments)


def test_a_strength_that_does_not_fit_is_refused_before_any_retraining(model, tiny_task, monkeypatch):
    monkeypatch.setattr(sensitivity, "retraining_curve", None)
    with pytest.raises(ValueError, match="divisible by 32"):
        search_hybrid(model, tiny_task, ["g"], 4.0, [Strength(4, 4, 6), Strength(32, 4, 6)], epochs=1, seed=0)


def test_a_task_is_calibrated_where_the_model_is(tiny_task):
    batches = list(sensitivity.batches_of(models.build_classifier(tiny_task, 8, seed=0).to("meta"), tiny_task, 0))
    assert batches and all(part.device.type == "meta" for batch in batches for part in batch)
