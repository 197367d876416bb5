"""A bucket over real HTTP: created once, errors in one sentence, states in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from s3_server import PAGE, S3Server

from p2pnet.data import objects
from p2pnet.data.blobs import check_state, open_state
from p2pnet.data.objects import Bucket, open_bucket
from p2pnet.errors import MalformedError, NotFoundError, ResourceError, UsageError

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    open_bucket.cache_clear()  # it keeps the variables that it was made with
    monkeypatch.setattr(objects, "RETRIES_MAX", 1)
    with S3Server("states").running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for name in KEYS:
            monkeypatch.setenv(name, "test")
        yield server
    open_bucket.cache_clear()


def test_an_object_is_created_once(s3: S3Server) -> None:
    bucket = open_bucket("s3://states/a/prefix")
    assert bucket.create("k/1", b"one")
    assert not bucket.create("k/1", b"two")
    assert s3.objects == {"a/prefix/k/1": b"one"}
    assert bucket.get("k/1", 10) == b"one"
    assert bucket.size("k/1") == 3
    assert (bucket.get("k/2", 10), bucket.size("k/2")) == (None, None)
    bucket.put("k/1", b"over")
    assert bucket.get("k/1", 10) == b"over"


def test_of_many_creators_one_wins(s3: S3Server) -> None:
    bucket = open_bucket("s3://states")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: bucket.create("k", b"%d" % n), range(32)))
    assert won.count(True) == 1
    assert s3.objects["k"] == b"%d" % won.index(True)


def test_a_long_listing_is_whole_and_in_order(s3: S3Server) -> None:
    names = [f"many/{number:05d}" for number in range(3 * PAGE + 7)]
    s3.objects.update({f"p/{name}": b"x" for name in reversed(names)})
    s3.objects["p/other/1"] = b"x"
    bucket = open_bucket("s3://states/p")
    assert bucket.list("many") == names
    assert bucket.list("many", names[PAGE]) == names[PAGE + 1 :]
    assert bucket.list("nothing") == []


Do = Callable[[Bucket], Any]
DEEDS: dict[str, Do] = {
    "create": lambda bucket: bucket.create("k", b"data"),
    "put": lambda bucket: bucket.put("k", b"data"),
    "get": lambda bucket: bucket.get("there", 100),
    "size": lambda bucket: bucket.size("there"),
    "list": lambda bucket: bucket.list("logs"),
}


FAULTS = {
    "503": "it answers 503 Service Unavailable",
    "403": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they may do there",
    "lost": "it cannot be reached, or breaks off",
    "short": "its answer comes short",
}


@pytest.mark.parametrize(
    ("fault", "deed"),
    [
        (fault, deed)
        for fault in FAULTS
        for deed in DEEDS
        if fault != "short" or deed in ("get", "list")  # the other answers have no body
    ],
)
def test_a_store_that_fails_is_said_in_one_sentence(s3: S3Server, fault: str, deed: str) -> None:
    s3.objects["there"] = b"some data"
    s3.fault = lambda method, key: fault
    with pytest.raises(ResourceError) as said:
        DEEDS[deed](open_bucket("s3://states"))
    assert FAULTS[fault] in str(said.value)
    assert "s3://states" in str(said.value)
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 250


def test_a_store_that_stumbles_once_is_asked_again(s3: S3Server) -> None:
    faults = ["503"]
    s3.fault = lambda method, key: faults.pop() if faults else ""
    assert open_bucket("s3://states").create("k", b"data")
    assert len(s3.requests) == 2


def test_a_bucket_that_is_not_there_is_said(s3: S3Server) -> None:
    bucket = open_bucket("s3://another/prefix")
    for deed in ("create", "list"):
        with pytest.raises(ResourceError, match="there is no bucket for s3://another/prefix"):
            DEEDS[deed](bucket)


def test_missing_credentials_are_said(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    # No machine of a cloud provider answers for them either: this one refuses at once.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", s3.url)
    with pytest.raises(ResourceError, match=r"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_bucket("s3://states").create("k", b"data")
    assert s3.objects == {}


def test_an_object_that_is_far_too_large_is_not_read(s3: S3Server) -> None:
    s3.objects["k"] = bytes(101)
    with pytest.raises(ResourceError, match="has 101 bytes: far too many"):
        open_bucket("s3://states").get("k", 100)


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///key", "s3://UPPER/x", "s3://a", "s3://bucket/../x", "s3://bucket/a//b",
     "s3://bucket/a?b", "s3://bucket/ü", "http://bucket", "s3://user@bucket/x", "s3://b:80/x"],
)  # fmt: skip
def test_what_is_no_bucket_url_is_said(url: str) -> None:
    with pytest.raises(UsageError, match="write for example"):
        open_bucket(url)
    with pytest.raises(UsageError):
        check_state(url)


def test_states_live_in_a_bucket(s3: S3Server) -> None:
    store = open_state("s3://states/net", 1 << 20)
    data = b"a state"
    digest = hashlib.sha256(data).hexdigest()
    assert store.put(data) == digest
    assert s3.objects == {f"net/states/{digest}": data}
    assert store.get(digest) == data
    before = len(s3.requests)
    assert store.put(data, digest) == digest  # not sent again
    assert [method for method, _ in s3.requests[before:]] == ["HEAD"]
    with pytest.raises(NotFoundError, match="is not in s3://states/net"):
        store.get("0" * 64)
    s3.objects[f"net/states/{digest}"] = b"spoiled"
    with pytest.raises(NotFoundError, match="was spoiled"):
        store.get(digest)
    with pytest.raises(MalformedError, match="not a SHA-256"):
        store.get("../../secret")


def test_half_a_state_is_replaced(s3: S3Server) -> None:
    store = open_state("s3://states/net", 1 << 20)
    data = b"a state"
    digest = hashlib.sha256(data).hexdigest()
    s3.objects[f"net/states/{digest}"] = data[:3]
    store.put(data)
    assert store.get(digest) == data
