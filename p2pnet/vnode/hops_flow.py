"""What both ends of a stream of hops are made of: parts in turns, parts put together. Pure."""

from __future__ import annotations

from collections import deque

from p2pnet.errors import MalformedError
from p2pnet.net.hop_frames import DATA_BYTES_MAX, first_frame, later_frame
from p2pnet.v1 import vnode_pb2

CHUNK_BYTES = 512 << 10  # measured: docs/performance.md
LARGE_BYTES = 4 << 20
EXCHANGES_MAX = 256  # of one peer at a time
ROOM_BYTES_MAX = 512 << 20  # of payloads that one peer has sent or begun to send

assert CHUNK_BYTES <= DATA_BYTES_MAX

NOTHING = memoryview(b"")


class Outbox:
    """What is to be sent, a frame of each message in turn; payloads are not copied."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.unsent_bytes = 0  # of payloads
        self._chunk_bytes = chunk_bytes
        self._heads: dict[int, vnode_pb2.HopFrame] = {}  # not sent yet
        self._rest: dict[int, memoryview] = {}  # of payloads
        self._turns: deque[int] = deque()

    def __bool__(self) -> bool:
        """Whether something is to be sent."""
        return bool(self._turns)

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
            data, rest = rest[: self._chunk_bytes], rest[self._chunk_bytes :]
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
    """A payload that comes in parts. What comes in one is not copied."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._filled = 0
        self._buffer: memoryview | None = None

    def add(self, data: memoryview) -> memoryview | None:
        """Takes the next part; the payload once it is whole (writable where it was assembled).

        Raises:
            MalformedError: more than was announced.
        """
        filled = self._filled + len(data)
        if filled > self._size_bytes:
            raise MalformedError(f"{filled} bytes came of a payload of {self._size_bytes}")
        if self._buffer is None:
            if filled == self._size_bytes:
                return data
            self._buffer = _memory(self._size_bytes)
        self._buffer[self._filled : filled] = data
        self._filled = filled
        return self._buffer if filled == self._size_bytes else None


def _memory(size_bytes: int) -> memoryview:
    """Some to write to, the whole of which is about to be."""
    if size_bytes < LARGE_BYTES:
        return memoryview(bytearray(size_bytes))
    # numpy asks for huge pages, and zeroes nothing: half the time (docs/performance.md).
    import numpy as np

    return np.empty(size_bytes, np.uint8).data


class Room:
    """How much one peer may have here, over all its streams; `within` what all may have."""

    def __init__(
        self,
        exchanges_max: int = EXCHANGES_MAX,
        bytes_max: int = ROOM_BYTES_MAX,
        within: Room | None = None,
    ) -> None:
        self.exchanges = 0
        self.held_bytes = 0
        self._exchanges_max = exchanges_max
        self._bytes_max = bytes_max
        self._within = within

    def take(self, size_bytes: int) -> bool:
        """For one more exchange; False: there is none."""
        if self.exchanges >= self._exchanges_max or self.held_bytes + size_bytes > self._bytes_max:
            return False
        if self._within is not None and not self._within.take(size_bytes):
            return False
        self.exchanges += 1
        self.held_bytes += size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        """What an exchange has taken."""
        self.exchanges -= 1
        self.held_bytes -= size_bytes
        if self._within is not None:
            self._within.give_back(size_bytes)
