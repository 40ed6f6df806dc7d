# Needs make, python3 >= 3.11 and either uv or pip on PATH. torch is the plain package; nothing is downloaded elsewhere.

VENV := .venv
BIN := $(VENV)/bin
FAST_TESTS := $(wildcard tests/unit tests/golden tests/property tests/contract tests/architecture)

ifneq ($(shell command -v uv),)
NEW_VENV = uv venv --python '>=3.11' $(VENV)
INSTALL = uv pip install --python $(BIN)/python
else
NEW_VENV = python3 -m venv $(VENV)
INSTALL = $(BIN)/python -m pip install
endif

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-slow lint check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The interpreter is an order-only prerequisite: its date says nothing about what is installed.
$(BIN)/python:
	$(NEW_VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

venv: $(VENV)/.installed-dev ## create .venv with the package and the development tools

quickstart: $(VENV)/.installed ## the whole job on the embedded model: generate, score, build, train, eval, report
	$(BIN)/diffalign quickstart

test: $(VENV)/.installed-dev ## all tests except the slow ones (make test ARGS="-k name")
	$(BIN)/pytest $(ARGS)

test-slow: $(VENV)/.installed-dev ## the slow tests
	$(BIN)/pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint ## style, types and the fast tests: run this before every commit
	$(BIN)/pytest $(FAST_TESTS) $(ARGS)

format: $(VENV)/.installed-dev ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build products; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find diffalign scorers tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
