# The commands a person types. `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo-out
GPU_SECONDS ?= 480
GPU_ARCH ?= 90
TORCH_LIBRARIES := "libtorch*" "libc10*" "libcudart*"

.PHONY: help demo test test-slow lint docs wheel sanitize bench gpu gpu-cache clean
help:
	@echo "make demo       the three stages on the embedded model and data, a table and $(DEMO_OUT)/results.json"
	@echo "make test       lint, types, the documentation built strictly, and the test suite"
	@echo "make test-slow  the tests that take minutes"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation, into site/; a warning is an error"
	@echo "make wheel      a manylinux wheel, built from the sdist, into dist/; prints its size and tag"
	@echo "make sanitize   the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: random input, failed allocations"
	@echo "make bench      the CPU benchmarks"
	@echo "make gpu        on a CUDA machine, in the current environment: in GPU_SECONDS, correctness and headline figures first"
	@echo "make gpu-cache  on any machine, with the device's Triton and Python: compiles the kernels of that for GPU_ARCH"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: the extension builds against it, and its pin keeps the CUDA packages away.
$(VENV)/installed: requirements/dev.txt requirements/demo.txt | $(BIN)/python
	$(BIN)/pip install -q "$$(grep '^torch==' requirements/dev.txt)"
	$(BIN)/pip install -q -r requirements/dev.txt
	$(BIN)/pip install -q --no-deps -r requirements/demo.txt
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(shell find csrc -type f)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# The tools of `make docs` and `make wheel`, an environment each, so that their pins and those of the package do not meet.
.venv-%/installed: requirements/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -q -r $<
	touch $@

demo: $(VENV)/built
	$(BIN)/kmq run minilm --task banking77 --bits 4 --bits 3 --bits 2 --scheme kmeans --scheme linear --assignments fixed -o $(DEMO_OUT)
	$(BIN)/kmq run minilm --task banking77 --bits 3 --bits 2 --assignments moving --moving-steps 100 -o $(DEMO_OUT)

SANITIZE := -std=c++20 -O1 -g1 -Wno-psabi -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc
SANITIZED := $(patsubst csrc/%.cpp,build/sanitize/%.o,$(shell find csrc/cpu -name "*.cpp"))
SANITIZERS := $(patsubst tests/sanitize/%.cpp,build/sanitize/%,$(wildcard tests/sanitize/*.cpp))

.SECONDARY: $(SANITIZED)

build/sanitize/%.o: csrc/%.cpp $(shell find csrc -name "*.h")
	mkdir -p $(@D)
	$(CXX) $(SANITIZE) -c -o $@ $<

build/sanitize/%: tests/sanitize/%.cpp tests/sanitize/driver.h $(SANITIZED)
	$(CXX) $(SANITIZE) -o $@ $< $(SANITIZED) -pthread

# A driver says so where the processor lacks a path.
sanitize: $(SANITIZERS)
	for driver in $(SANITIZERS); do for path in amx avx512 avxvnni avx2 scalar; do KMQ_CPU_PATH=$$path $$driver || exit 1; done; done

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

# From the sdist in a folder of its own: nothing of an earlier build gets in. torch's libraries are those of the torch that runs it.
wheel: $(VENV)/installed .venv-wheel/installed
	rm -rf build/wheel && mkdir -p build/wheel dist
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('build/wheel')" > build/wheel/sdist.log 2>&1
	tar -xzf build/wheel/*.tar.gz -C build/wheel
	cd build/wheel/kmq_kernels-*/ && $(CURDIR)/$(BIN)/python -c \
	  "from setuptools.build_meta import build_wheel; build_wheel('../built')" > ../wheel.log 2>&1 || { tail -n 40 ../wheel.log; exit 1; }
	PATH="$(CURDIR)/.venv-wheel/bin:$$PATH" .venv-wheel/bin/auditwheel repair --strip -w build/wheel/repaired \
	  $(addprefix --exclude ,$(TORCH_LIBRARIES)) build/wheel/built/*.whl > build/wheel/repair.log 2>&1
	mv build/wheel/repaired/*.whl dist/
	@cd dist && for wheel in $$(ls -t *.whl | head -n 1); do echo "dist/$$wheel: $$(stat -c %s $$wheel) bytes"; done

# Processes of tests, two threads each; those who wait for others sleep.
TEST_PROCESSES ?= 2

test: lint docs $(VENV)/built
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "not slow and not gpu"

test-slow: $(VENV)/built
	$(BIN)/python -m pytest -m "slow and not gpu"

bench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks/bench_ops.py --benchmark-only
	for script in kmeans codebook_linear codebook_grad training_step; do $(BIN)/python benchmarks/bench_$$script.py || exit 1; done

gpu:
	$(PYTHON) benchmarks/gpu.py --seconds $(GPU_SECONDS)

gpu-cache:
	$(PYTHON) -m benchmarks.gpu_cache --arch $(GPU_ARCH)
	$(PYTHON) -m benchmarks.gpu_cache --arch $(GPU_ARCH) --count

clean:
	rm -rf build dist site *.egg-info kmq_kernels/*.so $(VENV)/built
