"""Tables of a study as pandas DataFrames, one function a table, and the metrics that a run records."""

import hashlib
from dataclasses import fields
from numbers import Number

import numpy as np
import pandas as pd

from workbench.acceleration import BY_FFT, STALLS, Acceleration, plan_name, stalls
from workbench.array import (
    ASSUMPTIONS,
    SYSTOLIC,
    ArraySpec,
    Schedule,
    crossover,
    faster_part,
    last_cycle,
    layer_products,
    smallest_array,
)
from workbench.array.cost import (
    BASELINE,
    DEVICES,
    ENERGY_NOTE,
    PJ_PER_EVENT,
    STATIC_POWER,
    baseline_of,
    compare,
    energy,
    resources,
)
from workbench.array.mapping import part_of
from workbench.array.schedule import EVENTS, SPLIT
from workbench.array.spec import FIELDS
from workbench.array.systolic import OMITTED
from workbench.packed import GATES, PackedModel
from workbench.pareto import pareto_points
from workbench.precision import (
    AFTER,
    AS_TRAINED,
    FLOAT,
    IN,
    TRAINED_ON,
    Mixture,
    Precision,
    is_language,
    lost_name,
    quality_name,
)
from workbench.published import PERPLEXITY_SOURCE, PUBLISHED, PUBLISHED_PERPLEXITIES, PUBLISHED_SPEED_UP
from workbench.report import DUST
from workbench.runs import listed, record
from workbench.sensitivity import class_stability, method_agreement, rank_blocks, seed_agreement
from workbench.study import DENSE, DENSE_ONCE, HYBRID, NOT_ALONE, SMALL, Comparison, Tradeoff
from workbench.tasks import LanguageTask, Task
from workbench.train import Interval, evaluate, paired_interval

# Spearman's correlation within the matrices: between two seeds, gates in random order reach it in 32 of 576 cases (two
# matrices of four gates each).
STABLE = 0.7
LONG_TEXT = 40  # characters; longer texts may wrap


def present(frame: pd.DataFrame, index: bool = False):
    """A table as a notebook and its report show it: whole texts to the left, numbers to the right with four significant
    digits, nothing where nothing is."""
    texts = [name for name in frame.columns if frame[name].map(lambda value: not isinstance(value, Number)).all()]
    long = [name for name in frame.columns if frame[name].map(lambda value: len(str(value))).max() > LONG_TEXT]
    # Styler's own identifiers are random; the same table must give the same report.
    identifier = hashlib.sha256(frame.to_csv().encode()).hexdigest()[:8]
    style = frame.style.set_uuid(identifier).format(_cell, escape="html").format_index(escape="html", axis=1)
    left, wrapped = ("text-align", "left"), [("white-space", "normal"), ("min-width", "12em")]
    style = style.set_table_attributes('class="dataframe"').set_table_styles(
        {name: [{"selector": "", "props": [left] * (name in texts) + wrapped * (name in long)}] for name in frame.columns})
    return style if index else style.hide(axis="index")


def _cell(value):
    if value is None or value != value:  # NaN is the one value that differs from itself
        return ""
    if not isinstance(value, Number) or isinstance(value, bool):
        return value
    if abs(value) < DUST:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def task_table(task: Task | LanguageTask) -> pd.DataFrame:
    """One row a split: sequences, frames (shortest, mean, longest) and features; of a language task its words."""
    if isinstance(task, LanguageTask):
        return pd.DataFrame([{"split": name, "words": len(words), "vocabulary": len(task.vocabulary)}
                             for name, words in task.splits.items()])
    return pd.DataFrame([
        {"split": name, "sequences": len(split.labels), "classes": task.num_classes, "features": task.num_features,
         "shortest (frames)": int(split.lengths.min()), "mean (frames)": float(split.lengths.mean()),
         "longest (frames)": int(split.lengths.max())} for name, split in task.splits.items()])


def accuracy_table(models: dict, task: Task) -> pd.DataFrame:
    """One row a seed: validation loss and accuracy of its dense model (the test split stays unread)."""
    found = {seed: evaluate(model, task, "valid") for seed, model in models.items()}
    return pd.DataFrame([{"seed": seed, "validation loss": e.loss, "validation accuracy %": e.accuracy}
                         for seed, e in found.items()])


