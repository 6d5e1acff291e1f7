# Two commands do all: `make demo` and `make test`. Both make .venv themselves; python3 (3.11+) is enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SOURCES := deploy gateway loadtest services tests hatch_build.py

.DEFAULT_GOAL := help
.PHONY: help demo leak test check format bench constraints clean

help:  ## what each target does
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/uv:
	@# without pip in it: some systems package ensurepip apart from Python
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	@$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check uv

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(shell find protos -name '*.proto') | $(BIN)/uv
	@echo "==> setting up $(VENV) (once; about a minute)"
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --build-constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## a real mesh answers 500 held-out flights, then loses a service and keeps answering
	@$(BIN)/tenfold demo

leak: $(STAMP)  ## what a leaky training set promises and delivers, and the check that finds it
	@$(BIN)/python -m deploy.flights.leak

test: $(STAMP)  ## every test
	@$(BIN)/python -m pytest

check: $(STAMP)  ## format, lint, types, import contracts, protobuf contracts
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	.ci/buf-breaking $(BIN)/buf

format: $(STAMP)  ## rewrite the sources in the house format
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(STAMP)  ## what a request costs, process by process; `python -m loadtest.bench.features` is another
	@$(BIN)/python -m loadtest.bench.mesh

constraints: $(BIN)/uv  ## pin the newest releases that pyproject.toml allows: names and versions, no addresses
	$(BIN)/uv pip compile --quiet --upgrade --all-extras --python-version 3.11 --no-header --no-annotate \
		--no-emit-index-url pyproject.toml deploy/build-requirements.txt --output-file constraints.txt

clean:  ## remove the environment, the demonstration's artefacts and every cache
	rm -rf $(VENV) .tenfold .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find protos -name '*_pb2*.py*' -delete
