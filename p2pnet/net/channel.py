"""Calls over one gRPC channel: messages in and out, and errors of our own kinds.

Everything here runs on the asyncio side. Replies are parsed here rather than by
gRPC, so that bytes that are no message are the peer's fault and not ours.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from p2pnet.causality import Causality
from p2pnet.errors import (
    CancelledByUs,
    LocalError,
    MalformedError,
    NotFoundError,
    P2PNetError,
    RefusedError,
    RemoteError,
    ResourceError,
    UnreachableError,
    UsageError,
    VersionError,
)

M = TypeVar("M", bound=Message)
T = TypeVar("T")
Metadata = tuple[tuple[str, str | bytes], ...]

OPEN_METADATA = "p2pnet-open"  # what a server sends at once when it lets a stream in
HLC_METADATA = "p2pnet-hlc"  # the sender's timestamp: with each call, reply and error
MESSAGE_BYTES_MAX = 64 << 20
DETAIL_CHARS_MAX = 500
TARGET_CHARS_MAX = 255
KEEPALIVE_S = 10.0  # after so long without a byte a peer is asked for a sign of life ...
KEEPALIVE_WAIT_S = 10.0  # ... and has so long to give one (a slow line's queue included)

# Shared by both ends of every connection.
COMMON_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_WAIT_S * 1000)),
    # Measured: without it a silent peer goes unnoticed for a minute, this option's default.
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_WAIT_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    *COMMON_OPTIONS,
    # Channels to one target share a connection, and its back-off, unless told not to.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # $http_proxy is not meant for peers
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_retries", 0),  # not every call may be repeated: callers decide
)


class NoSessionError(RefusedError):
    """The peer does not know our session (any more). The call was not carried out."""


class Stream(Generic[M]):
    """An open call with any number of messages either way. Made by `Channel.stream`.

    Every method raises what `Channel.call` does. After an error, a timeout or a
    cancellation the stream is over.
    """

    def __init__(
        self, call: grpc.aio.StreamStreamCall[bytes, bytes], reply_type: type[M], channel: Channel
    ) -> None:
        self._call = call
        self._reply_type = reply_type
        self._channel = channel

    async def write(self, message: Message) -> None:
        """Sends one message; waits while the peer takes no more."""
        await self.write_raw(message.SerializeToString())

    async def write_raw(self, message: bytes) -> None:
        """`write` for a message's bytes."""
        await self._channel.guard(self._call.write(message))

    async def done_writing(self) -> None:
        """Tells the peer that no more comes. Replies may."""
        await self._channel.guard(self._call.done_writing())

    async def read(self, *, timeout_s: float | None = None) -> M | None:
        """The next message; None when the peer has ended the stream without an error."""
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._channel.guard(self._call.read())
                if not isinstance(reply, bytes):  # EOF
                    self._channel.hear(await self._channel.guard(self._call.trailing_metadata()))
                    return None
        except TimeoutError:
            self._channel.lost = True
            raise UnreachableError(f"{self._channel.who} sent nothing in time") from None
        return parse(self._reply_type, reply)

    async def read_raw(self) -> bytes | None:
        """`read` for a message's bytes, without a time limit."""
        reply = await self._channel.guard(self._call.read())
        return reply if isinstance(reply, bytes) else None

    def stamp(self) -> str:
        """The next timestamp, for a message that carries its own; "" where there is no clock."""
        return self._channel.stamp()

    def hear(self, hlc: str) -> None:
        """Continues after a timestamp that a message carried."""
        self._channel.follow(hlc)

    def cancel(self) -> None:
        """Ends the stream on both sides; nothing where it is over."""
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[M]:
        while (reply := await self.read()) is not None:
            yield reply


