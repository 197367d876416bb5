"""Gossip messages: bounds when read, a byte budget when written. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from p2pnet.errors import MalformedError
from p2pnet.gossip.coordinates import Coordinate, read_coordinate, write_coordinate
from p2pnet.gossip.digests import DEPTH_MAX, DIGEST_BYTES
from p2pnet.gossip.statements import Versions, read_versions
from p2pnet.net.varint import frame
from p2pnet.v1 import common_pb2
from p2pnet.v1 import gossip_pb2 as pb

MESSAGE_BYTES_MAX = 256 << 10
STATEMENTS_MAX = 1024
DETAIL_CHARS_MAX = 256
_TAG_BYTES = 4  # a statement's tag and length
_ADVERTS_TAG = bytes([pb.GossipMessage.ADVERTS_FIELD_NUMBER << 3 | 2])  # 2: length-delimited
_ACCUSATIONS_TAG = bytes([pb.GossipMessage.ACCUSATIONS_FIELD_NUMBER << 3 | 2])

Kinds = pb.GossipMessage  # its members KIND_... name the kinds
Kind = pb.GossipMessage.Kind
_REQUESTS = (Kinds.KIND_PROBE, Kinds.KIND_SYNC, Kinds.KIND_NEWS, Kinds.KIND_SYNC_REST)


@dataclass(frozen=True, slots=True)
class Summary:
    """Which live members the sender knows: a digest a bucket of the ring, from `first` on."""

    depth: int
    first: int
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What the answer to a summary holds: the buckets told in full; were there more?"""

    told: tuple[int, ...] = ()
    more: bool = False
    members: int = 0


_NO_SUMMARY = Summary(0, 0, ())
_NO_RESULT = SyncResult()


@dataclass(frozen=True, slots=True)
class Message:
    """A message within bounds; its statements are not verified yet."""

    kind: Kind
    versions: Versions
    adverts: tuple[common_pb2.Signed, ...]
    accusations: tuple[common_pb2.Signed, ...]
    detail: str
    client: bool
    summary: Summary
    result: SyncResult
    coordinate: Coordinate | None


def read_message(data: bytes) -> Message:
    """Raises MalformedError: too long, too many statements, or no gossip message."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise MalformedError(f"a gossip message of {len(data)} bytes is too long")
    message = pb.GossipMessage()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise MalformedError("a gossip message does not parse") from None
    if len(message.adverts) + len(message.accusations) > STATEMENTS_MAX:
        raise MalformedError("a gossip message has too many statements")
    detail = "".join(c if c.isprintable() else "?" for c in message.detail[:DETAIL_CHARS_MAX])
    return Message(
        kind=message.kind,
        versions=read_versions(message.versions),
        adverts=tuple(message.adverts),
        accusations=tuple(message.accusations),
        detail=detail,
        client=message.client,
        summary=_read_summary(message.summary) if message.HasField("summary") else _NO_SUMMARY,
        result=_read_result(message.result) if message.HasField("result") else _NO_RESULT,
        coordinate=read_coordinate(message.coordinate) if message.HasField("coordinate") else None,
    )


def read_request(data: bytes) -> Message:
    """Raises MalformedError: as `read_message`, or of a kind that nobody asks with."""
    message = read_message(data)
    if message.kind not in _REQUESTS:
        raise MalformedError("a gossip request is neither a probe nor a sync nor news")
    return message


def _read_summary(message: pb.Summary) -> Summary:
    count = len(message.digests) // DIGEST_BYTES
    buckets = 1 << min(message.depth, DEPTH_MAX)
    if (
        message.depth > DEPTH_MAX
        or count * DIGEST_BYTES != len(message.digests)
        or count > buckets
        or message.first >= buckets
    ):
        raise MalformedError("a summary has other buckets than a ring has")
    data = message.digests
    digests = tuple(data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES))
    return Summary(message.depth, message.first, digests)


def _read_result(message: pb.SyncResult) -> SyncResult:
    if len(message.told) > 1 << DEPTH_MAX:
        raise MalformedError("a sync tells more buckets than a ring has")
    return SyncResult(tuple(message.told), message.more, message.members)


def write_message(
    kind: Kind,
    versions: Versions,
    *,
    adverts: Iterable[bytes] = (),
    accusations: Iterable[bytes] = (),
    detail: str = "",
    client: bool = False,
    summary: Summary | None = None,
    result: SyncResult | None = None,
    coordinate: Coordinate | None = None,
) -> bytes:
    """A message's bytes; the caller keeps to its byte budget (see `Parcel`).

    Statements are raw, as `statements.raw_of` gives them.
    """
    head = pb.GossipMessage(
        kind=kind,
        versions=common_pb2.VersionRange(min=versions.min, max=versions.max),
        detail=detail,
        client=client,
    )
    if summary is not None:
        head.summary.depth, head.summary.first = summary.depth, summary.first
        head.summary.digests = b"".join(summary.digests)
    if result is not None:
        head.result.told.extend(result.told)
        head.result.more, head.result.members = result.more, result.members
    if coordinate is not None:
        head.coordinate.CopyFrom(write_coordinate(coordinate))
    # Fields may stand in any order (protobuf.dev, "Encoding"), and a statement's
    # bytes are a field's content already: no need to take them apart first.
    parts = [head.SerializeToString()]
    for tag, statements in ((_ADVERTS_TAG, adverts), (_ACCUSATIONS_TAG, accusations)):
        for raw in statements:
            parts += (tag, frame(raw))
    return b"".join(parts)


class Parcel:
    """Raw statements for one message, each once, up to a number of bytes."""

    def __init__(self, budget_bytes: int) -> None:
        self.left_bytes = budget_bytes
        self.adverts: list[bytes] = []
        self.accusations: list[bytes] = []
        self._seen: set[bytes] = set()

    def advert(self, raw: bytes) -> bool:
        """Packs an advert; False if there is no room for it."""
        return self._pack(self.adverts, raw)

    def accusation(self, raw: bytes) -> bool:
        """Packs an accusation; False if there is no room for it."""
        return self._pack(self.accusations, raw)

    def room(self, statements: list[bytes]) -> bool:
        """True if all of these would still fit."""
        size_bytes = sum(len(raw) + _TAG_BYTES for raw in statements)
        return size_bytes <= self.left_bytes and len(self._seen) + len(statements) <= STATEMENTS_MAX

    def _pack(self, into: list[bytes], raw: bytes) -> bool:
        if raw in self._seen:
            return True
        size_bytes = len(raw) + _TAG_BYTES
        if size_bytes > self.left_bytes or len(self._seen) >= STATEMENTS_MAX:
            return False
        self._seen.add(raw)
        self.left_bytes -= size_bytes
        into.append(raw)
        return True
