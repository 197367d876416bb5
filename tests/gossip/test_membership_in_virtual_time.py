"""Whole networks of membership cores in virtual time: joining, dying, stopping, leaving.

The times asserted are virtual seconds, with message delays of 0.5 to 5 ms.
"""

from __future__ import annotations

import pytest
from gossip_world import World

from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.events import (
    Departed,
    Describe,
    Description,
    GossipConfig,
    Leave,
    Request,
    State,
    SyncWith,
)
from p2pnet.gossip.messages import Kinds, write_message
from p2pnet.gossip.statements import OpenAdvert, Versions


def settled(count: int, seed: int) -> World:
    world = World(count, seed=seed)
    world.join_all()
    assert world.run(20, world.all_alive) is not None
    world.run(3)
    return world


@pytest.mark.parametrize("seed", range(2))
def test_a_join_reaches_all_of_32_within_a_few_seconds(seed: int) -> None:
    world = World(32, seed=seed)
    world.join_all()
    took = world.run(20, world.all_alive)
    assert took is not None
    assert took < 4  # the last one joins within the first second
    newcomer = world.add(100)
    world.feed(newcomer, SyncWith(world.list()[7].peer_id))
    took = world.run(10, world.all_alive)
    assert took is not None
    assert took < 2


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_a_killed_peer_is_failed_for_all_within_a_second(count: int) -> None:
    took = []
    for seed in range(2 if count > 5 else 6):
        world = settled(count, seed)
        victim = world.list()[seed % count]
        world.kill(victim)
        dead = victim.peer_id
        took.append(world.run(20, lambda w=world, d=dead: set(w.states(d)) == {State.FAILED}))
        assert {subject for _, subject in world.ever(State.FAILED)} == {dead}
        assert {subject for _, subject in world.ever(State.SUSPECT)} <= {dead}
    assert max(t if t is not None else 99 for t in took) < 1.0, took


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_a_silent_peer_is_failed_for_all_within_ten_seconds_and_not_before_five(count: int) -> None:
    took = []
    for seed in range(1 if count > 5 else 3):
        world = settled(count, seed)
        victim = world.list()[seed % count]
        world.pause(victim)
        dead = victim.peer_id
        took.append(world.run(40, lambda w=world, d=dead: set(w.states(d)) == {State.FAILED}))
        assert {subject for _, subject in world.ever(State.FAILED)} == {dead}
    times = [t if t is not None else 99 for t in took]
    assert max(times) < 10, times
    assert min(times) > 5, times


def test_the_survivor_of_three_gives_up_both_others() -> None:
    world = settled(3, 1)
    one, other, survivor = world.list()
    world.kill(one)
    world.kill(other)
    took = world.run(
        60,
        lambda: world.states(one.peer_id) == world.states(other.peer_id) == [State.FAILED],
    )
    assert took is not None
    assert took < 20
    assert survivor.core.member(survivor.peer_id) is not None


def test_when_most_of_a_network_dies_at_once_the_rest_agrees_on_it() -> None:
    world = settled(12, 2)
    dead = world.list()[:7]
    for node in dead:
        world.kill(node)
    took = world.run(
        60, lambda: all(set(world.states(node.peer_id)) == {State.FAILED} for node in dead)
    )
    assert took is not None
    assert took < 30
    assert world.all_alive()


def test_a_short_stop_is_forgiven() -> None:
    world = settled(5, 3)
    victim = world.list()[2]
    world.pause(victim)
    world.run(2.5)
    world.resume(victim)
    world.run(20)
    assert world.ever(State.FAILED) == []
    assert world.all_alive()


@pytest.mark.parametrize("seed", range(2))
def test_one_stopped_for_20_s_comes_back_by_itself_and_blames_nobody(seed: int) -> None:
    world = settled(8, seed)
    victim = world.list()[4]
    before = victim.core.member(victim.peer_id)
    world.pause(victim)
    world.run(20)
    assert set(world.states(victim.peer_id)) == {State.FAILED}
    world.resume(victim)
    took = world.run(20, world.all_alive)
    assert took is not None
    assert took < 3
    after = victim.core.member(victim.peer_id)
    assert before is not None
    assert after is not None
    assert after.advert.incarnation > before.advert.incarnation
    world.run(15)
    assert {subject for _, subject in world.ever(State.FAILED)} == {victim.peer_id}
    assert world.all_alive()


