"""The compute thread: where torch lives. The one shell of this package that starts a thread.

One thread, so that components need no locks and results come in the order asked
for. torch is imported in it at the first use, or ahead of that by `warm`; grad
mode and the number of threads are torch's per thread, and are set in it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from p2pnet.errors import CancelledByUs, ResourceError

logger = logging.getLogger(__name__)

T = TypeVar("T")

QUEUE_MAX = 1024
_SWITCH_S = 0.0005


class ComputeThread:
    """Runs functions one at a time, in order, off the event loop.

    Args:
        threads: what torch may use within one operation. Results differ in their
            last bits with it, so that it is part of what makes a run exact.
        queue_max: how many functions may wait or run at a time.
    """

    def __init__(self, threads: int = 1, queue_max: int = QUEUE_MAX) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="p2pnet-compute")
        self._places = threading.BoundedSemaphore(queue_max)
        self._ready = False
        self._closed = threading.Event()

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """What `fn(*args)` returns or raises. Cancelled while it waits, it never runs.

        Raises:
            ResourceError: too much is waiting already.
            CancelledByUs: the thread is closed, now or while this waited.
        """
        if self._closed.is_set():
            raise CancelledByUs("the node is shutting down")
        if not self._places.acquire(blocking=False):
            raise ResourceError("this node has more to compute than it can hold: try again later")
        future: Future[T] = self._pool.submit(self._call, fn, args)
        future.add_done_callback(lambda done: self._places.release())
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._closed.is_set() and future.cancelled():
                raise CancelledByUs("the node is shutting down") from None
            raise

    async def warm(self) -> None:
        """Imports torch ahead of its first use, which takes a second or more."""
        await self.run(_nothing)

    def close(self) -> None:
        """Ends the thread; blocks until what runs now is done, and what waits never runs."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _call(self, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
        if not self._ready:
            torch = _import_torch()
            torch.set_num_threads(self.threads)
            torch.set_grad_enabled(True)
            self._ready = True
            logger.debug("torch %s computes with %d threads", torch.__version__, self.threads)
        return fn(*args)


def _import_torch() -> Any:
    """Seconds of work during which the node's other threads have to answer its peers.

    So they are let in more often meanwhile than the interpreter's usual 5 ms.
    """
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        import torch
    finally:
        sys.setswitchinterval(usual_s)
    return torch


def _nothing() -> None: ...
