# Each command makes what it needs: the virtual environment .venv, torch in it, the compiled kernels.
# A second call is quick, and a changed source is compiled again.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11
PYTEST_ARGS ?=
# Processes that share the tests, each with one thread of torch; 0: one process, two threads.
WORKERS ?= auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SOURCES := $(shell find csrc -type f)
FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
JOBS := $(if $(MAX_JOBS),-j $(MAX_JOBS))
say = @printf '\033[1m== %s\033[0m\n' '$(strip $(1))'

.PHONY: help demo test test-slow test-cpp test-sanitizers test-cuda-emulation test-avx512 \
        test-compat test-pure cuda-report lint format bench docs build info clean FORCE

help:
	@echo 'make demo                 train on glyphs, then recognise handwritten digits; writes report.html'
	@echo 'make test                 the quick tests, on the compiled kernels (test-slow: the long ones)'
	@echo 'make lint                 ruff, clang-format, mypy (format: rewrite the files)'
	@echo 'make bench                the benchmarks'
	@echo 'make docs                 the documentation, into site/'
	@echo 'make build                compile the C++ and install in place (info: what runs where)'
	@echo 'make test-cpp             GoogleTest tests of the kernels (test-sanitizers: with ASan+UBSan, TSan)'
	@echo 'make test-cuda-emulation  the CUDA kernels, run on the CPU'
	@echo 'make test-avx512          the AVX-512 kernels, run with AVX2 instructions'
	@echo 'make cuda-report          compile every .cu with nvcc: registers, spills (needs no GPU)'
	@echo 'make test-compat          a wheel built here runs beside another torch (downloads 5.5 GB)'
	@echo 'make test-pure            the install without compiled code'
	@echo 'make clean                remove what was built (.venv stays)'
	@echo
	@echo 'TORCH="torch==2.13.0"     which torch to install in .venv (default "torch>=2.11"; one that is'
	@echo '                          there and fits stays). MAX_JOBS, CXX, FASTMETA_CUDA, FASTMETA_NATIVE:'
	@echo '                          see setup.py. PYTHON=python3.12: which Python makes .venv.'

# Stamps in .venv, one a step: Python and torch, the package in place, its kernels.
ifneq ($(TORCH),$(file <$(VENV)/.torch))
$(VENV)/.torch: FORCE
endif
$(VENV)/.torch:
	$(call say, $(VENV) with $(TORCH) (a minute or more the first time))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'fastmeta needs Python 3.10 or later: make PYTHON=/path/to/python3'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo 'no venv in this Python: apt-get install python3-venv'; exit 1; }
	@$(PIP) '$(TORCH)' 'setuptools>=77' ninja 'pybind11>=2.13' numpy
	@printf '%s' '$(TORCH)' > $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	$(call say, compile and install fastmeta in place (a minute or two the first time))
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(call say, compile what changed)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.%: pyproject.toml | $(VENV)/.built
	$(call say, tools of fastmeta[$*])
	@$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

build: $(VENV)/.built

info: build
	@$(BIN)/fastmeta info

demo: build
	$(call say, meta-train on glyphs and recognise handwritten digits (minutes))
	@$(BIN)/fastmeta demo

test: build
	$(call say, quick tests on the compiled kernels)
	@FASTMETA_BACKEND=native $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: build
	$(call say, slow tests on the compiled kernels)
	@FASTMETA_BACKEND=native $(BIN)/python -m pytest -m 'slow and not cuda' $(PYTEST_ARGS)

test-cuda-emulation: build
	$(call say, CUDA kernels run on the CPU, plain and under ASan+UBSan and TSan (an hour))
	@FASTMETA_BACKEND=native $(BIN)/python -m pytest -m 'not cuda' tests/cuda_emulation $(PYTEST_ARGS)

test-cpp: build
	$(call say, GoogleTest tests of the kernels as they were built)
	@cmake --preset release -DFASTMETA_KERNEL_OBJECTS="$$(ls -td $(CURDIR)/build/temp.*/fastmeta._C/kernels | head -1)" \
	  && cmake --build --preset release $(JOBS) && ctest --preset release

test-sanitizers:
	$(call say, GoogleTest tests under sanitizers)
	@for preset in asan tsan; do \
	  cmake --preset $$preset; cmake --build --preset $$preset $(JOBS); ctest --preset $$preset; \
	done

# In a copy, whose kernels the compiler of tests/avx512_emulation makes.
AVX512 := build/avx512-emulation
test-avx512: build
	$(call say, the AVX-512 kernels with AVX2 instructions: compiled (minutes) and tested)
	@rm -rf $(AVX512)/tests && mkdir -p $(AVX512) && git ls-files -z | xargs -0 cp --parents --preserve=timestamps -t $(AVX512)
	@cd $(AVX512) && export PYTHONPATH=$$PWD FASTMETA_BACKEND=native FASTMETA_CPU_ISA=avx512_bf16 && \
	  REAL_CXX="$${CXX:-g++}" CXX=$$PWD/tests/avx512_emulation/c++ FASTMETA_CUDA=0 \
	    $(abspath $(BIN))/python setup.py --quiet build_ext --inplace && \
	  $(abspath $(BIN))/python -c 'import fastmeta; assert fastmeta.backend_info()["isa"] == "avx512_bf16"' && \
	  $(abspath $(BIN))/python -m pytest -n $(WORKERS) --ignore=tests/cuda_emulation --ignore=tests/packaging \
	    tests $(PYTEST_ARGS)

test-compat: build
	@.ci/torch-compat $(BIN)/python

test-pure: build
	@.ci/pure-python $(BIN)/python

cuda-report: build
	$(call say, every .cu through nvcc)
	@$(BIN)/python tools/cuda_report.py $(if $(CHECK),--check) $(if $(WRITE),--write)

lint: $(VENV)/.dev
	$(call say, ruff)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	$(call say, clang-format)
	@$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(call say, mypy)
	@$(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(FORMATTED)

bench: $(VENV)/.bench
	$(call say, benchmarks)
	@$(BIN)/python -m benchmarks

docs: $(VENV)/.docs
	$(call say, documentation into site/)
	@$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site *.egg-info fastmeta/_C*.so fastmeta/_build_info.json
	rm -f $(VENV)/.installed $(VENV)/.built
