"""A small swarm trains while everything happens to it (RELIABILITY, R26). Pure.

First the seed draws faults of every kind, and jobs are submitted, one of them perhaps to
two nodes at once. Then all faults cease, and within a while every job has to be done.
Afterwards `log/checker.py` judges what everybody was told: one history, nothing that was
acknowledged lost, and every state what the steps before it make of it, each once.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping

from p2pnet.orchestrator import messages as m
from p2pnet.sim.faults import Faults, any_clock, any_links
from p2pnet.sim.orchestra import Job, Node, Orchestra
from p2pnet.sim.report import Report
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.villain import Villain
from p2pnet.sim.world import World

_NODES_MIN = 5
_PAUSE_S = 0.7  # between two faults, on average
_LOOK_S = 0.2


class _Storm:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        world = self.world = World(seed)
        rng = self.rng = world.rng_of("orchestration")
        world.links = any_links(rng)
        world.links.rng = world.rng_of("links")
        wrong = rng.random() < 0.5
        self.orchestra = Orchestra(
            world,
            min(rng.randint(_NODES_MIN, nodes) for _ in range(2)),
            clock=lambda number: any_clock(rng, wrong=wrong),
            gossip=rng.random() < options["gossip"],
            wrong=rng.choice((0.0, 0.0, 0.01)),
            replays=rng.choice((0.0, 0.1, 0.5)),
        )
        machines = [node.machine for node in self.orchestra.nodes]
        # Who has lost its disk has lost its key with it: that is somebody else.
        self.faults = Faults(world, machines, world.rng_of("faults"), keep_disks=True)
        self.job = self._submit()
        self.villain: Villain | None = None
        if rng.random() < options["villains"]:
            self.villain = self._turn(rng.choice(self.orchestra.nodes))

    def _turn(self, node: Node) -> Villain:
        log_of, manifest = node.orchestrator.log_of, self.job.manifest
        return Villain(
            node.calls,
            lambda: log_of(manifest),
            manifest,
            self.job.graph,
            self.world.rng_of("villain"),
        )

    def _submit(self) -> Job:
        rng = self.rng
        orchestrators = (0, 1) if rng.random() < 0.3 else (0,)
        return self.orchestra.submit(
            steps=rng.randint(3, round(self.options["steps"])),
            vnodes=rng.randint(2, 4),
            cut_every=rng.randint(1, 3),
            orchestrators=orchestrators,
            replicas=rng.choice((1, 1, 2)),
        )

    def _drain(self, node: Node) -> None:
        """A node says that it is about to go, and then stays after all."""
        self.faults.log.append((self.world.now, f"{node.machine.number} wants to leave"))
        peer_id = node.machine.peer_id
        for run in self.orchestra.conductors(self.job):
            if run.machine is node.machine:
                run.ask(m.Resign, lambda refusal: None)
            else:
                run.ask(lambda ask: m.HostLeaves(ask, peer_id), lambda refusal: None)

    def play(self) -> float | None:
        """After how long after the last fault the job was done, None: it was not."""
        end = self.world.now + self.options["storm_s"]
        while self.world.now < end:
            self.world.run_for(self.rng.expovariate(1.0 / _PAUSE_S))
            if self.rng.random() < self.options["faults"]:
                self.faults.strike()
            elif self.rng.random() < self.options["drains"]:
                self._drain(self.rng.choice(self.orchestra.nodes))
            elif self.villain is not None and self.villain.able:
                self.faults.log.append((self.world.now, f"a villain: {self.villain.strike()}"))
        self.faults.cease()
        for node in self.orchestra.nodes:
            if not node.machine.alive:
                node.machine.restart()
        return self.world.run(lambda: self.job.done, self.options["recover_s"], every_s=_LOOK_S)


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    report = Report("orchestration", nodes, seed)
    storm = _Storm(nodes, seed, options)
    took_s: float | None = None
    if options["log"]:
        storm.orchestra.note_watchers.append(
            lambda run, event, fields: storm.faults.log.append(
                (
                    storm.world.now,
                    f"    {run.machine.number} {event} "
                    + " ".join(
                        f"{key}={fields[key]}"
                        for key in fields
                        if key in ("epoch", "slot", "step", "reason", "vnode")
                    ),
                )
            )
        )
    try:
        took_s = storm.play()
    except Exception as error:  # a core may raise anything: that is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        report.failures.append(
            f"at {storm.world.now:.3f} s: {type(error).__name__}: {error} "
            f"({where.filename.rpartition('p2pnet/')[2]}:{where.lineno})"
        )
    job = storm.job
    report.failures += [str(violation) for violation in storm.orchestra.violations()]
    report.expect(
        took_s is not None or bool(report.failures),
        f"{options['recover_s']:g} s after the last fault the job is not done: "
        f"{len(job.feeder.results)} of {job.steps} steps",
    )
    report.expect(not job.feeder.gave_up, f"the feeder gave up: {job.feeder.gave_up}")
    report.trace = storm.world.trace
    report.figures = {
        "machines": len(storm.orchestra.nodes),
        "virtual seconds": storm.world.now,
        "events": storm.world.events,
        "faults": len(storm.faults.log),
        "steps": job.steps,
        "claims": job.claims,
        "commits": job.commits,
        "relocations": sum(job.relocated.values()),
        "done after s": took_s if took_s is not None else -1.0,
    }
    if options["log"]:
        report.figures |= {f"{at:9.3f} s {n}": what
                           for n, (at, what) in enumerate(storm.faults.log)}  # fmt: skip
    return report


SCENARIO = Scenario(
    "orchestration",
    "a swarm trains while the seed does everything to it: one history, and all jobs done?",
    _run,
    nodes=8,
    nodes_min=_NODES_MIN,
    nodes_max=64,
    options={
        "storm_s": 12.0,
        "steps": 8.0,
        "faults": 0.7,  # the share of what might strike that does
        "drains": 0.1,  # the share of what else happens that is somebody who wants to leave
        "villains": 0.5,  # the share of seeds in which a node breaks the rules
        "gossip": 0.0,  # the share of seeds with the shipped membership
        "recover_s": 200.0,
        "log": 0.0,  # 1: list the faults, and what orchestrators note
    },
)
