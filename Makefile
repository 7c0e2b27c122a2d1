# Two commands matter: `make demo` shows the whole job, `make test` runs the tests, but for the slow ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev

.PHONY: demo install test test-slow lint format schemas clean

# Train SOVR on digits, attack it with AutoAttack standard.
demo: $(READY)
	$(BIN)/python cli.py train
	$(BIN)/python cli.py evaluate --suite standard

install: $(READY)

# `robustbench` installs a top-level package `tests` that would shadow ours.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	rm -rf $(VENV)/lib/python3*/site-packages/tests
	touch $@

$(DEV_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

# Each test process runs torch on one thread, so there is one process per core; one that is done takes from the other.
test: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

# Whole suites of AutoAttack beside the original, commands interrupted and killed, forgeries by the hundred.
test-slow: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow $(ARGS)

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schemas: $(READY)
	$(BIN)/python tools/make_schemas.py

clean:
	rm -rf $(VENV) runs dist
