"""What the peers that send large payloads have in common."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

from benchmarks.peers import talk

SIZE_BYTES = 16 << 20
CHUNK_BYTES = 512 << 10  # as p2pnet's hops have them


def payload() -> bytes:
    """Nothing that could be compressed."""
    return os.urandom(SIZE_BYTES)


async def obey(once: Callable[[], Awaitable[None]]) -> None:
    """Sends for as long as it is told to, one after another, until its driver is gone."""
    while command := await asyncio.to_thread(talk.listen):
        took_ms: list[float] = []
        until = time.perf_counter() + command["limit_s"]
        while (began := time.perf_counter()) < until:
            await once()
            took_ms.append((time.perf_counter() - began) * 1000)
        talk.say(took_ms=took_ms)
