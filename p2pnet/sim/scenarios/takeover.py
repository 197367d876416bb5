"""An orchestrator dies before or after any thing that it does (RELIABILITY, R6). Pure.

One run for each effect that the conductor of an undisturbed run has, and for each of
before and after it: with kill -9, and with a pulled plug.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from p2pnet.orchestrator import messages as m
from p2pnet.sim.drill import Drill
from p2pnet.sim.orchestra import Orchestra
from p2pnet.sim.orchestrator_node import OrchestratorNode
from p2pnet.sim.report import Report
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World

_LATE_S = (1.0, 6.0)  # after how long the membership tells of a death
_LOOK_S = 0.5  # in which it looks
_TAKEOVER_S = 10.0  # what R6 asks of it, after the end of the lease
_LIMIT_S = 120.0


@dataclass
class _Run:
    drill: Drill
    points: int  # effects that were carried out, or were about to be
    died: str  # at which, and when


def _play(
    report: Report, nodes: int, seed: int, options: Mapping[str, float], point: int, *, after: bool
) -> _Run:
    orchestra = Orchestra(World(seed), nodes, late_s=_LATE_S)
    drill = Drill(orchestra)
    points, died = 0, ""

    def crash(node: OrchestratorNode, effect: m.Effect, done: bool) -> None:
        nonlocal points, died
        if done is not after:
            return
        points += 1
        if points - 1 == point and not died:
            died = f"{'after' if after else 'before'} effect {point}, {type(effect).__name__}"
            drill.say(f"dies {died}")
            owner = next(n for n in orchestra.nodes if n.orchestrator is node)
            drill.lost(owner)
            (node.machine.vanish if point % 3 == 2 else node.machine.kill)()
            if options["back_s"]:
                orchestra.world.after(options["back_s"], node.machine.restart)

    for node in orchestra.nodes:
        node.orchestrator.crash_point = crash
    orchestra.submit(steps=round(options["steps"]), cut_every=2)
    before = len(report.failures)
    drill.judge(report, lambda: _finish(drill, report))
    for took_s in drill.takeover_s:
        limit_s = _LATE_S[1] + _LOOK_S + _TAKEOVER_S
        report.expect(took_s <= limit_s, f"taken over {took_s:.1f} s after the death")
    report.failures[before:] = [
        f"{died}: {failure} (--option point={point} --option after={after:d})"
        for failure in report.failures[before:]
    ]
    return _Run(drill, points, died)


def _finish(drill: Drill, report: Report) -> None:
    drill.finish(report, _LIMIT_S)


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    report = Report("takeover", nodes, seed)
    if options["point"] >= 0:
        one = _play(
            report, nodes, seed, options, round(options["point"]), after=bool(options["after"])
        )
        one.drill.figures(report, log=bool(options["log"]))
        return report
    quiet = _play(report, nodes, seed, options, -1, after=False)
    took_s: list[float] = []
    runs = 0
    for point in range(quiet.points):
        for after in (False, True):
            run = _play(report, nodes, seed, options, point, after=after)
            took_s += run.drill.takeover_s
            runs += 1
    quiet.drill.takeover_s = took_s
    quiet.drill.figures(report, log=bool(options["log"]))
    report.figures["crash points"] = quiet.points
    report.figures["runs"] = runs
    return report


SCENARIO = Scenario(
    "takeover",
    "an orchestrator dies before and after every thing that it does: is it taken over?",
    _run,
    nodes=6,
    nodes_min=4,
    nodes_max=64,
    options={
        "steps": 4.0,
        "point": -1.0,  # at which effect it dies; -1: at each, in a run of its own
        "after": 0.0,  # 1: after it, 0: before
        "back_s": 0.0,  # it comes back so long after; 0: never
        "log": 0.0,
    },
)
