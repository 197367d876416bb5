"""A shell: async code for a program that is not: one place between its thread and the loop's.

Only waiting happens on the loop. What the program brings along, its batches and callbacks,
runs in its own thread, where it may block and be interrupted.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import CancelledError
from typing import Any, TypeVar, TypeVarTuple, Unpack

from p2pnet.errors import CancelledByUs
from p2pnet.net.bridge import AsyncioThread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CANCEL_S = 10.0

_END: Any = object()


class Portal:
    """Runs coroutines on a loop's thread while the caller's thread does what they ask of it."""

    def __init__(self, thread: AsyncioThread) -> None:
        self._thread = thread
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def run(self, coro_fn: Callable[[Unpack[Ts]], Coroutine[Any, Any, T]], *args: *Ts) -> T:
        """What `coro_fn(*args)` returns or raises; Ctrl-C cancels it. In the caller's thread.

        Raises:
            CancelledByUs: the loop's thread stops meanwhile.
        """
        ended = threading.Event()

        async def whole() -> T:
            try:
                return await coro_fn(*args)
            finally:
                ended.set()

        future = self._thread.submit(whole)
        future.add_done_callback(lambda _: self._work.put(None))
        try:
            while (work := self._work.get()) is not None:
                work()
            return future.result()
        except CancelledError:
            raise CancelledByUs("the client is closed") from None
        except BaseException:
            if future.cancel():
                ended.wait(CANCEL_S)  # it may have something to put in order
            raise

    async def call(self, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """What `function(*args)` returns or raises in the caller's thread. On the loop."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: Exception | None) -> None:
            if result.done():
                return  # cancelled
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)  # type: ignore[arg-type]

        def work() -> None:
            value: T | None = None
            problem: Exception | None = None
            try:
                value = function(*args)
            except Exception as error:
                problem = error
            loop.call_soon_threadsafe(settle, value, problem)

        self._work.put(work)
        return await result

    async def iterate(self, items: Callable[[], Iterable[T]]) -> AsyncIterator[T]:
        """What `items` gives, made in the caller's thread."""
        iterator = await self.call(lambda: iter(items()))
        while (item := await self.call(next, iterator, _END)) is not _END:
            yield item
