"""The stores: newest by author, ages, marks, bounds."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from dht_samples import CLAIMANT, VNODE_KEY, WALL_MS, allocation_record, keypair

from p2pnet.dht.keyspace import peer_position, position, record_key
from p2pnet.dht.records import AUTHORS_MAX, OpenRecord, open_record
from p2pnet.dht.store import PROVIDERS_MAX, ProviderStore, RecordStore
from p2pnet.net.network import PeerInfo
from p2pnet.v1 import common_pb2

OWN = peer_position(keypair(0).peer_id)
BASE = open_record(allocation_record(), VNODE_KEY, WALL_MS)


def rec(
    epoch: int = 1,
    sequence: int = 1,
    *,
    author: str = CLAIMANT.peer_id,
    key: bytes = VNODE_KEY,
    age_s: float = 0.0,
    size_bytes: int = 100,
    ttl_s: int = 60,
) -> OpenRecord:
    """An open record, without the cost of signing it: a store does not look inside."""
    payload = b"%s %d %d" % (author.encode(), epoch, sequence)
    return dataclasses.replace(
        BASE, epoch=epoch, sequence=sequence, author=author, key=key, age_s=age_s, ttl_s=ttl_s,
        signed=common_pb2.Signed(payload=payload.ljust(size_bytes)),
    )  # fmt: skip


def ranks(store: RecordStore, now: float, key: bytes = VNODE_KEY) -> list[tuple[int, int]]:
    """What is held."""
    return [(r.epoch, r.sequence) for r in store.get(key, now)]


@pytest.mark.parametrize("order", list(itertools.permutations([(1, 9), (2, 1), (2, 2)])))
def test_the_newest_by_epoch_then_sequence_stays(order: list[tuple[int, int]]) -> None:
    store = RecordStore(OWN)
    for epoch, sequence in order:
        store.put(rec(epoch, sequence), 0.0)
        store.check()
    assert ranks(store, 0.0) == [(2, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_and_repetition_of_puts_decide_nothing(seed: int) -> None:
    rng = random.Random(seed)
    records = [
        rec(rng.randrange(3), rng.randrange(3), author=f"author {rng.randrange(4)}")
        for _ in range(15)
    ]
    results = []
    for _ in range(4):
        rng.shuffle(records)
        store = RecordStore(OWN)
        for record in [*records, *records[:7]]:
            store.put(record, 0.0)
        results.append([(r.author, r.rank) for r in store.get(VNODE_KEY, 0.0)])
    assert all(result == results[0] for result in results)


def test_only_a_newer_signature_restarts_a_life() -> None:
    store = RecordStore(OWN)
    assert store.put(rec(1, 1, age_s=20.0), 100.0)
    assert store.get(VNODE_KEY, 110.0)[0].age_s == 30.0
    assert store.put(rec(1, 1, age_s=0.0), 110.0), "it is held"
    assert store.get(VNODE_KEY, 110.0)[0].age_s == 30.0, "a younger copy revives nothing"
    assert store.put(rec(1, 1, age_s=59.0), 110.0)
    assert store.get(VNODE_KEY, 110.0)[0].age_s == 30.0, "an older copy kills nothing"
    assert ranks(store, 139.9) == [(1, 1)]
    assert ranks(store, 140.0) == []
    assert store.put(rec(1, 2), 139.0)
    assert ranks(store, 198.9) == [(1, 2)]


def test_what_has_expired_does_not_come_back() -> None:
    store = RecordStore(OWN)
    store.put(rec(2, 5), 0.0)
    store.expire(60.0)
    store.check()
    assert len(store) == 0
    assert store.size_bytes == 0
    for epoch, sequence in ((2, 5), (2, 4), (1, 9)):
        assert not store.put(rec(epoch, sequence), 61.0)
    assert store.put(rec(2, 6), 61.0)
    assert not store.put(rec(3, 1, age_s=60.0), 61.0), "expired on arrival"


def test_marks_are_bounded_and_the_oldest_go() -> None:
    store = RecordStore(OWN, marks_max=3)
    for n in range(4):
        store.put(rec(author=f"author {n}"), 0.0)
    store.expire(60.0)
    store.check()
    assert store.put(rec(author="author 0"), 61.0)
    assert not store.put(rec(author="author 3"), 61.0)


def test_authors_under_a_key_are_bounded_and_newcomers_displace_nobody() -> None:
    store = RecordStore(OWN)
    for n in range(AUTHORS_MAX):
        assert store.put(rec(author=f"author {n}"), 0.0)
    assert not store.put(rec(99, author="newcomer"), 0.0)
    assert store.put(rec(2, author="author 3"), 0.0)
    store.check()


def test_an_author_can_fill_only_its_part() -> None:
    store = RecordStore(OWN, author_bytes_max=1000)
    taken = [store.put(rec(key=record_key(f"{n}")), 0.0) for n in range(6)]
    assert taken == [True] * 4 + [False] * 2
    assert store.put(rec(author="another", key=record_key("5")), 0.0)
    assert store.put(rec(1, 2, key=record_key("0")), 0.0), "replacing needs no more room"
    store.check()


@pytest.mark.parametrize("bound", [{"keys_max": 5}, {"total_bytes_max": 5 * 228 + 10}])
def test_what_is_farthest_from_us_gives_way(bound: dict[str, int]) -> None:
    store = RecordStore(OWN, **bound)
    keys = [record_key(f"{n}") for n in range(40)]
    for key in keys:
        store.put(rec(key=key, author="author " + key.hex()[-4:]), 0.0)
        store.check()
    nearest = sorted(keys, key=lambda key: position(key) ^ OWN)[:5]
    assert sorted(store.keys()) == sorted(nearest)


def info(n: int) -> PeerInfo:
    """A provider."""
    return PeerInfo(f"peer {n}", ())


def test_providers_live_for_their_time_and_are_bounded() -> None:
    store = ProviderStore(keys_max=2, life_s=100.0)
    store.add(b"a", info(1), 0.0)
    store.add(b"a", info(2), 50.0)
    assert store.get(b"a", 60.0) == [info(2), info(1)]
    store.add(b"a", info(1), 60.0)
    assert store.get(b"a", 120.0) == [info(1), info(2)]
    store.expire(155.0)
    assert store.get(b"a", 155.0) == [info(1)]
    for n in range(100):
        store.add(b"a", info(n), 155.0)
    store.check()
    assert len(store.get(b"a", 155.0)) == PROVIDERS_MAX
    store.add(b"b", info(1), 155.0)
    store.add(b"c", info(1), 155.0)
    assert store.get(b"a", 155.0) == []
    store.remove(b"c", info(1).peer_id)
    store.remove(b"nobody", "x")
    assert len(store) == 1
    store.expire(300.0)
    assert len(store) == 0
    store.check()
