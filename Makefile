# Every target works on a fresh machine with Python 3.11+, make and a package index; the first one called builds .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
LOWER := .venv-lower
LOWER_READY := $(LOWER)/.ready
LOWER_TESTS := tests/target/test_target.py tests/target/test_held_model.py tests/training/test_features.py tests/engine/test_custom_generate.py tests/formats/test_import_eagle.py

.DEFAULT_GOAL := help
.PHONY: help demo test lint types pytest lower docs bench clean

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

# One process per core, and one thread in each: threads that wait for each other would spin.
pytest: $(READY)  ## all tests, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

# The package is installed from its wheel and runs elsewhere, so that nothing of this folder is found by chance.
lower: $(LOWER_READY)  ## a few tests and the demo from a wheel, with the oldest versions that are allowed
	OMP_NUM_THREADS=1 $(LOWER)/bin/python -m pytest -q -m "not slow" -p no:cacheprovider $(LOWER_TESTS)
	rm -rf $(LOWER)/wheel $(LOWER)/elsewhere
	mkdir $(LOWER)/elsewhere
	$(LOWER)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(LOWER)/wheel .
	$(LOWER)/bin/python -m pip install --quiet --no-deps --force-reinstall $(LOWER)/wheel/*.whl
	cd $(LOWER)/elsewhere && ../bin/headstart demo

docs: $(READY)  ## write docs/cli.md from the commands themselves
	$(BIN)/python docs/generate_cli.py

bench: $(READY)  ## every drafter against plain decoding, on the embedded model
	$(BIN)/headstart bench

clean:  ## remove the environment and every cache
	rm -rf .venv .venv-lower .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first: with the pinned build in place, no other package can pull a larger one in.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "headstart needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(LOWER_READY): pyproject.toml constraints-lower.txt
	test -x $(LOWER)/bin/python || $(PYTHON) -m venv $(LOWER)
	$(LOWER)/bin/python -m pip install --quiet -c constraints-lower.txt torch
	$(LOWER)/bin/python -m pip install --quiet -c constraints-lower.txt hatchling hypothesis pytest
	$(LOWER)/bin/python -m pip install --quiet -c constraints-lower.txt '.[train]'
	$(LOWER)/bin/python -m pip uninstall --quiet --yes headstart
	@touch $@
