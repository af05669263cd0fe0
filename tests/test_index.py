"""The index page of a sweep: its numbers, its picture, its safety, and what a browser makes of it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from workbench import plots, report
from workbench.__main__ import main
from workbench.pareto import pareto_front

HOSTILE = "</script></td><script>document.title = 'taken'</script><img src=http://example.org/x onerror=alert(1)>"
PARAMETERS = """\
seed: int = 0
method: str = "dense"  # what is done
hidden: int = 4
limit: int | None = None"""


class Page(HTMLParser):
    """Tags with attributes, tables as lists of rows of texts, definition lists as dicts, the text of everything else."""

    def __init__(self, source):
        super().__init__()
        self.source, self.tags, self.tables, self.pairs, self.text, self.open = source, [], [], [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("dt", "dd"):
            self.pairs.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data.strip()
        elif "dt" in self.open or "dd" in self.open:
            self.pairs[-1] += data
        elif not {"style", "script"} & set(self.open):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def made(tmp_path, monkeypatch, write_notebook, instant):
    """(TOML text, function, shard) -> Page of the sweep `s` whose runs give what the function gives."""
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path / "n.ipynb", "import workbench as wb\nwb.record(done=1)", parameters=PARAMETERS)

    def make(text, function, shard="1/1"):
        Path("s.toml").write_text('notebook = "n.ipynb"\n' + text)
        instant(function)
        outcome = CliRunner().invoke(main, ["sweep", "s.toml", "--workers", "1", "--shard", shard])
        assert isinstance(outcome.exception, SystemExit | None), outcome.exception
        assert outcome.stdout == f"{tmp_path / 'results' / 'sweeps' / 's' / 'index.html'}\n", outcome.output
        return Page(Path(outcome.stdout.strip()).read_text())

    return make


def check_sound(page, folder):
    """What holds for every index page: one heading, one script, nothing from elsewhere, links that lead somewhere."""
    script = (report.TEMPLATES / "sort.js").read_text()
    assert report.offline_problems(page.source, script=script) == []
    assert page.source.count("<script") == 1 and page.source.count("http://") == page.source.count("&lt;img src=http://")
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-[A-Za-z0-9+/]{43}='", policy
    )
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link["href"][1:] in ids if link["href"].startswith("#") else (folder / link["href"]).is_file()
    for picture in page.all("img"):
        assert picture["src"].startswith("data:image/png;base64,") and len(picture["alt"]) > 20
    for cells in page.tables:
        assert {len(row) for row in cells} == {len(cells[0])}
    assert not re.search(r"\b(nan|NaN|None|NaT|inf)\b", re.sub(r"base64,[^\"]*", "", page.source).split("<script>")[0])


# --- numbers ----------------------------------------------------------------------------------------------------------

PARETO = '[pareto]\nx = "bits"\ny = "accuracy"\nlower_is_better = ["bits"]\n'


def test_mean_spread_number_and_front_by_hand(made):
    """Accuracy of 0.5, 0.7, 0.9 has the mean 0.7 and the standard deviation 0.2 (ddof 1)."""

    def notebook(seed, method, hidden, limit):
        if (method, seed) == ("tt", 2):
            raise ValueError("diverged")
        centre, bits = {"dense": (0.9, 32000), "circulant": (0.7, 1000), "tt": (0.6, 1000), "sparse": (0.7, 1000)}[method]
        return {"accuracy": centre + 0.2 * (seed - 1), "bits": bits, "curve": [1, 2]}

    page = made('seeds = [0, 1, 2]\n[grid]\nmethod = ["dense", "circulant", "tt", "sparse"]\n' + PARETO, notebook)
    points, table, parameters = page.tables
    assert points == [
        ["method", "n", "bits", "std bits", "accuracy", "std accuracy", "front"],
        ["dense", "3", "32,000", "0", "0.9", "0.2", "yes"],
        ["circulant", "3", "1000", "0", "0.7", "0.2", "yes"],  # equal points stand together
        ["tt", "2", "1000", "0", "0.5", "0.1414", ""],
        ["sparse", "3", "1000", "0", "0.7", "0.2", "yes"],
    ]
    assert table[0] == ["method", "seed", "state", "accuracy", "bits", "wall time (s)", "files"]
    assert table[1][:5] == ["dense", "0", "ok", "0.7", "32,000"]
    assert table[9][:5] == ["tt", "2", "failed", "", ""]
    assert parameters[1:] == [["hidden", "4"], ["limit", "none"]]
    assert page.pairs[0] == "method tt, seed 2" and page.pairs[1].startswith("ValueError: diverged (notebook, log)")
    assert "12 runs: 11 finished, 1 failed." in page.text
    assert "n = 3 or fewer. Line: Pareto front" in page.text and "(ddof 1)" in page.text
    assert [image["alt"] for image in page.all("img")] == [
        "accuracy against bits: 4 points, 3 of them on the Pareto front."
    ]
    check_sound(page, Path("results/sweeps/s"))


@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 2), max_size=12), st.booleans(), st.booleans())
def test_the_front_is_what_no_point_beats(points, lower_x, lower_y):
    """Brute force over few values, so that ties in one and in both figures are many."""

    def beats(a, b):
        sides = [(q - p if lower else p - q) for p, q, lower in zip(a, b, (lower_x, lower_y), strict=True)]
        return min(sides) >= 0 and max(sides) > 0

    expected = [not any(beats(other, point) for other in points) for point in points]
    x, y = zip(*points, strict=True) if points else ((), ())
    assert list(pareto_front(x, y, lower_x=lower_x, lower_y=lower_y)) == expected


def test_a_point_without_a_figure_is_on_no_front():
    assert list(pareto_front([1, np.nan, 3], [1, 9, np.nan])) == [True, False, False]


GRID = "seeds = [0, 1]\n[grid]\nhidden = [1, 2]\n"


def test_one_seed_has_no_spread(made):
    page = made("seeds = [7]\n[grid]\nhidden = [2, 4]\n" + PARETO, lambda seed, hidden, **_: {"accuracy": hidden, "bits": 2})
    assert page.tables[0][1:] == [["2", "1", "2", "", "2", "", ""], ["4", "1", "2", "", "4", "", "yes"]]
    assert "One run a point, so no spread can be told; n = 1." in page.text
    check_sound(page, Path("results/sweeps/s"))


def test_without_a_picture_all_numbers_are_summed_up(made):
    """No [pareto]: every numeric metric; texts, tables and truth are none."""

    def notebook(seed, hidden, **_):
        return {"a": seed, "b": 2.5, "label": "x", "good": True, "rows": [{"c": 1}]}

    page = made("seeds = [1, 3]\n[[list]]\nhidden = 2\n[[list]]\nlimit = 9", notebook)
    assert page.tables[0] == [
        ["hidden", "limit", "n", "a", "std a", "b", "std b"],
        ["2", "", "2", "2", "1.414", "2.5", "0"],
        ["4", "9", "2", "2", "1.414", "2.5", "0"],
    ]
    assert page.tables[1][0] == ["hidden", "limit", "seed", "state", "a", "b", "label", "good", "wall time (s)", "files"]
    assert page.all("img") == []
    check_sound(page, Path("results/sweeps/s"))


def test_rows_of_a_metric_can_be_the_points(made):
    """Two runs, each with a table of two methods."""

    def notebook(seed, **_):
        return {"table": [{"kind": "a", "accuracy": 0.5 + 0.1 * seed, "bits": 10}, {"kind": "b", "accuracy": 0.4, "bits": 5}]}

    page = made("seeds = [0, 2]\n" + PARETO + 'records = "table"\ngroup = ["kind"]', notebook)
    assert page.tables[0][1:] == [["a", "2", "10", "0", "0.6", "0.1414", "yes"], ["b", "2", "5", "0", "0.4", "0", "yes"]]
    assert "m_kind" in wb.results("s", records="table") and "Mean and spread over the seeds" in page.text
    check_sound(page, Path("results/sweeps/s"))


def test_a_mean_is_of_the_rows_that_have_both_figures(made):
    page = made("seeds = [0, 1, 2]\n" + PARETO, lambda seed, **_: {"accuracy": [None, 0.5, None][seed], "bits": 10 * seed})
    assert page.tables[0][1] == ["1", "10", "", "0.5", "", "yes"] and "n = 1" in page.text


def test_a_model_that_several_runs_share_counts_once(made):
    """Both runs measure the float model of both seeds; the other rows are the runs' own."""
    def notebook(hidden, **_):
        return {"table": [{"kind": kind, "seed": seed, "accuracy": 0.5 + 0.1 * seed + (kind == "b") * hidden, "bits": 10}
                          for kind in "ab" for seed in (0, 1)]}

    page = made("[grid]\nhidden = [2, 4]\n" + PARETO + 'records = "table"\ngroup = ["kind"]', notebook)
    assert [row[:2] for row in page.tables[0][1:]] == [["a", "2"], ["b", "4"]] and page.tables[0][1][5] == "0.07071"
    assert "Not counted: rows of another run with the seed and every figure of one that is" in page.text and "(2)." in page.text


