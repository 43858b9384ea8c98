# Two commands do all the set-up on a fresh machine: `make demo` (the main job) and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
export RAY_AUTH_MODE ?= disabled
export TOKENIZERS_PARALLELISM = false

.PHONY: help env demo serve test test-all lint types imports check

help:
	@echo "make demo      set up and run the whole recipe on the bundled corpus"
	@echo "make serve     serve what the demo made at http://127.0.0.1:8000"
	@echo "make test      set up and run the tests"
	@echo "make test-all  the slow tests too"
	@echo "make check     lint, types and import contracts"

env: $(VENV)/.ready

# torch first and pinned: unpinned it pulls several GB of CUDA libraries onto machines without a GPU.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,test]'
	@touch $@

demo: env
	$(BIN)/unime-ray run --config demo

serve: env
	$(BIN)/unime-ray serve runs/demo

test: env
	$(BIN)/python -m pytest -m "not slow"

test-all: env
	$(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

imports: env
	$(BIN)/lint-imports

check: lint types imports
