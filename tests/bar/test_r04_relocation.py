"""R4: 10 of 32 nodes are killed while two jobs train, 10 more 30 T later, the first 10 return.

Short form: 4 seeds. As written: 20 seeds, and 5 with the shipped membership. Whoever keeps
a log stays in the majority, and of the five holders of a committed state one stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from many_seeds import failed, play, total, values

from p2pnet.orchestrator.messages import MakePlan, Planned
from p2pnet.orchestrator.planning import Planning
from p2pnet.sim.report import quantile
from p2pnet.sim.scenarios.relocation import SCENARIO

SHORT = ["--option", "steps=40"]


def test_r04(scale: Any, figure: Callable[[str], None]) -> None:
    reports = play("relocation", 20) if scale.as_written else play("relocation", 4, SHORT)
    if scale.as_written:
        reports += play("relocation", 5, ["--option", "gossip=1"], first=100)
    assert not failed(reports), failed(reports)
    took_s = values(reports, "relocation s")
    assert took_s, "nothing was lost"
    assert quantile(took_s, 0.5) <= 10.0
    assert quantile(took_s, 0.99) <= 20.0
    figure(
        f"{len(reports)} seeds, {total(reports, 'jobs'):.0f} jobs, all done; {len(took_s)} VNodes "
        f"lost their host: p50 {quantile(took_s, 0.5):.1f} s, p99 {quantile(took_s, 0.99):.1f} s "
        f"to the next step; takeover p50 {quantile(values(reports, 'takeover s'), 0.5):.1f} s"
    )


def test_r04_mutant_that_leaves_vnodes_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = Planning.plan

    def stays(planning: Planning, request: MakePlan, hosts: Any, now: float) -> Planned:
        if request.current:
            return Planned(request.purpose, dict(request.current))
        return planned(planning, request, hosts, now)

    monkeypatch.setattr(Planning, "plan", stays)
    report = SCENARIO.play(32, 0, {"steps": 60.0, "limit_s": 20.0})
    assert any("not done" in failure for failure in report.failures)
