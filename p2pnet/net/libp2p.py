"""The one door to libp2p: Noise and yamux over TCP, identify and ping.

Of py-libp2p this uses the handshake, the muxer and the identify message, and
not its host and swarm, whose defects cannot be defended against from outside:
there a handler that raises ends the host, an inbound connection keeps its slot
until the node stops, a silent peer blocks `connect()` and `close()` for ever,
and addresses are dialled as it sees fit. `swarm.Swarm` takes their place.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import cast

import trio
from google.protobuf.message import DecodeError
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.custom_types import TProtocol
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.generic_selector import GenericMultistreamSelector
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.security.security_multistream import SecurityMultistream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream

from p2pnet.errors import MalformedError, RemoteError, UnreachableError
from p2pnet.keys import KeyPair, public_key_of, short
from p2pnet.net import multiaddr
from p2pnet.net.connections import Connection, Identity
from p2pnet.net.network import MESSAGE_BYTES_MAX
from p2pnet.net.streams import Conversation, propose
from p2pnet.net.swarm import Swarm
from p2pnet.net.varint import frame

_log = logging.getLogger(__name__)

_READ_BYTES = 64 * 1024
_FRAME_WRITE_S = 10.0  # a peer that takes no frame for so long is gone
_BUFFER_BYTES_MAX = 4 * MESSAGE_BYTES_MAX  # received on a connection and not yet read
_IDENTIFY_S = 10.0
_ADDRS_MAX = 16  # a peer's, of those that it names
_PING_BYTES = 32
_AGENT = "p2pnet"
_IDENTIFY = "/ipfs/id/1.0.0"
_PING = "/ipfs/ping/1.0.0"
_ED25519_PUBLIC_KEY_PREFIX = bytes.fromhex("08011220")  # libp2p's PublicKey protobuf


class _Tcp(TrioTCPStream):
    """Reads ahead: Noise asks for two bytes, then for a body, each a system call."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self.heard_at = trio.current_time()
        self._ahead = bytearray()

    async def read(self, n: int | None = None) -> bytes:
        if not self._ahead:
            self._ahead += await super().read(_READ_BYTES)
            self.heard_at = trio.current_time()
        data = bytes(self._ahead[:n])
        del self._ahead[:n]
        return data


class _Yamux(Yamux):
    """Yamux whose writes are never cut short and whose buffers have a limit."""

    broken = False  # a write has failed; the reader may not know it yet

    async def _write_frame(self, data: bytes) -> None:
        # Half a frame would break the connection for everybody on it, so a task
        # that is cancelled finishes its frame first (a read writes frames too).
        # A peer that does not take it in time loses the connection.
        with trio.move_on_after(_FRAME_WRITE_S) as scope:
            scope.shield = True
            try:
                await super()._write_frame(data)
            except Exception:
                self.broken = True
                raise
        if scope.cancelled_caught:
            self.broken = True
            await self.secured_conn.close()

    async def _read_data_body(self, length: int) -> bytes:
        # The library only warns of a peer that ignores its window.
        if length + sum(map(len, self.stream_buffers.values())) > _BUFFER_BYTES_MAX:
            raise trio.TooSlowError  # the one error at which the caller closes the connection
        return await super()._read_data_body(length)


class _Stream:
    """A `streams.ByteStream` over a yamux stream."""

    def __init__(self, yamux: YamuxStream) -> None:
        self._yamux = yamux

    async def read(self) -> bytes:
        try:
            return await self._yamux.read(_READ_BYTES)
        except MuxedStreamEOF:
            return b""
        except Exception as error:
            raise UnreachableError("the stream was reset") from error

    async def write(self, data: bytes) -> None:
        try:
            await self._yamux.write(data)
        except Exception as error:
            raise UnreachableError("the stream was reset") from error

    async def close(self) -> None:
        await _quietly(self._yamux.close)

    async def reset(self) -> None:
        await _quietly(self._yamux.reset)
        # A reader that the end of the stream woke up has left this behind.
        self._yamux.conn.stream_events.pop(self._yamux.stream_id, None)

    def usable(self) -> bool:
        return not (self._yamux.closed or self._yamux.recv_closed or self._yamux.send_closed)


async def _quietly(end: Callable[[], Awaitable[None]]) -> None:
    try:
        await end()
    except Exception as error:
        _log.debug("while ending a stream: %r", error)


class _Muxed:
    """A `connections.Muxed` over yamux."""

    def __init__(self, yamux: _Yamux, tcp: _Tcp) -> None:
        self._yamux = yamux
        self._tcp = tcp

    @property
    def peer_id(self) -> str:
        return self._yamux.peer_id.to_base58()

    @property
    def heard_at(self) -> float:
        return self._tcp.heard_at

    async def run(self) -> None:
        await self._yamux.start()

    async def ready(self) -> None:
        await self._yamux.event_started.wait()

    def alive(self) -> bool:
        return not (self._yamux.broken or self._yamux.event_shutting_down.is_set())

    async def open_stream(self) -> _Stream:
        try:
            return _Stream(await self._yamux.open_stream())
        except Exception as error:
            raise UnreachableError("the connection is gone") from error

    async def accept_stream(self) -> _Stream:
        try:
            return _Stream(cast(YamuxStream, await self._yamux.accept_stream()))
        except Exception as error:
            raise UnreachableError("the connection is gone") from error


