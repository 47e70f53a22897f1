# Each target makes .venv when it is missing, and is quick when it is not. `make demo` installs the package alone;
# `make test` and `make lint` add what developers need.
PYTHON ?= python3
# The release that the tests run with. `make TORCH=torch==X.Y.Z` takes another one.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SDIST := build/sdist-test
DEMO := tools/demo-requirements.txt
# Compiling every module to bytecode takes longer than the demo's imports: Python compiles those few as it reads them.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile

.DELETE_ON_ERROR:
.PHONY: demo test hostile fuzz sdist-test test-matrix lint format demo-model clean

# torch goes in first and by itself: pulled in by another package it would be whatever build that package asks for.
$(VENV)/core-installed: pyproject.toml Makefile tools/install_torch.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install_torch.py $(TORCH)
	$(INSTALL) --editable .
	touch $@

$(VENV)/demo-installed: $(VENV)/core-installed $(DEMO)
	$(INSTALL) --no-deps --requirement $(DEMO)
	touch $@

$(VENV)/dev-installed: $(VENV)/core-installed
	$(INSTALL) --editable '.[dev]'
	touch $@

demo-model: $(VENV)/demo-installed

demo: demo-model
	$(BIN)/melayer demo --out demo-report

# One thread for each worker: with more, the workers' threads wait for one another most of the time. A worker that has
# nothing left takes the last tests of another, so that those of one file stay together as far as can be.
test: $(VENV)/dev-installed demo-model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --durations=20

# Everything hostile with every command; `make test` takes a part of it.
hostile: $(VENV)/dev-installed demo-model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/hostile --hostile=all

# Bytes led by coverage in what reads files of ours and of others. SECONDS for all targets together.
SECONDS ?= 60
fuzz: $(VENV)/dev-installed
	$(BIN)/python tools/fuzz.py --seconds $(SECONDS)

# The tests once more, from the source distribution, unpacked where nothing else lies. TESTS names some of them.
sdist-test: $(VENV)/dev-installed demo-model
	rm -rf $(SDIST) && mkdir -p $(SDIST)/unpacked
	$(BIN)/python -m build --quiet --sdist --outdir $(SDIST)
	tar -xzf $(SDIST)/melayer-*.tar.gz --strip-components=1 -C $(SDIST)/unpacked
	cd $(SDIST)/unpacked && PYTHONPATH=$$PWD/src OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m pytest -n auto $(TESTS)

# Every supported Python with the oldest and the newest dependencies; noxfile.py says how. It takes hours and gigabytes.
test-matrix: $(VENV)/dev-installed
	$(BIN)/nox
	$(BIN)/python tools/versions_page.py

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml \
		.github/ISSUE_TEMPLATE/idea.yml

format: $(VENV)/dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .nox build demo-report
