"""Budget allocation: a method and a width for every block, by measured sensitivity, within bytes, a loss or cycles."""

import functools
import math
import numbers
import warnings
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from workbench.array.mapping import Region, map_block, stored_forms, tile_unit
from workbench.array.schedule import schedule_layers
from workbench.array.spec import ArraySpec, ceil_div
from workbench.budget import (
    ROUNDING,
    OutOfReach,
    bits_within,
    check_bits,
    check_target,
    full_block,
    ladder,
    pack_anew,
    strongest_member,
    uniform_plan,
)
from workbench.checks import check_whole
from workbench.gates import blocks, check_gates, dense_weights, weights
from workbench.methods import METHODS, Method, check_family, method_from_label
from workbench.packed import PackedModel
from workbench.plan import Plan, plan_block
from workbench.quantise import calibrate
from workbench.sensitivity import (
    Loop,
    batches_of,
    check_keep_start,
    check_measured,
    check_table,
    outcome,
    retraining_curve,
)
from workbench.tasks import LanguageTask, Task

MOST_UNITS = 1_000_000  # of a budget that are told apart
STEPS = 16  # that a plan is scheduled for: enough to find its steady state
MEASURED = ("block", "method", "bits", "excess_loss")  # columns of a table that choices are made by
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)  # of the weights that a choice to be measured stores


@dataclass(frozen=True)
class Allocation:
    """plan: what was chosen. table: one row per block and measured choice, with the columns block, method, bits (of a weight),
    bytes (with every kept weight non-zero), cycles and load_cycles (cycles_alone, where an array was given), excess_loss (as
    measured), predicted_loss (what the choice was made by), chosen. budget: what there was of `cost`, "bytes", "cycles" or
    "predicted_loss". scheduled_cycles: of a time step of the plan on the array (cycles_in_turn), where one was given; inf where
    the plan cannot be packed or the array does not hold it."""

    plan: Plan
    table: pd.DataFrame
    cost: str
    budget: float
    scheduled_cycles: float | None = None

    @property
    def chosen(self) -> pd.DataFrame:
        """The chosen row of every block."""
        return self.table[self.table["chosen"]].drop(columns="chosen").reset_index(drop=True)

    def explain(self) -> pd.DataFrame:
        """The choice, for the eye: the chosen row of every block, beside it the alternative of least loss per unit of the cost
        that it saves (saves, for_loss) and that of most gain per unit that it takes more (takes, for_gain). To check: what an
        alternative takes more must come from what is left of the budget and from what another block saves, and where blocks
        are free to choose no such exchange gains more than it loses; but for a budget of cycles, which do not add up. The last
        row sums up; its `method` is the budget, its cycles are those of the plan's schedule, where blocks overlap and wait."""
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
        total = {name: frame[name].sum() for name in ("bytes", "load_cycles", "excess_loss", "predicted_loss") if name in frame}
        total |= {"block": "all", "method": f"{self.cost} of at most {self.budget:g}"}
        total |= {} if self.scheduled_cycles is None else {"cycles": self.scheduled_cycles}
        return pd.concat([frame, pd.DataFrame([total])], ignore_index=True)[frame.columns]


def choices_to_measure(model: torch.nn.Module, families=None) -> list[Method]:
    """Members of each family that store about 1/2, 1/4, ... 1/64 of the weights: what sensitivity_table may measure for an
    allocation at any ratio. families: of METHODS, all by default; one without a member for every block, as where a power of two
    divides no rows, is left out with a warning."""
    families = METHODS.values() if families is None else families
    if not isinstance(families, Collection) or isinstance(families, str):
        raise ValueError(f"choices_to_measure needs a list of families, got {families!r}")
    for family in families:
        check_family("choices_to_measure", family)
    ws = list(weights(model).values())
    found = {}
    for family in families:
        try:
            members = ladder(ws, family)
        except OutOfReach as error:
            warnings.warn(f"choices_to_measure leaves out {family.__name__}: {error}", stacklevel=2)
            continue
        for share in SHARES:
            if (member := strongest_member(members, ws, share)) is not None:
                found[member] = None
    return list(found)


