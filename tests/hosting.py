"""What tests of a host say to it by hand, in an orchestrator's, a feeder's or a VNode's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memory_swarm import MemorySwarm
from memory_wire import keypair_of

from p2pnet.dht.manifest import network_id_of
from p2pnet.keys import MANIFEST
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2, vnode_pb2
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array, digest_of, encode

BOSS = "boss"  # orchestrates, and is granted to
RIVAL = "rival"  # is granted to as well
ORDER = ("fc1", "act", "fc2", "skip", "out", "loss")  # of the small network


def manifest_of(
    graph: CompiledGraph, granted: Sequence[str] = (BOSS, RIVAL, "b")
) -> common_pb2.Signed:
    owner = keypair_of("owner")
    body = records_pb2.Manifest(
        owner=owner.public_key,
        name=graph.name,
        spec_digest=graph.digest,
        orchestrators=[keypair_of(name).peer_id for name in granted],
    )
    return owner.sign(MANIFEST, body.SerializeToString(deterministic=True))


def network_of(graph: CompiledGraph) -> str:
    return network_id_of(manifest_of(graph))


def allocation(
    graph: CompiledGraph, vnodes: Sequence[str] = ORDER, /, *, epoch: int = 1, **changes: Any
) -> pnode_pb2.AllocateRequest:
    """Asks for VNodes under an epoch; `changes` are of the request's fields."""
    fields: dict[str, Any] = {
        "network_id": network_of(graph),
        "epoch": epoch,
        "manifest": manifest_of(graph),
        "graph": graph.to_json(),
        "vnodes": vnodes,
        "lease_s": 60,
    }
    return pnode_pb2.AllocateRequest(**(fields | changes))


async def allocate(
    swarm: MemorySwarm,
    name: str,
    graph: CompiledGraph,
    vnodes: Sequence[str] = ORDER,
    /,
    *,
    by: str = BOSS,
    **changes: Any,
) -> pnode_pb2.AllocateReply:
    request = allocation(graph, vnodes, **changes)
    return await swarm.ask(name, "PNode/Allocate", request, pnode_pb2.AllocateReply, by=by)


async def place(
    swarm: MemorySwarm, graph: CompiledGraph, hosts: Mapping[str, str], **changes: Any
) -> None:
    """Allocates the whole network: the node of each VNode, by name."""
    locations = [
        pnode_pb2.Location(vnode=vnode, host=swarm[name].peer_id, epoch=1)
        for vnode, name in hosts.items()
    ]
    for name in dict.fromkeys(hosts.values()):
        mine = [vnode for vnode in hosts if hosts[vnode] == name]
        reply = await allocate(swarm, name, graph, mine, **{"locations": locations} | changes)
        assert not reply.HasField("refusal"), reply.refusal


def training_input(
    graph: CompiledGraph,
    vnode: str,
    source: str,
    array: Array,
    *,
    step: int = 1,
    epoch: int = 1,
    **changes: Any,
) -> vnode_pb2.TrainRequest:
    """An activation or a network input for the slot of `vnode` that takes `source`."""
    fields: dict[str, Any] = {
        "id": vnode_pb2.StepId(network_id=network_of(graph), epoch=epoch, step=step),
        "vnode": vnode,
        "direction": vnode_pb2.DIRECTION_FORWARD,
        "source": source,
        "slot": graph.node(vnode).inputs.index(source) if vnode in ORDER else 0,
        "tensor": encode(array),
        "decided_step": step - 1,
        "tensor_digest": digest_of(array),
    }
    return vnode_pb2.TrainRequest(**(fields | changes))


async def feed(
    swarm: MemorySwarm,
    graph: CompiledGraph,
    hosts: Mapping[str, str],
    batch: tuple[Array, Array],
    **changes: Any,
) -> None:
    """Feeds the inputs and the target of one step, each of which has to be taken."""
    for name, array in (("x", batch[0]), (TARGET, batch[1])):
        for vnode, slot in graph.consumers(name):
            request = training_input(graph, vnode, name, array, slot=slot, **changes)
            reply = await swarm.ask(hosts[vnode], "VNode/Train", request, vnode_pb2.HopReply)
            assert not reply.HasField("refusal"), reply.refusal
