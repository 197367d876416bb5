"""The shipped step core on a simulated machine: what `vnode/crew.py` does. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from p2pnet.core import Core, Tick
from p2pnet.sim.compute import Hosted
from p2pnet.sim.driver import Driver
from p2pnet.sim.machine import Machine
from p2pnet.v1 import common_pb2, orchestrator_pb2, vnode_pb2
from p2pnet.vnode.edges import pace_of
from p2pnet.vnode.follow import Follow
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.messages import (
    ActivationArrived,
    ApplyDone,
    Arrival,
    BackwardDone,
    ComputeFailed,
    Decided,
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
    SendActivations,
    SendGradients,
    Sent,
    Trouble,
)
from p2pnet.vnode.network import refusal
from p2pnet.vnode.stages import stages_of
from p2pnet.vnode.step import StepCore

_LONGEST = 64  # characters of an event that the trace keeps


@dataclass(frozen=True, slots=True)
class Hop:
    """A tensor on its way to a node, or what is decided on its way to a host."""

    network_id: str
    event: Arrival | Decided


@dataclass(frozen=True, slots=True)
class Followed:
    """What a VNode holds for a step, on its way to a standby."""

    network_id: str
    vnode: str
    epoch: int
    step: int
    packed: bytes
    decided: int
    norms: tuple[float, ...]


class Loading(Protocol):
    """Whoever begins with states."""

    network_id: str
    graph: CompiledGraph
    begins_with: dict[str, common_pb2.BlobRef]


class Surroundings(Protocol):
    """What a crew needs of its host."""

    def load(self, who: Loading, vnode: str, done: Callable[[bytes | None, str], None]) -> None:
        """Fetches the state that a VNode begins with; None: it is not to be had, and why."""
        ...

    def hop(self, crew: Crew, arrival: Arrival, done: Callable[[], None]) -> None:
        """Sends a tensor to another host; trouble comes back as `Crew.trouble`."""
        ...

    def follow(self, standby: str, followed: Followed, done: Callable[[bool], None]) -> None:
        """Sends what is held to a standby; `done` hears whether it took it."""
        ...

    def tell(self, crew: Crew, report: orchestrator_pb2.ReportRequest) -> None:
        """Tells the orchestrator."""
        ...


# the states after the step; or None and why there are none
Saving = Callable[[Mapping[str, bytes] | None, str], None]


class Crew(Driver[Event, Effect]):
    """The VNodes of a network here, under one epoch. `compute_s`: what each piece of work takes."""

    def __init__(
        self,
        machine: Machine,
        network_id: str,
        claimant: str,
        graph: CompiledGraph,
        vnodes: Sequence[str],
        *,
        epoch: int,
        base_step: int,
        states: Mapping[str, common_pb2.BlobRef],
        standbys: Mapping[str, Sequence[str]],
        adopted: Mapping[str, bytes] | None,
        around: Surroundings,
        compute_s: float,
    ) -> None:
        """`adopted`: the states to go on from, where that is not a cut."""
        super().__init__(machine)
        self.network_id = network_id
        self.claimant = claimant
        self.graph = graph
        self.vnodes = tuple(vnodes)
        self.epoch = epoch
        self.begins_with = dict(states)
        self.error = ""
        self.closed = False
        self._around = around
        self._compute_s = compute_s
        self._stages = stages_of(graph, vnodes)
        self._core = StepCore(
            graph.name, self._stages, pace_of(graph), epoch=epoch, base_step=base_step
        )
        self.standbys = standbys
        self._hosted = None if adopted is None else Hosted(graph, adopted)
        self._when: list[tuple[Callable[[], None], Callable[[str], None]]] = []
        self._waiting: deque[Effect] = deque()
        self._busy = False
        self._saves: dict[int, list[Saving]] = {}

    @property
    def step(self) -> int:
        """The last step applied."""
        return self._core.applied_step

    @property
    def instantiated(self) -> bool:
        """Whether it has its states."""
        return self._hosted is not None

    def take(self, event: Event) -> common_pb2.Refusal | None:
        """Takes what a peer sent; the refusal, if there is one, is the answer."""
        if self.closed:
            return refusal("REFUSAL_CODE_STALE_EPOCH", "its epoch is over", epoch=self.epoch)
        answer: common_pb2.Refusal | None = None
        for effect in self.hand_in(event, 50, repr(event)[:_LONGEST].encode()):
            if isinstance(effect, Refuse):
                answer = refusal(effect.code, effect.detail, epoch=self.epoch)
        return answer

    def save(self, step: int, norms: Sequence[float], done: Saving) -> None:
        """The states after `step`, which is decided."""

        def have() -> None:
            answer = self.take(SaveRequested(self.epoch, step, tuple(norms)))
            if answer is not None:
                done(None, answer.detail)
            else:
                self._saves.setdefault(step, []).append(done)

        self._when_loaded(have, lambda why: done(None, why))

    def give(self, vnode: str, step: int, norm: float) -> bytes | None:
        """The state of a VNode after a step, which is decided, if it can be had."""
        hosted, applied = self._hosted, self._core.applied_step
        if hosted is None or applied not in (step, step - 1):
            return None
        if applied == step - 1:
            if not hosted.complete(vnode, step):
                return None
            hosted.follow(vnode, step, hosted.pack(vnode, step), norm)
        return hosted.states[vnode]

    def close(self) -> None:
        """Stops: the epoch is over, or the VNodes have gone elsewhere."""
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
            orchestrator_pb2.ReportRequest(
                id=self._id(step), vnode=self.vnodes[0], trouble=trouble
            ),
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
        hosted = self._hosted
        if self.closed or hosted is None:
            return
        match effect:
            case RunForward(stage, step, part, inputs, _):
                outputs, metrics = hosted.forward(stage, step, part, _tensors(inputs))
                self.take(ForwardDone(stage, step, part, outputs, metrics))
            case RunBackward(stage, step, part, gradients):
                found = hosted.backward(stage, step, part, _tensors(gradients))
                self.take(BackwardDone(stage, step, part, found))
            case RunApply(step, norm):
                hosted.apply(step, norm)
                self.take(ApplyDone(step))
            case RunSave(step):
                for done in self._saves.pop(step, []):
                    done(dict(hosted.states), "")
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
            case SendActivations(stage, step, part, outputs, samples, decided, norms):
                edges = self._stages[stage].outputs
                waiting = len(edges)

                def sent() -> None:
                    nonlocal waiting
                    waiting -= 1
                    if not waiting:
                        self.take(Sent(stage, step, part))

                for out, tensor in zip(edges, outputs, strict=True):
                    self._hop(
                        ActivationArrived(
                            self.epoch, step, part, out.consumer, out.node, out.slot, tensor,
                            b"", decided, samples, norms,
                        ),
                        sent,
                    )  # fmt: skip
            case SendGradients(stage, step, part, gradients, samples, decided, norms):
                wanted = [edge for edge in self._stages[stage].inputs if edge.wants_gradient]
                for edge, tensor in zip(wanted, gradients, strict=True):
                    self._hop(
                        GradientArrived(
                            self.epoch, step, part, edge.source, edge.node, edge.slot, tensor,
                            b"", decided, samples, norms,
                        ),
                        lambda: None,
                    )  # fmt: skip
            case Report(step, metrics):
                held = orchestrator_pb2.Held()
                if metrics is not None:
                    held.loss, held.correct = metrics.loss, metrics.correct
                    held.samples = metrics.samples
                if self.graph.clip_norm and self._hosted is not None:
                    held.squares.extend(self._hosted.squares(step))
                self._report(step, held)
            case Trouble(step, _, reason, bad_input):
                self.trouble(step, "", reason, bad_input=bad_input)
            case _:
                pass  # a refusal was given to whoever sent the message

    def _report(self, step: int, held: orchestrator_pb2.Held) -> None:
        """Once the standbys have what is held, or do not take it."""
        pairs = [(v, peer) for v in self.vnodes for peer in self.standbys.get(v, ())]
        waiting = len(pairs)

        def tell() -> None:
            if not self.closed:
                report = orchestrator_pb2.ReportRequest(
                    id=self._id(step), vnode=self.vnodes[0], held=held, vnodes=self.vnodes
                )
                self._around.tell(self, report)

        def done(vnode: str, taken: bool) -> None:
            nonlocal waiting
            waiting -= 1
            if not taken and vnode not in held.unfollowed:
                held.unfollowed.append(vnode)
            if not waiting:
                tell()

        if not pairs:
            tell()
        decided, norms = self._core.decision()
        for vnode, peer in pairs:
            assert self._hosted is not None
            packed = self._hosted.pack(vnode, step)
            followed = Followed(self.network_id, vnode, self.epoch, step, packed, decided, norms)
            self._around.follow(peer, followed, partial(done, vnode))

    def _hop(self, arrival: Arrival, sent: Callable[[], None]) -> None:
        if self.graph.home(arrival.node) not in self.vnodes:
            self._around.hop(self, arrival, sent)
            return

        def deliver() -> None:
            answer = self.take(arrival)
            if answer is None:
                sent()
            elif answer.code == common_pb2.REFUSAL_CODE_BUSY and not self.closed:
                self.machine.after(self._compute_s, deliver)

        deliver()

    def _when_loaded(self, then: Callable[[], None], failed: Callable[[str], None]) -> None:
        if self._hosted is not None:
            then()
            return
        self._when.append((then, failed))
        if len(self._when) > 1:
            return
        states: dict[str, bytes] = {}

        def loaded(vnode: str, state: bytes | None, why: str) -> None:
            if self.closed or not self._when:
                return
            if state is None:
                self.error = why
            else:
                states[vnode] = state
                if len(states) < len(self.vnodes):
                    return
                self._hosted = Hosted(self.graph, {v: states[v] for v in self.vnodes})
            waiting, self._when = self._when, []
            for then, failed in waiting:
                if state is None:
                    failed(why)
                else:
                    then()

        for vnode in self.vnodes:
            self._around.load(self, vnode, partial(loaded, vnode))

    def _id(self, step: int) -> vnode_pb2.StepId:
        return vnode_pb2.StepId(network_id=self.network_id, epoch=self.epoch, step=step)


class Following:
    """VNodes that are followed here, under one epoch: what `vnode/standby.py` does."""

    def __init__(
        self,
        network_id: str,
        graph: CompiledGraph,
        vnodes: Sequence[str],
        *,
        epoch: int,
        base_step: int,
        states: Mapping[str, common_pb2.BlobRef],
        adopted: Mapping[str, bytes] | None,
        around: Surroundings,
    ) -> None:
        self.network_id = network_id
        self.graph = graph
        self.vnodes = tuple(vnodes)
        self.epoch = epoch
        self.begins_with = dict(states)
        clips = graph.clip_norm > 0
        self._cores = {vnode: Follow(base_step, clips=clips) for vnode in vnodes}
        self._states = dict(adopted or {})
        if adopted is None:
            for vnode in vnodes:
                around.load(self, vnode, partial(self._loaded, vnode))

    def _loaded(self, vnode: str, state: bytes | None, why: str) -> None:
        if state is not None:
            self._states[vnode] = state

    def follow(self, followed: Followed) -> common_pb2.Refusal | None:
        """Takes what a VNode holds for a step, and applies what is decided."""
        vnode = followed.vnode
        if vnode not in self._states:
            return refusal("REFUSAL_CODE_FAILED", "its state is not here yet")
        self._apply(vnode, followed.decided, followed.norms)
        why = self._cores[vnode].take(followed.step, followed.packed)
        self._cores[vnode].check()
        return refusal("REFUSAL_CODE_FAILED", why) if why else None

    def give(self, vnode: str, step: int, norms: Sequence[float]) -> bytes | None:
        """The state of a VNode after a step, which is decided, if it can be had."""
        if vnode not in self._states:
            return None
        self._apply(vnode, step, norms)
        return self._states[vnode] if self._cores[vnode].applied_step == step else None

    def _apply(self, vnode: str, decided: int, norms: Sequence[float]) -> None:
        hosted = Hosted(self.graph, {vnode: self._states[vnode]})
        for step, norm, packed in self._cores[vnode].decided(decided, norms):
            hosted.follow(vnode, step, packed, norm)
            self._states[vnode] = hosted.states[vnode]
            self._cores[vnode].applied(step)


def _tensors(payloads: Sequence[Any]) -> list[bytes]:
    return [_tensor(payload) for payload in payloads]


def _tensor(payload: object) -> bytes:
    assert isinstance(payload, bytes)
    return payload
