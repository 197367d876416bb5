"""yamux: many streams over one connection. Pure: bytes in, events and bytes out.

The protocol is that of github.com/hashicorp/yamux/blob/master/spec.md, as
github.com/libp2p/specs/tree/master/yamux has it: frames of 12 bytes of header, a
credit of 256 KiB a stream and direction, renewed here when half of it is used up.
Its caller reads and writes the connection, and wakes who waits on a stream.

py-libp2p's own muxer sends a credit frame for every read and breaks the connection
where a write is cancelled; with this one a request takes a quarter of the time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from p2pnet.errors import MalformedError

WINDOW_BYTES = 256 << 10
UNREAD_BYTES_MAX = 4 << 20  # over all streams of a connection
OUTGOING_BYTES_MAX = 1 << 20  # a peer that makes us answer more than it reads is cut off
STREAMS_MAX = 256  # that the peer has opened; more are reset
_DATA_BYTES_MAX = 65_507  # with its header just one Noise message
_CREDIT_MAX = 1 << 32

_HEADER = struct.Struct("!BBHII")  # version, type, flags, stream, length
_DATA, _CREDIT, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8


class Stream:
    """The state of one stream. Read by the caller, changed by `Yamux` alone."""

    __slots__ = (
        "_consumed",
        "_inbox",
        "_may_receive",
        "_may_send",
        "finished_here",
        "finished_there",
        "is_reset",
        "stream_id",
    )

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id
        self.finished_here = False  # we write no more
        self.finished_there = False  # the peer writes no more
        self.is_reset = False  # ended both ways at once, by either
        self._inbox = bytearray()
        self._may_send = WINDOW_BYTES
        self._may_receive = WINDOW_BYTES
        self._consumed = 0  # read since the peer's credit was renewed


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer has opened a stream."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class Changed:
    """There is more to read on a stream, or more may be written, or it has ended."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer ends the connection."""


Event = Opened | Changed | GoneAway


