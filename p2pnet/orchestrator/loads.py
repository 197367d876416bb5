"""Who would be done first: hosts with their loads, and the search for the least. Pure.

The hosts are the leaves of a binary tree, like beside like; every inner node has the
least load and the most memory and speed below it, which bounds the finish of whatever is
below. The search opens the lowest bound first and so finds the very best leaf, mostly in
about log(hosts) steps. Loads are kept once for each class of need, without the hosts that
are too full for it: idle because full, they would spoil the bounds.
"""

from __future__ import annotations

import copy
import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from p2pnet.orchestrator.costs import STEP_NS, HostView, speed_of, step_ns

FOREVER_NS = 2**62
_TURNS_MAX = 16
_FULL = (FOREVER_NS, 2**31)


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be placed on one host: so many VNodes, their memory and FLOPs a step."""

    vnodes: int
    memory_bytes: int
    flops: int


class Loads:
    """How long each host is busy with a step, in ns, and what memory it has left."""

    def __init__(self, salt: str, hosts: Sequence[HostView], works: Iterable[Work]) -> None:
        self.hosts = hosts = sorted(hosts, key=_kind)
        self.leaf_of = {host.peer_id: leaf for leaf, host in enumerate(hosts)}
        count = len(hosts)
        self._size = size = 1 << max(1, (count - 1).bit_length())  # the root is no leaf
        turns = _turns(salt, hosts)
        in_order = sorted(turns, key=turns.__getitem__)
        ranks = {peer_id: rank for rank, peer_id in enumerate(in_order)}
        self.rank = [ranks[host.peer_id] for host in hosts]
        # Of hosts that are alike those of an IP group that has fewer before them.
        self._turn_ns = [
            min(turns[host.peer_id][0], _TURNS_MAX) * STEP_NS // (8 * _TURNS_MAX) for host in hosts
        ]
        self.busy = [host.vnodes * step_ns(host) for host in hosts]
        self._free = [-1] * (2 * size)
        self._room = [1] * (2 * size)
        self._speed = [1e-3] * (2 * size)
        self._step = [1 << 40] * (2 * size)
        for leaf, host in enumerate(hosts):
            self._free[size + leaf] = host.memory_free_bytes
            self._room[size + leaf] = max(1, host.memory_free_bytes)
            self._speed[size + leaf] = speed_of(host)
            self._step[size + leaf] = step_ns(host)
        for index in range(size - 1, 0, -1):
            left, right = 2 * index, 2 * index + 1
            self._free[index] = max(self._free[left], self._free[right])
            self._room[index] = max(self._room[left], self._room[right])
            self._speed[index] = max(self._speed[left], self._speed[right])
            self._step[index] = min(self._step[left], self._step[right])
        # At most what the fullest host has left.
        self.least_free_bytes = min((host.memory_free_bytes for host in hosts), default=0)
        # For each class of need: (load, rank) by tree index.
        classes = dict.fromkeys(_class(work.memory_bytes) for work in works)
        self._loads = {low: [_FULL] * (2 * size) for low in sorted(classes)}
        for low, loads in self._loads.items():
            for leaf in range(count):
                loads[size + leaf] = self._key(leaf, low)
            for index in range(size - 1, 0, -1):
                loads[index] = min(loads[2 * index], loads[2 * index + 1])

    def copy(self) -> Loads:
        """Another to charge, of the same hosts."""
        other = copy.copy(self)
        other.busy, other._free = self.busy[:], self._free[:]
        other._loads = {low: loads[:] for low, loads in self._loads.items()}
        return other

    def free_bytes(self, leaf: int) -> int:
        """What memory a host has left."""
        return self._free[self._size + leaf]

    def all_free_bytes(self) -> list[int]:
        """The same of every host."""
        return self._free[self._size : self._size + len(self.hosts)]

    def finish_ns(self, leaf: int, work: Work) -> int:
        """How long a host would be busy with a step if it had this as well."""
        return self.busy[leaf] + self._cost(self._size + leaf, work)

    def wanted_ns(self, leaf: int, work: Work) -> int:
        """The same and a little more, up to an eighth of a VNode's least, for a crowded IP group.

        For comparison: this is what `first` goes by.
        """
        return self.finish_ns(leaf, work) + self._turn_ns[leaf]

    def cost_ns(self, leaf: int, work: Work) -> int:
        """What this adds to a host's load."""
        return self._cost(self._size + leaf, work)

    def path_ns(self, leaf: int, vnodes: int, flops: int) -> int:
        """How long the next in the graph waits for it there."""
        index = self._size + leaf
        return vnodes * self._step[index] + int(flops / self._speed[index])

    def first(self, work: Work, within_ns: int = FOREVER_NS) -> Iterator[tuple[int, int]]:
        """(`wanted_ns`, leaf) of every host that has room, the first first; ties by rank.

        Only of those for which it is within so long.
        """
        need, count, flops = work.memory_bytes, work.vnodes, work.flops
        loads, free, room = self._loads[_class(need)], self._free, self._room
        step, speed, crowd = self._step, self._speed, STEP_NS * need
        queue = [(0, 0, 1)]
        while queue:
            finish, _, index = heapq.heappop(queue)
            if index >= self._size:
                yield finish, index - self._size
                continue
            for child in (2 * index, 2 * index + 1):
                if free[child] < need or loads[child] is _FULL:
                    continue
                bound, rank = loads[child]
                # As `_cost`; a call for each would be half of the time.
                bound += count * step[child] + int(flops / speed[child]) + crowd // room[child]
                if bound <= within_ns:
                    heapq.heappush(queue, (bound, rank, child))

    def charge(self, leaf: int, load_ns: int, memory_bytes: int) -> None:
        """Adds to a host's load and takes from its memory; negative: the other way."""
        self.busy[leaf] = max(0, self.busy[leaf] + load_ns)
        index = self._size + leaf
        self._free[index] -= memory_bytes
        self.least_free_bytes = min(self.least_free_bytes, self._free[index])
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

    def _cost(self, index: int, work: Work) -> int:
        """What a work adds to a host's load; for an inner node, a lower bound."""
        return (
            work.vnodes * self._step[index]
            + int(work.flops / self._speed[index])
            # To fill a host is as bad as another VNode on it: others may need the memory more.
            + STEP_NS * work.memory_bytes // self._room[index]
        )

    def _key(self, leaf: int, low: int) -> tuple[int, int]:
        if self._free[self._size + leaf] < low:
            return _FULL
        return self.busy[leaf] + self._turn_ns[leaf], self.rank[leaf]


def _class(need: int) -> int:
    """The least need of the same class: a number of two leading bits."""
    shift = max(0, need.bit_length() - 2)
    return need >> shift << shift


def _kind(host: HostView) -> tuple[int, float, str]:
    """Hosts of like memory, then of like speed, side by side."""
    return host.memory_free_bytes.bit_length(), speed_of(host), host.peer_id


def _turns(salt: str, hosts: Sequence[HostView]) -> dict[str, tuple[int, int]]:
    """How many of its IP group come before a host, and its place among all by hash."""
    by_hash = sorted(
        hosts, key=lambda host: hashlib.sha256(f"{salt}\0{host.peer_id}".encode()).digest()
    )
    seen: dict[str, int] = {}
    turns: dict[str, tuple[int, int]] = {}
    for position, host in enumerate(by_hash):
        turn = seen.get(host.ip_group, 0)
        seen[host.ip_group] = turn + 1
        turns[host.peer_id] = (turn if host.ip_group else 0, position)
    return turns
