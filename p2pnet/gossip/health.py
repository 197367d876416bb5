"""Lifeguard's two lessons: doubt yourself first, and wait longer the fewer confirm. Pure.

Dadgar, Phillips, Currey, "Lifeguard: Local Health Awareness for More Accurate
Failure Detection", DSN 2018 (arXiv 1707.00788).
"""

from __future__ import annotations

import math

_SCORE_MAX = 4


class LocalHealth:
    """How far this node mistrusts itself.

    The score (Lifeguard's local health multiplier) grows when our own ticks come
    late or when others accuse us wrongly, and shrinks by one in each quiet
    interval.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._score = 0
        self._at = 0.0

    def late(self, lateness_s: float, now: float) -> None:
        """A tick of ours came late: by more than an interval counts for more."""
        self._worse(1 + int(lateness_s / self._interval_s), now)

    def accused(self, now: float) -> None:
        """Somebody missed us, who are here: we may have answered too late."""
        self._worse(1, now)

    def score(self, now: float) -> int:
        """0 (well) to 4."""
        return max(0, self._score - int((now - self._at) / self._interval_s))

    def _worse(self, by: int, now: float) -> None:
        self._score = min(_SCORE_MAX, self.score(now) + by)
        self._at = now


def suspicion_s(
    confirmations: int, possible: int, members: int, *, min_s: float, max_s: float
) -> float:
    """How long a suspicion lasts before it is held to be a failure (Lifeguard, section IV-B).

    max(min, max - (max - min) * log(C + 1) / log(K + 1)), where C others confirm it
    of K that could; both ends grow with log10 of the members, as in SWIM.
    """
    scale = max(1.0, math.log10(max(1, members)))
    if possible < 1:
        return min_s * scale
    share = math.log(confirmations + 1) / math.log(possible + 1)
    return scale * max(min_s, max_s - (max_s - min_s) * share)
