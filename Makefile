# `make demo` and `make test` need Python 3.11+ and nothing else of ours; both may be run again at any time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
INSTALLED := $(VENV)/.installed
DEVELOPING := $(VENV)/.developing

.PHONY: demo fast test coverage lint slow gpu lock clean

# Thousands of processes import ours: each would compile it anew where the environment keeps no compiled files.
export PYTHONDONTWRITEBYTECODE :=

# The packages below `flows`; with flows come servers, commands and whole pipelines.
UNIT := tests/fastgda_core tests/storage_schemas tests/tasks
ALONE := "not integration and not slow and not gpu"
FAST := "not heavy and not integration and not slow and not gpu"

demo: $(INSTALLED)
	$(BIN)/fastgda demo

# What needs neither a server, nor a command, nor half a second: a minute and a half on 2 cores.
fast: $(DEVELOPING)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m $(FAST) $(UNIT)

# Of the tests that need no server and no command. Of all: `make coverage UNIT=tests ALONE="'not slow and not gpu'"`.
coverage: $(DEVELOPING)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m $(ALONE) --cov --cov-report= $(UNIT)
	$(BIN)/python -m coverage report --skip-covered --skip-empty
	$(BIN)/python -m coverage json --quiet -o .coverage.json
	$(BIN)/python -m tests.coverage_floors .coverage.json

# Tests that kill workers and watch clocks come last: they mostly wait, and would wait in vain beside others that count.
# Each is handed out by itself: no group of them, as pytest-xdist 3.8 forms none with pytest 9.2.
test: $(DEVELOPING)
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder --ignore tests/orchestration
	$(BIN)/python -m pytest --numprocesses 3 --dist loadgroup tests/orchestration

slow: $(DEVELOPING)
	$(BIN)/python -m pytest -m slow

# On a machine with a GPU, with the torch that is its own.
gpu: $(DEVELOPING)
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: $(DEVELOPING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What runs: torch first and by itself, then the complete lock without its dependencies: kronfluence asks for torchvision,
# which it never imports, and a torchvision that does not match torch breaks transformers. Of 29,000 files the few that
# are imported are compiled, by the first import. uv does in ten seconds what takes pip two minutes; pip comes after it
# where uv cannot, as it does not read pip's settings.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
INSTALL_LOCK = $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r $(1) || $(PIP_INSTALL) --no-deps -r $(1)
$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH)
	-$(PIP_INSTALL) "uv>=0.9,<1"
	$(call INSTALL_LOCK,requirements.lock)
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

# What develops: all extras and the tools, beside what runs.
$(DEVELOPING): $(INSTALLED) requirements-dev.lock
	$(call INSTALL_LOCK,requirements-dev.lock)
	touch $@

# Both locks from pyproject.toml, after a change there; `make lock UPGRADE=--upgrade` takes newer releases as well. The
# lock of what runs has the pins of the other one, so that what is tested is what runs: `make lint test` comes next.
LOCK = echo $(TORCH) | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-package torch \
	--no-annotate --custom-compile-command "make lock" $(UPGRADE) pyproject.toml -
lock: $(INSTALLED)
	$(LOCK) --extra dev --output-file requirements-dev.lock >/dev/null
	$(LOCK) --extra demo --extra report --extra alerts --extra metrics --constraint requirements-dev.lock \
		--output-file requirements.lock >/dev/null

clean:
	rm -rf $(VENV) demo
