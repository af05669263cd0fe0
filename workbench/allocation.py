"""Budget allocation: a method and a width for every block, by measured sensitivity, within bytes, a loss or cycles."""

import math
import numbers
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from workbench.array.mapping import map_block
from workbench.array.spec import ArraySpec
from workbench.budget import OutOfReach, check_target, full_block, pack_within_reach, strongest_member, uniform_plan
from workbench.gates import blocks, dense_weights, weight, weights
from workbench.methods import METHODS, Method, method_from_label
from workbench.plan import Plan, plan_block
from workbench.quantise import calibrate
from workbench.sensitivity import Loop, batches_of, check_place, outcome, retraining_curve
from workbench.tasks import LanguageTask, Task

MOST_UNITS = 1_000_000  # of a budget that are told apart
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)  # of the weights that a choice to be measured stores


@dataclass(frozen=True)
class Allocation:
    """plan: what was chosen. table: one row per block and measured choice, with the columns block, method, bits (of a weight),
    bytes (with every kept weight non-zero), cycles (where an array was given), excess_loss (as measured), predicted_loss (what
    the choice was made by), chosen. budget: what there was of `cost`, "bytes", "cycles" or "predicted_loss"."""

    plan: Plan
    table: pd.DataFrame
    cost: str
    budget: float

    @property
    def chosen(self) -> pd.DataFrame:
        """The chosen row of every block."""
        return self.table[self.table["chosen"]].drop(columns="chosen").reset_index(drop=True)

    def explain(self) -> pd.DataFrame:
        """The choice, for the eye: the chosen row of every block, beside it the alternative of least loss per unit of the cost
        that it saves (saves, for_loss) and that of most gain per unit that it takes more (takes, for_gain). To check: what an
        alternative takes more must come from what is left of the budget and from what another block saves, and where blocks
        are free to choose no such exchange gains more than it loses. The last row sums up; its `method` is the budget."""
        cost = "bytes" if self.cost == "predicted_loss" else self.cost
        rows = []
        for row in self.chosen.to_dict("records"):
            others = self.table[self.table["block"] == row["block"]]
            saved, lost = row[cost] - others[cost], others["predicted_loss"] - row["predicted_loss"]
            less, more = (lost / saved)[saved > 0], (lost / saved)[(saved < 0) & (lost < 0)]
            row |= {"saves": saved[less.idxmin()], "for_loss": lost[less.idxmin()]} if len(less) else {}
            row |= {"takes": -saved[more.idxmax()], "for_gain": -lost[more.idxmax()]} if len(more) else {}
            rows.append(row)
        frame = pd.DataFrame(rows, columns=[*self.chosen.columns, "saves", "for_loss", "takes", "for_gain"])
        total = {name: frame[name].sum() for name in ("bytes", "cycles", "excess_loss", "predicted_loss") if name in frame}
        total |= {"block": "all", "method": f"{self.cost} of at most {self.budget:g}"}
        return pd.concat([frame, pd.DataFrame([total])], ignore_index=True)[frame.columns]


def choices_to_measure(model: torch.nn.Module, families=None) -> list[Method]:
    """Members of each family that store about 1/2, 1/4, ... 1/64 of the weights: what sensitivity_table may measure for an
    allocation at any ratio. families: of METHODS, all by default."""
    ws = list(weights(model).values())
    found = {}
    for family in METHODS.values() if families is None else families:
        members = family.ladder([tuple(w.shape) for w in ws])
        for share in SHARES:
            if (member := strongest_member(members, ws, share)) is not None:
                found[member] = None
    return list(found)


