"""Both ends of a stream of hops: many requests with their payloads at a time. Pure.

Frames of what is under way take turns, so that a small message waits for one frame of
each large one and not for the whole of it. What a peer sends is held against what the
head of it said, before anything is allocated; a peer that breaks the rules costs its
stream (MalformedError) and nothing else.
"""

from __future__ import annotations

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
ID_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Asked:
    """A request has come, whole."""

    id: int
    request: Request
    payload: memoryview | None  # None: it has none
    timeout_s: float  # for how long its sender waits
    hlc: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Nobody waits any more for the reply to a request."""

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
    size_bytes: int
    timeout_s: float
    hlc: str
    assembly: Assembly | None  # None: it is whole


class Answerer:
    """The called side of a stream.

    Args:
        bytes_max: how large a payload a request may carry, by its head.
        room: the caller's.
    """

    def __init__(
        self,
        bytes_max: Callable[[Request], int],
        room: Room,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.outbox = Outbox(chunk_bytes)
        self._bytes_max = bytes_max
        self._room = room
        self._last = 0
        self._open: dict[int, _Open] = {}
        self._refused: dict[int, int] = {}  # how much more comes of a payload nobody wants

    def heard(self, raw: bytes) -> Asked | GivenUp | None:
        """Takes a frame. What is not taken in is answered by itself.

        Raises:
            MalformedError: the caller breaks the rules of a stream, which should end.
        """
        frame, data = read_frame(raw)
        id = frame.id
        request = request_of(frame)
        if request is not None:
            return self._begin(frame, request, data)
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
        return self._add(id, there, there.assembly, data)

    def answer(
        self, id: int, reply: vnode_pb2.HopReply, payload: memoryview | None, hlc: str
    ) -> None:
        """What becomes of a request; nothing where it was given up."""
        there = self._open.pop(id, None)
        if there is not None:
            self._room.give_back(there.size_bytes)
            head = vnode_pb2.HopFrame(id=id, reply=reply, hlc=hlc)
            self.outbox.put(head, NOTHING if payload is None else payload)

    def close(self) -> None:
        """The stream is over."""
        for there in self._open.values():
            self._room.give_back(there.size_bytes)
        self._open.clear()

    def _begin(self, frame: vnode_pb2.HopFrame, request: Request, data: memoryview) -> Asked | None:
        id, size_bytes = frame.id, frame.size_bytes
        if not self._last < id <= ID_MAX:
            raise MalformedError(f"hop {id} begins after hop {self._last}")
        self._last = id
        if no := self._refusal(request, size_bytes):
            head = vnode_pb2.HopFrame(id=id, reply=vnode_pb2.HopReply(refusal=no))
            self.outbox.put(head, NOTHING)
            # Each byte of it has to be read anyway; only what is refused is not bounded by room.
            if len(self._refused) >= EXCHANGES_MAX:
                raise MalformedError("too many hops that are refused are sent on all the same")
            self._refused[id] = size_bytes
            self._drain(id, data)
            return None
        there = _Open(request, size_bytes, frame.timeout_ms / 1000, frame.hlc, Assembly(size_bytes))
        self._open[id] = there
        assert there.assembly is not None
        return self._add(id, there, there.assembly, data)

    def _refusal(self, request: Request, size_bytes: int) -> common_pb2.Refusal | None:
        limit_bytes = min(self._bytes_max(request), PAYLOAD_BYTES_MAX)
        if size_bytes > limit_bytes:
            return common_pb2.Refusal(
                code=common_pb2.REFUSAL_CODE_TOO_LARGE,
                detail=f"a payload of {size_bytes} bytes; this peer takes {limit_bytes} here",
            )
        if not self._room.take(size_bytes):
            return common_pb2.Refusal(
                code=common_pb2.REFUSAL_CODE_BUSY,
                detail="this peer has no room for more of yours now",
            )
        return None

    def _add(self, id: int, there: _Open, assembly: Assembly, data: memoryview) -> Asked | None:
        payload = assembly.add(data)
        if payload is None:
            return None
        there.assembly = None
        return Asked(
            id, there.request, payload if there.size_bytes else None, there.timeout_s, there.hlc
        )

    def _drain(self, id: int, data: memoryview) -> None:
        left = self._refused[id] - len(data)
        if left < 0:
            raise MalformedError(f"hop {id} has another size than it said")
        if left:
            self._refused[id] = left
        else:
            del self._refused[id]

    def _give_up(self, id: int) -> GivenUp | None:
        if not 0 < id <= self._last:
            raise MalformedError(f"hop {id} is given up, and has not begun")
        self._refused.pop(id, None)
        there = self._open.pop(id, None)
        if there is None:
            self.outbox.drop(id)  # its reply, if that is on its way
            return None
        self._room.give_back(there.size_bytes)
        return GivenUp(id)


class Asker:
    """The calling side of a stream."""

    def __init__(self, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.outbox = Outbox(chunk_bytes)
        self._last = 0
        self._open: dict[int, int] = {}  # how large a payload the reply may have
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
        self._open[self._last] = reply_bytes_max
        self.outbox.put(head, NOTHING if payload is None else payload)
        return self._last

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
            if size_bytes > self._open[id]:
                raise MalformedError(
                    f"an answer of {size_bytes} bytes, where {self._open[id]} are the most"
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
        return Replied(id, head.reply, payload if head.size_bytes else None, head.hlc)
