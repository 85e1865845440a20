# Two commands for newcomers: `make run` shows the whole idea at work, `make test` proves it.
# `run` needs python3 alone. `test` sets up .venv by itself, once, and again when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv

.PHONY: run test lint suite uvloop bench wheel clean

run:
	PYTHONPATH=.:client exec $(PYTHON) services/demo.py

test: lint suite uvloop

lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

suite: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q

# The socket tests once more, on the event loop of the extra `fast`.
uvloop: $(VENV)/ready
	REGD_TEST_LOOP=uvloop $(VENV)/bin/python -m pytest -q -m socket

# How long things take here. Figures, no verdict.
bench: $(VENV)/ready
	$(VENV)/bin/python -m tests.bench
	$(VENV)/bin/python -m tests.bench uvloop

# What users install: built, installed into an empty environment, and tried there.
wheel: $(VENV)/ready
	rm -rf dist .venv-wheel
	$(VENV)/bin/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q --no-index dist/*.whl
	$(PYTHON) tests/smoke.py .venv-wheel/bin

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q --editable . --group dev
	touch $@

clean:
	rm -rf $(VENV) .venv-wheel dist
