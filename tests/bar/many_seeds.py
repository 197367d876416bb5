"""Many seeds of a scenario, in as many processes as there are cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def _start(
    scenario: str, first: int, count: int, hash_seed: int, options: Sequence[str]
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "p2pnet", "sim", "--scenario", scenario, "--json"]
    command += ["--seed", str(first), "--seeds", str(count), *options]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def play(
    scenario: str, seeds: int, options: Sequence[str] = (), *, first: int = 0, hash_seed: int = 1
) -> list[dict[str, Any]]:
    """The report of each seed from `first` on."""
    cores = os.cpu_count() or 1
    share = -(-seeds // cores)
    started = [
        _start(scenario, first + at, min(share, seeds - at), hash_seed, options)
        for at in range(0, seeds, share)
    ]
    try:
        outputs = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    reports = [json.loads(line) for output in outputs for line in output.splitlines()]
    assert [report["seed"] for report in reports] == list(range(first, first + seeds))
    return reports


def failed(reports: Sequence[dict[str, Any]]) -> str:
    """What went wrong, each with the command that shows it again; empty: nothing."""
    return "\n".join(
        f"{report['replay']}: {report['failures']}" for report in reports if report["failures"]
    )


def total(reports: Sequence[dict[str, Any]], name: str) -> float:
    """The sum of a figure."""
    return float(sum(report["figures"].get(name, 0) for report in reports))


def values(reports: Sequence[dict[str, Any]], name: str) -> list[float]:
    """All values of a series."""
    return [float(value) for report in reports for value in report["series"].get(name, [])]
