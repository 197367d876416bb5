"""Who watches whom: members on a ring in the order of a hash of their peer ids. Pure.

The observers of a member are those that follow it. Every node works this out
from what it knows, so that no view need be agreed upon; a peer cannot choose
whom it watches without making a new identity.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from p2pnet.keys import sha256

_SALT = b"p2pnet/v1/observers"


def position(peer_id: str) -> bytes:
    """Where a peer stands on the ring."""
    return sha256(peer_id.encode() + _SALT)


class Ring:
    """Peer ids in the order of their positions."""

    def __init__(self) -> None:
        self._points: list[tuple[bytes, str]] = []

    def __len__(self) -> int:
        return len(self._points)

    def add(self, peer_id: str) -> None:
        """Puts a peer in its place; it must not be there yet."""
        point = (position(peer_id), peer_id)
        self._points.insert(bisect_left(self._points, point), point)

    def remove(self, peer_id: str) -> None:
        """Takes out a peer that is there."""
        del self._points[self._index(peer_id)]

    def at(self, index: int) -> str:
        """The peer at an index, 0 to len - 1."""
        return self._points[index][1]

    def after(self, peer_id: str) -> Iterator[str]:
        """The peers that follow, nearest first; every one but `peer_id`, which must be there."""
        start = self._index(peer_id)
        for step in range(1, len(self._points)):
            yield self._points[(start + step) % len(self._points)][1]

    def before(self, peer_id: str) -> Iterator[str]:
        """The peers that go before, nearest first."""
        start = self._index(peer_id)
        for step in range(1, len(self._points)):
            yield self._points[start - step][1]

    def _index(self, peer_id: str) -> int:
        return bisect_left(self._points, (position(peer_id), peer_id))
