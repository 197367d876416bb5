"""Rosters, their digests, and what two nodes tell each other where these differ."""

from __future__ import annotations

import random

import pytest
from gossip_world import World, keypair
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnet.gossip.digests import DEPTH_MAX, EMPTY, depth_for
from p2pnet.gossip.events import Answered, Describe, Description, Request, Send, State, SyncWith
from p2pnet.gossip.messages import Kinds, SyncResult, read_message, write_message
from p2pnet.gossip.mutes import Mutes
from p2pnet.gossip.ring import Ring, bucket, points_of, position
from p2pnet.gossip.roster import Entry, Roster
from p2pnet.gossip.statements import OpenAdvert, Versions, build_advert

COUNT = 24
ADVERTS = [build_advert(keypair(n), incarnation=5, sequence=0) for n in range(1, COUNT + 1)]


def entry(number: int, state: State, sequence: int = 0) -> Entry:
    left = state is State.LEFT
    advert = build_advert(keypair(number), incarnation=5, sequence=sequence, left=left)
    return Entry(advert, state, 1.0)


def plain(adverts: list[OpenAdvert]) -> Roster:
    roster = Roster()
    for advert in adverts:
        roster.put(advert.peer_id, Entry(advert, State.ALIVE, 0.0))
    return roster


def digests(roster: Roster, depth: int) -> list[bytes]:
    return [roster.digests.get(depth, index) for index in range(1 << depth)]


