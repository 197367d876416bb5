"""The shipped membership core on a simulated machine: what `gossip/shell.py` does. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from p2pnet.core import Core, Tick
from p2pnet.gossip.events import (
    Answered,
    Description,
    Effect,
    Event,
    GossipConfig,
    Leave,
    Member,
    MemberChanged,
    PeerConnected,
    PeerDisconnected,
    Reply,
    Request,
    Send,
    State,
    Synced,
    SyncWith,
    Unanswered,
)
from p2pnet.gossip.membership import Membership
from p2pnet.gossip.roster import Roster
from p2pnet.net.groups import GroupOf, ip_group
from p2pnet.sim.driver import Driver
from p2pnet.sim.machine import Machine

PROTOCOL = "/p2pnet/gossip/1.0.0"

# (node, change): called at each change that a node sees
Watcher = Callable[["GossipNode", MemberChanged], None]
# makes the core, at each start of the process
MakeCore = Callable[["GossipNode"], Membership]

_tick = Tick()


class GossipNode(Driver[Event, Effect]):
    """One member. `core` is a new one after each restart of the machine."""

    protocol = PROTOCOL

    def __init__(
        self,
        machine: Machine,
        *,
        config: GossipConfig | None = None,
        group_of: GroupOf = ip_group,
        client: bool = False,
        make_core: MakeCore | None = None,
    ) -> None:
        super().__init__(machine)
        self.config = config or GossipConfig()
        self.group_of = group_of
        self.client = client
        self.watchers: list[Watcher] = []
        self.synced: dict[str, None] = {}  # who told this process everything
        self._make_core = make_core or fresh_core
        self.core: Membership
        machine.install(self)

    # What a scenario asks

    def join(self, other: Machine) -> None:
        """Exchanges everything with a peer whose address is known, as with a bootstrap peer."""
        self.machine.remembered[other.peer_id] = other.addr
        self.feed(SyncWith(other.peer_id))

    def leave(self) -> None:
        """Says goodbye; the process goes on."""
        self.feed(Leave())

    def members(self) -> list[Member]:
        """Everyone that it knows, itself too."""
        return self.core.members()

    def states(self) -> dict[str, State]:
        """What it holds everyone to be, by peer id, in the order of peer ids."""
        return {member.peer_id: member.state for member in self.core.members()}

    def live(self) -> list[str]:
        """Whom it holds to be here, itself included."""
        return [member.peer_id for member in self.core.members() if member.state.live]

    # What happens

    def feed(self, event: Event) -> Sequence[Effect]:
        """Hands the core an event and carries out what comes of it.

        Raises RemoteError: a request that no honest peer makes.
        """
        match event:
            case Request(peer_id, message):
                return self.hand_in(event, 2, peer_id.encode() + message)
            case Answered(rpc_id, message):
                return self.hand_in(event, 3, b"%d " % rpc_id + message)
            case Unanswered(rpc_id):
                return self.hand_in(event, 4, b"%d" % rpc_id)
            case PeerConnected(peer_id):
                return self.hand_in(event, 5, peer_id.encode())
            case PeerDisconnected(peer_id):
                return self.hand_in(event, 6, peer_id.encode())
            case _:
                return self.hand_in(event, 7, repr(event).encode())

    def boot(self) -> None:
        """See `Program`."""
        self.synced.clear()
        self.core = self._make_core(self)
        self.booted()

    def connected(self, peer_id: str, addr: str) -> None:
        """See `Program`."""
        self.feed(PeerConnected(peer_id, addr))

    def disconnected(self, peer_id: str) -> None:
        """See `Program`."""
        self.feed(PeerDisconnected(peer_id))

    def serve(self, peer_id: str, payload: bytes) -> bytes | None:
        """See `Program`."""
        for effect in self.feed(Request(peer_id, payload)):
            if isinstance(effect, Reply):
                return effect.message
        return None

    def size_bytes(self, payload: bytes) -> int:
        """See `Program`."""
        return len(payload)

    def _driven(self) -> Core[Event | Tick, Effect]:
        return self.core

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Send):
            self._ask(effect)
        elif isinstance(effect, MemberChanged):
            for watcher in self.watchers:
                watcher(self, effect)
        elif isinstance(effect, Synced):
            self.synced[effect.peer_id] = None

    def _ask(self, send: Send) -> None:
        rpc_id = send.rpc_id

        def done(reply: bytes | None, who: Machine | None) -> None:
            if who is None or reply is None:
                self.feed(Unanswered(rpc_id))
            else:
                self.feed(Answered(rpc_id, reply))

        self.machine.world.wire.request(
            self.machine,
            send.peer_id,
            PROTOCOL,
            send.message,
            timeout_s=send.timeout_s,
            addrs=send.addrs,
            done=done,
        )


def fresh_core(node: GossipNode, base: Roster | None = None) -> Membership:
    """A core that knows nobody, or those of a shared roster."""
    machine = node.machine
    return Membership(
        machine.key,
        incarnation=machine.wall_ms,
        now=machine.now,
        rng=machine.world.rng_of("gossip", machine.number, machine.boots),
        description=Description(addrs=(machine.addr,)),
        client=node.client,
        config=node.config,
        group_of=node.group_of,
        base=base,
    )
