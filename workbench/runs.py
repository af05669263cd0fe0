"""One run of one notebook: checked parameters, a subprocess of its own, a directory made whole by a rename.

results/runs/<run id>/ holds run.ipynb, metrics.json, status.json and log.txt of a finished run, and
results/failed/<run id>/ the same of the last failed attempt. Finished means: the status says ok and the metrics are
valid. The notebook's own metadata are not trusted, they call a killed kernel "completed".
"""

import ast
import contextlib
import datetime
import difflib
import errno
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import psutil

from workbench import __version__

SCHEMA = 1  # part of every run id: raise it where old results must not be reused
PACKAGE = Path(__file__).resolve().parent
NOTEBOOKS = PACKAGE.parent / "notebooks"
PACKAGES_RECORDED = ("torch", "numpy", "pandas", "papermill", "nbclient", "ipykernel")
# Parameters of these names say how a run is executed and never change its result: they are no part of its identity.
FILE = "packed_file"  # the parameter whose file is a run's data
EXECUTION_ONLY = ("workers", "checkpoints")
UNNAMED = ("integer", "empty")  # pandas' kinds of an index that does not name a table's rows
STATUS = {"schema": int, "state": str, "notebook": str, "parameters": dict, "provenance": dict}  # what a status.json has


# --- parameters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: `name: type = default  # help`."""

    name: str
    type: str
    default: object
    help: str


def find_notebook(notebook) -> Path:
    """The path itself, or `hybrid` -> notebooks/hybrid.ipynb of the repository; ValueError lists the known names."""
    path = Path(notebook)
    if path.suffix == ".ipynb" and path.is_file():
        return path
    known = {p.stem: p for p in sorted(NOTEBOOKS.glob("*.ipynb"))}
    if str(notebook) in known:
        return known[str(notebook)]
    raise ValueError(f"no notebook {str(notebook)!r}: give a path to an .ipynb file or one of {listed(known)}")


def read_parameters(notebook) -> dict[str, Parameter]:
    """Parameters of a notebook in the order of its cell tagged "parameters"; ValueError where the cell is not readable.

    Types are int, float, str, bool, list[int], list[float], list[str], each also as `X | None`.
    """
    path = find_notebook(notebook)
    return _parameters(_code_cells(path), path.name)


def resolve(notebook, overrides: dict) -> dict:
    """Defaults of `notebook` with `overrides` (values, or text as typed on the command line), checked and coerced.

    ValueError names an unknown parameter or a number that is not finite, TypeError a wrong type.
    """
    path = find_notebook(notebook)
    parameters = read_parameters(path)
    parsed = {
        name: _parsed(value, parameters[name].type) if isinstance(value, str) and name in parameters else value
        for name, value in overrides.items()
    }
    return complete(path.name, parameters, parsed)


def complete(who: str, parameters: dict[str, Parameter], overrides: dict, folder: str | Path = ".") -> dict:
    """Defaults of `parameters` with `overrides`, checked; text is no number here. `who` opens the messages of errors; folder:
    from where a relative path leads to a file."""
    values = {name: parameter.default for name, parameter in parameters.items()}
    for name, value in overrides.items():
        if name not in parameters:
            raise ValueError(f"{who} has no parameter {name!r}{did_you_mean(name, parameters)} It has {listed(parameters)}")
        values[name] = _checked(f"{who}: parameter {name!r}", value, parameters[name].type)
    if isinstance(path := values.get(FILE), str):  # a run has a folder of its own, from which a relative path leads elsewhere
        values[FILE] = str(Path(folder, path).resolve())
    return values


