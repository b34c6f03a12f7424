# Every target sets up what it needs, from a fresh clone on. Override: make test TORCH=2.14.1
# With ENV=current, a target takes PYTHON's environment as it is, and installs and fetches nothing:
# make test-cuda ENV=current
PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   ?= .venv
ENV    ?= venv
ARGS   ?=
# Processes that the tests run in.
JOBS   ?= 2
# What installs Debian's packages: nothing if you are root, else "make test-cpp SUDO=sudo".
SUDO   ?=

ifeq ($(ENV),venv)
PY := $(VENV)/bin/python
BUILT := build/built-for-$(notdir $(VENV))-torch-$(TORCH)
INSTALLED := $(VENV)/installed-torch-$(TORCH)
PARALLEL := -n $(JOBS) --dist worksteal
CUDA_TOOLS := $(VENV)/cuda-tools
RELEASE_TOOLS := $(VENV)/release-tools
DOCS_TOOLS := $(VENV)/docs-tools
apt_install = test -f $(1) || ($(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq $(2))
else ifeq ($(ENV),current)
PY := $(shell command -v $(PYTHON) 2> /dev/null)
BUILT := build/built-for-current-torch-$(shell $(PY) -c "import torch; print(torch.__version__)")
INSTALLED := build/checked-current
PARALLEL := $(shell $(PY) -c "import xdist" 2> /dev/null && echo ' -n $(JOBS) --dist worksteal')
CUDA_TOOLS :=
RELEASE_TOOLS :=
DOCS_TOOLS :=
apt_install = test -f $(1) || { echo "ENV=current installs nothing, and $(2) is missing"; exit 1; }
export PYTHONPATH := $(CURDIR)$(addprefix :,$(PYTHONPATH))
# A test whose optional package is missing is skipped, here and nowhere else.
export OE_EXT_TEST_MISSING := skip
else
$(error ENV must be venv or current, got $(ENV))
endif
BIN := $(abspath $(dir $(PY)))
ON_PATH := PATH="$(BIN):$$PATH"

SOURCES := setup.py pyproject.toml oe_ext/_build.py \
           $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
MARKERS := not packaging and not cuda_build and not mutants and not nvcc and not scale
# The files of these tests, whichever folder they are in: $(call test_files,values cpu_kernels).
test_files = $(foreach name,$(1),$(or $(wildcard tests/*/test_$(name).py),$(error no test_$(name).py)))

.PHONY: demo test fuzz test-scale test-cpp test-sanitizers test-aarch64 test-asan-python \
        test-levels test-packaging test-mutants test-nvcc test-jit-cuda test-torches \
        test-compilers test-cuda test-pythons bench bench-cuda instructions ptx sass-report \
        cuda-model lint format docs build dist wheels clean

demo: $(BUILT)  ## train on real data, with and without Outlier Exposure
	$(PY) examples/train_digits.py $(ARGS)

test: $(BUILT)  ## the Python tests
	$(PY) -m pytest $(PARALLEL) -m "$(MARKERS)" $(ARGS)

SEED ?= 0
fuzz: $(BUILT)  ## 20,000 examples of the properties, others for every SEED: minutes
	$(PY) -m pytest -q -m hypothesis --hypothesis-profile=fuzz --hypothesis-seed=$(SEED) \
	  --hypothesis-show-statistics $(ARGS)

test-scale: $(BUILT)  ## billions of logits, millions of rows, 10^5 calls; 20 GiB of memory: minutes
	$(PY) -m pytest -m scale --durations=0 $(ARGS)

test-cpp: $(BUILT)  ## the C++ tests, through CMake and ctest
	$(call apt_install,/usr/include/gtest/gtest.h,libgtest-dev)
	$(ON_PATH) cmake -G Ninja -B build/cmake -DOE_EXT_PYTHON="$(abspath $(PY))" \
	  -DCMAKE_PREFIX_PATH="$$($(PY) -c 'import torch.utils as u; print(u.cmake_prefix_path)')"
	cmake --build build/cmake
	ctest --test-dir build/cmake --output-on-failure -j $(JOBS)

test-sanitizers: $(BUILT)  ## the C++ tests, the CUDA kernels' too, with ASan and UBSan, and with TSan
	$(call apt_install,/usr/include/gtest/gtest.h,libgtest-dev)
	for preset in asan-ubsan tsan; do \
	  $(ON_PATH) cmake --preset $$preset \
	    -DCMAKE_PREFIX_PATH="$$($(PY) -c 'import torch.utils as u; print(u.cmake_prefix_path)')" && \
	  cmake --build --preset $$preset && ctest --preset $$preset -j $(JOBS) || exit 1; \
	done

# Compiled with setup.py's flags, and linked without libtorch: its headers are all that is here. The
# other sources are only checked, but for Python's module, whose headers are this processor's.
# -Wno-restrict: g++ 12 warns of its own std::string.
AARCH64_CXX = aarch64-linux-gnu-g++ -Werror -Wno-restrict $$(cd $(CURDIR)/oe_ext && OE_EXT_CUDA=0 \
  $(abspath $(PY)) -c "import _build as b; print(*b.describe_build(b.Path('..')).cxx_flags)")
GOOGLETEST := /usr/src/googletest/googletest
AARCH64_TESTS := kernels_test cpu_threads_test upsampled_test row_math_test elementwise_test \
                 cpu_kernels without_torch
# The one that takes longest goes first.
AARCH64_SOURCES = $(abspath csrc/cpu/kernels_default.cpp $(AARCH64_TESTS:%=tests/cpp/%.cpp) \
                  $(wildcard csrc/cpu/launch_*.cpp csrc/cpu/choose_*.cpp) \
                  $(GOOGLETEST)/src/gtest-all.cc $(GOOGLETEST)/src/gtest_main.cc)
test-aarch64: $(INSTALLED)  ## the C++ tests of the CPU kernels on aarch64, in QEMU: minutes
	$(call apt_install,/usr/bin/aarch64-linux-gnu-g++,g++-aarch64-linux-gnu)
	$(call apt_install,/usr/bin/qemu-aarch64-static,qemu-user-static)
	$(call apt_install,$(GOOGLETEST)/src/gtest-all.cc,googletest)
	ls csrc/ops/*.cpp csrc/autograd/*.cpp csrc/cpu/*.cpp | \
	  xargs -P $(JOBS) -n 1 $(AARCH64_CXX) -fsyntax-only
	rm -rf build/aarch64 && mkdir -p build/aarch64
	cd build/aarch64 && printf '%s\n' $(AARCH64_SOURCES) | xargs -P $(JOBS) -n 1 \
	  $(AARCH64_CXX) -c -I$(CURDIR)/csrc -isystem $(GOOGLETEST)/include -isystem $(GOOGLETEST)
	$(AARCH64_CXX) build/aarch64/*.o -o build/aarch64-tests
	aarch64-linux-gnu-objdump -dC build/aarch64-tests | $(PY) tests/cpp/check_neon.py
	seq 0 $$(($(JOBS) - 1)) | GTEST_TOTAL_SHARDS=$(JOBS) xargs -P $(JOBS) -I{} env GTEST_SHARD_INDEX={} \
	  qemu-aarch64-static -L /usr/aarch64-linux-gnu build/aarch64-tests $(ARGS)

# Python is not compiled with it, so its library is loaded first; libstdc++ too, whose throw it
# replaces. What Python and torch never free is not ours to count. From the folder of the build: the
# checkout holds a library too.
ASAN_LIBRARY = build/asan-python
test-asan-python: $(BUILT)  ## Python tests of the CPU operators, compiled with ASan and UBSan: minutes
	$(ON_PATH) LDFLAGS="-fsanitize=address,undefined" \
	  CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
	  $(PY) setup.py -q build_py --build-lib $(ASAN_LIBRARY)/lib \
	  build_ext --build-temp $(ASAN_LIBRARY)/temp --build-lib $(ASAN_LIBRARY)/lib
	cd $(ASAN_LIBRARY)/lib && export ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" && \
	  $(abspath $(PY)) -c "import oe_ext; assert 'asan-python' in oe_ext._ext.origin, oe_ext._ext.origin" && \
	  $(abspath $(PY)) -m pytest -q -k "not simt" \
	    $(abspath $(call test_files,values layouts edges errors autograd unit_gradient stats vmap module cpu_kernels)) $(ARGS)

# What the CPU kernels compute, $(call at_level,default). One of the tests goes through the levels
# by itself.
NUMERIC_TESTS = $(call test_files,values layouts edges autograd numerics stats weights counts_and_parts unit_gradient cpu_kernels properties upsampled upsampled_properties)
at_level = ATEN_CPU_CAPABILITY=$(1) $(PY) -m pytest -q $(PARALLEL) -m "$(MARKERS)" \
           -k "not simt and not at_every_level" $(NUMERIC_TESTS) $(ARGS)
test-levels: $(BUILT)  ## the CPU kernels' tests at every capability below this processor's: minutes
	$(call at_level,default)
	$(call at_level,avx2)

test-packaging: $(BUILT) dist  ## what dist made, pip with and without isolation, JIT: minutes
	$(PY) -m pytest $(PARALLEL) -m "packaging and not cuda_build" $(ARGS)

test-jit-cuda: $(BUILT)  ## the JIT build with the CUDA kernels; TORCH= a CUDA build; needs nvcc
	$(PY) -m pytest -m cuda_build $(ARGS)

# Each with the CUDA kernels, where it is a CUDA build of nvcc's major version.
TORCHES ?= 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0
test-torches:  ## make test with each of TORCHES: ten minutes and 8 GB each
	for torch in $(TORCHES); do \
	  $(MAKE) test TORCH=$$torch VENV=.venv-torch-$$torch || exit 1; \
	done

# Levels of capability, or the widest that the processor has below one.
LEVELS ?= default avx2 avx512
COMPILERS ?= g++-11 g++-12 g++-13 g++-14 g++-15 g++-16 clang++-14
test-compilers: $(BUILT)  ## the kernels' tests at every level, loops' instructions; COMPILERS= LEVELS=: minutes each
	$(call apt_install,/usr/include/valgrind/callgrind.h,valgrind)
	for compiler in $(COMPILERS); do \
	  if command -v $$compiler; then \
	    rm -f build/built-for-* oe_ext/_C*.so && \
	    $(ON_PATH) CXX=$$compiler $(PY) setup.py -q build_ext --inplace --build-temp build/temp-$$compiler && \
	    $(PY) -c "import oe_ext; print(oe_ext._ext.module.build_info()['compiler'])" && \
	    for level in $(LEVELS); do \
	      $(call at_level,$$level) || exit 1; \
	    done && \
	    $(PY) bench/instructions.py --slopes || exit 1; \
	  fi; \
	done

PYTHONS ?= python3.10 python3.11 python3.12 python3.13 python3.14
test-pythons:  ## make test on each of PYTHONS that is here: minutes each
	for python in $(PYTHONS); do \
	  if command -v $$python; then \
	    $(MAKE) test PYTHON=$$python VENV=.venv-$$(basename $$python) || exit 1; \
	  fi; \
	done

test-mutants: $(BUILT)  ## wrong kernels, which the tests must all catch; the real ones under more schedules: minutes
	$(PY) -m pytest $(PARALLEL:worksteal=loadfile) -m mutants $(ARGS)

test-nvcc: $(BUILT) $(CUDA_TOOLS)  ## the CUDA kernels' machine code; needs nvcc: minutes
	$(PY) -m pytest -m nvcc $(ARGS)

# On a GPU: the same tests with device "cuda", then each of compute-sanitizer's tools over a part.
test-cuda: $(BUILT)
	$(PY) -c "import torch, sys; sys.exit(not torch.cuda.is_available() and 'make test-cuda needs a GPU, and TORCH= a CUDA build of torch')"
	$(PY) -m pytest -m "$(MARKERS)" -k "cuda" $(ARGS)
	for tool in memcheck racecheck initcheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PY) -m pytest -q $(call test_files,values) -k "cuda and (row_counts or class_counts or tiles)" || exit 1; \
	done

bench-cuda: $(BUILT)  ## on a GPU: our loss against its rivals; writes bench/results/cuda.*: minutes
	$(PY) bench/cuda/speed.py $(ARGS)

ptx: $(INSTALLED)  ## the CUDA kernels in PTX; needs nvcc
	$(PY) bench/cuda/report.py ptx

sass-report: $(INSTALLED) $(CUDA_TOOLS)  ## rewrites the machine-code tables of bench/CUDA.md; needs nvcc
	$(PY) bench/cuda/report.py machine-code

cuda-model: $(BUILT) $(CUDA_TOOLS)  ## rewrites the predictions of bench/CUDA.md; needs nvcc
	$(PY) bench/cuda/report.py model

bench: $(BUILT)  ## our loss against its rivals; rewrites bench/RESULTS.md
	$(PY) bench/bench.py $(ARGS)

instructions: $(BUILT)  ## of small calls, by callgrind, against those recorded; of loops, against limits
	$(call apt_install,/usr/include/valgrind/callgrind.h,valgrind)
	$(PY) bench/instructions.py $(ARGS)
	$(PY) bench/instructions.py --slopes

lint: $(INSTALLED)  ## nothing is changed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
	  $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

# -E: what a page includes, or an option of docs/conf.py, may have changed.
docs: $(BUILT) $(DOCS_TOOLS)  ## the pages of docs/ and the API reference, in build/docs; warnings are errors
	$(PY) -m sphinx -q -E -W --keep-going -d build/doctrees docs build/docs

build: $(BUILT)  ## compile what has changed

# For the torch that is here. The wheel is built from what the sdist holds.
dist: $(BUILT) $(RELEASE_TOOLS)  ## an sdist and a wheel, checked
	rm -rf dist && mkdir -p build
	$(ON_PATH) $(PY) -m build --no-isolation > build/dist.log 2>&1 || \
	  { cat build/dist.log; exit 1; }
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/auditwheel show dist/*.whl

# From the sdist, so that no environment of the checkout is copied into the containers.
wheels: dist  ## a wheel for each Python, built in containers, in build/wheels; needs Docker
	$(BIN)/cibuildwheel --platform linux --output-dir build/wheels dist/*.tar.gz

# The editable install compiles nothing; in place, an edit compiles what it changes. There is one
# place for the library: what another environment has left there goes first, and is never taken for
# ours.
.PHONY: missing-library
TORCH_OF_LIBRARY := oe_ext-built-with-torch=$(lastword $(subst -torch-, ,$(BUILT)))
IS_OURS := $(shell grep -sqF '$(TORCH_OF_LIBRARY)' oe_ext/_C*.so && echo yes)
$(BUILT): $(INSTALLED) $(SOURCES) $(if $(IS_OURS),,missing-library)
	rm -f build/built-for-* oe_ext/_C*.so
	$(ON_PATH) $(PY) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

ifeq ($(ENV),current)
$(INSTALLED):
	$(PY) -c "import torch, setuptools, pybind11, numpy, pytest, hypothesis, psutil"
	$(ON_PATH) ninja --version > /dev/null
	mkdir -p build && touch $@
else
# --no-deps: they are two programs, and what they name as needed is a whole toolkit.
$(CUDA_TOOLS): | $(INSTALLED)
	$(PY) -m pip install -q --no-deps nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

$(RELEASE_TOOLS): pyproject.toml | $(INSTALLED)
	OE_EXT_DEFER_BUILD=1 $(PY) -m pip install -q --no-build-isolation -e ".[release]"
	touch $@

$(DOCS_TOOLS): pyproject.toml | $(INSTALLED)
	OE_EXT_DEFER_BUILD=1 $(PY) -m pip install -q --no-build-isolation -e ".[docs]"
	touch $@

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/*-torch-*
	$(PY) -m pip install -q torch==$(TORCH) "setuptools>=77" ninja "pybind11>=2.13"
	OE_EXT_DEFER_BUILD=1 $(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	$(PY) -m pip install -q --no-deps pytorch-ood==0.4.0
	touch $@

endif

clean:
	rm -rf build dist *.egg-info oe_ext/*.so examples/out .pytest_cache .mypy_cache .ruff_cache
