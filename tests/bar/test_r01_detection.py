"""R1: whoever dies is missed by everybody, soon.

Short form: 32 nodes with 1 % loss, of which 4 die at once, two that vanish and two that
are killed. As written: 32, 1,000 and 10,000 nodes (the last two take minutes and hours), and
32 real processes (3.5 GB), of which two are killed and two stopped (rig P). The mutant
never suspects whoever is silent.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cluster.swarm import Node, Swarm, until

from p2pnet.gossip.probing import Watch
from p2pnet.sim.report import Report, quantile
from p2pnet.sim.scenarios.detection import SCENARIO

if TYPE_CHECKING:
    from conftest import Scale

SEED = 7
# p50 and p99 in probe intervals, which are seconds.
LIMITS = {32: (10.0, 15.0), 1000: (16.0, 25.0), 10_000: (20.0, 30.0)}


def judge(report: Report) -> list[str]:
    p50_s, p99_s = LIMITS[report.nodes]
    too_late = [
        f"{kind} {name}: {took} s"
        for kind in ("vanished", "killed")
        for name, limit_s in (("p50_s", p50_s), ("p99_s", p99_s))
        if not (took := float(report.figures[f"{kind} {name}"])) <= limit_s
    ]
    return report.failures + too_late


def failed(node: Node) -> set[str]:
    """Whom `p2pnet members` shows as failed."""
    return {row["peer_id"] for row in node.client.members() if row["state"] == "failed"}


def test_r01(scale: Scale, figure: Callable[[str], None]) -> None:
    for nodes in LIMITS if scale.as_written else (32,):
        report = SCENARIO.play(nodes, SEED)
        figure(report.text())
        assert judge(report) == []


def test_r01_of_real_processes(scale: Scale, figure: Callable[[str], None], tmp_path: Path) -> None:
    if not scale.as_written:
        pytest.skip("32 processes: only as written")
    with Swarm(tmp_path) as swarm:
        nodes = swarm.grow(32)
        dead, survivors = nodes[10:14], nodes[:10] + nodes[14:]
        for number in (signal.SIGKILL, signal.SIGSTOP):
            victims, dead = dead[:2], dead[2:]
            at = max(victim.kill(number) for victim in victims)
            gone = {victim.peer_id for victim in victims}
            took_s: dict[str, float] = {}

            def all_know(
                gone: set[str] = gone, at: float = at, took: dict[str, float] = took_s
            ) -> bool:
                for node in survivors:
                    if node.peer_id not in took and gone <= failed(node):
                        took[node.peer_id] = time.monotonic() - at
                return len(took) == len(survivors)

            until(all_know, LIMITS[32][1], f"all of {len(survivors)} know")
            figure(f"{number.name}: p50 {quantile(list(took_s.values()), 0.5):.1f} s")
            assert quantile(list(took_s.values()), 0.5) <= LIMITS[32][0]


def test_r01_mutant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "silent", lambda *_: False)
    assert judge(SCENARIO.play(32, SEED, {"limit_s": 16})) != []
