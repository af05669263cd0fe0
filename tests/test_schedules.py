"""Retraining schedules: strengths by hand, what the optimizer holds, exact members at the end, own loops, resuming."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import workbench as wb
from workbench.gates import blocks, weight
from workbench.methods.pruning import Pruning
from workbench.plan import Plan, plan_block
from workbench.schedules import milder

X = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(3))  # (T, B, F)


class Regressor(nn.Module):
    def __init__(self, hidden=16, features=16):
        super().__init__()
        self.rnn, self.head = nn.GRU(features, hidden), nn.Linear(hidden, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Regressor()


def hybrid(model, bits=6, z=wb.Structured(8)):  # noqa: B008
    """TopK for gate n, circulant for r, another for z."""
    methods = {"n": wb.TopK(0.1), "r": wb.BlockCirculant(16), "z": z}
    return Plan({name: plan_block(weight(model, name), methods[block.gate], bits) for name, block in blocks(model).items()},
                wb.calibrate(model, [X]))


def loss_of(model):
    return (model(X) - X.mean((0, 2))[:, None]).square().mean()


def methods_of(plan, gate):
    return {entry.method for name, entry in plan.blocks.items() if name.endswith(f".{gate}")}


SCHEDULES = {
    "one-shot": lambda model, plan: wb.one_shot(model, plan),
    "gradual": lambda model, plan: wb.gradual(model, plan, stages=4, until=0.5),
    "iterative": lambda model, plan: wb.iterative(model, plan, [["r", "z"], ["n"]], until=0.5),
    "ADMM": lambda model, plan: wb.admm(model, plan, rho=0.1, updates=3, until=0.5),
}
every = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


# --- the stages by hand


def test_the_cubic_schedule_by_hand(model):
    """s (1 - (1 - n/4)^3) of s: 0, 0.578125 s, 0.875 s, 0.984375 s, s. TopK 0.1: s = 0.9. Circulant 16 on 16 columns stores a
    sixteenth, s = 0.9375: at least 0.458, 0.180 and 0.077 of the weights are stored by blocks of 2, 4 and 8. Structured 8: s =
    0.875, at least 0.494, 0.234 and 0.139: periods 2, 4 and 4."""
    plan = hybrid(model)
    stages = wb.gradual(model, plan, stages=4, until=0.5).stages
    assert [start for start, _ in stages] == [0, 0.125, 0.25, 0.375, 0.5] and stages[-1][1] is plan
    assert all(methods_of(stages[0][1], gate) == {wb.Dense()} for gate in "rzn")
    keeps = [m.keep for _, p in stages[1:] for m in methods_of(p, "n")]
    assert keeps == pytest.approx([0.4796875, 0.2125, 0.1140625, 0.1], abs=1e-12)
    assert [m.block for _, p in stages[1:] for m in methods_of(p, "r")] == [2, 4, 8, 16]
    assert [m.period for _, p in stages[1:] for m in methods_of(p, "z")] == [2, 4, 4, 8]
    assert {entry.format.bits for _, p in stages for entry in p.blocks.values()} == {6}


@pytest.mark.parametrize(("method", "kept", "found"), [
    (wb.TopK(0.2), 0.5, wb.TopK(0.5)), (wb.TopK(0.2), 0.1, wb.TopK(0.2)), (wb.TopK(0.2), 1.0, wb.Dense()),
    (wb.BankBalanced(0.25, 4), 0.5, wb.BankBalanced(0.5, 4)), (wb.BlockSparse(0.25, 2), 0.5, wb.BlockSparse(0.5, 2)),
    (wb.BlockCirculant(8), 0.5, wb.BlockCirculant(2)), (wb.BlockCirculant(8), 0.51, wb.Dense()),
    (wb.BlockCirculant(8), 0.25, wb.BlockCirculant(4)), (wb.BlockCirculant(8), 0.125, wb.BlockCirculant(8)),
    (wb.BlockCirculant(12), 0.3, wb.BlockCirculant(2)), (wb.Structured(4), 0.3, wb.Structured(2)),
    (wb.Dense(), 0.5, wb.Dense()), (wb.BlockCirculant(3), 0.4, wb.BlockCirculant(2)), (wb.BlockCirculant(3), 0.6, wb.Dense()),
    (wb.Structured(2), 0.1, wb.Structured(2)), (wb.LowRank(4), 0.5, wb.LowRank(6)), (wb.LowRank(4), 0.99, wb.Dense()),
], ids=str)  # fmt: skip
def test_the_strongest_that_keeps_so_much(method, kept, found):
    assert milder(method, torch.ones(24, 24), kept) == found


@dataclass(frozen=True)
class RowK(Pruning):
    """A user's method whose field `keep` is a count."""

    keep: int

    @classmethod
    def ladder(cls, shapes):
        return [cls(n) for n in range(min(columns for _, columns in shapes), 0, -1)]

    def support(self, w):
        kept = torch.zeros_like(w, dtype=torch.bool).scatter_(1, w.abs().topk(self.keep).indices, True)
        return kept.flatten().nonzero().squeeze(1)


