# Every target works on a fresh machine with Python 3.11+, make and a package index; the first one called builds .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint types pytest docs bench clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(READY)  ## the embedded model: plain and drafted, side by side
	$(BIN)/headstart demo

test: lint types pytest  ## everything CI runs: lint, types, all tests

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet headstart tests examples benchmarks recipes

types: $(READY)  ## mypy, strict, on the package
	$(BIN)/mypy

pytest: $(READY)  ## all tests, the slow ones too
	$(BIN)/python -m pytest -q

docs: $(READY)  ## write docs/cli.md from the commands themselves
	$(BIN)/python docs/generate_cli.py

bench: $(READY)  ## every drafter against plain decoding, on the embedded model
	$(BIN)/headstart bench

clean:  ## remove the environment and every cache
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first: with the pinned build in place, no other package can pull a larger one in.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "headstart needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
