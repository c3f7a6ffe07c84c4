# Two commands matter: `make smoke` and `make test`. Each makes .venv when it is missing or out of date.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# constraints/cuda.txt on a machine with a GPU.
CONSTRAINTS ?= constraints/cpu.txt
# Where torch comes from, such as a wheel index for one CUDA version; empty: the default index.
TORCH_INDEX ?=

# Overrides for the smoke run: make smoke ARGS='parallel.tensor=1'.
ARGS ?=
RUN ?= runs/smoke

# Test files that run at once: each starts processes of its own, which import for long and wait for one another.
WORKERS ?= 2

PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup smoke smoke-gpu checks format test test-slow test-slurm test-slurm-all clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## the virtual environment .venv, with pinned versions

$(STAMP): setup.py pyproject.toml constraints/cpu.txt constraints/cuda.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; $(PYTHON) is older. Name one: make setup PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install -c $(CONSTRAINTS) --index-url $(TORCH_INDEX) torch)
	$(BIN)/pip install -c $(CONSTRAINTS) -e '.[dev,eval]'
	@touch $@

smoke: $(STAMP) ## raw text -> tokenizer -> training on two processes -> Hugging Face folder -> text
	@RUN='$(RUN)' BIN='$(BIN)' bash tools/smoke.sh $(ARGS)

smoke-gpu: $(STAMP) ## the same on this machine's GPUs, after the tests that need one
	@RUN='$(RUN)' BIN='$(BIN)' bash tools/smoke_gpu.sh $(ARGS)

checks: $(STAMP) ## linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	git ls-files '*.sh' .ci/run | xargs $(BIN)/shellcheck

format: $(STAMP) ## apply ruff's format and fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(STAMP) ## unit, distributed and integration tests
	$(PYTEST) $(SPREAD) -m 'not slow and not gpu and not slurm'

test-slow: $(STAMP) ## the long tables
	$(PYTEST) $(SPREAD) -m 'slow and not gpu and not slurm'

test-slurm: $(STAMP) ## the job scripts on a real Slurm of two nodes, made for it; needs root
	bash tests/slurm/install.sh
	$(PYTEST) tests/slurm -m 'slurm and not slow'

test-slurm-all: $(STAMP) ## the same, and what takes long: preemption, cut links, lost nodes
	bash tests/slurm/install.sh
	$(PYTEST) tests/slurm -m slurm

clean: ## remove the virtual environment
	rm -rf $(VENV)
