"""Kademlia as one pure core: events in, effects out (DESIGN D1, D4).

It holds the requests under way and hands what becomes of them to the operations
that want to know (`searches.py`, `placements.py`); what others ask is answered in
`local.py`; what it does by itself is timed in `upkeep.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from p2pnet.core import Tick
from p2pnet.dht import events as ev
from p2pnet.dht.keyspace import peer_position
from p2pnet.dht.local import Local
from p2pnet.dht.placements import ProviderPlacement, RecordPlacement
from p2pnet.dht.routing import Contact
from p2pnet.dht.searches import Ask, NodeSearch, ProviderSearch, RecordSearch, Search
from p2pnet.dht.upkeep import REFRESH_BITS_MAX, REFRESH_S, Upkeep
from p2pnet.dht.wire import Kind, Message
from p2pnet.errors import MalformedError
from p2pnet.keys import peer_id_bytes
from p2pnet.net.network import PeerInfo

_UPKEEP_TIMEOUT_S = 20.0
_FRESH_S = 60.0  # who was seen so lately is not asked whether it is there
_GRACE_S = 1.0  # what the shell may be late with a failure
_RUNNING_MAX = 64
_QUEUED_MAX = 4096

_Then = Callable[[ev.Result, float], None]


@dataclass(slots=True)
class _Request:
    """One under way. `operation` None: only the table wants to know."""

    peer: PeerInfo
    operation: Search | None
    sent_at: float
    overdue_at: float | None  # None: past
    given_up_at: float

    @property
    def next_at(self) -> float:
        return self.given_up_at if self.overdue_at is None else self.overdue_at


class Kademlia:
    """The DHT of one peer. `server`: answers others and keeps records for them."""

    def __init__(self, peer_id: str, rng: random.Random, *, server: bool = True) -> None:
        self.local = Local(peer_id, server=server)
        self._upkeep = Upkeep(rng)
        self._requests: dict[int, _Request] = {}
        self._last_rpc_id = 0
        self._running: dict[Search, _Then] = {}
        self._queued: dict[Search, _Then] = {}
        self._republishing = 0
        self._effects: list[ev.Effect] = []

    def handle(self, event: ev.Event, now: float) -> Sequence[ev.Effect]:
        """Takes one event and says what is to be done about it."""
        match event:
            case Tick():
                self._tick(now)
            case ev.ReplyArrived():
                self._replied(event, now)
            case ev.RequestFailed(rpc_id):
                self._failed(rpc_id, now)
            case ev.RequestArrived():
                self._requested(event, now)
            case ev.PeerSeen(peer_id, addrs, server, holder):
                self.local.alive(peer_id)
                if server:
                    self._seen(Contact(peer_id, addrs, holder, now), now)
                else:
                    self.local.table.remove(peer_id)
            case ev.PeerMoved(peer_id, addrs):
                self.local.alive(peer_id)
                self.local.table.moved(peer_id, addrs)
            case ev.PeerGone(peer_id):
                self.local.table.remove(peer_id)
            case ev.Keep(record, op_id):
                self._upkeep.keep(record, now)
                search = RecordPlacement(self.local, [record], now, _UPKEEP_TIMEOUT_S)
                self._start(search, partial(self._kept, record.key, op_id), now)
            case ev.Unkeep(key):
                self._upkeep.unkeep(key)
            case ev.Unprovide(key):
                self._upkeep.unprovide(key)
                self.local.providers.remove(key, self.local.peer_id)
            case _:
                self._start(self._search(event, now), partial(self._done, event.op_id), now)
        if self.local.store or self.local.providers:
            self._upkeep.holding(now)
        effects, self._effects = self._effects, []
        return effects

    def deadline(self) -> float | None:
        """When it wants a Tick, at the latest."""
        times = [request.next_at for request in self._requests.values()]
        times += [search.until for search in self._running]
        times += [search.until for search in self._queued]
        upkeep = self._upkeep.deadline()
        if upkeep is not None:
            times.append(upkeep)
        return min(times, default=None)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        self.local.table.check()
        self.local.store.check()
        self.local.providers.check()
        assert not self._effects
        assert all(search.result is None for search in self._running)
        assert len(self._running) <= _RUNNING_MAX
        assert len(self._queued) <= _QUEUED_MAX
        for request in self._requests.values():
            assert request.peer.peer_id != self.local.peer_id, "we ask ourselves"
            assert request.sent_at <= request.next_at <= request.given_up_at
        asked = [id(request.operation) for request in self._requests.values()]
        assert all(id(search) in asked for search in self._running), "one that waits for nothing"

    def wants(self, peer_id: str) -> bool:
        """Whether the table would take that peer, if it is a server."""
        table = self.local.table
        return (
            peer_id != self.local.peer_id and table.get(peer_id) is None and table.has_room(peer_id)
        )

    def stats(self) -> dict[str, int | float | None]:
        """Counts, for people."""
        local = self.local
        return {
            "peers": len(local.table),
            "holders": sum(contact.holder for contact in local.table),
            "records": len(local.store),
            "record_keys": len(local.store.keys()),
            "record_bytes": local.store.size_bytes,
            "records_kept": self._upkeep.kept_count,
            "records_refused": local.records_refused,
            "provider_keys": len(local.providers),
            "operations": len(self._running),
            "requests": len(self._requests),
            "round_trip_s": local.round_trips.smoothed_s,
        }

    # Operations

    def _search(self, event: ev.Operation, now: float) -> Search:
        local = self.local
        match event:
            case ev.FindNode(_, peer_id, timeout_s):
                return NodeSearch.of_peer(local, peer_id, now, timeout_s)
            case ev.Get(_, key, timeout_s):
                return RecordSearch(local, key, now, timeout_s)
            case ev.FindProviders(_, key, timeout_s):
                return ProviderSearch(local, key, now, timeout_s)
            case ev.Put(_, record, timeout_s):
                return RecordPlacement(local, [record], now, timeout_s)
            case ev.Provide(_, key, timeout_s):
                self._upkeep.provide(key, now)
                return ProviderPlacement(local, key, now, timeout_s)

    def _start(self, search: Search, then: _Then, now: float) -> None:
        """Begins an operation as soon as few enough are under way."""
        if len(self._running) < _RUNNING_MAX:
            self._running[search] = then
            self._go_on(search, search.begin(now), now)
            self.local.table.touch(search.lookup.target, now)
        elif len(self._queued) < _QUEUED_MAX:
            self._queued[search] = then
        else:
            then(ev.Failed("too many lookups at once"), now)

    def _go_on(self, search: Search, asks: list[Ask], now: float) -> None:
        for ask in asks:
            self._ask(ask.peer, ask.message, search if ask.tracked else None, now)
        if search.result is None:
            return
        self._running.pop(search)(search.result, now)
        if self._queued and len(self._running) < _RUNNING_MAX:
            queued = next(iter(self._queued))
            self._start(queued, self._queued.pop(queued), now)

    def _done(self, op_id: int, result: ev.Result, now: float) -> None:
        self._effects.append(ev.OperationDone(op_id, result))

    def _kept(self, key: bytes, op_id: int, result: ev.Result, now: float) -> None:
        if isinstance(result, ev.Failed):
            self._upkeep.keep_failed(key, now)
        if op_id:
            self._done(op_id, result, now)

    def _republished(self, result: ev.Result, now: float) -> None:
        self._republishing -= 1

    def _refreshed(self, result: ev.Result, now: float) -> None:
        """After looking ourselves up: the parts of the space that nobody looked at."""
        own = peer_position(self.local.peer_id)
        for bits in self.local.table.stale(now - REFRESH_S / 2):
            if bits <= REFRESH_BITS_MAX:
                key = self._upkeep.key_in_bucket(own, bits)
                search = NodeSearch(self.local, key, now, _UPKEEP_TIMEOUT_S)
                self._start(search, _ignore, now)

    # Requests of ours

    def _ask(self, peer: PeerInfo, message: Message, search: Search | None, now: float) -> None:
        self._last_rpc_id += 1
        trips = self.local.round_trips
        timeout_s = trips.timeout_s(peer.peer_id)
        self._requests[self._last_rpc_id] = _Request(
            peer=peer,
            operation=search,
            sent_at=now,
            overdue_at=now + trips.patience_s(peer.peer_id),
            given_up_at=now + timeout_s + _GRACE_S,
        )
        self._effects.append(ev.SendRequest(self._last_rpc_id, peer, message, timeout_s))

    def _replied(self, event: ev.ReplyArrived, now: float) -> None:
        request = self._requests.get(event.rpc_id)
        if request is None:
            return  # given up already
        peer_id, search = request.peer.peer_id, request.operation
        if search is not None and search.result is None:
            try:
                asks = search.answered(peer_id, event.message, event.holder, now, event.wall_ms)
            except MalformedError:
                self._failed(event.rpc_id, now)
                return
        else:
            asks = []
        del self._requests[event.rpc_id]
        self.local.round_trips.sample(peer_id, now - request.sent_at)
        self.local.alive(peer_id)
        known = self.local.table.get(peer_id)
        addrs = known.addrs if known and known.addrs else request.peer.addrs
        self._seen(Contact(peer_id, addrs, event.holder, now), now)
        if search is not None and search in self._running:
            self._go_on(search, asks, now)

    def _failed(self, rpc_id: int, now: float) -> None:
        request = self._requests.pop(rpc_id, None)
        if request is None:
            return
        self.local.silent(request.peer, now)
        self._effects.append(ev.Forget(request.peer.peer_id))
        search = request.operation
        if search is not None and search.result is None:
            self._go_on(search, search.failed(request.peer.peer_id, now), now)

    def _seen(self, contact: Contact, now: float) -> None:
        first = not len(self.local.table)
        longest_silent = self.local.table.seen(contact)
        if first and len(self.local.table):
            self._upkeep.joined(now)
        if longest_silent is not None and longest_silent.seen_at < now - _FRESH_S:
            asked = (r.peer.peer_id for r in self._requests.values() if r.operation is None)
            if longest_silent.peer_id not in asked:
                # kad-dht has retired PING; any request will do.
                message = Message(Kind.FIND_NODE, peer_id_bytes(self.local.peer_id))
                self._ask(longest_silent.info, message, None, now)

    # Requests of others

    def _requested(self, event: ev.RequestArrived, now: float) -> None:
        message, peer_id = event.message, event.peer_id
        self.local.alive(peer_id)
        for peer in message.closer[:1]:
            if peer.peer_id == peer_id:
                self.local.table.moved(peer_id, peer.addrs)
        try:
            reply = self.local.answer(peer_id, message, now, event.wall_ms)
        except MalformedError as error:
            self._effects.append(ev.Refuse(event.request_id, str(error)))
            return
        self._effects.append(ev.SendReply(event.request_id, reply))
        if message.kind is Kind.PUT_VALUE:
            held = self.local.store.get(message.key, now)
            if held:
                self._upkeep.held(message.key, min(record.ttl_s for record in held), now)

    # Time

    def _tick(self, now: float) -> None:
        for rpc_id, request in list(self._requests.items()):
            if request.given_up_at <= now:
                self._failed(rpc_id, now)
            elif request.overdue_at is not None and request.overdue_at <= now:
                request.overdue_at = None
                search = request.operation
                if search is not None and search.result is None:
                    self._go_on(search, search.overdue(request.peer.peer_id, now), now)
        for search in [search for search in self._queued if search.until <= now]:
            self._queued.pop(search)(ev.Failed("not begun in time: too many lookups"), now)
        for search in list(self._running):
            if search.until <= now and search.result is None:
                self._go_on(search, search.expired(now), now)
        self._do_upkeep(now)

    def _do_upkeep(self, now: float) -> None:
        local, upkeep = self.local, self._upkeep
        if upkeep.expire_due(now):
            local.store.expire(now)
            local.providers.expire(now)
        for key in upkeep.renewals_due(now):
            self._effects.append(ev.Renew(key))
        for key in upkeep.announcements_due(now):
            announce = ProviderPlacement(local, key, now, _UPKEEP_TIMEOUT_S)
            self._start(announce, _ignore, now)
        for key in upkeep.republish_due(now, self._republishing):
            records = local.store.get(key, now)
            if records:
                self._republishing += 1
                upkeep.held(key, min(record.ttl_s for record in records), now)
                republish = RecordPlacement(local, records, now, _UPKEEP_TIMEOUT_S)
                self._start(republish, self._republished, now)
        if upkeep.refresh_due(now, len(local.table)):
            search = NodeSearch(local, peer_id_bytes(local.peer_id), now, _UPKEEP_TIMEOUT_S)
            self._start(search, self._refreshed, now)


def _ignore(result: ev.Result, now: float) -> None:
    """What nobody asked for."""
