"""A connection that carries streams: Noise messages over TCP, and yamux in them.

Runs on trio; knows nothing of libp2p. What a stream's user writes is queued whole
and sent from there, so a user who is cancelled never leaves half a frame behind.
"""

from __future__ import annotations

import os
from typing import Protocol

import trio

from p2pnet.errors import UnreachableError
from p2pnet.net.yamux import STREAMS_MAX, GoneAway, Opened, Stream, Yamux

_READ_BYTES = 64 << 10
_PLAIN_BYTES_MAX = 65_535 - 16  # in a Noise message, whose length has two bytes
_LENGTH_BYTES = 2
_WRITE_S = 10.0  # a peer that takes nothing for so long is gone, or done with a stream
_BACKLOG_BYTES = 64 << 10  # queued and not yet sent, before a writer has to wait


class Cipher(Protocol):
    """What the handshake left: raises an Exception for what was tampered with."""

    def encrypt(self, data: bytes) -> bytes:
        """A message of ours."""
        ...

    def decrypt(self, data: bytes) -> bytes:
        """A message of the peer's."""
        ...


class SecureChannel:
    """Bytes both ways over an encrypted connection; a `streams.ByteStream`.

    `ahead`: what was read of the TCP connection already. Its methods raise what trio
    and the cipher raise; its owner closes the socket.
    """

    def __init__(self, tcp: trio.SocketStream, ahead: bytes, cipher: Cipher) -> None:
        self.heard_at = trio.current_time()
        self._tcp = tcp
        self._ahead = bytearray(ahead)
        self._cipher = cipher
        self._unsent = b""

    async def read(self) -> bytes:
        """All that has come, some at least; b"" at the end."""
        plain = b""
        while not plain:
            while (message := self._message()) is not None:
                plain += self._cipher.decrypt(message)
            if plain:
                break
            data = await self._tcp.receive_some(_READ_BYTES)
            if not data:
                break
            self.heard_at = trio.current_time()
            self._ahead += data
        return plain

    async def write(self, data: bytes) -> None:
        """All of `data`. Must not be cancelled, unless the connection ends."""
        self.post(data)
        await self.flush()

    def busy(self) -> bool:
        """Whether something is left to `flush`."""
        return bool(self._unsent)

    def post(self, data: bytes) -> None:
        """Sends `data` as far as the kernel takes it at once, which it mostly does.

        That saves a small message two turns of the event loop, a third of its cost.
        Not while `busy`.
        """
        messages: list[bytes] = []
        for at in range(0, len(data), _PLAIN_BYTES_MAX):
            message = self._cipher.encrypt(data[at : at + _PLAIN_BYTES_MAX])
            messages += (len(message).to_bytes(_LENGTH_BYTES, "big"), message)
        sealed = b"".join(messages)
        try:
            sent = os.write(self._tcp.socket.fileno(), sealed)
        except OSError:
            sent = 0  # full, or broken: `flush` will see
        self._unsent = sealed[sent:]

    async def flush(self) -> None:
        """Sends what is left. Must not be cancelled, unless the connection ends."""
        await self._tcp.send_all(self._unsent)
        self._unsent = b""

    async def close(self) -> None:
        """Nothing: the socket's owner does."""

    async def reset(self) -> None:
        """Nothing: the socket's owner does."""

    def usable(self) -> bool:
        """As far as is known."""
        return True

    def _message(self) -> bytes | None:
        size = _LENGTH_BYTES + int.from_bytes(self._ahead[:_LENGTH_BYTES], "big")
        if len(self._ahead) < max(size, _LENGTH_BYTES):
            return None
        message = bytes(self._ahead[_LENGTH_BYTES:size])
        del self._ahead[:size]
        return message


