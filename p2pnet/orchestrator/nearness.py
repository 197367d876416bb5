"""Which hosts are near those that a VNode's inputs come from, and what being far costs. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from p2pnet.orchestrator.costs import Distances, hop_ns
from p2pnet.orchestrator.loads import Loads, Work

# For so many of a VNode's inputs, those that come last, so many hosts next to theirs.
_INPUTS_MAX, _NEAR_MAX = 3, 6

Arrival = tuple[int, int, int]  # when it is there, ns; at which host; bytes


class Nearness:
    """Hosts by their leaf in `Loads`; `near` is shared between plans on the same hosts."""

    def __init__(self, loads: Loads, distances: Distances, near: dict[int, list[int]]) -> None:
        self._loads = loads
        self._distances = distances
        self._near = near  # by host: all hosts, the nearest first; filled as they are asked for

    def waits_ns(
        self,
        leaves: Sequence[int],
        arrivals: Sequence[Arrival],
        onward: Sequence[tuple[int, int]],
    ) -> list[int]:
        """For each host how much later than at its source the last input is there.

        And for how long the outputs are on their way to where they are taken now.
        """
        waits = [0] * len(leaves)
        for at, source, size in arrivals:
            row, late = self._distances.row(source), at - arrivals[0][0]
            waits = [
                max(wait, late + hop_ns(row[leaf], size))
                for leaf, wait in zip(leaves, waits, strict=True)
            ]
        out = [0] * len(leaves)
        for target, size in onward:
            row = self._distances.row(target)
            out = [
                max(wait, hop_ns(row[leaf], size)) for leaf, wait in zip(leaves, out, strict=True)
            ]
        return [wait + more for wait, more in zip(waits, out, strict=True)]

    def candidates(self, arrivals: Sequence[Arrival], work: Work) -> list[int]:
        """The hosts of the inputs that come last and those next to them, of them that have room.

        Those of the very last one are at the end, the farthest from it last.
        """
        found: dict[int, None] = {}
        for _, source, _ in arrivals[:_INPUTS_MAX][::-1]:
            for leaf in self._next_to(source, work):
                found.pop(leaf, None)
                found[leaf] = None
        return list(found)

    def _next_to(self, source: int, work: Work) -> list[int]:
        near = self._near.get(source)
        if near is None:
            row, rank = self._distances.row(source), self._loads.rank
            # A distance is a multiple of more than there are ranks.
            key = [far + rank[leaf] for leaf, far in enumerate(row)]
            key[source] = -1
            near = self._near[source] = sorted(range(len(row)), key=key.__getitem__)
        found = []
        for leaf in near:
            if self._loads.free_bytes(leaf) >= work.memory_bytes:
                found.append(leaf)
                if len(found) == _NEAR_MAX:
                    break
        return found
