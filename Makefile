# Two commands for newcomers: `make run` shows the whole idea at work, `make test` proves it.
# `run` needs python3 alone. `test` sets up .venv by itself, once, and again when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
WORKERS ?= 3
PYTEST := $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: run test lint suite uvloop bench crash soak fuzz siege health memory wheel clean

run:
	PYTHONPATH=.:client exec $(PYTHON) services/demo.py

test: lint suite uvloop

lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The short form, in about three minutes. REGD_TEST_LONG=1 runs every test, with every example, as CI does.
suite: $(VENV)/ready
	$(PYTEST)

# The socket tests again, on the event loop of the extra `fast`.
uvloop: $(VENV)/ready
	REGD_TEST_LOOP=uvloop $(PYTEST) -m socket

# regd beside the servers that one would take instead. ROWS="resolve register" measures these rows alone,
# SHORT=1 with two short rounds. All of it takes a quarter of an hour, and writes regd/BENCHMARKS.md.
bench: $(VENV)/ready
	$(VENV)/bin/python -m pip install -q --group bench
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.benchmarks $(if $(SHORT),--short) $(ROWS)

# The long runs. Each has a short form in the suite; tests/README.md has their last figures.

# kill -9 of a daemon under load, 200 times: nothing acknowledged is missing.
crash: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.crash

# Ten minutes of everything at once, on a bad line: everybody who follows has the daemon's state.
soak: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.soak

# Any bytes, guided by what they reach, a minute for each target.
fuzz: $(VENV)/ready
	$(VENV)/bin/python -m pip install -q --group fuzz
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.fuzz.run

# How a well-behaved peer fares beside hostile ones; how long a command holds the loop; what memory is taken.
siege: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.siege

health: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.health

memory: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.memory

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
