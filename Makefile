PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
FORCE_CUDA ?= auto
# Python compiles what it imports; to compile all of torch takes a quarter of a minute more.
PIP := $(BIN)/python -m pip install --no-compile
CUDA_VENV := build/cuda-venv
CUDA_TORCH ?= torch==2.14.1
CUDA_PYTHON ?= $(CUDA_VENV)/bin/python
INSTALLED := $(VENV)/installed$(if $(filter 1,$(FORCE_CUDA)),-with-cuda)
# What checks and packages the project. A demo needs none of it.
TOOLS := $(VENV)/tools
# A file runs in one worker, which makes what its tests share once.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# Every layer, pass and promise on the CPU, and nothing that compiles or interprets for long.
CHECKED := $(wildcard $(addprefix tests/*/test_,$(addsuffix .py,golden passes external_passes cpu_level shift \
  attention_in_attention external_attention external_attention_modules external_attention_parameters convert \
  external_attention_submodules convert_look_alikes promises_bad_input promises_checkpoint promises_determinism \
  promises_dispatch promises_func promises_in_place promises_memory)))
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install check test test-all fuzz rehearse-cuda lint wheel hub demo bench gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## make .venv and build (PYTHON=python3.12, TORCH=torch==2.13.0, FORCE_CUDA=1)
	@$(BIN)/python -m aia_kernels

# Debian splits ensurepip from Python; pip alone can fill an environment too.
define make-environment
$(PYTHON) -m venv $(1) >/dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip $(1) && \
  $(PYTHON) -m pip --python $(1)/bin/python install pip; }
endef

$(BIN)/python:
	$(call make-environment,$(VENV))

$(INSTALLED): setup.py pyproject.toml $(shell find csrc -type f) | $(BIN)/python
	$(PIP) "setuptools>=77" ninja $$($(BIN)/python -c "import torch" 2>/dev/null || echo "$(TORCH)")
	FORCE_CUDA=$(FORCE_CUDA) $(PIP) --no-build-isolation --editable ".[demo]"
	@rm -f $(VENV)/installed* && touch $@

$(TOOLS): pyproject.toml | $(INSTALLED)
	$(PIP) "aia_kernels[all]"
	@touch $@

check: lint  ## at every save: lint, then the tests of the CPU that are fast
	$(PYTEST) -k "not triton and not emulator and not compiled" $(CHECKED) $(ARGS)

test: lint  ## before every push: lint, then the tests (ARGS="-k pool" for some)
	$(PYTEST) $(ARGS)

test-all: lint  ## the tests and their sweeps, with CUDA compiled where nvcc is
	$(BIN)/python setup.py build_ext --inplace
	$(PYTEST) -m "" $(ARGS)

fuzz: $(TOOLS)  ## argument sets to the CPU operators, under sanitizers at every level (N=100000, ONLY=seed)
	PYTHONPATH=tests $(BIN)/python -m fuzz $(if $(ONLY),--only $(ONLY),--sets $(or $(N),10000)) $(ARGS)

# A Python of one's own is not made here, and its path may have spaces.
rehearse-cuda: $(if $(filter file,$(origin CUDA_PYTHON)),$(CUDA_PYTHON))  ## the tests for a GPU without one, 5 GB of torch (CUDA_PYTHON=python that has torch for CUDA)
	PYTHONPATH=tests "$(CUDA_PYTHON)" -m rehearsal $(ARGS)

$(CUDA_VENV)/bin/python:
	$(call make-environment,$(CUDA_VENV))
	$@ -m pip install $(CUDA_TORCH) numpy tqdm pytest pytest-xdist hypothesis ninja

lint: $(TOOLS)  ## ruff, mypy and clang-format, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

# auditwheel finds patchelf on the path. It leaves libtorch_cpu, the one library of torch that is linked, to torch.
wheel: $(TOOLS)  ## the wheel (with CUDA where nvcc is) and the source distribution, in dist/
	rm -rf build/dist dist
	$(BIN)/python -m build --no-isolation --sdist --wheel --outdir build/dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist

hub: $(INSTALLED)  ## the layout that Hugging Face's kernels loads, in build/hub
	$(BIN)/python .ci/hub.py build/hub

demo: $(INSTALLED)  ## every layer and a ResNet-50 on a real video, fused beside published (VIDEO=path)
	$(BIN)/python -m benchmarks.demo $(if $(VIDEO),--video "$(VIDEO)") $(ARGS)

bench: $(INSTALLED)  ## microbenchmarks: rows and plots in benchmarks/results
	$(BIN)/python -m benchmarks.run $(ARGS)
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.offline.roofline --results benchmarks/results --page docs/benchmarks.md

gpu:  ## on a GPU without a network: PART=smoke (2 min), check, bench, network, compile (RESULTS=dir REHEARSE=1)
	PYTHON=$(PYTHON) PART=$(PART) PACK=$(PACK) FILTER="$(FILTER)" REHEARSE=$(REHEARSE) .ci/gpu $(RESULTS)

clean:  ## remove what the build made, and .venv
	rm -rf build dist *.egg-info aia_kernels/_C.so $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
