"""A shell: hops over gRPC, on one stream to each host, kept open for all that goes there.

For nodes and for clients; `hops_server_shell` answers. Lives on the gRPC thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack

from p2pnet.errors import (
    CancelledByUs,
    P2PNetError,
    ResourceError,
    UnreachableError,
)
from p2pnet.keys import short
from p2pnet.net.channel import Stream
from p2pnet.net.dialer import Dialer, PeerContact
from p2pnet.net.hop_frames import Buffer, Request
from p2pnet.v1 import vnode_pb2
from p2pnet.vnode.alarm_shell import Alarm
from p2pnet.vnode.hops import Asker
from p2pnet.vnode.hops_flow import EXCHANGES_MAX, PAYLOAD_BYTES_MAX

logger = logging.getLogger(__name__)

LINES_MAX = 256
OPEN_S = 15.0
LINE_S = 3600.0  # a stream's whole life; it takes nothing new in the last quarter
IDLE_S = 120.0
UNSENT_BYTES_MAX = 64 << 20  # on one stream; who has more to send waits

Answer = tuple[vnode_pb2.HopReply, memoryview | None]
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
            return await line.ask(request, data, began + timeout_s)
        except TimeoutError:
            if line.heard_at < began + timeout_s / 2:  # nobody may be there any more
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
            if line is not None:
                self._drop(line)
            while len(self._lines) >= LINES_MAX:
                self._drop(next(iter(self._lines.values())))
            line = self._lines[key] = _Line(self._dialer, contact, self._drop)
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
        self.heard_at = 0.0  # the last sign of life; never
        self.over = loop.create_task(self._run(dialer, contact))
        self._drop = drop
        self._loop = loop
        self._used_at = loop.time()
        self._retire_at = self._used_at + 0.75 * LINE_S
        self._retired = False
        self._error: P2PNetError | None = None
        self._core = Asker()
        self._alarm = Alarm(self._late)
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
        """See `Hops.hop`; raises TimeoutError at `until`."""
        self._users += 1
        try:
            if self._stream is None or self._error is not None or self._is_full():
                await self._wait_for_room(until)
            assert self._stream is not None
            now = self._loop.time()
            id = self._core.ask(
                request,
                payload,
                now,
                until - now,
                self._stream.stamp(),
                reply_bytes_max=PAYLOAD_BYTES_MAX if isinstance(request, _WITH_TENSOR) else 0,
            )
            self._alarm.by(until)
            answer: asyncio.Future[Answer] = self._loop.create_future()
            self._waiting[id] = answer
            self._to_send.set()
            try:
                return await answer
            finally:
                del self._waiting[id]
                self._core.give_up(id)
                if self._core.outbox:
                    self._to_send.set()
                self._room.set()
        finally:
            self._used_at = self._loop.time()
            self._users -= 1
            if self._retired and not self._users:
                self.end(None)

    async def _wait_for_room(self, until: float) -> None:
        async with asyncio.timeout_at(until):
            await self._opened.wait()
            while self._error is None and self._is_full():
                self._room.clear()
                await self._room.wait()
        if self._error is not None:
            raise _copy(self._error)

    def _late(self) -> float:
        for id in self._core.late(self._loop.time()):
            _fail(self._waiting[id], TimeoutError())
        self._to_send.set()
        return self._core.until

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
                    if self._core.outbox:  # the peer takes what is sent: slow, but there
                        self.heard_at = self._loop.time()
                self._to_send.clear()
                await self._to_send.wait()
        except P2PNetError:
            pass  # the other direction knows more

    def _ended(self) -> None:
        assert self._error is not None
        self._idle.cancel()
        self._alarm.stop()
        for answer in self._waiting.values():
            _fail(answer, _copy(self._error))
        self._opened.set()
        self._room.set()
        self._drop(self)

    def _check_idle(self) -> None:
        quiet_s = self._loop.time() - self._used_at
        if quiet_s >= IDLE_S and not self._users:
            self._drop(self)
        else:
            self._idle = self._loop.call_later(max(IDLE_S - quiet_s, 1.0), self._check_idle)


def _fail(answer: asyncio.Future[Answer], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # who waited for it may be cancelled meanwhile


def _copy(error: P2PNetError) -> P2PNetError:
    """Each that it concerns raises its own."""
    return type(error)(str(error))
