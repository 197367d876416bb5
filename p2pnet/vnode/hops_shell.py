"""A shell: hops over gRPC, on one stream to each host, kept open for all that goes there.

`Hops` asks, for nodes and for clients; `HopsServer` answers. Both live on the gRPC thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from p2pnet.bounded import keep_latest
from p2pnet.errors import (
    CancelledByUs,
    MalformedError,
    P2PNetError,
    RefusedError,
    ResourceError,
    UnreachableError,
)
from p2pnet.keys import short
from p2pnet.net.channel import Stream
from p2pnet.net.dialer import Dialer, PeerContact
from p2pnet.net.handlers import Caller, Method, RawRequests, refusal_of
from p2pnet.net.hop_frames import Buffer, Request
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.hops import (
    EXCHANGES_MAX,
    PAYLOAD_BYTES_MAX,
    Answerer,
    Asked,
    Asker,
    GivenUp,
    Room,
)

logger = logging.getLogger(__name__)

LINES_MAX = 256
OPEN_S = 15.0
LINE_S = 3600.0  # a stream's whole life; it takes nothing new in the last quarter
IDLE_S = 120.0
SERVED_IDLE_S = 300.0
REPLY_S = 0.5  # what is left of a caller's patience to tell it that it was not done in time
STREAMS_MAX = 8  # of one caller
UNSENT_BYTES_MAX = 64 << 20  # on one stream; who has more to send waits

Answer = tuple[vnode_pb2.HopReply, memoryview | None]
Handler = Callable[
    [Request, memoryview | None, Caller], Awaitable[tuple[vnode_pb2.HopReply, Buffer | None]]
]

_WITH_TENSOR = (vnode_pb2.ForwardRequest, vnode_pb2.CollectRequest)  # in their replies


class Hops:
    """Hops to peers, over a dialer's channels."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._lines: dict[tuple[str, bytes], _Line] = {}
        self._closed = False

    async def hop(
        self, contact: PeerContact, request: Request, payload: Buffer | None, *, timeout_s: float
    ) -> Answer:
        """One request with what it carries, and its reply with what that carries.

        The payload must stay as it is until then. It waits while too much is on its way to
        that peer already, for `timeout_s` all in all.

        Raises:
            UnreachableError: no connection, or no reply in time.
            VersionError, RefusedError: the peer does not let us in.
            MalformedError: the peer does not keep to the protocol.
            ResourceError: a payload larger than any that travels.
            CancelledByUs: this node is shutting down.
        """
        data = None if payload is None else memoryview(payload)
        if data is not None and data.nbytes > PAYLOAD_BYTES_MAX:
            raise ResourceError(
                f"a payload of {data.nbytes} bytes; {PAYLOAD_BYTES_MAX} are the most that travel"
            )
        began = asyncio.get_running_loop().time()
        line = self._line(contact)
        try:
            async with asyncio.timeout(timeout_s):
                return await line.ask(request, data, began + timeout_s)
        except TimeoutError:
            if line.heard_at < began:  # nobody may be there any more: the next call looks anew
                self._drop(line)
                await self._dialer.forget(contact.peer_id)
            raise UnreachableError(
                f"peer {short(contact.peer_id)} did not answer in time"
            ) from None

    async def close(self) -> None:
        """Ends all; hops under way raise CancelledByUs."""
        self._closed = True
        lines = list(self._lines.values())
        for line in lines:
            line.end(CancelledByUs("this node is shutting down"))
        await asyncio.gather(*(line.over for line in lines), return_exceptions=True)

    def _line(self, contact: PeerContact) -> _Line:
        if self._closed:
            raise CancelledByUs("no hop was made: this node is shutting down")
        key = (contact.peer_id, contact.certificate_der)
        line = self._lines.get(key)
        if line is None or not line.takes_more():
            line = _Line(self._dialer, contact, self._drop)
            evicted = next(iter(self._lines.values())) if len(self._lines) >= LINES_MAX else None
            keep_latest(self._lines, key, line, LINES_MAX)
            if evicted is not None:
                evicted.retire()
        return line

    def _drop(self, line: _Line) -> None:
        if self._lines.get(line.key) is line:
            del self._lines[line.key]
        line.retire()