def test_a_count_is_no_share():
    assert [milder(RowK(3), torch.ones(24, 24), kept) for kept in (1.0, 0.5, 0.26, 0.1)] == [
        wb.Dense(), RowK(12), RowK(7), RowK(3)]


def test_groups_of_gates_have_their_turns(model):
    plan = hybrid(model)
    stages = wb.iterative(model, plan, [["z"], ["r"], ["n"]], until=0.6).stages
    assert [start for start, _ in stages] == [0, 0.3, 0.6] and stages[-1][1] == plan
    waiting = [{gate for gate in "rzn" if methods_of(p, gate) == {wb.Dense()}} for _, p in stages]
    assert waiting == [{"r", "n"}, {"n"}, set()]
    assert {entry.format.bits for name, entry in stages[0][1].blocks.items() if not name.endswith("z")} == {16}


def test_a_stage_that_changes_nothing_is_none(model):
    plan = wb.uniform(model, wb.BlockCirculant(4), 6, wb.calibrate(model, [X]))
    stages = wb.gradual(model, plan, stages=8, until=0.8).stages  # kept at least 1 - 0.75 (1 - (1 - n/8)^3)
    assert [next(iter(methods_of(p, "r"))) for _, p in stages] == [wb.Dense(), wb.BlockCirculant(2), wb.BlockCirculant(4)]
    assert [start for start, _ in stages] == pytest.approx([0, 0.3, 0.8])
    dense = wb.uniform(model, wb.Dense(), 6, wb.calibrate(model, [X]))
    assert wb.gradual(model, dense).stages == [(0.0, dense)]


def test_a_stage_holds_from_its_progress_on(model):
    schedule = wb.gradual(model, hybrid(model), stages=2, until=0.5)
    assert [schedule.step(p) for p in (0, 0.2, 0.25, 0.3, 0.25, 0.49, 0.5, 1)] == [
        False, False, True, False, False, False, True, False]
    late = wb.gradual(model, hybrid(model), stages=2)
    assert late.step(1.0) and late.entered == 2  # what lies between is left out


def test_steps_that_come_too_seldom_are_warned_of(model):
    """Once an epoch, of 4: until 0.25 all 8 stages lie between two steps, and until 1 every second one is passed over."""
    for until, distance in ((0.25, "0.0312"), (1.0, "0.125")):
        seldom = wb.gradual(model, hybrid(model), until=until)
        assert not seldom.step(0)
        with pytest.warns(UserWarning, match=f"passed over stages, .* they are {distance} of the training apart; call"):
            assert seldom.step(0.25)
    seldom = wb.admm(model, hybrid(model), until=1.0, updates=8)
    seldom.step(0)
    with pytest.warns(UserWarning, match="passed over updates, .* 0.125 of the training apart; .* ask for fewer updates"):
        seldom.step(0.25)
    often = wb.gradual(model, hybrid(model), until=1.0)
    assert [often.step(n / 8) for n in range(9)] == [False, *8 * [True]]


def test_admm_into_a_plan_of_what_is_free_anyway(model):
    dense = wb.uniform(model, wb.Dense(), 16, wb.calibrate(model, [X]))
    schedule = wb.admm(model, dense)
    assert not schedule.step(0) and not schedule.step(1) and schedule.penalty() == 0 and schedule.until == 0


