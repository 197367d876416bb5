"""What works with tensors on a host. Made when the first VNode comes: an idle node has no numpy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.codecs import packed_bytes
from p2pnet.vnode.courier import Courier
from p2pnet.vnode.crew import Adopt, Crew, Surroundings
from p2pnet.vnode.edges import bytes_max, tensor_ref
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.hosting import Present
from p2pnet.vnode.inference import Inference
from p2pnet.vnode.network import HostedNetwork
from p2pnet.vnode.standby import Following
from p2pnet.vnode.tensors import Buffer

# The state that a VNode begins with; None: it is initialised from the seed.
FetchState = Callable[[HostedNetwork, str], Awaitable[bytes | None]]
HEADER_BYTES = 64 << 10  # of a safetensors file


class Engine:
    """Makes VNodes, and carries forward passes. Lives on the gRPC thread.

    Args:
        fetch: the state that a VNode begins with.
        forward: hands a forward pass to a VNode on this host.
    """

    def __init__(
        self,
        swarm: Swarm,
        compute: ComputeThread,
        faults: Faults,
        *,
        fetch: FetchState,
        forward: Callable[
            [vnode_pb2.ForwardRequest, Buffer | None], Awaitable[common_pb2.Refusal | None]
        ],
    ) -> None:
        courier = Courier(swarm)
        self.inference = Inference(swarm.keypair.peer_id, compute, courier, forward)
        self._around = Surroundings(swarm, compute, courier, faults, fetch)

    def begin(
        self,
        net: HostedNetwork,
        vnodes: Sequence[str],
        following: Sequence[str],
        adopt: Adopt | None,
    ) -> Present:
        """Runs VNodes of a network, and follows others, under its present epoch."""
        return Present(
            net,
            Crew(net, vnodes, self._around, adopt) if vnodes else None,
            Following(net, following, self._around, adopt) if following else None,
        )


def payload_bytes_max(
    graph: CompiledGraph,
    request: vnode_pb2.TrainRequest | vnode_pb2.ForwardRequest | vnode_pb2.FollowRequest,
) -> int:
    """The most bytes that can come with a request; KeyError if it names what there is not."""
    if isinstance(request, vnode_pb2.FollowRequest):
        return graph.node(request.vnode).state_bytes + HEADER_BYTES
    if isinstance(request, vnode_pb2.TrainRequest):
        ref = tensor_ref(request)
    elif request.source:
        ref = request.source
    else:
        return 0  # why there is no tensor
    return packed_bytes(bytes_max(graph, ref), request.tensor.codec)
