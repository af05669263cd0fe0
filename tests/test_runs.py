import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest

from workbench import runs

RECORD = "import workbench as wb\nwb.record(done=1)"


# --- parameters -------------------------------------------------------------------------------------------------------

ALL_TYPES = """\
task_name: str = "it's"  # a text, with # inside? no: "#"
hidden: int = 128
rate: float = 1  # an int literal becomes a float
deep: bool = False
seeds: list[int] = [0, 1]  # several
ratios: list[float] = [1, 2.5]
gates: list[str] = ["i", "f"]
limit: int | None = None  # no limit
label: str | None = "é"  # after a letter of two bytes
"""


def test_reads_typed_literals_with_their_help(tmp_path, write_notebook):
    parameters = runs.read_parameters(write_notebook(tmp_path / "n.ipynb", parameters=ALL_TYPES))
    assert list(parameters) == ["task_name", "hidden", "rate", "deep", "seeds", "ratios", "gates", "limit", "label"]
    assert parameters["rate"] == runs.Parameter("rate", "float", 1.0, "an int literal becomes a float")
    assert type(parameters["rate"].default) is float
    assert parameters["hidden"].help == ""
    assert parameters["ratios"].default == [1.0, 2.5]
    assert parameters["label"] == runs.Parameter("label", "str | None", "é", "after a letter of two bytes")


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("hidden", "64", 64),
        ("hidden", 64, 64),
        ("rate", "1e-3", 0.001),
        ("rate", 2, 2.0),
        ("deep", "True", True),
        ("deep", False, False),
        ("seeds", "[3, 4]", [3, 4]),
        ("ratios", "[1, 2]", [1.0, 2.0]),
        ("gates", '["o"]', ["o"]),
        ("limit", "none", None),
        ("limit", "7", 7),
        ("task_name", "12", "12"),
        ("label", None, None),
    ],
)
def test_text_and_values_become_the_declared_type(tmp_path, write_notebook, name, given, value):
    path = write_notebook(tmp_path / "n.ipynb", parameters=ALL_TYPES)
    resolved = runs.resolve(path, {name: given})[name]
    assert resolved == value and type(resolved) is type(value)
    assert runs.resolve(path, {name: runs.as_text(value)})[name] == value


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"hiden": "64"}, ValueError, r"no parameter 'hiden'; did you mean 'hidden'\? It has task_name, hidden"),
        ({"hidden": "64.0"}, TypeError, "parameter 'hidden' needs int, for example 3, got '64.0'"),
        ({"hidden": True}, TypeError, "needs int"),
        ({"hidden": np.int64(3)}, TypeError, r"needs int, .*got np.int64\(3\)"),
        ({"hidden": None}, TypeError, "needs int"),
        ({"rate": "fast"}, TypeError, "needs float, .*got 'fast'"),
        ({"rate": "nan"}, ValueError, "needs a finite number, got nan"),
        ({"ratios": "[1, Infinity]"}, ValueError, "'ratios', item 1 needs a finite number"),
        ({"deep": "yes"}, TypeError, "needs bool, for example true, got 'yes'"),
        ({"deep": 1}, TypeError, "needs bool"),
        ({"seeds": "3"}, TypeError, r"needs list\[int\], for example \[0, 1\], got 3"),
        ({"seeds": "0,1"}, TypeError, r"needs list\[int\]"),
        ({"seeds": [0, 1.5]}, TypeError, "'seeds', item 1 needs int, .*got 1.5"),
        ({"seeds": (0, 1)}, TypeError, r"needs list\[int\]"),
        ({"limit": "nothing"}, TypeError, r"needs int \| None"),
        ({"hidden": str(2**63)}, ValueError, "'hidden' needs a whole number of at most 64 bits, got 9223372036854775808"),
        ({"seeds": [0, -(2**63) - 1]}, ValueError, "'seeds', item 1 needs a whole number of at most 64 bits, got -9223372036"),
        ({"rate": 10**400}, TypeError, "'rate' needs float, for example 0.5, got 1000"),
        ({"seeds": "[" * 100_000}, TypeError, r"needs list\[int\]"),
    ],
)
def test_wrong_parameters_are_refused(tmp_path, write_notebook, overrides, error, message):
    with pytest.raises(error, match=message):
        runs.resolve(write_notebook(tmp_path / "n.ipynb", parameters=ALL_TYPES), overrides)


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        ("seed = 0", ValueError, "a parameter reads `name: type = literal  # help`, got 'seed = 0'"),
        ("seed: int", ValueError, "a parameter reads"),
        ("seed: int = 1 + n", ValueError, "a parameter reads"),
        ("import os", ValueError, "a parameter reads"),
        ("seed: tuple = (1,)", ValueError, "parameter 'seed' needs a type of int, float, .*got tuple"),
        ('seed: int = "3"', TypeError, "the default of parameter 'seed' needs int"),
    ],
)
def test_unreadable_parameters_cells_are_refused(tmp_path, write_notebook, cell, error, message):
    with pytest.raises(error, match=message):
        runs.read_parameters(write_notebook(tmp_path / "n.ipynb", parameters=cell))


