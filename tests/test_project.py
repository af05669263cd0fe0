"""The files that install the project agree with each other."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import workbench

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
LOCK_LINES = (REPOSITORY / "requirements.lock").read_text().splitlines()
LOCK = {canonicalize_name(name): version for name, version in (line.split("==") for line in LOCK_LINES)}
CORE = PYPROJECT["project"]["dependencies"]
LOCKED = [*CORE, *PYPROJECT["project"]["optional-dependencies"]["lab"], *PYPROJECT["dependency-groups"]["dev"]]


@pytest.mark.parametrize("dependency", LOCKED)
def test_the_lock_holds_every_dependency_within_its_bound(dependency):
    requirement = Requirement(dependency)
    assert [bound.operator for bound in requirement.specifier] == [">="]
    assert LOCK[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_lock_is_plain():
    """Exact public versions only: no index, no local suffix (+cpu), no CUDA packages; torch is the version measured."""
    assert [line for line in LOCK_LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    assert [name for name in LOCK if name.startswith(("nvidia-", "cuda-")) or name in ("triton", "pip")] == []
    assert LOCK["torch"] == "2.13.0"
    assert "setuptools" in LOCK


def test_conda_users_get_the_same_set():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    assert environment["name"] == "workbench"
    python, pip, lines = environment["dependencies"]
    assert python == f"python{PYPROJECT['project']['requires-python']}"
    assert pip == "pip"
    assert lines == {"pip": ["-r requirements.lock", "-e ."]}


def test_every_third_party_import_is_declared():
    extras = [dependency for extra in PYPROJECT["project"]["optional-dependencies"].values() for dependency in extra]
    declared = {canonicalize_name(Requirement(dependency).name) for dependency in [*CORE, *extras]}
    distributions = packages_distributions()
    for path in (REPOSITORY / "workbench").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"workbench"}:
                assert declared & {canonicalize_name(d) for d in distributions[name]}, f"{path}: {name}"


def test_version_is_the_package_s():
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "workbench.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", workbench.__version__)


def test_public_names_are_there_and_lazy():
    for name in workbench.__all__:
        assert getattr(workbench, name) is not None
    assert dir(workbench) == sorted(workbench.__all__)
    with pytest.raises(AttributeError, match="'workbench' has no attribute 'recrod'; did you mean 'record'"):
        _ = workbench.recrod


def make(*arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=REPOSITORY, capture_output=True, text=True, env=environment)


def test_make_alone_lists_every_verb():
    verbs = set(re.findall(r"^make (\w+)", make().stdout, flags=re.MULTILINE))
    assert {"setup", "report", "test", "lint", "lab", "clean"} <= verbs
    targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert verbs == set(targets) - {"help"}


@pytest.mark.parametrize(("version", "status"), [("3.10", 1), ("3.11", 0)])
def test_make_refuses_an_old_python(tmp_path, version, status):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$1" = -V ] && echo "Python {version}"\nexit {status}\n')
    fake.chmod(0o755)
    outcome = make("python-version", f"PYTHON={fake}")
    assert bool(outcome.returncode) == bool(status)
    assert (f"needs Python 3.11 or newer, '{fake}' is Python {version}" in outcome.stderr) == bool(status)


def test_make_names_a_missing_python():
    outcome = make("python-version", "PYTHON=python9.9")
    assert outcome.returncode
    assert "no interpreter 'python9.9'" in outcome.stderr


def test_ci_script_runs():
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", REPOSITORY / ".ci" / "run"], check=True)
