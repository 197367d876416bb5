"""The stores: newest by author, ages, marks, bounds."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from dht_samples import CLAIMANT, VNODE_KEY, WALL_MS, allocation_record, keypair

from p2pnet.dht.keyspace import peer_position, position, record_key
from p2pnet.dht.rates import SenderRates
from p2pnet.dht.records import AUTHORS_MAX, OpenRecord, open_record
from p2pnet.dht.store import PROVIDERS_MAX, ProviderStore, RecordStore
from p2pnet.net.network import PeerInfo
from p2pnet.v1 import common_pb2, records_pb2

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
    assert not store.put(rec(1, 99, author="newcomer"), 0.0)
    assert store.put(rec(1, 2, author="author 3"), 0.0)
    store.check()
    assert store.put(rec(2, author="newcomer"), 0.0), "by its epoch all of theirs are over"
    store.check()
    assert [r.author for r in store.get(VNODE_KEY, 0.0)] == ["newcomer"]


def test_an_author_can_fill_only_its_part() -> None:
    store = RecordStore(OWN, author_bytes_max=1000)
    taken = [store.put(rec(key=record_key(f"{n}")), 0.0) for n in range(6)]
    assert taken == [True] * 4 + [False] * 2
    assert store.put(rec(author="another", key=record_key("5")), 0.0)
    assert store.put(rec(1, 2, key=record_key("0")), 0.0), "replacing needs no more room"
    store.check()


@pytest.mark.parametrize("bound", [{"records_max": 5}, {"total_bytes_max": 5 * 228 + 10}])
def test_what_is_farthest_from_us_gives_way(bound: dict[str, int]) -> None:
    store = RecordStore(OWN, **bound)
    keys = [record_key(f"{n}") for n in range(40)]
    for key in keys:
        store.put(rec(key=key, author="author " + key.hex()[-4:]), 0.0)
        store.check()
    nearest = sorted(keys, key=lambda key: position(key) ^ OWN)[:5]
    assert sorted(store.keys()) == sorted(nearest)


def test_who_floods_the_store_drives_out_its_own() -> None:
    store = RecordStore(OWN, records_max=40)
    keys = [record_key(f"{n}") for n in range(400)]
    far, near = sorted(keys, key=lambda key: position(key) ^ OWN, reverse=True)[:8], keys
    for key in far:
        assert store.put(rec(key=key, author="honest"), 0.0, "house")
    for n, key in enumerate(near):
        store.put(rec(key=key, author=f"sybil {n}"), 0.0, "flood")
        store.check()
    assert all(store.get(key, 0.0)[-1].author == "honest" for key in far)
    assert len(store) == 40
    for n, key in enumerate(near):  # with as many names of its own there is no telling
        store.put(rec(key=key, author=f"other {n}"), 0.0, f"street {n}")
        store.check()
    assert sum(bool(store.get(key, 0.0)) for key in far) < 8


def test_who_floods_the_marks_drives_out_its_own() -> None:
    store = RecordStore(OWN, marks_max=20)
    store.put(rec(5, author="honest"), 0.0, "house")
    store.expire(60.0)
    for n in range(1000):
        store.put(rec(author=f"sybil {n}", key=record_key(f"{n}")), 60.0, "flood")
    store.expire(120.0)
    store.check()
    assert not store.put(rec(5, author="honest"), 121.0, "flood")
    assert not store.put(rec(4, author="honest"), 121.0, "flood")


def test_a_record_stays_charged_to_whom_it_first_came_from() -> None:
    store = RecordStore(OWN, records_max=10)
    for n in range(5):
        store.put(rec(key=record_key(f"{n}")), 0.0, "house")
    for n in range(5):  # passed on by another, each a newer one
        store.put(rec(1, 2, key=record_key(f"{n}")), 0.0, "flood")
    for n in range(5, 100):
        store.put(rec(key=record_key(f"{n}"), author="sybil"), 0.0, "flood")
    assert all(store.get(record_key(f"{n}"), 0.0) for n in range(5))


def test_under_a_crowded_key_the_crowd_gives_way() -> None:
    store = RecordStore(OWN)
    assert store.put(rec(author="honest"), 0.0, "house")
    for n in range(AUTHORS_MAX):
        store.put(rec(1, 9, author=f"sybil {n}"), 0.0, "flood")
    for n in range(AUTHORS_MAX):
        assert store.put(rec(author=f"late {n}"), 0.0, f"house {n}")
        store.check()
        if n == AUTHORS_MAX - 3:
            break
    assert "honest" in [r.author for r in store.get(VNODE_KEY, 0.0)]
    assert not store.put(rec(1, 10**9, author="one more"), 0.0, "flood")


def test_what_gave_way_may_come_back_but_not_younger() -> None:
    store = RecordStore(OWN, records_max=1)
    near, far = sorted([record_key("a"), record_key("b")], key=lambda k: position(k) ^ OWN)
    store.put(rec(key=far), 0.0)
    store.put(rec(key=near, ttl_s=10), 5.0)
    assert store.get(far, 5.0) == []
    store.expire(20.0)
    assert store.put(rec(key=far, age_s=0.0), 20.0)
    assert store.get(far, 20.0)[0].age_s == 20.0
    store.check()


def test_what_was_once_held_is_known_when_others_answer_with_it() -> None:
    store = RecordStore(OWN)
    store.put(rec(2, 5), 0.0)
    assert [r.age_s for r in store.sift([rec(2, 5), rec(2, 4)], 20.0)] == [20.0]
    assert store.sift([rec(2, 5)], 61.0) == [], "expired, and not dropped yet"
    store.expire(60.0)
    assert store.sift([rec(2, 4)], 61.0) == [], "older"
    assert store.sift([rec(2, 5)], 61.0) == [], "the same, and it has expired"
    assert store.sift([rec(2, 6)], 61.0) == [rec(2, 6)]
    assert store.sift([rec(2, 5, author="another")], 61.0) == [rec(2, 5, author="another")]


def test_a_claim_that_is_over_does_not_come_back() -> None:
    """Claimant a had epoch 5, b has 6: a's record loses at put and at get, as long as is known."""
    store = RecordStore(OWN, marks_max=100)
    old, new = rec(5, 7, author="a"), rec(6, 1, author="b", ttl_s=10)
    for first, second in ((old, new), (new, old)):
        store = RecordStore(OWN)
        store.put(first, 0.0)
        assert store.put(second, 0.0) is (second is new)
        store.check()
        assert ranks(store, 0.0) == [(6, 1)]
        assert store.sift([old, new], 0.0) == [new]
    store.expire(20.0)
    assert ranks(store, 20.0) == []
    assert not store.put(old, 20.0), "its successor's has run out"
    assert not store.put(rec(5, 8, author="a"), 20.0), "it is signed anew, under the old claim"
    assert store.sift([rec(5, 8, author="a")], 20.0) == []
    assert store.put(rec(6, 1, author="c"), 20.0), "who raced is not older"
    # after a restart
    again = RecordStore(OWN)
    for mark in store.marks(20.0):
        again.remember(mark, 0.0)
    assert not again.put(old, 0.0)
    again.check()
    # who has only read it remembers as well
    reader = RecordStore(OWN)
    assert reader.sift([new], 0.0) == [new]
    assert reader.sift([old], 30.0) == []
    # and another VNode's records are another matter
    assert reader.put(rec(5, 7, author="a", key=record_key("else")), 30.0)


