"""A placement with its VNodes in contiguous runs, on the same hosts. Pure; see `runs`.

The greedy way looks at one VNode after the other and gives neighbours to different hosts.
Here each stretch of VNodes that it has found a place for, in the graph's order, is divided
anew among the hosts that it has found, and those that the neighbours of the stretch are on.
What stays where it was stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

from p2pnet.orchestrator.costs import edge_ns, speed_of, step_ns
from p2pnet.orchestrator.greedy import Greedy, Ground
from p2pnet.orchestrator.runs import Piece, Seat, split
from p2pnet.orchestrator.unit import Unit

_TOUR_MAX = 100  # hosts that are put in the order of the way from one to the next


def in_runs(plan: Greedy, ground: Ground) -> list[int] | None:
    """Where each unit goes, as leaves; None: nothing is different, or there is no room."""
    before = [plan.leaf_of(unit) for unit in ground.units]
    leaves = before[:]
    hosts, widths = _Hosts(plan, ground), _Widths(ground)
    begin = 0
    for stays, stretch in groupby(ground.units, key=plan.stays):
        end = begin + len(list(stretch))
        if not stays:
            seats = hosts.seats(leaves, begin, end)
            hosts.give(leaves, begin, end, -1)
            ends = split(
                [_piece(unit) for unit in ground.units[begin:end]],
                [widths.between(a, b, begin, end) for a, b in pairwise(seats)],
                [hosts.seat(leaf) for leaf in seats],
                all=end - begin == len(leaves),
            )
            if ends is not None:
                for leaf, first, last in zip(seats, [0, *ends], ends, strict=False):
                    leaves[begin + first : begin + last] = [leaf] * (last - first)
            hosts.give(leaves, begin, end, 1)
        begin = end
    return None if leaves == before else leaves


class _Hosts:
    """What the hosts have to do, and room for, with all that the plan has put there."""

    def __init__(self, plan: Greedy, ground: Ground) -> None:
        self._ground = ground
        self._hosts = ground.loads.hosts
        self._busy, self._free = plan.left()

    def seat(self, leaf: int) -> Seat:
        host = self._hosts[leaf]
        busy_ns, free_bytes = max(0, self._busy[leaf]), max(0, self._free[leaf])
        return Seat(busy_ns, step_ns(host), speed_of(host), free_bytes)

    def give(self, leaves: Sequence[int], begin: int, end: int, sign: int) -> None:
        """Puts units where they are to be; with -1 for `sign`, takes them from there."""
        for leaf, unit in zip(leaves[begin:end], self._ground.units[begin:end], strict=True):
            self._busy[leaf] += sign * self._ground.loads.cost_ns(leaf, unit.work)
            self._free[leaf] -= sign * unit.work.memory_bytes

    def seats(self, leaves: Sequence[int], begin: int, end: int) -> list[int]:
        """The hosts to divide a stretch among, in the order that its runs are to have."""
        order = list(dict.fromkeys(leaves[begin:end]))
        if self._ground.distances.matter and len(order) <= _TOUR_MAX:
            order = self._tour(order)
        ends = [leaves[begin - 1]] if begin else []
        ends += [leaves[end]] if end < len(leaves) and leaves[end] not in ends else []
        inner = [leaf for leaf in order if leaf not in ends]
        return [*ends[: bool(begin)], *inner, *ends[bool(begin) :]]

    def _tour(self, leaves: Sequence[int]) -> list[int]:
        """From one to the nearest that is left, each time."""
        left, tour = list(leaves), []
        at = left[0]
        while left:
            row = self._ground.distances.row(at)
            at = min(left, key=row.__getitem__)
            left.remove(at)
            tour.append(at)
        return tour


class _Widths:
    """What is sent across a cut before each unit, were the units in one line."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        graph, count = ground.graph, len(ground.units)
        position = {node.id: at for at, unit in enumerate(ground.units) for node in unit.nodes}
        edges, sizes = [0] * (count + 1), [0] * (count + 1)
        for vnode, at in position.items():
            for source in ground.sources[vnode]:
                first, last = sorted((position[source], at))
                size = graph.node(source).output.size_bytes * ground.batch_size
                if first != last:
                    for here, sign in ((first + 1, 1), (last + 1, -1)):
                        edges[here] += sign
                        sizes[here] += sign * size
        self._edges, self._sizes = list(accumulate(edges)), list(accumulate(sizes))
        self._known: dict[int, list[int]] = {}

    def between(self, one: int, other: int, begin: int, end: int) -> list[int]:
        """For two hosts, what a cut before each unit of a stretch, and behind it, costs in ns."""
        apart_ns = self._ground.distances.between_ns(one, other)
        if apart_ns not in self._known:
            each_ns = edge_ns(apart_ns, 0)
            cuts = list(zip(self._edges, self._sizes, strict=True))
            costs = {
                (edges, size): each_ns * (edges - 1) + edge_ns(apart_ns, size)
                for edges, size in dict.fromkeys(cuts)
            }
            self._known[apart_ns] = [costs[cut] for cut in cuts]
        whole = self._known[apart_ns]
        return whole[begin : end + 1] if end - begin < len(whole) - 1 else whole


def _piece(unit: Unit) -> Piece:
    return Piece(unit.work.vnodes, unit.work.flops, unit.work.memory_bytes)
