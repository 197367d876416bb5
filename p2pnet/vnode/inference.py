"""A shell: forward passes without training, hopping from stage to stage.

`Gathering` decides what is run when, and with what; here its decisions are carried out,
and what comes of them goes on to whoever takes it. The network's output waits for the
caller. Where a pass fails, the host that makes the output is told why, and tells who asks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pnet.bounded import keep_latest
from p2pnet.core import Tick
from p2pnet.errors import MalformedError, P2PNetError, ResourceError
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode import tensors
from p2pnet.vnode.codecs import codec_of
from p2pnet.vnode.courier import Courier, EpochOver, HopFailed
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.forwards import answering, head_of, wanted
from p2pnet.vnode.gathering import Effect, Event, Freed, Gathering, GiveUp, InputArrived, Part, Run
from p2pnet.vnode.network import HostedNetwork, clip, refusal
from p2pnet.vnode.outputs import Outputs
from p2pnet.vnode.sessions import Sessions
from p2pnet.vnode.stages import Stage, inference_stages_of
from p2pnet.vnode.tensors import Array, Buffer
from p2pnet.vnode.together import No, Result, do_continue, do_run

if TYPE_CHECKING:
    from p2pnet.vnode.crew import Crew
    from p2pnet.vnode.standby import Following

logger = logging.getLogger(__name__)

NETWORKS_MAX = 64
LOADING_MAX = 16  # runs that wait for VNodes to be made
REPLY_S = 0.5  # what is left of a caller's patience to tell it so

Deliver = Callable[[vnode_pb2.ForwardRequest, Buffer | None], Awaitable[common_pb2.Refusal | None]]


@dataclass(frozen=True, slots=True)
class _Pass:
    """Where a request is run here, and whose it is."""

    net: HostedNetwork
    crew: Crew | Following
    stage: Stage
    request_id: bytes
    session: bytes
    position: int
    tokens: int  # of this part of a session; 0: of no session
    replica: int


class Inference:
    """The forward passes under way on this host. Lives on the gRPC thread.

    Args:
        me: this host's peer id.
        deliver: hands a request to a VNode on this same host.
    """

    def __init__(self, me: str, compute: ComputeThread, courier: Courier, deliver: Deliver) -> None:
        self._me = me
        self._compute = compute
        self._courier = courier
        self._deliver = deliver
        self._gathering = Gathering()
        self._sessions = Sessions()
        self._outputs = Outputs()
        self._loading = 0
        self._standing_in: dict[tuple[str, int, int], tuple[Stage, ...]] = {}
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = TaskSet("forward passes")

    async def close(self) -> None:
        """Ends everything under way."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.close()

    async def forward(
        self,
        net: HostedNetwork,
        crew: Crew | Following,
        request: vnode_pb2.ForwardRequest,
        payload: Buffer | None,
        timeout_s: float,
    ) -> tuple[vnode_pb2.HopReply, Buffer | None]:
        """One input of one request, and the reply: with the output where that is asked for.

        Raises:
            MalformedError: bytes that are no tensor.
        """
        if no := self.take(net, crew, request, payload):
            return vnode_pb2.HopReply(refusal=no), None
        if request.collect and answering(net.graph, crew.inference_stages):
            return await self.collect(net, request.request_id, timeout_s)
        return vnode_pb2.HopReply(), None

    async def collect(
        self, net: HostedNetwork, request_id: bytes, timeout_s: float
    ) -> tuple[vnode_pb2.HopReply, Buffer | None]:
        """The reply with the output of a request; a refusal where that does not come in time."""
        try:
            patience_s = max(0.0, timeout_s - REPLY_S)
            output = await self._outputs.wait((net.network_id, request_id), patience_s)
        except MalformedError as error:
            no = refusal(common_pb2.REFUSAL_CODE_BAD_REQUEST, str(error))
            return vnode_pb2.HopReply(refusal=no), None
        except (TimeoutError, ResourceError) as error:
            detail = str(error) or "the output has not come in time"
            no = refusal(common_pb2.REFUSAL_CODE_FAILED, detail)
            return vnode_pb2.HopReply(refusal=no), None
        head, payload = tensors.encode(output)
        return vnode_pb2.HopReply(tensor=head), payload

    def take(
        self,
        net: HostedNetwork,
        crew: Crew | Following,
        request: vnode_pb2.ForwardRequest,
        payload: Buffer | None,
    ) -> common_pb2.Refusal | None:
        """One input of one request.

        Raises:
            MalformedError: bytes that are no tensor.
        """
        if request.failed:
            if request.vnode == net.graph.output:
                key = (net.network_id, request.request_id)
                kind = MalformedError if request.bad_input else ResourceError
                self._outputs.fail(key, kind(clip(request.failed)))
            return None
        head = head_of(net.graph, self._stages(net, crew, request.replica), request)
        if isinstance(head, common_pb2.Refusal):
            return head
        tensor = tensors.decode(request.tensor, payload, bytes_max=head.bytes_max)
        where = _Pass(
            net,
            crew,
            head.stage,
            request.request_id,
            request.session,
            request.position,
            head.tokens,
            request.replica,
        )
        self._handle(
            InputArrived(
                stage=(net.network_id, net.epoch, request.replica, head.stage.nodes[0]),
                request=request.request_id,
                place=head.place,
                places=len(head.stage.inputs),
                samples=len(tensor),
                size_bytes=tensor.nbytes,
                tensor=tensor,
                where=where,
                together_max=net.graph.batch_max,
                session=request.session,
            )
        )
        return None

    def _stages(self, net: HostedNetwork, crew: Crew | Following, replica: int) -> Sequence[Stage]:
        """What a pass goes through here: the VNodes, or those whose r-th standby this is."""
        if replica == 0 or net.graph.replicas <= 2:
            return crew.inference_stages
        key = (net.network_id, net.epoch, replica)
        if key not in self._standing_in:
            here = [
                vnode
                for vnode in crew.vnodes
                if net.standbys.get(vnode, ())[replica - 1 : replica] == (self._me,)
            ]
            found = inference_stages_of(net.graph, here)
            keep_latest(self._standing_in, key, found, NETWORKS_MAX)
        return self._standing_in[key]

    # The core

    def _handle(self, event: Event) -> None:
        if self._closed:
            return
        now = asyncio.get_running_loop().time()
        for effect in self._gathering.handle(event, now):
            self._do(effect)
        if self._timer is None:
            self._set_timer()

    def _set_timer(self) -> None:
        """For the next deadline; one that has moved on meanwhile is found out when it comes."""
        deadlines = (self._gathering.deadline(), self._sessions.deadline())
        due = [deadline for deadline in deadlines if deadline is not None]
        self._timer = None
        if due:
            self._timer = asyncio.get_running_loop().call_at(min(due), self._tick)

    def _tick(self) -> None:
        self._sessions.expire(asyncio.get_running_loop().time())
        self._handle(Tick())
        self._set_timer()

    def _do(self, effect: Effect) -> None:
        match effect:
            case GiveUp():
                at = _pass_of(effect)
                self._fail(at, No(f"{at.stage.nodes[0]}: {effect.reason}"))
            case Run():
                self._tasks.spawn(self._run(effect))

    # Running

    async def _run(self, run: Run) -> None:
        first = _pass_of(run.parts[0])
        try:
            if first.crew.hosted is None:
                await self._load(first.crew)
            results = await self._compute_all(run, first)
        except P2PNetError as error:
            results = [No(f"{first.stage.nodes[0]}: {error}")] * len(run.parts)
        except Exception as error:
            logger.exception("%s of network %s failed", first.stage.nodes[0], first.net.graph.name)
            results = [No(f"{first.stage.nodes[0]}: {error}")] * len(run.parts)
        finally:
            self._handle(Freed())
        for part, result in zip(run.parts, results, strict=True):
            if isinstance(result, No):
                self._fail(_pass_of(part), result)
            else:
                self._pass_on(_pass_of(part), result)

    async def _load(self, crew: Crew | Following) -> None:
        """Others go on meanwhile: it may take as long as a state takes to be fetched."""
        if self._loading >= LOADING_MAX:
            raise ResourceError("this host has too many passes for VNodes that it still loads")
        self._loading += 1
        try:
            self._handle(Freed())
            await crew.ready()
        finally:
            self._loading -= 1

    async def _compute_all(self, run: Run, first: _Pass) -> list[Result]:
        hosted, nodes = first.crew.hosted, wanted(first.net.graph, first.stage)
        if hosted is None:
            raise ResourceError("the VNodes were let go")
        if not first.session:
            return await self._compute.run(do_run, hosted, first.stage, nodes, run.parts)
        now = asyncio.get_running_loop().time
        key = (run.stage, first.session)
        session = self._sessions.take(key, first.position, now())
        if session is None:
            raise ResourceError(f"the session is not here any more at token {first.position}")
        results = await self._compute.run(
            do_continue, hosted, first.stage, nodes, run.parts, session
        )
        session.tokens = first.position + first.tokens
        self._sessions.put(key, session, now())
        return results

    # Passing on

    def _pass_on(self, done: _Pass, outputs: Mapping[str, Array]) -> None:
        net = done.net
        if net.graph.output in done.stage.nodes:
            key = (net.network_id, done.request_id)
            self._outputs.settle(key, outputs[net.graph.output])
        for edge in done.stage.outputs:
            hop = vnode_pb2.ForwardRequest(
                network_id=net.network_id,
                epoch=net.epoch,
                request_id=done.request_id,
                vnode=edge.consumer,
                source=edge.node,
                slot=edge.slot,
                session=done.session,
                position=done.position,
                replica=done.replica,
            )
            self._tasks.spawn(self._hop(done, hop, outputs[edge.node]))

    def _fail(self, done: _Pass, no: No) -> None:
        """Tells the host that makes the output, and so who asks for it."""
        graph = done.net.graph
        hop = vnode_pb2.ForwardRequest(
            network_id=done.net.network_id,
            epoch=done.net.epoch,
            request_id=done.request_id,
            vnode=graph.output,
            failed=clip(no.reason),
            bad_input=no.bad_input,
            replica=done.replica,
        )
        self._tasks.spawn(self._hop(done, hop, None))

    async def _hop(self, done: _Pass, hop: vnode_pb2.ForwardRequest, output: Array | None) -> None:
        net = done.net
        try:
            payload = None
            if output is not None:
                codec = codec_of(net.graph.codec_of(hop.source))
                head, payload = await self._courier.encode(net, hop.vnode, output, codec)
                hop.tensor.CopyFrom(head)
            await self._courier.send(net, hop, payload, lambda: self._deliver(hop, payload))
        except EpochOver:
            pass
        except (HopFailed, P2PNetError) as error:
            logger.info("a forward pass of %s is lost: %s", net.graph.name, error)
            if not hop.failed:
                self._fail(done, No(f"{hop.vnode} cannot be reached: {error}"))


def _pass_of(item: Part | GiveUp) -> _Pass:
    assert isinstance(item.where, _Pass)
    return item.where
