# blockffn: `make demo` and `make test` do everything on a fresh machine; the other targets are their parts.
#   PYTHON         interpreter for the virtual environment (>= 3.10)
#   BUILD_PROFILE  native (this CPU, default), portable (x86-64: AVX2+FMA+F16C+BMI2, no AVX512, no AMX) or
#                  dispatch (every generation of CPUs, chosen at run time: what a wheel carries);
#                  for us: amx-emulated, amx-free (what a CPU with AMX gets, see ggml-ops/tests/amx-stand-in.h)
#   JOBS           parallel compile jobs

PYTHON        ?= python3
BUILD_PROFILE ?= native
JOBS          ?= $(shell nproc 2>/dev/null || echo 2)

VENV   := .venv
PY     := $(VENV)/bin/python
TREE   := build/src/llama.cpp
OUT    := build/$(BUILD_PROFILE)
# the real model of the tests: a package without code that we need, whose own dependencies stay away
REAL   := $(shell sed -n 's/^real = \["\([^"]*\)"\].*/\1/p' pyproject.toml)
# tools that come by pip when the machine has none
CMAKE  := $(shell command -v cmake 2>/dev/null || echo $(VENV)/bin/cmake)
NINJA  := $(shell command -v ninja 2>/dev/null || echo $(VENV)/bin/ninja)

PROGRAMS := llama-cli llama-completion llama-server llama-bench llama-batched-bench llama-quantize llama-perplexity \
            llama-imatrix llama-gguf-split
TESTS    := test-backend-ops test-llama-archs test-batch-alloc test-save-load-state test-state-restore-fragmented \
            test-thread-safety

CMAKE_FLAGS := -DCMAKE_BUILD_TYPE=Release -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON -DCMAKE_BUILD_RPATH='$$ORIGIN' \
               -DBLOCKFFN_OPS_DIR=$(CURDIR)/ggml-ops \
               -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
               -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_IS_DEV=OFF
ifeq ($(BUILD_PROFILE),native)
CMAKE_FLAGS += -DGGML_NATIVE=ON
else ifeq ($(BUILD_PROFILE),portable)
CMAKE_FLAGS += -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF
else ifeq ($(BUILD_PROFILE),dispatch)
# No OpenMP, which a machine may lack. The C++ runtime is the machine's: a static one needs a newer glibc (2.36, for arc4random).
CMAKE_FLAGS += -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DGGML_OPENMP=OFF
else ifneq ($(filter amx-emulated amx-free,$(BUILD_PROFILE)),)
AMX_FLAGS := -march=sapphirerapids $(if $(filter amx-free,$(BUILD_PROFILE)),-DAMX_STAND_IN_FREE)
CMAKE_FLAGS += -DGGML_NATIVE=OFF -DCMAKE_C_FLAGS="$(AMX_FLAGS)" \
               -DCMAKE_CXX_FLAGS="$(AMX_FLAGS) -include $(CURDIR)/ggml-ops/tests/amx-stand-in.h"
else
$(error BUILD_PROFILE is '$(BUILD_PROFILE)': expected native, portable or dispatch (or amx-emulated, amx-free))
endif

.PHONY: demo test test-quick setup venv tree build lint bench bench-ops test-upstream test-sanitize test-arm fuzz \
        test-amx test-clients wheel wheels test-wheels check-upstream refresh-patches clean

setup: venv build

# --- the parts -------------------------------------------------------------------------------------------------------

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock patches/UPSTREAM
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is missing or older than 3.10: install Python 3.10 or newer, or set PYTHON=..."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
	    { echo "error: no virtual environment: install the venv module (Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	$(PY) patches/tree.py fetch
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(PY) -m pip install --quiet --disable-pip-version-check \
	    --find-links build/download --requirement requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(REAL) || \
	    echo "note: $(REAL) could not be installed: the tests that need a real model will be skipped"
	@touch $@

tree: $(VENV)/.installed
	@$(PY) patches/tree.py apply

# Configuring again is cheap, and needed after a change of flags or of a CMake file; ninja does that by itself.
$(OUT)/build.ninja: Makefile $(VENV)/.installed | tree
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	    { echo "error: no C++17 compiler: install one (Debian and Ubuntu: apt-get install g++)"; exit 1; }
	@test -x $(CMAKE) || $(PY) -m pip install --quiet --disable-pip-version-check cmake==3.31.10
	@test -x $(NINJA) || $(PY) -m pip install --quiet --disable-pip-version-check ninja==1.13.0
	@mkdir -p $(OUT)
	$(CMAKE) -S $(TREE) -B $(OUT) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(NINJA)) $(CMAKE_FLAGS) > $(OUT)/configure.log 2>&1 || \
	    { tail -20 $(OUT)/configure.log; echo "error: cmake failed: see $(OUT)/configure.log"; exit 1; }

