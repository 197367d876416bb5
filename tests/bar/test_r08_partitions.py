"""R8: a swarm that trains falls apart for 60 T and comes together again.

Two halves, one alone (the orchestrator), a ring in which each hears only its neighbours,
a half that does not hear the other, and two hosts that do not reach each other though all
others reach both. At most one side commits, one view is there within
30 T, and the job is done. Short form: 16 nodes, each kind once, 30 T. As written: 32 nodes,
60 T, 20 seeds of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from many_seeds import failed, play, total

from p2pnet.log import keeper, proof, proposer, reader
from p2pnet.sim.scenarios.partition import SCENARIO

KINDS = ("two halves", "one alone", "a ring", "a deaf half", "two hosts apart")
SHORT = ["--nodes", "16", "--option", "apart_s=30", "--option", "steps=30"]


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_r08(kind: int, scale: Any, figure: Callable[[str], None]) -> None:
    seeds, options = (20, []) if scale.as_written else (2, SHORT)
    reports = play("partition", seeds, [*options, "--option", f"kind={kind}"])
    assert not failed(reports), failed(reports)
    views = [report["figures"]["one view after s"] for report in reports]
    figure(
        f"{KINDS[kind]}: {seeds} seeds, {total(reports, 'claims'):.0f} claims, one view after "
        f"{max(views):.1f} s at most"
    )


def test_r08_mutant_for_whom_one_keeper_is_a_majority(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (proof, proposer, reader, keeper):
        if hasattr(module, "majority"):
            monkeypatch.setattr(module, "majority", lambda keepers: 1)
    failures: list[str] = []
    for seed in range(6):
        failures += SCENARIO.play(
            16, seed, {"apart_s": 30.0, "steps": 20.0, "kind": float(seed % 2)}
        ).failures
    assert any("decided for slot" in failure or "both sides" in failure for failure in failures)
