"""Tensors as bytes: `pb.Tensor` <-> numpy (DESIGN D9). Never a pickle, and no torch.

Nothing is allocated for a peer's tensor before its size is known to be allowed:
the shape's product is bounded first, the payload must then fill it exactly, and
a decompressor never writes past it.

numpy has no bfloat16: such a tensor is an array of uint16 with the same bits,
and only the message's dtype tells.
"""

from __future__ import annotations

import hashlib
import io
import sys
from typing import Any

import numpy as np
import zstandard

from p2pnet.errors import MalformedError
from p2pnet.v1 import common_pb2 as pb

Array = np.ndarray[Any, np.dtype[Any]]

RAW = pb.CODEC_RAW
ZSTD = pb.CODEC_ZSTD
AUTO = pb.CODEC_UNSPECIFIED  # encode() picks one of the lossless codecs

DIMS_MAX = 16
BYTES_MAX = 1 << 30

# The size of the window that every decompressor should have (RFC 8878, section
# 3.1.1.1.2): what a peer can make us allocate beside the tensor itself.
_WINDOW_BYTES_MAX = 8 << 20
_LEVEL = 1
_PROBE_BYTES = 64 << 10
_WORTH_IT = 0.7  # compressed/raw below which zstd costs less time than it saves

_DTYPES: dict[pb.DType, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT64: np.dtype("<f8"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_UINT8: np.dtype("u1"),
    pb.DTYPE_BOOL: np.dtype("bool"),
}
_BY_NAME = {dtype.name: value for value, dtype in _DTYPES.items() if value != pb.DTYPE_BFLOAT16} | {
    "bfloat16": pb.DTYPE_BFLOAT16
}
_NAMES = {value: name for name, value in _BY_NAME.items()}


def encode(array: Array, codec: pb.Codec = AUTO, *, dtype_name: str | None = None) -> pb.Tensor:
    """The message for an array of any layout and byte order.

    `codec` is RAW, ZSTD or AUTO (zstd where a probe says that it saves 30 %).
    `dtype_name` is needed for "bfloat16" only, whose bits the array holds as uint16.

    Raises:
        ValueError: a dtype, codec or number of dimensions that does not travel.
    """
    dtype = _BY_NAME.get(dtype_name or array.dtype.name)
    if dtype is None or _DTYPES[dtype].name != array.dtype.name:
        raise ValueError(f"tensors of {dtype_name or array.dtype.name} do not travel")
    if array.ndim > DIMS_MAX:
        raise ValueError(f"a tensor has at most {DIMS_MAX} dimensions, not {array.ndim}")
    payload = raw_bytes(array)
    if codec == AUTO:
        codec = _probe(payload)
    if codec == ZSTD:
        payload = zstandard.ZstdCompressor(level=_LEVEL).compress(payload)
    elif codec != RAW:
        raise ValueError(f"no codec {codec}")
    return pb.Tensor(
        dtype=dtype,
        shape=array.shape,
        codec=codec,
        payload=payload,
    )


def decode(tensor: pb.Tensor, *, bytes_max: int = BYTES_MAX) -> Array:
    """The array of a message: writable, row-major, its own memory (torch takes it without a copy).

    `bytes_max` bounds the array's size, not the payload's.

    Raises:
        MalformedError: an unknown dtype or codec, too many dimensions, larger
            than `bytes_max`, or a payload that does not fill the shape exactly.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise MalformedError(f"a tensor has the unknown dtype {int(tensor.dtype)}")
    size_bytes = _size_bytes(tensor, dtype.itemsize, bytes_max)
    if tensor.codec == RAW:
        if len(tensor.payload) != size_bytes:
            raise MalformedError(
                f"a tensor of {size_bytes} bytes came with {len(tensor.payload)} bytes"
            )
        buffer = bytearray(tensor.payload)
    elif tensor.codec == ZSTD:
        buffer = _decompress(tensor.payload, size_bytes)
    else:
        raise MalformedError(f"a tensor has the unknown codec {int(tensor.codec)}")
    if tensor.dtype == pb.DTYPE_BOOL and size_bytes and np.frombuffer(buffer, np.uint8).max() > 1:
        raise MalformedError("a tensor of booleans holds bytes other than 0 and 1")
    array: Array = np.frombuffer(buffer, dtype).reshape(tuple(tensor.shape))
    return array if sys.byteorder == "little" else array.astype(dtype.newbyteorder("="))


def dtype_name(tensor: pb.Tensor) -> str:
    """The name of a message's dtype, as `encode` takes it; "?" for one that does not travel."""
    return _NAMES.get(tensor.dtype, "?")


def raw_bytes(array: Array) -> bytes:
    """Little-endian, row-major bytes: what RAW carries and every digest is over."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(order="C")


def digest_of(array: Array) -> bytes:
    """SHA-256 (32 bytes) over the raw bytes; dtype and shape are not part of it."""
    if sys.byteorder == "little" and array.dtype.isnative and array.flags.c_contiguous:
        return hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()  # without a copy
    return hashlib.sha256(raw_bytes(array)).digest()


def _size_bytes(tensor: pb.Tensor, itemsize: int, bytes_max: int) -> int:
    if len(tensor.shape) > DIMS_MAX:
        raise MalformedError(f"a tensor has {len(tensor.shape)} dimensions, at most {DIMS_MAX} go")
    size_bytes = itemsize
    for length in tensor.shape:
        # Python's integers do not overflow, but numpy's do: each length is bounded
        # by itself, for a zero in the shape would hide the others in the product.
        if length > bytes_max:
            raise MalformedError(f"a tensor is larger than the {bytes_max} bytes allowed")
        size_bytes *= length
    if size_bytes > bytes_max:
        raise MalformedError(f"a tensor of {size_bytes} bytes is over the {bytes_max} allowed")
    return size_bytes


def _decompress(payload: bytes, size_bytes: int) -> bytearray:
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


def _probe(payload: bytes) -> pb.Codec:
    if len(payload) < 1024:
        return RAW
    middle = max(0, len(payload) // 2 - _PROBE_BYTES // 2)
    probe = payload[middle : middle + _PROBE_BYTES]
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(probe)
    return ZSTD if len(packed) < _WORTH_IT * len(probe) else RAW