class _Line:
    """One stream to a peer, with what is under way on it. It ends when it is of no more use."""

    def __init__(self, dialer: Dialer, contact: PeerContact, drop: Callable[[_Line], None]) -> None:
        self.key = (contact.peer_id, contact.certificate_der)
        loop = asyncio.get_running_loop()
        self.heard_at = 0.0  # never
        self.over = loop.create_task(self._run(dialer, contact))
        self._drop = drop
        self._loop = loop
        self._used_at = loop.time()
        self._retire_at = self._used_at + 0.75 * LINE_S
        self._retired = False
        self._error: P2PNetError | None = None
        self._core = Asker()
        self._stream: Stream[vnode_pb2.HopFrame] | None = None
        self._opened = asyncio.Event()  # or failed
        self._to_send = asyncio.Event()
        self._room = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._users = 0
        self._idle = loop.call_later(IDLE_S, self._check_idle)

    def takes_more(self) -> bool:
        """Whether it is good for new hops."""
        return not self._retired and self._error is None and self._loop.time() < self._retire_at

    async def ask(self, request: Request, payload: memoryview | None, until: float) -> Answer:
        """See `Hops.hop`."""
        self._users += 1
        try:
            if not self._opened.is_set():
                await self._opened.wait()
            while self._error is None and self._is_full():
                self._room.clear()
                await self._room.wait()
            if self._error is not None:
                raise _copy(self._error)
            assert self._stream is not None
            id = self._core.ask(
                request,
                payload,
                until - self._loop.time(),
                self._stream.stamp(),
                reply_bytes_max=PAYLOAD_BYTES_MAX if isinstance(request, _WITH_TENSOR) else 0,
            )
            answer: asyncio.Future[Answer] = self._loop.create_future()
            self._waiting[id] = answer
            self._to_send.set()
            try:
                return await answer
            finally:
                del self._waiting[id]
                if answer.cancelled():
                    self._core.give_up(id)
                    self._to_send.set()
                self._room.set()
        finally:
            self._used_at = self._loop.time()
            self._users -= 1
            if self._retired and not self._users:
                self.end(None)

    def retire(self) -> None:
        """Takes nothing new, and ends with what is under way."""
        self._retired = True
        if not self._users:
            self.end(None)

    def end(self, error: P2PNetError | None) -> None:
        """Ends now."""
        if self._error is None:
            self._error = error or CancelledByUs("the stream of hops was closed")
        self.over.cancel()

    def _is_full(self) -> bool:
        return self._core.open >= EXCHANGES_MAX or self._core.outbox.unsent_bytes > UNSENT_BYTES_MAX

    async def _run(self, dialer: Dialer, contact: PeerContact) -> None:
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(OPEN_S):
                    stream: Stream[vnode_pb2.HopFrame] = await stack.enter_async_context(
                        dialer.stream(contact, "VNode/Hops", vnode_pb2.HopFrame, timeout_s=LINE_S)
                    )
                self._stream = stream
                self._opened.set()
                sender = self._loop.create_task(self._send(stream))
                try:
                    await self._receive(stream)
                finally:
                    sender.cancel()
                    await asyncio.wait([sender])
        except TimeoutError:
            self._error = UnreachableError(f"peer {short(contact.peer_id)} did not answer in time")
        except P2PNetError as error:
            self._error = self._error or error
        except asyncio.CancelledError:
            self._error = self._error or CancelledByUs("the stream of hops was closed")
        finally:
            self._ended()

    async def _receive(self, stream: Stream[vnode_pb2.HopFrame]) -> None:
        while (raw := await stream.read_raw()) is not None:
            self.heard_at = self._loop.time()
            replied = self._core.heard(raw)
            if replied is not None:
                stream.hear(replied.hlc)
                answer = self._waiting.get(replied.id)
                if answer is not None and not answer.done():
                    answer.set_result((replied.reply, replied.payload))
        raise UnreachableError("the peer has closed the stream of hops")

    async def _send(self, stream: Stream[vnode_pb2.HopFrame]) -> None:
        try:
            while True:
                while (frame := self._core.outbox.take()) is not None:
                    await stream.write_raw(frame)
                    self._room.set()
                self._to_send.clear()
                await self._to_send.wait()
        except P2PNetError:
            pass  # the other direction knows more

    def _ended(self) -> None:
        assert self._error is not None
        self._idle.cancel()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_copy(self._error))
        self._opened.set()
        self._room.set()
        self._drop(self)

    def _check_idle(self) -> None:
        quiet_s = self._loop.time() - self._used_at
        if quiet_s >= IDLE_S and not self._users:
            self._drop(self)
        else:
            self._idle = self._loop.call_later(max(IDLE_S - quiet_s, 1.0), self._check_idle)


def _copy(error: P2PNetError) -> P2PNetError:
    """Each that it concerns raises its own."""
    return type(error)(str(error))


