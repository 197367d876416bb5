"""Codecs: what is lost is bounded, what is sent is what `through` says, peers cost nothing."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnet.errors import MalformedError, UsageError
from p2pnet.v1 import common_pb2 as pb
from p2pnet.vnode import codecs
from p2pnet.vnode.codecs import BLOCK, BY_NAME, FP16, INT8, LOSSY, RAW, Array, through
from p2pnet.vnode.tensors import decode, encode

SIZES = (0, 1, 255, 256, 257, 1000, 4096)


def noise(size: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(size).standard_normal(size) * scale).astype(np.float32)


def sent(array: Array, codec: str) -> Array:
    message, payload = encode(array, codecs.codec_of(codec))
    assert message.codec == BY_NAME[codec]
    assert len(payload) == codecs.packed_bytes(array.nbytes, message.codec)
    return decode(message, bytes(payload))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("size", SIZES)
def test_through_is_what_a_receiver_has(codec: str, size: int) -> None:
    array = noise(size)
    assert through(array, codec).tobytes() == sent(array, codec).tobytes()
    again = through(through(array, codec), codec)
    assert again.tobytes() == through(array, codec).tobytes()


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-6e4, max_value=6e4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(floats, max_size=3 * BLOCK))
def test_errors_are_bounded_and_happen_once(values: list[float]) -> None:
    array = np.array(values, np.float32)
    half = through(array, "fp16")
    assert (np.abs(half - array) <= np.maximum(np.abs(array) * 2.0**-11, 2.0**-25)).all()
    assert half.tobytes() == through(half, "fp16").tobytes()
    eight = through(array, "int8")
    for at in range(0, array.size, BLOCK):
        block = array[at : at + BLOCK].astype(np.float64)
        absmax = np.abs(block).max()
        error = np.abs(eight[at : at + BLOCK] - block).max()
        assert error <= absmax / 127 * 0.501 + 127 * 2.0**-142
    assert eight.tobytes() == through(eight, "int8").tobytes()


def test_the_bytes_of_int8_are_pinned() -> None:
    array = np.zeros(BLOCK + 2, np.float32)
    array[0], array[1], array[BLOCK] = 127.0, -1.0, -2.0
    _, payload = encode(array, INT8)
    assert len(payload) == 4 + BLOCK + 4 + 2
    assert bytes(payload[:6]) == struct.pack("<fbb", 1.0, 127, -1)
    scale, first, second = struct.unpack("<fbb", bytes(payload[4 + BLOCK :]))
    assert (first, second) == (-127, 0)
    assert scale == pytest.approx(2 / 127, rel=2**-16)
    assert scale * 127 >= 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_not_finite_is_refused_by_the_sender(codec: str, bad: float) -> None:
    array = noise(300)
    array[270] = bad
    with pytest.raises(UsageError, match="choose another codec"):
        through(array, codec)
    assert np.array_equal(sent(array, "raw"), array, equal_nan=True)


def test_what_a_half_does_not_hold_is_named() -> None:
    array = noise(10)
    array[3] = -70_000
    with pytest.raises(UsageError, match=r"-70000, and fp16 carries no more than 65504"):
        through(array, "fp16")
    assert through(array, "int8")[3] == pytest.approx(-70_000, rel=1e-4)
    with pytest.raises(UsageError, match="int8"):
        through(np.full(3, np.finfo(np.float32).max), "int8")


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("name", ["int64", "float64", "bool"])
def test_other_dtypes_are_never_changed(codec: str, name: str) -> None:
    array = np.arange(300).astype(name)
    assert through(array, codec) is array
    message, payload = encode(array, BY_NAME[codec])
    assert message.codec == RAW
    assert np.array_equal(decode(message, payload), array)


def lying(payload: bytes, codec: pb.Codec, count: int, dtype: int = pb.DTYPE_FLOAT32) -> None:
    tensor = pb.Tensor(dtype=dtype, shape=[count], codec=codec)  # type: ignore[arg-type]
    with pytest.raises(MalformedError):
        decode(tensor, payload, bytes_max=1 << 20)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3.3e38])
def test_scales_that_cannot_be(scale: float) -> None:
    lying(struct.pack("<f", scale) + b"\x7f" * 3, INT8, 3)
    lying(struct.pack("<f", scale) + b"\x7f" * BLOCK, INT8, BLOCK)


def test_payloads_of_another_size() -> None:
    for count in (1, 255, 256, 257):
        for codec in (FP16, INT8):
            right = codecs.packed_bytes(4 * count, codec)
            lying(b"\0" * (right - 1), codec, count)
            lying(b"\0" * (right + 1), codec, count)
    lying(b"\0" * 6, FP16, 3, pb.DTYPE_INT32)
    lying(b"\0" * 7, INT8, 3, pb.DTYPE_FLOAT16)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([FP16, INT8]), st.integers(0, 600), st.binary(max_size=1300), st.booleans())
def test_garbage_is_malformed_or_fits(
    codec: pb.Codec, count: int, payload: bytes, fit: bool
) -> None:
    if fit:
        size = codecs.packed_bytes(4 * count, codec)
        payload = (payload * (size // max(len(payload), 1) + 1))[:size].ljust(size, b"\1")
    tensor = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[count], codec=codec)
    try:
        array = decode(tensor, payload)
    except MalformedError:
        return
    assert array.shape == (count,)
    if codec == INT8:
        assert np.isfinite(array).all()
