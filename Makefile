PYTHON ?= python3.11
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Where torch alone comes from. Empty means the public index, whose Linux wheels are CUDA builds; the CPU builds are at
# https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# More arguments for pytest, as in: make test ARGS="-k layering"
ARGS ?=
# Where `make support` writes down what became of each cell, and finds what need not be tried again.
RECORDS ?= .records
# Test processes side by side, each with its own pool of ranks, which need 4 GB: ranks that wait for one another leave
# half of two cores idle otherwise.
WORKERS ?= auto
MAX_WORKERS ?= 4

PACKAGES := configs models parallel trainer launch
BIN := $(VENV)/bin
STAMP := $(VENV)/.weft-installed
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses $(MAX_WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install test test-slow support lint check-all demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## make the virtual environment and install weft in it

# An editable install maps the packages that exist at that moment, hence their __init__.py among the prerequisites.
# torch goes first and without the constraints: its index may lack other packages' pinned versions, and the second
# install, which finds torch in place, brings those to their pins.
$(STAMP): pyproject.toml $(CONSTRAINTS) $(wildcard $(PACKAGES:%=%/__init__.py))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' $(CONSTRAINTS))
	$(BIN)/python -m pip install --editable '.[dev,engines,triton]' --constraint $(CONSTRAINTS)
	touch $@

test: install ## run the tests, without the long sweeps
	$(PYTEST) $(ARGS)

test-slow: install ## run the long sweeps only
	$(PYTEST) -m slow $(ARGS)

support: install ## try what is missing of the whole matrix, and write docs/support.md
	-WEFT_RECORDS=$(RECORDS) $(PYTEST) -m slow tests/matrix/test_every_cell.py $(ARGS)
	$(BIN)/python -m tests.matrix.support $(RECORDS) docs/support.md

lint: install ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check-all: lint test test-slow ## run everything

demo: install ## run the demonstration
	$(BIN)/python -m launch.demo

clean: ## remove caches and build outputs; the virtual environment stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(wildcard $(PACKAGES) tests bench) -name __pycache__ -type d -prune -exec rm -rf {} +
