"""Cheap sensitivity: scores by hand and against torch's own gradients, agreement against scipy."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import workbench as wb
from workbench.cheap import ALL, SCORES
from workbench.gates import blocks
from workbench.plan import plan_block
from workbench.sensitivity import sample_batch

METHODS = [wb.TopK(0.25), wb.BlockCirculant(4)]


def test_scores_by_hand():
    """A GRU of one unit whose W_ih is (4, 1) for each gate: keep one of two, so d = (0, -1). The inputs are (3, 3) and (4, 4):
    root mean square sqrt(12.5). The losses are 2 (w01 + w11) and 4 w21 - w01 with w_i1 the second weight of gate i: gradients
    of r 2 and -1, of z 2 and 0, of n 0 and 4; means 0.5, 1, 2; mean squares 2.5, 2, 8."""
    model = nn.GRU(2, 1, bias=False)
    with torch.no_grad():
        model.weight_ih_l0.copy_(torch.tensor([4.0, 1]))
        model.weight_hh_l0.fill_(1)

    def losses(model):
        w = model.weight_ih_l0
        yield 2 * (w[0, 1] + w[1, 1]) + 0 * model.weight_hh_l0.sum()
        yield 4 * w[2, 1] - w[0, 1] + 0 * model.weight_hh_l0.sum()

    loop = wb.Loop(evaluate=None, batches=[torch.tensor([[[3.0, 3]], [[4, 4]]])], losses=losses)
    table = wb.cheap_sensitivity(model, loop, [wb.TopK(0.5)], bits=8).set_index("block")
    ih = table.loc[[f"weight_ih_l0.{gate}" for gate in "rzn"]]
    assert ih["magnitude"].tolist() == [1, 1, 1] and ih["gradient"].tolist() == [0.5, 1, 2]
    assert ih["fisher"].tolist() == [1.25, 1, 4] and ih["activation"].tolist() == pytest.approx([math.sqrt(12.5)] * 3)
    assert (table.loc[[f"weight_hh_l0.{gate}" for gate in "rzn"], list(SCORES)] == 0).all(axis=None)  # one of one is kept
    assert table["compression"].unique().tolist() == ["TopK 0.5 at 8 bits"]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("form", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 4}], ids=str)
def test_scores_are_those_of_torch_s_own_gradients_and_outputs(form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(4, 8, **form))
    batches = torch.randn(3, 6, 2, 4)
    loop = wb.Loop(evaluate=None, batches=batches, losses=lambda model: (model(x)[0].square().sum() for x in batches))
    table = wb.cheap_sensitivity(model, loop, [*METHODS, wb.LowRank(2)], bits=[4, 8])
    assert len(table) == 6 * len(blocks(model)) and (table[list(SCORES)] > 0).all(axis=None)
    names = [name for name, _ in model[0].named_parameters()]
    found = [torch.autograd.grad(model(x)[0].square().sum(), list(model.parameters())) for x in batches]
    gradients = {name: torch.stack(each).double() for name, each in zip(names, zip(*found, strict=True), strict=True)}
    for row in table.itertuples():
        block = blocks(model)[row.block]
        w = getattr(model[0], block.parameter)[block.rows].detach().double()
        gradient = gradients[block.parameter][:, block.rows]  # (batches, out, in), of both signs
        entry = plan_block(w, wb.method_from_label(row.method), row.bits)
        inside = entry.method.constrain(w, entry.format)
        d = inside(inside.right_inverse(w)) - w
        assert row.gradient == pytest.approx((gradient.mean(0) * d).abs().sum().item(), rel=1e-6)
        assert row.fisher == pytest.approx(((gradient**2).mean(0) * d**2).sum().item() / 2, rel=1e-6)
        assert row.magnitude == pytest.approx((d**2).sum().item())
        if block.part == "hh" and not block.layer.reverse and block.layer.index == form.get("num_layers", 1) - 1:
            h = torch.stack([model(x)[0] for x in batches])[..., : w.shape[1]].detach().double()
            assert row.activation == pytest.approx((d.abs() @ h.square().mean((0, 1, 2)).sqrt()).sum().item(), rel=1e-5)


def test_a_task_gives_its_own_losses_and_everything_repeats(tiny_task, tiny_language_task):
    model = wb.build_classifier(tiny_task, 8, seed=0)
    state = torch.get_rng_state()
    one, again, other = (wb.cheap_sensitivity(model, tiny_task, METHODS, batches=2, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, again)
    assert not one["gradient"].equals(other["gradient"]) and one["activation"].equals(other["activation"])
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(p.grad is None for p in model.parameters())
    baked = wb.cheap_sensitivity(wb.compress(model, wb.uniform(model, wb.TopK(0.25), 8, wb.calibrate(
        model, [(torch.ones(1, 2, 3), torch.tensor([2]))]))), tiny_task, METHODS[:1], batches=1)
    assert (baked["magnitude"] == 0).all()  # of a compressed model nothing moves
    words = wb.build_language_model(tiny_language_task, 8, seed=0)
    assert (wb.cheap_sensitivity(words, tiny_language_task, METHODS, batches=2)["fisher"] > 0).all()


@pytest.mark.parametrize("own", [False, True], ids=["of a task", "of a loop"])
def test_dropout_is_off(tiny_task, own):
    with_dropout, without = (wb.build_classifier(tiny_task, 8, seed=0, dropout=dropout) for dropout in (0.5, 0.0))
    batch = sample_batch(tiny_task)
    task = wb.Loop(None, [batch], losses=lambda model: [model(*batch).square().sum()]) if own else tiny_task
    pd.testing.assert_frame_equal(*(wb.cheap_sensitivity(m, task, METHODS, batches=2) for m in (with_dropout, without)))
    assert with_dropout.training and not torch.equal(with_dropout(*batch), without(*batch))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_no_step(bidirectional):
    """Packed sequences of different lengths have the activations that they have one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(3, 8, bidirectional=bidirectional))
    sequences = [torch.randn(length, 3) for length in (2, 9, 4)]
    together, one_by_one = (
        wb.cheap_sensitivity(model, wb.Loop(None, batches, losses=lambda model: [model(sequences[1])[0].sum()]), METHODS)
        for batches in ([pack_sequence(sequences, enforce_sorted=False)], sequences))  # fmt: skip
    pd.testing.assert_frame_equal(together, one_by_one)
    assert (together["activation"] > 0).all()


