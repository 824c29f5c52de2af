# Both targets work on a fresh machine with python3 and make; a stamp in .venv makes second runs quick.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/demo.stamp
	$(BIN)/nugget2d demo

test: lint
	$(BIN)/python -m pytest

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/mypy

.venv/demo.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[eval]"
	touch $@

.venv/test.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[eval,dev]"
	touch $@
