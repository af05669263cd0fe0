"""Sweeps: many runs of one notebook, asked for by a TOML file, executed side by side, gone on with where they were.

The runs lie where single runs lie, in results/runs/ under their own identity; results/sweeps/<name>/ holds what is said
of them together: results.parquet with one row a run, sweep.json with what was asked, and the index page.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import os
import statistics
import threading
import tomllib
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

from workbench import runs

# Keys of a sweep file and of its table [pareto], with their types.
KEYS = {
    "description": str,
    "notebook": str,
    "seeds": list,
    "timeout_s": (int, float),
    "parameters": dict,
    "grid": dict,
    "list": list,
    "pareto": dict,
}
PARETO_KEYS = {"records": str, "x": str, "y": str, "group": list, "lower_is_better": list}


@dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for.

    name: stem of the file. parameters: one complete set a run, in the order of execution. swept: names of the parameters
    that the file varies, without the seed. seed_parameter: the one that `seeds` sets, None where the file has no seeds.
    timeout_s: wall-clock limit of each run. pareto: what the index page draws, see PARETO_KEYS.
    """

    name: str
    description: str
    notebook: Path
    parameters: tuple[dict, ...]
    swept: tuple[str, ...]
    seed_parameter: str | None
    timeout_s: float | None
    pareto: dict | None


def read(path) -> Sweep:
    """The sweep of a TOML file, every value of every run checked; ValueError or TypeError name the file and the rule.

    notebook: a name, or a path from the file's folder, as that of the parameter packed_file. [parameters]: the same in every
    run. [grid]: lists, every combination is a run. [[list]]: rows of parameters, each combined with the grid. seeds: one run
    each; they set the notebook's parameter `seed`, or `seeds` to a list of one.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"a sweep needs a TOML file, {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    _check_keys(path.name, data, KEYS)
    if "notebook" not in data:
        raise ValueError(f'{path.name} needs notebook = "NAME"')
    beside = path.parent / data["notebook"]
    notebook = runs.find_notebook(beside if beside.is_file() else data["notebook"])
    declared = runs.read_parameters(notebook)
    seed_parameter, seeds = _seeds(path.name, data, declared, notebook)
    fixed, grid, rows = data.get("parameters", {}), data.get("grid", {}), data.get("list", [{}])
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise TypeError(f"{path.name}: [grid] needs a list of values for {name}, got {values!r}")
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"{path.name}: [[list]] needs rows of parameters, got {rows!r}")
    in_rows = dict.fromkeys(name for row in rows for name in row)
    given = [*fixed, *grid, *in_rows, *([seed_parameter] if seeds else [])]
    if doubled := sorted({name for name in given if given.count(name) > 1}):
        raise ValueError(f"{path.name} sets {', '.join(doubled)} in more than one place")
    # Seeds vary fastest: runs that start together then train different models, not the same one twice.
    overrides = [
        {**fixed, **row, **dict(zip(grid, values, strict=True)), **seed}
        for row in rows
        for values in itertools.product(*grid.values())
        for seed in seeds or [{}]
    ]
    parameters = tuple(runs.complete(f"{path.name}: {notebook.name}", declared, values, path.parent)
                       for values in overrides)
    first = {}
    for n, values in enumerate(parameters):
        m = first.setdefault(runs.question(notebook.stem, values), n)
        if m < n:
            raise ValueError(f"{path.name}: runs {m + 1} and {n + 1} are the same: {shown(overrides[n])}")
    return Sweep(
        path.stem,
        data.get("description", ""),
        notebook,
        parameters,
        (*in_rows, *grid),
        seed_parameter if seeds else None,
        data.get("timeout_s"),
        _pareto(path.name, data.get("pareto")),
    )


def _check_keys(who, data, keys):
    for key, value in data.items():
        if key not in keys:
            raise ValueError(f"{who} has an unknown key {key!r}{runs.did_you_mean(key, keys)} The keys are {', '.join(keys)}")
        kinds = keys[key] if isinstance(keys[key], tuple) else (keys[key],)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{who}: {key} needs {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
        if key == "timeout_s" and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{who}: timeout_s needs a number of seconds above 0, got {value!r}")


def _seeds(who, data, declared, notebook):
    """The parameter that seeds set, and its value in every run of one combination."""
    if "seeds" not in data:
        return None, []
    seeds = data["seeds"]
    if not seeds or not all(type(seed) is int for seed in seeds):
        raise TypeError(f"{who}: seeds needs a list of whole numbers, got {seeds!r}")
    if "seed" in declared:
        return "seed", [{"seed": seed} for seed in seeds]
    if "seeds" in declared:
        return "seeds", [{"seeds": [seed]} for seed in seeds]
    raise ValueError(f"{who} has seeds, but {notebook.name} has no parameter seed or seeds")


def _pareto(who, pareto):
    if pareto is None:
        return None
    _check_keys(f"{who}: [pareto]", pareto, PARETO_KEYS)
    if missing := [key for key in ("x", "y") if key not in pareto]:
        raise ValueError(f"{who}: [pareto] needs {' and '.join(missing)}")
    group = pareto.get("group", [""])
    if not group or not all(isinstance(name, str) for name in group) or len(set(group)) < len(group):
        raise TypeError(f"{who}: [pareto] group needs a list of different names, got {group!r}")
    axes = (pareto["x"], pareto["y"])
    if unknown := [name for name in pareto.get("lower_is_better", []) if name not in axes]:
        raise ValueError(f"{who}: [pareto] lower_is_better names an axis, x or y, got {unknown[0]!r}")
    return pareto


def shown(values: dict) -> str:
    """Names and values of parameters, for a message."""
    return ", ".join(f"{name} {runs.as_text(value)}" for name, value in values.items()) or "the notebook's defaults"


# --- what is there ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One run of a sweep and where it stands. directory, status: of the result that counts for it, None where there is none;
    that of a failed run may be gone by now, as another process has had it again."""

    run: runs.Run
    state: str  # "cached", "stale", "failed" or "missing"
    directory: Path | None
    status: dict | None


