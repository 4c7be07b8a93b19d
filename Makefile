# `make quickstart` and `make test` set everything up themselves in .venv/ and .build/ (a compiled DeepSpeed op).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.build/torch_extensions
export HF_HUB_OFFLINE := 1

.PHONY: test lint setup clean

setup: $(VENV)/.installed

# torch first: DeepSpeed's build asks for it, and the constraints keep pip from pulling CUDA builds.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy setuptools
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) .build
