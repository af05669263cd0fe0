"""Plans that fill a budget: the largest member that fits, and the rule that chooses the width."""

import numpy as np
import pytest
import torch

from workbench import budget
from workbench.budget import OutOfReach, full_bits, largest_member, uniform_plan
from workbench.constrain import pack
from workbench.gates import blocks, weight
from workbench.methods import METHODS, BlockCirculant, BlockSparse, Dense, LowRank, Structured, TopK
from workbench.plan import Unpackable, uniform
from workbench.quantise import calibrate


@pytest.fixture(scope="module")
def model():
    """One LSTM of 8 blocks of 4x4: 128 weights, 4,096 bits dense."""
    torch.manual_seed(0)
    return torch.nn.LSTM(4, 4, batch_first=True)


@pytest.fixture(scope="module")
def signals(model):
    return calibrate(model, [torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(1))])


@pytest.mark.parametrize("bits", [2, 5, 6, 7])
@pytest.mark.parametrize("size", [4, 6, 10, 13])
def test_a_plan_reaches_the_ratio_that_it_has(size, bits):
    lstm = torch.nn.LSTM(size, size)
    signals = calibrate(lstm, [torch.randn(5, 2, size)])
    ratio = pack(lstm, uniform(lstm, Dense(), bits, signals)).cr_disk
    assert chosen(uniform_plan(lstm, Dense, bits, ratio, signals))[1] == bits


def chosen(plan):
    (entry,) = {(entry.method, entry.format.bits) for entry in plan.blocks.values()}
    return entry


# A block of 2 takes 8 values a gate block, one of 4 takes 4; a block's bits fill whole bytes.
@pytest.mark.parametrize(("target", "bits", "block", "width"), [
    (8, 8, 2, 8),      # 512 of 512 bits
    (8, 6, 2, 8),      # 6 bits take 75 %, 7 bits 87.5 %, 5 bits less: only 8 bits fill the budget
    (9, 6, 2, 7),      # 448 of 455; 6 bits would take 84 %
    (10.6, 6, 2, 6),   # 384 of 386
    (10, 6, 2, 6),     # 384 of 410 is under 95 %, but no other width takes more
    (30, 6, 4, 4),     # 128 of 137 at 2, 3 and 4 bits: of equals the nearest to 6
    (30, 3, 4, 3),     # and the nearest to 3
    (4096 / 192, 7, 4, 6),  # 8 and 7 bits fit nowhere: 6 bits, 192 of 192
])  # fmt: skip
def test_the_width_by_hand(model, signals, target, bits, block, width):
    assert chosen(uniform_plan(model, BlockCirculant, bits, target, signals)) == (BlockCirculant(block), width)


@pytest.mark.parametrize(("sizes", "bits", "width"), [
    ({4: 960, 5: 940, 6: 960}, 5, 6),  # 5 does not fill the 1,000 bits; of two as near the wider
    ({4: 960, 5: 940, 6: 940}, 5, 4),
    ({4: 960, 5: 950, 6: 960}, 5, 5),  # 95 % is enough
    ({2: 1000, 8: 951}, 4, 2),  # nearer, not larger
    ({2: 951, 8: 1000}, 6, 8),
    ({2: 900, 4: 949, 8: 940}, 8, 4),  # none fills: the one that takes most
    ({3: 949, 5: 949, 8: 949}, 4, 5),  # none fills, all take the same: the nearest, of two the wider
])  # fmt: skip
def test_the_rule_by_hand(model, signals, monkeypatch, sizes, bits, width):
    def member(weights, family, width, budget_bits):
        assert budget_bits == 1000
        if width not in sizes:
            raise OutOfReach
        return Dense(), sizes[width]

    monkeypatch.setattr(budget, "largest_member", member)
    assert chosen(uniform_plan(model, Dense, bits, 4.096, signals)) == (Dense(), width)


@pytest.mark.parametrize("target", [6, 12.0, 30])
def test_topk_fills_the_budget_to_the_last_weight(target):
    torch.manual_seed(0)
    model = torch.nn.LSTM(12, 16)
    plan = uniform_plan(model, TopK, 6, target, calibrate(model, [torch.randn(5, 4, 12)]))
    topk, width = chosen(plan)
    assert width == 6 and pack(model, plan).cr_disk >= target
    weights = [weight(model, name) for name in blocks(model)]
    budget_bits = 32 * 64 * (12 + 16) / target
    assert sum(full_bits(w, topk, 6) for w in weights) <= budget_bits
    one_more = TopK(topk.keep + 1 / 256)
    assert sum(full_bits(w, one_more, 6) for w in weights) > budget_bits


