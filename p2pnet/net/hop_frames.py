"""Frames on a stream of hops, as bytes (`HopFrame`). Pure.

Protobuf would copy a tensor three times on its way out and twice on its way in. So the
message's last field, `data`, is written and found here (protobuf.dev, "Encoding"): on
the way out it is copied once, into the frame; on the way in it is a view on the frame.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from p2pnet.errors import MalformedError
from p2pnet.v1 import vnode_pb2

DATA_BYTES_MAX = 1 << 20  # in one frame
HEAD_BYTES_MAX = 256 << 10  # in one frame, beside its data

Request = (
    vnode_pb2.TrainRequest
    | vnode_pb2.ForwardRequest
    | vnode_pb2.CollectRequest
    | vnode_pb2.FollowRequest
    | vnode_pb2.DecidedRequest
)

Buffer = bytes | bytearray | memoryview  # of bytes, flat

_FIELD_OF: dict[type[Request], str] = {
    vnode_pb2.TrainRequest: "train",
    vnode_pb2.ForwardRequest: "forward",
    vnode_pb2.CollectRequest: "collect",
    vnode_pb2.FollowRequest: "follow",
    vnode_pb2.DecidedRequest: "decided",
}
_NOTHING = memoryview(b"")
_ID = b"\x08"  # field 1, a varint
_DATA = b"\x7a"  # field 15, with its length
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES_MAX = 10


def request_head(request: Request) -> vnode_pb2.HopFrame:
    """The first frame of a request, but for what is not of the request itself."""
    return vnode_pb2.HopFrame(**{_FIELD_OF[type(request)]: request})  # type: ignore[arg-type]


def request_of(frame: vnode_pb2.HopFrame) -> Request | None:
    """What a frame asks for; None where it does not ask."""
    field = frame.WhichOneof("head")
    if field is None or field == "reply":
        return None
    request: Request = getattr(frame, field)
    return request


def first_frame(head: vnode_pb2.HopFrame, data: memoryview) -> bytes:
    """The frame that begins a request or a reply."""
    raw = head.SerializeToString()
    return b"".join((raw, _DATA, _varint(len(data)), data)) if data else raw


def later_frame(id: int, data: memoryview) -> bytes:
    """A frame that goes on with the payload of `id`; without data it gives `id` up."""
    if not data:
        return b"".join((_ID, _varint(id)))
    return b"".join((_ID, _varint(id), _DATA, _varint(len(data)), data))


def read_frame(raw: bytes) -> tuple[vnode_pb2.HopFrame, memoryview]:
    """A frame without its data, and the data: a view on `raw`.

    Raises:
        MalformedError: no frame, or larger than one may be.
    """
    at, size = _find_data(raw)
    if at > HEAD_BYTES_MAX or size > DATA_BYTES_MAX:
        raise MalformedError(f"a frame of a hop has a head of {at} bytes and {size} of data")
    try:
        frame = vnode_pb2.HopFrame.FromString(raw[:at])
    except DecodeError:
        raise MalformedError("bytes that are no frame of a hop") from None
    return frame, memoryview(raw)[len(raw) - size :] if size else _NOTHING


def _find_data(raw: bytes) -> tuple[int, int]:
    """Where the field `data` begins, or the frame ends; and how many bytes it has."""
    at, end = 0, len(raw)
    while at < end:
        tag = raw[at]
        if tag == _DATA[0]:
            size, begin = _read_varint(raw, at + 1)
            if begin + size != end:
                raise MalformedError("a frame of a hop does not end with its data")
            return at, size
        kind = tag & 7
        at = at + 1 if tag < 0x80 else _read_varint(raw, at)[1]
        if kind == _VARINT:
            _, at = _read_varint(raw, at)
        elif kind == _BYTES:
            size, at = _read_varint(raw, at)
            at += size
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        else:
            raise MalformedError("bytes that are no frame of a hop")
    return end, 0  # where the last field is cut short protobuf says so


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """A varint and where it ends."""
    if at < len(raw) and (byte := raw[at]) < 0x80:  # nearly all of them: a third of the time
        return byte, at + 1
    value = shift = 0
    for byte in raw[at : at + _VARINT_BYTES_MAX]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at + shift // 7
    raise MalformedError("bytes that are no frame of a hop")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
