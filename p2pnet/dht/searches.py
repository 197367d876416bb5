"""What a lookup finds: one small state machine for each thing one asks of a DHT. Pure.

Each is told what happens to the requests that it wants sent, says what to send
next, and has a `result` in the end. None of them outlives its `until`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from p2pnet.dht.events import Failed, Nodes, Providers, Records, Result
from p2pnet.dht.keyspace import peer_position, position
from p2pnet.dht.local import REPLICAS, Local
from p2pnet.dht.lookup import Lookup
from p2pnet.dht.records import OpenRecord, merge, serialise_set
from p2pnet.dht.routing import K
from p2pnet.dht.store import PROVIDERS_MAX
from p2pnet.dht.wire import ADDRS_MAX, Kind, Message
from p2pnet.errors import MalformedError
from p2pnet.keys import peer_id_bytes
from p2pnet.net.network import PeerInfo


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that an operation wants sent. Not `tracked`: it does not wait for it."""

    peer: PeerInfo
    message: Message
    tracked: bool = True


class Search:
    """A lookup, and what is gathered on its way. Base of all operations."""

    def __init__(
        self, local: Local, request: Message, now: float, timeout_s: float, *, holders: int = 0
    ) -> None:
        self.local = local
        self.request = request
        self.until = now + timeout_s
        self.result: Result | None = None
        self.lookup = Lookup(local.peer_id, request.key, width=K, holders=holders)
        self.answers = 0

    def begin(self, now: float) -> list[Ask]:
        """The first requests."""
        self.lookup.heard(self.local.seeds(self.request.key))
        return self._go_on(now)

    def answered(
        self, peer_id: str, message: Message | None, holder: bool, now: float, wall_ms: int
    ) -> list[Ask]:
        """A reply came, late or not.

        Raises:
            MalformedError: it is none that an honest peer gives; to be counted as failed.
        """
        if message is None or message.kind is not self.request.kind:
            raise MalformedError("a DHT reply of another kind than its request")
        self._take(peer_id, message, holder, now, wall_ms)
        self.answers += 1
        self.lookup.answered(peer_id, holder=holder)
        self.lookup.heard(self.local.hints(message.closer, now))
        return self._go_on(now)

    def failed(self, peer_id: str, now: float) -> list[Ask]:
        """A request got no answer."""
        self.lookup.failed(peer_id)
        return self._go_on(now)

    def overdue(self, peer_id: str, now: float) -> list[Ask]:
        """A request takes long."""
        self.lookup.overdue(peer_id)
        return self._go_on(now)

    def expired(self, now: float) -> list[Ask]:
        """`until` has come."""
        return self._converged(now)

    def _go_on(self, now: float) -> list[Ask]:
        if self.result is not None:
            return []
        if self.lookup.done:
            return self._converged(now)
        return [Ask(peer, self.request) for peer in self.lookup.next()]

    def _take(self, peer_id: str, message: Message, holder: bool, now: float, wall_ms: int) -> None:
        """Gathers what a reply brings beside nearer peers."""

    def _converged(self, now: float) -> list[Ask]:
        """The lookup is over: sets `result`, or goes on with the requests returned."""
        raise NotImplementedError

    def _nobody_answered(self) -> bool:
        return self.answers == 0 and not self.lookup.asked_nobody


class NodeSearch(Search):
    """Who is nearest to a key; for a peer's id, where is that peer."""

    def __init__(
        self, local: Local, key: bytes, now: float, timeout_s: float, *, peer_id: str = ""
    ) -> None:
        super().__init__(local, Message(Kind.FIND_NODE, key), now, timeout_s)
        self._sought = peer_id

    @staticmethod
    def of_peer(local: Local, peer_id: str, now: float, timeout_s: float) -> NodeSearch:
        """A search that ends as soon as that peer itself answers."""
        return NodeSearch(local, peer_id_bytes(peer_id), now, timeout_s, peer_id=peer_id)

    def answered(
        self, peer_id: str, message: Message | None, holder: bool, now: float, wall_ms: int
    ) -> list[Ask]:
        asks = super().answered(peer_id, message, holder, now, wall_ms)
        if self.result is None and peer_id == self._sought:
            return self._converged(now)
        return asks

    def _converged(self, now: float) -> list[Ask]:
        if self._nobody_answered():
            self.result = Failed("no peer of the network answered")
        else:
            target = self.lookup.reachable(self._sought)
            self.result = Nodes(tuple(self.lookup.nearest()[:K]), target)
        return []


