import shutil
from html.parser import HTMLParser

import matplotlib.image
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from workbench import report, runs

PARAMETERS = """\
seeds: list[int] = [0, 1]  # seeds of the repeated training
label: str = "plain"  # shown as typed
limit: int | None = None"""


PLOTLY = {"application/vnd.plotly.v1+json": {"data": [], "layout": {}}}
ALTAIR = {"application/vnd.vegalite.v6+json": {"mark": "bar"}, "text/plain": "alt.Chart(...)"}


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, write_notebook):
    """A finished run whose notebook shows one of everything."""
    folder = tmp_path_factory.mktemp("report")
    path = write_notebook(
        folder / "n.ipynb",
        "import workbench as wb\nimport matplotlib.pyplot as plt\nimport numpy as np\nimport pandas as pd\nimport sys",
        "## What the gates do\n\nWith $c < 38.4$ and\n\n$$r = \\frac{32 N}{v + i}$$\n\n| a | b |\n|---|---|\n| 1 | 2 |",
        "fig, ax = plt.subplots(figsize=(9, 3))\nax.bar([1, 2], [1, 2])\nwb.show(fig, 'Bars & \"rising\"')",
        "### Table\n\n[a link](https://example.org)",
        "pd.DataFrame(np.ones((2, 20)), columns=[f'a long column name {i}' for i in range(20)])",
        "print('<script>printed</script>')\nprint('progress', file=sys.stderr)",
        "## What the gates do",
        "wb.record(label=label, note='<img src=https://example.org/x.png>')",
        parameters=PARAMETERS,
    )
    result = runs.run(path, {"label": "<script>alert(1)</script>"}, folder / "results")
    assert result.state == "ok", result.error
    return result.directory


