"""A swarm that trains falls apart, and comes together again (RELIABILITY, R8). Pure.

`kind` 0: two halves; 1: one alone against all others, the one being the orchestrator;
2: a ring, in which each hears only its two neighbours; 3: one half is not heard by the other;
4: two hosts of the network do not reach each other, though everybody else reaches both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from p2pnet.sim.drill import Drill
from p2pnet.sim.links import Links
from p2pnet.sim.machine import Machine
from p2pnet.sim.orchestra import Orchestra
from p2pnet.sim.report import Report
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World

_BEGIN_S = 3.0
_ONE_VIEW_S = 30.0
_LIMIT_S = 300.0
_HALVES, _ALONE, _RING, _DEAF, _PAIR = range(5)


class _Partition:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        self.world = World(seed, Links(loss=0.01))
        self.rng = self.world.rng_of("partition")
        self.orchestra = Orchestra(
            self.world, nodes, gossip=bool(options["gossip"]), compute_s=options["compute_s"]
        )
        self.drill = Drill(self.orchestra)
        self.job = self.orchestra.submit(steps=round(options["steps"]), vnodes=4, cut_every=3)

    def play(self, report: Report) -> None:
        """Apart, together, and to the end."""
        self.world.run_for(_BEGIN_S)
        sides = self._apart(round(self.options["kind"]))
        began_s = self.world.now
        self.world.run_for(self.options["apart_s"])
        if round(self.options["kind"]) == _PAIR:
            commits = [at for at, _, _ in self.drill.committed if at > began_s + 1.0]
            report.expect(bool(commits), "two hosts do not reach each other, and nothing goes on")
        writers = {who for at, who, _ in self.drill.committed if at > began_s + 1.0}
        if sides:
            wrote = [side for side in sides if any(m.number in writers for m in side)]
            report.expect(len(wrote) <= 1, "both sides of a partition have committed")
        self.world.links.heal()
        self.drill.say("healed")
        took_s = self.world.run(self._one_view, _ONE_VIEW_S, every_s=0.2)
        report.expect(took_s is not None, f"{_ONE_VIEW_S:g} s after the heal two orchestrate")
        report.figures["one view after s"] = took_s if took_s is not None else -1.0
        done_s = self.drill.finish(report, _LIMIT_S)
        report.figures["done after s"] = done_s if done_s is not None else -1.0

    def _one_view(self) -> bool:
        """One orchestrates; whoever still believes to is at the same epoch, so there is none."""
        runs = self.orchestra.conductors(self.job)
        return self.job.done or (len(runs) == 1 and runs[0].ready)

    def _apart(self, kind: int) -> list[Sequence[Machine]]:
        links, machines = self.world.links, [node.machine for node in self.orchestra.nodes]
        if kind == _PAIR:
            return self._part_a_pair()
        feeder = self.job.feeder.machine
        first = [run.machine for run in self.orchestra.conductors(self.job)][:1]
        shuffled = self.rng.sample(machines, len(machines))
        half = len(machines) // 2
        match kind:
            case 0 | 3:
                one, other = shuffled[:half], [*shuffled[half:], feeder]
            case 1:
                one, other = first, [m for m in [*machines, feeder] if m not in first]
            case _:
                ring = [*shuffled, feeder]
                for number, machine in enumerate(ring):
                    near = (ring[number - 1], ring[(number + 1) % len(ring)])
                    for far in ring:
                        if far is not machine and far not in near:
                            links.cut(machine, far)
                self.drill.say("a ring")
                return []
        if kind == _DEAF:
            for deaf in one:
                for mute in other:
                    links.cut(mute, deaf)
        else:
            links.split(one, other)
        self.drill.say(f"apart: {[m.number for m in one]} | the others")
        return [one, other]

    def _part_a_pair(self) -> list[Sequence[Machine]]:
        placement = self.orchestra.conductors(self.job)[0].core.placement
        hosts = [self.world.by_id[placement[vnode]] for vnode in self.job.graph.vnodes()]
        pairs = [(a, b) for a, b in pairwise(hosts) if a is not b]
        if pairs:
            one, other = self.rng.choice(pairs)
            self.world.links.cut(one, other, both_ways=True)
            self.drill.say(f"{one.number} and {other.number} do not reach each other")
        return []


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    report = Report("partition", nodes, seed)
    partition = _Partition(nodes, seed, options)
    partition.drill.judge(report, lambda: partition.play(report))
    partition.drill.figures(report, log=bool(options["log"]))
    return report


SCENARIO = Scenario(
    "partition",
    "a swarm that trains falls apart for a while: does one side go on, and only one?",
    _run,
    nodes=32,
    nodes_min=6,
    nodes_max=200,
    options={
        "kind": 0.0,  # 0: halves, 1: one alone, 2: a ring, 3: one half is deaf, 4: a pair
        "apart_s": 60.0,
        "steps": 60.0,
        "compute_s": 0.05,
        "gossip": 0.0,
        "log": 0.0,
    },
)
