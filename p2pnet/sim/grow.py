"""Swarms: grown honestly, or such as an old network would be. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from p2pnet.dht.keyspace import POSITION_BITS, peer_position
from p2pnet.dht.routing import Contact, K
from p2pnet.gossip.events import GossipConfig, MemberChanged
from p2pnet.gossip.roster import Roster
from p2pnet.net.groups import GroupOf, ip_group
from p2pnet.sim.dht_node import DhtNode
from p2pnet.sim.gossip_node import GossipNode, fresh_core
from p2pnet.sim.machine import Clock, Machine
from p2pnet.sim.world import World

# As `node.py` has them.
_RETRY_S_MIN = 0.5
_RETRY_S_MAX = 30.0
_DIAL_TIMEOUT_S = 5.0
_REFRESH_S = 5.0
_REFRESH_PEERS = 20
_KNOWN_MAX = 8  # whom a peer remembers on its disk, to turn to at its next start
_FILE = "peers"


@dataclass(eq=False)
class Peer:
    """A whole node: a machine with both cores, tied together as `node.py` does it.

    `bootstrap`: whom it turns to at each start, until each has answered.
    """

    machine: Machine
    maybe_dht: DhtNode | None
    maybe_gossip: GossipNode | None
    bootstrap: list[Machine] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine.on_boot.append(self.join)
        if self.maybe_dht is not None and self.maybe_gossip is not None:
            self.maybe_gossip.watchers.append(self._changed)
            self.machine.on_boot.append(self._keep_fresh)
            self._keep_fresh()

    @property
    def dht(self) -> DhtNode:
        """Its DHT core's node."""
        assert self.maybe_dht is not None, "a peer without a DHT"
        return self.maybe_dht

    @property
    def gossip(self) -> GossipNode:
        """Its membership core's node."""
        assert self.maybe_gossip is not None, "a peer without membership"
        return self.maybe_gossip

    @property
    def peer_id(self) -> str:
        """The machine's."""
        return self.machine.peer_id

    def join(self) -> None:
        """Turns to the bootstrap peers, again and again until each has answered."""
        self._join(_RETRY_S_MIN)

    def _join(self, pause_s: float) -> None:
        known = [self.machine.world.by_id[peer_id] for peer_id in self.machine.disk.get(_FILE, ())]
        waiting = [other for other in (*self.bootstrap, *known) if not self._reached(other)]
        # One of those it remembers is enough; it turns to them besides.
        if known and len(waiting) < len(self.bootstrap) + len(known):
            waiting = [other for other in waiting if other in self.bootstrap]
        for other in waiting:
            if other is not self.machine:
                self._join_through(other)
        if waiting:
            self.machine.after(pause_s, self._join, min(2 * pause_s, _RETRY_S_MAX))

    def _reached(self, other: Machine) -> bool:
        if other is self.machine:
            return True
        if self.maybe_gossip is not None:
            return other.peer_id in self.maybe_gossip.synced
        return self.dht.core.local.table.get(other.peer_id) is not None

    def _join_through(self, other: Machine) -> None:
        def connected(_: None, who: Machine | None) -> None:
            if who is not None and self.maybe_gossip is not None:
                self.maybe_gossip.join(who)
            if who is not None and self.maybe_dht is not None:
                self.maybe_dht.meet(who)

        self.machine.world.wire.connect(
            self.machine, other.peer_id, (other.addr,), timeout_s=_DIAL_TIMEOUT_S, done=connected
        )

    def _changed(self, node: GossipNode, change: MemberChanged) -> None:
        # After the core is done with the event that brought the change.
        if change.peer_id != self.peer_id:
            self.machine.after(0.0, self._tell_dht, change)

    def _tell_dht(self, change: MemberChanged) -> None:
        if change.new.live:
            self.dht.seen(change.peer_id, change.advert.addrs)
        else:
            self.dht.gone(change.peer_id)

    def _keep_fresh(self) -> None:
        self.machine.after(_REFRESH_S, self._refresh)

    def _refresh(self) -> None:
        alive = [member for member in self.gossip.members() if member.state.live]
        rng = self.machine.world.rng
        for member in rng.sample(alive, min(len(alive), _REFRESH_PEERS)):
            if member.peer_id != self.peer_id:
                self.dht.seen(member.peer_id, member.advert.addrs)
        known = [member.peer_id for member in alive if member.peer_id != self.peer_id]
        if known:
            self.machine.disk[_FILE] = known[:_KNOWN_MAX]
        self._keep_fresh()


