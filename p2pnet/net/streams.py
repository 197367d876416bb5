"""Messages over a connection's streams: the end that asks and the end that answers.

A stream starts with multistream-select (github.com/multiformats/multistream-select),
whose lines are framed as our messages are. The asking end sends its lines and its
first message in one go, and keeps the stream for further messages: opening one
costs several times a request. Knows nothing of libp2p; runs on trio.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from p2pnet.errors import MalformedError, UnreachableError
from p2pnet.net.network import MESSAGE_BYTES_MAX, Handler
from p2pnet.net.varint import Unframer, frame

_MULTISTREAM = "/multistream/1.0.0"
_NOT_AVAILABLE = "na"
_LINE_BYTES_MAX = 1024
_PROPOSALS_MAX = 16  # protocols that a peer may ask for on one stream
_NEGOTIATION_S = 10.0
_MESSAGE_S = 30.0  # from a message's first bytes to its last
_IDLE_S = 600.0  # between two messages
_STREAMS_PER_PROTOCOL = 8


class NotSpokenError(MalformedError):
    """The peer does not speak the protocol, which is no offence."""


class ByteStream(Protocol):
    """One stream of a connection. Its methods raise UnreachableError when it is broken."""

    async def read(self) -> bytes:
        """Some bytes; b"" once the peer has closed its side."""
        ...

    async def write(self, data: bytes) -> None:
        """All of `data`."""
        ...

    async def close(self) -> None:
        """Says that no more will be written. Never raises."""
        ...

    async def reset(self) -> None:
        """Ends the stream at once, both ways. Never raises."""
        ...

    def usable(self) -> bool:
        """Whether neither side has closed it."""
        ...


class Conversation:
    """A stream, read as multistream lines, as messages, or as plain bytes."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self._ahead = b""  # read from the stream and not yet looked at
        self._lines = Unframer(_LINE_BYTES_MAX)
        self._unframer = Unframer(MESSAGE_BYTES_MAX)
        self._messages: list[bytes] = []

    async def line(self) -> str | None:
        """The next multistream line; None at the end of the stream."""
        while self._ahead or await self._more():
            for i in range(len(self._ahead)):
                # byte by byte: what follows the last line is no line
                if found := self._lines.feed(self._ahead[i : i + 1]):
                    self._ahead = self._ahead[i + 1 :]
                    return _line(found[0])
            self._ahead = b""
        return None

    async def message(self, idle_s: float) -> bytes | None:
        """The next message; None if the stream ends or stays silent for `idle_s`.

        Raises:
            MalformedError: too large, or too slow in coming.
        """
        deadline, begun = trio.current_time() + idle_s, False
        while not self._messages:
            if self._ahead:
                self._messages = self._unframer.feed(self._ahead)
                self._ahead = b""
                if not begun:
                    deadline, begun = trio.current_time() + _MESSAGE_S, True
                continue
            with trio.CancelScope(deadline=deadline) as scope:
                if not await self._more():
                    return None
            if scope.cancelled_caught:
                if begun:
                    raise MalformedError(f"a message that took over {_MESSAGE_S:.0f} s to come")
                return None
        return self._messages.pop(0)

    async def exactly(self, size: int) -> bytes | None:
        """The next `size` plain bytes; None if the stream ends first."""
        while len(self._ahead) < size:
            if not await self._more():
                return None
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    def rest(self) -> bytes:
        """What was read from the stream and not yet looked at."""
        data, self._ahead = self._ahead, b""
        return data

    async def _more(self) -> bool:
        data = await self.stream.read()
        self._ahead += data
        return bool(data)


# Takes over a stream once its protocol is settled.
StreamHandler = Callable[[Conversation, str], Awaitable[None]]


def answering(handler: Handler) -> StreamHandler:
    """Serves message after message of a stream with a `Handler`."""

    async def serve(talk: Conversation, peer_id: str) -> None:
        while (message := await talk.message(_IDLE_S)) is not None:
            reply = await handler(peer_id, message)
            if reply is not None:
                await talk.stream.write(frame(reply))

    return serve


async def answer(stream: ByteStream, peer_id: str, handlers: Mapping[str, StreamHandler]) -> None:
    """Settles the protocol of a stream that a peer opened, and serves it to its end.

    Raises:
        MalformedError, and whatever a handler raises.
    """
    talk = Conversation(stream)
    with trio.move_on_after(_NEGOTIATION_S) as scope:
        protocol = await settle(talk, handlers)
    if scope.cancelled_caught:
        raise MalformedError("a stream whose protocol was not settled in time")
    if protocol is not None:
        await handlers[protocol](talk, peer_id)


