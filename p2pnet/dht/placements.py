"""What a lookup is followed by: leaving something with the peers that it found. Pure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace

from p2pnet.dht.events import Failed, ReplyArrived, Stored
from p2pnet.dht.keyspace import peer_position
from p2pnet.dht.local import REPLICAS, Local
from p2pnet.dht.lookup import ALPHA, QUORUM
from p2pnet.dht.records import OpenRecord, serialise_set
from p2pnet.dht.routing import K
from p2pnet.dht.searches import Ask, Search, is_among
from p2pnet.dht.wire import Kind, Message
from p2pnet.net.network import PeerInfo

# The part of its time that a placement may spend on finding out where.
_LOOKUP_SHARE = 0.6


class Placement(Search):
    """Finds the peers nearest to a key, then leaves something with `copies` of them.

    Whoever does not take it is made up for by the next nearest. Base of the two
    that follow.
    """

    def __init__(
        self, local: Local, key: bytes, now: float, timeout_s: float, *, copies: int, holders: int
    ) -> None:
        # As many at once as are to take it: mostly those asked first do.
        alpha = max(ALPHA, holders)
        super().__init__(local, key, Kind.FIND_NODE, now, timeout_s, holders=holders, alpha=alpha)
        self._ends = self.until
        self.until = now + _LOOKUP_SHARE * timeout_s
        self._copies = copies
        self._spare: list[PeerInfo] | None = None  # None: still looking
        self._waiting: dict[str, bool] = {}  # asked to take it; True: overdue
        self._taken: dict[str, None] = {}
        self._put_at_once: dict[str, Message] = {}  # during the lookup

    def answered(self, peer_id: str, event: ReplyArrived, now: float) -> list[Ask]:
        if peer_id not in self._waiting:
            if self._spare is not None:
                return []  # an answer to the lookup that came after its end
            return super().answered(peer_id, event, now)
        overdue = self._waiting.pop(peer_id)
        if self._took(event.message):
            self._taken[peer_id] = None
            return self._store([], now)
        return self._store([] if overdue else self._next_spare(), now)

    def failed(self, peer_id: str, now: float) -> list[Ask]:
        if peer_id not in self._waiting:
            return super().failed(peer_id, now) if self._spare is None else []
        overdue = self._waiting.pop(peer_id)
        return self._store([] if overdue else self._next_spare(), now)

    def slow(self, peer_id: str, now: float) -> list[Ask]:
        if self._spare is not None or peer_id in self._put_at_once:
            return []  # to hedge would leave copies where they do not belong
        return super().slow(peer_id, now)

    def overdue(self, peer_id: str, now: float) -> list[Ask]:
        if peer_id not in self._waiting:
            return super().overdue(peer_id, now) if self._spare is None else []
        self._waiting[peer_id] = True
        return self._store(self._next_spare(), now)

    def expired(self, now: float) -> list[Ask]:
        if self._spare is None:
            return self._converged(now)
        self._finish()
        return []

    def _converged(self, now: float) -> list[Ask]:
        self.until = self._ends
        places = self._places()
        names = [peer.peer_id for peer in places]
        near = is_among(self.local.peer_id, names, self._copies, self.key)
        if self.local.server and near and self._take_ourselves(now):
            self._taken[self.local.peer_id] = None
        copies = self._copies - (self.local.peer_id in self._taken)
        chosen = [peer for peer in places[:copies] if peer.peer_id not in self._taken]
        self._spare = [peer for peer in places[copies:] if peer.peer_id not in self._taken]
        return self._store(chosen, now)

    def _store(self, peers: list[PeerInfo], now: float) -> list[Ask]:
        """Asks `peers` to take it; the end, where nobody is left to wait for."""
        asks = [Ask(peer, self._message(now)) for peer in peers]
        for peer in peers:
            self._waiting[peer.peer_id] = False
        in_time = sum(not overdue for overdue in self._waiting.values())
        if not self._waiting or (in_time == 0 and len(self._taken) >= QUORUM):
            self._finish()
        return asks

    def _finish(self) -> None:
        if self._taken:
            self._end(Stored(len(self._taken)))
        else:
            self._end(Failed("no peer of the network took it"))

    def _next_spare(self) -> list[PeerInfo]:
        return [self._spare.pop(0)] if self._spare else []

    @abstractmethod
    def _places(self) -> list[PeerInfo]:
        """Who could take it, nearest first."""

    @abstractmethod
    def _message(self, now: float) -> Message:
        """What asks a peer to take it."""

    @abstractmethod
    def _took(self, message: Message | None) -> bool:
        """Whether that reply says that it was taken."""

    @abstractmethod
    def _take_ourselves(self, now: float) -> bool:
        """Takes it, where we are one of the nearest; whether we could."""


class RecordPlacement(Placement):
    """Puts records on the holders nearest to their key.

    A peer that is likely to be one of them is asked to take it at once: its answer
    names nearer peers as well, so that mostly there is nothing left to do when the
    lookup has converged.
    """

    def __init__(
        self, local: Local, records: Iterable[OpenRecord], now: float, timeout_s: float
    ) -> None:
        self._records = tuple(records)
        self._began = now
        self._radius = local.neighbourhood()
        key = self._records[0].key
        super().__init__(local, key, now, timeout_s, copies=REPLICAS, holders=REPLICAS)
        self._young = self._message(now)

    def _ask(self, peer: PeerInfo) -> Message:
        contact = self.local.table.get(peer.peer_id)
        if contact is None or not contact.holder:
            return self._question
        if contact.position ^ self.lookup.target > self._radius:
            return self._question
        self._put_at_once[peer.peer_id] = self._young
        return self._young

    def _asked(self, peer_id: str) -> Message:
        return self._put_at_once.get(peer_id, self._question)

    def _take(self, peer_id: str, message: Message, event: ReplyArrived, now: float) -> None:
        if peer_id in self._put_at_once and self._took(message):
            self._taken[peer_id] = None

    def _places(self) -> list[PeerInfo]:
        places = self.lookup.holders()
        known = {peer.peer_id for peer in places}
        if len(places) < self._copies:
            # Among many stock peers, those near the key may keep no records.
            for contact in self.local.table.closest(self.lookup.target, len(self.local.table)):
                if contact.holder and contact.peer_id not in self.lookup:
                    places.append(contact.info)
            target = self.lookup.target
            if len(places) > len(known):
                places.sort(key=lambda peer: peer_position(peer.peer_id) ^ target)
        # Who was asked on the way and did not take it will not now.
        return [p for p in places if p.peer_id in self._taken or p.peer_id not in self._put_at_once]

    def _aged(self, now: float) -> list[OpenRecord]:
        since = now - self._began
        return [replace(record, age_s=record.age_s + since) for record in self._records]

    def _message(self, now: float) -> Message:
        return Message(Kind.PUT_VALUE, self.key, serialise_set(self._aged(now)))

    def _took(self, message: Message | None) -> bool:
        # The signed bytes themselves come back, read from where they are kept: a stock
        # peer's or a liar's acknowledgement of something else does not count.
        if message is None or message.kind is not Kind.PUT_VALUE or message.value is None:
            return False
        return any(record.signed.payload in message.value for record in self._records)

    def _take_ourselves(self, now: float) -> bool:
        taken = [self.local.store.put(record, now) for record in self._aged(now)]
        return any(taken)


class ProviderPlacement(Placement):
    """Tells the peers nearest to a key that we provide it."""

    def __init__(self, local: Local, key: bytes, now: float, timeout_s: float) -> None:
        super().__init__(local, key, now, timeout_s, copies=K, holders=0)

    def _places(self) -> list[PeerInfo]:
        return self.lookup.nearest()

    def _message(self, now: float) -> Message:
        # The shell adds where we are: addresses may change while this waits.
        own = PeerInfo(self.local.peer_id, ())
        return Message(Kind.ADD_PROVIDER, self.key, providers=(own,))

    def _took(self, message: Message | None) -> bool:
        return True  # the protocol has no reply to it

    def _take_ourselves(self, now: float) -> bool:
        self.local.providers.add(self.key, PeerInfo(self.local.peer_id, ()), now)
        return True
