"""A shell: the VNodes of one network on this host, their training steps carried out.

`StepCore` decides what is to be done; here it is done: tensors computed on the
compute thread, messages sent, results fed back. Components are made (or their
states fetched) at first use.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pnet.errors import ForgedError, MalformedError, P2PNetError, RefusedError
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.codecs import codec_of
from p2pnet.vnode.courier import Courier, EpochOver, HopFailed
from p2pnet.vnode.edges import (
    activation_to,
    array_of,
    arrival_of,
    gradient_to,
    head_of,
    pace_of,
)
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.hosted import Hosted
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
from p2pnet.vnode.network import HostedNetwork, clip, refusal
from p2pnet.vnode.reporting import Reporter
from p2pnet.vnode.stages import inference_stages_of
from p2pnet.vnode.step import StepCore
from p2pnet.vnode.tensors import Buffer

if TYPE_CHECKING:
    from p2pnet.vnode.components import Component

logger = logging.getLogger(__name__)

SAVE_TIMEOUT_S = 20.0
ROOM_S = 3.0  # how long a message waits for room, before its sender is told to come again
SNAPSHOTS_KEPT = 2
STATE_LOST = common_pb2.REFUSAL_CODE_STATE_LOST

# A VNode's component with the state that the epoch starts from, out of this host's memory.
Adopt = Callable[[str], Awaitable["Component"]]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every network of a host shares. `fetch`: the state that a VNode begins with."""

    swarm: Swarm
    compute: ComputeThread
    courier: Courier
    faults: Faults
    fetch: Callable[[HostedNetwork, str], Awaitable[bytes | None]]


