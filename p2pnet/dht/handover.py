"""Records that a newcomer should have, as it is nearer to their keys than we. Pure.

Republishing would bring them there in the end; until then a lookup that
converges on the newcomer finds nothing with it (Maymounkov and Mazieres 2002,
section 2.5). Of the holders that know it only the two nearest to the key hand a
record over, or all eight would.
"""

from __future__ import annotations

from collections import deque

from p2pnet.dht.keyspace import position
from p2pnet.dht.local import REPLICAS, Local
from p2pnet.dht.records import serialise_set
from p2pnet.dht.routing import Contact
from p2pnet.dht.wire import Kind, Message
from p2pnet.net.network import PeerInfo

_PAUSE_S = 0.2
_KEYS_AT_ONCE = 64  # looked at; fewer are sent
_SENT_AT_ONCE = 8
_GIVERS = 2
_NEWCOMERS_MAX = 64


class Handover:
    """Goes through what we hold for each newcomer, a little at a time."""

    def __init__(self, local: Local) -> None:
        self._local = local
        self._queue: deque[tuple[str, deque[bytes]]] = deque()
        self.next_at: float | None = None

    def newcomer(self, contact: Contact, now: float) -> None:
        """A peer that keeps records came into the table."""
        keys = self._local.store.keys()
        if keys and len(self._queue) < _NEWCOMERS_MAX:
            self._queue.append((contact.peer_id, deque(keys)))
            if self.next_at is None:
                self.next_at = now + _PAUSE_S

    def due(self, now: float) -> list[tuple[PeerInfo, Message]]:
        """What to send to whom now."""
        if self.next_at is None or now < self.next_at:
            return []
        out: list[tuple[PeerInfo, Message]] = []
        looked = 0
        while self._queue and looked < _KEYS_AT_ONCE and len(out) < _SENT_AT_ONCE:
            peer_id, keys = self._queue[0]
            newcomer = self._local.table.get(peer_id)
            if newcomer is None or not keys:
                self._queue.popleft()
                continue
            looked += 1
            key = keys.popleft()
            records = (
                self._local.store.get(key, now) if self._is_ours_to_give(key, newcomer) else []
            )
            if records:
                message = Message(Kind.PUT_VALUE, key, serialise_set(records))
                out.append((newcomer.info, message))
        self.next_at = now + _PAUSE_S if self._queue else None
        return out

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert (self.next_at is None) == (not self._queue)
        assert len(self._queue) <= _NEWCOMERS_MAX

    def _is_ours_to_give(self, key: bytes, newcomer: Contact) -> bool:
        target = position(key)
        own = self._local.table.position ^ target
        distance = newcomer.position ^ target
        others = [
            contact.position ^ target
            for contact in self._local.table.closest(target, REPLICAS + 1)
            if contact.holder and contact.peer_id != newcomer.peer_id
        ]
        nearer = sum(other < distance for other in others)
        before_us = sum(other < own for other in others)
        return nearer < REPLICAS and before_us < _GIVERS
