"""A swarm of Kademlia cores in virtual time: an event queue, and nothing else.

Every core's invariants are checked after each of its events.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

from dht_samples import WALL_MS, keypair

from p2pnet.core import Tick
from p2pnet.dht import events as ev
from p2pnet.dht import wire as kad_wire
from p2pnet.dht.core import Kademlia
from p2pnet.dht.keyspace import peer_position, position
from p2pnet.dht.routing import Contact
from p2pnet.dht.wire import Message


def addrs_of(peer_id: str) -> tuple[str, ...]:
    """One address for each peer."""
    return (f"/dns4/{peer_id[-12:].lower()}/tcp/4001",)


class Swarm:
    """`count` peers; each two are 5 to 50 ms apart, and messages take up to a fifth more.

    The first `stock` of them keep no records. Without `upkeep`, only peers that
    asked for something live in time: big swarms, small tests. With `wire`, messages
    pass through the real wire format.
    """

    def __init__(
        self, count: int, seed: int, *, stock: int = 0, upkeep: bool = True, wire: bool = False
    ) -> None:
        self._upkeep = upkeep
        self._wire = wire
        self._active: set[str] = set()
        self.rng = random.Random(seed)
        self.now = 0.0
        self.requests = 0
        self.ids = [keypair(n).peer_id for n in range(count)]
        self.holders = set(self.ids[stock:])
        self.silent: set[str] = set()
        self.cores: dict[str, Kademlia] = {}
        self.results: dict[int, ev.Result] = {}
        self.done_at: dict[int, float] = {}
        self.renewals: list[bytes] = []
        self.forgotten: list[tuple[str, str]] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._ticks: dict[str, float] = {}
        self._last_op = 0
        for peer_id in self.ids:
            self.add(peer_id)

    def add(self, peer_id: str, *, server: bool = True) -> Kademlia:
        """A fresh core, also for one that was there before: a restart."""
        core = self.cores[peer_id] = Kademlia(
            peer_id, random.Random(self.rng.random()), server=server
        )
        self._ticks.pop(peer_id, None)
        return core

    def acquaint(self, each: int) -> None:
        """Everybody knows `each` others, and those numerically nearest to it."""
        for peer_id in self.ids:
            own = peer_position(peer_id)
            known = self.rng.sample(self.ids, min(each, len(self.ids)))
            known += sorted(self.ids, key=lambda p: peer_position(p) ^ own)[1:9]
            for other in known:
                self.meet(peer_id, other)

    def meet(self, peer_id: str, other: str) -> None:
        """`peer_id` has known `other` for long."""
        contact = Contact(other, addrs_of(other), other in self.holders, self.now, other)
        self.cores[peer_id].local.table.seen(contact)

    def hear(self, peer_id: str, other: str) -> None:
        """`peer_id` hears that `other` serves, and will see whether it answers."""
        if other != peer_id:
            self.feed(
                peer_id,
                ev.PeerSeen(
                    other, addrs_of(other), True, other in self.holders, addrs_of(other)[0]
                ),
            )

    def start(self, peer_id: str, make: Callable[[int], ev.Operation]) -> int:
        """Begins an operation; its id."""
        self._last_op += 1
        self._active.add(peer_id)
        self.feed(peer_id, make(self._last_op))
        return self._last_op

    def ask(self, peer_id: str, make: Callable[[int], ev.Operation]) -> ev.Result:
        """Runs until an operation is done."""
        op_id = self.start(peer_id, make)
        self.run(lambda: op_id in self.results)
        return self.results[op_id]

    def nearest(self, key: bytes, n: int, among: Sequence[str] | None = None) -> list[str]:
        """The truth, by looking at everybody."""
        target = position(key)
        peers = self.ids if among is None else among
        return sorted(peers, key=lambda p: peer_position(p) ^ target)[:n]

    def feed(self, peer_id: str, event: ev.Event) -> None:
        """One event for one core."""
        core = self.cores[peer_id]
        for effect in core.handle(event, self.now):
            self._carry_out(peer_id, effect)
        core.check(full=True)
        deadline = core.deadline()
        if deadline is not None and deadline < self._ticks.get(peer_id, 1e18):
            self._ticks[peer_id] = deadline
            self._at(deadline, lambda: self._tick(peer_id, core, deadline))

    def run(self, until: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Until something holds; an AssertionError after `limit_s` of virtual time."""
        end = self.now + limit_s
        while not until():
            assert self._queue, "nothing more will happen"
            at, _, what = heapq.heappop(self._queue)
            assert at <= end, f"not within {limit_s} s of virtual time"
            self.now = max(self.now, at)
            what()

    def run_for(self, seconds: float) -> None:
        """Lets time pass."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now = max(self.now, self._queue[0][0])
            heapq.heappop(self._queue)[2]()
        self.now = end

    def wall_ms(self) -> int:
        """The wall clock that goes with the virtual time."""
        return WALL_MS + round(self.now * 1000)

    def _tick(self, peer_id: str, core: Kademlia, at: float) -> None:
        if self.cores[peer_id] is core and self._ticks.get(peer_id) == at:
            del self._ticks[peer_id]
            if peer_id not in self.silent and (self._upkeep or peer_id in self._active):
                self.feed(peer_id, Tick())

    def _at(self, at: float, what: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (at, self._order, what))

    def _carry_out(self, peer_id: str, effect: ev.Effect) -> None:
        match effect:
            case ev.SendRequest():
                self.requests += 1
                delay = self._delay_s(peer_id, effect.peer.peer_id)
                core = self.cores[peer_id]
                self._at(self.now + delay, lambda: self._request(peer_id, core, effect, delay))
            case ev.OperationDone(op_id, result):
                self.results[op_id] = result
                self.done_at[op_id] = self.now
            case ev.Renew(key):
                self.renewals.append(key)
            case ev.Forget(other):
                self.forgotten.append((peer_id, other))

    def _request(self, asker: str, core: Kademlia, request: ev.SendRequest, delay: float) -> None:
        peer_id = request.peer.peer_id
        if peer_id in self.silent or peer_id not in self.cores:
            return
        message = self._pass(request.message)
        replies: list[ev.Effect] = []
        served = self.cores[peer_id]
        for effect in served.handle(ev.RequestArrived(0, asker, message, self.wall_ms()), self.now):
            if isinstance(effect, ev.SendReply | ev.Refuse):
                replies.append(effect)
            else:
                self._carry_out(peer_id, effect)
        served.check(full=True)
        # As the shell does: who asks may come in, if it serves.
        server = core.local.server and served.wants(asker)
        event: ev.Event = ev.PeerMoved(asker, addrs_of(asker))
        if server:
            event = ev.PeerSeen(
                asker, addrs_of(asker), True, asker in self.holders, addrs_of(asker)[0]
            )
        self.feed(peer_id, event)
        (reply,) = replies
        self._at(self.now + delay, lambda: self._reply(asker, core, request, reply))

    def _delay_s(self, a: str, b: str) -> float:
        apart = random.Random(f"{min(a, b)} {max(a, b)}").uniform(0.005, 0.05)
        return apart * self.rng.uniform(1.0, 1.2)

    def _pass(self, message: Message) -> Message:
        return kad_wire.parse(kad_wire.serialise(message)) if self._wire else message

    def _reply(self, asker: str, core: Kademlia, request: ev.SendRequest, reply: ev.Effect) -> None:
        if self.cores.get(asker) is not core or asker in self.silent:
            return
        event: ev.Event
        if isinstance(reply, ev.SendReply):
            message: Message | None = reply.message
            if message is not None:
                message = self._pass(message)
            holder = request.peer.peer_id in self.holders
            where = addrs_of(request.peer.peer_id)[0]
            event = ev.ReplyArrived(
                request.rpc_id, message, holder, self.wall_ms(), where, (where,)
            )
        else:
            event = ev.RequestFailed(request.rpc_id)
        self.feed(asker, event)
