# Needs Python 3.11 or newer with pip, and make. `make help` lists what there is.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart install test fast lint wheel clean

help: ## this list
	@echo "make TARGET [VENV=.venv] [PYTHON=python3]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Every target makes the environment VENV with PYTHON (3.11 or newer) if it is missing or out of date."
	@echo "On Linux, pip's plain build of torch brings the CUDA libraries along: several GB, once."

quickstart: install ## install, train a small teacher, then a student on its pseudo-labels
	$(PY) -m depthany.train stage=teacher
	$(PY) -m depthany.train stage=student

install: $(VENV)/.installed ## depthany and what it needs into VENV

test: $(VENV)/.installed-test ## every test, the slow ones too
	$(PY) -m pytest

fast: $(VENV)/.installed-test ## the tests that take about a minute together
	$(PY) -m pytest -m "not slow and not gpu"

lint: $(VENV)/.installed-test ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

wheel: $(VENV)/.installed-test ## dist/depthany-*.whl
	$(PY) -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove VENV, builds and caches; runs stay
	rm -rf "$(VENV)" dist build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "depthany needs Python 3.11 or newer, and PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1 || true)"; \
	  echo "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	$(PYTHON) -m venv "$(VENV)"
	@touch "$@"

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch "$@"

$(VENV)/.installed-test: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) -e ".[test]"
	@touch "$@" "$(VENV)/.installed"
