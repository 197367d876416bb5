"""What a request and a connection are in the simulator. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pnet.sim.machine import Machine

# (answer, who): answer None where the protocol has none; who None if the request failed.
Done = Callable[[Any, Machine | None], None]


class Silence:
    """What a program answers to say nothing at all: the asker waits for its timeout."""


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
