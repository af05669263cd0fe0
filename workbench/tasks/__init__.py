"""Sequence data sets, one per file: those of the workbench in `TASKS`, a user's own in a folder (see docs/adding_a_task.md)."""

import ast
import contextlib
import hashlib
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

from workbench.tasks import fsdd, imdb, japanese_vowels, ptb
from workbench.tasks.task import LanguageTask, Recipe, Split, Task, pad, standardise

__all__ = ["TASKS", "LanguageTask", "Recipe", "Split", "Task", "descriptions", "digest", "load", "names", "pad", "standardise"]

# Each module gives load(split) -> Task or LanguageTask and digest() -> str.
TASKS = {
    "japanese_vowels": japanese_vowels,
    "fsdd": fsdd,
    "imdb": imdb,
    "ptb": ptb,
}
# A folder of files like them. They are run: the environment names them, which no file that comes from others can set.
OWN = "WORKBENCH_TASKS"


def names() -> list[str]:
    """Names of all tasks."""
    return [*TASKS, *_own()]


def descriptions() -> dict[str, str]:
    """Name -> first line of its file; nothing of a user's own is run for it."""
    docs = {name: module.__doc__ for name, module in TASKS.items()}
    docs |= {name: _described(path) for name, path in _own().items()}
    return {name: (doc or "").partition("\n")[0] for name, doc in docs.items()}


def _described(path):
    try:
        return ast.get_docstring(ast.parse(path.read_bytes()))
    except SyntaxError as error:
        return f"not Python: {error}"


def load(name: str, split: str = "official") -> Task | LanguageTask:
    """The task `name`, its examples divided the way `split` says; ValueError where either is unknown."""
    module = _module(name)
    task = module.load(split)
    if name in TASKS:
        return task
    if type(task) not in (Task, LanguageTask):  # no class of the file's own: other processes would not know it
        raise ValueError(f"load of {module.__file__} needs to give a Task or LanguageTask, got a {type(task).__name__}")
    if (task.name, task.split) != (name, split):
        raise ValueError(f"load of {module.__file__} needs to give the task {name!r} with split {split!r}, got {task.name!r} "
                         f"with {task.split!r}")
    return replace(task, digest=_own_digest(module))


def digest(name: str) -> str:
    """SHA-256 (hex) over the source bytes and the feature version of task `name`, of a user's own over its file too; equal to
    `load(name).digest`."""
    module = _module(name)
    return module.digest() if name in TASKS else _own_digest(module)


def _own_digest(module):
    with _named(module.__file__):
        found = module.digest()
    if not isinstance(found, str):
        raise ValueError(f"digest of {module.__file__} needs to give a text, got {found!r}")
    return hashlib.sha256(Path(module.__file__).read_bytes() + found.encode()).hexdigest()


@contextlib.contextmanager
def _named(file):
    """What the code of a user's own file raises, as a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file} fails with {type(error).__name__}: {error}") from error


def _own() -> dict[str, Path]:
    """Name -> file of a user's own tasks."""
    if not (folder := os.environ.get(OWN)):
        return {}
    if not os.path.isabs(folder) or not Path(folder).is_dir():  # a notebook runs in a folder of its own
        raise ValueError(f"{OWN} needs the absolute path of a folder, got {folder!r}")
    found = {path.stem: path for path in sorted(Path(folder).glob("[!_]*.py"))}
    if taken := [name for name in found if name in TASKS]:
        raise ValueError(f"{OWN} needs tasks of other names than the workbench's, got {', '.join(taken)} in {folder}")
    return found


def _module(name):
    if name in TASKS:
        return TASKS[name]
    if name not in (own := _own()):
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join([*TASKS, *own])}; one of your own needs a file "
                         f"in the folder that the environment variable {OWN} names")
    spec = importlib.util.spec_from_file_location(f"workbench_task_{name}", own[name])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # known by name, as its dataclasses need
    with _named(own[name]):
        spec.loader.exec_module(module)  # anew each time: it may have been edited
    if missing := [verb for verb in ("load", "digest") if not callable(getattr(module, verb, None))]:
        raise ValueError(f"{own[name]} needs the functions load(split) and digest(), got none named {' or '.join(missing)}")
    return module