def test_folds_with_the_same_figures_count_each(made, write_notebook):
    write_notebook(Path("n.ipynb"), "1", parameters=PARAMETERS + '\nsplit: str = "a"')
    page = made('[grid]\nsplit = ["a", "b", "c"]\n' + PARETO + 'records = "table"\ngroup = ["kind"]',
                lambda split, **_: {"table": [{"kind": "x", "seed": 0, "accuracy": 0.6 if split == "c" else 0.9, "bits": 10}]})
    assert page.tables[0][1][:2] == ["x", "3"] and page.tables[0][1][4] == "0.8" and "Not counted" not in page.text


def test_points_with_the_same_figures_are_all_there(made):
    page = made("seeds = [0, 1]\n[grid]\nhidden = [2, 4]\n" + PARETO + 'records = "table"\ngroup = ["hidden"]',
                lambda seed, **_: {"table": [{"seed": seed, "accuracy": 98.0 + seed, "bits": 10}]})
    assert [row[:2] for row in page.tables[0][1:]] == [["2", "2"], ["4", "2"]]


def test_rows_without_a_seed_are_called_rows(made):
    page = made("[grid]\nhidden = [2, 4]\n" + PARETO + 'records = "table"\ngroup = ["kind"]',
                lambda hidden, **_: {"table": [{"kind": "a", "accuracy": hidden, "bits": 1}]})
    assert "Mean and spread over the rows of a point" in page.text and "one seed" not in page.text


