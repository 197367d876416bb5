"""A third of a swarm dies in the middle of training, and then another (RELIABILITY, R4). Pure.

Whoever keeps a log stays in the majority, and of those who hold a committed state one
stays: without them nothing can be decided, or gone on from.
"""

from __future__ import annotations

from collections.abc import Mapping

from p2pnet.sim.drill import Drill
from p2pnet.sim.links import Links
from p2pnet.sim.orchestra import Node, Orchestra
from p2pnet.sim.report import Report
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World

_BEGIN_S = 5.0
_APART_S = 30.0


class _Relocation:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        self.world = World(seed, Links(loss=options["loss"]))
        self.rng = self.world.rng_of("relocation")
        self.orchestra = Orchestra(
            self.world, nodes, gossip=bool(options["gossip"]), compute_s=options["compute_s"]
        )
        self.drill = Drill(self.orchestra)
        for number in range(round(options["jobs"])):
            self.orchestra.submit(
                name=f"job{number}",
                steps=round(options["steps"]),
                vnodes=round(options["vnodes"]),
                cut_every=5,
                orchestrators=(number % nodes,),
            )

    def play(self, report: Report) -> None:
        """Kills, kills more, and lets some come back."""
        kills = round(len(self.orchestra.nodes) * self.options["kills"])
        self.world.run_for(_BEGIN_S)
        first = self._kill(kills)
        self.world.run_for(_APART_S)
        self._kill(kills)
        for node in first:
            self.drill.say(f"restart {node.machine.number}")
            node.machine.restart()
        self.drill.finish(report, self.options["limit_s"])

    def _kill(self, count: int) -> list[Node]:
        up = [node for node in self.orchestra.nodes if node.machine.alive]
        killed: list[Node] = []
        for node in self.rng.sample(up, len(up)):
            if len(killed) < count and self._can_spare(node):
                killed.append(node)
                self.drill.kill(node)
        return killed

    def _can_spare(self, node: Node) -> bool:
        """Whether every log keeps a majority without it, and every committed state a holder."""
        alive = {n.machine.peer_id for n in self.orchestra.nodes if n.machine.alive}
        for job in self.orchestra.jobs.values():
            histories = [
                history
                for n in self.orchestra.nodes
                if (history := n.keeper.histories().get(job.network_id)) is not None
            ]
            newest = max(histories, key=lambda history: history.next_slot, default=None)
            if newest is None:
                continue
            left = [k for k in newest.keepers if k in alive and k != node.machine.peer_id]
            if 2 * len(left) <= len(newest.keepers):
                return False
            states = newest.commit.states.values() if newest.commit is not None else ()
            others = alive - {node.machine.peer_id}
            if any(others.isdisjoint(state.holders) for state in states):
                return False
        return True


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    report = Report("relocation", nodes, seed)
    relocation = _Relocation(nodes, seed, options)
    drill = relocation.drill
    drill.judge(report, lambda: relocation.play(report))
    drill.figures(report, log=bool(options["log"]))
    report.figures["VNodes that lost their host"] = len(drill.relocation_s)
    return report


SCENARIO = Scenario(
    "relocation",
    "a third of a swarm dies while it trains, then another: are all jobs done?",
    _run,
    nodes=32,
    nodes_min=8,
    nodes_max=1000,
    options={
        "jobs": 2.0,
        "steps": 60.0,
        "vnodes": 6.0,
        "compute_s": 0.03,  # of each piece of a step
        "kills": 0.3125,  # the share of nodes that dies, twice
        "loss": 0.01,
        "gossip": 0.0,  # 1: the shipped membership
        "limit_s": 600.0,
        "log": 0.0,
    },
)
