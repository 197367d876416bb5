"""R7: two orchestrators race for one network, and the log decides.

Half the seeds submit it to two nodes at once, the other half kill its orchestrator while
most take most for dead. Short form: 300 seeds. As written: 10,000.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from many_seeds import failed, play, total

from p2pnet.log.keeper import Keeper
from p2pnet.log.proposer import Proposer
from p2pnet.sim.scenarios.log import SCENARIO as LOG
from p2pnet.v1 import log_pb2

MUTANT_SEEDS_MAX = 60


def test_r07(scale: Any, figure: Callable[[str], None]) -> None:
    reports = play("race", 10_000 if scale.as_written else 300)
    assert not failed(reports), failed(reports)
    figure(
        f"{len(reports)} races, {total(reports, 'claims'):,.0f} claims, "
        f"{total(reports, 'commits'):,.0f} commits, "
        f"{total(reports, 'relocations'):,.0f} relocations"
    )
    assert total(reports, "claims") > 1.2 * len(reports), "hardly anybody raced"


def test_r07_keepers_that_die(scale: Any, figure: Callable[[str], None]) -> None:
    """The same for the log alone, while its keepers die, come back and are replaced."""
    reports = play("log", 5_000 if scale.as_written else 120)
    assert not failed(reports), failed(reports)
    figure(
        f"{len(reports)} seeds, {total(reports, 'entries tried'):,.0f} entries tried, "
        f"{total(reports, 'entries acknowledged'):,.0f} acknowledged, none lost"
    )


def test_r07_mutant_keeper_that_forgets_at_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Keeper.load.__func__  # type: ignore[attr-defined]

    def forgets(cls: type[Keeper], key: Any, records: Any, *grants: Any) -> Keeper:
        decided = {
            at: data
            for at, data in records.items()
            if log_pb2.PrepareReply.FromString(data).decided
        }
        keeper: Keeper = load(cls, key, decided, *grants)
        return keeper

    monkeypatch.setattr(Keeper, "load", classmethod(forgets))
    assert "two entries were decided" in _first_failure()


def test_r07_mutant_proposer_that_does_not_mind_what_was_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It proposes its own entry where it has to finish another's."""
    prepared = Proposer._on_prepare

    def selfish(core: Proposer, keeper: str, request: Any, reply: Any, now: float) -> Any:
        blank = log_pb2.PrepareReply()
        blank.CopyFrom(reply)
        if not reply.decided:
            blank.ClearField("accepted")
            blank.ClearField("entry")
        return prepared(core, keeper, request, blank, now)

    monkeypatch.setattr(Proposer, "_on_prepare", selfish)
    assert "two entries were decided" in _first_failure()


def _first_failure() -> str:
    for seed in range(MUTANT_SEEDS_MAX):
        failures = LOG.play(LOG.nodes, seed).failures
        if failures:
            return "\n".join(failures)
    return "nothing"
