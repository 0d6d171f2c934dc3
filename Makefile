# Every target sets itself up in .venv. Variables: PYTHON (which interpreter), PIP_FLAGS, TORCH_INDEX
# (on a machine without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA libraries).
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt
# Stamps carry a hash of what they stand for, so that a changed dependency installs again and nothing else does.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | tr -s ' ' '-')
RUN := $(VENV)/.run-$(KEY)
DEV := $(VENV)/.dev-$(KEY)
BENCH := $(VENV)/.bench-$(KEY)
CONFIG ?= configs/demo.yaml

.PHONY: demo demo-stories test test-all bench lint format golden clean

demo: $(RUN)  ## train the demo's three stages and write its report
	$(BIN)/nexus-ray roadmap $(CONFIG)

demo-stories: $(RUN)  ## the demo with its middle domain written by a small model
	$(BIN)/nexus-ray synthesize configs/demo-stories.yaml
	$(BIN)/nexus-ray roadmap configs/demo-stories.yaml

test: lint  ## what must be green before a commit
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not ray and not fault and not slow and not gpu and not browser"
	$(BIN)/python -m pytest -q -m "(ray or fault) and not slow and not gpu and not browser"

test-all: lint  ## everything; GPU tests where there is one
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not ray and not fault and not gpu"
	$(BIN)/python -m pytest -q -m "(ray or fault) and not gpu"
	@if nvidia-smi >/dev/null 2>&1; then $(BIN)/python -m pytest -q -m gpu; else echo "no GPU: tests marked gpu not run"; fi

bench: $(BENCH)  ## steady tokens per second against bare PyTorch; time to the first step
	$(BIN)/python -m tests.benchmarks

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(DEV)  ## write the golden files anew, to be reviewed as a diff
	$(BIN)/python -m pytest -q tests/unit/test_configs_load.py --update-golden

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUN): | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(DEV): | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $(RUN) $@

# datatrove, a peer, works with xxhash 3 alone; `datasets`, which is why xxhash is pinned, takes either.
$(BENCH): $(DEV)
	grep -v '^xxhash==' constraints.txt > $(VENV)/bench-constraints.txt
	$(subst constraints.txt,$(VENV)/bench-constraints.txt,$(PIP)) --editable '.[dev,bench]'
	@touch $@
