"""R5, its lookups: while a part of all nodes comes and goes, the others are found.

Short form: 30 nodes, half of which have sessions of 40 s, for 40 s. As written: 200 nodes,
20 % of which have sessions of 10 min, for 2 h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from p2pnet.dht.local import Local
from p2pnet.sim.report import Report
from p2pnet.sim.scenarios.churn import SCENARIO

Figure = Callable[[str], None]

SEED = 7
SHORT = {"duration_s": 40.0, "session_s": 40.0, "off_s": 15.0, "churning": 0.5}
AS_WRITTEN = {"duration_s": 7200.0, "session_s": 600.0, "off_s": 60.0, "churning": 0.2}


def lookups_found(report: Report) -> float:
    """What R5 asks of lookups: at least 0.99."""
    return float(report.figures["which found it"])


def test_r05(scale: Any, figure: Figure) -> None:
    nodes, options = (200, AS_WRITTEN) if scale.as_written else (30, SHORT)
    report = SCENARIO.play(nodes, SEED, options)
    figure(report.text())
    assert report.figures["lookups of a peer"]
    assert lookups_found(report) >= 0.99


def test_r05_mutant_that_never_hears_of_new_neighbours(
    monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    """Whoever believes no hints, and takes in nobody whom it meets, soon knows only the dead."""
    monkeypatch.setattr("p2pnet.dht.core.Kademlia.wants", lambda self, peer_id: False)
    monkeypatch.setattr(Local, "hints", lambda self, peers, now: [])
    report = SCENARIO.play(30, SEED, SHORT)
    figure(report.text())
    assert lookups_found(report) < 0.99