def frames(seeds, truth, score, retrained=None):
    """cheap and measured: one compression, blocks in order; truth, score: seed -> values."""
    rows = [{"seed": s, "block": f"b{n}", "compression": "c"} | dict.fromkeys(SCORES, score[s][n])
            for s in range(seeds) for n in range(len(truth[s]))]
    cheap = pd.DataFrame(rows)
    before = [x for s in range(seeds) for x in truth[s]]
    after = before if retrained is None else [x for s in range(seeds) for x in retrained[s]]
    return cheap, cheap[["seed", "block", "compression"]].assign(loss_before=before, loss_after=after, loss_dense=0.0)


def test_correlations_are_scipys():
    rng = np.random.default_rng(0)
    truth, score, after = (rng.integers(0, 6, (4, 12)).astype(float) for _ in range(3))  # with ties
    found = wb.cheap_agreement(*frames(4, truth, score, after))
    assert found.groupby("compression", sort=False).size().to_dict() == {ALL: 8, "c": 8}
    for name, values in (("one-shot", truth), ("retrained", after)):
        row = found[(found["truth"] == name) & (found["compression"] == "c")].iloc[0]
        for what, function in (("spearman", scipy.stats.spearmanr), ("kendall", scipy.stats.kendalltau)):
            each = [function(a, b).statistic for a, b in zip(score, values, strict=True)]
            half = scipy.stats.t.ppf(0.975, 3) * np.std(each, ddof=1) / 2
            assert row[what] == pytest.approx(np.mean(each))
            assert row[f"{what}_low"] == pytest.approx(np.mean(each) - half, abs=1e-4)
            assert row[f"{what}_high"] == pytest.approx(np.mean(each) + half, abs=1e-4)


