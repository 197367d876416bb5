"""States as blobs: stored and copied, fetched from whoever has the right bytes, and let go."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from memory_swarm import NOTICE_S, MemorySwarm
from s3_server import S3Server
from virtual_time import play

from p2pnet.data import objects
from p2pnet.data.blobs import BlobStore
from p2pnet.data.objects import open_bucket
from p2pnet.errors import (
    ForgedError,
    RefusedError,
    ResourceError,
    UnreachableError,
)
from p2pnet.keys import sha256
from p2pnet.net.dialer import PeerContact
from p2pnet.net.handlers import Caller
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode import blobs, transfer
from p2pnet.vnode.blob_ages import UNKNOWN_KEPT_S, UNNAMED_KEPT_S
from p2pnet.vnode.blobs import BlobKeeper, chunks_of
from p2pnet.vnode.transfer import put_blob

NET = "0" * 32
DATA = bytes(range(256)) * 6000  # three chunks


def ids(swarm: MemorySwarm, names: str) -> list[str]:
    return [swarm[name].peer_id for name in names]


def has(swarm: MemorySwarm, name: str, data: bytes = DATA) -> bool:
    return swarm[name].store.has(sha256(data).hex())


def ref_to(swarm: MemorySwarm, names: str, data: bytes = DATA) -> common_pb2.BlobRef:
    return common_pb2.BlobRef(digest=sha256(data), size_bytes=len(data), holders=ids(swarm, names))


def test_a_state_is_here_and_where_it_was_copied_to(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            ref = await swarm["a"].blobs.store(DATA, NET, ids(swarm, "bc"), "")
            assert ref == ref_to(swarm, "abc")
            assert [has(swarm, name) for name in "abcd"] == [True, True, True, False]
            assert await swarm["d"].blobs.fetch(ref, NET, "") == DATA
            assert has(swarm, "d")  # and is kept there
            before = len(swarm.letters)
            assert await swarm["d"].blobs.fetch(ref, NET, "") == DATA
            assert len(swarm.letters) == before

    play(main())


@pytest.mark.parametrize(("dead", "held"), [("b", "ac"), ("bc", None), ("", "abc")])
def test_a_reference_names_who_took_a_copy(tmp_path: Path, dead: str, held: str | None) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            for name in dead:
                swarm.kill(swarm[name].peer_id)
            storing = swarm["a"].blobs.store(DATA, NET, ids(swarm, "bc"), "")
            if held is None:
                with pytest.raises(ResourceError, match="no other peer"):
                    await storing
            else:
                assert list((await storing).holders) == ids(swarm, held)

    play(main())


@pytest.mark.parametrize("copies", ["bc", ""])
def test_a_full_disk_here_is_no_matter_where_others_have_room(tmp_path: Path, copies: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            full = BlobKeeper(BlobStore(tmp_path / "full", 1000), swarm["a"])
            storing = full.store(DATA, NET, ids(swarm, copies), "")
            if copies:
                assert list((await storing).holders) == ids(swarm, copies)
            else:
                with pytest.raises(ResourceError):
                    await storing
            # what cannot be kept can still be used
            await swarm["b"].blobs.store(DATA, NET, [], "")
            assert await full.fetch(ref_to(swarm, "ab"), NET, "") == DATA

    play(main())


def test_a_state_comes_from_the_next_holder_when_one_is_gone_or_lies(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            await swarm["e"].blobs.store(DATA, NET, [], "")
            swarm.kill(swarm["b"].peer_id)
            lie(swarm, "c", [b"other bytes"])
            with pytest.raises(ForgedError):
                await swarm["a"].get_blob(swarm["c"].peer_id, sha256(DATA), timeout_s=5)
            with pytest.raises(RefusedError) as refused:  # "d" never had it
                await swarm["a"].get_blob(swarm["d"].peer_id, sha256(DATA), timeout_s=5)
            assert refused.value.code == common_pb2.REFUSAL_CODE_STATE_LOST
            assert await swarm["a"].blobs.fetch(ref_to(swarm, "abcde"), NET, "") == DATA

    play(main())


@pytest.mark.parametrize(
    ("holders", "lost"),
    [
        ("", True),
        ("d", True),
        ("ad", True),
        ("c", True),
        ("cd", True),
        ("b", False),
        ("bcd", False),
    ],
)
def test_a_state_is_lost_when_nobody_who_may_have_it_is_silent(
    tmp_path: Path, holders: str, lost: bool
) -> None:
    """ "b" is away, and nobody knows yet; "c" has other bytes; "d" never had it."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            swarm.kill(swarm["b"].peer_id)
            (swarm["c"].store.path / sha256(DATA).hex()).write_bytes(DATA[:-1])

            async def fetch() -> None:
                await swarm["a"].blobs.fetch(ref_to(swarm, holders), NET, "")

            if not lost:
                with pytest.raises(UnreachableError, match="1 of the peers that may have it do"):
                    await fetch()
                await asyncio.sleep(NOTICE_S + 1)  # and then it is known to be gone
            with pytest.raises(RefusedError, match=f"none of the {len(holders)} peers") as refused:
                await fetch()
            assert refused.value.code == common_pb2.REFUSAL_CODE_STATE_LOST

    play(main())


