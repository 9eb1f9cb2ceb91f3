# Everything a developer does here, by name. `make` alone lists it; the two that matter are `make run` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
export SDAN_FAST_BUILD_DIR ?= $(CURDIR)/build

# A developer's build compiles the CUDA kernels for the GPU at hand, or for one architecture and PTX where there is
# none, which is minutes less; `make wheel` takes the whole list of build_tools/toolkit.py.
GPU_ARCH   := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
BUILD_ARCH := $(or $(TORCH_CUDA_ARCH_LIST),$(if $(GPU_ARCH),$(GPU_ARCH)+PTX,9.0+PTX))

ARGS ?=

# Tests run in a process for each core, whole files at a time; two threads of OpenMP each, which do not spin.
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores : 8)))
PYTEST  := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=8

.DEFAULT_GOAL := help
.PHONY: help env build run test test-slow sanitize lint format bench gpu-check wheel-check wheel clean distclean

help:  ## list the targets
	@echo "usage: make TARGET [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s%s\n", $$1, $$2}'

run: build  ## environment, build, then SDAN x4 on a real photograph through every backend (ARGS: for the demo)
	@echo "==> demo"
	$(VENV)/bin/sdan-fast demo $(ARGS)

test: build  ## environment, build, then the fast tests (ARGS: for pytest)
	@echo "==> tests"
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: build  ## the tests that make test leaves out (ARGS: for pytest)
	@echo "==> slow tests"
	$(PYTEST) --dist worksteal -m slow $(ARGS)

sanitize: $(VENV)/.installed  ## the CPU kernels and their tests under AddressSanitizer and UBSan (ARGS: for pytest)
	@echo "==> sanitizers"
	$(PY) scripts/sanitize_cpu.py $(ARGS)

bench: build  ## every benchmark under pytest-benchmark: benchmarks/bench_*.py (ARGS: for pytest)
	$(PY) -m pytest benchmarks/bench_*.py --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

lint: $(VENV)/.installed  ## ruff, clang-format and mypy, changing nothing
	@echo "==> lint"
	$(PY) scripts/lint.py $(ARGS)

format: $(VENV)/.installed  ## let ruff and clang-format rewrite what lint would complain about
	$(PY) scripts/lint.py --fix $(ARGS)

gpu-check: build  ## on a machine with a GPU: tests, compute-sanitizer, benchmarks/results/<gpu>.json
	@echo "==> GPU check"
	$(PY) benchmarks/gpu_check.py $(ARGS)

wheel-check: $(VENV)/.installed  ## one wheel, built once, tested under two torch releases
	@echo "==> wheel check (CUDA architectures: $(BUILD_ARCH))"
	@TORCH_CUDA_ARCH_LIST="$(BUILD_ARCH)" $(PY) scripts/wheel_check.py $(ARGS)

wheel: $(VENV)/.installed  ## a wheel for every supported GPU architecture, into dist/
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

build: $(VENV)/.installed  ## compile what changed of the C++ and CUDA kernels, in place
	@echo "==> build (CUDA architectures: $(BUILD_ARCH))"
	@TORCH_CUDA_ARCH_LIST="$(BUILD_ARCH)" $(PY) setup.py --quiet build_ext --inplace

env: $(VENV)/.installed  ## the virtual environment alone

$(VENV)/bin/python:
	@echo "==> virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: requirements/torch.txt | $(VENV)/bin/python
	@echo "==> torch and the build tools (the large download)"
	$(PIP) install -r requirements/torch.txt "setuptools>=77" wheel ninja
	@touch $@

# The kernels are left to the target build, which shows its progress; pip would hide it.
$(VENV)/.installed: pyproject.toml setup.py $(VENV)/.torch
	@echo "==> the package (editable) with its extras"
	SDAN_FAST_SKIP_CPU=1 SDAN_FAST_SKIP_CUDA=1 \
	    $(PIP) install --no-build-isolation -r requirements/torch.txt -e ".[cli,peers,plots,dev]"
	@touch $@

clean:  ## remove what was built, keep the environment
	rm -rf build dist *.egg-info sdan_fast/*.so sdan_fast/_build_info.json
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean  ## remove the environments too
	rm -rf $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