class Yamux:
    """One end of a connection. `initiator`: the one that dialled."""

    def __init__(self, *, initiator: bool) -> None:
        self._next_id = 1 if initiator else 2
        self._streams: dict[int, Stream] = {}
        self._of_peer = 0  # how many of them the peer has opened
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._unread = 0

    # Bytes of the connection

    def receive(self, data: bytes) -> Sequence[Event]:
        """Takes what has come.

        Raises:
            MalformedError: not yamux, or over a limit; the connection is of no use any more.
        """
        self._incoming += data
        events: list[Event] = []
        at, end = 0, len(self._incoming)
        while end - at >= _HEADER.size:
            version, kind, flags, stream_id, length = _HEADER.unpack_from(self._incoming, at)
            if version != 0 or kind > _GO_AWAY:
                raise MalformedError(f"no yamux frame: version {version}, type {kind}")
            body = at + _HEADER.size
            if kind == _DATA:
                if length > WINDOW_BYTES:
                    raise MalformedError(f"a yamux frame of {length} bytes")
                if end - body < length:
                    break
                at = body + length
                self._stream_frame(stream_id, flags, 0, bytes(self._incoming[body:at]), events)
                continue
            at = body
            if kind == _CREDIT:
                self._stream_frame(stream_id, flags, length, b"", events)
            elif kind == _GO_AWAY:
                events.append(GoneAway())
            elif flags & _SYN:
                self._queue(_PING, _ACK, 0, length)
        del self._incoming[:at]
        if len(self._outgoing) > OUTGOING_BYTES_MAX:
            raise MalformedError("a peer that takes no answers")
        return events

    def outgoing(self) -> bytes:
        """Takes what is to be sent, in this order."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    @property
    def outgoing_bytes(self) -> int:
        """How much waits to be sent."""
        return len(self._outgoing)

    # Streams

    def open(self) -> Stream:
        """A new stream to the peer."""
        stream = self._streams[self._next_id] = Stream(self._next_id)
        self._next_id += 2
        self._queue(_CREDIT, _SYN, stream.stream_id, 0)
        return stream

    def write(self, stream: Stream, data: memoryview) -> int:
        """Queues as much of `data` as the peer's credit allows; how many bytes that was."""
        if stream.is_reset or stream.finished_here:
            raise ValueError("a stream that was ended is written to")
        size = min(len(data), stream._may_send)
        stream._may_send -= size
        for at in range(0, size, _DATA_BYTES_MAX):
            piece = data[at : min(at + _DATA_BYTES_MAX, size)]
            self._queue(_DATA, 0, stream.stream_id, len(piece))
            self._outgoing += piece
        return size

    def read(self, stream: Stream, bytes_max: int) -> bytes:
        """Takes what has come on a stream; b"" where nothing has."""
        inbox = stream._inbox
        data = bytes(inbox[:bytes_max])
        del inbox[:bytes_max]
        self._unread -= len(data)
        stream._consumed += len(data)
        live = not (stream.finished_there or stream.is_reset)
        if live and stream._consumed >= WINDOW_BYTES // 2:
            self._queue(_CREDIT, 0, stream.stream_id, stream._consumed)
            stream._may_receive += stream._consumed
            stream._consumed = 0
        return data

    def finish(self, stream: Stream) -> None:
        """Says that we write no more."""
        if not (stream.finished_here or stream.is_reset):
            stream.finished_here = True
            self._queue(_CREDIT, _FIN, stream.stream_id, 0)
            self._forget_if_over(stream)

    def reset(self, stream: Stream) -> None:
        """Ends a stream at once, both ways; what was not read is lost."""
        over = stream.is_reset or (stream.finished_here and stream.finished_there)
        if not over:
            self._queue(_CREDIT, _RST, stream.stream_id, 0)
        stream.is_reset = True
        self._unread -= len(stream._inbox)
        stream._inbox.clear()
        self._forget(stream)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        for stream_id, stream in self._streams.items():
            assert stream.stream_id == stream_id
            assert not stream.is_reset
            assert 0 <= stream._may_receive <= WINDOW_BYTES
            assert stream._may_send >= 0
            assert stream._may_receive + len(stream._inbox) + stream._consumed <= WINDOW_BYTES
        assert 0 <= self._of_peer <= STREAMS_MAX
        assert 0 <= self._unread <= UNREAD_BYTES_MAX

    # Frames

    def _stream_frame(
        self, stream_id: int, flags: int, credit: int, data: bytes, events: list[Event]
    ) -> None:
        if flags & _SYN:
            if (stream := self._opened(stream_id)) is None:
                return
            events.append(Opened(stream))
        elif (found := self._streams.get(stream_id)) is None:
            return  # of a stream that was ended here: it was still under way
        else:
            stream = found
        if flags & _RST:
            stream.is_reset = True
            self._forget(stream)
        elif data and not stream.finished_there:
            stream._may_receive -= len(data)
            self._unread += len(data)
            if stream._may_receive < 0 or self._unread > UNREAD_BYTES_MAX:
                raise MalformedError("a peer that sends more than it has credit for")
            stream._inbox += data
        stream._may_send += credit
        if stream._may_send > _CREDIT_MAX:
            raise MalformedError("a peer that gives credit without end")
        if flags & _FIN and not stream.is_reset:
            stream.finished_there = True
            self._forget_if_over(stream)
        events.append(Changed(stream))

    def _opened(self, stream_id: int) -> Stream | None:
        if not stream_id or stream_id % 2 == self._next_id % 2 or stream_id in self._streams:
            raise MalformedError(f"a yamux stream that cannot be new: {stream_id}")
        if self._of_peer >= STREAMS_MAX:
            self._queue(_CREDIT, _RST, stream_id, 0)
            return None
        stream = self._streams[stream_id] = Stream(stream_id)
        self._of_peer += 1
        self._queue(_CREDIT, _ACK, stream_id, 0)
        return stream

    def _forget_if_over(self, stream: Stream) -> None:
        if stream.finished_here and stream.finished_there:
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        """No frame of it counts any more; what it holds unread may still be read."""
        # Another stream may have its number by now.
        if self._streams.get(stream.stream_id) is stream:
            del self._streams[stream.stream_id]
            self._of_peer -= stream.stream_id % 2 != self._next_id % 2

    def _queue(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        self._outgoing += _HEADER.pack(0, kind, flags, stream_id, length)
