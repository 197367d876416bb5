"""Kademlia as one pure core: events in, effects out (DESIGN D1, D4).

It holds the requests under way and hands what becomes of them to the operations
that want to know (`searches.py`, `placements.py`); what others ask is answered in
`local.py`; what it does by itself is timed in `upkeep.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from p2pnet.bounded import keep_latest
from p2pnet.core import Tick
from p2pnet.dht import events as ev
from p2pnet.dht.handover import Handover
from p2pnet.dht.keyspace import peer_position
from p2pnet.dht.local import REPLICAS, Local
from p2pnet.dht.lookup import QUORUM
from p2pnet.dht.placements import ProviderPlacement, RecordPlacement
from p2pnet.dht.records import OpenRecord
from p2pnet.dht.requests import Request, Requests
from p2pnet.dht.routing import UNKNOWN_GROUP, Contact
from p2pnet.dht.rtt import TIMEOUT_S_MIN
from p2pnet.dht.searches import Ask, NodeSearch, ProviderSearch, RecordSearch, Search
from p2pnet.dht.snapshot import Held
from p2pnet.dht.upkeep import REFRESH_BITS_MAX, REFRESH_S, Upkeep
from p2pnet.dht.wire import Kind, Message
from p2pnet.errors import MalformedError
from p2pnet.keys import peer_id_bytes
from p2pnet.net.groups import GroupOf, ip_group
from p2pnet.net.network import PeerInfo

_UPKEEP_TIMEOUT_S = 20.0
_FRESH_S = 60.0  # who was seen so lately is not asked whether it is there
_RUNNING_MAX = 64
_QUEUED_MAX = 4096
_CHECKS_MAX = 64
_TURNED_AWAY_S = 60.0
_UNCHECKED_S = 10.0  # who asks and does not answer is not asked again at once
_TURNED_AWAY_MAX = 1024
_CHECK_ALL_EVERY = 32

_Then = Callable[[ev.Result, float], None]


class Kademlia:
    """The DHT of one peer. `server`: answers others and keeps records for them.

    `group_of`: the IP group of a peer id and a multiaddr.
    """

    def __init__(
        self,
        peer_id: str,
        rng: random.Random,
        *,
        server: bool = True,
        group_of: GroupOf = ip_group,
    ) -> None:
        self.local = Local(peer_id, server=server, group_of=group_of)
        self._upkeep = Upkeep(rng)
        self._handover = Handover(self.local)
        self._requests = Requests(self.local)
        # What becomes of a result: several may wait for one search.
        self._running: dict[Search, list[_Then]] = {}
        self._queued: dict[Search, list[_Then]] = {}
        self._gets: dict[tuple[bytes, int], RecordSearch] = {}
        self._turned_away: dict[str, float] = {}  # who is no candidate for the table, until when
        self._now = 0.0  # at the last event
        self._republishing = 0
        self._checks = 0
        self._effects: list[ev.Effect] = []

    def handle(self, event: ev.Event, now: float) -> Sequence[ev.Effect]:
        """Takes one event and says what is to be done about it."""
        self._now = now
        match event:
            case Tick():
                self._tick(now)
            case ev.ReplyArrived():
                self._replied(event, now)
            case ev.RequestFailed(rpc_id):
                self._failed(rpc_id, now)
            case ev.RequestArrived():
                self._requested(event, now)
            case ev.PeerSeen():
                self._peer_seen(event, now)
            case ev.PeerMoved(peer_id, addrs):
                self.local.alive(peer_id)
                self.local.table.moved(peer_id, addrs)
            case ev.PeerGone(peer_id):
                self.local.table.remove(peer_id)
            case ev.Keep(record, op_id):
                self._upkeep.keep(record, now)
                search = RecordPlacement(self.local, [record], now, _UPKEEP_TIMEOUT_S)
                self._start(search, partial(self._kept, record, op_id), now)
            case ev.Unkeep(key):
                self._upkeep.unkeep(key)
            case ev.Unprovide(key):
                self._upkeep.unprovide(key)
                self.local.providers.remove(key, self.local.peer_id)
            case ev.Get():
                self._get(event, now)
            case _:
                self._start(self._search(event, now), partial(self._done, event.op_id), now)
        self._begin_queued(now)
        if self.local.store or self.local.providers:
            self._upkeep.holding(now)
        effects, self._effects = self._effects, []
        return effects

    def deadline(self) -> float | None:
        """When it wants a Tick, at the latest."""
        times = [request.next_at for request in self._requests.under_way()]
        times += [search.until for search in self._running]
        times += [search.until for search in self._queued]
        times += [at for at in (self._upkeep.deadline(), self._handover.next_at) if at is not None]
        return min(times, default=None)

    def check(self, *, full: bool = False) -> None:
        """Raises AssertionError if an invariant does not hold.

        Table and stores, which take long, are looked at every so often only, or if `full`.
        """
        self._checks += 1
        if full or self._checks % _CHECK_ALL_EVERY == 0:
            self.local.table.check()
            self.local.store.check()
            self.local.providers.check()
        assert not self._effects
        assert not any(search.over for search in self._running)
        assert all(waiting == [] or s.result is None for s, waiting in self._running.items())
        assert len(self._running) <= _RUNNING_MAX
        assert len(self._queued) <= _QUEUED_MAX
        self._requests.check()
        asked = [id(request.operation) for request in self._requests.under_way()]
        assert all(id(search) in asked for search in self._running), "one that waits for nothing"
        self._handover.check()

    def wants(self, peer_id: str) -> bool:
        """Whether the table would take that peer, if it is a server that answers.

        Not for a while after it was found out that it would not: two peers that both
        have no place for the other would else ask each other for ever.
        """
        table = self.local.table
        return (
            peer_id != self.local.peer_id
            and self._turned_away.get(peer_id, self._now) <= self._now
            and not self._requests.checks(peer_id)
            and table.get(peer_id) is None
            and table.has_room(peer_id)
        )

    def is_holder(self, peer_id: str) -> bool:
        """Whether that peer is in the table, and keeps records."""
        contact = self.local.table.get(peer_id)
        return contact is not None and contact.holder

    def is_open(self, rpc_id: int) -> bool:
        """Whether an answer to that request is still of use."""
        return self._requests.get(rpc_id) is not None

    def checking(self, peer_id: str) -> bool:
        """Whether it is being found out if that peer answers lookups."""
        return self._requests.checks(peer_id)

    def stats(self) -> dict[str, int | float | None]:
        """Counts, for people."""
        local = self.local
        return {
            "peers": len(local.table),
            "buckets": local.table.buckets,
            "ip_groups": local.table.groups,
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
            case ev.Get(_, key, timeout_s, quorum):
                return RecordSearch(local, key, now, timeout_s, quorum=quorum)
            case ev.FindProviders(_, key, timeout_s):
                return ProviderSearch(local, key, now, timeout_s)
            case ev.Put(_, record, timeout_s):
                return RecordPlacement(local, [record], now, timeout_s)
            case ev.Provide(_, key, timeout_s):
                self._upkeep.provide(key, now)
                return ProviderPlacement(local, key, now, timeout_s)

    def _get(self, event: ev.Get, now: float) -> None:
        """Reads of one key at once share one lookup."""
        then = partial(self._done, event.op_id)
        search = self._gets.get((event.key, event.quorum))
        for waiting in (self._running, self._queued):
            # Nobody has answered yet, or what is read might be older than what was just put.
            if search in waiting and search.answers == 0 and search.result is None:
                waiting[search].append(then)
                return
        search = RecordSearch(self.local, event.key, now, event.timeout_s, quorum=event.quorum)
        self._gets[event.key, event.quorum] = search
        self._start(search, then, now)

    def _start(self, search: Search, then: _Then, now: float) -> None:
        """Begins an operation as soon as few enough are under way: see `_begin_queued`."""
        if len(self._queued) < _QUEUED_MAX:
            self._queued[search] = [then]
        else:
            self._tell(search, [then], ev.Failed("too many lookups at once"), now)

    def _begin_queued(self, now: float) -> None:
        # A loop, and not where one ends: many may end as soon as they begin.
        while self._queued and len(self._running) < _RUNNING_MAX:
            search = next(iter(self._queued))
            self._running[search] = self._queued.pop(search)
            self._go_on(search, search.begin(now), now)
            self.local.table.touch(search.lookup.target, now)

    def _go_on(self, search: Search, asks: list[Ask], now: float) -> None:
        for ask in asks:
            self._ask(ask.peer, ask.message, search if ask.tracked else None, now)
        if search.result is not None:
            thens, self._running[search] = self._running[search], []
            self._tell(search, thens, search.result, now)
        if search.over:
            del self._running[search]

    def _tell(self, search: Search, thens: list[_Then], result: ev.Result, now: float) -> None:
        if isinstance(search, RecordSearch):
            name = (search.key, search.quorum)
            if self._gets.get(name) is search:
                del self._gets[name]
        for then in thens:
            then(result, now)

    def _done(self, op_id: int, result: ev.Result, now: float) -> None:
        self._effects.append(ev.OperationDone(op_id, result))

    def _kept(self, record: OpenRecord, op_id: int, result: ev.Result, now: float) -> None:
        if isinstance(result, ev.Failed):
            self._upkeep.keep_failed(record.key, now)
        else:
            self._upkeep.placed(record.key, now)
        if op_id:
            self._done(op_id, result, now)

    def _read_back(self, record: OpenRecord, now: float) -> None:
        """Whether those that took a record of ours give it out, too."""
        search = RecordSearch(self.local, record.key, now, _UPKEEP_TIMEOUT_S, quorum=REPLICAS)

        def read(result: ev.Result, now: float) -> None:
            if not isinstance(result, ev.Records) or result.answers == 0:
                return  # nobody to read from, as when we are alone
            if search.holders_of(record) >= min(QUORUM, result.answers):
                self._upkeep.read_back(record.key)
            elif self._upkeep.misplaced(record.key, now):
                again = RecordPlacement(self.local, [record], now, _UPKEEP_TIMEOUT_S)
                self._start(again, partial(self._kept, record, 0), now)

        self._start(search, read, now)

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

    def _ask(
        self,
        peer: PeerInfo,
        message: Message,
        search: Search | None,
        now: float,
        *,
        check: bool = False,
        last: bool = False,
    ) -> None:
        request = self._requests.open(peer, message.kind, search, now, check=check, last=last)
        self._effects.append(ev.SendRequest(request.rpc_id, peer, message, request.timeout_s))

    def _replied(self, event: ev.ReplyArrived, now: float) -> None:
        request = self._requests.get(event.rpc_id)
        if request is None:
            return  # given up already
        peer_id, search = request.peer.peer_id, request.operation
        asks: list[Ask] = []
        try:
            if search is not None and not search.over:
                asks = search.answered(peer_id, event, now)
            elif event.message is not None and event.message.kind is not request.kind:
                raise MalformedError("a DHT reply of another kind than its request")
        except MalformedError:
            self._failed(event.rpc_id, now)
            return
        self._requests.close(request)
        self.local.round_trips.sample(peer_id, now - request.sent_at)
        self.local.alive(peer_id)
        # ADD_PROVIDER has no answer, so that it shows nothing.
        if event.message is not None:
            known = self.local.table.get(peer_id)
            # What others say of where it is may be a lie; of that only what proved right.
            proved = tuple(addr for addr in request.peer.addrs if addr == event.addr)
            addrs = known.addrs if known and known.addrs else event.addrs or proved
            self._seen(self._contact(peer_id, addrs, event.holder, event.addr, now), now)
            if request.check and self.local.table.get(peer_id) is None:
                self._turn_away(peer_id, now + _TURNED_AWAY_S)
        if search is not None and search in self._running:
            self._go_on(search, asks, now)

    def _failed(self, rpc_id: int, now: float) -> None:
        request = self._requests.get(rpc_id)
        if request is None:
            return
        self._requests.close(request)
        self._missed(request, now)
        search = request.operation
        if search is not None and not search.over:
            self._go_on(search, search.failed(request.peer.peer_id, now), now)

    def _missed(self, request: Request, now: float) -> None:
        """A peer did not answer: it goes, unless it may only have been too busy."""
        peer_id = request.peer.peer_id
        contact = self.local.table.get(peer_id)
        if contact is not None and contact.seen_at > request.sent_at:
            return  # it has answered others since
        if contact is not None and not request.last:
            refused = now - request.sent_at < TIMEOUT_S_MIN / 2
            if not refused and contact.seen_at > now - _FRESH_S:
                if not self._requests.is_last(peer_id):
                    self._look(contact.info, now, last=True)
                return
        if request.check:
            self._turn_away(peer_id, now + _UNCHECKED_S)
        self.local.silent(request.peer, now)
        self._effects.append(ev.Forget(peer_id))

    # Who comes into the table

    def _peer_seen(self, event: ev.PeerSeen, now: float) -> None:
        """Somebody says that it serves: it comes in when it has answered a lookup."""
        peer_id = event.peer_id
        self.local.alive(peer_id)
        if not event.server:
            self.local.table.remove(peer_id)
        elif self.local.table.get(peer_id) is not None:
            contact = self._contact(peer_id, event.addrs, event.holder, event.addr, now)
            self._seen(contact, now)
        elif self.wants(peer_id) and self._requests.checks_count < _CHECKS_MAX:
            self._look(PeerInfo(peer_id, event.addrs), now, check=True)

    def _turn_away(self, peer_id: str, until: float) -> None:
        keep_latest(self._turned_away, peer_id, until, _TURNED_AWAY_MAX)

    def _look(self, peer: PeerInfo, now: float, *, check: bool = False, last: bool = False) -> None:
        # kad-dht has retired PING; that it answers a lookup is what we want to know.
        message = Message(Kind.FIND_NODE, peer_id_bytes(self.local.peer_id))
        self._ask(peer, message, None, now, check=check, last=last)

    def _contact(
        self, peer_id: str, addrs: tuple[str, ...], holder: bool, addr: str, now: float
    ) -> Contact:
        # Where it says that it is counts for nothing: its group is that of where it was seen.
        known = self.local.table.get(peer_id)
        unknown = known.group if known is not None else UNKNOWN_GROUP
        group = self.local.group_of(peer_id, addr) if addr else unknown
        return Contact(peer_id, addrs, holder, now, group)

    def _seen(self, contact: Contact, now: float) -> None:
        table = self.local.table
        first, known = not len(table), table.get(contact.peer_id)
        longest_silent = table.seen(contact)
        if first and len(table):
            self._upkeep.joined(now)
        if known is None and contact.holder and table.get(contact.peer_id) is not None:
            self._handover.newcomer(contact, now)
        if longest_silent is not None and longest_silent.seen_at < now - _FRESH_S:
            requests = self._requests.under_way()
            asked = (r.peer.peer_id for r in requests if r.operation is None)
            if longest_silent.peer_id not in asked:
                self._look(longest_silent.info, now)

    # Requests of others

    def _requested(self, event: ev.RequestArrived, now: float) -> None:
        message, peer_id = event.message, event.peer_id
        self.local.alive(peer_id)
        for peer in message.closer[:1]:
            if peer.peer_id == peer_id:
                self.local.table.moved(peer_id, peer.addrs)
        try:
            reply = self.local.answer(peer_id, message, now, event.wall_ms, event.addr)
        except MalformedError as error:
            self._effects.append(ev.Refuse(event.request_id, str(error)))
            return
        self._effects.append(ev.SendReply(event.request_id, reply))
        if message.kind is Kind.PUT_VALUE and reply is not None and reply.value is not None:
            held = self.local.store.get(message.key, now)
            if held:
                self._upkeep.held(message.key, min(record.ttl_s for record in held), now)

    # What outlives a restart

    def held(self, now: float) -> Held:
        """What is kept for others, to be written to disk."""
        local = self.local
        return Held(local.store.held(now), local.store.marks(now), local.providers.held(now))

    def restore(self, held: Held, now: float) -> None:
        """Takes back what a run before this one kept; it will be passed on to others soon."""
        local = self.local
        for mark in held.marks:
            local.store.remember(mark, now)
        for record, source in held.records:
            if local.store.put(record, now, source):
                self._upkeep.held(record.key, record.expires_in_s, now)
        for hint in held.hints:
            local.providers.add(hint.key, hint.provider, now, hint.source, age_s=hint.age_s)
        if local.store or local.providers:
            self._upkeep.holding(now)

    # Time

    def _tick(self, now: float) -> None:
        for request in self._requests.under_way():
            search = request.operation
            if request.slow_at is not None and request.slow_at <= now:
                request.slow_at = None
                if search is not None and not search.over:
                    self._go_on(search, search.slow(request.peer.peer_id, now), now)
            if request.given_up_at <= now:
                self._failed(request.rpc_id, now)
            elif request.overdue_at is not None and request.overdue_at <= now:
                self._requests.overdue(request)
                if search is not None and not search.over:
                    self._go_on(search, search.overdue(request.peer.peer_id, now), now)
        for search in [search for search in self._queued if search.until <= now]:
            failed = ev.Failed("not begun in time: too many lookups")
            self._tell(search, self._queued.pop(search), failed, now)
        for search in list(self._running):
            if search.until <= now and not search.over:
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
        for record in upkeep.read_backs_due(now):
            self._read_back(record, now)
        for peer, message in self._handover.due(now):
            self._ask(peer, message, None, now)
        if upkeep.refresh_due(now, len(local.table)):
            search = NodeSearch(local, peer_id_bytes(local.peer_id), now, _UPKEEP_TIMEOUT_S)
            self._start(search, self._refreshed, now)


def _ignore(result: ev.Result, now: float) -> None:
    """What nobody asked for."""
