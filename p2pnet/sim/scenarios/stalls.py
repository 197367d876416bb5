"""Machines stand still, clocks are wrong, messages come twice, late and again. Pure.

RELIABILITY, R9 (a share of the machines is stopped for a while, the orchestrator among
them), R10 (wrong clocks that drift and jump, and sleep) and R15 (duplicates, reordering,
replays), which differ in their options.
"""

from __future__ import annotations

from collections.abc import Mapping

from p2pnet.sim.drill import Drill
from p2pnet.sim.links import Links
from p2pnet.sim.machine import Clock
from p2pnet.sim.orchestra import Node, Orchestra
from p2pnet.sim.report import Report
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World

_BEGIN_S = 3.0
_LIMIT_S = 400.0
_LOOK_S = 0.1


class _Stalls:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        share = options["repeats"]
        links = Links(loss=0.01, duplication=share, reordering=share)
        world = self.world = World(seed, links)
        rng = self.rng = world.rng_of("stalls")
        offset_s, drift = options["offset_s"], options["drift"]
        self.orchestra = Orchestra(
            world,
            nodes,
            clock=lambda number: Clock(
                rng.uniform(-offset_s, offset_s), rng.uniform(-drift, drift)
            ),
            replays=share,
            compute_s=options["compute_s"],
        )
        self.drill = Drill(self.orchestra)
        self.dropped_s: list[float] = []
        self.job = self.orchestra.submit(steps=round(options["steps"]), vnodes=4, cut_every=3)

    def play(self, report: Report) -> None:
        """Stall after stall, then to the end."""
        self.world.run_for(_BEGIN_S)
        for _ in range(round(self.options["times"])):
            if self.options["offset_s"]:
                self._jump()
            stalled = self._stop()
            self.world.run_for(self.options["stall_s"])
            for node in stalled:
                node.machine.resume()
            self.drill.say(f"woken: {[node.machine.number for node in stalled]}")
            self._watch(stalled)
            self.world.run_for(self.options["stall_s"])
        self.drill.finish(report, _LIMIT_S)

    def _stop(self) -> list[Node]:
        nodes = self.orchestra.nodes
        stalled = self.rng.sample(nodes, round(len(nodes) * self.options["share"]))
        runs = self.orchestra.conductors(self.job)
        if stalled and runs and self.rng.random() < 0.7:
            stalled[0] = next(n for n in nodes if n.machine is runs[0].machine)
        for node in stalled:
            node.machine.pause()
        self.drill.say(f"stopped: {[node.machine.number for node in stalled]}")
        return stalled

    def _jump(self) -> None:
        node, offset_s = self.rng.choice(self.orchestra.nodes), self.options["offset_s"]
        node.machine.clock.offset_s = self.rng.uniform(-offset_s, offset_s)

    def _watch(self, woken: list[Node]) -> None:
        """How long they still run what the newest claim gives to others."""
        since = self.world.now
        waiting = dict.fromkeys(node for node in woken if self._has_lost(node))

        def look() -> None:
            for node in list(waiting):
                if not self._has_lost(node):
                    del waiting[node]
                    self.dropped_s.append(self.world.now - since)
            if waiting:
                self.world.after(_LOOK_S, look)

        look()

    def _has_lost(self, node: Node) -> bool:
        newest = max(
            (history for n in self.orchestra.nodes for history in n.keeper.histories().values()),
            key=lambda history: history.next_slot,
        )
        return any(
            newest.placement.get(vnode) != node.machine.peer_id or crew.epoch < newest.epoch
            for crew in node.host.crews.values()
            for vnode in crew.vnodes
        )


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    report = Report("stalls", nodes, seed)
    stalls = _Stalls(nodes, seed, options)
    stalls.drill.judge(report, lambda: stalls.play(report))
    stalls.drill.figures(report, log=bool(options["log"]))
    if stalls.dropped_s:
        report.figures["woken and dropped after s, at most"] = max(stalls.dropped_s)
        report.figures["woken that had to drop"] = len(stalls.dropped_s)
    return report


SCENARIO = Scenario(
    "stalls",
    "machines stand still, clocks are wrong, messages come twice and late: one history?",
    _run,
    nodes=10,
    nodes_min=5,
    nodes_max=200,
    options={
        "share": 0.2,  # of the machines, that is stopped
        "stall_s": 10.0,
        "times": 2.0,
        "offset_s": 0.0,  # how wrong a wall clock may be
        "drift": 0.0,
        "repeats": 0.0,  # the share of messages that is doubled, reordered, replayed
        "steps": 30.0,
        "compute_s": 0.05,
        "log": 0.0,
    },
)
