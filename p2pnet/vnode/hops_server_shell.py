"""A shell: answers hops over gRPC, on the streams of all callers. Lives on the gRPC thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from p2pnet.errors import CancelledByUs, MalformedError, P2PNetError, RefusedError
from p2pnet.keys import short
from p2pnet.net.handlers import Caller, Method, RawRequests, refusal_of
from p2pnet.net.hop_frames import Buffer, Request
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.hops import Answerer, Asked, GivenUp
from p2pnet.vnode.hops_flow import Room
from p2pnet.vnode.hops_shell import LINE_S, UNSENT_BYTES_MAX

logger = logging.getLogger(__name__)

IDLE_S = 300.0  # more than callers keep an idle stream
REPLY_S = 0.5  # what is left of a caller's patience to tell it that it was not done in time
STREAMS_MAX = 8  # of one caller
ALL_EXCHANGES_MAX = 4096  # of all callers at a time
ALL_BYTES_MAX = 1 << 30  # of what they have sent

Handler = Callable[
    [Request, memoryview | None, Caller], Awaitable[tuple[vnode_pb2.HopReply, Buffer | None]]
]


class HopsServer:
    """Answers the streams of all callers.

    Args:
        hop: handles a request; what it raises becomes a refusal.
        bytes_max: how large a payload a request may carry, by what it says.
    """

    def __init__(self, hop: Handler, bytes_max: Callable[[Request], int]) -> None:
        self._hop = hop
        self._bytes_max = bytes_max
        self._room = Room(ALL_EXCHANGES_MAX, ALL_BYTES_MAX)
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
        room, streams = self._callers.get(caller.peer_id) or (Room(within=self._room), 0)
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
            async with asyncio.timeout(IDLE_S) as patience:
                async for raw in requests:
                    self._heard(self._core.heard(raw))
                    if self._core.outbox and self._sending is None:  # the core has refused it
                        self._sending = loop.create_task(self._send())
                    while self._core.outbox.unsent_bytes > UNSENT_BYTES_MAX:
                        self._sent.clear()
                        await self._sent.wait()
                    patience.reschedule(loop.time() + IDLE_S)
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