def test_under_one_name_each_network_has_its_own_epochs() -> None:
    content = records_pb2.NetworkRecord(network_id="1" * 32, name="digits", epoch=9)
    first = dataclasses.replace(rec(9, author="a"), content=content)
    content = records_pb2.NetworkRecord(network_id="2" * 32, name="digits", epoch=2)
    second = dataclasses.replace(rec(2, author="b"), content=content)
    older = dataclasses.replace(rec(1, author="c"), content=content)
    store = RecordStore(OWN)
    assert store.put(first, 0.0)
    assert store.put(older, 0.0)
    assert store.put(second, 0.0)
    assert not store.put(older, 0.0)
    assert ranks(store, 0.0) == [(9, 1), (2, 1)]


@pytest.mark.parametrize("age_s", [-1.0, -1e-9, float("nan"), float("inf"), float("-inf"), 60.0])
def test_an_age_that_is_none_makes_nothing_immortal(age_s: float) -> None:
    store = RecordStore(OWN)
    assert not store.put(rec(age_s=age_s), 100.0)
    assert store.sift([rec(age_s=age_s)], 100.0) == []
    assert store.put(rec(), 100.0)
    assert not store.put(rec(1, 2, age_s=age_s), 100.0)
    assert ranks(store, 100.0) == [(1, 1)]
    assert ranks(store, 160.0) == []