def test_sizes_are_those_of_weights_that_are_all_kept():
    assert full_bits(torch.zeros(4, 4), BlockCirculant(2), 6) == 8 * 6
    assert full_bits(torch.zeros(4, 4), TopK(1), 6) == 16 * 6  # without an index
    assert full_bits(torch.zeros(4, 4), TopK(0.5), 6) == 8 * 6 + 16  # with a bitmap
    assert full_bits(torch.zeros(4, 4), Dense(), 3) == 16 * 3


def test_the_largest_member_that_fits():
    weights = [torch.ones(4, 4), torch.ones(4, 6)]
    assert largest_member(weights, BlockCirculant, 8, 160) == (BlockCirculant(2), 160)  # 64 + 96
    assert largest_member(weights, BlockCirculant, 8, 159) == (BlockCirculant(4), 96)  # 32 + 64, two columns of padding
    with pytest.raises(OutOfReach, match="no BlockCirculant of 8 bits on blocks of 4x4, 4x6 fits 95 bits"):
        largest_member(weights, BlockCirculant, 8, 95)
    with pytest.raises(OutOfReach, match="no BlockCirculant .* 3x4"):
        largest_member([torch.ones(3, 4)], BlockCirculant, 8, 10_000)  # no power of two divides 3 rows


@pytest.mark.parametrize("family", METHODS.values(), ids=lambda cls: cls.__name__)
def test_every_method_reaches_a_mild_target_or_says_so(model, signals, family):
    assert pack(model, uniform_plan(model, family, 6, 4, signals)).cr_disk >= 4
    with pytest.raises(OutOfReach, match=f"no uniform {family.__name__} of 2 to 8 bits meets cr_disk 1000"):
        uniform_plan(model, family, 6, 1000, signals)


@pytest.mark.parametrize(("bits", "target", "message"), [
    (1, 10, "a uniform plan needs 2 to 8 bits, got 1"),
    (9, 10, "2 to 8 bits, got 9"),
    (True, 10, "2 to 8 bits, got True"),
    (4.5, 10, "2 to 8 bits, got 4.5"),
    (6, 0.5, "a target cr_disk must be a number of at least 1, got 0.5"),
    (6, float("nan"), "at least 1, got nan"),
    (6, "10", "at least 1, got '10'"),
])  # fmt: skip
def test_bad_values_are_refused(model, signals, bits, target, message):
    with pytest.raises(ValueError, match=message):
        uniform_plan(model, TopK, bits, target, signals)


def test_a_width_that_cannot_be_packed_is_passed_over():
    """Sums V x of 300 inputs of 16 bits need more than the 27 bits that a multiplier takes, unless V is narrow."""
    torch.manual_seed(0)
    model = torch.nn.LSTM(300, 8)
    signals = calibrate(model, [torch.randn(6, 4, 300).clamp(-0.9, 0.9)])
    plan = uniform_plan(model, LowRank, 8, 8, signals)
    ((_, width),) = {(entry.method, entry.format.bits) for entry in plan.blocks.values()}
    assert width < 8 and pack(model, plan).cr_disk >= 8
    with pytest.raises(ValueError, match="sums V x"):  # the nearest to 8 bits, which fits the budget too
        pack(model, uniform(model, largest_member([weight(model, name) for name in blocks(model)], LowRank, 8,
                                                  4 * 4 * 8 * 308)[0], 8, signals))


def test_where_nothing_can_be_packed_it_says_why(model, signals, monkeypatch):
    def refuse(*_):
        raise Unpackable("layer l0: no multiplier")

    monkeypatch.setattr(budget, "pack", refuse)
    with pytest.raises(OutOfReach, match="no uniform TopK of 2 to 8 bits meets cr_disk 8: the plan cannot be packed: layer "
                                         "l0: no multiplier"):
        uniform_plan(model, TopK, 6, 8, signals)


@pytest.mark.parametrize("family", [BlockCirculant, Structured, BlockSparse])
def test_where_no_power_of_two_divides_the_rows_that_is_the_reason(family):
    model = torch.nn.LSTM(12, 75)
    with pytest.raises(OutOfReach, match=rf"^no {family.__name__} of its ladder takes blocks of 75x12, 75x75$"):
        uniform_plan(model, family, 6, 4, calibrate(model, [torch.randn(3, 2, 12)]))


def test_signals_of_another_model_are_no_matter_of_size(model):
    with pytest.raises(ValueError, match="misses the layers l0") as refused:
        uniform_plan(model, TopK, 6, 8, {})
    assert not isinstance(refused.value, OutOfReach)


def test_a_target_may_be_any_real_number():
    for target in (1, 20.0, np.int64(20), np.float32(2.5)):
        budget.check_target(target)
