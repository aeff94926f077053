.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test slow mutants check fmt bench docs

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## Make .venv with everything that the demo, the tests and the checks need

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV): about two minutes, most of it PyTorch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --group parity --editable '.[serve]'
	@touch $@

demo: $(READY) ## Run the whole pipeline offline on the CPU: train, evaluate, compare
	PATH="$(CURDIR)/$(BIN):$$PATH" ./run_all.sh demo

test: $(READY) ## Run the tests
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

slow: $(READY) ## Run the tests that take minutes
	$(BIN)/python -m pytest -q -m slow --numprocesses auto --maxprocesses 4 --dist worksteal

mutants: $(READY) ## Plant some hundred small defects, one at a time, and list those that the tests do not notice
	$(BIN)/python -m tests.mutants

check: $(READY) ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/python -m tests.house

fmt: $(READY) ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## Measure speed and memory against TRL (benchmarks/README.md)
	$(BIN)/python -m benchmarks.run

docs: $(READY) ## Make the pages of docs/ a site, in outputs/site
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