def survey(sweep: Sweep, results: Path) -> list[Point]:
    """Where every run of the sweep stands. Unknown data raise ValueError. Stale: only older code or data answered."""
    code = runs.code_hash(sweep.notebook)
    named = [json.dumps([values.get("task"), values.get(runs.FILE)]) for values in sweep.parameters]
    digests = {names: runs.data_digest(values) for names, values in dict(zip(named, sweep.parameters, strict=True)).items()}
    asked = [runs.Run(sweep.notebook, values, code, digests[names])
             for names, values in zip(named, sweep.parameters, strict=True)]
    finished = [runs.ended(results / "runs" / run.id, "ok") for run in asked]
    older = {} if all(finished) else _answers(results)
    points, place = [], runs.place_of(sweep.notebook)
    for run, done in zip(asked, finished, strict=True):
        failed = results / "failed" / run.id
        answers = [(status["provenance"]["ended"], directory, status)
                   for directory, status in older.get(runs.question(run.notebook.stem, run.parameters), ())
                   if status.get("place", place) == place]  # old runs do not say theirs
        if done:
            points.append(Point(run, "cached", results / "runs" / run.id, done))
        elif status := runs.ended(failed, "failed"):
            points.append(Point(run, "failed", failed, status))
        elif answers:
            points.append(Point(run, "stale", *max(answers, key=itemgetter(0, 1))[1:]))
        else:
            points.append(Point(run, "missing", None, None))
    return points


def _answers(results):
    """Question -> (directory, status) of every finished run that answers it."""
    found = {}
    for directory in (results / "runs").glob("[!.]*"):
        status = runs.ended(directory, "ok")
        if status and status["schema"] == runs.SCHEMA:
            found.setdefault(runs.question(status["notebook"], status["parameters"]), []).append((directory, status))
    return found


def estimate_s(points: list[Point], to_run: int, workers: int) -> float | None:
    """Seconds that `to_run` runs will take, from the median of those that have finished; None where none has."""
    times = [point.status["provenance"]["wall_s"] for point in points if point.state in ("cached", "stale")]
    return math.ceil(to_run / workers) * statistics.median(times) if times else None


# --- execution --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a call of a sweep will do. points: all of the sweep; ours: those of this shard; to_run: those to be executed."""

    sweep: Sweep
    stale: str
    points: list[Point]
    ours: list[Point]
    to_run: list[Point]

    def counts(self) -> dict[str, int]:
        """Runs of this shard by their state, and how many will be executed."""
        states = [point.state for point in self.ours]
        return {"total": len(self.ours)} | {s: states.count(s) for s in ("cached", "stale", "failed", "missing")} | {
            "to run": len(self.to_run)}


