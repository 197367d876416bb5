"""R26 for orchestration and stepping: the seed draws all faults, then everything is well again.

Short form: 250 seeds of `p2pnet sim --scenario orchestration` (5 nodes with every role,
4 s of faults each) and a dozen of them again under another PYTHONHASHSEED. As written: 10,000
seeds of up to 8 nodes and 12 s, and 500 with the shipped membership. Each mutant is a core, or
what a shell does, with one defence taken out; seeds are played until the judge has caught it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from many_seeds import failed, play, total

from p2pnet.client.events import Deliver, Effect, StepResult
from p2pnet.client.results import Results
from p2pnet.errors import RemoteError
from p2pnet.log.history import History, check_entry
from p2pnet.orchestrator.ledger import StepLedger
from p2pnet.sim.log_client import WasRead
from p2pnet.sim.orchestrator_node import OrchestratorNode
from p2pnet.sim.scenarios.orchestration import SCENARIO
from p2pnet.vnode.tenancy_events import ReadLog

SEEDS, SEEDS_AS_WRITTEN = 250, 10_000
SHORT = ["--nodes", "5", "--option", "storm_s=4", "--option", "steps=5"]
MUTANT_SEEDS_MAX = 60


def test_r26_orchestration(scale: Any, figure: Callable[[str], None]) -> None:
    seeds, options = (SEEDS_AS_WRITTEN, []) if scale.as_written else (SEEDS, SHORT)
    reports = play("orchestration", seeds, options)
    again = play("orchestration", 12, options, first=seeds // 2, hash_seed=2)
    if scale.as_written:
        reports += play("orchestration", 500, ["--option", "gossip=1"], first=SEEDS_AS_WRITTEN)
    assert not failed(reports), failed(reports)
    traces = {report["seed"]: report["trace"] for report in reports}
    assert all(report["trace"] == traces[report["seed"]] for report in again)
    figure(
        f"{len(reports)} seeds, {total(reports, 'faults'):,.0f} faults, "
        f"{total(reports, 'claims'):,.0f} claims, {total(reports, 'commits'):,.0f} commits, "
        f"{total(reports, 'relocations'):,.0f} relocations, {total(reports, 'events'):,.0f} "
        f"events; done {max(r['figures']['done after s'] for r in reports):.0f} s after the last "
        "fault, at most"
    )
    assert total(reports, "claims") > 1.5 * len(reports), "hardly anything was taken over"


def _caught(options: dict[str, float] | None = None) -> str:
    """What the judge finds first, and all that it finds with it."""
    for seed in range(MUTANT_SEEDS_MAX):
        report = SCENARIO.play(8, seed, {"recover_s": 60.0, **(options or {})})
        if report.failures:
            return "\n".join(report.failures)
    return "nothing"


def test_r26_mutant_host_that_believes_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the caller's word that its claim is in the log."""

    def read_log(node: OrchestratorNode, wanted: ReadLog, done: WasRead) -> None:
        log = node.log_of(wanted.manifest).history
        ahead = History(log.network_id)
        ahead.extend(log.entries)
        try:
            if wanted.claim is not None:
                check_entry(wanted.claim, ahead)
                ahead.add(wanted.claim)
        except RemoteError:
            pass
        entries = tuple(ahead.entries[wanted.from_slot - 1 :])
        node.machine.after(0.0, lambda: done(entries, ""))

    monkeypatch.setattr(OrchestratorNode, "read_log", read_log)
    assert "which the log does not have" in _caught({"villains": 1.0})


def test_r26_mutant_ledger_that_decides_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = StepLedger._advance

    def hasty(ledger: StepLedger, now: float) -> Any:
        held = ledger._held.get(ledger.decided + 1, {})
        if ledger.loss in held:
            for vnode in ledger.vnodes:
                held.setdefault(vnode, held[ledger.loss])
        return advance(ledger, now)

    monkeypatch.setattr(StepLedger, "_advance", hasty)
    assert _caught() != "nothing"


def test_r26_mutant_feed_that_hands_on_a_result_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = Results.deliver

    def again(results: Results, result: StepResult, effects: list[Effect]) -> None:
        if result.step == results.delivered:
            effects.append(Deliver(result))
        else:
            deliver(results, result, effects)

    monkeypatch.setattr(Results, "deliver", again)
    assert "came after that of step" in _caught()
