# `make demo` and `make test` from a fresh clone do all their own set-up. Needs python3 (≥ 3.10), make and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# ninja and the compiler must be found when DeepSpeed builds an op, activated environment or not.
export PATH := $(BIN):$(PATH)

# Two tests at a time, each file's in order: most of a test is one process that imports.
TWO_AT_A_TIME := -n 2 --dist loadfile

# What a cluster on this one machine needs, by its names in Debian.
CLUSTER_PACKAGES := iproute2 slurmctld slurmd slurm-client munge openssh-server pdsh openmpi-bin mpich iptables

.PHONY: setup demo test test-data test-benchmarks test-faults test-cluster test-report test-architectures check clean

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
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m "not data and not benchmarks and not faults and not cluster and not browser and not architectures"

# Signals, dead launchers, hangs: real processes, real time.
test-faults: setup
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m faults

# A real SLURM and real ssh on hosts in namespaces. Root on Debian gets what they need (no service is started); without
# it the tests skip and say why.
test-cluster: setup
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! dpkg -s $(CLUSTER_PACKAGES) > /dev/null 2>&1; then \
	    export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive; \
	    apt-get -q -o DPkg::Lock::Timeout=120 update && apt-get -q -o DPkg::Lock::Timeout=120 install -y \
	        --no-install-recommends $(CLUSTER_PACKAGES) || echo "not all of $(CLUSTER_PACKAGES) could be installed"; \
	fi
	$(BIN)/python -m pytest -m cluster

# The report in headless Chromium, which root on Debian gets; without it the tests skip and say why.
test-report: setup
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! command -v chromium > /dev/null; then \
	    apt-get -q -o DPkg::Lock::Timeout=120 update && apt-get -q -o DPkg::Lock::Timeout=120 install -y \
	        --no-install-recommends chromium || echo "chromium could not be installed"; \
	fi
	$(BIN)/python -m pytest -m browser

# Every architecture of transformers in small: rehearsed, counted, trained, exported, loaded.
test-architectures: setup
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) tests/test_architectures.py

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
