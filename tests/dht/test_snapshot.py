"""What a store held, through a file and back: older, verified again, and never more than it was."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable

import pytest
from dht_samples import CLAIMANT, STRANGER, WALL_MS, allocation_record, keypair, manifest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from p2pnet import keys
from p2pnet.dht import snapshot
from p2pnet.dht.core import Kademlia
from p2pnet.dht.hints import PROVIDER_LIFE_S, Hint
from p2pnet.dht.keyspace import peer_position, vnode_key
from p2pnet.dht.manifest import network_id_of
from p2pnet.dht.records import REPLAY_MS, OpenRecord, open_record
from p2pnet.dht.snapshot import Held, parse, serialise
from p2pnet.dht.store import Mark, RecordStore
from p2pnet.dht.wire import KEY_BYTES_MAX
from p2pnet.errors import LocalError
from p2pnet.net.network import PeerInfo
from p2pnet.sealed import HEAD_BYTES, seal, unseal
from p2pnet.v1 import kept_pb2 as pb

OWN = peer_position(keypair(0).peer_id)
NETWORK_ID = network_id_of(manifest())
PEER = keypair(1).peer_id


def rec(vnode: str, *, epoch: int = 1, ttl_s: int = 60, age_s: float = 0.0) -> OpenRecord:
    """A checked record of that VNode."""
    signed = allocation_record(vnode=vnode, epoch=epoch, ttl_s=ttl_s)
    key = vnode_key(NETWORK_ID, vnode)
    return dataclasses.replace(open_record(signed, key, WALL_MS), age_s=age_s)


RECORDS = [rec(f"v{n}", age_s=float(n)) for n in range(6)]
HINT = Hint(b"a key", PeerInfo(PEER, ("/ip4/192.0.2.1/tcp/4001",)), 5.0, "house")
MARK = Mark(b"a key", PEER, 3, 7, 5.0, "house")
HELD = Held([(record, "house") for record in RECORDS], [MARK], [HINT])


def read(data: bytes, wall_ms: int = WALL_MS, **limits: int) -> list[Held]:
    """All parts of a file."""
    return list(parse(data, lambda: wall_ms, **limits))


def changed(change: Callable[[pb.KeptStore], object]) -> bytes:
    """A file in which somebody has changed something, and made it whole again."""
    kept = pb.KeptStore.FromString(unseal(snapshot.KIND, 1, serialise(HELD, WALL_MS)))
    change(kept)
    return seal(snapshot.KIND, 1, kept.SerializeToString())


def test_what_was_held_comes_back() -> None:
    (held,) = read(serialise(HELD, WALL_MS))
    assert held == HELD
    assert read(serialise(Held(), WALL_MS)) == [Held([], [], [])]


@pytest.mark.parametrize("down_s", [0.0, 0.001, 12.5, 50.0, 57.0, 60.0, 3600.0])
def test_what_was_held_has_aged_by_the_time_that_passed(down_s: float) -> None:
    (held,) = read(serialise(HELD, WALL_MS), WALL_MS + round(down_s * 1000))
    living = [n for n in range(6) if n + down_s < 60]
    assert [(r.content.vnode, r.age_s) for r, _ in held.records] == [  # type: ignore[union-attr]
        (f"v{n}", pytest.approx(n + down_s)) for n in living
    ]
    assert held.dropped["a record that has expired"] == 6 - len(living)
    marks = {(mark.epoch, mark.sequence) for mark in held.marks}
    assert marks == ({(3, 7), (1, 1)} if len(living) < 6 else {(3, 7)}), "their ranks stay known"
    assert [hint.age_s for hint in held.hints] == ([5 + down_s] if down_s < 1795 else [])


@pytest.mark.parametrize("back_ms", [1, 3600_000, REPLAY_MS - 1])
def test_a_clock_that_went_back_makes_nothing_younger(back_ms: int) -> None:
    (held,) = read(serialise(HELD, WALL_MS), WALL_MS - back_ms)
    assert [record.age_s for record, _ in held.records] == [0, 1, 2, 3, 4, 5]
    assert held.hints[0].age_s == 5
    assert held.marks[0].age_s == 5


def test_a_clock_that_jumped_far_leaves_nothing() -> None:
    for wall_ms in (WALL_MS - 10**9, WALL_MS + 10**10):
        (held,) = read(serialise(HELD, WALL_MS), wall_ms)
        assert held.records == []
        assert held.dropped["a record that is forged or from long ago"] == 6


def test_ages_never_shrink_however_often_a_node_restarts() -> None:
    held = Held([(rec("v", age_s=1.0001), "")])
    for _ in range(1000):
        (held,) = read(serialise(held, WALL_MS), WALL_MS - 5000)
    assert held.records[0][0].age_s >= 1.0001


def test_it_is_read_in_parts_and_time_passes_between_them() -> None:
    data = serialise(HELD, WALL_MS)
    times = iter([0, 0, 10, 20])
    parts = list(parse(data, lambda: WALL_MS + 1000 * next(times), records_at_once=2))
    assert [[r.age_s for r, _ in part.records] for part in parts] == [[0, 1], [12, 13], [24, 25]]
    assert [len(part.marks) for part in parts] == [1, 0, 0]


def test_the_nearest_are_kept_where_there_is_too_much() -> None:
    size_bytes = RECORDS[0].size_bytes
    data = serialise(HELD, WALL_MS, records_bytes_max=3 * size_bytes + 10)
    (held,) = read(data)
    assert [r for r, _ in held.records] == RECORDS[:3]


def test_more_than_a_store_takes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = serialise(HELD, WALL_MS)
    monkeypatch.setattr(snapshot, "RECORDS_MAX", 4)
    (held,) = read(data)
    assert len(held.records) == 4
    assert held.dropped == Counter({"a record beyond the limit": 2})
    monkeypatch.setattr(snapshot, "TOTAL_BYTES_MAX", 2 * len(RECORDS[0].signed.payload))
    (held,) = read(data)
    assert len(held.records) == 2
    monkeypatch.setattr(snapshot, "FILE_BYTES_MAX", 1000)
    with pytest.raises(LocalError, match="over 1000"):
        read(data)


def forged(kept: pb.KeptStore) -> None:
    signed = STRANGER.sign(keys.RECORD, kept.records[0].record.payload)
    kept.records[0].record.CopyFrom(signed)


def flipped(kept: pb.KeptStore) -> None:
    kept.records[0].record.signature = bytes(64)


def elsewhere(kept: pb.KeptStore) -> None:
    kept.records[0].key = kept.records[1].key


def reaged(kept: pb.KeptStore) -> None:
    kept.records[0].age_ms = (1 << 64) - 5


def garbage(kept: pb.KeptStore) -> None:
    kept.records[0].record.payload = b"\xff\xff"


def long_source(kept: pb.KeptStore) -> None:
    kept.records[0].source = "x" * 1000


@pytest.mark.parametrize("change", [forged, flipped, elsewhere, reaged, garbage, long_source])
def test_a_record_that_somebody_changed_is_dropped_and_counted(
    change: Callable[[pb.KeptStore], None],
) -> None:
    (held,) = read(changed(change))
    assert [r for r, _ in held.records] == RECORDS[1:]
    assert held.dropped.total() == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.marks.add(key=b"", author=PEER),
        lambda kept: kept.marks.add(key=b"x" * (KEY_BYTES_MAX + 1), author=PEER),
        lambda kept: kept.marks.add(key=b"x", author="0OIl"),
        lambda kept: kept.marks.add(key=b"x", author=PEER, epoch=1 << 63),
        lambda kept: kept.hints.add(key=b"x", provider="0OIl"),
        lambda kept: kept.hints.add(key=b"x", provider=PEER, addrs=["x" * 1000]),
        lambda kept: kept.hints.add(key=b"x", provider=PEER, age_ms=round(PROVIDER_LIFE_S * 1000)),
    ],
)
def test_a_bad_mark_or_hint_is_dropped_and_counted(
    change: Callable[[pb.KeptStore], object],
) -> None:
    (held,) = read(changed(change))
    assert (held.marks, held.hints) == ([MARK], [HINT])
    assert held.dropped.total() == 1


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: b"", "another kind of file"),
        (lambda data: b"[]", "another kind of file"),
        (lambda data: data[: HEAD_BYTES - 1], "cut off"),
        (lambda data: data[:-1], "damaged"),
        (lambda data: data + b"\0", "damaged"),
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "damaged"),
        (lambda data: seal(b"pees", 1, data), "another kind of file"),
        (lambda data: seal(snapshot.KIND, 2, data), "of version 2, and this node reads 1"),
        (lambda data: data[:11] + b"\2" + data[12:], "of version 2"),
        (lambda data: seal(snapshot.KIND, 1, b"\xff\xff"), "does not parse"),
    ],
)
def test_a_damaged_or_foreign_file_says_what_it_is(
    damage: Callable[[bytes], bytes], what: str
) -> None:
    with pytest.raises(LocalError, match=what):
        read(damage(serialise(HELD, WALL_MS)))


@seed(7)
@settings(max_examples=300, deadline=None, database=None)
@given(st.binary(max_size=300))
def test_any_body_is_refused_or_read(body: bytes) -> None:
    try:
        parts = read(seal(snapshot.KIND, 1, body))
    except LocalError:
        return
    assert all(not part.records for part in parts)


@pytest.mark.parametrize("seed", range(3))
def test_a_store_is_after_a_restart_what_it_was(seed: int) -> None:
    rng = random.Random(seed)
    store, now = RecordStore(OWN), 1000.0
    for _ in range(60):
        now += rng.random()
        n = rng.randrange(8)
        store.put(rec(f"v{n}", epoch=rng.randrange(4), ttl_s=20), now, f"source {n}")
        if rng.random() < 0.1:
            store.expire(now)
    held = Held(store.held(now), store.marks(now))
    (back,) = read(serialise(held, WALL_MS), WALL_MS + 3000)
    again = RecordStore(OWN)
    for mark in back.marks:
        again.remember(mark, 5.0)
    for record, source in back.records:
        assert again.put(record, 5.0, source)
    again.check()
    for n in range(8):
        key = vnode_key(NETWORK_ID, f"v{n}")
        was, found = store.get(key, now + 3.0), again.get(key, 5.0)
        assert [r.signed for r in found] == [r.signed for r in was]
        assert [r.age_s for r in found] == pytest.approx([r.age_s for r in was], abs=0.01)
        for epoch in range(4):  # and what was refused is refused
            old = rec(f"v{n}", epoch=epoch, ttl_s=20)
            assert again.put(old, 25.0) == store.put(old, now + 20.0)


def test_what_a_node_takes_back_it_passes_on_soon() -> None:
    core = Kademlia(keypair(0).peer_id, random.Random(0))
    core.restore(Held([(rec("v", age_s=20.0), "house")], [MARK], [HINT]), 100.0)
    core.check()
    assert [r.age_s for r in core.local.store.get(RECORDS[0].key, 100.0)] == []
    key = vnode_key(NETWORK_ID, "v")
    assert [r.age_s for r in core.local.store.get(key, 110.0)] == [30.0]
    assert core.local.providers.get(b"a key", 110.0) == [HINT.provider]
    deadline = core.deadline()
    assert deadline is not None
    assert deadline <= 100.0 + 30.0
    held = core.held(100.0)
    assert held == Held([(rec("v", age_s=20.0), "house")], [MARK], [HINT])
    assert CLAIMANT.peer_id == held.records[0][0].author
