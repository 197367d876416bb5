"""R18: with 20 % adversaries lookups find what brute force finds, and clean ones stay cheap.

Short form: 1,000 nodes, 40 lookups each: clean, all kinds of liars, and only inventors. As
written: 1,000 and 10,000 nodes, 500 lookups each, every kind of liar by itself too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from p2pnet.dht import lookup
from p2pnet.sim.report import Report
from p2pnet.sim.scenarios.lookups import SCENARIO

Figure = Callable[[str], None]

SEED = 7
CLEAN = {"silent": 0.0, "accomplices": 0.0, "inventors": 0.0}
MIXED = {"silent": 0.07, "accomplices": 0.07, "inventors": 0.06}
ALONE = [CLEAN | {kind: 0.2} for kind in CLEAN]
INVENTORS = ALONE[2]


def play(nodes: int, lookups: int, liars: Mapping[str, float], figure: Figure) -> Report:
    """One run, and its figures."""
    report = SCENARIO.play(nodes, SEED, {"lookups": lookups, **liars})
    figure(report.text())
    return report


@pytest.mark.parametrize("liars", [CLEAN, MIXED, INVENTORS], ids=["clean", "mixed", "inventors"])
def test_r18(liars: Mapping[str, float], scale: Any, figure: Figure) -> None:
    sizes = [(1000, 500), (10_000, 500)] if scale.as_written else [(1000, 40)]
    for nodes, lookups in sizes:
        assert play(nodes, lookups, liars, figure).failures == []


@pytest.mark.parametrize("liars", ALONE[:2], ids=list(CLEAN)[:2])
def test_r18_one_kind_of_liar(liars: Mapping[str, float], scale: Any, figure: Figure) -> None:
    sizes = [(1000, 500), (10_000, 500)] if scale.as_written else [(200, 30)]
    for nodes, lookups in sizes:
        assert play(nodes, lookups, liars, figure).failures == []


def test_r18_mutant_that_believes_whoever_names_peers_that_do_not_exist(
    monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    monkeypatch.setattr(lookup, "_CREDIT", 1_000_000)
    report = play(1000, 40, INVENTORS, figure)
    assert any("were right" in failure for failure in report.failures)


def test_r18_mutant_that_is_content_with_the_first_answers(
    monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    monkeypatch.setattr("p2pnet.dht.searches.K", 3)
    assert play(200, 30, CLEAN, figure).failures
