# The commands a person types. `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo-out

.PHONY: help demo test test-slow lint sanitize bench gpu clean
help:
	@echo "make demo       the three stages on the embedded model and data, a table and $(DEMO_OUT)/results.json"
	@echo "make test       lint, types and the test suite"
	@echo "make test-slow  the tests that take minutes"
	@echo "make lint       ruff and mypy"
	@echo "make sanitize   the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on random input"
	@echo "make bench      the CPU benchmarks"
	@echo "make gpu        on a CUDA machine, in the current environment: build, tests marked gpu, benchmarks, result file"

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

demo: $(VENV)/built
	$(BIN)/kmq run minilm --task banking77 --bits 4 --bits 3 --bits 2 --scheme kmeans --scheme linear -o $(DEMO_OUT)

sanitize:
	mkdir -p build
	for driver in tests/sanitize/*.cpp; do \
	  $(CXX) -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc -o build/sanitize \
	    $$driver $$(find csrc/cpu -name "*.cpp") && build/sanitize && KMQ_CPU_PATH=avx2 build/sanitize && KMQ_CPU_PATH=scalar build/sanitize || exit 1; done

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(VENV)/built
	$(BIN)/python -m pytest -m "slow and not gpu"

bench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks/bench_ops.py --benchmark-only
	for script in kmeans codebook_linear codebook_grad training_step; do $(BIN)/python benchmarks/bench_$$script.py || exit 1; done

gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf build *.egg-info kmq_kernels/*.so $(VENV)/built
