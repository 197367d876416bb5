"""Which VNode goes where. Pure and deterministic: the same members give the same plan.

Memory is a hard limit. What is left is scored by predicted load: how long a host
is busy with one training step of all that it hosts. VNodes are taken in topological
order and each goes where its host would be done first (greedy list scheduling;
Graham 1969 bounds it by twice the best for equal hosts). Loads are whole
nanoseconds, so that sums do not depend on their order.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from p2pnet.errors import UsageError
from p2pnet.units import format_size
from p2pnet.vnode.graph import CompiledGraph, Node

# What a step costs a VNode beside its FLOPs: two messages in, two out.
STEP_NS = 3_000_000
# Of a host that has not measured its speed yet, for each CPU that it lends.
GFLOPS_A_CPU = 4.0
GFLOPS_MIN, GFLOPS_MAX = 0.1, 1e6
# A VNode stays where it is unless another host would be done in half the time:
# moving it costs its neighbours a lookup and the swarm a copy of its state.
STAY_FACTOR = 2
REJECTED_MAX = 1_000
_CHECKS_MAX = 100_000
_FULL = (2**62, 2**31)


class SwarmTooSmallError(UsageError):
    """The network does not fit into the memory that is free."""


@dataclass(frozen=True, slots=True)
class HostView:
    """A PNode that can host.

    `memory_free_bytes` and `vnodes` are as it says itself, so they include what
    it hosts of this network already. `gflops` is 0 where it was not measured.
    """

    peer_id: str
    cpus: float
    memory_free_bytes: int
    gflops: float
    vnodes: int = 0
    ip_group: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each VNode goes (in the graph's order), and why not elsewhere.

    A score is the time, in ms, for which the host would be busy with one step of
    all that it hosted when the VNode was placed: lower is better. `rejected` has
    at most REJECTED_MAX rows of (vnode, peer_id, reason).
    """

    assignments: Mapping[str, str]
    scores: Mapping[str, float]
    rejected: tuple[tuple[str, str, str], ...]


