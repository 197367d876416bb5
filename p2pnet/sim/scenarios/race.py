"""Two orchestrators race for one network (RELIABILITY, R7). Pure.

Either it was submitted to both at once, or its orchestrator dies and two who each take
the other for dead take it over. The log decides.
"""

from __future__ import annotations

from collections.abc import Mapping

from p2pnet.sim.drill import Drill
from p2pnet.sim.faults import any_clock, any_links
from p2pnet.sim.orchestra import Job, Orchestra
from p2pnet.sim.report import Report
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World

_LEASES_S = 20.0  # two of them: within this one has won
_LIMIT_S = 120.0
_MOVES_MAX = 2  # of one VNode


class _Race:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        world = self.world = World(seed)
        rng = self.rng = world.rng_of("race")
        world.links = any_links(rng)
        world.links.rng = world.rng_of("links")
        wrong = rng.random() < 0.5
        self.orchestra = Orchestra(
            world,
            nodes,
            clock=lambda number: any_clock(rng, wrong=wrong),
            late_s=(0.2, 3.0),
            resubmit_s=2.0,
        )
        self.drill = Drill(self.orchestra)
        self.submitted_twice = rng.random() < 0.5
        self.racers: tuple[int, ...] = (0, 1) if self.submitted_twice else (0,)
        self.job: Job = self.orchestra.submit(
            steps=round(options["steps"]), cut_every=2, orchestrators=self.racers
        )

    def play(self, report: Report) -> None:
        """The race, and the run to its end."""
        rng, nodes = self.rng, self.orchestra.nodes
        if rng.random() < 0.5:  # the two do not hear each other, or not both ways
            one, other = nodes[0].machine, nodes[1].machine
            self.world.links.cut(one, other, both_ways=rng.random() < 0.5)
            self.world.after(rng.uniform(0.5, 6.0), self.world.links.mend, one, other)
        if not self.submitted_twice:
            self.world.run_for(rng.uniform(0.5, 4.0))
            assert self.orchestra.oracle is not None
            views = self.orchestra.oracle.views
            for node in nodes:  # most take most for dead: all think that it is their turn
                for other_node in nodes:
                    if other_node is not node and rng.random() < 0.6:
                        views[node.machine.number].set(other_node.machine.peer_id, False)
            if rng.random() < 0.7:
                self.drill.kill(nodes[0])
        began_s = self.world.now
        self.world.run(
            lambda: self.job.done or self.world.now > began_s + _LEASES_S, _LIMIT_S, every_s=0.2
        )
        busy = [run for run in self.orchestra.conductors(self.job) if run.ready]
        newest = max((run.core.epoch for run in busy), default=0)
        report.expect(
            sum(run.core.epoch == newest for run in busy) <= 1 and (self.job.done or bool(busy)),
            f"{_LEASES_S:g} s later nobody has won",
        )
        self.drill.finish(report, _LIMIT_S)
        for vnode, times in self.job.relocated.items():
            report.expect(times <= self.moves_max, f"{vnode} was moved {times} times")

    @property
    def moves_max(self) -> int:
        """One more where a host has died."""
        return _MOVES_MAX + (not self.submitted_twice)


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    report = Report("race", nodes, seed)
    race = _Race(nodes, seed, options)
    race.drill.judge(report, lambda: race.play(report))
    race.drill.figures(report, log=bool(options["log"]))
    return report


SCENARIO = Scenario(
    "race",
    "two orchestrators race for one network: does one win, and only one?",
    _run,
    nodes=5,
    nodes_min=4,
    nodes_max=64,
    options={"steps": 4.0, "log": 0.0},
)
