# make train: speech and captions in, a trained model out.   make test: everything CI checks.
# make bench: throughput beside other libraries', within ten minutes; ARGS='--json --plot' records it.
# Each target makes .venv and installs what it needs; nothing but python3, make and a C++ compiler is assumed.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt
# Every run touches __pycache__.
SOURCES += $(shell find csrc clsp_fast kernels -name __pycache__ -prune -o -type f -print)
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test test-machines bench lint sanitize fuzz clean
train: .venv/.train
	$(BIN)/python -m clsp_fast.train $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 -m "not alone" $(ARGS)
	$(BIN)/python -m pytest -m alone $(ARGS) || [ $$? = 5 ]  # 5: ARGS chose none of them
	$(if $(ARGS),,$(BIN)/python tests/machines.py --part)

# The numerical tests as other processors would run them: every instruction set of PyTorch and of our engine,
# with 1 to 3 threads, and MKL and oneDNN lowered. `make test` runs a part of it.
test-machines: .venv/.test
	$(BIN)/python tests/machines.py $(ARGS)

bench: .venv/.bench
	$(BIN)/python -m bench.run $(ARGS)

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp tests/fuzz/*.cpp)
	$(BIN)/codespell bench clsp_fast csrc tests docs kernels README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md Makefile

# The tests of frontend and engine whole under each sanitizer; `make test` runs a part of them.
sanitize: .venv/.test
	CLSP_SANITIZE_LONG=1 CLSP_FUZZ=6000 $(BIN)/python -m pytest -n 2 tests/test_sanitize.py

# 6,000 damaged recordings, then libFuzzer (with clang++ only): make fuzz ARGS=600 for ten minutes a target.
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