class Crew:
    """The VNodes of one network on this host, under one epoch. Lives on the gRPC thread.

    Args:
        adopt: where the network goes on from a step that is not a cut.
    """

    def __init__(
        self,
        net: HostedNetwork,
        vnodes: Sequence[str],
        around: Surroundings,
        adopt: Adopt | None = None,
    ) -> None:
        self.vnodes = tuple(vnodes)
        self.errors: dict[str, str] = {}
        self._hosted = Hosted(net.graph, vnodes, around.compute.device)
        self.inference_stages = inference_stages_of(net.graph, vnodes)
        self._net = net
        self._around = around
        self._adopt = adopt
        self._core = StepCore(
            net.graph.name,
            self._hosted.stages,
            pace_of(net.graph),
            epoch=net.epoch,
            base_step=net.base_step,
        )
        self._reporter = Reporter(
            net, vnodes, self._hosted, self._core.decision, around.swarm, around.compute
        )
        self._made = False
        # What the core keeps is bounded, and so is what it asks for.
        self._effects: asyncio.Queue[Effect] = asyncio.Queue()
        self._room = asyncio.Event()  # set, and replaced, whenever something was used up
        self._saves: dict[int, asyncio.Future[dict[str, bytes]]] = {}
        self._snapshots: dict[int, dict[str, bytes]] = {}
        self._loading = asyncio.Lock()
        self._lost_state = False  # the one that a VNode begins with is nowhere to be had
        self._culprit = self.vnodes[0]  # whose computation failed
        self._closed = False
        self._tasks = TaskSet(f"network {net.graph.name}")
        self._tasks.spawn(self._work())

    @property
    def step(self) -> int:
        """The last step applied."""
        return self._core.applied_step

    @property
    def hosted(self) -> Hosted | None:
        """The components; None as long as they are not in memory."""
        return self._hosted if self._made else None

    async def close(self) -> None:
        """Stops: the epoch is over, or the VNodes have gone elsewhere."""
        self._closed = True
        for save in self._saves.values():
            if not save.done():
                save.set_exception(self._over())
        self._room.set()
        await self._tasks.close()

    async def ready(self) -> Hosted:
        """The components with their states, made at first use; raises P2PNetError."""
        async with self._loading:
            if not self._made:
                for vnode in self.vnodes:
                    try:
                        await make(self._hosted, vnode, self._net, self._around, self._adopt)
                    except P2PNetError as error:
                        self.errors[vnode] = clip(str(error))
                        raise
                self._made = True
        return self._hosted

    async def give(self, vnode: str, step: int, norm: float) -> Component:
        """A component with the state after `step`, for the epoch after this one.

        Raises:
            LocalError: it is not to be had.
        """
        return await self._around.compute.run(self._hosted.do_give, vnode, step, norm)

    async def hear(
        self, request: vnode_pb2.TrainRequest, payload: Buffer | None
    ) -> common_pb2.Refusal | None:
        """`hear_now`, but where there is no room for it yet, waits a little."""
        return await self._when_room(lambda: self.hear_now(request, payload))

    def hear_now(
        self, request: vnode_pb2.TrainRequest, payload: Buffer | None
    ) -> common_pb2.Refusal | None:
        """Takes a message from another host.

        Raises:
            MalformedError: bytes that are no tensor, or no training message.
        """
        event = head = head_of(request)
        if self._core.wants(head):
            found = arrival_of(self._net.graph, head, request, payload)
            if isinstance(found, common_pb2.Refusal):
                return found
            event = found
        return self.take(event)  # and says why, if that is a mistake

    async def _when_room(
        self, take: Callable[[], common_pb2.Refusal | None]
    ) -> common_pb2.Refusal | None:
        """What `take` answers; patient where that is for now that there is no room."""
        deadline = asyncio.get_running_loop().time() + ROOM_S
        while True:
            room = self._room
            answer = take()
            if answer is None or answer.code != common_pb2.REFUSAL_CODE_BUSY or self._closed:
                return answer
            try:
                async with asyncio.timeout_at(deadline):
                    await room.wait()
            except TimeoutError:
                return answer

    def decided(self, step: int, norms: Sequence[float]) -> common_pb2.Refusal | None:
        """Every step up to that one is decided."""
        return self.take(Decided(self._net.epoch, step, tuple(norms)))

    def take(self, event: Event) -> common_pb2.Refusal | None:
        """Takes what a peer sent; the refusal, if there is one, is the answer."""
        answer: common_pb2.Refusal | None = None
        for effect in self._core.handle(event, self._around.swarm.now()):
            if isinstance(effect, Refuse):
                answer = refusal(effect.code, effect.detail, epoch=self._net.epoch)
            else:
                self._effects.put_nowait(effect)
        return answer

    async def save(self, step: int, norms: Sequence[float] = ()) -> dict[str, bytes]:
        """The states after `step`, which is decided, by VNode, as safetensors.

        Raises:
            TimeoutError: the step is not applied in time.
            RefusedError: the epoch is over.
            P2PNetError: there is no such state.
        """
        await self.ready()
        if self._closed:
            raise self._over()
        if (kept := self._snapshots.get(step)) is not None:
            return kept
        done = self._saves.get(step)
        if done is None:
            if answer := self.take(SaveRequested(self._net.epoch, step, tuple(norms))):
                raise MalformedError(answer.detail)
            done = self._saves[step] = asyncio.get_running_loop().create_future()
            done.add_done_callback(lambda done: self._saved(step, done))
        async with asyncio.timeout(SAVE_TIMEOUT_S):
            return await asyncio.shield(done)

    def _saved(self, step: int, done: asyncio.Future[dict[str, bytes]]) -> None:
        del self._saves[step]
        if not done.cancelled():
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
                self._lost_state |= getattr(error, "code", 0) == STATE_LOST
                self._failed(effect, str(error), bad_input=isinstance(error, MalformedError))
            except Exception as error:  # of torch: whatever it is, the step is lost
                logger.exception("network %s failed here", self._net.graph.name)
                self._failed(effect, f"{type(error).__name__}: {error}", bad_input=False)

    def _failed(self, effect: Effect, reason: str, *, bad_input: bool) -> None:
        reason = clip(reason)
        if not bad_input:
            self.errors.setdefault(self._whose(effect), reason)
        if isinstance(effect, RunSave):
            done = self._saves.get(effect.step)
            if done is not None and not done.done():
                done.set_exception(MalformedError(reason))
            return
        micro_batch = getattr(effect, "micro_batch", 0)
        step = getattr(effect, "step", 0)
        self._culprit = self._whose(effect)
        self.take(ComputeFailed(step, micro_batch, reason, bad_input))
        self._made_room()

    async def _carry_out(self, effect: Effect) -> None:
        run, hosted = self._around.compute.run, self._hosted
        match effect:
            case RunForward(stage, step, micro_batch, inputs, batch_samples):
                if not self._made:
                    await self.ready()
                outputs, metrics = await run(
                    hosted.do_forward, stage, step, micro_batch, inputs, batch_samples
                )
                self.take(ForwardDone(stage, step, micro_batch, outputs, metrics))
                self._made_room()
            case RunBackward(stage, step, micro_batch, gradients):
                found = await run(hosted.do_backward, stage, step, micro_batch, gradients)
                for vnode in hosted.stages[stage].nodes:
                    await self._around.faults.reach("backward", vnode, step)
                self.take(BackwardDone(stage, step, micro_batch, found))
                self._made_room()
            case RunApply(step, norm):
                if not self._made:
                    await self.ready()
                await run(hosted.do_apply, step, norm)
                self.take(ApplyDone(step))
                self._made_room()
            case RunSave(step):
                await self.ready()
                states = await run(hosted.do_save, step)
                if self._core.pace.snapshot_every:
                    self._snapshots[step] = states
                    for old in sorted(self._snapshots)[:-SNAPSHOTS_KEPT]:
                        del self._snapshots[old]
                done = self._saves.get(step)
                if done is not None and not done.done():
                    done.set_result(states)
                # Nothing may follow for long, and forward passes go through standbys, too.
                self._tasks.spawn(self._reporter.tell_standbys())
            case SendActivations():
                self._tasks.spawn(self._send_activations(effect))
            case SendGradients():
                self._tasks.spawn(self._send_gradients(effect))
            case Report():
                self._tasks.spawn(self._reporter.held(effect))
            case Trouble():
                told = self._trouble(
                    effect.step, self._culprit, effect.reason, bad_input=effect.bad_input
                )
                self._tasks.spawn(told)
            case Refuse():
                pass  # given to whoever sent the message

    def _whose(self, effect: Effect) -> str:
        """The VNode that a failure is put down to: the first of the stage, or of all."""
        stage = getattr(effect, "stage", None)
        if stage is None:
            return self.vnodes[0]
        return self._net.graph.home(self._hosted.stages[stage].nodes[0])

    def _made_room(self) -> None:
        room, self._room = self._room, asyncio.Event()
        room.set()

    # Sending

    async def _send_activations(self, effect: SendActivations) -> None:
        edges = self._hosted.stages[effect.stage].outputs
        sends = [
            self._hop(edge.consumer, *activation_to(self._net, edge, effect, output), edge.node)
            for edge, output in zip(edges, effect.outputs, strict=True)
        ]
        if all(await asyncio.gather(*sends)):
            self.take(Sent(effect.stage, effect.step, effect.micro_batch))

    async def _send_gradients(self, effect: SendGradients) -> None:
        edges = [e for e in self._hosted.stages[effect.stage].inputs if e.wants_gradient]
        await asyncio.gather(
            *(
                self._hop(edge.source, *gradient_to(self._net, edge, effect, gradient), edge.source)
                for edge, gradient in zip(edges, effect.gradients, strict=True)
            )
        )

    async def _hop(
        self, to: str, event: Arrival, request: vnode_pb2.TrainRequest, ref: str
    ) -> bool:
        """Whether a tensor has arrived at another node, here or elsewhere.

        `ref` is the node whose output it is, or whose output's gradient.
        """
        if self._net.graph.home(to) in self.vnodes:
            answer = await self._locally(event)
            if answer is not None:
                await self._trouble(event.step, self._sender(event), f"{to}: {answer.detail}")
            return answer is None
        courier, tensor = self._around.courier, array_of(event.payload)
        codec = codec_of(self._net.graph.codec_of(ref))
        try:
            head, payload = await courier.encode(self._net, to, tensor, codec)
            request.tensor.CopyFrom(head)
            await courier.send(self._net, request, payload, lambda: self._locally(event))
        except EpochOver:
            return False
        except HopFailed as error:
            sender = self._sender(event)
            await self._trouble(event.step, sender, f"{to}: {error}", host=error.host)
            return False
        return True

    def _sender(self, event: Arrival) -> str:
        own = event.source if isinstance(event, ActivationArrived) else event.consumer
        return self._net.graph.home(own)

    async def _locally(self, event: Arrival) -> common_pb2.Refusal | None:
        while True:
            answer = await self._when_room(lambda: self.take(event))
            if answer is None or answer.code != common_pb2.REFUSAL_CODE_BUSY or self._closed:
                return answer

    async def _trouble(
        self, step: int, vnode: str, reason: str, *, host: str = "", bad_input: bool = False
    ) -> None:
        await self._reporter.trouble(
            step, vnode, reason, host=host, bad_input=bad_input, state_lost=self._lost_state
        )


async def make(
    hosted: Hosted,
    vnode: str,
    net: HostedNetwork,
    around: Surroundings,
    adopt: Adopt | None,
) -> None:
    """Puts a VNode's component, with the state that the epoch starts from, into `hosted`.

    Raises:
        P2PNetError: that state is not to be had, and why.
    """
    if adopt is not None:
        component = await adopt(vnode)
        await around.compute.run(hosted.do_adopt, vnode, component, net.base_step)
        return
    state = await around.fetch(net, vnode)
    step = await around.compute.run(hosted.do_make, vnode, state)
    if step != net.base_step:
        raise ForgedError(f"the state of {vnode} is of step {step}, not {net.base_step}")
