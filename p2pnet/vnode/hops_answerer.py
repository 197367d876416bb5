"""The called side of a stream of hops: requests put together, refused, answered. Pure.

See `hops` for the calling side, and for what both hold to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from p2pnet.errors import MalformedError
from p2pnet.net.hop_frames import Request, read_frame, request_of
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.hops_flow import (
    CHUNK_BYTES,
    EXCHANGES_MAX,
    NOTHING,
    PAYLOAD_BYTES_MAX,
    Assembly,
    Outbox,
    Room,
)

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
        self.until = math.inf  # nothing is late before
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

    def end(self, id: int) -> None:
        """The handler of a request has ended, and there is nothing to answer."""
        self._leave(id)

    def late(self, now: float) -> list[GivenUp]:
        """Refuses what has not come in time, and what has no answer in time."""
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
        self.until = min((it.until for it in self._open.values()), default=math.inf)
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
        if len(self._refused) >= EXCHANGES_MAX:
            raise MalformedError("too many hops that are refused are sent on all the same")
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
        self.until = min(self.until, until)
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
        self.until = min(self.until, there.until)
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
