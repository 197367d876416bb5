"""Swarms that grow, come back, or have been there for long."""

from __future__ import annotations

from collections import Counter

import pytest

from p2pnet.dht.core import Kademlia
from p2pnet.dht.events import FindNode, Get, Nodes, Put, Records, Stored
from p2pnet.dht.keyspace import common_prefix_bits, name_key, peer_position
from p2pnet.dht.records import open_record
from p2pnet.dht.routing import K
from p2pnet.gossip.events import State
from p2pnet.keys import peer_id_bytes
from p2pnet.sim.grow import Peer, acquainted, grow, settle
from p2pnet.sim.records import network_record
from p2pnet.sim.scenarios import SCENARIOS
from p2pnet.sim.truth import nearest
from p2pnet.sim.world import World


def _all_see(peers: list[Peer]) -> bool:
    here = sorted(peer.peer_id for peer in peers)
    return all(
        [m.peer_id for m in peer.gossip.members() if m.state is State.ALIVE] == here
        for peer in peers
    )


def test_peers_that_join_through_one_find_each_other() -> None:
    world = World(3)
    peers = grow(world, 8)
    assert world.run(lambda: _all_see(peers), 30.0, every_s=0.1) is not None
    world.run_for(5.0)
    for peer in peers:
        others = [p.machine for p in peers if p is not peer]
        result = peer.dht.ask(lambda op: FindNode(op, peers[5].peer_id, 10.0))
        assert isinstance(result, Nodes)
        known = sorted(contact.peer_id for contact in peer.dht.core.local.table)
        assert known == sorted(machine.peer_id for machine in others)


def test_a_peer_comes_back_and_finds_its_way_without_the_bootstrap_peer() -> None:
    world = World(4)
    peers = grow(world, 6)
    world.run_for(15.0)
    peers[0].machine.vanish()
    peers[3].machine.restart(keep_disk=True)
    assert world.run(lambda: _all_see(peers[1:]), 60.0, every_s=0.1) is not None


def test_a_restart_with_its_disk_keeps_the_records_that_it_held() -> None:
    world = World(5)
    peers = [settle(world, save_s=1.0) for _ in range(4)]
    for peer in peers:
        peer.bootstrap = [peers[0].machine]
        peer.join()
    world.run_for(10.0)
    author, key = peers[1], name_key("ant")
    signed = network_record(author.machine, "ant", epoch=1, ttl_s=600)
    record = open_record(signed, key, author.machine.wall_ms)
    assert isinstance(author.dht.ask(lambda op: Put(op, record, 5.0)), Stored)
    world.run_for(3.0)
    for peer in peers:
        peer.machine.kill()
    for peer in peers:
        peer.machine.restart(keep_disk=peer is peers[2])
    world.run_for(10.0)
    found = peers[3].dht.ask(lambda op: Get(op, key, 5.0))
    assert isinstance(found, Records)
    assert [r.author for r in found.records] == [author.peer_id]


def test_an_old_network_has_the_tables_that_it_should() -> None:
    peers = acquainted(World(6), 120, gossip=False)
    positions = [peer_position(peer.peer_id) for peer in peers]
    for peer, own in zip(peers, positions, strict=True):
        there = Counter(common_prefix_bits(own, p) for p in positions if p != own)
        held = Counter(
            common_prefix_bits(own, peer_position(contact.peer_id))
            for contact in peer.dht.core.local.table
        )
        assert held == {bits: min(K, count) for bits, count in there.items()}
        peer.dht.core.check()


def test_an_old_network_sees_itself_and_looks_up_as_brute_force_does() -> None:
    world = World(7)
    peers = acquainted(world, 60)
    assert _all_see(peers)
    target = peers[17].peer_id
    peers[17].machine.kill()
    result = peers[2].dht.ask(lambda op: FindNode(op, target, 10.0))
    assert isinstance(result, Nodes)
    others = [p.machine for p in peers if p not in (peers[2], peers[17])]
    named = [peer.peer_id for peer in result.closest]
    assert named[:8] == nearest(others, peer_id_bytes(target), 8)
    survivors = [peer for peer in peers if peer.machine.running]
    assert world.run(lambda: _all_see(survivors), 60.0, every_s=0.1) is not None


def test_whatever_a_core_raises_is_a_failure_of_that_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(core: Kademlia) -> None:
        raise AssertionError("a core contradicts itself")

    monkeypatch.setattr(Kademlia, "check", broken)
    report = SCENARIOS["swarm"].play(8, 3)
    assert "a core contradicts itself" in report.failures[0]
    assert report.replay == "p2pnet sim --scenario swarm --nodes 8 --seed 3"
