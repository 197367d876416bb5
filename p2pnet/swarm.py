"""What a VNode's host and an orchestrator see of the p2p network around them.

`p2pnet.around` implements this; both users live on the gRPC thread, so
everything here may be called there: views are immutable snapshots, and what is
asynchronous crosses to the trio side at most once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from p2pnet.gossip.coordinates import Coordinate
from p2pnet.keys import KeyPair
from p2pnet.net.hop_frames import Buffer, Request
from p2pnet.v1 import common_pb2, records_pb2, vnode_pb2

ReplyT = TypeVar("ReplyT", bound=Message)


@dataclass(frozen=True, slots=True)
class MemberView:
    """A member as this node sees it now. Memory in bytes, speed in GFLOP/s (0: not measured)."""

    peer_id: str
    alive: bool
    hosting: bool
    addrs: tuple[str, ...]
    cpus: float
    memory_bytes: int
    memory_used_bytes: int
    gflops: float
    vnodes: int
    ip_group: str = ""  # the network of the address that it says it has; a peer id where private
    trust: float = 1.0  # 0: nothing may be placed there
    coordinate: Coordinate | None = None  # as its advert says, so that everybody has the same
    suspect: bool = False  # alive, but somebody accuses it of being gone


class Swarm(Protocol):
    """The p2p network, from the gRPC thread."""

    @property
    def keypair(self) -> KeyPair:
        """This node's identity."""
        ...

    def now(self) -> float:
        """The node's clock, seconds (`p2pnet.clock`)."""
        ...

    def advert(self) -> common_pb2.Signed | None:
        """What this node says of itself."""
        ...

    async def introduce(self, peer_id: str, advert: common_pb2.Signed) -> None:
        """Hands what an authenticated peer says of itself to the membership.

        Raises:
            ForgedError, MalformedError: it is not that peer's, or no advert.
        """
        ...

    def members(self) -> Sequence[MemberView]:
        """Every member known, this node included, in order of peer id."""
        ...

    async def call(
        self,
        peer_id: str,
        method: str,
        request: Message,
        reply_type: type[ReplyT],
        *,
        timeout_s: float,
    ) -> ReplyT:
        """One gRPC call to a peer, such as "PNode/Allocate".

        Raises:
            UnreachableError: unknown peer, no connection, or not in time.
            RefusedError: the peer's gRPC layer said no.
        """
        ...

    async def hop(
        self, peer_id: str, request: Request, payload: Buffer | None, *, timeout_s: float
    ) -> tuple[vnode_pb2.HopReply, memoryview | None]:
        """A request to a host with the bytes that it carries, and its reply with what it does.

        Its payload must stay as it is until then. Raises as `call`; what the host itself has
        to say against it is in the reply.
        """
        ...

    async def put_blob(
        self, peer_id: str, data: bytes, *, network_id: str, timeout_s: float, digest: bytes = b""
    ) -> None:
        """Gives a peer a copy of a state, whose SHA-256 saves hashing it; raises as `call`."""
        ...

    async def get_blob(self, peer_id: str, digest: bytes, *, timeout_s: float) -> bytes:
        """Fetches a state and checks its digest; raises as `call`, and ForgedError."""
        ...

    async def find_allocations(
        self, network_id: str, vnode: str, *, timeout_s: float
    ) -> Sequence[records_pb2.Allocation]:
        """What the DHT says of where a VNode lives, newest first; checked and unexpired."""
        ...

    async def keep_record(self, key: bytes, make: Callable[[], common_pb2.Signed]) -> int:
        """Keeps a record of ours in the DHT, made afresh for each republish.

        Returns how many peers took it the first time.
        """
        ...

    async def drop_record(self, key: bytes) -> None:
        """No longer republishes what is under `key`."""
        ...

    async def provide(self, key: bytes) -> None:
        """Announces this node as a provider of a key."""
        ...

    def emit(self, event: str, **fields: Any) -> None:
        """Tells whoever follows this node's events."""
        ...
