"""A peer process and whoever drives it: one JSON object a line, in and out.

Standard library alone: the peers of other systems run in environments of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

# What a peer stores is about as large as the record that an orchestrator signs.
VALUE_BYTES = 460
QUORUM = 3
REPLICAS = 8


def value(number: int) -> bytes:
    """What the systems that sign nothing store under a key."""
    return (b"%d " % number * VALUE_BYTES)[:VALUE_BYTES]


class Peer:
    """What a peer can be told to do. Keys go by number; every get checks what it got."""

    async def meet(self, addrs: Sequence[str]) -> None:
        """Joins the swarm through these peers."""
        raise NotImplementedError

    async def known(self) -> int:
        """How many others are in its routing table."""
        raise NotImplementedError

    async def holds(self, number: int) -> bool:
        """Whether a get here would find a copy without asking anybody."""
        raise NotImplementedError

    async def put(self, number: int) -> bool:
        """Stores one; whether that was confirmed."""
        raise NotImplementedError

    async def get(self, number: int) -> bool:
        """Whether the right value was found."""
        raise NotImplementedError

    async def get_any(self, number: int) -> bool:
        """The same where the first copy will do, whatever its age."""
        return await self.get(number)

    async def put_all(self, numbers: Sequence[int]) -> int:
        """Stores all in one call or at once; how many were confirmed."""
        raise NotImplementedError

    async def get_all(self, numbers: Sequence[int]) -> int:
        """Gets all in one call or at once; how many right values were found."""
        raise NotImplementedError

    async def prepare(self, number: int) -> None:
        """Before an operation on that key, unmeasured: what is not the DHT's work."""

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carries a command out and says what came of it."""
        numbers = command.get("numbers", [])
        match command["do"]:
            case "meet":
                await self.meet(command["addrs"])
                return {}
            case "known":
                return {"known": await self.known()}
            case "holds":
                return {"holds": [n for n in numbers if await self.holds(n)]}
            case "put" | "get" | "get_any" as name:
                for number in numbers:
                    await self.prepare(number)
                return await _one_by_one(getattr(self, name), numbers, command["limit_s"])
            case "put_all" | "get_all" as name:
                for number in numbers:
                    await self.prepare(number)
                began = time.perf_counter()
                good = await getattr(self, name)(numbers)
                return {"good": good, "took_s": time.perf_counter() - began}
            case other:
                raise ValueError(other)


async def _one_by_one(
    do: Callable[[int], Awaitable[bool]], numbers: Sequence[int], limit_s: float
) -> dict[str, Any]:
    """Times each; begins none after `limit_s`. What fails counts as not good, with its time."""
    took_ms: list[float] = []
    good = 0
    error = ""
    until = time.perf_counter() + limit_s
    for number in numbers:
        began = time.perf_counter()
        if began >= until:
            break
        try:
            good += await do(number)
        except Exception as failure:
            error = repr(failure)
        took_ms.append((time.perf_counter() - began) * 1000)
    return {"took_ms": took_ms, "good": good, "error": error}


def listen() -> dict[str, Any] | None:
    """The next command; None when whoever drives us is gone."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def say(**answer: object) -> None:
    """One answer."""
    os.write(_answers, json.dumps(answer).encode() + b"\n")


# What libraries print goes where their logs go.
_answers = os.dup(1)
os.dup2(2, 1)
