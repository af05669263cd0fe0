"""Budget allocation: hand cases, every combination tried as the oracle, messages."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from workbench import allocation
from workbench.allocation import (
    _choice_at,
    _least_losses,
    allocate,
    choices_to_measure,
    cycles_alone,
    cycles_in_turn,
    search_allocation,
)
from workbench.array import preset, schedule_layer
from workbench.budget import OutOfReach, full_block, uniform_plan
from workbench.constrain import bake, compress, pack
from workbench.emulation import emulate
from workbench.fixedpoint import QFormat
from workbench.gates import blocks, dense_weights, weights
from workbench.methods import METHODS, BlockCirculant, Dense, LowRank, RowBalanced, TopK, method_from_label
from workbench.plan import uniform
from workbench.quantise import calibrate
from workbench.sensitivity import Loop, Strength, search_hybrid, sensitivity_table


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.GRU(6, 8))


@pytest.fixture(scope="module")
def signals(model):
    return calibrate(model, [torch.randn(5, 4, 6)])


def measured(model, loss, methods=("Dense", "TopK 0.5"), widths=(2, 4, 8)):
    """A table as sensitivity_table gives it; loss(block, method, bits)."""
    rows = [{"block": name, "method": method, "bits": bits, "excess_loss": loss(name, method, bits)}
            for name in blocks(model) for method in methods for bits in widths]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seed", range(20))
def test_the_least_loss_of_all_combinations(seed):
    rng = np.random.default_rng(seed)
    groups = [(rng.integers(1, 12, n), rng.integers(0, 6, n) / 4) for n in rng.integers(1, 5, 4)]
    budget = int(rng.integers(4, 40))
    sums = [(sum(losses[n] for (_, losses), n in zip(groups, picks, strict=True)),
             sum(sizes[n] for (sizes, _), n in zip(groups, picks, strict=True)))
            for picks in itertools.product(*(range(len(sizes)) for sizes, _ in groups))]
    least, picks = _least_losses(groups, budget)
    for place in range(budget + 1):
        within = [(loss, size) for loss, size in sums if size <= place]
        if not within:
            assert least[place] == np.inf
            continue
        chosen = _choice_at(groups, picks, place)
        assert least[place] == min(within)[0] == sum(losses[n] for (_, losses), n in zip(groups, chosen, strict=True))
        assert sum(sizes[n] for (sizes, _), n in zip(groups, chosen, strict=True)) <= place


@pytest.mark.parametrize("seed", range(20))
def test_the_least_size_of_all_combinations_within_a_loss(seed):
    rng = np.random.default_rng(seed)
    groups = [(rng.integers(1, 12, n), rng.integers(0, 6, n) / 4) for n in rng.integers(1, 5, 4)]
    most = rng.integers(0, 12) / 4
    sums = [(sum(losses[n] for (_, losses), n in zip(groups, picks, strict=True)),
             sum(sizes[n] for (sizes, _), n in zip(groups, picks, strict=True)))
            for picks in itertools.product(*(range(len(sizes)) for sizes, _ in groups))]
    within = [size for loss, size in sums if loss <= most]
    least, picks = _least_losses(groups, sum(int(sizes.max()) for sizes, _ in groups))
    places = np.flatnonzero(least <= most)
    if not within:
        assert not places.size
        return
    chosen = _choice_at(groups, picks, int(places[0]))
    assert sum(sizes[n] for (sizes, _), n in zip(groups, chosen, strict=True)) == min(within)
    assert sum(losses[n] for (_, losses), n in zip(groups, chosen, strict=True)) <= most


def test_of_equal_losses_within_a_block_the_smaller_choice():
    groups = [(np.array([3, 1, 2]), np.array([0.5, 0.5, 1.0]))]
    least, picks = _least_losses(groups, 4)
    assert least.tolist() == [np.inf, 0.5, 0.5, 0.5, 0.5]
    assert [_choice_at(groups, picks, place) for place in (1, 3, 4)] == [[1]] * 3


def test_bytes_are_a_ratio_and_a_loss_is_its_inverse(model, signals):
    table = measured(model, lambda name, method, bits: 2.0**-bits * (2 if method == "Dense" else 3))
    by_ratio = allocate(model, table, 8, signals)
    by_bytes = allocate(model, table, signals=signals, target_bytes=168)  # 4 * 336 / 8
    assert by_ratio.plan == by_bytes.plan and (by_ratio.cost, by_ratio.budget) == (by_bytes.cost, by_bytes.budget)
    loss = by_ratio.chosen["predicted_loss"].sum()
    by_loss = allocate(model, table, signals=signals, most_loss=loss)
    assert by_loss.chosen["predicted_loss"].sum() <= loss and by_loss.chosen["bytes"].sum() <= 168
    less = allocate(model, table, signals=signals, target_bytes=by_loss.chosen["bytes"].sum() - 1)
    assert less.chosen["predicted_loss"].sum() > loss  # nothing smaller does


def test_what_an_allocation_reaches_is_within_reach(model, signals):
    """Its own ratio and its own predicted loss, whatever their computation rounded."""
    random = np.random.default_rng(0)
    for _ in range(20):
        table = measured(model, lambda *_: random.random())
        found = allocate(model, table, random.uniform(4, 12), signals)
        size = found.chosen["bytes"].sum()
        assert allocate(model, table, 4 * 336 / size, signals).chosen["bytes"].sum() == size
        again = allocate(model, table, signals=signals, most_loss=float(found.chosen["predicted_loss"].sum()))
        assert again.chosen["bytes"].sum() <= size


def test_cycles_of_a_block_by_hand():
    """4 x 4 PEs. Dense 8 x 6: two rows a PE row, at most two columns a PE column: 4 multiply-accumulates. Circulant 2 of 8 x 8:
    4 tiles of rows over 4 PE rows, 4 of columns over 4: one tile of 4 products; of 8 x 8 in one tile of 8 split, each PE has 4
    products, whole one PE has 64. Rank 2 of 8 x 6: V of 2 x 6 takes 2, U of 8 x 2 takes 2."""
    array = preset("group4x4")
    array = array.with_(load_bits_per_cycle=64)
    assert (array.rows, array.cols, array.mac_ii) == (4, 4, 1)
    for shape, method, cycles in (((8, 6), Dense(), (4, 6)), ((8, 8), BlockCirculant(2), (4, 4)),
                                  ((8, 8), BlockCirculant(8), (4, 1)), ((8, 6), LowRank(2), (2 + 2, 4))):
        assert cycles_alone(full_block(torch.ones(shape), method, 8), array) == cycles, method
    assert cycles_alone(full_block(torch.ones(8, 6), Dense(), 2), array.with_(mac_ii=3)) == (3 * 4, 2)


@pytest.mark.parametrize("methods", [("Dense", "TopK 0.5", "TopK 0.125"), ("Dense", "LowRank 1", "BlockCirculant 4")])
@pytest.mark.parametrize("array", [preset("group4x4"), preset("group4x4").with_(weight_words=8, load_bits_per_cycle=16)],
                         ids=["resident", "streaming"])
def test_a_cycle_budget_is_kept_by_the_schedule_and_used(model, signals, array, methods):
    """Beside the schedule itself, the uniform plans are the yardstick."""
    losses = dict(zip(methods, (0.0, 0.1, 0.5), strict=True))
    table = measured(model, lambda name, method, bits: losses[method] * (1 + len(name) % 3), losses, widths=(4,))

    def scheduled(allocation):
        layers = pack(model, allocation.plan).layers.values()
        return sum(schedule_layer(layer, array, 16).steady_state_cycles for layer in layers)

    alone = {method: allocate(model, table[table["method"] == method], target_bytes=10**6, signals=signals, array=array)
             for method in methods}
    cycles = {method: scheduled(found) for method, found in alone.items()}
    assert {method: found.scheduled_cycles for method, found in alone.items()} == cycles
    assert cycles_in_turn(pack(model, alone["Dense"].plan), array) == cycles["Dense"]
    assert alone["Dense"].explain()["cycles"].iloc[-1] == cycles["Dense"]
    most, least = max(cycles.values()), min(cycles.values())
    free = allocate(model, table, signals=signals, most_cycles=most, array=array)
    parts = {(name, method): cycles_alone(full_block(w, method_from_label(method), 4), array)
             for name, w in weights(model).items() for method in methods}
    assert {(row.block, row.method): (row.cycles, row.load_cycles) for row in free.table.itertuples()} == parts
    assert free.chosen["method"].eq("Dense").all() or cycles["Dense"] > most
    for budget in np.linspace(least, most, 5)[1:-1]:
        found = allocate(model, table, signals=signals, most_cycles=budget, array=array)
        assert scheduled(found) == found.scheduled_cycles <= budget and (found.cost, found.budget) == ("cycles", budget)
        within = [alone[method].chosen["predicted_loss"].sum() for method in methods if cycles[method] <= budget]
        assert found.chosen["predicted_loss"].sum() <= min(within)
    with pytest.raises(OutOfReach, match=r"cannot reach most_cycles 1: the fewest of the plans that it tried are [\d.]+$"):
        allocate(model, table, signals=signals, most_cycles=1, array=array)


def test_what_the_array_does_not_hold_is_beyond_the_budget(model, signals):
    array = preset("group4x4").with_(word_bits=8)
    signals = {layer: {name: QFormat(8, 6, fmt.signed) for name, fmt in of.items()} for layer, of in signals.items()}
    table = measured(model, lambda name, method, bits: 2.0**-bits, ["Dense"], (8, 12))
    found = allocate(model, table, signals=signals, most_cycles=10**6, array=array)
    assert found.chosen["bits"].eq(8).all() and found.scheduled_cycles < 10**6
    shown = allocate(model, table, signals=signals, target_bytes=10**6, array=array)
    assert shown.chosen["bits"].eq(12).all() and shown.scheduled_cycles == np.inf
    with pytest.raises(OutOfReach, match=r"cannot reach most_cycles 1e\+06: the array has words of 8 bits"):
        allocate(model, table[table["bits"] == 12], signals=signals, most_cycles=10**6, array=array)


@pytest.mark.parametrize("budget", [{"target_bytes": 10**6}, {"most_loss": 10**6},
                                    {"most_cycles": 10**6, "array": preset("group4x4")}], ids=str)
def test_a_choice_of_infinite_loss_is_none(model, signals, budget):
    def loss(name, method, bits):
        return np.inf if method == "Dense" and (bits == 8 or name.endswith("hh_l0.n")) else 1.0

    table = measured(model, loss)
    found = allocate(model, table, signals=signals, **budget)
    assert found.chosen["predicted_loss"].tolist() == [1.0] * 6
    dense = found.table[found.table["method"] == "Dense"].set_index(["block", "bits"])["predicted_loss"]
    assert dense["0.weight_ih_l0.r", 8] == np.inf and dense["0.weight_ih_l0.r", 4] == 1
    with pytest.raises(ValueError, match="a choice of finite loss for every block, got none for 0.weight_hh_l0.n"):
        allocate(model, table[table["method"] == "Dense"], signals=signals, **budget)
    out = budget | {"most_loss": -1.0} if "most_loss" in budget else budget | dict.fromkeys({*budget} - {"array"}, 1)
    with pytest.raises(OutOfReach, match="allocate cannot reach"):
        allocate(model, table, signals=signals, **out)


def test_of_equal_losses_the_fewest_bytes_and_a_budget_that_is_just_reached(model, signals, monkeypatch):
    """Both blocks may go down for the same loss, one saves more."""
    table = measured(model, lambda name, method, bits: {2: 0.5, 4: 0.25, 8: 0.0}[bits], ["Dense"])
    sizes = allocate(model, table, signals=signals, target_bytes=10**6).table.pivot(index="block", columns="bits")["bytes"]
    budget = int(sizes[4].sum())
    found = allocate(model, table, signals=signals, target_bytes=budget)
    losses = {2: 0.5, 4: 0.25, 8: 0.0}
    best = min((sum(losses[b] for b in widths), sum(sizes.loc[name, b] for name, b in zip(sizes.index, widths, strict=True)))
               for widths in itertools.product(losses, repeat=6)
               if sum(sizes.loc[name, b] for name, b in zip(sizes.index, widths, strict=True)) <= budget)
    assert (found.chosen["predicted_loss"].sum(), found.chosen["bytes"].sum()) == best
    monkeypatch.setattr(allocation, "MOST_UNITS", 7)
    least = int(sizes[2].sum())
    assert allocate(model, table, signals=signals, target_bytes=least).chosen["bytes"].sum() == least
    for budget in range(least, int(sizes[8].sum()), 5):  # in units of many bytes
        assert allocate(model, table, signals=signals, target_bytes=budget).chosen["bytes"].sum() <= budget
    assert allocate(model, table, signals=signals, target_bytes=10**6).chosen["bits"].eq(8).all()


def test_a_feasible_cycle_budget_of_a_circulant_plan_is_taken():
    torch.manual_seed(0)
    model, array = nn.LSTM(12, 32), preset("array16x16")
    signals = calibrate(model, [torch.randn(5, 4, 12)])
    table = pd.DataFrame({"block": list(blocks(model)), "method": "BlockCirculant 8", "bits": 8, "excess_loss": 0.0})
    found = allocate(model, table, signals=signals, most_cycles=200, array=array)
    assert found.scheduled_cycles == schedule_layer(pack(model, found.plan).layers["l0"], array, 100).steady_state_cycles < 200


def test_the_rule_of_two_classes_is_the_best_of_its_pairs(model, signals):
    rng = np.random.default_rng(0)
    loss = {(m, b): rng.random() for m in ("TopK 0.5", "TopK 0.25", "BlockCirculant 2", "BlockCirculant 4") for b in (3, 4)}
    table = measured(model, lambda name, method, bits: loss[method, bits], ["TopK 0.5", "TopK 0.25", "BlockCirculant 2",
                                                                           "BlockCirculant 4"], (3, 4))
    found = allocate(model, table, 10, signals, sensitive=["n"])
    assert found.chosen["bytes"].sum() <= 134  # 4 * 336 / 10
    by_class = found.chosen.assign(n=found.chosen["block"].str.endswith("n")).groupby("n")[["method", "bits"]].nunique()
    assert (by_class == 1).all(axis=None)
    predicted = {(row.method, row.bits): (row.predicted_loss, row.bytes) for row in found.table.itertuples()}
    sizes = found.table.assign(n=found.table["block"].str.endswith("n")).groupby(["n", "method", "bits"])["bytes"].sum()
    best = min(2 * predicted[t][0] + 4 * predicted[c][0] for t, c in itertools.product(predicted, repeat=2)
               if t[0][0] == "T" and c[0][0] == "B" and sizes[True, *t] + sizes[False, *c] <= 134)
    assert found.chosen["predicted_loss"].sum() == pytest.approx(best)
    free = allocate(model, table, 10, signals)
    assert free.chosen["predicted_loss"].sum() <= found.chosen["predicted_loss"].sum()
    assert list(found.plan.blocks) == list(blocks(model))
    everything = allocate(model, table, 4, signals, sensitive=["r", "z", "n"])
    assert everything.chosen["method"].str.startswith("TopK").all()


@pytest.mark.parametrize("losses", [{3: 0.9, 4: 0.1}, {3: 0.1, 4: 0.9}])
def test_of_choices_of_the_same_bytes_the_better_whatever_the_order_of_the_rows(losses):
    """Two weights are kept of 8, of 3 or of 4 bits with indices of 2: 2 bytes either way; the larger choice of 8 bits is worse
    than one of both, so that this one gets its loss, and better than the other, which keeps its own."""
    model = nn.Sequential(nn.GRU(2, 4))
    signals = calibrate(model, [torch.randn(5, 2, 2)])
    rows = pd.DataFrame([{"block": name, "method": "TopK 0.25", "bits": bits, "excess_loss": (losses | {8: 0.5})[bits]}
                         for name in blocks(model) if "ih" in name for bits in (3, 4, 8)])
    rest = pd.DataFrame([{"block": name, "method": "Dense", "bits": 4, "excess_loss": 0.0}
                         for name in blocks(model) if "hh" in name])
    for order in (rows, rows.iloc[::-1], rows.sample(frac=1, random_state=0)):
        found = allocate(model, pd.concat([order, rest], ignore_index=True), signals=signals, target_bytes=10**6)
        shown = found.table[found.table["method"] == "TopK 0.25"].set_index("bits")
        sizes = shown["bytes"].groupby("bits").first()
        assert sizes[3] == sizes[4] < sizes[8], sizes
        assert shown["predicted_loss"].groupby("bits").first().to_dict() == {
            bits: max(loss, 0.5) for bits, loss in (losses | {8: 0.5}).items()}


def test_a_choice_is_explained_by_hand(model, signals):
    """Each block at 2, 4 and 8 bits: losses 1, 0.25 and 0. W_ih takes 12, 24, 48 bytes, W_hh 16, 32, 64."""
    table = measured(model, lambda name, method, bits: {2: 1.0, 4: 0.25, 8: 0.0}[bits], methods=["Dense"])
    frame = allocate(model, table, 8, signals).explain()
    assert frame["block"].tolist() == [*blocks(model), "all"] and frame["method"].iloc[-1] == "bytes of at most 168"
    assert (frame["bits"].iloc[:-1] == 4).all() and frame["bytes"].iloc[-1] == 168 and frame["predicted_loss"].iloc[-1] == 1.5
    first = frame.iloc[0]
    assert first[["bytes", "saves", "for_loss", "takes", "for_gain"]].tolist() == [24, 12, 0.75, 24, 0.25]
    last = frame[frame["block"] == "0.weight_hh_l0.n"].iloc[0]
    assert last[["bytes", "saves", "for_loss", "takes", "for_gain"]].tolist() == [32, 16, 0.75, 32, 0.25]
    ends = allocate(model, table, 4, signals).explain()  # all at 8 bits: nothing larger
    assert ends["takes"].isna().all() and (ends["saves"].iloc[0], ends["for_loss"].iloc[0]) == (24, 0.25)


def test_alternatives_are_those_of_best_exchange(model, signals):
    """At 8 bits: 4 bits save 24 bytes for 0.25, 2 bits 36 for 0.3, less a byte. At 4 bits, where 8 gain nothing: none."""
    table = measured(model, lambda name, method, bits: {2: 0.3, 4: 0.25, 8: 0.0}[bits], methods=["Dense"])
    first = allocate(model, table, 4, signals).explain().iloc[0]
    assert (first["saves"], first["for_loss"]) == (36, 0.3)
    table = measured(model, lambda name, method, bits: {2: 1.0, 4: 0.25, 8: 0.25}[bits], methods=["Dense"])
    frame = allocate(model, table, 4, signals).explain()
    assert (frame["bits"].iloc[:-1] == 4).all() and frame["takes"].isna().all()


def test_of_two_larger_choices_the_one_of_more_gain_a_byte_is_told(model, signals):
    """At 2 bits: 4 bits take 12 bytes for 0.75, 8 bits 36 for 1."""
    table = measured(model, lambda name, method, bits: {2: 1.0, 4: 0.25, 8: 0.0}[bits], methods=["Dense"])
    first = allocate(model, table, 16, signals).explain().iloc[0]
    assert (first["bits"], first["takes"], first["for_gain"]) == (2, 12, 0.75)


def test_what_was_measured_is_what_is_planned():
    """Of 96 columns 1/64 keeps two weights a row, and 0.01562, which it looks like in four digits, one."""
    torch.manual_seed(0)
    model, x = nn.LSTM(192, 96), torch.randn(3, 2, 192)
    loop = Loop(evaluate=lambda model: model(x)[0].square().mean(), batches=[x])
    method = RowBalanced(1 / 64)
    table = sensitivity_table(model, loop, [method], bits=[4])
    assert set(table["method"]) == {"RowBalanced 0.015625"}
    found = allocate(model, table, 20, calibrate(model, [x]))
    assert {entry.method for entry in found.plan.blocks.values()} == {method}
    one = found.chosen.set_index("block").loc["weight_hh_l0.i"]
    measured_ = table.set_index("block").loc["weight_hh_l0.i"]
    assert 32 * 96 * 96 / 8 / measured_["cr_disk"] == one["bytes"] == 96 + 168  # 192 words of 4 and of 7 bits


def test_a_class_needs_a_choice_that_all_its_blocks_have(model, signals):
    table = measured(model, lambda name, method, bits: 0.0 if method == "TopK 0.5" else 1.0, ["TopK 0.5", "TopK 0.25",
                                                                                             "BlockCirculant 2"], (4,))
    partly = table[(table["method"] != "TopK 0.5") | (table["block"] != "0.weight_hh_l0.n")]
    for measured_, method in ((table, "TopK 0.5"), (partly, "TopK 0.25")):
        found = allocate(model, measured_, 4, signals, sensitive=["n"]).chosen
        assert set(found.loc[found["block"].str.endswith("n"), "method"]) == {method}


def test_what_is_measured_stores_a_half_to_a_64th(model):
    assert choices_to_measure(model, [Dense]) == [Dense()]
    # The largest block has 64 weights: 32, 16, ... 1 of them.
    assert choices_to_measure(model, [TopK]) == [TopK(n / 64) for n in (32, 16, 8, 4, 2, 1)]
    # 8 x 6 and 8 x 8: blocks of 2 store half; of 4, whose padding of 6 columns counts, 28.6 %; of 8 1/7.
    assert choices_to_measure(model, [BlockCirculant]) == [BlockCirculant(2), BlockCirculant(4), BlockCirculant(8)]
    assert {type(method) for method in choices_to_measure(model)} == set(METHODS.values())


def test_bits_go_where_they_are_needed(model, signals):
    table = measured(model, lambda name, method, bits: (100 if name.endswith(".n") else 1) * 2.0**-bits, methods=["Dense"])
    found = allocate(model, table, 8, signals).chosen.set_index("block")["bits"]
    # 3 * 48 + 3 * 64 weights at 4 bits: 168 bytes. Both n blocks at 8 bits leave two bits for the others.
    assert found[["0.weight_ih_l0.n", "0.weight_hh_l0.n"]].tolist() == [8, 8]
    assert sorted(found.drop(["0.weight_ih_l0.n", "0.weight_hh_l0.n"]).tolist()) == [2, 2, 2, 2]


def test_the_packed_plan_meets_the_target(model, signals):
    table = measured(model, lambda name, method, bits: 2.0**-bits * (2 if method == "Dense" else 3))
    for target in (4, 7, 10, 16):
        allocation = allocate(model, table, target, signals)
        packed = pack(model, allocation.plan)
        assert packed.cr_disk >= target
        assert allocation.chosen["bytes"].sum() == packed.storage_bits // 8 <= 4 * dense_weights(blocks(model)) / target
        assert allocation.table["chosen"].sum() == len(blocks(model))


def test_noise_never_makes_a_smaller_choice_look_better(model, signals):
    noisy = {2: 0.5, 4: -0.2, 8: 0.1}  # at 4 bits better than at 8: noise
    table = measured(model, lambda name, method, bits: noisy[bits], methods=["Dense"])
    allocation = allocate(model, table, 1, signals)
    assert allocation.table.groupby("bits")["predicted_loss"].unique().explode().to_dict() == {2: 0.5, 4: 0.1, 8: 0.1}
    assert set(allocation.chosen["bits"]) == {4}  # equal losses: the smaller one


def test_several_seeds_count_by_their_mean(model, signals):
    one, other = (measured(model, lambda name, method, bits, s=s: s + 2.0**-bits) for s in (0, 1))
    both = allocate(model, pd.concat([one.assign(seed=0), other.assign(seed=1)]), 8, signals)
    assert np.allclose(both.table["excess_loss"], one["excess_loss"] + 0.5)


@pytest.mark.filterwarnings("ignore:.*(proj_size|LSTM with projections).*:UserWarning")
def test_families_without_a_member_for_every_block_are_left_out_with_a_warning():
    model = nn.LSTM(12, 64, proj_size=15)
    with pytest.warns(UserWarning, match="leaves out BlockCirculant: no BlockCirculant of its ladder takes .*15x64"):
        found = choices_to_measure(model, [BlockCirculant, TopK])
    assert {type(method) for method in found} == {TopK}


@pytest.mark.parametrize("family", [TopK(0.5), "TopK"])
def test_what_is_no_family_is_refused(model, signals, family):
    for verb, arguments, who in ((choices_to_measure, ([family],), "choices_to_measure"),
                                 (uniform_plan, (family, 6, 8, signals), "a uniform plan")):
        with pytest.raises(ValueError, match=f"{who} needs a family of methods, such as TopK without parameters"):
            verb(model, *arguments)


def test_a_compressed_model_is_planned_anew(model, signals):
    """What pack refuses, a training that another plan would undo, is what a planner is asked for."""
    compressed = compress(model, uniform(model, TopK(0.5), 8, signals))
    table = measured(compressed, lambda name, method, bits: 1 / bits, methods=["BlockCirculant 2", "TopK 0.25"], widths=(4, 8))
    array = preset("group4x4")
    assert allocate(compressed, table, most_cycles=2000, array=array, signals=signals).scheduled_cycles <= 2000
    assert pack(bake(compressed), uniform_plan(compressed, BlockCirculant, 6, 8, signals)).cr_disk >= 8
    loop = Loop(evaluate=lambda model: model(torch.ones(5, 1, 6))[0].square().mean(), batches=[torch.randn(5, 4, 6)])
    assert search_allocation(compressed, loop, table, 5.0, bits=6, epochs=0, seed=0)["cr_disk"].min() >= 5
    whole = table["method"] == "TopK 0.25"
    table.loc[~whole & (table["block"] == table["block"].iloc[0]), "excess_loss"] = np.inf
    found = search_allocation(compressed, loop, table, 5.0, bits=6, epochs=0, seed=0)
    assert {"allocation of TopK", "allocation of every method"} <= set(found["candidate"])
    assert "allocation of BlockCirculant" not in set(found["candidate"])
    found = search_allocation(compressed, loop, table[whole], 5.0, bits=6, epochs=0, seed=0)
    assert sorted(found["candidate"]) == ["allocation of TopK", "uniform TopK"]
    strength = Strength(2, circulant_bits=4, topk_bits=4)
    assert search_hybrid(compressed, loop, ["n"], 8.0, [strength], epochs=0, seed=0)["cr_disk"].min() >= 8
    assert emulate(compressed, uniform(compressed, TopK(0.25), 8, signals))(torch.ones(5, 1, 6))[0].isfinite().all()


@pytest.mark.parametrize("families", [TopK, "TopK"])
def test_one_family_is_no_list(model, families):
    with pytest.raises(ValueError, match="choices_to_measure needs a list of families, got"):
        choices_to_measure(model, families)


def test_messages(model, signals):
    table = measured(model, lambda *_: 0.0)
    with pytest.raises(OutOfReach, match=r"cannot reach cr_disk 100: the smallest choices take .* bytes of 13, cr_disk 1\d"):
        allocate(model, table, 100, signals)
    with pytest.raises(ValueError, match="a table of every block of the model, these differ: 0.weight_hh_l0.n"):
        allocate(model, table[table["block"] != "0.weight_hh_l0.n"], 4, signals)
    with pytest.raises(OutOfReach, match="allocate cannot reach most_loss -0.1: the least is 0"):
        allocate(model, table, signals=signals, most_loss=-0.1)
    for arguments, message in (
        ({"target_cr_disk": 0.5}, "at least 1, got 0.5"),
        ({}, "needs one of target_cr_disk, target_bytes, most_loss and most_cycles, got none"),
        ({"target_cr_disk": 4, "most_loss": 1}, "most_cycles, got target_cr_disk and most_loss"),
        ({"target_bytes": True}, "needs a number as target_bytes, got True"),
        ({"most_loss": float("nan")}, "needs a number as most_loss, got nan"),
        ({"target_bytes": -5}, "needs target_bytes above 0, got -5"),
        ({"most_cycles": 0, "array": preset("group4x4")}, "needs most_cycles above 0, got 0"),
        ({"target_cr_disk": 4, "table": table.drop(columns="bits")}, "block, method, bits, excess_loss, got none named bits"),
        ({"target_cr_disk": 4, "table": table.assign(bits=2.5)}, "needs whole bits and .*, got 0.0 of Dense in 2.5 bits"),
        ({"target_cr_disk": 4, "table": table.assign(excess_loss=[*[0.0] * 35, float("nan")])},
         "an excess_loss that is a number .*, got nan of TopK 0.5 in 8 bits for 0.weight_hh_l0.n"),
        ({"most_cycles": 100}, "needs the array whose most_cycles are given"),
        ({"target_cr_disk": 4, "signals": None}, "needs the signals of the plan"),
        ({"target_cr_disk": 4, "table": None}, "needs a table, as sensitivity_table gives it, got a NoneType"),
        ({"target_cr_disk": 4, "array": "group4x4"}, "needs an ArraySpec as array, as array.preset gives it, got 'group4x4'"),
        ({"target_cr_disk": 4, "sensitive": "rz"}, "allocate needs a list of gates, got 'rz'"),
        ({"target_cr_disk": 4, "sensitive": 3}, "allocate needs a list of gates, got 3"),
        ({"target_cr_disk": 4, "table": table.assign(method=[None, *table["method"][1:]])},
         "needs the label of a method in every row of its table, got nan"),
        ({"target_cr_disk": 4, "table": table.assign(excess_loss=pd.array([None, *[0.0] * 35], dtype="Float64"))},
         "an excess_loss that is a number .*, got None of Dense in 2 bits for 0.weight_ih_l0.r"),
        ({"target_cr_disk": 4, "table": table.assign(block=[3, *table["block"][1:]])}, "of the model, these differ: 3"),
        ({"target_cr_disk": 4, "table": table.iloc[:0]}, "allocate needs a table with a row at least, got none"),
        ({"target_cr_disk": 4, "signals": {"0.l0": None}}, "Plan needs the formats of every layer's signals"),
        ({"target_cr_disk": 4, "signals": {"0.l0": {}}}, r"Plan needs the signals input, .* of 0\.l0, got none"),
        ({"target_cr_disk": 4, "signals": {}}, "the plan misses the layers 0.l0"),
        ({"target_cr_disk": 4, "table": table.assign(bits="8")}, r"needs numbers in the column bits of its table, got \['8'\]"),
        ({"target_cr_disk": 4, "table": table.assign(excess_loss="x")}, "needs numbers in the column excess_loss"),
        ({"target_cr_disk": 4, "sensitive": ["g"]}, "allocate knows the gates r, z, n, got g"),
        ({"target_cr_disk": 4, "sensitive": ["n"]}, "needs a choice of BlockCirculant that is measured on all of 0.weight_ih"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(model, **{"table": table, "signals": signals} | arguments)


def test_a_block_without_a_choice_of_finite_mean_loss_is_refused(model, signals):
    """Each choice of one block is infinite in one seed: its mean over both is too."""
    first, seeds = next(iter(blocks(model))), []
    for seed, bad in enumerate(("Dense", "TopK 0.5")):
        table = measured(model, lambda name, method, bits, bad=bad: np.inf if (name, method) == (first, bad) else 0.1)
        seeds.append(table.assign(seed=seed))
    with pytest.raises(ValueError, match=f"needs a choice of finite loss for every block, got none for {first}"):
        allocate(model, pd.concat(seeds), 4.0, signals)


@pytest.mark.parametrize("bad, message", [
    ({"bits": 9}, "a uniform plan needs 2 to 8 bits, got 9"),
    ({"target_cr_disk": 0}, "a target cr_disk must be a number of at least 1, got 0"),
    ({"epochs": -1}, "search_allocation needs a whole number of epochs of at least 0, got -1"),
], ids=str)
def test_bad_values_of_a_search_are_refused_before_any_work(model, monkeypatch, bad, message):
    monkeypatch.setattr(allocation, "calibrate", None)
    with pytest.raises(ValueError, match=message):
        allocation.search_allocation(model, None, None, **{"target_cr_disk": 8.0, "bits": 6, "epochs": 1, "seed": 0} | bad)
