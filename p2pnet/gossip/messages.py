"""Gossip messages: bounds when read, a byte budget when written. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from p2pnet.errors import MalformedError
from p2pnet.gossip.statements import Versions, read_versions
from p2pnet.v1 import common_pb2
from p2pnet.v1 import gossip_pb2 as pb

MESSAGE_BYTES_MAX = 256 << 10
STATEMENTS_MAX = 1024
DETAIL_CHARS_MAX = 256

Kinds = pb.GossipMessage  # its members KIND_... name the kinds
Kind = pb.GossipMessage.Kind


@dataclass(frozen=True, slots=True)
class Message:
    """A message within bounds; its statements are not verified yet."""

    kind: Kind
    versions: Versions
    adverts: tuple[common_pb2.Signed, ...]
    accusations: tuple[common_pb2.Signed, ...]
    detail: str
    client: bool


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
    )


def write_message(
    kind: Kind,
    versions: Versions,
    *,
    adverts: Iterable[common_pb2.Signed] = (),
    accusations: Iterable[common_pb2.Signed] = (),
    detail: str = "",
    client: bool = False,
) -> bytes:
    """A message's bytes; the caller keeps to its byte budget (see `Parcel`)."""
    return pb.GossipMessage(
        kind=kind,
        versions=common_pb2.VersionRange(min=versions.min, max=versions.max),
        adverts=adverts,
        accusations=accusations,
        detail=detail,
        client=client,
    ).SerializeToString()


class Parcel:
    """Statements for one message, each once, up to a number of bytes."""

    def __init__(self, budget_bytes: int) -> None:
        self.left_bytes = budget_bytes
        self.adverts: list[common_pb2.Signed] = []
        self.accusations: list[common_pb2.Signed] = []
        self._seen: set[bytes] = set()

    def advert(self, signed: common_pb2.Signed) -> bool:
        """Packs an advert; False if there is no room for it."""
        return self._pack(self.adverts, signed)

    def accusation(self, signed: common_pb2.Signed) -> bool:
        """Packs an accusation; False if there is no room for it."""
        return self._pack(self.accusations, signed)

    def _pack(self, into: list[common_pb2.Signed], signed: common_pb2.Signed) -> bool:
        if signed.signature in self._seen:
            return True
        size_bytes = signed.ByteSize() + 8  # and its tag and length
        if size_bytes > self.left_bytes or len(self._seen) >= STATEMENTS_MAX:
            return False
        self._seen.add(signed.signature)
        self.left_bytes -= size_bytes
        into.append(signed)
        return True
