"""Who watches whom: members on a ring in the order of a hash of their peer ids. Pure.

The observers of a member are those that follow it. Every node works this out
from what it knows, so that no view need be agreed upon; a peer cannot choose
whom it watches without making a new identity.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from heapq import merge

from p2pnet.keys import sha256

_SALT = b"p2pnet/v1/observers"
_BYTES = 32

Point = tuple[bytes, str]


def position(peer_id: str) -> bytes:
    """Where a peer stands on the ring."""
    return sha256(peer_id.encode() + _SALT)


def bucket(peer_id: str, depth: int) -> int:
    """In which of 2**depth equal parts of the ring a peer stands; depth up to 16."""
    return int.from_bytes(position(peer_id)[:2]) >> (16 - depth)


def points_of(peer_ids: Sequence[str]) -> list[Point]:
    """A `base` for rings."""
    return sorted((position(peer_id), peer_id) for peer_id in peer_ids)


class Ring:
    """Peer ids in the order of their positions.

    Args:
        base: points in order that many rings share, and that none of them changes.
    """

    def __init__(self, base: Sequence[Point] = ()) -> None:
        self.base = base
        self._added: list[Point] = []
        self._removed: set[Point] = set()  # of the base

    def __len__(self) -> int:
        return len(self.base) + len(self._added) - len(self._removed)

    def add(self, peer_id: str) -> None:
        """Puts a peer in its place; it must not be there yet."""
        point = (position(peer_id), peer_id)
        if point in self._removed:
            self._removed.discard(point)
        else:
            self._added.insert(bisect_left(self._added, point), point)

    def remove(self, peer_id: str) -> None:
        """Takes out a peer that is there."""
        point = (position(peer_id), peer_id)
        at = bisect_left(self._added, point)
        if at < len(self._added) and self._added[at] == point:
            del self._added[at]
        else:
            self._removed.add(point)

    def pick(self, rng: random.Random) -> str | None:
        """A peer at random, or None: try again."""
        index = rng.randrange(len(self.base) + len(self._added))
        if index >= len(self.base):
            return self._added[index - len(self.base)][1]
        point = self.base[index]
        return None if point in self._removed else point[1]

    def all(self) -> Iterator[str]:
        """All peers, in order."""
        return self._between(b"", b"\xff" * (_BYTES + 1))

    def after(self, peer_id: str) -> Iterator[str]:
        """The peers that follow, nearest first; every one but `peer_id`."""
        here = position(peer_id)
        yield from self._between(here + b"\0", b"\xff" * (_BYTES + 1))
        yield from self._between(b"", here)

    def before(self, peer_id: str) -> Iterator[str]:
        """The peers that go before, nearest first."""
        here = position(peer_id)
        yield from self._between(b"", here, backwards=True)
        yield from self._between(here + b"\0", b"\xff" * (_BYTES + 1), backwards=True)

    def within(self, depth: int, index: int) -> Iterator[str]:
        """The peers of one of 2**depth buckets, in order."""
        low = (index << (16 - depth)).to_bytes(3)[1:]
        high = ((index + 1) << (16 - depth)).to_bytes(3)
        return self._between(low, high[1:] if high[0] == 0 else b"\xff" * (_BYTES + 1))

    def _between(self, low: bytes, high: bytes, *, backwards: bool = False) -> Iterator[str]:
        spans = (_span(self.base, low, high, backwards), _span(self._added, low, high, backwards))
        if not self._added:
            found: Iterator[Point] = spans[0]
        elif not self.base:
            found = spans[1]
        else:
            found = merge(*spans, reverse=backwards)
        for point in found:
            if not self._removed or point not in self._removed:
                yield point[1]


def _span(points: Sequence[Point], low: bytes, high: bytes, backwards: bool) -> Iterator[Point]:
    # Positions are 32 bytes long, so that one with a byte more comes right after.
    first, end = bisect_left(points, (low, "")), bisect_left(points, (high, ""))
    indexes = range(end - 1, first - 1, -1) if backwards else range(first, end)
    return (points[index] for index in indexes)
