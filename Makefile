# `make demo` needs Python 3.10 or newer and nothing else, `make test` git too: they make .venv first. With
# a C++ compiler on PATH they also build the C++ kernels, for this CPU's capability; without one all
# runs in plain PyTorch.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
ifeq ($(origin PYTHON)$(filter clean help,$(MAKECMDGOALS)),command line)
ifneq ($(wildcard .venv/.installed-torch),)
ifneq ($(shell $(PYTHON) -V 2>&1),$(shell $(BIN)/python -V 2>&1))
$(error .venv has another Python than $(PYTHON): first make clean)
endif
endif
endif
# Processes that `make test` and `make test-long` divide the files of tests over; JOBS=1 takes one alone.
JOBS ?= 2
SPREAD = $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile --no-loadscope-reorder)

.DEFAULT_GOAL := help
.PHONY: help demo test pytest docs lint style types library clean .venv
.PHONY: nightly test-long test-random test-capabilities test-oldest sanitize cross-arm

help:
	@echo "make demo      run the bundled image tasks (mulki run embedded --preset small) and show the results"
	@echo "make test      make lint, and pytest in JOBS=2 processes"
	@echo "make docs      the documentation as a site in build/docs, without warnings or a network"
	@echo "make lint      ruff, clang-format and mypy"
	@echo "make nightly   all that takes long, each of which is a target of its own:"
	@echo "    make test-long          tests that take minutes, those of killed runs among them"
	@echo "    make test-random        many new cases of the tests that draw theirs at random"
	@echo "    make test-capabilities  the C++ kernels of every capability that this CPU has"
	@echo "    make test-oldest        the operators and kernels with the oldest torch and Triton supported"
	@echo "    make sanitize           the C++ kernels under sanitizers, on Linux"
	@echo "    make cross-arm          the C++ kernels compiled and linked for ARM, with g++-aarch64-linux-gnu"
	@echo "make .venv     only make .venv, with all that demo and test need"
	@echo "make clean     remove .venv, built libraries and caches (run folders in logs/ stay)"
	@echo "All but clean make .venv where it is missing; PYTHON=... picks its interpreter."

demo: .venv/.installed-demo library
	$(BIN)/mulki run embedded --preset small

# mypy has one process and takes a minute, so the tests begin beside it.
test: style
	$(MAKE) --no-print-directory -j 2 types pytest

# Where a compiler knows torch's C++, kernels that do not build are no fallback for tests.
pytest: REQUIRED := 1
pytest: .venv/.installed-test library
	$(BIN)/python -m pytest -q $(SPREAD)

# What fails does not keep the rest from running.
nightly:
	$(MAKE) --keep-going test-long test-random test-capabilities test-oldest sanitize cross-arm

# Of the tests that take hours a sample, as wherever CI is set; make test-long CI= tries every place.
test-long: export CI ?= true
test-long: REQUIRED := 1
test-long: .venv/.installed-test-all library
	$(BIN)/python -m pytest -q --long $(SPREAD)

# With all packages, what `make test` may have left out too.
test-random: .venv/.installed-test-all library
	$(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile=nightly $(SPREAD)

test-capabilities: .venv/.installed-test
	MULKI_BUILD_CAPABILITIES=all $(BIN)/python setup.py -q build_ext --inplace
	for capability in $$($(BIN)/python -c 'from mulki.ops.loader import cpu_capabilities as c; print(*c())'); do \
	    echo "$$capability:"; ATEN_CPU_CAPABILITY=$$(echo $$capability | tr A-Z a-z) \
	    $(BIN)/python -m pytest -q $(SPREAD) tests/ops tests/functional tests/losses || exit 1; \
	done

# In an environment of its own, without the C++ kernels. NumPy 2.4 does not go with the interpreter
# of Triton 3.6. Then with a Triton between the oldest and the newest.
OLDEST := build/oldest
OLDEST_PACKAGES := "torch==2.11.*" "triton==3.6.*" "numpy<2.4" "pytest>=8.2" "hypothesis>=6.100"

test-oldest: $(OLDEST)/.installed $(OLDEST)/triton-3.7
	$(OLDEST)/bin/python -m pytest -q -m "not slow" tests/ops tests/kernels
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest -q -m "not slow" tests/kernels/interpreted
	PYTHONPATH=$(OLDEST)/triton-3.7 $(OLDEST)/bin/python -m pytest -q -m "not slow" tests/kernels

$(OLDEST)/triton-%: | $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pip install -q --no-deps --target $@ "triton==$*.*"

# PyPI's torch brings CUDA's libraries.
$(OLDEST)/.installed:
	@$(PYTHON) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < 1e10)' || { \
	    echo "make test-oldest: the disk has less than 10 GB left for torch 2.11 and CUDA's libraries" >&2; exit 1; }
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q $(OLDEST_PACKAGES)
	@touch $@

