"""Tables of a study as pandas DataFrames, one function a table, and the metrics that a run records."""

import hashlib
from dataclasses import fields
from numbers import Number

import pandas as pd

from workbench.array import ASSUMPTIONS, ArraySpec, Schedule
from workbench.array.cost import ENERGY_NOTE, PJ_PER_EVENT, STATIC_POWER, compare, energy
from workbench.array.schedule import EVENTS, SPLIT
from workbench.runs import record
from workbench.study import HYBRID, Comparison
from workbench.tasks import Task
from workbench.train import evaluate

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
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def task_table(task: Task) -> pd.DataFrame:
    """One row a split: sequences, frames (shortest, mean, longest) and features."""
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
    """One row per block and method, averaged over the seeds (recovery epochs: over the seeds that recover)."""
    names = {"loss_before": "loss before", "loss_after": "loss after", "accuracy_before": "% before",
             "accuracy_after": "% after", "recovered": "recovered", "recovery_epochs": "in epochs",
             "excess_loss": "excess loss"}
    if table["recovered"].isna().all():  # one-shot: there is no after
        names = {name: names[name] for name in ("loss_before", "accuracy_before", "excess_loss")}
    numbers = table.astype({"recovered": float, "recovery_epochs": float})
    means = numbers.groupby(["block", "method"], sort=False)[list(names)].mean()
    return means.reset_index().rename(columns=names)


def plan_table(comparison: Comparison, seed: int) -> pd.DataFrame:
    """The hybrid plan of one seed, block by block, with the sizes of what was packed."""
    return pd.DataFrame(comparison.plans[HYBRID][seed].table(comparison.packed[HYBRID][seed]))


def verdict(comparison: Comparison, schedules: dict[str, Schedule]):
    """Who wins, in a paragraph written from the figures: accuracy loss of every variant, acceleration of every plan."""
    from IPython.display import Markdown

    summary = comparison.summary().set_index("variant")
    hybrid = summary.loc[HYBRID]
    losses = [f"{name} {row['loss (points)']:.2f} ({row['low']:.2f} to {row['high']:.2f}) at {row['cr_disk']:.1f}x"
              for name, row in summary.iterrows() if row["arithmetic"] == "integers"]
    rivals = summary[(summary["arithmetic"] == "integers") & (summary.index != HYBRID)]
    better = [name for name, row in rivals.iterrows() if row["loss (points)"] <= hybrid["loss (points)"]]
    rows = {row["label"]: row["acceleration"] for row in compare(schedules)}
    faster = [name for name, acceleration in rows.items() if acceleration > rows[HYBRID]]
    return Markdown(
        f"Accuracy loss in points against the dense control, with its 95 % interval: {'; '.join(losses)}. "
        f"By its mean the hybrid plan is {'matched or beaten by ' + ', '.join(better) if better else 'ahead of the others'}. "
        f"Acceleration in the steady state: {'; '.join(f'{name} {value:.2f}x' for name, value in rows.items())}. "
        f"{'Faster than the hybrid plan: ' + ', '.join(faster) if faster else 'The hybrid plan is the fastest'}.")


def signal_table(comparison: Comparison, seed: int) -> pd.DataFrame:
    """Formats of the signals of the hybrid model, and the largest error of the table that writes each, in its last place."""
    rows = []
    for name, layer in comparison.packed[HYBRID][seed].layers.items():
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
    """Every field of the array and its value."""
    return pd.DataFrame([{"field": f.name, "value": getattr(spec, f.name)} for f in fields(spec)])


def hardware_table(schedules: dict[str, Schedule]) -> pd.DataFrame:
    """One row a figure, one column a plan: cycles, accelerations, memory, modelled energy and resources."""
    return pd.DataFrame(compare(schedules)).set_index("label").drop(columns=list(SPLIT)).T.rename_axis(columns=None)


def split_table(schedules: dict[str, Schedule]) -> pd.DataFrame:
    """Cycles of the whole sequence by what its critical path waits for; every column sums to the total."""
    table = pd.DataFrame({label: schedule.split() for label, schedule in schedules.items()})
    table.loc["total"] = table.sum()
    return table


def layout_table(schedule: Schedule) -> pd.DataFrame:
    """Every layout that the scheduler considered for one plan; those without steady-state cycles could not win any more."""
    return pd.DataFrame(schedule.candidates)


def energy_table(schedules: dict[str, Schedule]) -> pd.DataFrame:
    """Modelled dynamic energy of the sequence, "low to high" in nJ: a row an event and their sum, a column a plan."""
    columns = {}
    for label, schedule in schedules.items():
        modelled = energy(schedule.counts())
        columns[label] = {row["event"]: _interval(row["low_pj"], row["high_pj"]) for row in modelled.rows}
        columns[label] |= {"dynamic, total": _interval(modelled.low_pj, modelled.high_pj), "static": STATIC_POWER}
    return pd.DataFrame(columns)


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
        summary=comparison.summary(), results=comparison.results, classes=classes,
        search=search.assign(strength=search["strength"].astype(str)), hardware=compare(schedules),
    )
