"""Replies as the JSON that the command line prints: keys that people script."""

from __future__ import annotations

from typing import Any

from p2pnet.v1 import control_pb2, gossip_pb2, orchestrator_pb2
from p2pnet.vnode.graph import CompiledGraph


def member_json(row: control_pb2.MemberRow) -> dict[str, Any]:
    """A member as `p2pnet members --json` prints it."""
    advert = gossip_pb2.Advert.FromString(row.advert.payload)
    lent = advert.capabilities
    return {
        "peer_id": advert.peer_id,
        "state": row.state,
        "addrs": list(advert.addrs),
        "capabilities": {
            "cpus": lent.cpus,
            "memory_bytes": lent.memory_bytes,
            "memory_used_bytes": lent.memory_used_bytes,
            "arch": lent.arch,
            "devices": list(lent.devices),
            "device": lent.device,
            "threads": lent.threads,
            "matmul_gflops": lent.matmul_gflops,
            "hosting": lent.hosting,
        },
        "trust": "untrusted",
        "vnodes": lent.vnodes,
        "grpc": list(advert.grpc_targets),
    }


def where_json(row: control_pb2.WhereIsRow) -> dict[str, Any]:
    """A VNode's place as `p2pnet whereis --json` prints it."""
    return {
        "vnode": row.vnode,
        "peer_id": row.peer_id,
        "addrs": list(row.addrs),
        "epoch": row.epoch,
        "role": row.role,
        "expires_in_s": row.expires_in_s,
        "cid": row.cid,
    }


def status_json(reply: orchestrator_pb2.StatusReply) -> dict[str, Any]:
    """A network as `p2pnet status --json` prints it; MalformedError for no graph in the reply."""
    graph = CompiledGraph.from_json(reply.graph)
    hosted = {vnode.vnode: vnode for vnode in reply.vnodes if not vnode.standby}
    standbys: dict[str, list[str]] = {}
    for location in reply.locations:
        if location.standby:
            standbys.setdefault(location.vnode, []).append(location.host)
    vnodes = []
    for location in reply.locations:
        if location.standby:
            continue
        health = hosted.get(location.vnode)
        vnodes.append(
            {
                "vnode": location.vnode,
                "peer_id": location.host,
                "standbys": standbys.get(location.vnode, []),
                "epoch": location.epoch,
                "step": health.step if health else 0,
                "instantiated": bool(health and health.instantiated),
                "error": health.error if health else "",
            }
        )
    return {
        "network_id": reply.network_id,
        "name": reply.name,
        "state": reply.state,
        "detail": reply.detail,
        "epoch": reply.epoch,
        "step": reply.step,
        "committed_step": reply.committed_step,
        "orchestrator": reply.orchestrator,
        "learning": graph.learning,
        "micro_batches": graph.micro_batches,
        "staleness": graph.staleness,
        "clip_norm": graph.clip_norm,
        "replicas": graph.replicas,
        "vnodes": vnodes,
        "relocations": [
            {
                "vnode": move.vnode,
                "from": move.from_host,
                "to": move.to_host,
                "epoch": move.epoch,
                "reason": move.reason,
                "seconds": move.seconds,
            }
            for move in reply.relocations
        ],
        "steps_decided": reply.steps_decided,
        "orchestrator_bytes": reply.step_bytes,
    }
