"""Framing: known vectors, every way of cutting a stream, and limits that hold early."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnet.errors import MalformedError
from p2pnet.net.varint import Unframer, encode_varint, frame


# The examples of github.com/multiformats/unsigned-varint, and the ends.
@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (127, "7f"),
        (128, "8001"),
        (255, "ff01"),
        (300, "ac02"),
        (16384, "808001"),
        ((1 << 63) - 1, "ffffffffffffffff7f"),
    ],
)
def test_known_varints(value: int, encoded: str) -> None:
    assert encode_varint(value).hex() == encoded


@pytest.mark.parametrize("value", [-1, 1 << 63])
def test_out_of_range(value: int) -> None:
    with pytest.raises(ValueError, match="varint"):
        encode_varint(value)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    messages=st.lists(st.binary(max_size=300), max_size=6),
    cuts=st.lists(st.integers(0, 2000), max_size=12),
)
def test_messages_survive_any_cutting(messages: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(frame(message) for message in messages)
    unframer, got, at = Unframer(300), [], 0
    for cut in [*sorted(min(cut, len(wire)) for cut in cuts), len(wire)]:
        got += unframer.feed(wire[at:cut])
        at = cut
    assert got == messages


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary(max_size=64))
def test_garbage_raises_malformed_and_nothing_else(data: bytes) -> None:
    try:
        messages = Unframer(32).feed(data)
    except MalformedError:
        return
    assert sum(map(len, messages)) < max(1, len(data))


def test_the_limit_is_checked_at_the_length() -> None:
    assert Unframer(10).feed(frame(b"x" * 10)) == [b"x" * 10]
    with pytest.raises(MalformedError, match="11 bytes"):
        Unframer(10).feed(encode_varint(11))


def test_a_length_without_end_is_refused() -> None:
    unframer = Unframer(10)
    assert unframer.feed(b"\xff" * 8) == []
    with pytest.raises(MalformedError, match="no varint"):
        unframer.feed(b"\xff")