def test_admm_by_hand():
    """Two features, one unit, keep one weight of two. W = (3, 1): Z = (3, 0), U = 0, |W - Z + U|^2 = 1. Then W = (1, 2) at the
    second update: Z = (0, 2) of W + U, U = (1, 0): 4. Then W = (1.5, 2), third: W + U = (2.5, 2), Z = (2.5, 0), U = (0, 2):
    |(-1, 4)|^2 = 17."""
    model = Regressor(1, 2)
    with torch.no_grad():
        for name, parameter in model.rnn.named_parameters():
            parameter.copy_(torch.tensor([3.0, 1]) if name == "weight_ih_l0" else torch.tensor(1.0))
    plan = wb.uniform(model, wb.TopK(0.5), 8, wb.calibrate(model, [torch.ones(2, 1, 2)]))
    schedule = wb.admm(model, plan, rho=0.5, updates=4, until=0.8)
    penalties = [schedule.penalty()]
    for progress, w in ((0, [3, 1]), (0.1, [3, 1]), (0.2, [1, 2]), (0.3, [1, 2]), (0.4, [1.5, 2])):
        with torch.no_grad():
            for gate in schedule.model.rnn.parametrizations.weight_ih_l0.parameters():
                gate.copy_(torch.tensor([w]))
        schedule.step(progress)
        penalties.append(schedule.penalty().item())
    assert penalties == [0, *(0.5 / 2 * 3 * square for square in (1, 1, 4, 4, 17))]
    loss = schedule.penalty()
    loss.backward()  # rho (W - Z + U) = 0.5 * (-1, 4)
    assert schedule.model.rnn.parametrizations.weight_ih_l0.original0.grad.tolist() == [[-0.5, 2]]
    assert schedule.step(0.8) and schedule.penalty() == 0
    assert schedule.model.rnn.weight_ih_l0.tolist() == [[0, 2]] * 3


# --- training


@every
@pytest.mark.parametrize("z", [wb.Structured(8), wb.LowRank(2)], ids=str)
def test_the_end_is_a_member_of_the_plan(model, make, z):
    plan = hybrid(model, z=z)
    schedule = make(model, plan)
    optimizer = torch.optim.AdamW(schedule.model.parameters(), 1e-2)
    first = loss_of(schedule.model).item()
    for step in range(30):
        schedule.step(step / 30, optimizer)
        optimizer.zero_grad()
        with parametrize.cached():
            loss = loss_of(schedule.model)
        (loss + schedule.penalty()).backward()
        optimizer.step()
    assert loss_of(schedule.model).item() < first / 2 and schedule.plan == plan
    packed = wb.pack(schedule.model, plan)
    for name, entry in plan.blocks.items():
        step = 2.0 ** -(entry.format.frac * getattr(entry.method, "factors", 1))
        assert torch.equal(torch.from_numpy(packed.blocks[name].dense() * step).float(), weight(schedule.model, name)), name
    constrained = wb.compress(model, plan)
    assert {n: p.shape for n, p in schedule.model.named_parameters()} == {n: p.shape for n, p in constrained.named_parameters()}
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Regressor().parameters(), strict=True))  # left alone


def test_ten_lines_of_a_loop_of_one_s_own(model):
    plan = hybrid(model)
    # --- the loop
    schedule = wb.gradual(model, plan, until=0.5)
    optimizer = torch.optim.Adam(schedule.model.parameters(), lr=1e-2)
    for epoch in range(20):
        schedule.step(epoch / 20, optimizer)
        optimizer.zero_grad()
        with parametrize.cached():
            loss = loss_of(schedule.model) + schedule.penalty()
        loss.backward()
        optimizer.step()
    # ---
    assert schedule.entered == 8 and wb.pack(schedule.model, plan).cr_disk > 10 and loss.item() < 0.1


