"""R19: 256 ground identities in 4 IP groups do not take a key's neighbourhood over.

Short form: 150 honest nodes, 30 reads. As written: 1,000 honest nodes, 200 reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from p2pnet.dht import lookup, routing
from p2pnet.sim.report import Report
from p2pnet.sim.scenarios.eclipse import SCENARIO

Figure = Callable[[str], None]

SEED = 7


def play(nodes: int, reads: int, figure: Figure) -> Report:
    """One run, and its figures."""
    report = SCENARIO.play(nodes, SEED, {"reads": reads})
    figure(report.text())
    return report


def test_r19(scale: Any, figure: Figure) -> None:
    report = play(1000, 200, figure) if scale.as_written else play(150, 30, figure)
    assert report.failures == []


def test_r19_mutant_whose_table_takes_any_number_of_a_group(
    monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    monkeypatch.setattr(routing, "GROUP_TABLE_MAX", 1000)
    failures = play(150, 5, figure).failures
    assert any("crowds a table" in failure for failure in failures)
    assert any("honest" in failure for failure in failures)


def test_r19_mutant_whose_lookups_count_any_number_of_a_group(
    monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    monkeypatch.setattr(lookup, "GROUP_NEAREST_MAX", 1000)
    monkeypatch.setattr(lookup.Lookup, "_diverse", lambda self, n: self._nearest())
    failures = play(150, 30, figure).failures
    assert any("could read the key" in failure for failure in failures)
