"""What tests of a host say to it by hand, in an orchestrator's, a feeder's or a VNode's place.

The network's log is kept by node "a" alone, and has what the test makes up for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from claims import Log, manifest_for
from memory_swarm import MemorySwarm
from memory_wire import keypair_of

from p2pnet import keys
from p2pnet.dht.manifest import network_id_of
from p2pnet.log.history import placement_of
from p2pnet.v1 import common_pb2, log_pb2, pnode_pb2, vnode_pb2
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array, Buffer, digest_of, encode

BOSS = "boss"  # orchestrates, and is granted to
RIVAL = "rival"  # is granted to as well
GRANTED = (BOSS, RIVAL, "b")
KEEPER = "a"
ORDER = ("fc1", "act", "fc2", "skip", "out", "loss")  # of the small network

_LOGS: WeakKeyDictionary[MemorySwarm, dict[str, Log]] = WeakKeyDictionary()


def manifest_of(graph: CompiledGraph) -> common_pb2.Signed:
    return manifest_for(graph, GRANTED, keepers=[KEEPER])


def network_of(graph: CompiledGraph) -> str:
    return network_id_of(manifest_of(graph))


def log_of(swarm: MemorySwarm, graph: CompiledGraph) -> Log:
    """What is decided for a network in this swarm."""
    logs = _LOGS.setdefault(swarm, {})
    return logs.setdefault(network_of(graph), Log(graph, GRANTED, keepers=[KEEPER]))


async def teach(
    swarm: MemorySwarm, log: Log, *, names: Sequence[str] = KEEPER, by: str = BOSS
) -> None:
    """The keepers hear all that is decided."""
    request = log_pb2.LearnRequest(
        network_id=log.network_id, entries=log.entries, proofs=log.proofs
    )
    for name in names:
        await swarm.ask(name, "Keeper/Learn", request, log_pb2.LearnReply, by=by)


async def claim_for(
    swarm: MemorySwarm, graph: CompiledGraph, epoch: int, by: str, hosts: Mapping[str, str]
) -> common_pb2.Signed:
    """A claim of that epoch by somebody, which places VNodes (-> the host's name) so.

    It is in the log if that has none of the epoch yet; else it was, or is made up.
    """
    log = log_of(swarm, graph)
    if not log.history.claims:
        for node in swarm.nodes.values():  # nobody else shall look after what the test does
            await node.orchestrator.close()
    if epoch > log.history.epoch and by in GRANTED:
        log.claim_until(epoch, by, hosts)
        await teach(swarm, log)
    peers = {vnode: keypair_of(name).peer_id for vnode, name in hosts.items()}
    for signed in log.entries:
        entry = log_pb2.LogEntry.FromString(signed.payload)
        if entry.claim.epoch != epoch or entry.claim.orchestrator != keypair_of(by).peer_id:
            continue
        placed = placement_of(entry.claim)
        if all(
            [v for v in placed if placed[v] == host] == sorted(v for v in peers if peers[v] == host)
            for host in peers.values()
        ):
            return signed
    entry = log_pb2.LogEntry.FromString(log.proposal(by, hosts).payload)
    entry.claim.epoch = epoch
    return keypair_of(by).sign(keys.LOG_ENTRY, entry.SerializeToString(deterministic=True))


def allocation(
    graph: CompiledGraph,
    vnodes: Sequence[str],
    claim: common_pb2.Signed,
    /,
    *,
    epoch: int = 1,
    **changes: Any,
) -> pnode_pb2.AllocateRequest:
    """Asks for VNodes under a claim; `changes` are of the request's fields."""
    fields: dict[str, Any] = {
        "network_id": network_of(graph),
        "epoch": epoch,
        "manifest": manifest_of(graph),
        "graph": graph.to_json(),
        "vnodes": vnodes,
        "lease_s": 60,
        "claim": claim,
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
    epoch: int = 1,
    hosts: Mapping[str, str] | None = None,
    **changes: Any,
) -> pnode_pb2.AllocateReply:
    """Claims the network if need be, with `hosts` or all of it on one, and asks that one."""
    hosts = dict.fromkeys(vnodes, name) if hosts is None else hosts
    claim = await claim_for(swarm, graph, epoch, by, hosts)
    request = allocation(graph, vnodes, claim, epoch=epoch, **changes)
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
        reply = await allocate(
            swarm, name, graph, mine, hosts=hosts, **{"locations": locations} | changes
        )
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
) -> tuple[vnode_pb2.TrainRequest, Buffer]:
    """An activation or a network input for the slot of `vnode` that takes `source`; its bytes."""
    tensor, payload = encode(array)
    fields: dict[str, Any] = {
        "id": vnode_pb2.StepId(network_id=network_of(graph), epoch=epoch, step=step),
        "vnode": vnode,
        "direction": vnode_pb2.DIRECTION_FORWARD,
        "source": source,
        "slot": graph.node(vnode).inputs.index(source) if vnode in ORDER else 0,
        "tensor": tensor,
        "decided_step": step - 1,
        "tensor_digest": digest_of(array),
        "batch_samples": len(array) if array.ndim else 1,
    }
    return vnode_pb2.TrainRequest(**(fields | changes)), payload


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
            request, payload = training_input(graph, vnode, name, array, slot=slot, **changes)
            reply, _ = await swarm.ask_hop(hosts[vnode], request, payload)
            assert not reply.HasField("refusal"), reply.refusal