def test_agreement_by_hand():
    cheap, measured = frames(2, [[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [1, 3, 2]])  # tau 1 and 1/3, rho 1 and 1/2
    row = wb.cheap_agreement(cheap, measured).iloc[0]
    assert (row["spearman"], row["kendall"], row["seeds"]) == (0.75, pytest.approx(2 / 3), 2)
    assert row["ranked"] == 3
    assert (row["spearman_low"], row["spearman_high"]) == (-1, 1)  # 12.7 * 0.25, cut
    assert set(wb.cheap_agreement(cheap, measured)["truth"]) == {"one-shot"}
    single = wb.cheap_agreement(*frames(1, [[1, 2, 3]], [[3, 2, 1]])).iloc[0]
    assert single["kendall"] == -1 and math.isnan(single["kendall_low"])
    without = [table.drop(columns="seed") for table in frames(1, [[1, 2, 3]], [[3, 2, 1]])]  # as the tables of one model are
    pd.testing.assert_series_equal(wb.cheap_agreement(*without).iloc[0], single)
    flat = wb.cheap_agreement(*frames(1, [[1, 2, 3]], [[1, 1, 1]])).iloc[0]
    assert flat["seeds"] == 0 and math.isnan(flat["spearman"])


def test_infinite_values_have_a_rank_and_what_is_no_number_is_refused():
    infinite = wb.cheap_agreement(*frames(2, [[1, 2, math.inf]] * 2, [[1, 2, 3], [3, 2, math.inf]])).iloc[0]
    assert (infinite["spearman"], infinite["kendall"]) == (0.75, pytest.approx(2 / 3)) and infinite["seeds"] == 2
    cheap, measured = frames(2, [[1, 2, 3]] * 2, [[1, 2, 3]] * 2)
    for one, other, message in (
        (cheap.assign(fisher=math.nan), measured, "needs numbers to rank, got NaN in the column fisher"),
        (cheap, measured.assign(loss_before=math.nan), "needs numbers to rank, got NaN in the column loss_before"),
        (pd.concat([cheap] * 2), pd.concat([measured] * 2), "needs every seed, block and compression once, got one more often"),
        (measured, cheap, "cheap_agreement needs a table with the columns block, compression, magnitude, .*, got none named"),
        (cheap, None, "cheap_agreement needs a table, as sensitivity_table gives it, got a NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            wb.cheap_agreement(one, other)


def test_scores_are_ranked_against_a_measurement(tiny_task):
    dense = {seed: wb.build_classifier(tiny_task, 8, seed=seed) for seed in (0, 1)}
    cheap = wb.cheap_over_seeds(tiny_task, dense, METHODS, bits=[4, 8])
    measured = pd.concat([wb.sensitivity_table(model, tiny_task, METHODS, bits=[4, 8]).assign(seed=seed)
                          for seed, model in dense.items()])
    found = wb.cheap_agreement(cheap, measured)
    assert found.groupby("compression")["ranked"].first().drop(ALL).eq(8).all() and found["ranked"].max() == 32
    assert len(found) == 5 * len(SCORES) and found["seeds"].eq(2).all()
    with pytest.raises(ValueError, match="the same seeds, blocks and compressions in both tables, got 64 and 32 rows, 32 of"):
        wb.cheap_agreement(cheap, measured[measured["seed"] == 0])


@pytest.mark.parametrize(("change", "message"), [
    ({"batches": 0}, "cheap_sensitivity needs a whole number of batches of at least 1, got 0"),
    ({"bits": []}, "needs different widths in bits, got none"),
    ({"methods": [wb.BlockCirculant(3)]}, "block 0.weight_ih_l0.r at 8 bits: .* needs rows divisible by 3"),
    ({"task": wb.Loop(None, [torch.ones(2, 1, 3)])}, "needs a Loop with the function losses, got one without"),
    ({"task": wb.Loop(None, [torch.ones(2, 1, 3)], losses=lambda model: [])}, "needs at least one loss, got none"),
    ({"task": wb.Loop(None, [torch.ones(2, 1, 3)], losses=lambda model: [torch.ones(())])},
     "needs losses that depend on every recurrent weight, got one that does not depend on weight_ih_l0 of '0'"),
    ({"task": wb.Loop(None, [torch.ones(2, 1, 3)], losses=lambda model: [model[0].bias_ih_l0.sum()])},
     "needs losses that depend on every recurrent weight, got one that does not depend on weight_ih_l0 of '0'"),
    *(({"task": wb.Loop(None, [torch.ones(2, 1, 3)], losses=losses)}, f"needs {message}") for losses, message in (
        (lambda model: [model[0].weight_ih_l0.sum() * math.nan], "finite losses, got nan"),
        (lambda model: [model[0].weight_ih_l0], r"losses of one real number each, got one of torch.float32 and .* \(12, 3\)"),
        (lambda model: [0.5], "losses of one real number each, got 0.5"),
        (lambda model: model[0].weight_ih_l0.sum(), "several losses from the Loop's losses, got a Tensor"),
        (lambda model: None, "several losses from the Loop's losses, got a NoneType"))),
])  # fmt: skip
def test_messages(change, message):
    model = nn.Sequential(nn.GRU(3, 4))
    loop = wb.Loop(None, [torch.ones(2, 1, 3)], losses=lambda model: [model(torch.ones(2, 1, 3))[0].sum()])
    arguments = {"task": loop, "methods": [wb.TopK(0.5)], "bits": 8} | change
    with pytest.raises(ValueError, match=message):
        wb.cheap_sensitivity(model, arguments.pop("task"), arguments.pop("methods"), **arguments)


def test_batches_that_leave_out_a_module_are_refused():
    class Alternating(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.GRU(3, 4), torch.nn.GRU(3, 4)

        def forward(self, x):
            return (self.a if x.shape[0] == 2 else self.b)(x)[0].square().mean()

    batches = [torch.randn(2, 1, 3), torch.randn(3, 1, 3)]
    loop = wb.Loop(None, batches, losses=lambda model: (sum(map(model, batches)) for _ in range(2)))
    assert set(wb.cheap_sensitivity(Alternating(), loop, [wb.TopK(0.5)], batches=2)["block"]) == set(blocks(Alternating()))
    with pytest.raises(ValueError, match="cheap_sensitivity needs batches .* every recurrent module .*, got no call of 'b'"):
        wb.cheap_sensitivity(Alternating(), loop, [wb.TopK(0.5)], batches=1)


def test_frozen_layers_and_callers_without_gradients_are_measured_alike():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.GRU(3, 4)), torch.randn(2, 1, 3)
    loop = wb.Loop(None, [x], losses=lambda model: [model(x)[0].square().sum()])
    expected = wb.cheap_sensitivity(model, loop, [wb.TopK(0.5)], bits=8)
    model.requires_grad_(False)
    with torch.no_grad():
        pd.testing.assert_frame_equal(wb.cheap_sensitivity(model, loop, [wb.TopK(0.5)], bits=8), expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_own_losses_are_not_asked_of_cudnn():
    """It gives no gradients in evaluation mode."""
    x, model, seen = torch.randn(3, 2, 4), nn.Sequential(nn.LSTM(4, 8)), []

    def losses(model):
        for _ in range(2):
            seen.append(torch.backends.cudnn.enabled)
            yield model(x)[0].square().sum()

    wb.cheap_sensitivity(model, wb.Loop(None, [x], losses=losses), METHODS)
    assert seen == [False, False] and torch.backends.cudnn.enabled
