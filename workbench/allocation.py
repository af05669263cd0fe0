"""Budget allocation: a method and a width for every block, by measured sensitivity, within a number of bytes."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from workbench.budget import OutOfReach, check_target, full_bits
from workbench.gates import blocks, dense_weights, weight
from workbench.methods import method_from_label
from workbench.plan import Plan, plan_block

MOST_UNITS = 1_000_000  # of a budget that are told apart


@dataclass(frozen=True)
class Allocation:
    """plan: what was chosen. table: one row per block and measured choice, with the columns block, method, bits (of a weight),
    bytes (with every kept weight non-zero), excess_loss (as measured), predicted_loss (what the choice was made by), chosen."""

    plan: Plan
    table: pd.DataFrame

    @property
    def chosen(self) -> pd.DataFrame:
        """The chosen row of every block."""
        return self.table[self.table["chosen"]].drop(columns="chosen").reset_index(drop=True)


def allocate(model: torch.nn.Module, table: pd.DataFrame, target_cr_disk: float, signals) -> Allocation:
    """The choices of least predicted loss, summed over the blocks, whose bytes meet target_cr_disk.

    table: as sensitivity_table gives it, over any methods and widths; several seeds count by their mean. Blocks are taken to
    add up. Within a block and a method a larger choice is never predicted worse than a smaller one (what would be is
    measurement noise): it gets the largest loss measured at its size or above. The best sum is found by a dynamic programme
    over bytes, exact up to a millionth of the budget. Of equal ones the smaller is taken. ValueError for a table of other
    blocks, OutOfReach when the smallest choices are too large.
    """
    check_target(target_cr_disk)
    known = blocks(model)
    if unknown := set(table["block"]) ^ set(known):
        raise ValueError(f"allocate needs a table of every block of the model, these differ: {', '.join(sorted(unknown))}")
    choices = table.groupby(["block", "method", "bits"], sort=False, as_index=False)["excess_loss"].mean()
    choices["bytes"] = [full_bits(weight(model, row.block), method_from_label(row.method), row.bits) // 8
                        for row in choices.itertuples()]
    choices = choices.sort_values("bytes", ascending=False, kind="stable")
    choices["predicted_loss"] = choices.groupby(["block", "method"])["excess_loss"].cummax()
    choices = choices.sort_index()
    budget = int(4 * dense_weights(known) / target_cr_disk)
    groups = [choices[choices["block"] == name] for name in known]
    unit = math.ceil(budget / MOST_UNITS)  # sizes are rounded up to it, so that the budget is kept
    chosen = _least_loss([(-(-g["bytes"].to_numpy() // unit), g["predicted_loss"].to_numpy()) for g in groups], budget // unit)
    if chosen is None:
        least = sum(int(g["bytes"].min()) for g in groups)
        raise OutOfReach(f"allocate cannot reach cr_disk {target_cr_disk}: the smallest choices take {least} bytes of {budget}")
    picked = [g.index[n] for g, n in zip(groups, chosen, strict=True)]
    choices["chosen"] = choices.index.isin(picked)
    plan = {row.block: plan_block(weight(model, row.block), method_from_label(row.method), row.bits)
            for row in choices.loc[picked].itertuples()}
    columns = ["block", "method", "bits", "bytes", "excess_loss", "predicted_loss", "chosen"]
    return Allocation(Plan(plan, signals), choices[columns])


def _least_loss(groups, budget: int) -> list[int] | None:
    """groups: per block (sizes, losses); the index of each block's choice, of least total loss within the budget, or None."""
    best, picks = np.zeros(budget + 1), []  # best[b]: least loss of the blocks so far within b bytes
    for sizes, losses in groups:
        totals = np.full((len(sizes), budget + 1), np.inf)
        for n, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
            if size <= budget:
                totals[n, size:] = best[: budget + 1 - size] + loss
        order = np.argsort(sizes, kind="stable")  # of equal losses the smaller choice
        pick = order[totals[order].argmin(axis=0)]
        best = totals[pick, np.arange(budget + 1)]
        picks.append(pick.astype(np.int32))
    if not np.isfinite(best[budget]):
        return None
    place, chosen = budget, []
    for (sizes, _), pick in zip(reversed(groups), reversed(picks), strict=True):
        chosen.append(int(pick[place]))
        place -= int(sizes[chosen[-1]])
    return chosen[::-1]
