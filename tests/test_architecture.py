"""Rules of the whole code base that no single module can hold."""

import ast
import graphlib
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import REPOSITORY

import workbench
from workbench import runs
from workbench.methods import METHODS
from workbench.tasks import TASKS

PACKAGE = REPOSITORY / "workbench"

# Imports run down this table only. A package stands for all its files.
LEVELS = (
    ("checks", "container", "fixedpoint", "spectrum", "packed"),
    ("engine", "array"),
    ("gates", "methods"),
    ("plan", "budget", "constrain", "quantise", "emulation", "units"),
    ("tasks", "models", "schedules", "train"),
    ("sensitivity", "cheap", "allocation", "signals"),
    ("runs", "pareto", "published", "sweep", "index", "report", "plots", "study", "acceleration", "sparsity", "precision",
     "tables", "exploration", "deployment", "__main__"),
)
LEVEL = {unit: level for level, units in enumerate(LEVELS) for unit in units}
WITHOUT_TORCH = ("checks", "container", "fixedpoint", "spectrum", "packed", "engine", "array")

MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def imports(name):
    """Full names of the modules that module `name` imports anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return found


def unit(name):
    return name.split(".")[1]


def below_the_top(names):
    return {name for name in names if name.startswith("workbench.")}


def test_every_file_has_a_level():
    assert {unit(name) for name in below_the_top(MODULES)} <= LEVEL.keys()


@pytest.mark.parametrize("name", sorted(below_the_top(MODULES)))
def test_imports_run_down(name):
    for imported in below_the_top(imports(name)):
        assert LEVEL[unit(imported)] <= LEVEL[unit(name)], f"{name} imports {imported}"


def test_imports_have_no_cycle():
    # A package's __init__ gathers its files, which may import their siblings: only that edge is left out.
    graph = {name: {i for i in imports(name) if not name.startswith(f"{i}.")} for name in below_the_top(MODULES)}
    graphlib.TopologicalSorter(graph).prepare()


def test_array_and_engine_never_import_torch():
    names = [name for name in below_the_top(MODULES) if unit(name) in WITHOUT_TORCH]
    for name in names:
        assert not [i for i in imports(name) if "torch" in i.split(".")], name
    code = f"import sys, {', '.join(sorted(names))}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_of_the_package_loads_nothing():
    third_party = "{'numpy', 'torch', 'pandas', 'nbformat'}"
    subprocess.run(
        [sys.executable, "-c", f"import sys, workbench; assert not {third_party} & set(sys.modules)"], check=True
    )


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_public_function_bears_a_module_s_name(name):
    """A submodule, once imported, would shadow it."""
    taken = {part for module in MODULES for part in module.split(".")}
    body = ast.parse(MODULES[name].read_text()).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert not defined & taken
    assert not set(workbench._NAMES) & taken


def test_registries_are_complete():
    assert {name: entry.__name__ for name, entry in METHODS.items()} == {name: name for name in METHODS}
    assert {name: entry.__name__ for name, entry in TASKS.items()} == {
        name: f"workbench.tasks.{name}" for name in TASKS
    }
    files = {path.stem for path in (PACKAGE / "tasks").glob("*.py")}
    assert files - {"__init__", "task"} == set(TASKS)


LOGIC = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef),
    *(ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
    *(ast.If, ast.IfExp, ast.Match, ast.Try),
)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_logic_and_no_outputs(path):
    """Where a notebook needs a function, a loop or a condition, a function is missing in the package."""
    assert runs.read_parameters(path)
    cells = nbformat.read(path, as_version=4).cells
    for cell in cells:
        if cell.cell_type == "code":
            logic = [ast.unparse(node) for node in ast.walk(ast.parse(cell.source)) if isinstance(node, LOGIC)]
            assert logic == []
            assert cell.outputs == [] and cell.execution_count is None
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")


def test_files_name_no_place_of_one_machine():
    place = re.compile(r"(?<![\w.])/(work|farm|home|Users|tmp)/\w")
    folders = ("workbench", "tests", "notebooks", "benchmarks", "docs", ".ci", "data")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*")]
    files += [path for path in REPOSITORY.iterdir() if path.name != ".git"]  # a worktree has a file there, git's own
    for path in files:
        if path.is_file() and path.suffix in (
            ".py",
            ".ipynb",
            ".md",
            ".toml",
            ".lock",
            ".yml",
            ".j2",
            ".css",
            ".json",
            "",
        ):
            assert not place.search(path.read_text()), path
