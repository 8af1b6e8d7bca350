# Every target does its own set-up in a fresh clone.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RECIPE ?= rl/recipes/tiny.toml
ARGS ?=

.PHONY: help train test slow lint clean

help:  ## show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "torch>=2.11,<2.14"
	$(PY) -m pip install -q -e ".[train,dev]"
	touch $@

train: $(VENV)/installed  ## train the tiny policy (RECIPE=..., ARGS="--steps=2 --resume")
	$(PY) rl/train.py $(RECIPE) $(ARGS)

test: $(VENV)/installed lint  ## lint, types, layers, all tests but the slow ones
	$(PY) -m pytest -m "not slow" $(ARGS)

slow: $(VENV)/installed  ## the slow tests: killed and resumed runs, measurements
	$(PY) -m pytest -m slow $(ARGS)

lint: $(VENV)/installed  ## ruff, mypy, import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:  ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
