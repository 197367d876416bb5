"""A shell: answers hops over gRPC, on the streams of all callers. Lives on the gRPC thread."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from p2pnet.errors import CancelledByUs, MalformedError, P2PNetError, RefusedError
from p2pnet.keys import short
from p2pnet.net.handlers import Caller, Method, RawRequests, refusal_of
from p2pnet.net.hop_frames import Buffer, Request
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.alarm_shell import Alarm
from p2pnet.vnode.hops_answerer import UNKNOWN_BYTES_MAX, Answerer, Asked, GivenUp
from p2pnet.vnode.hops_flow import EXCHANGES_MAX, ROOM_BYTES_MAX, Room
from p2pnet.vnode.hops_shell import LINE_S, UNSENT_BYTES_MAX

logger = logging.getLogger(__name__)

IDLE_S = 300.0  # more than callers keep an idle stream
STREAMS_MAX = 8  # of one caller
ALL_EXCHANGES_MAX = 4096  # of all callers at a time
ALL_BYTES_MAX = 1 << 30  # of what they have sent
STRANGE_BYTES_MAX = UNKNOWN_BYTES_MAX + (1 << 20)  # of networks that are not known: of one caller
ALL_STRANGE_BYTES_MAX = 192 << 20  # ... and of all

Answer = tuple[vnode_pb2.HopReply, Buffer | None]
Handler = Callable[[Request, memoryview | None, Caller], Answer | Coroutine[Any, Any, Answer]]


class HopsServer:
    """Answers the streams of all callers.

    Args:
        hop: handles a request; what it raises becomes a refusal. What need not wait is answered
            without a task, which would cost more than the rest of a hop does here.
        bytes_max: how large a payload a request may carry, by what it says; None where it is
            of a network that is not known.
    """

    def __init__(self, hop: Handler, bytes_max: Callable[[Request], int | None]) -> None:
        self._hop = hop
        self._bytes_max = bytes_max
        self._room = Room(ALL_EXCHANGES_MAX, ALL_BYTES_MAX)
        self._strange = Room(ALL_EXCHANGES_MAX, ALL_STRANGE_BYTES_MAX)
        self._callers: dict[str, tuple[Room, Room, int]] = {}  # and how many streams
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
        room, strange, streams = self._callers.get(caller.peer_id) or (*self._rooms(), 0)
        if streams >= STREAMS_MAX:
            raise RefusedError(f"{streams} of your streams of hops are open already")
        self._callers[caller.peer_id] = room, strange, streams + 1
        serving = _Serving(self._hop, Answerer(self._bytes_max, room, strange), caller, write)
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
            *_, streams = self._callers[caller.peer_id]
            if streams == 1:
                del self._callers[caller.peer_id]
            else:
                self._callers[caller.peer_id] = room, strange, streams - 1

    def _rooms(self) -> tuple[Room, Room]:
        room = Room(EXCHANGES_MAX, ROOM_BYTES_MAX, self._room)
        return room, Room(EXCHANGES_MAX, STRANGE_BYTES_MAX, room, self._strange)


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
        self._loop = asyncio.get_running_loop()
        self._alarm = Alarm(self._late)
        self._tasks: dict[int, asyncio.Task[None]] = {}  # handlers that run
        self._sending: asyncio.Task[Any] | None = None
        self._sent = asyncio.Event()

    async def run(self, requests: RawRequests) -> None:
        """Until the caller ends it; raises MalformedError where it breaks the rules."""
        core, idle_at = self._core, self._loop.time() + IDLE_S
        try:
            async with asyncio.timeout_at(idle_at) as patience:
                async for raw in requests:
                    now = self._loop.time()
                    self._heard(core.heard(raw, now))
                    self._alarm.by(core.until)
                    if core.outbox and self._sending is None:
                        # A frame from here: waking somebody for it costs more than the rest.
                        self._sending = asyncio.current_task()
                        await self._send(1)
                        self._send_on()
                    while core.outbox.is_full or core.outbox.unsent_bytes > UNSENT_BYTES_MAX:
                        self._sent.clear()
                        await self._sent.wait()
                    if idle_at - now < 0.75 * IDLE_S:  # each time would cost a timer
                        idle_at = now + IDLE_S
                        patience.reschedule(idle_at)
        except TimeoutError:
            pass  # it is idle: the caller opens another when it has something to say
        finally:
            self._alarm.stop()
            tasks = [*self._tasks.values(), *([self._sending] if self._sending else [])]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            core.close()

    def _heard(self, event: Asked | GivenUp | None) -> None:
        if isinstance(event, Asked):
            self._asked(event)
        elif event is not None:
            self._given_up(event)

    def _given_up(self, event: GivenUp) -> None:
        if event.id in self._tasks:
            self._tasks[event.id].cancel()

    def _late(self) -> float:
        for event in self._core.late(self._loop.time()):
            self._given_up(event)
        self._send_on()
        return self._core.until

    def _asked(self, asked: Asked) -> None:
        who = self._caller
        if who.causality is not None:
            who.causality.incoming(asked.hlc, who.peer_id)
        try:
            found = self._hop(
                asked.request, asked.payload, Caller(who.peer_id, asked.timeout_s, who.causality)
            )
        except Exception as error:
            self._answer(asked.id, *self._refused(error))
            return
        if isinstance(found, tuple):
            self._answer(asked.id, *found)
            return
        handler = found  # cancelled before its first step, it would not be closed

        def ended(task: asyncio.Task[None]) -> None:
            handler.close()
            self._tasks.pop(asked.id, None)
            self._core.end(asked.id)

        task = self._tasks[asked.id] = self._loop.create_task(self._wait_for(asked.id, handler))
        task.add_done_callback(ended)

    async def _wait_for(self, id: int, handler: Coroutine[Any, Any, Answer]) -> None:
        try:
            reply, payload = await handler
        except Exception as error:
            reply, payload = self._refused(error)
        del self._tasks[id]  # from here on it sends
        self._answer(id, reply, payload)
        if self._sending is None:
            # By this very task: waking another one costs more than the rest of an answer.
            self._sending = asyncio.current_task()
            await self._send(math.inf)

    def _refused(self, error: Exception) -> Answer:
        if not isinstance(error, (P2PNetError, TimeoutError)):
            logger.error("a hop of peer %s failed", short(self._caller.peer_id), exc_info=error)
        return vnode_pb2.HopReply(refusal=refusal_for(error)), None

    def _answer(self, id: int, reply: vnode_pb2.HopReply, payload: Buffer | None) -> None:
        causality = self._caller.causality
        hlc = "" if causality is None else causality.outgoing()
        self._core.answer(id, reply, None if payload is None else memoryview(payload), hlc)

    def _send_on(self) -> None:
        if self._core.outbox and self._sending is None:
            self._sending = self._loop.create_task(self._send(math.inf))

    async def _send(self, frames_max: float) -> None:
        """Sends what is to be sent, and what is added meanwhile."""
        try:
            while frames_max and (frame := self._core.outbox.take()) is not None:
                frames_max -= 1
                await self._write(frame)
                self._sent.set()
        except Exception as error:  # the stream is over, as its other direction hears
            logger.debug("no more replies to peer %s: %s", short(self._caller.peer_id), error)
        finally:
            self._sending = None
            self._sent.set()