def allocate(model: torch.nn.Module, table: pd.DataFrame, target_cr_disk: float | None = None, signals=None, *,
             target_bytes: int | None = None, most_loss: float | None = None, most_cycles: float | None = None,
             array: ArraySpec | None = None, sensitive: list[str] | None = None) -> Allocation:
    """The choices of least predicted loss, summed over the blocks, within one budget.

    The budget is one of: target_cr_disk; target_bytes, of all blocks; most_cycles, the sum of what each block takes alone on
    the whole `array` (block_cycles), in a time step; or most_loss, predicted: then the bytes are what is least. table: as
    sensitivity_table gives it, over any methods and widths; several seeds count by their mean. Blocks are taken to add up, in
    loss, bytes and cycles. Within a block and a method a larger choice is never predicted worse than a smaller one (what
    would be is measurement noise): it gets the largest loss measured at its size or above. The best sum is found by a dynamic
    programme, exact up to a millionth of the budget. Of equal ones the cheaper is taken. signals: of the plan.

    sensitive: gates; then the rule of two classes (Wu 2026) instead: all blocks of these gates share one measured choice of
    TopK, all others one of BlockCirculant. ValueError for a table of other blocks, OutOfReach where nothing is within the
    budget.
    """
    known, asked = blocks(model), {"target_cr_disk": target_cr_disk, "target_bytes": target_bytes, "most_loss": most_loss,
                                   "most_cycles": most_cycles}
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) != 1:
        raise ValueError("allocate needs one of target_cr_disk, target_bytes, most_loss and most_cycles, got "
                         + (" and ".join(asked) or "none"))
    if signals is None:
        raise ValueError("allocate needs the signals of the plan, as calibrate gives them")
    if unknown := set(table["block"]) ^ set(known):
        raise ValueError(f"allocate needs a table of every block of the model, these differ: {', '.join(sorted(unknown))}")
    ((name, value),) = asked.items()
    cost, budget = _budget(name, value, known, array)
    choices = _choices(model, table, array)
    options = _classes(choices, known, sensitive) if sensitive is not None else [
        [[row] for row in choices.index[choices["block"] == block]] for block in known]
    sizes, losses = choices["bytes" if cost == "predicted_loss" else cost], choices["predicted_loss"]
    groups = [tuple(np.array([values[rows].sum() for rows in group]) for values in (sizes, losses)) for group in options]
    reach = sum(int(size.max()) for size, _ in groups) if cost == "predicted_loss" else int(budget)
    unit = max(1, math.ceil(reach / MOST_UNITS))  # sizes are rounded up to it, so that the budget is kept
    groups = [(-(-size // unit), loss) for size, loss in groups]
    room = sum(int(size.max()) for size, _ in groups) if cost == "predicted_loss" else reach // unit
    chosen = _least_loss(groups, room, budget if cost == "predicted_loss" else None)
    if chosen is None:
        limit = f"cr_disk {value}" if name == "target_cr_disk" else f"{name} {value:g}"
        if cost == "predicted_loss":
            raise OutOfReach(f"allocate cannot reach {limit}: the least is {sum(loss.min() for _, loss in groups):.4g}")
        least = sum(int(size.min()) for size, _ in groups) * unit
        raise OutOfReach(f"allocate cannot reach {limit}: the smallest choices take {least} {cost} of {int(budget)}")
    picked = [row for group, n in zip(options, chosen, strict=True) for row in group[n]]
    choices["chosen"] = choices.index.isin(picked)
    plan = {row.block: plan_block(weight(model, row.block), method_from_label(row.method), row.bits)
            for row in choices.loc[picked].itertuples()}
    columns = ["block", "method", "bits", "bytes", *(["cycles"] if array else []), "excess_loss", "predicted_loss", "chosen"]
    return Allocation(Plan({block: plan[block] for block in known}, signals), choices[columns], cost, budget)


def search_allocation(model: torch.nn.Module, task: Task | LanguageTask | Loop, table: pd.DataFrame, target_cr_disk: float, *,
                      bits: int, epochs: int, seed: int, device: str | None = None, keep_start: bool = False) -> pd.DataFrame:
    """Several plans that meet the target, each with its validation loss after `epochs` of retraining, best first.

    Losses of single blocks before any retraining compare strengths of one method well and methods badly, and blocks do not add
    up where little is left. So the candidates are the allocation over each method family of the table alone, that over all
    together, and beside them each family's uniform plan of about `bits` bits; what decides is the model as a whole. table: as
    sensitivity_table gives it, for example over choices_to_measure. Columns: candidate, plan, cr_disk, valid_loss,
    valid_accuracy. device: as of sensitivity_table. keep_start: a candidate that retraining makes worse counts as it was
    before. OutOfReach when none meets it.
    """
    check_place(task, device)
    signals = calibrate(model, batches_of(task, epochs))
    family = table["method"].str.split(" ").str[0]
    tables = {name: table[family == name] for name in family.unique()}
    planners = {f"allocation of {name}": lambda rows=rows: allocate(model, rows, target_cr_disk, signals).plan
                for name, rows in {**tables, "every method": table}.items()}
    planners |= {f"uniform {name}": lambda name=name: uniform_plan(model, METHODS[name], bits, target_cr_disk, signals)
                 for name in tables}
    rows, refused = [], []
    for candidate, planned in planners.items():
        try:
            plan = planned()
            packed = pack_within_reach(model, plan)
        except OutOfReach as error:
            refused.append(str(error))
            continue
        found = outcome(retraining_curve(model, plan, task, epochs, seed, candidate, device), keep_start)
        rows.append({"candidate": candidate, "plan": plan, "cr_disk": packed.cr_disk, "valid_loss": found["loss"],
                     "valid_accuracy": found["accuracy"]})
    if not rows:
        raise OutOfReach(f"no allocation meets cr_disk {target_cr_disk}: " + "; ".join(refused))
    return pd.DataFrame(rows).sort_values("valid_loss", kind="stable", ignore_index=True)


def _budget(name, value, known, array) -> tuple[str, float]:
    """(column that is limited, its limit)"""
    if name == "target_cr_disk":
        check_target(value)
        return "bytes", int(4 * dense_weights(known) / value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"allocate needs a number as {name}, got {value!r}")
    if name == "most_cycles" and array is None:
        raise ValueError("allocate needs the array whose most_cycles are given")
    return {"target_bytes": "bytes", "most_cycles": "cycles", "most_loss": "predicted_loss"}[name], value


def _choices(model, table, array):
    """One row per block and choice: mean excess loss of the seeds, bytes, cycles of an array, predicted loss."""
    choices = table.groupby(["block", "method", "bits"], sort=False, as_index=False)["excess_loss"].mean()
    full = [full_block(weight(model, row.block), method_from_label(row.method), row.bits) for row in choices.itertuples()]
    choices["bytes"] = [packed.storage_bits // 8 for packed in full]
    if array is not None:
        choices["cycles"] = [block_cycles(packed, array) for packed in full]
    choices = choices.sort_values("bytes", ascending=False, kind="stable")
    choices["predicted_loss"] = choices.groupby(["block", "method"])["excess_loss"].cummax()
    return choices.sort_index()


def block_cycles(packed, array: ArraySpec) -> int:
    """Cycles of a packed block alone on the whole array, without the loader: multiply-accumulates of the fullest PE, then the
    drain of its rows. Blocks of a layer overlap, so a schedule takes fewer cycles than their sum."""
    mapped = map_block(packed, array.rows, array.cols)
    return int(mapped.macs.max() + mapped.local_rows.max()) + array.mac_latency + (array.cols - 1) * array.link_cycles


def _classes(choices, known, sensitive):
    """For each of both classes of gates its options, each the rows of all its blocks with one method and width."""
    gates = dict.fromkeys(block.gate for block in known.values())
    if unknown := [gate for gate in sensitive if gate not in gates]:
        raise ValueError(f"allocate knows the gates {', '.join(gates)}, got {', '.join(map(str, unknown))}")
    options = []
    for family, inside in (("TopK", True), ("BlockCirculant", False)):
        mine = [name for name, block in known.items() if (block.gate in sensitive) == inside]
        rows = choices[choices["block"].isin(mine) & (choices["method"].str.split(" ").str[0] == family)]
        same = [list(group.index) for _, group in rows.groupby(["method", "bits"], sort=False) if len(group) == len(mine)]
        if mine and not same:
            raise ValueError(f"allocate needs a choice of {family} that is measured on all of {', '.join(mine)}")
        options += [same] if mine else []
    return options


def _least_loss(groups, budget: int, most_loss: float | None = None) -> list[int] | None:
    """groups: per block (sizes, losses); the index of each block's choice, of least total loss within the budget, or None.
    most_loss: of least total size instead, among those of no more total loss, within the budget too."""
    best, picks = np.zeros(budget + 1), []  # best[b]: least loss of the blocks so far within b
    for sizes, losses in groups:
        totals = np.full((len(sizes), budget + 1), np.inf)
        for n, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
            if size <= budget:
                totals[n, size:] = best[: budget + 1 - size] + loss
        order = np.argsort(sizes, kind="stable")  # of equal losses the smaller choice
        pick = order[totals[order].argmin(axis=0)]
        best = totals[pick, np.arange(budget + 1)]
        picks.append(pick.astype(np.int32))
    within = np.flatnonzero(best <= most_loss) if most_loss is not None else np.flatnonzero(np.isfinite(best))[-1:]
    if not within.size:
        return None
    place, chosen = int(within[0]), []
    for (sizes, _), pick in zip(reversed(groups), reversed(picks), strict=True):
        chosen.append(int(pick[place]))
        place -= int(sizes[chosen[-1]])
    return chosen[::-1]
