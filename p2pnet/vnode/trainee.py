"""A shell: one hosted VNode, its training steps carried out.

`StepCore` decides what is to be done; here it is done: tensors computed on the
compute thread, messages sent, results fed back. The component is made (or its
state fetched) at first use.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from p2pnet.errors import MalformedError, P2PNetError, RefusedError
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, orchestrator_pb2, vnode_pb2
from p2pnet.vnode.courier import Courier, EpochOver, HopFailed
from p2pnet.vnode.edges import head_of, misfit, tensor_of, wiring_of
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.hosted import HostedComponent
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
)
from p2pnet.vnode.network import HostedNetwork, clip, refusal
from p2pnet.vnode.step import StepCore
from p2pnet.vnode.tensors import Array, digest_of, encode

logger = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 5.0
SAVE_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every VNode of a host shares."""

    swarm: Swarm
    compute: ComputeThread
    courier: Courier
    faults: Faults
    load: Callable[[HostedNetwork, str], Awaitable[HostedComponent]]
    deliver: Callable[[HostedNetwork, str, Event], Awaitable[common_pb2.Refusal | None]]


class Trainee:
    """One VNode under one epoch. Lives on the gRPC thread."""

    def __init__(self, vnode: str, net: HostedNetwork, around: Surroundings) -> None:
        self.vnode = vnode
        self.error = ""
        self.component: HostedComponent | None = None
        self._net = net
        self._around = around
        self._core = StepCore(wiring_of(net.graph, vnode), epoch=net.epoch, base_step=net.base_step)
        # What the core keeps is bounded, and so is what it asks for.
        self._effects: asyncio.Queue[Effect] = asyncio.Queue()
        self._state_digest = b""  # of the state at the last cut
        self._saves: dict[int, asyncio.Future[bytes]] = {}
        self._loading = asyncio.Lock()
        self._closed = False
        self._tasks = TaskSet(f"{vnode} of network {net.graph.name}")
        self._tasks.spawn(self._work())

    @property
    def step(self) -> int:
        """The last step applied."""
        return self._core.applied_step

    async def close(self) -> None:
        """Stops: the epoch is over, or the VNode has gone elsewhere."""
        self._closed = True
        for save in self._saves.values():
            if not save.done():
                save.set_exception(self._over())
        await self._tasks.close()

    async def ready(self) -> HostedComponent:
        """The component with its state, made at first use; raises P2PNetError."""
        async with self._loading:
            if self.component is None:
                try:
                    self.component = await self._around.load(self._net, self.vnode)
                except P2PNetError as error:
                    self.error = clip(str(error))
                    raise
        return self.component

    def hear(self, request: vnode_pb2.TrainRequest) -> common_pb2.Refusal | None:
        """Takes a message from another host.

        Raises:
            MalformedError: bytes that are no tensor, or no training message.
        """
        event = head_of(request)
        if not self._core.wants(event):
            return self.take(event)  # and says why, if that is a mistake
        graph = self._net.graph
        ref = self.vnode if isinstance(event, GradientArrived) else request.source
        if answer := misfit(graph, ref, self.vnode, request.tensor):
            return answer
        tensor = tensor_of(graph, ref, request.tensor)
        digest = digest_of(tensor)
        if request.tensor_digest not in (b"", digest):
            raise MalformedError("the tensor is not the one that its digest names")
        return self.take(replace(event, payload=tensor, digest=digest))

    def take(self, event: Event) -> common_pb2.Refusal | None:
        """Takes what a peer sent; the refusal, if there is one, is the answer."""
        answer: common_pb2.Refusal | None = None
        for effect in self._core.handle(event, self._around.swarm.now()):
            if isinstance(effect, Refuse):
                answer = refusal(effect.code, effect.detail, epoch=self._net.epoch)
            else:
                self._effects.put_nowait(effect)
        return answer

    async def save(self, step: int) -> bytes:
        """The state after `step`, which is decided, as safetensors.

        Raises:
            TimeoutError: the step is not applied in time.
            RefusedError: the epoch is over.
            P2PNetError: there is no such state.
        """
        await self.ready()
        if self._closed:
            raise self._over()
        done = self._saves.get(step)
        if done is None:
            if answer := self.take(SaveRequested(self._net.epoch, step)):
                raise MalformedError(answer.detail)
            done = self._saves[step] = asyncio.get_running_loop().create_future()
            done.add_done_callback(lambda done: self._saved(step, done))
        async with asyncio.timeout(SAVE_TIMEOUT_S):
            return await asyncio.shield(done)

    def saved_as(self, digest: bytes) -> None:
        """The state at the last cut is known by this digest."""
        self._state_digest = digest

    def _saved(self, step: int, done: asyncio.Future[bytes]) -> None:
        del self._saves[step]
        done.exception()  # it may be that nobody waits any more

    def _over(self) -> RefusedError:
        return RefusedError(
            f"epoch {self._net.epoch} of {self._net.graph.name} is over here",
            code=common_pb2.REFUSAL_CODE_STALE_EPOCH,
        )

    # Carrying out

    async def _work(self) -> None:
        while True:
            effect = await self._effects.get()
            try:
                await self._carry_out(effect)
            except P2PNetError as error:
                self._failed(effect, str(error), bad_input=isinstance(error, MalformedError))
            except Exception as error:  # of torch: whatever it is, the step is lost
                logger.exception("%s of network %s failed", self.vnode, self._net.graph.name)
                self._failed(effect, f"{type(error).__name__}: {error}", bad_input=False)

    def _failed(self, effect: Effect, reason: str, *, bad_input: bool) -> None:
        reason = clip(reason)
        self.error = "" if bad_input else reason
        if isinstance(effect, RunSave):
            done = self._saves.get(effect.step)
            if done is not None and not done.done():
                done.set_exception(MalformedError(reason))
            return
        micro_batch = getattr(effect, "micro_batch", 0)
        step = getattr(effect, "step", 0)
        self.take(ComputeFailed(step, micro_batch, reason, bad_input))

    async def _carry_out(self, effect: Effect) -> None:
        run = self._around.compute.run
        match effect:
            case RunForward():
                component = await self.ready()
                output, metrics = await run(
                    component.do_forward, effect.step, effect.micro_batch, effect.inputs
                )
                self.take(ForwardDone(effect.step, effect.micro_batch, output, metrics))
            case RunBackward():
                component = await self.ready()
                gradients = await run(
                    component.do_backward,
                    effect.step,
                    effect.micro_batch,
                    effect.gradients,
                    effect.weight,
                )
                await self._around.faults.reach("backward", self.vnode, effect.step)
                self.take(BackwardDone(effect.step, effect.micro_batch, tuple(gradients)))
            case RunApply():
                component = await self.ready()
                await run(component.do_apply, effect.step)
                self.take(ApplyDone(effect.step))
            case RunSave():
                component = await self.ready()
                state = await run(component.do_save, effect.step)
                done = self._saves.get(effect.step)
                if done is not None and not done.done():
                    done.set_result(state)
            case SendActivation():
                self._send_activation(effect)
            case SendGradient():
                self._send_gradient(effect)
            case Report():
                self._tasks.spawn(self._report(effect))
            case Trouble():
                self._tasks.spawn(
                    self._trouble(effect.step, "", effect.reason, bad_input=effect.bad_input)
                )
            case Refuse():
                pass  # given to whoever sent the message

    def _send_activation(self, effect: SendActivation) -> None:
        output = _array(effect.output)
        event = ActivationArrived(
            self._net.epoch, effect.step, effect.micro_batch, self.vnode, effect.slot,
            output, digest_of(output), effect.decided_step,
        )  # fmt: skip
        self._hop(effect.consumer, vnode_pb2.DIRECTION_FORWARD, effect.slot, output, event)

    def _send_gradient(self, effect: SendGradient) -> None:
        gradient = _array(effect.gradient)
        event = GradientArrived(
            self._net.epoch, effect.step, effect.micro_batch, self.vnode, effect.slot,
            gradient, digest_of(gradient), effect.decided_step,
        )  # fmt: skip
        self._hop(effect.producer, vnode_pb2.DIRECTION_BACKWARD, effect.slot, gradient, event)

    def _hop(
        self,
        to: str,
        direction: vnode_pb2.Direction,
        slot: int,
        tensor: Array,
        event: Arrival,
    ) -> None:
        async def here() -> common_pb2.Refusal | None:
            return await self._around.deliver(self._net, to, event)

        async def send() -> None:
            local = self._net.locations.get(to) == self._around.swarm.keypair.peer_id
            request = vnode_pb2.TrainRequest(
                id=vnode_pb2.StepId(
                    network_id=self._net.network_id,
                    epoch=event.epoch,
                    step=event.step,
                    micro_batch=event.micro_batch,
                ),
                vnode=to,
                direction=direction,
                source=self.vnode,
                slot=slot,
                tensor=None if local else encode(tensor),
                decided_step=event.decided_step,
                tensor_digest=event.digest,
                state_digest=self._state_digest,
            )
            try:
                await self._around.courier.send(self._net, "VNode/Train", request, here)
            except EpochOver:
                pass
            except HopFailed as error:
                await self._trouble(event.step, error.host, f"{to}: {error}", bad_input=False)

        self._tasks.spawn(send())

    async def _report(self, effect: Report) -> None:
        held = orchestrator_pb2.Held(state_digest=self._state_digest)
        if effect.metrics is not None:
            held.loss = effect.metrics.loss
            held.correct = effect.metrics.correct
            held.samples = effect.metrics.samples
        await self._tell(
            orchestrator_pb2.ReportRequest(id=self._id(effect.step), vnode=self.vnode, held=held)
        )

    async def _trouble(self, step: int, host: str, reason: str, *, bad_input: bool) -> None:
        trouble = orchestrator_pb2.Trouble(host=host, reason=clip(reason), bad_input=bad_input)
        await self._tell(
            orchestrator_pb2.ReportRequest(id=self._id(step), vnode=self.vnode, trouble=trouble)
        )

    async def _tell(self, report: orchestrator_pb2.ReportRequest) -> None:
        try:
            await self._around.swarm.call(
                self._net.claimant,
                "Orchestrator/Report",
                report,
                orchestrator_pb2.ReportReply,
                timeout_s=REPORT_TIMEOUT_S,
            )
        except P2PNetError as error:  # it notices a step that stands still by itself
            logger.info("%s could not report to its orchestrator: %s", self.vnode, error)

    def _id(self, step: int) -> vnode_pb2.StepId:
        return vnode_pb2.StepId(network_id=self._net.network_id, epoch=self._net.epoch, step=step)


def _array(payload: object) -> Array:
    return payload  # type: ignore[return-value]  # the step core carries payloads without looking