# The theme prints a long notice of MkDocs 2 otherwise, which is not the MkDocs that is installed.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/docs/index.html is the first page. The search wants a server:"
	@echo "    python3 -m http.server --directory build/docs"

lint: style types

style: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

types: .venv/.installed-test
	$(BIN)/mypy

sanitize: .venv/.installed-test
	tests/csrc/sanitize "$(CURDIR)/$(BIN)/python"

cross-arm: .venv/.installed-test
	tests/csrc/cross-arm "$(CURDIR)/$(BIN)/python"

.venv: .venv/.installed-test library

# Torch comes before mulki: the package is built without isolation, against the torch it will run with.
.venv/.installed-torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "mulki needs Python 3.10 or newer; '$(PYTHON)' is missing or older:" >&2; \
	    $(PYTHON) -V >&2; \
	    echo "Name another one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv .venv && $(BIN)/python -m pip --version || { \
	    echo "'$(PYTHON)' cannot make a virtual environment with pip in it." >&2; \
	    echo "On Debian and Ubuntu: apt-get install python3-venv. Elsewhere install Python's venv" >&2; \
	    echo "and ensurepip, or name another interpreter: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(BIN)/python -m pip install "setuptools>=77" wheel ninja "torch>=2.11" torchvision
	@touch $@

# The C++ kernels are built for themselves: a change of them installs nothing anew.
EXTRAS := $(addprefix .venv/.installed-,demo test test-all docs)
.venv/.installed-test: .venv/.installed-demo
.venv/.installed-docs .venv/.installed-test-all: .venv/.installed-test
$(EXTRAS): .venv/.installed-%: .venv/.installed-torch pyproject.toml setup.py
	MULKI_BUILD_CPP=0 $(BIN)/python -m pip install --no-build-isolation -e ".[$*]"
	@touch $@

COMPILES = [ "$${MULKI_BUILD_CPP-}" != 0 ] && echo 'int main() {}' | \
    "$${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null
LOADS = MULKI_DISABLE_CPP= $(BIN)/python -c 'import sys; from mulki.ops.loader import load; sys.exit(load())'

.venv/.library: .venv/.installed-demo $(shell find csrc -name '*.h' -o -name '*.cpp')
	@if $(COMPILES); then echo "compiles what has changed of the C++ kernels; all of them take minutes"; \
	    $(BIN)/python setup.py -q build_ext --inplace >.venv/library.log 2>&1 || { \
	    tail -n 20 .venv/library.log >&2; [ -z "$(REQUIRED)$(filter 1,$(MULKI_BUILD_CPP))" ] || { \
	    echo "build them with $(BIN)/python, or test without them: MULKI_BUILD_CPP=0 make test" >&2; exit 1; }; }; fi
	@$(BIN)/python -c 'from mulki.ops.loader import capability_in_words, load; \
	    print("C++ kernels:", load() or capability_in_words())'
	@touch $@

# Schemas of operators stand in mulki/ops: where one has changed, no library is for it.
library: .venv/.library
	@if $(COMPILES) && ! $(LOADS); then rm -f .venv/.library; \
	    $(MAKE) --no-print-directory REQUIRED=$(REQUIRED) .venv/.library; fi

clean:
	rm -rf .venv build dist *.egg-info mulki/_cpu_*
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find mulki kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
