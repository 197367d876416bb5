"""What the scenarios of orchestration have in common: figures, and who judges. Pure."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping

from p2pnet import keys
from p2pnet.sim.conductor_run import ConductorRun
from p2pnet.sim.orchestra import Job, Node, Orchestra
from p2pnet.sim.report import Report, quantile
from p2pnet.v1 import common_pb2

_LOOK_S = 0.2
_NOTED = ("epoch", "slot", "step", "reason", "vnode", "host")


class Drill:
    """Watches an orchestra: how long what was lost stayed lost, and who wrote what.

    Attributes:
        relocation_s: from the death of a host to the next step that is decided without it,
            once for each VNode that it had; `takeover_s`: from the death of an orchestrator
            (or from when its claim is known) to another's claim; `log`: what happened, for people.
    """

    def __init__(self, orchestra: Orchestra) -> None:
        self.orchestra = orchestra
        self.world = orchestra.world
        self.relocation_s: list[float] = []
        self.takeover_s: list[float] = []
        self.committed: list[tuple[float, int, int]] = []  # (when, machine, step)
        self.log: list[tuple[float, str]] = []
        self._homeless: dict[tuple[str, str], tuple[float, str]] = {}  # since when, of whom
        self._headless: dict[str, tuple[float, str]] = {}
        self._known: dict[str, None] = {}  # networks whose claim anybody else knows
        orchestra.note_watchers.append(self._noted)
        orchestra.decided_watchers.append(self._decided)

    def say(self, what: str) -> None:
        """Something for the log."""
        self.log.append((self.world.now, what))

    def lost(self, node: Node) -> None:
        """A node is about to die."""
        me, now = node.machine.peer_id, self.world.now
        for job in self.orchestra.jobs.values():
            runs = self.orchestra.conductors(job)
            newest = max(runs, key=lambda run: run.core.epoch, default=None)
            if newest is None or job.done:
                continue
            for vnode, host in newest.core.placement.items():
                if host == me:
                    self._homeless.setdefault((job.network_id, vnode), (now, me))
            if newest.machine is node.machine:
                self._headless.setdefault(job.network_id, (now, me))

    def kill(self, node: Node) -> None:
        """kill -9."""
        if node.machine.alive:
            self.say(f"kill {node.machine.number}")
            self.lost(node)
            node.machine.kill()

    def end(self, job: Job) -> None:
        """The job is over: what it still waits for does not count."""
        for at in [at for at in self._homeless if at[0] == job.network_id]:
            del self._homeless[at]
        self._headless.pop(job.network_id, None)

    def _decided(self, network_id: str, who: str, entry: common_pb2.Signed) -> None:
        # A claim that nobody has heard of has no successor: it counts from when they do.
        if network_id not in self._known and keys.peer_id_of(entry.public_key) != who:
            self._known[network_id] = None
            if network_id in self._headless:
                self._headless[network_id] = self.world.now, self._headless[network_id][1]

    def _noted(self, run: ConductorRun, event: str, fields: Mapping[str, object]) -> None:
        now, network_id = self.world.now, run.core.network_id
        said = " ".join(f"{key}={fields[key]}" for key in fields if key in _NOTED)
        self.say(f"    {run.machine.number} {event} {said}")
        if event == "claimed" and network_id in self._headless:
            since, who = self._headless[network_id]
            if run.peer_id != who:
                del self._headless[network_id]
                self.takeover_s.append(now - since)
        elif event == "decided":
            placement = run.core.placement
            for at, (since, who) in list(self._homeless.items()):
                if at[0] == network_id and placement.get(at[1]) != who:
                    del self._homeless[at]
                    self.relocation_s.append(now - since)
        elif event == "committed" and run.core.epoch:
            self.committed.append((now, run.machine.number, int(str(fields["step"]))))

    # The report

    def judge(self, report: Report, play: Callable[[], None]) -> None:
        """Plays, and notes all that is wrong. A core may raise anything: it is looked for."""
        try:
            play()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            report.failures.append(
                f"at {self.world.now:.3f} s: {type(error).__name__}: {error} "
                f"({where.filename.rpartition('p2pnet/')[2]}:{where.lineno})"
            )
        report.failures += [str(violation) for violation in self.orchestra.violations()]
        for job in self.orchestra.jobs.values():
            report.expect(not job.feeder.gave_up, f"a feeder gave up: {job.feeder.gave_up}")
        report.trace = self.world.trace

    def finish(self, report: Report, limit_s: float) -> float | None:
        """Waits until all jobs are done; after how long, None and a failure if never."""
        jobs = list(self.orchestra.jobs.values())
        took_s = self.world.run(lambda: all(job.done for job in jobs), limit_s, every_s=_LOOK_S)
        done = sum(job.done for job in jobs)
        report.expect(
            took_s is not None,
            f"{limit_s:g} s later {len(jobs) - done} of {len(jobs)} jobs are not done",
        )
        return took_s

    def figures(self, report: Report, *, log: bool) -> None:
        """The figures that all these scenarios have."""
        jobs = self.orchestra.jobs.values()
        report.figures |= {
            "virtual seconds": self.world.now,
            "events": self.world.events,
            "jobs": len(jobs),
            "steps": sum(job.steps for job in jobs),
            "claims": sum(job.claims for job in jobs),
            "commits": sum(job.commits for job in jobs),
            "relocations": sum(sum(job.relocated.values()) for job in jobs),
        }
        for name, values in (("relocation", self.relocation_s), ("takeover", self.takeover_s)):
            if values:
                report.figures |= {
                    f"{name} p50 s": quantile(values, 0.5),
                    f"{name} p99 s": quantile(values, 0.99),
                }
                report.series[f"{name} s"] = list(values)
        if log:
            report.figures |= {
                f"{at:9.3f} s {number}": what for number, (at, what) in enumerate(self.log)
            }
