# make demo | test | test-faults | bench | lint | env    (VENV=DIR uses another environment)
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.intl-bench
JOBS ?= 2
# index: the wheel on PyPI, no compiler needed.  source: the authors' repository, needs internet and a compiler.
DETECTRON2 ?= index
# 1: each package at the lowest version that setup.cfg allows.
OLDEST ?=
DISK_GB := 7
# pip's own progress on a terminal; in a log the line of each stage is enough.
INSTALL := $(PY) -m pip install --disable-pip-version-check $(shell [ -t 2 ] || echo -q)

DATASET ?= fashion_mnist
DATA ?=
SEED ?= 0
OUTPUT ?= runs/demo_$(DATASET)_seed$(SEED)

.PHONY: help env demo test test-commands test-bare test-matrix test-faults bench lint
help:
	@echo "make demo         set up, run everything small on this machine, end with a report (DATASET=fashion_mnist|cifar10, DATA=DIR, SEED=0)"
	@echo "make test         set up and run the tests"
	@echo "make test-commands  every command of the documentation, made small, and the demo"
	@echo "make test-bare    the tests that touch their surroundings, as on a stranger's machine (TESTS='tests/slurm ...': others)"
	@echo "make test-matrix  numerically delicate tests by instruction set, threads and order (VENV=DIR: with other versions)"
	@echo "make test-faults  tests that kill processes, fill disks and start a SLURM cluster"
	@echo "make bench        speed and memory beside plain references"
	@echo "make lint         ruff and mypy"
	@echo "make env          only set up the environment in VENV=$(VENV)"

env: $(STAMP)
	@echo "the environment is ready: source $(VENV)/bin/activate"

# The stamp is written last: an installation that was cut off is taken up again by the next make.
$(STAMP): setup.cfg
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 10) else "error: Python %d.%d found, 3.10 or newer is needed: install one and name it, make PYTHON=python3.11 ..." % v)'
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { echo "error: '$(PYTHON) -m pip' does not run; install it (Debian: apt-get install python3-pip)" >&2; exit 1; }
	@mkdir -p "$(VENV)"
	@if [ ! -x "$(PY)" ]; then \
	  free=$$(df -Pk "$(VENV)" | awk 'NR==2 {print int($$4 / 1048576)}'); \
	  if [ "$$free" -lt $(DISK_GB) ]; then echo "error: $$free GB free for $(VENV), about $(DISK_GB) GB are needed: free some, or name another place with VENV=DIR" >&2; exit 1; fi; \
	  $(PYTHON) -m venv --without-pip "$(VENV)" && $(PYTHON) -m pip --python "$(PY)" install -q pip || exit 1; \
	fi
	@echo "1 of 3: installing PyTorch and the other packages into $(VENV): about $(DISK_GB) GB, 2 to 15 minutes by the network's speed"
	@sed -n 's/^ *\([a-z0-9-]*\)[^ ]* >= /\1==/p' setup.cfg | sort -u >"$(VENV)/oldest.txt"
	@$(INSTALL) $(if $(OLDEST),-c "$(VENV)/oldest.txt") -e '.[test]' || { echo "error: a package did not install (see above); is the package index reachable? Run make again to go on" >&2; exit 1; }
	@echo "2 of 3: installing detectron2: $(if $(filter source,$(DETECTRON2)),compiling it takes 5 to 20 minutes,seconds)"
	@$(MAKE) --no-print-directory detectron2-$(DETECTRON2) || { echo "error: detectron2 did not install (see above); run make again to go on" >&2; exit 1; }
	@echo "3 of 3: importing them once, which compiles them to byte code: up to a minute"
	@$(PY) -c 'import torch, torchvision, timm, detectron2' || { echo "error: the environment in $(VENV) does not import; remove it and run make again" >&2; exit 1; }
	@touch "$@"

.PHONY: detectron2-index detectron2-source
# The wheel is tagged for CPython 3.10 alone; its Python code runs on later ones too, and nothing here needs its compiled part.
detectron2-index:
	@$(PY) -c 'import importlib.metadata as m; m.version("sal-detectron2")' 2>/dev/null || $(INSTALL) --no-deps --only-binary=:all: --python-version 3.10 \
	  --target "$$($(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" sal-detectron2==0.7.2
detectron2-source:
	@$(INSTALL) setuptools wheel && $(INSTALL) --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'

demo: $(STAMP)
	@$(PY) -m slurm demo --dataset $(DATASET) $(if $(DATA),--data-dir '$(DATA)') --seed $(SEED) --output '$(OUTPUT)'

test: $(STAMP)
	$(PY) -m pytest -n $(JOBS) -m "not faults and not commands"

test-commands: $(STAMP)
	$(PY) -m pytest -n $(JOBS) -m commands

# What of the tests starts commands, looks for programs, or reads and writes outside the test's own folder.
TESTS ?= tests/slurm/commands/test_status.py tests/slurm/commands/test_suite.py tests/slurm/execution/test_job.py tests/pretrain/common/test_cli.py tests/pretrain/common/test_files.py tests/transfer/evaluation/test_local_copy.py
test-bare: $(STAMP)
	PY=$(PY) tests/bare.sh -n $(JOBS) $(TESTS)

test-matrix: $(STAMP)
	$(PY) tests/matrix.py

test-faults: $(STAMP)
	$(PY) -m pytest -m faults

bench: $(STAMP)
	$(PY) -m benchmarks

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
