# Everything runs from .venv, which is made once and again when the requirements change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One more than there are cores, because some tests wait for processes of their own.
WORKERS = $(shell $(BIN)/python -c "import os; print(os.cpu_count() + 1)")

# Where Python may not keep what it has compiled, every process compiles what it imports, for up to half a minute.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-slow lint docs bench install playground
install: $(STAMP)

# Without --no-compile, pip compiles all modules for half a minute. Python compiles those that are imported.
$(STAMP): requirements.txt setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m experiments.demo

playground: $(STAMP)
	$(BIN)/python -m experiments.playground

PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks.meta_step --short
	$(BIN)/python -m benchmarks.orders --short
	$(BIN)/python -m benchmarks.memory --short
	$(BIN)/python -m benchmarks.sinusoid --short
	$(BIN)/python -m benchmarks.devices --short
	$(BIN)/python -m benchmarks.breakdown --short
