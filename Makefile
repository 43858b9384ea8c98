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
	@echo "make test-vllm only those that run vLLM on a CPU, which lies in .venv-vllm (1.1 GB); both others run them too"
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
	$(BIN)/python -m pytest -m "not slow and not vllm"
	@$(TEST_VLLM)

test-all: env
	$(BIN)/python -m pytest -m "not vllm"
	@$(TEST_VLLM) MARK=vllm

# vLLM's CPU build runs on the CPU wheel of torch, which PyPI does not have for every machine.
TEST_VLLM = ls $(VENV)/lib/python*/site-packages | grep -q '^torch-.*+cpu' || \
	{ echo "vLLM was NOT tested: it needs the CPU wheel of torch in $(VENV) (docs/vllm.md)"; exit; }; $(MAKE) test-vllm

# What vLLM adds to $(VENV), on top of it: docs/vllm.md says why it is not in there.
SITE = -c "import sysconfig; print(sysconfig.get_path('purelib'))"
$(VLLM_VENV)/.ready: requirements-vllm.txt $(VENV)/.ready
	$(PYTHON) -m venv --without-pip $(VLLM_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" > "$$($(VLLM_BIN)/python $(SITE))/layer.pth"
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements-vllm.txt
	$(VLLM_BIN)/python -m unime_ray.models.vllm_cpu_setup
	@touch $@

# One family of checkpoints; `make test-vllm MARK=vllm` runs all of them, and the stages on Ray.
MARK ?= vllm and not slow
test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_BIN)/python -m pytest -m "$(MARK)" tests/vllm

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

imports: env
	$(BIN)/lint-imports

check: lint types imports
