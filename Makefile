# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` on a fresh machine; see CONTRIBUTING.md for the rest.
# Everything runs in .venv, on the package that is installed there from its wheel.

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
MATRIX_ARGS ?=
EVIDENCE_ARGS ?=
# TensorFlow's log holds errors only.
export TF_CPP_MIN_LOG_LEVEL ?= 2
# What `make demo` needs; tests and tools are installed when they are wanted.
EXTRAS := cpu experiments bench

VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := $(VENV)/.requirements-installed
TOOLS := $(VENV)/.tools-installed
PACKAGE := $(VENV)/.lbe_ops-installed
BUILD_OPTIONS := $(VENV)/.build-options
SOURCES := $(shell find lbe_ops lbe_ops_numpy-stubs cc cuda -type f -not -name '*.py[co]' \
             -not -name '*.so' 2>/dev/null) \
           CMakeLists.txt setup.py MANIFEST.in README.md LICENSE
CXX_SOURCES = $(wildcard cc/*.h cc/*.cc cuda/*.cc cuda/*.cu cuda/*.cuh tests/*.h tests/*.cc benchmarks/*.c)

# $(call timed,what,command): says how long the command took.
timed = @echo '$(2)'; start=$$(date +%s); $(2) && echo "$(1): $$(($$(date +%s) - start)) s"

.PHONY: help demo test test-long test-all test-matrix build wheel bench bench-training bench-distributed test-gpu bench-gpu evidence-gpu docs lint lint-python lint-types lint-cxx format sanitize test-aarch64 clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## list the targets, and how long each takes on two cores
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1: /p' Makefile

# A machine without a GPU needs no CUDA kernels for it; what is built stays as it is.
ifneq ($(wildcard $(PACKAGE)),)
demo: export LBE_CUDA ?= $(patsubst LBE_CUDA=%,%,$(filter LBE_CUDA=%,$(shell cat $(BUILD_OPTIONS))))
else ifeq ($(wildcard /dev/nvidia0),)
demo: export LBE_CUDA ?= OFF
endif
demo: $(PACKAGE) ## train 50 GELU layers with and without LBE, plots and a short benchmark (4 min on a fresh machine)
	$(BIN)/lbe-ops train --preset demo
	$(BIN)/python benchmarks/bench_op.py --quick --output results/demo/benchmark

# In tests/, where `import lbe_ops` cannot mean the source folder. A process for each
# core takes one file after the other, in the order of tests/conftest.py.
PYTEST = LBE_REQUIRE_NATIVE=1 LBE_TEST_INSTALLED=1 \
  ../$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(PACKAGE) $(TOOLS) ## all tests but the long ones, on the installed wheel (10 min, and 3 min to build)
	cd tests && $(PYTEST) -m "not long and not slow and not gpu" $(PYTEST_ARGS)

test-long: $(PACKAGE) $(TOOLS) ## the long tests: emulated CUDA, examples, several processes (17 min)
	cd tests && $(PYTEST) -m "long and not gpu" $(PYTEST_ARGS)

test-all: test test-long ## both; what CI runs (30 min)

build: $(PACKAGE) ## build the wheel into dist/ and install it into .venv (2 min; with nvcc 3 min)

# One wheel for every Python and every TensorFlow that pyproject.toml allows, on systems
# as old as those that TensorFlow's own wheels serve; auditwheel looks at every library.
PYTHONS ?= $(shell $(PYTHON) .ci/supported.py pythons)
TENSORFLOWS ?= $(shell $(PYTHON) .ci/supported.py tensorflows)
WHEEL_PLATFORM := manylinux_2_27_x86_64

wheel: $(TOOLS) ## one wheel for all TensorFlows and Pythons, into dist/ (4 min with nvcc)
	rm -rf build/lib* build/wheel
	LBE_NATIVE=ON LBE_TENSORFLOW="$(TENSORFLOWS)" LBE_PYTHONS="$(PYTHONS)" \
	  $(BIN)/python -m pip wheel -v --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat $(WHEEL_PLATFORM) \
	  --exclude 'libtensorflow_*.so.2' --wheel-dir dist build/wheel/lbe_ops-*.whl
	ls -l dist

test-matrix: wheel ## that wheel with other TensorFlows, Pythons and Kerases (5 min each)
	$(PYTHON) .ci/matrix.py $(MATRIX_ARGS)

bench: $(PACKAGE) ## the whole benchmark, into results/benchmark (tens of minutes)
	$(BIN)/python benchmarks/bench_op.py --output results/benchmark
	$(BIN)/python benchmarks/bench_kernels.py --output results/benchmark/kernels

bench-training: $(PACKAGE) ## training with LBE against training without, into results/training (an hour)
	$(BIN)/python benchmarks/bench_training.py $(BENCH_ARGS)

bench-distributed: $(PACKAGE) ## training on several replicas of this CPU, into results/distributed (an hour)
	$(BIN)/python benchmarks/bench_distributed.py $(BENCH_ARGS)

# With what $(PYTHON) can import, without .venv: a GPU machine may reach no package
# registry. TensorFlow's part only where it is installed.
test-gpu: ## correctness on this machine's GPU (not run yet)
	$(PYTHON) benchmarks/on_gpu.py test $(PYTEST_ARGS)

bench-gpu: ## the benchmark on this machine's GPU, into results/benchmark-gpu (not run yet)
	$(PYTHON) benchmarks/on_gpu.py bench $(BENCH_ARGS)

# Its archive is all that is needed from the machine: EVIDENCE_ARGS="--archive FILE".
evidence-gpu: ## in ten minutes, all that a GPU can tell, into results/gpu-evidence
	$(PYTHON) benchmarks/on_gpu.py evidence $(EVIDENCE_ARGS)

# In a small environment of its own, without TensorFlow: docstrings are read, not run.
DOCS := build/docs-venv
docs: $(DOCS)/.installed ## the documentation site, into site/; a warning is an error (20 s)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "the documentation: site/index.html"

lint: lint-python lint-types lint-cxx ## check the style of Python and C++, and types (20 s)

# One by one for .pre-commit-config.yaml.
lint-python: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types: $(TOOLS)
	$(BIN)/mypy

lint-cxx: $(TOOLS)
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(TOOLS) ## put Python and C++ into that style (seconds)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

sanitize: $(REQUIREMENTS) ## kernel tests under ASan + UBSan, then under TSan; random calls (10 min)
	export PATH="$(abspath $(BIN)):$$PATH"; \
	for sanitizers in address,undefined thread; do \
	  folder=build/$$sanitizers; \
	  cmake -S . -B $$folder -G Ninja -DLBE_SANITIZE=$$sanitizers && \
	  cmake --build $$folder || exit 1; \
	  for simd in avx512 avx2 baseline; do \
	    LBE_OPS_SIMD=$$simd $$folder/kernel_test || exit 1; \
	  done; \
	done; \
	folder=build/sanitized-module; options=-fsanitize=address,undefined; \
	cmake -S . -B $$folder -G Ninja -DLBE_TENSORFLOW=OFF -DLBE_CUDA=OFF \
	  -DLBE_OUTPUT_DIR="$(abspath build)/sanitized-module/out" \
	  -DPython_EXECUTABLE="$(abspath $(BIN))/python" \
	  -DCMAKE_CXX_FLAGS="$$options -fno-sanitize-recover=all -g" && \
	cmake --build $$folder || exit 1; \
	for simd in avx512 avx2 baseline; do \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 LBE_OPS_SIMD=$$simd PYTHONPATH=$$folder/out \
	  $(BIN)/python tests/fuzz_numpy.py || exit 1; \
	done

# Cross-compiled and emulated: it shows bits, not speed.
test-aarch64: $(REQUIREMENTS) ## kernel tests for aarch64, emulated, and whether its bits are these (minutes)
	@for program in aarch64-linux-gnu-g++ qemu-aarch64; do \
	  command -v $$program >/dev/null || { echo "error: $$program is missing:" \
	    "sudo apt-get install -y g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; \
	done
	export PATH="$(abspath $(BIN)):$$PATH" QEMU_LD_PREFIX=/usr/aarch64-linux-gnu; \
	set -e; \
	cmake -S . -B build/native -G Ninja -DLBE_KERNEL_TEST=ON; \
	cmake -S . -B build/aarch64 -G Ninja -DLBE_KERNEL_TEST=ON \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++; \
	cmake --build build/native; \
	cmake --build build/aarch64; \
	qemu-aarch64 build/aarch64/kernel_test; \
	qemu-aarch64 build/aarch64/kernel_test digests > build/aarch64/digests; \
	for simd in avx512 avx2 baseline; do \
	  LBE_OPS_SIMD=$$simd build/native/kernel_test digests > build/native/digests; \
	  diff build/native/digests build/aarch64/digests; \
	done; \
	echo "the same digests, all $$(wc -l < build/aarch64/digests)"

clean: ## remove .venv and everything built; results/ stays (a second)
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

# One line that names what to install, not a page of errors later.
$(REQUIREMENTS): pyproject.toml .ci/requirements.py
	@missing=; \
	if command -v $(PYTHON) >/dev/null; then \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing \
	    $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
	  $(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists( \
	    sysconfig.get_path("include") + "/Python.h"))' || missing="$$missing \
	    $$($(PYTHON) -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')"; \
	else missing=" python3 python3-venv python3-dev"; fi; \
	command -v $${CXX:-c++} >/dev/null || missing="$$missing g++"; \
	if [ -n "$$missing" ]; then \
	  echo "error: a system package is missing: sudo apt-get install -y" $$missing >&2; \
	  exit 1; \
	fi
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python .ci/requirements.py $(EXTRAS) > $(VENV)/requirements.txt
	$(call timed,installing requirements,$(BIN)/python -m pip install -r $(VENV)/requirements.txt)
	@touch $@

# With those of $(REQUIREMENTS), so that the versions fit together.
$(TOOLS): $(REQUIREMENTS)
	$(BIN)/python .ci/requirements.py $(EXTRAS) test dev > $(VENV)/requirements.txt
	$(call timed,installing tools,$(BIN)/python -m pip install -r $(VENV)/requirements.txt)
	@touch $@

$(DOCS)/.installed: pyproject.toml .ci/requirements.py
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python .ci/requirements.py --only docs > $(DOCS)/requirements.txt
	$(call timed,installing mkdocs,$(DOCS)/bin/python -m pip install -r $(DOCS)/requirements.txt)
	@touch $@

# Without build isolation: TensorFlow is in .venv already. CMake's folder is kept in
# build/, so that only what changed is compiled again; copies of old modules are not.
$(PACKAGE): $(REQUIREMENTS) $(SOURCES) $(BUILD_OPTIONS)
	rm -rf build/lib* dist
	$(call timed,building,LBE_NATIVE=ON $(BIN)/python -m pip wheel -v --no-build-isolation --no-deps -w dist .)
	$(BIN)/python -m pip install --force-reinstall --no-deps dist/lbe_ops-*.whl
	$(BIN)/lbe-ops info
	@touch $@

# Built anew where the options or the CUDA compiler are others than last time.
$(BUILD_OPTIONS): $(REQUIREMENTS) always
	@options="LBE_CUDA=$(LBE_CUDA) LBE_XLA=$(LBE_XLA) $${CUDACXX:-$$(PATH="$$PATH:/usr/local/cuda/bin" \
	  command -v nvcc)}"; \
	[ "$$(cat $@ 2>/dev/null)" = "$$options" ] || echo "$$options" > $@

.PHONY: always
