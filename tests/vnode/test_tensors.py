"""Tensors as bytes: the round trip is exact, and nothing a peer sends costs more than it may."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnet.errors import MalformedError
from p2pnet.v1 import common_pb2 as pb
from p2pnet.vnode import tensors
from p2pnet.vnode.tensors import AUTO, RAW, ZSTD, Array, Buffer, decode, digest_of, encode

NAMES = ["float32", "float64", "float16", "int64", "int32", "uint8", "bool"]


def back_and_forth(array: Array, codec: pb.Codec, **limits: int) -> Array:
    message, payload = encode(array, codec)
    return decode(message, bytes(payload), **limits)


@pytest.mark.parametrize("codec", [RAW, ZSTD, AUTO])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (5, 4, 3)])
def test_what_goes_in_comes_out(name: str, codec: pb.Codec, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).integers(0, 2 if name == "bool" else 100, shape)
    array = np.asarray(values).astype(name)
    back = back_and_forth(array, codec)
    assert back.dtype == array.dtype
    assert back.shape == shape
    assert np.array_equal(back, array)
    assert back.flags.c_contiguous


@pytest.mark.parametrize("codec", [RAW, ZSTD])
def test_layout_and_byte_order_do_not_travel(codec: pb.Codec) -> None:
    array = np.arange(24, dtype=">f4").reshape(4, 6).T
    back = back_and_forth(array, codec)
    assert np.array_equal(back, array)
    assert back.dtype == np.dtype("<f4")
    assert digest_of(array) == digest_of(back)


def test_bfloat16_is_its_bits() -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)
    message, payload = encode(bits, RAW, dtype_name="bfloat16")
    assert message.dtype == pb.DTYPE_BFLOAT16
    assert np.array_equal(decode(message, payload), bits)
    with pytest.raises(ValueError, match="do not travel"):
        encode(bits)  # uint16 alone is no dtype of the protocol
    with pytest.raises(ValueError, match="do not travel"):
        encode(np.zeros(2, np.float32), dtype_name="bfloat16")


def test_the_bytes_are_pinned() -> None:
    array = np.array([[1.0, -2.0]], np.float32)
    _, payload = encode(array, RAW)
    assert payload == bytes.fromhex("0000803f000000c0")
    assert digest_of(array) == hashlib.sha256(payload).digest()


def test_raw_tensors_are_not_copied() -> None:
    array = np.arange(1000, dtype=np.float32)
    message, payload = encode(array, RAW)
    assert np.shares_memory(np.frombuffer(payload, np.uint8), array)
    came = bytearray(payload)
    back = decode(message, came)
    assert np.shares_memory(np.frombuffer(came, np.uint8), back)
    assert back.flags.writeable
    assert not decode(message, bytes(came)).flags.writeable


def test_auto_compresses_what_is_worth_it() -> None:
    noise = np.random.default_rng(2).standard_normal(50_000).astype(np.float32)
    assert encode(noise, AUTO)[0].codec == RAW
    assert encode(np.zeros(50_000, np.float32), AUTO)[0].codec == ZSTD
    assert encode(np.zeros(10, np.float32), AUTO)[0].codec == RAW


def test_no_object_array_travels() -> None:
    with pytest.raises(ValueError, match="do not travel"):
        encode(np.array([object()]))


def message(
    *, payload: Buffer | None = b"\0" * 24, **changes: object
) -> tuple[pb.Tensor, Buffer | None]:
    fields = {"dtype": pb.DTYPE_FLOAT32, "shape": [2, 3], "codec": RAW}
    return pb.Tensor(**(fields | changes)), payload  # type: ignore[arg-type]


BAD = {
    "no dtype": message(dtype=0),
    "dtype of the future": message(dtype=99),
    "no codec": message(codec=0),
    "codec of the future": message(codec=99),
    "17 dimensions": message(shape=[1] * 17, payload=b"\0" * 4),
    "no payload": message(payload=None),
    "a payload inside too": (
        pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1], codec=RAW, payload=b"1234"),
        b"1234",
    ),
    "payload short": message(payload=b"\0" * 23),
    "payload long": message(payload=b"\0" * 25),
    "too large": message(shape=[2**20, 2**20]),
    "product wraps 64 bits": message(shape=[2**63, 2, 6]),
    "a zero hides 2**63": message(shape=[2**63, 0], payload=b""),
    "no zstd": message(codec=ZSTD),
    "empty zstd": message(codec=ZSTD, payload=b""),
    "zstd of less": message(codec=ZSTD, payload=zstandard.compress(b"\0" * 23)),
    "zstd of more": message(codec=ZSTD, payload=zstandard.compress(b"\0" * 25)),
    "zstd cut short": message(codec=ZSTD, payload=zstandard.compress(bytes(range(24)))[:-3]),
    "zstd and then junk": message(codec=ZSTD, payload=zstandard.compress(b"\0" * 24) + b"junk"),
    "two frames too many": message(codec=ZSTD, payload=zstandard.compress(b"\0" * 24) * 2),
    "a bool of 2": message(dtype=pb.DTYPE_BOOL, shape=[2], payload=b"\1\2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tensors_are_refused(name: str) -> None:
    with pytest.raises(MalformedError):
        decode(*BAD[name], bytes_max=1 << 20)


@pytest.mark.parametrize("stated", [True, False])
def test_a_bomb_costs_nothing(stated: bool) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=stated).compress(bytes(200 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(MalformedError):
            decode(*message(codec=ZSTD, payload=bomb), bytes_max=1 << 20)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_limit_is_a_limit() -> None:
    array = np.zeros(256, np.float32)
    for codec in (RAW, ZSTD):
        assert back_and_forth(array, codec, bytes_max=1024).shape == (256,)
        with pytest.raises(MalformedError):
            back_and_forth(array, codec, bytes_max=1023)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(0, 12),
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=18),
    st.integers(0, 4),
    st.binary(max_size=200),
    st.booleans(),
)
def test_garbage_is_malformed_or_fits(
    dtype: int, shape: list[int], codec: int, payload: bytes, pack: bool
) -> None:
    if pack:
        payload = zstandard.compress(payload)
    tensor = pb.Tensor(dtype=dtype, shape=shape, codec=codec)  # type: ignore[arg-type]
    try:
        array = decode(tensor, payload, bytes_max=4096)
    except MalformedError:
        return
    assert array.nbytes <= 4096
    assert list(array.shape) == shape
    if codec in (RAW, ZSTD):
        raw = payload if codec == RAW else zstandard.decompress(payload)
        assert tensors.raw_bytes(array) == raw
