"""Every notebook runs end to end with small parameters, hands over its metrics and makes a whole report."""

import json
import re

import pytest
from conftest import REPOSITORY

from workbench import report, runs

SMALL = {  # notebook -> (small parameters, metrics that it must hand over, figures in its report, words in its report)
    "hybrid": (
        {"hidden_size": 16, "target_cr_disk": 12.0, "seeds": [0, 1], "epochs": 1, "retrain_epochs": 1, "search_epochs": 0,
         "array": "group4x4", "steps": 3},
        {"summary", "results", "classes", "search", "hardware"},
        4,
        ("sensitive", "cr_disk", "integer engine", "small dense", "modelled"),
    ),
    "explore": (
        {"hidden_size": 16, "target_cr_disk": 8.0, "array": "group4x4"},
        {"cr_disk", "cr_model", "rnn_bytes", "step_us", "layout", "batch", "steady_state_cycles", "cycles_per_item",
         "first_step_latency", "cycles", "acceleration", "acceleration_sequence", "multiply_cycles", "acceleration_multiply",
         "bound", "words_per_pe", "bits", "streamed_bits_per_step", "on_chip_bits", "cr_chip", "energy_low_nj",
         "energy_high_nj", "dsp", "bram36", "lut_low", "lut_high", "ff_low", "ff_high"},
        2,
        ("No accuracy", "An interactive control stands here", "BlockCirculant 8", "steady_state_cycles", "assumption"),
    ),
    "deploy": (
        {"array": "group4x4", "steps": 4},
        {"cr_disk", "cr_bits", "cr_params", "cr_model", "weights", "stored_values", "bytes", "biases", "other_parameters",
         "steady_state_cycles", "step_us", "acceleration", "modules", "layers"},
        2,
        ("No accuracy", "dense 16-bit", "steady_state_cycles", "stored as", "circulant, block 8", "partial sum", "table error"),
    ),
    "fixed_point": (
        {"hidden_size": 8, "seeds": [0], "epochs": 2, "weight_bits": [4], "activation_bits": [8], "trained": ["4/8"],
         "tuning_epochs": 1, "target_cr_disks": [8.0], "tolerance": 100.0, "workers": 1},
        {"quality", "lost", "summary", "results", "signals", "mixture"},
        5,
        ("against float", "trained on", "in training", "smallest matrices within", "integer engine", "tanh",
         "beyond the range %", "largest error (last places)", "mismatches %", "uniform"),
    ),
    "hardware_mapping": (
        {"hidden_size": 16, "methods": ["hybrid", "TopK", "BlockCirculant", "small dense"], "target_cr_disks": [8.0],
         "seeds": [0], "epochs": 1, "retrain_epochs": 1, "search_epochs": 0, "array": "group4x4", "steps": 3, "batches": [2],
         "windows": [0], "sequences": 2, "thresholds": [0.1], "lookaheads": [1, 4], "delta_loss": 100.0, "crossover_units": 32,
         "weight_densities": [0.2, 0.6], "input_densities": [0.5], "latencies": [1.0], "space_sides": [4, 8],
         "space_bandwidths": [64], "space_memories": [256], "space_bits": [4, 8], "curve_array": "group4x4", "curve_units": 32,
         "fractions": [0.25], "looked_at": 0.25},
        {"results", "summary", "unreachable", "curves"},
        9,
        ("dense 16-bit", "Within the same loss limit", "multiplications alone", "modelled", "Structured", "imbalance",
         "integer", "Wang S. 2019", "hoisted", "delta threshold", "Test accuracy", "CN113537465A",
         "k26"),
    ),
    "sensitivity": (
        {"hidden_size": 16, "seeds": [0, 1], "epochs": 1, "sensitivity_epochs": 1, "bits": [4],
         "methods": ["TopK 0.125", "BlockCirculant 8", "Dense"]},
        {"table", "ranking", "stability", "classes", "sensitive_gates", "rank_correlation", "rank_correlation_pooled"},
        4,
        ("Spearman", "all choices", "fisher", "cr_disk", "top quarter", "Dense at 4 bits",
         "recovered in (seeds)", "Within a matrix"),
    ),
    "tradeoff": (
        {"hidden_size": 16, "methods": ["Dense", "TopK", "hidden units", "hybrid", "small dense"],
         "target_cr_disks": [6.0, 30.0], "seeds": [0, 1], "epochs": 1, "retrain_epochs": 1, "search_epochs": 0},
        {"summary", "results", "controls", "unreachable"},
        2,
        ("dense control", "front of the means", "integer engine", "no uniform Dense of 2 to 8 bits", "Wu 2026",
         "cr_model", "vs small dense", "bytes asked for"),
    ),
}


def test_every_notebook_is_here():
    assert {path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb")} == set(SMALL)


@pytest.fixture(scope="module", params=SMALL)
def run(request, tmp_path_factory):
    parameters, metrics, figures, words = SMALL[request.param]
    result = runs.run(request.param, parameters, tmp_path_factory.mktemp("results"), timeout_s=300)
    assert result.state == "ok", result.error
    return result.directory, metrics, figures, words, parameters.get("seeds")


def test_metrics_are_handed_over(run):
    directory, metrics, _, _, seeds = run
    recorded = json.loads((directory / "metrics.json").read_text())
    assert set(recorded) == metrics
    if seeds is None:  # numbers alone
        assert recorded["cr_disk"] >= 8.0
        return
    rows = recorded["results" if "results" in recorded else "table"]  # a row a seed and variant or block
    assert {row["seed"] for row in rows} == set(seeds)
    assert all(row["cr_disk"] >= 12.0 for row in rows if row.get("variant", "").startswith(("hybrid", "uniform")))


def test_the_report_is_whole_and_needs_no_network(run):
    directory, _, figures, words, _ = run
    page = report.build(directory).read_text()
    assert report.offline_problems(page) == []
    pictures = re.findall(r'<img[^>]*src="data:image/png;base64,[^"]{2000,}"[^>]*>', page)
    assert len(pictures) == figures
    assert all(re.search(r'alt="[^"]{20,}"', picture) for picture in pictures)
    for word in (*words, "SHA-256", "Provenance"):
        assert word in page, word
    printed = re.findall(r"<pre>(.*?)</pre>", page, flags=re.DOTALL)
    assert max(map(len, printed), default=0) < 500, "a value is printed in full: give it a name instead"
    assert "..." not in re.sub(r"<code>.*?</code>", "", page.split("<main", 1)[-1]), "a table is cut short"


def test_the_report_in_a_browser(run, screenshot, tmp_path):
    directory = run[0]
    for width in (1280, 390):
        picture = tmp_path / f"{width}.png"
        screenshot(report.build(directory), width, 3000, picture)
        assert picture.stat().st_size > 50_000
