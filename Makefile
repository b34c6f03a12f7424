# Every target sets up what it needs, from a fresh clone on. Override: make test TORCH=2.14.1
PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   ?= .venv
ARGS   ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-torch-$(TORCH)
SOURCES := setup.py pyproject.toml oe_ext/_build.py \
           $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILT := $(VENV)/built-torch-$(TORCH)

.PHONY: demo test test-cpp test-packaging bench lint format build clean

demo: $(BUILT)  ## train on real data, with and without Outlier Exposure
	$(BIN)/python examples/train_digits.py $(ARGS)

test: $(BUILT)  ## the Python tests
	$(BIN)/python -m pytest -m "not packaging" $(ARGS)

test-cpp: $(INSTALLED)  ## the C++ tests, through CMake and ctest
	test -f /usr/include/gtest/gtest.h || (apt-get update -qq && apt-get install -y -qq libgtest-dev)
	cmake -G Ninja -B build/cmake -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch.utils as u; print(u.cmake_prefix_path)')"
	cmake --build build/cmake
	ctest --test-dir build/cmake --output-on-failure

test-packaging: $(BUILT)  ## wheel, sdist, pip with and without isolation, JIT: minutes
	$(BIN)/python -m pytest -m packaging $(ARGS)

bench: $(BUILT)  ## our loss against its rivals
	$(BIN)/python bench/bench.py $(ARGS)

lint: $(INSTALLED)  ## nothing is changed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

build: $(BUILT)  ## compile what has changed

# An editable install once; after that, compiling in place is all that a change needs.
$(BUILT): $(INSTALLED) $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/*-torch-*
	$(BIN)/python -m pip install -q torch==$(TORCH) "setuptools>=77" ninja "pybind11>=2.13"
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps pytorch-ood==0.4.0
	touch $@

clean:
	rm -rf build dist *.egg-info oe_ext/*.so examples/out .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/built-torch-*