class _Upgrader:
    """A `swarm.Upgrade`: Noise and yamux, and nothing else (the library's default set
    of security protocols has plaintext in it)."""

    def __init__(self, keypair: KeyPair) -> None:
        noise = Noise(create_new_key_pair(keypair.seed), noise_privkey=create_x25519().private_key)
        self._security = SecurityMultistream({NOISE: noise})
        self._muxers: GenericMultistreamSelector[type[_Yamux]] = GenericMultistreamSelector()
        self._muxers.add_handler(TProtocol(YAMUX), _Yamux)

    async def __call__(self, tcp: trio.SocketStream, peer_id: str | None) -> _Muxed:
        stream = _Tcp(tcp)
        raw = RawConnection(stream, initiator=peer_id is not None)
        if peer_id is not None:
            secure = await self._security.secure_outbound(raw, ID.from_base58(peer_id))
        else:
            secure = await self._security.secure_inbound(raw)
        await self._muxers.select(secure, peer_id is not None)
        remote = secure.get_remote_peer()
        return _Muxed(_Yamux(secure, remote, is_initiator=peer_id is not None), stream)


class Libp2pNetwork(Swarm):
    """`network.Network` among libp2p peers. Made by `open_network`."""

    async def protocols(self, peer_id: str, *, timeout_s: float) -> tuple[str, ...]:
        """What a peer says that it speaks (libp2p's identify), sorted; empty if unknown."""
        connection = self._connections.best(peer_id)
        if connection is None:
            return ()
        if connection.identity is None:
            with trio.move_on_after(timeout_s):
                try:
                    connection.identity = await _ask_identify(connection)
                except RemoteError as error:
                    _log.debug("peer %s does not identify itself: %s", short(peer_id), error)
        return connection.identity.protocols if connection.identity else ()

    def listen_addrs(self, peer_id: str) -> tuple[str, ...]:
        """Where a connected peer says that it listens; see `Network.listen_addrs`."""
        connection = self._connections.best(peer_id)
        return connection.identity.addrs if connection and connection.identity else ()

    def serve_libp2p(self) -> None:
        """Answers what any libp2p peer asks (github.com/libp2p/specs: identify, ping)."""
        self._handlers[_IDENTIFY] = self._identify_us
        self._handlers[_PING] = _echo

    async def _identify_us(self, talk: Conversation, peer_id: str) -> None:
        connection = self._connections.best(peer_id)
        message = Identify(
            protocol_version="ipfs/0.1.0",
            agent_version=_AGENT,
            public_key=_ED25519_PUBLIC_KEY_PREFIX + public_key_of(self.peer_id),
            listen_addrs=[multiaddr.encode(addr) for addr in self.addrs()],
            observed_addr=multiaddr.encode(connection.addr) if connection else b"",
            protocols=sorted(self._handlers),
        )
        await talk.stream.write(frame(message.SerializeToString()))


async def _ask_identify(connection: Connection) -> Identity:
    stream = await connection.muxed.open_stream()
    try:
        talk = await propose(stream, _IDENTIFY)
        data = await talk.message(_IDENTIFY_S)
        message = Identify.FromString(data or b"")
    except DecodeError:
        raise MalformedError("not an identify message") from None
    finally:
        await stream.reset()
    addrs = multiaddr.readable(message.listen_addrs, connection.peer_id, _ADDRS_MAX)
    return Identity(tuple(sorted(set(message.protocols))), addrs)


async def _echo(talk: Conversation, peer_id: str) -> None:
    while (data := await talk.exactly(_PING_BYTES)) is not None:
        await talk.stream.write(data)


@asynccontextmanager
async def open_network(
    keypair: KeyPair,
    *,
    listen: Sequence[str],
    announce: Sequence[str] = (),
    connections_max: int = 512,
    inbound_connections_max: int = 384,
    inbound_streams_max: int = 1024,
    silence_s: float = 5.0,
) -> AsyncIterator[Libp2pNetwork]:
    """A running network: it serves while the block runs, and is closed at its end.

    Args:
        keypair: who we are.
        listen: TCP multiaddrs; port 0 for any free one; none for a client, which
            only dials.
        announce: what to tell others instead of the addresses listened on, where
            a router stands between.
        connections_max: all connections; inbound ones are refused from
            `inbound_connections_max` on, so that we can always dial.
        inbound_connections_max: see there.
        inbound_streams_max: streams that are being served, over all peers.
        silence_s: a peer that leaves a request unanswered, and of whom not a byte was
            heard for so long, is disconnected and forgotten.

    Raises:
        ResourceError: cannot listen there: the port is taken, or not ours.
        UsageError: `listen` or `announce` holds something else than TCP multiaddrs.
    """
    # The library logs what peers do wrong, which is not our user's trouble.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        network = Libp2pNetwork(
            keypair.peer_id,
            _Upgrader(keypair),
            nursery,
            connections_max=connections_max,
            inbound_connections_max=inbound_connections_max,
            inbound_streams_max=inbound_streams_max,
            silence_s=silence_s,
        )
        network.serve_libp2p()
        try:
            await network.listen(listen, announce)
            yield network
        except Exception as error:
            failure = error  # raised below, so that the nursery does not wrap it in a group
        finally:
            network.close()
    if failure is not None:
        raise failure
