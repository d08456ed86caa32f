# Each target sets up what it needs: a virtual environment in .venv, made once and again when its inputs change.
#   make demo    train the tiny model on 2 ranks beside unsharded eager, and compare
#   make test    lint, types and the test suite
#   make sweep   the rest of it, before a release: all examples, every model's graphs under three hash seeds
#   make older-triton   the kernels' machine code by Triton 3.6, which torch 2.11 comes with
#   make bench   time and memory against sequence length, into bench/results/

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Test processes side by side; each of them computes on one thread.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

.DELETE_ON_ERROR:
.PHONY: help setup demo test lint bench sweep older-triton clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tests/requirements.txt
	@echo "== setting up $(VENV) (once; a few minutes on a slow network)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
		-c constraints.txt -e ".[demo,bench,test,dev]"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
		--no-deps -r tests/requirements.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m demo $(DEMO_ARGS)

lint: $(STAMP)
	@echo "== ruff"
	$(BIN)/ruff check .
	@echo "== mypy"
	$(BIN)/mypy

# The smoke test runs first and alone: if it fails, nothing else is worth the wait.
test: lint
	@echo "== smoke test"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -x tests/test_tiny.py
	@echo "== all tests, $(JOBS) at a time"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not sweep" tests $(PYTEST_ARGS)

# What is too dear for each change: more examples and hash seeds on real ranks, and every model under each seed.
sweep: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m sweep tests $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hash_seeds --sweep
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.random_graphs --count 1000

# Beside the Triton that is installed, which it hides; it needs no torch of its own.
OLDER := build/triton-3.6.0

older-triton: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $(OLDER) triton==3.6.0
	PYTHONPATH=$(OLDER) $(BIN)/python -m pytest -q -m "not sweep" tests/test_machine_code.py

bench: $(STAMP)
	$(BIN)/python -m bench $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
