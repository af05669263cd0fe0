"""Figures: each function takes a table or a schedule and returns a matplotlib Figure. Nothing is computed here."""

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

# Colours that stay apart for colour-blind readers (Okabe and Ito 2008); kinds also differ by their row and label.
COLOURS = {"mac": "#0072B2", "drain": "#56B4E9", "activation": "#E69F00", "elementwise": "#D55E00", "multicast": "#009E73",
           "load": "#CC79A7", "config": "#999999", "transform": "#332288", "inverse": "#882255", "gather": "#88CCEE",
           "send": "#DDCC77"}
PALE = ("drain", "activation", "gather", "send")  # kinds whose bars need dark letters
GATE_COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7")  # in the model's order
MATRIX_LINES = ("--", "-", ":", "-.")  # of the weight matrices, in the model's order
LINEAR_NATS = 0.01  # losses are drawn on a logarithmic scale down to this, and linearly below
LONG_LABEL = 40  # characters of a legend's entry; longer ones are cut
SENSITIVE, INSENSITIVE = "#D55E00", "#0072B2"
# One pair a method: colours of the same palette (the last two of Tol 2021), and markers whose count shares no divisor.
METHOD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black", "#882255", "#999933")
METHOD_MARKERS = "os^Dv<P>Xp"
_LOSS_TICKS = (-20, -10, -5, -3, -2, -1, 0, 1, 2, 3, 5, 10, 20, 50, 100)
_RATIO_TICKS = [step * 10**power for power in range(5) for step in (1, 2, 5)]


def _method_style(n: int) -> tuple[str, str]:
    """Colour and marker of the n-th method (or other series) of a figure."""
    return METHOD_COLOURS[n % len(METHOD_COLOURS)], METHOD_MARKERS[n % len(METHOD_MARKERS)]


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


def excess_loss_figure(table: pd.DataFrame) -> Figure:
    """Map of the excess validation loss, mean over the seeds: a row a block, a column a compression.

    The colours are logarithmic on both sides of zero and linear within LINEAR_NATS of it.
    """
    values = table.pivot_table(index="block", columns="compression", values="excess_loss", sort=False)
    figure = Figure(figsize=(max(6, 2.4 + 0.65 * values.shape[1]), 1.9 + 0.36 * values.shape[0]), layout="constrained")
    axis = figure.subplots()
    largest = max(float(values.abs().to_numpy().max()), 10 * LINEAR_NATS)
    norm = SymLogNorm(linthresh=LINEAR_NATS, vmin=-largest, vmax=largest)
    image = _numbered_map(axis, values, norm, "RdBu_r", "{:.3f}")
    figure.colorbar(image, ax=axis, label="excess validation loss (nats)", shrink=0.9)
    return figure


def _numbered_map(axis, values, norm, cmap, form):
    """A coloured cell with its number for every value of a frame; values that are not there stay empty."""
    image = axis.imshow(values.to_numpy(), norm=norm, cmap=cmap, aspect="auto")
    for row, column in np.argwhere(values.notna().to_numpy()):
        value = values.iat[row, column]
        # Both ends of a diverging map are dark, its middle is pale. Adding zero turns a rounded -0.0 into 0.0.
        axis.text(column, row, form.format(round(value, 3) + 0.0), ha="center", va="center", fontsize=7,
                  color="white" if abs(norm(value) - 0.5) > 0.35 else "black")
    axis.set_xticks(range(values.shape[1]), values.columns, rotation=40, ha="right", rotation_mode="anchor", fontsize="small")
    axis.set_yticks(range(values.shape[0]), values.index, fontsize="small")
    return image