def test_names_that_begin_like_a_column_s(made):
    page = made(GRID + '[pareto]\nx = "p_max"\ny = "m_x"', lambda seed, hidden, **_: {"p_max": seed, "m_x": hidden, "max": 7})
    assert page.tables[0][0][1:] == ["n", "p_max", "std p_max", "m_x", "std m_x", "front"]
    check_sound(page, Path("results/sweeps/s"))


def test_a_metric_that_begins_like_a_parameter_s_column(made):
    page = made(GRID, lambda seed, **_: {"p_value": seed, "value": 2 * seed})
    assert page.tables[0][0][1:] == ["n", "p_value", "std p_value", "value", "std value"]


def test_how_figures_read(made):
    page = made("seeds = [12345]", lambda **_: {"a": 9999.7, "b": 9999.4, "c": 2e-17, "d": 12345.6})
    assert dict(zip(page.tables[1][0], page.tables[1][1], strict=True)) == {
        "seed": "12345", "state": "ok", "a": "10,000", "b": "9999", "c": "0", "d": "12,346",
        "wall time (s)": page.tables[1][1][-2], "files": page.tables[1][1][-1]}


@pytest.mark.parametrize("kinds", ["ab", "aa"])
def test_rows_that_differ_in_more_than_the_seed_are_called_so(made, kinds):
    """Two runs of one seed that [pareto] does not tell apart, and rows of one run that it does not."""
    page = made("seeds = [0]\n[grid]\nhidden = [2, 4]\n" + PARETO + 'records = "table"\ngroup = ["kind"]',
                lambda hidden, **_: {"table": [{"kind": kind, "accuracy": hidden, "bits": 1} for kind in kinds]})
    assert page.tables[0][1][1] == str(2 * kinds.count("a")) and "over the seeds" not in page.text
    assert "Mean and spread over the rows of a point, of which several have one seed" in page.text
    assert "the mean over the rows of a point, of which several have one seed, with its standard deviation" in page.text
    check_sound(page, Path("results/sweeps/s"))


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("seeds = [0, 1]\n" + PARETO, lambda **_: {"accuracy": 1, "bits": 1}),
        (PARETO, lambda **_: {"accuracy": 1, "bits": 1}),
        ("seeds = [0, 1]\n[[list]]\nlimit = 3\n[[list]]\n" + PARETO, lambda **_: {"accuracy": 1, "bits": 1}),
        ("seeds = [0, 1]\n" + PARETO, lambda seed, **_: {"accuracy": [None, 1][seed], "bits": 1}),
        (GRID + '[pareto]\nx = "hidden"\ny = "accuracy"', lambda seed, **_: {"accuracy": seed}),
        ('[grid]\nhidden = [1, 2]\n[pareto]\nx = "accuracy"\ny = "accuracy"', lambda **_: {"accuracy": 2}),
        ('[grid]\nmethod = ["$_{x", "_b"]\n' + PARETO, lambda **_: {"accuracy": 1, "bits": 1}),
        ('[grid]\nhidden = [1, 2]\n[pareto]\nx = "a$_{"\ny = "b"', lambda **_: {"a$_{": 1, "b": 1}),
        ('[grid]\nhidden = [1, 2]\n[pareto]\nx = "y$\\\\frac$"\ny = "b"', lambda **_: {"y$\\frac$": 1, "b": 1}),
        (GRID, lambda seed, hidden, **_: {"hidden": hidden, "seed": seed, "state": "x", "n": 1, "files": 2}),
        ("seeds = [0, 1]", lambda seed, **_: {"a": [1, "text"][seed]}),
        ("seeds = [0, 1, 2]\n" + PARETO, lambda seed, **_: {"accuracy": 1e120 * (seed - 1), "bits": 1e-300}),
        ("seeds = [0, 1]\n" + PARETO, lambda **_: 1 / 0),
        (GRID, lambda **_: 1 / 0),
        ("seeds = [0, 1]", lambda **_: {"t": "a" * 10_000, "u": {"v": 1}}),
    ],
    ids=["no group", "one run", "a value of none", "gaps", "a parameter as axis", "one axis twice", "dollars", "dollar names",
         "mathematics",
         "shared names", "sorts", "huge", "all failed", "all failed, no picture", "long"],
)  # fmt: skip
def test_odd_sweeps_have_a_page_too(made, text, function):
    check_sound(made(text, function), Path("results/sweeps/s"))


