"""The compute thread: where torch lives. The one shell of this package that starts a thread.

One thread, so that components need no locks and results come in the order asked
for. torch is imported in it at the first use, or ahead of that by `warm`; grad
mode and the number of threads are torch's per thread, and are set in it.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from p2pnet import clock
from p2pnet.errors import CancelledByUs, ResourceError
from p2pnet.vnode.devices import CPU, CUDA_ENVIRONMENT

logger = logging.getLogger(__name__)

T = TypeVar("T")

QUEUE_MAX = 1024
_SWITCH_S = 0.0005
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BLOCK_BYTES = 32 << 20  # the most that glibc allows
KEPT_BYTES = 128 << 20


class ComputeThread:
    """Runs functions one at a time, in order, off the event loop.

    Args:
        threads: what torch may use within one operation. Results differ in their
            last bits with it, so that it is part of what makes a run exact. torch
            starts no further thread for the CPU: one operation runs at a time, and a
            backward pass runs in the thread that asks for it.
        queue_max: how many functions may wait or run at a time.
        device: torch's name of what components are computed on.
        cpus: how many CPUs all of it may take: where that is fewer than `threads`, the
            thread rests after each function until what it took is no more than that share
            of the time since the function began.
        now, used: the node's clock, and the CPU time of the thread that asks; in seconds.
    """

    def __init__(
        self,
        threads: int = 1,
        queue_max: int = QUEUE_MAX,
        *,
        device: str = CPU,
        cpus: float | None = None,
        now: Callable[[], float] = clock.now,
        used: Callable[[], float] = time.thread_time,
    ) -> None:
        self.threads = threads
        self.device = device
        self._stretch = max(1.0, threads / (threads if cpus is None else cpus))
        self._now = now
        self._used = used
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
        future: Future[T] = Future()
        future.add_done_callback(lambda done: self._places.release())
        job = self._pool.submit(self._work, future, fn, args)
        job.add_done_callback(lambda job: job.cancelled() and future.cancel())
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

    def rest(self, seconds: float) -> None:
        """Blocks the thread for so long, or until it is closed."""
        self._closed.wait(seconds)

    def _work(self, future: Future[T], fn: Callable[..., T], args: tuple[Any, ...]) -> None:
        """Gives the result before it rests, so that whoever waits for it does not wait for that."""
        if not future.set_running_or_notify_cancel():
            return
        began, used_s = self._now(), 0.0
        try:
            self._set_up()
            began, before_s = self._now(), self._used()
            try:
                result = fn(*args)
            finally:
                used_s = self._used() - before_s
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        rest_s = began + used_s * self._stretch - self._now()
        if self._stretch > 1.0 and rest_s > 0:
            self.rest(rest_s)

    def _set_up(self) -> None:
        if self._ready:
            return
        if self.device != CPU:
            os.environ.update(CUDA_ENVIRONMENT)
        keep_memory()
        torch = _import_torch()
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(True)
        if self.device != CPU:
            torch.cuda.set_device(self.device)
        self._ready = True
        logger.debug(
            "torch %s computes on %s with %d threads", torch.__version__, self.device, self.threads
        )


def keep_memory() -> None:
    """Lets glibc keep blocks of the size of a layer's gradients, and not only small ones.

    It gives them back to the kernel by default, whose zeroed pages are then asked for again
    in every step (measured: 8 % of the CPU of a step of 8 layers of 1024 x 1024).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another libc
    mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


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
