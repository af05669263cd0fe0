"""The index page of a sweep: what ran, mean and spread over the seeds, a picture, a sortable table of all runs.

One file that opens with no network; its only script is the sorting of report_template/sort.js, and a content security
policy keeps any other from running.
"""

import base64
import contextlib
import hashlib
import io
import json
import math
import numbers
import os
from pathlib import Path

import pandas as pd

from workbench import plots, report, runs, sweep
from workbench.pareto import pareto_front

LONG_CELL = 60  # characters; longer values are left to the run's own report


def build_index(folder) -> Path:
    """Write index.html into the folder of a sweep (results/sweeps/<name>/) from its table, and give its path."""
    folder = Path(folder)
    about, table = (folder / sweep.ASKED).read_bytes(), (folder / sweep.TABLE).read_bytes()
    asked, frame = json.loads(about), pd.read_parquet(io.BytesIO(table))
    rows, shared = samples(frame, asked)
    points = spread(rows, asked)
    pareto = asked["pareto"]
    picture = None
    if pareto and len(points):
        axes = [column(rows, pareto[axis]) for axis in ("x", "y")]
        picture = plots.sweep_figure(points, rows, *axes, pareto.get("lower_is_better", []))
    script = (report.TEMPLATES / "sort.js").read_text()
    failed = frame[frame["state"] == "failed"]
    varied = [f"p_{name}" for name in asked["swept"]]
    over = _over(rows, asked) if len(points) else ""
    summed_up = f"Mean and spread over {over}"
    page = report.environment().get_template("sweep.html.j2").render(
        stamp=sweep.stamp(about, table),
        name=asked["name"],
        description=asked["description"],
        notebook=asked["notebook"],
        counts=_counts(frame),
        table=sweep.TABLE,
        css=(report.TEMPLATES / "style.css").read_text(),
        script=script,
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headings=[heading for heading, shown in (
            ({"id": "picture", "text": "Picture"}, picture is not None),
            ({"id": "points", "text": summed_up}, len(points) > 0),
            ({"id": "runs", "text": "Runs"}, True),
            ({"id": "failures", "text": "Failed runs"}, len(failed) > 0),
            ({"id": "parameters", "text": "The same in every run"}, True),
            ({"id": "provenance", "text": "Provenance"}, True)) if shown],
        picture=_png(picture) if picture else None,
        alt=_alt(points, pareto) if picture else None,
        caption=_caption(points, over) if picture else None,
        shared=("Not counted: rows of another run with the seed and every figure of one that is, as of a baseline that runs "
                f"share ({shared})." if shared else ""),
        summed_up=summed_up,
        points=_table(points.rename(columns=_plain), ()) if len(points) else None,
        runs=_runs(frame, asked, folder),
        failures=[{"run": _label(row, [*varied, "seed"]), "error": row["error"],
                   "notebook": _href(folder, row, "run.ipynb"), "log": _href(folder, row, "log.txt")}
                  for _, row in failed.iterrows()],
        parameters=[(_plain(name), _text(frame[name].iloc[0]) or "none") for name in frame
                    if name.startswith("p_") and name not in varied and frame[name].nunique(dropna=False) == 1],
        provenance=_provenance(frame, asked),
    )
    if problems := report.offline_problems(page, script=script):
        raise ValueError(f"the index of {folder} would not open without a network: {'; '.join(problems)}")
    runs.replace_file(folder / sweep.INDEX, page.encode())
    return folder / sweep.INDEX


def build_reports(folder, again: bool = False) -> list[str]:
    """Write the report of every finished run of a sweep that has none yet, or of all `again`; one message for each that
    cannot have one."""
    folder, problems = Path(folder), []
    frame = pd.read_parquet(folder / sweep.TABLE)
    for place in frame.loc[frame["state"].isin(("ok", "stale")), "directory"]:
        directory = folder.parents[1] / place
        if again or not (directory / report.REPORT).is_file():
            try:
                report.build(directory)
            except (ValueError, FileNotFoundError) as error:
                problems.append(f"no report of {directory}: {error}")
    return problems


