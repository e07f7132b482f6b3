# Everything sets itself up: a virtual environment in .venv, the local model in the user's cache.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-matrix mutation bench bench-decision bench-gpu soak fmt clean

BIN := .venv/bin

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv with everything pinned (again only where it is out of date)
	@scripts/setup.sh

demo: setup  ## serve the local MoE, with and without speculation, and compare (ARGS="--help" for options)
	@$(BIN)/moecascade demo $(ARGS)

test: setup  ## lint, types, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest $(ARGS)

test-matrix: setup  ## the adapter's tests with other versions of vLLM (ARGS="0.29.0" for one of them)
	@scripts/versions.sh $(ARGS)

mutation: setup  ## change the core in one place at a time: does a test notice? (ARGS="--sample 200" for some)
	@$(BIN)/python scripts/mutation.py $(ARGS)

test-fast: setup  ## the same without the tests that start vLLM
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -m "not engine" $(ARGS)

bench: setup  ## the whole evaluation, 90 minutes, and its report (QUICK=1: 10 minutes; AGAIN=1: a pass more; FRESH=1: anew)
	@PATH="$(CURDIR)/$(BIN):$$PATH" benchmarks/evaluation.sh $(if $(QUICK),quick,full)

bench-decision: setup  ## print how long a decision takes (ARGS=--cold: with cold caches, as in an engine)
	@$(BIN)/python benchmarks/decision_cost.py $(ARGS)

bench-gpu: setup  ## what a GPU can tell: step times, lossless text, policies, report (ARGS=--tiny: on CPUs)
	@$(BIN)/python benchmarks/gpu/run.py $(ARGS)

soak: setup  ## serve under all that clients do to it, and say what came of it (MINUTES=30)
	@$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),30) $(ARGS)

fmt: setup  ## format and fix what can be fixed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## remove .venv and what tools left (the model cache stays: see moecascade model)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
