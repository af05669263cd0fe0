"""Figures: each function takes a table or a schedule and returns a matplotlib Figure. Nothing is computed here."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

# Colours that stay apart for colour-blind readers (Okabe and Ito 2008); kinds also differ by their row and label.
COLOURS = {"mac": "#0072B2", "drain": "#56B4E9", "activation": "#E69F00", "elementwise": "#D55E00", "multicast": "#009E73",
           "load": "#CC79A7", "config": "#999999"}
PALE = ("drain", "activation")  # kinds whose bars need dark letters
SENSITIVE, INSENSITIVE = "#D55E00", "#0072B2"


def sensitivity_figure(table: pd.DataFrame, classes: pd.DataFrame) -> Figure:
    """Excess validation loss per block and method, beside each gate's score and the line that divides the classes."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    pivot = table.pivot_table(index="block", columns="method", values="excess_loss", sort=False)  # mean over seeds
    place = np.arange(len(pivot))
    for n, (method, values) in enumerate(pivot.items()):
        left.barh(place + (n - (len(pivot.columns) - 1) / 2) * 0.8 / len(pivot.columns), values, 0.8 / len(pivot.columns),
                  label=method, color=list(COLOURS.values())[n])
    left.set(yticks=place, yticklabels=pivot.index, xlabel="excess validation loss (nats)", title="each block compressed alone")
    left.invert_yaxis()
    left.legend(fontsize="small", loc="lower right")
    colours = [SENSITIVE if c == "sensitive" else INSENSITIVE for c in classes["class"]]
    right.bar(classes["gate"], classes["score"], color=colours)
    right.axhline(classes["mean of gates"].iloc[0], color="black", linestyle="--", linewidth=1)
    right.set(xlabel="gate", ylabel="score (nats)", title="class of each gate")
    right.legend([Patch(color=SENSITIVE), Patch(color=INSENSITIVE), right.get_lines()[0]],
                 ["sensitive", "insensitive", "mean of the gates"], fontsize="small", loc="upper center",
                 bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False, columnspacing=1, handlelength=1.2)
    return figure


