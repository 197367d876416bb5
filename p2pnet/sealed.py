"""Files that say what they are and whether they are whole. Pure.

    "p2pnet" 0x00   kind, 4 bytes   version, 1 byte   SHA-256 of all the rest, 32 bytes   body

The digest is against damage: a disk that failed, a write that was cut off. Who may
write to a data dir can make a good one, so that what is in a file is checked besides.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from p2pnet.errors import LocalError
from p2pnet.keys import sha256

MessageT = TypeVar("MessageT", bound=Message)

_MAGIC = b"p2pnet\0"
_KIND_BYTES = 4
_DIGEST_BYTES = 32
HEAD_BYTES = len(_MAGIC) + _KIND_BYTES + 1 + _DIGEST_BYTES


def seal(kind: bytes, version: int, body: bytes) -> bytes:
    """The whole file. `kind` has 4 bytes; `version` is from 0 to 255."""
    head = _MAGIC + kind.ljust(_KIND_BYTES)[:_KIND_BYTES] + bytes([version])
    return b"".join((head, sha256(head + sha256(body)), body))


def unseal_message(
    message: type[MessageT], kind: bytes, version: int, data: bytes, bytes_max: int
) -> MessageT:
    """The body, which is a protobuf message; a whole file has at most `bytes_max`.

    Raises:
        LocalError: as `unseal`, or it does not parse; says which.
    """
    if len(data) > bytes_max:
        raise LocalError(f"it has {len(data)} bytes, over {bytes_max}")
    body = unseal(kind, version, data)
    try:
        return message.FromString(body)
    except DecodeError:
        raise LocalError("it does not parse") from None


def unseal(kind: bytes, version: int, data: bytes) -> bytes:
    """The body.

    Raises:
        LocalError: another file, of another version, or damaged; says which.
    """
    head = _MAGIC + kind.ljust(_KIND_BYTES)[:_KIND_BYTES]
    if not data.startswith(head) or len(data) < HEAD_BYTES:
        raise LocalError("it is another kind of file, or was cut off")
    if data[len(head)] != version:
        raise LocalError(f"it is of version {data[len(head)]}, and this node reads {version}")
    head += bytes([version])
    body = data[HEAD_BYTES:]
    if sha256(head + sha256(body)) != data[len(head) : HEAD_BYTES]:
        raise LocalError("it is damaged")
    return body
