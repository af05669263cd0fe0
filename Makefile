# Everything runs from .venv, no activation needed. PYTHON is the interpreter that makes it (3.11 or newer).
PYTHON ?= python3
# Address of a package index to take torch from first, for example https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

TORCH_VERSION := 2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Named after the content of lock and pyproject: a second call does nothing until one of them changes.
STAMP := $(VENV)/.ready-$(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)
NBSTRIPOUT := $(BIN)/nbstripout --keep-id --extra-keys "metadata.papermill metadata.widgets cell.metadata.papermill"

.PHONY: help setup report test lint strip lab lock clean

help:
	@echo "make setup    environment in $(VENV), exact versions of requirements.lock"
	@echo "make report   the main job on the embedded data; the last line is the path of its HTML report"
	@echo "make test     lint and all tests"
	@echo "make lint     ruff, and no outputs in notebooks"
	@echo "make strip    take the outputs out of the notebooks"
	@echo "make lab      JupyterLab on the notebooks"
	@echo "make lock     requirements.lock anew from pyproject.toml"
	@echo "make clean    remove the environment and caches (results stay)"
	@echo
	@echo "PYTHON=python3.12 make setup     another interpreter"
	@echo "make setup TORCH_INDEX=URL       torch from another index, e.g. https://download.pytorch.org/whl/cpu"

setup: $(STAMP)

$(STAMP): | python-version
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.ready-*
	$(if $(TORCH_INDEX),$(BIN)/pip install --no-deps --index-url $(TORCH_INDEX) torch==$(TORCH_VERSION))
	$(BIN)/pip install --requirement requirements.lock
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	touch $@

.PHONY: python-version
python-version:
	@command -v $(PYTHON) > /dev/null || { echo "make: no interpreter '$(PYTHON)'; name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "make: needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.11" >&2; exit 1; }

report: setup
	@$(BIN)/python -m workbench run notebooks/hybrid.ipynb --report

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: setup
	$(BIN)/ruff check
	$(NBSTRIPOUT) --verify notebooks/*.ipynb

strip: setup
	$(NBSTRIPOUT) notebooks/*.ipynb

lab: setup
	$(BIN)/jupyter lab notebooks

lock: python-version
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --upgrade "pip>=25.1" setuptools
	$(VENV)-lock/bin/pip install torch==$(TORCH_VERSION) --group dev ".[lab]"
# No local version suffix (+cpu) and no CUDA packages: pip adds those that the platform's own torch asks for.
	$(VENV)-lock/bin/pip freeze --all --exclude pip --exclude lstm-compression-workbench | \
	sed -e 's/+[^ ]*//' -e '/^nvidia-/d' -e '/^cuda-/d' -e '/^triton==/d' > requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) $(VENV)-lock build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find workbench tests -name __pycache__ -prune -exec rm -rf {} +
