"""Tensors as bytes: a `pb.Tensor` and a payload <-> numpy (DESIGN D9). Never a pickle, no torch.

The payload travels beside the message, so that nothing has to copy it. Nothing is
allocated for a peer's tensor before its size is known to be allowed: the shape's product
is bounded first, the payload must then fill it exactly, and a decompressor never writes
past it.

numpy has no bfloat16: such a tensor is an array of uint16 with the same bits,
and only the message's dtype tells.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy as np

from p2pnet.errors import MalformedError
from p2pnet.net.hop_frames import Buffer
from p2pnet.v1 import common_pb2 as pb
from p2pnet.vnode.codecs import AUTO, FP16, INT8, RAW, ZSTD, Array, applies, flat, pack, unpack

__all__ = [
    "AUTO", "BYTES_MAX", "DIMS_MAX", "FP16", "INT8", "RAW", "ZSTD", "Array", "Buffer",
    "decode", "digest_of", "dtype_name", "encode", "probe", "raw_bytes", "raw_size",
]  # fmt: skip

DIMS_MAX = 16
BYTES_MAX = 1 << 30

_PROBE_BYTES = 64 << 10
_PROBE_BYTES_MIN = 1024
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
# A dtype makes up its name anew each time, which was most of what `encode` took.
_BY_DTYPE = {dtype: value for value, dtype in _DTYPES.items() if value != pb.DTYPE_BFLOAT16}


def encode(
    array: Array, codec: pb.Codec = RAW, *, dtype_name: str | None = None
) -> tuple[pb.Tensor, Buffer]:
    """The message for an array of any layout and byte order, and its payload beside it.

    `codec` AUTO is zstd where a probe says that it saves 30 %; a lossy one is RAW where it
    does not apply. With RAW the payload is a view on a contiguous array, and must not
    outlive its contents. `dtype_name` is needed for "bfloat16" only, whose bits the array
    holds as uint16.

    Raises:
        ValueError: a dtype, codec or number of dimensions that does not travel.
        UsageError: a value that the codec does not carry.
    """
    dtype = None if dtype_name else _BY_DTYPE.get(array.dtype)
    if dtype is None:
        dtype = _BY_NAME.get(dtype_name or array.dtype.name)
        if dtype is None or _DTYPES[dtype].name != array.dtype.name:
            raise ValueError(f"tensors of {dtype_name or array.dtype.name} do not travel")
    if array.ndim > DIMS_MAX:
        raise ValueError(f"a tensor has at most {DIMS_MAX} dimensions, not {array.ndim}")
    values = flat(array)
    if codec == AUTO:
        codec = ZSTD if probe(values)[1] < _WORTH_IT else RAW
    elif codec in (FP16, INT8) and not applies(codec, values.dtype):
        codec = RAW
    return pb.Tensor(dtype=dtype, shape=array.shape, codec=codec), pack(values, codec)


def decode(tensor: pb.Tensor, payload: Buffer | None, *, bytes_max: int = BYTES_MAX) -> Array:
    """The array of a message and its payload, row-major.

    A RAW one is a view on the payload, and writable if that is; others have their own
    memory. `bytes_max` bounds the array's size, not the payload's.

    Raises:
        MalformedError: an unknown dtype or codec, too many dimensions, larger than
            `bytes_max`, or a payload that does not fill the shape exactly or is not there.
    """
    size_bytes = raw_size(tensor, bytes_max)
    if payload is None:
        payload = b""
    if tensor.payload:
        raise MalformedError("a tensor has a payload in its message too")
    dtype = _DTYPES[tensor.dtype]
    values = unpack(payload, tensor.codec, dtype, size_bytes)
    if tensor.dtype == pb.DTYPE_BOOL and size_bytes and values.view(np.uint8).max() > 1:
        raise MalformedError("a tensor of booleans holds bytes other than 0 and 1")
    array = values.reshape(tuple(tensor.shape))
    return array if sys.byteorder == "little" else array.astype(dtype.newbyteorder("="))


def raw_size(tensor: pb.Tensor, bytes_max: int = BYTES_MAX) -> int:
    """How many bytes the array of a message takes, by its head alone.

    Raises:
        MalformedError: an unknown dtype, too many dimensions, or more than `bytes_max`.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise MalformedError(f"a tensor has the unknown dtype {int(tensor.dtype)}")
    return _size_bytes(tensor, dtype.itemsize, bytes_max)


def probe(values: Array) -> tuple[int, float]:
    """Compresses the middle of a flat array: how many bytes of it, and to which part."""
    raw = values.view(np.uint8).data if values.size else memoryview(b"")
    if len(raw) < _PROBE_BYTES_MIN:
        return len(raw), 1.0
    middle = max(0, len(raw) // 2 - _PROBE_BYTES // 2)
    part = raw[middle : middle + _PROBE_BYTES]
    return len(part), len(pack(np.frombuffer(part, np.uint8), ZSTD)) / len(part)


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
