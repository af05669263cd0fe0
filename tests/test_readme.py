"""The worked example of the README runs, what it names is there, and the recorded figures stand in docs/results.md."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

from workbench import study, sweep, tables

SWEEPS = sorted((REPOSITORY / "notebooks" / "sweeps").glob("*.toml"))


def test_the_sweep_file_is_one(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.toml").write_text(example)
    assert len(sweep.read(tmp_path / "example.toml").parameters) == 2 * 2 * 3


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_ready_sweep_files_are_valid(path):
    asked = sweep.read(path)
    assert asked.description and len(asked.parameters) > 1 and asked.timeout_s
    if path.stem != "explore":  # which trains nothing
        assert all(values["workers"] == 1 and values["checkpoints"] == "checkpoints" for values in asked.parameters)


def test_the_short_table_says_what_the_recorded_ones_do():
    """Of each recorded table with an allocation, one row: its mean loss, the least of a method alone, the small network's."""
    readme, found = (REPOSITORY / "README.md").read_text(), 0
    for path in sorted((REPOSITORY / "docs" / "measured").glob("*.csv")):
        table = pd.read_csv(path)
        if "allocation" not in set(table["method"]) or "loss (points)" not in table:
            continue
        losses, cells = table.pivot(index="method", columns="target_cr_disk", values="loss (points)"), []
        alone = losses.drop(index=["allocation", "hybrid", "small dense"], errors="ignore")
        for target in (10, 20, 40, 80, 160):
            cells.append(f"{losses[target]['allocation']:.2f} ({alone[target].idxmin()} {alone[target].min():.2f}, small dense "
                         f"{losses[target]['small dense']:.2f})" if target in losses else "not run")
        assert f"](docs/measured/{path.name}) | {' | '.join(cells)} |\n" in readme, path.name
        found += 1
    assert found >= 5


def test_the_worked_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})
    ratio, error, cycles = map(float, re.findall(r"[\d.]+\d", capsys.readouterr().out))
    assert 20 <= ratio < 25
    assert error < 0.02  # the variance of the targets is 1 / 120, a model that learnt nothing would show it
    assert cycles > 0
    assert (tmp_path / "model.packed.safetensors").stat().st_size < 8 * 6144


def test_what_it_lists_is_what_there_is():
    readme = (REPOSITORY / "README.md").read_text()
    built = readme[readme.index("## How it is built"):]
    modules = {path.stem for path in (REPOSITORY / "workbench").iterdir() if not path.name.startswith(("__", "report_"))}
    benchmarks = {f"benchmarks/{path.name}" for path in (REPOSITORY / "benchmarks").glob("*.py")}
    assert modules | benchmarks <= set(re.findall(r"`([^`]+)`", built))


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", REPOSITORY / "docs" / "results.md"], ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert len(links) > 5
    for link in links:
        name, _, heading = link.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), link
        assert not heading or heading in _anchors(linked.read_text()), link


def _anchors(text):
    """Of every heading outside a block of code, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "docs" / "measured").glob("*.csv")), ids=lambda path: path.stem)
def test_the_measured_tables_stand_among_the_results(path):
    """Every row of the grid that the recorded figures give, as it is."""
    results = (REPOSITORY / "docs" / "results.md").read_text()
    table = pd.read_csv(path)
    grid = tables.settings_grid if "setting" in table else tables.tradeoff_grid
    rows = grid(table).itertuples(index=False, name=None)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    points = ["method", "target_cr_disk"] if "setting" in table else ["method"]
    assert len(lines) == len(table[points].drop_duplicates()) > 3
    assert [line for line in lines if f"\n{line}\n" not in results] == []


@pytest.mark.parametrize("path", sorted((REPOSITORY / "docs" / "measured" / "pairs").glob("*.csv")), ids=lambda path: path.stem)
def test_the_recorded_pairs_are_of_the_recorded_tables(path):
    """Against the dense control, and against the small network, a pair says what the table of its methods does."""
    results, table = (REPOSITORY / "docs" / "results.md").read_text(), pd.read_csv(path.parent.parent / path.name)
    assert f"](measured/pairs/{path.name})" in results
    pairs = pd.read_csv(path).set_index(["other", "method", "target_cr_disk"])
    for other, mean, low, high in ((study.DENSE, "loss (points)", "low", "high"),
                                   (study.SMALL, "vs_small", "vs_small_low", "vs_small_high")):
        losses = table[table["method"] != other].set_index(["method", "target_cr_disk"])[[mean, low, high]]
        found = -pairs.loc[other].loc[losses.index, ["better", "better_high", "better_low"]]
        np.testing.assert_allclose(found, losses, atol=1e-4)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "docs/measured/networks").glob("*.csv")), ids=lambda path: path.stem)
def test_recorded_networks_give_the_recorded_figures(path):
    """Table and pairs of a ratio follow from its networks, one by one, and from their controls."""
    setting, target = re.fullmatch(r"(.*)_(\d+)", path.stem).groups()
    rows, controls = pd.read_csv(path), pd.read_csv(path.parent / "controls" / path.name)
    unit, recorded = ["method", "target_cr_disk"], path.parent.parent
    table = pd.read_csv(recorded / f"{setting}.csv").query(f"target_cr_disk == {target}").set_index(unit)
    pd.testing.assert_frame_equal(study.over_folds(rows).set_index(unit).loc[table.index, table.columns], table,
                                  check_dtype=False, rtol=1e-4, atol=1e-4)
    pairs = pd.read_csv(recorded / "pairs" / f"{setting}.csv").query(f"target_cr_disk == {target}").set_index([*unit, "other"])
    found = study.pairs_over_folds(study.with_chosen(rows), controls).set_index([*unit, "other"])
    pd.testing.assert_frame_equal(found.loc[pairs.index, pairs.columns], pairs, check_dtype=False, rtol=1e-4, atol=1e-4)
    reference = controls[controls["m_variant"] == study.DENSE].set_index(["p_split", "m_seed"])["m_test_accuracy"]
    lost = reference.loc[pd.MultiIndex.from_frame(rows[["p_split", "m_seed"]])].to_numpy() - rows["m_test_accuracy"]
    np.testing.assert_allclose(rows["m_loss_points"], lost, atol=1e-4)
