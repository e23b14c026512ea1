# `make demo` and `make test` from a fresh clone do all their own set-up. Needs python3 (≥ 3.10), make and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# ninja and the compiler must be found when DeepSpeed builds an op, activated environment or not.
export PATH := $(BIN):$(PATH)

PYTEST := $(BIN)/python -m pytest

# Two files at a time, the longest first, each file's tests in order: what they share is made once.
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder

# What a cluster on this one machine needs, by its names in Debian.
CLUSTER_PACKAGES := iproute2 slurmctld slurmd slurm-client munge openssh-server pdsh openmpi-bin mpich iptables

.PHONY: setup demo test test-data test-benchmarks test-faults test-cluster test-report test-architectures all nightly check clean
.PHONY: test-cuda-path architectures chromium cluster-packages

setup: $(VENV)/ready

# torch first: where it comes from decides whether this is a CPU or a CUDA environment; the rest then fits it.
$(VENV)/ready: pyproject.toml constraints.txt
	@echo "installing torch, DeepSpeed, transformers and what they need into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel ninja
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,lm-eval]'
	touch $@

# The whole way on this machine, no download, in a few minutes: text → corpus → three runs → export → table, report.
demo: setup
	$(BIN)/python tools/demo.py --output_dir runs/demo

test: setup
	$(PYTEST) $(TWO_AT_A_TIME) -m "not (data or benchmarks or faults or cluster or browser or architectures or cuda_path or nightly)"

# Signals, dead launchers, hangs: real processes, real time.
test-faults: setup
	$(PYTEST) $(TWO_AT_A_TIME) -m "faults and not nightly"

# A real SLURM and real ssh on hosts in namespaces. Root on Debian gets what they need (no service is started); without
# it the tests skip and say why.
test-cluster: setup cluster-packages
	$(PYTEST) -m "cluster and not nightly"

cluster-packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! dpkg -s $(CLUSTER_PACKAGES) > /dev/null 2>&1; then \
	    export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive; \
	    apt-get -q -o DPkg::Lock::Timeout=120 update && apt-get -q -o DPkg::Lock::Timeout=120 install -y \
	        --no-install-recommends $(CLUSTER_PACKAGES) || echo "not all of $(CLUSTER_PACKAGES) could be installed"; \
	fi

# The report in headless Chromium, which root on Debian gets; without it the tests skip and say why.
test-report: setup chromium
	$(PYTEST) -m "browser and not nightly"

chromium:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! command -v chromium > /dev/null; then \
	    apt-get -q -o DPkg::Lock::Timeout=120 update && apt-get -q -o DPkg::Lock::Timeout=120 install -y \
	        --no-install-recommends chromium || echo "chromium could not be installed"; \
	fi

# Every architecture of transformers in small, by task: rehearsed, counted, trained, exported, loaded.
test-architectures: setup
	$(PYTEST) -n 2 -m architectures

# docs/architectures.md anew, for another version of transformers: what each of them is as a peer.
architectures: setup
	HF_HUB_OFFLINE=1 $(BIN)/python tests/survey.py

# What a GPU would run, on a machine without one: every precision and DeepSpeed JSON, kernels, waits, bytes. Needs g++.
test-cuda-path: setup
	$(PYTEST) -m cuda_path

# The benchmarks at tiny size: that they run and say what they promise, not how fast.
test-benchmarks: setup
	$(PYTEST) $(TWO_AT_A_TIME) -m "benchmarks and not nightly"

# What needs the real text and GLUE files of ../shared/data; skips, and says so, where they are not there.
test-data: setup
	$(PYTEST) $(TWO_AT_A_TIME) -m "data and not nightly"

# Every proof above; three files at a time, as a cluster's tests mostly wait.
all: setup chromium cluster-packages
	$(PYTEST) $(TWO_AT_A_TIME) -n 3 -m "not nightly"

# All there is, with the heavy counts, and every process that a test starts is a true start.
nightly: export CTCD_TRUE_STARTS = 1
nightly: setup chromium cluster-packages
	$(PYTEST) $(TWO_AT_A_TIME) -m "not cluster"
	$(PYTEST) -m cluster

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs .cache
