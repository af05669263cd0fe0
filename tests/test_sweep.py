"""Sweeps: what a file asks for, what is done about it, and what survives kills, full disks and interrupts."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

import workbench as wb
from workbench import __main__ as main_module
from workbench import runs, sweep

PARAMETERS = """\
seed: int = 0  # seed of everything random
hidden: int = 4  # units
rate: float = 0.5  # of learning
label: str | None = None  # shown
gates: list[str] = ["i"]  # compressed
workers: int = 1  # processes
task: str = "japanese_vowels"  # data set"""
RECORD = "import workbench as wb\nwb.record(done=1)"
SWEEP = [sys.executable, "-m", "workbench", "sweep"]


@pytest.fixture
def here(tmp_path, monkeypatch, write_notebook):
    """An empty working directory with n.ipynb, whose parameters are PARAMETERS."""
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path / "n.ipynb", RECORD, parameters=PARAMETERS)
    return tmp_path


def write(text, name="s.toml"):
    Path(name).write_text(text)
    return Path(name)


def call(*arguments):
    return CliRunner().invoke(main_module.main, ["sweep", *map(str, arguments)])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


# --- what a file asks for ---------------------------------------------------------------------------------------------


def test_a_file_becomes_runs_with_seeds_fastest(here):
    """Hand numbers: 2 rows x 3 x 2 of the grid x 2 seeds."""
    asked = sweep.read(write("""\
description = "all of it"
notebook = "n.ipynb"
seeds = [7, 3]
timeout_s = 60
[parameters]
task = "fsdd"
[grid]
hidden = [8, 4, 2]
rate = [1, 0.25]
[[list]]
gates = ["f"]
[[list]]
gates = ["i", "o"]
label = "both"
[pareto]
x = "bits"
y = "accuracy"
lower_is_better = ["bits"]
"""))
    assert (asked.name, asked.description, asked.timeout_s) == ("s", "all of it", 60)
    assert asked.notebook.resolve() == here / "n.ipynb"
    assert len(asked.parameters) == 2 * 3 * 2 * 2
    assert (asked.swept, asked.seed_parameter) == (("gates", "label", "hidden", "rate"), "seed")
    assert asked.pareto == {"x": "bits", "y": "accuracy", "lower_is_better": ["bits"]}
    short = [(p["gates"], p["label"], p["hidden"], p["rate"], p["seed"]) for p in asked.parameters]
    assert short[:5] == [
        (["f"], None, 8, 1.0, 7), (["f"], None, 8, 1.0, 3),
        (["f"], None, 8, 0.25, 7), (["f"], None, 8, 0.25, 3),
        (["f"], None, 4, 1.0, 7),
    ]
    assert short[-1] == (["i", "o"], "both", 2, 0.25, 3)
    assert {(p["task"], p["workers"]) for p in asked.parameters} == {("fsdd", 1)}
    assert {type(p["rate"]) for p in asked.parameters} == {float}


def test_a_file_of_one_run_and_seeds_as_a_list(here, write_notebook):
    assert len(sweep.read(write('notebook = "n.ipynb"')).parameters) == 1
    write_notebook(here / "m.ipynb", RECORD, parameters="seeds: list[int] = [0]")
    asked = sweep.read(write('notebook = "m.ipynb"\nseeds = [5, 6]'))
    assert (asked.parameters, asked.seed_parameter) == (({"seeds": [5]}, {"seeds": [6]}), "seeds")


def test_a_notebook_is_found_beside_the_file_or_by_name(here, write_notebook):
    (here / "below").mkdir()
    write_notebook(here / "below" / "n.ipynb", RECORD)
    found = sweep.read(write('notebook = "n.ipynb"', "below/s.toml"))
    assert found.notebook.resolve() == here / "below" / "n.ipynb"
    assert sweep.read(write('notebook = "../n.ipynb"', "below/s.toml")).notebook.resolve() == here / "n.ipynb"
    assert sweep.read(write('notebook = "hybrid"')).notebook == runs.NOTEBOOKS / "hybrid.ipynb"