@pytest.mark.parametrize(
    ("pareto", "message"),
    [
        ('x = "bit"\ny = "accuracy"', "[pareto] names 'bit', which no run has; the parameters and metrics are accuracy, bits,"),
        ('x = "bits"\ny = "none"', "[pareto] needs numbers on its axes, none has no value in any run"),
        ('x = "bits"\ny = "label"', "[pareto] needs numbers on its axes, label is good"),
        ('x = "bits"\ny = "accuracy"\ngroup = ["methd"]', "[pareto] names 'methd', which no run has"),
        ('x = "bits"\ny = "accuracy"\nrecords = "rows"', "the runs have no metric 'rows'. They have accuracy, bits, label"),
        ('x = "bits"\ny = "accuracy"\nrecords = "bits"', "the metric 'bits' is no table of records, got 1"),
    ],
)
def test_a_picture_of_what_is_not_there_is_refused_after_all_runs_are_kept(made, pareto, message):
    with pytest.raises(AssertionError, match=re.escape("Error: " + message)):
        made("[pareto]\n" + pareto, lambda **_: {"accuracy": 1, "bits": 1, "label": "good", "none": None})
    assert list(wb.results("s")["state"]) == ["ok"]
    # The picture can be mended without running anything again.
    page = made(PARETO, lambda **_: 1 / 0)
    assert page.tables[0][1][-1] == "yes"


def test_what_is_missing_or_stale_is_said(made, write_notebook):
    page = made("seeds = [0, 1, 2]", lambda seed, **_: {"a": seed}, shard="2/3")
    assert "3 runs: 1 finished, 2 not run yet." in page.text
    assert [row[1] for row in page.tables[1][1:]] == ["missing", "ok", "missing"]
    check_sound(page, Path("results/sweeps/s"))
    write_notebook(Path("n.ipynb"), "2", parameters=PARAMETERS)
    page = made("seeds = [0, 1, 2]", lambda seed, **_: {"a": seed}, shard="1/3")
    assert "3 runs: 1 finished, 1 of older code or data, 1 not run yet." in page.text
    check_sound(page, Path("results/sweeps/s"))


def test_provenance_is_at_the_foot(made):
    page = made("seeds = [0, 1]", lambda seed, **_: {"a": seed})
    foot = dict(zip(page.pairs[::2], page.pairs[1::2], strict=True))
    assert foot["Command"] == "python -m workbench sweep s.toml"
    table = wb.results("s")
    assert foot["Code"] == table["code"][0] and foot["Commit"] == "commit" and foot["Uncommitted changes"] == "in 2 runs"
    assert foot["Data"] == "none recorded"
    assert foot["Sum of wall times"] == f"{sum(table['wall_s']):.0f} s"
    assert f"torch {table['version_torch'][0]}" in foot["Versions"]


