"""Accusers: colluders accuse, resurrect and impersonate, and nobody here is evicted (R20). Pure.

The colluders know everything at once: they see an incarnation of a victim in the
moment in which the victim makes it, and accuse that one. They have ground their
identities until they stand right behind their victims on the ring, and they come from
several IP groups. They also tell everybody the old adverts of the dead, and adverts
that they signed themselves in others' names.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from p2pnet import keys
from p2pnet.gossip.events import GossipConfig, MemberChanged, State
from p2pnet.gossip.messages import Kinds, write_message
from p2pnet.gossip.ring import position
from p2pnet.gossip.roster import Roster
from p2pnet.gossip.statements import OpenAdvert, Versions, build_advert, raw_of
from p2pnet.keys import KeyPair
from p2pnet.sim.gossip_node import GossipNode, fresh_core
from p2pnet.sim.grow import Peer, acquainted
from p2pnet.sim.liars import FalseAccuser
from p2pnet.sim.links import Links
from p2pnet.sim.machine import Machine
from p2pnet.sim.report import Report
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World
from p2pnet.v1 import common_pb2, gossip_pb2

_SETTLE_S = 1.0
_DEAD = 2
_TOLD = 8  # how many honest members a colluder tells each time
_AHEAD = 1000  # incarnations in forged adverts are so far ahead
_GRIND_MAX = 1_000_000


class _Plot:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        self.world = World(seed, Links(loss=options["loss"]))
        self.rng: random.Random = self.world.rng_of("plot")
        config = GossipConfig(observers=int(options["observers"]), quorum=int(options["quorum"]))
        self.honest = acquainted(self.world, nodes, dht=False, config=config)
        self.victims = self.rng.sample(self.honest, int(options["victims"]))
        others = [peer for peer in self.honest if peer not in self.victims]
        self.dead = self.rng.sample(others, _DEAD)
        self.old_adverts = [_advert(peer) for peer in self.dead]
        self.evicted: dict[tuple[str, str], None] = {}  # (subject, by whom)
        self.ended: dict[str, float] = {}
        self.accusations = self.refused = 0
        self.colluders = [self._colluder(number) for number in range(int(options["colluders"]))]
        self._acquaint()
        for peer in self.honest:
            peer.gossip.watchers.append(self._changed)

    def _colluder(self, number: int) -> FalseAccuser:
        victim = self.victims[number % len(self.victims)]
        group = number // len(self.victims) % int(self.options["groups"])
        addr = f"/ip4/9.9.{group}.{1 + number}/tcp/4001"
        machine = self.world.machine(addr=addr)
        _rename(self.world, machine, self._ground(victim))
        advert = build_advert(
            machine.key, incarnation=machine.wall_ms, sequence=0, addrs=(machine.addr,)
        )
        return FalseAccuser(machine, advert)

    def _ground(self, victim: Peer) -> KeyPair:
        """A key that stands on the ring between the victim and the honest one behind it."""
        here = position(victim.peer_id)
        places = sorted(position(peer.peer_id) for peer in self.honest)
        behind = places[(places.index(here) + 1) % len(places)]
        for _ in range(_GRIND_MAX):
            key = KeyPair.from_seed(self.rng.randbytes(32))
            there = position(key.peer_id)
            if here < there < behind or (behind < here and (there > here or there < behind)):
                return key
        raise AssertionError("no such key: the ring is too full")

    def _acquaint(self) -> None:
        adverts = [_advert(peer) for peer in self.honest]
        adverts += [liar.advert for liar in self.colluders]
        roster = Roster.shared(adverts, 0.0)
        for peer in self.honest:
            peer.gossip.core = fresh_core(peer.gossip, roster)
            peer.gossip.booted()

    def _changed(self, node: GossipNode, change: MemberChanged) -> None:
        machine = self.world.by_id[change.peer_id]
        if change.new is State.FAILED and machine.alive and node.machine.alive:
            self.evicted[change.peer_id, node.peer_id] = None

    # What they do

    def begin(self) -> None:
        """Two of the honest die, and the colluders begin."""
        for peer in self.dead:
            peer.machine.kill()
            self.ended[peer.peer_id] = _advert(peer).incarnation
        for liar in self.colluders:
            self.world.after(self.rng.uniform(0.0, 0.5), self._lie, liar, 0)

    def _lie(self, liar: FalseAccuser, turn: int) -> None:
        told = [peer.machine for peer in self.rng.sample(self.honest, _TOLD)]
        for victim in self.victims:
            self.accusations += 1
            liar.accuse(victim.peer_id, _advert(victim).incarnation, told)
        lies = (self._resurrect, self._impersonate)
        lies[turn % len(lies)](liar, told)
        self.world.after(self.options["every_s"], self._lie, liar, turn + 1)

    def _resurrect(self, liar: FalseAccuser, told: list[Machine]) -> None:
        adverts = [advert.raw for advert in self.old_adverts]
        liar.tell(told, write_message(Kinds.KIND_NEWS, Versions(), adverts=adverts))

    def _impersonate(self, liar: FalseAccuser, told: list[Machine]) -> None:
        victim = _advert(self.rng.choice(self.victims))
        payload = gossip_pb2.Advert.FromString(victim.signed.payload)
        payload.incarnation += _AHEAD
        ours = liar.machine.key.sign(keys.ADVERT, payload.SerializeToString(deterministic=True))
        theirs = common_pb2.Signed(
            payload=ours.payload, public_key=victim.signed.public_key, signature=ours.signature
        )
        for signed in (ours, theirs):  # its own signature, and one that does not hold
            liar.tell(told, write_message(Kinds.KIND_NEWS, Versions(), adverts=[raw_of(signed)]))

    # What came of it

    def unsigned(self) -> int:
        """How many members are held in an incarnation that they never had."""
        own = {peer.peer_id: _advert(peer).incarnation for peer in self.honest}
        return sum(
            member.advert.incarnation > own[member.peer_id]
            for peer in self.honest
            if peer.machine.alive
            for member in peer.gossip.members()
            if member.peer_id in own
        )

    def resurrected(self) -> int:
        """How many of the dead are held to be alive, by how many."""
        return sum(
            member.state is State.ALIVE
            for peer in self.honest
            if peer.machine.alive
            for member in map(peer.gossip.core.member, self.ended)
            if member is not None
        )


def run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    """See the module."""
    plot = _Plot(nodes, seed, options)
    world = plot.world
    world.run_for(_SETTLE_S)
    before = sum(peer.machine.sent_bytes for peer in plot.honest)
    plot.begin()
    world.run_for(options["lasts_s"])
    spent = sum(peer.machine.sent_bytes for peer in plot.honest) - before
    subjects = {subject: None for subject, _ in plot.evicted}
    report = Report("accusers", nodes, seed, trace=world.trace)
    report.figures = {
        "colluders": len(plot.colluders),
        "groups": int(options["groups"]),
        "accusations made": plot.accusations,
        "live members evicted": len(subjects),
        "by how many": len(plot.evicted),
        "unsigned incarnations held": plot.unsigned(),
        "dead held alive": plot.resurrected(),
        "refutations": sum(_refuted(peer) for peer in plot.victims),
        "bytes/s a node": spent / options["lasts_s"] / nodes,
        "events": world.events,
    }
    report.expect(not subjects, f"{len(subjects)} live members were evicted")
    report.expect(plot.unsigned() == 0, "an incarnation is held that nobody signed")
    report.expect(plot.resurrected() == 0, "one of the dead is held to be alive")
    return report


def _refuted(peer: Peer) -> int:
    return _advert(peer).incarnation - peer.machine.clock.wall_ms(0.0)


def _advert(peer: Peer) -> OpenAdvert:
    own = peer.gossip.core.member(peer.peer_id)
    assert own is not None, "a client is no member"
    return own.advert


def _rename(world: World, machine: Machine, key: KeyPair) -> None:
    # Before anything runs on it, a machine is nobody in particular yet.
    del world.by_id[machine.peer_id]
    machine.key, machine.peer_id = key, key.peer_id
    world.by_id[machine.peer_id] = machine


SCENARIO = Scenario(
    name="accusers",
    summary="colluders accuse, resurrect and impersonate: nobody live is evicted (membership)",
    run=run,
    nodes=100,
    nodes_min=20,
    options={
        "loss": 0.01,
        "colluders": 30,
        "groups": 5,
        "victims": 3,
        "observers": 6,
        "quorum": 3,
        "every_s": 0.5,
        "lasts_s": 30,
    },
)