def samples(frame: pd.DataFrame, asked: dict) -> tuple[pd.DataFrame, int]:
    """One row a measured point: the finished runs of a sweep, or the rows of the metric that its [pareto] names. And how many
    of those are left out because another run measured the same."""
    done = frame[frame["state"].isin(("ok", "stale"))]
    pareto = asked["pareto"] or {}
    if "records" not in pareto or not len(done):
        return done, 0
    rows = sweep.explode(done, pareto["records"])
    if "m_seed" not in rows:
        return rows, 0
    # What several runs measured of one model, as of a float baseline that they share, counts once for each point. On other
    # data, as of another fold, it is another model.
    data = [name for name in ("data", "p_task", "p_split") if name in rows]
    told = dict.fromkeys([name for name in rows if name.startswith("m_")] + data + _groups(rows, asked))
    same = rows[list(told)].astype(str).duplicated()
    return rows[~same], int(same.sum())


def spread(rows: pd.DataFrame, asked: dict) -> pd.DataFrame:
    """Mean and standard deviation (ddof 1) over the rows of a group, of its seeds where nothing else varies in it: one row a
    group, with their number.

    rows: as `samples` gives them. Groups: the columns of [pareto] group, else all swept parameters. Figures: the axes of
    [pareto], else every numeric metric of the runs. Column `front`: whether the mean lies on the Pareto front.
    """
    pareto = asked["pareto"]
    if not len(rows):
        return pd.DataFrame()
    groups = _groups(rows, asked)
    if pareto:
        figures = [column(rows, pareto[axis]) for axis in ("x", "y")]
        for name in figures:
            if rows[name].isna().all():
                raise ValueError(f"[pareto] needs numbers on its axes, {_plain(name)} has no value in any run")
            if not _is_number(rows[name].dtype):
                raise ValueError(f"[pareto] needs numbers on its axes, {_plain(name)} is {rows[name].dropna().iloc[0]}")
    else:
        figures = [name for name in rows if name.startswith("m_") and _is_number(rows[name].dtype)]
    if pareto:  # both means are of the rows that have both figures, and so is their number
        complete = rows[figures].notna().all(axis=1)
        rows = rows.assign(**{name: rows[name].where(complete) for name in figures})
    grouped = rows.groupby(groups, sort=False, dropna=False) if groups else rows.groupby(lambda _: 0)
    counted = grouped[figures[0]].count() if pareto else grouped.size()
    table = counted.rename("n").reset_index()[[*groups, "n"]]
    for name in figures:
        table[name] = grouped[name].mean().to_numpy()
        table[f"std {_plain(name)}"] = grouped[name].std(ddof=1).to_numpy()
    if pareto:
        lower = pareto.get("lower_is_better", [])
        front = pareto_front(*(table[name] for name in figures), lower_x=pareto["x"] in lower, lower_y=pareto["y"] in lower)
        table["front"] = ["yes" if on else "" for on in front]
    return table


def _groups(rows, asked):
    """The columns whose values make a point."""
    return [column(rows, name) for name in (asked["pareto"] or {}).get("group", ())] or [f"p_{name}" for name in asked["swept"]]


def _over(rows, asked):
    """What a point is the mean of, in words: its seeds, or rows that differ in more than those."""
    seed = "m_seed" if "m_seed" in rows else "seed"
    if not rows.duplicated([*_groups(rows, asked), seed]).any():
        return "the seeds"
    return "the rows of a point, of which several have one seed" if rows[seed].notna().any() else "the rows of a point"


def column(frame: pd.DataFrame, name: str) -> str:
    """The column of a metric or parameter; ValueError names what there is."""
    for prefix in ("m_", "p_"):
        if prefix + name in frame:
            return prefix + name
    known = sorted({_plain(c) for c in frame if c.startswith(("m_", "p_"))})
    raise ValueError(f"[pareto] names {name!r}, which no run has; the parameters and metrics are {', '.join(known)}")


def _plain(name):
    return name[2:] if name.startswith(("m_", "p_")) else name


def _counts(frame):
    states = frame["state"].value_counts()
    parts = [f"{states[state]} {word}" for state, word in
             (("ok", "finished"), ("stale", "of older code or data"), ("failed", "failed"), ("missing", "not run yet"))
             if state in states]
    return f"{len(frame)} runs: {', '.join(parts)}."


