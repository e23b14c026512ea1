# `make demo` and `make test` from a fresh clone do all their own set-up. Needs python3 (≥ 3.10), make and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# ninja and the compiler must be found when DeepSpeed builds an op, activated environment or not.
export PATH := $(BIN):$(PATH)

.PHONY: setup demo test test-data test-benchmarks test-faults test-report check clean

setup: $(VENV)/ready

# torch first: where it comes from decides whether this is a CPU or a CUDA environment; the rest then fits it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel ninja
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The whole way on this machine, no download, in a few minutes: text → corpus → three runs → export → scores.
demo: setup
	$(BIN)/python tools/demo.py --output_dir runs/demo

test: setup
	$(BIN)/python -m pytest -m "not data and not benchmarks and not faults and not browser"

# Signals, dead launchers, hangs: real processes, real time.
test-faults: setup
	$(BIN)/python -m pytest -m faults

# The report in headless Chromium: installed from Debian's archive where apt can, else the tests skip and say so.
test-report: setup
	command -v chromium || command -v google-chrome || \
		{ apt-get update && apt-get install -y --no-install-recommends chromium; } || true
	$(BIN)/python -m pytest -m browser

# The benchmarks at tiny size: that they run and say what they promise, not how fast.
test-benchmarks: setup
	$(BIN)/python -m pytest -m benchmarks

# What needs the real text and GLUE files of ../shared/data; skips, and says so, where they are not there.
test-data: setup
	$(BIN)/python -m pytest -m data

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs .cache
