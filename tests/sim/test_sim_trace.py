"""The same seed is the same run: in one process, in several, whatever PYTHONHASHSEED."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2pnet.sim.scenarios import SCENARIOS

COMMANDS = {
    "swarm": ["--scenario", "swarm", "--nodes", "12", "--seed", "5"],
    "churn": ["--scenario", "churn", "--nodes", "12", "--seed", "5", "--option", "duration_s=10"],
}


def _trace(arguments: list[str], hash_seed: str) -> str:
    output = subprocess.run(
        [sys.executable, "-m", "p2pnet", "sim", "--json", *arguments],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    ).stdout
    trace: str = json.loads(output)["trace"]
    return trace


@pytest.mark.parametrize("name", COMMANDS)
def test_the_trace_does_not_depend_on_the_hash_seed(name: str) -> None:
    assert _trace(COMMANDS[name], "1") == _trace(COMMANDS[name], "2")


def test_the_trace_depends_on_the_seed_and_not_on_what_ran_before() -> None:
    swarm = SCENARIOS["swarm"]
    first, other, again = (swarm.play(8, seed).trace for seed in (1, 2, 1))
    assert first == again != other


def test_every_scenario_is_listed_under_its_own_name() -> None:
    here = Path(sys.modules[SCENARIOS["swarm"].run.__module__].__file__ or "").parent
    modules = {path.stem for path in here.glob("*.py")} - {"__init__"}
    assert {name: scenario.name for name, scenario in SCENARIOS.items()} == {n: n for n in modules}
