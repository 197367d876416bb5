"""Between the two event loops: trio, where the node lives, and asyncio, where gRPC does.

grpc.aio is asyncio-only and py-libp2p trio-only (DESIGN D2). gRPC has a thread
with its own loop; a call into the other side crosses once and its result once
back. The thread also serves alone, for a client that has no trio side.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, TypeVarTuple, Unpack

import trio

from p2pnet.errors import CancelledByUs, LocalError, ResourceError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CROSSINGS_MAX = 4096  # calls into trio at once; more are refused
STOP_S = 10.0

_STOPPING = "this node is shutting down"


class AsyncioThread:
    """One thread with its own asyncio loop.

    `start` and `stop` it, or use it in a `with`. What a task raises and nobody
    awaits is logged.
    """

    def __init__(self, name: str = "p2pnet-grpc") -> None:
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._lock = threading.Lock()  # orders `submit` before or after `stop`
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    def start(self) -> None:
        """Starts the loop and returns when it runs."""
        self._thread.start()
        self._ready.result(STOP_S)

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Cancels every task, waits for them to end, and ends the thread.

        Their callers get CancelledByUs. A second call does nothing.

        Raises:
            LocalError: a task did not end within `timeout_s`.
        """
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None:
            return
        loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise LocalError(f"a task did not end within {timeout_s:.0f} s of its cancellation")

    def submit(
        self, coro_fn: Callable[[Unpack[Ts]], Coroutine[Any, Any, T]], *args: *Ts
    ) -> concurrent.futures.Future[T]:
        """Starts `coro_fn(*args)` on the loop; may be called from any thread.

        Cancelling the future cancels the task.

        Raises:
            CancelledByUs: the thread is stopped, or was never started.
        """
        return self._spawn(coro_fn(*args))

    def run(self, coro: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        """Runs a coroutine and blocks until it is done. Not from the loop's own thread.

        Raises:
            TimeoutError: not done within `timeout_s`; it is cancelled.
            CancelledByUs: the thread is stopped, or stops meanwhile.
        """
        future = self._spawn(coro)
        try:
            return future.result(timeout_s)
        except concurrent.futures.CancelledError:
            raise CancelledByUs(_STOPPING) from None
        finally:
            future.cancel()  # nothing where it is done

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _spawn(self, coro: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._lock:
            if self._loop is not None:
                return asyncio.run_coroutine_threadsafe(coro, self._loop)
        coro.close()
        raise CancelledByUs(_STOPPING)

    def _main(self) -> None:
        asyncio.run(self._until_stopped())  # which cancels what is left

    async def _until_stopped(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log)
        self._loop = loop
        self._ready.set_result(None)
        await self._stop.wait()


def _log(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    logger.error("in gRPC's thread: %s", context["message"], exc_info=context.get("exception"))


class _Crossing(Generic[T]):
    """One call from asyncio into trio: where its result goes, and how it is cancelled."""

    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self.call = call
        self.scope = trio.CancelScope()
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self.loop.create_future()
        self._delivered = False

    def succeed(self, result: T) -> None:
        self._deliver(self.future.set_result, result)

    def fail(self, error: Exception) -> None:
        self._deliver(self.future.set_exception, error)

    def _deliver(self, setter: Callable[[Any], None], value: object) -> None:
        if self._delivered:
            return
        self._delivered = True

        def set_unless_cancelled() -> None:
            if not self.future.done():
                setter(value)

        try:
            self.loop.call_soon_threadsafe(set_unless_cancelled)
        except RuntimeError:
            logger.debug("a result came after the asyncio loop had closed")


class Bridge:
    """Calls from either loop into the other; made by `open_bridge`."""

    def __init__(self, thread: AsyncioThread, nursery: trio.Nursery, crossings_max: int) -> None:
        self.thread = thread
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._crossings = 0  # touched on the trio thread only, like `_closed`
        self._crossings_max = crossings_max
        self._closed = False

    async def to_trio(
        self,
        async_fn: Callable[[Unpack[Ts]], Awaitable[T]],
        *args: *Ts,
        timeout_s: float,
    ) -> T:
        """From asyncio: awaits `async_fn(*args)` on the trio side.

        Cancelling the caller cancels the trio task.

        Raises:
            TimeoutError: not done within `timeout_s`, even if the trio side hangs.
            ResourceError: too many such calls at once.
            CancelledByUs: the bridge is closed, or closes meanwhile.
        """
        crossing = _Crossing(lambda: async_fn(*args))
        try:
            self._token.run_sync_soon(self._start, crossing)
        except trio.RunFinishedError:
            raise CancelledByUs(_STOPPING) from None
        try:
            async with asyncio.timeout(timeout_s):
                return await crossing.future
        except (TimeoutError, asyncio.CancelledError):
            try:
                self._token.run_sync_soon(crossing.scope.cancel)
            except trio.RunFinishedError:
                pass  # and so did the task
            raise

    async def to_asyncio(
        self,
        coro_fn: Callable[[Unpack[Ts]], Coroutine[Any, Any, T]],
        *args: *Ts,
        timeout_s: float,
    ) -> T:
        """From trio: awaits `coro_fn(*args)` on the asyncio side.

        Cancelling the caller cancels the asyncio task.

        Raises:
            TimeoutError: not done within `timeout_s`.
            CancelledByUs: the bridge is closed, or closes meanwhile.
        """
        done = trio.Event()

        def wake(_: concurrent.futures.Future[T]) -> None:
            try:
                self._token.run_sync_soon(done.set)
            except trio.RunFinishedError:
                pass  # nobody waits any more

        future = self.thread.submit(coro_fn, *args)
        try:
            future.add_done_callback(wake)
            with trio.move_on_after(timeout_s):
                await done.wait()
            if not future.done():
                raise TimeoutError(f"not done within {timeout_s:g} s")
            return future.result()
        except concurrent.futures.CancelledError:
            raise CancelledByUs(_STOPPING) from None
        finally:
            future.cancel()  # nothing where it is done

    def _start(self, crossing: _Crossing[Any]) -> None:
        # Runs in trio's own loop, where an exception would end the whole program.
        if self._closed:
            crossing.fail(CancelledByUs(_STOPPING))
        elif self._crossings >= self._crossings_max:
            crossing.fail(ResourceError(f"busy: {self._crossings} calls are under way already"))
        else:
            self._crossings += 1
            self._nursery.start_soon(self._run, crossing)

    async def _run(self, crossing: _Crossing[T]) -> None:
        try:
            with crossing.scope:
                crossing.succeed(await crossing.call())
        except Exception as error:
            crossing.fail(error)
        finally:
            self._crossings -= 1
            crossing.fail(CancelledByUs(_STOPPING))  # nothing where it has an outcome

    def _close(self) -> None:
        self._closed = True
        self._nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_bridge(crossings_max: int = CROSSINGS_MAX) -> AsyncIterator[Bridge]:
    """On trio: starts the asyncio thread and joins the two loops.

    On leaving, calls still under way in either direction are cancelled and
    their callers get CancelledByUs.
    """
    thread = AsyncioThread()
    thread.start()
    try:
        async with trio.open_nursery() as nursery:
            bridge = Bridge(thread, nursery, crossings_max)
            try:
                yield bridge
            finally:
                bridge._close()
    finally:
        with trio.CancelScope(shield=True):  # `stop` has its own deadline
            await trio.to_thread.run_sync(thread.stop)