def settle(
    world: World,
    *,
    dht: bool = True,
    gossip: bool = True,
    group_of: GroupOf = ip_group,
    config: GossipConfig | None = None,
    clock: Clock | None = None,
    addr: str | None = None,
    save_s: float | None = None,
) -> Peer:
    """One more peer, up and alone. `save_s`: see `DhtNode`."""
    machine = world.machine(clock=clock, addr=addr)
    return Peer(
        machine,
        DhtNode(machine, group_of=group_of, save_s=save_s) if dht else None,
        GossipNode(machine, group_of=group_of, config=config) if gossip else None,
    )


def grow(
    world: World,
    n: int,
    *,
    dht: bool = True,
    gossip: bool = True,
    over_s: float = 1.0,
    group_of: GroupOf = ip_group,
    config: GossipConfig | None = None,
    clock: Callable[[int], Clock] = lambda number: Clock(),
) -> list[Peer]:
    """`n` peers that join through the first one, spread over `over_s` seconds.

    Nothing has happened yet when it returns: run the world.
    """
    peers = [
        settle(world, dht=dht, gossip=gossip, group_of=group_of, config=config, clock=clock(i))
        for i in range(n)
    ]
    for peer in peers:
        peer.bootstrap = [peers[0].machine]
        peer.machine.after(world.rng.uniform(0.0, over_s), peer.join)
    return peers


def acquainted(
    world: World,
    n: int,
    *,
    dht: bool = True,
    gossip: bool = True,
    group_of: GroupOf = ip_group,
    config: GossipConfig | None = None,
) -> list[Peer]:
    """`n` peers that have been a network for long: they know whom they should.

    Their DHT does no upkeep before it is told of somebody new.
    """
    peers = [
        settle(world, dht=dht, gossip=gossip, group_of=group_of, config=config) for _ in range(n)
    ]
    for peer in peers:
        peer.bootstrap = [peers[0].machine, peers[n // 2].machine]
    if dht:
        acquaint_dht([peer.dht for peer in peers])
    if gossip:
        acquaint_gossip([peer.gossip for peer in peers])
    return peers


def acquaint_dht(nodes: Sequence[DhtNode]) -> None:
    """Fills routing tables as those of an old network are.

    In each bucket up to K random peers of those that belong there. A contact is one
    object, whoever has it in its table: 10,000 tables hold two million places.
    """
    world = nodes[0].machine.world
    rng = world.rng_of("acquaintances")
    contacts = sorted((_contact(node) for node in nodes), key=lambda c: peer_position(c.peer_id))
    places = [peer_position(contact.peer_id) for contact in contacts]
    for node in nodes:
        own, table = peer_position(node.peer_id), node.core.local.table
        first, last = 0, len(places)
        bits = 0
        # Step by step down the tree: the half that we are not in is one bucket.
        while last - first > 1 and bits < POSITION_BITS:
            half = 1 << (POSITION_BITS - 1 - bits)
            middle = bisect_left(
                places, (own >> (POSITION_BITS - bits) << 1 | 1) * half, first, last
            )
            upper = bool(own & half)
            others = range(first, middle) if upper else range(middle, last)
            for index in rng.sample(others, K) if len(others) > K else others:
                table.seen(contacts[index])
            first, last = (middle, last) if upper else (first, middle)
            bits += 1


def _contact(node: DhtNode) -> Contact:
    machine = node.machine
    group = node.group_of(node.peer_id, machine.addr)
    return Contact(node.peer_id, (machine.addr,), True, machine.now, group)


def acquaint_gossip(nodes: Sequence[GossipNode]) -> None:
    """Everybody knows everybody: all start from one roster that they share."""
    adverts = []
    for node in nodes:
        own = node.core.member(node.peer_id)
        assert own is not None, "a client is no member"
        adverts.append(own.advert)
    roster = Roster.shared(adverts, nodes[0].machine.now)
    for node in nodes:
        node.core = fresh_core(node, roster)
        node.booted()
