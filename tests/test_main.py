import subprocess
import sys

import pytest
from click.testing import CliRunner

from workbench.__main__ import main

RECORD = "import workbench as wb\nwb.record(done=seed)"


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_run_with_report_prints_its_path_last(tmp_path, write_notebook):
    path = write_notebook(tmp_path / "n.ipynb", RECORD)
    command = [sys.executable, "-m", "workbench", "run", path, "-p", "seed", "4", "--results", tmp_path, "--report"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    (report,) = outcome.stdout.splitlines()
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert report == str(run_dir / "report.html")
    assert "Executing: 100%" in outcome.stderr and f"finished: {run_dir}" in outcome.stderr

    again = call("run", path, "-p", "seed", "4", "--results", tmp_path)
    assert (again.exit_code, again.stdout) == (0, f"reused: {run_dir}\n")
    (run_dir / "report.html").unlink()
    assert call("report", run_dir).stdout == f"{report}\n"
    assert (run_dir / "report.html").exists()


def test_a_failing_notebook_is_named_with_its_place(tmp_path, write_notebook):
    path = write_notebook(tmp_path / "n.ipynb", "1 / seed")
    command = [sys.executable, "-m", "workbench", "run", path, "--results", tmp_path]
    outcome = subprocess.run(command, capture_output=True, text=True)
    (run_dir,) = (tmp_path / "failed").iterdir()
    assert outcome.returncode == 1
    assert outcome.stderr.splitlines()[-2:] == [
        "Error: ZeroDivisionError: division by zero",
        f"notebook and log: {run_dir / 'run.ipynb'}",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hybird"], "no notebook 'hybird': give a path to an .ipynb file or one of"),
        (["n.ipynb", "-p", "sead", "1"], "n.ipynb has no parameter 'sead'; did you mean 'seed'?"),
        (["n.ipynb", "-p", "seed", "one"], "parameter 'seed' needs int, for example 3, got 'one'"),
        (["n.ipynb", "-p", "seed", "1", "-p", "seed", "2"], "parameter 'seed' is given more than once"),
        (["n.ipynb", "-p", "task", "vowels"], "unknown task 'vowels'; known tasks: japanese_vowels"),
        (["n.ipynb", "--results", "n.ipynb/below"], "n.ipynb is a file"),
    ],
)
def test_bad_input_is_one_message_and_nothing_starts(tmp_path, write_notebook, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    parameters = 'seed: int = 0\ntask: str = "japanese_vowels"'
    write_notebook(tmp_path / "n.ipynb", RECORD, parameters=parameters)
    outcome = call("run", *arguments)
    assert outcome.exit_code == 1
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("Error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["n.ipynb"]


def test_report_of_no_run_is_refused(tmp_path):
    outcome = call("report", tmp_path)
    assert outcome.exit_code == 1
    assert outcome.stderr == f"Error: {tmp_path} is not a run directory: it has no readable status.json\n"


def test_a_sweep_has_a_report_of_every_run_and_an_index(tmp_path, write_notebook, instant):
    path = write_notebook(tmp_path / "n.ipynb", RECORD)
    (tmp_path / "s.toml").write_text('notebook = "n.ipynb"\nseeds = [0, 1]')
    instant(lambda seed: {"done": seed})
    outcome = call("sweep", tmp_path / "s.toml", "--results", tmp_path, "--report")
    folder = tmp_path / "sweeps" / "s"
    assert (outcome.exit_code, outcome.stdout) == (0, f"{folder / 'index.html'}\n")
    reports = sorted(tmp_path.glob("runs/*/report.html"))
    assert len(reports) == 2
    assert (folder / "index.html").read_text().count("/report.html") == 2

    written = reports[0].stat().st_mtime_ns
    reports[1].unlink()
    assert call("report", folder).stdout == outcome.stdout
    assert reports[1].exists() and reports[0].stat().st_mtime_ns > written

    # A notebook that breaks a rule of reports costs its report, neither the runs nor the index.
    write_notebook(path, "# A second title", RECORD)
    (tmp_path / "t.toml").write_text('notebook = "n.ipynb"\nseeds = [2]')
    outcome = call("sweep", tmp_path / "t.toml", "--results", tmp_path, "--report")
    (place,) = set(tmp_path.glob("runs/*")) - {report.parent for report in reports}
    assert outcome.exit_code == 0 and outcome.stdout.endswith("sweeps/t/index.html\n")
    assert f"no report of {place}: a report needs one top heading (# ...) that opens the notebook, n has 2" in outcome.stderr


def test_the_parameters_of_a_notebook_are_listed(tmp_path, write_notebook):
    parameters = 'seed: int = 0  # of everything\nmethods: list[str] = ["a", "b c"]\nlimit: float | None = None'
    write_notebook(tmp_path / "n.ipynb", RECORD, parameters=parameters)
    outcome = call("parameters", tmp_path / "n.ipynb")
    assert outcome.exit_code == 0 and outcome.stdout.splitlines() == [
        "seed                 int, 0  # of everything",
        "methods              list[str], '[\"a\", \"b c\"]'",
        "limit                float | None, none",
    ]
    outcome = call("parameters", "hybird")
    assert outcome.exit_code == 1 and "no notebook 'hybird'" in outcome.stderr


@pytest.mark.parametrize(("command", "name"), [("tasks", "japanese_vowels"), ("methods", "BlockCirculant")])
def test_tables_are_listed(command, name):
    outcome = call(command)
    assert outcome.exit_code == 0
    assert [line for line in outcome.stdout.splitlines() if line.startswith(name + " ")]
