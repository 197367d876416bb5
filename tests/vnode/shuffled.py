"""A network of step cores in one place: messages are shuffled, doubled and delayed at will.

`Shuffled` carries effects out as hosts' shells do, one compute queue a host, and decides
a step when all hosts have reported it. What a host computes is up to `compute`, so that
the same driver runs hashes and torch.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from p2pnet.v1 import common_pb2 as pb
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.edges import pace_of
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.messages import (
    ActivationArrived,
    Arrival,
    Decided,
    Effect,
    Event,
    GradientArrived,
    Metrics,
    Refuse,
    Report,
    RunApply,
    RunBackward,
    RunForward,
    RunSave,
    SendActivations,
    SendGradients,
    Sent,
)
from p2pnet.vnode.stages import stages_of
from p2pnet.vnode.step import StepCore

EPOCH = 3
Run = RunForward | RunBackward | RunApply | RunSave


@dataclass
class Shuffled:
    """Trains to `last_step`. `rng` None: messages go in order, each once.

    `hosts` maps a host to its VNodes. `squares` are what a host says for the global norm.
    """

    graph: CompiledGraph
    hosts: Mapping[str, Sequence[str]]
    compute: Callable[[str, Run], Event | None]
    batch: Callable[[int, int, str], object]  # step, micro-batch, network input
    samples: Callable[[int], int]  # of a step's whole batch
    rng: random.Random | None = None
    base_step: int = 0
    core_type: type[StepCore] = StepCore
    squares: Callable[[str, int], list[float]] | None = None
    seen: Callable[[object], object] = lambda payload: payload  # what comes out of the wire
    events_max: int = 400_000
    mail: list[tuple[str, Event]] = field(default_factory=list)
    log: dict[str, list[Run]] = field(default_factory=dict)
    metrics: dict[int, Metrics] = field(default_factory=dict)
    busy: int = 0
    most_ahead: int = 0  # of applied before decided

    def __post_init__(self) -> None:
        self.stages = {host: stages_of(self.graph, vnodes) for host, vnodes in self.hosts.items()}
        self.cores = {
            host: self.core_type(
                self.graph.name, stages, pace_of(self.graph), epoch=EPOCH, base_step=self.base_step
            )
            for host, stages in self.stages.items()
        }
        self.host_of = {
            node: host
            for host, vnodes in self.hosts.items()
            for vnode in vnodes
            for node in self.graph.entries(vnode)
        }
        self.queues: dict[str, deque[Run]] = {host: deque() for host in self.cores}
        self.log = {host: [] for host in self.cores}
        self.reports: dict[int, list[str]] = {}
        self.decided = self.fed = self.base_step
        self.last_step = self.base_step
        self.norms: dict[int, float] = {}

    def train(self, steps: int) -> None:
        """Some more steps; AssertionError if the network gets stuck or breaks a rule."""
        self.last_step += steps
        self._feed()
        for _ in range(self.events_max):
            if not self._one_event():
                break
        else:
            raise AssertionError("the network never comes to rest")
        for host, core in self.cores.items():
            assert core.applied_step == self.last_step, f"{host} is stuck"
            assert not core._samples, "something is kept for nothing"
            assert not any(inbox.payloads for inbox in core._inboxes.values())

    def _one_event(self) -> bool:
        ready = [host for host, queue in self.queues.items() if queue]
        if not ready and not self.mail:
            return False
        pick = self.rng.randrange(len(ready) + len(self.mail)) if self.rng else 0
        if pick < len(ready):
            host = ready[pick]
            run = self.queues[host].popleft()
            result = self.compute(host, run)
            if result is not None:
                self._handle(host, result)
            return True
        host, event = self.mail[pick - len(ready)]
        if self._handle(host, event):
            self.busy += 1  # it stays in the mail
            if not self.rng:
                self.mail.append(self.mail.pop(pick - len(ready)))
        elif isinstance(event, Sent) or not self.rng or self.rng.random() < 0.7:
            del self.mail[pick - len(ready)]  # else it comes once more
        return True

    def _handle(self, host: str, event: Event) -> bool:
        core = self.cores[host]
        if isinstance(event, Arrival) and not core.wants(event):
            event = replace(event, payload=b"never decoded")
        effects = core.handle(event, 0.0)
        core.check()
        self.most_ahead = max(self.most_ahead, core.applied_step - self.decided)
        assert core.pace.ahead or core.applied_step <= self.decided
        busy = False
        for effect in effects:
            if isinstance(effect, Refuse):
                assert effect.code == pb.REFUSAL_CODE_BUSY, effect
                busy = True
            else:
                self._carry_out(host, effect)
        return busy

    def _carry_out(self, host: str, effect: Effect) -> None:
        match effect:
            case RunForward() | RunBackward() | RunApply() | RunSave():
                self.queues[host].append(effect)
                self.log[host].append(effect)
            case SendActivations():
                for out, payload in zip(
                    self.stages[host][effect.stage].outputs, effect.outputs, strict=True
                ):
                    self._post(
                        ActivationArrived(
                            EPOCH, effect.step, effect.micro_batch, out.consumer, out.node,
                            out.slot, self.seen(payload), b"", effect.decided_step,
                            effect.batch_samples, effect.norms,
                        )
                    )  # fmt: skip
                self.mail.append((host, Sent(effect.stage, effect.step, effect.micro_batch)))
            case SendGradients():
                wanted = [e for e in self.stages[host][effect.stage].inputs if e.wants_gradient]
                for edge, payload in zip(wanted, effect.gradients, strict=True):
                    self._post(
                        GradientArrived(
                            EPOCH, effect.step, effect.micro_batch, edge.source, edge.node,
                            edge.slot, self.seen(payload), b"", effect.decided_step,
                            effect.batch_samples, effect.norms,
                        )
                    )  # fmt: skip
            case Report():
                self._report(host, effect)
            case _:
                raise AssertionError(effect)

    def _post(self, event: Arrival) -> None:
        self.mail.append((self.host_of[event.node], event))

    def _report(self, host: str, report: Report) -> None:
        reports = self.reports.setdefault(report.step, [])
        assert host not in reports, "a step is reported once"
        reports.append(host)
        if report.metrics is not None:
            self.metrics[report.step] = report.metrics
        if self.squares is not None:
            self._squares(host, report.step)
        while len(self.reports.get(self.decided + 1, [])) == len(self.cores):
            self.decided += 1
            if self.squares is not None:
                self.norms[self.decided] = math.sqrt(math.fsum(self._found.pop(self.decided)))
            for other in self.cores:
                self.mail.append((other, Decided(EPOCH, self.decided, self._newest())))
            self._feed()

    def _squares(self, host: str, step: int) -> None:
        assert self.squares is not None
        if not hasattr(self, "_found"):
            self._found: dict[int, list[float]] = {}
        self._found.setdefault(step, []).extend(self.squares(host, step))

    def _newest(self) -> tuple[float, ...]:
        if not self.graph.clip_norm:
            return ()
        steps = range(self.decided - self.graph.staleness, self.decided + 1)
        return tuple(self.norms[step] for step in steps if step in self.norms)

    def _feed(self) -> None:
        while self.fed < min(self.last_step, self.decided + self.graph.window):
            self.fed += 1
            for name in (*self.graph.inputs, TARGET):
                for node, slot in self.graph.consumers(name):
                    for micro_batch in range(self.graph.micro_batches):
                        event = ActivationArrived(
                            EPOCH, self.fed, micro_batch, node, name, slot,
                            self.batch(self.fed, micro_batch, name), b"", self.decided,
                            self.samples(self.fed), self._newest(),
                        )  # fmt: skip
                        self._post(event)
