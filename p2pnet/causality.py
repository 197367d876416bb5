"""A node's hybrid logical clock, as its calls and its events share it. From any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from p2pnet import clock
from p2pnet.errors import MalformedError
from p2pnet.hlc import HybridClock, Timestamp, parse_timestamp

APART_KEPT = 256  # peers whose clocks are too far ahead, and of whom that was said

# (peer id, by how many seconds its timestamps are ahead of our clock)
Apart = Callable[[str, float], None]


class Causality:
    """Stamps what goes out, and continues after what comes in.

    Args:
        wall_ms: the wall clock; another one in tests.
    """

    def __init__(self, wall_ms: Callable[[], int] = clock.wall_ms) -> None:
        self.on_apart: Apart = lambda peer_id, ahead_s: None
        self._wall_ms = wall_ms
        self._clock = HybridClock()
        self._lock = threading.Lock()
        self._apart: dict[str, None] = {}

    def stamp(self) -> tuple[Timestamp, int]:
        """The next timestamp, and what our own wall clock says, in ms."""
        wall_ms = self._wall_ms()
        with self._lock:
            return self._clock.tick(wall_ms), wall_ms

    def outgoing(self) -> str:
        """What a message of ours carries."""
        return str(self.stamp()[0])

    def incoming(self, text: object, peer_id: str) -> None:
        """Takes what a message carries. What is no timestamp, or too far ahead, changes nothing;

        of the latter `on_apart` is told once a peer.
        """
        if not isinstance(text, str):
            return
        try:
            heard = parse_timestamp(text)
        except MalformedError:
            return
        if self.follow(heard) or peer_id in self._apart or len(self._apart) >= APART_KEPT:
            return
        self._apart[peer_id] = None
        self.on_apart(peer_id, (heard.wall_ms - self._wall_ms()) / 1000)

    def follow(self, heard: Timestamp) -> bool:
        """Continues after a timestamp; False where it is too far ahead."""
        wall_ms = self._wall_ms()
        with self._lock:
            return self._clock.merge(heard, wall_ms)
