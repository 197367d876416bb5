"""What a lookup finds: one small state machine for each thing one asks of a DHT. Pure.

Each is told what happens to the requests that it wants sent, says what to send
next, and has a `result` in the end. None of them outlives its `until`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from p2pnet.dht.events import Failed, Nodes, Providers, Records, ReplyArrived, Result
from p2pnet.dht.keyspace import peer_position, position
from p2pnet.dht.local import REPLICAS, Local
from p2pnet.dht.lookup import ALPHA, QUORUM, Lookup
from p2pnet.dht.records import OpenRecord, merge, serialise_set
from p2pnet.dht.routing import K
from p2pnet.dht.rtt import HEDGE_S_MAX
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


class Search(ABC):
    """A lookup, and what is gathered on its way. Base of all operations.

    It has its `result` as soon as it can be given, and is `over` when nothing more
    comes of it: a read goes on hearing the answers under way, to mend what is stale.
    """

    hedge_s_max = HEDGE_S_MAX

    def __init__(
        self,
        local: Local,
        key: bytes,
        kind: Kind,
        now: float,
        timeout_s: float,
        *,
        holders: int = 0,
        narrow: int = 0,
        alpha: int = ALPHA,
    ) -> None:
        self.local = local
        self.key = key
        self.until = now + timeout_s
        self.result: Result | None = None
        self.over = False
        self.lookup = Lookup(
            local.peer_id,
            key,
            width=K,
            group_of=local.group_of,
            holders=holders,
            narrow=narrow,
            alpha=alpha,
            shy=local.is_stalled,
        )
        self.answers = 0
        self._question = Message(kind, key)

    def begin(self, now: float) -> list[Ask]:
        """The first requests."""
        self.lookup.begin(self.local.seeds(self.key))
        return self._go_on(now)

    def answered(self, peer_id: str, event: ReplyArrived, now: float) -> list[Ask]:
        """A reply came, late or not.

        Raises:
            MalformedError: it is none that an honest peer gives; to be counted as failed.
        """
        message = event.message
        if message is None or message.kind is not self._asked(peer_id).kind:
            raise MalformedError("a DHT reply of another kind than its request")
        self._take(peer_id, message, event, now)
        self.answers += 1
        self.lookup.answered(peer_id, holder=event.holder, addr=event.addr)
        self.lookup.heard(peer_id, self.local.hints(message.closer, now))
        return self._go_on(now)

    def failed(self, peer_id: str, now: float) -> list[Ask]:
        """A request got no answer."""
        self.lookup.failed(peer_id)
        return self._go_on(now)

    def slow(self, peer_id: str, now: float) -> list[Ask]:
        """A request takes longer than most."""
        self.lookup.slow(peer_id)
        return self._go_on(now)

    def overdue(self, peer_id: str, now: float) -> list[Ask]:
        """A request takes longer than it should."""
        self.lookup.overdue(peer_id)
        return self._go_on(now)

    def expired(self, now: float) -> list[Ask]:
        """`until` has come."""
        return self._converged(now)

    def _go_on(self, now: float) -> list[Ask]:
        if self.over:
            return []
        asks = [Ask(peer, self._ask(peer)) for peer in self.lookup.next()]
        return self._converged(now) if not asks and self.lookup.done else asks

    def _ask(self, peer: PeerInfo) -> Message:
        """What a peer on the way is asked."""
        return self._question

    def _asked(self, peer_id: str) -> Message:
        """What it was asked."""
        return self._question

    def _take(  # noqa: B027 - there may be nothing
        self, peer_id: str, message: Message, event: ReplyArrived, now: float
    ) -> None:
        """Gathers what a reply brings beside nearer peers."""

    @abstractmethod
    def _converged(self, now: float) -> list[Ask]:
        """The lookup is over: sets `result`; the end, or the requests that follow."""

    def _end(self, result: Result) -> None:
        self.result = self.result or result
        self.over = True

    def _nobody_answered(self) -> bool:
        # A server may be the first of its network; a client has to know somebody.
        alone = self.lookup.asked_nobody and self.local.server
        return self.answers == 0 and not alone


class NodeSearch(Search):
    """Who is nearest to a key; for a peer's id, where is that peer."""

    def __init__(
        self, local: Local, key: bytes, now: float, timeout_s: float, *, peer_id: str = ""
    ) -> None:
        super().__init__(local, key, Kind.FIND_NODE, now, timeout_s)
        self._sought = peer_id

    @staticmethod
    def of_peer(local: Local, peer_id: str, now: float, timeout_s: float) -> NodeSearch:
        """A search that ends as soon as that peer itself answers."""
        return NodeSearch(local, peer_id_bytes(peer_id), now, timeout_s, peer_id=peer_id)

    def answered(self, peer_id: str, event: ReplyArrived, now: float) -> list[Ask]:
        asks = super().answered(peer_id, event, now)
        if not self.over and peer_id == self._sought:
            return self._converged(now)
        return asks

    def _converged(self, now: float) -> list[Ask]:
        if self._nobody_answered():
            self._end(Failed("no peer of the network answered"))
        else:
            target = self.lookup.reachable(self._sought)
            closest = tuple(self.lookup.nearest()[:K])
            self._end(Nodes(closest, target, self.lookup.hops, self.lookup.requests))
        return []