def did_you_mean(name: str, known) -> str:
    """The end of a sentence that names the known word nearest to an unknown one."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _code_cells(path):
    """(source, tags) of the code cells. Plain JSON: nbformat's validator takes a second to load, and papermill checks."""
    try:
        cells = json.loads(path.read_text())["cells"]
        return [
            ("".join(cell["source"]), sorted(cell["metadata"].get("tags", [])))
            for cell in cells
            if cell["cell_type"] == "code"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a Jupyter notebook: {error!r}") from error


def _parameters(cells, who):
    sources = [source for source, tags in cells if "parameters" in tags]
    if len(sources) != 1:
        raise ValueError(f'{who} needs one cell tagged "parameters", it has {len(sources)}')
    (source,) = sources
    lines = source.encode().splitlines()  # ast counts columns in UTF-8 bytes
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"{who}: the parameters cell is not Python: {error}") from error
    parameters = {}
    for statement in statements:
        line = lines[statement.end_lineno - 1]
        try:
            name, kind = statement.target.id, ast.unparse(statement.annotation)
            value = ast.literal_eval(statement.value)
        except (AttributeError, ValueError) as error:
            got = line.decode().strip()
            raise ValueError(f"{who}: a parameter reads `name: type = literal  # help`, got {got!r}") from error
        if kind.removesuffix(" | None") not in _TYPES:
            raise ValueError(f"{who}: parameter {name!r} needs a type of {listed(_TYPES)}, got {kind}")
        default = _checked(f"{who}: the default of parameter {name!r}", value, kind)
        comment = line[statement.end_col_offset :].decode().strip().removeprefix("#").strip()
        parameters[name] = Parameter(name, kind, default, comment)
    return parameters


# Type as written in a parameters cell -> Python type, example of its text on the command line.
_TYPES = {
    "int": (int, "3"),
    "float": (float, "0.5"),
    "str": (str, "text"),
    "bool": (bool, "true"),
    "list[int]": (list, "[0, 1]"),
    "list[float]": (list, "[0.5, 1]"),
    "list[str]": (list, '["a", "b"]'),
}


def as_text(value) -> str:
    """A parameter's value as typed on the command line, which `resolve` reads back."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _parsed(text, kind):
    """Text of the command line -> value; text that does not read as `kind` stays text and is refused by _checked."""
    base = kind.removesuffix(" | None")
    if base != kind and text.lower() == "none":
        return None
    truth = {"true": True, "false": False}
    readers = {"int": int, "float": float, "str": str, "bool": lambda text: truth[text.lower()]}
    try:
        return readers.get(base, json.loads)(text)
    except (ValueError, KeyError, RecursionError):
        return text


def _checked(who, value, kind):
    base = kind.removesuffix(" | None")
    python_type, example = _TYPES[base]
    if value is None and base != kind:
        return None
    if base == "float" and type(value) is int:
        with contextlib.suppress(OverflowError):  # that one stays whole and is refused
            value = float(value)
    if type(value) is not python_type:  # exactly: True is no int, and papermill would pass np.int64(3) on as text
        raise TypeError(f"{who} needs {kind}, for example {example}, got {value!r}")
    if base == "int" and not -(2**63) <= value < 2**63:  # what tables hold
        raise ValueError(f"{who} needs a whole number of at most 64 bits, got {value!r}")
    if base == "float" and not math.isfinite(value):
        raise ValueError(f"{who} needs a finite number, got {value!r}")
    if python_type is list:
        return [_checked(f"{who}, item {i}", item, base[len("list[") : -1]) for i, item in enumerate(value)]
    return value


def listed(names) -> str:
    """Names for a sentence."""
    return ", ".join(names) or "none"


# --- identity ---------------------------------------------------------------------------------------------------------


def code_hash(notebook) -> str:
    """SHA-256 over what the notebook runs: source and tags of its code cells, and every *.py of the package."""
    return _package_digest(_canonical(_code_cells(find_notebook(notebook)))).hexdigest()


def _package_digest(first=b""):
    digest = hashlib.sha256(first)
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest


def data_digest(parameters: dict) -> str | None:
    """Digest of the data that the parameter `task` names, or of the packed model that `packed_file` does; None without such a
    parameter or value. What is not there, or no packed model, raises ValueError."""
    if (path := parameters.get(FILE)) is not None:
        from workbench.packed import load

        load(path)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if (task := parameters.get("task")) is None:
        return None
    if not isinstance(task, str):
        raise ValueError(f"the parameter task names the data of a run and needs one name, got {task!r}")
    from workbench import tasks  # loads torch: only where a task is named

    return tasks.digest(task)


@dataclass(frozen=True)
class Run:
    """What one execution of a notebook depends on. parameters: complete and checked; code, data: digests."""

    notebook: Path
    parameters: dict
    code: str
    data: str | None

    @property
    def id(self) -> str:
        """Name of the run: 16 hexadecimal digits of a SHA-256 over the question, the code and the data. Versions of other
        packages are no part of it: the provenance names them."""
        identity = {"question": question(self.notebook.stem, self.parameters), "code": self.code, "data": self.data}
        return hashlib.sha256(_canonical({"schema": SCHEMA} | identity)).hexdigest()[:16]


def place_of(notebook) -> str:
    """Where a notebook lies, from the repository's root where it lies below that: two of one file name are told apart by it."""
    path, root = Path(notebook).resolve(), PACKAGE.parent
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def question(notebook: str, parameters: dict) -> str:
    """What a run asks, whatever code and data answer it: notebook (name without suffix) and parameters, as one text."""
    asked = {name: value for name, value in parameters.items() if name not in EXECUTION_ONLY}
    return _canonical({"notebook": notebook, "parameters": asked}).decode()


