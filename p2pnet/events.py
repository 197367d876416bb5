"""What happens in a node, for whoever follows it. Lives on the gRPC thread."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

FOLLOWERS_MAX = 16
_WAITING_MAX = 10_000  # a follower that is so far behind misses events


class EventBus:
    """Hands every event to every follower, as one line of JSON.

    `emit` may be called on any thread once `bind` has named the loop.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._followers: list[asyncio.Queue[str]] = []

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Followers live on this loop."""
        self._loop = loop

    def emit(self, event: str, **fields: Any) -> None:
        """Tells all followers; costs next to nothing when there are none."""
        if self._followers and self._loop is not None and not self._loop.is_closed():
            line = json.dumps({"event": event, **fields})
            self._loop.call_soon_threadsafe(self._deliver, line)

    async def follow(self) -> AsyncIterator[str]:
        """Events from now on."""
        if len(self._followers) >= FOLLOWERS_MAX:
            return
        queue: asyncio.Queue[str] = asyncio.Queue(maxsize=_WAITING_MAX)
        self._followers.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._followers.remove(queue)

    def _deliver(self, line: str) -> None:
        for queue in self._followers:
            if not queue.full():
                queue.put_nowait(line)