@pytest.mark.parametrize(("off_s", "on_s"), [(0.8, 0.05), (1.2, 0.3), (3.0, 0.5)])
def test_a_starved_node_gets_nobody_declared_failed(off_s: float, on_s: float) -> None:
    world = settled(8, 4)
    starved = world.list()[3]
    world.starve(starved, off_s=off_s, on_s=on_s, times=int(30 / (off_s + on_s)))
    world.run(32)
    assert world.ever(State.FAILED) == []
    world.run(10)
    assert world.all_alive()


def test_whoever_leaves_is_left_at_once_and_never_failed() -> None:
    world = settled(8, 5)
    leaver = world.list()[6]
    world.feed(leaver, Leave())
    took = world.run(5, lambda: set(world.states(leaver.peer_id)) == {State.LEFT})
    assert took is not None
    assert took < 1
    world.run(0.1)
    assert Departed() in leaver.effects
    world.kill(leaver)
    world.run(20)
    assert set(world.states(leaver.peer_id)) == {State.LEFT}
    assert world.ever(State.FAILED) == []


def test_leaving_alone_is_over_at_once() -> None:
    world = World(1)
    assert Departed() in world.feed(world.list()[0], Leave())


def test_whoever_left_or_failed_is_alive_again_after_a_restart() -> None:
    world = settled(6, 6)
    leaver, victim = world.list()[1:3]
    world.feed(leaver, Leave())
    world.run(1)
    world.kill(leaver)
    world.kill(victim)
    world.run(5)
    anchor = world.list()[0].peer_id
    for number in (2, 3):
        world.feed(world.add(number), SyncWith(anchor))
    assert world.run(10, world.all_alive) is not None
    assert set(world.states(leaver.peer_id)) == {State.ALIVE}


def test_a_restart_with_a_clock_set_back_outdoes_its_own_past() -> None:
    world = settled(4, 7)
    node = world.list()[1]
    world.kill(node)
    world.run(3)
    again = world.add(2, incarnation=1)
    world.feed(again, SyncWith(world.list()[0].peer_id))
    assert world.run(10, world.all_alive) is not None


def test_one_who_joins_later_hears_only_of_those_who_are_here() -> None:
    world = settled(8, 8)
    dead = world.list()[1:4]
    for node in dead:
        world.kill(node)
    world.run(40, lambda: all(set(world.states(n.peer_id)) == {State.FAILED} for n in dead))
    newcomer = world.add(50)
    world.feed(newcomer, SyncWith(world.list()[0].peer_id))
    took = world.run(10, world.all_alive)
    assert took is not None
    assert took < 5
    assert all(newcomer.core.member(node.peer_id) is None for node in dead)


def test_one_told_of_the_dead_by_a_liar_is_told_better_by_the_next() -> None:
    world = settled(8, 8)
    dead = world.list()[3]
    advert = dead.core.member(dead.peer_id)
    assert advert is not None
    world.kill(dead)
    world.run(40, lambda: set(world.states(dead.peer_id)) == {State.FAILED})
    world.run(30)  # the news of it are old
    newcomer = world.add(50)
    world.feed(newcomer, SyncWith(world.list()[0].peer_id))
    world.run(1)
    replay = write_message(Kinds.KIND_NEWS, Versions(), adverts=[advert.advert.raw])
    world.feed(newcomer, Request(world.list()[1].peer_id, replay))
    took = world.run(10, lambda: set(world.states(dead.peer_id)) == {State.FAILED})
    assert took is not None
    assert took < 5


def test_the_halves_of_a_split_network_find_each_other_again() -> None:
    world = settled(4, 9)
    left = [node.peer_id for node in world.list()[:2]]
    world.cut = lambda a, b: (a in left) != (b in left)
    world.run(60)
    for node in world.list():
        far = [p for p in world.nodes if (p in left) != (node.peer_id in left)]
        states = [node.core.member(peer_id) for peer_id in far]
        assert all(m is not None and m.state is State.FAILED for m in states)
    world.cut = lambda a, b: False
    took = world.run(120, world.all_alive)
    assert took is not None