def test_what_is_no_notebook_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no notebook 'hybird': give a path to an .ipynb file or one of"):
        runs.find_notebook("hybird")
    (tmp_path / "n.ipynb").write_text("not JSON")
    with pytest.raises(ValueError, match="n.ipynb is not a Jupyter notebook"):
        runs.read_parameters(tmp_path / "n.ipynb")
    (tmp_path / "n.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    with pytest.raises(ValueError, match='needs one cell tagged "parameters", it has 0'):
        runs.read_parameters(tmp_path / "n.ipynb")


# --- identity ---------------------------------------------------------------------------------------------------------


def test_run_id_depends_on_all_that_the_result_depends_on(tmp_path, write_notebook):
    path = write_notebook(tmp_path / "n.ipynb", RECORD)
    code = runs.code_hash(path)
    asked = runs.Run(path, {"a": 1, "b": 2.0, "workers": 1}, code, None)
    assert len(asked.id) == 16
    assert replace(asked, parameters={"b": 2.0, "a": 1}).id == asked.id
    assert replace(asked, parameters={"a": 1, "b": 2.0, "workers": 2, "checkpoints": "here"}).id == asked.id
    others = [{"notebook": Path("m.ipynb")}, {"parameters": {"a": 2, "b": 2.0}}, {"code": "other"}, {"data": "digest"}]
    assert asked.id not in [replace(asked, **other).id for other in others]


def test_code_hash_reads_code_cells_only(tmp_path, write_notebook):
    same = runs.code_hash(write_notebook(tmp_path / "a.ipynb", "# text", RECORD))
    assert runs.code_hash(write_notebook(tmp_path / "b.ipynb", RECORD, "# other text")) == same
    assert runs.code_hash(write_notebook(tmp_path / "c.ipynb", RECORD + " ")) != same
    assert runs.code_hash(write_notebook(tmp_path / "d.ipynb", RECORD, parameters="seed: int = 1")) != same


def test_data_digest_names_the_task_or_refuses_it():
    assert runs.data_digest({"seed": 0}) is None and runs.data_digest({"task": None}) is None
    with pytest.raises(ValueError, match="the parameter task names the data of a run and needs one name, got \\['fsdd'\\]"):
        runs.data_digest({"task": ["fsdd"]})
    assert len(runs.data_digest({"task": "japanese_vowels"})) == 64
    with pytest.raises(ValueError, match="japanese_vowles"):
        runs.data_digest({"task": "japanese_vowles"})


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_record_writes_plain_json_and_merges(tmp_path, monkeypatch):
    monkeypatch.setenv("WB_RUN_DIR", str(tmp_path))
    runs.record(acc=np.float32(0.5), kept=np.arange(2), label="x", nothing=None)
    frame = pd.DataFrame({"loss": [1.0, 2.0]}, index=pd.Index(["i", "f"], name="gate"))
    assert runs.record(table=frame, acc=1, nested={"a": (np.int64(1), True)}) == {
        "acc": 1,
        "kept": [0, 1],
        "label": "x",
        "nothing": None,
        "table": [{"gate": "i", "loss": 1.0}, {"gate": "f", "loss": 2.0}],
        "nested": {"a": [1, True]},
    }
    assert runs.read_metrics(tmp_path)["table"][1] == {"gate": "f", "loss": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_record_by_hand_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("WB_RUN_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert runs.record(acc=np.float64(1.5)) == {"acc": 1.5}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), ValueError, "record cannot keep m = nan"),
        (np.array([0.0, np.inf]), ValueError, r"m\[1\] = inf"),
        (pd.DataFrame({"loss": [1.0, np.nan]}), ValueError, r"m\[1\]\['loss'\] = nan"),
        # What the table of a sweep could not hold would cost the whole table.
        ("\udc80", ValueError, r"record cannot keep m = '\\udc80': it is no valid Unicode text"),
        ([1, 2**63], ValueError, r"record cannot keep m\[1\] = 9223372036854775808: whole numbers have at most 64 bits"),
        ({1: 2}, TypeError, "text as keys of m, got 1"),
        ({"a": {2}}, TypeError, r"m\['a'\] is a set"),
    ],
)
def test_record_refuses_by_name(tmp_path, monkeypatch, value, error, message):
    monkeypatch.setenv("WB_RUN_DIR", str(tmp_path))
    with pytest.raises(error, match=message):
        runs.record(m=value)
    assert list(tmp_path.iterdir()) == []


def test_rows_with_names_keep_them():
    table = pd.DataFrame({"x": [1.0, 3.0]})
    described = runs.record(a=table.describe())["a"]
    assert [row["index"] for row in described][:3] == ["count", "mean", "std"] and described[1]["x"] == 2.0
    assert runs.record(a=table[table["x"] > 1])["a"] == [{"x": 3.0}]  # the numbers of rows are no names
    assert runs.record(a=table.iloc[:0])["a"] == []
    assert runs.record(a=pd.Series({"lstm": 1.0, "gru": 2.0}))["a"] == {"lstm": 1.0, "gru": 2.0}
    assert runs.record(a=pd.Series([1, 2]))["a"] == [1, 2]
    with pytest.raises(ValueError, match="record needs different columns in a, got 'x' more than once"):
        runs.record(a=pd.concat([table, table], axis=1))


WHOLE = '{"state": "ok", "schema": 1, "notebook": "n", "parameters": {}, "provenance": {"ended": "", "wall_s": 1}}'


@pytest.mark.parametrize("text", ["{}", "[]", "3", "", WHOLE.replace('"ok"', '"failed"'), WHOLE[:-1], '{"state": "ok"}',
                                  WHOLE.replace("wall_s", "time"), WHOLE.replace('"parameters": {}', '"parameters": null')])
def test_a_damaged_status_is_not_a_finished_run(tmp_path, text):
    (tmp_path / "metrics.json").write_text('{"a": 1}')
    (tmp_path / "status.json").write_text(text)
    assert not runs.is_finished(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"a": NaN}', '{"a": ', "3"])
def test_invalid_metrics_are_not_a_finished_run(tmp_path, text):
    (tmp_path / "status.json").write_text(WHOLE)
    (tmp_path / "metrics.json").write_text(text)
    assert not runs.is_finished(tmp_path)
    (tmp_path / "metrics.json").write_text('{"a": 1}')
    assert runs.is_finished(tmp_path)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_kept_and_reused(tmp_path, write_notebook, monkeypatch):
    """One run has it all: a results path with braces, a kernel that is this interpreter although another one is named so.

    Traps: T3, the warning of ipykernel; T5, papermill formats paths; a kernel of another environment; a wrong directory.
    """
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("WORKBENCH_DATA", "somewhere")
    cells = (
        "import os, sys\nimport workbench as wb",
        "wb.record(executable=sys.executable, threads=os.environ['OMP_NUM_THREADS'], seed=seed, rate=rate)",
        "wb.record(package=wb.__file__, data=os.environ['WORKBENCH_DATA'], here=os.getcwd() == os.environ['WB_RUN_DIR'])",
    )
    path = write_notebook(tmp_path / "n.ipynb", *cells, parameters="seed: int = 0\nrate: float = 1")
    results = tmp_path / "{seed} of results"
    first = runs.run(path, {"seed": "5"}, results, threads=1)
    assert (first.state, first.cached, first.error) == ("ok", False, "")
    assert first.directory.parent == results / "runs"
    assert sorted(p.name for p in first.directory.iterdir()) == ["log.txt", "metrics.json", "run.ipynb", "status.json"]
    assert runs.read_metrics(first.directory) == {
        "executable": sys.executable,
        "threads": "1",
        "seed": 5,
        "rate": 1.0,
        "package": str(Path(runs.__file__).with_name("__init__.py")),
        "data": os.path.abspath("somewhere"),
        "here": True,
    }
    assert "without encryption" not in (first.directory / "log.txt").read_text()
    status = runs.read_status(first.directory)
    assert status["parameters"] == {"seed": 5, "rate": 1.0}
    assert status["provenance"]["command"] == f"python -m workbench run {path} -p seed 5"
    assert status["provenance"]["wall_s"] > 0

    again = runs.run(path, {"seed": 5, "rate": 1.0}, results)
    assert again == runs.RunResult(first.directory, "ok", True, "")
    assert [p.name for p in (results / "runs").iterdir()] == [first.directory.name]


def test_every_kernel_has_time_sockets_and_an_interpreter_of_its_own(tmp_path, write_notebook, monkeypatch):
    """Traps T3 and T4, sockets that kernels share; T6, too little time to start; a kernel of another environment."""
    import papermill

    build = tmp_path / "build"
    build.mkdir()
    write_notebook(build / "run.ipynb", RECORD)
    (build / "status.json").write_text(WHOLE.replace('"ok"', '"running"'))
    asked = []

    def execute(*_, **options):
        manager = options["kernel_manager_class"]()
        assert Path(manager.ip).parent.is_dir() and manager.transport == "ipc"
        assert manager.kernel_spec.argv[0] == sys.executable
        asked.append((manager.ip, options["kernel_name"], options["start_timeout"]))
        return nbformat.v4.new_notebook()

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(runs, "_die_with_parent", lambda: None)
    monkeypatch.setenv("IPYTHONDIR", "")  # put back afterwards
    monkeypatch.chdir(build)
    assert runs._run_notebook(build) == runs._run_notebook(build) == 0
    (first, *_), (second, name, seconds) = asked
    assert first != second and name == "python3" and seconds >= 60


def test_failures_are_kept_aside_retried_and_never_replace_a_finished_run(tmp_path, write_notebook):
    flag = tmp_path / "flag"
    path = write_notebook(tmp_path / "n.ipynb", f"text = open({str(flag)!r}).read()", RECORD)
    results = tmp_path / "results"
    failed = runs.run(path, {}, results)
    assert (failed.state, failed.cached) == ("failed", False)
    assert failed.error.startswith("FileNotFoundError: [Errno 2] No such file or directory")
    assert failed.directory.parent == results / "failed"
    assert "FileNotFoundError" in (failed.directory / "run.ipynb").read_text()
    assert "FileNotFoundError" in (failed.directory / "log.txt").read_text()
    assert not runs.is_finished(failed.directory)

    flag.write_text("here now")
    finished = runs.run(path, {}, results)
    assert finished.state == "ok" and not finished.cached
    assert not failed.directory.exists()

    flag.unlink()
    forced = runs.run(path, {}, results, force=True)
    assert forced.state == "failed"
    assert runs.is_finished(finished.directory)


@pytest.mark.parametrize(
    ("cells", "error"),
    [
        ((RECORD, "import sys\nsys.exit(0)", "1 + 1"), "RuntimeError: a cell stopped the notebook early"),
        ((RECORD, "import os\nos.kill(os.getpid(), 9)"), "DeadKernelError: the kernel was killed"),
        (("1 + 1",), "ValueError: no metrics were recorded"),
    ],
    ids=["exits 0", "killed", "records nothing"],
)
def test_what_papermill_calls_completed_can_still_be_a_failure(tmp_path, write_notebook, cells, error):
    """Traps T1, a killed kernel, and T2, sys.exit(0): papermill's own notebook says that all cells were completed."""
    result = runs.run(write_notebook(tmp_path / "n.ipynb", *cells), {}, tmp_path / "results")
    assert result.state == "failed"
    assert result.error.startswith(error)
    assert runs.read_status(result.directory)["state"] == "failed"


def test_a_hanging_notebook_is_stopped_at_the_limit(tmp_path, write_notebook):
    path = write_notebook(tmp_path / "n.ipynb", "import time\ntime.sleep(600)")
    before = set(psutil.Process().children(recursive=True))  # other tests may have left a process pool's tracker
    start = time.monotonic()
    result = runs.run(path, {}, tmp_path / "results", timeout_s=4)
    assert time.monotonic() - start < 30
    assert result.state == "failed"
    assert result.error == "TimeoutError: stopped at the wall-clock limit of 4 s"
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopping_the_command_stops_the_kernel(tmp_path, write_notebook, stop):
    """Even a kernel inside a C call that holds the interpreter lock, so that it cannot see that its parent is gone."""
    mark = tmp_path / "kernel"
    hold = f"""\
import ctypes, os, pathlib
pathlib.Path({str(mark)!r} + ".tmp").write_text(str(os.getpid()))
os.replace({str(mark)!r} + ".tmp", {str(mark)!r})
ctypes.PyDLL(None).sleep(100)
"""
    path = write_notebook(tmp_path / "n.ipynb", hold)
    command = [sys.executable, "-m", "workbench", "run", str(path), "--results", str(tmp_path / "results")]
    # Where the tests run in the background SIGINT is ignored, and a child would inherit that.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        signal.signal(signal.SIGINT, inherited)
        wait_until(mark.exists, 120)
        kernel = psutil.Process(int(mark.read_text()))
        process.send_signal(stop)
        process.stderr.read()
        assert process.wait(20) != 0
    wait_until(lambda: not kernel.is_running(), 20)
    kept = [p for p in (tmp_path / "results").rglob("*") if p.is_file()]
    assert (kept == []) if stop == signal.SIGINT else kept
    # What a killed command leaves is cleared by the next one.
    runs.tidy(tmp_path / "results" / "runs")
    assert [p for p in (tmp_path / "results").rglob("*") if p.is_file()] == []


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


class Closed(io.BytesIO):
    """A full disk or a terminal that is gone."""

    def write(self, chunk):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("targets", [(Closed(), None), (io.BytesIO(), Closed()), (Closed(), io.BytesIO())])
def test_the_log_is_read_to_its_end_whatever_becomes_of_it(targets):
    """A child whose output nobody reads would stop for ever."""
    stream = io.BufferedReader(io.BytesIO(b"x" * 100_000), 1000)
    runs._copy_log(stream, *targets)
    assert stream.read() == b""
    assert [len(target.getvalue()) for target in targets if type(target) is io.BytesIO] in ([], [100_000])


def test_an_interrupted_exchange_of_directories_is_finished(tmp_path):
    aside = tmp_path / f".old-0123456789abcdef-{socket.gethostname()}-{os.getpid()}-1000000000.00"  # an earlier process
    aside.mkdir()
    (aside / "status.json").write_text('{"state": "ok"}')
    runs.tidy(tmp_path, "0123456789abcdef")
    assert (tmp_path / "0123456789abcdef" / "status.json").exists()
    assert not aside.exists()


def test_what_others_left_is_passed_over_and_every_name_is_tidied(tmp_path):
    owner = f"{socket.gethostname()}-{os.getpid()}-1000000000.00"  # an earlier process
    others = [tmp_path / name for name in (".nfs-a-b", f".tmp-x-another-{os.getpid()}-1000000000.00", ".a-b-c-d-e")]
    mine = [tmp_path / f".tmp-{name}-{owner}" for name in ("metrics.json", "a-Dense-3-4-seed0.plan.json")]
    for path in (*others, *mine):
        path.write_text("")
    runs.tidy(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_results_path_below_a_file_is_refused_before_any_work(tmp_path, write_notebook):
    path = write_notebook(tmp_path / "n.ipynb", RECORD)
    (tmp_path / "file").write_text("")
    for results in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="results cannot go to .*file is a file"):
            runs.run(path, {}, results)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "n.ipynb"]


def test_a_package_edited_while_a_run_executes_is_no_finished_run(tmp_path, write_notebook, instant, monkeypatch):
    """Cells load modules when they first use them: the late ones may have had the new code."""
    path = write_notebook(tmp_path / "n.ipynb", RECORD)
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(runs, "PACKAGE", package)
    instant(lambda seed: {"written": (package / "new.py").write_text("new = True")})
    result = runs.run(path, {}, tmp_path / "results")
    assert result.state == "failed"
    assert result.error == "RuntimeError: the package changed while the run executed: run it again"


def test_data_that_change_while_a_run_executes_are_those_of_no_finished_run(tmp_path, write_notebook, instant, monkeypatch):
    """Neither an edit that stays nor a file that goes is filed under the digest of before."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    monkeypatch.setenv("WORKBENCH_TASKS", str(folder))
    task = "def load(split):\n    return None\n\n\ndef digest():\n    return 'one'\n"
    (folder / "mine.py").write_text(task)
    path = write_notebook(tmp_path / "n.ipynb", RECORD, parameters='task: str = "mine"')
    for change in (lambda: (folder / "mine.py").write_text(task.replace("one", "two")), (folder / "mine.py").unlink):
        instant(lambda task, change=change: {"changed": str(change())})
        result = runs.run(path, {}, tmp_path / "results")
        assert (result.state, result.error) == ("failed", "RuntimeError: the data changed while the run executed: run it again")
        (folder / "mine.py").write_text(task)
    assert not list((tmp_path / "results" / "runs").iterdir())
    instant(lambda task: {"a": 1})
    assert runs.run(path, {}, tmp_path / "results").state == "ok"


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("4,2", 4), (" 2 ", 2), ("", None), (None, None)])
def test_threads_that_the_environment_gives(monkeypatch, text, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if text is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert runs.given_threads() == threads


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5"])
def test_threads_that_are_none_are_refused(monkeypatch, text):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(ValueError, match=f"OMP_NUM_THREADS needs a whole number of threads of at least 1, got '{text}'"):
        runs.given_threads()
