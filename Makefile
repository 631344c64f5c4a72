# Everything here needs only python3 (3.11 or newer) and make. `make` alone lists what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
ONLY ?=
ARGS ?=
# How many tests run side by side.
PROCESSES ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup up demo test generate format lint types imports pytest obs-check bench load storm lock clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(VENV)/.run ## Make the environment; `up` and `test` do so by themselves

up: $(VENV)/.run ## Run everything until Ctrl-C; ARGS="--port 8080" and the like
	@exec $(BIN)/sessiongate up $(ARGS)

demo: $(VENV)/.run ## Tell the story step by step, against a running `make up`
	@$(BIN)/sessiongate demo $(ARGS)

test: lint types imports pytest ## Check style, types and import contracts, and run all tests

generate: $(VENV)/.dev ## Write what in deploy/ and docs/ follows from the program
	$(BIN)/python -m deploy.generate

format: $(VENV)/.dev ## Bring the source into shape
	$(BIN)/ruff check --quiet --fix
	$(BIN)/ruff format --quiet

lint: $(VENV)/.dev
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --quiet --check

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

pytest: $(VENV)/.dev
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile

obs-check: $(VENV)/.dev ## Check rules, boards and runbooks, and run them beside an API and a worker
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile tests/deploy --ignore tests/deploy/test_image.py

bench: $(VENV)/.dev ## Measure and print tables; ONLY=name for one of them
	$(BIN)/python -m tests.benchmarks $(ONLY)

load: $(VENV)/.dev ## A minute of mixed load on an `up` of its own, beside its budgets; ARGS=seconds
	$(BIN)/python -m tests.load $(ARGS)

storm: $(VENV)/.dev ## The long tests: kills and lost connections under load, guards removed, long conversations
	$(BIN)/pytest tests/storms tests/mutation tests/api/test_conversation_model.py tests/api/test_consultation_model.py \
		--storm=full -rP

lock: $(VENV)/.dev ## Bring the locks up to date with requirements/*.in
	cd requirements && for lock in run dev; do \
		../$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
			--python-version 3.11 $(UPGRADE) $$lock.in --output-file $$lock.txt || exit 1; \
	done

clean: ## Remove the environment and the caches; data stays
	rm -rf $(VENV) .bench .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say which lock is installed; the development lock contains the other one.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Sessiongate needs Python 3.11 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make environments; install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements/run.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) install --require-hashes --requirement requirements/run.txt
	$(PIP) install --no-index --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.run
	$(PIP) install --require-hashes --requirement requirements/dev.txt
	@touch $@
