"""R3: one change reaches everybody soon, and costs few bytes.

Short form: 200 nodes with 5 % loss, watched for 5 s, within which all know; at most 5 kB
a node a second. As written: 10,000 nodes, 20 s, 10 kB. One mutant passes no news on, the
other compares no digests and tells everything at each exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from p2pnet.gossip.packing import Packer
from p2pnet.sim.report import Report
from p2pnet.sim.scenarios.spread import SCENARIO

if TYPE_CHECKING:
    from conftest import Scale

SEED = 7
SHORT = {"watched_s": 5.0}
SHORT_BYTES = 5_000
BYTES = 10_000
SOON_S = 20.0


def judge(report: Report, bytes_max: int) -> list[str]:
    failures = list(report.failures)
    if not float(report.figures["all know after_s"]) <= SOON_S:
        failures.append("not all know in time")
    if float(report.figures["bytes/s a node"]) > bytes_max:
        failures.append(f"{report.figures['bytes/s a node']} bytes a second")
    return failures


def test_r03(scale: Scale, figure: Callable[[str], None]) -> None:
    nodes, options = (10_000, {}) if scale.as_written else (200, SHORT)
    report = SCENARIO.play(nodes, SEED, options)
    figure(report.text())
    assert judge(report, BYTES if scale.as_written else SHORT_BYTES) == []


@pytest.mark.parametrize(
    ("method", "instead"),
    [("spread", lambda *_: None), ("_alike", lambda *_: False)],
    ids=["no news", "no digests"],
)
def test_r03_mutant(
    method: str, instead: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Packer, method, instead)
    assert judge(SCENARIO.play(200, SEED, SHORT), SHORT_BYTES) != []
