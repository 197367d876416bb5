"""The node's clock: CLOCK_BOOTTIME, so that a suspended laptop's sleep counts (DESIGN D5)."""

from __future__ import annotations

import time

_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", None)  # Linux; elsewhere the monotonic clock


def now() -> float:
    """Seconds since some fixed point in the past; never goes back."""
    return time.clock_gettime(_BOOTTIME) if _BOOTTIME is not None else time.monotonic()


def wall_ms() -> int:
    """Milliseconds since 1970. Only for `issued_at` and for people: it may jump."""
    return time.time_ns() // 1_000_000