N = 'notebook = "n.ipynb"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid =", "s.toml is not TOML: Invalid value"),
        (N + "seeds = [0]\nseeds = [1]", "s.toml is not TOML: Cannot overwrite a value"),
        (N + "seed = [0]", "s.toml has an unknown key 'seed'; did you mean 'seeds'? The keys are description, notebook,"),
        (N + "[[grids]]\nhidden = [1]", "unknown key 'grids'; did you mean 'grid'?"),
        (N + "zzz = 1", "s.toml has an unknown key 'zzz'. The keys are"),
        ("seeds = [0]", 's.toml needs notebook = "NAME"'),
        ("notebook = 3", "s.toml: notebook needs str, got 3"),
        ('notebook = "m.ipynb"', "no notebook 'm.ipynb': give a path to an .ipynb file or one of"),
        (N + "description = true", "s.toml: description needs str, got True"),
        (N + "grid = [1]", "s.toml: grid needs dict, got [1]"),
        (N + "[list]\nhidden = 1", "s.toml: list needs list, got {'hidden': 1}"),
        # types: text is no number in a file, and no value is converted
        (N + '[grid]\nhidden = ["60"]', "s.toml: n.ipynb: parameter 'hidden' needs int, for example 3, got '60'"),
        (N + "[grid]\nhidden = [4, 8.0]", "parameter 'hidden' needs int, for example 3, got 8.0"),
        (N + "[parameters]\nhidden = true", "parameter 'hidden' needs int, for example 3, got True"),
        (N + '[parameters]\nrate = "0.5"', "parameter 'rate' needs float, for example 0.5, got '0.5'"),
        (N + "[parameters]\nlabel = 2026-01-01", "parameter 'label' needs str | None, for example text, got datetime.date"),
        (N + '[grid]\ngates = ["i", "f"]', "parameter 'gates' needs list[str], for example [\"a\", \"b\"], got 'i'"),
        (N + "[[list]]\ngates = [1]", "parameter 'gates', item 0 needs str, for example text, got 1"),
        (N + "[grid]\nrate = [0.1, nan]", "parameter 'rate' needs a finite number, got nan"),
        (N + "[parameters]\nrate = -inf", "parameter 'rate' needs a finite number, got -inf"),
        # names, wherever they stand
        (N + "[grid]\nhiden = [1]", "s.toml: n.ipynb has no parameter 'hiden'; did you mean 'hidden'? It has seed, hidden"),
        (N + "[parameters]\nhiden = 1", "no parameter 'hiden'; did you mean 'hidden'?"),
        (N + "[[list]]\nhiden = 1", "no parameter 'hiden'; did you mean 'hidden'?"),
        (N + '[grid]\ntask = ["japanese_vowels", "vowels"]', "unknown task 'vowels'; known tasks: japanese_vowels"),
        # what is no set of runs
        (N + "[grid]\nhidden = []", "s.toml: [grid] needs a list of values for hidden, got []"),
        (N + "[grid]\nhidden = 4", "s.toml: [grid] needs a list of values for hidden, got 4"),
        (N + "list = []", "s.toml: [[list]] needs rows of parameters, got []"),
        (N + "list = [4]", "s.toml: [[list]] needs rows of parameters, got [4]"),
        (N + "[grid]\nhidden = [1]\n[parameters]\nhidden = 1", "s.toml sets hidden in more than one place"),
        (N + "[grid]\nhidden = [1]\n[[list]]\nrate = 1\n[[list]]\nhidden = 1", "s.toml sets hidden in more than one place"),
        (N + "seeds = [1]\n[parameters]\nseed = 1", "s.toml sets seed in more than one place"),
        (N + "[grid]\nhidden = [1, 2, 1]", "s.toml: runs 1 and 3 are the same: hidden 1"),
        (N + "seeds = [1, 1]", "s.toml: runs 1 and 2 are the same: seed 1"),
        (N + "[[list]]\nrate = 1\n[[list]]\nrate = 1.0", "s.toml: runs 1 and 2 are the same: rate 1.0"),
        (N + "[[list]]\nhidden = 4\n[[list]]", "s.toml: runs 1 and 2 are the same: the notebook's defaults"),
        (N + "[grid]\nworkers = [1, 2]", "s.toml: runs 1 and 2 are the same: workers 2"),
        # seeds
        (N + "seeds = []", "s.toml: seeds needs a list of whole numbers, got []"),
        (N + "seeds = 3", "s.toml: seeds needs list, got 3"),
        (N + 'seeds = [0, "1"]', "s.toml: seeds needs a list of whole numbers, got [0, '1']"),
        (N + "seeds = [true]", "s.toml: seeds needs a list of whole numbers, got [True]"),
        ('notebook = "noseed.ipynb"\nseeds = [0]', "s.toml has seeds, but noseed.ipynb has no parameter seed or seeds"),
        # limits
        (N + "timeout_s = 0", "s.toml: timeout_s needs a number of seconds above 0, got 0"),
        (N + "timeout_s = -5.0", "s.toml: timeout_s needs a number of seconds above 0, got -5.0"),
        (N + "timeout_s = nan", "s.toml: timeout_s needs a number of seconds above 0, got nan"),
        (N + "timeout_s = inf", "s.toml: timeout_s needs a number of seconds above 0, got inf"),
        (N + 'timeout_s = "60"', "s.toml: timeout_s needs int or float, got '60'"),
        (N + "timeout_s = true", "s.toml: timeout_s needs int or float, got True"),
        # the picture
        (N + 'pareto = "bits"', "s.toml: pareto needs dict, got 'bits'"),
        (N + '[pareto]\nx = "bits"', "s.toml: [pareto] needs y"),
        (N + '[pareto]\nx = "a"\ny = "b"\nlower_is_beter = ["a"]', "[pareto] has an unknown key 'lower_is_beter'; did you"),
        (N + '[pareto]\nx = "a"\ny = 3', "s.toml: [pareto]: y needs str, got 3"),
        (N + '[pareto]\nx = "a"\ny = "b"\nlower_is_better = ["bits"]', "lower_is_better names an axis, x or y, got 'bits'"),
        (N + '[pareto]\nx = "a"\ny = "b"\ngroup = "hidden"', "s.toml: [pareto]: group needs list, got 'hidden'"),
        (N + '[pareto]\nx = "a"\ny = "b"\ngroup = [1]', "s.toml: [pareto] group needs a list of different names, got [1]"),
        (N + '[pareto]\nx = "a"\ny = "b"\ngroup = ["a", "a"]', "group needs a list of different names, got ['a', 'a']"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_one_message_before_anything_starts(here, write_notebook, text, message):
    write_notebook(here / "noseed.ipynb", RECORD, parameters="hidden: int = 4")
    write(text)
    before = files(here)
    outcome = call("s.toml")
    assert outcome.exit_code == 1, outcome.output
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("Error: ") and message in line
    assert files(here) == before


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["missing.toml"], 1, "a sweep needs a TOML file, missing.toml cannot be read: [Errno 2] No such file"),
        (["."], 1, "a sweep needs a TOML file, . cannot be read: [Errno 21] Is a directory"),
        (["binary.toml"], 1, "a sweep needs a TOML file, binary.toml cannot be read: 'utf-8' codec"),
        (["s.toml", "--results", "s.toml/below"], 1, "s.toml is a file"),
        (["s.toml", "--shard", "0/3"], 2, "needs K/N with K from 1 to N, for example 2/8 (a job array of 1-8), got '0/3'"),
        (["s.toml", "--shard", "4/3"], 2, "needs K/N with K from 1 to N"),
        (["s.toml", "--shard", "3"], 2, "needs K/N with K from 1 to N"),
        (["s.toml", "--workers", "0"], 2, "0 is not in the range x>=1"),
        (["s.toml", "--stale", "reuse"], 2, "'reuse' is not one of 'rerun', 'warn', 'ignore'"),
        ([], 2, "Missing argument 'FILE'"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_a_message(here, arguments, status, message):
    write(N)
    Path("binary.toml").write_bytes(b"\xff\xfe\x00")
    before = files(here)
    outcome = call(*arguments)
    assert (outcome.exit_code, outcome.stdout) == (status, "")
    assert message in outcome.stderr and "Traceback" not in outcome.stderr
    assert files(here) == before


# --- what is there, and what is to be done ----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch, write_notebook):
    """A working directory whose s.toml asks for the seeds 0 to 5 of n.ipynb."""
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path / "n.ipynb", RECORD, parameters="seed: int = 0\nhidden: int = 4\nworkers: int = 1")
    write('notebook = "n.ipynb"\nseeds = [0, 1, 2, 3, 4, 5]')
    return tmp_path


def counts(*arguments, file="s.toml"):
    """Of `--plan`: name -> number."""
    outcome = call(file, "--plan", *arguments)
    assert outcome.exit_code == 0, outcome.output
    rows = [line[:14].rsplit(maxsplit=1) for line in outcome.stdout.splitlines() if line[8:14].strip().isdigit()]
    return {name.strip(): int(number) for name, number in rows}


def told(total, cached=0, stale=0, failed=0, missing=0):
    return {"total": total, "cached": cached, "stale": stale, "failed": failed, "missing": missing}


def places(root="results"):
    """Seed -> directory of the finished runs."""
    finished = [path for path in Path(root, "runs").glob("[!.]*") if runs.is_finished(path)]
    seeds = [runs.read_status(path)["parameters"]["seed"] for path in finished]
    assert len(seeds) == len(set(seeds))
    return dict(zip(seeds, finished, strict=True))


