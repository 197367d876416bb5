"""An event loop whose clock jumps where others would wait, and computations without a thread.

There is nothing beside the loop: computations and files run where they are asked
for, and time goes on only when nothing else can. So a test that waits for a lease
takes no time, a run repeats exactly, and a test in which nothing can happen any
more fails at once instead of hanging.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from p2pnet.vnode.executor import ComputeThread

T = TypeVar("T")

LIMIT_S = 3600.0  # of a test, by the loop's own clock


class _Timeless(selectors.SelectSelector):
    """Waits for nothing: the clock jumps to where the wait would have ended."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits, and nothing can happen any more"
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own, and with no threads beside it."""

    def __init__(self) -> None:
        self._timeless = _Timeless()
        super().__init__(self._timeless)

    def time(self) -> float:
        return self._timeless.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def play(main: Coroutine[Any, Any, T], *, limit_s: float = LIMIT_S) -> T:
    """As `asyncio.run`, in virtual time; what a task dies of without being asked fails the test."""
    unheard: list[str] = []

    async def bounded() -> T:
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: unheard.append(f"{context['message']}: {context}")
        )
        async with asyncio.timeout(limit_s):
            return await main

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(bounded())
    assert not unheard, unheard
    return result


class InlineCompute(ComputeThread):
    """Computes where it is asked to, a turn of the loop later."""

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        import torch

        torch.set_num_threads(1)
        await asyncio.sleep(0)
        return fn(*args)

    async def warm(self) -> None:
        pass
