"""What serves a method: four kinds of handler, and what their errors become on the wire.

A handler is an `async def` (or an async generator, where it has many replies)
that takes messages and the caller; it knows nothing of gRPC.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from p2pnet.causality import Causality
from p2pnet.errors import (
    CancelledByUs,
    ForgedError,
    LocalError,
    MalformedError,
    NotFoundError,
    RefusedError,
    RemoteError,
    ResourceError,
    UsageError,
    VersionError,
)
from p2pnet.net.channel import DETAIL_CHARS_MAX, parse

RequestT = TypeVar("RequestT", bound=Message)
ReplyT = TypeVar("ReplyT", bound=Message)

RawRequests = AsyncIterator[bytes]
Context = grpc.aio.ServicerContext[bytes, bytes]

UNARY_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and how long the call may still take.

    `peer_id` is proven; it is "" on the control socket and before a session is open.
    `causality` is the clock that its messages go by, where they carry their own timestamps.
    """

    peer_id: str
    timeout_s: float
    causality: Causality | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """One served method. `run` takes raw requests, the caller, and where replies go."""

    run: Callable[
        [RawRequests, Caller, Callable[[bytes], Awaitable[None]]], Awaitable[bytes | None]
    ]
    is_unary: bool
    timeout_s: float


def unary(
    handler: Callable[[RequestT, Caller], Awaitable[ReplyT]],
    request_type: type[RequestT],
    reply_type: type[ReplyT],
    *,
    timeout_s: float = UNARY_S_MAX,
) -> Method:
    """One request, one reply: `async def handler(request, caller) -> reply`."""

    async def run(
        requests: RawRequests, caller: Caller, write: Callable[[bytes], Awaitable[None]]
    ) -> bytes:
        return _dump(await handler(await _only(request_type, requests), caller), reply_type)

    return Method(run, True, timeout_s)


def server_stream(
    handler: Callable[[RequestT, Caller], AsyncGenerator[ReplyT, None]],
    request_type: type[RequestT],
    reply_type: type[ReplyT],
    *,
    timeout_s: float,
) -> Method:
    """One request, many replies: `async def handler(request, caller): yield reply`."""

    async def run(
        requests: RawRequests, caller: Caller, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        async with aclosing(handler(await _only(request_type, requests), caller)) as replies:
            async for reply in replies:
                await write(_dump(reply, reply_type))

    return Method(run, False, timeout_s)


def client_stream(
    handler: Callable[[AsyncIterator[RequestT], Caller], Awaitable[ReplyT]],
    request_type: type[RequestT],
    reply_type: type[ReplyT],
    *,
    timeout_s: float,
) -> Method:
    """Many requests, one reply: `async def handler(requests, caller) -> reply`."""

    async def run(
        requests: RawRequests, caller: Caller, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        async with aclosing(_each(request_type, requests)) as parsed:
            await write(_dump(await handler(parsed, caller), reply_type))

    return Method(run, False, timeout_s)


def bidi(
    handler: Callable[[AsyncIterator[RequestT], Caller], AsyncGenerator[ReplyT, None]],
    request_type: type[RequestT],
    reply_type: type[ReplyT],
    *,
    timeout_s: float,
) -> Method:
    """Many both ways: `async def handler(requests, caller): yield reply`."""

    async def run(
        requests: RawRequests, caller: Caller, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        async with (
            aclosing(_each(request_type, requests)) as parsed,
            aclosing(handler(parsed, caller)) as replies,
        ):
            async for reply in replies:
                await write(_dump(reply, reply_type))

    return Method(run, False, timeout_s)


def refusal_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status that tells a caller of a handler's error.

    What was not raised on purpose is INTERNAL and says nothing more. A refusal
    that a program should act on belongs in the reply's `Refusal`; a status says
    it in words alone.
    """
    for kind, code in _STATUS_OF:
        if isinstance(error, kind):
            return code, (str(error) or "not done in time")[:DETAIL_CHARS_MAX]
    return grpc.StatusCode.INTERNAL, "the handler failed; its node's log says why"


# The first that fits. UNAVAILABLE and DEADLINE_EXCEEDED would make the caller
# believe that *we* cannot be reached, so they are not used for our own troubles.
_STATUS_OF: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (VersionError, grpc.StatusCode.FAILED_PRECONDITION),
    (RefusedError, grpc.StatusCode.PERMISSION_DENIED),
    (MalformedError, grpc.StatusCode.INVALID_ARGUMENT),
    (ForgedError, grpc.StatusCode.PERMISSION_DENIED),
    (RemoteError, grpc.StatusCode.ABORTED),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (ResourceError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (CancelledByUs, grpc.StatusCode.UNAVAILABLE),  # true: we are going
    (LocalError, grpc.StatusCode.INTERNAL),
    (TimeoutError, grpc.StatusCode.ABORTED),
)


async def _each(
    message_type: type[RequestT], requests: RawRequests
) -> AsyncGenerator[RequestT, None]:
    async for request in requests:
        yield parse(message_type, request)


async def _only(message_type: type[RequestT], requests: RawRequests) -> RequestT:
    async for request in requests:
        return parse(message_type, request)
    raise MalformedError("a call without a request")


def _dump(reply: Message, reply_type: type[Message]) -> bytes:
    if not isinstance(reply, reply_type):
        raise TypeError(f"a handler made a {type(reply).__name__}, not a {reply_type.__name__}")
    return reply.SerializeToString()