class Page(HTMLParser):
    """Tags with their attributes, and the text inside chosen tags."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="session")
def page(run_dir):
    path = report.build(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text())


def test_report_loads_nothing_from_anywhere(page):
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "poster", "data"):
                assert value.startswith("data:")
            if name == "href":
                assert tag == "a"
    assert not [text for text in page.texts if "@import" in text or "url(" in text]


def test_report_forbids_what_it_does_not_hold(page):
    """Even what the check of a page overlooked can neither run nor load."""
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_report_is_structured(page):
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a") if a["href"].startswith("#")]
    assert targets == ["parameters", "what-the-gates-do", "table", "what-the-gates-do-2", "provenance"]
    assert set(targets) <= set(ids)
    assert [a["href"] for a in page.all("a")].count("https://example.org") == 1
    assert [image["alt"] for image in page.all("img")] == ['Bars & "rising"']
    assert [math["display"] for math in page.all("math")] == ["inline", "block"]
    assert sum(div.get("class") == "scroll" for div in page.all("div")) == len(page.all("table")) == 3


def test_report_hides_code_and_shows_what_was_asked(page, run_dir):
    text = "".join(page.texts)
    assert "import workbench" not in text and "progress" not in text
    for shown in (
        "<script>alert(1)</script>",
        "<script>printed</script>",
        "<img src=https://example.org/x.png>",
        "seeds of the repeated training",
        "[0, 1]",
        run_dir.name,
        "-p label '<script>alert(1)</script>'",
        runs.read_status(run_dir)["provenance"]["code"],
    ):
        assert shown in text
    assert "none" in page.texts  # the parameter `limit`


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (new_markdown_cell("# A second top heading"), "needs one top heading .* has 2"),
        (new_markdown_cell("![](data:image/png;base64,AAAA)"), "<img> without alt"),
        (new_markdown_cell("![x](picture.png)"), 'src="picture.png"'),
        (new_markdown_cell("![x](https://example.org/x.png)"), 'src="https://example.org/x.png"'),
        (new_markdown_cell("<script>1</script>"), "<script>"),
        (new_markdown_cell("<p onclick='x()'>a</p>"), "<p onclick>"),
        (new_markdown_cell("<style>@import 'x.css';</style>"), "a style that loads a file"),
        (new_markdown_cell("<p style='background: url(https://example.org/x.png)'>a</p>"), "a style that loads a file"),
        (new_markdown_cell("<p style='background: URL(https://example.org/x.png)'>a</p>"), "a style that loads a file"),
        (new_markdown_cell("<svg><image xlink:href='https://example.org/x.png'/></svg>"), "<image xlink:href>"),
        (new_markdown_cell("<meta http-equiv='Refresh' content='0; url=https://example.org'>"), "<meta http-equiv=refresh>"),
        (new_markdown_cell("<iframe srcdoc='a'></iframe>"), "<iframe>"),
        (new_markdown_cell("<link rel='stylesheet' href='x.css'>"), "<link>"),
        (new_code_cell(outputs=[new_output("display_data", {"image/png": "AAAA"})]), "has no description"),
        (new_code_cell(outputs=[new_output("display_data", {"image/svg+xml": "<svg/>"})]), "cannot show image/svg"),
        (new_code_cell(outputs=[new_output("display_data", {"image/jpeg": "AAAA"})]), "cannot show image/jpeg"),
        # Plots that need a script: plotly's default is dropped by nbconvert with a warning only, altair's loads from a CDN.
        (new_code_cell(outputs=[new_output("display_data", PLOTLY)]), "cannot show application/vnd.plotly.v1"),
        (new_code_cell(outputs=[new_output("execute_result", ALTAIR)]), "cannot show application/vnd.vegalite.v6"),
        (new_code_cell(outputs=[new_output("display_data", {"text/html": "<div></div><script>1</script>"})]), "<script>"),
        (new_code_cell(outputs=[new_output("display_data", {"application/x-new": "?", "text/plain": "a"})]), "cannot show"),
        (
            new_code_cell(outputs=[new_output("display_data", {"text/html": "<img alt='x' src='http://a/b.png'>"})]),
            'src="http://a/b.png"',
        ),
    ],
)
def test_what_would_break_a_report_is_refused(run_dir, tmp_path, cell, message):
    with pytest.raises(ValueError, match=message):
        report.build(changed(run_dir, tmp_path, cell))
    assert not (tmp_path / "run" / "report.html").exists()


def changed(run_dir, tmp_path, cell):
    """A copy of the run with one more cell."""
    copy = shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    notebook = nbformat.read(copy / "run.ipynb", as_version=4)
    notebook.cells.append(cell)
    nbformat.write(notebook, copy / "run.ipynb")
    return copy


def test_widgets_leave_a_note_and_latex_outputs_become_mathml(run_dir, tmp_path):
    outputs = [
        new_output("display_data", {report.WIDGET: {"model_id": "x"}, "text/plain": "HBox()"}),
        new_output("display_data", {"text/latex": "$a^2$", "text/plain": "a2"}),
    ]
    source = report.build(changed(run_dir, tmp_path, new_code_cell(outputs=outputs))).read_text()
    assert "An interactive control stands here" in source and "HBox" not in source and "widget" not in source
    assert source.count("<math") == 3


def test_the_state_of_widgets_stays_out(run_dir, tmp_path):
    """papermill keeps it in the notebook; nbconvert would load a manager for it from a CDN."""
    copy = changed(run_dir, tmp_path, new_markdown_cell("the end"))
    notebook = nbformat.read(copy / "run.ipynb", as_version=4)
    state = {"a": {"model_module": "@jupyter-widgets/controls", "model_module_version": "2.0.0", "model_name": "HBoxModel"}}
    state["a"]["state"] = {}
    kind = "application/vnd.jupyter.widget-state+json"
    notebook.metadata["widgets"] = {kind: {"state": state, "version_major": 2, "version_minor": 0}}
    nbformat.write(notebook, copy / "run.ipynb")
    assert "jupyter-widgets" not in report.build(copy).read_text()


def test_a_cell_can_be_left_out(run_dir, tmp_path):
    cell = new_markdown_cell("for the author only", metadata={"tags": ["remove_cell"]})
    assert "for the author" not in report.build(changed(run_dir, tmp_path, cell)).read_text()


def test_only_finished_runs_have_reports(run_dir, tmp_path):
    with pytest.raises(ValueError, match="is not a run directory"):
        report.build(tmp_path)
    copy = shutil.copytree(run_dir, tmp_path / "run")
    (copy / "metrics.json").unlink()
    with pytest.raises(ValueError, match="holds no finished run"):
        report.build(copy)


def test_show_needs_a_description():
    with pytest.raises(ValueError, match="show needs a description"):
        report.show(None, " ")


@pytest.mark.parametrize("width", [1280, 390])
def test_report_opens_in_a_browser_without_network(screenshot, page, run_dir, tmp_path, width):
    picture = tmp_path / f"{width}.png"
    screenshot(run_dir / "report.html", width, 2000, picture)
    pixels = matplotlib.image.imread(picture)[..., :3]  # (height, width, 3)
    assert pixels.shape[:2] == (2000, width)
    ink = pixels.min(axis=2) < 0.9  # (height, width)
    assert ink.mean() > 0.01
    # The 20-column table scrolls inside the page: nothing reaches the right margin.
    assert not ink[:, -5:].any()
    # The bars of the figure are there.
    assert (np.abs(pixels - np.array([31, 119, 180]) / 255).max(axis=2) < 0.02).sum() > 100


def test_a_formula_that_cannot_be_read_is_named(run_dir, tmp_path):
    cell = new_markdown_cell(r"$\frac{1}{$")
    with pytest.raises(ValueError, match=r"a report cannot show the formula '\\\\frac\{1\}\{'"):
        report.build(changed(run_dir, tmp_path, cell))
