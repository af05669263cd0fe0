"""The page about the array runs as it stands, and what it says of the figures is true."""

import re

import pytest
import torch
from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "array.md").read_text()


@pytest.fixture(scope="module")
def names():
    found = {"__name__": "page"}
    with torch.random.fork_rng():
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(compile(block, "array.md", "exec"), found)
    return found


def test_what_it_says_is_so(names):
    schedule = names["schedule"]
    assert sum(schedule.split().values()) == schedule.cycles
    assert names["executed"].output.shape == (20, 1, 32) and names["executed"].schedule.cycles == schedule.cycles
    assert names["batch"].cycles_per_item < schedule.steady_state_cycles
    assert len(names["pipeline"].stages) == 1 < len(names["in_turn"].stages)
    assert names["sparing"].delta and not names["layer"].delta
    assert names["skipping"].counts()["skipped_macs"] > 0
    assert names["space"]["fits"].all() and names["space"]["cycles"].size == 16
    assert names["smallest"][0]["meets"]
