"""R6: an orchestrator dies before and after each thing that it does, and is taken over.

Every effect of the conductor of an undisturbed run (claim, allocations, records, heartbeats,
cuts, commits, words to the feeder) is a crash point, before it and after it; the machine
dies by kill -9, at every third point silently. Short form: 2 seeds, 2 steps. As written:
20 seeds, 4 steps, and again with the dead one coming back after 3 s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from many_seeds import failed, play, total, values

from p2pnet.sim import host_node
from p2pnet.sim.orchestrator_node import OrchestratorNode
from p2pnet.sim.report import quantile
from p2pnet.sim.scenarios.takeover import SCENARIO

SHORT = ["--option", "steps=2", "--nodes", "5"]


def test_r06(scale: Any, figure: Callable[[str], None]) -> None:
    reports = play("takeover", 20) if scale.as_written else play("takeover", 2, SHORT)
    if scale.as_written:
        reports += play("takeover", 5, ["--option", "back_s=3"], first=50)
    assert not failed(reports), failed(reports)
    took_s = values(reports, "takeover s")
    assert took_s, "nobody was taken over"
    figure(
        f"{total(reports, 'runs'):.0f} runs; from death to the successor's claim p50 "
        f"{quantile(took_s, 0.5):.1f} s, p99 {quantile(took_s, 0.99):.1f} s, of which the "
        "membership takes 1 to 6.5"
    )


def test_r06_mutant_without_successors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrchestratorNode, "_take_over", lambda *_: None)
    report = SCENARIO.play(5, 0, {"steps": 2.0, "point": 12.0})
    assert any("not done" in failure for failure in report.failures)


def test_r06_mutant_that_goes_on_from_the_states_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """VNodes that do not go back to the committed cut apply steps that nobody committed."""
    left: dict[tuple[str, str, str], bytes] = {}
    end, load = host_node.HostNode._end, host_node.HostNode.load

    def keeps(node: host_node.HostNode, network_id: str, keep: bool) -> None:
        for network, crew in node.crews.items():
            if crew._hosted is not None and not crew._hosted._held:
                for vnode, state in crew._hosted.states.items():
                    left[node.peer_id, network, vnode] = state
        end(node, network_id, keep)

    def loads(node: host_node.HostNode, crew: Any, vnode: str, done: Any) -> None:
        state = left.get((node.peer_id, crew.network_id, vnode))
        if state is not None:
            done(state, "")
        else:
            load(node, crew, vnode, done)

    monkeypatch.setattr(host_node.HostNode, "_end", keeps)
    monkeypatch.setattr(host_node.HostNode, "load", loads)
    failures: list[str] = []
    for point in range(14, 40):
        failures += SCENARIO.play(5, 0, {"steps": 4.0, "point": float(point)}).failures
        if failures:
            break
    assert any("each once and in order" in failure for failure in failures)