def _canonical(data):
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


# --- metrics, called inside the notebook ------------------------------------------------------------------------------


def record(**metrics) -> dict:
    """Hand results over to the run: numbers, texts, lists, dicts, arrays and data frames go into its metrics.json.

    Returns everything recorded so far as plain JSON data. A second call adds to the first, the later value wins. NaN
    and infinities raise ValueError by name. In a notebook run by hand nothing is written.
    """
    plain = {name: _plain(name, value) for name, value in metrics.items()}
    if "WB_RUN_DIR" not in os.environ:
        return plain
    path = Path(os.environ["WB_RUN_DIR"]) / "metrics.json"
    if path.exists():
        plain = read_metrics(path.parent) | plain
    _write_json(path, plain)
    return plain


def read_metrics(directory) -> dict:
    """Metrics of a run directory; ValueError unless they are there and are a non-empty object of finite values."""
    path = Path(directory) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ValueError("no metrics were recorded: the notebook must end with workbench.record(...)") from None
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(f"metrics must be a non-empty JSON object, got {str(metrics)[:60]}")
    return metrics


def _refuse_constant(text):
    raise ValueError(f"metrics must be finite, got {text}")


def _plain(name, value):
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # a pandas.DataFrame, seen without loading pandas
        if doubled := value.columns[value.columns.duplicated()].tolist():
            raise ValueError(f"record needs different columns in {name}, got {doubled[0]!r} more than once")
        named_rows = value.index.nlevels > 1 or value.index.name is not None or value.index.inferred_type not in UNNAMED
        value = (value.reset_index() if named_rows else value).to_dict("records")
    elif hasattr(value, "to_dict") and value.index.inferred_type == "string":  # a pandas.Series of named figures
        value = value.to_dict()
    elif hasattr(value, "tolist"):  # NumPy scalars and arrays
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"record cannot keep {name} = {value}: metrics must be finite; leave it out or give None")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"record cannot keep {name} = {value}: whole numbers have at most 64 bits here")
    if isinstance(value, str) and value.encode(errors="replace").decode() != value:
        raise ValueError(f"record cannot keep {name} = {value!r}: it is no valid Unicode text")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"record needs text as keys of {name}, got {wrong[0]!r}")
        return {key: _plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    raise TypeError(
        f"record keeps numbers, text, lists, dicts, arrays and data frames, {name} is a {type(value).__name__}"
    )


def _write_json(path, data):
    replace_file(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, though this process is killed or others write it too."""
    tidy(path.parent, path.name)
    temporary = path.with_name(f".tmp-{path.name}-{_owner()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunResult:
    """directory: where notebook, metrics, status and log lie; state: "ok" or "failed"; error: one line, "" when ok."""

    directory: Path
    state: str
    cached: bool
    error: str


class Cancelled(Exception):
    """The run was given up because its sweep ends; nothing of it is kept."""


def run(
    notebook, parameters: dict, results="results", *, force=False, timeout_s=None, threads=None, echo=None
) -> RunResult:
    """Run `notebook` with `parameters` (name -> value or text) in a subprocess, or reuse the finished run (cached).

    force: run again although finished. timeout_s: wall-clock limit of the whole run, None for no limit. threads: cap on
    numerical threads, None for OMP_NUM_THREADS or else `cores`. echo: binary stream that gets the log while it grows.
    Names and types are checked before anything starts (ValueError, TypeError); a notebook that fails is a result.
    """
    path = find_notebook(notebook)
    values = resolve(path, parameters)
    data = data_digest(values)
    results = usable(results)
    asked = Run(path, values, code_hash(path), data)
    done = results / "runs" / asked.id
    tidy(done.parent, asked.id)
    if not force and is_finished(done):
        return RunResult(done, "ok", True, "")
    threads = threads or given_threads() or cores()
    return perform(asked, results, threads=threads, timeout_s=timeout_s, echo=echo)


def perform(asked: Run, results: Path, *, threads: int, timeout_s=None, echo=None, cancelled=None) -> RunResult:
    """Run it now. cancelled: a threading.Event that ends it (Cancelled) from another thread; the rest as for `run`.

    A full disk is no result of the notebook but an OSError. A run during which the package or the data change has failed: its
    late cells may have loaded the new ones.
    """
    done, failed = results / "runs" / asked.id, results / "failed" / asked.id
    # Unique even where two threads of a process have the same run.
    build = done.with_name(f".tmp{threading.get_ident()}-{asked.id}-{_owner()}")
    status = {
        "schema": SCHEMA,
        "run_id": asked.id,
        "state": "running",
        "error": None,
        "notebook": asked.notebook.stem,
        "place": place_of(asked.notebook),
        "parameters": asked.parameters,
        "provenance": _provenance()
        | {
            "code": asked.code,
            "data": asked.data,
            "threads": threads,
            "command": _command(asked.notebook, asked.parameters),
        },
    }
    package = _package_digest().hexdigest()
    build.mkdir(parents=True)
    try:
        shutil.copyfile(asked.notebook, build / "run.ipynb")
        _write_json(build / "status.json", status)
        with open(build / "log.txt", "wb", buffering=0) as log:
            returncode = _execute(build, results, threads, timeout_s, log, echo, cancelled)
        status = _judged(build, returncode, timeout_s)
        if _is_full(build, status):  # no fault of the notebook: every later run would fail in the same way
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(results))
        now = {"package": _package_digest().hexdigest() == package, "data": data_now(asked.parameters) == asked.data}
        changed = [name for name, same in now.items() if not same]
        if status["state"] == "ok" and changed:
            error = {"class": "RuntimeError",
                     "message": f"the {' and the '.join(changed)} changed while the run executed: run it again"}
            status |= {"state": "failed", "error": error}
        _write_json(build / "status.json", status)
        ok = status["state"] == "ok"
        _publish(build, done if ok else failed)
    except BaseException:  # Ctrl-C and a full disk too: nothing half-written stays
        shutil.rmtree(build, ignore_errors=True)
        raise
    if ok:
        shutil.rmtree(failed, ignore_errors=True)
        return RunResult(done, "ok", False, "")
    return RunResult(failed, "failed", False, error_line(status))


def data_now(parameters):
    """data_digest, or why there is none any more."""
    try:
        return data_digest(parameters)
    except (ValueError, OSError) as error:
        return str(error)


def error_line(status: dict) -> str:
    """Class and message of a failed run in one line."""
    return "{class}: {message}".format(**status["error"]).splitlines()[0]


def read_status(directory) -> dict:
    """status.json of a run directory; ValueError where there is none, or none that is whole."""
    path = Path(directory) / "status.json"
    try:
        status = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        status = None
    if not isinstance(status, dict) or not all(isinstance(status.get(name), kind) for name, kind in STATUS.items()):
        raise ValueError(f"{directory} is not a run directory: it has no readable status.json")
    return status


def is_finished(directory) -> bool:
    """Whether `directory` holds a run whose status is whole and says ok, and whose metrics are valid."""
    return ended(directory, "ok") is not None


def ended(directory, state: str) -> dict | None:
    """The status of a run directory where it is whole and says that its run ended in that state, "ok" (then its metrics are
    valid too) or "failed"."""
    try:
        status = read_status(directory)
        if status["state"] != state or not {"ended", "wall_s"} <= status["provenance"].keys():
            return None
        if state == "ok":
            read_metrics(directory)
    except ValueError:
        return None
    return status


def usable(results) -> Path:
    """The folder of results as an absolute path; ValueError where it cannot be written."""
    results = Path(results).resolve()
    existing = next(place for place in (results, *results.parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"results cannot go to {results}: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"results cannot go to {results}: {existing} is not writable")
    return results


def _owner():
    """This process, so named that no later process, here or on another machine, has the same name."""
    return f"{socket.gethostname()}-{os.getpid()}-{psutil.Process().create_time():.2f}"


def tidy(folder: Path, name: str = "*") -> None:
    """Finish or remove what killed processes of this machine left of the run or file `name`, or of all in `folder`."""
    named = re.compile(rf"(\.\w+)-(.+)-{re.escape(socket.gethostname())}-(\d+)-([\d.]+)")  # as _owner ends it
    for leftover in folder.glob(f".*-{name}-*"):
        found = named.fullmatch(leftover.name)
        if not found or _lives(int(found[3]), float(found[4])):
            continue
        kind, run = found[1], found[2]
        with contextlib.suppress(FileNotFoundError):  # another process tidies too
            if kind == ".old" and not (folder / run).exists():
                os.replace(leftover, folder / run)
            elif leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _lives(pid, started):
    try:
        return abs(psutil.Process(pid).create_time() - started) < 60  # the system's clock may have been set meanwhile
    except psutil.NoSuchProcess:
        return False


def _publish(build, final):
    """Move `build` to `final`; what stood there steps aside and is deleted only when the new one is in place."""
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".old-{final.name}-{_owner()}")
    while build.exists():
        with contextlib.suppress(FileNotFoundError):
            os.replace(final, aside)
        try:
            os.replace(build, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process published the same run in between
                raise
        shutil.rmtree(aside, ignore_errors=True)


TRACEBACK = "traceback.txt"  # how the child hands the traceback of a failed cell over


def _execute(build, results, threads, timeout_s, log, echo, cancelled):
    """Run the child process and give its exit status, None where it was stopped at the limit."""
    environment = os.environ | {
        name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    environment |= {
        "MPLBACKEND": "agg",
        "WB_RUN_DIR": str(build),
        "WB_RESULTS": str(results),
        # The kernel works in the run directory: it must find this very package, and data named by a relative path.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
    }
    if "WORKBENCH_DATA" in os.environ:
        environment["WORKBENCH_DATA"] = os.path.abspath(os.environ["WORKBENCH_DATA"])
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench.runs", str(build)],
        cwd=build,
        env=environment,
        stdin=subprocess.PIPE,  # its end tells the child that this process is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    reader = threading.Thread(target=_copy_log, args=(process.stdout, log, echo))
    reader.start()
    end = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
    try:
        while process.poll() is None:
            if cancelled is not None and cancelled.is_set():
                raise Cancelled
            if time.monotonic() > end:
                return None
            time.sleep(0.05)
        return process.returncode
    finally:
        _kill_tree(process.pid)
        process.wait()
        _kill_strays(build)
        process.stdin.close()
        reader.join()
        process.stdout.close()
        # The traceback belongs into the log but not on the screen, where one message names the error.
        if (found := build / TRACEBACK).exists():
            log.write(found.read_bytes())
            found.unlink()


def _copy_log(stream, log, echo):
    while chunk := stream.read1():
        for target in filter(None, (log, echo)):
            # A full disk, a closed terminal: the log is cut, but the child must not wait for its reader.
            with contextlib.suppress(OSError):
                target.write(chunk)
                target.flush()


def _kill_tree(pid):
    """Kill a process and all below it: a kernel starts a session of its own, so killing the group would miss it."""
    try:
        root = psutil.Process(pid)
        tree = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _kill_strays(build):
    """Kill what outlived its parent: where the child is killed, its kernel may hang on, and holds the log open."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # other users' processes, and those that end meanwhile
            if process.environ().get("WB_RUN_DIR") == str(build):
                process.kill()


def _judged(build, returncode, timeout_s):
    """The status with its verdict, from what the run left behind."""
    status = read_status(build)
    started = datetime.datetime.fromisoformat(status["provenance"]["started"])
    ended = datetime.datetime.now(datetime.UTC)
    status["provenance"] |= {"ended": ended.isoformat(), "wall_s": round((ended - started).total_seconds(), 3)}
    error = status["error"]
    if returncode is None:
        error = {"class": "TimeoutError", "message": f"stopped at the wall-clock limit of {timeout_s:g} s"}
    elif returncode and error is None:
        ending = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with status {returncode}"
        error = {"class": "ChildProcessError", "message": f"the process of the run {ending}"}
    elif error and error["class"] == "DeadKernelError":
        error = error | {"message": "the kernel was killed, as the system does for want of memory, or crashed"}
    elif error is None:
        try:
            read_metrics(build)
        except ValueError as invalid:
            error = {"class": "ValueError", "message": str(invalid)}
    return status | {"state": "failed" if error else "ok", "error": error}


def _is_full(folder, status):
    """Whether a run failed because the disk of `folder` is full, or so nearly full that it found no room there."""
    if status["state"] == "ok":
        return False
    codes = [f"[Errno {number}]" for number in (errno.ENOSPC, errno.EDQUOT)]
    found_none = any(code in status["error"]["message"] for code in codes)
    return shutil.disk_usage(folder).free < (2**24 if found_none else 2**16)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def given_threads() -> int | None:
    """Numerical threads of a process by OMP_NUM_THREADS, of a list (one for each level of nesting) the first; None without."""
    if not (text := os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()):
        return None
    if not text.isdecimal() or not int(text):
        raise ValueError("OMP_NUM_THREADS needs a whole number of threads of at least 1, got "
                         f"{os.environ['OMP_NUM_THREADS']!r}")
    return int(text)


def _provenance():
    changes = _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"workbench": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES_RECORDED},
        "started": datetime.datetime.now(datetime.UTC).isoformat(),
    }