def test_the_optimizer_goes_on_with_the_new_parameters(model):
    schedule = wb.gradual(model, hybrid(model), stages=1, until=0.5)
    rnn, head = schedule.model.rnn, schedule.model.head
    recurrent = list(rnn.parameters())
    biases = [rnn.bias_ih_l0, rnn.bias_hh_l0]
    optimizer = torch.optim.AdamW([{"params": recurrent, "lr": 0.01}, {"params": head.parameters(), "lr": 0.1}])
    rates = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def train():
        optimizer.zero_grad()
        loss_of(schedule.model).backward()
        optimizer.step()
        rates.step()

    train()
    moment = optimizer.state[head.weight]["exp_avg"].clone()
    assert schedule.step(0.5, optimizer)
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert held == [{id(p) for p in m.parameters()} for m in (rnn, head)]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 10
    assert set(optimizer.state) == {*biases, *head.parameters()}  # old weights are forgotten
    assert torch.equal(optimizer.state[head.weight]["exp_avg"], moment)
    before = [p.detach().clone() for p in schedule.model.parameters()]
    train()
    assert all(not torch.equal(p, b) for p, b in zip(schedule.model.parameters(), before, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.025]


@pytest.mark.parametrize("handed", [False, True])
def test_an_optimizer_that_holds_the_weights_of_before_is_warned_of(model, handed):
    schedule = wb.gradual(model, hybrid(model), stages=2, until=0.5)
    optimizer, warned = torch.optim.SGD(schedule.model.parameters(), 0.1), []
    for n in range(6):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedule.step(n / 6, optimizer if handed else None)
        warned += [(n, str(warning.message)) for warning in caught]
        optimizer.zero_grad()
        loss_of(schedule.model).backward()
        optimizer.step()
    assert schedule.entered == 2
    assert [n for n, _ in warned] == ([] if handed else [3, 4])  # a step after each stage, once
    assert all("none has moved since its stage began" in text for _, text in warned)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.LSTM(16, 8), nn.GRU(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.second(self.first(x)[0])[0][-1])


@pytest.mark.parametrize(("handed", "remade"), [("ab", ""), ("ba", ""), ("a", ""), ("", "a"), ("", "ab"), ("a", "b")])
def test_several_optimizers_are_brought_along_or_warned_of(handed, remade):
    torch.manual_seed(0)
    model = Two()
    schedule = wb.gradual(model, wb.uniform(model, wb.TopK(0.4), 8, wb.calibrate(model, [X])), stages=2, until=0.5)
    first, second, head = schedule.model.first, schedule.model.second, schedule.model.head
    make = {"a": lambda: torch.optim.Adam(first.parameters(), 0.01),
            "b": lambda: torch.optim.Adam([*second.parameters(), *head.parameters()], 0.01)}
    optimizers = {name: made() for name, made in make.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(20):
            new = [schedule.step(n / 20, optimizers[name]) for name in handed] or [schedule.step(n / 20)]
            optimizers |= {name: make[name]() for name in (remade if any(new) else "")}
            schedule.model.zero_grad()
            loss_of(schedule.model).backward()
            for optimizer in optimizers.values():
                optimizer.step()
    live, held = ({id(p) for p in found} for found in (
        schedule.model.parameters(), [p for o in optimizers.values() for group in o.param_groups for p in group["params"]]))
    warned = [str(warning.message) for warning in caught]
    if set(handed + remade) == {"a", "b"}:
        assert held == live and not warned
        assert sum(len(optimizer.state) for optimizer in optimizers.values()) == len(live)
    else:
        assert len(warned) == 2 and held != live
        assert all("and 6 of 14, first second.weight_ih_l0.r, not one has moved since" in text for text in warned)


@pytest.mark.parametrize("skipped", [False, True])
def test_weights_that_no_optimizer_ever_held_are_not_warned_of(skipped):
    """Nor those whose optimizer was handed over and waits, as a GradScaler makes it."""
    torch.manual_seed(0)
    model = Two()
    schedule = wb.gradual(model, wb.uniform(model, wb.TopK(0.4), 8, wb.calibrate(model, [X])), stages=2, until=0.5)
    optimizer = torch.optim.Adam(schedule.model.first.parameters(), 0.01)
    for n in range(20):
        schedule.step(n / 20, optimizer)
        loss_of(schedule.model).backward()
        if not skipped or n < 3:
            optimizer.step()
    assert schedule.entered == 2


def test_an_optimizer_that_comes_late_is_brought_along_from_any_stage():
    torch.manual_seed(0)
    model = Two()
    schedule = wb.gradual(model, wb.uniform(model, wb.TopK(0.4), 8, wb.calibrate(model, [X])), stages=2, until=0.5)
    first, late = (torch.optim.Adam(part.parameters()) for part in (schedule.model.first, schedule.model.second))
    for progress in (0.0, 0.3, 0.5):
        schedule.step(progress, first)
    assert schedule.entered == 2 and not schedule.step(0.5, late)
    assert {id(p) for p in late.param_groups[0]["params"]} == {id(p) for p in schedule.model.second.parameters()}


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.9])
def test_an_admm_schedule_is_resumed_from_every_place(model, progress):
    schedule, again, other = (wb.admm(model, hybrid(model)) for _ in range(3))
    fresh = schedule.state_dict()
    schedule.step(progress)
    again.resume(progress, None, state := schedule.state_dict())
    assert again.entered == schedule.entered == (progress > 0.25)
    assert {name: w.tolist() for name, w in again.state_dict().items()} == {name: w.tolist() for name, w in state.items()}
    other.resume(0.0, None, fresh)
    assert other.updated == 0 and other.penalty() == 0.0
    for wrong in (None, {}, {"z/rnn.weight_ih_l0.r": torch.zeros(1)}, state | {"w": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"ADMM schedule is resumed with what state_dict\(\) gave for a model of the same"):
            wb.admm(model, hybrid(model)).resume(progress, None, wrong)


@pytest.mark.parametrize("handed", [False, True])
def test_weights_that_wait_for_their_step_are_not_warned_of(model, handed):
    """Gradients of four batches are added up before each step, of 800; the optimizer is handed over, or made anew."""
    schedule = wb.gradual(model, hybrid(model), stages=2, until=0.5)
    optimizer = torch.optim.SGD(schedule.model.parameters(), 0.1)
    for n in (*range(6), *range(200, 206), *range(400, 406), *range(420, 426)):
        if schedule.step(n / 800, optimizer if handed else None) and not handed:
            optimizer = torch.optim.SGD(schedule.model.parameters(), 0.1)
        loss_of(schedule.model).backward()
        if n % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert schedule.entered == 2


def test_frozen_weights_stay_out_of_the_optimizer(model):
    schedule = wb.gradual(model, hybrid(model), stages=1)
    ih = list(schedule.model.rnn.parametrizations.weight_ih_l0.parameters())
    optimizer = torch.optim.SGD([*ih, *schedule.model.head.parameters()], 0.1)
    schedule.step(0.5, optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    kept = [*schedule.model.rnn.parametrizations.weight_ih_l0.parameters(), *schedule.model.head.parameters()]
    assert held == {id(p) for p in kept}


@pytest.mark.parametrize("name", ["gradual", "ADMM"])
def test_fit_follows_a_schedule_and_resumes_within_it(tiny_task, tmp_path, name):
    dense = wb.build_classifier(tiny_task, 16, seed=0)
    signals = wb.calibrate(dense, [(torch.randn(2, 4, 3), torch.tensor([4, 4]))])
    plan = wb.uniform(dense, wb.BlockCirculant(8), 8, signals)

    def trained(**settings):
        schedule = SCHEDULES[name](dense, plan)
        history = wb.fit(schedule.model, tiny_task, seed=1, epochs=4, retraining=schedule, progress=False,
                         teacher=dense, **settings)
        return schedule, history

    whole, history = trained()
    assert whole.entered == len(whole.stages) - 1 and history.best_epoch == 4  # of epochs 3 and 4 only 4 ends behind 0.75
    assert all(torch.equal(weight(whole.model, n), e.method.project(weight(whole.model, n))) for n, e in plan.blocks.items())

    class Stop(Exception):
        pass

    def after_the_first(row):
        if row["epoch"] == 1:
            raise Stop

    path = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        trained(checkpoint=path, on_epoch=after_the_first)
    resumed, again = trained(checkpoint=path)
    found, _ = trained(checkpoint=path)  # finished
    for other in (resumed, found):
        assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), other.model.parameters(), strict=True))
    assert [row["valid_loss"] for row in again.epochs] == [row["valid_loss"] for row in history.epochs]
    with pytest.raises(ValueError, match="checkpoint of another training. (model: .*)?retraining: "):
        other = wb.gradual(dense, plan, stages=2)
        wb.fit(other.model, tiny_task, seed=1, epochs=4, retraining=other, progress=False, teacher=dense, checkpoint=path)


