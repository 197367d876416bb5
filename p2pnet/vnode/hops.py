"""The calling side of a stream of hops: many requests with their payloads at a time. Pure.

Frames of what is under way take turns, so that a small message waits for one frame of
each large one and not for the whole of it. What a peer sends is held against what the
head of it said, before anything is allocated; a peer that breaks the rules costs its
stream (MalformedError) and nothing else. `hops_answerer` is the other side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from p2pnet.errors import MalformedError
from p2pnet.net.hop_frames import Request, read_frame, request_head, request_of
from p2pnet.v1 import vnode_pb2
from p2pnet.vnode.hops_flow import CHUNK_BYTES, NOTHING, ROOM_BYTES_MAX, Assembly, Outbox


@dataclass(frozen=True, slots=True)
class Replied:
    """A reply has come, whole."""

    id: int
    reply: vnode_pb2.HopReply
    payload: memoryview | None
    hlc: str


class Asker:
    """The calling side of a stream."""

    def __init__(self, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.outbox = Outbox(chunk_bytes)
        self.until = math.inf  # nothing is late before
        self._last = 0
        self._open: dict[int, tuple[int, float]] = {}  # how large a reply may be, and until when
        self._coming: dict[int, tuple[vnode_pb2.HopFrame, Assembly]] = {}
        self._coming_bytes = 0

    @property
    def open(self) -> int:
        """How many requests have no reply yet."""
        return len(self._open)

    def ask(
        self,
        request: Request,
        payload: memoryview | None,
        now: float,
        timeout_s: float,
        hlc: str,
        *,
        reply_bytes_max: int,
    ) -> int:
        """Sends a request; returns its id."""
        self._last += 1
        head = request_head(request)
        head.id = self._last
        head.timeout_ms = max(1, min(int(timeout_s * 1000), (1 << 32) - 1))
        head.hlc = hlc
        until = now + timeout_s
        self._open[self._last] = reply_bytes_max, until
        self.until = min(self.until, until)
        self.outbox.put(head, NOTHING if payload is None else payload)
        return self._last

    def late(self, now: float) -> list[int]:
        """Gives up what has no reply in time."""
        out = [id for id, (_, until) in self._open.items() if until <= now]
        for id in out:
            self.give_up(id)
        self.until = min((until for _, until in self._open.values()), default=math.inf)
        return out

    def give_up(self, id: int) -> None:
        """The reply is not waited for; nothing where it has come."""
        if self._open.pop(id, None) is None:
            return
        coming = self._coming.pop(id, None)
        if coming is not None:
            self._coming_bytes -= coming[0].size_bytes
        self.outbox.give_up(id)

    def heard(self, raw: bytes) -> Replied | None:
        """Takes a frame.

        Raises:
            MalformedError: the peer breaks the rules of a stream, which should end.
        """
        frame, data = read_frame(raw)
        id = frame.id
        if not 0 < id <= self._last or request_of(frame) is not None:
            raise MalformedError(f"an answer to hop {id}, which was never sent")
        if id not in self._open:
            return None  # it was given up
        if frame.HasField("reply"):
            if id in self._coming:
                raise MalformedError(f"two answers to hop {id}")
            size_bytes = frame.size_bytes
            most_bytes, _ = self._open[id]
            if size_bytes > most_bytes:
                raise MalformedError(
                    f"an answer of {size_bytes} bytes, where {most_bytes} are the most"
                )
            self._coming[id] = frame, Assembly(size_bytes)
            self._coming_bytes += size_bytes
            if self._coming_bytes > ROOM_BYTES_MAX:
                raise MalformedError(f"answers of {self._coming_bytes} bytes at a time")
        elif id not in self._coming or not data:
            raise MalformedError(f"a frame without its answer to hop {id}")
        head, assembly = self._coming[id]
        payload = assembly.add(data)
        if payload is None:
            return None
        del self._coming[id], self._open[id]
        self._coming_bytes -= head.size_bytes
        if id in self.outbox:  # it is refused: the rest of it would be sent in vain
            self.outbox.give_up(id)
        return Replied(id, head.reply, payload if head.size_bytes else None, head.hlc)
