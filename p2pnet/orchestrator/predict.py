"""How long a step would take with a placement, and what of that takes longest. Pure.

A step is as long as the longest way through the graph: what each VNode takes on its host
(forward and back), what an edge to another host takes, and the waiting for a host that has
something else to do. Hosts work at one thing at a time, in the graph's order; before the
first VNode of this network a host has all that it hosts of others to do. Within a host an
edge costs nothing (`vnode.stages`).

Of a batch in micro-batches that is the way of the first. The others follow as quickly as
the busiest host lets them, its edges' CPU time included (Huang et al., "GPipe", 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from p2pnet.orchestrator.costs import (
    Distances,
    HostView,
    edge_cpu_ns,
    edge_ns,
    flops_of,
    sources_of,
    speed_of,
    step_ns,
)
from p2pnet.vnode.graph import CompiledGraph


@dataclass(frozen=True, slots=True)
class Prediction:
    """A foretold step: seconds, and the way through the graph that takes so long.

    `slowest_host` is the one that most of that way's time is spent on, `slowest_edge` that
    of its edges between hosts that takes longest (from VNode, to VNode, seconds), if any
    takes time. `busiest_host` has most to do in a step, whoever waits for it.
    """

    step_s: float
    path: tuple[str, ...]
    slowest_host: str
    slowest_host_s: float
    slowest_edge: tuple[str, str, float] | None
    busiest_host: str
    busiest_s: float

    @property
    def cost_s(self) -> float:
        """What a placement is to make small: the step, and the load of whom it loads most.

        The second is what bounds a host that serves several steps or networks at once.
        """
        return self.step_s + self.busiest_s


def predict(
    graph: CompiledGraph,
    hosts: Sequence[HostView],
    assignments: Mapping[str, str],
    *,
    batch_size: int,
    current: Mapping[str, str] | None = None,
    distances: Distances | None = None,
    sources: Mapping[str, Sequence[str]] | None = None,
) -> Prediction:
    """Foretells a step. Linear in the graph's edges.

    `assignments` has every VNode of the graph, on hosts that are in `hosts`. `current`
    says which VNodes the hosts' own counts have in them already, `distances` what is known
    of the same hosts in the same order, and `sources` every VNode's, where that is there
    already.
    """
    index = {host.peer_id: number for number, host in enumerate(hosts)}
    far = distances or Distances(hosts)
    takes = sources or {vnode: sources_of(graph, vnode) for vnode in graph.vnodes()}
    ours: dict[str, int] = {}
    for peer_id in (current or {}).values():
        ours[peer_id] = ours.get(peer_id, 0) + 1

    parts = max(1, min(graph.micro_batches, batch_size))

    def size_bytes(source: str) -> int:
        return graph.node(source).output.size_bytes * batch_size // parts

    def hop(source: str, target: str) -> int:
        here, there = index[assignments[source]], index[assignments[target]]
        return 0 if here == there else edge_ns(far.between_ns(here, there), size_bytes(source))

    busy: dict[str, int] = {}  # of a host, with all that it hosts of others
    each: dict[str, int] = {}  # and with a micro-batch of this network
    free_at: dict[int, int] = {}  # hosts at work for this network
    last_on: dict[int, str] = {}
    done_at: dict[str, int] = {}
    after: dict[str, str] = {}  # what each VNode waited for last
    spent: dict[str, int] = {}  # on its host, from when that turned to it
    for vnode in graph.vnodes():
        at = index[assignments[vnode]]
        host = hosts[at]
        ready = 0
        each.setdefault(host.peer_id, 0)
        for ref in takes[vnode]:
            if ref in done_at:
                arrival = done_at[ref]
                source = index[assignments[ref]]
                if source != at:
                    arrival += hop(ref, vnode)
                    for end in (hosts[source], host):
                        each[end.peer_id] += edge_cpu_ns(end, size_bytes(ref))
                if arrival > ready:
                    ready, after[vnode] = arrival, ref
        begin = ready
        if at not in free_at:
            others = max(0, host.vnodes - ours.get(host.peer_id, 0)) * step_ns(host)
            begin += others
            busy[host.peer_id] = others
        elif free_at[at] > ready:
            begin, after[vnode] = free_at[at], last_on[at]
            ready = begin
        work = step_ns(host) + int(flops_of(graph, vnode) * batch_size / speed_of(host))
        work //= parts
        done = begin + work
        each[host.peer_id] += work
        spent[vnode] = done - ready
        done_at[vnode] = free_at[at] = done
        last_on[at] = vnode
    for peer_id, part in each.items():
        busy[peer_id] += parts * part
    last = max(graph.vnodes(), key=lambda vnode: done_at[vnode])
    path = [last]
    while path[-1] in after:
        path.append(after[path[-1]])
    path.reverse()
    on_host: dict[str, int] = {}
    for vnode in path:
        peer_id = assignments[vnode]
        on_host[peer_id] = on_host.get(peer_id, 0) + spent[vnode]
    slowest = max(sorted(on_host), key=lambda peer_id: on_host[peer_id])
    busiest = max(sorted(busy), key=lambda peer_id: busy[peer_id])
    edges = [(hop(a, b), a, b) for a, b in pairwise(path) if a in takes[b]]
    edge = max(edges, default=(0, "", ""), key=lambda edge: edge[0])
    return Prediction(
        (done_at[last] + (parts - 1) * max(each.values())) / 1e9,
        tuple(path),
        slowest,
        on_host[slowest] / 1e9,
        (edge[1], edge[2], edge[0] / 1e9) if edge[0] else None,
        busiest,
        busy[busiest] / 1e9,
    )


def least_step_s(graph: CompiledGraph, hosts: Sequence[HostView], *, batch_size: int) -> float:
    """What no placement on these hosts can fall short of: every VNode on the best, no distances."""
    step = min(map(step_ns, hosts))
    speed = max(map(speed_of, hosts))
    parts = max(1, min(graph.micro_batches, batch_size))
    done_at: dict[str, int] = {}
    longest = 0
    for vnode in graph.vnodes():
        sources = sources_of(graph, vnode)
        ready = max((done_at[ref] for ref in sources if ref in done_at), default=0)
        work = (step + int(flops_of(graph, vnode) * batch_size / speed)) // parts
        done_at[vnode] = ready + work
        longest = max(longest, work)
    return (max(done_at.values()) + (parts - 1) * longest) / 1e9
