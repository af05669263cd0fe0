"""Budget allocation: hand cases, every combination tried as the oracle, messages."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from workbench.allocation import _least_loss, allocate
from workbench.budget import OutOfReach
from workbench.constrain import pack
from workbench.gates import blocks, dense_weights
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
    with pytest.raises(ValueError, match="at least 1, got 0.5"):
        allocate(model, table, 0.5, signals)
