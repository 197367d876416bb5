"""Contiguous runs: what is next to each other goes to one host, cut where little crosses. Pure.

This is the partitioning of chains (Bokhari, "Partitioning Problems in Parallel, Pipelined,
and Distributed Computing", IEEE Trans. Computers 37(1), 1988), as PipeDream divides a
network into stages (Narayanan et al., SOSP 2019). The slowest run is made as quick as it can
be by bisection with a greedy probe (Pinar, Aykanat, "Fast optimal load balancing algorithms
for 1D partitioning", J. Parallel Distrib. Comput. 64, 2004). Of all cuts whose slowest run is
within an eighth of that, dynamic programming finds those that leave no host without work,
then those with the least crossing, then the most even.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_ALIKE_SHIFT = 3  # a slowest run within an eighth of the best is as good
_EXACT_SHIFT = 7  # and the best is found to within a hundredth
# So far from where an even cut would be, in units; of what is large, nearer.
_AWAY_MAX, _AWAY_LARGE = 32, 6
_LARGE = 50_000  # units times hosts


@dataclass(frozen=True, slots=True)
class Piece:
    """What is not cut: so many VNodes, their FLOPs a step, their memory."""

    vnodes: int
    flops: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Seat:
    """A host for one run. `busy_ns` and `free_bytes` are without any of the pieces."""

    busy_ns: int
    step_ns: int  # a VNode
    speed: float  # FLOPs a nanosecond
    free_bytes: int


def split(
    pieces: Sequence[Piece], crossing: Sequence[Sequence[int]], seats: Sequence[Seat], *, all: bool
) -> list[int] | None:
    """Where each seat's run ends: piece numbers that do not fall, the last is `len(pieces)`.

    Args:
        crossing: for each seat but the first, what it costs, in ns, to have its run begin
            before piece 0, 1, ..., len(pieces).
        all: no seat is to be without a piece, as far as that goes.

    None: runs in this order of seats cannot have room for all.
    """
    runs = _Runs(pieces, seats)
    limit_ns = runs.least_ns()
    if limit_ns is None:
        return None
    count, last = len(pieces), len(seats)
    within_ns = limit_ns + (limit_ns >> _ALIKE_SHIFT)
    latest, earliest = runs.ends(within_ns), runs.begins(within_ns)
    away = _AWAY_MAX if count * last <= _LARGE else _AWAY_LARGE
    # By seat, for each end of its run: ((empty, crossing, uneven), the end before).
    table: list[dict[int, tuple[tuple[int, int, int], int]]] = [{0: ((0, 0, 0), 0)}]
    for number in range(last):
        after = number + 1
        even = (latest[number] * (last - after) + earliest[after] * after) // last
        low = max(earliest[after], even - away)
        high = min(latest[number], even + away)
        if after == last:
            low = high = count
        # By this the sum of squares is least where all are busy for as long.
        whole_ns = max(1, runs.busy_ns(number, 0, count) - seats[number].busy_ns)
        here: dict[int, tuple[tuple[int, int, int], int]] = {}
        for begin, (before, _) in table[-1].items():
            cut_ns = crossing[number - 1] if number else None
            # Behind a seat without a piece the cut is the one before it.
            fresh = number == 1 or (number > 1 and table[-1][begin][1] != begin)
            paid = before[1] + (cut_ns[begin] if cut_ns is not None and fresh else 0)
            most = runs.reach(number, begin, within_ns)
            for end in range(max(low, begin), min(high, most) + 1):
                busy_ns = runs.busy_ns(number, begin, end)
                uneven = before[2] + busy_ns * busy_ns // whole_ns
                value = (before[0] + (all and end == begin), paid, uneven)
                if end not in here or value < here[end][0]:
                    here[end] = value, begin
        table.append(here)
    if count not in table[-1]:
        return runs.ends(limit_ns)
    ends = [count]
    for here in table[:1:-1]:
        ends.append(here[ends[-1]][1])
    return ends[::-1]


class _Runs:
    """How long each seat is busy with pieces from here to there, and how far it gets."""

    def __init__(self, pieces: Sequence[Piece], seats: Sequence[Seat]) -> None:
        self._vnodes = [0, *accumulate(piece.vnodes for piece in pieces)]
        self._flops = [0, *accumulate(piece.flops for piece in pieces)]
        self._memory = [0, *accumulate(piece.memory_bytes for piece in pieces)]
        self._seats = seats
        self._count = len(pieces)

    def busy_ns(self, number: int, begin: int, end: int) -> int:
        seat = self._seats[number]
        flops = self._flops[end] - self._flops[begin]
        vnodes = self._vnodes[end] - self._vnodes[begin]
        return seat.busy_ns + vnodes * seat.step_ns + int(flops / seat.speed)

    def reach(self, number: int, begin: int, limit_ns: int) -> int:
        """The last end of a run from there that the seat has room and time for."""
        seat, memory = self._seats[number], self._memory
        most = bisect_right(memory, memory[begin] + seat.free_bytes, begin + 1) - 1
        if self.busy_ns(number, begin, most) <= limit_ns:
            return most
        return max(
            begin,
            bisect_right(
                range(most), limit_ns, begin + 1, key=lambda end: self.busy_ns(number, begin, end)
            )
            - 1,
        )

    def _back(self, number: int, end: int, limit_ns: int) -> int:
        """The first begin of a run to there that the seat has room and time for."""
        seat, memory = self._seats[number], self._memory
        least = bisect_left(memory, memory[end] - seat.free_bytes, 0, end)
        if self.busy_ns(number, least, end) <= limit_ns:
            return least
        return bisect_left(
            range(end), -limit_ns, least, key=lambda begin: -self.busy_ns(number, begin, end)
        )

    def ends(self, limit_ns: int) -> list[int]:
        """Of runs as long as they can be, from the left; the last may fall short."""
        found, at = [], 0
        for number in range(len(self._seats)):
            at = self.reach(number, at, limit_ns)
            found.append(at)
        return found

    def begins(self, limit_ns: int) -> list[int]:
        """Of runs as long as they can be, from the right; and the end."""
        found = [self._count]
        for number in range(len(self._seats) - 1, -1, -1):
            found.append(self._back(number, found[-1], limit_ns))
        return found[::-1]

    def least_ns(self) -> int | None:
        """What the slowest run takes at least, and a hundredth; None: there is no room."""
        high = max(self.busy_ns(number, 0, self._count) for number in range(len(self._seats)))
        if self.ends(high)[-1] < self._count:
            return None
        low = 0
        while high - low > high >> _EXACT_SHIFT:
            middle = (low + high) // 2
            low, high = (low, middle) if self.ends(middle)[-1] == self._count else (middle, high)
        return high