def test_a_holder_that_cannot_read_its_disk_has_not_lost_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            ref = await swarm["b"].blobs.store(DATA, NET, [], "")
            with monkeypatch.context() as patched:
                patched.setattr(Path, "read_bytes", unread)
                with pytest.raises(UnreachableError):
                    await swarm["a"].blobs.fetch(ref, NET, "")
            assert await swarm["a"].blobs.fetch(ref, NET, "") == DATA

    play(main())


def lie(swarm: MemorySwarm, name: str, parts: Sequence[bytes]) -> None:
    """The node sends these bytes, whatever is asked for."""
    real = swarm[name].methods["Blob/Get"]

    async def run(requests: object, caller: object, write: object) -> None:
        for part in parts:
            await write(vnode_pb2.BlobChunk(data=part).SerializeToString())  # type: ignore[operator]

    swarm[name].methods["Blob/Get"] = type(real)(run, False, real.timeout_s)


def test_a_sender_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BLOB_BYTES_MAX", 1 << 20)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            lie(swarm, "b", [bytes(1 << 19)] * 4)
            with pytest.raises(ForgedError, match="more bytes than any state has"):
                await swarm["a"].get_blob(swarm["b"].peer_id, sha256(DATA), timeout_s=5)

    play(main())


def test_what_the_disk_has_spoiled_is_fetched_anew(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            ref = await swarm["a"].blobs.store(DATA, NET, ids(swarm, "b"), "")
            (swarm["a"].store.path / ref.digest.hex()).write_bytes(b"spoiled")
            assert await swarm["a"].blobs.fetch(ref, NET, "") == DATA
            assert swarm["a"].store.get(ref.digest.hex()) == DATA

    play(main())


def test_a_holder_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            await swarm["c"].blobs.store(DATA, NET, [], "")
            swarm.before.append(lambda it: hang(swarm) if it.to == swarm["b"].peer_id else None)
            began = swarm.loop.time()
            assert await swarm["a"].blobs.fetch(ref_to(swarm, "bc"), NET, "") == DATA
            assert swarm.loop.time() - began < 2 * blobs.TRANSFER_TIMEOUT_S

    play(main())


async def hang(swarm: MemorySwarm) -> None:
    await swarm.loop.create_future()


BAD: dict[str, list[vnode_pb2.BlobChunk]] = {
    "nothing": [],
    "other bytes than the digest": [
        vnode_pb2.BlobChunk(digest=sha256(b"a"), size_bytes=1, data=b"b", network_id=NET)
    ],
    "more than announced": [
        vnode_pb2.BlobChunk(digest=sha256(b"ab"), size_bytes=1, data=b"a", network_id=NET),
        vnode_pb2.BlobChunk(data=b"b"),
    ],
    "more than any state has": [
        vnode_pb2.BlobChunk(digest=sha256(b"a"), size_bytes=1 << 40, data=b"a", network_id=NET)
    ],
}


@pytest.mark.parametrize("what", BAD)
def test_bytes_that_are_not_what_they_say_are_not_kept(tmp_path: Path, what: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            dialer = swarm["b"]._dialer
            contact = PeerContact(swarm["a"].peer_id, (), b"")
            async with dialer.stream(
                contact, "Blob/Put", vnode_pb2.BlobPutReply, timeout_s=5
            ) as stream:
                for chunk in BAD[what]:
                    await stream.write(chunk)
                await stream.done_writing()
                reply = await stream.read()
            assert reply.refusal.code == common_pb2.REFUSAL_CODE_BAD_REQUEST
            assert swarm["a"].store.used_bytes() == 0
            await put_blob(dialer, contact, b"", network_id=NET, timeout_s=5)  # not even this
            assert has(swarm, "a", b"")

    play(main())


def test_who_has_no_room_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            swarm["b"].store.bytes_max = 1000
            with pytest.raises(RefusedError) as refused:
                await swarm["a"].put_blob(swarm["b"].peer_id, DATA, network_id=NET, timeout_s=5)
            assert refused.value.code == common_pb2.REFUSAL_CODE_NO_MEMORY

    play(main())


async def believed(network_id: str, caller: str, claim: common_pb2.Signed) -> None:
    """Who says that it orchestrates does."""


def test_what_no_commit_names_is_let_go_after_a_while(tmp_path: Path) -> None:
    old, named, other, young = b"old", b"named", b"another network's", b"young"

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            keeper = swarm["a"].blobs
            keeper.vouch = believed
            await keeper.store(old, NET, [], "")
            await keeper.store(named, NET, [], "")
            await keeper.store(other, "1" * 32, [], "")
            request = vnode_pb2.RetainRequest(network_id=NET, digests=[sha256(named)])

            async def retain() -> list[bool]:
                await swarm.ask("a", "Blob/Retain", request, vnode_pb2.RetainReply, by="b")
                return [has(swarm, "a", data) for data in (old, named, other, young)]

            assert await retain() == [True, True, True, False]  # it may be about to be named
            await asyncio.sleep(UNNAMED_KEPT_S + 1)
            await keeper.store(young, NET, [], "")
            assert await retain() == [False, True, True, True]
            await asyncio.sleep(UNNAMED_KEPT_S + 1)
            assert await retain() == [False, True, True, False]

    play(main())


def test_chunks_say_once_what_they_are_of() -> None:
    chunks = list(chunks_of(DATA, sha256(DATA), NET))
    assert b"".join(chunk.data for chunk in chunks) == DATA
    assert max(len(chunk.data) for chunk in chunks) == blobs.CHUNK_BYTES
    assert [chunk.digest for chunk in chunks] == [sha256(DATA), b"", b""]
    assert chunks[0].network_id == NET
    assert [len(chunk.data) for chunk in chunks_of(b"", sha256(b""), NET)] == [0]


def test_with_a_state_url_a_state_is_there_alone(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            ref = await swarm["a"].blobs.store(DATA, NET, ids(swarm, "b"), url)
            assert list(ref.holders) == []
            assert not has(swarm, "a")
            assert not has(swarm, "b")
            assert await swarm["b"].blobs.fetch(ref, NET, url) == DATA
            assert swarm.letters == []

    play(main())


@contextmanager
def lost(match: str) -> Iterator[None]:
    """Who asks is told, in words and typed, that a state is nowhere to be had."""
    with pytest.raises(RefusedError, match=match) as refused:
        yield
    assert refused.value.code == common_pb2.REFUSAL_CODE_STATE_LOST


@pytest.mark.parametrize("spoiled", [b"", DATA[:-1], bytes(len(DATA)), None])
def test_a_state_in_a_directory_that_is_cut_off_or_changed_or_gone_is_lost(
    tmp_path: Path, spoiled: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/shared"

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            keeper = swarm["a"].blobs
            ref = await keeper.store(DATA, NET, [], url)
            file = tmp_path / "shared" / ref.digest.hex()
            if spoiled is None:
                file.unlink()
            else:
                file.write_bytes(spoiled)
            with lost("was spoiled$" if spoiled is not None else "is not in "):
                await keeper.fetch(ref, NET, url)
            said = [message for message in caplog.messages if str(file) in message]
            assert len(said) == (spoiled is not None), "which file it was, for who looks after it"
            await keeper.store(DATA, NET, [], url)  # who still has it mends it
            assert await keeper.fetch(ref, NET, url) == DATA

    play(main())


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    open_bucket.cache_clear()  # it keeps the variables that it was made with
    monkeypatch.setattr(objects, "RETRIES_MAX", 1)
    with S3Server("states").running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "test")
        yield server
    open_bucket.cache_clear()


def test_a_state_in_a_bucket_is_what_its_digest_names_or_is_not_restored(
    tmp_path: Path, s3: S3Server
) -> None:
    url = "s3://states/nets"
    key = f"nets/states/{sha256(DATA).hex()}"

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            ref = await swarm["a"].blobs.store(DATA, NET, ids(swarm, "b"), url)
            assert list(ref.holders) == []
            assert s3.objects == {key: DATA}
            assert not has(swarm, "a")
            fetch = partial(swarm["b"].blobs.fetch, ref, NET, url)
            assert await fetch() == DATA
            s3.objects[key] = DATA[:-1]  # cut off, and by nobody's fault that shows
            with lost(r"in s3://states/nets was spoiled$"):
                await fetch()
            assert await swarm["a"].blobs.store(DATA, NET, [], url) == ref
            assert await fetch() == DATA, "it was replaced"
            s3.objects[key] = bytes(len(DATA))
            with lost(r"was spoiled$"):
                await fetch()
            del s3.objects[key]
            with lost(r"is not in s3://states/nets$"):
                await fetch()
            assert swarm.letters == []

    play(main())


@pytest.mark.parametrize(
    ("fault", "why"), [("503", "it answers 503 Service Unavailable"), ("short", "comes short")]
)
def test_a_bucket_that_fails_is_said_in_one_sentence(
    tmp_path: Path, s3: S3Server, fault: str, why: str
) -> None:
    url = "s3://states"

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            keeper = swarm["a"].blobs
            ref = await keeper.store(DATA, NET, [], url)
            s3.fault = lambda method, key: fault
            with pytest.raises(
                ResourceError, match=rf"cannot read s3://states/states/\w+: .*{why}"
            ):
                await keeper.fetch(ref, NET, url)
            if fault == "503":
                with pytest.raises(ResourceError, match=rf"the object store cannot .*{why}$"):
                    await keeper.store(DATA + b"1", NET, [], url)
                assert len(s3.objects) == 1

    play(main())


# What was there before the node started


def restarted(swarm: MemorySwarm, directory: Path, bytes_max: int, **ages_s: float) -> BlobKeeper:
    """A keeper that finds blobs, each made of its own name, written so long ago."""
    store = BlobStore(directory, 1 << 30)
    for text, age_s in ages_s.items():
        path = store.path / store.put(text.encode())
        os.utime(path, (time.time() - age_s,) * 2)
    store.bytes_max = bytes_max
    (store.path / ".put-crashed").write_bytes(b"half")
    keeper = BlobKeeper(store, swarm["a"])
    keeper.vouch = believed
    assert not (store.path / ".put-crashed").exists()
    return keeper


async def retain(swarm: MemorySwarm, keeper: BlobKeeper, *named: bytes, network: str = NET) -> None:
    request = vnode_pb2.RetainRequest(network_id=network, digests=map(sha256, named))
    await keeper._retain(request, Caller(swarm["b"].peer_id, 5))


def left(directory: Path, *texts: str) -> list[str]:
    return [text for text in texts if (directory / sha256(text.encode()).hex()).exists()]


def test_what_nobody_has_named_for_a_day_goes(tmp_path: Path) -> None:
    texts = ("old", "named", "young")

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            day = UNKNOWN_KEPT_S
            for node in swarm.nodes.values():  # who looks after nothing need not look around
                await node.orchestrator.close()
            keeper = restarted(swarm, tmp_path / "x", 1000, old=day + 60, named=day + 60, young=60)
            await retain(swarm, keeper, b"named")
            assert left(tmp_path / "x", *texts) == ["named", "young"]
            await asyncio.sleep(day)
            await retain(swarm, keeper, b"else", network="1" * 32)
            assert left(tmp_path / "x", *texts) == ["named"]
            await retain(swarm, keeper, b"else")  # its commits no longer name it
            assert left(tmp_path / "x", *texts) == []

    play(main(), limit_s=10 * UNKNOWN_KEPT_S)


def test_where_there_is_no_room_the_oldest_unnamed_goes_first(tmp_path: Path) -> None:
    texts = ("oldest", "older", "old", "named")

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            keeper = restarted(
                swarm, tmp_path / "x", 30, older=300, old=200, oldest=400, named=900
            )  # 5 + 3 + 6 + 5 bytes
            await retain(swarm, keeper, b"named")
            await keeper.store(b"1" * 20, NET, [], "")
            assert left(tmp_path / "x", *texts) == ["old", "named"]
            with pytest.raises(ResourceError, match="no room"):  # all that could go is gone
                await keeper.store(b"2" * 11, NET, [], "")
            assert left(tmp_path / "x", *texts) == ["named"]
            await asyncio.sleep(UNNAMED_KEPT_S + 1)
            await keeper.store(b"2" * 11, NET, [], "")
            assert left(tmp_path / "x", "1" * 20, "2" * 11, *texts) == ["2" * 11, "named"]
            with pytest.raises(ResourceError, match="no room"):  # not if all of it went
                await keeper.store(b"3" * 31, NET, [], "")
            assert left(tmp_path / "x", "2" * 11) == ["2" * 11]

    play(main())


def test_a_blob_of_two_networks_goes_with_the_second(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            keeper = swarm["a"].blobs
            keeper.vouch = believed
            for network in (NET, "1" * 32):
                await keeper.store(DATA, network, [], "")
            await asyncio.sleep(UNNAMED_KEPT_S + 1)
            await retain(swarm, keeper)
            assert has(swarm, "a")
            await retain(swarm, keeper, network="1" * 32)
            assert not has(swarm, "a")

    play(main())


@pytest.mark.parametrize("network", ["", "0" * 31, "../" + "0" * 29, "A" * 32])
def test_only_networks_have_blobs(tmp_path: Path, network: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            with pytest.raises(RefusedError, match="is not a network id"):
                await swarm["b"].put_blob(swarm["a"].peer_id, DATA, network_id=network, timeout_s=5)
            assert not has(swarm, "a")
            request = vnode_pb2.RetainRequest(network_id=network)
            with pytest.raises(RefusedError, match="is not a network id"):
                await swarm.ask("a", "Blob/Retain", request, vnode_pb2.RetainReply)

    play(main())


def test_a_large_state_is_hashed_beside_the_event_loop_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def counted(data: bytes) -> bytes:
        threads.append(threading.get_ident())
        return sha256(data)

    monkeypatch.setattr(blobs, "sha256", counted)
    monkeypatch.setattr(transfer, "sha256", counted)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            await swarm["a"].blobs.store(DATA, NET, ids(swarm, "b"), "")
            assert len(threads) == 2  # by who has it, and by who gets it
            assert await swarm["c"].blobs.fetch(ref_to(swarm, "b"), NET, "") == DATA
            assert len(threads) == 3
            assert threading.get_ident() not in threads

    asyncio.run(main())