# --- safety -----------------------------------------------------------------------------------------------------------


def test_nothing_hostile_gets_out_of_its_place(made):
    def notebook(seed, method, **_):
        if seed:
            raise ValueError(HOSTILE)
        return {"text": HOSTILE[:50], HOSTILE: 1, "accuracy": 1, "bits": 1}

    text = f"description = {json.dumps(HOSTILE)}\nseeds = [0, 1]\n[grid]\nmethod = [{json.dumps(HOSTILE)}]\n" + PARETO
    page = made(text, notebook)
    check_sound(page, Path("results/sweeps/s"))
    assert page.source.count("&lt;script&gt;") >= 5
    assert HOSTILE in page.text and HOSTILE in page.tables[0][1][0] and HOSTILE in page.tables[1][0]
    assert HOSTILE in page.pairs[1]


# --- in a browser -----------------------------------------------------------------------------------------------------


def twelve(seed, method, **_):
    if (seed, method) == (2, "tt"):
        raise ValueError("the loss is not finite after 3 epochs")
    n = ["dense", "circulant", "tt", "sparse"].index(method)
    return {"accuracy": 0.97 - 0.02 * n * n + 0.004 * seed, "bits": 64000 // 3**n + seed, "label": f"text {9 - n}"}


TWELVE = 'seeds = [0, 1, 2]\n[grid]\nmethod = ["dense", "circulant", "tt", "sparse"]\n' + PARETO


def test_a_click_sorts_the_table(made, browse, tmp_path):
    """By number, by text, upwards, downwards, with empty cells last; the policy admits our script by its hash."""
    page = made(TWELVE, twelve)
    clicks = """<script nonce="test">
const out = [], table = document.querySelectorAll("table.sortable")[1], heads = [...table.tHead.rows[0].cells];
function click(name, column) {
  const n = heads.findIndex(head => head.textContent === name);
  heads[n].querySelector("button").click();
  out.push([name, heads[n].ariaSort, [...table.tBodies[0].rows].map(row => row.cells[column].textContent.trim())]);
}
click("bits", 4); click("bits", 4); click("label", 0); click("seed", 1); click("state", 2);
document.title = JSON.stringify(out);
</script>"""
    source = page.source.replace("script-src ", "script-src 'nonce-test' ").replace("</body>", clicks + "</body>")
    (tmp_path / "clicks.html").write_text(source)
    dumped = Page(browse(tmp_path / "clicks.html", "--dump-dom").strip())
    upwards, downwards, by_label, by_seed, by_state = json.loads(re.search(r"<title>(.*?)</title>", dumped.source, re.S)[1])
    bits = ["2370", "2371", "2372", "7111", "7112", "21,333", "21,334", "21,335", "64,000", "64,001", "64,002"]
    assert upwards == ["bits", "ascending", [*bits, ""]]
    assert downwards == ["bits", "descending", [*bits[::-1], ""]]
    assert by_label[1:] == ["ascending", ["sparse"] * 3 + ["tt"] * 2 + ["circulant"] * 3 + ["dense"] * 3 + ["tt"]]
    assert by_seed[2] == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    assert by_state[2] == ["failed"] + ["ok"] * 11


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_in_a_browser_without_network(made, screenshot, tmp_path, width):
    made(TWELVE, twelve)
    screenshot(tmp_path / "results" / "sweeps" / "s" / "index.html", width, 2400, tmp_path / "page.png")
    pixels = matplotlib.image.imread(tmp_path / "page.png")[..., :3]  # (height, width, 3)
    ink = pixels.min(axis=2) < 0.9
    assert ink.mean() > 0.01 and not ink[:, -5:].any()
    # The green of the picture is there, the only one of the page, at either width.
    red, green, blue = np.moveaxis(pixels, 2, 0)
    assert ((green - red > 0.3) & (green - blue > 0.1)).sum() > 20


def test_a_long_value_is_cut_in_the_legend():
    points = pd.DataFrame({"p_label": ["$" * 500, "short"], "n": 1, "m_bits": [1.0, 2.0], "m_accuracy": [1.0, 2.0],
                           "std bits": np.nan, "std accuracy": np.nan, "front": "yes"})
    figure = plots.sweep_figure(points, points, "m_bits", "m_accuracy", [])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["Pareto front of the means", r"\$" * 39 + "…", "short"]
