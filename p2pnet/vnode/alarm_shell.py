"""A shell: one timer for many deadlines. A timer each costs more than what it guards."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Alarm:
    """Rings no earlier than the earliest deadline it was told of, and again for the next.

    Deadlines that are met need not be taken back: it rings in vain then, and is told by
    `ring` which one is next (infinity: none). Belongs to the running loop.
    """

    def __init__(self, ring: Callable[[], float]) -> None:
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._at = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def by(self, when: float) -> None:
        """A deadline, in the loop's time."""
        if when < self._at:
            self.stop()
            self._at = when
            self._timer = self._loop.call_at(when, self._rung)

    def stop(self) -> None:
        """Does not ring any more, unless it is told of another deadline."""
        if self._timer is not None:
            self._timer.cancel()
        self._at, self._timer = math.inf, None

    def _rung(self) -> None:
        self._at, self._timer = math.inf, None
        self.by(self._ring())
