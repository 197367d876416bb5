"""The shipped step core on a simulated machine: what `vnode/trainee.py` does. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from p2pnet.core import Core, Tick
from p2pnet.sim.compute import Component
from p2pnet.sim.driver import Driver
from p2pnet.sim.machine import Machine
from p2pnet.v1 import common_pb2, orchestrator_pb2, vnode_pb2
from p2pnet.vnode.messages import (
    ActivationArrived,
    ApplyDone,
    Arrival,
    BackwardDone,
    ComputeFailed,
    Effect,
    Event,
    ForwardDone,
    GradientArrived,
    Refuse,
    Report,
    RunApply,
    RunBackward,
    RunForward,
    RunSave,
    SaveRequested,
    SendActivation,
    SendGradient,
    Trouble,
    Wiring,
)
from p2pnet.vnode.network import refusal
from p2pnet.vnode.step import StepCore

_LONGEST = 64  # characters of an event that the trace keeps


@dataclass(frozen=True, slots=True)
class Hop:
    """A tensor on its way to a VNode; `source` is the VNode that sends it."""

    network_id: str
    vnode: str
    arrival: Arrival


class Surroundings(Protocol):
    """What a trainee needs of its host."""

    def load(self, trainee: Trainee, done: Callable[[bytes | None, str], None]) -> None:
        """Fetches the state that the VNode begins with; None: it is not to be had, and why."""
        ...

    def hop(self, trainee: Trainee, to: str, arrival: Arrival) -> None:
        """Sends a tensor to another VNode; trouble comes back as `Trainee.trouble`."""
        ...

    def tell(self, trainee: Trainee, report: orchestrator_pb2.ReportRequest) -> None:
        """Tells the orchestrator."""
        ...


# the state after the step; or None and why there is none
Saving = Callable[[bytes | None, str], None]


class Trainee(Driver[Event, Effect]):
    """One VNode under one epoch. `compute_s`: what each piece of work takes."""

    def __init__(
        self,
        machine: Machine,
        network_id: str,
        claimant: str,
        wiring: Wiring,
        *,
        epoch: int,
        base_step: int,
        state: common_pb2.BlobRef | None,
        around: Surroundings,
        compute_s: float,
    ) -> None:
        super().__init__(machine)
        self.network_id = network_id
        self.claimant = claimant
        self.epoch = epoch
        self.begins_with = state
        self.error = ""
        self.closed = False
        self._wiring = wiring
        self._around = around
        self._compute_s = compute_s
        self._core = StepCore(wiring, epoch=epoch, base_step=base_step)
        self._component: Component | None = None
        self._loading = False
        self._waiting: deque[Effect] = deque()
        self._busy = False
        self._saves: dict[int, list[Saving]] = {}

    @property
    def vnode(self) -> str:
        """Its name."""
        return self._wiring.vnode

    @property
    def step(self) -> int:
        """The last step applied."""
        return self._core.applied_step

    @property
    def instantiated(self) -> bool:
        """Whether it has its state."""
        return self._component is not None

    def take(self, event: Event) -> common_pb2.Refusal | None:
        """Takes what a peer sent; the refusal, if there is one, is the answer."""
        if self.closed:
            return refusal("REFUSAL_CODE_STALE_EPOCH", "its epoch is over", epoch=self.epoch)
        answer: common_pb2.Refusal | None = None
        for effect in self.hand_in(event, 50, repr(event)[:_LONGEST].encode()):
            if isinstance(effect, Refuse):
                answer = refusal(effect.code, effect.detail, epoch=self.epoch)
        return answer

    def save(self, step: int, done: Saving) -> None:
        """The state after `step`, which is decided."""

        def have() -> None:
            answer = self.take(SaveRequested(self.epoch, step))
            if answer is not None:
                done(None, answer.detail)
            else:
                self._saves.setdefault(step, []).append(done)

        self._when_loaded(have, lambda why: done(None, why))

    def close(self) -> None:
        """Stops: the epoch is over, or the VNode has gone elsewhere."""
        self.closed = True
        saves, self._saves = self._saves, {}
        for waiting in saves.values():
            for done in waiting:
                done(None, "the epoch is over here")

    def trouble(self, step: int, host: str, reason: str, *, bad_input: bool = False) -> None:
        """Tells the orchestrator that a step does not get on."""
        trouble = orchestrator_pb2.Trouble(host=host, reason=reason, bad_input=bad_input)
        self._around.tell(
            self,
            orchestrator_pb2.ReportRequest(id=self._id(step), vnode=self.vnode, trouble=trouble),
        )

    # The core

    def _driven(self) -> Core[Event | Tick, Effect]:
        return self._core  # type: ignore[return-value]  # it wants no ticks

    def _carry_out(self, effect: Effect) -> None:
        self._waiting.append(effect)
        if not self._busy:
            self._busy = True
            self.machine.after(0.0, self._work)

    # One thing after the other

    def _work(self) -> None:
        if self.closed or not self._waiting:
            self._busy = False
            return
        effect = self._waiting.popleft()
        if isinstance(effect, RunForward | RunBackward | RunApply | RunSave):
            self._when_loaded(
                lambda: self.machine.after(self._compute_s, self._run, effect),
                lambda why: self._failed(effect, why),
            )
            return
        self._send(effect)
        self._work()

    def _run(self, effect: Effect) -> None:
        component = self._component
        if self.closed or component is None:
            return
        match effect:
            case RunForward():
                output, metrics = component.forward(
                    effect.step, effect.micro_batch, _tensors(effect.inputs)
                )
                self.take(ForwardDone(effect.step, effect.micro_batch, output, metrics))
            case RunBackward():
                gradients = component.backward(
                    effect.step, effect.micro_batch, _tensors(effect.gradients)
                )
                self.take(BackwardDone(effect.step, effect.micro_batch, gradients))
            case RunApply():
                component.apply(effect.step)
                self.take(ApplyDone(effect.step))
            case RunSave():
                for done in self._saves.pop(effect.step, []):
                    done(component.state, "")
        self._work()

    def _failed(self, effect: Effect, why: str) -> None:
        self.error = why
        if isinstance(effect, RunSave):
            for done in self._saves.pop(effect.step, []):
                done(None, why)
        elif not self.closed and isinstance(effect, RunForward | RunBackward | RunApply):
            micro_batch = getattr(effect, "micro_batch", 0)
            self.take(ComputeFailed(effect.step, micro_batch, why, bad_input=False))
        self._work()

    def _send(self, effect: Effect) -> None:
        match effect:
            case SendActivation(step, micro_batch, to, slot, output, decided):
                digest = _tensor(output)
                self._around.hop(
                    self,
                    to,
                    ActivationArrived(
                        self.epoch, step, micro_batch, self.vnode, slot, output, digest, decided
                    ),
                )
            case SendGradient(step, micro_batch, to, slot, gradient, decided):
                digest = _tensor(gradient)
                self._around.hop(
                    self,
                    to,
                    GradientArrived(
                        self.epoch, step, micro_batch, self.vnode, slot, gradient, digest, decided
                    ),
                )
            case Report(step, metrics):
                held = orchestrator_pb2.Held()
                if metrics is not None:
                    held.loss, held.correct = metrics.loss, metrics.correct
                    held.samples = metrics.samples
                self._around.tell(
                    self,
                    orchestrator_pb2.ReportRequest(id=self._id(step), vnode=self.vnode, held=held),
                )
            case Trouble(step, _, reason, bad_input):
                self.trouble(step, "", reason, bad_input=bad_input)
            case _:
                pass  # a refusal was given to whoever sent the message

    def _when_loaded(self, then: Callable[[], None], failed: Callable[[str], None]) -> None:
        if self._component is not None:
            then()
            return

        def loaded(state: bytes | None, why: str) -> None:
            if self.closed:
                failed("the epoch is over here")
            elif state is None:
                self.error = why
                failed(why)
            else:
                if self._component is None:
                    self._component = Component(self._wiring, state)
                then()

        self._around.load(self, loaded)

    def _id(self, step: int) -> vnode_pb2.StepId:
        return vnode_pb2.StepId(network_id=self.network_id, epoch=self.epoch, step=step)


def _tensors(payloads: Sequence[Any]) -> list[bytes]:
    return [_tensor(payload) for payload in payloads]


def _tensor(payload: object) -> bytes:
    assert isinstance(payload, bytes)
    return payload