def allocate(model: torch.nn.Module, table: pd.DataFrame, target_cr_disk: float | None = None, signals=None, *,
             target_bytes: int | None = None, most_loss: float | None = None, most_cycles: float | None = None,
             array: ArraySpec | None = None, sensitive: list[str] | None = None) -> Allocation:
    """The choices of least predicted loss, summed over the blocks, within one budget.

    The budget is one of: target_cr_disk; target_bytes, of all blocks; most_cycles, of a time step on the `array`
    (cycles_in_turn); or most_loss, predicted: then the bytes are what is least. table: as sensitivity_table gives it, over any
    methods and widths; several seeds count by their mean. Blocks are taken to add up, in loss and bytes. Within a block and a
    method a larger choice is never predicted worse than a smaller one (what would be is measurement noise): it gets its
    own loss or the largest that was measured at a larger size. The best sum is found by a dynamic programme, exact up to a
    millionth of the budget. Of equal ones the cheaper is taken. signals: of the plan.

    Cycles do not add up, as blocks overlap, wait for each other and may be streamed. So the programme gives the plans of least
    loss for every sum of the blocks' own cycles (cycles_alone; once of those that multiply, once of those that load), and the
    largest sum whose plan keeps the budget when it is scheduled is found by bisection; where none does, over each method family
    alone. So the cycles are those of a schedule, but another plan within the budget may lose less, and they are of the weights
    as they are: in few bits, retraining can move kept weights away from 0, which then take cycles too. A plan that cannot be
    packed, or that the array does not hold, counts as beyond the budget.

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
    if array is not None and not isinstance(array, ArraySpec):
        raise ValueError(f"allocate needs an ArraySpec as array, as array.preset gives it, got {array!r}")
    _check_table(table, known)
    ((name, value),) = asked.items()
    cost, budget = _budget(name, value, known, array)
    check_gates("allocate", model, () if sensitive is None else sensitive)
    Plan({}, signals).check_signals(model)
    ws = weights(model)
    choices = _choices(ws, table, array)
    usable = choices[np.isfinite(choices["predicted_loss"])]
    options = _of_every_block(usable, known) if sensitive is None else _classes(usable, known, sensitive)
    refusals = []

    def planned(rows):
        entries = {row.block: plan_block(ws[row.block], method_from_label(row.method), row.bits)
                   for row in choices.loc[list(rows)].itertuples()}
        return Plan({block: entries[block] for block in known}, signals)

    @functools.cache
    def cycles_of(rows):
        """inf for a plan that cannot be packed, or that the array does not hold."""
        try:
            return cycles_in_turn(pack_anew(model, planned(rows)), array)
        except ValueError as error:
            refusals.append(str(error))
            return math.inf

    if cost == "cycles":
        families = [_of_every_block(rows, known) for _, rows in usable.groupby(family(usable["method"]), sort=False)]
        alone = [of for of in families if all(of)] if sensitive is None else []
        chosen = _within_cycles(choices, [options, *alone], cycles_of, budget, refusals)
    else:
        least, chosen_at = _programme(choices["bytes"], choices["predicted_loss"], options,
                                      int(budget) if cost == "bytes" else None)
        # Of equal losses the fewest bytes.
        within = np.flatnonzero((least <= (budget if cost == "predicted_loss" else least[-1])) & np.isfinite(least))
        if not within.size:
            limit = f"cr_disk {value}" if name == "target_cr_disk" else f"{name} {value:g}"
            if cost == "predicted_loss":
                raise OutOfReach(f"allocate cannot reach {limit}: the least is {least.min():.4g}")
            smallest = sum(min(choices["bytes"][rows].sum() for rows in group) for group in options)
            raise OutOfReach(f"allocate cannot reach {limit}: the smallest choices take {smallest} bytes of {int(budget)}, "
                             f"cr_disk {4 * dense_weights(known) / smallest:.4g}")
        chosen = chosen_at(within[0])
    choices["chosen"] = choices.index.isin(chosen)
    columns = ["block", "method", "bits", "bytes", *(["cycles", "load_cycles"] if array else []), "excess_loss",
               "predicted_loss", "chosen"]
    return Allocation(planned(chosen), choices[columns], cost, budget, cycles_of(chosen) if array else None)


def search_allocation(model: torch.nn.Module, task: Task | LanguageTask | Loop, table: pd.DataFrame, target_cr_disk: float, *,
                      bits: int, epochs: int, seed: int, device: str | None = None, keep_start: bool = False) -> pd.DataFrame:
    """Several plans that meet the target, each with its validation loss after `epochs` of retraining, best first.

    Losses of single blocks before any retraining compare strengths of one method well and methods badly, and blocks do not add
    up where little is left. So the candidates are the allocation over each method family of the table alone, that over all
    together, and beside them each family's uniform plan of about `bits` bits; what decides is the model as a whole. A family
    without a finite loss for every block has no allocation of its own. table: as
    sensitivity_table gives it, for example over choices_to_measure. Columns: candidate, plan, cr_disk, valid_loss,
    valid_accuracy. device: as of sensitivity_table. keep_start: a candidate that retraining makes worse counts as it was
    before. OutOfReach when none meets it.
    """
    check_target(target_cr_disk)
    check_bits(bits)
    check_measured(task, device, seed)
    check_whole("search_allocation", "number of epochs", epochs, 0)
    check_keep_start("search_allocation", keep_start)
    _check_table(table, blocks(model))
    signals = calibrate(model, batches_of(model, task, epochs))
    tables = dict(list(table.groupby(family(table["method"]), sort=False)))
    whole = {name: rows for name, rows in tables.items() if not _without_choice(rows, blocks(model))}
    every = {"every method": table} if len(tables) > 1 else {}
    planners = {f"allocation of {name}": lambda rows=rows: allocate(model, rows, target_cr_disk, signals).plan
                for name, rows in (whole | every).items()}
    planners |= {f"uniform {name}": lambda name=name: uniform_plan(model, METHODS[name], bits, target_cr_disk, signals)
                 for name in tables}
    rows, refused = [], []
    for candidate, planned in planners.items():
        try:
            plan = planned()
            packed = pack_anew(model, plan)
        except OutOfReach as error:
            refused.append(str(error))
            continue
        found = outcome(retraining_curve(model, plan, task, epochs, seed, candidate, device), keep_start)
        rows.append({"candidate": candidate, "plan": plan, "cr_disk": packed.cr_disk, "valid_loss": found["loss"],
                     "valid_accuracy": found["accuracy"]})
    if not rows:
        raise OutOfReach(f"no allocation meets cr_disk {target_cr_disk}: " + "; ".join(refused))
    return pd.DataFrame(rows).sort_values("valid_loss", kind="stable", ignore_index=True)


def _check_table(table, known):
    check_table("allocate", table, MEASURED)
    if texts := [column for column in ("bits", "excess_loss") if not pd.api.types.is_numeric_dtype(table[column])]:
        got = table[texts[0]].iloc[:1].tolist()
        raise ValueError(f"allocate needs numbers in the column {texts[0]} of its table, got {got}")
    if unknown := set(table["block"]) ^ set(known):
        raise ValueError("allocate needs a table of every block of the model, these differ: "
                         f"{', '.join(sorted(map(str, unknown)))}")
    if odd := [method for method in table["method"].unique() if not isinstance(method, str)]:
        raise ValueError(f"allocate needs the label of a method in every row of its table, got {odd[0]!r}")
    losses, bits = (table[column].to_numpy(dtype=float, na_value=math.nan) for column in ("excess_loss", "bits"))
    bad = table[~(losses > -math.inf) | (bits % 1 != 0)]  # NaN is no whole number
    for row in bad.head(1).to_dict("records"):
        raise ValueError("allocate needs whole bits and an excess_loss that is a number (inf for a choice that is none), got "
                         f"{row['excess_loss']} of {row['method']} in {row['bits']} bits for {row['block']}")
    if hopeless := _without_choice(table, known):
        raise ValueError(f"allocate needs a choice of finite loss for every block, got none for {', '.join(sorted(hopeless))}")


def _without_choice(table, known) -> set[str]:
    """The blocks for which a table has no finite loss."""
    means = table.groupby(["block", "method", "bits"])["excess_loss"].mean()  # over the seeds: what _choices chooses from
    return set(known) - set(means[means < math.inf].index.get_level_values("block"))


def _budget(name, value, known, array) -> tuple[str, float]:
    """(column that is limited, its limit)"""
    if name == "target_cr_disk":
        check_target(value)
        return "bytes", int(bits_within(value, known) / 8)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"allocate needs a number as {name}, got {value!r}")
    if name != "most_loss" and value <= 0:
        raise ValueError(f"allocate needs {name} above 0, got {value!r}")
    if name == "most_cycles" and array is None:
        raise ValueError("allocate needs the array whose most_cycles are given")
    if name == "most_loss":
        value += abs(value) * ROUNDING  # of losses that add up to it in another order
    return {"target_bytes": "bytes", "most_cycles": "cycles", "most_loss": "predicted_loss"}[name], value


def _choices(ws, table, array):
    """One row per block and choice: mean excess loss of the seeds, bytes, cycles of an array, predicted loss. ws: block -> its
    weights."""
    choices = table.astype({"bits": int}).groupby(["block", "method", "bits"], sort=False, as_index=False)["excess_loss"].mean()
    full = [full_block(ws[row.block], method_from_label(row.method), row.bits) for row in choices.itertuples()]
    choices["bytes"] = [packed.storage_bits // 8 for packed in full]
    if array is not None:
        choices[["cycles", "load_cycles"]] = [cycles_alone(packed, array) for packed in full]
    kept = choices["excess_loss"].where(choices["excess_loss"] < math.inf, -math.inf)
    size = ["block", "method", "bytes"]
    largest = kept.groupby([choices[name] for name in size]).max().sort_index(level="bytes", ascending=False)
    above = largest.groupby(level=size[:2]).transform(lambda losses: losses.cummax().shift(fill_value=-math.inf))
    above = choices.join(above.rename("above"), on=size)["above"]
    choices["predicted_loss"] = kept.clip(lower=above).where(kept > -math.inf, math.inf)
    return choices


def cycles_alone(packed, array: ArraySpec) -> tuple[int, int]:
    """What a packed block adds to a step of the whole array, alone: cycles of the multiply-accumulates in its fullest PE, and
    of the loader where its weights are streamed. Of a circulant block's whole and split tiles the fewer of each, of a low-rank
    one both products."""
    region, cycles, bits = Region(0, 0, array.rows, array.cols), 0, 0
    for form in stored_forms(packed):
        both = [map_block(form, array.rows, array.cols, tile_unit(form, region, array.acc_depth, split))
                for split in (False, True)]
        cycles += array.mac_ii * min(int(mapped.macs.max()) for mapped in both)
        bits += min(mapped.on_chip_bits for mapped in both)
    return cycles, ceil_div(bits, array.load_bits_per_cycle)


def cycles_in_turn(packed: PackedModel, array: ArraySpec) -> float:
    """Cycles of a time step in the steady state, the layers one after the other, each alone on the whole array."""
    return sum(schedule.steady_state_cycles for schedule in schedule_layers(packed.layers, array, STEPS).values())


def _programme(sizes, losses, options, most: int | None = None):
    """(the least loss within each number of units of the sizes' sum beyond the smallest, inf where `most` is less than that;
    place -> the rows that are chosen there). A unit is a millionth of what there is to choose from; sizes are rounded up to
    it, so that a budget is kept."""
    groups = [tuple(np.array([values[rows].sum() for rows in group]) for values in (sizes, losses)) for group in options]
    spread = [size.astype(np.int64) - int(size.min()) for size, _ in groups]
    reach = whole = sum(int(size.max()) for size in spread)
    if most is not None:
        reach = min(whole, most - sum(int(size.min()) for size, _ in groups))
    if reach < 0:
        return np.full(1, np.inf), None
    unit = max(1, math.ceil(reach / MOST_UNITS))
    groups = [(-(-size // unit), loss) for size, (_, loss) in zip(spread, groups, strict=True)]
    room = sum(int(size.max()) for size, _ in groups) if reach == whole else reach // unit
    least, picks = _least_losses(groups, room)
    return least, lambda place: tuple(row for group, n in zip(options, _choice_at(groups, picks, int(place)), strict=True)
                                      for row in group[n])


def _within_cycles(choices, tried, cycles_of, most: float, refusals) -> tuple:
    """The rows of least predicted loss whose plan takes no more than `most` cycles, of the programme over the first of `tried`
    (options of every block) or, where that has none, over any other. OutOfReach where none has."""
    fewest = math.inf

    def within(options):
        """Of each of both sums the largest that keeps the budget, by bisection over those where the least loss falls."""
        nonlocal fewest
        for column in ("cycles", "load_cycles"):
            least, chosen_at = _programme(choices[column], choices["predicted_loss"], options)
            places = np.flatnonzero(least < np.concatenate([[np.inf], least[:-1]]))
            low, high = 0, len(places) - 1
            first, last = (cycles_of(chosen_at(places[n])) for n in (low, high))
            fewest = min(fewest, first, last)
            if last <= most:
                yield chosen_at(places[high])
                return  # nothing loses less
            if first <= most:
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if cycles_of(chosen_at(places[middle])) <= most else (low, middle)
                yield chosen_at(places[low])

    found = list(within(tried[0])) or [rows for options in tried[1:] for rows in within(options)]
    if not found:
        why = f"the fewest of the plans that it tried are {fewest:g}" if math.isfinite(fewest) else refusals[-1]
        raise OutOfReach(f"allocate cannot reach most_cycles {most:g}: {why}")
    return min(found, key=lambda rows: choices["predicted_loss"][list(rows)].sum())


def family(labels: pd.Series) -> pd.Series:
    """"TopK 0.5" -> "TopK"."""
    return labels.str.split(" ").str[0]


def _of_every_block(choices, known) -> list:
    """For each block its options, each a row."""
    return [[[row] for row in choices.index[choices["block"] == block]] for block in known]


def _classes(choices, known, sensitive):
    """For each of both classes of gates its options, each the rows of all its blocks with one method and width."""
    options = []
    for kind, inside in (("TopK", True), ("BlockCirculant", False)):
        mine = [name for name, block in known.items() if (block.gate in sensitive) == inside]
        rows = choices[choices["block"].isin(mine) & (family(choices["method"]) == kind)]
        same = [list(group.index) for _, group in rows.groupby(["method", "bits"], sort=False) if len(group) == len(mine)]
        if mine and not same:
            raise ValueError(f"allocate needs a choice of {kind} that is measured on all of {', '.join(mine)}, got a table of "
                             f"{', '.join(choices['method'].unique())}")
        options += [same] if mine else []
    return options


def _least_losses(groups, budget: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """groups: per block (sizes, losses). (budget + 1,) the least total loss within each budget, inf where nothing is, and per
    block the choice that it takes there, of equal ones the smaller."""
    best, picks = np.zeros(budget + 1), []  # of the blocks so far
    for sizes, losses in groups:
        total, pick, lowest = np.full(budget + 1, np.inf), np.zeros(budget + 1, dtype=np.int32), np.inf
        for n in np.lexsort((losses, sizes)):
            size, loss = int(sizes[n]), losses[n]
            if size > budget or loss >= lowest:  # a smaller choice loses no more
                continue
            lowest, with_it = loss, best[: budget + 1 - size] + loss
            better = with_it < total[size:]
            np.copyto(total[size:], with_it, where=better)
            pick[size:][better] = n
        best = total
        picks.append(pick)
    return best, picks


def _choice_at(groups, picks, place: int) -> list[int]:
    """The index of each block's choice within a budget of `place`."""
    chosen = []
    for (sizes, _), pick in zip(reversed(groups), reversed(picks), strict=True):
        chosen.append(int(pick[place]))
        place -= int(sizes[chosen[-1]])
    return chosen[::-1]
