"""A network of step cores in one place: messages are shuffled, doubled and delayed at will.

`Shuffled` carries effects out as a host's shell does, one compute queue a VNode,
and decides a step when all have reported it. What a component computes is up to
`compute`, so that the same driver runs symbols and torch.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from p2pnet.v1 import common_pb2 as pb
from p2pnet.vnode.messages import (
    ActivationArrived,
    Arrival,
    Consumer,
    Decided,
    Effect,
    Event,
    GradientArrived,
    InputSlot,
    Metrics,
    Refuse,
    Report,
    RunApply,
    RunBackward,
    RunForward,
    RunSave,
    SendActivation,
    SendGradient,
    Wiring,
)
from p2pnet.vnode.step import StepCore

EPOCH = 3
Run = RunForward | RunBackward | RunApply | RunSave


def wire(nodes: Mapping[str, Sequence[str]], loss: str, micro_batches: int = 1) -> list[Wiring]:
    """Wirings of `{vnode: inputs}`; what is no VNode is a network input."""
    return [
        Wiring(
            vnode,
            tuple(InputSlot(ref, ref not in nodes) for ref in inputs),
            tuple(
                Consumer(other, slot)
                for other in sorted(nodes)
                for slot, ref in enumerate(nodes[other])
                if ref == vnode
            ),
            vnode == loss,
            micro_batches,
        )
        for vnode, inputs in nodes.items()
    ]


@dataclass
class Shuffled:
    """Trains to `last_step`. `rng` None: messages go in order, each once."""

    wirings: Sequence[Wiring]
    compute: Callable[[str, Run], Event | None]
    batch: Callable[[int, int, str], object]  # step, micro-batch, network input
    digest: Callable[[object], bytes]
    rng: random.Random | None = None
    base_step: int = 0
    core_type: type[StepCore] = StepCore
    feed_ahead: int = 0
    events_max: int = 200_000
    mail: list[tuple[str, Event]] = field(default_factory=list)
    log: dict[str, list[Run]] = field(default_factory=dict)
    metrics: dict[int, Metrics] = field(default_factory=dict)
    busy: int = 0

    def __post_init__(self) -> None:
        self.cores = {
            wiring.vnode: self.core_type(wiring, epoch=EPOCH, base_step=self.base_step)
            for wiring in self.wirings
        }
        self.queues: dict[str, deque[Run]] = {vnode: deque() for vnode in self.cores}
        self.log = {vnode: [] for vnode in self.cores}
        self.reports: dict[int, list[str]] = {}
        self.decided = self.fed = self.base_step
        self.last_step = self.base_step

    def train(self, steps: int) -> None:
        """Some more steps; AssertionError if the network gets stuck or breaks a rule."""
        self.last_step += steps
        self._feed()
        for _ in range(self.events_max):
            if not self._one_event():
                break
        else:
            raise AssertionError("the network never comes to rest")
        for core in self.cores.values():
            assert core.applied_step == self.last_step, f"{core.wiring.vnode} is stuck"
            assert not core._steps, "something is kept for nothing"

    def _one_event(self) -> bool:
        ready = [vnode for vnode, queue in self.queues.items() if queue]
        if not ready and not self.mail:
            return False
        pick = self.rng.randrange(len(ready) + len(self.mail)) if self.rng else 0
        if pick < len(ready):
            vnode = ready[pick]
            run = self.queues[vnode].popleft()
            result = self.compute(vnode, run)
            if result is not None:
                self._handle(vnode, result)
            return True
        vnode, event = self.mail[pick - len(ready)]
        if self._handle(vnode, event):
            self.busy += 1  # it stays in the mail
        elif not self.rng or self.rng.random() < 0.7:  # else it comes once more
            self.mail.remove((vnode, event))
        return True

    def _handle(self, vnode: str, event: Event) -> bool:
        core = self.cores[vnode]
        if isinstance(event, Arrival) and not core.wants(event):
            event = replace(event, payload=b"never decoded")
        effects = core.handle(event, 0.0)
        core.check()
        busy = False
        for effect in effects:
            if isinstance(effect, Refuse):
                assert effect.code == pb.REFUSAL_CODE_BUSY, effect
                busy = True
            else:
                self._carry_out(vnode, effect)
        return busy

    def _carry_out(self, vnode: str, effect: Effect) -> None:
        match effect:
            case RunForward() | RunBackward() | RunApply() | RunSave():
                assert effect.step <= self.decided + (not isinstance(effect, RunApply))
                self.queues[vnode].append(effect)
                self.log[vnode].append(effect)
            case SendActivation():
                event: Event = ActivationArrived(
                    EPOCH, effect.step, effect.micro_batch, vnode, effect.slot, effect.output,
                    self.digest(effect.output), effect.decided_step,
                )  # fmt: skip
                self.mail.append((effect.consumer, event))
            case SendGradient():
                event = GradientArrived(
                    EPOCH, effect.step, effect.micro_batch, vnode, effect.slot, effect.gradient,
                    self.digest(effect.gradient), effect.decided_step,
                )  # fmt: skip
                self.mail.append((effect.producer, event))
            case Report():
                self._report(vnode, effect)
            case _:
                raise AssertionError(effect)

    def _report(self, vnode: str, report: Report) -> None:
        reports = self.reports.setdefault(report.step, [])
        assert vnode not in reports, "a step is reported once"
        reports.append(vnode)
        if report.metrics is not None:
            self.metrics[report.step] = report.metrics
        if len(reports) == len(self.cores):
            assert report.step == self.decided + 1
            self.decided = report.step
            if self.feed_ahead or self.decided == self.last_step:
                for other in self.cores:
                    self.mail.append((other, Decided(EPOCH, self.decided)))
            self._feed()

    def _feed(self) -> None:
        while self.fed < min(self.last_step, self.decided + 1 + self.feed_ahead):
            self.fed += 1
            for wiring in self.wirings:
                for slot, source in enumerate(wiring.inputs):
                    if source.is_network_input:
                        for micro_batch in range(wiring.micro_batches):
                            self._send_input(wiring.vnode, source.source, slot, micro_batch)

    def _send_input(self, vnode: str, ref: str, slot: int, micro_batch: int) -> None:
        payload = self.batch(self.fed, micro_batch, ref)
        event = ActivationArrived(
            EPOCH, self.fed, micro_batch, ref, slot, payload, self.digest(payload), self.decided
        )
        self.mail.append((vnode, event))
