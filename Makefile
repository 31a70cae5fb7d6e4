# Every target does its own set-up: a virtual environment in .venv, made once and again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint dist docs clean

demo: .venv/train.stamp  ## digits-LT: one teacher, five methods, three seeds; prints a table, writes a page
	$(BIN)/python -m experiments.reproduce experiments/queues/demo.json --results=runs/demo/results

test: .venv/test.stamp  ## the fast suite, under ten minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/test.stamp .venv/docs.stamp  ## what takes minutes: kills and resumes, real data, whole runs, the site
	$(BIN)/python -m pytest -m slow

lint: .venv/test.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: .venv/test.stamp  ## the source distribution and the wheel, in dist
	$(BIN)/python -m build --no-isolation

docs: .venv/docs.stamp  ## the documentation, in docs/_build: every page's code is run; a warning is an error
	$(BIN)/sphinx-build -q -j auto -W --keep-going -b html docs docs/_build/html
	@echo "$(CURDIR)/docs/_build/html/index.html"

clean:
	rm -rf .venv .jax_cache .mypy_cache build dist docs/_build *.egg-info

.venv/%.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
