"""What `p2pnet plan` shows: a placement, its reasons, and who slows it down. Pure.

It is the placement that an orchestrator with the same view makes, with memory for the
largest batches that a network may train with; the foretold step is for the batch asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median_low
from typing import Any

from p2pnet.orchestrator.costs import HostView, flops_of, speed_of, step_ns
from p2pnet.orchestrator.placement import Placement, place
from p2pnet.orchestrator.predict import Prediction, predict
from p2pnet.orchestrator.shortage import SwarmTooSmallError
from p2pnet.swarm import MemberView
from p2pnet.vnode.graph import CompiledGraph

SLOWS_FACTOR = 1.25  # a peer without which a step would be so much shorter is named
_WORTH_S = 0.005
# So many of the hosts that take longest are tried without; of a large network fewer.
_SUSPECTS_MAX = 8
_LARGE = 50_000  # VNodes times hosts


def host_view(member: MemberView) -> HostView:
    """A member as placement sees it."""
    return HostView(
        peer_id=member.peer_id,
        cpus=member.cpus,
        memory_free_bytes=member.memory_bytes - member.memory_used_bytes,
        gflops=member.gflops,
        vnodes=member.vnodes,
        ip_group=member.ip_group,
        trust=member.trust,
        coordinate=member.coordinate,
        suspect=member.suspect,
    )


def plan_json(
    graph: CompiledGraph, members: Sequence[MemberView], *, batch_size: int
) -> dict[str, Any]:
    """The plan as `p2pnet plan --json` prints it; docs/cli.md has its keys.

    Args:
        batch_size: samples of a step, for which its time is foretold.

    A network that does not fit gives an object with `error` and what is missing.
    """
    hosts = [host_view(member) for member in members if member.alive and member.hosting]
    out = [
        {"vnode": None, "peer_id": member.peer_id, "reason": "does not host"}
        for member in members
        if member.alive and not member.hosting
    ]
    try:
        placed = place(graph, hosts, batch_size=graph.batch_max)
    except SwarmTooSmallError as error:
        return {
            "name": graph.name,
            "error": str(error),
            "memory_missing_bytes": error.memory_missing_bytes,
            "peers_missing": error.peers_missing,
            "peer_bytes": error.peer_bytes,
            "rejected": out,
        }
    step = predict(graph, hosts, placed.assignments, batch_size=batch_size)
    rejected = [
        {"vnode": vnode, "peer_id": peer_id, "reason": reason}
        for vnode, peer_id, reason in placed.rejected
    ]
    return {
        "name": graph.name,
        "batch_size": batch_size,
        "placements": _placements(graph, hosts, placed, batch_size),
        "rejected": out + rejected,
        "predicted": _predicted(step, batch_size),
        "warnings": _warnings(graph, hosts, placed, step, batch_size),
    }


def _placements(
    graph: CompiledGraph,
    hosts: Sequence[HostView],
    placed: Placement,
    batch_size: int,
) -> list[dict[str, Any]]:
    by_id = {host.peer_id: host for host in hosts}
    rows = []
    for vnode, peer_id in placed.assignments.items():
        node, host = graph.node(vnode), by_id[peer_id]
        compute_ns = int(flops_of(graph, vnode) * batch_size / speed_of(host))
        rows.append(
            {
                "vnode": vnode,
                "peer_id": peer_id,
                "score": placed.scores[vnode],
                "type": node.type,
                "group": node.group,
                "ip_group": host.ip_group,
                "memory_bytes": graph.memory_bytes(vnode),
                "step_ms": _ms(step_ns(host) / 1e9 + compute_ns / 1e9),
            }
        )
    return rows


def _predicted(step: Prediction, batch_size: int) -> dict[str, Any]:
    edge = step.slowest_edge
    return {
        "step_ms": _ms(step.step_s),
        "samples_per_s": round(batch_size / step.step_s, 1),
        "path": list(step.path),
        "slowest_host": {"peer_id": step.slowest_host, "ms": _ms(step.slowest_host_s)},
        "slowest_edge": edge and {"from": edge[0], "to": edge[1], "ms": _ms(edge[2])},
        "busiest_host": {"peer_id": step.busiest_host, "ms": _ms(step.busiest_s)},
    }


def _warnings(
    graph: CompiledGraph,
    hosts: Sequence[HostView],
    placed: Placement,
    step: Prediction,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Peers that slow the whole down, the worst first."""
    suspects = [step.slowest_host]
    if len(graph.vnodes()) * len(hosts) <= _LARGE:
        suspects += [placed.assignments[vnode] for vnode in step.path]
    found = []
    for peer_id in list(dict.fromkeys(suspects))[:_SUSPECTS_MAX]:
        others = [host for host in hosts if host.peer_id != peer_id]
        without = "without it"
        try:
            instead = place(graph, others, batch_size=graph.batch_max).assignments
            other_s = predict(graph, others, instead, batch_size=batch_size).step_s
        except SwarmTooSmallError:
            if not others:
                continue
            # Its memory is needed; so what a usual peer in its place would be worth.
            without = "with a peer like the others in its place"
            usual = [_like(host, others) if host.peer_id == peer_id else host for host in hosts]
            instead = place(graph, usual, batch_size=graph.batch_max).assignments
            other_s = predict(graph, usual, instead, batch_size=batch_size).step_s
        if step.step_s >= SLOWS_FACTOR * other_s and step.step_s - other_s >= _WORTH_S:
            found.append((other_s, peer_id, without))
    host_of = {host.peer_id: host for host in hosts}
    return [
        {
            "peer_id": peer_id,
            "step_ms_without": _ms(other_s),
            "factor": round(step.step_s / other_s, 2),
            "text": (
                f"peer {peer_id} ({_describe(host_of[peer_id])}) makes a step "
                f"{step.step_s / other_s:.1f} times as long: {step.step_s * 1e3:.0f} ms, and "
                f"{other_s * 1e3:.0f} ms {without}"
            ),
        }
        for other_s, peer_id, without in sorted(found)
    ]


def _like(host: HostView, others: Sequence[HostView]) -> HostView:
    """A peer with its memory, and else like the others, next to one of them."""
    near = min(others, key=lambda other: (other.vnodes, other.peer_id))
    return replace(
        host,
        gflops=median_low([speed_of(other) for other in others]),
        vnodes=median_low([other.vnodes for other in others]),
        trust=1.0,
        coordinate=near.coordinate,
    )


def _describe(host: HostView) -> str:
    speed = f"{host.gflops:.3g} GFLOP/s" if host.gflops else "its speed not measured yet"
    return speed + (f", with {host.vnodes} VNodes already" if host.vnodes else "")


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
