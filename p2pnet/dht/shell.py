"""The DHT on trio: carries the core's effects out over a `Network`.

A thin shell: requests, replies and the clock. What is decided is decided in
`core.py`.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import trio

from p2pnet import clock
from p2pnet.bounded import keep_latest
from p2pnet.core import Tick
from p2pnet.dht import events as ev
from p2pnet.dht import wire
from p2pnet.dht.canonical import parse_canonical
from p2pnet.dht.carrier_shell import Carrier
from p2pnet.dht.core import Kademlia
from p2pnet.dht.lookup import QUORUM
from p2pnet.dht.records import PAYLOAD_BYTES_MAX, OpenRecord, open_record
from p2pnet.dht.snapshot import Held
from p2pnet.dht.wire import KAD_PROTOCOL, RECORD_PROTOCOL, Kind, Message
from p2pnet.errors import (
    CancelledByUs,
    LocalError,
    MalformedError,
    P2PNetError,
    RefusedError,
    RemoteError,
    UnreachableError,
    UsageError,
)
from p2pnet.keys import peer_id_bytes
from p2pnet.net.groups import GroupOf, ip_group
from p2pnet.net.network import MESSAGE_BYTES_MAX, Network, PeerInfo
from p2pnet.v1 import common_pb2, records_pb2

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # libp2p installs trio-stubs, which hides trio's own

TIMEOUT_S = 10.0
_CHECK_TIMEOUT_S = 5.0
_CHECKS_AT_ONCE = 8
_CHECKS_MAX = 256
_QUIET_S = 10.0
_MANY_AT_ONCE = 512
_QUIET_MAX = 1024
_GRACE_S = 2.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Check:
    """A peer is being found out about; `fed`: the rest is the core's."""

    done: trio.Event = field(default_factory=trio.Event)
    fed: bool = False


@dataclass(slots=True)
class _Waiting:
    """Somebody waits for an operation."""

    done: trio.Event = field(default_factory=trio.Event)
    result: ev.Result = field(default_factory=lambda: ev.Failed("the DHT did not come to an end"))