async def settle(talk: Conversation, spoken: Container[str]) -> str | None:
    """The first of the `spoken` protocols that the peer asks for; None if it asks no more.

    Raises:
        MalformedError: not multistream-select, or too many unknown protocols.
    """
    if (hello := await talk.line()) is None:
        return None
    if hello != _MULTISTREAM:
        raise MalformedError("a stream that does not begin with multistream-select")
    await talk.stream.write(_framed(_MULTISTREAM))
    for turn in range(_PROPOSALS_MAX):
        try:
            if (proposal := await talk.line()) is None:
                return None
        except MalformedError:
            if turn == 0:
                raise
            return None  # the message that it sent along with a proposal we do not speak
        if proposal in spoken:
            await talk.stream.write(_framed(proposal))
            return proposal
        await talk.stream.write(_framed(_NOT_AVAILABLE))
    raise MalformedError("a peer that asks for one unknown protocol after another")


async def propose(stream: ByteStream, protocol: str, first: bytes = b"") -> Conversation:
    """Asks for a protocol on a new stream, and sends `first` along.

    Raises:
        NotSpokenError: the peer does not speak the protocol.
        UnreachableError: the stream ended.
    """
    await stream.write(proposal(protocol) + first)
    talk = Conversation(stream)
    await agreed(talk, protocol)
    return talk


def proposal(protocol: str) -> bytes:
    """What asks for a protocol. What is meant for it may be sent right after."""
    return _framed(_MULTISTREAM) + _framed(protocol)


async def agreed(talk: Conversation, protocol: str) -> None:
    """Returns when the peer has agreed to a `proposal`; raises as `propose` does."""
    for expected in (_MULTISTREAM, protocol):
        got = await talk.line()
        if got is None:
            raise UnreachableError("the peer closed the stream")
        if got != expected:
            raise NotSpokenError(f"the peer does not speak {protocol}")


class Pool:
    """The streams of one connection for one protocol, kept between requests.

    A stream carries one request at a time, so each has one writer. A caller of
    `ask` holds a `slot`; one who is cancelled ends the stream and harms no other.
    """

    def __init__(self, open_stream: Callable[[], Awaitable[ByteStream]], protocol: str) -> None:
        self._slots = trio.Semaphore(_STREAMS_PER_PROTOCOL)
        self._open_stream = open_stream
        self._protocol = protocol
        self._idle: list[Conversation] = []

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """The right to one request at a time; waits while all are taken."""
        try:
            self._slots.acquire_nowait()  # saves a turn of the event loop
        except trio.WouldBlock:
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()

    async def ask(self, message: bytes, *, wants_reply: bool) -> bytes:
        """Sends a message and returns the reply, or b"" where none is wanted.

        A stream that has been used before may have been closed by the peer
        meanwhile: where it ends before any reply, a fresh one is tried, once.

        Raises:
            UnreachableError: the stream ended before the reply.
            MalformedError: the reply is too large, or the protocol not spoken.
        """
        while self._idle and wants_reply:
            talk = self._idle.pop()
            if not talk.stream.usable():
                await talk.stream.reset()
                continue
            try:
                return await self._exchange(talk, frame(message))
            except UnreachableError:
                break
        stream = await self._open_stream()
        try:
            talk = await propose(stream, self._protocol, frame(message))
            if not wants_reply:
                return await _end(talk)
        except BaseException:
            await stream.reset()
            raise
        return await self._exchange(talk)

    async def _exchange(self, talk: Conversation, request: bytes = b"") -> bytes:
        try:
            if request:
                await talk.stream.write(request)
            reply = await talk.message(float("inf"))  # the caller has the deadline
            if reply is None:
                raise UnreachableError("the peer ended the stream without a reply")
        except BaseException:
            await talk.stream.reset()
            raise
        self._idle.append(talk)
        return reply


async def _end(talk: Conversation) -> bytes:
    """Ends a stream whose one message wants no reply, and waits until the peer has done so.

    That tells that the message was read. The stream cannot be kept: some peers answer
    all the same (py-libp2p echoes an ADD_PROVIDER, then resets), and that is not the
    next reply.

    Raises:
        UnreachableError: the peer ended the stream at once: it did not take the message.
    """
    await talk.stream.close()
    answered = False
    try:
        while await talk.stream.read():
            answered = True
    except UnreachableError:
        if not answered:
            raise
    await talk.stream.reset()
    return b""


def _framed(line: str) -> bytes:
    return frame(line.encode() + b"\n")


def _line(data: bytes) -> str:
    if not data.endswith(b"\n"):
        raise MalformedError("a multistream line without an end")
    try:
        return data[:-1].decode()
    except UnicodeDecodeError:
        raise MalformedError("a multistream line that is not UTF-8") from None
