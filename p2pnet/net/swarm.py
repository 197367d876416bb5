"""Requests to peers and from them over TCP: dials, listens, asks and answers.

Knows nothing of libp2p: what turns a TCP connection into an authenticated, muxed
one is handed in (`Upgrade`). Every task belongs to one nursery, every wait has a
deadline, and nothing that happens on one stream or connection leaves it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import trio

from p2pnet.errors import (
    CancelledByUs,
    LocalError,
    MalformedError,
    RefusedError,
    RemoteError,
    ResourceError,
    UnreachableError,
    UsageError,
)
from p2pnet.keys import peer_id_bytes, short
from p2pnet.net import multiaddr
from p2pnet.net.connections import Connection, Connections, Muxed, watch_for_death
from p2pnet.net.interfaces import reachable_addrs
from p2pnet.net.network import MESSAGE_BYTES_MAX, ConnectionChange, Handler
from p2pnet.net.streams import (
    ByteStream,
    NotSpokenError,
    StreamHandler,
    answer,
    answering,
)

_log = logging.getLogger(__name__)

_HANDSHAKE_S = 10.0
_HANDSHAKES_MAX = 64  # inbound and not yet authenticated
_CONNECTION_STREAMS_MAX = 32  # inbound
_LINGER_S = 5.0  # for the peer to close its side of a stream too


class Upgrade(Protocol):
    """The handshake."""

    async def __call__(self, tcp: trio.SocketStream, peer_id: str | None) -> Muxed:
        """Authenticates the other end: `peer_id` if we dialled it, None if it dialled us.

        Raises any Exception if that fails; the caller closes the socket.
        """
        ...


class Swarm:
    """`Network` but for what is libp2p's own.

    A connection is kept until it fails, times out or is dropped; when there are
    `connections_max`, a new dial closes the one that was idle the longest.
    """

    def __init__(
        self,
        peer_id: str,
        upgrade: Upgrade,
        nursery: trio.Nursery,
        *,
        connections_max: int,
        inbound_connections_max: int,
        inbound_streams_max: int,
        silence_s: float,
    ) -> None:
        self._peer_id = peer_id
        self._upgrade = upgrade
        self._nursery = nursery
        self._inbound_connections_max = inbound_connections_max
        self._inbound_streams_max = inbound_streams_max
        self._silence_s = silence_s
        self._connections = Connections(connections_max)
        self._handlers: dict[str, StreamHandler] = {}
        self._dialling: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._handshakes = 0
        self._answering = 0
        self._addrs: tuple[str, ...] = ()

    @property
    def peer_id(self) -> str:
        """Ours."""
        return self._peer_id

    def addrs(self) -> tuple[str, ...]:
        """Where others may reach us: multiaddrs without /p2p/; none for a client."""
        return self._addrs

    def serve(self, protocol: str, handler: Handler) -> None:
        """Answers `protocol` with `handler` from now on."""
        self._handlers[protocol] = answering(handler)

    def watch(self, callback: Callable[[ConnectionChange], None]) -> None:
        """Calls back at each peer's first connection and after its last."""
        self._connections.watch(callback)

    def connected(self) -> tuple[str, ...]:
        """The peers with a live connection, sorted."""
        return self._connections.peers()

    def seen_at(self, peer_id: str) -> str:
        """The multiaddr at which a connected peer is seen to be; "" where that is unknown."""
        connection = self._connections.best(peer_id)
        return connection.addr if connection is not None else ""

    def offences(self, peer_id: str) -> int:
        """How often a peer did what no honest one does, of late."""
        return self._connections.offences(peer_id)

    async def drop(self, peer_id: str) -> None:
        """Closes every connection to a peer and forgets its addresses."""
        self._connections.forget(peer_id)
        await trio.lowlevel.checkpoint()

    # Asking

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
        """Sends one message and returns the reply; see `Network.request`."""
        if len(message) > MESSAGE_BYTES_MAX:
            raise ValueError(f"a message of {len(message)} bytes, over {MESSAGE_BYTES_MAX}")
        deadline = trio.current_time() + timeout_s
        if (connection := self._connections.best(peer_id)) is not None:
            try:
                return await self._ask(connection, protocol, message, wants_reply, deadline)
            except UnreachableError:
                # It may have died unseen since its last use: once more on a new
                # one. If it lives, the peer has had its chance.
                if connection.live or trio.current_time() >= deadline:
                    raise
        left_s = max(0.0, deadline - trio.current_time())
        await self.connect(peer_id, addrs, timeout_s=left_s)
        if (connection := self._connections.best(peer_id)) is None:
            raise UnreachableError(f"peer {short(peer_id)} closed the connection at once")
        return await self._ask(connection, protocol, message, wants_reply, deadline)

    async def _ask(
        self, connection: Connection, protocol: str, message: bytes, wants_reply: bool, by: float
    ) -> bytes:
        who = f"peer {short(connection.peer_id)}"
        pool = connection.pool(protocol)
        begun = False
        reply = b""
        connection.asking += 1
        try:
            with trio.CancelScope(deadline=by) as scope:
                async with pool.slot():
                    begun = True
                    reply = await pool.ask(message, wants_reply=wants_reply)
        except UnreachableError as error:
            if not connection.muxed.alive():  # seen here first
                self._connections.end(connection)
            raise UnreachableError(f"{who} did not answer: {error}") from error
        except RemoteError as error:
            if not isinstance(error, NotSpokenError):
                self._connections.offence(connection.peer_id, str(error))
            raise MalformedError(f"{who}: {error}") from error
        finally:
            connection.asking -= 1
            connection.used_at = trio.current_time()
        if not scope.cancelled_caught:
            return reply
        if begun:  # else only our own queue was too long
            self._unanswered(connection)
        raise UnreachableError(f"{who} did not answer in time")

    def _unanswered(self, connection: Connection) -> None:
        """A request got no answer in time: by a peer that is slow, or by one that is gone.

        A slow one keeps its connection: closing it would end everything else that
        is under way there, and a swarm that is busy would be busier still with
        handshakes. A silent one is disconnected (which frees a stuck write) and
        forgotten.
        """
        if trio.current_time() - connection.muxed.heard_at >= self._silence_s:
            self._connections.forget(connection.peer_id)

    # Dialling

    async def connect(self, peer_id: str, addrs: Sequence[str], *, timeout_s: float) -> None:
        """Makes sure of a connection, one address at a time; raises UnreachableError."""
        if peer_id == self._peer_id:
            raise UnreachableError("a node does not connect to itself")
        failures: list[str] = []
        with trio.move_on_after(timeout_s) as scope:
            lock = self._dialling.setdefault(peer_id, trio.Lock())
            async with lock:
                candidates = list(addrs) or self._connections.remembered(peer_id)
                for i, addr in enumerate(candidates):
                    if self._connections.best(peer_id) is not None:
                        return
                    left_s = max(0.0, scope.deadline - trio.current_time())
                    share_s = left_s / (len(candidates) - i)
                    with trio.move_on_after(share_s) as turn:
                        try:
                            await self._dial(peer_id, addr)
                        except RemoteError as error:
                            failures.append(f"{addr}: {error}")
                    if turn.cancelled_caught:
                        failures.append(f"{addr}: no answer within {share_s:.1f} s")
        if self._connections.best(peer_id) is None:
            why = "; ".join(failures) or ("no time" if scope.cancelled_caught else "no address")
            raise UnreachableError(f"no connection to peer {short(peer_id)}: {why}")

    async def identify(self, addr: str, *, timeout_s: float) -> str:
        """Connects to a multiaddr with /p2p/ at its end, and returns the peer id.

        Raises:
            UnreachableError: nobody there, or somebody else.
            UsageError: not such a multiaddr.
        """
        end = _of_user(addr)
        if not end.peer_id:
            raise UsageError(f"{addr} does not say who is there: it should end in /p2p/PEER_ID")
        await self.connect(end.peer_id, [end.where], timeout_s=timeout_s)
        return end.peer_id

    async def _dial(self, peer_id: str, addr: str) -> None:
        end = multiaddr.parse(addr)
        if end.peer_id not in ("", peer_id):
            raise UnreachableError(f"that is an address of peer {short(end.peer_id)}")
        peer_id_bytes(peer_id)
        self._connections.make_room()
        try:
            tcp = await trio.open_tcp_stream(end.host, end.port)
        except OSError as error:
            raise UnreachableError(_reason(error)) from error
        except ValueError as error:  # a name that cannot be one
            raise UnreachableError(f"{addr} cannot be dialled") from error
        connection: Connection | None = None
        try:
            watch_for_death(tcp)
            # Where it is, and not what it is called: a name can be anybody's.
            host, port = tcp.socket.getpeername()[:2]
            where = multiaddr.of_socket(host, port)
            connection = Connection(tcp, await self._upgrade(tcp, peer_id), where)
            self._nursery.start_soon(self._carry, connection)
            await connection.settled.wait()
        except Exception as error:
            raise UnreachableError(f"no handshake with that peer there: {error!r}") from error
        finally:
            if connection is None or not connection.live:
                tcp.socket.close()
        if not connection.live:
            raise UnreachableError("the peer closed the connection at once")
        self._connections.remember(peer_id, end.where)

    # Listening and answering

    async def listen(self, listen: Sequence[str], announce: Sequence[str]) -> None:
        """Starts to accept connections; raises ResourceError and UsageError."""
        listeners: list[trio.SocketListener] = []
        try:
            for addr in listen:
                end = _of_user(addr)
                try:
                    listeners += await trio.open_tcp_listeners(end.port, host=end.host)
                except OSError as error:
                    raise ResourceError(f"cannot listen on {addr}: {_reason(error)}") from error
            bound = [listener.socket.getsockname()[:2] for listener in listeners]
            self._addrs = tuple(_of_user(a).where for a in announce) or reachable_addrs(bound)
        except BaseException:
            for listener in listeners:
                listener.socket.close()
            raise
        if listeners:
            self._nursery.start_soon(trio.serve_listeners, self._accept, listeners)

    def close(self) -> None:
        """Ends every connection and task."""
        for peer_id in self.connected():
            self._connections.forget(peer_id)
        self._nursery.cancel_scope.cancel()

    async def _accept(self, tcp: trio.SocketStream) -> None:
        """An inbound connection, from its first byte to its end; trio closes the socket."""
        full = len(self._connections) >= self._inbound_connections_max
        if full or self._handshakes >= _HANDSHAKES_MAX:
            return
        self._handshakes += 1
        try:
            with trio.fail_after(_HANDSHAKE_S):
                watch_for_death(tcp)
                host, port = tcp.socket.getpeername()[:2]
                muxed = await self._upgrade(tcp, None)
        except Exception as error:
            _log.debug("an inbound connection failed in its handshake: %r", error)
            return
        finally:
            self._handshakes -= 1
        if self._connections.admits(muxed.peer_id) and muxed.peer_id != self._peer_id:
            await self._carry(Connection(tcp, muxed, multiaddr.of_socket(host, port)))

    async def _carry(self, connection: Connection) -> None:
        """Carries a connection until it ends, and serves the streams that the peer opens."""
        try:
            async with trio.open_nursery() as nursery:

                async def run() -> None:
                    await connection.muxed.run()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(run)
                await connection.muxed.ready()
                self._connections.add(connection)
                connection.settled.set()
                while True:
                    stream = await connection.muxed.accept_stream()
                    if self._is_full(connection):
                        # Streams that have just ended count themselves out first.
                        await trio.lowlevel.checkpoint()
                    if self._is_full(connection):
                        await stream.reset()
                    else:
                        nursery.start_soon(self._answer, connection, stream)
                        await trio.lowlevel.checkpoint()  # which lets it count itself
        except* Exception as errors:
            _log.debug("the connection to peer %s ended: %r", short(connection.peer_id), errors)
        finally:
            self._connections.end(connection)
            connection.settled.set()

    def _is_full(self, connection: Connection) -> bool:
        """Whether a peer may open no more streams."""
        full = self._answering >= self._inbound_streams_max
        return full or connection.answering >= _CONNECTION_STREAMS_MAX

    async def _answer(self, connection: Connection, stream: ByteStream) -> None:
        """The guard: whatever happens on a stream ends that stream, and no more."""
        who = short(connection.peer_id)
        connection.used_at = trio.current_time()
        connection.answering += 1
        self._answering += 1
        try:
            try:
                await answer(stream, connection.peer_id, self._handlers)
                await stream.close()
                with trio.move_on_after(_LINGER_S):
                    while await stream.read():
                        pass
            except (UnreachableError, RefusedError) as error:
                _log.debug("a stream of peer %s: %s", who, error)
            except CancelledByUs as error:
                _log.debug("peer %s was not served: %s", who, error)
            except LocalError as error:
                _log.warning("could not serve peer %s: %s", who, error)
            except RemoteError as error:
                self._connections.offence(connection.peer_id, str(error))
            except Exception:
                _log.exception("a handler failed on a message of peer %s", who)
                self._connections.offence(connection.peer_id, "a handler failed")
            await stream.reset()
        finally:
            connection.answering -= 1
            self._answering -= 1


def _of_user(addr: str) -> multiaddr.Endpoint:
    try:
        return multiaddr.parse(addr)
    except MalformedError as error:
        raise UsageError(str(error)) from None


def _reason(error: OSError) -> str:
    """Why, in words: trio wraps the system's own error."""
    while error.strerror is None and isinstance(error.__cause__, OSError):
        error = error.__cause__
    return error.strerror or str(error)