def test_the_plan_counts_every_state_and_writes_nothing(small, instant, write_notebook):
    assert counts() == told(6, missing=6) | {"to run": 6}
    assert files(small) == ["n.ipynb", "s.toml"]

    asked = []

    def notebook(seed, hidden, workers):
        asked.append(seed)
        return {"accuracy": 1 / (3 - seed)}

    instant(notebook)
    outcome = call("s.toml")
    assert outcome.exit_code == 1
    lines = outcome.stderr.splitlines()
    place = lines.index("failed: seed 3: ZeroDivisionError: division by zero")
    assert lines[place + 1] == f"  {next((small / 'results' / 'failed').iterdir()) / 'run.ipynb'}"
    assert lines[-2].startswith("6/6 runs, 1 failed, ")
    assert lines[-1] == "Error: 1 of 6 runs failed; the same command tries them again"
    assert sorted(asked) == [0, 1, 2, 3, 4, 5]
    assert counts() == told(6, cached=5, failed=1) | {"to run": 1}

    (places()[4] / "metrics.json").write_text('{"accuracy": NaN}')
    (places()[5] / "status.json").write_text("{}")
    before = files(small)
    assert counts() == told(6, cached=3, failed=1, missing=2) | {"to run": 3}
    assert files(small) == before

    asked.clear()
    kept = {seed: (path / "status.json").stat() for seed, path in places().items() if seed < 3}
    assert call("s.toml").exit_code == 1
    assert sorted(asked) == [3, 4, 5]
    assert counts() == told(6, cached=5, failed=1) | {"to run": 1}
    assert {seed: (places()[seed] / "status.json").stat() for seed in kept} == kept

    # A comment in the text is no change; one in the code is.
    write_notebook(small / "n.ipynb", "# other text", RECORD, parameters="seed: int = 0\nhidden: int = 4\nworkers: int = 1")
    assert counts() == told(6, cached=5, failed=1) | {"to run": 1}
    write_notebook(small / "n.ipynb", RECORD + "  # a remark", parameters="seed: int = 0\nhidden: int = 4\nworkers: int = 1")
    assert counts() == told(6, stale=5, missing=1) | {"to run": 6}
    assert counts("--stale", "warn") == told(6, stale=5, missing=1) | {"to run": 1}
    assert counts("--stale", "ignore") == told(6, stale=5, missing=1) | {"to run": 1}


def test_stale_results_are_kept_only_when_asked_for(small, instant, write_notebook, monkeypatch):
    package = small / "package"
    package.mkdir()
    (package / "module.py").write_text("a = 1\n")
    monkeypatch.setattr(runs, "PACKAGE", package)
    asked = []

    def notebook(seed, **_):
        asked.append(seed)
        return {"accuracy": len(asked)}

    instant(notebook)
    assert call("s.toml", "--workers", "1").exit_code == 0
    old = places()
    (package / "module.py").write_text("a = 2\n")
    asked.clear()

    outcome = call("s.toml", "--stale", "warn")
    assert (outcome.exit_code, asked) == (0, [])
    assert "answered by older code or data, KEPT" in outcome.stderr
    assert [line for line in outcome.stderr.splitlines() if line.startswith("stale: ")] == [
        f"stale: seed {n}, hidden 4, workers 1" for n in range(6)
    ]
    assert list(wb.results("s")["state"]) == ["stale"] * 6
    assert list(wb.results("s")["m_accuracy"]) == [1, 2, 3, 4, 5, 6]

    outcome = call("s.toml", "--stale", "ignore")
    assert (outcome.exit_code, asked) == (0, [])
    assert "stale: " not in outcome.stderr and "older code or data, kept" in outcome.stderr

    # Rows are added: only they run, and beside the old ones.
    write('notebook = "n.ipynb"\nseeds = [0, 1, 2, 3, 4, 5, 6]')
    assert call("s.toml", "--stale", "ignore").exit_code == 0
    assert asked == [6]
    assert list(wb.results("s")["state"]) == ["stale"] * 6 + ["ok"]

    asked.clear()
    assert call("s.toml").exit_code == 0
    assert sorted(asked) == [0, 1, 2, 3, 4, 5]
    assert list(wb.results("s")["state"]) == ["ok"] * 7
    # The older answers lie where they lay, and going back to the old code finds them.
    assert all(path.is_dir() for path in old.values())
    (package / "module.py").write_text("a = 1\n")
    assert counts() == told(7, cached=6, stale=1) | {"to run": 1}


def test_a_run_that_fails_with_new_code_is_failed_and_not_its_older_answer(small, instant, write_notebook):
    instant(lambda seed, **_: {"a": seed})
    assert call("s.toml").exit_code == 0
    write_notebook(small / "n.ipynb", RECORD + " ", parameters="seed: int = 0\nhidden: int = 4\nworkers: int = 1")

    def fail(**_):
        raise ValueError("broken now")

    instant(fail)
    assert call("s.toml").exit_code == 1
    table = wb.results("s")
    assert set(table["state"]) == {"failed"} and set(table["error"]) == {"ValueError: broken now"}


def test_two_notebooks_do_not_share_the_name_of_a_sweep(small, instant, write_notebook):
    instant(lambda seed, **_: {"a": seed})
    assert call("s.toml").exit_code == 0
    write_notebook(small / "m.ipynb", RECORD, parameters="seed: int = 0\nhidden: int = 4\nworkers: int = 1")
    write('notebook = "m.ipynb"\nseeds = [0]')
    outcome = call("s.toml")
    assert outcome.exit_code == 1
    assert (f"holds a sweep of the notebook {small / 'n.ipynb'}, this one is of {small / 'm.ipynb'}: give the file another name"
            in outcome.stderr)


def test_a_notebook_of_the_same_file_name_elsewhere_is_another_one(small, instant, write_notebook):
    """Neither are its answers older ones of this one, nor does its sweep take this one's place."""
    instant(lambda seed, **_: {"a": seed})
    assert call("s.toml").exit_code == 0
    (small / "copy").mkdir()
    write_notebook(small / "copy" / "n.ipynb", "another", parameters="seed: int = 0\nhidden: int = 4\nworkers: int = 1")
    write(Path("s.toml").read_text(), "copy/t.toml")
    assert counts(file="copy/t.toml") == told(6, missing=6) | {"to run": 6}
    write(Path("s.toml").read_text(), "copy/s.toml")
    outcome = call("copy/s.toml")
    assert outcome.exit_code == 1 and f"this one is of {small / 'copy' / 'n.ipynb'}: give" in outcome.stderr
    assert set(wb.results("s")["state"]) == {"ok"}


def test_of_several_older_answers_the_last_counts(small, instant, write_notebook):
    write('notebook = "n.ipynb"')
    for n in (1, 2):
        write_notebook(small / "n.ipynb", f"{n}", parameters="seed: int = 0")
        instant(lambda seed, n=n: {"edition": n})
        assert call("s.toml").exit_code == 0
    write_notebook(small / "n.ipynb", "3", parameters="seed: int = 0")
    assert call("s.toml", "--stale", "ignore").exit_code == 0
    assert list(wb.results("s")["m_edition"]) == [2]


def test_how_a_run_is_executed_is_no_part_of_it(small, instant):
    instant(lambda **_: {"a": 1})
    assert call("s.toml").exit_code == 0
    write('notebook = "n.ipynb"\nseeds = [0, 1, 2, 3, 4, 5]\ntimeout_s = 5\n[parameters]\nworkers = 2')
    assert counts() == told(6, cached=6) | {"to run": 0}


