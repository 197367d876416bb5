"""R20: colluders accuse, resurrect and impersonate; nobody who is here is evicted.

Short form: 40 honest nodes and 30 colluders of 5 IP groups, who stand right behind three
victims on the ring, for 3 s (540 accusations). As written: 1,000 honest nodes, 60 s,
from 2 groups (fewer than a quorum) and from 5 (more). The mutant leaves the convicted no
time to refute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from p2pnet.gossip.verdicts import Judge
from p2pnet.sim.scenarios.accusers import SCENARIO

if TYPE_CHECKING:
    from conftest import Scale

SEED = 7
SHORT = {"lasts_s": 3.0}


def test_r20(scale: Scale, figure: Callable[[str], None]) -> None:
    if not scale.as_written:
        assert SCENARIO.play(40, SEED, SHORT).failures == []
        return
    for groups in (2.0, 5.0):
        report = SCENARIO.play(1000, SEED, {"lasts_s": 60.0, "groups": groups})
        figure(report.text())
        assert report.failures == []


def test_r20_mutant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "window_s", lambda _: 0.0)
    assert SCENARIO.play(40, SEED, SHORT).failures != []
