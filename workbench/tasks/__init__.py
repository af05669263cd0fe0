"""Sequence data sets, one per file; `TASKS` lists them all."""

from workbench.tasks import fsdd, imdb, japanese_vowels, ptb
from workbench.tasks.task import LanguageTask, Recipe, Split, Task

__all__ = ["TASKS", "LanguageTask", "Recipe", "Split", "Task", "digest", "load", "names"]

# Each module gives load(split) -> Task or LanguageTask and digest() -> str.
TASKS = {
    "japanese_vowels": japanese_vowels,
    "fsdd": fsdd,
    "imdb": imdb,
    "ptb": ptb,
}


def names() -> list[str]:
    """Names of all tasks."""
    return list(TASKS)


def load(name: str, split: str = "official") -> Task | LanguageTask:
    """The task `name`, its examples divided the way `split` says; ValueError where either is unknown."""
    return _module(name).load(split)


def digest(name: str) -> str:
    """SHA-256 (hex) over the source bytes and the feature version of task `name`, equal to `load(name).digest`."""
    return _module(name).digest()


def _module(name):
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    return TASKS[name]
