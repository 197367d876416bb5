"""The routing table: k-buckets by common prefix. Pure.

Maymounkov and Mazieres 2002, section 2.4: a full bucket keeps the contacts that
it has known longest as long as they answer, since who has stayed long is
likeliest to stay, and since a flood of newcomers then displaces nobody. Only
servers of the protocol that have answered a lookup come in here.

Identities are free and IP addresses are not, so that a group of addresses has
few places (as in go-libp2p-kbucket's diversity filter): who wants to surround a
peer needs as many networks as the peer has neighbours. Only where few groups are
known at all, as in a swarm of one laboratory, a group may have more.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from p2pnet.dht.keyspace import POSITION_BITS, common_prefix_bits, peer_position
from p2pnet.net.network import PeerInfo

K = 20
UNKNOWN_GROUP = "?"  # of all who were seen nowhere
GROUP_TABLE_MAX = 2  # contacts of one IP group, where there are enough groups
_SPARES_MAX = 5  # newcomers that wait beside a full bucket


@dataclass(frozen=True, slots=True)
class Contact:
    """A server that we know. `holder`: it announces that it keeps records.

    `group`: its IP group, by the address where it was seen.
    """

    peer_id: str
    addrs: tuple[str, ...]
    holder: bool
    seen_at: float
    group: str
    position: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "position", peer_position(self.peer_id))

    @property
    def info(self) -> PeerInfo:
        """The contact as others are told of it."""
        return PeerInfo(self.peer_id, self.addrs)


@dataclass(slots=True)
class _Bucket:
    contacts: dict[str, Contact]  # the least recently seen first
    spares: dict[str, Contact]  # the latest last
    touched_at: float  # when its part of the space was last looked up


def group_limit(places: int, groups: int, least: int) -> int:
    """How many of `places` one of so many known groups may have: its share, or `least`."""
    return max(least, -(-places // groups))


class RoutingTable:
    """At most K contacts a bucket, a bucket for each length of common prefix."""

    def __init__(self, own_peer_id: str, *, k: int = K) -> None:
        self._own_peer_id = own_peer_id
        self._own = peer_position(own_peer_id)
        self._k = k
        self._buckets: dict[int, _Bucket] = {}
        self._contacts: dict[str, Contact] = {}  # all of them
        self._groups: Counter[str] = Counter()

    @property
    def position(self) -> int:
        """Ours."""
        return self._own

    @property
    def buckets(self) -> int:
        """How many buckets have contacts."""
        return len(self._buckets)

    @property
    def groups(self) -> int:
        """How many IP groups the contacts are of."""
        return len(self._groups)

    def __len__(self) -> int:
        return len(self._contacts)

    def __iter__(self) -> Iterator[Contact]:
        return iter(self._contacts.values())

    def get(self, peer_id: str) -> Contact | None:
        """The contact of that id, if it is in the table."""
        return self._contacts.get(peer_id)

    def has_room(self, peer_id: str) -> bool:
        """Whether a newcomer of that id would come in at once, its group permitting."""
        bucket = self._buckets.get(self._number(peer_id))
        return bucket is None or len(bucket.contacts) < self._k

    def admits(self, contact: Contact) -> bool:
        """Whether its IP group has a place for that contact."""
        known = self.get(contact.peer_id)
        itself = known is not None and known.group == contact.group
        groups = len(self._groups) + (contact.group not in self._groups)
        return self._groups[contact.group] - itself < group_limit(K, groups, GROUP_TABLE_MAX)

    def seen(self, contact: Contact) -> Contact | None:
        """A server showed signs of life.

        Known addresses stay where it comes with none. Where its bucket is full it
        waits beside it, and the result is the contact that has been silent longest:
        to be asked, and removed if it does not answer. One whose group has no place
        is left out, also if it was here with another address.
        """
        if contact.peer_id == self._own_peer_id:
            return None
        if not self.admits(contact):
            self.remove(contact.peer_id)
            return None
        number = self._number(contact.peer_id)
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = _Bucket({}, {}, -math.inf)
        known = bucket.contacts.get(contact.peer_id)
        if known is not None or len(bucket.contacts) < self._k:
            if known is not None:
                self._take_out(bucket, contact.peer_id)
                if not contact.addrs:
                    contact = replace(contact, addrs=known.addrs)
            self._put_in(bucket, contact)
            bucket.spares.pop(contact.peer_id, None)
            self._prune()
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
            # It keeps its place.
            bucket.contacts[peer_id] = self._contacts[peer_id] = replace(contact, addrs=addrs)

    def remove(self, peer_id: str) -> None:
        """A peer is gone or silent; the latest that waited and may takes its place."""
        number = self._number(peer_id)
        bucket = self._buckets.get(number)
        if bucket is None:
            return
        bucket.spares.pop(peer_id, None)
        if peer_id not in bucket.contacts:
            return
        self._take_out(bucket, peer_id)
        for spare in reversed(list(bucket.spares.values())):
            if self.admits(spare):
                del bucket.spares[spare.peer_id]
                self._put_in(bucket, spare)
                self._prune()  # it may be of a group that was not here
                break
        if not bucket.contacts and number in self._buckets:
            del self._buckets[number]

    def closest(self, target: int, n: int) -> list[Contact]:
        """The `n` contacts nearest to a position, nearest first."""
        found: list[Contact] = []
        for contacts in self._outwards(target):
            if len(found) >= n:
                break
            found += heapq.nsmallest(n - len(found), contacts, key=lambda c: c.position ^ target)
        return found

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
        in_buckets = [c for bucket in self._buckets.values() for c in bucket.contacts.values()]
        assert len(in_buckets) == len(self._contacts)
        assert all(self._contacts[contact.peer_id] is contact for contact in in_buckets)
        groups: Counter[str] = Counter()
        for number, bucket in self._buckets.items():
            assert 0 <= number < POSITION_BITS, "we are in our own table"
            assert 0 < len(bucket.contacts) <= self._k
            assert len(bucket.spares) <= _SPARES_MAX
            groups.update(contact.group for contact in bucket.contacts.values())
            for peer_id, contact in (bucket.contacts | bucket.spares).items():
                assert contact.peer_id == peer_id
                assert self._number(peer_id) == number
            assert not bucket.contacts.keys() & bucket.spares.keys()
        assert groups == self._groups
        limit = group_limit(K, max(1, len(groups)), GROUP_TABLE_MAX)
        # A group may have gone meanwhile, or have made room for a spare of another.
        assert max(groups.values(), default=0) <= limit, "one IP group fills the table"

    def _prune(self) -> None:
        """A new group has come: others that had more than their places give them back."""
        limit = group_limit(K, len(self._groups), GROUP_TABLE_MAX)
        over = [group for group, count in self._groups.items() if count > limit]
        for group in over:
            members = [contact for contact in self if contact.group == group]
            for contact in members[limit:]:
                self.remove(contact.peer_id)

    def _outwards(self, target: int) -> Iterator[Iterable[Contact]]:
        # Contacts in shells about a target that shares b bits with us, the nearest
        # shell first: those of bucket b share more than b bits with it; those of all
        # longer buckets differ from it where we do, in bit b; those of bucket j < b
        # differ in bit j.
        at = common_prefix_bits(self._own, target)
        if at in self._buckets:
            yield self._buckets[at].contacts.values()
        yield [c for n, b in self._buckets.items() if n > at for c in b.contacts.values()]
        for number in sorted((n for n in self._buckets if n < at), reverse=True):
            yield self._buckets[number].contacts.values()

    def _put_in(self, bucket: _Bucket, contact: Contact) -> None:
        bucket.contacts[contact.peer_id] = self._contacts[contact.peer_id] = contact
        self._groups[contact.group] += 1

    def _take_out(self, bucket: _Bucket, peer_id: str) -> None:
        contact = bucket.contacts.pop(peer_id)
        del self._contacts[peer_id]
        self._groups[contact.group] -= 1
        if not self._groups[contact.group]:
            del self._groups[contact.group]

    def _number(self, peer_id: str) -> int:
        return common_prefix_bits(self._own, peer_position(peer_id))
