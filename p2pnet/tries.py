"""When to try which of the peers to start from. Pure.

For ever: a bootstrap peer that is no member now may be one of a part of the network
that we could not see, and through it the two parts become one again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RETRY_MIN_S = 0.5
RETRY_MAX_S = 300.0
ALONE_MAX_S = 30.0  # instead, while there is nobody else to learn from
REACHED_MIN_S = 30.0  # one that answers and is no member (it may only route)
WATCH_S = 30.0  # how often it is looked at whether one that is a member still is
AT_ONCE = 16


@dataclass(slots=True)
class _Try:
    at: float
    wait_s: float = RETRY_MIN_S
    running: bool = False


class Tries:
    """Tries of peers by name, in random order, a few at once, each with its own back-off."""

    def __init__(
        self, names: Sequence[str], rng: random.Random, now: float, *, at_once: int = AT_ONCE
    ) -> None:
        self._rng = rng
        self._at_once = at_once
        self._tries = {name: _Try(now) for name in rng.sample(names, len(names))}
        self._running = 0
        self._first = dict.fromkeys(self._tries)

    @property
    def all_tried(self) -> bool:
        """Whether every one was tried, or needed no try."""
        return not self._first

    def due(self, now: float, needless: Callable[[str], bool]) -> list[str]:
        """Whom to try now; each is to be followed by `ended`. Not who is `needless` to try."""
        names: list[str] = []
        waiting = [(name, one) for name, one in self._tries.items() if not one.running]
        waiting.sort(key=lambda item: item[1].at)  # stable: of those that wait alike, by lot
        for name, one in waiting:
            if one.at > now:
                break
            if needless(name):
                self._first.pop(name, None)
                one.wait_s = RETRY_MIN_S
                one.at = now + self._jittered(WATCH_S)
            elif self._running < self._at_once:
                one.running = True
                self._running += 1
                names.append(name)
        return names

    def ended(self, name: str, now: float, *, reached: bool, alone: bool) -> None:
        """A try is over."""
        one = self._tries[name]
        one.running = False
        self._running -= 1
        self._first.pop(name, None)
        wait_s = max(one.wait_s, REACHED_MIN_S) if reached else one.wait_s
        one.at = now + self._jittered(wait_s)
        one.wait_s = min(2 * one.wait_s, ALONE_MAX_S if alone else RETRY_MAX_S)

    def deadline(self) -> float | None:
        """When somebody is due; None where nobody is before a try ends."""
        if self._running >= self._at_once:
            return None
        return min((one.at for one in self._tries.values() if not one.running), default=None)

    def _jittered(self, wait_s: float) -> float:
        return wait_s * self._rng.uniform(0.75, 1.25)