class Dht:
    """One peer's part in the DHT. Everything but `run` works only while `run` does.

    `server`: answers others and keeps records for them; a short-lived client does not,
    and stays out of everybody's routing table.
    """

    def __init__(
        self,
        network: Network,
        *,
        rng: random.Random,
        server: bool = True,
        protocol: str = KAD_PROTOCOL,
        now: Callable[[], float] = clock.now,
        wall_ms: Callable[[], int] = clock.wall_ms,
        group_of: GroupOf = ip_group,
    ) -> None:
        self._network = network
        self._server = server
        self._protocol = protocol
        self._now = now
        self._wall_ms = wall_ms
        self._core = Kademlia(network.peer_id, rng, server=server, group_of=group_of)
        self._nursery: trio.Nursery | None = None
        self._early: list[tuple[Callable[..., Awaitable[None]], tuple[object, ...]]] = []
        self._alarm = trio.Event()
        self._alarm_at: float | None = None
        self._last_id = 0
        self._waiting: dict[int, _Waiting] = {}
        self._replies: dict[int, Message | MalformedError | None] = {}
        self._makers: dict[bytes, Callable[[], common_pb2.Signed]] = {}
        self._checking: dict[str, _Check] = {}
        self._quiet_until: dict[str, float] = {}  # who did not say whether it serves
        self._check_slots = trio.CapacityLimiter(_CHECKS_AT_ONCE)
        self._answered = 0
        self._carrier = Carrier(
            network,
            server=server,
            protocol=protocol,
            feed=self._feed,
            spawn=self._spawn,
            is_holder=self._core.is_holder,
            is_open=self._core.is_open,
            wall_ms=wall_ms,
        )

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Takes part until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                if self._server:
                    self._network.serve(self._protocol, self._serve)
                    self._network.serve(RECORD_PROTOCOL, self._serve_batch)
                for task, arguments in self._early:
                    nursery.start_soon(task, *arguments)
                self._early.clear()
                task_status.started()
                await self._keep_time()
            finally:
                self._nursery = None
                for waiting in self._waiting.values():
                    waiting.done.set()

    # What one asks of a DHT

    async def find_peer(self, peer_id: str, timeout_s: float = TIMEOUT_S) -> PeerInfo | None:
        """Where a peer may be reached; None where nobody knows.

        Raises:
            MalformedError: not a peer id.
            UnreachableError: no other peer answered.
        """
        if peer_id == self._network.peer_id:
            return self._carrier.us()
        peer_id_bytes(peer_id)
        result = await self._operate(lambda op_id: ev.FindNode(op_id, peer_id, timeout_s))
        assert isinstance(result, ev.Nodes)
        return result.target

    async def get(
        self, key: bytes, timeout_s: float = TIMEOUT_S, *, quorum: int = QUORUM
    ) -> list[OpenRecord]:
        """The records under a key, checked: the newest of each author, newest first.

        `quorum`: of how many of the nearest holders the answers are merged, at least.

        Raises:
            UnreachableError: peers are known, and none answered.
        """
        _check_key(key)
        result = await self._operate(lambda op_id: ev.Get(op_id, key, timeout_s, quorum))
        assert isinstance(result, ev.Records)
        return list(result.records)

    async def get_many(
        self, keys: Sequence[bytes], timeout_s: float = TIMEOUT_S, *, quorum: int = QUORUM
    ) -> dict[bytes, list[OpenRecord]]:
        """As `get`, of many keys at once; the lookups share messages to the same peers.

        A key for which nobody answered in time is not in the result.
        """
        wanted = list(dict.fromkeys(keys))
        for key in wanted:
            _check_key(key)
        results = await self._operate_many(
            [partial(ev.Get, key=key, timeout_s=timeout_s, quorum=quorum) for key in wanted]
        )
        return {
            key: list(result.records)
            for key, result in zip(wanted, results, strict=True)
            if isinstance(result, ev.Records)
        }

    async def put(self, record: common_pb2.Signed, timeout_s: float = TIMEOUT_S) -> int:
        """Stores a record; returns how many peers took it, us included.

        Raises:
            LocalError: a record that every peer would refuse.
            UnreachableError: nobody took it.
        """
        opened = self._open(record)
        result = await self._operate(lambda op_id: ev.Put(op_id, opened, timeout_s))
        assert isinstance(result, ev.Stored)
        return result.holders

    async def put_many(
        self, records: Sequence[common_pb2.Signed], timeout_s: float = TIMEOUT_S
    ) -> list[int]:
        """As `put`, of many records at once: how many peers took each, 0 where none did.

        Raises:
            LocalError: a record that every peer would refuse; nothing was stored.
        """
        opened = [self._open(record) for record in records]
        results = await self._operate_many(
            [partial(ev.Put, record=record, timeout_s=timeout_s) for record in opened]
        )
        return [result.holders if isinstance(result, ev.Stored) else 0 for result in results]

    def keep(self, key: bytes, make: Callable[[], common_pb2.Signed]) -> None:
        """Puts the record that `make` makes, and a newer one after each third of its life.

        To put a newer one at once, call this again. Raises what `make` raises this
        time, and LocalError for a record that every peer would refuse; a later failure
        of `make` is logged, and tried again soon.
        """
        self._keep(key, make, 0)

    async def publish(
        self, key: bytes, make: Callable[[], common_pb2.Signed], timeout_s: float = TIMEOUT_S
    ) -> int:
        """As `keep`, and returns how many peers took the record the first time, us included.

        Raises:
            UnreachableError: nobody took it so far; it is kept all the same.
        """

        def begin(op_id: int) -> float:
            self._keep(key, make, op_id)
            return timeout_s

        result = await self._wait_for(begin)
        assert isinstance(result, ev.Stored)
        return result.holders

    def _keep(self, key: bytes, make: Callable[[], common_pb2.Signed], op_id: int) -> None:
        record = self._open(make())
        if record.key != key:
            raise LocalError("a record to be kept under another key than its own")
        self._makers[key] = make
        self._feed(ev.Keep(record, op_id))

    def unkeep(self, key: bytes) -> None:
        """Lets the record that is kept under a key run out."""
        self._makers.pop(key, None)
        self._feed(ev.Unkeep(key))

    async def provide(self, key: bytes, timeout_s: float = TIMEOUT_S) -> int:
        """Tells the peers nearest to a key that we provide it, from now on until `unprovide`.

        Returns how many were told, us included. Raises UnreachableError: none, so far.
        """
        _check_key(key)
        result = await self._operate(lambda op_id: ev.Provide(op_id, key, timeout_s))
        assert isinstance(result, ev.Stored)
        return result.holders

    def unprovide(self, key: bytes) -> None:
        """Says no more that we provide a key; what was said runs out."""
        self._feed(ev.Unprovide(key))

    async def providers(self, key: bytes, timeout_s: float = TIMEOUT_S) -> list[PeerInfo]:
        """Who says that it provides a key: unsigned hints, at most 32.

        Raises:
            UnreachableError: peers are known, and none answered.
        """
        _check_key(key)
        result = await self._operate(lambda op_id: ev.FindProviders(op_id, key, timeout_s))
        assert isinstance(result, ev.Providers)
        ours = self._carrier.us()
        return [ours if peer.peer_id == ours.peer_id else peer for peer in result.peers]

    # What the node tells it

    def seen(self, peer_id: str, addrs: Sequence[str] = ()) -> None:
        """A peer is there: a bootstrap peer, a member, a connection.

        It comes into the routing table if it says that it serves our protocol.
        """
        self._feed(ev.PeerMoved(peer_id, tuple(addrs)))
        self._consider(peer_id, tuple(addrs))

    async def meet(self, peer_id: str, addrs: Sequence[str] = ()) -> None:
        """As `seen`, and returns when it is known whether the peer comes into the table."""
        self._feed(ev.PeerMoved(peer_id, tuple(addrs)))
        self._consider(peer_id, tuple(addrs), waited_for=True)
        if (checked := self._checking.get(peer_id)) is not None:
            await checked.done.wait()

    def gone(self, peer_id: str) -> None:
        """A peer has left or failed."""
        self._feed(ev.PeerGone(peer_id))

    def stats(self) -> dict[str, int | float | None]:
        """Counts, for people and for `p2pnet dht stats`."""
        return self._core.stats() | {
            "requests_sent": self._carrier.sent,
            "requests_failed": self._carrier.failed,
            "requests_answered": self._answered,
        }

    # What outlives a restart

    @property
    def changes(self) -> int:
        """Grows with each change of what is kept for others."""
        return self._core.local.store.changes + self._core.local.providers.changes

    def held(self) -> Held:
        """What is kept for others, for `snapshot.serialise`, which any thread may run."""
        return self._core.held(self._now())

    def restore(self, held: Held) -> None:
        """Takes back what `snapshot.parse` gave; before `run`."""
        self._core.restore(held, self._now())
        self._alarm.set()

    # Effects

    def _feed(self, *events: ev.Event) -> None:
        now = self._now()
        requests: dict[str, list[ev.SendRequest]] = {}
        for event in events:
            for effect in self._core.handle(event, now):
                if isinstance(effect, ev.SendRequest):
                    requests.setdefault(effect.peer.peer_id, []).append(effect)
                else:
                    self._perform(effect)
        for peer_id, together in requests.items():
            self._carrier.send(peer_id, together)
        for peer_id, checked in list(self._checking.items()):
            if checked.fed and not self._core.checking(peer_id):
                del self._checking[peer_id]
                checked.done.set()
        deadline = self._core.deadline()
        if deadline is not None and (self._alarm_at is None or deadline < self._alarm_at):
            self._alarm.set()

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.SendReply(request_id, message):
                self._replies[request_id] = message
            case ev.Refuse(request_id, reason):
                self._replies[request_id] = MalformedError(reason)
            case ev.OperationDone(op_id, result):
                waiting = self._waiting.get(op_id)
                if waiting is not None:
                    waiting.result = result
                    waiting.done.set()
            case ev.Renew(key):
                self._spawn(self._renew, key)
            case _:
                # Forget: out of the table; the network disconnects a peer that is silent.
                pass

    def _spawn(self, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
        if self._nursery is None:
            self._early.append((task, arguments))
        else:
            self._nursery.start_soon(task, *arguments)

    async def _keep_time(self) -> None:
        while True:
            self._alarm = trio.Event()
            self._alarm_at = self._core.deadline()
            wait_s = math.inf if self._alarm_at is None else max(0.0, self._alarm_at - self._now())
            with trio.move_on_after(wait_s):
                await self._alarm.wait()
            if self._alarm_at is not None and self._alarm_at <= self._now():
                self._feed(Tick())

    async def _operate(self, make: Callable[[int], ev.Operation]) -> ev.Result:
        def begin(op_id: int) -> float:
            operation = make(op_id)
            self._feed(operation)
            return operation.timeout_s

        return await self._wait_for(begin)

    async def _operate_many(
        self, makes: Sequence[Callable[[int], ev.Operation]]
    ) -> list[ev.Result]:
        """Some at a time: the core takes only so many, and each is to have its time."""
        results: list[ev.Result] = []
        for start in range(0, len(makes), _MANY_AT_ONCE):
            results += await self._operate_some(makes[start : start + _MANY_AT_ONCE])
        return results

    async def _operate_some(
        self, makes: Sequence[Callable[[int], ev.Operation]]
    ) -> list[ev.Result]:
        if self._nursery is None:
            raise CancelledByUs("the DHT is not running")
        waiting: dict[int, _Waiting] = {}
        operations: list[ev.Operation] = []
        for make in makes:
            self._last_id += 1
            waiting[self._last_id] = _Waiting()
            operations.append(make(self._last_id))
        self._waiting |= waiting
        timeout_s = max((operation.timeout_s for operation in operations), default=0.0)
        try:
            self._feed(*operations)
            with trio.move_on_after(timeout_s + _GRACE_S):
                for each in waiting.values():
                    await each.done.wait()
        finally:
            for op_id in waiting:
                del self._waiting[op_id]
        if self._nursery is None:
            raise CancelledByUs("the DHT is shutting down")
        return [each.result for each in waiting.values()]

    async def _wait_for(self, begin: Callable[[int], float]) -> ev.Result:
        """Waits for the operation that `begin` starts, for as many seconds as that returns."""
        if self._nursery is None:
            raise CancelledByUs("the DHT is not running")
        self._last_id += 1
        op_id = self._last_id
        waiting = self._waiting[op_id] = _Waiting()
        try:
            with trio.move_on_after(begin(op_id) + _GRACE_S):
                await waiting.done.wait()
        finally:
            del self._waiting[op_id]
        if self._nursery is None:
            raise CancelledByUs("the DHT is shutting down")
        if isinstance(waiting.result, ev.Failed):
            raise UnreachableError(f"the DHT cannot say: {waiting.result.reason}")
        return waiting.result

    async def _serve(self, peer_id: str, data: bytes) -> bytes | None:
        """Answers a request; None where the protocol has no answer."""
        reply = self._answer(peer_id, wire.parse(data))
        return None if reply is None else wire.serialise(reply)

    async def _serve_batch(self, peer_id: str, data: bytes) -> bytes | None:
        """Answers several requests; the replies after those that fit are left out."""
        replies: list[bytes] = []
        size_bytes = 0
        for request in wire.parse_batch(data):
            try:
                reply = await self._serve(peer_id, request) or b""
            except RefusedError:
                reply = b""
            size_bytes += len(reply) + wire.BATCH_ENTRY_BYTES
            if replies and size_bytes > MESSAGE_BYTES_MAX:
                break
            replies.append(reply)
            await trio.lowlevel.checkpoint()
        return wire.join_batch(replies)

    def _answer(self, peer_id: str, message: Message) -> Message | None:
        if self._nursery is None:
            raise CancelledByUs("the DHT is shutting down")
        self._last_id += 1
        request_id = self._last_id
        addr = self._network.seen_at(peer_id)
        self._feed(ev.RequestArrived(request_id, peer_id, message, self._wall_ms(), addr))
        reply = self._replies.pop(request_id)
        if isinstance(reply, MalformedError):
            if message.kind is Kind.PUT_VALUE:  # a stock peer's value, perhaps: no offence
                raise RefusedError(str(reply))
            raise reply
        self._answered += 1
        addrs = [peer.addrs for peer in message.closer[:1] if peer.peer_id == peer_id]
        self._consider(peer_id, addrs[0] if addrs else ())
        return None if reply is None else self._carrier.reply_with_us(reply)

    async def _renew(self, key: bytes) -> None:
        make = self._makers.get(key)
        if make is None:
            return
        try:
            self.keep(key, make)
        except P2PNetError as error:
            _log.warning("a record of ours could not be renewed: %s", error)

    def _consider(self, peer_id: str, addrs: tuple[str, ...], *, waited_for: bool = False) -> None:
        """Whether a peer that we met may come into the table is for it to say.

        One who did not say is not asked again at once, and one that somebody waits for
        does not queue behind the others: or those who say nothing could keep all out.
        """
        if not self._core.wants(peer_id) or peer_id in self._checking:
            return
        quiet = self._quiet_until.get(peer_id, 0.0) > self._now()
        if waited_for or (not quiet and len(self._checking) < _CHECKS_MAX):
            self._checking[peer_id] = _Check()
            slots = trio.CapacityLimiter(1) if waited_for else self._check_slots
            self._spawn(self._check, peer_id, addrs, slots)

    async def _check(
        self, peer_id: str, addrs: tuple[str, ...], slots: trio.CapacityLimiter
    ) -> None:
        try:
            async with slots:
                if peer_id not in self._network.connected():
                    await self._network.connect(peer_id, addrs, timeout_s=_CHECK_TIMEOUT_S)
                spoken = await self._network.protocols(peer_id, timeout_s=_CHECK_TIMEOUT_S)
            if spoken:
                addrs = addrs or self._network.listen_addrs(peer_id)[: wire.ADDRS_MAX]
                server, holder = self._protocol in spoken, RECORD_PROTOCOL in spoken
                addr = self._network.seen_at(peer_id)
                self._checking[peer_id].fed = True
                self._feed(ev.PeerSeen(peer_id, addrs, server, holder, addr))
        except RemoteError as error:
            _log.debug("peer %s: %s", peer_id, error)
        finally:
            if peer_id in self._checking and not self._checking[peer_id].fed:
                self._checking.pop(peer_id).done.set()
                keep_latest(self._quiet_until, peer_id, self._now() + _QUIET_S, _QUIET_MAX)

    # Ourselves

    def _open(self, signed: common_pb2.Signed) -> OpenRecord:
        """A record of our own. Raises LocalError for one that peers would refuse."""
        try:
            record = parse_canonical(records_pb2.Record, signed.payload, PAYLOAD_BYTES_MAX)
            return open_record(signed, record.key, self._wall_ms())
        except RemoteError as error:
            raise LocalError(f"peers would refuse this record: {error}") from error


def _check_key(key: bytes) -> None:
    if not 0 < len(key) <= wire.KEY_BYTES_MAX:
        raise UsageError(f"a DHT key has from 1 to {wire.KEY_BYTES_MAX} bytes, not {len(key)}")
