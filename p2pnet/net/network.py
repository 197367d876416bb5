"""What the DHT and the gossip need of a network: short requests between peers.

Two things implement it: `libp2p.Libp2pNetwork`, the real one, and
`memory.MemoryNetwork`, for tests of shells' users. Everything here runs on trio.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

# A handler gets the authenticated peer id and one message, and returns the
# reply (None: nothing to say, as kad-dht's ADD_PROVIDER). A RemoteError that it
# raises resets the stream and counts against the peer, unless it is a RefusedError,
# for what an honest peer may ask; it never kills the node.
Handler = Callable[[str, bytes], Awaitable[bytes | None]]

MESSAGE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A peer and where it may be reached: libp2p multiaddrs as text, without /p2p/."""

    peer_id: str
    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConnectionChange:
    """A peer's first connection came up, or its last one went."""

    peer_id: str
    connected: bool
    addr: str  # where the peer was seen, or "" where that is not known


class Network(Protocol):
    """Requests to peers and from them, over kept connections."""

    @property
    def peer_id(self) -> str:
        """Ours."""
        ...

    def addrs(self) -> tuple[str, ...]:
        """The multiaddrs that we listen on, without /p2p/; none for a client."""
        ...

    async def request(
        self,
        peer_id: str,
        protocol: str,
        message: bytes,
        *,
        timeout_s: float,
        addrs: Sequence[str] = (),
        wants_reply: bool = True,
    ) -> bytes:
        """Sends one message and returns the reply (b"", once the message was read, if
        `wants_reply` is False).

        Connects first if need be, to `addrs` or to where the peer was last reached.
        On the wire a message follows its length as a varint.

        Raises:
            UnreachableError: no connection, or no answer within `timeout_s`; the
                connection is then dropped.
            MalformedError: a reply over MESSAGE_BYTES_MAX, or none of the protocol.
        """
        ...

    def serve(self, protocol: str, handler: Handler) -> None:
        """Answers `protocol` with `handler` from now on."""
        ...

    async def connect(self, peer_id: str, addrs: Sequence[str], *, timeout_s: float) -> None:
        """Makes sure of a connection, one address at a time; raises UnreachableError."""
        ...

    async def identify(self, addr: str, *, timeout_s: float) -> str:
        """Connects to a multiaddr with /p2p/ at its end, and returns the peer id.

        Raises:
            UnreachableError: nobody there, or somebody else.
        """
        ...

    async def drop(self, peer_id: str) -> None:
        """Closes every connection to a peer and forgets its addresses."""
        ...

    def connected(self) -> tuple[str, ...]:
        """The peers with a live connection, sorted."""
        ...

    def seen_at(self, peer_id: str) -> str:
        """The multiaddr at which a connected peer is seen to be; "" where that is unknown."""
        ...

    def watch(self, callback: Callable[[ConnectionChange], None]) -> None:
        """Calls back on the trio thread at each change; the callback must not block."""
        ...

    async def protocols(self, peer_id: str, *, timeout_s: float) -> tuple[str, ...]:
        """What a peer says that it speaks (libp2p's identify), sorted; empty if unknown."""
        ...

    def listen_addrs(self, peer_id: str) -> tuple[str, ...]:
        """Where a connected peer says that it listens, without /p2p/, those of TCP first.

        Empty where that is unknown: until `protocols` has asked it, and for a client.
        """
        ...