def accuracy_figure(results: pd.DataFrame) -> Figure:
    """Test accuracy of every variant: each seed a point, the mean a bar; left the validation before and after retraining."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    variants = list(results["variant"].unique())
    offsets = np.linspace(-0.15, 0.15, max(results.groupby("variant").size()))
    for n, variant in enumerate(variants):
        group = results[results["variant"] == variant]
        for axis, column, colour, shift in ((left, "valid_accuracy_before", "#E69F00", -0.2),
                                            (left, "valid_accuracy", "#0072B2", 0.2), (right, "test_accuracy", "#0072B2", 0)):
            axis.plot(n + shift + offsets[: len(group)], group[column], "o", color=colour, alpha=0.7, markersize=5)
            axis.hlines(group[column].mean(), n + shift - 0.18, n + shift + 0.18, color=colour, linewidth=3)
    left.set(title="validation split, before and after retraining", ylabel="accuracy (%)")
    left.legend(handles=[Patch(color="#E69F00", label="before"), Patch(color="#0072B2", label="after")], fontsize="small")
    right.set(title="test split, after retraining", ylabel="accuracy (%)")
    for axis in (left, right):
        axis.set_xticks(range(len(variants)), [v.replace(" ", "\n") for v in variants], fontsize="small")
        axis.grid(axis="y", alpha=0.3)
    return figure


def gantt_figure(schedule, step: int) -> Figure:
    """What runs when in one time step: a row a resource, a bar an operation, cycles from the step's first start."""
    operations = schedule.table(step)
    resources = list(dict.fromkeys(op["resource"] for op in operations))
    first = min(op["start"] for op in operations)
    figure = Figure(figsize=(10, 0.55 * len(resources) + 1.4), layout="constrained")
    axis = figure.subplots()
    for op in operations:
        row, width = resources.index(op["resource"]), op["end"] - op["start"]
        axis.barh(row, width, 0.7, left=op["start"] - first, color=COLOURS[op["kind"]], edgecolor="white", linewidth=0.6)
    last = max(op["end"] for op in operations) - first
    for op in operations:
        label = op["name"].removeprefix(f"{op['kind']} ")
        # Pipelined operations of one resource overlap: the label gets the room up to the next one's start.
        later = [other["start"] for other in operations
                 if other["resource"] == op["resource"] and other["start"] > op["start"]]
        room = min([op["end"], *later]) - op["start"]
        if room > 0.012 * last * max(len(label), 3):
            axis.text(op["start"] + room / 2 - first, resources.index(op["resource"]), label, ha="center",
                      va="center", fontsize=7, color="black" if op["kind"] in PALE else "white", clip_on=True)
    kinds = list(dict.fromkeys(op["kind"] for op in operations))
    axis.legend(handles=[Patch(color=COLOURS[kind], label=kind) for kind in kinds], ncols=len(kinds), fontsize="small",
                loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axis.set_yticks(range(len(resources)), resources)
    axis.invert_yaxis()
    axis.set(xlabel=f"cycles from the first start of step {step}", xlim=(0, last))
    return figure


def utilisation_figure(schedules: dict) -> Figure:
    """Share of all cycles in which each PE multiplies, one map a plan. schedules: label -> Schedule."""
    shares = {label: 100 * schedule.utilisation() for label, schedule in schedules.items()}  # (PE rows, PE columns), percent
    figure = Figure(figsize=(3 * len(shares) + 1, 3.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(shares)))
    largest = max(float(values.max()) for values in shares.values())
    for axis, (label, values) in zip(axes, shares.items(), strict=True):
        image = axis.imshow(values, vmin=0, vmax=largest, cmap="cividis")
        axis.set_title(f"{label}\nmean {values.mean():.1f} %", fontsize="medium")
        axis.set(xlabel="PE column", ylabel="PE row")
    figure.colorbar(image, ax=list(axes), label="multiplying (% of cycles)", shrink=0.8)
    return figure


# Markers beside colours: curves stay apart in print and for colour-blind readers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def sweep_figure(points: pd.DataFrame, samples: pd.DataFrame, x: str, y: str, lower_is_better: list[str]) -> Figure:
    """Means over the seeds with their standard deviation, every run as a small point, and the Pareto front of the means.

    points: as index.spread gives them, its first column decides the colour where it is a group; samples: one row a run, with
    the same columns.
    x, y: columns of both, m_* or p_*; lower_is_better: names of axes, without that prefix.
    """
    group = points.columns[0]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axis = figure.subplots()
    parts = [("all runs", points, samples)]
    if group in samples:  # isin, because a parameter that is none is NaN here, which equals nothing
        kinds = points[group].unique()
        parts = [(kind, points[points[group].isin([kind])], samples[samples[group].isin([kind])]) for kind in kinds]
    for n, (kind, mine, runs) in enumerate(parts):
        colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
        label = "none" if kind is None or kind != kind else str(kind).replace("$", r"\$")
        axis.errorbar(mine[x], mine[y], xerr=_deviation(mine, x), yerr=_deviation(mine, y), fmt=marker, color=colour,
                      markerfacecolor="white", markersize=9, capsize=3, label=label)
        axis.plot(runs[x], runs[y], marker, color=colour, alpha=0.5, markersize=4, linestyle="none", zorder=4)
    front = points[points["front"] == "yes"].sort_values(x)
    axis.plot(front[x], front[y], color="black", linewidth=1, linestyle="--", label="Pareto front of the means", zorder=0)
    if points[x].min() > 0 and points[x].max() > 10 * points[x].min():
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(**{f"{side}label": f"{name[2:]}  ({'less' if name[2:] in lower_is_better else 'more'} is better)"
                for side, name in (("x", x), ("y", y))})
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", title=group[2:], frameon=False)
    return figure


def _deviation(points, name):
    deviation = points[f"std {name[2:]}"]
    return deviation.where(deviation > 0, 0)
