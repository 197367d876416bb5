"""Who follows a VNode's training, and who of them takes it over. Pure and deterministic.

A standby is of use where it does not die with the VNode that it follows, so it is on
another host, and in another IP group where there is room. What there is no room for is
left out: a network with too few standbys still trains, and goes back to its last cut
when a host dies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from p2pnet.orchestrator.costs import HostView
from p2pnet.orchestrator.hosts import all_hosts
from p2pnet.vnode.graph import CompiledGraph

Standbys = Mapping[str, tuple[str, ...]]


def wholes(graph: CompiledGraph) -> list[tuple[str, ...]]:
    """What is placed as a whole: a group's VNodes, or one that has no group."""
    together: dict[tuple[str, str], list[str]] = {}
    for vnode in graph.vnodes():
        group = graph.node(vnode).group
        together.setdefault(("group", group) if group else ("", vnode), []).append(vnode)
    return [tuple(vnodes) for vnodes in together.values()]


def promote(
    graph: CompiledGraph,
    current: Mapping[str, str],
    standbys: Standbys,
    usable: Collection[str],
) -> dict[str, str] | None:
    """Every VNode where it is, or on the first standby that is there; None: one has neither."""
    placed: dict[str, str] = {}
    for vnodes in wholes(graph):
        homes = {current.get(vnode, "") for vnode in vnodes}
        if len(homes) == 1 and current[vnodes[0]] in usable:
            home = current[vnodes[0]]
        else:
            able = [
                peer
                for peer in standbys.get(vnodes[0], ())
                if peer in usable and all(peer in standbys.get(vnode, ()) for vnode in vnodes)
            ]
            if not able:
                return None
            home = able[0]
        placed.update(dict.fromkeys(vnodes, home))
    return placed


def left_of(standbys: Standbys, placed: Mapping[str, str], usable: Collection[str]) -> Standbys:
    """The standbys that go on following: who is there, and does not host the VNode now."""
    left = {
        vnode: tuple(peer for peer in peers if peer in usable and peer != placed[vnode])
        for vnode, peers in standbys.items()
    }
    return {vnode: peers for vnode, peers in left.items() if peers}


def count(standbys: Standbys) -> int:
    """How many there are."""
    return sum(len(peers) for peers in standbys.values())


def choose(
    graph: CompiledGraph,
    hosts: Sequence[HostView],
    placed: Mapping[str, str],
    *,
    current: Mapping[str, str],
    following: Standbys,
    hosts_max: int = 0,
) -> dict[str, tuple[str, ...]]:
    """Standbys for a placement, as many as the network wants and there is room for.

    Args:
        placed: the placement; `current` and `following` say what the hosts' free memory
            counts as used that is this network's already.
        hosts_max: on so many hosts at most, those of the placement included; 0: any number.
    """
    wanted = graph.replicas - 1
    if wanted < 1:
        return {}
    free = {host.peer_id: host.memory_free_bytes for host in hosts}
    groups = {host.peer_id: host.ip_group or host.peer_id for host in hosts}
    usable = [host.peer_id for host in hosts if host.trust > 0 and not host.suspect]
    for vnode in graph.vnodes():
        need = graph.memory_bytes(vnode)
        for peer in (current.get(vnode, ""), *following.get(vnode, ())):
            if peer in free:
                free[peer] += need
        if placed[vnode] in free:
            free[placed[vnode]] -= need
    chosen: dict[str, tuple[str, ...]] = {}
    used = dict.fromkeys(all_hosts(placed, {}))
    load = dict.fromkeys(free, 0)
    for vnodes in wholes(graph):
        first, need = vnodes[0], sum(map(graph.memory_bytes, vnodes))
        taken = [placed[first]]
        for _ in range(wanted):
            near = {groups.get(peer, peer) for peer in taken}
            full = 0 < hosts_max <= len(used)
            able = [
                (
                    peer not in following.get(first, ()),  # it has all of it already
                    groups[peer] in near,
                    load[peer],
                    -free[peer],
                    peer,
                )
                for peer in usable
                if peer not in taken and free[peer] >= need and (peer in used or not full)
            ]
            if not able:
                break
            peer = min(able)[-1]
            taken.append(peer)
            used[peer] = None
            free[peer] -= need
            load[peer] += len(vnodes)
        if len(taken) > 1:
            chosen.update(dict.fromkeys(vnodes, tuple(taken[1:])))
    return dict(sorted(chosen.items()))
