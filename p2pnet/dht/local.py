"""What this peer knows and keeps, and what it answers to others. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from p2pnet.bounded import keep_latest
from p2pnet.dht.keyspace import POSITION_BITS, peer_position, position
from p2pnet.dht.rates import PUT_BYTES_A_TOKEN, SenderRates
from p2pnet.dht.records import OpenRecord, open_set, serialise_set
from p2pnet.dht.routing import UNKNOWN_GROUP, K, RoutingTable
from p2pnet.dht.rtt import RoundTrips
from p2pnet.dht.store import ProviderStore, RecordStore
from p2pnet.dht.wire import ADDRS_MAX, PEERS_MAX, Kind, Message
from p2pnet.errors import MalformedError
from p2pnet.net.groups import GroupOf, ip_group
from p2pnet.net.network import PeerInfo

REPLICAS = 8  # on how many peers a record is kept
_SILENT_S = 30.0  # for so long, hints of a peer that did not answer are passed over
_SILENT_MAX = 1024


class Local:
    """The state that every operation reads: table, stores, round trips, who was silent."""

    def __init__(self, peer_id: str, *, server: bool, group_of: GroupOf = ip_group) -> None:
        self.peer_id = peer_id
        self.server = server
        self.group_of = group_of
        self.table = RoutingTable(peer_id)
        self.store = RecordStore(peer_position(peer_id))
        self.providers = ProviderStore()
        self.rates = SenderRates()
        self.round_trips = RoundTrips()
        self.records_refused = 0
        self._silent: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._stalled: Counter[str] = Counter()

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
            if known is None or known.addrs == peer.addrs:
                out.append(peer)
                continue
            addrs = known.addrs
            addrs += tuple(addr for addr in peer.addrs if addr not in addrs)
            out.append(PeerInfo(peer.peer_id, addrs[:ADDRS_MAX]))
        return out

    def silent(self, peer: PeerInfo, now: float) -> None:
        """A peer did not answer in time at these addresses."""
        self.table.remove(peer.peer_id)
        keep_latest(self._silent, peer.peer_id, (now + _SILENT_S, peer.addrs), _SILENT_MAX)

    def stalled(self, peer_id: str, requests: int) -> None:
        """So many more (or fewer) requests to a peer are overdue, and not given up."""
        self._stalled[peer_id] += requests
        if self._stalled[peer_id] <= 0:
            del self._stalled[peer_id]

    def is_stalled(self, peer_id: str) -> bool:
        """Whether a peer has left a request unanswered for long: to be asked last."""
        return peer_id in self._stalled

    def neighbourhood(self) -> int:
        """How far from a key its holders are, by how far our own neighbours are from us."""
        own = peer_position(self.peer_id)
        if len(self.table) < K:
            return (1 << POSITION_BITS) - 1  # so few peers are all neighbours
        return self.table.closest(own, REPLICAS)[-1].position ^ own

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

    def answer(
        self, peer_id: str, message: Message, now: float, wall_ms: int, addr: str = ""
    ) -> Message | None:
        """The reply to a peer's request, None where the protocol has none.

        `addr` is where the peer was seen to be: what it leaves here is charged to its group.

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
        source = self.group_of(peer_id, addr) if addr else UNKNOWN_GROUP
        if kind is Kind.PUT_VALUE:
            cost = 1 + len(message.value or b"") // PUT_BYTES_A_TOKEN
            if not self.rates.take(source, cost, now):
                return Message(kind, key, None, self._closer(peer_id, key, REPLICAS))
            records = self.open(key, message.value, wall_ms)
            taken = [record.rank for record in records if self.store.put(record, now, source)]
            # What is echoed was taken, and is read from where it is kept.
            kept = [record for record in self.store.get(key, now) if record.rank in taken]
            echo = serialise_set(kept) if kept else None
            return Message(kind, key, echo, self._closer(peer_id, key, REPLICAS))
        if kind is Kind.ADD_PROVIDER:
            for provider in message.providers:
                # Nobody speaks for another.
                if provider.peer_id == peer_id and self.rates.take(source, 1, now):
                    self.providers.add(key, provider, now, source)
            return None
        value: bytes | None = None
        providers: tuple[PeerInfo, ...] = ()
        if kind is Kind.GET_VALUE:
            held = self.store.get(key, now)
            value = serialise_set(held) if held else None
        elif kind is Kind.GET_PROVIDERS:
            providers = tuple(self.providers.get(key, now)[:PEERS_MAX])
        # Who finds what it asked for has little use for more than the other holders.
        count = REPLICAS if value is not None else PEERS_MAX
        return Message(kind, key, value, self._closer(peer_id, key, count), providers)

    def _closer(self, peer_id: str, key: bytes, count: int) -> tuple[PeerInfo, ...]:
        """Whom we know nearest to a key, for a peer that asks."""
        closest = self.table.closest(position(key), count + 1)
        named = [c.info for c in closest if c.peer_id != peer_id and c.addrs]
        return tuple(named[:count])
