# Every target sets up what it needs: `make demo` and `make test` work on a fresh machine with Python >= 3.11.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: setup demo test test-slow lint bench clean

setup: $(READY)

# Bytes the installed files depend on; touching none of them makes the next call instant.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/spectral-window demo --out runs/demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(PYTEST)

test-slow: setup
	$(PYTEST) -m slow --timeout 7200
	HYPOTHESIS_PROFILE=nightly $(PYTEST) --timeout 7200 tests/ops/test_properties.py tests/hf/test_properties.py

bench: setup
	$(BIN)/spectral-window bench --out results/cpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