def excess_curve_figure(table: pd.DataFrame) -> Figure:
    """Excess loss of each block against that block's own ratio: a panel per method and width, a line per block through the
    means of the seeds, every seed a pale point. A method of a single strength has one panel, over its widths."""
    panels = {}
    for family, group in table.groupby(table["method"].str.split().str[0], sort=False):
        if group["method"].nunique() > 1:
            panels |= {f"{family}, {width} bits": rows for width, rows in group.groupby("bits", sort=False)}
        else:
            panels[group["method"].iloc[0]] = group
    gates, parameters = list(table["gate"].unique()), list(table["block"].str.rsplit(".", n=1).str[0].unique())
    figure = Figure(figsize=(10, 3.3 * -(-len(panels) // 2) + 0.7), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, sharex=True, sharey=True, squeeze=False)
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        for block, points in rows.groupby("block", sort=False):
            colour = GATE_COLOURS[gates.index(points["gate"].iloc[0]) % len(GATE_COLOURS)]
            style = MATRIX_LINES[parameters.index(block.rsplit(".", 1)[0]) % len(MATRIX_LINES)]
            means = points.groupby("compression")[["cr_disk", "excess_loss"]].mean().sort_values("cr_disk")
            axis.plot(points["cr_disk"], points["excess_loss"], "o", color=colour, alpha=0.25, markersize=4)
            axis.plot(means["cr_disk"], means["excess_loss"], style, color=colour, marker="o", markersize=5, label=block)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("symlog", linthresh=LINEAR_NATS)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    figure.supxlabel("cr_disk of the block alone", fontsize="medium")
    figure.supylabel("excess validation loss (nats)", fontsize="medium")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
    return figure


def rank_figure(ranks: pd.DataFrame) -> Figure:
    """Rank of every block, a panel per compression: each seed a point (the first on top), a bar at the mean, the top quarter
    shaded. The blocks are in the order of their mean rank over everything."""
    order = list(ranks.groupby("block")["rank"].mean().sort_values(kind="stable").index)
    seeds = list(ranks["seed"].unique())
    names = list(ranks["compression"].unique())
    across = min(4, len(names))
    figure = Figure(figsize=(max(5, 1.6 + 2.2 * across), (0.9 + 0.2 * len(order)) * -(-len(names) // across) + 0.4),
                    layout="constrained")
    axes = figure.subplots(-(-len(names) // across), across, sharex=True, sharey=True, squeeze=False)
    offsets = np.linspace(-0.25, 0.25, len(seeds)) if len(seeds) > 1 else [0.0]
    for axis, name in zip(axes.flat, names, strict=False):
        group = ranks[ranks["compression"] == name]
        for seed, offset in zip(seeds, offsets, strict=True):
            of_seed = group[group["seed"] == seed].set_index("block")["rank"].reindex(order)
            (point,) = axis.plot(of_seed, np.arange(len(order)) + offset, "o", color="#0072B2", alpha=0.8, markersize=4)
        means = group.groupby("block")["rank"].mean().reindex(order)
        (bar,) = axis.plot(means, np.arange(len(order)), "|", color="#D55E00", markersize=11, markeredgewidth=2.5)
        shade = axis.axvspan(0.5, max(1, len(order) / 4) + 0.5, color="#999999", alpha=0.2, linewidth=0)
        axis.set_title(name, fontsize="small")
        axis.grid(axis="y", alpha=0.3)
        axis.tick_params(labelbottom=True)
    axes[0, 0].set(xlim=(0.5, len(order) + 0.5), xticks=range(1, len(order) + 1))
    axes[0, 0].set_yticks(range(len(order)), order)
    axes[0, 0].invert_yaxis()
    for axis in axes.flat:
        axis.tick_params(labelsize="small")
    for axis in axes.flat[len(names):]:
        axis.remove()
    figure.legend([point, bar, shade], ["one seed (the first on top)", "mean of the seeds", "top quarter"],
                  loc="outside upper center", ncols=3, fontsize="small")
    figure.supxlabel("rank (1: the largest excess loss)", fontsize="medium")
    return figure


def agreement_figure(agreement: pd.DataFrame) -> Figure:
    """Map of Spearman's correlation between two compressions' rankings of the gates of a matrix."""
    size = len(agreement)
    figure = Figure(figsize=(3.4 + 0.48 * size, 2.2 + 0.36 * size), layout="constrained")
    axis = figure.subplots()
    image = _numbered_map(axis, agreement, Normalize(-1, 1), "RdBu_r", "{:.2f}")
    figure.colorbar(image, ax=axis, label="Spearman's correlation\n(within a matrix)", shrink=0.9)
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


def gantt_figure(schedule, step: int, stage: int = 0) -> Figure:
    """What runs when in one step of a schedule's program: a row a resource, a bar an operation, cycles from the step's first
    start. Of stages in turn one is drawn. Every second item of a batch is hatched; of layers side by side each names its PEs
    and links, and its bars on what they share. In a pipeline a layer is a step of the sequence behind the one below."""
    operations = [op for op in schedule.table(step) if op["stage"] == stage]
    if not operations:
        raise ValueError(f"gantt_figure finds no operations in step {step} of stage {stage}; the schedule has {schedule.steps} "
                         "steps")
    layers = {}  # resource -> the layers that it serves
    for op in operations:
        layers.setdefault(op["resource"], {})[op["layer"]] = None
    resources, many = list(layers), len({op["layer"] for op in operations}) > 1
    if many:  # what layers share below
        resources.sort(key=lambda resource: (len(layers[resource]) > 1, next(iter(layers[resource]))))
    first = min(op["start"] for op in operations)
    figure = Figure(figsize=(10, 0.55 * len(resources) + 1.4), layout="constrained")
    axis = figure.subplots()
    for op in operations:
        row, width = resources.index(op["resource"]), op["end"] - op["start"]
        axis.barh(row, width, 0.7, left=op["start"] - first, color=COLOURS[op["kind"]], edgecolor="white", linewidth=0.6,
                  hatch="///" * (op["item"] % 2))
    last = max(op["end"] for op in operations) - first
    for op in operations:
        label = op["name"].removeprefix(f"{op['kind']} ")
        if many and len(layers[op["resource"]]) > 1:
            label = f"{op['layer']} {label}"
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
    axis.set_yticks(range(len(resources)), [f"{next(iter(layers[resource]))} {resource}" if many and len(layers[resource]) == 1
                                            else resource for resource in resources])
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
        colour, marker = _method_style(n)
        label = "none" if kind is None or kind != kind else str(kind)
        label = _literal(label if len(label) <= LONG_LABEL else label[: LONG_LABEL - 1] + "…")
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
    axis.set(**{f"{side}label": f"{_literal(name[2:])}  ({'less' if name[2:] in lower_is_better else 'more'} is better)"
                for side, name in (("x", x), ("y", y))})
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", title=_literal(group[2:]), frameon=False)
    return figure


def space_figure(space: pd.DataFrame, x: str = "step_us", y: str = "bram36", colour: str = "energy_high_nj") -> Figure:
    """Every point of a design space (tables.space_table) by two figures, a third as its colour; those on the front are large
    and have a black rim. Scales are logarithmic where a figure spans more than a decade."""
    names = {"step_us": "time of a step (us)", "steady_state_cycles": "cycles of a step", "cycles": "cycles of the sequence",
             "bram36": "BRAM36", "dsp": "DSPs", "energy_low_nj": "modelled energy of the sequence, low (nJ)",
             "energy_high_nj": "modelled energy of the sequence, high (nJ)"}
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axis, fits = figure.subplots(), space[space["fits"]]

    def decades(column):
        return fits[column].min() > 0 and fits[column].max() > 10 * fits[column].min()

    norm = (LogNorm if decades(colour) else Normalize)(fits[colour].min(), fits[colour].max())
    for on_front, size, rim, label in ((False, 14, "none", "other arrays"), (True, 60, "black", "on the Pareto front")):
        some = fits[fits["front"] == on_front]
        dots = axis.scatter(some[x], some[y], c=some[colour], norm=norm, cmap="viridis", s=size, edgecolors=rim, linewidths=1,
                            alpha=1 if on_front else 0.5, zorder=2 + on_front, label=f"{label} ({len(some)})")
    for side, column in (("x", x), ("y", y)):
        if decades(column):
            getattr(axis, f"set_{side}scale")("log")
            ticks = getattr(axis, f"{side}axis")
            ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
            ticks.set_minor_formatter(NullFormatter())
    axis.set(xlabel=f"{names.get(x, x)}  (less is better)", ylabel=f"{names.get(y, y)}  (less is better)",
             title=f"{len(fits)} arrays" + f"; {len(space) - len(fits)} cannot hold the layer" * (len(fits) < len(space)))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.colorbar(dots, ax=axis, label=names.get(colour, colour))
    return figure


def _literal(text):
    """A text that matplotlib shows as it is, without looking for mathematics in it."""
    return text.replace("$", r"\$")


def _deviation(points, name):
    deviation = points[f"std {name[2:]}"]
    return deviation.where(deviation > 0, 0)


def tradeoff_figure(results: pd.DataFrame, summary: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Accuracy loss against compression ratio, both axes such that better is up and right. Seeds are pale points, means have
    the standard deviation of the loss over several seeds; means on the front are joined and full, the others grey inside. Of a
    single ratio the published points are left out and the axis is as wide as the ratios that were reached."""
    is_single = summary["target_cr_disk"].nunique() == 1
    published = published.iloc[:0] if is_single else published
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="black", linestyle="--", linewidth=1)
    front = summary[summary["front"]].sort_values("cr_disk")
    axis.plot(front["cr_disk"], front["loss (points)"], color="black", linewidth=1.5, alpha=0.6, zorder=2)
    handles = [Line2D([], [], color="black", linestyle="--", linewidth=1, label="dense control"),
               Line2D([], [], color="black", alpha=0.6, label="front of the means")]
    for n, (method, means) in enumerate(summary.groupby("method", sort=False)):
        colour, marker = _method_style(n)
        seeds = results[results["method"] == method]
        axis.plot(seeds["cr_disk"], seeds["loss_points"], marker, color=colour, alpha=0.3, markersize=4, markeredgewidth=0)
        axis.errorbar(means["cr_disk"], means["loss (points)"], means["loss std"].fillna(0), color=colour, fmt="none",
                      capsize=2, elinewidth=1, alpha=0.5)
        for best, inside in ((False, "lightgrey"), (True, colour)):
            part = means[means["front"] == best]
            axis.plot(part["cr_disk"], part["loss (points)"], marker, markersize=8, markeredgecolor=colour,
                      markerfacecolor=inside, markeredgewidth=1.5, zorder=3)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=method))
    for _, point in published.iterrows():
        axis.plot(point["ratio"], point["loss (%)"], "*", markersize=14, color="black", markerfacecolor="none", zorder=3)
        axis.annotate(point["work"], (point["ratio"], point["loss (%)"]), (-8, 4), textcoords="offset points",
                      ha="right", fontsize="small")
    handles += [
        Line2D([], [], color="grey", marker="o", markerfacecolor="lightgrey", linestyle="none", label="mean off the front"),
        Line2D([], [], color="grey", marker="o", markersize=4, markeredgewidth=0, linestyle="none", label="one seed"),
    ] + [Line2D([], [], color="black", marker="*", markersize=12, markerfacecolor="none", linestyle="none",
                label="published; data and\ncounting not stated")] * (not is_single)
    ratios = [*results["cr_disk"], *published["ratio"]]
    spread = "mean ± std over seeds; " if summary["seeds"].max() > 1 else ""
    ticks = [tick for tick in _RATIO_TICKS if min(ratios) / 1.3 <= tick <= max(ratios) * 1.3]
    axis.set(xlabel=f"compression ratio cr_disk ({'' if is_single else 'log scale; '}better: right)",
             ylabel="accuracy loss against the dense control (percentage points,\n"
                    f"{spread}linear up to 2, log beyond; better: up)")
    axis.set_yscale("symlog", linthresh=2, linscale=1.2)
    axis.set_yticks(_LOSS_TICKS, map(str, _LOSS_TICKS))
    if is_single:
        axis.xaxis.set_major_formatter("{x:g}x")
    else:
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axis.minorticks_off()
    losses = [*results["loss_points"], *published["loss (%)"], 0]
    axis.set_ylim(max(losses) * 1.3 + 0.5, min(losses) * 1.3 - 0.5)
    axis.grid(alpha=0.3)
    figure.legend(handles=handles, loc="outside right upper", fontsize="small", frameon=False)
    return figure


def interval_figure(results: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Accuracy loss of every method with its 95 % interval, a panel with its own scale for each asked ratio, left is better.
    Below a mean its seeds as pale points; one seed has no interval."""
    methods, targets = list(summary["method"].unique()), sorted(summary["target_cr_disk"].unique())
    figure = Figure(figsize=(10, 1.3 + 0.36 * len(methods)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(targets) or 1, sharey=True))  # an empty one where nothing was reached
    for axis, target in zip(panels, targets, strict=False):
        axis.axvline(0, color="black", linestyle="--", linewidth=1)
        for n, method in enumerate(methods):
            colour, marker = _method_style(n)
            seeds, means = (table[(table["method"] == method) & (table["target_cr_disk"] == target)]
                            for table in (results, summary))
            axis.plot(seeds["loss_points"], np.full(len(seeds), n + 0.3), ".", color=colour, alpha=0.5, markeredgewidth=0)
            axis.hlines([n] * len(means), means["low"].astype(float), means["high"].astype(float), color=colour, linewidth=1.5)
            axis.plot(means["loss (points)"], [n] * len(means), marker, color=colour, markersize=7)
        axis.set_title(f"asked for {target:g}x", fontsize="medium")
        axis.xaxis.set_major_locator(MaxNLocator(6 if len(targets) < 4 else 3, steps=[1, 2, 5, 10]))
        axis.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    figure.supxlabel("accuracy loss against the dense control (percentage points; better: left)", fontsize="medium")
    return figure


def precision_figure(summary: pd.DataFrame, quality: str, published: pd.DataFrame) -> Figure:
    """Bytes of the recurrent matrices against test quality, a panel a cell: a line per width of the signals through the widths
    of the weights, stars for what was trained inside its widths, the float model across, and published points where there are
    some. summary: of Precision; published: precision_published."""
    cells = list(summary["cell"].unique())
    figure = Figure(figsize=(5.2 * len(cells), 4.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(cells), sharey=True))
    handles = {}
    for axis, cell in zip(axes, cells, strict=True):
        mine = summary[summary["cell"] == cell]
        after, trained = mine[mine["when"] == "after training"], mine[mine["when"] == "in training"]
        widths = sorted({*summary.loc[summary["when"] != "float", "activation_bits"]}, reverse=True)
        for n, bits in enumerate(widths):
            colour, marker = _method_style(n)
            line = after[after["activation_bits"] == bits].sort_values("rnn_bytes")
            if len(line):
                handles[f"{bits}-bit signals"] = axis.errorbar(
                    line["rnn_bytes"] / 1000, line["test"], yerr=line["test std"].fillna(0), color=colour, marker=marker,
                    markersize=5, linewidth=1.2, capsize=2)
            for row in trained[trained["activation_bits"] == bits].itertuples():
                axis.plot(row.rnn_bytes / 1000, row.test, "*", color=colour, markersize=15, markeredgecolor="black", zorder=5)
                axis.annotate(f"{row.weight_bits}/{row.activation_bits}", (row.rnn_bytes / 1000, row.test), fontsize=8,
                              xytext=(7, 5), textcoords="offset points")
        floats = mine[(mine["when"] == "float") & (mine["method"] == "as trained")]["test"]
        handles["float"] = axis.axhline(floats.iloc[0], color="black", linestyle="--", linewidth=1)
        for row in published[published["cell"] == cell].itertuples():
            axis.plot(row.kilobytes, row.perplexity, "o", markerfacecolor="white", color="grey", markersize=7, zorder=4)
            axis.annotate(f"{row.work} {row.weight_bits}/{row.activation_bits}", (row.kilobytes, row.perplexity), fontsize=7,
                          color="dimgrey", xytext=(5, -9), textcoords="offset points")
        wide = mine["cell_bits"].dropna()
        axis.set(title=f"{cell}, cell state of at least {wide.min():.0f} bits" if wide.size else cell,
                 xlabel="recurrent matrices (kB)", xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"test {quality}")
    if quality == "perplexity":
        best = summary.loc[summary["when"] == "float", "test"].min()
        axes[0].set_ylim(0.95 * min(best, published["perplexity"].min() if len(published) else best), 1.6 * best)
        if beyond := int((summary["test"] > 1.6 * best).sum()):
            axes[0].set_ylabel(f"test {quality} ({beyond} {'points lie' if beyond > 1 else 'point lies'} above)")
    if (summary["when"] == "in training").any():
        handles["trained inside (weights/signals)"] = Line2D([], [], marker="*", color="white", markeredgecolor="black",
                                                             markerfacecolor="grey", markersize=12)
    if len(published):
        handles["published"] = Line2D([], [], marker="o", linestyle="none", color="grey", markerfacecolor="white")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure


def bits_figure(summary: pd.DataFrame, lost: str) -> Figure:
    """What post-training quantisation costs: a map a cell, widths of the weights across, of the signals down."""
    after = summary[summary["when"] == "after training"]
    cells = list(after["cell"].unique())
    if not cells:
        figure = Figure(figsize=(6, 1), layout="constrained")
        figure.text(0.5, 0.5, "no pair of widths could be packed after training", ha="center", va="center")
        return figure
    maps = {cell: after[after["cell"] == cell].pivot(index="activation_bits", columns="weight_bits", values="lost")
            for cell in cells}
    rows, columns = next(iter(maps.values())).shape
    figure = Figure(figsize=(1.6 + len(cells) * (1.4 + 0.6 * columns), 1.8 + 0.42 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(cells)))
    norm = SymLogNorm(linthresh=1, vmin=-100, vmax=100)
    for axis, (cell, values) in zip(axes, maps.items(), strict=True):
        image = _numbered_map(axis, values.sort_index(ascending=False), norm, "RdBu_r", "{:.2f}")
        axis.set(title=cell, xlabel="bits of a weight", ylabel="bits of a signal")
        axis.tick_params(axis="x", labelrotation=0)
    figure.colorbar(image, ax=list(axes), label=lost, shrink=0.9)
    return figure


def signal_noise_figure(errors: pd.DataFrame) -> Figure:
    """Signal-to-quantisation-noise ratio of every signal over the time steps: a panel a layer and direction."""
    names = list(errors["layer"].unique())
    figure = Figure(figsize=(9, 3.4 * len(names)), layout="constrained")
    for axis, name in zip(np.atleast_1d(figure.subplots(len(names), 1)), names, strict=True):
        for n, (signal, rows) in enumerate(errors[errors["layer"] == name].groupby("signal", sort=False)):
            axis.plot(rows["step"], rows["sqnr_db"], label=signal, color=METHOD_COLOURS[n], marker=METHOD_MARKERS[n],
                      markersize=4, markevery=max(1, len(rows) // 20), linewidth=1.2)
        axis.set(title=name, xlabel="time step", ylabel="signal to quantisation noise (dB)")
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", frameon=False)
    return figure


def one_signal_figure(rows: pd.DataFrame) -> Figure:
    """Excess validation loss with one signal alone at few bits: every seed a point, the mean a bar, a panel a cell."""
    cells = list(rows["cell"].unique())
    figure = Figure(figsize=(4.6 * len(cells), 3.4), layout="constrained")
    for axis, cell in zip(np.atleast_1d(figure.subplots(1, len(cells), sharey=True)), cells, strict=True):
        mine = rows[rows["cell"] == cell]
        signals = list(mine["signal"].unique())
        means = [mine.loc[mine["signal"] == signal, "excess_loss"].mean() for signal in signals]
        axis.bar(range(len(signals)), means, color="#56B4E9")
        axis.plot(mine["signal"].map(signals.index), mine["excess_loss"], "o", color="#0072B2", markersize=4)
        axis.set_xticks(range(len(signals)), [signal.replace("_", "\n") for signal in signals], fontsize="small")
        axis.set(title=f"{cell}, one signal at {mine['bits'].iloc[0]} bits", ylabel="excess validation loss (nats)")
        axis.grid(axis="y", alpha=0.3)
    return figure


def mixture_figure(results: pd.DataFrame, lost: str) -> Figure:
    """Loss against the ratio that was reached, mixed and uniform widths: means over the seeds joined, every seed a point."""
    cells = list(results["cell"].unique()) or ["no ratio asked for"]
    figure = Figure(figsize=(4.8 * len(cells), 3.8), layout="constrained")
    for axis, cell in zip(np.atleast_1d(figure.subplots(1, len(cells), sharey=True)), cells, strict=True):
        for kind, colour, marker in (("mixed", "#0072B2", "o"), ("uniform", "#D55E00", "s")):
            mine = results[(results["cell"] == cell) & (results["kind"] == kind)]
            axis.plot(mine["cr_disk"], mine["lost"], marker, color=colour, alpha=0.4, markersize=5)
            means = mine.groupby("target_cr_disk")[["cr_disk", "lost"]].mean()
            axis.plot(means["cr_disk"], means["lost"], color=colour, marker=marker, label=kind)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=cell, xlabel="cr_disk", ylabel=lost)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def crossover_figure(table: pd.DataFrame, blocks: pd.DataFrame | None = None) -> Figure:
    """Which operation of a block takes fewer cycles, a panel per lookahead: counted points in the colour of the better one,
    wrongly predicted ones in a ring, and the predicted borders, of these blocks and of endless ones. table: rows of
    array.crossover; blocks: those of real layers, rows of compare_operations, in the panel of their column `lookahead`."""
    lookaheads = sorted(table["lookahead"].unique())
    figure = Figure(figsize=(1.2 + 3.2 * len(lookaheads), 3.9), layout="constrained")
    colours = {"dense": INSENSITIVE, "sparse": SENSITIVE}
    for axis, lookahead in zip(np.atleast_1d(figure.subplots(1, len(lookaheads), sharey=True)), lookaheads, strict=True):
        mine = table[table["lookahead"] == lookahead]
        for (name, colour), marker in zip(colours.items(), "so", strict=True):
            best = mine[mine["best"] == name]
            axis.plot(best["input density"], best["weight density"], marker, color=colour, markersize=6, alpha=0.8,
                      label=f"{name} is better")
        wrong = mine[~mine["right"]]
        axis.plot(wrong["input density"], wrong["weight density"], "o", color="black", fillstyle="none", markersize=12,
                  label="predicted wrongly")
        for column, style in (("border", "k-"), ("ideal border", "k:")):
            line = mine.groupby("input density")[column].first()
            axis.plot(line.index, line, style, linewidth=1.2, label=f"predicted {column}")
        if blocks is not None:
            for name, some in blocks[blocks["lookahead"] == lookahead].groupby("choice"):
                axis.plot(some["input density"], some["weight density"], "*", color=colours[name], markeredgecolor="black",
                          markersize=11, label=f"real block, {name} chosen")
        axis.set(title=f"lookahead {lookahead}", xlabel="input density")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("weight density")
    labelled = {text: handle for axis in figure.axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=4, fontsize="small")
    return figure


def delta_figure(table: pd.DataFrame) -> Figure:
    """Delta thresholds of one layer: what is still sent and how accurate the model is, and cycles per step of real sequences,
    mean and from there to the 95th percentile, a line a lookahead. table: rows of delta_study."""
    figure = Figure(figsize=(10, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = table[table["lookahead"] == table["lookahead"].min()]
    place = np.arange(len(first))
    for n, (name, unit) in enumerate({"input sent": 100, "hidden sent": 100, "valid accuracy": 1}.items()):
        left.plot(place, unit * first[name], color=GATE_COLOURS[n], marker=METHOD_MARKERS[n], label=name)
    left.set(xlabel="delta threshold", ylabel="%", ylim=(0, 102))
    for n, (lookahead, rows) in enumerate(table.groupby("lookahead")):
        right.plot(place, rows["cycles mean"], color=GATE_COLOURS[n], marker=METHOD_MARKERS[n], label=f"lookahead {lookahead}")
        right.fill_between(place, rows["cycles mean"], rows["cycles p95"], color=GATE_COLOURS[n], alpha=0.2)
    right.set(xlabel="delta threshold", ylabel="cycles per step", ylim=(0, 1.05 * table["cycles p95"].max()))
    for axis in (left, right):
        axis.set_xticks(place, first["threshold"])
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def acceleration_figure(summary: pd.DataFrame, loss_limit: float, mark: float) -> Figure:
    """Acceleration of a step against dense 16-bit over the ratio on disk: a colour and marker a plan, full where the validation
    loss stays within the limit; mark: the published acceleration. summary: of Acceleration."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axis = figure.subplots()
    axis.axhline(1, color="black", linewidth=1)
    handles = [axis.axhline(mark, color="grey", linestyle="--", linewidth=1, label=f"published hybrid, {mark}")]
    known = summary[summary["acceleration"].notna()]
    for n, (label, rows) in enumerate(known.groupby("label", sort=False)):
        colour, marker = _method_style(n)
        rows = rows.sort_values("cr_disk")
        axis.plot(rows["cr_disk"], rows["acceleration"], color=colour, linewidth=0.8, alpha=0.6)
        within = rows["valid_loss_above"] <= loss_limit
        for some, face in ((rows[within], colour), (rows[~within], "white")):
            axis.plot(some["cr_disk"], some["acceleration"], marker, color=colour, markerfacecolor=face, markersize=9)
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=0.8, markersize=8, label=label))
    handles.append(Line2D([], [], color="grey", marker="o", markerfacecolor="white", linestyle="none",
                          label=f"hollow: validation loss more\nthan {loss_limit:g} nats above"))
    axis.set_xscale("log")
    axis.set_yscale("log", base=2)
    for scale, values in ((axis.xaxis, known["cr_disk"]), (axis.yaxis, [*known["acceleration"], mark, 1])):
        ticks = [tick for tick in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 40, 80, 160, 320, 640)
                 if min(values) / 1.15 <= tick <= max(values) * 1.15]
        scale.set_ticks(ticks, [f"{tick:g}x" for tick in ticks])
        scale.set_minor_formatter(NullFormatter())
    axis.set(xlabel="compression ratio cr_disk (log scale)", ylabel="acceleration of a step (log scale)")
    axis.grid(alpha=0.3)
    figure.legend(handles=handles, loc="outside right upper", fontsize="small", frameon=False)
    return figure


def region_figure(schedules: dict) -> Figure:
    """Which PEs take which gates, and beside it how much of a step they multiply, two plans a row. schedules: label ->
    Schedule."""
    rows = -(-len(schedules) // 2)
    figure = Figure(figsize=(11, 0.4 + 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    pairs = axes.reshape(-1, 2)
    shares = {label: 100 * s.mapping.macs * s.mapping.batch / s.steady_state_cycles for label, s in schedules.items()}
    largest = max(float(values.max()) for values in shares.values())
    for (left, right), (label, schedule) in zip(pairs, schedules.items(), strict=False):
        mapping, spec = schedule.mapping, schedule.mapping.spec
        for n, region in enumerate(mapping.layout.regions):
            left.add_patch(Rectangle((region.col, region.row), region.cols, region.rows, color=METHOD_COLOURS[n], alpha=0.25,
                                     linewidth=0))
            left.text(region.col + region.cols / 2, region.row + region.rows / 2, _region_text(mapping, n), ha="center",
                      va="center", fontsize=8, rotation=90 if region.cols < 0.4 * region.rows else 0)
        for axis, far in ((left.axvline, spec.cols), (left.axhline, spec.rows)):
            for place in range(0, far + 1, 4):
                axis(place, color="grey", linewidth=0.8)
        left.set(xlim=(0, spec.cols), ylim=(spec.rows, 0), aspect="equal")
        left.set_title(label.replace(", ", ",\n", 1), fontsize="medium")
        image = right.imshow(shares[label], vmin=0, vmax=largest, cmap="cividis", extent=(0, spec.cols, spec.rows, 0))
        right.set_title(f"{schedule.steady_state_cycles:,.0f} cycles a step,\nmean PE {shares[label].mean():.0f} %",
                        fontsize="medium")
        for axis in (left, right):
            axis.set(xticks=[0, spec.cols], yticks=[0, spec.rows])
            axis.tick_params(labelsize="small")
    for axis in pairs[len(schedules):].flat:
        axis.remove()
    outer = pairs[1 : len(schedules) : 2, 1] if len(schedules) > 1 else pairs[:1, 1]
    figure.colorbar(image, ax=list(outer), label="multiplying weights (% of a step)", shrink=0.9)
    return figure


def _region_text(mapping, region):
    blocks = {}
    for (_, gate), block in mapping.blocks.items():
        if mapping.layout.region_of(block.packed) == region:
            blocks.setdefault(type(block.packed).__name__.removeprefix("Packed").lower(), {})[gate] = None
    return "\n".join(f"{kind}\n{' '.join(gates)}" for kind, gates in blocks.items())


def speed_up_figure(curves: pd.DataFrame, published) -> Figure:
    """Speed-up over the ratio of dense to stored weights, the ideal line beside it, and below it as a share of the ideal: left
    the matrix-vector phase, right the whole step. curves: as speed_up gives them; published: PublishedSpeedUp."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    known = curves[curves["speedup_step"].notna() & (curves["kept"] < 1)]
    ends, shares = [1, known["ideal"].max()], known[["efficiency_matvec", "efficiency_step"]].to_numpy()
    for (upper, lower), what, title in zip(axes.T, ("matvec", "step"), ("matrix-vector phase", "whole step"), strict=True):
        upper.plot(ends, ends, color="black", linestyle="--", linewidth=1, label="ideal")
        lower.axhline(100, color="black", linestyle="--", linewidth=1)
        for n, (form, rows) in enumerate(known.groupby("form", sort=False)):
            colour, marker = _method_style(n)
            style = {"color": colour, "marker": marker, "linewidth": 1.2, "markersize": 7, "alpha": 0.8}
            upper.plot(rows["ideal"], rows[f"speedup_{what}"], label=form, **style)
            lower.plot(rows["ideal"], 100 * rows[f"efficiency_{what}"], **style)
        star = {"color": "black", "markerfacecolor": "none", "markersize": 15, "linestyle": "none", "marker": "*"}
        upper.plot(published.ratio, published.speed_up, label=f"published, {published.work}", **star)
        lower.plot(published.ratio, 100 * published.speed_up / published.ratio, **star)
        upper.set_title(title)
        upper.set_xscale("log", base=2)
        upper.set_yscale("log", base=2)
        lower.set_xlabel("dense weights / stored weights")
        for scale in (upper.xaxis, upper.yaxis):
            scale.set_major_formatter(StrMethodFormatter("{x:g}"))
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    near = 100 * shares[shares > 0.9].min(initial=0.98)  # what is far below is seen above
    axes[1, 0].set_ylim(near - 2, 100 * max(1, shares.max()) + 2)
    axes[0, 0].set_ylabel("times as fast as the dense model")
    axes[1, 0].set_ylabel("share of the ideal (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    return figure


def stalls_figure(curves: pd.DataFrame, kept: float, parts: tuple[str, ...]) -> Figure:
    """What the mean PE does in a step, percent of the step's cycles: a bar a form at one kept fraction, the dense model below.
    parts: the columns that sum to step_cycles."""
    rows = curves[((curves["kept"] == kept) | (curves["kept"] == 1)) & curves["step_cycles"].notna()]
    shown = [part for part in parts if (rows[part] > 0).any()]
    figure = Figure(figsize=(10, 1.4 + 0.42 * len(rows)), layout="constrained")
    axis, left = figure.subplots(), np.zeros(len(rows))
    for n, part in enumerate(shown):
        share = (100 * rows[part] / rows["step_cycles"]).to_numpy()
        axis.barh(np.arange(len(rows)), share, left=left, color=METHOD_COLOURS[n % len(METHOD_COLOURS)], label=part,
                  edgecolor="white", linewidth=0.5, hatch="//" if n >= len(METHOD_COLOURS) else None)
        left += share
    for n, row in enumerate(rows.itertuples()):
        axis.text(101, n, f"{row.step_cycles:,.0f} cycles, {100 * row.efficiency_step:.1f} % of ideal", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), rows["form"])
    axis.set(xlim=(0, 132), xticks=range(0, 101, 20), xlabel="share of a step's cycles (%)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=min(5, len(shown)), fontsize="small", frameon=False)
    return figure


def overlap_figure(table: pd.DataFrame) -> Figure:
    """Cycles per step and item, a bar a schedule, a panel a plan. table: of overlap_study."""
    known = table[table["refused"].isna()]
    plans = list(known["plan"].unique())
    figure = Figure(figsize=(10, 0.6 + 0.27 * known.groupby("plan").size().max() * -(-len(plans) // 2) + 0.5 * len(plans)),
                    layout="constrained")
    axes = figure.subplots(-(-len(plans) // 2), min(2, len(plans)), squeeze=False).ravel()
    for axis, plan in zip(axes, plans, strict=False):
        rows = known[known["plan"] == plan]
        colours = [SENSITIVE if layers > 1 else INSENSITIVE for layers in rows["layers"]]
        bars = axis.barh(range(len(rows)), rows["per_step"], color=colours)
        axis.bar_label(bars, fmt="{:,.0f}", fontsize="small", padding=3)
        axis.set_yticks(range(len(rows)), rows["schedule"], fontsize="small")
        axis.invert_yaxis()
        axis.set_title(plan, fontsize="medium")
        axis.set_xlim(0, 1.2 * rows["per_step"].max())
        axis.set_xlabel("cycles per step and sequence", fontsize="small")
    for axis in axes[len(plans):]:
        axis.remove()
    return figure
