# make demo: train both stages on the embedded images and generate.   make test: the test suite.   make bench: timings.
# make check: what to run before every commit: lint, types and the tests that neither train nor take long.
# make sanity: a minute and a half that shows that training works: one image is memorised and generated from noise.
# Each target sets up .venv by itself; running it again does only what is left to do.

PYTHON ?= python3
BIN := .venv/bin
PACKAGE := .venv/package_installed
INSTALLED := .venv/installed
PIP_INSTALL := $(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable
# Tests and demo read local files only; no process of a test may wait for a network.
OFFLINE := HF_HUB_OFFLINE=1
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo sanity check test test-slow bench lint format reference clean

demo: $(PACKAGE)
	$(OFFLINE) $(BIN)/python train_vae.py configs/demo/vae.yaml
	$(OFFLINE) $(BIN)/python train_unet.py configs/demo/unet.yaml
	$(OFFLINE) $(BIN)/latentdiff evaluate saved/demo --dtype fastest

sanity: $(PACKAGE)
	$(OFFLINE) $(BIN)/python train_unet.py configs/sanity/unet.yaml
	$(OFFLINE) $(BIN)/latentdiff evaluate saved/sanity --prompts 4

check: lint
	$(PYTEST) -n 2 --dist loadfile -m "not runs and not slow and not gpu"

test: $(INSTALLED)
	$(PYTEST) -n 2 --dist loadfile

test-slow: $(INSTALLED)
	$(OFFLINE) $(BIN)/python -m pytest -m slow

bench: $(PACKAGE)
	$(BIN)/python benchmarks/precision_and_layout.py configs/demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# configs/reference/*.yaml from the docstrings of the config sections
reference: $(PACKAGE)
	$(BIN)/python -m latentdiff.explain

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

# A stamp that is older than the files that say what to install: install again.
$(PACKAGE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; choose one with make PYTHON=python3.12 ...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP_INSTALL) .
	touch $(PACKAGE)

# The same with what tests and tools need.
$(INSTALLED): $(PACKAGE)
	$(PIP_INSTALL) ".[test,data]"
	touch $(INSTALLED)
