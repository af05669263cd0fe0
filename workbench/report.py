"""The HTML report of a run: one file that opens with no network and runs no script.

nbconvert renders the executed notebook through the templates in report_template/; code stays hidden.
"""

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from workbench import runs

TEMPLATES = Path(__file__).with_name("report_template")
DUST = 1e-12  # in tables what rounding leaves of a mean or a deviation that is 0, of percentages too
REPORT = "report.html"
WIDGET = "application/vnd.jupyter.widget-view+json"
# What a report shows. Other pictures cannot carry a description in a notebook, and nbconvert drops plots that need a
# script (plotly, altair) without a word.
SHOWN = ("text/plain", "text/html", "text/markdown", "text/latex", "image/png", WIDGET)


def show(fig, alt: str) -> None:
    """Display a matplotlib figure as PNG (110 dots per inch) with a description for those who cannot see it, and close it.

    alt: what the picture shows, in a sentence or two.
    """
    from IPython.display import display
    from matplotlib import pyplot

    if not alt.strip():
        raise ValueError("show needs a description of the figure in alt, got an empty text")
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(fig)
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})


def build(run_dir) -> Path:
    """Write report.html into the directory of a finished run and give its path.

    ValueError where the run did not finish, or where its notebook breaks a rule of reports: one top heading, in the first
    cell; a description for every picture; nothing that loads from a network.
    """
    import nbformat  # takes a second to load, which notebooks that only show figures need not wait for

    run_dir = Path(run_dir)
    status = runs.read_status(run_dir)
    if not runs.is_finished(run_dir):
        raise ValueError(f"{run_dir} holds no finished run (state {status['state']}): a report needs one")
    notebook = nbformat.read(run_dir / "run.ipynb", as_version=4)
    declared = runs.read_parameters(run_dir / "run.ipynb")
    exporter = _exporter()
    cells = [shown for cell in notebook.cells if (shown := _shown(cell))]
    opening, body = (
        exporter.from_notebook_node(nbformat.v4.new_notebook(cells=part))[0] for part in (cells[:1], cells[1:])
    )
    titles = [heading for heading in exporter.headings if heading["level"] == 1]
    if len(titles) != 1 or exporter.headings[0] is not titles[0]:
        raise ValueError(
            f"a report needs one top heading (# ...) that opens the notebook, {status['notebook']} has {len(titles)}"
        )
    page = environment().get_template("page.html.j2").render(
        title=titles[0]["text"],
        css=(TEMPLATES / "style.css").read_text(),
        headings=[
            {"level": 2, "id": "parameters", "text": "Parameters"},
            *(heading for heading in exporter.headings if heading["level"] in (2, 3)),
            {"level": 2, "id": "provenance", "text": "Provenance"},
        ],
        opening=opening,
        parameters=[
            {
                "name": name,
                "value": runs.as_text(value),
                "help": declared[name].help,
                "changed": value != declared[name].default,
            }
            for name, value in status["parameters"].items()
        ],
        body=body,
        provenance=_provenance(status),
    )
    if problems := offline_problems(page):
        raise ValueError(
            f"the report of {run_dir} would not open without a network or a picture: {'; '.join(problems)}"
        )
    runs.replace_file(run_dir / REPORT, page.encode())
    return run_dir / REPORT


