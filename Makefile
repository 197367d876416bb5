# make demo    the main job: a swarm trains a network and survives three kills
# make test    lint, types, layers and every test
# make bar     the reliability bar as written (docs/reliability.md): hours; ARGS='-k r18' for a row
# make bench   beside hivemind and py-libp2p (docs/benchmarks.md, performance.md); ARGS=--quick
# Each works on a fresh clone: .venv is made first. `make clean` takes it away.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint unit bar bench clean setup

demo: $(READY)
	@$(BIN)/p2pnet demo $(ARGS)

test: lint unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tests/wire/breaking.py

# What runs in virtual time or by itself goes two at a time; what starts processes and
# has them meet deadlines comes after it, alone.
PROCESSES := tests/cluster tests/interop tests/packaging

unit: $(READY) $(BIN)/p2pd
ifdef ARGS
	$(BIN)/pytest $(ARGS)
else
	$(BIN)/pytest -n 2 --dist loadfile $(PROCESSES:%=--ignore=%)
	$(BIN)/pytest $(PROCESSES)
endif

# A Go libp2p daemon for tests/interop, which are skipped where it cannot be had.
$(BIN)/p2pd: | $(READY)
	@$(BIN)/python tools/fetch_p2pd.py $@

bar: $(READY)
	$(BIN)/pytest tests/bar --as-written -s $(ARGS)

bench: $(READY)
	@$(BIN)/python -m benchmarks $(ARGS)

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
	rm -rf $(VENV) $(VENV)-hivemind build dist p2pnet.egg-info p2pnet/v1 p2pnet/bootstrap_peers.txt .mypy_cache .pytest_cache .ruff_cache .hypothesis
