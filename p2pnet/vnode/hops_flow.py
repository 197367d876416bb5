"""What both ends of a stream of hops are made of: parts in turns, parts put together. Pure."""

from __future__ import annotations

from collections import deque

from p2pnet.errors import MalformedError
from p2pnet.net.hop_frames import DATA_BYTES_MAX, first_frame, later_frame
from p2pnet.v1 import vnode_pb2

CHUNK_BYTES = 512 << 10  # measured: docs/performance.md
EXCHANGES_MAX = 256  # of one peer at a time
PAYLOAD_BYTES_MAX = 256 << 20
ROOM_BYTES_MAX = 320 << 20  # of what one peer has sent at a time: one payload and then some
WAITING_MAX = 2 * EXCHANGES_MAX  # messages that a peer is to be sent
PARTS_FREE = 64  # of a payload, and one more for each ...
PART_BYTES_MIN = 512  # ... bytes: a part costs half as much beside its data

assert CHUNK_BYTES <= DATA_BYTES_MAX

NOTHING = memoryview(b"")


class Outbox:
    """What is to be sent, a frame of each message in turn; payloads are not copied."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.unsent_bytes = 0  # of payloads
        self._chunk_bytes = chunk_bytes
        self._alone_bytes = min(2 * chunk_bytes, DATA_BYTES_MAX)
        self._heads: dict[int, vnode_pb2.HopFrame] = {}  # not sent yet
        self._rest: dict[int, memoryview] = {}  # of payloads
        self._turns: deque[int] = deque()

    def __bool__(self) -> bool:
        """Whether something is to be sent."""
        return bool(self._turns)

    def __contains__(self, id: int) -> bool:
        """Whether a message has not been sent to its end."""
        return id in self._rest

    @property
    def is_full(self) -> bool:
        """Whether its receiver takes less than it causes."""
        return len(self._turns) > WAITING_MAX

    def put(self, head: vnode_pb2.HopFrame, payload: memoryview) -> None:
        """A message, the head of which gets the size of the payload (a flat view of bytes)."""
        head.size_bytes = len(payload)
        self._heads[head.id] = head
        self._rest[head.id] = payload
        self._turns.append(head.id)
        self.unsent_bytes += len(payload)

    def take(self) -> bytes | None:
        """The next frame; None: all is sent."""
        while self._turns:
            id = self._turns.popleft()
            rest = self._rest.get(id)
            if rest is None:
                continue  # dropped
            size_bytes = self._chunk_bytes
            if not self._turns and len(rest) <= self._alone_bytes:
                size_bytes = self._alone_bytes  # nobody waits, and its receiver copies nothing
            data, rest = rest[:size_bytes], rest[size_bytes:]
            self.unsent_bytes -= len(data)
            if rest:
                self._rest[id] = rest
                self._turns.append(id)
            else:
                del self._rest[id]
            head = self._heads.pop(id, None)
            return later_frame(id, data) if head is None else first_frame(head, data)
        return None

    def drop(self, id: int) -> bool:
        """What is left of a message is not sent; whether its receiver can have heard of it."""
        rest = self._rest.pop(id, None)
        if rest is not None:
            self.unsent_bytes -= len(rest)
        return self._heads.pop(id, None) is None

    def give_up(self, id: int) -> None:
        """As `drop`, and the receiver is told."""
        if self.drop(id):
            self._rest[id] = NOTHING  # a frame without a head and without data
            self._turns.append(id)


class Assembly:
    """A payload that comes in parts. What comes in one is not copied.

    It has no more memory than what has come, whatever was announced.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._filled = 0
        self._parts: list[memoryview] = []

    @property
    def left_bytes(self) -> int:
        """How much has not come."""
        return self._size_bytes - self._filled

    def add(self, data: memoryview) -> memoryview | None:
        """Takes the next part; the payload once it is whole.

        Raises:
            MalformedError: more than was announced, or in parts too small.
        """
        parts = self._parts
        parts.append(data)
        self._filled += len(data)
        if self._filled > self._size_bytes:
            raise MalformedError(f"{self._filled} bytes came of a payload of {self._size_bytes}")
        if self._filled < self._size_bytes:
            if len(parts) > PARTS_FREE + self._filled // PART_BYTES_MIN:
                raise MalformedError(f"{self._filled} bytes came in {len(parts)} parts")
            return None
        return data if len(parts) == 1 else memoryview(b"".join(parts))


class Room:
    """How much there may be at a time, of one peer or of many; `within` that of others."""

    def __init__(self, exchanges_max: int, bytes_max: int, *within: Room) -> None:
        self.exchanges = 0
        self.held_bytes = 0
        self._exchanges_max = exchanges_max
        self._bytes_max = bytes_max
        self._all: tuple[Room, ...] = (self, *(room for outer in within for room in outer._all))

    def take(self, exchanges: int, size_bytes: int) -> bool:
        """For so many more exchanges and bytes; False: there is none, and nothing is taken."""
        for room in self._all:
            if (
                room.exchanges + exchanges > room._exchanges_max
                or room.held_bytes + size_bytes > room._bytes_max
            ):
                return False
        for room in self._all:
            room.exchanges += exchanges
            room.held_bytes += size_bytes
        return True

    def give_back(self, exchanges: int, size_bytes: int) -> None:
        """What was taken."""
        for room in self._all:
            room.exchanges -= exchanges
            room.held_bytes -= size_bytes
