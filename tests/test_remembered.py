"""What a node remembers in its data dir: written whole, read with care, and never its undoing."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
from pathlib import Path

import pytest
import trio

from p2pnet import keys, remembered
from p2pnet.dht import snapshot
from p2pnet.dht.keyspace import vnode_key
from p2pnet.dht.manifest import network_id_of
from p2pnet.dht.records import ALLOCATION, make_record
from p2pnet.dht.shell import Dht
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.known import Known, serialise
from p2pnet.gossip.shell import Gossip
from p2pnet.gossip.statements import build_advert
from p2pnet.keys import KeyPair
from p2pnet.net.memory import MemoryFabric
from p2pnet.net.network import PeerInfo
from p2pnet.remembered import Remembered
from p2pnet.v1 import common_pb2, records_pb2

WALL_MS = 1_800_000_000_000
OURS, OTHER = (KeyPair.from_seed(bytes([n]) * 32) for n in (1, 2))
OTHERS_ADVERT = build_advert(
    OTHER, incarnation=1, sequence=0, addrs=("/ip4/192.0.2.7/tcp/4001",)
)  # fmt: skip


def record(vnode: str) -> tuple[bytes, common_pb2.Signed]:
    """A good one, and its key."""
    manifest = records_pb2.Manifest(
        owner=OTHER.public_key, name="n", spec_digest=bytes(32), any_orchestrator=True
    )
    grant = OTHER.sign(keys.MANIFEST, manifest.SerializeToString(deterministic=True))
    body = records_pb2.Allocation(
        network_id=network_id_of(grant), vnode=vnode, host=OTHER.peer_id, epoch=1,
        claimant=OTHER.peer_id, role="primary", lease_s=30, manifest=grant,
    )  # fmt: skip
    accepted = OTHER.sign(keys.ACCEPTANCE, body.SerializeToString(deterministic=True))
    key = vnode_key(body.network_id, vnode)
    signed = make_record(
        OTHER, key, ALLOCATION, epoch=1, sequence=1, ttl_s=3600, issued_at_ms=WALL_MS,
        body=accepted.SerializeToString(deterministic=True),
    )  # fmt: skip
    return key, signed


class Life:
    """One run of a node, as far as it remembers. Its clocks are ours."""

    def __init__(self, directory: Path, at_s: float = 0.0) -> None:
        self.at_s = at_s
        network = MemoryFabric().network(OURS, "/ip4/127.0.0.1/tcp/4000")
        self.gossip = Gossip(
            network, OURS, grpc_targets=[], certificate_der=b"", capabilities=Capabilities(),
            incarnation=1, rng=random.Random(0), now=lambda: self.at_s,
        )  # fmt: skip
        self.dht = Dht(network, rng=random.Random(0), now=lambda: self.at_s, wall_ms=self.wall_ms)
        self.remembered = Remembered(
            directory, OURS.peer_id, self.gossip, self.dht, rng=random.Random(0),
            now=lambda: self.at_s, wall_ms=self.wall_ms,
        )  # fmt: skip

    def wall_ms(self) -> int:
        """The wall clock."""
        return WALL_MS + round(self.at_s * 1000)

    async def begin(self) -> list[Known]:
        """Takes back what there is."""
        members = await self.remembered.members()
        await self.remembered.restore()
        return members

    async def put(self, *vnodes: str) -> None:
        """Stores records, and that the other peer provides their keys."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.dht.run)
            for vnode in vnodes:
                assert await self.dht.put(record(vnode)[1]) == 1
            nursery.cancel_scope.cancel()

    async def age_s(self, vnode: str) -> float | None:
        """Of a record that it holds."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.dht.run)
            found = await self.dht.get(record(vnode)[0])
            nursery.cancel_scope.cancel()
        return found[0].age_s if found else None


def test_what_was_held_is_held_after_a_restart_and_older(tmp_path: Path) -> None:
    async def main() -> None:
        first = Life(tmp_path)
        assert await first.begin() == []
        await first.put("a", "b")
        first.at_s = 10.0
        await first.remembered.save()
        second = Life(tmp_path, at_s=500.0)
        assert await second.begin() == []
        assert await second.age_s("a") == pytest.approx(500.0)
        assert second.dht.stats()["records"] == 2

    trio.run(main)


def test_members_are_remembered_and_not_forgotten_by_one_who_meets_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "peers").write_bytes(serialise([Known(OTHERS_ADVERT, WALL_MS)]))
        for at_s in (100.0, 200.0):
            life = Life(tmp_path, at_s)
            (member,) = await life.begin()
            assert member == Known(OTHERS_ADVERT, WALL_MS)
            await life.remembered.save()

    trio.run(main)


@pytest.mark.parametrize("file", ["peers", "records"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "another kind of file"),
        (b'["/ip4/1.2.3.4/tcp/1"]', "another kind of file"),
        (serialise([]) + b"\0", "damaged|another kind"),
        (snapshot.serialise(snapshot.Held(), 0)[:-1] + b"\1\1", "damaged|another kind"),
    ],
)
def test_a_damaged_file_is_one_sentence_and_the_node_begins_with_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, content: bytes, why: str
) -> None:
    async def main() -> None:
        (tmp_path / file).write_bytes(content)
        life = Life(tmp_path)
        assert await life.begin() == []
        assert life.dht.stats()["records"] == 0
        (told,) = caplog.records
        assert told.levelno == logging.WARNING
        assert str(tmp_path / file) in told.message
        assert "\n" not in told.message
        await life.put("a")  # and the next save makes it good
        await life.remembered.save()
        caplog.clear()
        again = Life(tmp_path)
        await again.begin()
        if file == "records":
            assert again.dht.stats()["records"] == 1
            assert not caplog.records

    trio.run(main)


def test_a_file_that_is_too_long_or_cannot_be_read_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        (tmp_path / "records").write_bytes(bytes(100))
        (tmp_path / "peers").mkdir()
        monkeypatch.setattr(snapshot, "FILE_BYTES_MAX", 99)
        assert await Life(tmp_path).begin() == []
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2

    trio.run(main)


def test_a_full_disk_is_said_once_and_the_node_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        life = Life(tmp_path)
        await life.begin()
        await life.put("a")
        await life.remembered.save()
        before = (tmp_path / "records").read_bytes()
        fsync = os.fsync

        def full(fd: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        for vnode in ("b", "c", "d"):
            await life.put(vnode)
            await life.remembered.save()
        (told,) = caplog.records
        assert "No space left" in told.message
        assert "the node goes on" in told.message
        assert (tmp_path / "records").read_bytes() == before
        assert os.listdir(tmp_path) == ["records"], "no half of a file stays"
        monkeypatch.setattr(os, "fsync", fsync)
        await life.remembered.save()  # there is room again
        again = Life(tmp_path)
        await again.begin()
        assert again.dht.stats()["records"] == 4

    trio.run(main)


def test_nothing_is_written_where_nothing_has_changed(tmp_path: Path) -> None:
    async def main() -> None:
        life = Life(tmp_path)
        await life.begin()
        await life.remembered.save()
        assert os.listdir(tmp_path) == []
        await life.put("a")
        await life.remembered.save()
        (tmp_path / "records").unlink()
        await life.remembered.save()
        assert os.listdir(tmp_path) == []

    trio.run(main)


def test_what_is_not_all_read_back_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        first = Life(tmp_path)
        await first.begin()
        await first.put("a", "b", "c")
        await first.remembered.save()
        before = (tmp_path / "records").read_bytes()
        monkeypatch.setattr(remembered, "RESTORED_AT_ONCE", 1)
        second = Life(tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(second.remembered.restore)
            some = second.dht.stats()["records"]
            await second.put("d")
            await second.remembered.save()
        assert some == 1, "the DHT serves while the others are verified"
        assert second.dht.stats()["records"] == 4
        await second.remembered.save()
        assert (tmp_path / "records").read_bytes() != before

    trio.run(main)


def test_hints_of_providers_are_kept_too(tmp_path: Path) -> None:
    async def main() -> None:
        first = Life(tmp_path)
        await first.begin()
        hint = snapshot.Hint(b"a key", PeerInfo(OTHER.peer_id, ("/ip4/192.0.2.7/tcp/1",)), 5.0, "")
        first.dht.restore(snapshot.Held(hints=[hint]))
        await first.remembered.save()
        second = Life(tmp_path, at_s=100.0)
        await second.begin()
        (back,) = second.dht.held().hints
        assert (back.provider, back.age_s) == (hint.provider, pytest.approx(105.0))

    trio.run(main)


def when_written(changes: list[float], until_s: float, *, size_bytes: int = 1000) -> list[float]:
    """When a file is written that changes at these times."""
    pace, written = remembered._Pace(0.0), []
    for step in range(round(until_s)):
        now = float(step)
        count = sum(at <= now for at in changes)
        if pace.due(count, now):
            written.append(now)
            pace.written(count, now, size_bytes, done=True)
    return written


def test_it_is_written_soon_at_first_and_then_ever_more_rarely() -> None:
    assert when_written([], 1000) == []
    assert when_written([0.5], 1000) == [2.0]
    assert when_written([100.5], 1000) == [102.0]
    often = when_written([float(n) for n in range(0, 1000, 5)], 1000)
    assert often[:3] == [2.0, 6.0, 14.0]
    assert all(b - a >= remembered.SAVE_EVERY_S for a, b in itertools.pairwise(often[4:]))
    assert 25 <= len(often) <= 40


def test_what_never_rests_is_written_too_and_what_is_large_rarely() -> None:
    restless = [n / 2 for n in range(2000)]
    assert when_written(restless, 1000)[:4] == [2.0, 7.0, 16.0, 33.0]
    assert len(when_written(restless, 1000)) <= 40
    assert len(when_written(restless, 1000, size_bytes=64 << 20)) <= 3
    assert len(when_written([float(n) for n in range(0, 1000, 5)], 1000, size_bytes=64 << 20)) <= 3


def test_what_could_not_be_written_is_tried_again() -> None:
    pace = remembered._Pace(0.0)
    assert pace.due(1, 10.0) is False  # it has only just changed
    assert pace.due(1, 12.0)
    pace.written(1, 12.0, 0, done=False)
    assert not pace.due(1, 13.0)
    assert pace.due(1, 30.0)
