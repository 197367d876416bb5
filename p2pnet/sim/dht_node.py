"""The shipped Kademlia core on a simulated machine: what `dht/shell.py` does. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from p2pnet.core import Core, Tick
from p2pnet.dht import events as ev
from p2pnet.dht import snapshot
from p2pnet.dht import wire as kad_wire
from p2pnet.dht.core import Kademlia
from p2pnet.dht.records import OpenRecord
from p2pnet.dht.wire import Kind, Message
from p2pnet.errors import MalformedError
from p2pnet.keys import peer_id_bytes
from p2pnet.net.groups import GroupOf, ip_group
from p2pnet.net.network import PeerInfo
from p2pnet.sim.driver import Driver
from p2pnet.sim.machine import Machine

PROTOCOL = kad_wire.KAD_PROTOCOL
RECORD_PROTOCOL = kad_wire.RECORD_PROTOCOL
# As the shell has them.
CHECK_TIMEOUT_S = 5.0
CHECKS_MAX = 256
_FILE = "records"

# makes the core, at each start of the process
MakeCore = Callable[["DhtNode"], Kademlia]


class DhtNode(Driver[ev.Event, ev.Effect]):
    """One peer of the DHT. `core` is a new one after each restart of the machine.

    `holder`: announces that it keeps records; a stock peer does not. `on_wire`: messages
    pass through their bytes, as they do in reality, which takes ten times as long.
    `save_s`: how often what is held for others is written to the machine's disk; None: never.
    """

    protocol = PROTOCOL

    def __init__(
        self,
        machine: Machine,
        *,
        server: bool = True,
        holder: bool = True,
        group_of: GroupOf = ip_group,
        on_wire: bool = False,
        save_s: float | None = None,
        make_core: MakeCore | None = None,
    ) -> None:
        super().__init__(machine)
        self.server = server
        self.group_of = group_of
        self.results: dict[int, ev.Result] = {}  # of operations, until `ask` takes them
        self.requests = 0  # sent
        self._then: dict[int, Callable[[ev.Result], None]] = {}
        self._makers: dict[bytes, Callable[[], OpenRecord]] = {}
        self._on_wire = on_wire
        self._save_s = save_s
        self._own_key = peer_id_bytes(machine.peer_id)
        self._make_core = make_core or fresh_core
        self._last_id = 0
        self._reply: Message | MalformedError | None = None
        self._checking: dict[str, None] = {}
        self.core: Kademlia
        if server and holder:
            machine.announces += (RECORD_PROTOCOL,)
        machine.install(self)

    # What a scenario asks

    def meet(self, other: Machine) -> None:
        """Hears of a peer at its address: a bootstrap peer, a member. Takes a moment."""
        self.seen(other.peer_id, (other.addr,))

    def seen(self, peer_id: str, addrs: Sequence[str] = ()) -> None:
        """A peer is there, or is said to be: see `Dht.seen`."""
        self.feed(ev.PeerMoved(peer_id, tuple(addrs)))
        self._consider(peer_id, tuple(addrs))

    def gone(self, peer_id: str) -> None:
        """A peer has left or failed."""
        self.feed(ev.PeerGone(peer_id))

    def start(
        self, make: Callable[[int], ev.Event], then: Callable[[ev.Result], None] | None = None
    ) -> int:
        """Begins an operation, made with its id; its result goes to `then`, or into `results`."""
        self._last_id += 1
        if then is not None:
            self._then[self._last_id] = then
        self.feed(make(self._last_id))
        return self._last_id

    def ask(self, make: Callable[[int], ev.Event], *, limit_s: float = 60.0) -> ev.Result:
        """Runs the world until an operation is done. AssertionError: not within `limit_s`."""
        op_id = self.start(make)
        took_s = self.machine.world.run(lambda: op_id in self.results, limit_s)
        assert took_s is not None, f"not done within {limit_s} s of virtual time"
        return self.results.pop(op_id)

    def keep(self, key: bytes, make: Callable[[], OpenRecord]) -> None:
        """Keeps a record alive: puts what `make` makes, and a newer one whenever it is time."""
        self._makers[key] = make
        self.feed(ev.Keep(make()))

    # What happens

    def feed(self, event: ev.Event) -> Sequence[ev.Effect]:
        """Hands the core an event and carries out what comes of it."""
        match event:
            case ev.RequestArrived(_, peer_id, message):
                return self.hand_in(event, 12, peer_id.encode() + _digest(message))
            case ev.ReplyArrived(rpc_id, message):
                return self.hand_in(event, 13, b"%d " % rpc_id + _digest(message))
            case ev.RequestFailed(rpc_id):
                return self.hand_in(event, 14, b"%d" % rpc_id)
            case ev.PeerSeen(peer_id) | ev.PeerMoved(peer_id) | ev.PeerGone(peer_id):
                return self.hand_in(event, 15, type(event).__name__.encode() + peer_id.encode())
            case ev.Put(op_id, record):
                return self.hand_in(event, 16, b"%d " % op_id + record.signed.signature)
            case ev.Keep(record, op_id):
                return self.hand_in(event, 17, b"%d " % op_id + record.signed.signature)
            case _:
                return self.hand_in(event, 18, repr(event).encode())

    def boot(self) -> None:
        """See `Program`."""
        self._checking.clear()
        self._then.clear()
        self._makers.clear()
        self.core = self._make_core(self)
        kept = self.machine.disk.get(_FILE)
        if kept is not None:
            for part in snapshot.parse(kept, lambda: self.machine.wall_ms):
                self.core.restore(part, self.machine.now)
        self.booted()
        self._save_later()

    def connected(self, peer_id: str, addr: str) -> None:
        """See `Program`."""
        self.seen(peer_id)

    def disconnected(self, peer_id: str) -> None:
        """See `Program`."""

    def serve(self, peer_id: str, payload: Message | bytes) -> Message | bytes | None:
        """See `Program`."""
        message = kad_wire.parse(payload) if isinstance(payload, bytes) else payload
        self._last_id += 1
        self._reply = None
        machine = self.machine
        addr = machine.world.by_id[peer_id].addr
        self.feed(ev.RequestArrived(self._last_id, peer_id, message, machine.wall_ms, addr))
        reply, self._reply = self._reply, None
        if isinstance(reply, MalformedError):
            raise reply
        addrs = [peer.addrs for peer in message.closer[:1] if peer.peer_id == peer_id]
        self._consider(peer_id, addrs[0] if addrs else ())
        return None if reply is None else self._passed(self._with_us(reply, asks=False))

    def size_bytes(self, payload: Message | bytes) -> int:
        """See `Program`."""
        return len(payload if isinstance(payload, bytes) else kad_wire.serialise(payload))

    def _save_later(self) -> None:
        if self._save_s is not None:
            self.machine.after(self._save_s, self._save)

    def _save(self) -> None:
        held = self.core.held(self.machine.now)
        self.machine.disk[_FILE] = snapshot.serialise(held, self.machine.wall_ms)
        self._save_later()

    def _driven(self) -> Core[ev.Event | Tick, ev.Effect]:
        return self.core

    def _carry_out(self, effect: ev.Effect) -> None:
        match effect:
            case ev.SendRequest():
                self._ask(effect)
            case ev.SendReply(_, message):
                self._reply = message
            case ev.Refuse(_, reason):
                self._reply = MalformedError(reason)
            case ev.OperationDone(op_id, result):
                then = self._then.pop(op_id, None)
                if then is not None:
                    then(result)
                else:
                    self.results[op_id] = result
            case ev.Renew(key):
                self._renew(key)
            case _:
                pass  # whether a connection is dead is the network's to say

    def _ask(self, request: ev.SendRequest) -> None:
        rpc_id, wants_reply = request.rpc_id, request.message.kind is not Kind.ADD_PROVIDER
        self.requests += 1

        def done(reply: Message | bytes | None, who: Machine | None) -> None:
            if who is None:
                self.feed(ev.RequestFailed(rpc_id))
                return
            message = kad_wire.parse(reply) if isinstance(reply, bytes) else reply
            holder, wall_ms = who.speaks(RECORD_PROTOCOL), self.machine.wall_ms
            self.feed(ev.ReplyArrived(rpc_id, message, holder, wall_ms, who.addr, (who.addr,)))

        self.machine.world.wire.request(
            self.machine,
            request.peer.peer_id,
            PROTOCOL,
            self._passed(self._with_us(request.message)),
            timeout_s=request.timeout_s,
            addrs=request.peer.addrs,
            wants_reply=wants_reply,
            done=done,
        )

    def _consider(self, peer_id: str, addrs: tuple[str, ...]) -> None:
        """Whether a peer that we met may come into the table is for it to say."""
        if (
            not self.core.wants(peer_id)
            or peer_id in self._checking
            or len(self._checking) >= CHECKS_MAX
        ):
            return
        self._checking[peer_id] = None

        def done(reply: None, who: Machine | None) -> None:
            self._checking.pop(peer_id, None)
            if who is not None:
                server, holder = who.speaks(PROTOCOL), who.speaks(RECORD_PROTOCOL)
                self.feed(ev.PeerSeen(peer_id, addrs or (who.addr,), server, holder, who.addr))

        self.machine.world.wire.connect(
            self.machine, peer_id, addrs, timeout_s=CHECK_TIMEOUT_S, done=done
        )

    def _renew(self, key: bytes) -> None:
        make = self._makers.get(key)
        if make is not None:
            self.keep(key, make)

    def _with_us(self, message: Message, *, asks: bool = True) -> Message:
        """As `Dht._with_us`: a server names itself in what it asks."""
        ours = PeerInfo(self.peer_id, (self.machine.addr,))
        providers = message.providers
        if providers:
            providers = tuple(ours if p.peer_id == ours.peer_id else p for p in providers)
        closer = (ours,) if asks and self.server else message.closer
        if not asks and message.kind is Kind.FIND_NODE and message.key == self._own_key:
            closer = (ours, *closer[: kad_wire.PEERS_MAX - 1])
        return replace(message, closer=closer, providers=providers)

    def _passed(self, message: Message) -> Message | bytes:
        return kad_wire.serialise(message) if self._on_wire else message


def fresh_core(node: DhtNode) -> Kademlia:
    """A core that knows nobody."""
    machine = node.machine
    rng = machine.world.rng_of("dht", machine.number, machine.boots)
    return Kademlia(machine.peer_id, rng, server=node.server, group_of=node.group_of)


def _digest(message: Message | None) -> bytes:
    """What the trace keeps of a message."""
    if message is None:
        return b""
    peers = " ".join([peer.peer_id for peer in (*message.closer, *message.providers)])
    return b"%d " % message.kind + message.key + (message.value or b"") + peers.encode()