class MuxedConnection:
    """A `connections.Muxed` over a secure channel. `ahead`: read from that already."""

    def __init__(
        self, channel: SecureChannel, peer_id: str, *, initiator: bool, ahead: bytes = b""
    ) -> None:
        self._channel = channel
        self._peer_id = peer_id
        self._ahead = ahead
        self._ended = False
        self._started = trio.Event()
        self._yamux = Yamux(initiator=initiator)
        self._streams: dict[int, MuxedStream] = {}
        self._opened, self._to_accept = trio.open_memory_channel[MuxedStream](STREAMS_MAX)
        self._writer = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()

    @property
    def peer_id(self) -> str:
        """Who is at the other end."""
        return self._peer_id

    @property
    def heard_at(self) -> float:
        """When the last byte came from there, on trio's clock."""
        return self._channel.heard_at

    async def run(self) -> None:
        """Carries the streams until the connection ends."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_all)
                self._started.set()
                await self._read_all()
                nursery.cancel_scope.cancel()
        finally:
            self._ended = True
            self._opened.close()
            self._room.unpark_all()
            for stream in self._streams.values():
                stream.changed.unpark_all()

    async def ready(self) -> None:
        """Returns when `run` has begun."""
        await self._started.wait()

    def alive(self) -> bool:
        """Whether streams still pass, as far as is known."""
        return not self._ended

    async def open_stream(self) -> MuxedStream:
        """A new stream to the peer; raises UnreachableError."""
        if self._ended:
            raise UnreachableError("the connection is gone")
        return self._stream(self._yamux.open())

    async def accept_stream(self) -> MuxedStream:
        """The next stream that the peer opens; UnreachableError when the connection ends."""
        try:
            return await self._to_accept.receive()
        except trio.EndOfChannel:
            raise UnreachableError("the connection is gone") from None

    async def _read_all(self) -> None:
        data, self._ahead = self._ahead, b""
        while data or (data := await self._channel.read()):
            for event in self._yamux.receive(data):
                if isinstance(event, GoneAway):
                    return
                if isinstance(event, Opened):
                    self._take(self._stream(event.stream))
                elif (stream := self._streams.get(event.stream.stream_id)) is not None:
                    stream.changed.unpark_all()
            self._kick()
            data = b""

    def _take(self, stream: MuxedStream) -> None:
        try:
            self._opened.send_nowait(stream)
        except trio.WouldBlock:
            stream.end()

    async def _write_all(self) -> None:
        while True:
            while not self._channel.busy():
                await self._writer.park()
            with trio.fail_after(_WRITE_S):
                await self._channel.flush()
            self._kick()
            self._room.unpark_all()

    def _kick(self) -> None:
        """Sends what is queued, unless that is for the writing task to do."""
        if self._yamux.outgoing_bytes and not self._channel.busy():
            self._channel.post(self._yamux.outgoing())
            if self._channel.busy():
                self._writer.unpark_all()

    def _stream(self, stream: Stream) -> MuxedStream:
        muxed = self._streams[stream.stream_id] = MuxedStream(self, stream)
        return muxed

    # For MuxedStream

    async def send(self, stream: MuxedStream, data: bytes) -> None:
        """All of `data`, as there is room in the queue and credit from the peer."""
        left = memoryview(data)
        while left:
            if self._ended or not stream.writable():
                raise UnreachableError("the stream was reset")
            if self._yamux.outgoing_bytes >= _BACKLOG_BYTES:
                await self._room.park()
                continue
            size = self._yamux.write(stream.state, left[:_BACKLOG_BYTES])
            left = left[size:]
            self._kick()
            if not size:
                with trio.move_on_after(_WRITE_S) as scope:
                    await stream.changed.park()
                if scope.cancelled_caught:
                    raise UnreachableError("the peer takes no more of the stream")

    def receive(self, stream: MuxedStream) -> bytes:
        """What has come on a stream."""
        data = self._yamux.read(stream.state, _READ_BYTES)
        self._kick()
        return data

    def finish(self, stream: MuxedStream) -> None:
        """No more is written."""
        self._yamux.finish(stream.state)
        self._kick()

    def end(self, stream: MuxedStream) -> None:
        """Ends a stream both ways."""
        self._yamux.reset(stream.state)
        if self._streams.get(stream.state.stream_id) is stream:
            del self._streams[stream.state.stream_id]
        stream.changed.unpark_all()
        self._kick()


class MuxedStream:
    """A `streams.ByteStream`. `state` is for the connection."""

    def __init__(self, connection: MuxedConnection, state: Stream) -> None:
        self.state = state
        self.changed = trio.lowlevel.ParkingLot()
        self._connection = connection

    async def read(self) -> bytes:
        """Some bytes; b"" once the peer has closed its side."""
        while not (data := self._connection.receive(self)):
            if self.state.is_reset or not self._connection.alive():
                raise UnreachableError("the stream was reset")
            if self.state.finished_there:
                return b""
            await self.changed.park()
        return data

    async def write(self, data: bytes) -> None:
        """All of `data`."""
        await self._connection.send(self, data)

    async def close(self) -> None:
        """Says that no more will be written."""
        self._connection.finish(self)

    async def reset(self) -> None:
        """Ends the stream at once, both ways."""
        self.end()

    def end(self) -> None:
        """As `reset`."""
        self._connection.end(self)

    def writable(self) -> bool:
        """Whether it may be written to, credit aside."""
        return not (self.state.is_reset or self.state.finished_here)

    def usable(self) -> bool:
        """Whether neither side has closed it."""
        return self.writable() and not self.state.finished_there and self._connection.alive()
