# `make demo` and `make test` make the environment that they need, with python3 -m venv and pip.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# torch from PyPI brings CUDA libraries of several GB; give TORCH_INDEX a CPU index to avoid them on a CPU machine.
TORCH_INDEX ?=
PIP = $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test test-all test-gpu lint env clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'import torch; from fedzo import directions; directions.fill(torch.empty(1), 0, "rademacher")'
	touch $@

env: $(VENV)/.installed

demo: env
	$(BIN)/fedzo run --config configs/demo.toml

test: env
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-all: env
	$(BIN)/python -m pytest -m 'not gpu'

test-gpu: env
	$(BIN)/python -m pytest -m gpu

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) dist build *.egg-info
