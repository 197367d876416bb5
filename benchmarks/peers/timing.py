"""How long calls take, in a process that is measured from. Standard library alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence


def each(do: Callable[[], object], limit_s: float) -> list[float]:
    """One call after another for so long; what each took, ms."""
    took_ms: list[float] = []
    until = time.perf_counter() + limit_s
    while (began := time.perf_counter()) < until:
        do()
        took_ms.append((time.perf_counter() - began) * 1000)
    return took_ms


def at_once(callers: Sequence[Callable[[], object]], limit_s: float) -> float:
    """All callers at once, each one call after another in a thread of its own; calls a second."""
    counts = [0] * len(callers)
    start = threading.Barrier(len(callers) + 1)
    until = 0.0

    def run(number: int) -> None:
        start.wait()
        while time.perf_counter() < until:
            callers[number]()
            counts[number] += 1

    threads = [threading.Thread(target=run, args=[n], daemon=True) for n in range(len(callers))]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    until = began + limit_s
    start.wait()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)
