"""A hybrid logical clock: timestamps that respect what caused what and stay near the time. Pure.

Kulkarni, Demirbas, Madappa, Avva, Leone: "Logical Physical Clocks", OPODIS 2014. A
timestamp is the largest wall clock reading heard of, and a counter for what happens
within it. Every call carries the sender's, and whoever hears it continues from there;
so if one event can have caused another, its timestamp is the smaller one, however
wrong the clocks are.

How far the clocks of two honest nodes may be apart is bounded, or a single peer with a
clock in the year 2100 would drag everybody's timestamps there. Clocks are taken to be
right within an hour, so two are at most two hours apart; a timestamp further ahead of
our own clock than `AHEAD_MS_MAX` is not followed, and the order between its sender's
events and ours is then not known.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from p2pnet.errors import MalformedError

AHEAD_MS_MAX = (2 * 60 + 5) * 60_000
WALL_MS_MAX = (1 << 48) - 1  # 48 bits for milliseconds and 16 for the counter, as in the paper
COUNTER_MAX = (1 << 16) - 1

_is_timestamp = re.compile(r"[0-9a-f]{12}-[0-9a-f]{4}").fullmatch


class Timestamp(NamedTuple):
    """Two of one node are never equal; those of several nodes are told apart by the node.

    `wall_ms` since 1970, by the fastest clock heard of.
    """

    wall_ms: int
    counter: int

    def __str__(self) -> str:
        """17 characters that sort as the timestamps do."""
        return "{:012x}-{:04x}".format(*self)


def parse_timestamp(text: str) -> Timestamp:
    """The inverse of `str`.

    Raises:
        MalformedError: it is none.
    """
    if not _is_timestamp(text):
        raise MalformedError(f"{text[:40]!r} is no timestamp such as 019a0c5f3a20-0003")
    return Timestamp(int(text[:12], 16), int(text[13:], 16))


class HybridClock:
    """One node's. `wall_ms` is what its wall clock says, and may jump either way."""

    def __init__(self) -> None:
        self._last = Timestamp(0, 0)

    def tick(self, wall_ms: int) -> Timestamp:
        """The timestamp of something that happens now: an event, or a message that goes out."""
        wall_ms = min(max(wall_ms, 0), WALL_MS_MAX)
        last = self._last
        if wall_ms > last.wall_ms:
            self._last = Timestamp(wall_ms, 0)
        elif last.counter < COUNTER_MAX:
            self._last = Timestamp(last.wall_ms, last.counter + 1)
        else:  # so much within a millisecond, or under a clock that went back
            self._last = Timestamp(last.wall_ms + 1, 0)
        return self._last

    def merge(self, heard: Timestamp, wall_ms: int) -> bool:
        """Continues after a timestamp that came in; False if it is too far ahead to follow."""
        if heard.wall_ms - wall_ms > AHEAD_MS_MAX:
            return False
        self._last = max(self._last, heard)
        return True