def place(
    graph: CompiledGraph,
    hosts: Sequence[HostView],
    *,
    batch_size: int,
    current: Mapping[str, str] | None = None,
    exclude: Collection[str] = (),
) -> Placement:
    """Assigns every VNode of a network to a host.

    `current` says where VNodes live now; who is in no host's list, or in
    `exclude` (peer ids), has to move. Ties go to hosts of different IP groups
    first, then by hash.

    Raises:
        SwarmTooSmallError: names the VNode, what it needs, what there is and
            how much is missing.
    """
    barred = frozenset(exclude)
    usable = sorted(
        (host for host in hosts if host.peer_id not in barred), key=lambda host: host.peer_id
    )
    nodes = [graph.node(vnode) for vnode in graph.vnodes()]
    plan = _Plan(graph.name, usable, nodes, batch_size)
    if not plan.try_all(nodes, current or {}):
        # What is large first: what is small fits between.
        by_need = sorted(nodes, key=lambda node: -node.memory_bytes(batch_size))
        plan = _Plan(graph.name, usable, nodes, batch_size)
        if not plan.try_all(by_need, current or {}):
            raise _too_small(nodes, usable, batch_size, plan, current or {})
    out = sorted(host.peer_id for host in hosts if host.peer_id in barred)[:REJECTED_MAX]
    rejected = [
        (vnode, peer_id, "excluded")
        for vnode in graph.vnodes()[: REJECTED_MAX // max(1, len(out)) + 1]
        for peer_id in out
    ]
    return Placement(
        {vnode: plan.assignments[vnode] for vnode in graph.vnodes()},
        {vnode: plan.scores[vnode] for vnode in graph.vnodes()},
        tuple((rejected + plan.rejected)[:REJECTED_MAX]),
    )


class _Plan:
    """Hosts with their loads, and the search for the best of them.

    The hosts are the leaves of a binary tree, like beside like; every inner node has
    the least load and the most memory and speed below it, which bounds the finish of
    whatever is below. The search opens the lowest bound first and so finds the very
    best leaf, mostly in about log(hosts) steps. Loads are kept once for each class of
    need, without the hosts that are too full for it: idle because full, they would
    spoil the bounds.
    """

    def __init__(
        self, salt: str, hosts: Sequence[HostView], nodes: Sequence[Node], batch_size: int
    ) -> None:
        self.assignments: dict[str, str] = {}
        self.scores: dict[str, float] = {}
        self.rejected: list[tuple[str, str, str]] = []
        self.failed: Node | None = None
        self._batch = batch_size
        self._hosts = sorted(hosts, key=_kind)
        self._at = {host.peer_id: leaf for leaf, host in enumerate(self._hosts)}
        self._checks_left = _CHECKS_MAX
        count = len(self._hosts)
        self._size = size = 1 << max(1, (count - 1).bit_length())  # the root is no leaf
        rank = _ranks(salt, self._hosts)
        self._busy = [host.vnodes * STEP_NS for host in self._hosts]
        self._rank = [rank[host.peer_id] for host in self._hosts]
        self._free = [-1] * (2 * size)
        self._room = [1] * (2 * size)
        self._speed = [1.0] * (2 * size)
        for leaf, host in enumerate(self._hosts):
            self._free[size + leaf] = host.memory_free_bytes
            self._room[size + leaf] = max(1, host.memory_free_bytes)
            self._speed[size + leaf] = _gflops(host)
        for index in range(size - 1, 0, -1):
            self._free[index] = max(self._free[2 * index : 2 * index + 2])
            self._room[index] = max(self._room[2 * index : 2 * index + 2])
            self._speed[index] = max(self._speed[2 * index : 2 * index + 2])
        # For each class of need: (load, rank) by tree index.
        classes = dict.fromkeys(_class(node.memory_bytes(batch_size)) for node in nodes)
        self._loads = {low: [_FULL] * (2 * size) for low in sorted(classes)}
        for low, loads in self._loads.items():
            for leaf in range(count):
                loads[size + leaf] = self._key(leaf, low)
            for index in range(size - 1, 0, -1):
                loads[index] = min(loads[2 * index], loads[2 * index + 1])

    def try_all(self, nodes: Sequence[Node], current: Mapping[str, str]) -> bool:
        """Places the nodes in this order; False where one fits nowhere."""
        stays = {
            node.id: self._at[current[node.id]]
            for node in nodes
            if current.get(node.id) in self._at
        }
        for node in nodes:
            # A host's own count has its VNodes of this network in it, but nothing else of them.
            if node.id in stays:
                leaf = stays[node.id]
                cost = self._cost(self._size + leaf, node, node.memory_bytes(self._batch))
                self._charge(leaf, cost - STEP_NS, 0)
        for node in nodes:
            need = node.memory_bytes(self._batch)
            home = stays.get(node.id)
            if home is not None:
                self._charge(home, -self._cost(self._size + home, node, need), -need)
            self._note_rejected(node, need)
            best = self._best(node, need)
            if best is None:
                self.failed = node
                return False
            finish, leaf = best
            if home is not None and self._free[self._size + home] >= need:
                at_home = self._busy[home] + self._cost(self._size + home, node, need)
                if at_home <= STAY_FACTOR * finish:
                    finish, leaf = at_home, home
            self._charge(leaf, self._cost(self._size + leaf, node, need), need)
            self.assignments[node.id] = self._hosts[leaf].peer_id
            self.scores[node.id] = round(finish / 1e6, 3)
        return True

    def _best(self, node: Node, need: int) -> tuple[int, int] | None:
        """(finish in ns, leaf) of the host that would be done first; ties by rank."""
        loads = self._loads[_class(need)]
        queue = [(0, 0, 1)]
        while queue:
            finish, _, index = heapq.heappop(queue)
            if index >= self._size:
                return finish, index - self._size
            for child in (2 * index, 2 * index + 1):
                if self._free[child] >= need and loads[child] is not _FULL:
                    load, rank = loads[child]
                    bound = load + self._cost(child, node, need)
                    heapq.heappush(queue, (bound, rank, child))
        return None

    def _cost(self, index: int, node: Node, need: int) -> int:
        """What a VNode adds to a host's load, in ns; for an inner node, a lower bound."""
        # To fill a host is as bad as another VNode on it: others may need the memory more.
        crowding = STEP_NS * need // self._room[index]
        work = int(_flops(node) * self._batch / self._speed[index])  # a GFLOP/s is a FLOP/ns
        return STEP_NS + work + crowding

    def _charge(self, leaf: int, load_ns: int, memory_bytes: int) -> None:
        self._busy[leaf] = max(0, self._busy[leaf] + load_ns)
        index = self._size + leaf
        self._free[index] -= memory_bytes
        free = self._free
        while index > 1:
            index //= 2
            most = max(free[2 * index], free[2 * index + 1])
            if free[index] == most:
                break
            free[index] = most
        for low, loads in self._loads.items():
            index = self._size + leaf
            loads[index] = self._key(leaf, low)
            while index > 1:
                index //= 2
                least = min(loads[2 * index], loads[2 * index + 1])
                if loads[index] == least:
                    break
                loads[index] = least

    def _key(self, leaf: int, low: int) -> tuple[int, int]:
        if self._free[self._size + leaf] < low:
            return _FULL
        return self._busy[leaf], self._rank[leaf]

    def _note_rejected(self, node: Node, need: int) -> None:
        # For people, so for swarms that a person can read.
        for leaf, host in enumerate(self._hosts):
            if self._checks_left <= 0 or len(self.rejected) >= REJECTED_MAX:
                return
            self._checks_left -= 1
            free = self._free[self._size + leaf]
            if free < need:
                reason = f"needs {format_size(need)}, has {format_size(max(0, free))} left"
                self.rejected.append((node.id, host.peer_id, reason))


def _class(need: int) -> int:
    """The least need of the same class: a number of two leading bits."""
    shift = max(0, need.bit_length() - 2)
    return need >> shift << shift


def _flops(node: Node) -> int:
    return node.flops_forward + node.flops_backward


def _kind(host: HostView) -> tuple[int, float, str]:
    """Hosts of like memory, then of like speed, side by side."""
    return host.memory_free_bytes.bit_length(), _gflops(host), host.peer_id


def _gflops(host: HostView) -> float:
    gflops = host.gflops if host.gflops > 0 else GFLOPS_A_CPU * host.cpus
    # In this order NaN, which a peer may send, becomes the least.
    return max(GFLOPS_MIN, min(gflops, GFLOPS_MAX))


def _ranks(salt: str, hosts: Sequence[HostView]) -> dict[str, int]:
    """The order in which ties are broken: a host of every IP group before a group's second."""
    by_hash = sorted(
        hosts, key=lambda host: hashlib.sha256(f"{salt}\0{host.peer_id}".encode()).digest()
    )
    seen: dict[str, int] = {}
    keys: list[tuple[int, int, str]] = []
    for position, host in enumerate(by_hash):
        turn = seen.get(host.ip_group, 0)
        seen[host.ip_group] = turn + 1
        keys.append((turn if host.ip_group else 0, position, host.peer_id))
    return {peer_id: rank for rank, (_, _, peer_id) in enumerate(sorted(keys))}


def _too_small(
    nodes: Sequence[Node],
    hosts: Sequence[HostView],
    batch_size: int,
    plan: _Plan,
    current: Mapping[str, str],
) -> SwarmTooSmallError:
    if not hosts:
        return SwarmTooSmallError("no peer here hosts VNodes: start one with `p2pnet join`")
    failed = plan.failed
    assert failed is not None
    here = {host.peer_id for host in hosts}
    # What this network takes already is free for it.
    ours = sum(node.memory_bytes(batch_size) for node in nodes if current.get(node.id) in here)
    total = sum(node.memory_bytes(batch_size) for node in nodes)
    free = sum(host.memory_free_bytes for host in hosts) + ours
    largest = max(host.memory_free_bytes for host in hosts)
    need = failed.memory_bytes(batch_size)
    peers = "1 peer has" if len(hosts) == 1 else f"{len(hosts)} peers have"
    if total > free:
        lack = (
            f"{format_size(total)} in all, {format_size(total - free)} more than the "
            f"{format_size(free)} that {peers} free"
        )
    else:
        lack = (
            f"{format_size(total)} in all, and {peers} {format_size(free)} free, but in pieces "
            f"that are too small"
        )
    return SwarmTooSmallError(
        f"the swarm is too small: VNode {failed.id} needs {format_size(need)} and the most that a "
        f"peer has free is {format_size(largest)}; the network needs {lack}: let more peers join, "
        f"or join with a larger --memory"
    )
