"""Accusers who were refuted are not heard for a while, twice as long each time. Pure.

Who lies has a few shots, and then nobody spends bytes on it any more; who was
merely wrong, because it was itself slow, is soon heard again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

_FIRST_S = 5.0
_TIMES_MAX = 8  # 5 s * 2**7: 11 minutes
_ACCUSERS_MAX = 1024


class Mutes:
    """Refuted accusers, each with until when and how often; the last refuted last."""

    def __init__(self) -> None:
        self._muted: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def refuted(self, accusers: Iterable[str], now: float) -> None:
        """A member whom these accused of having failed is here."""
        for accuser in accusers:
            until, times = self._muted.pop(accuser, (now, 0))
            # What it does not do again is forgotten as slowly as it was muted.
            times = 1 + (times if now < until + _FIRST_S * 2**times else 0)
            times = min(times, _TIMES_MAX)
            self._muted[accuser] = (now + _FIRST_S * 2 ** (times - 1), times)
            if len(self._muted) > _ACCUSERS_MAX:
                self._muted.popitem(last=False)

    def muted(self, accuser: str, now: float) -> bool:
        """Whether what it says of others is not heard now."""
        return accuser in self._muted and now < self._muted[accuser][0]
