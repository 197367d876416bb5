"""Which VNode goes where. Pure and deterministic: the same rows of hosts give the same plan.

Memory is a hard limit, as is a node's `group`: all of one group go to one host. What is left
is scored by the time that a VNode adds to a step where it would be: how long its host is
then busy with one step of all that it hosts, and how much later than on its neighbours'
hosts its inputs arrive there. VNodes are taken in topological order and each goes where
that is least: HEFT (Topcuoglu, Hariri, Wu, "Performance-Effective and Low-Complexity Task
Scheduling for Heterogeneous Computing", IEEE TPDS 13(3), 2002, the earliest finish with
communication), with the host's whole load in place of its first gap, as the steps of a
network repeat and a host serves several. Without distances that is greedy list scheduling
(Graham 1969: within twice the best for equal hosts). On the hosts found neighbours are then
brought together (`pipeline`), where the foretold step is better for it.

Of hosts that are about as good (an eighth of a step) those come first that are alone in
their IP group, and of a crowded one its first, so that the loss of one neighbourhood takes
few VNodes. Not every host is looked
at: the least loaded, the hosts of the neighbours, and those next to them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from p2pnet.orchestrator.costs import HostView as HostView
from p2pnet.orchestrator.costs import speed_of, step_ns
from p2pnet.orchestrator.greedy import REJECTED_MAX as REJECTED_MAX
from p2pnet.orchestrator.greedy import Greedy, Ground
from p2pnet.orchestrator.pipeline import in_runs
from p2pnet.orchestrator.predict import predict
from p2pnet.orchestrator.shortage import SwarmTooSmallError as SwarmTooSmallError
from p2pnet.vnode.graph import CompiledGraph

# So many VNodes times hosts are placed several times over, and the best placement taken.
_SMALL, _BEGINNINGS_MAX = 50_000, 8


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each VNode goes (in the graph's order), and why not elsewhere.

    A score is the time, in ms, that a step took longer for the VNode when it was placed: for
    which its host was then busy with all that it hosted, and was waiting for a far
    neighbour; lower is better. `rejected` has at most REJECTED_MAX rows of (vnode, peer_id,
    reason). `replicas` are further hosts of a VNode, none of them twice or its own.
    """

    assignments: Mapping[str, str]
    scores: Mapping[str, float]
    rejected: tuple[tuple[str, str, str], ...]
    replicas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def place(
    graph: CompiledGraph,
    hosts: Sequence[HostView],
    *,
    batch_size: int,
    current: Mapping[str, str] | None = None,
    exclude: Collection[str] = (),
    replicas: Mapping[str, int] | None = None,
    hosts_max: int = 0,
) -> Placement:
    """Assigns every VNode of a network to a host.

    `current` says where VNodes live now; who is in no host's list, or in
    `exclude` (peer ids), has to move. `replicas` says how many hosts a VNode is to have
    beside its own; they are in other IP groups where there is room. Ties go to hosts of
    different IP groups first, then by hash. `hosts_max`: on so many hosts at most,
    replicas aside; 0: on any number.

    Raises:
        SwarmTooSmallError: names the VNode, what it needs, what there is, how much memory is
            missing, and how many peers.
    """
    free = _place(graph, hosts, batch_size, current or {}, exclude, replicas or {})
    if not 0 < hosts_max < len({*free.assignments.values()}):
        return free
    counts: dict[str, int] = {}
    for peer_id in (current or {}).values():
        counts[peer_id] = counts.get(peer_id, 0) + 1
    able = sorted(
        (host for host in hosts if host.peer_id not in exclude and host.trust > 0),
        key=lambda host: (-counts.get(host.peer_id, 0), -speed_of(host), host.peer_id),
    )
    try:
        few = able[:hosts_max]
        return _place(graph, few, batch_size, current or {}, exclude, replicas or {})
    except SwarmTooSmallError:
        able.sort(key=lambda host: (-host.memory_free_bytes, host.peer_id))
        few = able[:hosts_max]
        return _place(graph, few, batch_size, current or {}, exclude, replicas or {})


def _place(
    graph: CompiledGraph,
    hosts: Sequence[HostView],
    batch_size: int,
    current: Mapping[str, str],
    exclude: Collection[str],
    replicas: Mapping[str, int],
) -> Placement:
    barred = frozenset(exclude)
    usable = [host for host in hosts if host.peer_id not in barred and host.trust > 0]
    usable.sort(key=lambda host: host.peer_id)
    ground = Ground(graph, usable, batch_size, replicas)
    plan = Greedy(ground, current)
    if not plan.place_all(ground.units):
        # What is large first: what is small fits between.
        by_need = sorted(ground.units, key=lambda unit: -unit.work.memory_bytes)
        plan = Greedy(ground, current)
        if not plan.place_all(by_need):
            raise plan.too_small()
    if not current and ground.distances.matter and len(ground.units) * len(usable) <= _SMALL:
        plan = _best_of(plan, ground)
    plan = _or_in_runs(plan, ground, current)
    vnodes = graph.vnodes()
    out = sorted(
        (host.peer_id, "excluded" if host.peer_id in barred else "not trusted")
        for host in hosts
        if host.peer_id in barred or not host.trust > 0
    )[:REJECTED_MAX]
    rejected = [
        (vnode, peer_id, reason)
        for vnode in vnodes[: REJECTED_MAX // max(1, len(out)) + 1]
        for peer_id, reason in out
    ]
    return Placement(
        {vnode: plan.assignments[vnode] for vnode in vnodes},
        {vnode: plan.scores[vnode] for vnode in vnodes},
        tuple((rejected + plan.rejected)[:REJECTED_MAX]),
        {vnode: tuple(plan.replicas[vnode]) for vnode in vnodes if vnode in plan.replicas},
    )


def _best_of(plan: Greedy, ground: Ground) -> Greedy:
    """Where a greedy way ends depends on where it begins: a few beginnings, and the best."""
    hosts = ground.loads.hosts
    best, best_s = plan, _cost_s(plan, ground, {})
    idle = sorted((host.vnodes * step_ns(host), -speed_of(host), host.peer_id) for host in hosts)
    for _, _, peer_id in idle[:_BEGINNINGS_MAX]:
        other = Greedy(ground, {}, begin_at=peer_id)
        if other.place_all(ground.units) and (other_s := _cost_s(other, ground, {})) < best_s:
            best, best_s = other, other_s
    return best


def _or_in_runs(plan: Greedy, ground: Ground, current: Mapping[str, str]) -> Greedy:
    """The same with neighbours together, if that is better."""
    leaves = in_runs(plan, ground)
    if leaves is None:
        return plan
    other = Greedy(ground, current)
    if not other.place_all(ground.units, leaves):
        return plan
    better = _cost_s(other, ground, current) < _cost_s(plan, ground, current)
    return other if better else plan


def _cost_s(plan: Greedy, ground: Ground, current: Mapping[str, str]) -> float:
    return predict(
        ground.graph,
        ground.loads.hosts,
        plan.assignments,
        batch_size=ground.batch_size,
        current=current,
        distances=ground.distances,
        sources=ground.sources,
    ).cost_s
