# Every target sets up what it needs: `make demo` and `make test` work on a fresh machine with Python >= 3.11.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SUITE_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
SUITE := $(BIN)/python -m pytest -n 2 --dist worksteal
PYTEST := $(SUITE_ENV) $(SUITE)
# A CUDA build of torch brings its own; beside the CPU build it interprets and compiles kernels for tests.
TRITON := triton==3.6.0

.PHONY: setup demo check test test-machines test-slow lint docs bench clean

setup: $(READY)

# Bytes the installed files depend on; touching none of them makes the next call instant.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps $(TRITON) \
		|| echo "no wheel of $(TRITON) for this machine: the tests of the GPU kernels will skip"
	touch $@

demo: setup
	$(BIN)/spectral-window demo --out runs/demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The inner loop, under 90 s on two quiet cores: lint, types, and the tests that most changes break.
CORE := tests/test_house.py tests/test_setup.py tests/test_errors.py tests/nn/test_paper.py \
	tests/nn/test_options.py tests/ops/test_fir.py tests/ops/test_linear.py tests/ops/test_pointwise.py \
	tests/hf/test_config.py tests/hf/test_keywords.py tests/hf/test_inputs.py tests/data/test_kinds.py \
	tests/data/test_blocks.py tests/training/test_optimizer.py

check: lint
	$(PYTEST) $(CORE)

test: lint
	$(PYTEST)

# build/docs/index.html; a warning is an error.
docs: setup
	$(BIN)/python docs/tables.py --check
	$(BIN)/python -m sphinx -W --keep-going -E -d build/doctrees docs build/docs

# The whole suite as on other machines, up to half an hour each; some of them:
#     make test-machines MACHINES="threads-4 load"
# numba, onednn, aten   each compiler or library limited to AVX2; avx2: all three
# threads-1, threads-4  the threads of every test and its children
# load                  beside ten busy processes
# generic               no AVX at all: the portable code that other processors (ARM) run
MACHINES ?= numba onednn aten threads-1 threads-4 load generic
CACHE := $(CURDIR)/$(VENV)/numba
ON_numba := NUMBA_CPU_NAME=x86-64-v3 NUMBA_CPU_FEATURES=-avx512f NUMBA_CACHE_DIR=$(CACHE)-v3
ON_onednn := ONEDNN_MAX_CPU_ISA=AVX2
ON_aten := ATEN_CPU_CAPABILITY=avx2
ON_avx2 := $(ON_numba) $(ON_onednn) $(ON_aten)
ON_threads-1 := OMP_NUM_THREADS=1
ON_threads-4 := OMP_NUM_THREADS=4
ON_load := BUSY=10
ON_generic := NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES= NUMBA_CACHE_DIR=$(CACHE)-generic \
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default

test-machines: $(MACHINES:%=test-on-%)

test-on-%: setup
	@test -n "$(ON_$*)" || { echo "no such machine: $*"; exit 2; }
	export $(SUITE_ENV) $(ON_$*); busy=; \
	for i in $$(seq $${BUSY:-0}); do while :; do :; done & busy="$$busy $$!"; done; \
	trap 'test -z "$$busy" || kill $$busy' EXIT; trap 'exit 130' INT TERM; \
	$(SUITE) --timeout 3600 $(ARGS)

test-slow: setup
	$(PYTEST) -m slow --timeout 7200
	HYPOTHESIS_PROFILE=nightly $(PYTEST) --timeout 7200 tests/ops/test_properties.py tests/hf/test_properties.py

bench: setup
	$(BIN)/spectral-window bench --out results/cpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