class Contrary(nn.Module):
    """A teacher that says the opposite of the labels: what lies above 0 on average goes down."""

    def forward(self, x, lengths):
        above = 4 * x.sum((1, 2)) / lengths
        return torch.stack([above, -above], 1)


@every
def test_a_teacher_is_followed_under_every_schedule(tiny_task, make):
    """At weight 1 the labels do not matter, at weight 0 the teacher does not."""
    dense = wb.build_classifier(tiny_task, 16, seed=0, cell="GRU")
    methods = {"n": wb.TopK(0.25), "r": wb.BlockCirculant(8), "z": wb.Structured(4)}
    plan = Plan({name: plan_block(weight(dense, name), methods[block.gate], 8) for name, block in blocks(dense).items()},
                wb.calibrate(dense, [(torch.randn(2, 4, 3), torch.tensor([4, 4]))]))
    train = tiny_task.splits["train"]
    swapped = replace(tiny_task, splits=tiny_task.splits | {"train": replace(train, labels=1 - train.labels)})

    def trained(task, **settings):
        schedule = make(dense, plan)
        wb.fit(schedule.model, task, seed=1, epochs=8, lr=2e-2, select_after=0.9, retraining=schedule, progress=False,
               **settings)
        assert wb.pack(schedule.model, plan).cr_disk > 5
        return schedule.model

    def same(one, other):
        return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))

    def accuracy(model):
        return wb.evaluate(model, tiny_task, "train").accuracy

    taught, ignoring, mixed = (trained(tiny_task, teacher=Contrary(), distillation_weight=share) for share in (1.0, 0.0, 0.5))
    assert same(taught, trained(swapped, teacher=Contrary(), distillation_weight=1.0))
    assert same(ignoring, trained(tiny_task)) and not same(ignoring, trained(swapped))
    assert accuracy(taught) < 20 and accuracy(ignoring) > 80
    assert not same(mixed, taught) and not same(mixed, ignoring)


