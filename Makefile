# make train: trains a model, on the demo corpus if ARGS is empty.   make test: runs every check of CI.
# make human: the same with human speech as well, which apt-get fetches (410 MB).
# make bench: compares throughput with other libraries, in ten minutes; ARGS='--json --plot' records it.
# make card-wheels: prepares .card/ for a machine that has a GPU and no network; see docs/card.md.
# Each target makes .venv and installs what it needs. It requires only python3, make and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt
# Without __pycache__, which every run changes.
SOURCES += $(shell find csrc clsp_fast kernels -name __pycache__ -prune -o -type f -print)
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train human test test-machines test-triton bench card-wheels lint sanitize fuzz clean
train: .venv/.train
	$(BIN)/python -m clsp_fast.train $(ARGS)

human: .venv/.train
	$(BIN)/python -m clsp_fast.train human $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 -m "not alone" $(ARGS)
	$(BIN)/python -m pytest -m alone $(ARGS) || [ $$? = 5 ]  # 5: ARGS selects none of these tests
	$(if $(ARGS),,$(BIN)/python tests/machines.py --part)

# Repeats the numerical tests as on other processors: with each instruction set of PyTorch and of the engine, with 1 to
# 3 threads, and with lower instruction sets for MKL and oneDNN. `make test` runs a part of this.
test-machines: .venv/.test
	$(BIN)/python tests/machines.py $(ARGS)

# Tests the kernels with triton 3.6.0, which torch 2.10 and 2.11 install. ARGS=--write rewrites its budgets.
test-triton: .venv/.test
	$(BIN)/python tests/triton_versions.py $(ARGS)

bench: .venv/.bench
	$(BIN)/python -m bench.run $(ARGS)

# Needs Python 3.12 (PYTHON312=/path/to/python3.12), git, pip and a C++ compiler.
card-wheels:
	$(PYTHON) -m bench.card.wheels

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp tests/*.cpp tests/fuzz/*.cpp)
	$(BIN)/codespell bench clsp_fast csrc tests docs kernels README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md Makefile

# Runs the tests of the extension under each sanitizer (address, undefined, thread), except tests that compute with torch.
# `make test` runs a part of this.
sanitize: .venv/.test
	CLSP_SANITIZE_LONG=1 CLSP_FUZZ=6000 $(BIN)/python -m pytest -n 2 tests/test_sanitize.py

# Reads 6,000 damaged recordings, then runs libFuzzer, which needs clang++. ARGS=600: ten minutes for each target.
fuzz: .venv/.test
	CLSP_FUZZ=6000 $(BIN)/python -m pytest -n 2 -m fuzz
	PYTHON=$(CURDIR)/$(BIN)/python tests/fuzz/run $(ARGS)

clean:
	rm -rf .venv build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.train: .venv/bin/python $(SOURCES)
	$(INSTALL) '.[demo,demo-espeak]'
	touch $@

.venv/.bench: .venv/bin/python $(SOURCES)
	$(INSTALL) '.[bench,demo]'
	touch $@

.venv/.test: .venv/bin/python $(SOURCES)
	$(INSTALL) '.[test,demo,demo-espeak]'
	touch $@
