"""Fixtures that several test files share."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from workbench import runs

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def write_notebook():
    """(path, cells...) -> path of a small notebook: texts are code, texts that start with "#" are markdown."""

    def write(path, *cells, parameters="seed: int = 0  # seed of everything random"):
        notebook = new_notebook(
            cells=[
                new_markdown_cell("# A small notebook"),
                new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                *(new_markdown_cell(cell) if cell.startswith("#") else new_code_cell(cell) for cell in cells),
            ]
        )
        nbformat.write(notebook, path)
        return path

    return write


@pytest.fixture
def instant(monkeypatch):
    """(function): runs ask the function, parameters -> metrics, instead of executing a notebook. What it raises is the error
    of the run. The command line's handler of SIGTERM goes with the test."""
    sigterm = signal.getsignal(signal.SIGTERM)

    def install(function):
        def execute(build, *_):
            status = runs.read_status(build)
            (build / "log.txt").write_text("a line\n")
            try:
                metrics = function(**status["parameters"])
            except Exception as error:
                failure = {"class": type(error).__name__, "message": str(error)}
                (build / "status.json").write_text(json.dumps(status | {"error": failure}))
                return 1
            (build / "metrics.json").write_text(json.dumps(metrics))
            return 0

        monkeypatch.setattr(runs, "_execute", execute)
        monkeypatch.setattr(runs, "_git", lambda *_: "commit")

    yield install
    signal.signal(signal.SIGTERM, sigterm)


@pytest.fixture(scope="session")
def browse():
    """(page, options...) -> stdout: Chromium without any network opens an HTML file."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("WORKBENCH_REQUIRE_BROWSER") == "1":
            pytest.fail("WORKBENCH_REQUIRE_BROWSER=1, but there is no chromium on this machine")
        pytest.skip("no chromium on this machine")

    def open_page(page, *options):
        with tempfile.TemporaryDirectory() as profile:
            command = [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                "--hide-scrollbars",
                *options,
                page.resolve().as_uri(),
            ]
            return subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout

    return open_page


@pytest.fixture(scope="session")
def screenshot(browse):
    """(page, width, height, picture): Chromium without any network writes the picture of an HTML file."""

    def take(page, width, height, picture):
        browse(page, f"--window-size={width},{height}", f"--screenshot={picture}")

    return take


@pytest.fixture(scope="session")
def tiny_task():
    """Two classes of short random sequences of 3 features that a small LSTM tells apart: 64, 40 and 40 of them."""
    import numpy as np

    from workbench.tasks import Recipe, Task
    from workbench.tasks.task import pad

    def split(count, seed):
        rng = np.random.default_rng(seed)
        labels = [n % 2 for n in range(count)]
        sequences = [rng.normal(0.5 * (2 * label - 1), 1, (rng.integers(2, 10), 3)) for label in labels]
        return pad(sequences, labels, [str(n) for n in range(count)])

    splits = {"train": split(64, 0), "valid": split(40, 1), "test": split(40, 2)}
    return Task("tiny", "official", ("down", "up"), splits, "", "", "", "", Recipe(epochs=3, batch_size=16))


@pytest.fixture(scope="session")
def tiny_token_task():
    """Two classes of short random sequences of 8 words, each class with words it prefers: 64, 40 and 40 of them."""
    import numpy as np

    from workbench.tasks import Recipe, Task
    from workbench.tasks.task import pad

    def split(count, seed):
        rng = np.random.default_rng(seed)
        labels = [n % 2 for n in range(count)]
        likely = np.array([[6, 6, 6, 1, 1, 1], [1, 1, 1, 6, 6, 6]]) / 21  # of the words behind padding and unknown
        sequences = [rng.choice(np.arange(2, 8), rng.integers(2, 10), p=likely[label]) for label in labels]
        return pad(sequences, labels, [str(n) for n in range(count)])

    recipe = Recipe(epochs=3, lr=2e-2, batch_size=16, feature_noise=0.0, embedding_size=4)
    splits = {"train": split(64, 0), "valid": split(40, 1), "test": split(40, 2)}
    return Task("tiny_tokens", "official", ("down", "up"), splits, "", "", "", "", recipe, ("<pad>", "<unk>", *"abcdef"))


@pytest.fixture(scope="session")
def tiny_language_task():
    """A text of 7 words of which each is followed by the next one of the circle, one time in ten by any: 2,000, 203 and 203
    tokens."""
    import numpy as np

    from workbench.tasks import LanguageTask, Recipe

    def text(count, seed):
        rng = np.random.default_rng(seed)
        steps = np.where(rng.random(count) < 0.9, 1, rng.integers(0, 7, count))
        return steps.cumsum() % 7

    recipe = Recipe(epochs=3, lr=5.0, batch_size=4, bptt=20, weight_decay=0.0, dropout=0.1, feature_noise=0.0, select_after=0.0,
                    optimizer="sgd", max_gradient_norm=0.5)
    splits = {"train": text(2000, 0), "valid": text(203, 1), "test": text(203, 2)}
    return LanguageTask("tiny_language", "official", tuple("abcdefg"), splits, "", "", "", "", recipe)
