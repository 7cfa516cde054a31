# `make demo` and `make test` need nothing but Python 3.11 or newer and a package registry; both make their own .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test crash-test setup lint bench docs clean

demo: setup
	$(BIN)/knnlm demo

test: setup
	$(BIN)/pytest --numprocesses auto --dist loadscope

# Crashes and kills of builds, ten times as many as `make test` has.
crash-test: setup
	$(BIN)/pytest tests/index_builder/test_crashes.py tests/index_builder/test_kills.py --crashes 10

setup: $(STAMP)

# torch first and pinned: any other way to it may bring several gigabytes of CUDA along.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,dev]"
	touch $(STAMP)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against tests/golden/protos

bench: setup
	$(BIN)/python -m benchmarks

docs: setup
	$(BIN)/python scripts/generate_cli_docs.py
	$(BIN)/python scripts/generate_stubs.py

clean:
	rm -rf .venv build dist
