# Every target makes its own virtual environment when it is missing: `make demo` and `make test` work on a bare checkout.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all check bench clean

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.bench: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev,bench]'
	touch $@

demo: $(VENV)/.demo ## train, compress, certify a small network on real digits; output under runs/demo
	$(BIN)/tersor demo --out runs/demo

test: $(VENV)/.dev ## the tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(VENV)/.dev ## all tests that this machine can run
	$(BIN)/python -m pytest -m "not gpu"

check: $(VENV)/.dev ## lint, format, types, layers, docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/check.py

bench: $(VENV)/.bench ## all benchmarks; DATA points to the CIFAR images and weights
	$(BIN)/python benchmarks/int8_peers.py --data $(or $(DATA),../shared/data)
	$(BIN)/python benchmarks/certificate_simulation.py
	$(BIN)/python benchmarks/pruning_accuracy.py --data $(or $(DATA),../shared/data) --out benchmarks/results/pruning_accuracy.json
	$(BIN)/python benchmarks/pruning_training.py --data $(or $(DATA),../shared/data) --chosen benchmarks/results/pruning_accuracy.json --out benchmarks/results/pruning_training.json
	$(BIN)/python benchmarks/sparse_accuracy.py --data $(or $(DATA),../shared/data) --out benchmarks/results/sparse_accuracy.json
	$(BIN)/python benchmarks/coupling_speed.py --out benchmarks/results/coupling_speed.json
	$(BIN)/python benchmarks/number_formats.py --data $(or $(DATA),../shared/data) --out benchmarks/results/number_formats.json

clean:
	rm -rf $(VENV) runs