class RecordSearch(Search):
    """The records under a key, merged over the holders nearest to it.

    Given as soon as `quorum` of the REPLICAS nearest have answered and something was
    found; that nothing is there is said only after all of them. A copy of our own is
    only one more answer: it is believed alone only where we know nobody to ask.
    What a holder lacked is sent to it afterwards.
    """

    hedge_s_max = 0.1  # somebody waits, and few are asked

    def __init__(
        self, local: Local, key: bytes, now: float, timeout_s: float, *, quorum: int = QUORUM
    ) -> None:
        # Mostly the nearest that we know are the holders, and no more are asked than have
        # to answer. What they give is signed; only that they have nothing may be a lie.
        narrow = min(quorum, REPLICAS)
        super().__init__(
            local, key, Kind.GET_VALUE, now, timeout_s, holders=REPLICAS, narrow=narrow
        )
        self.quorum = quorum
        self._records: list[OpenRecord] = []
        self._copies: dict[str, dict[str, tuple[int, int, bytes]]] = {}
        self._began = now

    def holders_of(self, record: OpenRecord) -> int:
        """How many of those that answered hold that record, or one that is newer."""
        return sum(
            copies.get(record.author, (-1, -1, b"")) >= record.rank
            for copies in self._copies.values()
        )

    def _take(self, peer_id: str, message: Message, event: ReplyArrived, now: float) -> None:
        records = self.local.open(self.key, message.value, event.wall_ms)
        records = self.local.store.sift(records, now)
        # How long the answer was under way is not known: at most since we began.
        # Copies only grow older.
        since = now - self._began
        aged = [replace(record, age_s=record.age_s + since) for record in records]
        self._records = merge([*self._records, *aged])
        if event.holder:
            self._copies[peer_id] = {record.author: record.rank for record in records}

    def _go_on(self, now: float) -> list[Ask]:
        if self.over:
            return []
        if self.result is None and self._records and self.lookup.quorum(self.quorum, REPLICAS):
            self.result = Records(tuple(self._live(now)), len(self._copies))
        if self.result is None:
            if not self._records and len(self._copies) >= self.quorum:
                self.lookup.widen()
            return super()._go_on(now)
        # Only what is under way is still heard.
        return [] if self.lookup.awaited else self._converged(now)

    def _converged(self, now: float) -> list[Ask]:
        if self._nobody_answered():
            self._end(Failed("no peer of the network answered"))
            return []
        live = self._live(now)
        self._end(Records(tuple(live), len(self._copies)))
        near = self.lookup.holders()[:REPLICAS]
        names = [peer.peer_id for peer in near]
        if self.local.server and is_among(self.local.peer_id, names, REPLICAS, self.key):
            for record in live:
                self.local.store.put(record, now)
        repairs: list[Ask] = []
        for peer in near:
            copies = self._copies[peer.peer_id]
            lacking = [r for r in live if copies.get(r.author, (-1, -1, b"")) < r.rank]
            if lacking:
                message = Message(Kind.PUT_VALUE, self.key, serialise_set(lacking))
                repairs.append(Ask(peer, message, tracked=False))
        return repairs

    def _live(self, now: float) -> list[OpenRecord]:
        merged = merge([*self._records, *self.local.store.get(self.key, now)])
        return [record for record in merged if record.expires_in_s > 0]


class ProviderSearch(Search):
    """Who says that it provides a key."""

    def __init__(self, local: Local, key: bytes, now: float, timeout_s: float) -> None:
        super().__init__(local, key, Kind.GET_PROVIDERS, now, timeout_s)
        # By who named them; what nobody else says shall not crowd out what others say.
        self._named: list[tuple[PeerInfo, ...]] = [tuple(local.providers.get(key, now))]

    def _take(self, peer_id: str, message: Message, event: ReplyArrived, now: float) -> None:
        self._named.append(message.providers[:PROVIDERS_MAX])

    def _providers(self) -> tuple[PeerInfo, ...]:
        """Whom most name first; of those named as often, one of each answer in turn."""
        votes = Counter(peer.peer_id for named in self._named for peer in named)
        found: dict[str, PeerInfo] = {}
        for turn in zip_longest(*self._named):
            for peer in turn:
                if peer is not None:
                    known = found.get(peer.peer_id)
                    addrs = known.addrs if known else ()
                    addrs += tuple(addr for addr in peer.addrs if addr not in addrs)
                    found[peer.peer_id] = PeerInfo(peer.peer_id, addrs[:ADDRS_MAX])
        in_order = sorted(found.values(), key=lambda peer: -votes[peer.peer_id])
        return tuple(in_order[:PROVIDERS_MAX])

    def _converged(self, now: float) -> list[Ask]:
        if self._nobody_answered():
            self._end(Failed("no peer of the network answered"))
        else:
            self._end(Providers(self._providers()))
        return []


def is_among(peer_id: str, others: Sequence[str], n: int, key: bytes) -> bool:
    """Whether a peer is one of the `n` nearest to a key, `others` being sorted."""
    if len(others) < n:
        return True
    target = position(key)
    return peer_position(peer_id) ^ target < peer_position(others[n - 1]) ^ target