def test_fit_refuses_schedules_that_do_not_fit(tiny_task):
    dense = wb.build_classifier(tiny_task, 16, seed=0)
    signals = wb.calibrate(dense, [(torch.randn(2, 4, 3), torch.tensor([4, 4]))])
    plan = wb.uniform(dense, wb.TopK(0.5), 8, signals)
    with pytest.raises(ValueError, match="fresh retraining schedule of the model that it trains, got a used one or that of an"):
        wb.fit(dense, tiny_task, seed=0, retraining=wb.one_shot(dense, plan))
    used = wb.gradual(dense, plan)
    used.step(0.5)
    with pytest.raises(ValueError, match="fresh retraining schedule"):
        wb.fit(used.model, tiny_task, seed=0, retraining=used)
    late = wb.gradual(dense, plan, until=0.8)
    with pytest.raises(ValueError, match="done after select_after, 0.75 of the steps, got one until 0.8"):
        wb.fit(late.model, tiny_task, seed=0, retraining=late)


def test_a_stage_is_not_entered_inside_cached(model):
    """It would set the weights back to those of the forward before."""
    schedule = wb.gradual(model, hybrid(model), stages=4, until=0.5)
    with parametrize.cached():
        loss_of(schedule.model)
        with pytest.raises(ValueError, match="cannot be copied or constrained anew inside torch.nn.utils"):
            schedule.step(0.3)
    assert schedule.step(0.3)


def test_a_stage_that_cannot_be_entered_leaves_the_model_as_it_is(model):
    schedule = wb.gradual(model, hybrid(model), stages=4, until=0.5)
    before = {name: p.clone() for name, p in schedule.model.state_dict().items()}
    with torch.inference_mode(), pytest.raises(ValueError, match="call step outside of torch.inference_mode"):
        schedule.step(0.3)
    stored = next(schedule.model.rnn.parametrizations.weight_ih_l0.parameters())
    kept = stored.detach().clone()
    with torch.no_grad():
        stored.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="needs finite weights to enter a stage, got others in rnn.weight_ih_l0.r"):
        schedule.step(0.3)
    with torch.no_grad():
        stored.copy_(kept)
    assert schedule.entered == 0 and all(torch.equal(p, before[name]) for name, p in schedule.model.state_dict().items())
    assert schedule.step(0.3)


