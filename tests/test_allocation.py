"""Budget allocation: hand cases, every combination tried as the oracle, messages."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from workbench.allocation import _least_loss, allocate, block_cycles, choices_to_measure
from workbench.array import preset
from workbench.budget import OutOfReach, full_block
from workbench.constrain import pack
from workbench.gates import blocks, dense_weights, weight
from workbench.methods import BlockCirculant, Dense, TopK, method_from_label
from workbench.quantise import calibrate


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
    within = [loss for loss, size in sums if size <= budget]
    chosen = _least_loss(groups, budget)
    if not within:
        assert chosen is None
        return
    loss = sum(losses[n] for (_, losses), n in zip(groups, chosen, strict=True))
    assert loss == min(within)
    assert sum(sizes[n] for (sizes, _), n in zip(groups, chosen, strict=True)) <= budget


@pytest.mark.parametrize("seed", range(20))
def test_the_least_size_of_all_combinations_within_a_loss(seed):
    rng = np.random.default_rng(seed)
    groups = [(rng.integers(1, 12, n), rng.integers(0, 6, n) / 4) for n in rng.integers(1, 5, 4)]
    most = rng.integers(0, 12) / 4
    sums = [(sum(losses[n] for (_, losses), n in zip(groups, picks, strict=True)),
             sum(sizes[n] for (sizes, _), n in zip(groups, picks, strict=True)))
            for picks in itertools.product(*(range(len(sizes)) for sizes, _ in groups))]
    within = [size for loss, size in sums if loss <= most]
    chosen = _least_loss(groups, sum(sizes.max() for sizes, _ in groups), most)
    if not within:
        assert chosen is None
        return
    assert sum(sizes[n] for (sizes, _), n in zip(groups, chosen, strict=True)) == min(within)
    assert sum(losses[n] for (_, losses), n in zip(groups, chosen, strict=True)) <= most


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


def test_cycles_of_a_block_by_hand(model):
    """4 x 4 PEs. Dense 8 x 6: two rows a PE row, at most two columns a PE column: 4 multiply-accumulates, latency 4, two rows
    to drain, three links. Circulant 2 of 8 x 8: 4 tiles of rows over 4 PE rows, 4 of columns over 4: one tile of 4 products."""
    array = preset("group4x4")
    assert (array.rows, array.cols, array.mac_latency, array.link_cycles) == (4, 4, 4, 1)
    assert block_cycles(full_block(torch.ones(8, 6), Dense(), 8), array) == 4 + 4 + 2 + 3
    assert block_cycles(full_block(torch.ones(8, 8), BlockCirculant(2), 8), array) == 4 + 4 + 2 + 3
    assert block_cycles(full_block(torch.ones(8, 8), Dense(), 2), array) == 4 + 4 + 2 + 3


def test_a_cycle_budget_is_kept_and_used(model, signals):
    array, losses = preset("group4x4"), {"Dense": 0.0, "TopK 0.5": 0.1, "TopK 0.125": 0.5}
    table = measured(model, lambda name, method, bits: losses[method], losses, widths=(4,))
    alone = {(name, method): block_cycles(full_block(weight(model, name), method_from_label(method), 4), array)
             for name in blocks(model) for method in losses}
    dense, least = (sum(alone[name, method] for name in blocks(model)) for method in ("Dense", "TopK 0.125"))
    assert allocate(model, table, signals=signals, most_cycles=dense, array=array).chosen["method"].eq("Dense").all()
    budget = (dense + least) // 2
    middle = allocate(model, table, signals=signals, most_cycles=budget, array=array)
    assert least < middle.chosen["cycles"].sum() <= budget < dense and middle.cost == "cycles"
    assert {(row.block, row.method): row.cycles for row in middle.table.itertuples()} == alone
    best = min(sum(losses[method] for method in picks) for picks in itertools.product(losses, repeat=6)
               if sum(alone[pair] for pair in zip(blocks(model), picks, strict=True)) <= budget)
    assert middle.chosen["predicted_loss"].sum() == pytest.approx(best)
    with pytest.raises(OutOfReach, match=f"cannot reach most_cycles 10: the smallest choices take {least} cycles of 10"):
        allocate(model, table, signals=signals, most_cycles=10, array=array)


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
    everything = choices_to_measure(model)
    assert {type(method).__name__ for method in everything} == {"Dense", "TopK", "RowBalanced", "BankBalanced", "BlockSparse",
                                                                "Structured", "BlockCirculant", "LowRank"}


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


def test_messages(model, signals):
    table = measured(model, lambda *_: 0.0)
    with pytest.raises(OutOfReach, match="allocate cannot reach cr_disk 100: the smallest choices take .* bytes of 13"):
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
        ({"most_cycles": 100}, "needs the array whose most_cycles are given"),
        ({"target_cr_disk": 4, "signals": None}, "needs the signals of the plan"),
        ({"target_cr_disk": 4, "sensitive": ["g"]}, "allocate knows the gates r, z, n, got g"),
        ({"target_cr_disk": 4, "sensitive": ["n"]}, "needs a choice of BlockCirculant that is measured on all of 0.weight_ih"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(model, table, **{"signals": signals} | arguments)
