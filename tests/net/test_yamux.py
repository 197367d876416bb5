"""yamux as a pure core: what passes between two ends, its limits, and arbitrary bytes."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from p2pnet.errors import MalformedError
from p2pnet.net.yamux import (
    STREAMS_MAX,
    UNREAD_BYTES_MAX,
    WINDOW_BYTES,
    Changed,
    Event,
    GoneAway,
    Opened,
    Stream,
    Yamux,
)

DATA, CREDIT, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


class Pair:
    """Two ends and the wire between them."""

    def __init__(self) -> None:
        self.a = Yamux(initiator=True)
        self.b = Yamux(initiator=False)

    def pass_all(self) -> list[Event]:
        """Carries everything across, both ways, until nothing is left; what `b` saw."""
        seen: list[Event] = []
        while self.a.outgoing_bytes or self.b.outgoing_bytes:
            seen += self.b.receive(self.a.outgoing())
            self.a.receive(self.b.outgoing())
            self.a.check()
            self.b.check()
        return seen

    def stream(self) -> tuple[Stream, Stream]:
        """A new stream from `a`, as both see it."""
        ours = self.a.open()
        (opened, _) = self.pass_all()
        assert isinstance(opened, Opened)
        return ours, opened.stream


def frame(kind: int, flags: int, stream_id: int, length: int, body: bytes = b"") -> bytes:
    """A frame as the specification draws it."""
    return struct.pack("!BBHII", 0, kind, flags, stream_id, length) + body


def test_the_bytes_are_those_of_the_specification() -> None:
    end = Yamux(initiator=True)
    stream = end.open()
    assert end.write(stream, memoryview(b"hello")) == 5
    end.finish(stream)
    expected = frame(CREDIT, SYN, 1, 0) + frame(DATA, 0, 1, 5, b"hello") + frame(CREDIT, FIN, 1, 0)
    assert end.outgoing() == expected
    other = Yamux(initiator=False)
    assert [type(event) for event in other.receive(expected)] == [Opened, Changed, Changed, Changed]
    assert other.outgoing() == frame(CREDIT, ACK, 1, 0)
    assert other.open().stream_id == 2
    other.outgoing()
    other.receive(frame(PING, SYN, 0, 77))
    assert other.outgoing() == frame(PING, ACK, 0, 77)
    assert other.receive(frame(GO_AWAY, 0, 0, 0)) == [GoneAway()]


def test_bytes_come_in_order_and_then_the_end() -> None:
    pair = Pair()
    ours, theirs = pair.stream()
    pair.a.write(ours, memoryview(b"one"))
    pair.a.write(ours, memoryview(b"two"))
    pair.a.finish(ours)
    pair.pass_all()
    assert theirs.finished_there
    assert (pair.b.read(theirs, 4), pair.b.read(theirs, 9), pair.b.read(theirs, 9)) == (
        b"onet",
        b"wo",
        b"",
    )
    assert pair.b.write(theirs, memoryview(b"still")) == 5
    pair.b.finish(theirs)
    pair.pass_all()
    assert pair.a.read(ours, 9) == b"still"
    with pytest.raises(ValueError, match="ended"):
        pair.a.write(ours, memoryview(b"more"))


def test_nobody_sends_beyond_the_credit_and_small_reads_cost_no_frame() -> None:
    pair = Pair()
    ours, theirs = pair.stream()
    data = memoryview(bytes(WINDOW_BYTES + 1))
    assert pair.a.write(ours, data) == WINDOW_BYTES
    assert pair.a.write(ours, data) == 0
    pair.pass_all()
    assert pair.b.read(theirs, WINDOW_BYTES // 2 - 1)
    assert pair.b.outgoing_bytes == 0
    assert pair.b.read(theirs, 1)
    assert pair.b.outgoing() == frame(CREDIT, 0, 1, WINDOW_BYTES // 2)


def test_megabytes_pass_in_pieces_of_any_size() -> None:
    rng = random.Random(5)
    pair = Pair()
    ours, theirs = pair.stream()
    sent = rng.randbytes(3 << 20)
    got = bytearray()
    left = memoryview(sent)
    while len(got) < len(sent):
        size = pair.a.write(ours, left[: rng.randrange(1, 100_000)])
        left = left[size:]
        pair.pass_all()
        got += pair.b.read(theirs, rng.randrange(1, 200_000))
    assert got == sent


def test_a_reset_ends_both_ends_and_what_had_come_may_be_read() -> None:
    pair = Pair()
    ours, theirs = pair.stream()
    pair.a.write(ours, memoryview(b"last words"))
    pair.a.reset(ours)
    pair.pass_all()
    assert ours.is_reset
    assert theirs.is_reset
    assert pair.b.read(theirs, 99) == b"last words"
    pair.b.reset(theirs)
    assert pair.b.outgoing_bytes == 0, "it is over: nothing to say"
    pair.a.receive(frame(DATA, 0, 1, 3, b"abc") + frame(CREDIT, FIN, 1, 0))  # was under way
    assert pair.a.outgoing_bytes == 0


def test_streams_beyond_the_limit_are_reset_and_others_make_room() -> None:
    pair = Pair()
    streams = [pair.a.open() for _ in range(STREAMS_MAX + 1)]
    pair.pass_all()
    assert [stream.is_reset for stream in streams] == [False] * STREAMS_MAX + [True]
    pair.a.reset(streams[0])
    pair.pass_all()
    one_more = pair.a.open()
    pair.pass_all()
    assert not one_more.is_reset


@pytest.mark.parametrize(
    "data",
    [
        b"\x01" + frame(PING, SYN, 0, 0)[1:],
        frame(4, 0, 0, 0),
        frame(DATA, SYN, 1, WINDOW_BYTES + 1),
        frame(CREDIT, SYN, 2, 0),
        frame(CREDIT, SYN, 0, 0),
        frame(CREDIT, SYN, 1, 0) * 2,
        frame(DATA, SYN, 1, WINDOW_BYTES, bytes(WINDOW_BYTES)) + frame(DATA, 0, 1, 1, b"x"),
        frame(CREDIT, SYN, 1, 0) + frame(CREDIT, 0, 1, (1 << 32) - 1) * 2,
        frame(PING, SYN, 0, 0) * 100_000,
        b"".join(
            frame(DATA, SYN, 2 * n + 1, WINDOW_BYTES, bytes(WINDOW_BYTES))
            for n in range(UNREAD_BYTES_MAX // WINDOW_BYTES + 1)
        ),
    ],
    ids=["version", "type", "frame", "our id", "id 0", "twice", "window", "credit", "pings",
         "unread"],
)  # fmt: skip
def test_what_no_honest_peer_sends(data: bytes) -> None:
    with pytest.raises(MalformedError):
        Yamux(initiator=False).receive(data)


@seed(1)
@settings(max_examples=500, deadline=None, database=None)
@given(st.lists(st.binary(max_size=80), max_size=5))
def test_any_bytes_are_taken_or_malformed(pieces: list[bytes]) -> None:
    end = Yamux(initiator=False)
    end.open()
    for piece in pieces:
        try:
            end.receive(piece)
        except MalformedError:
            return
        end.check()


KINDS = st.sampled_from([DATA, CREDIT, PING])
FLAGS = st.integers(0, 15)


@seed(2)
@settings(max_examples=500, deadline=None, database=None)
@given(st.lists(st.tuples(KINDS, FLAGS, st.integers(0, 5), st.integers(0, 30)), max_size=30))
def test_any_frames_are_taken_or_malformed(frames: list[tuple[int, int, int, int]]) -> None:
    end = Yamux(initiator=False)
    streams = [end.open(), end.open()]
    for kind, flags, stream_id, length in frames:
        body = bytes(length) if kind == DATA else b""
        try:
            events = end.receive(frame(kind, flags, stream_id, length, body))
        except MalformedError:
            return
        end.check()
        streams += [event.stream for event in events if isinstance(event, Opened)]
        for stream in streams:
            end.read(stream, 7)
        end.check()
    for stream in streams:
        end.reset(stream)
    assert end._unread == 0
    end.check()