def environment():
    """The jinja2 environment of the templates; what goes into a page is escaped."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )


def offline_problems(page: str, script: str | None = None) -> list[str]:
    """What in an HTML page loads from elsewhere, runs as a script, or is a picture without description; [] where nothing.

    script: the one script that the page may hold.
    """
    checker = _Checker(script)
    checker.feed(page)
    return checker.problems


class _Checker(HTMLParser):
    def __init__(self, script):
        super().__init__()
        self.problems = []
        self.script = script
        self.tag = None  # the element whose text comes, where it is a style or a script

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tag = tag
        if tag in ("iframe", "link", "object", "embed", "base"):
            self.problems.append(f"<{tag}>")
        if tag == "script" and self.script is None:
            self.problems.append("<script>")
        if tag == "img" and not (attrs.get("alt") or "").strip():
            self.problems.append("<img> without alt")
        for name, value in attrs.items():
            if name in ("src", "srcset", "data", "poster", "background") and not (value or "").startswith("data:"):
                self.problems.append(f'{name}="{(value or "")[:60]}"')
            if name in ("href", "xlink:href") and tag != "a":
                self.problems.append(f"<{tag} {name}>")
            if name == "style" and "url(" in (value or "").lower():
                self.problems.append("a style that loads a file")
            if name == "http-equiv" and (value or "").lower() == "refresh":
                self.problems.append("<meta http-equiv=refresh>")
            if name.startswith("on"):
                self.problems.append(f"<{tag} {name}>")

    def handle_endtag(self, tag):
        self.tag = None

    def handle_data(self, data):
        if self.tag == "style" and re.search(r"@import|url\(", data, re.IGNORECASE):
            self.problems.append("a style that loads a file")
        if self.tag == "script" and self.script not in (None, data):
            self.problems.append("a script that is not ours")


def _shown(cell):
    """The cell as the report shows it, None where it shows nothing."""
    if "remove_cell" in cell.metadata.get("tags", []):
        return None
    if cell.cell_type != "code":
        return cell
    outputs = []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr":  # progress bars; log.txt keeps them
            continue
        if kinds := [kind for kind in data if kind not in SHOWN]:
            raise ValueError(f"a report cannot show {kinds[0]}: display figures with workbench.show(fig, alt)")
        if "image/png" in data and not output.metadata.get("image/png", {}).get("alt", "").strip():
            raise ValueError(
                "a picture in the notebook has no description: display figures with workbench.show(fig, alt)"
            )
        if WIDGET in data:
            output.data = {
                "text/markdown": "*An interactive control stands here when the notebook is open in JupyterLab.*"
            }
        outputs.append(output)
    cell.outputs = outputs
    return cell if outputs else None


def _exporter():
    """nbconvert's HTML exporter with formulas as MathML, and with headings that it numbers and remembers in `.headings`."""
    from jinja2 import pass_context
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    headings = []
    used = {"parameters", "provenance"}

    class Renderer(IPythonRenderer):
        def heading(self, text, level, **attrs):
            plain = html.unescape(re.sub(r"<[^>]+>", "", text))
            slug = re.sub(r"[^\w]+", "-", plain.lower()).strip("-")
            ids = (slug if n == 1 else f"{slug}-{n}" for n in range(1, len(used) + 2))
            identifier = next(i for i in ids if i not in used)
            used.add(identifier)
            headings.append({"level": level, "id": identifier, "text": plain})
            return f'<h{level} id="{identifier}">{text}</h{level}>\n'

        def table(self, text):
            return f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>{text}</table></div>\n'

        def inline_math(self, body):
            return _mathml(body, "inline")

        def block_math(self, body):
            return _mathml(body)

        def latex_environment(self, name, body):
            return _mathml(rf"\begin{{{name}}}{body}\end{{{name}}}")

    class Exporter(HTMLExporter):
        @pass_context
        def markdown2html(self, context, source):
            attachments = context.get("cell", {}).get("attachments", {})
            return MarkdownWithMath(renderer=Renderer(escape=False, attachments=attachments)).render(source)

    exporter = Exporter(
        extra_template_basedirs=[str(TEMPLATES.parent)],
        template_name=TEMPLATES.name,
        filters={"mathml": _mathml},
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    exporter.headings = headings
    return exporter


def _mathml(latex, display="block"):
    from latex2mathml.converter import convert

    try:
        return convert(latex.strip().strip("$"), display=display)
    except Exception as error:  # latex2mathml has no base class of its own for what it cannot read
        raise ValueError(f"a report cannot show the formula {latex.strip()!r}: {error!r}") from error


def _provenance(status):
    """(name, text) rows of the report's foot."""
    provenance = status["provenance"]
    commit = provenance["commit"] or "not in a git repository"
    if provenance["dirty"]:
        commit += ", with changes that are not committed"
    seeds = [runs.as_text(value) for name, value in status["parameters"].items() if name in ("seed", "seeds")]
    return [
        ("Run", status["run_id"]),
        ("Commit", commit),
        ("Code", f"SHA-256 {provenance['code']}"),
        ("Data", f"SHA-256 {provenance['data']}" if provenance["data"] else "no data set named by a parameter"),
        ("Seeds", ", ".join(seeds) or "no parameter named seed or seeds"),
        ("Threads", provenance["threads"]),
        ("Command", provenance["command"]),
        ("Started", provenance["started"]),
        ("Wall time", f"{provenance['wall_s']:.1f} s"),
        ("Python", f"{provenance['python']} on {provenance['platform']}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())),
    ]
