"""The page that adds a method: run as it stands, and its method is under the contract of all methods."""

import contextlib
import io
import re

import pytest
import test_methods
import torch
from conftest import REPOSITORY

import workbench as wb

PAGE = (REPOSITORY / "docs" / "adding_a_method.md").read_text()
METHODS = set(wb.METHODS)  # before the page has added its own


@pytest.fixture(scope="module")
def page():
    """(names that the page defines, what it prints)"""
    before, names, printed = dict(wb.METHODS), {"__name__": "nofm"}, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), torch.random.fork_rng():
            for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
                exec(compile(block, "adding_a_method.md", "exec"), names)
        yield names, printed.getvalue()
    finally:
        wb.METHODS.clear()
        wb.METHODS.update(before)


def test_it_runs(page):
    names, printed = page
    assert re.fullmatch(r"NofM 2 4: cr_disk 1\d\.\d, \d+ cycles a step\n", printed)
    assert names["packed"].cr_disk >= 10
    x = torch.randn(20, 2, 12)
    assert (names["integer"](x)[0] - names["schedule"].model(x)[0]).abs().max() < 0.1
    assert wb.method_from_label("NofM 2 4") == names["NofM"](2, 4)


@pytest.mark.parametrize(("n", "m", "shape"), [(2, 4, (6, 12)), (1, 4, (3, 7)), (4, 4, (4, 6)), (1, 8, (4, 5))])
def test_its_method_keeps_the_contract(page, n, m, shape):
    method = page[0]["NofM"](n, m)
    for check in (
        test_methods.test_project_is_idempotent_and_leaves_its_input, test_methods.test_nothing_in_the_set_is_nearer,
        test_methods.test_zero_weights_are_stored_like_any,
        test_methods.test_pack_holds_the_quantised_projection, test_methods.test_json_round_trip,
        test_methods.test_constrained_weights_are_the_quantised_projection, test_methods.test_the_constrained_set_is_trained_in,
        test_methods.test_the_gradient_is_that_of_the_expansion, test_methods.test_float32_training_shows_the_same_grid,
    ):
        check(method, shape)


def test_the_page_lists_the_places_that_name_every_method():
    """All of them, apart from tests, which may use every method without listing them, and a study that chooses its own."""
    places = re.findall(r"^\d\. `(.+?)`: ", PAGE, re.MULTILINE)
    files = {place for pattern in ("README.md", "benchmarks/*.py", "notebooks/*.ipynb", "tests/*.py", "workbench/**/*.py")
             for place in REPOSITORY.glob(pattern)}
    known = {str(path.relative_to(REPOSITORY)): set(re.findall(r"\w+", path.read_text())) for path in files}
    assert [(place, METHODS - known[place]) for place in places if not known[place] >= METHODS] == []
    listing = {place for place, words in known.items() if words >= METHODS and not place.startswith("tests/")}
    assert listing - {"workbench/acceleration.py"} <= set(places)
    assert len(places) == 7 and "seven places" in PAGE


def test_its_ladder_falls(page):
    for shapes in ([(16, 12), (16, 16)], [(8, 3)], [(6, 5), (4, 7)]):
        test_methods.test_no_member_of_a_ladder_is_larger_than_the_one_before(page[0]["NofM"], shapes)


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 4), "NofM needs a whole n from 1 to 4, got 0"), ((2, 1), "NofM needs a whole m of at least 2, got 1")])
def test_its_messages(page, arguments, message):
    with pytest.raises(ValueError, match=message):
        page[0]["NofM"](*arguments)
