"""A shell: a bucket of an object store that speaks S3 (DESIGN D6, D12). The only door to one.

`s3://bucket/prefix`; keys, region and endpoint come from the usual environment
variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL for
MinIO and others). What is created is created once: `If-None-Match: *`
(docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html).

Methods block: call them in a worker thread. Any thread may.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from p2pnet.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from obstore.store import S3Store

TIMEOUT_S = 30.0  # of one request
CONNECT_TIMEOUT_S = 5.0
RETRY_TIMEOUT_S = 20.0
RETRIES_MAX = 3
LISTED_MAX = 1_000_000
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()/-]{0,400}")
_DETAIL_CHARS_MAX = 160


class Bucket:
    """Objects by key, below the prefix of a URL. `url` is for people."""

    def __init__(self, store: S3Store, url: str) -> None:
        self.url = url
        self._store = store

    def create(self, key: str, data: bytes) -> bool:
        """Writes an object unless there is one. Whether it was written by this call.

        False may be a lie where an answer was lost and the request repeated: look
        what is there.

        Raises:
            ResourceError: the store cannot be written, and why.
        """
        import obstore

        with self._said("write", key):
            try:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
        return True

    def put(self, key: str, data: bytes) -> None:
        """Writes an object, over another if there is one; raises as `create`."""
        import obstore

        with self._said("write", key):
            obstore.put(self._store, key, data, use_multipart=False)

    def get(self, key: str, size_bytes_max: int) -> bytes | None:
        """A whole object, or None where there is none.

        Raises:
            ResourceError: the store cannot be read, the object came short, or is larger.
        """
        import obstore

        with self._said("read", key):
            try:
                found = obstore.get(self._store, key)
            except FileNotFoundError:
                return None
            size_bytes = found.meta["size"]
            if size_bytes > size_bytes_max:
                raise ResourceError(f"{self.url}/{key} has {size_bytes} bytes: far too many")
            data = bytes(found.bytes())
        if len(data) != size_bytes:
            raise ResourceError(f"{self.url}/{key} came short: {len(data)} of {size_bytes} bytes")
        return data

    def size(self, key: str) -> int | None:
        """An object's size in bytes, or None where there is none; raises as `get`."""
        import obstore

        with self._said("read", key):
            try:
                return int(obstore.head(self._store, key)["size"])
            except FileNotFoundError:
                return None

    def folders(self, prefix: str) -> list[str]:
        """The names right below a prefix that have something below them, in order."""
        import obstore

        with self._said("list", prefix):
            found = obstore.list_with_delimiter(self._store, prefix)
        return sorted(str(path).rpartition("/")[2] for path in found["common_prefixes"])

    def list(self, prefix: str, after: str = "") -> list[str]:
        """The keys under a prefix (whole parts of a path), after one of them, in order."""
        import obstore

        with self._said("list", prefix):
            names: list[str] = []
            for page in obstore.list(self._store, prefix, offset=after or None):
                names += [str(meta["path"]) for meta in page]
                if len(names) > LISTED_MAX:
                    raise ResourceError(f"{self.url}/{prefix} holds over {LISTED_MAX} objects")
            return sorted(names)

    @contextmanager
    def _said(self, verb: str, key: str) -> Iterator[None]:
        """What goes wrong as one sentence for people."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError):
            raise ResourceError(self._sentence(verb, key, "403")) from None
        except (BaseError, FileNotFoundError, PermissionError, OSError) as error:
            raise ResourceError(self._sentence(verb, key, str(error))) from None

    def _sentence(self, verb: str, key: str, detail: str) -> str:
        if "/latest/" in detail:  # without keys a cloud provider's machine is asked for them
            return (
                f"there are no credentials for {self.url}: set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        if "NoSuchBucket" in detail:
            return f"there is no bucket for {self.url}: make it, or check the name and the endpoint"
        if re.search(r"\b40[13]\b", detail):
            return (
                f"the object store does not let this node {verb} {self.url}: check "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they may do there"
            )
        status = re.search(r"status code: (\d{3} [A-Za-z ]*[A-Za-z])", detail)
        if status:
            why = f"it answers {status[1]}"
        elif "Range" in detail or "response body" in detail:
            why = "its answer comes short"
        elif "sending request" in detail or "onnect" in detail:
            why = "it cannot be reached, or breaks off"
        else:
            why = " ".join(detail.split())[:_DETAIL_CHARS_MAX]
        return f"the object store cannot {verb} {self.url}/{key}: {why}"


@lru_cache(maxsize=64)
def open_bucket(url: str) -> Bucket:
    """The bucket that an s3:// URL names; nothing is asked of it yet.

    Raises:
        UsageError: no such URL, or this node cannot speak to object stores.
    """
    check_bucket_url(url)
    parts = urlsplit(url)
    try:
        from obstore.store import S3Store
    except ImportError:
        raise UsageError(f"{url} needs the package obstore: pip install obstore") from None
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=TIMEOUT_S),
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "allow_http": endpoint.startswith("http://"),
    }
    store = S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        client_options=client,  # type: ignore[arg-type]
        retry_config={
            "max_retries": RETRIES_MAX,
            "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=2),
                "base": 2,
            },
        },
    )
    return Bucket(store, url.rstrip("/"))


def check_bucket_url(url: str) -> None:
    """Raises UsageError for anything but s3://BUCKET or s3://BUCKET/PREFIX."""
    parts = urlsplit(url)
    path = parts.path.strip("/")
    if (
        parts.scheme != "s3"
        or not _BUCKET.fullmatch(parts.netloc)
        or not _PREFIX.fullmatch(path)
        or any(part in ("", ".", "..") for part in path.split("/") if path)
        or parts.query
        or parts.fragment
    ):
        raise UsageError(f"{url!r} is no URL of a bucket: write for example s3://p2pnet/states")
