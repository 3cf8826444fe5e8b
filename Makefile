# `make demo` and `make test` need Python 3.11+ and nothing else of ours; both may be run again at any time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo fast test coverage lint slow clean

# The packages below `flows`; with flows come servers, commands and whole pipelines.
UNIT := tests/fastgda_core tests/storage_schemas tests/tasks
FAST := "not integration and not slow and not gpu"

demo: $(INSTALLED)
	$(BIN)/fastgda demo

# What needs neither a server, nor a command, nor seconds: under a minute on 2 cores.
fast: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m $(FAST) $(UNIT)

# Of the tests that `make fast` runs. Of all tests: `make coverage UNIT=tests FAST="'not slow and not gpu'"`.
coverage: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m $(FAST) --cov --cov-report= $(UNIT)
	$(BIN)/python -m coverage report --skip-covered --skip-empty
	$(BIN)/python -m coverage json --quiet -o .coverage.json
	$(BIN)/python -m tests.coverage_floors .coverage.json

# Tests that kill workers and watch clocks come last: they mostly wait, and would wait in vain beside others that count.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --ignore tests/orchestration
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile tests/orchestration

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and by itself, then the complete lock without its dependencies: kronfluence asks for torchvision,
# which it never imports, and a torchvision that does not match torch breaks transformers.
$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) demo