def test_a_link_that_is_down_between_two_gets_neither_declared_failed() -> None:
    world = settled(6, 10)
    a, b = (node.peer_id for node in world.list()[:2])
    world.cut = lambda x, y: {x, y} == {a, b}
    world.run(30)
    assert world.ever(State.FAILED) == []


def test_what_a_node_says_of_itself_spreads() -> None:
    world = settled(10, 11)
    node = world.list()[5]
    richer = Description(addrs=("/ip4/127.0.0.1/tcp/7",), capabilities=Capabilities(vnodes=3))
    world.feed(node, Describe(richer))

    def known(at: OpenAdvert) -> bool:
        return at.capabilities.vnodes == 3 and at.addrs == richer.addrs

    def everywhere() -> bool:
        held = [n.core.member(node.peer_id) for n in world.running()]
        return all(m is not None and known(m.advert) for m in held)

    took = world.run(5, everywhere)
    assert took is not None
    assert took < 1
    assert node.core.member(node.peer_id) is not None
    assert world.feed(node, Describe(richer)) == []  # nothing new, nothing said


def test_a_client_hears_of_all_and_is_told_of_by_nobody() -> None:
    world = settled(5, 12)
    client = world.add(60, client=True)
    world.feed(client, SyncWith(world.list()[0].peer_id))
    world.run(15)
    heard = [m.peer_id for m in client.core.members()]
    assert heard == sorted(node.peer_id for node in world.list() if node is not client)
    assert all(
        node.core.member(client.peer_id) is None for node in world.list() if node is not client
    )


def test_the_failed_are_forgotten_after_a_while() -> None:
    assert GossipConfig().forget_s == 24 * 3600
    world = World(2, config=GossipConfig(forget_s=600))
    world.join_all()
    world.run(5)
    survivor, victim = world.list()
    world.kill(victim)
    world.run(590)
    assert survivor.core.member(victim.peer_id) is not None
    world.run(90)
    assert survivor.core.member(victim.peer_id) is None


def test_a_table_larger_than_a_message_is_learned_in_slices() -> None:
    world = World(1)
    anchor = world.list()[0]
    others = [world.add(number) for number in range(2, 26)]
    fat = Description(addrs=(), grpc_certificate=bytes(4000))
    for node in others:
        world.feed(node, Describe(fat))
        world.feed(node, SyncWith(anchor.peer_id))
    took = world.run(30, world.all_alive)
    assert took is not None
    newcomer = world.add(99)
    world.feed(newcomer, SyncWith(anchor.peer_id))
    took = world.run(15, world.all_alive)
    assert took is not None


def test_a_run_is_the_same_again_with_the_same_seed() -> None:
    runs = []
    for _ in range(2):
        world = settled(6, 14)
        world.kill(world.list()[0])
        world.run(5)
        runs.append((world.messages, world.ever(State.FAILED)))
    assert runs[0] == runs[1]


def test_round_trips_are_measured_or_foretold() -> None:
    world = settled(8, 15)
    world.run(30)
    node = world.list()[0].core
    one, other = (n.peer_id for n in world.list()[3:5])
    measured = node.round_trip_s(one, world.list()[0].peer_id)
    foretold = node.round_trip_s(one, other)
    assert measured is not None
    assert 0.001 <= measured <= 0.01  # as the world's delays are
    assert foretold is not None
    assert 0.0005 <= foretold <= 0.02
    assert node.round_trip_s(one, one) == 0.0
    assert node.round_trip_s(one, "a stranger") is None


def test_an_advert_says_where_a_node_is_but_not_often() -> None:
    world = settled(4, 16)
    world.run(400)
    told = [n.core.member(n.peer_id) for n in world.list()]
    assert all(m is not None and m.advert.coordinate is not None for m in told)
    assert all(m is not None and m.advert.sequence <= 400 / 30 for m in told)
