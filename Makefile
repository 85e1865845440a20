# Two commands to start with: `make run` runs a demo, `make test` the tests.
# `run` needs only python3. `test` creates .venv, and updates it when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
WORKERS ?= 3
PYTEST := $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: run cluster test lint suite uvloop bench crash soak soak-cluster bridge-figures fuzz siege health memory wheel clean

run:
	PYTHONPATH=.:client exec $(PYTHON) services/demo.py

# Two machines on this one, connected through etcd, which must be installed.
cluster: $(VENV)/ready
	exec $(VENV)/bin/python services/cluster.py

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

# The benchmarks of regd and comparable servers. ROWS="resolve register" runs only these rows, SHORT=1 two short
# rounds. The full run takes 15 minutes and writes regd/BENCHMARKS.md.
bench: $(VENV)/ready
	$(VENV)/bin/python -m pip install -q --group bench
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.benchmarks $(if $(SHORT),--short) $(ROWS)

# The long runs. Each has a short form in the suite; tests/README.md has their last figures.

# Kill a daemon under load with SIGKILL, 200 times: no acknowledged change may be missing.
crash: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.crash

# Random clients, restarts and cut connections for ten minutes: every watcher must have the daemon's state.
soak: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.soak

# Three machines with bridges over etcd, with a random history and disturbances, for ten minutes.
soak-cluster: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.cluster

# The figures of the bridge, in five minutes. WHAT="latency size" measures only these.
bridge-figures: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.bridge_figures $(WHAT)

# Coverage-guided fuzzing, a minute for each target.
fuzz: $(VENV)/ready
	$(VENV)/bin/python -m pip install -q --group fuzz
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.fuzz.run

# Response times beside hostile peers; how long a command holds the event loop; memory at every limit.
siege: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.siege

health: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.health

memory: $(VENV)/ready
	PYTHONPATH=.:client $(VENV)/bin/python -m tests.long.memory

# Build the wheel, install it into an empty environment, and try it there.
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
