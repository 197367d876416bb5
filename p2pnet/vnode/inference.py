"""A shell: forward passes without training, hopping from VNode to VNode.

Each VNode waits until all its inputs of a request have come, computes, and
passes the result to whoever consumes it; the network's output is kept for the
caller, who asks for it at the host of the VNode that makes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from p2pnet.errors import P2PNetError, ResourceError
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.courier import Courier, EpochOver, HopFailed
from p2pnet.vnode.edges import misfit, tensor_of
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.network import HostedNetwork, clip, refusal
from p2pnet.vnode.tensors import Array, encode
from p2pnet.vnode.trainee import Trainee

logger = logging.getLogger(__name__)

REQUESTS_MAX = 1024  # begun and not finished; the oldest gives way
OUTPUT_KEPT_S = 60.0

Key = tuple[str, str, bytes]  # network id, VNode, request id


class Inference:
    """The forward passes under way on this host. Lives on the gRPC thread."""

    def __init__(
        self,
        compute: ComputeThread,
        courier: Courier,
        deliver: Callable[[vnode_pb2.ForwardRequest], Awaitable[common_pb2.Refusal | None]],
    ) -> None:
        self._compute = compute
        self._courier = courier
        self._deliver = deliver
        self._waiting: OrderedDict[Key, dict[int, Array]] = OrderedDict()  # by slot
        self._outputs: OrderedDict[Key, asyncio.Future[Array]] = OrderedDict()
        self._tasks = TaskSet("forward passes")

    async def close(self) -> None:
        """Ends everything under way."""
        await self._tasks.close()

    def take(
        self, net: HostedNetwork, trainee: Trainee, request: vnode_pb2.ForwardRequest
    ) -> common_pb2.Refusal | None:
        """One input of one request.

        Raises:
            MalformedError: bytes that are no tensor.
        """
        node = net.graph.node(request.vnode)
        key = (net.network_id, request.vnode, request.request_id)
        if request.slot >= len(node.inputs) or node.inputs[request.slot] != request.source:
            return refusal(
                common_pb2.REFUSAL_CODE_BAD_REQUEST,
                f"{request.source} is not input {request.slot} of {request.vnode}",
            )
        if request.failed:
            self._waiting.pop(key, None)
            self._tasks.spawn(self._pass_on(net, request, None, request.failed))
            return None
        if answer := misfit(net.graph, request.source, request.vnode, request.tensor):
            return answer
        tensor = tensor_of(net.graph, request.source, request.tensor)
        slots = self._waiting.setdefault(key, {})
        slots[request.slot] = tensor
        if len(slots) == len(node.inputs):
            del self._waiting[key]
            inputs = tuple(slots[slot] for slot in range(len(node.inputs)))
            self._tasks.spawn(self._compute_one(net, trainee, request, inputs))
        while len(self._waiting) > REQUESTS_MAX:
            self._waiting.popitem(last=False)
        return None

    async def collect(self, net: HostedNetwork, request_id: bytes, timeout_s: float) -> Array:
        """Waits for the output of a request.

        Raises:
            TimeoutError: it has not come.
            ResourceError: a VNode on the way failed.
        """
        future = self._output((net.network_id, net.graph.output, request_id))
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(future)

    async def _compute_one(
        self,
        net: HostedNetwork,
        trainee: Trainee,
        request: vnode_pb2.ForwardRequest,
        inputs: tuple[Array, ...],
    ) -> None:
        try:
            component = await trainee.ready()
            output = await self._compute.run(component.do_infer, inputs)
        except P2PNetError as error:
            await self._pass_on(net, request, None, f"{request.vnode}: {error}")
        except Exception as error:
            logger.exception("%s of network %s failed", request.vnode, net.graph.name)
            await self._pass_on(net, request, None, f"{request.vnode}: {error}")
        else:
            await self._pass_on(net, request, output, "")

    async def _pass_on(
        self,
        net: HostedNetwork,
        request: vnode_pb2.ForwardRequest,
        output: Array | None,
        failed: str,
    ) -> None:
        failed = clip(failed)
        if request.vnode == net.graph.output:
            future = self._output((net.network_id, request.vnode, request.request_id))
            if not future.done():
                if output is None:
                    future.set_exception(ResourceError(failed))
                    future.exception()  # it may be that nobody asks
                else:
                    future.set_result(output)
            return
        tensor = None if output is None else encode(output)
        for consumer, slot in net.graph.consumers(request.vnode):
            if consumer == net.graph.loss.id:
                continue
            hop = vnode_pb2.ForwardRequest(
                network_id=net.network_id,
                epoch=net.epoch,
                request_id=request.request_id,
                vnode=consumer,
                source=request.vnode,
                slot=slot,
                tensor=tensor,
                failed=failed,
            )
            self._tasks.spawn(self._hop(net, hop))

    async def _hop(self, net: HostedNetwork, hop: vnode_pb2.ForwardRequest) -> None:
        try:
            await self._courier.send(net, "VNode/Forward", hop, lambda: self._deliver(hop))
        except EpochOver:
            pass
        except HopFailed as error:  # the caller's Collect runs out, and it tries again
            logger.info("a forward pass of %s is lost: %s", net.graph.name, error)

    def _output(self, key: Key) -> asyncio.Future[Array]:
        loop = asyncio.get_running_loop()
        if key not in self._outputs:
            self._outputs[key] = loop.create_future()
            loop.call_later(OUTPUT_KEPT_S, self._outputs.pop, key, None)
            while len(self._outputs) > REQUESTS_MAX:
                self._outputs.popitem(last=False)
        return self._outputs[key]
