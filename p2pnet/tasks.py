"""Background tasks of one owner on the asyncio loop: none is forgotten, none dies unheard."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class TaskSet:
    """Keeps tasks alive until they end, and ends those that are left on `close`.

    Args:
        what: whose tasks they are, for the log.
        on_error: told of a task that died of an exception, which is logged anyway.
    """

    def __init__(self, what: str, on_error: Callable[[BaseException], None] | None = None) -> None:
        self._what = what
        self._on_error = on_error
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins a coroutine."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Cancels what is under way, and waits for it to end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s: a task died", self._what, exc_info=error)
            if self._on_error is not None:
                self._on_error(error)