build: tree $(OUT)/build.ninja
	@$(NINJA) -C $(OUT) -j $(JOBS) $(PROGRAMS) $(TESTS) blockffn-programs

# --- what people call ------------------------------------------------------------------------------------------------

demo: setup
	$(PY) examples/demo.py

test: setup
	$(PY) -m pytest --numprocesses 2 --dist loadfile

# Every module that takes no more than two seconds (tests/conftest.py): half a minute.
test-quick: setup
	$(PY) -m pytest -m "not slow"

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/basedpyright --pythonpath $(PY)
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard ggml-ops/*/*.[hc] ggml-ops/*/*.cpp)

bench: setup
	$(VENV)/bin/blockffn bench --report build/bench-report.html

bench-ops: setup
	$(VENV)/bin/blockffn bench ops --build $(OUT)

# All of upstream's tests on the patched tree but those that download; `make test` runs some of them on our models.
test-upstream: setup
	$(NINJA) -C $(OUT) -j $(JOBS)
	$(dir $(CMAKE))ctest --test-dir $(OUT) --output-on-failure -LE python \
	    -E 'test-download-model|test-thread-safety|test-state-restore-fragmented|test-arg-parser'
	$(OUT)/bin/test-backend-ops test -b CPU

# The op tests alone with ggml, without the rest of llama.cpp. Without OpenMP, whose barriers ThreadSanitizer cannot see.
OPS_FLAGS := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(NINJA)) -DGGML_SOURCE_DIR=$(CURDIR)/$(TREE)/ggml -DBUILD_SHARED_LIBS=OFF \
             -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF
OPS_TESTS := test-node-barrier test-flash-attn test-relu-router test-union-ffn test-token-tiles

test-sanitize: sanitize-address,undefined sanitize-thread

# NDEBUG, as people build: upstream's debug assertions stop at NaN in what is quantized, which our tests hold against our ops.
sanitize-%: tree
	$(CMAKE) -S ggml-ops -B build/sanitize-$* $(OPS_FLAGS) -DCMAKE_BUILD_TYPE=Debug \
	    -DCMAKE_C_FLAGS="-O1 -g1 -DNDEBUG -fsanitize=$*" -DCMAKE_CXX_FLAGS="-O1 -g1 -DNDEBUG -fsanitize=$*" > /dev/null
	$(NINJA) -C build/sanitize-$* -j $(JOBS) $(OPS_TESTS)
	build/sanitize-$*/bin/test-node-barrier
	build/sanitize-$*/bin/test-relu-router
	UBSAN_OPTIONS=halt_on_error=1 build/sanitize-$*/bin/test-union-ffn --quick
	UBSAN_OPTIONS=halt_on_error=1 build/sanitize-$*/bin/test-token-tiles --quick
	UBSAN_OPTIONS=halt_on_error=1 build/sanitize-$*/bin/test-flash-attn --quick

# Mutated GGUF files of every kind of model, loaded under AddressSanitizer and UndefinedBehaviorSanitizer.
# FUZZ: mutations; SEED: of their choice. `fuzz-load` says how to repeat one. NDEBUG, as people build: upstream's debug
# assertions stop at NaN weights, which files may have. No check of enumerations: upstream keeps whatever number a file has in
# them, then compares it with their range.
FUZZ       ?= 10000
SEED       ?= 1
FUZZ_FLAGS := -O1 -g1 -DNDEBUG -w -fsanitize=address,undefined -fno-sanitize=enum -fno-sanitize-recover=undefined

