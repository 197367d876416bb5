"""Jobs come one after the other, and nodes come and go under them (RELIABILITY, R5). Pure.

Sessions of those that churn are exponential and end by a kill or a pulled plug. When a
job is done its owner ends the network. How long a job takes undisturbed is measured on
the first one, before anybody goes.
"""

from __future__ import annotations

from collections.abc import Mapping

from p2pnet.sim.drill import Drill
from p2pnet.sim.links import Links
from p2pnet.sim.orchestra import Job, Node, Orchestra
from p2pnet.sim.report import Report, quantile, share
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World

_QUIET_LIMIT_S = 600.0
_LATER = 3.0  # times the quiet time: so long the last jobs are waited for
_IN_TIME = 2.0
_IN_TIME_SHARE = 0.99
_CANCEL_S = 5.0
_MINUTE_S = 60.0


class _Jobs:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        self.world = World(seed, Links(loss=options["loss"]))
        self.rng = self.world.rng_of("jobs")
        self.orchestra = Orchestra(
            self.world, nodes, gossip=bool(options["gossip"]), compute_s=options["compute_s"]
        )
        self.drill = Drill(self.orchestra)
        self.took_s: list[float] = []
        self.quiet_s = 0.0
        self.ended = 0  # sessions
        self.churn_s = 0.0
        self.uptime_s = 0.0

    def play(self, report: Report) -> None:
        """One job in peace, then many in the churn."""
        first = self._submit()
        quiet_s = self.world.run(lambda: first.done, _QUIET_LIMIT_S, every_s=0.2)
        report.expect(quiet_s is not None, "an undisturbed job is not done")
        self.quiet_s = quiet_s or _QUIET_LIMIT_S
        for node in self.orchestra.nodes:
            if self.rng.random() < self.options["churning"]:
                self._session(node)
        began_s, every_s = self.world.now, self.options["every_s"]
        while self.world.now < began_s + self.options["duration_s"]:
            self._submit()
            self.world.run_for(self.rng.expovariate(1.0 / every_s))
        self.churn_s = self.world.now - began_s
        jobs = list(self.orchestra.jobs.values())
        self.world.run(lambda: all(job.done for job in jobs), _LATER * self.quiet_s, every_s=1.0)
        self.took_s = [
            (job.feeder.finished_s if job.feeder.finished_s is not None else self.world.now)
            - job.began_s
            for job in jobs
        ]
        done = sum(job.done for job in jobs)
        report.expect(done == len(jobs), f"{len(jobs) - done} of {len(jobs)} jobs are not done")
        report.expect(
            self.in_time >= _IN_TIME_SHARE,
            f"{self.in_time:.1%} of jobs took no more than twice their time",
        )

    @property
    def in_time(self) -> float:
        """The share of jobs that took no more than twice as long as undisturbed."""
        late = sum(took_s > _IN_TIME * self.quiet_s for took_s in self.took_s)
        return share(len(self.took_s) - late, len(self.took_s))

    def _submit(self) -> Job:
        up = [number for number, n in enumerate(self.orchestra.nodes) if n.machine.running]
        job = self.orchestra.submit(
            name=f"job{len(self.orchestra.jobs)}",
            steps=round(self.options["steps"]),
            vnodes=round(self.options["vnodes"]),
            cut_every=5,
            orchestrators=(self.rng.choice(up),),
        )
        self.world.after(_CANCEL_S, self._cancel, job)
        return job

    def _cancel(self, job: Job) -> None:
        if job.done:
            self.drill.end(job)
            self.orchestra.cancel(job)
            if not self.orchestra.conductors(job):
                return
        self.world.after(_CANCEL_S, self._cancel, job)

    # Sessions

    def _session(self, node: Node) -> None:
        lasts_s = self.rng.expovariate(1.0 / self.options["session_s"])
        self.world.after(lasts_s, self._end, node)

    def _end(self, node: Node) -> None:
        self.ended += 1
        self.drill.lost(node)
        if self.rng.random() < 0.5:
            node.machine.kill()
        else:
            node.machine.vanish()
        off_s = self.rng.expovariate(1.0 / self.options["off_s"])
        self.world.after(off_s, self._back, node)

    def _back(self, node: Node) -> None:
        node.machine.restart()
        self._session(node)


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    report = Report("jobs", nodes, seed)
    jobs = _Jobs(nodes, seed, options)
    jobs.drill.judge(report, lambda: jobs.play(report))
    jobs.drill.figures(report, log=bool(options["log"]))
    moved = sum(sum(job.relocated.values()) for job in jobs.orchestra.jobs.values())
    report.figures |= {
        "sessions that ended": jobs.ended,
        "a job takes s, undisturbed": jobs.quiet_s,
        "a job took s, p50": quantile(jobs.took_s, 0.5),
        "a job took s, p99": quantile(jobs.took_s, 0.99),
        "in twice its time": jobs.in_time,
        "relocations an hour": moved * 3600.0 / max(_MINUTE_S, jobs.churn_s),
    }
    return report


SCENARIO = Scenario(
    "jobs",
    "nodes come and go under many jobs: are they done, and how often does a VNode move?",
    _run,
    nodes=40,
    nodes_min=8,
    nodes_max=1000,
    options={
        "duration_s": 600.0,
        "every_s": 60.0,  # between two submissions
        "steps": 60.0,
        "vnodes": 4.0,
        "compute_s": 0.1,
        "churning": 0.2,  # the share of nodes that come and go
        "session_s": 600.0,
        "off_s": 60.0,
        "loss": 0.01,
        "gossip": 0.0,
        "log": 0.0,
    },
)
