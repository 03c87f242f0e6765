# SPDX-License-Identifier: Apache-2.0
# Every word sets up what it needs in .venv; a second call is quick. PYTHON and TORCH choose the interpreter and the torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHES ?=
BACKEND ?=
# The disassembler writes what the audit reads, so its version is pinned.
SASS_TOOLS := nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37 nvidia-cuda-nvrtc==13.5.37 ninja pybind11 "setuptools>=77"

VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc build_support moe_kernels -type f \
             -not -name '*.pyc' -not -name '*.so' -not -name _build_info.py)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTHON_FILES := setup.py build_support moe_kernels tests bench examples

.DELETE_ON_ERROR:
.PHONY: demo test lint format types bench sanitize compat clean cuda simt mutants audit gpu soak fuzz

demo: $(VENV)/demo.stamp
	@$(BIN)/moe-kernels demo

# From tests/, so that the installed package is tested and not the checkout beside it; a file at a time on two processes.
test: $(VENV)/test.stamp
	cd tests && MOE_KERNELS_STRICT=1 ../$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The peers are extras: one that does not install here is left out, and the report says so.
bench: $(VENV)/test.stamp
	-@$(PIP) --no-deps "zentorch==2.13.*" deprecated wrapt
	$(BIN)/python bench/suite.py $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CPP)

types: $(VENV)/dev.stamp
	$(BIN)/mypy

# Kernels and communicator without Python under AddressSanitizer and UndefinedBehaviorSanitizer, this one under
# ThreadSanitizer too.
sanitize: $(VENV)/dev.stamp
	$(BIN)/cmake -S . -B build/sanitize -DMOE_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize -j 2
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure
	$(BIN)/cmake -S . -B build/tsan -DMOE_SANITIZE=thread
	$(BIN)/cmake --build build/tsan -j 2 --target comm_checks
	$(BIN)/ctest --test-dir build/tsan -R comm_checks --output-on-failure

# By hand: make compat TORCHES="2.11.0 2.12.0" runs one wheel, built here, on other torches.
compat: $(VENV)/torch.stamp
	@test -n "$(TORCHES)" || { echo 'compat: say which, as in make compat TORCHES="2.11.0 2.12.0"'; exit 2; }
	rm -rf build/lib* build/bdist* build/wheel
	$(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	@set -e; for torch in $(TORCHES); do \
	  echo "compat: torch $$torch"; venv=.venv-compat/$$torch; \
	  test -x $$venv/bin/python || $(PYTHON) -m venv $$venv; \
	  $$venv/bin/python -m pip install -q "torch==$$torch"; \
	  wheel=$$(echo build/wheel/*.whl); \
	  $$venv/bin/python -m pip install -q --force-reinstall --no-deps $$wheel; \
	  $$venv/bin/python -m pip install -q "$$wheel[test]"; \
	  (cd tests && MOE_KERNELS_STRICT=1 ../$$venv/bin/python -m pytest $(ARGS)); \
	done

# The three words about CUDA: compile strictly, read the machine code, run on a GPU. Where there is nothing to do that
# with, they say so and end with status 77, which make reports: a skip is never a pass.
cuda: $(VENV)/cuda.stamp
	@$(BIN)/python build_support/cubins.py
	@$(BIN)/python build_support/forced_build.py

audit: $(VENV)/cuda.stamp
	@$(BIN)/python build_support/sass_audit.py $(ARGS)
	@cd bench && ../$(BIN)/python cuda_model.py

gpu: $(VENV)/test.stamp
	@BACKEND=$(BACKEND) $(BIN)/python build_support/gpu.py

clean:
	rm -rf build dist *.egg-info demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f moe_kernels/*.so moe_kernels/_build_info.py $(VENV)/*.stamp
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# The CUDA kernels and the emulator itself, executed on this processor under the race detector; then the proof that the
# emulator would have noticed: faults planted in every kernel. ARGS="--third 1 -v", ARGS=route ...
simt: $(VENV)/test.stamp
	cd tests && MOE_KERNELS_STRICT=1 ../$(BIN)/python -m pytest -n 2 --dist loadfile -k "simt or cuda_" $(ARGS) \
	  $(patsubst tests/%,%,$(wildcard $(patsubst %,tests/test_%*.py,simt cuda_kernels cuda_gemm cuda_wgrad cuda_decode))) \
	  test_route.py test_permute.py test_unpermute.py test_grouped_gemm.py

mutants: $(VENV)/test.stamp
	$(BIN)/python tests/mutants/run.py $(ARGS)
	$(if $(ARGS),,$(BIN)/python tests/mutants/comm.py)

# Hours: ranks killed, stopped, made to fail or to disagree, threads, leaks. ARGS="--share 0.1 kill stop" for a part.
soak: $(VENV)/test.stamp
	cd tests && MOE_KERNELS_STRICT=1 ../$(BIN)/python soak.py $(ARGS)

# Ten minutes of cases that nobody chose, CPU kernels and emulator in turn. ARGS="--seconds 3600", ARGS="--seed 7 --cases 1"
fuzz: $(VENV)/test.stamp
	cd tests && MOE_KERNELS_STRICT=1 ../$(BIN)/python fuzz.py $(ARGS)

$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch; assert torch.__version__ >= "2.11"' 2>/dev/null || $(PIP) "$(TORCH)"
	@touch $@

# What users do: a plain pip install of this folder, which builds the library.
$(VENV)/demo.stamp: $(VENV)/torch.stamp $(SOURCES)
	@rm -rf build/lib* build/bdist*
	$(PIP) ".[hf,plot]"
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp $(SOURCES)
	@rm -rf build/lib* build/bdist*
	$(PIP) ".[test]"
	@touch $@ $(VENV)/demo.stamp

$(VENV)/cuda.stamp: $(VENV)/torch.stamp Makefile
	$(PIP) $(SASS_TOOLS)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	@rm -rf build/lib* build/bdist*
	$(PIP) ".[dev]"
	@touch $@
