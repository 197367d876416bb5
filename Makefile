# make demo    the main job: a swarm trains a network and survives two kills
# make test    lint, types, layers and every test
# Each works on a fresh clone: .venv is made first. `make clean` takes it away.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint unit clean setup

demo: $(READY)
	@$(BIN)/p2pnet demo $(ARGS)

test: lint unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tests/wire/breaking.py

unit: $(READY)
	$(BIN)/pytest $(ARGS)

setup: $(READY)

# torch goes in first and alone: any other version than the pinned one may bring
# gigabytes of GPU libraries along.
$(READY): pyproject.toml constraints.txt setup.py bootstrap_peers.txt $(wildcard proto/p2pnet/v1/*.proto)
	@PYTHON="$(PYTHON)" sh tools/check-prerequisites.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist p2pnet.egg-info p2pnet/v1 p2pnet/bootstrap_peers.txt .mypy_cache .pytest_cache .ruff_cache .hypothesis
