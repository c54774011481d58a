# `make demo` needs Python 3.10 or newer and nothing else, `make test` git too: they make .venv first. With
# a C++ compiler on PATH they also build the C++ kernels, for this CPU's capability; without one all
# runs in plain PyTorch. CI builds and tests every capability: MULKI_BUILD_CAPABILITIES=all make test
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
.PHONY: help demo test pytest test-oldest docs lint style types sanitize cross-arm fuzz test-long clean .venv

help:
	@echo "make demo      run the bundled image tasks (mulki run embedded --preset small) and show the results"
	@echo "make test      make lint, and pytest in JOBS=2 processes"
	@echo "make test-long tests that take minutes, every point to kill a run at, and more cases of others"
	@echo "make test-oldest  some tests of the Triton kernels with torch 2.11 and Triton 3.6, the oldest supported"
	@echo "make docs      the documentation as a site in build/docs, without warnings or a network"
	@echo "make lint      ruff, clang-format and mypy"
	@echo "make sanitize  the C++ kernels under sanitizers, on Linux; SHORT=1 for fewer tests"
	@echo "make cross-arm the C++ kernels compiled and linked for Linux on ARM, with g++-aarch64-linux-gnu"
	@echo "make fuzz      random cases for SECONDS=20 each, of a fixed seed and, without FIXED=1, of a fresh one"
	@echo "make .venv     only make .venv, with all that demo and test need"
	@echo "make clean     remove .venv, built libraries and caches (run folders in logs/ stay)"
	@echo "demo, test, docs, lint, sanitize, cross-arm, fuzz and test-long make .venv where it is missing; PYTHON=... picks its interpreter."

demo: .venv/.installed-demo
	$(BIN)/mulki run embedded --preset small

# mypy has one process and takes a minute, so the tests begin beside it.
test: style
	$(MAKE) --no-print-directory -j 2 types pytest

pytest: .venv/.installed-test
	$(BIN)/python -m pytest -q $(SPREAD)

# In an environment of its own, without the C++ kernels. NumPy 2.4 does not go with the interpreter
# of Triton 3.6.
OLDEST := build/oldest
OLDEST_PACKAGES := "torch==2.11.*" "triton==3.6.*" "numpy<2.4" "pytest>=8.2"
# Compiled, counted, launched up to a driver that does nothing, interpreted, traced.
OLDEST_TESTS := tests/benchmarks/test_host.py tests/benchmarks/test_plan.py \
    tests/benchmarks/test_kernels.py tests/kernels/test_kernel_choice.py \
    tests/kernels/test_schedule.py tests/ops/test_torch_private.py tests/ops/test_compile.py
OLDEST_INTERPRETED := tests/kernels/interpreted/test_triton_schedules.py -k "ce_all or pairs_blend"

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -q -m "not slow" $(OLDEST_TESTS)
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest -q $(OLDEST_INTERPRETED)

# A version between the oldest and the newest: no product is asynchronous in what it compiles.
BETWEEN := $(OLDEST)/triton-3.7

test-between: $(BETWEEN)
	PYTHONPATH=$(BETWEEN) $(OLDEST)/bin/python -m pytest -q tests/benchmarks/test_kernels.py -k asynchronously

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
	tests/csrc/sanitize "$(CURDIR)/$(BIN)/python" $(if $(SHORT),short)

cross-arm: .venv/.installed-test
	tests/csrc/cross-arm "$(CURDIR)/$(BIN)/python"

SECONDS ?= 20
fuzz: .venv/.installed-test
	for target in operators calls files kernels; do \
	    $(BIN)/python -m tests.fuzz $$target --seconds $(SECONDS) --seed 0 || exit 1; \
	    $(if $(FIXED),,$(BIN)/python -m tests.fuzz $$target --seconds $(SECONDS) || exit 1;) \
	done

test-long: .venv/.installed-test
	$(BIN)/python -m pytest -q --long $(SPREAD)

.venv: .venv/.installed-test

BUILT_FROM := pyproject.toml setup.py $(wildcard mulki/ops/*.py) $(shell find csrc -name '*.h' -o -name '*.cpp')

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

.venv/.installed-demo: .venv/.installed-torch $(BUILT_FROM)
	$(BIN)/python -m pip install --no-build-isolation -e ".[demo]"
	@$(BIN)/python -c 'from mulki.ops.loader import capability_in_words, load; \
	    print("C++ kernels:", load() or capability_in_words())'
	@touch $@

# The C++ kernels are built by then; an installation in place would compile all of them again.
.venv/.installed-docs: .venv/.installed-test
.venv/.installed-test: .venv/.installed-demo
.venv/.installed-test .venv/.installed-docs: .venv/.installed-%:
	MULKI_BUILD_CPP=0 $(BIN)/python -m pip install --no-build-isolation -e ".[$*]"
	@# Where a compiler knows torch's C++, kernels that do not build are no fallback for tests.
	@if [ "$${MULKI_BUILD_CPP-}" = 0 ] || ! echo 'int main() {}' | \
	    "$${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; then :; else \
	    MULKI_DISABLE_CPP= $(BIN)/python -c 'import sys; from mulki.ops.loader import load; sys.exit(load())' || { \
	    echo "build them with $(BIN)/python, or test without them: MULKI_BUILD_CPP=0 make test" >&2; exit 1; }; fi
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info mulki/_cpu_*
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find mulki kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
