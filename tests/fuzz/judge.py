"""The judge of R12: only documented errors come out of a parser, soon, and little is kept."""

from __future__ import annotations

import gc
import inspect
import time
from random import Random

import trio
from fuzz.parsers import Parser

CPU_S_MAX = 0.05  # for one frame, of this thread's own time


def judge(parser: Parser, seed: int, count: int) -> int:
    """Sends `count` frames of a seed to a parser; returns how many it refused.

    Raises:
        AssertionError: another error than the parser documents, or too slow.
    """
    rng = Random(f"{parser.name} {seed}")
    read = parser.start(rng)

    async def waiting(data: bytes) -> None:
        found = read(data)
        assert inspect.isawaitable(found)
        await found

    async def all_of_them() -> int:
        refused = 0
        for n in range(count):
            data = parser.frame(rng)
            before = time.thread_time()
            try:
                if parser.waits:
                    await waiting(data)
                else:
                    read(data)
            except parser.errors:
                refused += 1
            except Exception as error:
                raise AssertionError(_case(parser, seed, n, data, error)) from error
            cpu_s = time.thread_time() - before
            assert cpu_s < CPU_S_MAX, _case(parser, seed, n, data, f"took {cpu_s:.3f} s")
        return refused

    # What the collector takes to look through the whole process is no frame's time.
    collects = gc.isenabled()
    gc.disable()
    try:
        if parser.waits:
            return trio.run(all_of_them)
        all_of_them().send(None)
    except StopIteration as done:
        return int(done.value)
    finally:
        if collects:
            gc.enable()
    raise AssertionError(f"the parser of a {parser.name} waits for something")


def _case(parser: Parser, seed: int, n: int, data: bytes, what: object) -> str:
    return (
        f"{parser.name}: {what!r} on frame {n} of seed {seed}, {len(data)} bytes: "
        f"{data[:600].hex()}"
    )
