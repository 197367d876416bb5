"""R5, its jobs: while a part of all nodes comes and goes, jobs are done in time.

Short form: 20 nodes, a quarter of which have sessions of 40 s, for 90 s. As written: 200
nodes, 20 % of which have sessions of 10 min, for 2 h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from p2pnet.sim.orchestrator_node import OrchestratorNode
from p2pnet.sim.scenarios.jobs import SCENARIO

SEED = 3
SHORT = {
    "duration_s": 90.0,
    "every_s": 20.0,
    "steps": 30.0,
    "churning": 0.25,
    "session_s": 40.0,
    "off_s": 20.0,
}
AS_WRITTEN = {
    "duration_s": 7200.0,
    "every_s": 120.0,
    "steps": 300.0,
    "churning": 0.2,
    "session_s": 600.0,
    "off_s": 60.0,
}


def test_r05_jobs(scale: Any, figure: Callable[[str], None]) -> None:
    nodes, options = (200, AS_WRITTEN) if scale.as_written else (20, SHORT)
    report = SCENARIO.play(nodes, SEED, options)
    figure(report.text())
    assert not report.failures, report.failures
    assert report.figures["sessions that ended"]
    assert float(report.figures["in twice its time"]) >= 0.99


def test_r05_mutant_without_successors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrchestratorNode, "_take_over", lambda *_: None)
    report = SCENARIO.play(20, SEED, {**SHORT, "churning": 0.8})
    assert any("not done" in failure for failure in report.failures)
