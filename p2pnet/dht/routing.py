"""The routing table: k-buckets by common prefix. Pure.

Maymounkov and Mazieres 2002, section 2.4: a full bucket keeps the contacts that
it has known longest as long as they answer, since who has stayed long is
likeliest to stay, and since a flood of newcomers then displaces nobody. Only
servers of the protocol come in here; who else asks is answered and forgotten.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from p2pnet.dht.keyspace import POSITION_BITS, common_prefix_bits, peer_position
from p2pnet.net.network import PeerInfo

K = 20
_SPARES_MAX = 5  # newcomers that wait beside a full bucket


@dataclass(frozen=True, slots=True)
class Contact:
    """A server that we know. `holder`: it announces that it keeps records."""

    peer_id: str
    addrs: tuple[str, ...]
    holder: bool
    seen_at: float

    @property
    def info(self) -> PeerInfo:
        """The contact as others are told of it."""
        return PeerInfo(self.peer_id, self.addrs)


@dataclass(slots=True)
class _Bucket:
    contacts: dict[str, Contact]  # the least recently seen first
    spares: dict[str, Contact]  # the latest last
    touched_at: float  # when its part of the space was last looked up


class RoutingTable:
    """At most K contacts a bucket; a bucket for each length of common prefix."""

    def __init__(self, own_peer_id: str, *, k: int = K) -> None:
        self._own_peer_id = own_peer_id
        self._own = peer_position(own_peer_id)
        self._k = k
        self._buckets: dict[int, _Bucket] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Contact]:
        for bucket in self._buckets.values():
            yield from bucket.contacts.values()

    def get(self, peer_id: str) -> Contact | None:
        """The contact of that id, if it is in the table."""
        bucket = self._buckets.get(self._number(peer_id))
        return bucket.contacts.get(peer_id) if bucket else None

    def has_room(self, peer_id: str) -> bool:
        """Whether a newcomer of that id would come in at once."""
        bucket = self._buckets.get(self._number(peer_id))
        return bucket is None or len(bucket.contacts) < self._k

    def seen(self, contact: Contact) -> Contact | None:
        """A server showed signs of life.

        Known addresses stay where it comes with none. Where its bucket is full it
        waits beside it, and the result is the contact that has been silent longest:
        to be asked, and removed if it does not answer.
        """
        if contact.peer_id == self._own_peer_id:
            return None
        number = self._number(contact.peer_id)
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = _Bucket({}, {}, -math.inf)
        known = bucket.contacts.pop(contact.peer_id, None)
        if known is not None or len(bucket.contacts) < self._k:
            if known is not None and not contact.addrs:
                contact = replace(contact, addrs=known.addrs)
            self._size += known is None
            bucket.contacts[contact.peer_id] = contact
            bucket.spares.pop(contact.peer_id, None)
            return None
        bucket.spares.pop(contact.peer_id, None)
        if len(bucket.spares) >= _SPARES_MAX:
            del bucket.spares[next(iter(bucket.spares))]
        bucket.spares[contact.peer_id] = contact
        return next(iter(bucket.contacts.values()))

    def moved(self, peer_id: str, addrs: tuple[str, ...]) -> None:
        """A peer says itself where it is now; says nothing of its being alive."""
        contact = self.get(peer_id)
        if contact is not None and addrs and addrs != contact.addrs:
            bucket = self._buckets[self._number(peer_id)]
            bucket.contacts[peer_id] = replace(contact, addrs=addrs)  # keeps its place

    def remove(self, peer_id: str) -> None:
        """A peer is gone or silent; the latest that waited takes its place."""
        number = self._number(peer_id)
        bucket = self._buckets.get(number)
        if bucket is None:
            return
        bucket.spares.pop(peer_id, None)
        if bucket.contacts.pop(peer_id, None) is None:
            return
        self._size -= 1
        if bucket.spares:
            _, spare = bucket.spares.popitem()
            bucket.contacts[spare.peer_id] = spare
            self._size += 1
        if not bucket.contacts:
            del self._buckets[number]

    def closest(self, target: int, n: int) -> list[Contact]:
        """The `n` contacts nearest to a position, nearest first."""
        return heapq.nsmallest(n, self, key=lambda c: peer_position(c.peer_id) ^ target)

    def touch(self, target: int, now: float) -> None:
        """The part of the space where `target` lies was just looked up."""
        bucket = self._buckets.get(common_prefix_bits(self._own, target))
        if bucket is not None:
            bucket.touched_at = now

    def stale(self, before: float) -> list[int]:
        """The numbers of the buckets not looked up since `before`, in order."""
        return sorted(n for n, bucket in self._buckets.items() if bucket.touched_at < before)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert self._size == sum(len(b.contacts) for b in self._buckets.values())
        for number, bucket in self._buckets.items():
            assert 0 <= number < POSITION_BITS, "we are in our own table"
            assert 0 < len(bucket.contacts) <= self._k
            assert len(bucket.spares) <= _SPARES_MAX
            for peer_id, contact in (bucket.contacts | bucket.spares).items():
                assert contact.peer_id == peer_id
                assert self._number(peer_id) == number
            assert not bucket.contacts.keys() & bucket.spares.keys()

    def _number(self, peer_id: str) -> int:
        return common_prefix_bits(self._own, peer_position(peer_id))