fuzz: tree
	$(CMAKE) -S $(TREE) -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(NINJA)) $(filter -DLLAMA% -DBLOCKFFN%,$(CMAKE_FLAGS)) \
	    -DCMAKE_BUILD_TYPE=Debug -DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF \
	    -DCMAKE_C_FLAGS="$(FUZZ_FLAGS)" -DCMAKE_CXX_FLAGS="$(FUZZ_FLAGS)" > /dev/null
	$(NINJA) -C build/fuzz -j $(JOBS) fuzz-load
	rm -rf build/fuzz/models
	$(PY) tests/small_models.py build/fuzz/models > /dev/null
	ASAN_OPTIONS=quarantine_size_mb=32 build/fuzz/bin/fuzz-load --count $(FUZZ) --seed $(SEED) build/fuzz/models/*.gguf

test-arm: tree
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	    { echo "error: the cross compiler or the emulator is missing: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	for arch in dotprod dotprod+i8mm; do \
	    $(CMAKE) -S ggml-ops -B build/arm-$$arch $(OPS_FLAGS) -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
	        -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	        -DCMAKE_EXE_LINKER_FLAGS=-static -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+fp16+$$arch > /dev/null && \
	    $(NINJA) -C build/arm-$$arch -j $(JOBS) $(OPS_TESTS) || exit 1; \
	    qemu-aarch64 -cpu max,sve=off build/arm-$$arch/bin/test-node-barrier && \
	    qemu-aarch64 -cpu max,sve=off build/arm-$$arch/bin/test-relu-router && \
	    qemu-aarch64 -cpu max,sve=off build/arm-$$arch/bin/test-union-ffn --quick && \
	    qemu-aarch64 -cpu max,sve=off build/arm-$$arch/bin/test-token-tiles --quick && \
	    qemu-aarch64 -cpu max,sve=off build/arm-$$arch/bin/test-flash-attn --quick || exit 1; \
	done

# AMX without a CPU that has it: our tests on a build whose tile instructions are emulated.
test-amx:
	$(MAKE) BUILD_PROFILE=amx-emulated build
	BLOCKFFN_LIB_DIR=$(CURDIR)/build/amx-emulated/bin $(PY) -m pytest

# LangChain and LlamaIndex on our server and on blockffn.replace_llama. They bring 80 packages, which nothing else needs.
test-clients: setup
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock $$($(PY) -c \
	    'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("blockffn") if "clients" in r))')
	$(PY) -m pytest tests/test_serve_clients.py tests/test_replace_llama.py

# Wheels that need no compiler where they are installed: ours with the CPU backends of every generation, and llama_cpp's
# binding without its library. auditwheel says which glibc they need.
WHEEL_TOOLS := auditwheel==6.8.2 wheel==0.48.0

wheel: wheels

wheels:
	$(MAKE) BUILD_PROFILE=dispatch setup
	$(PY) -m pip install --quiet --disable-pip-version-check $(WHEEL_TOOLS)
	$(PY) python_bindings/build_wheel.py

# The wheels in a clean environment, the op tests and the promises of exact mode with run-time dispatch, and the choice of a
# backend by emulated processors (Debian and Ubuntu: apt-get install qemu-user).
test-wheels: wheels
	for test in test-node-barrier test-flash-attn test-relu-router test-union-ffn test-batch-invariance; do \
	    build/dispatch/bin/$$test || exit 1; done
	BLOCKFFN_LIB_DIR=$(CURDIR)/build/dispatch/bin BLOCKFFN_WHEELS=$(CURDIR)/dist $(PY) -m pytest \
	    tests/test_backends.py tests/test_wheel.py tests/test_speculative_exact.py tests/test_engine_exact.py

# Whether the patches fit another release of the upstream package.
check-upstream: venv
	@test -n "$(VERSION)" || { echo "error: which release? make check-upstream VERSION=0.3.35"; exit 1; }
	$(PY) patches/check_upstream.py $(VERSION)

refresh-patches: tree
	$(PY) patches/tree.py refresh

clean:
	rm -rf build/native build/portable build/src dist