class Channel:
    """Calls to one server.

    Args:
        who: names it in errors.
        local: it is this user's own node.
        causality: the clock that calls and replies carry; none for who is no node.
        peer_id: whose timestamps come back.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        who: str,
        *,
        local: bool = False,
        causality: Causality | None = None,
        peer_id: str = "",
    ) -> None:
        self.who = who
        self.lost = False  # a call found nobody there, or no answer in time
        self._channel = channel
        self._local = local
        self._causality = causality
        self._peer_id = peer_id

    async def call(
        self,
        method: str,
        request: Message,
        reply_type: type[M],
        *,
        timeout_s: float,
        metadata: Metadata = (),
    ) -> M:
        """One request, one reply. `method` is "Service/Method" of package p2pnet.v1.

        Raises:
            UnreachableError: nobody answers there, or not within `timeout_s`.
            VersionError, RefusedError: the peer said no; NoSessionError among them.
            MalformedError: the reply is no message of that type.
            CancelledByUs: the channel was closed meanwhile.
            UsageError, NotFoundError, ResourceError: from this user's own node only.
        """
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
        unary = self._channel.unary_unary(_path(method))
        data = request.SerializeToString()
        stamped = self._stamped(metadata)
        call = self._started(lambda: unary(data, timeout=timeout_s, metadata=stamped))
        reply = await self.guard(call)
        if self._causality is not None:
            self.hear(await self.guard(call.trailing_metadata()))
        return parse(reply_type, reply)

    async def open(
        self, method: str, reply_type: type[M], *, timeout_s: float, metadata: Metadata = ()
    ) -> Stream[M]:
        """Opens a stream, whichever side of the method is one; to be cancelled in the end.

        It is open when the server has let the caller in. For a method with a single
        request write that, then `done_writing`; for one with a single reply `read` it.
        Raises as `call` does.
        """
        open_stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        open_stream = self._channel.stream_stream(_path(method))
        stamped = self._stamped(metadata)
        call = self._started(lambda: open_stream(timeout=timeout_s, metadata=stamped))
        stream = Stream(call, reply_type, self)
        try:
            metadata_back = await self.guard(call.initial_metadata())
            if metadata_back.get(OPEN_METADATA) is None:
                await stream.read()  # raises, with the reason
                raise MalformedError(f"{self.who} ended a stream that it had not opened")
            self.hear(metadata_back)
        except BaseException:
            stream.cancel()
            raise
        return stream

    @asynccontextmanager
    async def stream(
        self, method: str, reply_type: type[M], *, timeout_s: float, metadata: Metadata = ()
    ) -> AsyncIterator[Stream[M]]:
        """`open` for `async with`."""
        stream = await self.open(method, reply_type, timeout_s=timeout_s, metadata=metadata)
        try:
            yield stream
        finally:
            stream.cancel()

    async def close(self) -> None:
        """Ends the connection; calls under way raise CancelledByUs."""
        await self._channel.close()

    async def guard(self, awaitable: Awaitable[T]) -> T:
        """Awaits something of gRPC's, with its errors turned into ours."""
        try:
            return await awaitable
        except grpc.aio.AioRpcError as error:
            raise self._error_of(error) from None
        except (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError):
            raise CancelledByUs(_CLOSED) from None
        except asyncio.CancelledError:
            # gRPC says so both when its channel is closed and when our task is cancelled.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise CancelledByUs(_CLOSED) from None

    def _started(self, start: Callable[[], T]) -> T:
        try:
            return start()
        except grpc.aio.UsageError:
            raise CancelledByUs(_CLOSED) from None

    def hear(self, metadata: grpc.aio.Metadata | None) -> None:
        """Continues after the timestamp that an answer carries, if it does."""
        if self._causality is not None and metadata is not None:
            self._causality.incoming(metadata.get(HLC_METADATA), self._peer_id)

    def stamp(self) -> str:
        """The next timestamp; "" where there is no clock."""
        return "" if self._causality is None else self._causality.outgoing()

    def follow(self, hlc: str) -> None:
        """Continues after a timestamp of the peer's, if it is one."""
        if self._causality is not None:
            self._causality.incoming(hlc, self._peer_id)

    def _stamped(self, metadata: Metadata) -> Metadata:
        if self._causality is None:
            return metadata
        return (*metadata, (HLC_METADATA, self._causality.outgoing()))

    def _error_of(self, error: grpc.aio.AioRpcError) -> P2PNetError:
        self.hear(error.trailing_metadata())
        detail = _printable(error.details() or "")
        code = error.code()
        if self._local and (own := _LOCAL_ERRORS.get(code)) is not None:
            return own(detail)
        self.lost |= code in _LOST
        match code:
            case grpc.StatusCode.UNAVAILABLE if "CERTIFICATE_VERIFY_FAILED" in detail:
                return UnreachableError(
                    f"somebody else answers at {self.who}'s address: "
                    "the certificate is not the one in its advert"
                )
            case grpc.StatusCode.UNAVAILABLE:
                # "failed to connect to all addresses; last error: UNKNOWN: ipv4:...: ...: why"
                why = detail.rpartition(": ")[2] if "last error: " in detail else detail
                return UnreachableError(f"cannot reach {self.who}: {why}")
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return UnreachableError(f"{self.who} did not answer in time")
            case grpc.StatusCode.CANCELLED:
                return UnreachableError(f"{self.who} broke off the call")
            case grpc.StatusCode.FAILED_PRECONDITION:
                return VersionError(f"{self.who}: {detail}")
            case grpc.StatusCode.UNAUTHENTICATED:
                return NoSessionError(f"{self.who} refused: {detail}")
        return RefusedError(f"{self.who} refused: {detail or code.name}")


# What a node's own control socket may say. A peer never makes us raise these.
_LOCAL_ERRORS: dict[grpc.StatusCode, Callable[[str], P2PNetError]] = {
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.INVALID_ARGUMENT: UsageError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceError,
    grpc.StatusCode.INTERNAL: LocalError,
    grpc.StatusCode.ABORTED: RemoteError,  # of a peer that the node asked for us
}
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_CLOSED = "the connection was closed on our side"


def unix_channel(path: Path) -> Channel:
    """A channel to the local node's control socket. Call it on the asyncio loop.

    Nothing is connected yet: where no node runs, calls raise UnreachableError.
    """
    raw = grpc.aio.insecure_channel(f"unix:{path}", options=CHANNEL_OPTIONS)
    return Channel(raw, "the local node", local=True)


def target_uri(target: str) -> str:
    """gRPC's name for a "host:port" out of a peer's advert.

    Only addresses and DNS names: gRPC would also take "unix:..." and load resolvers.

    Raises:
        MalformedError: anything else.
    """
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9.-]+)):([0-9]{1,5})", target)
    if match is None or len(target) > TARGET_CHARS_MAX or not 0 < int(match[3]) < 65536:
        raise MalformedError(f"{_printable(target)!r} is not host:port")
    try:
        version = ipaddress.ip_address(match[1] or match[2]).version
    except ValueError:
        if match[1]:
            raise MalformedError(f"{target!r} is not host:port") from None
        return f"dns:{target}"
    return f"ipv{version}:{target}"


def parse(message_type: type[M], data: bytes) -> M:
    """A message from its bytes; raises MalformedError."""
    try:
        return message_type.FromString(data)
    except DecodeError:
        name = message_type.DESCRIPTOR.name
        raise MalformedError(f"bytes that are no {name}") from None


def _path(method: str) -> str:
    return f"/p2pnet.v1.{method}"


def _printable(text: str) -> str:
    # A peer's words end up on a terminal.
    return "".join(c if c.isprintable() else " " for c in text[:DETAIL_CHARS_MAX])
