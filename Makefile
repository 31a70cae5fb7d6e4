# Every target installs what it needs into .venv, again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
# A file's tests stay in one process, which compiles their functions once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# The part of the system tests to run, k/n.
SHARD ?= 1/1

.PHONY: help demo test test-unit test-integration test-system lint format dist docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 18

demo: .venv/train.stamp  ## train digits-LT: one teacher, five methods, three seeds; a table and a page
	$(BIN)/python -m experiments.reproduce experiments/queues/demo.json --results=runs/demo/results

test: test-unit test-integration  ## run unit and integration tests: about ten minutes on two cores

test-unit: .venv/test.stamp  ## run unit tests and doctests: under two minutes on two cores
	$(PYTEST) --doctest-modules tests/unit ltkd_jax configs experiments/config experiments/reporting experiments/sweep.py

test-integration: .venv/test.stamp  ## run tests that train small networks: under ten minutes on two cores
	$(PYTEST) tests/integration

test-system: .venv/system.stamp  ## run tests of whole commands, processes, real data, docs, packaging; SHARD=k/n: a part
	$(PYTEST) tests/system --shard=$(SHARD) $(ARGS)

lint: .venv/dev.stamp  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.stamp  ## rewrite the code in the project's format, and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: .venv/dev.stamp  ## build the source distribution and the wheel, in dist
	$(BIN)/python -m build --no-isolation

docs: .venv/docs.stamp  ## build the documentation, in docs/_build, and run its code; a warning is an error
	$(BIN)/sphinx-build -q -j auto -W --keep-going -b html docs docs/_build/html
	@echo "$(CURDIR)/docs/_build/html/index.html"

clean:  ## remove environments, caches and what was built
	rm -rf .venv .jax_cache .mypy_cache .ruff_cache .pytest_cache build dist docs/_build *.egg-info

.venv/%.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