def _runs(frame, asked, folder):
    """The table of all runs: what was varied, where it stands, its short figures, links."""
    varied = [f"p_{name}" for name in asked["swept"]]
    metrics = [name for name in frame if name.startswith("m_") and frame[name].map(_short).all()]
    seed = ["seed"] if asked["seed_parameter"] else []
    table = frame[[*varied, *seed, "state", *metrics, *(["wall_s"] if "wall_s" in frame else [])]]
    table = table.rename(columns=lambda name: "wall time (s)" if name == "wall_s" else _plain(name))
    files = ((report.REPORT, "report"), ("run.ipynb", "notebook"), ("log.txt", "log"))
    links = [[{"href": _href(folder, row, name), "text": text} for name, text in files
              if isinstance(row.get("directory"), str) and (folder.parents[1] / row["directory"] / name).is_file()]
             for _, row in frame.iterrows()]
    return _table(table.assign(files=""), links)


def _short(value):
    return len(_text(value)) <= LONG_CELL and not str(value).startswith(("[", "{"))  # no tables as JSON


def _table(frame, links):
    # By position: a parameter and a metric may share a name.
    right = [_is_number(dtype) for dtype in frame.dtypes]
    rows = []
    for n, row in enumerate(frame.itertuples(index=False)):
        cells = [{"value": "" if _empty(v) else v, "text": _text(v, name), "number": number, "links": []}
                 for name, number, v in zip(frame, right, row, strict=True)]
        if links:
            cells[-1]["links"] = links[n]
        rows.append(cells)
    return {"columns": [{"name": n, "number": number} for n, number in zip(frame, right, strict=True)], "rows": rows}


def _is_number(dtype):
    return pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype)


def _empty(value):
    return value is None or value != value


def _text(value, name=""):
    """A cell as it is read: four significant digits, of a seed all, nothing where nothing is. name: of its column."""
    if _empty(value):
        return ""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):  # the table holds lists as JSON, but this may be any text
            return ", ".join(map(str, json.loads(value)))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return str(value)
    # A column of whole numbers is one of floats as soon as a run has none: both read the same.
    if name == "seed":
        return f"{value:.0f}"
    if abs(value) < report.DUST:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 9_999.5 else f"{value:.4g}"  # which would be 1e+04


def _label(row, names):
    return ", ".join(f"{_plain(name)} {_text(row[name], name)}" for name in names if not _empty(row[name])) or row["run_id"]


def _href(folder, row, name):
    return os.path.relpath(folder.parents[1] / row["directory"] / name, folder)


def _png(figure):
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return base64.b64encode(data.getvalue()).decode()


def _alt(points, pareto):
    on = points[points["front"] == "yes"]
    return f"{pareto['y']} against {pareto['x']}: {len(points)} points, {len(on)} of them on the Pareto front."


def _caption(points, over):
    most = int(points["n"].max())
    spread_of = (f"Small: every measured point. Large: the mean over {over}, with its standard deviation (ddof 1)" if most > 1
                 else "One run a point, so no spread can be told")
    return f"{spread_of}; n = {most}{'' if (points['n'] == most).all() else ' or fewer'}. Line: Pareto front of the means."


def _provenance(frame, asked):
    done = frame[frame["state"].isin(("ok", "stale", "failed"))]
    rows = [("Command", asked["command"])]
    for title, name in (("Commit", "commit"), ("Code", "code"), ("Data", "data"), ("Threads of a run", "threads")):
        if name in done:
            values = [_text(value) for value in done[name].dropna().unique()]
            rows.append((title, ", ".join(values) or "none recorded"))
    if "dirty" in done and done["dirty"].fillna(False).astype(bool).any():
        rows.append(("Uncommitted changes", f"in {int(done['dirty'].fillna(False).astype(bool).sum())} runs"))
    if len(done):
        rows += [("First start", done["started"].min()), ("Last end", done["ended"].max()),
                 ("Sum of wall times", f"{math.fsum(done['wall_s']):.0f} s")]
    versions = [(name.removeprefix("version_"), done[name].dropna().unique()) for name in done if name.startswith("version_")]
    return [*rows, ("Versions", ", ".join(f"{name} {' or '.join(values)}" for name, values in versions))]
