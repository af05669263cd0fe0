"""The page that adds a task: its file makes the task known everywhere; what such a file may get wrong is refused."""

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

import workbench as wb
from workbench import runs, tasks

PAGE = (REPOSITORY / "docs" / "adding_a_task.md").read_text()
(FILE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the page, named in the environment."""
    place = tmp_path / "my_tasks"
    place.mkdir()
    (place / "steps.py").write_text(FILE)
    monkeypatch.setenv(tasks.OWN, str(place))
    return place


def test_the_task_of_the_page_is_learned(folder):
    task = tasks.load("steps")
    assert tasks.names()[-1] == "steps" and task.num_features == 4 and task.num_classes == 2
    model = wb.build_classifier(task, task.recipe.hidden_size, seed=0)
    wb.fit(model, task, seed=0, epochs=10, progress=False)
    assert wb.evaluate(model, task, "test").accuracy > 90
    assert tasks.load("japanese_vowels").name == "japanese_vowels"


def test_the_commands_of_the_page_know_it(folder):
    def said(*arguments):
        return subprocess.run([sys.executable, "-m", "workbench", *arguments], check=True, capture_output=True, text=True,
                              cwd=folder).stdout

    assert re.search(r"^steps +Toy: whether a noisy sequence rises or falls", said("tasks"), re.MULTILINE)
    assert "epoch 2 kept, test loss" in said("train", "steps", "--seed", "1", "--epochs", "2")


def test_an_edited_file_is_another_task(folder):
    before = runs.data_digest({"task": "steps"})
    assert before == tasks.digest("steps") == tasks.load("steps").digest
    (folder / "steps.py").write_text(FILE.replace("normal(0, 1,", "normal(0, 2,"))
    assert tasks.load("steps").digest == tasks.digest("steps") != before
    (folder / "steps.py").write_text(FILE.replace('VERSION = "1"', 'VERSION = "2"'))
    assert tasks.digest("steps") != before


def test_names_run_nothing(folder):
    (folder / "broken.py").write_text('"""Says so."""\nraise RuntimeError("it was run")\n')
    (folder / "_helper.py").write_text("raise RuntimeError")
    assert tasks.names()[-2:] == ["broken", "steps"] and tasks.descriptions()["broken"] == "Says so."
    (folder / "half.py").write_text("def load(split")
    assert tasks.descriptions()["half"].startswith("not Python: '(' was never closed")
    with pytest.raises(ValueError, match=r"broken\.py fails with RuntimeError: it was run"):
        tasks.load("broken")
    with pytest.raises(ValueError, match=r"half\.py fails with SyntaxError: '\(' was never closed"):
        tasks.load("half")
    with pytest.raises(ValueError, match=r"unknown task 'stairs'; known tasks: .*, ptb, broken, half, steps; one of your"):
        tasks.load("stairs")


@pytest.mark.parametrize(("change", "message"), [
    (("def digest", "def fingerprint"), r"steps\.py needs the functions load\(split\) and digest\(\), got none named digest"),
    (('name="steps"', 'name="stairs"'), r"the task 'steps' with split 'official', got 'stairs' with 'official'"),
    (("split=split,", 'split="other",'), r"give the task 'steps' with split 'official', got 'steps' with 'other'"),
    (("return Task(", "return dict("), r"load of .*steps\.py needs to give a Task or LanguageTask, got a dict"),
    (("return Task(", "return type('Mine', (Task,), {})("), r"to give a Task or LanguageTask, got a Mine"),
    (("hashlib.sha256(VERSION.encode()).hexdigest()", "1"), r"digest of .*steps\.py needs to give a text, got 1"),
])  # fmt: skip
def test_a_file_that_is_no_task_is_refused(folder, change, message):
    assert change[0] in FILE
    (folder / "steps.py").write_text(FILE.replace(*change))
    with pytest.raises(ValueError, match=message):
        tasks.load("steps")


def test_what_digest_raises_names_the_file(folder):
    (folder / "steps.py").write_text(FILE.replace("hashlib.sha256(VERSION.encode()).hexdigest()", "{}[VERSION]"))
    with pytest.raises(ValueError, match=r"steps\.py fails with KeyError: '1'"):
        tasks.digest("steps")


def test_a_folder_that_is_none_is_refused(folder, monkeypatch):
    (folder / "fsdd.py").write_text(FILE)
    with pytest.raises(ValueError, match="WORKBENCH_TASKS needs tasks of other names than the workbench's, got fsdd in"):
        tasks.names()
    for place in ("my_tasks", str(folder / "none")):
        monkeypatch.setenv(tasks.OWN, place)
        with pytest.raises(ValueError, match="WORKBENCH_TASKS needs the absolute path of a folder, got '.*(my_tasks|none)'"):
            tasks.load("steps")