def sensitivity_summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per block, method and width, averaged over the seeds; the share recovered over the seeds that lost anything,
    recovery epochs over those that recovered, and how many did, of how many that lost."""
    names = {"cr_disk": "cr_disk of the block", "loss_before": "loss before", "loss_after": "loss after",
             "accuracy_before": "% before", "accuracy_after": "% after", "recovered": "recovered",
             "recovery_epochs": "in epochs", "excess_loss": "excess loss"}
    one_shot = table["recovered"].isna().all()
    if one_shot:  # there is no after
        names = {name: names[name] for name in ("cr_disk", "loss_before", "accuracy_before", "excess_loss")}
    groups = table.astype({"recovered": float, "recovery_epochs": float}).groupby(["block", "method", "bits"], sort=False)
    summary = groups[list(names)].mean().rename(columns=names)
    if not one_shot:
        counts = groups[["recovery_epochs", "recovered"]].count()
        summary["recovered in (seeds)"] = [f"{back} of {lost}" for back, lost in counts.to_numpy()]
    return summary.reset_index()


def ranking_table(ranks: pd.DataFrame) -> pd.DataFrame:
    """One row a block, the most sensitive first: mean rank over everything and per method, best and worst rank, and how
    many of all rankings (a compression on a seed's model) have it in their top quarter."""
    by_block = ranks.groupby("block")
    methods = ranks.groupby(["block", ranks["method"].str.split().str[0]], sort=False)["rank"].mean().unstack()
    table = pd.DataFrame({"mean rank": by_block["rank"].mean()}).join(methods.add_prefix("mean under "))
    table["best"], table["worst"] = by_block["rank"].min(), by_block["rank"].max()
    table["in the top quarter"], table["of rankings"] = by_block["top_quarter"].sum(), by_block.size()
    return table.sort_values("mean rank", kind="stable").reset_index()


def stability_table(ranks: pd.DataFrame) -> pd.DataFrame:
    """One row a compression: mean excess loss, Spearman's correlations of seed_agreement, and in how many seeds each block is
    in the top quarter (blocks not named: in none)."""
    top = ranks[ranks["top_quarter"]].groupby(["compression", "block"]).size()
    texts = {}
    for name in ranks["compression"].unique():
        counts = top[name].sort_values(ascending=False, kind="stable") if name in top.index else {}
        texts[name] = ", ".join(f"{block} {count}" for block, count in counts.items()) or "none"
    table = seed_agreement(ranks).drop(columns="pairs")
    table["in the top quarter (seeds)"] = table["compression"].map(texts)
    return table.rename(columns={"excess_loss": "mean excess loss", "within_mean": "within a matrix, mean",
                                 "within_least": "least", "pooled_mean": "all blocks, mean"})


def sensitivity_verdict(table: pd.DataFrame):
    """What is stable and what is not, written from the figures; table: as sensitivity_over_seeds gives it."""
    from IPython.display import Markdown

    ranks = rank_blocks(table)
    points = {"Over the seeds": _seed_text(ranks), "Blocks": _block_text(ranks), "Between compressions": _method_text(ranks),
              "Classes": _class_text(class_stability(table))}
    return Markdown("\n".join(f"- **{title}.** {text}" for title, text in points.items()))


def _seed_text(ranks):
    seeds, agreement = ranks["seed"].nunique(), seed_agreement(ranks).dropna(subset="within_mean")
    if seeds < 2:
        return "With one seed nothing can be said about the stability of the ranking: that needs at least two."
    if agreement.empty:
        return "No compression made a difference between the gates of a matrix in two seeds, so there is nothing to compare."
    is_stable = agreement["within_mean"].round(9) >= STABLE  # few gates: the correlation often is the threshold itself
    means = [f"{part['excess_loss'].min():.2g} to {part['excess_loss'].max():.2g} nats where {what}"
             for part, what in ((agreement[is_stable], "it is stable"), (agreement[~is_stable], "it is not")) if len(part)]
    top = ranks.pivot(index=["compression", "block"], columns="seed", values="top_quarter")
    by_compression = top.any(axis=1).groupby(level="compression").any()  # one where no block differs has no top quarter
    same_top = (top.nunique(axis=1) == 1).groupby(level="compression").all() & by_compression
    within, pooled = agreement[["within_mean", "pooled_mean"]].mean()
    return (f"Within a matrix, two seeds' rankings of the gates correlate with {within:.2f} on average, in "
            f"{is_stable.sum()} of {len(agreement)} compressions with at least {STABLE} (called stable). "
            f"Not stable: {listed(agreement.loc[~is_stable, 'compression'])}. "
            f"All blocks in one ranking correlate with {pooled:.2f}, the difference between the matrices included. "
            f"The mean excess loss of the blocks is {' and '.join(means)}. "
            f"All {seeds} seeds have the same blocks in the top quarter in {same_top.sum()} of {len(same_top)} compressions.")


def _block_text(ranks):
    counts = ranks.groupby("block", sort=False)["top_quarter"].sum().sort_values(ascending=False, kind="stable")
    seen = [f"{block} in {count}" for block, count in counts[counts > 0].items()]
    return f"Of the {ranks.groupby(['compression', 'seed']).ngroups} rankings, in the top quarter: {listed(seen)}."


def _method_text(ranks):
    agreement = method_agreement(ranks)
    methods = agreement.index.str.split().str[0].to_numpy()
    values, upper = agreement.to_numpy(), np.triu(np.ones(agreement.shape, bool), 1)
    same = methods[:, None] == methods
    pairs = {"is the same": pd.Series(values[upper & same]), "differs": pd.Series(values[upper & ~same])}
    means = [f"with {found.mean():.2f} on average where the method {what} (least {found.min():.2f})"
             for what, found in pairs.items() if found.notna().any()]
    if not means:
        return "There are no two compressions whose rankings could be compared."
    return f"On the same model, two compressions' rankings of the gates of a matrix correlate {', '.join(means)}."


def _class_text(classes):
    seeds, compressions = classes["seeds"].iloc[0], classes["compressions"].iloc[0]
    changing = classes.loc[~classes["sensitive in seeds"].isin([0, seeds]), "gate"]
    alone = [f"{row['gate']} in {row['sensitive in compressions']}" for _, row in classes.iterrows()]
    return (f"Sensitive by the rule: {listed(classes.loc[classes['class'] == 'sensitive', 'gate'])}. "
            + (f"Gates whose class changes with the seed: {listed(changing)}. " if seeds > 1 else "")
            + f"Taken alone, the {compressions} compressions call sensitive: {listed(alone)}.")


def record_sensitivity(table: pd.DataFrame) -> dict:
    """Hand a measurement over to the run; table: as sensitivity_over_seeds gives it.

    table (a row per block, method, width and seed), ranking (the ranks of the same rows), stability (a row a compression),
    classes, sensitive_gates (text), rank_correlation: Spearman's between two seeds over the gates of one matrix, mean over
    matrices, pairs of seeds and compressions, and rank_correlation_pooled: the same over all blocks in one ranking. Each is
    left out where no two seeds can be compared.
    """
    ranks, classes = rank_blocks(table), class_stability(table)
    agreement = seed_agreement(ranks)
    correlations = agreement[["within_mean", "pooled_mean"]].mean().dropna()
    return record(
        table=_plain(table), ranking=ranks, stability=_plain(agreement), classes=classes,
        sensitive_gates=listed(classes.loc[classes["class"] == "sensitive", "gate"]),
        **correlations.rename({"within_mean": "rank_correlation", "pooled_mean": "rank_correlation_pooled"}).to_dict(),
    )


def plan_table(comparison: Comparison, seed: int) -> pd.DataFrame:
    """The hybrid plan of one seed, block by block, with the sizes of what was packed."""
    return pd.DataFrame(comparison.plans[HYBRID][seed].table(comparison.packed[HYBRID][seed]))


def verdict(comparison: Comparison, schedules: dict[str, Schedule]):
    """Who wins, in a paragraph written from the figures: accuracy loss of every variant, acceleration of every plan."""
    from IPython.display import Markdown

    summary = comparison.summary().set_index("variant")
    losses = [f"{name} {row['loss (points)']:.2f}{_bounded(row)} at {row['cr_disk']:.1f}x"
              for name, row in summary.iterrows() if row["arithmetic"] == "integers"]
    rows = {row["label"]: row["acceleration"] for row in compare(schedules)}
    faster = [name for name, acceleration in rows.items() if acceleration > rows[HYBRID]]
    interval = ", with its 95 % interval" if (summary["seeds"] > 1).any() else ", of one seed"
    return Markdown(
        f"Accuracy loss in points against the dense control{interval}: {'; '.join(losses)}. "
        f"{_against_hybrid(comparison, summary)} "
        f"Acceleration in the steady state: {'; '.join(f'{name} {value:.2f}x' for name, value in rows.items())}. "
        f"{'Faster than the hybrid plan: ' + ', '.join(faster) if faster else 'None is faster than the hybrid plan'}.")


def _against_hybrid(comparison, summary):
    """Which variants on integers are better or worse than the hybrid plan, beyond chance. summary: of the comparison."""
    rivals = summary[(summary["arithmetic"] == "integers") & (summary.index != HYBRID)].index
    if (summary["seeds"] == 1).all():
        return f"One seed does not tell the hybrid plan from {listed(rivals)}."
    gains = pd.DataFrame({name: paired_interval(comparison.correct[name], comparison.correct[HYBRID], seed=0)
                          for name in rivals}, index=Interval._fields).T
    told = [f"{name} ({_bounds(gain['low'], gain['high'])} points)" for name, gain in gains.iterrows()]
    return ("Against the hybrid plan, by the 95 % interval of the difference in accuracy, paired by seed and test item, not "
            f"corrected for the number of comparisons, {_told_apart(told, gains['low'] > 0, gains['high'] < 0)}.")


def _told_apart(names, better, worse) -> str:
    """Three lists of names, in words. better, worse: a bool for each."""
    names = pd.Series(list(names), dtype=object, index=better.index)
    return (f"better: {listed(names[better])}; worse: {listed(names[worse])}; "
            f"not told apart: {listed(names[~(better | worse)])}")


def signal_table(packed: PackedModel) -> pd.DataFrame:
    """Formats of the signals of every layer, and the largest error of the table that writes each, in its last place."""
    rows = []
    for name, layer in packed.layers.items():
        for signal, fmt in layer.signals.items():
            error = layer.tables[signal].max_error_ulp(layer.signals["pre"], fmt) if signal in layer.tables else None
            rows.append({"layer": name, "signal": signal, "bits": fmt.bits, "fraction bits": fmt.frac, "signed": fmt.signed,
                         "smallest": fmt.min * 2.0**-fmt.frac, "largest": fmt.max * 2.0**-fmt.frac,
                         "table error (last places)": error})
    return pd.DataFrame(rows)


def assumption_table() -> pd.DataFrame:
    """What the array's model takes for granted and does not charge."""
    return pd.DataFrame({"assumed": ASSUMPTIONS})


def spec_table(spec: ArraySpec) -> pd.DataFrame:
    """Every field of the array: its value, its unit and where the value comes from."""
    return pd.DataFrame([{"field": name, "value": getattr(spec, name), "unit": unit, "source": source}
                         for name, (unit, source) in FIELDS.items()])


def device_table(schedules: dict[str, Schedule], device: str) -> pd.DataFrame:
    """Modelled resources, a row each, against a device's totals; LUTs and flip-flops are intervals: what a tool packs into the
    DSPs decides."""
    used = {label: resources(schedule.mapping).share(device) for label, schedule in schedules.items()}
    rows = [{"resource": name, "device": total.count, "verified": "yes" if total.verified else "no", "source": total.source}
            | {label: _percent(*share[name]) for label, share in used.items()} for name, total in DEVICES[device].items()]
    return pd.DataFrame(rows)


def _percent(low, high):
    return f"{low:.1%}" if low == high else f"{low:.1%} to {high:.1%}"


def systolic_table(layers) -> pd.DataFrame:
    """Cycles of one time step (label -> packed layer, as dense matrices) on systolic arrays, for comparison with SCALE-Sim
    only: a row a matrix product. What they leave out is in omission_table."""
    return pd.DataFrame([
        {"layer": label, "product": name, "rows x columns": " x ".join(map(str, w.shape))}
        | {array: int(last_cycle(1, *w.shape, spec)) for array, spec in SYSTOLIC.items()}
        for label, layer in layers.items() for name, w in layer_products(layer).items()])


def omission_table() -> pd.DataFrame:
    """What the systolic model leaves out, as SCALE-Sim does, beside what the array processor does."""
    return pd.DataFrame(OMITTED, columns=["left out", "systolic model", "array processor"])


def hardware_table(schedules: dict[str, Schedule]) -> pd.DataFrame:
    """One row a figure, one column a plan: cycles, accelerations, memory, modelled energy and resources."""
    baseline_of("hardware_table", schedules)
    return pd.DataFrame(compare(schedules)).set_index("label").drop(columns=list(SPLIT)).T.rename_axis(columns=None)


def step_text(mine: Schedule, base: Schedule, of: str = "") -> str:
    """What a step costs, beside dense 16-bit (Markdown). of: which step, if more has to be said."""
    items, per_item = mine.mapping.batch, mine.cycles_per_item
    batch = f"; {items} sequences, {_cycles(per_item)} cycles each" if items > 1 else ""
    return (f"A step{of} takes **{_cycles(mine.steady_state_cycles)} cycles** ({mine.step_us:.2f} µs at "
            f"{mine.mapping.spec.clock_mhz} MHz{batch}), most of all for {mine.bound}: "
            f"{base.cycles_per_item / per_item:.2f} times as fast as dense 16-bit ({_cycles(base.steady_state_cycles)} cycles, "
            f"most of all for {base.bound}).")


def _cycles(count) -> str:
    return f"{count:,.1f}".removesuffix(".0")


def fit_text(schedule: Schedule, array: str) -> str:
    """That the array does not fit its device (Markdown); empty where it does, or where the preset of that name is no device."""
    if array in DEVICES:
        try:
            resources(schedule.mapping).check_fit(array)
        except ValueError as error:
            return f"**Only a model: {error}.**"
    return ""


def baseline_text(base: Schedule) -> str:
    """Whether dense 16-bit, that accelerations are against, would be faster on a part of its array, as far as faster_part finds
    (Markdown)."""
    spec, part = base.mapping.spec, faster_part(base)
    if part is None:
        return f"Dense 16-bit is not faster on half the rows or columns of the {spec.rows} x {spec.cols} PEs."
    small = part.mapping.spec
    few, all_ = part.steady_state_cycles, base.steady_state_cycles
    return (f"**The {spec.rows} x {spec.cols} PEs are more than dense 16-bit can use: on {small.rows} x {small.cols} of them a "
            f"step takes {few:,.0f} cycles, on all {all_:,.0f}. Accelerations against it are {all_ / few:.2f} times those "
            "against that part.**")


def baseline_note(schedules: dict[str, Schedule]):
    """baseline_text of the schedules that are compared, each of one layer."""
    from IPython.display import Markdown

    return Markdown(baseline_text(baseline_of("baseline_note", schedules)))


def split_table(schedules: dict[str, Schedule]) -> pd.DataFrame:
    """Cycles of the whole sequence by what its critical path waits for; every column sums to the total."""
    table = pd.DataFrame({label: schedule.split() for label, schedule in schedules.items()})
    table.loc["total"] = table.sum()
    return table


def layout_table(schedule: Schedule) -> pd.DataFrame:
    """Every layout that the scheduler considered for one plan; those without steady-state cycles could not win any more."""
    return pd.DataFrame(schedule.candidates)


SPACE_FIGURES = ("step_us", "energy_high_nj", "bram36")  # latency, modelled energy, memory


def space_table(space: dict, figures=SPACE_FIGURES) -> pd.DataFrame:
    """The points of array.sweep_space, a row each, and whether no other is better in all of these figures (`front`)."""
    return pd.DataFrame(space).assign(front=pareto_points(space, figures))


def front_table(space: pd.DataFrame, axes: dict, most: int = 15) -> pd.DataFrame:
    """The Pareto front of a design space, fastest first, of equals the first, evenly thinned to `most` rows. space: of
    space_table; axes: the points that were asked for."""
    front = space[space["front"]].sort_values("step_us", kind="stable").drop_duplicates(list(SPACE_FIGURES))
    some = np.unique(np.linspace(0, len(front) - 1, min(most, len(front))).astype(int))
    return front.iloc[some][[*axes, "step_us", "bram36", "dsp", "energy_low_nj", "energy_high_nj"]]


def smallest_table(schedules: dict[str, Schedule], latencies: list[float]) -> pd.DataFrame:
    """A row per latency of a step (microseconds) and plan: the smallest array that meets it (array.smallest_array, all else as
    in the plans' own), or the one that comes nearest."""
    rows, names = [], ["PEs", "cycles a step", "us a step", "dsp", "bram36", "layout"]
    for latency in latencies:
        for label, schedule in schedules.items():
            mapping = schedule.mapping
            (row,) = smallest_array({label: mapping.layer}, latency, spec=mapping.spec, steps=schedule.steps)
            values = (f"{row['rows']} x {row['cols']}", row["steady_state_cycles"], row["step_us"], row["dsp"], row["bram36"],
                      row["layout"])
            rows.append({"at most (us)": latency, "plan": label, "met": "yes" if row["meets"] else "no, this comes nearest"}
                        | dict(zip(names, values, strict=True)))
    return pd.DataFrame(rows)


def smallest_array_table(rows: list[dict]) -> pd.DataFrame:
    """What array.smallest_array found: a column a label."""
    return pd.DataFrame(rows).set_index("label").drop(columns=["fits", "reason"]).T.rename_axis(columns=None)


def energy_table(schedules: dict[str, Schedule]) -> pd.DataFrame:
    """Modelled dynamic energy of the whole sequence, "low to high" in nJ: a row an event and their sum, a column a plan."""
    columns = {}
    for label, schedule in schedules.items():
        modelled = energy(schedule.counts())
        columns[label] = {row["event"]: _interval(row["low_pj"], row["high_pj"]) for row in modelled.rows}
        columns[label] |= {"dynamic, total": _interval(modelled.low_pj, modelled.high_pj), "static": STATIC_POWER,
                           "dynamic + static": STATIC_POWER}
    return pd.DataFrame(columns).rename_axis("nJ of the sequence")


def _interval(low_pj, high_pj):
    return f"{_cell(low_pj / 1000)} to {_cell(high_pj / 1000)}"


def energy_note():
    """What the total of the energies leaves out."""
    from IPython.display import Markdown

    return Markdown(ENERGY_NOTE)


def price_table() -> pd.DataFrame:
    """Every event that the array counts: its price, low and high in pJ, and where the price comes from."""
    priced = {event: {"low (pJ)": low, "high (pJ)": high, "source": source}
              for event, (low, high, source) in PJ_PER_EVENT.items()}
    return pd.DataFrame([{"event": event} | priced.get(event, {"source": "none found: counted, not priced"})
                         for event in EVENTS])


def count_table(schedules: dict[str, Schedule]) -> pd.DataFrame:
    """Events of the whole sequence: a row an event, a column a plan."""
    return pd.DataFrame({label: schedule.counts() for label, schedule in schedules.items()})


def record_study(comparison: Comparison, schedules: dict[str, Schedule], classes: pd.DataFrame, search: pd.DataFrame) -> dict:
    """Hand the study's figures over to the run: summary, every seed's row, classes, candidates, hardware rows."""
    return record(
        summary=_plain(comparison.summary()), results=comparison.results, classes=classes,
        search=search.assign(strength=search["strength"].astype(str)), hardware=compare(schedules),
    )


def tradeoff_table(tradeoff: Tradeoff) -> pd.DataFrame:
    """The dense controls, then one row per method and target: means over the seeds, the standard deviations of accuracy and
    loss, and the 95 % intervals of the loss against the dense control and against the small dense network (points)."""
    rows = [{"method": variant, "cr_disk": 1.0, "accuracy %": group["test_accuracy"].mean(),
             "accuracy std": group["test_accuracy"].std(ddof=1), "seeds": len(group), "95 % interval": "",
             "vs small dense": "", "cross-entropy": group["test_loss"].mean(), "front": ""}
            for variant, group in tradeoff.controls.groupby("variant", sort=False)]
    rows += [row | {"target": row["target_cr_disk"], "95 % interval": _bounds(row["low"], row["high"]),
                    "vs small dense": _bounds(row["vs_small_low"], row["vs_small_high"]),
                    "front": "yes" if row["front"] else ""} for row in tradeoff.summary.to_dict("records")]
    columns = ["method", "target", "cr_disk", "front", "accuracy %", "accuracy std", "loss (points)", "loss std",
               "95 % interval", "vs small dense", "seeds", "cross-entropy"]
    return pd.DataFrame(rows, columns=columns)


def tradeoff_grid(summary: pd.DataFrame) -> pd.DataFrame:
    """One row a method, one column a target: the loss in points with its 95 % interval, the ratio that was reached, and the
    cross-entropy in nats; how many of the seeds or folds, where not all reached it. What has no row was out of reach.
    summary: of a Tradeoff, or over_folds of runs that all asked for the same."""
    counts = {"folds": "folds only", "seeds": "seeds a fold at least"} if "folds" in summary else {"seeds": "seeds only"}
    cells = {target: {} for target in sorted(summary["target_cr_disk"].unique())}
    for row in summary.to_dict("records"):
        few = [f", {row[name]} {what}" for name, what in counts.items() if row[name] < summary[name].max()]
        text = (f"{row['loss (points)']:.2f}{_bounded(row)} at {row['cr_disk']:.1f}x, {row['cross-entropy']:.3f} nats"
                f"{''.join(few)}")
        cells[row["target_cr_disk"]][row["method"]] = text
    table = pd.DataFrame(cells).reindex(dict.fromkeys(summary["method"])).fillna("out of reach")
    return table.rename(columns="asked {:g}x".format).rename_axis("method").reset_index()


def settings_grid(settings: pd.DataFrame) -> pd.DataFrame:
    """One row a method and target, one column a setting, the reference first: test cross-entropy in nats, in brackets what a
    setting adds to the reference's, with its 95 % interval over the seeds; how many of the seeds, where not all count.
    settings: as over_settings gives it."""
    cells, points = {}, {}
    for row in settings.to_dict("records"):
        text = f"{row['cross-entropy']:.3f}"
        if not pd.isna(row["added"]):
            bounds = "" if pd.isna(row["added_low"]) else f", {row['added_low']:+.3f} to {row['added_high']:+.3f}"
            text += f" ({row['added']:+.3f}{bounds})"
        text += f", {row['seeds']} seeds only" if row["seeds"] < settings["seeds"].max() else ""
        point = points.setdefault((row["method"], row["target_cr_disk"]), f"{row['method']}, {row['target_cr_disk']:g}x")
        cells.setdefault(row["setting"], {})[point] = text
    return pd.DataFrame(cells).reindex(points.values()).fillna("no result").rename_axis("method").reset_index()


def unreachable_table(tradeoff: Tradeoff) -> pd.DataFrame:
    """One row per method and target that no plan reaches, the seeds that it holds for, and why."""
    grouped = tradeoff.unreachable.groupby(["method", "target_cr_disk"], sort=False)
    return grouped.agg(seeds=("seed", lambda seeds: ", ".join(map(str, seeds))), reason=("reason", "first")).reset_index()


def published_table() -> pd.DataFrame:
    """Published ratios with an accuracy loss; see Published for what their abstracts do not state."""
    return pd.DataFrame([{"work": p.work, "ratio": p.ratio, "loss (%)": p.loss_percent, "source": p.source}
                         for p in PUBLISHED])


def tradeoff_verdict(tradeoff: Tradeoff):
    """What every target shows, in paragraphs written from the figures."""
    from IPython.display import Markdown

    summary, missing = tradeoff.summary.sort_values("loss (points)", kind="stable"), unreachable_table(tradeoff)
    paragraphs = [_target_verdict(target, *(table[table["target_cr_disk"] == target] for table in (summary, missing)))
                  for target in sorted({*summary["target_cr_disk"], *missing["target_cr_disk"]})]
    front = summary[summary["front"]].sort_values("cr_disk", kind="stable")
    points = [f"{row['method']} at {row['cr_disk']:.1f}x" for _, row in front.iterrows()]
    paragraphs.append(f"**On the front of the means:** {listed(points)}.")
    return Markdown("\n\n".join(paragraphs + _control_verdict(tradeoff.controls)))


def _control_verdict(controls) -> list[str]:
    """Says so where retraining harms the dense model: a loss against it is then flattered."""
    means = controls.groupby("variant")[["valid_loss", "test_accuracy"]].mean()
    before, after = means.loc[DENSE_ONCE], means.loc[DENSE]
    if before["valid_loss"] >= after["valid_loss"]:
        return []
    gap = before["test_accuracy"] - after["test_accuracy"]
    return [f"**Retraining harms the dense model itself**: its validation loss is {before['valid_loss']:.3f} nats before and "
            f"{after['valid_loss']:.3f} after it (means). The losses above are against the control, retrained like all others; "
            f"against the dense model as trained once every mean loss of all seeds is {abs(gap):.2f} points "
            f"{'larger' if gap >= 0 else 'smaller'}. With `keep_start` no model is measured after a retraining that harms it."]


def _target_verdict(target, rows, missing):
    """rows: of the summary, least loss first; missing: of unreachable_table."""
    best = rows.loc[rows["loss (points)"] == rows["loss (points)"].min(), "method"]
    text = f"**Asked for {target:g}x{f', the least mean loss: {listed(best)}' if len(rows) > 1 else ''}.**"
    losses = [f"{row['method']} {row['loss (points)']:.2f}{_bounded(row)} at {row['cr_disk']:.1f}x"
              for _, row in rows.iterrows()]
    if losses:
        text += f" Loss in points, least first: {'; '.join(losses)}."
    several = rows[rows["low"].notna()]
    if len(several):
        counts = listed(map(str, sorted(set(several["seeds"]))))
        text += (f" The 95 % interval ({counts} seeds, not corrected for the number of comparisons, all against the same "
                 f"controls) lies above zero for: {listed(several.loc[several['low'] > 0, 'method'])}; below zero for: "
                 f"{listed(several.loc[several['high'] < 0, 'method'])}.")
    elif losses:
        text += " One seed gives no interval."
    small, rivals = rows[rows["method"] == SMALL], rows[rows["vs_small_low"].notna()]
    if len(rivals):
        share = 100 * target / small["cr_disk"].iloc[0]
        text += (f" Against the 8-bit small network ({share:.1f} % of the bytes asked for), by the interval of the difference, "
                 f"{_told_apart(rivals['method'], rivals['vs_small_high'] < 0, rivals['vs_small_low'] > 0)}.")
    text += _choice_verdict(rows)
    if len(missing):
        text += f" Out of reach: {listed(f'{row.method} (seeds {row.seeds})' for row in missing.itertuples())}."
    return text


def _choice_verdict(rows):
    """What a user gets who chooses a method on the validation split, and how the searched plans and the small network do
    against it."""
    alone = rows[~rows["method"].isin(NOT_ALONE) & (rows["seeds"] == rows["seeds"].max())].sort_values("valid_loss")
    chosen = alone[alone["method"] == alone["chosen"]]
    if len(alone) < 2 or chosen.empty:
        return ""
    row, next_ = chosen.iloc[0], alone[alone["method"] != alone["chosen"]].iloc[0]
    text = (f" Of the methods alone the validation split takes {row['method']} ({row['valid_loss']:.3f} nats there, next "
            f"{next_['method']} {next_['valid_loss']:.3f}); its test loss, {row['loss (points)']:.2f}{_bounded(row)}, was not "
            "picked after the test.")
    against = [f"{rival['method']} {rival['vs_chosen']:.2f}{_bounded(rival, 'vs_chosen_low', 'vs_chosen_high')}"
               for _, rival in rows[rows["method"].isin(NOT_ALONE)].iterrows()]
    return text + (f" Lost against it, in points, this choice taken as given: {'; '.join(against)}." if against else "")


def _bounds(low, high):
    return f"{low:.2f} to {high:.2f}" if pd.notna(low) else ""


def record_tradeoff(tradeoff: Tradeoff) -> dict:
    """Hand the figures over to the run: every seed's row, the summary, the dense controls, the points out of reach."""
    return record(results=_plain(tradeoff.results), summary=_plain(tradeoff.summary), controls=_plain(tradeoff.controls),
                  unreachable=_plain(tradeoff.unreachable))


def _plain(frame):
    """None for what one seed cannot tell: metrics hold no NaN."""
    return frame.astype(object).where(frame.notna(), None)


def precision_table(precision: Precision) -> pd.DataFrame:
    """One row a point: means over the seeds with their standard deviations, and of accuracies the 95 % interval of the loss."""
    quality = quality_name(precision.task)
    rows = precision.summary.to_dict("records")
    for row in rows:
        row["95 % interval"] = _bounds(row.get("low", np.nan), row.get("high", np.nan))
        row["widths"] = row["method"] if row["when"] == FLOAT else f"{row['weight_bits']}/{row['activation_bits']}"
    names = {"cell": "cell", "when": "quantised", "widths": "weights/signals", "cr_disk": "cr_disk", "cr_model": "cr_model",
             "rnn_bytes": "RNN bytes", "valid": "validation", "test": f"test {quality}", "test std": "std", "lost": "lost",
             "lost std": "std lost", "95 % interval": "95 % interval", "control": "against float", "seeds": "seeds"}
    table = pd.DataFrame(rows)[list(names)].rename(columns=names)
    return table.drop(columns="95 % interval") if is_language(precision.task) else table


def precision_published(precision: Precision, hidden_size: int) -> pd.DataFrame:
    """Published points of the task, empty for all but Penn Treebank with 300 units. kilobytes: of the recurrent matrices of
    such a layer at the stated width, derived here."""
    columns = ["work", "cell", "weight_bits", "activation_bits", "float_perplexity", "perplexity", "in_training", "kilobytes"]
    if precision.task.name != "ptb" or hidden_size != 300:
        return pd.DataFrame(columns=columns)
    return pd.DataFrame([{field.name: getattr(p, field.name) for field in fields(p)}
                         | {"kilobytes": len(GATES[p.cell]) * hidden_size * 2 * hidden_size * p.weight_bits / 8000}
                         for p in PUBLISHED_PERPLEXITIES], columns=columns)


def precision_verdict(precision: Precision, published: pd.DataFrame, tolerance: float):
    """What the figures say of every cell, in paragraphs: which widths stay within `tolerance` (points of accuracy, percent of
    perplexity) on the validation split, and what the test split then says of them."""
    from IPython.display import Markdown

    task, summary = precision.task, precision.summary
    quality, unit = quality_name(task).removesuffix(" %"), "%" if is_language(task) else "points"
    paragraphs = []
    for cell, mine in summary.groupby("cell", sort=False):
        floats = mine[mine["when"] == FLOAT].set_index("method")
        further = f", trained on as long {floats.loc[TRAINED_ON, 'test']:.2f}" if TRAINED_ON in floats.index else ""
        text = [f"**{cell}.** In float, test {quality} {floats.loc[AS_TRAINED, 'test']:.2f}{further}."]
        if (wider := mine[mine["cell_bits"] > mine["activation_bits"]]).size:
            text.append(f"Its cell state has {wider['cell_bits'].min():.0f} bits where the other signals have fewer.")
        for when in (AFTER, IN):
            rows = mine[mine["when"] == when]
            if not len(rows):
                continue
            rows = rows[rows["seeds"] == floats.loc[AS_TRAINED, "seeds"]]  # none that was refused for one of them
            within = rows[rows["valid_lost"].round(9) <= tolerance].sort_values(["rnn_bytes", "activation_bits"])
            if not len(within):
                text.append(f"Quantised {when}, no pair of widths that all seeds have stays within {tolerance:g} {unit} on the "
                            "validation split.")
                continue
            row = within.iloc[0]
            text.append(f"Quantised {when}, the smallest matrices within {tolerance:g} {unit} on the validation split have "
                        f"{row['weight_bits']}-bit weights with {row['activation_bits']}-bit signals: test {quality} "
                        f"{row['test']:.2f}, lost {row['lost']:.2f} {unit}{_bounded(row)} against the float model "
                        f"{row['control']}, at cr_disk {row['cr_disk']:.1f}.")
        paragraphs.append(" ".join(text))
    if len(published):
        paragraphs.append(f"Published points: {PERPLEXITY_SOURCE}.")
    return Markdown("\n\n".join(paragraphs))


def _bounded(row, low="low", high="high") -> str:
    bounds = _bounds(row.get(low, np.nan), row.get(high, np.nan))
    return f" ({bounds})" if bounds else ""


def mixture_table(mixture: Mixture) -> pd.DataFrame:
    """One row per cell, target and kind: means over the seeds."""
    grouped = mixture.results.groupby(["cell", "target_cr_disk", "kind"], sort=False)
    return grouped[["bits", "cr_disk", "valid", "test", "lost"]].mean().join(grouped.size().rename("seeds")).reset_index()


def record_precision(precision: Precision, signals: pd.DataFrame, mixture: Mixture) -> dict:
    """Hand the figures over to the run: every point's summary and seeds, the signals one at a time, mixed precision."""
    return record(quality=quality_name(precision.task), lost=lost_name(precision.task), summary=_plain(precision.summary),
                  results=_plain(precision.results), signals=_plain(signals), mixture=_plain(mixture.results))


def acceleration_table(acceleration: Acceleration, loss_limit: float) -> pd.DataFrame:
    """One row per plan and asked ratio, means over the seeds: sizes, accuracy, cycles of a step, accelerations against dense
    16-bit, and whether the validation loss stays within the limit."""
    rows = [{
        "plan": row["label"], "asked": row["target_cr_disk"] if row["target_cr_disk"] > 1 else None, "cr_disk": row["cr_disk"],
        "cr_chip": row["cr_chip"], "accuracy %": row["accuracy %"], "loss (points)": row["loss (points)"],
        "95 % interval": _bounds(row["low"], row["high"]), "seeds": row["seeds"],
        "validation loss above": row["valid_loss_above"], "std above": row["valid_loss_above_std"],
        "within the limit": "yes" if row["valid_loss_above"] <= loss_limit else "no",
        "cycles a step": row["steady_state_cycles"], "acceleration": row["acceleration"],
        "of the sequence": row["acceleration_sequence"], "strength": row["strength"],
    } for row in acceleration.summary.to_dict("records")]
    return pd.DataFrame(rows)


def acceleration_parts_table(acceleration: Acceleration) -> pd.DataFrame:
    """One row per plan and asked ratio: accelerations where multiplications and where the loader bind, with all overhead and
    without, memory and modelled energy of the sequence."""
    rows = [{
        "plan": plan_name(row["label"], row["target_cr_disk"]), "acceleration": row["acceleration"], "bound": row["bound"],
        "weights resident": row["acceleration_resident"], "multiplications alone": row["acceleration_multiply"],
        "weights streamed": row["acceleration_streamed"], "loads alone": row["acceleration_load"],
        "words in the fullest PE": row["words_per_pe"], "BRAM36": row["bram36"],
        "energy (nJ, modelled)": _energy_text(row), "layout": row["layout"],
    } for row in acceleration.summary.to_dict("records") if pd.isna(row["refused"])]
    return pd.DataFrame(rows)


def _energy_text(row):
    return f"{_cell(row['energy_low_nj'])} to {_cell(row['energy_high_nj'])}" if pd.notna(row["energy_low_nj"]) else ""


def acceleration_verdict(acceleration: Acceleration, target: float, loss_limit: float):
    """Who is faster, win or lose, in paragraphs written from the figures."""
    from IPython.display import Markdown

    summary, spec = acceleration.summary, acceleration.spec
    mine = summary[(summary["target_cr_disk"] == target) & summary["acceleration"].notna()]
    hybrids = mine[mine["method"] == HYBRID].set_index("label")
    uniform = mine[~mine["method"].isin([HYBRID, SMALL])].sort_values("acceleration", ascending=False, kind="stable")
    small = [f"The small dense network of that ratio: {row['acceleration']:.2f}x, for {row['loss (points)']:.2f} points"
             f"{_bounded(row)}." for row in mine[mine["method"] == SMALL].to_dict("records")]
    wu = next(p for p in PUBLISHED if p.acceleration)
    paragraphs = []
    for label, row in hybrids.iterrows():
        datapath = "multiplied by FFT" if label.endswith(BY_FFT) else "in time domain"
        faster = uniform[uniform["acceleration"] > row["acceleration"]]
        than = [f"{name} {value:.2f}x" for name, value in zip(uniform["label"], uniform["acceleration"], strict=True)]
        equal = uniform[uniform["acceleration"] == row["acceleration"]]
        verdict = (f"In cycles it **loses** to {listed(faster['label'])}" if len(faster) else
                   f"In cycles it **draws** with {listed(equal['label'])}" if len(equal) else
                   "In cycles it **wins** against every uniform plan" if len(uniform) else "There is no uniform plan beside it")
        paragraphs.append(
            f"**Hybrid {datapath}, {spec.rows} x {spec.cols} PEs:** {row['steady_state_cycles']:,.0f} cycles a step, "
            f"{row['acceleration']:.2f} times as fast as dense 16-bit (multiplications alone: "
            f"{row['acceleration_multiply']:.2f}), at cr_disk {row['cr_disk']:.1f} and cr_chip {row['cr_chip']:.1f}, "
            f"for {row['loss (points)']:.2f} points"
            f"{_bounded(row)}. The published {wu.acceleration} ({wu.work}, whose baseline is not stated) is "
            f"{'reached' if round(row['acceleration'], 2) >= wu.acceleration else 'missed'}. {verdict} at the same ratio"
            f"{': ' + '; '.join(than) if than else ''}.")
    paragraphs += small
    if len(large := mine[mine["bram36"] > acceleration.block_rams]):
        taken = [f"{name} {count:,.0f}" for name, count in zip(large["label"], large["bram36"], strict=True)]
        paragraphs.append(f"**No design for the device**, which has {acceleration.block_rams:,} BRAM36: as modelled "
                          f"{listed(taken)} of them are taken.")
    within = acceleration.fastest(loss_limit, hybrid=False), acceleration.fastest(loss_limit, hybrid=True)
    fitting = " and that fits the device" if acceleration.block_rams < np.inf else ""
    texts = [f"none of the {kind} plans that all seeds have{fitting}" if row is None else
             f"the fastest {kind} plan is {plan_name(row['label'], row['target_cr_disk'])} with "
             f"{row['steady_state_cycles']:,.0f} cycles a step ({row['acceleration']:.2f}x, loss {row['loss (points)']:.2f} "
             f"points{_bounded(row)})" for kind, row in zip(("uniform", "hybrid"), within, strict=True)]
    plans = summary[~summary["method"].isin([BASELINE, SMALL])]
    tried = (plans["method"] == HYBRID).sum()
    text = (f"**Within the same loss limit** (mean validation loss at most {loss_limit:g} nats above the dense control's), of "
            f"{len(plans) - tried} uniform and {tried} hybrid plans at all asked ratios: {'; '.join(texts)}.")
    if all(row is not None for row in within):
        ratio = within[0]["steady_state_cycles"] / within[1]["steady_state_cycles"]
        lost = acceleration.accuracy_lost(within[1], within[0])
        text += (f" So in cycles the hybrid plan **{'wins' if ratio > 1 else 'loses' if ratio < 1 else 'draws'}**: it takes "
                 f"{1 / ratio:.2f} times as many. In accuracy it loses {lost['loss (points)']:.2f} points{_bounded(lost)} to "
                 f"that uniform plan (paired by seed and test item; negative: it gains)"
                 f"{_unless_told_apart(lost)}.")
    return Markdown("\n\n".join([*paragraphs, text]))


def _unless_told_apart(lost) -> str:
    """The end of a sentence on a loss with its interval, NaN of a single seed."""
    if np.isnan(lost["low"]):
        return ", which one seed does not tell apart"
    return ", not told apart" if lost["low"] <= 0 <= lost["high"] else ""


def region_table(schedules: dict[str, Schedule]) -> pd.DataFrame:
    """One row per plan and region: its PEs, the blocks that they take, multiply-accumulates of the mean and of the fullest PE
    in a step, and the share of a step for which the mean PE multiplies."""
    rows = []
    for label, schedule in schedules.items():
        mapping = schedule.mapping
        for n, region in enumerate(mapping.layout.regions):
            blocks = [f"{part_of(part)} {gate}" for (part, gate), block in mapping.blocks.items()
                      if mapping.layout.region_of(block.packed) == n]
            macs = mapping.macs[region.window]
            rows.append({"plan": label, "PEs": f"{region.rows} x {region.cols}",
                         "blocks": ", ".join(dict.fromkeys(blocks)), "mean PE": macs.mean(),
                         "fullest PE": macs.max(), "multiplying %": 100 * macs.mean() / schedule.steady_state_cycles})
    return pd.DataFrame(rows)


def product_table(schedules: dict[str, Schedule]) -> pd.DataFrame:
    """One row per plan, sum of matrix products and region: cycles of a step on the PEs, of the loader and on the links, and
    which of them binds (Schedule.products)."""
    return pd.DataFrame([{"plan": label} | row for label, schedule in schedules.items() for row in schedule.products()]
                        ).drop(columns="layer")


def stall_table(schedules: dict[str, Schedule]) -> pd.DataFrame:
    """Cycles of a step of the mean PE by what it does or waits for (stalls); every column sums to the steady-state cycles."""
    table = pd.DataFrame({label: stalls(schedule) for label, schedule in schedules.items()})
    table = table[(table != 0).any(axis=1)]
    table.loc["total"] = table.sum()
    return table


def speed_up_table(curves: pd.DataFrame) -> pd.DataFrame:
    """One row per form and kept fraction: cycles of the matrix-vector phase and of the whole step, speed-ups, each as a share
    of the ideal one, and the cycles of a step of the mean PE by what it does or waits for."""
    names = {"form": "form", "kept": "kept", "strength": "strength", "units": "units", "ideal": "ideal",
             "matvec_cycles": "multiplying", "speedup_matvec": "speed-up", "step_cycles": "whole step",
             "speedup_step": "speed-up of the step"}
    table = curves[list(names)].rename(columns=names)
    for what, after in (("matvec", "speed-up"), ("step", "speed-up of the step")):
        table.insert(table.columns.get_loc(after) + 1, f"% of ideal{' (step)' * (what == 'step')}",
                     100 * curves[f"efficiency_{what}"])
    table = table.join(curves[[name for name in STALLS if (curves[name] > 0).any()]])
    return table[curves["refused"].isna()]


def speed_up_verdict(curves: pd.DataFrame, kept: float):
    """What the curves say of one kept fraction, and where the cycles go that keep each form from the ideal."""
    from IPython.display import Markdown

    mark, lines = PUBLISHED_SPEED_UP, []
    rows = curves[(curves["kept"] == kept) & curves["speedup_step"].notna()].sort_values("efficiency_step", ascending=False)
    for row in rows.to_dict("records"):
        lost = sorted(((name, 100 * row[name] / row["step_cycles"]) for name in STALLS[1:]), key=lambda part: -part[1])
        parts = [f"{name} {share:.1f} %" for name, share in lost if share > 0.5]
        works = row["multiply"] * row["ideal"] / curves["multiply"].iloc[0]  # multiplications a stored weight
        lines.append(f"- **{row['form']}**: {row['speedup_matvec']:.2f} times as fast in the matrix-vector phase "
                     f"({100 * row['efficiency_matvec']:.1f} % of the ideal {row['ideal']:.2f}), {row['speedup_step']:.2f} in "
                     f"the whole step ({100 * row['efficiency_step']:.1f} %). Multiplications for each stored weight: "
                     f"{works:.2f}; of a step's cycles not multiplied: {listed(parts)}.")
    reached = rows[(rows["efficiency_step"] * mark.ratio).round(2) >= mark.speed_up]["form"]  # to the published digits
    return Markdown(f"Keeping {kept:g} of the weights of one random draw. {mark.work} published {mark.speed_up} at a ratio of "
                    f"{mark.ratio:g} ({100 * mark.speed_up / mark.ratio:.1f} % of the ideal); that share or more in the whole "
                    f"step: {listed(reached)}. (More than 100 % is possible: where units and PEs do not divide, the dense "
                    f"model fills its last PEs worse.)\n\n" + "\n".join(lines))


def record_acceleration(acceleration: Acceleration, curves: pd.DataFrame) -> dict:
    """Hand the figures over to the run: every seed's row, the summary, the points out of reach, the speed-up curves."""
    return record(results=_plain(acceleration.results), summary=_plain(acceleration.summary),
                  unreachable=_plain(acceleration.points.unreachable), curves=_plain(curves))


def crossover_table(spec: ArraySpec, weight_densities: list[float], input_densities: list[float], lookaheads: list[int],
                    units: int, bits: int) -> pd.DataFrame:
    """Sparse or dense operation of one random block of units x units (crossover), a row a point."""
    return pd.DataFrame(crossover(spec, weight_densities, input_densities, lookaheads, (units, units), bits))


def operation_verdict(table: pd.DataFrame, blocks: pd.DataFrame):
    """How often the operation that was predicted to be faster is the faster one, and what was lost where it is not. table: of
    crossover_table; blocks: of operation_study."""
    from IPython.display import Markdown

    rows = blocks[blocks["best"].notna()]
    equal = [int((some[f"{what} dense"] == some[f"{what} sparse"]).sum())  # where any choice is the best
             for some, what in ((table, "counted"), (rows, "sequences"))]
    chosen = [f"{row.part} {row.gate} {row.choice}" for row in rows[rows["lookahead"] == rows["lookahead"].min()].itertuples()]
    return Markdown(
        f"Random blocks: the predicted operation takes the fewest cycles in {table['right'].sum()} of {len(table)} points "
        f"(both take the same in {equal[0]}), and at most {100 * table['lost'].max():.1f} % more than the better one "
        f"elsewhere. Blocks of a trained model on real sequences: the choice is the best in {rows['best'].sum()} of "
        f"{len(rows)} cases (both take the same in {equal[1]}); the other way would save at most "
        f"{100 * rows['lost'].max():.1f} % of the cycles. Chosen with the shortest lookahead: {listed(chosen)}.")


def delta_verdict(delta):
    """The chosen delta threshold of a DeltaStudy, its test accuracy beside that without, and what it saves in each layer."""
    from IPython.display import Markdown

    table, label = delta.table, f"{delta.chosen:g}"
    if not (table["threshold"] == label).any():
        return Markdown("**No threshold** stays within the limit of the validation loss.")
    saved = []
    for layer, all_rows in table.groupby("layer", sort=False):
        rows = all_rows[all_rows["lookahead"] == all_rows["lookahead"].max()]
        none, row = (rows[rows["threshold"] == name].iloc[0] for name in ("none", label))
        saved.append(f"{layer} sends {100 * row['input sent']:.0f} % of its inputs and {100 * row['hidden sent']:.0f} % of its "
                     f"hidden values and multiplies {row['macs per step'] / none['macs per step']:.2f} times as much; a step "
                     f"takes {row['cycles mean']:.0f} cycles in the mean and {row['cycles p95']:.0f} in the 95th percentile, "
                     f"{row['acceleration']:.2f} times as fast as without a threshold and with a lookahead of "
                     f"{all_rows['lookahead'].iloc[0]}, {none['cycles mean'] / row['cycles mean']:.2f} times as fast by the "
                     "threshold alone")
    return Markdown(f"**Threshold {label}**, with a lookahead of {table['lookahead'].max()}: {'; '.join(saved)}. Test accuracy "
                    f"{delta.test_accuracy['chosen']:.1f} %, without a threshold {delta.test_accuracy['without']:.1f} %.")


def overlap_table(table: pd.DataFrame) -> pd.DataFrame:
    """overlap_study's rows for the eye, without those that were refused."""
    names = {"plan": "plan", "schedule": "schedule", "cycles": "cycles of all sequences", "per_step": "per step and sequence",
             "first_step": "until the first h"}
    return table.loc[table["refused"].isna(), list(names)].rename(columns=names)


def refusal_note(acceleration: Acceleration, overlap: pd.DataFrame, curves: pd.DataFrame):
    """What no plan reaches and what the array refused, each reason once, in words."""
    from IPython.display import Markdown

    missing = acceleration.points.unreachable.to_dict("records")
    plans, overlaps, forms = (table[table["refused"].notna()].to_dict("records")
                              for table in (acceleration.summary, overlap, curves))
    found = [(plan_name(row["label"], row["target_cr_disk"]), row["reason"]) for row in missing]
    found += [(plan_name(row["label"], row["target_cr_disk"]), row["refused"]) for row in plans]
    found += [(f"{row['plan']}, {row['schedule']}", row["refused"]) for row in overlaps]
    found += [(f"random {row['form']}, {row['kept']:g}", row["refused"]) for row in forms]
    reasons = {}
    for what, why in found:
        reasons.setdefault(why, {})[what] = None
    lines = [f"- {listed(whats)}: {why}" for why, whats in reasons.items()]
    return Markdown("\n".join(lines) or "Everything that was asked was within reach, and the array refused nothing.")
