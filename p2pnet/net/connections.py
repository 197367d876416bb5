"""The connections that a node has: who is connected, what each costs, who misbehaved.

Runs on trio; knows nothing of libp2p. Ending a connection is closing its
socket: that cannot block, and ends every task that waits on the connection.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from p2pnet.bounded import keep_latest
from p2pnet.errors import UnreachableError
from p2pnet.keys import short
from p2pnet.net.network import ConnectionChange
from p2pnet.net.streams import ByteStream, Pool

_log = logging.getLogger(__name__)

_PEER_CONNECTIONS_MAX = 4
_ADDRS_REMEMBERED = 4096  # peers
_OFFENCES_REMEMBERED = 4096  # peers
_OFFENCES_TO_DROP = 8


class Muxed(Protocol):
    """An authenticated connection that carries streams."""

    @property
    def peer_id(self) -> str:
        """Who is at the other end."""
        ...

    @property
    def heard_at(self) -> float:
        """When the last byte came from there, on trio's clock."""
        ...

    async def run(self) -> None:
        """Carries the streams until the connection ends."""
        ...

    async def ready(self) -> None:
        """Returns when `run` has begun."""
        ...

    def alive(self) -> bool:
        """Whether streams still pass, as far as is known."""
        ...

    async def open_stream(self) -> ByteStream:
        """A new stream to the peer; raises UnreachableError."""
        ...

    async def accept_stream(self) -> ByteStream:
        """The next stream that the peer opens; UnreachableError when the connection ends."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """What a peer says of itself: what it speaks, and where it listens."""

    protocols: tuple[str, ...]
    addrs: tuple[str, ...]


class Connection:
    """A connection and what is going on over it."""

    def __init__(self, tcp: trio.SocketStream, muxed: Muxed, addr: str) -> None:
        self.tcp = tcp
        self.muxed = muxed
        self.addr = addr  # where the peer is, as we see it
        self.peer_id = muxed.peer_id
        self.settled = trio.Event()  # it is up, or has failed
        self.live = False
        self.answering = 0  # streams that the peer opened
        self.asking = 0  # requests of ours under way
        self.used_at = trio.current_time()
        self.identity: Identity | None = None  # what the peer says of itself
        self.identifying = trio.Lock()  # one asks for it, the others wait
        self._pools: dict[str, Pool] = {}

    def pool(self, protocol: str) -> Pool:
        """Our streams for a protocol."""
        if protocol not in self._pools:
            self._pools[protocol] = Pool(self.muxed.open_stream, protocol)
        return self._pools[protocol]


class Connections:
    """The live connections by peer, and what is remembered of peers; all of it bounded."""

    def __init__(self, connections_max: int) -> None:
        self._max = connections_max
        self._by_peer: dict[str, list[Connection]] = {}
        self._watchers: list[Callable[[ConnectionChange], None]] = []
        self._addrs: dict[str, str] = {}
        self._offences: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._by_peer.values()))

    def peers(self) -> tuple[str, ...]:
        """Who is connected, sorted."""
        return tuple(sorted(self._by_peer))

    def best(self, peer_id: str) -> Connection | None:
        """The connection to send a request on: the oldest."""
        connections = self._by_peer.get(peer_id)
        return connections[0] if connections else None

    def watch(self, callback: Callable[[ConnectionChange], None]) -> None:
        """Calls back at each peer's first connection and after its last."""
        self._watchers.append(callback)

    def admits(self, peer_id: str) -> bool:
        """Whether a peer may have one more connection."""
        return len(self._by_peer.get(peer_id, ())) < _PEER_CONNECTIONS_MAX

    def add(self, connection: Connection) -> None:
        """Takes note of a connection that is up."""
        connection.live = True
        connections = self._by_peer.setdefault(connection.peer_id, [])
        connections.append(connection)
        if len(connections) == 1:
            self._tell(ConnectionChange(connection.peer_id, True, connection.addr))

    def end(self, connection: Connection) -> None:
        """Closes a connection, once."""
        connection.tcp.socket.close()
        if not connection.live:
            return
        connection.live = False
        connections = self._by_peer[connection.peer_id]
        connections.remove(connection)
        if not connections:
            del self._by_peer[connection.peer_id]
            self._tell(ConnectionChange(connection.peer_id, False, connection.addr))

    def forget(self, peer_id: str) -> None:
        """Closes every connection to a peer and forgets its address."""
        self._addrs.pop(peer_id, None)
        for connection in list(self._by_peer.get(peer_id, ())):
            self.end(connection)

    def make_room(self) -> None:
        """For a connection to dial: closes the one that has been idle the longest if need be.

        Raises:
            UnreachableError: all are in use.
        """
        if len(self) < self._max:
            return
        idle = [c for each in self._by_peer.values() for c in each if not c.asking]
        if not idle:
            raise UnreachableError(f"this node has {self._max} connections in use")
        self.end(min(idle, key=lambda c: c.used_at))

    def remember(self, peer_id: str, addr: str) -> None:
        """Where a peer was reached."""
        keep_latest(self._addrs, peer_id, addr, _ADDRS_REMEMBERED)

    def remembered(self, peer_id: str) -> list[str]:
        """Where a peer was last reached, if that is known."""
        return [self._addrs[peer_id]] if peer_id in self._addrs else []

    def offence(self, peer_id: str, what: str) -> None:
        """Counts against a peer what no honest one does; every eighth time drops it."""
        _log.info("peer %s misbehaves: %s", short(peer_id), what)
        if len(self._offences) >= _OFFENCES_REMEMBERED and peer_id not in self._offences:
            del self._offences[next(iter(self._offences))]
        self._offences[peer_id] += 1
        if self._offences[peer_id] % _OFFENCES_TO_DROP == 0:
            self.forget(peer_id)

    def offences(self, peer_id: str) -> int:
        """How many were counted, of late."""
        return self._offences[peer_id]

    def _tell(self, change: ConnectionChange) -> None:
        for callback in self._watchers:
            try:
                callback(change)
            except Exception:
                _log.exception("a watcher of connections failed")


def watch_for_death(tcp: trio.SocketStream) -> None:
    """Has the kernel give up a peer whose machine is gone or takes nothing any more."""
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 15),  # s
        ("TCP_KEEPINTVL", 5),  # s
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 30_000),  # ms
    ):
        if hasattr(socket, option):
            tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
