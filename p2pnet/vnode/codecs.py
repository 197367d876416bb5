"""Codecs of tensors on the wire: flat arrays <-> bytes, and which one to take.

raw    little-endian, row-major
zstd   the same, compressed (RFC 8878)
fp16   of float32: IEEE half precision, little-endian; relative error at most 2**-11
       (below 2**-14 absolute, 2**-25). What does not fit a half is an error.
int8   of float32, in blocks of 256 values (the last may have fewer): a float32 scale,
       little-endian, then a signed byte q for each value, which is q * scale. With
       absmax the block's largest magnitude the scale is absmax / 127, rounded up to 17
       significant bits: so every q * scale is exact, and encoding what was decoded
       changes nothing. Error at most 0.501 scale, that is 0.4 % of absmax. Blockwise
       absmax quantisation is Dettmers et al., "8-bit Optimizers" (2022), section 2.1.

fp16 and int8 lose something, so a network asks for them; of tensors that are not float32
they are raw. `through` says what the receiver will have. Nothing is allocated for a
peer's payload before its size is known to be allowed.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import zstandard

from p2pnet.errors import MalformedError, UsageError
from p2pnet.net.hop_frames import Buffer
from p2pnet.v1 import common_pb2 as pb

Array = np.ndarray[Any, np.dtype[Any]]

RAW = pb.CODEC_RAW
ZSTD = pb.CODEC_ZSTD
FP16 = pb.CODEC_FP16
INT8 = pb.CODEC_INT8
AUTO = pb.CODEC_UNSPECIFIED  # one of the lossless codecs, whichever is quicker

BY_NAME = {"auto": AUTO, "raw": RAW, "zstd": ZSTD, "fp16": FP16, "int8": INT8}
LOSSY = ("fp16", "int8")

BLOCK = 256  # values, of int8
_BLOCK_TYPE = np.dtype([("scale", "<f4"), ("values", "i1", (BLOCK,))])
_SCALE_BYTES = 4
_LOW_BITS = np.uint32(0x7F)  # of a float32's 24 significant ones, which leaves 17
_HALF_MAX = 65504.0

# The size of the window that every decompressor should have (RFC 8878, section
# 3.1.1.1.2): what a peer can make us allocate beside the tensor itself.
_WINDOW_BYTES_MAX = 8 << 20
_LEVEL = 1
_FLOAT32 = np.dtype("<f4")


def codec_of(name: str) -> pb.Codec:
    """The codec of that name in a spec; "" is "auto"."""
    return BY_NAME[name or "auto"]


def applies(codec: pb.Codec, dtype: np.dtype[Any]) -> bool:
    """Whether a codec carries tensors of a dtype."""
    return codec in (RAW, ZSTD) or (codec in (FP16, INT8) and dtype == _FLOAT32)


def through(array: Array, codec: str) -> Array:
    """The array as a receiver will have it: decoded from what it is encoded to.

    Raises:
        UsageError: the codec cannot carry a value in it.
    """
    chosen = codec_of(codec)
    if chosen not in (FP16, INT8) or array.dtype != _FLOAT32:
        return array
    payload = pack(flat(array), chosen)
    return unpack(payload, chosen, _FLOAT32, array.nbytes).reshape(array.shape)


def flat(array: Array) -> Array:
    """Little-endian and in one dimension, row-major; a view where that is how it is."""
    little = array if _is_little(array.dtype) else array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(little).reshape(-1)


def pack(values: Array, codec: pb.Codec) -> Buffer:
    """The bytes of a flat array, which the codec applies to; raw ones are a view.

    Raises:
        UsageError: the codec cannot carry a value in it.
    """
    if codec == RAW:
        return values.view(np.uint8).data if values.size else b""
    if codec == ZSTD:
        packed: bytes = zstandard.ZstdCompressor(level=_LEVEL).compress(values.view(np.uint8).data)
        return packed
    if codec == FP16:
        return _to_half(values)
    if codec == INT8:
        return _to_bytes(values)
    raise ValueError(f"no codec {codec}")


def unpack(payload: Buffer, codec: pb.Codec, dtype: np.dtype[Any], size_bytes: int) -> Array:
    """The flat array of `size_bytes` that a payload holds. Raw ones are a view on it.

    Raises:
        MalformedError: a codec that does not apply, or not exactly one such array.
    """
    if not applies(codec, dtype):
        raise MalformedError(f"a tensor of {dtype.name} has the codec {int(codec)}")
    if codec == ZSTD:
        return np.frombuffer(_decompress(payload, size_bytes), dtype)
    expected_bytes = packed_bytes(size_bytes, codec)
    if len(payload) != expected_bytes:
        raise MalformedError(
            f"a tensor of {size_bytes} bytes came as {len(payload)}, not {expected_bytes}"
        )
    if codec == RAW:
        return np.frombuffer(payload, dtype)
    if codec == FP16:
        return np.frombuffer(payload, "<f2").astype(dtype)
    return _from_bytes(payload, size_bytes // dtype.itemsize)


def packed_bytes(size_bytes: int, codec: pb.Codec) -> int:
    """How large the payload of so many raw bytes is; of zstd, at most (its compressBound)."""
    if codec == FP16:
        return size_bytes // 2
    if codec == INT8:
        values = size_bytes // _FLOAT32.itemsize
        return values + _SCALE_BYTES * -(-values // BLOCK)
    if codec == ZSTD:
        return size_bytes + (size_bytes >> 8) + (128 << 10)
    return size_bytes


def _is_little(dtype: np.dtype[Any]) -> bool:
    return dtype.byteorder in "<|" or (dtype.isnative and sys.byteorder == "little")


def _to_half(values: Array) -> Buffer:
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        worst = _worst(values)
        raise UsageError(
            f"a tensor holds {worst:g}, and fp16 carries no more than {_HALF_MAX:g}: choose "
            "another codec for it"
        )
    return _bytes_of(halves)


def _to_bytes(values: Array) -> Buffer:
    blocks, tail = divmod(values.size, BLOCK)
    padded = np.zeros((blocks + bool(tail), BLOCK), _FLOAT32)
    padded.reshape(-1)[: values.size] = values
    absmax = np.maximum(padded.max(axis=1, initial=0.0), -padded.min(axis=1, initial=0.0))
    bits = (absmax / np.float32(127)).view(np.uint32)
    scales = ((bits + _LOW_BITS) & ~_LOW_BITS).view(_FLOAT32)
    with np.errstate(over="ignore", invalid="ignore"):
        fits = np.isfinite(scales * np.float32(127)).all()
    if not fits:
        raise UsageError(
            f"a tensor holds {_worst(values):g}, which int8 does not carry: choose another "
            "codec for it"
        )
    out = np.empty(len(padded), _BLOCK_TYPE)
    out["scale"] = scales
    padded /= np.where(scales > 0, scales, np.float32(1))[:, None]
    out["values"] = np.clip(np.rint(padded, out=padded), -127, 127, out=padded)
    return _bytes_of(out)[: packed_bytes(values.nbytes, INT8)]


def _from_bytes(payload: Buffer, count: int) -> Array:
    blocks, tail = divmod(count, BLOCK)
    out = np.empty(count, _FLOAT32)
    whole = np.frombuffer(payload, _BLOCK_TYPE, blocks)
    body = out[: blocks * BLOCK].reshape(blocks, BLOCK)
    np.multiply(whole["values"], _checked(whole["scale"])[:, None], out=body)
    if tail:
        at = blocks * _BLOCK_TYPE.itemsize
        scale = _checked(np.frombuffer(payload, "<f4", 1, at))
        last = np.frombuffer(payload, "i1", tail, at + _SCALE_BYTES)
        np.multiply(last, scale[0], out=out[blocks * BLOCK :])
    return out


def _checked(scales: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        if not (np.isfinite(scales * np.float32(128)) & (scales >= 0)).all():
            raise MalformedError("a tensor in int8 has a scale that cannot be")
    return scales


def _worst(values: Array) -> float:
    wrong = values[~np.isfinite(values)]
    return float(wrong[0]) if wrong.size else float(values[np.abs(values).argmax()])


def _bytes_of(array: Array) -> memoryview:
    return array.view(np.uint8).reshape(-1).data if array.size else memoryview(b"")


def _decompress(payload: Buffer, size_bytes: int) -> bytearray:
    """Exactly `size_bytes` bytes out of zstd frames, or MalformedError."""
    wrong = MalformedError(f"a compressed tensor does not hold its {size_bytes} bytes")
    try:
        # Bounded before the buffer: a frame that states its size is refused for free.
        stated = zstandard.frame_content_size(payload)
        if stated not in (-1, size_bytes):
            raise wrong
        buffer = bytearray(size_bytes)
        view = memoryview(buffer)
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX)
        with decompressor.stream_reader(io.BytesIO(payload), read_across_frames=True) as reader:
            filled = 0
            while filled < size_bytes:
                count = reader.readinto(view[filled:])
                if count == 0:
                    raise wrong
                filled += count
            if reader.read(1):
                raise wrong
    except zstandard.ZstdError:
        raise wrong from None
    view.release()
    return buffer
