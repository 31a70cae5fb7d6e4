# Every target installs what it needs into .venv, again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
# A file's tests stay in one process, which compiles their functions once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# The part of the system tests to run, k/n.
SHARD ?= 1/1

.PHONY: demo test test-unit test-integration test-system lint dist docs clean

demo: .venv/train.stamp  ## digits-LT: one teacher, five methods, three seeds; prints a table and writes a page
	$(BIN)/python -m experiments.reproduce experiments/queues/demo.json --results=runs/demo/results

test: test-unit test-integration  ## unit and integration tests: about ten minutes on two cores

test-unit: .venv/test.stamp  ## unit tests and doctests: under two minutes on two cores
	$(PYTEST) --doctest-modules tests/unit ltkd_jax configs experiments/config experiments/reporting experiments/sweep.py

test-integration: .venv/test.stamp  ## programs of small networks: under ten minutes on two cores
	$(PYTEST) tests/integration

test-system: .venv/system.stamp  ## whole runs, processes, real data, docs, packaging; SHARD=k/n runs one n-th
	$(PYTEST) tests/system --shard=$(SHARD) $(ARGS)

lint: .venv/dev.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: .venv/dev.stamp  ## the source distribution and the wheel, in dist
	$(BIN)/python -m build --no-isolation

docs: .venv/docs.stamp  ## the documentation, in docs/_build; every page's code is run; a warning is an error
	$(BIN)/sphinx-build -q -j auto -W --keep-going -b html docs docs/_build/html
	@echo "$(CURDIR)/docs/_build/html/index.html"

clean:
	rm -rf .venv .jax_cache .mypy_cache .ruff_cache .pytest_cache build dist docs/_build *.egg-info

.venv/%.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
