"""Blobs on disk: whole or not there, within a quota, never believed unread."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from p2pnet.data.blobs import BlobStore, NoRoomError, open_state
from p2pnet.errors import MalformedError, NotFoundError, ResourceError, UsageError


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "a" / "blobs", bytes_max=1000)


def test_what_is_put_is_got(store: BlobStore) -> None:
    digest = store.put(b"state")
    assert digest == hashlib.sha256(b"state").hexdigest()
    assert store.get(digest) == b"state"
    assert store.has(digest)
    assert store.put(b"state") == digest
    assert os.listdir(store.path) == [digest]
    store.drop(digest)
    store.drop(digest)
    assert not store.has(digest)
    with pytest.raises(NotFoundError):
        store.get(digest)


def test_a_second_process_sees_it(store: BlobStore) -> None:
    digest = store.put(b"state")
    assert BlobStore(store.path, 1000).get(digest) == b"state"


@pytest.mark.parametrize("spoiled", [b"", b"stat", b"statE", b"state+"])
def test_what_the_disk_spoiled_is_deleted(store: BlobStore, spoiled: bytes) -> None:
    digest = store.put(b"state")
    (store.path / digest).write_bytes(spoiled)
    with pytest.raises(NotFoundError, match="spoiled"):
        store.get(digest)
    assert not store.has(digest)
    (store.path / digest).write_bytes(spoiled)
    store.put(b"state")  # mends it
    assert store.get(digest) == b"state"


def test_the_quota_holds(store: BlobStore) -> None:
    first = store.put(b"a" * 600)
    with pytest.raises(ResourceError, match="no room for a state of 401 B"):
        store.put(b"b" * 401)
    store.put(b"a" * 600)  # is there already
    store.put(b"c" * 400)
    assert store.used_bytes() == 1000
    store.drop(first)
    store.put(b"b" * 401)


def test_threads_together_do_not_pass_the_quota(store: BlobStore) -> None:
    def put(number: int) -> bool:
        try:
            store.put(bytes([number]) * 300)
        except ResourceError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(put, range(16))) == 3
    assert store.used_bytes() == 900


def test_a_full_disk_leaves_nothing_behind(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="No space left"):
            store.put(b"state")
    assert os.listdir(store.path) == []
    store.put(b"state")


def test_what_a_crash_has_left_is_tidied_away(store: BlobStore) -> None:
    keep = store.put(b"keep")
    (store.path / ".put-crashed").write_bytes(b"half")
    (store.path / "notes.txt").write_bytes(b"somebody's")
    store.tidy()
    assert sorted(os.listdir(store.path)) == sorted([keep, "notes.txt"])


def test_when_each_was_written(store: BlobStore) -> None:
    one, other = store.put(b"one"), store.put(b"other")
    (store.path / "notes.txt").write_bytes(b"somebody's")
    os.utime(store.path / one, (1000.0, 1000.0))
    written = store.written_at()
    assert sorted(written) == sorted([one, other])
    assert written[one] == 1000.0
    assert written[other] > 1000.0


def test_a_digest_that_is_known_is_not_worked_out_again(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(b"state").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "sha256", lambda data: pytest.fail("hashed"))
        assert store.put(b"state", digest) == digest
    assert store.get(digest) == b"state"


def test_only_what_room_could_mend_is_want_of_room(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(b"a" * 600)
    with pytest.raises(NoRoomError):
        store.put(b"b" * 600)
    with pytest.raises(ResourceError) as never:
        store.put(b"b" * 1001)
    assert not isinstance(never.value, NoRoomError)
    for number, mends in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)):

        def fail(handle: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            with pytest.raises(ResourceError) as failed:
                store.put(b"c")
        assert isinstance(failed.value, NoRoomError) == mends


@pytest.mark.parametrize(
    "digest", ["", "..", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 64 + "\n"]
)
def test_a_digest_is_no_path(store: BlobStore, digest: str) -> None:
    for use in (store.get, store.has, store.drop):
        with pytest.raises(MalformedError):
            use(digest)


def test_a_place_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot hold states"):
        BlobStore(tmp_path / "file" / "blobs", 1)


def test_state_urls(tmp_path: Path) -> None:
    store = open_state(f"file://{tmp_path}/a%20b", 100)
    assert isinstance(store, BlobStore)
    assert store.path == tmp_path / "a b"
    for url in ("/srv", "file://", "file:///", "file://elsewhere/srv", ""):
        with pytest.raises(UsageError, match="file:///srv"):
            open_state(url, 100)