def _git(*arguments):
    """Output of a git command in the package's folder, None outside a repository or without git."""
    try:
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=PACKAGE, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _command(path, values):
    """The command that repeats this run: every parameter that differs from its default."""
    parameters = read_parameters(path)
    words = ["python", "-m", "workbench", "run", path.stem if path.parent.resolve() == NOTEBOOKS else str(path)]
    for name, value in values.items():
        if value != parameters[name].default:
            words += ["-p", name, as_text(value)]
    return shlex.join(words)


# --- the child process ------------------------------------------------------------------------------------------------


def _die_with_parent():
    os.read(0, 1)  # nothing is ever written: it returns when the parent's end is closed
    _kill_tree(os.getpid())


def _run_notebook(build):
    """Body of the child: run.ipynb is executed in place, an error goes into status.json and to the log."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # An optional checker of jsonschema, for a kind of field that notebooks do not have: its grammar takes a second to load.
    sys.modules["rfc3987_syntax"] = None
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from traitlets import default

    with tempfile.TemporaryDirectory(prefix="wb-") as private:

        class PrivateKernelManager(AsyncKernelManager):
            """Kernel of this very interpreter, over sockets of its own (TCP ports collide where many kernels start)."""

            @default("transport")
            def _default_transport(self):
                return "ipc"

            @default("ip")
            def _default_ip(self):
                return os.path.join(private, "k")

            @property
            def kernel_spec(self):
                return KernelSpec(**get_kernel_dict())

        # Names are checked already, and papermill's own pattern does not know `X | None`.
        logging.getLogger("papermill").setLevel(logging.ERROR)
        os.environ["IPYTHONDIR"] = private  # a user's start-up files must not change results
        status = read_status(build)
        try:
            notebook = papermill.execute_notebook(
                "run.ipynb",
                "run.ipynb",
                status["parameters"],
                kernel_name="python3",
                language="python",
                kernel_manager_class=PrivateKernelManager,
                start_timeout=120,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
            )
            # sys.exit(0) in a cell: papermill returns as if all were well, though later cells never ran.
            if any(cell.metadata.papermill.exception for cell in notebook.cells if "papermill" in cell.metadata):
                raise RuntimeError("a cell stopped the notebook early: cells must not call sys.exit")
        except papermill.PapermillExecutionError as error:
            failure = {"class": error.ename, "message": error.evalue}
            Path(TRACEBACK).write_text(str(error))
        except Exception as error:
            failure = {"class": type(error).__name__, "message": str(error)}
            Path(TRACEBACK).write_text(traceback.format_exc())
        else:
            return 0
        _write_json(Path("status.json"), status | {"error": failure})
        return 1


if __name__ == "__main__":
    sys.exit(_run_notebook(Path(sys.argv[1])))