class RecordSearch(Search):
    """The records under a key, merged over the holders nearest to it.

    A copy of our own is only one more answer: it is believed alone only where we
    know nobody to ask. What a holder lacked is sent to it afterwards.
    """

    def __init__(self, local: Local, key: bytes, now: float, timeout_s: float) -> None:
        super().__init__(local, Message(Kind.GET_VALUE, key), now, timeout_s, holders=REPLICAS)
        self._records: list[OpenRecord] = []
        self._copies: dict[str, dict[str, tuple[int, int, bytes]]] = {}
        self._began = now

    def _take(self, peer_id: str, message: Message, holder: bool, now: float, wall_ms: int) -> None:
        records = self.local.open(self.request.key, message.value, wall_ms)
        # How long the answer was under way is not known: at most since we began.
        # Copies only grow older.
        since = now - self._began
        aged = [replace(record, age_s=record.age_s + since) for record in records]
        self._records = merge([*self._records, *aged])
        if holder:
            self._copies[peer_id] = {record.author: record.rank for record in records}

    def _converged(self, now: float) -> list[Ask]:
        if self._nobody_answered():
            self.result = Failed("no peer of the network answered")
            return []
        key = self.request.key
        own = self.local.store.get(key, now)
        merged = merge([*self._records, *own])
        live = [record for record in merged if record.expires_in_s > 0]
        self.result = Records(tuple(live), len(self._copies))
        nearest = [peer for peer in self.lookup.nearest() if peer.peer_id in self._copies][
            :REPLICAS
        ]
        if self.local.server and is_among(self.local.peer_id, nearest, REPLICAS, key):
            for record in live:
                self.local.store.put(record, now)
        repairs: list[Ask] = []
        for peer in nearest:
            copies = self._copies[peer.peer_id]
            lacking = [r for r in live if copies.get(r.author, (-1, -1, b"")) < r.rank]
            if lacking:
                message = Message(Kind.PUT_VALUE, key, serialise_set(lacking))
                repairs.append(Ask(peer, message, tracked=False))
        return repairs


class ProviderSearch(Search):
    """Who says that it provides a key."""

    def __init__(self, local: Local, key: bytes, now: float, timeout_s: float) -> None:
        super().__init__(local, Message(Kind.GET_PROVIDERS, key), now, timeout_s)
        self._providers: dict[str, PeerInfo] = {}
        self._gather(local.providers.get(key, now))

    def _take(self, peer_id: str, message: Message, holder: bool, now: float, wall_ms: int) -> None:
        self._gather(message.providers)

    def _gather(self, providers: Iterable[PeerInfo]) -> None:
        for peer in providers:
            known = self._providers.get(peer.peer_id)
            if known is not None:
                addrs = known.addrs + tuple(a for a in peer.addrs if a not in known.addrs)
                self._providers[peer.peer_id] = PeerInfo(peer.peer_id, addrs[:ADDRS_MAX])
            elif len(self._providers) < PROVIDERS_MAX:
                self._providers[peer.peer_id] = peer

    def _converged(self, now: float) -> list[Ask]:
        if self._nobody_answered():
            self.result = Failed("no peer of the network answered")
        else:
            self.result = Providers(tuple(self._providers.values()))
        return []


def is_among(peer_id: str, others: list[PeerInfo], n: int, key: bytes) -> bool:
    """Whether a peer is one of the `n` nearest to a key, `others` being sorted."""
    if len(others) < n:
        return True
    target = position(key)
    return peer_position(peer_id) ^ target < peer_position(others[n - 1].peer_id) ^ target