def test_a_contradicting_twin_is_not_younger_and_the_greater_wins_everywhere() -> None:
    ours, twin = rec(), dataclasses.replace(rec(), signed=common_pb2.Signed(payload=b"~"))
    for first, second in ((ours, twin), (twin, ours)):
        store = RecordStore(OWN)
        store.put(dataclasses.replace(first, age_s=30.0), 0.0)
        store.put(second, 0.0)
        assert store.get(VNODE_KEY, 0.0)[0].signed == twin.signed
        assert store.get(VNODE_KEY, 0.0)[0].age_s == 30.0
        store.expire(60.0)
        assert not store.put(twin, 60.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_store_holds_its_invariants_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    store = RecordStore(OWN, records_max=30, author_bytes_max=3000, total_bytes_max=6000,
                        marks_max=10)  # fmt: skip
    now = 0.0
    for _ in range(1500):
        now += rng.random()
        record = rec(
            rng.randrange(3), rng.randrange(4), author=f"author {rng.randrange(20)}",
            key=record_key(f"{rng.randrange(9)}"), age_s=rng.uniform(0, 20),
            size_bytes=rng.randrange(50, 400), ttl_s=20,
        )  # fmt: skip
        if store.put(record, now, f"source {rng.randrange(4) ** 2}"):
            found = [r for r in store.get(record.key, now) if r.author == record.author]
            assert [r.rank for r in found] == [record.rank]
        if rng.random() < 0.05:
            store.expire(now)
        store.check()


def info(n: int) -> PeerInfo:
    """A provider."""
    return PeerInfo(f"peer {n}", ())


def test_providers_live_for_their_time_and_are_bounded() -> None:
    store = ProviderStore(hints_max=PROVIDERS_MAX + 1, life_s=100.0)
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
    store.check()
    assert len(store.get(b"a", 155.0)) == PROVIDERS_MAX - 1, "the oldest of all gave way"
    store.remove(b"c", info(1).peer_id)
    store.remove(b"nobody", "x")
    assert len(store) == 2
    store.expire(300.0)
    assert len(store) == 0
    store.check()


def test_a_peer_provides_a_key_once_and_only_so_many() -> None:
    store = ProviderStore(provided_max=3)
    for n in range(5):
        store.add(b"%d" % n, info(1), float(n))
        store.add(b"4", info(2), float(n))
        store.check()
    assert [key for key in (b"0", b"1", b"2", b"3", b"4") if info(1) in store.get(key, 5.0)] == [
        b"2",
        b"3",
        b"4",
    ]
    assert store.get(b"4", 5.0) == [info(2), info(1)]


def test_who_floods_the_hints_drives_out_its_own() -> None:
    store = ProviderStore(hints_max=100)
    for n in range(10):
        store.add(b"%d" % n, info(1), 0.0, "house")
    store.add(b"crowded", info(1), 0.0, "house")
    for n in range(500):
        store.add(b"flood %d" % n, info(1000 + n), 1.0, "flood")
        store.add(b"crowded", info(1000 + n), 1.0, "flood")
        store.check()
    assert all(store.get(b"%d" % n, 1.0) == [info(1)] for n in range(10))
    assert info(1) in store.get(b"crowded", 1.0)


@pytest.mark.parametrize("age_s", [-1.0, float("nan"), 1800.0, float("inf")])
def test_a_hint_of_no_age_is_none(age_s: float) -> None:
    store = ProviderStore()
    store.add(b"a", info(1), 0.0, age_s=age_s)
    assert len(store) == 0


def test_a_sender_has_much_at_once_but_not_for_long() -> None:
    rates = SenderRates(per_s=10.0, burst=100.0)
    assert sum(rates.take("flood", 1, 0.0) for _ in range(1000)) == 100
    assert rates.take("another", 1, 0.0)
    assert sum(rates.take("flood", 1, n / 100) for n in range(1, 1001)) in (99, 100)
    assert not rates.take("flood", 1000, 1e9), "never more than fits"
    rates.check()


def test_a_bulk_put_of_an_honest_peer_passes() -> None:
    rates = SenderRates()
    assert all(rates.take("honest", 1, n / 1600) for n in range(200 * 8)), "within one second"


def test_new_names_do_not_buy_a_new_bucket() -> None:
    rates = SenderRates(per_s=10.0, burst=100.0, senders_max=8)
    taken = sum(rates.take(f"sybil {n % 5000}", 1, n / 50_000) for n in range(50_000))
    assert taken <= 8 * 100 + 9 * 10 + 100
    rates.check()
    assert rates.take("late", 1, 30.0), "those whose bucket is full again are forgotten"
    rates.check()
