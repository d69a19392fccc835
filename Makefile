# `make demo` and `make test` need nothing but Python 3.11+ and make; everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is made of what is imported, not of all that torch and transformers have.
INSTALL = --quiet --disable-pip-version-check --no-compile
# One thread for each of several processes, and bytecode for all those that tests start.
TESTS = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n auto --dist worksteal

.PHONY: help demo test test-all test-release check format docs bench clean
.DEFAULT_GOAL := help

help:  ## these lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: $(VENV)/installed  ## train on handwritten digits: four local modules, three minutes
	$(BIN)/localgrad train

test: $(VENV)/installed-dev  ## lint, strict types, the site and the quick tests
	$(MAKE) --no-print-directory -j2 check docs
	$(TESTS)

test-all: $(VENV)/installed-dev  ## the same with the heavy tests
	$(MAKE) --no-print-directory -j2 check docs
	$(TESTS) -m "heavy or not heavy"

test-release: $(VENV)/python  ## build the wheel, use it in clean environments: each extra, newest and oldest
	$(BIN)/python tests/release.py $(ARGS)

check: $(VENV)/installed-dev  ## lint, format and strict types
	$(BIN)/ruff check src tests research docs examples
	$(BIN)/ruff format --check src tests research docs examples
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## mend format and what the linter can mend
	$(BIN)/ruff check --fix src tests research docs examples
	$(BIN)/ruff format src tests research docs examples

docs: $(VENV)/installed-dev  ## the site, built strictly: open site/index.html
	PYTHONDONTWRITEBYTECODE= $(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env -c docs . site

bench: $(VENV)/installed  ## step time and peak memory of all methods, interleaved, as ratios
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736 $(BIN)/localgrad compare $(ARGS)

clean:  ## remove the environment and caches
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit("localgrad needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/python
	$(BIN)/python -m pip install $(INSTALL) -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/installed
	$(BIN)/python -m pip install $(INSTALL) -e '.[dev]'
	@touch $@