def test_frozen_recurrent_weights_need_no_optimizer_that_holds_them(model):
    model.rnn.requires_grad_(False)
    schedule = wb.gradual(model, hybrid(model), stages=4, until=0.5)
    assert schedule.step(0.3, torch.optim.SGD(schedule.model.head.parameters(), 0.1))


def test_a_step_without_gradients_leaves_every_weight_trainable(model):
    schedule = wb.gradual(model, hybrid(model), stages=4, until=0.5)
    names = [name for name, _ in schedule.model.named_parameters()]
    optimizer = torch.optim.SGD(schedule.model.parameters(), 0.1)
    with torch.no_grad():
        assert schedule.step(0.3, optimizer)
    assert [name for name, p in schedule.model.named_parameters() if p.requires_grad] == names
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, schedule.model.parameters()))


# --- messages


@pytest.mark.parametrize(("make", "message"), [
    (lambda m, p: wb.gradual(m, p, stages=0), "gradual needs a whole number of stages of at least 1, got 0"),
    (lambda m, p: wb.gradual(m, p, until=0), r"gradual needs until in \(0, 1\], got 0"),
    (lambda m, p: wb.iterative(m, p, [["r", "z"], ["n"]], until=1.5), r"iterative needs until in \(0, 1\], got 1.5"),
    (lambda m, p: wb.iterative(m, p, [["r", "z", "n"]]), "every gate of r, z, n in one of at least two groups, got"),
    (lambda m, p: wb.iterative(m, p, [["r"], ["z"]]), r"at least two groups, got \[\['r'\], \['z'\]\]"),
    (lambda m, p: wb.iterative(m, p, [["r", "n"], ["z", "n"]]), "every gate of r, z, n in one of at least two"),
    (lambda m, p: wb.iterative(m, p, None), "iterative needs a list of groups, each a list of gates, got None"),
    (lambda m, p: wb.iterative(m, p, ["rz", "n"]), r"a list of groups, each a list of gates, got \['rz', 'n'\]"),
    (lambda m, p: wb.admm(m, p, rho=0), "admm needs a rho above 0, got 0"),
    (lambda m, p: wb.admm(m, p, updates=2.5), "admm needs a whole number of updates of at least 1, got 2.5"),
    (lambda m, p: wb.admm(m, p, until=True), r"admm needs until in \(0, 1\], got True"),
    (lambda m, p: wb.one_shot(m, replace(p, blocks={})), "the plan misses the blocks"),
    (lambda m, p: wb.gradual(m, replace(p, blocks={})), "the plan misses the blocks"),
    (lambda m, p: wb.iterative(m, p, [["r", "z"], 3]), r"a list of groups, each a list of gates, got \[\['r', 'z'\], 3\]"),
    (lambda m, p: wb.one_shot(m, p).step(1.5), r"needs a progress in \[0, 1\], got 1.5"),
    (lambda m, p: wb.one_shot(m, p).step("half"), r"needs a progress in \[0, 1\], got 'half'"),
    (lambda m, p: wb.one_shot(m, p).step(0.5, "adam"), r"Optimizer or none, of several each in a call of its own, got 'adam'"),
    (lambda m, p: wb.one_shot(m, p).step(True), r"needs a progress in \[0, 1\], got True"),
    (lambda m, p: wb.gradual(m, p).step(0.5, torch.optim.SGD(m.parameters(), 1)),
     "needs an optimizer of its model's parameters, got one that holds none of the recurrent weights"),
    (lambda m, p: wb.one_shot(m, p).step(0, torch.optim.SGD(m.parameters(), 1)),
     "needs an optimizer of its model's parameters, got one that holds none of the recurrent weights"),
    (lambda m, p: wb.iterative(m, p, [["r", None], ["z", "n"]]), "every gate of r, z, n in one of at least two groups, got"),
    (lambda m, p: (late := wb.gradual(m, p)).step(0, torch.optim.LBFGS(late.model.parameters())),
     "cannot exchange parameters inside LBFGS, which keeps lists of its own: call step without it, and make it anew"),
])  # fmt: skip
def test_messages(model, make, message):
    with pytest.raises(ValueError, match=message):
        make(model, hybrid(model))