def test_runs_share_the_cores(small, instant, monkeypatch):
    """Threads of the numerical libraries: cores by workers, one at least, and no more than the environment gives."""
    instant(lambda seed, **_: {"a": seed})
    for workers, given, threads in ((1, "", runs.cores()), (1, "1", 1), (1, "1000", runs.cores()), (1000, "", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        shutil.rmtree("results", ignore_errors=True)
        assert call("s.toml", "--workers", str(workers)).exit_code == 0
        assert set(wb.results("s")["threads"]) == {threads}


def test_data_that_change_while_the_sweep_runs(small, instant, write_notebook, monkeypatch):
    """They end the sweep, or with --stale ignore every run bears those that it ran with."""
    folder = small / "tasks"
    folder.mkdir()
    monkeypatch.setenv("WORKBENCH_TASKS", str(folder))
    task = "def load(split):\n    return None\n\n\ndef digest():\n    return '{}'\n"
    (folder / "mine.py").write_text(task.format("one"))
    write_notebook(small / "n.ipynb", RECORD, parameters='seed: int = 0\ntask: str = "mine"')
    asked, digest = [], runs.data_digest

    def between(parameters):  # the data change as soon as the first run has been looked at
        found = digest(parameters)
        if asked:
            (folder / "mine.py").write_text(task.format("two"))
        return found

    instant(lambda seed, **_: asked.append(seed) or {"a": seed})
    monkeypatch.setattr(runs, "data_digest", between)
    outcome = call("s.toml", "--workers", "1")
    assert outcome.exit_code == 1 and asked == [0]
    assert outcome.stderr.splitlines()[-1].startswith("Error: the data have changed since the sweep began: it stops here,")
    assert sorted(places()) == [0]
    assert call("s.toml", "--workers", "1", "--stale", "ignore").exit_code == 0
    table = wb.results("s")
    assert list(table["state"]) == ["stale"] + ["ok"] * 5 and len(set(table["data"])) == 2


def test_shards_share_the_runs_out_exactly(small, instant):
    shards = [sweep.make_plan(sweep.read("s.toml"), small / "results", shard=(k, 4)).ours for k in (1, 2, 3, 4)]
    assert [[point.run.parameters["seed"] for point in points] for points in shards] == [[0, 4], [1, 5], [2], [3]]
    assert counts("--shard", "2/4") == told(2, missing=2) | {"to run": 2}
    asked = []
    instant(lambda seed, **_: {"a": asked.append(seed) or seed})
    for shard, states in (("1/3", ["ok", "missing", "missing"]), ("3/3", ["ok", "missing", "ok"]), ("2/3", ["ok"] * 3)):
        assert call("s.toml", "--shard", shard, "--workers", "1").exit_code == 0
        table = wb.results("s")
        assert list(table["state"]) == states * 2
        assert list(table["seed"]) == [0, 1, 2, 3, 4, 5]
    assert asked == [0, 3, 2, 5, 1, 4]
    # More shards than runs: the last have nothing to do, and that is no error.
    outcome = call("s.toml", "--shard", "7/7")
    assert outcome.exit_code == 0 and "total     0" in outcome.stderr


def test_a_failed_run_that_another_process_has_again_is_no_error(small, instant, monkeypatch):
    """Its folder goes between a look at it and the table that is written."""
    instant(lambda seed, **_: {"a": 1 // seed})
    assert call("s.toml", "--shard", "1/2").exit_code == 1
    survey = sweep.survey

    def late(*arguments):
        points = survey(*arguments)
        shutil.rmtree(small / "results" / "failed")
        monkeypatch.setattr(sweep, "survey", survey)
        return points

    monkeypatch.setattr(sweep, "survey", late)
    sweep.write_table(sweep.read("s.toml"), small / "results", "command")
    assert (small / "results" / "sweeps" / "s" / "sweep.json").is_file()


@pytest.mark.parametrize("text", ["", '{"state": "failed"}', "null"])
def test_a_damaged_failed_run_is_run_again(small, instant, text):
    instant(lambda seed, **_: {"a": 1 // seed})
    assert call("s.toml").exit_code == 1
    (failed,) = (small / "results" / "failed").iterdir()
    (failed / "status.json").write_text(text)
    assert counts() == told(6, cached=5, missing=1) | {"to run": 1}
    instant(lambda seed, **_: {"a": seed})
    assert call("s.toml").exit_code == 0


@pytest.mark.parametrize("text", ["null", "[]", "{}", "3", ""])
@pytest.mark.parametrize("name", ["sweep.json", "index.html"])
def test_damaged_files_of_a_sweep_are_written_anew(small, instant, name, text):
    instant(lambda seed, **_: {"a": seed})
    assert call("s.toml").exit_code == 0
    place = small / "results" / "sweeps" / "s" / name
    whole = place.read_bytes()
    place.write_bytes(text.encode() + b"\xff" * (name == "index.html"))
    assert call("s.toml").exit_code == 0
    assert place.read_bytes() == whole


def test_the_estimate_is_the_median_of_what_has_finished(small, instant):
    plan = sweep.make_plan(sweep.read("s.toml"), small / "results")
    assert sweep.estimate_s(plan.points, 6, 2) is None
    assert "no estimate yet: none has finished" in call("s.toml", "--plan").stdout
    instant(lambda **_: {"a": 1})
    assert call("s.toml", "--shard", "1/2").exit_code == 0
    for wall_s, path in zip((10, 100, 20), places().values(), strict=True):
        status = runs.read_status(path)
        status["provenance"]["wall_s"] = wall_s
        (path / "status.json").write_text(json.dumps(status))
    plan = sweep.make_plan(sweep.read("s.toml"), small / "results")
    assert sweep.estimate_s(plan.points, 3, 2) == 40  # two rounds of the median, 20 s
    assert "to run     3  2 at a time, about 40 s" in call("s.toml", "--plan", "--workers", "2").stdout


def test_a_finished_sweep_answers_at_once_and_writes_nothing(small, instant):
    instant(lambda seed, **_: {"a": seed})
    assert call("s.toml").exit_code == 0
    before = {path: path.stat() for path in small.rglob("*")}
    outcome = call("s.toml")
    assert (outcome.exit_code, outcome.stdout) == (0, f"{small / 'results' / 'sweeps' / 's' / 'index.html'}\n")
    assert {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in before.items()} == {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in small.rglob("*")
    }


def test_code_edited_while_the_sweep_runs(small, instant, write_notebook):
    """Runs that have not begun must not mix old and new code in one table, unless older results are kept anyway."""
    asked = []

    def notebook(seed, **_):
        asked.append(seed)
        if seed == 1:
            write_notebook(small / "n.ipynb", "1 + 1", parameters="seed: int = 0\nhidden: int = 4\nworkers: int = 1")
        return {"a": seed}

    instant(notebook)
    outcome = call("s.toml", "--workers", "1")
    assert outcome.exit_code == 1
    assert outcome.stderr.splitlines()[-1].startswith(
        "Error: the package or the notebook has changed since the sweep began: it stops here, finished runs are kept; the same"
    )
    assert asked == [0, 1] and sorted(places()) == [0, 1]
    assert hidden_leftovers() == []

    asked.clear()
    outcome = call("s.toml", "--workers", "1", "--stale", "ignore")
    assert (outcome.exit_code, asked) == (0, [2, 3, 4, 5])
    assert list(wb.results("s")["state"]) == ["stale", "stale", "ok", "ok", "ok", "ok"]
    write_notebook(small / "n.ipynb", RECORD, parameters="seed: int = 0\nhidden: int = 4\nworkers: int = 1")

    # With --stale ignore an edit in the middle is no reason to stop, and every run bears the code that it ran with.
    write('notebook = "n.ipynb"\nseeds = [0, 1, 2]\n[parameters]\nhidden = 5')
    assert call("s.toml", "--workers", "1", "--stale", "ignore").exit_code == 0
    table = wb.results("s")
    assert list(table["state"]) == ["stale", "stale", "ok"]
    assert table["code"][0] == table["code"][1] != table["code"][2]


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_has_a_column_for_everything_and_one_type_in_each(here, instant):
    """Hand-made metrics of every kind; floats with gaps, whole numbers, texts, truth, tables, and a column of all sorts."""
    write("""\
notebook = "n.ipynb"
seeds = [0, 1, 2, 3]
[parameters]
gates = ["i", "o"]
""")

    def notebook(seed, gates, **_):
        if seed == 3:
            raise ValueError("the last\nis bad")
        return {
            "accuracy": 0.5 + seed,
            "bits": 10**12 + seed,
            "gap": [0.25, None, 1][seed],
            "label": ["a", None, "ü"][seed],
            "good": seed == 0,
            "curve": [1, 2, 3],
            "table": [{"gate": gate, "seed": seed} for gate in gates],
            "sorts": [1, "text", [2]][seed],
            **({"once": 7} if seed == 1 else {}),
        }

    instant(notebook)
    assert call("s.toml").exit_code == 1
    table = wb.results("s")
    assert list(table["state"]) == ["ok", "ok", "ok", "failed"]
    assert list(table["seed"]) == list(table["p_seed"]) == [0, 1, 2, 3]
    assert list(table["error"])[3] == "ValueError: the last"
    assert list(table["p_hidden"]) == [4] * 4 and table["p_hidden"].dtype == "int64"
    assert table["p_rate"].dtype == table["m_accuracy"].dtype == "float64"
    assert set(table["p_gates"]) == {'["i", "o"]'}
    assert list(table["m_accuracy"])[:3] == [0.5, 1.5, 2.5]
    assert list(table["m_bits"])[:3] == [10**12, 10**12 + 1, 10**12 + 2]
    assert list(table["m_gap"].fillna(-1)) == [0.25, -1, 1, -1]
    assert [value if isinstance(value, str) else None for value in table["m_label"]] == ["a", None, "ü", None]
    assert list(table["m_good"])[:3] == [True, False, False]
    assert json.loads(table["m_curve"][0]) == [1, 2, 3]
    assert json.loads(table["m_table"][1]) == [{"gate": "i", "seed": 1}, {"gate": "o", "seed": 1}]
    assert [json.loads(text) for text in table["m_sorts"][:3]] == [1, "text", [2]]
    assert list(table["m_once"].fillna(0)) == [0, 7, 0, 0]
    metrics = [name for name in table if name.startswith("m_")]
    assert table.loc[3, metrics].isna().all()
    for name in ("commit", "code", "data", "threads", "started", "ended", "wall_s", "command", "version_torch", "dirty"):
        assert table[name].notna().all(), name
    kept = [*(places()[n] for n in range(3)), *Path("results/failed").iterdir()]
    assert [Path("results", place) for place in table["directory"]] == kept
    assert [Path(place).name for place in table["directory"]] == list(table["run_id"])

    rows = wb.results("s", records="table")
    assert list(rows["m_gate"]) == ["i", "o"] * 3
    assert list(rows["m_seed"]) == list(rows["seed"]) == [0, 0, 1, 1, 2, 2]
    assert "m_accuracy" not in rows and set(rows["p_hidden"]) == {4}
    for place in ("results/sweeps/s", here / "results" / "sweeps" / "s" / "results.parquet"):
        assert list(wb.results(place)["run_id"]) == list(table["run_id"])
    with pytest.raises(ValueError, match="there is no sweep 't' with results in results: it has s"):
        wb.results("t")
    damaged = here / "damaged.parquet"
    damaged.write_bytes(Path("results/sweeps/s/results.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"damaged\.parquet is no whole table of a sweep, whose command writes it anew"):
        wb.results(damaged)
    with pytest.raises(ValueError, match="there is no sweep 's' with results in elsewhere: it has none"):
        wb.results("s", "elsewhere")
    with pytest.raises(ValueError, match="the runs have no metric 'tabel'; did you mean 'table'\\? They have accuracy, bits"):
        wb.results("s", records="tabel")
    for name, got in (("curve", r"\[1, 2, 3\]"), ("bits", "1000000000000")):
        with pytest.raises(ValueError, match=f"the metric '{name}' is no table of records, got {got}"):
            wb.results("s", records=name)


def test_shards_that_end_at_the_same_time_leave_a_complete_table(small, instant, monkeypatch):
    """Another shard finishes and writes its newer table at every point of the writing of an older one."""
    instant(lambda seed, **_: {"a": seed})
    asked = sweep.read("s.toml")
    results = small / "results"
    really, owner, calls = os.replace, runs._owner, []

    def others(source, target):
        """Before the n-th rename another shard does two more runs and writes table and index."""
        calls.append(Path(target).name)
        if len(calls) == n:
            monkeypatch.setattr(os, "replace", really)
            monkeypatch.setattr(runs, "_owner", lambda: "elsewhere-1-0.00")
            assert call("s.toml", "--shard", "2/3").exit_code == 0
            monkeypatch.setattr(runs, "_owner", owner)
            monkeypatch.setattr(os, "replace", others)
        return really(source, target)

    for n in (1, 2, 3, 99):
        calls.clear()
        shutil.rmtree(results, ignore_errors=True)
        sweep.perform(sweep.make_plan(asked, results, shard=(1, 3)), results, workers=1)
        monkeypatch.setattr(os, "replace", others)
        calls.clear()
        folder = sweep.write_table(asked, results, "python -m workbench sweep s.toml")
        main_module._write_index(folder, with_report=False)
        monkeypatch.setattr(os, "replace", really)
        ok, rest = ["ok", "ok" if n < 99 else "missing", "missing"] * 2, ["results.parquet", "sweep.json"]
        assert list(wb.results("s")["state"]) == ok
        assert ("4 finished" if n < 99 else "2 finished") in (folder / "index.html").read_text()
        assert sweep.index_is_new(folder)
        assert calls[:2] == rest and files(folder) == ["index.html", *rest]


def test_an_older_table_between_a_newer_one_and_its_list_is_replaced(small, instant, monkeypatch):
    """The order of renames: newer table, older table, older list of runs, newer list of runs."""
    instant(lambda seed, **_: {"a": seed})
    asked, results, names = sweep.read("s.toml"), small / "results", []
    sweep.perform(sweep.make_plan(asked, results, shard=(1, 2)), results, workers=1)
    really, newer_waits, older_done = os.replace, threading.Event(), threading.Event()
    monkeypatch.setattr(runs, "_owner", lambda: f"elsewhere-{threading.get_ident()}-0.00")
    newer = threading.Thread(target=sweep.write_table, args=(asked, results, "command"))

    def replace(source, target):
        name = Path(target).name
        if threading.current_thread() is newer:
            if name == "sweep.json" and not older_done.is_set():
                newer_waits.set()
                assert older_done.wait(60)
        elif name == "results.parquet" and not newer_waits.is_set():
            monkeypatch.setattr(os, "replace", really)
            sweep.perform(sweep.make_plan(asked, results, shard=(2, 2)), results, workers=1)
            monkeypatch.setattr(os, "replace", replace)
            newer.start()
            assert newer_waits.wait(60)
        really(source, target)
        names.append(("newer" if threading.current_thread() is newer else "older", name))
        if names[-1] == ("older", "sweep.json") and not older_done.is_set():
            older_done.set()
            newer.join()

    monkeypatch.setattr(os, "replace", replace)
    sweep.write_table(asked, results, "command")
    assert names[:4] == [
        ("newer", "results.parquet"), ("older", "results.parquet"), ("older", "sweep.json"), ("newer", "sweep.json")
    ]  # fmt: skip
    assert list(wb.results("s")["state"]) == ["ok"] * 6


def test_two_shards_of_the_command_line_at_the_same_time(small):
    """Two real processes with two kernels each (trap T4: kernels that start together share sockets without a place each)."""
    write('notebook = "n.ipynb"\nseeds = [0, 1, 2, 3]')
    commands = [
        subprocess.Popen([*SWEEP, "s.toml", "--shard", f"{k}/2", "--workers", "2"], stderr=subprocess.PIPE, text=True)
        for k in (1, 2)
    ]
    for command in commands:
        errors = command.communicate(timeout=300)[1]
        assert command.returncode == 0, errors
    assert list(wb.results("s")["state"]) == ["ok"] * 4
    assert "4 finished" in Path("results/sweeps/s/index.html").read_text()
    logs = [(path / "log.txt").read_text() for path in places().values()]
    assert not [log for log in logs if "encryption" in log or "Signature" in log]
    assert [path for path in files("results") if "/." in path] == []


# --- what goes wrong --------------------------------------------------------------------------------------------------

def kernels(folder):
    """Processes of runs below `folder`: the run's own and its kernel carry its directory in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("WB_RUN_DIR", "").startswith(str(folder)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def hidden_leftovers(results="results"):
    return [path for path in files(results) if "/." in path or ".tmp" in path]


def test_a_sweep_killed_again_and_again_completes_and_repeats_nothing(small, write_notebook):
    """kill -9 at random moments, the same ones every time this test runs."""
    counter = small / "counter"
    cells = (
        f"import time, workbench as wb\nwith open({str(counter)!r}, 'a') as file:\n    print(seed, file=file)\ntime.sleep(0.3)",
        "wb.record(seed=seed)",
    )
    write_notebook(small / "n.ipynb", *cells)
    write('notebook = "n.ipynb"\nseeds = [0, 1, 2, 3, 4, 5]')
    moments = random.Random(1)
    kept = {}
    for _ in range(3):
        starts = len(counter.read_text().split()) if counter.exists() else 0
        with subprocess.Popen([*SWEEP, "s.toml", "--workers", "2"], stderr=subprocess.PIPE) as process:
            # Not before this start has begun something, or a slow machine would never get to the end.
            wait_until(lambda starts=starts: counter.exists() and len(counter.read_text().split()) > starts)
            time.sleep(moments.uniform(0, 2))
            process.kill()
        wait_until(lambda: not kernels(small), 20)
        finished = places() if Path("results/runs").exists() else {}
        assert kept.keys() <= finished.keys()
        kept |= {seed: (path / "status.json").stat() for seed, path in finished.items() if seed not in kept}
        ran = {seed: counter.read_text().split().count(str(seed)) for seed in kept}
    outcome = subprocess.run([*SWEEP, "s.toml", "--workers", "2"], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert sorted(places()) == [0, 1, 2, 3, 4, 5]
    for seed, before in kept.items():
        after = (places()[seed] / "status.json").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert counter.read_text().split().count(str(seed)) == ran[seed]
    assert hidden_leftovers() == [] and kernels(small) == []
    table = wb.results("s")
    assert list(table["state"]) == ["ok"] * 6 and list(table["m_seed"]) == [0, 1, 2, 3, 4, 5]


KILLED_AT_A_RENAME = """\
import json, os, sys
from workbench import __main__, runs
def execute(build, *_):
    (build / "metrics.json").write_text('{"a": 1}')
    return 0
runs._execute, runs._git = execute, lambda *_: "commit"
really, left = os.replace, [int(sys.argv.pop(1))]
def replace(source, target):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), 9)
    really(source, target)
os.replace = replace
__main__.main()
"""


def test_a_sweep_killed_before_any_of_its_renames_goes_on(small, instant):
    """The second run of two, one of which had failed before: status, verdict, run, then table, what was asked, index."""
    instant(lambda seed, **_: {"a": 1 / (seed - 1)})
    write('notebook = "n.ipynb"\nseeds = [0, 1]')
    assert call("s.toml", "--workers", "1").exit_code == 1
    instant(lambda seed, **_: {"a": 1})
    first = small / "first"
    Path("results").rename(first)
    for n in range(1, 10):
        shutil.rmtree("results", ignore_errors=True)
        shutil.copytree(first, "results")
        kept = (places()[0] / "status.json").stat()
        command = [sys.executable, "-c", KILLED_AT_A_RENAME, str(n), "sweep", "s.toml", "--workers", "1"]
        if subprocess.run(command, capture_output=True).returncode == 0:
            break
        assert call("s.toml", "--workers", "1").exit_code == 0
        assert sorted(places()) == [0, 1]
        after = (places()[0] / "status.json").stat()
        assert (after.st_ino, after.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
        assert list(wb.results("s")["state"]) == ["ok", "ok"]
        assert hidden_leftovers() == [] and files("results/failed") == []
    assert n == 8  # seven renames there are, then the command came to its end


def test_only_the_run_whose_process_is_killed_fails_and_its_kernel_goes(small, write_notebook):
    """The kernel hangs in a C call that holds the interpreter lock: it cannot see that its parent is gone."""
    hold = "import ctypes, workbench as wb\nif seed == 1:\n    open(mark, 'w').close()\n    ctypes.PyDLL(None).sleep(100)"
    parameters = f"seed: int = 0\nmark: str = {str(small / 'mark')!r}"
    write_notebook(small / "n.ipynb", hold, "wb.record(a=1)", parameters=parameters)
    write('notebook = "n.ipynb"\nseeds = [0, 1, 2]')
    with subprocess.Popen([*SWEEP, "s.toml", "--workers", "2"], stderr=subprocess.PIPE, text=True) as process:
        wait_until((small / "mark").exists)
        (child,) = {p.parent() for p in kernels(small) if "ipykernel" in " ".join(p.cmdline()) and held(p, 1)}
        child.kill()
        try:
            errors = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 1
    assert "failed: seed 1: ChildProcessError: the process of the run was killed by SIGKILL" in errors
    assert sorted(places()) == [0, 2]
    assert "1 of 3 runs failed" in errors and "Traceback" not in errors
    assert kernels(small) == []


def held(kernel, seed):
    status = runs.read_status(kernel.environ()["WB_RUN_DIR"])
    return status["parameters"]["seed"] == seed


BAD = """\
import os, sys, time, workbench as wb
print('the beginning of', kind)
if kind == 'raises': raise ValueError('<b>no</b>\\nsecond line')
if kind == 'exits': wb.record(a=1), sys.exit(0)
if kind == 'killed': wb.record(a=1), os.kill(os.getpid(), 9)
if kind == 'hangs': wb.record(a=1), time.sleep(1000)"""


def test_bad_notebooks_are_isolated_named_kept_and_retried(small, write_notebook, instant):
    """Traps T1, T2: what papermill calls completed. T6: a limit that leaves a loaded machine time to start kernels."""
    end = "if kind != 'silent':\n    wb.record(b=2)"
    write_notebook(small / "n.ipynb", BAD, end, parameters="kind: str = 'good'")
    kinds = ["hangs", "good", "raises", "exits", "killed", "silent"]
    write(f'notebook = "n.ipynb"\ntimeout_s = 15\n[grid]\nkind = {json.dumps(kinds)}')
    outcome = subprocess.run([*SWEEP, "s.toml", "--workers", "2"], capture_output=True, text=True)
    assert outcome.returncode == 1 and "Traceback" not in outcome.stderr
    table = wb.results("s").set_index("p_kind")
    errors = {
        "hangs": "TimeoutError: stopped at the wall-clock limit of 15 s",
        "raises": "ValueError: <b>no</b>",
        "exits": "RuntimeError: a cell stopped the notebook early: cells must not call sys.exit",
        "killed": "DeadKernelError: the kernel was killed, as the system does for want of memory, or crashed",
        "silent": "ValueError: no metrics were recorded: the notebook must end with workbench.record(...)",
    }
    assert dict(table.loc[table["state"] == "failed", "error"]) == errors
    assert set(table.index[table["state"] == "ok"]) == {"good"}
    lines = outcome.stderr.splitlines()
    for kind, error in errors.items():
        folder = Path("results", table.loc[kind, "directory"]).resolve()
        place = lines.index(f"failed: kind {kind}: {error}")
        assert lines[place + 1] == f"  {folder / 'run.ipynb'}"
        assert folder.parent.name == "failed" and runs.read_status(folder)["parameters"]["kind"] == kind
        assert "print('the beginning of', kind)" in (folder / "run.ipynb").read_text()
        # What a kernel that goes at once has not sent is lost.
        said = "Kernel died" if kind == "killed" else f"the beginning of {kind}"
        assert said in (folder / "log.txt").read_text()
    failed = Path("results", table.loc["raises", "directory"])
    assert "second line" in (failed / "log.txt").read_text() and "Cell In[3], line 3" in (failed / "log.txt").read_text()
    assert lines[-1] == "Error: 5 of 6 runs failed; the same command tries them again"
    assert kernels(small) == []

    kept = {path: (path / "status.json").stat() for path in Path("results/runs").iterdir()}
    asked = []
    instant(lambda kind: {"b": asked.append(kind) or 2})
    again = call("s.toml", "--workers", "1")
    assert again.exit_code == 0 and "  failed     5  run again" in again.stderr
    assert asked == [kind for kind in kinds if kind != "good"]
    assert list(wb.results("s")["state"]) == ["ok"] * 6
    assert {path: (path / "status.json").stat() for path in kept} == kept
    assert files("results/failed") == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_ends_at_once_without_its_kernels(small, write_notebook, stop):
    """Ctrl-C and the end of a job: one run is finished, two hang in C calls, three have not begun."""
    mark = f"    open({str(small)!r} + f'/mark{{seed}}', 'w')"
    hold = f"import ctypes, workbench as wb\nif seed:\n{mark}\n    ctypes.PyDLL(None).sleep(1000)"
    write_notebook(small / "n.ipynb", hold, "wb.record(a=1)")
    # Where the tests run in the background SIGINT is ignored, and a child would inherit that.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen([*SWEEP, "s.toml", "--workers", "2"], stderr=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGINT, inherited)
        wait_until(lambda: len(list(small.glob("mark*"))) == 2)
        start = time.monotonic()
        process.send_signal(stop)
        try:
            errors = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode == 1 and time.monotonic() - start < 10
    assert errors.splitlines()[-1] == "Error: interrupted: finished runs are kept, the same command goes on"
    assert "Traceback" not in errors
    wait_until(lambda: not kernels(small), 5)
    assert sorted(places()) == [0] and hidden_leftovers() == []
    assert list(wb.results("s")["state"]) == ["ok"] + ["missing"] * 5
    assert not Path("results/failed").exists()


def test_an_interrupt_while_runs_are_handed_out_cancels_them_all(small, instant, monkeypatch):
    """The pool would else wait for every run that it already has."""
    asked = []
    instant(lambda seed, **_: {"a": asked.append(seed) or seed})
    really = sweep.concurrent.futures.ThreadPoolExecutor.submit

    def submit(pool, function, run, *rest):
        if run.parameters["seed"] == 4:
            raise KeyboardInterrupt
        return really(pool, lambda *given: time.sleep(0.3) or function(*given), run, *rest)

    monkeypatch.setattr(sweep.concurrent.futures.ThreadPoolExecutor, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        sweep.perform(sweep.make_plan(sweep.read("s.toml"), small / "results"), small / "results", workers=1)
    assert asked == []


def test_two_processes_may_finish_the_same_run(tmp_path, monkeypatch):
    """Both find no run in place; the second to come steps in after the first."""
    final = tmp_path / "runs" / "0123456789abcdef"
    builds = [tmp_path / name for name in ("a", "b")]
    for build in builds:
        build.mkdir()
        (build / "from").write_text(build.name)
    really = os.replace

    def replace(source, target):
        if source == builds[0]:  # between the look and the move of the first, the second is published
            monkeypatch.setattr(os, "replace", really)
            runs._publish(builds[1], final)
        really(source, target)

    monkeypatch.setattr(os, "replace", replace)
    runs._publish(builds[0], final)
    assert (final / "from").read_text() == "a"
    assert files(tmp_path) == ["runs", "runs/0123456789abcdef", "runs/0123456789abcdef/from"]


def test_a_run_that_another_process_finishes_meanwhile_is_not_repeated(small, instant):
    asked = []

    def notebook(seed, **_):
        asked.append(seed)
        if seed == 0:
            other = sweep.make_plan(sweep.read("s.toml"), small / "results", shard=(2, 2))  # the seeds 1, 3, 5
            sweep.perform(other, small / "results", workers=1)
        return {"a": seed}

    instant(notebook)
    assert call("s.toml", "--workers", "1").exit_code == 0
    assert asked == [0, 1, 3, 5, 2, 4]


def test_processes_may_tidy_at_the_same_time(tmp_path, monkeypatch):
    leftover = tmp_path / f".tmp-0123456789abcdef-{socket.gethostname()}-{os.getpid()}-1000000000.00"  # an earlier process
    leftover.mkdir()
    (leftover / "file").touch()
    really = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments: really(leftover) or really(*arguments))
    runs.tidy(tmp_path)
    assert files(tmp_path) == []


# --- a full disk ------------------------------------------------------------------------------------------------------

@pytest.fixture
def tmpfs(tmp_path):
    """(size, code) -> outcome of a Python process whose first argument is a folder with a file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o "size=$1" none "$2" && shift 2 && exec "$@"'
    try:
        subprocess.run([*alone, mount, "sh", "1m", disk, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets its users mount no file system of their own (unshare --user --mount)")

    def run(size, code):
        command = [*alone, mount, "sh", size, disk, sys.executable, "-c", code, disk]
        return subprocess.run(command, capture_output=True, text=True)

    return run


ROOM_FOR_LESS = """\
import json, os, shutil, sys
from pathlib import Path
from click.testing import CliRunner
from workbench import __main__, runs
disk, room, counts = Path(sys.argv[1]), 0, []
def execute(build, *_):
    (build / "log.txt").write_text("x" * 5000)
    runs._write_json(build / "metrics.json", {"a": list(range(1000))})
    return 0
runs._execute, runs._git = execute, lambda *_: "commit"
def sweep():
    outcome = CliRunner().invoke(__main__.main, ["sweep", "s.toml", "--workers", "1", "--results", str(disk / "results")])
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exc_info
    hidden = [p for p in (disk / "results").rglob(".*")]
    assert hidden == [], hidden
    finished = [p for p in (disk / "results" / "runs").glob("*") if runs.is_finished(p)]
    assert len(finished) == len(list((disk / "results" / "runs").glob("*")))
    return outcome, len(finished)
while True:
    shutil.rmtree(disk / "results", ignore_errors=True)
    (disk / "results" / "runs").mkdir(parents=True)
    (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - room))
    outcome, finished = sweep()
    (disk / "ballast").unlink()
    counts.append(finished)
    if outcome.exit_code == 0:
        break
    line = outcome.stderr.splitlines()[-1]
    assert line.startswith("Error: [Errno 28] No space left on device"), outcome.stderr
    again, finished = sweep()
    assert (again.exit_code, finished) == (0, 2), again.output
    room += 4096
print(json.dumps(counts))
"""


def test_a_disk_full_at_any_write_is_one_message_and_room_lets_the_sweep_go_on(small, tmpfs):
    """Room for a page more each time: notebook, status, log, metrics, the second run, the table, what was asked, the index."""
    write('notebook = "n.ipynb"\nseeds = [0, 1]')
    outcome = tmpfs("2m", ROOM_FOR_LESS)
    assert outcome.returncode == 0, outcome.stderr
    finished = json.loads(outcome.stdout)
    assert finished == sorted(finished)
    assert all(finished.count(count) > 3 for count in (0, 1, 2))


FULL_DISK = """\
import json, os, subprocess, sys
from pathlib import Path
disk = Path(sys.argv[1])
def sweep():
    command = [sys.executable, "-m", "workbench", "sweep", "s.toml", "--workers", "1", "--results", str(disk / "results")]
    outcome = subprocess.run(command, capture_output=True, text=True)
    states = [json.loads(path.read_text())["state"] for path in (disk / "results").glob("*/*/status.json")]
    return [outcome.returncode, outcome.stderr, states, [p.name for p in (disk / "results").rglob(".*")]]
(disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 300_000))
full = sweep()
(disk / "ballast").unlink()
print(json.dumps([full, sweep()]))
"""


def test_a_disk_that_a_notebook_finds_full_stops_the_sweep(small, tmpfs, write_notebook):
    """The metrics of the second run, 200 kB, find no room: no result of the notebook, and the next run would fare no better."""
    write_notebook(small / "n.ipynb", "import workbench as wb\nkept = wb.record(a='x' * 200_000)")
    write('notebook = "n.ipynb"\nseeds = [0, 1]')
    outcome = tmpfs("3m", FULL_DISK)
    assert outcome.returncode == 0, outcome.stderr
    full, mended = json.loads(outcome.stdout)
    assert full[0] == 1 and "Traceback" not in full[1]
    place = small / "disk" / "results"
    assert full[1].splitlines()[-1] == (
        f"Error: [Errno 28] No space left on device: '{place}': the sweep stops, finished runs are kept in {place}; "
        "the same command goes on once this is mended"
    )
    assert full[2:] == [["ok"], []]
    assert mended[0] == 0 and mended[2:] == [["ok"] * 2, []]
    assert "  cached     1" in mended[1]


# --- on a cluster -----------------------------------------------------------------------------------------------------

CLUSTER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


def test_dask_workers_execute_the_runs(small, write_notebook):
    """A failure is isolated as on this machine, and an interrupt keeps what has finished."""
    code = "import time\ntime.sleep(2 * (seed > 3))\n1 / (seed - 1)"
    write_notebook(small / "n.ipynb", code, RECORD, parameters="seed: int = 0")
    write('notebook = "n.ipynb"\nseeds = [0, 1, 2]')
    write('notebook = "n.ipynb"\nseeds = [4, 5, 6, 7, 8, 9]', "long.toml")
    (small / "cluster.py").write_text(CLUSTER)
    with subprocess.Popen([sys.executable, "cluster.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
        try:
            address = cluster.stdout.readline().strip()
            command = [*SWEEP, "--scheduler", address]
            done = subprocess.run([*command, "s.toml"], capture_output=True, text=True, timeout=120)
            assert done.returncode == 1
            assert f"by the workers of {address}" in done.stderr
            assert "failed: seed 1: ZeroDivisionError: division by zero" in done.stderr
            assert sorted(places()) == [0, 2]

            with subprocess.Popen([*command, "long.toml"], stderr=subprocess.PIPE, text=True) as process:
                wait_until(lambda: 4 in places())
                start = time.monotonic()
                process.terminate()
                assert "interrupted: finished runs are kept" in process.communicate(timeout=60)[1]
                assert time.monotonic() - start < 10
        finally:
            cluster.stdin.close()
    wait_until(lambda: not kernels(small))
    assert 4 in places() and 9 not in places()


def test_a_machine_and_a_cluster_at_once_are_refused(small):
    write('notebook = "n.ipynb"')
    outcome = call("s.toml", "--workers", "2", "--scheduler", "tcp://nowhere:1")
    assert outcome.exit_code == 2
    assert "give one of the two" in outcome.stderr