class HopsServer:
    """Answers the streams of all callers.

    Args:
        hop: handles a request; what it raises becomes a refusal.
        bytes_max: how large a payload a request may carry, by what it says.
    """

    def __init__(self, hop: Handler, bytes_max: Callable[[Request], int]) -> None:
        self._hop = hop
        self._bytes_max = bytes_max
        self._callers: dict[str, tuple[Room, int]] = {}  # and how many streams
        self._served: dict[asyncio.Task[None], None] = {}
        self.method = Method(self._serve, False, LINE_S)

    async def close(self) -> None:
        """Ends every stream."""
        served = list(self._served)
        for task in served:
            task.cancel()
        await asyncio.gather(*served, return_exceptions=True)

    async def _serve(
        self, requests: RawRequests, caller: Caller, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        room, streams = self._callers.get(caller.peer_id, (Room(), 0))
        if streams >= STREAMS_MAX:
            raise RefusedError(f"{streams} of your streams of hops are open already")
        self._callers[caller.peer_id] = room, streams + 1
        serving = _Serving(self._hop, Answerer(self._bytes_max, room), caller, write)
        task = asyncio.ensure_future(serving.run(requests))
        self._served[task] = None
        try:
            await task
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if me is not None and me.cancelling():
                raise
            raise CancelledByUs("this node is shutting down") from None
        finally:
            task.cancel()
            del self._served[task]
            _, streams = self._callers[caller.peer_id]
            if streams == 1:
                del self._callers[caller.peer_id]
            else:
                self._callers[caller.peer_id] = room, streams - 1


def refusal_for(error: Exception) -> common_pb2.Refusal:
    """What the caller of a handler that raised hears."""
    code: common_pb2.RefusalCode | int = common_pb2.REFUSAL_CODE_FAILED
    epoch, host = 0, ""
    if isinstance(error, TimeoutError):
        code = common_pb2.REFUSAL_CODE_BUSY
    elif isinstance(error, MalformedError):
        code = common_pb2.REFUSAL_CODE_BAD_REQUEST
    elif isinstance(error, RefusedError):
        code, epoch, host = error.code or code, error.epoch, error.host
    detail = refusal_of(error)[1]
    return common_pb2.Refusal(
        code=common_pb2.RefusalCode.Name(code),
        detail=detail,
        epoch=epoch,
        host=host,
    )


class _Serving:
    """The called side of one stream."""

    def __init__(
        self,
        hop: Handler,
        core: Answerer,
        caller: Caller,
        write: Callable[[bytes], Awaitable[None]],
    ) -> None:
        self._hop = hop
        self._core = core
        self._caller = caller
        self._write = write
        self._tasks: dict[int, asyncio.Task[None]] = {}  # handlers that run
        self._sending: asyncio.Task[None] | None = None
        self._sent = asyncio.Event()

    async def run(self, requests: RawRequests) -> None:
        """Until the caller ends it; raises MalformedError where it breaks the rules."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SERVED_IDLE_S) as patience:
                async for raw in requests:
                    self._heard(self._core.heard(raw))
                    if self._core.outbox and self._sending is None:  # the core has refused it
                        self._sending = loop.create_task(self._send())
                    while self._core.outbox.unsent_bytes > UNSENT_BYTES_MAX:
                        self._sent.clear()
                        await self._sent.wait()
                    patience.reschedule(loop.time() + SERVED_IDLE_S)
        except TimeoutError:
            pass  # it is idle: the caller opens another when it has something to say
        finally:
            tasks = [*self._tasks.values(), *([self._sending] if self._sending else [])]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            self._core.close()

    def _heard(self, event: Asked | GivenUp | None) -> None:
        if isinstance(event, Asked):
            task = asyncio.get_running_loop().create_task(self._answer(event))
            self._tasks[event.id] = task
        elif isinstance(event, GivenUp) and event.id in self._tasks:
            self._tasks[event.id].cancel()

    async def _answer(self, asked: Asked) -> None:
        causality = self._caller.causality
        payload: Buffer | None = None
        try:
            if causality is not None:
                causality.incoming(asked.hlc, self._caller.peer_id)
            patience_s = asked.timeout_s - min(REPLY_S, asked.timeout_s / 10)
            caller = Caller(self._caller.peer_id, patience_s, causality)
            async with asyncio.timeout(patience_s):
                reply, payload = await self._hop(asked.request, asked.payload, caller)
        except Exception as error:
            if not isinstance(error, (P2PNetError, TimeoutError)):
                logger.exception("a hop of peer %s failed", short(self._caller.peer_id))
            reply = vnode_pb2.HopReply(refusal=refusal_for(error))
        finally:
            del self._tasks[asked.id]
        data = None if payload is None else memoryview(payload)
        hlc = "" if causality is None else causality.outgoing()
        self._core.answer(asked.id, reply, data, hlc)
        if self._sending is None:
            # By this very task: waking another one costs more than the rest of an answer.
            self._sending = asyncio.current_task()
            await self._send()

    async def _send(self) -> None:
        """Sends what is to be sent, and what is added meanwhile."""
        try:
            while (frame := self._core.outbox.take()) is not None:
                await self._write(frame)
                self._sent.set()
        except Exception as error:  # the stream is over, as its other direction hears
            logger.debug("no more replies to peer %s: %s", short(self._caller.peer_id), error)
        finally:
            self._sending = None
