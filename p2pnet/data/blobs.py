"""States by their content: one file a blob, named by its SHA-256 (DESIGN D12).

What is there under its name is whole: a blob is written aside, synced, and only
then renamed. What a disk has spoiled since is found out when it is read. Nothing
is kept in memory, so that several processes can share a directory.

All methods block: call them from a thread.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from p2pnet.data.objects import Bucket, check_bucket_url, open_bucket
from p2pnet.datadir import sync_folder
from p2pnet.errors import MalformedError, NotFoundError, ResourceError, UsageError
from p2pnet.units import format_size

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ASIDE = ".put-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoomError(ResourceError):
    """The disk or the quota is full."""


class BlobStore:
    """A directory of blobs, made if it is not there. Digests are 64 lower-case hex digits.

    Args:
        bytes_max: what all blobs together may take.

    Raises:
        ResourceError: the directory cannot be made.
    """

    def __init__(self, path: Path, bytes_max: int) -> None:
        self.path = path
        self.bytes_max = bytes_max
        self._lock = threading.Lock()  # one writer at a time counts what is used
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{path} cannot hold states: {error.strerror}") from error

    def put(self, data: bytes, digest: str = "") -> str:
        """Stores a blob and returns its digest; one that is there already costs nothing.

        `digest` is given by who has just worked it out.

        Raises:
            NoRoomError: the disk or the quota is full; nothing is left behind.
            ResourceError: it is larger than the quota, or cannot be written.
        """
        digest = digest or hashlib.sha256(data).hexdigest()
        with self._lock:
            if self._is_whole(digest, data):
                return digest
            used_bytes = self.used_bytes()
            if used_bytes + len(data) > self.bytes_max:
                kind = NoRoomError if len(data) <= self.bytes_max else ResourceError
                raise kind(
                    f"no room for a state of {format_size(len(data))} in {self.path}: "
                    f"{format_size(used_bytes)} of {format_size(self.bytes_max)} are used"
                )
            try:
                self._write(self.path / digest, data)
            except OSError as error:
                kind = NoRoomError if error.errno in _DISK_FULL else ResourceError
                raise kind(
                    f"a state of {format_size(len(data))} cannot be written to {self.path}: "
                    f"{error.strerror}"
                ) from error
        return digest

    def get(self, digest: str) -> bytes:
        """A blob, checked against its digest; one that does not hold is deleted.

        Raises:
            NotFoundError: it is not here, or was spoiled.
            ResourceError: it cannot be read.
        """
        path = self._file(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"the state {digest[:12]}… is not in {self.path}") from None
        except OSError as error:
            raise ResourceError(f"{path} cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            logger.warning("%s was spoiled on disk and is deleted", path)
            path.unlink(missing_ok=True)
            raise NotFoundError(f"the state {digest[:12]}… in {self.path} was spoiled")
        return data

    def has(self, digest: str) -> bool:
        """Whether a blob is here; only `get` knows whether it is sound."""
        return self._file(digest).is_file()

    def drop(self, digest: str) -> None:
        """Deletes a blob if it is here."""
        self._file(digest).unlink(missing_ok=True)

    def written_at(self) -> dict[str, float]:
        """When each blob was written, by digest; seconds since 1970."""
        found = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                if _DIGEST.fullmatch(entry.name):
                    try:
                        found[entry.name] = entry.stat().st_mtime
                    except FileNotFoundError:  # dropped in this moment
                        pass
        return found

    def tidy(self) -> None:
        """Deletes what a crash has left half-written; for who has the directory to himself."""
        with self._lock:
            for name in sorted(os.listdir(self.path)):
                if name.startswith(_ASIDE):
                    (self.path / name).unlink(missing_ok=True)

    def used_bytes(self) -> int:
        """What all blobs together take."""
        total = 0
        with os.scandir(self.path) as entries:
            for entry in entries:
                try:
                    total += entry.stat().st_size
                except FileNotFoundError:  # dropped in this moment
                    pass
        return total

    def _file(self, digest: str) -> Path:
        return self.path / _check_digest(digest)

    def _is_whole(self, digest: str, data: bytes) -> bool:
        try:
            return self._file(digest).read_bytes() == data
        except OSError:
            return False

    def _write(self, path: Path, data: bytes) -> None:
        handle, aside = tempfile.mkstemp(prefix=_ASIDE, dir=self.path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        sync_folder(self.path)


class StateStore(Protocol):
    """Where states go that all nodes of a network can reach. Methods block."""

    def put(self, data: bytes, digest: str = "") -> str:
        """Stores a blob and returns its digest; raises ResourceError."""
        ...

    def get(self, digest: str) -> bytes:
        """A blob, checked against its digest; raises NotFoundError, ResourceError."""
        ...


class BlobsInBucket:
    """States in an object store, under `states/`; its owner sees to what they cost."""

    def __init__(self, bucket: Bucket, bytes_max: int) -> None:
        self._bucket = bucket
        self._bytes_max = bytes_max

    def put(self, data: bytes, digest: str = "") -> str:
        """See `StateStore`; one that is there already is not sent again."""
        digest = digest or hashlib.sha256(data).hexdigest()
        key = f"states/{_check_digest(digest)}"
        if self._bucket.size(key) != len(data):
            self._bucket.put(key, data)
        return digest

    def get(self, digest: str) -> bytes:
        """See `StateStore`."""
        data = self._bucket.get(f"states/{_check_digest(digest)}", self._bytes_max)
        if data is None:
            raise NotFoundError(f"the state {digest[:12]}… is not in {self._bucket.url}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise NotFoundError(f"the state {digest[:12]}… in {self._bucket.url} was spoiled")
        return data


def open_state(url: str, bytes_max: int) -> StateStore:
    """The store that `join --state URL` names: a directory or bucket that all nodes can reach.

    Raises:
        UsageError: not such a URL.
        ResourceError: the directory cannot be made.
    """
    if url.startswith("s3://"):
        return BlobsInBucket(open_bucket(url), bytes_max)
    return BlobStore(path_of(url), bytes_max)


def check_state(url: str) -> None:
    """Raises UsageError for what `open_state` cannot open; asks nothing of it."""
    if url.startswith("s3://"):
        check_bucket_url(url)
    else:
        path_of(url)


def is_state_there(url: str) -> bool:
    """Whether a state's place is one that this machine has; a bucket is found out by asking.

    Makes nothing. Raises UsageError as `check_state`.
    """
    check_state(url)
    return url.startswith("s3://") or path_of(url).is_dir()


def path_of(url: str) -> Path:
    """The absolute path in a file:// URL; raises UsageError for anything else."""
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or len(parts.path) < 2:
        raise UsageError(
            f"{url!r} is no URL of a local file: write for example file:///srv/p2pnet or "
            "s3://bucket/prefix"
        )
    return Path(unquote(parts.path))


def _check_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):  # never a way out of the directory
        raise MalformedError(f"{digest[:80]!r} is not a SHA-256 in hex")
    return digest
