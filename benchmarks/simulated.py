"""What grows with the network, from the simulator: `p2pnet sim` runs the shipped cores."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.systems import ROOT

NODES = (100, 1000, 10_000)
_SEED = 7
_PLAY_S = 3600.0
# By scenario and number of nodes: figures, or why there are none.
Played = dict[str, dict[int, dict[str, float] | str]]


@dataclass(frozen=True)
class Play:
    """A scenario, and the figures of its report that are shown.

    `nodes_max`: beyond, it takes many minutes.
    """

    scenario: str
    options: tuple[str, ...]
    figures: tuple[str, ...]
    nodes_max: int = 10_000


PLAYS = (
    Play(
        "lookups",
        ("lookups=200", "silent=0", "accomplices=0", "inventors=0"),
        ("hops p50", "hops p99", "requests p50", "requests p99"),
    ),
    # Every member hears of everybody, so that a run costs the square of the nodes: only
    # as long as it takes to see what members say when nothing happens.
    Play("detection", ("dead=2", "limit_s=0.1"), ("idle bytes/s a node",), 1000),
)


def play(one: Play, nodes: int) -> dict[str, float] | str:
    """The figures, or why there are none."""
    command = [sys.executable, "-m", "p2pnet", "sim", "--json"]
    command += ["--scenario", one.scenario, "--nodes", str(nodes), "--seed", str(_SEED)]
    for option in one.options:
        command += ["--option", option]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=_PLAY_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not within {_PLAY_S:.0f} s"
    try:
        figures: dict[str, float] = json.loads(done.stdout)["figures"]
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or ["no report"])[-1]
    return {name: figures[name] for name in one.figures if name in figures}


def play_all(sizes: Sequence[int], *, long: bool) -> Played:
    """All of PLAYS; what takes many minutes only if `long`."""
    return {
        one.scenario: {
            nodes: play(one, nodes) if long or nodes <= one.nodes_max else "with --long"
            for nodes in sizes
        }
        for one in PLAYS
    }
