"""What works with tensors on a host. Made when the first VNode comes: an idle node has no numpy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from p2pnet.errors import ForgedError, ResourceError
from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.courier import Courier
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.hosted import HostedComponent
from p2pnet.vnode.inference import Inference
from p2pnet.vnode.messages import Event
from p2pnet.vnode.network import HostedNetwork, refusal
from p2pnet.vnode.tensors import encode
from p2pnet.vnode.trainee import Surroundings, Trainee

REPLY_S = 0.5  # what is left of a caller's patience to tell it so

# The state that a VNode begins with; None: it is initialised from the seed.
FetchState = Callable[[HostedNetwork, str], Awaitable[bytes | None]]


class Engine:
    """Makes VNodes, and carries forward passes. Lives on the gRPC thread.

    Args:
        fetch: the state that a VNode begins with.
        train, forward: hand a message to a VNode on this host.
    """

    def __init__(
        self,
        swarm: Swarm,
        compute: ComputeThread,
        faults: Faults,
        *,
        fetch: FetchState,
        train: Callable[[HostedNetwork, str, Event], Awaitable[common_pb2.Refusal | None]],
        forward: Callable[[vnode_pb2.ForwardRequest], Awaitable[common_pb2.Refusal | None]],
    ) -> None:
        courier = Courier(swarm)
        self.inference = Inference(compute, courier, forward)
        self._compute = compute
        self._fetch = fetch
        self._around = Surroundings(swarm, compute, courier, faults, self._load, train)

    def new_trainee(self, vnode: str, net: HostedNetwork) -> Trainee:
        """A VNode under a network's present epoch."""
        return Trainee(vnode, net, self._around)

    async def collect(
        self, net: HostedNetwork, request_id: bytes, timeout_s: float
    ) -> vnode_pb2.CollectReply:
        """The output of a forward pass, as a reply."""
        try:
            patience_s = max(0.0, timeout_s - REPLY_S)
            output = await self.inference.collect(net, request_id, patience_s)
        except (TimeoutError, ResourceError) as error:
            detail = str(error) or "the output has not come in time"
            return vnode_pb2.CollectReply(refusal=refusal(common_pb2.REFUSAL_CODE_FAILED, detail))
        return vnode_pb2.CollectReply(tensor=encode(output))

    async def _load(self, net: HostedNetwork, vnode: str) -> HostedComponent:
        node, graph = net.graph.node(vnode), net.graph
        inner = dict.fromkeys(graph.vnodes())
        component = HostedComponent(
            vnode,
            node.type,
            node.config,
            seed=graph.seed,
            optimizer=graph.optimizer.type,
            optimizer_config=graph.optimizer.config,
            wants_gradient=[ref in inner for ref in node.inputs],
        )
        state = await self._fetch(net, vnode)
        if state is not None:
            await self._compute.run(component.do_load, state)
        if component.step != net.base_step:
            raise ForgedError(
                f"the state of {vnode} is of step {component.step}, not {net.base_step}"
            )
        return component
