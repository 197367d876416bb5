"""What a request and a connection are in the simulator. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pnet.sim.machine import Machine

# (answer, who): answer None where the protocol has none; who None if the request failed.
Done = Callable[[Any, Machine | None], None]


class Silence:
    """What a program answers to say nothing at all: the asker waits for its timeout."""


class Later:
    """What a program answers when it has to ask others first; `answer` or `fail`, once."""

    __slots__ = ("_send", "_what")

    def __init__(self) -> None:
        self._send: Callable[[Any, bool], None] | None = None
        self._what: tuple[Any, bool] | None = None

    def answer(self, reply: Any) -> None:
        """Sends the answer; only the first one counts."""
        self._end(reply, True)

    def fail(self) -> None:
        """Ends the request without one."""
        self._end(None, False)

    def then(self, send: Callable[[Any, bool], None]) -> None:
        """Who sends it; at once, if it is there."""
        self._send = send
        if self._what is not None:
            send(*self._what)

    def _end(self, reply: Any, good: bool) -> None:
        if self._what is None:
            self._what = (reply, good)
            if self._send is not None:
                self._send(reply, good)


class Line:
    """One machine's end of a connection."""

    __slots__ = ("asked", "heard_at", "owner", "peer", "twin", "used_at")

    def __init__(self, owner: Machine, peer: Machine, now: float) -> None:
        self.owner = owner
        self.peer = peer
        self.twin: Line = self  # until the other end is made
        self.heard_at = now
        self.used_at = now
        self.asked: dict[Request, None] = {}  # what waits for an answer on it


class Request:
    """A request under way. `protocol` "": only the connection is wanted."""

    __slots__ = (
        "again",
        "asker",
        "boots",
        "done",
        "line",
        "payload",
        "peer_id",
        "protocol",
        "until",
        "wants_reply",
    )

    def __init__(
        self,
        asker: Machine,
        peer_id: str,
        protocol: str,
        payload: Any,
        until: float,
        wants_reply: bool,
        done: Done,
    ) -> None:
        self.asker = asker
        self.boots = asker.boots
        self.peer_id = peer_id
        self.protocol = protocol
        self.payload = payload
        self.until = until
        self.wants_reply = wants_reply
        self.done: Done | None = done
        self.line: Line | None = None
        self.again = False  # sent over a second connection already
