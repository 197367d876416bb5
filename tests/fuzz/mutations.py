"""What to send to a parser: valid samples made wrong, by bytes, by fields, by values.

Three depths, since each gets past other checks: bytes (bits flipped, cut off, spliced,
lengths that lie), protobuf fields (dropped, repeated, nested, re-typed, with the lengths
around them put right), and values (extremes put into a well-formed message, which can
then be signed anew). Everything comes from the `random.Random` that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from p2pnet.net.varint import encode_varint

M = TypeVar("M", bound=Message)
Field = tuple[int, int, bytes]  # number, wire type, the value without its length

FRAME_BYTES_MAX = 8 << 10
HUGE = (0x7F, 0x80, 0xFF, 1 << 14, 1 << 20, (1 << 30) + 1, (1 << 31) - 1, 1 << 31, 1 << 32,
        (1 << 62) + 7, (1 << 63) - 1)  # fmt: skip
OVERLONG = (b"\x80" * 9 + b"\x01", b"\xff" * 10, b"\x80" * 20, b"\xff" * 9 + b"\x7f", b"\x80\x00")
TEXTS = ("", "\0", "x" * 70, "x" * 600, "\u202e", "é\n", "/", "../../etc", "\U0001f4a5" * 20, " ")


def mutated(rng: Random, samples: Sequence[bytes]) -> bytes:
    """One sample made wrong by one to four mutations, or bytes that never were one."""
    if rng.random() < 0.04:
        return rng.randbytes(rng.choice((0, 1, 2, 9, 64, 300, 2000)))
    data = rng.choice(samples)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        by_field = rng.random() < 0.6
        data = _by_field(rng, data, samples) if by_field else _by_bytes(rng, data, samples)
    return data[:FRAME_BYTES_MAX]


def scrambled(rng: Random, message: M) -> M:
    """A copy with extremes in one to three of its fields, of nested messages too."""
    out = type(message)()
    out.CopyFrom(message)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _scramble(rng, out, 3)
    return out


# Bytes


def _by_bytes(rng: Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(8):
        case 0:  # a bit
            if not data:
                return b"\x00"
            at = rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:  # the head of one and the tail of another
            other = rng.choice(samples)
            return data[:at] + other[rng.randrange(len(other) + 1) :]
        case 3:
            return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[at:]
        case 4:
            return data[:at] + encode_varint(rng.choice(HUGE)) + data[at + 1 :]
        case 5:
            return data[:at] + rng.choice(OVERLONG) + data[at + 1 :]
        case 6:  # a piece again and again
            piece = data[at : at + rng.choice((1, 4, 40))]
            return data[:at] + piece * rng.choice((2, 20, 70)) + data[at:]
        case _:
            return data[:at] + data[at + rng.choice((1, 2, 16)) :]


# Fields


@lru_cache(maxsize=4096)
def fields_of(data: bytes) -> tuple[Field, ...] | None:
    """The fields of protobuf bytes; None where they are none."""
    out: list[Field] = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29 or kind not in (0, 1, 2, 5):
            return None
        if kind == 0:
            start = at
            _, at = _varint(data, at)
            value = data[start:at]
        else:
            size = {1: 8, 5: 4}.get(kind, 0)
            if kind == 2:
                size, at = _varint(data, at)
            value = data[at : at + size]
            at += size
        if at > len(data):
            return None
        out.append((number, kind, value))
    return tuple(out)


def bytes_of(fields: Sequence[Field]) -> bytes:
    """The inverse of `fields_of`."""
    out = bytearray()
    for number, kind, value in fields:
        out += encode_varint(number << 3 | kind)
        if kind == 2:
            out += encode_varint(len(value))
        out += value
    return bytes(out)


def nested(rng: Random, number: int) -> bytes:
    """Messages in messages, deeper than any parser should follow."""
    data = b""
    for _ in range(rng.choice((5, 101, 300))):
        data = encode_varint(number << 3 | 2) + encode_varint(len(data)) + data
    return data


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
        shift += 7
    return 0, len(data) + 1


def _by_field(rng: Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    found = fields_of(data)
    if not found:
        return _by_bytes(rng, data, samples)
    fields = list(found)
    at = rng.randrange(len(fields))
    number, kind, value = fields[at]
    match rng.randrange(9):
        case 0:
            del fields[at]
        case 1:
            fields[at:at] = [fields[at]] * rng.choice((1, 2, 30, 70))
        case 2:
            other = rng.randrange(len(fields))
            fields[at], fields[other] = fields[other], fields[at]
        case 3 if kind == 2:  # inside, with the lengths around it put right
            fields[at] = (number, kind, _by_field(rng, value, samples))
        case 4 if kind == 2:
            size = rng.choice((0, 1, 33, 63, 65, 513, 4000))
            fields[at] = (number, kind, (value + bytes(size))[:size])
        case 5:  # the length lies
            lie = encode_varint(rng.choice((*HUGE, len(value) + 1, max(0, len(value) - 1))))
            head = bytes_of(fields[:at])
            return head + encode_varint(number << 3 | 2) + lie + value + bytes_of(fields[at + 1 :])
        case 6:
            fields.insert(at, (rng.choice((number, 15, 99, (1 << 29) - 1)), 2, nested(rng, 1)))
        case 7:  # one that nobody knows, or a group, which nobody sends
            unknown = rng.choice((b"\x0b", b"\x0c", b"\xa2\x06\x03abc", b"\x07", b"\x0b" * 120))
            return bytes_of(fields[:at]) + unknown + bytes_of(fields[at:])
        case _:
            fields[at] = (number, 0, rng.choice((*map(encode_varint, HUGE), *OVERLONG)))
    return bytes_of(fields)


# Values


def _scramble(rng: Random, message: Message, depth: int) -> None:
    field = rng.choice(message.DESCRIPTOR.fields)
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        _scramble_message(rng, message, field, depth)
    elif field.is_repeated:
        values = getattr(message, field.name)
        if values and rng.random() < 0.5:
            values[rng.randrange(len(values))] = _extreme(rng, field)
        else:
            values.extend(_extreme(rng, field) for _ in range(rng.choice((1, 2, 17, 40))))
    elif rng.random() < 0.15:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _extreme(rng, field))


def _scramble_message(rng: Random, message: Message, field: FieldDescriptor, depth: int) -> None:
    if field.message_type.GetOptions().map_entry:
        _scramble_map(rng, getattr(message, field.name), field, depth)
    elif field.is_repeated:
        inner = getattr(message, field.name)
        if not inner or rng.random() < 0.2:
            for _ in range(rng.choice((1, 2, 21, 33))):
                inner.add()
        elif depth:
            _scramble(rng, inner[rng.randrange(len(inner))], depth - 1)
    elif depth and rng.random() < 0.8:
        _scramble(rng, getattr(message, field.name), depth - 1)
    else:
        message.ClearField(field.name)


def _scramble_map(rng: Random, inner: Any, field: FieldDescriptor, depth: int) -> None:
    key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    chosen = rng.choice((*sorted(inner), _extreme(rng, key)))
    if chosen in inner and rng.random() < 0.2:
        del inner[chosen]
    elif value.type == FieldDescriptor.TYPE_MESSAGE:  # asking for one puts it there
        if depth:
            _scramble(rng, inner[chosen], depth - 1)
    else:
        inner[chosen] = _extreme(rng, value)


def _extreme(rng: Random, field: FieldDescriptor) -> object:
    bits = {
        FieldDescriptor.TYPE_UINT32: 32,
        FieldDescriptor.TYPE_UINT64: 64,
        FieldDescriptor.TYPE_INT32: 31,
        FieldDescriptor.TYPE_INT64: 63,
        FieldDescriptor.TYPE_ENUM: 31,
    }
    match field.type:
        case FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.choice((0, 1, 31, 32, 33, 64, 65, 600)))
        case FieldDescriptor.TYPE_STRING:
            return rng.choice(TEXTS)
        case FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
            return rng.choice((float("nan"), float("inf"), -float("inf"), -0.0, -1.0, 3e38))
    top = (1 << bits[field.type]) - 1
    return rng.choice((0, 1, 2, 7, top, top - 1, min(top, 1 << 20), rng.randrange(top)))
