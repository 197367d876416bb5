"""Signed payloads have one serialisation. Pure."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from p2pnet.errors import MalformedError

MessageT = TypeVar("MessageT", bound=Message)


def parse_canonical(kind: type[MessageT], data: bytes, size_bytes_max: int) -> MessageT:
    """Parses a protobuf message that must be exactly as we would have written it.

    Otherwise one statement could go about in many forms of bytes, each with a
    digest of its own: a network id, for one, is such a digest. A field that we do not
    know is none that we would have written; what is to be added later comes with a new
    kind of record.

    Raises:
        MalformedError: too long, not that message, or written in another way.
    """
    name = kind.DESCRIPTOR.name
    if len(data) > size_bytes_max:
        raise MalformedError(f"a {name} of {len(data)} bytes, over {size_bytes_max}")
    try:
        message = kind.FromString(data)
    except DecodeError:
        raise MalformedError(f"not a {name}") from None
    message.DiscardUnknownFields()
    if message.SerializeToString(deterministic=True) != data:
        raise MalformedError(f"a {name} that is not serialised in the canonical way")
    return message
