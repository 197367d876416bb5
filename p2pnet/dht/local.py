"""What this peer knows and keeps, and what it answers to others. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from p2pnet.dht.keyspace import peer_position, position
from p2pnet.dht.records import OpenRecord, open_set, serialise_set
from p2pnet.dht.routing import K, RoutingTable
from p2pnet.dht.rtt import RoundTrips
from p2pnet.dht.store import ProviderStore, RecordStore
from p2pnet.dht.wire import ADDRS_MAX, PEERS_MAX, Kind, Message
from p2pnet.errors import MalformedError
from p2pnet.net.network import PeerInfo

REPLICAS = 8  # on how many peers a record is kept
_SILENT_S = 30.0  # for so long, hints of a peer that did not answer are passed over
_SILENT_MAX = 1024


class Local:
    """The state that every operation reads: table, stores, round trips, who was silent."""

    def __init__(self, peer_id: str, *, server: bool) -> None:
        self.peer_id = peer_id
        self.server = server
        self.table = RoutingTable(peer_id)
        self.store = RecordStore(peer_position(peer_id))
        self.providers = ProviderStore()
        self.round_trips = RoundTrips()
        self.records_refused = 0
        self._silent: dict[str, tuple[float, tuple[str, ...]]] = {}

    def seeds(self, key: bytes) -> list[PeerInfo]:
        """Whom a lookup of `key` begins with."""
        return [contact.info for contact in self.table.closest(position(key), K)]

    def hints(self, peers: Iterable[PeerInfo], now: float) -> list[PeerInfo]:
        """What an answer names, without who was just silent; addresses we know come first.

        One that was silent is asked again at other addresses, or else a liar could
        hide a peer by naming it at wrong ones.
        """
        out: list[PeerInfo] = []
        for peer in peers:
            until, tried = self._silent.get(peer.peer_id, (now, ()))
            if until > now and all(addr in tried for addr in peer.addrs):
                continue
            known = self.table.get(peer.peer_id)
            addrs = known.addrs if known else ()
            addrs += tuple(addr for addr in peer.addrs if addr not in addrs)
            out.append(PeerInfo(peer.peer_id, addrs[:ADDRS_MAX]))
        return out

    def silent(self, peer: PeerInfo, now: float) -> None:
        """A peer did not answer in time at these addresses."""
        self.table.remove(peer.peer_id)
        self._silent.pop(peer.peer_id, None)
        if len(self._silent) >= _SILENT_MAX:
            del self._silent[next(iter(self._silent))]
        self._silent[peer.peer_id] = (now + _SILENT_S, peer.addrs)

    def alive(self, peer_id: str) -> None:
        """A peer gave a sign of life."""
        self._silent.pop(peer_id, None)

    def open(self, key: bytes, value: bytes | None, wall_ms: int) -> list[OpenRecord]:
        """The records in an answer or a request that hold; counts those that do not.

        Raises:
            MalformedError: not a record set.
        """
        if value is None:
            return []
        records, refused = open_set(value, key, wall_ms)
        self.records_refused += refused
        return records

    def answer(self, peer_id: str, message: Message, now: float, wall_ms: int) -> Message | None:
        """The reply to a peer's request, None where the protocol has none.

        Raises:
            MalformedError: a request that no honest peer makes, or we are no server.
        """
        if not self.server:
            raise MalformedError("a DHT request to a peer that serves none")
        key, kind = message.key, message.kind
        if kind is Kind.PING:
            return Message(kind)
        if not key:
            raise MalformedError("a DHT request without a key")
        if kind is Kind.PUT_VALUE:
            records = self.open(key, message.value, wall_ms)
            taken = [record for record in records if self.store.put(record, now)]
            # What is echoed was taken; the reply's record says so to the putter.
            return Message(kind, key, value=serialise_set(taken) if taken else None)
        if kind is Kind.ADD_PROVIDER:
            for provider in message.providers:
                if provider.peer_id == peer_id:  # nobody speaks for another
                    self.providers.add(key, provider, now)
            return None
        value: bytes | None = None
        providers: tuple[PeerInfo, ...] = ()
        if kind is Kind.GET_VALUE:
            held = self.store.get(key, now)
            value = serialise_set(held) if held else None
        elif kind is Kind.GET_PROVIDERS:
            providers = tuple(self.providers.get(key, now)[:PEERS_MAX])
        closer = tuple(
            contact.info
            for contact in self.table.closest(position(key), PEERS_MAX + 1)
            if contact.peer_id != peer_id and contact.addrs
        )
        return Message(kind, key, value, closer[:PEERS_MAX], providers)
