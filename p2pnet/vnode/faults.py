"""Breakpoints for fault tests: a node stops at a point, so that it can be killed just there.

Only in a node that was started with `join --faults`; elsewhere nothing can be armed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from p2pnet.errors import UsageError


class Faults:
    """Points that a VNode's work goes past. Lives on the gRPC thread."""

    def __init__(self, enabled: bool, emit: Callable[..., None]) -> None:
        self.enabled = enabled
        self._emit = emit
        self._armed: dict[tuple[str, str], tuple[int, asyncio.Future[int]]] = {}

    async def stop_at(self, point: str, vnode: str, from_step: int) -> int:
        """Arms a point, and returns the step at which the VNode has stopped there, for good.

        Raises:
            UsageError: this node was not started with --faults.
        """
        if not self.enabled:
            raise UsageError("faults can only be injected into a node started with --faults")
        stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._armed[point, vnode] = (from_step, stopped)
        return await stopped

    async def reach(self, point: str, vnode: str, step: int) -> None:
        """Called where the point is: goes on at once unless it is armed."""
        if not self.enabled:
            return
        from_step, stopped = self._armed.get((point, vnode), (0, None))
        if stopped is not None and step >= from_step:
            if not stopped.done():
                stopped.set_result(step)
            self._emit("stopped", point=point, vnode=vnode, step=step)
            await asyncio.get_running_loop().create_future()
