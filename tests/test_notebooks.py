"""Every notebook runs end to end with small parameters, hands over its metrics and makes a whole report."""

import json
import re

import pytest
from conftest import REPOSITORY

from workbench import report, runs

SMALL = {  # notebook -> (small parameters, metrics that it must hand over, figures in its report)
    "hybrid": (
        {"hidden_size": 16, "target_cr_disk": 12.0, "seeds": [0, 1], "epochs": 1, "retrain_epochs": 1, "search_epochs": 0,
         "array": "group4x4", "steps": 3},
        {"summary", "results", "classes", "search", "hardware"},
        4,
    ),
}


def test_every_notebook_is_here():
    assert {path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb")} == set(SMALL)


@pytest.fixture(scope="module", params=SMALL)
def run(request, tmp_path_factory):
    parameters, metrics, figures = SMALL[request.param]
    result = runs.run(request.param, parameters, tmp_path_factory.mktemp("results"), timeout_s=300)
    assert result.state == "ok", result.error
    return result.directory, metrics, figures


def test_metrics_are_handed_over(run):
    directory, metrics, _ = run
    recorded = json.loads((directory / "metrics.json").read_text())
    assert set(recorded) == metrics
    rows = recorded["results"]
    assert {row["seed"] for row in rows} == {0, 1}
    assert all(row["cr_disk"] >= 12.0 for row in rows if row["variant"].startswith(("hybrid", "uniform")))


def test_the_report_is_whole_and_needs_no_network(run):
    directory, _, figures = run
    page = report.build(directory).read_text()
    assert report.offline_problems(page) == []
    pictures = re.findall(r'<img[^>]*src="data:image/png;base64,[^"]{2000,}"[^>]*>', page)
    assert len(pictures) == figures
    assert all(re.search(r'alt="[^"]{20,}"', picture) for picture in pictures)
    for word in ("sensitive", "cr_disk", "integer engine", "small dense 8-bit", "modelled", "SHA-256", "Provenance"):
        assert word in page, word
    printed = re.findall(r"<pre>(.*?)</pre>", page, flags=re.DOTALL)
    assert max(map(len, printed), default=0) < 500, "a value is printed in full: give it a name instead"
    assert "..." not in re.sub(r"<code>.*?</code>", "", page.split("<main", 1)[-1]), "a table is cut short"


def test_the_report_in_a_browser(run, screenshot, tmp_path):
    directory, _, _ = run
    for width in (1280, 390):
        picture = tmp_path / f"{width}.png"
        screenshot(report.build(directory), width, 3000, picture)
        assert picture.stat().st_size > 50_000