STEPS = st.lists(
    st.tuples(
        st.integers(1, COUNT + 6),
        st.sampled_from([*State, None]),
        st.integers(0, 3),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS)
def test_one_that_starts_from_a_shared_one_is_as_one_of_its_own(
    steps: list[tuple[int, State | None, int]],
) -> None:
    base = Roster.shared(ADVERTS, 0.0)
    before = digests(base, 4)
    shared, own = Roster(base), plain(ADVERTS)
    for number, state, sequence in steps:
        peer_id = keypair(number).peer_id
        for roster in (shared, own):
            if state is not None:
                roster.put(peer_id, entry(number, state, sequence))
            elif roster.get(peer_id) is not None:
                roster.drop(peer_id)
        shared.digests.get(DEPTH_MAX, bucket(peer_id, DEPTH_MAX))
    assert list(shared.members()) == list(own.members())
    assert (len(shared), shared.live) == (len(own), own.live)
    assert shared.longest_gone() == own.longest_gone()
    for depth in (0, 4, DEPTH_MAX):
        assert digests(shared, depth) == digests(own, depth)
    shared.check()
    own.check()
    assert digests(base, 4) == before
    assert len(base) == COUNT


def test_a_ring_on_a_shared_base_walks_as_one_of_its_own() -> None:
    peers = [advert.peer_id for advert in ADVERTS]
    ring, own = Ring(points_of(peers[:16])), Ring()
    for peer_id in peers[:16]:
        own.add(peer_id)
    for one in (ring, own):
        for peer_id in peers[16:]:
            one.add(peer_id)
        for peer_id in (peers[3], peers[20]):
            one.remove(peer_id)
        one.add(peers[3])
    for peer_id in peers:
        assert list(ring.after(peer_id)) == list(own.after(peer_id))
        assert list(ring.before(peer_id)) == list(own.before(peer_id))
    for depth in (0, 1, 3, 16):
        for index in {bucket(p, depth): None for p in peers}:
            assert list(ring.within(depth, index)) == [
                p for p in own.all() if int.from_bytes(position(p)[:2]) >> (16 - depth) == index
            ]
    rng = random.Random(1)
    assert {ring.pick(rng) for _ in range(2000)} - {None} == set(own.all())


def test_a_difference_shows_in_one_bucket_and_the_gone_in_none() -> None:
    one, other = plain(ADVERTS), plain(ADVERTS)
    assert digests(one, 5) == digests(other, 5)
    changed = keypair(7).peer_id
    other.put(changed, entry(7, State.ALIVE, 9))
    differing = [
        i for i, (a, b) in enumerate(zip(digests(one, 5), digests(other, 5), strict=True)) if a != b
    ]
    assert differing == [bucket(changed, 5)]
    for roster in (one, other):
        roster.put(changed, entry(7, State.LEFT, 9))
    one.drop(changed)
    assert digests(one, 5) == digests(other, 5)
    assert Roster().digests.get(3, 2) == EMPTY


@pytest.mark.parametrize(
    ("members", "depth"), [(0, 0), (7, 0), (8, 1), (100, 4), (10_000, 11), (100_000, 12)]
)
def test_the_ring_is_cut_the_finer_the_more_stand_on_it(members: int, depth: int) -> None:
    assert depth_for(members) == depth


def test_a_sync_tells_only_what_differs_and_mends_both_sides() -> None:
    world = World(40)
    world.join_all()
    assert world.run(30, world.all_alive) is not None
    world.run(30)
    one, other = world.list()[3:5]
    world.cut = lambda a, b: True
    world.feed(one, Describe(Description(addrs=("/ip4/127.0.0.1/tcp/77",))))
    world.feed(other, Describe(Description(addrs=("/ip4/127.0.0.1/tcp/88",))))
    world.run(0.2)
    world.cut = lambda a, b: False
    asked = next(e for e in world.feed(one, SyncWith(other.peer_id)) if isinstance(e, Send))
    assert len(asked.message) < 1500  # itself, the other, and 8 digests
    assert len(read_message(asked.message).summary.digests) == 8
    took = world.run(
        5,
        lambda: all(
            (held := a.core.member(b.peer_id)) is not None and held.advert.sequence == 1
            for a, b in ((one, other), (other, one))
        ),
    )
    assert took is not None


def test_what_a_sync_is_told_of_buckets_that_it_did_not_ask_for_is_ignored() -> None:
    node = World(1).list()[0]
    world_key = keypair(9).peer_id
    send = next(e for e in node.core.handle(SyncWith(world_key), 1000.0) if isinstance(e, Send))
    lie = write_message(
        Kinds.KIND_SYNC_REPLY,
        Versions(),
        result=SyncResult(tuple(range(1, 4096)), True, 1 << 31),
    )
    effects = node.core.handle(Answered(send.rpc_id, lie), 1000.0)
    assert [e for e in effects if isinstance(e, Send)] == []
    again = next(e for e in node.core.handle(SyncWith(world_key), 1000.0) if isinstance(e, Send))
    assert len(again.message) < 6000


def test_whoever_syncs_holds_no_message_in_memory() -> None:
    world = World(2)
    first, second = world.list()
    sync = next(e for e in world.feed(second, SyncWith(first.peer_id)) if isinstance(e, Send))
    world.feed(first, Request(second.peer_id, sync.message))
    member = first.core.member(second.peer_id)
    assert member is not None
    assert type(member.advert.raw) is bytes
    assert len(member.advert.raw) < 300


def test_the_refuted_are_not_heard_for_ever_longer() -> None:
    mutes = Mutes()
    now = 0.0
    silences = []
    for _ in range(4):
        mutes.refuted("liar", "us", "group", now)
        assert mutes.muted("liar", "us", now + 1)
        silence = next(s for s in range(1, 2000) if not mutes.muted("liar", "us", now + s))
        silences.append(silence)
        now += silence
    assert silences == [5, 10, 20, 40]
    assert not mutes.muted("honest", "us", now)
    mutes.refuted("liar", "us", "group", now + 1000)
    assert not mutes.muted("liar", "us", now + 1005)  # long ago: forgiven
    for number in range(3000):
        mutes.refuted(str(number), "us", "group", now)
    assert not mutes.muted("0", "us", now)


def test_one_who_plays_dead_does_not_silence_its_observers_for_all_others() -> None:
    mutes = Mutes()
    for number in range(10):  # one attacker's identities, from one place
        mutes.refuted("observer", f"sybil {number}", "one place", 0.0)
    assert mutes.muted("observer", "sybil 0", 1.0)
    assert not mutes.muted("observer", "another", 1.0)
    for number in range(3):
        mutes.refuted("liar", f"member {number}", f"place {number}", 0.0)
    assert mutes.muted("liar", "another", 1.0)
