"""Retraining schedules: on which way a model comes into the set of its plan while it is retrained.

One small object for any training loop: `step(progress, optimizer)` before every step or every epoch of it, and
`loss + penalty()`. What it trains is always a member of a plan: a stage is a plan of its own, the last one is the user's.
"""

import hashlib
import json
import math
import numbers
import warnings
import weakref
from bisect import bisect_right
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from workbench.budget import keeps_a_share, kept_share, strongest_member
from workbench.checks import check_whole
from workbench.constrain import compress, constrain_weights, make_plain
from workbench.gates import blocks, parameters_of, rnns, weight, weights
from workbench.methods import Dense, Method
from workbench.plan import Plan, plan_block

WAITING_BITS = 16  # of a block whose turn has not come
WATCHED = 0.02  # share of a retraining after which weights that have gradients should have moved
UNTIL = 0.25  # share of a retraining after which the model is in its plan, where nothing else is asked for


class RetrainingSchedule:
    """model: what is to be trained, always the same object; stages: (progress from which it holds, Plan), the first at 0.

    Entering a stage compresses the model again, in place: its recurrent weights get other parameters. An optimizer that was
    made before holds the old ones and would train nothing, so `step` exchanges them there, in each of several that it is called
    with; their moments start anew, its learning rate, its other parameters and a learning rate schedule on it go on. An
    optimizer that goes on without that is warned of at a later step.
    """

    def __init__(self, model: nn.Module, stages: list[tuple[float, Plan]]):
        # One that changes nothing would only cost the optimizer its moments.
        self.stages = [stage for n, stage in enumerate(stages) if not n or stage[1] != stages[n - 1][1]]
        self.entered, self.begun = 0, False
        self.model = compress(model, stages[0][1])
        for _, plan in self.stages[1:]:
            plan.check(self.model)
        self.former = []  # of each stage before: weak references to its parameters
        self.handed, self.held = set(), set()  # ids of optimizers of this stage, and places of the parameters that they hold
        self.trained = set()  # places, in _parameters, of those that have moved in some stage
        self._begin(0.0)

    def _begin(self, progress):
        """Remember the parameters as a stage began, until they are looked at."""
        self.fresh = (progress, [p.detach().clone() for p in _parameters(self.model)]) if len(self.stages) > 1 else None

    @property
    def plan(self) -> Plan:
        """Of the last stage."""
        return self.stages[-1][1]

    @property
    def until(self) -> float:
        """Progress from which the model is in the set of its plan and stays there."""
        return self.stages[-1][0]

    @property
    def digest(self) -> str:
        """What tells this schedule from others."""
        about = [[start, plan.to_json()] for start, plan in self.stages] + self._settings()
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    def _settings(self) -> list:
        return []

    def step(self, progress: float, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Be where the schedule is at `progress`, from 0 at the start of the training to 1 at its end. True where the
        recurrent weights have new parameters: without an optimizer here the caller must make his anew. Of several optimizers
        each is handed over in a call of its own. Not inside torch.nn.utils.parametrize.cached(), and not between backward
        passes whose gradients add up: those of parameters that are replaced are lost.

        Where it comes too seldom a stage is passed over, with a warning (of the first call it is no sign of that); a loop whose
        last step comes before `until` ends with step(1.0)."""
        if isinstance(progress, bool) or not isinstance(progress, numbers.Real) or not 0 <= progress <= 1:
            raise ValueError(f"a retraining schedule needs a progress in [0, 1], got {progress!r}")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError("a retraining schedule needs a torch.optim.Optimizer or none, of several each in a call of its "
                             f"own, got {optimizer!r}")
        if isinstance(optimizer, torch.optim.LBFGS) and len(self.stages) > 1:
            raise ValueError("a retraining schedule cannot exchange parameters inside LBFGS, which keeps lists of its own: "
                             "call step without it, and make it anew where that gives True")
        if torch.is_inference_mode_enabled():
            raise ValueError("a retraining schedule makes parameters that are trained: call step outside of "
                             "torch.inference_mode()")
        starts = [start for start, _ in self.stages]
        stage = bisect_right(starts, progress) - 1
        entering, passed_over = stage > self.entered, self.begun and stage > self.entered + 1
        handing = optimizer is not None and (entering or id(optimizer) not in self.handed)
        if entering or handing:
            old = _parameters(self.model)
            former = [*self.former, [weakref.ref(p) for p in old]]
            if handing and any(p.requires_grad for p in old) and not _held(optimizer, former):
                raise ValueError("a retraining schedule needs an optimizer of its model's parameters, got one that holds none "
                                 "of the recurrent weights: make it from schedule.model.parameters()")
        if entering and (odd := [name for name, w in weights(self.model).items() if not w.isfinite().all()]):
            raise ValueError(f"a retraining schedule needs finite weights to enter a stage, got others in {', '.join(odd)}")
        self._warn_untrained(progress)
        if entering:
            make_plain(self.model)
            constrain_weights(self.model, self.stages[stage][1])
            self.entered, self.former = stage, former
            self.handed, self.held = set(), set()
            self._begin(progress)
        if handing:
            new = _parameters(self.model)
            _exchange(optimizer, _held(optimizer, self.former), new)
            self.handed.add(id(optimizer))
            ids = _ids(optimizer)
            self.held |= {n for n, p in enumerate(new) if id(p) in ids}
        self.begun = True
        if passed_over:
            _warn_passed_over("stages", min(b - a for a, b in pairwise(starts)))
        return entering

    def _warn_untrained(self, progress):
        if self.fresh is None or progress < self.fresh[0] + WATCHED:
            return
        now = _parameters(self.model)
        pulled = {n for n, p in enumerate(now) if p.grad is not None and p.grad.any()}
        if not pulled:
            return
        moved = {n for n, old in enumerate(self.fresh[1]) if not torch.equal(old.to(now[n].device), now[n])}
        # What never moved may be kept out of every optimizer on purpose, unless nothing did and none was handed over.
        left = (pulled & self.trained if moved or self.held else pulled) - moved - self.held
        if self.entered and left:
            names = list(blocks(self.model))
            which = "none" if not moved else f"{len(left)} of {len(now)}, first {names[min(left)]}, not one"
            warnings.warn(f"a retraining schedule's recurrent weights have gradients, and {which} has moved since its stage "
                          "began: an optimizer that lives on holds those of before; hand it to step(progress, optimizer), each "
                          "of several in a call of its own, or make it anew where step gives True", stacklevel=3)
        self.trained |= moved
        self.fresh = None

    def penalty(self) -> torch.Tensor | float:
        """To be added to the loss."""
        return 0.0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What `resume` needs beside the model and the optimizer."""
        return {}

    def resume(self, progress: float, optimizer, state: dict[str, torch.Tensor]) -> None:
        """Be where an interrupted training stood after its step at `progress`, so that states of the model and of the
        optimizer fit; self is fresh."""
        RetrainingSchedule.step(self, progress, optimizer)


def _warn_passed_over(what, distance):
    warnings.warn(f"a retraining schedule passed over {what}, as step came too seldom for them: they are {distance:.3g} of the "
                  f"training apart; call step more often, or ask for fewer {what}", stacklevel=3)


def _parameters(model) -> list[nn.Parameter]:
    """The parameters that are trained for the recurrent weights, one a block, always in the same order."""
    return [p for rnn in rnns(model).values() for name in parameters_of(rnn) for p in rnn.parametrizations[name].parameters()]


def _ids(optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _held(optimizer, former) -> dict[int, int]:
    """id of a parameter of an earlier stage that the optimizer holds -> its place in _parameters. former: weak references."""
    ids = _ids(optimizer)
    return {id(p): n for stage in former for n, ref in enumerate(stage) if (p := ref()) is not None and id(p) in ids}


def _exchange(optimizer, held, new) -> None:
    """Each new parameter in the place of that of an earlier stage (_held)."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in held:
                optimizer.state.pop(p, None)
        group["params"] = [new[held[id(p)]] if id(p) in held else p for p in group["params"]]


def one_shot(model: nn.Module, plan) -> RetrainingSchedule:
    """The whole plan at once."""
    return RetrainingSchedule(model, [(0.0, Plan.read(plan))])


def gradual(model: nn.Module, plan, *, stages: int = 8, until: float = UNTIL) -> RetrainingSchedule:
    """Strengths rise in that many stages at equal distances, from every weight kept at 0 to the plan's at `until`.

    The cubic schedule of Zhu and Gupta 2017 (arXiv 1710.01878): at stage n of N the share that is not kept is
    s (1 - (1 - n / N)^3), s that of the plan. Of a method with a float field `keep` that is what is kept; of any other one the
    values that it stores: its family's member of fewest that still stores so many, so that the block of a circulant method
    (and the period of a structured one) doubles and the rank of a low-rank one falls. Until a member stores less than every
    weight the block is dense, in the plan's width.
    """
    plan = Plan.read(plan)
    stages = check_whole("gradual", "number of stages", stages, 1)
    _check_until("gradual", until)
    plan.check(model)
    final = {name: kept_share([w], plan.blocks[name].method) for name, w in weights(model).items()}
    found = []
    for n in range(stages):
        done = 1 - (1 - n / stages) ** 3
        planned = {}
        for name, entry in plan.blocks.items():
            w = weight(model, name)
            method = milder(entry.method, w, 1 - (1 - final[name]) * done)
            planned[name] = entry if method == entry.method else plan_block(w, method, entry.format.bits)
        found.append((n * until / stages, replace(plan, blocks=planned)))
    return RetrainingSchedule(model, [*found, (until, plan)])


def iterative(model: nn.Module, plan, groups: list[list[str]], *, until: float = UNTIL) -> RetrainingSchedule:
    """Some gates, retrain, the next ones (HIC, DOI 10.1109/TCSI.2021.3091318): the first group of gates is compressed at 0,
    the last one at `until`, the others in equal distances between; until then a block is dense in 16 bits."""
    plan = Plan.read(plan)
    _check_until("iterative", until)
    plan.check(model)
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in groups):
        raise ValueError(f"iterative needs a list of groups, each a list of gates, got {groups!r}")
    known = {name: block.gate for name, block in blocks(model).items()}
    named = [gate for group in groups for gate in group]
    if len(groups) < 2 or not all(groups) or sorted(map(str, named)) != sorted(set(known.values())):
        gates = ", ".join(dict.fromkeys(known.values()))
        raise ValueError(f"iterative needs every gate of {gates} in one of at least two groups, got {groups}")
    waiting = {name: plan_block(w, Dense(), WAITING_BITS) for name, w in weights(model).items()}
    found = []
    for n in range(len(groups)):
        turn = {gate for group in groups[: n + 1] for gate in group}
        planned = {name: entry if known[name] in turn else waiting[name] for name, entry in plan.blocks.items()}
        found.append((n * until / (len(groups) - 1), replace(plan, blocks=planned)))
    return RetrainingSchedule(model, found)


def admm(model: nn.Module, plan, *, rho: float = 1e-2, updates: int = 10, until: float = UNTIL) -> RetrainingSchedule:
    """The weights W are free until `until` and drawn towards the plan's set by the alternating direction method of
    multipliers, then projected onto it and retrained there (E-RNN, arXiv 1812.07106).

    penalty is rho / 2 |W - Z + U|^2, summed over the blocks. `updates` times, at equal distances from 0 on, Z becomes the
    plan's projection of W + U, and U grows by W - Z (from zero; at 0 it stays zero); once for all that fall between two steps
    of the loop. Free blocks are dense in 16 bits.
    """
    plan = Plan.read(plan)
    updates = check_whole("admm", "number of updates", updates, 1)
    _check_until("admm", until)
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 < rho < math.inf:
        raise ValueError(f"admm needs a rho above 0, got {rho!r}")
    plan.check(model)
    free = {name: plan_block(w, Dense(), WAITING_BITS) for name, w in weights(model).items()}
    return _Admm(model, [(0.0, replace(plan, blocks=free)), (until, plan)], rho, updates)


def _check_until(who, until):
    if isinstance(until, bool) or not isinstance(until, (int, float)) or not 0 < until <= 1:
        raise ValueError(f"{who} needs until in (0, 1], got {until!r}")


class _Admm(RetrainingSchedule):
    """z, u: block -> (out, in)."""

    def __init__(self, model, stages, rho, updates):
        super().__init__(model, stages)
        self.rho, self.updates, self.updated, self.z, self.u = rho, updates, 0, {}, {}

    def _settings(self):
        return [self.rho, self.updates]

    def step(self, progress, optimizer=None):
        if super().step(progress, optimizer):
            return True
        if len(self.stages) > 1 and self.entered == 0 and (
                due := 1 + math.floor(progress / self.until * self.updates)) > self.updated:
            if self.updated and due > self.updated + 1:
                _warn_passed_over("updates", self.until / self.updates)
            first, self.updated = not self.updated, due
            for name, w in weights(self.model).items():
                u = torch.zeros_like(w) if first else self.u[name]
                self.z[name] = self.plan.blocks[name].method.project(w + u)
                self.u[name] = u if first else u + w - self.z[name]
        return False

    def penalty(self):
        if self.entered or not self.z:
            return 0.0
        total = 0.0
        for block in blocks(self.model).values():
            w = getattr(self.model.get_submodule(block.rnn), block.parameter)[block.rows]
            total = total + (w - self.z[block.name] + self.u[block.name]).square().sum()
        return self.rho / 2 * total

    def state_dict(self):
        return {"updated": torch.tensor(self.updated)} | {
            f"{part}/{name}": w for part, ws in (("z", self.z), ("u", self.u)) for name, w in ws.items()}

    def resume(self, progress, optimizer, state):
        known = weights(self.model)
        parts = [f"{part}/{name}" for part in ("z", "u") for name in known]
        if set(state or ()) not in ({"updated"}, {"updated", *parts}):
            raise ValueError("an ADMM schedule is resumed with what state_dict() gave for a model of the same blocks, got "
                             f"{', '.join(map(str, state or ())) or 'nothing'}")
        super().resume(progress, optimizer, state)
        self.updated = int(state["updated"])
        for name, w in known.items() if len(state) > 1 else ():
            self.z[name], self.u[name] = state[f"z/{name}"].to(w), state[f"u/{name}"].to(w)


def milder(method: Method, w: torch.Tensor, kept: float) -> Method:
    """The strongest of the method's family, at most as strong as itself, that keeps at least the share `kept` of the (out, in)
    block; Dense where that is every weight."""
    if keeps_a_share(method):
        return Dense() if kept >= 1 else replace(method, keep=max(kept, method.keep))
    if kept <= kept_share([w], method):
        return method
    found = strongest_member(type(method).ladder([tuple(w.shape)]), [w], kept)
    return Dense() if found is None or kept_share([w], found) >= 1 else found