def make_plan(sweep: Sweep, results: Path, *, stale: str = "rerun", shard: tuple[int, int] = (1, 1)) -> Plan:
    """shard (k, n): every n-th run, from the k-th on. stale: "rerun", or "warn" or "ignore", which keep older
    answers. ValueError where another notebook's sweep has the same name."""
    earlier = _kept(results / "sweeps" / sweep.name)
    place = runs.place_of(sweep.notebook)
    if earlier and (earlier["notebook"], earlier.get("place", place)) != (sweep.notebook.stem, place):
        raise ValueError(f"{results / 'sweeps' / sweep.name} holds a sweep of the notebook "
                         f"{earlier.get('place', earlier['notebook'])}, this one is of {place}: give the file another name")
    points = survey(sweep, results)
    ours = points[shard[0] - 1 :: shard[1]]
    wanted = ("missing", "failed", "stale") if stale == "rerun" else ("missing", "failed")
    return Plan(sweep, stale, points, ours, [point for point in ours if point.state in wanted])


def perform(plan: Plan, results: Path, *, workers: int, scheduler: str | None = None, progress=None) -> dict:
    """Execute what the plan says: run id -> runs.RunResult. A notebook that fails is a result.

    workers: runs at a time on this machine. scheduler: address of a dask scheduler whose workers, one run a thread, take
    the runs instead; they need this package and the folder `results` at the same path. progress: called with every run and
    its result, and with (None, None) about once a second. Whatever ends this call early, Ctrl-C or a full disk, stops all
    kernels first and keeps every finished run; a dask worker ends the run that it has begun. When the package or the
    notebook changes meanwhile, runs that have not begun are left with a RuntimeError, unless the plan keeps stale results:
    then they use the new code.
    """
    for folder in ("runs", "failed"):
        runs.tidy(results / folder)
    threads = 1 if scheduler else max(1, min(runs.given_threads() or math.inf, runs.cores() // workers))
    settings = {"timeout_s": plan.sweep.timeout_s, "threads": threads}
    cancelled, found = threading.Event(), {}
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
            settings["cancelled"] = cancelled
        else:
            pool = _dask_pool(stack, scheduler)
        waiting = set()
        try:
            pending = {pool.submit(_perform, point.run, results, plan.stale, settings): point.run for point in plan.to_run}
            waiting = set(pending)
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, 1, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    run = pending[future]
                    found[run.id] = _result(future, run, results)
                    if progress:
                        progress(run, found[run.id])
                if progress:
                    progress(None, None)
        except BaseException:
            cancelled.set()
            for future in waiting:
                future.cancel()
            pool.shutdown(wait=False)
            raise
    return found


def _perform(run, results, stale, settings):
    if "cancelled" in settings and settings["cancelled"].is_set():
        raise runs.Cancelled
    now = replace(run, code=runs.code_hash(run.notebook), data=runs.data_now(run.parameters))
    if now != run and stale == "rerun":
        what = "package or the notebook has" if now.code != run.code else "data have"
        raise RuntimeError(
            f"the {what} changed since the sweep began: it stops here, finished runs are kept; the same command starts again "
            "with what is there now, with --stale ignore it goes on and keeps the older results"
        )
    run = now
    done = results / "runs" / run.id
    if runs.is_finished(done):  # another process has had the same run meanwhile
        return runs.RunResult(done, "ok", True, "")
    return runs.perform(run, results, **settings)


def _result(future, run, results):
    try:
        return future.result()
    except (OSError, RuntimeError, runs.Cancelled):
        raise
    except Exception as error:  # a cluster has lost the run's worker: a failure of this run alone
        return runs.RunResult(results / "failed" / run.id, "failed", False, f"{type(error).__name__}: {error}")


def _dask_pool(stack, scheduler):
    try:
        from distributed import Client
    except ImportError:
        raise ValueError('--scheduler needs dask.distributed: pip install "lstm-compression-workbench[dask]"') from None
    client = stack.enter_context(Client(scheduler, timeout="30s", set_as_default=False))
    return stack.enter_context(client.get_executor(pure=False))


# --- the table --------------------------------------------------------------------------------------------------------

TABLE = "results.parquet"
ASKED = "sweep.json"


def write_table(sweep: Sweep, results: Path, command: str) -> Path:
    """Write results.parquet and sweep.json of the sweep from what lies on disk, and give their folder.

    Several shards may end at the same time: who writes looks again afterwards, so that the last one has seen all runs and
    finds the table that it wrote. Nothing is written where nothing has changed.
    """
    folder = results / "sweeps" / sweep.name
    folder.mkdir(parents=True, exist_ok=True)
    asked = {
        "name": sweep.name,
        "description": sweep.description,
        "notebook": sweep.notebook.stem,
        "place": runs.place_of(sweep.notebook),
        "swept": list(sweep.swept),
        "seed_parameter": sweep.seed_parameter,
        "pareto": sweep.pareto,
        "command": command,
    }
    while True:
        points = survey(sweep, results)
        state = asked | {"runs": [_mark(point) for point in points]}
        if _kept(folder) == state:
            return folder
        table = _frame(sweep, points).to_parquet(index=False)
        runs.replace_file(folder / TABLE, table)
        state["table"] = hashlib.sha256(table).hexdigest()
        runs.replace_file(folder / ASKED, (json.dumps(state, indent=1) + "\n").encode())


def _mark(point):
    """What of a run decides its row of the table."""
    return {"id": point.run.id, "state": point.state, "ended": point.status["provenance"]["ended"] if point.status else None}


def _kept(folder):
    """What sweep.json says of the table that lies beside it, None where they do not belong together."""
    try:
        state = json.loads((folder / ASKED).read_text())
        whole = state.pop("table") == hashlib.sha256((folder / TABLE).read_bytes()).hexdigest()
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return state if whole and "notebook" in state else None


def _frame(sweep, points):
    """One row a run: p_* parameters, m_* metrics, seed, state and provenance."""
    import pandas as pd

    rows = []
    for point in points:
        values = point.run.parameters
        seed = values[sweep.seed_parameter] if sweep.seed_parameter else None
        row = {
            "run_id": point.run.id,
            "state": {"cached": "ok"}.get(point.state, point.state),
            "seed": seed[0] if isinstance(seed, list) else seed,
            "error": None,
        }
        row |= {f"p_{name}": json.dumps(value) if isinstance(value, list) else value for name, value in values.items()}
        if status := point.status:
            if point.state == "failed":
                row["error"] = runs.error_line(status)
            else:
                row |= {f"m_{name}": value for name, value in runs.read_metrics(point.directory).items()}
            kept = ("commit", "dirty", "code", "data", "threads", "started", "ended", "wall_s", "command")
            row |= {name: status["provenance"].get(name) for name in kept}
            row |= {f"version_{name}": version for name, version in status["provenance"]["versions"].items()}
            row["directory"] = os.path.relpath(point.directory, point.directory.parents[1])
        rows.append(row)
    frame = pd.DataFrame(rows)
    for name in frame.columns:
        # A column has one type: what is a table, a list, or of several types becomes JSON text.
        kinds = {type(value) for value in frame[name] if value is not None and value == value}
        if kinds & {dict, list} or len(kinds - {int, float}) + bool(kinds & {int, float}) > 1:
            frame[name] = [None if value is None or value != value else json.dumps(value) for value in frame[name]]
    return frame


def results(sweep, root="results", *, records: str | None = None):
    """The table of a sweep as a pandas DataFrame: one row a run, p_* parameters, m_* metrics, seed, state, provenance.

    sweep: a name (below root/sweeps/), or the path of its folder or table. records: name of a metric that is itself a
    table (m_<records> holds it as JSON); then one row for each of its rows, whose columns become m_*.
    """
    import pandas as pd

    places = [Path(root) / "sweeps" / str(sweep) / TABLE, Path(sweep) / TABLE, Path(sweep)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = sorted(place.parent.name for place in (Path(root) / "sweeps").glob(f"*/{TABLE}"))
        raise ValueError(f"there is no sweep {str(sweep)!r} with results in {root}: it has {', '.join(known) or 'none'}")
    try:
        frame = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no whole table of a sweep, whose command writes it anew: {error}") from error
    return frame if records is None else explode(frame, records)


def explode(frame, records: str):
    """The rows of the metric `records` of every run: its columns as m_*, beside the run's parameters and provenance."""
    import pandas as pd

    column = f"m_{records}"
    if column not in frame:
        known = [name.removeprefix("m_") for name in frame.columns if name.startswith("m_")]
        raise ValueError(f"the runs have no metric {records!r}{runs.did_you_mean(records, known)} They have {', '.join(known)}")
    rows = []
    about = frame[[name for name in frame.columns if not name.startswith("m_")]]
    for (_, run), text in zip(about.iterrows(), frame[column], strict=True):
        table = json.loads(text) if isinstance(text, str) else [] if pd.isna(text) else text
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            raise ValueError(f"the metric {records!r} is no table of records, got {str(text)[:60]}")
        rows += [dict(run) | {f"m_{name}": value for name, value in row.items()} for row in table]
    return pd.DataFrame(rows)


INDEX = "index.html"


def stamp(asked: bytes, table: bytes) -> str:
    """What the index page bears of the two files that it was made from."""
    return hashlib.sha256(asked + table).hexdigest()


def index_is_new(folder: Path) -> bool:
    """Whether the index page of a sweep was made from the table that is there now."""
    index = folder / INDEX
    made_from = stamp((folder / ASKED).read_bytes(), (folder / TABLE).read_bytes())
    return index.is_file() and made_from.encode() in index.read_bytes()
