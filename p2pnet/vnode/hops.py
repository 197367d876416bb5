"""Both ends of a stream of hops: many requests with their payloads at a time. Pure.

Frames of what is under way take turns, so that a small message waits for one frame of
each large one and not for the whole of it. What a peer sends is held against what the
head of it said, before anything is allocated; a peer that breaks the rules costs its
stream (MalformedError) and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from p2pnet.errors import MalformedError
from p2pnet.net.hop_frames import Request, read_frame, request_head, request_of
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.hops_flow import (
    CHUNK_BYTES,
    EXCHANGES_MAX,
    NOTHING,
    ROOM_BYTES_MAX,
    Assembly,
    Outbox,
    Room,
)

PAYLOAD_BYTES_MAX = 256 << 20
UNKNOWN_BYTES_MAX = 64 << 20  # of a network that is not known, or not yet
ARRIVE_S_MAX = 600.0  # a payload that takes longer is not waited for
REPLY_S = 0.5  # what is left of a caller's patience to tell it that it was not done in time
ID_MAX = (1 << 63) - 1
BUSY = common_pb2.REFUSAL_CODE_BUSY
NO_ROOM = "this peer has no room for more of yours now"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request has come, whole."""

    id: int
    request: Request
    payload: memoryview | None  # None: it has none
    timeout_s: float  # for how long its sender waits, less the time that a reply takes
    hlc: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Nobody waits any more for the reply to a request: its handler should end."""

    id: int


@dataclass(frozen=True, slots=True)
class Replied:
    """A reply has come, whole."""

    id: int
    reply: vnode_pb2.HopReply
    payload: memoryview | None
    hlc: str


@dataclass(slots=True)
class _Open:
    """A request that is here in part, or has no reply yet."""

    request: Request
    timeout_s: float
    hlc: str
    until: float  # when it is late
    room: Room
    assembly: Assembly | None  # None: it is whole
    held_bytes: int = 0  # what has come of it
    unwanted: bool = False  # it is given up, or late: nobody hears its reply


class Answerer:
    """The called side of a stream.

    Room is taken for what has come, not for what is announced: an announcement costs nothing.

    Args:
        bytes_max: how large a payload a request may carry, by its head; None where it is of
            a network that is not known.
        room: the caller's.
        strange: the caller's, for what is of networks that are not known.
    """

    def __init__(
        self,
        bytes_max: Callable[[Request], int | None],
        room: Room,
        strange: Room,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.outbox = Outbox(chunk_bytes)
        self._bytes_max = bytes_max
        self._room = room
        self._strange = strange
        self._last = 0
        self._open: dict[int, _Open] = {}
        self._refused: dict[int, int] = {}  # how much more comes of a payload nobody wants

    def heard(self, raw: bytes, now: float) -> Asked | GivenUp | None:
        """Takes a frame. What is not taken in is answered by itself.

        Raises:
            MalformedError: the caller breaks the rules of a stream, which should end.
        """
        frame, data = read_frame(raw)
        id = frame.id
        request = request_of(frame)
        if request is not None:
            return self._begin(frame, request, data, len(raw), now)
        if frame.HasField("reply"):
            raise MalformedError("a caller sends requests, and no replies")
        if not data:
            return self._give_up(id)
        if id in self._refused:
            self._drain(id, data)
            return None
        there = self._open.get(id)
        if there is None or there.assembly is None:
            raise MalformedError(f"{len(data)} bytes for hop {id}, which takes none")
        return self._add(id, there, there.assembly, data, len(raw), now)

    def answer(
        self, id: int, reply: vnode_pb2.HopReply, payload: memoryview | None, hlc: str
    ) -> None:
        """What becomes of a request: its handler has ended. Not sent where it was given up."""
        there = self._leave(id)
        if there is not None and not there.unwanted:
            head = vnode_pb2.HopFrame(id=id, reply=reply, hlc=hlc)
            self.outbox.put(head, NOTHING if payload is None else payload)

    @property
    def until(self) -> float:
        """When something is late; infinity where nothing can be."""
        return min((it.until for it in self._open.values()), default=math.inf)

    def late(self, now: float) -> list[GivenUp]:
        """What was not answered in time is refused; what has not come is not waited for."""
        out = []
        for id in [id for id, there in self._open.items() if there.until <= now]:
            there = self._open[id]
            there.until = math.inf
            if there.assembly is not None:
                self._refuse(id, there.assembly.left_bytes, BUSY, "it did not come in time")
                self._leave(id)
            else:
                self._reply(id, BUSY, "not done in time")
                there.unwanted = True
                out.append(GivenUp(id))
        return out

    def close(self) -> None:
        """The stream is over, and no handler runs."""
        for id in list(self._open):
            self._leave(id)

    def _begin(
        self,
        frame: vnode_pb2.HopFrame,
        request: Request,
        data: memoryview,
        raw_bytes: int,
        now: float,
    ) -> Asked | None:
        id, size_bytes = frame.id, frame.size_bytes
        if not self._last < id <= ID_MAX:
            raise MalformedError(f"hop {id} begins after hop {self._last}")
        self._last = id
        limit_bytes, room = self._bytes_max(request), self._room
        if limit_bytes is None:
            limit_bytes, room = UNKNOWN_BYTES_MAX, self._strange
        if size_bytes > min(limit_bytes, PAYLOAD_BYTES_MAX):
            detail = f"a payload of {size_bytes} bytes; this peer takes {limit_bytes} here"
            self._refuse(id, size_bytes, common_pb2.REFUSAL_CODE_TOO_LARGE, detail)
            self._drain(id, data)
            return None
        if not room.take(1, 0):
            self._refuse(id, size_bytes, BUSY, NO_ROOM)
            self._drain(id, data)
            return None
        timeout_s, assembly = frame.timeout_ms / 1000, Assembly(size_bytes)
        until = now + min(timeout_s, ARRIVE_S_MAX)
        there = self._open[id] = _Open(request, timeout_s, frame.hlc, until, room, assembly)
        return self._add(id, there, assembly, data, raw_bytes, now)

    def _add(
        self,
        id: int,
        there: _Open,
        assembly: Assembly,
        data: memoryview,
        raw_bytes: int,
        now: float,
    ) -> Asked | None:
        if not there.room.take(0, raw_bytes):
            self._refuse(id, assembly.left_bytes, BUSY, NO_ROOM)
            self._leave(id)
            self._drain(id, data)
            return None
        there.held_bytes += raw_bytes
        payload = assembly.add(data)
        if payload is None:
            return None
        there.assembly = None
        timeout_s = there.timeout_s - min(REPLY_S, there.timeout_s / 10)
        there.until = now + timeout_s
        return Asked(id, there.request, payload if payload else None, timeout_s, there.hlc)

    def _leave(self, id: int) -> _Open | None:
        there = self._open.pop(id, None)
        if there is not None:
            there.room.give_back(1, there.held_bytes)
        return there

    def _refuse(self, id: int, left_bytes: int, code: common_pb2.RefusalCode, detail: str) -> None:
        """What is left of it is read over; only what is refused is not bounded by room."""
        self._reply(id, code, detail)
        if left_bytes:
            if len(self._refused) >= EXCHANGES_MAX:
                raise MalformedError("too many hops that are refused are sent on all the same")
            self._refused[id] = left_bytes

    def _reply(self, id: int, code: common_pb2.RefusalCode, detail: str) -> None:
        no = common_pb2.Refusal(code=common_pb2.RefusalCode.Name(code), detail=detail)
        self.outbox.put(vnode_pb2.HopFrame(id=id, reply=vnode_pb2.HopReply(refusal=no)), NOTHING)

    def _drain(self, id: int, data: memoryview) -> None:
        left = self._refused.get(id, 0) - len(data)
        if left < 0:
            raise MalformedError(f"hop {id} has another size than it said")
        if left:
            self._refused[id] = left
        else:
            self._refused.pop(id, None)

    def _give_up(self, id: int) -> GivenUp | None:
        if not 0 < id <= self._last:
            raise MalformedError(f"hop {id} is given up, and has not begun")
        self._refused.pop(id, None)
        there = self._open.get(id)
        if there is None or there.unwanted:
            self.outbox.drop(id)  # its reply, if that is on its way
            return None
        if there.assembly is not None:
            self._leave(id)
            return None
        there.unwanted = True  # its room is taken until its handler has ended
        return GivenUp(id)


class Asker:
    """The calling side of a stream."""

    def __init__(self, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.outbox = Outbox(chunk_bytes)
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
        self._open[self._last] = reply_bytes_max, now + timeout_s
        self.outbox.put(head, NOTHING if payload is None else payload)
        return self._last

    @property
    def until(self) -> float:
        """When something is late; infinity where nothing can be."""
        return min((until for _, until in self._open.values()), default=math.inf)

    def late(self, now: float) -> list[int]:
        """Gives up what has no reply in time."""
        out = [id for id, (_, until) in self._open.items() if until <= now]
        for id in out:
            self.give_up(id)
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
