"""Calls between nodes in one process: what a dialer and a gRPC server are elsewhere.

Messages cross as bytes, and handlers run in tasks of the node that serves them,
so that a node can die with all that it does. Faults go between: hooks that every
call passes, delays, copies.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from p2pnet import keys
from p2pnet.errors import P2PNetError, RefusedError, UnreachableError
from p2pnet.keys import KeyPair, sha256
from p2pnet.net.dialer import PeerContact
from p2pnet.net.handlers import Caller, Method, refusal_of
from p2pnet.net.hop_frames import Buffer, Request
from p2pnet.v1 import vnode_pb2
from p2pnet.vnode.hops_server_shell import Handler, refusal_for

M = TypeVar("M", bound=Message)
T = TypeVar("T")

LATENCY_S = 0.001


@dataclass(frozen=True)
class Letter:
    """A call on its way. `source` and `to` are peer ids; a stream's `request` is None.

    A hop's method is "VNode/" and Train, Forward, Collect, Follow or Decided, though gRPC
    carries all of them over one stream; it alone has a payload.
    """

    source: str
    to: str
    method: str
    request: Any
    payload: bytes | None = None


Hook = Callable[[Letter], Awaitable[None] | None]


class MemoryStream:
    """What `Dialer.stream` opens."""

    def __init__(self, reply_type: type[Message]) -> None:
        self.requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.replies: asyncio.Queue[bytes | P2PNetError | None] = asyncio.Queue()
        self._reply_type = reply_type
        self._over: P2PNetError | None = None

    async def write(self, message: Message) -> None:
        if self._over is not None:
            raise self._over
        self.requests.put_nowait(message.SerializeToString())

    async def done_writing(self) -> None:
        self.requests.put_nowait(None)

    async def read(self, *, timeout_s: float | None = None) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self.replies.get()
        except TimeoutError:
            raise UnreachableError("the peer sent nothing in time") from None
        if isinstance(reply, P2PNetError):
            self._over = reply
            raise reply
        return None if reply is None else self._reply_type.FromString(reply)

    async def incoming(self) -> AsyncIterator[bytes]:
        while (request := await self.requests.get()) is not None:
            yield request


class MemoryDialer:
    """A `Dialer` whose peers are all in this process."""

    def __init__(self, wire: Wire, source: str) -> None:
        self._wire = wire
        self._source = source

    async def call(
        self,
        contact: PeerContact,
        method: str,
        request: Message,
        reply_type: type[M],
        *,
        timeout_s: float,
    ) -> M:
        letter = Letter(self._source, contact.peer_id, method, request)
        return reply_type.FromString(await self._wire.carry(letter, timeout_s))

    @asynccontextmanager
    async def stream(
        self, contact: PeerContact, method: str, reply_type: type[M], *, timeout_s: float
    ) -> AsyncIterator[Any]:
        letter = Letter(self._source, contact.peer_id, method, None)
        async with self._wire.stream(letter, reply_type, timeout_s) as stream:
            yield stream

    async def forget(self, peer_id: str) -> None:
        pass

    async def close(self) -> None:
        pass


class MemoryHops:
    """`vnode.hops_shell.Hops` over memory."""

    def __init__(self, wire: Wire, source: str) -> None:
        self._wire = wire
        self._source = source

    async def hop(
        self, contact: PeerContact, request: Request, payload: Buffer | None, *, timeout_s: float
    ) -> tuple[vnode_pb2.HopReply, memoryview | None]:
        return await self._wire.hop(self._source, contact.peer_id, request, payload, timeout_s)

    async def close(self) -> None:
        pass


class Endpoint:
    """A node as its callers meet it. `awake` is cleared while it answers nobody."""

    def __init__(self) -> None:
        self.dead = False
        self.awake = asyncio.Event()
        self.awake.set()
        self.tasks: dict[asyncio.Task[Any], None] = {}  # handlers that run
        self.methods: dict[str, Method] = {}  # by "Service/Method"
        self.answer_hop: Handler | None = None  # what it answers to hops


class Wire:
    """What carries calls. Made inside a running loop.

    Attributes:
        nodes: by peer id.
        letters: every call so far.
        before, after: hooks that every call goes past, before it is handled and
            before its answer goes back. They may kill, freeze, wait, or raise
            UnreachableError, which loses the message.
        latency_s: how long a message takes, by letter.
        copies: how often a unary call is delivered; the first answer counts.
        crashes: errors of handlers that were not raised on purpose.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.letters: list[Letter] = []
        self.before: list[Hook] = []
        self.after: list[Hook] = []
        self.latency_s: Callable[[Letter], float] = lambda letter: LATENCY_S
        self.copies: Callable[[Letter], int] = lambda letter: 1
        self.crashes: list[Exception] = []
        self._strays: dict[asyncio.Task[Any], None] = {}
        self._pulse = asyncio.Event()

    @property
    def nodes(self) -> Mapping[str, Endpoint]:
        raise NotImplementedError

    def is_seen(self, peer_id: str) -> bool:
        """Whether the membership counts a node among the living."""
        raise NotImplementedError

    async def until(self, condition: Callable[[], object], limit_s: float = 300.0) -> None:
        """Looks whenever something happens."""
        async with asyncio.timeout(limit_s):
            while not condition():
                self._pulse.clear()
                await self._pulse.wait()

    def something_happened(self) -> None:
        self._pulse.set()

    async def carry(self, letter: Letter, timeout_s: float) -> bytes:
        """A unary call: the reply's bytes, or the error that a dialer would raise."""
        for _ in range(self.copies(letter) - 1):
            self.spawn(self._stray(letter, timeout_s, self._handle))
        return await self._carry(letter, timeout_s, self._handle)

    async def hop(
        self, source: str, to: str, request: Request, payload: Buffer | None, timeout_s: float
    ) -> tuple[vnode_pb2.HopReply, memoryview | None]:
        """What `vnode.hops_shell.Hops` does, each hop a letter of its own."""
        method = f"VNode/{type(request).__name__.removesuffix('Request')}"
        letter = Letter(source, to, method, request, None if payload is None else bytes(payload))
        for _ in range(self.copies(letter) - 1):
            self.spawn(self._stray(letter, timeout_s, self._handle_hop))
        reply, data = await self._carry(letter, timeout_s, self._handle_hop)
        return vnode_pb2.HopReply.FromString(reply), None if data is None else memoryview(data)

    @asynccontextmanager
    async def stream(
        self, letter: Letter, reply_type: type[Message], timeout_s: float
    ) -> AsyncIterator[MemoryStream]:
        stream = MemoryStream(reply_type)
        try:
            async with asyncio.timeout(timeout_s):
                await self._on_the_way(letter)
                await self._past(self.before, letter)
        except TimeoutError:
            raise UnreachableError("the peer did not answer in time") from None
        node = self.nodes[letter.to]

        async def serve() -> None:
            async def write(reply: bytes) -> None:
                stream.replies.put_nowait(reply)

            try:
                caller = Caller(letter.source, timeout_s)
                method = node.methods[letter.method]
                reply = await method.run(stream.incoming(), caller, write)
                if reply is not None:
                    await write(reply)
                await self._past(self.after, letter)
                stream.replies.put_nowait(None)
            except Exception as error:
                stream.replies.put_nowait(self._refused(error))
            except asyncio.CancelledError:
                stream.replies.put_nowait(UnreachableError("the connection was lost"))

        task = self._run_at(node, serve())
        try:
            yield stream
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._strays[task] = None
        task.add_done_callback(self._strays.pop)

    async def _stray(
        self, letter: Letter, timeout_s: float, handle: Callable[[Letter, float], Awaitable[Any]]
    ) -> None:
        try:
            await self._carry(letter, timeout_s, handle)
        except P2PNetError:
            pass  # nobody waits for the answer to a copy

    async def _carry(
        self, letter: Letter, timeout_s: float, handle: Callable[[Letter, float], Awaitable[T]]
    ) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                await self._on_the_way(letter)
                await self._past(self.before, letter)
                reply = await handle(letter, timeout_s)
                await self._past(self.after, letter)
                await asyncio.sleep(self.latency_s(letter))
                return reply
        except TimeoutError:
            raise UnreachableError("the peer did not answer in time") from None

    async def _on_the_way(self, letter: Letter) -> None:
        self.letters.append(letter)
        await self._connected(letter)
        await asyncio.sleep(self.latency_s(letter))

    async def _past(self, hooks: Sequence[Hook], letter: Letter) -> None:
        for hook in list(hooks):
            done = hook(letter)
            if inspect.isawaitable(done):
                await done
        await self._connected(letter)

    async def _connected(self, letter: Letter) -> None:
        """Both ends are there; a caller that is dead gets no further."""
        source, to = self.nodes.get(letter.source), self.nodes.get(letter.to)
        if source is not None:
            if source.dead:
                await self.loop.create_future()
            await source.awake.wait()
        if to is None or to.dead or not self.is_seen(letter.to):
            raise UnreachableError(f"cannot reach peer {keys.short(letter.to)}")
        await to.awake.wait()

    async def _handle(self, letter: Letter, timeout_s: float) -> bytes:
        node = self.nodes[letter.to]
        raw = letter.request.SerializeToString()

        async def requests() -> AsyncIterator[bytes]:
            yield raw

        async def no_stream(reply: bytes) -> None:
            raise AssertionError(f"{letter.method} is no unary method")

        method = node.methods[letter.method]
        caller = Caller(letter.source, min(timeout_s, method.timeout_s))
        task = self._run_at(node, method.run(requests(), caller, no_stream))
        await self._done(task)
        error = task.exception()
        if isinstance(error, Exception):
            raise self._refused(error)
        reply = task.result()
        assert isinstance(reply, bytes)
        return reply

    async def _handle_hop(self, letter: Letter, timeout_s: float) -> tuple[bytes, bytes | None]:
        node = self.nodes[letter.to]
        request: Any = type(letter.request).FromString(letter.request.SerializeToString())
        payload = None if letter.payload is None else memoryview(letter.payload)
        assert node.answer_hop is not None

        async def answer(handler: Handler) -> tuple[vnode_pb2.HopReply, Buffer | None]:
            async with asyncio.timeout(timeout_s * 0.9):
                found = handler(request, payload, Caller(letter.source, timeout_s * 0.9))
                return found if isinstance(found, tuple) else await found

        task = self._run_at(node, answer(node.answer_hop))
        await self._done(task)
        error = task.exception()
        if isinstance(error, Exception):
            self._refused(error)  # which notes crashes
            return vnode_pb2.HopReply(refusal=refusal_for(error)).SerializeToString(), None
        reply, data = task.result()
        return reply.SerializeToString(), None if data is None else bytes(data)

    async def _done(self, task: asyncio.Task[Any]) -> None:
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        self.something_happened()
        if task.cancelled():
            raise UnreachableError("the connection was lost")

    def _refused(self, error: Exception) -> RefusedError:
        """As gRPC hands an error of a handler to the caller."""
        if not isinstance(error, (P2PNetError, TimeoutError)):
            self.crashes.append(error)
        return RefusedError(f"the peer refused: {refusal_of(error)[1]}")

    def _run_at(self, node: Endpoint, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        node.tasks[task] = None
        task.add_done_callback(lambda done: node.tasks.pop(done, None))
        return task


def keypair_of(name: str) -> KeyPair:
    """Everybody's key, by name."""
    return KeyPair.from_seed(sha256(name.encode()))


def contact_of(peer_id: str) -> PeerContact:
    return PeerContact(peer_id, (), b"")
