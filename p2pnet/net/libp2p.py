"""The one door to libp2p: Noise and yamux over TCP, identify and ping.

Of py-libp2p this uses the handshake and the identify message, and not its host and
swarm, whose defects cannot be defended against from outside: there a handler that
raises ends the host, an inbound connection keeps its slot until the node stops, a
silent peer blocks `connect()` and `close()` for ever, and addresses are dialled as
it sees fit. `swarm.Swarm` takes their place, and `muxed` that of its muxer.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise

from p2pnet.errors import MalformedError, RemoteError, UnreachableError
from p2pnet.keys import KeyPair, public_key_of, short
from p2pnet.net import multiaddr
from p2pnet.net.connections import Connection, Identity
from p2pnet.net.muxed import MuxedConnection, SecureChannel
from p2pnet.net.streams import ByteStream, Conversation, agreed, proposal, propose, settle
from p2pnet.net.swarm import Swarm
from p2pnet.net.varint import frame

_log = logging.getLogger(__name__)

_READ_BYTES = 64 * 1024
_IDENTIFY_S = 10.0
_ADDRS_MAX = 16  # a peer's, of those that it names
_PROTOCOLS_MAX = 1024
_PROTOCOL_CHARS_MAX = 16 << 10  # over all of a peer
_PING_BYTES = 32
_AGENT = "p2pnet"
_YAMUX = "/yamux/1.0.0"
_IDENTIFY = "/ipfs/id/1.0.0"
_PING = "/ipfs/ping/1.0.0"
_ED25519_PUBLIC_KEY_PREFIX = bytes.fromhex("08011220")  # libp2p's PublicKey protobuf


class _Tcp(TrioTCPStream):
    """What the handshake is made over, from the proposal of it on.

    The proposal goes out with the first message: two round trips less. And it reads
    ahead: the library asks for two bytes, then for a body, each a system call.
    """

    def __init__(self, stream: trio.SocketStream, proposed: str = "") -> None:
        super().__init__(stream)
        self.ahead = b""
        self._proposed = proposed
        self._first = proposal(proposed) if proposed else b""

    async def write(self, data: bytes) -> None:
        data, self._first = self._first + data, b""
        await super().write(data)

    async def read(self, n: int | None = None) -> bytes:
        if self._proposed:
            proposed, self._proposed = self._proposed, ""
            talk = Conversation(self)
            await agreed(talk, proposed)
            self.ahead = talk.rest()
        if not self.ahead:
            self.ahead = await super().read(_READ_BYTES)
        data, self.ahead = self.ahead[:n], self.ahead[n:] if n is not None else b""
        return data

    async def reset(self) -> None:
        """Nothing: the socket's owner does."""

    def usable(self) -> bool:
        """As far as is known."""
        return True


class _Upgrader:
    """A `swarm.Upgrade`: Noise and yamux, and nothing else (the library's default set
    of security protocols has plaintext in it)."""

    def __init__(self, keypair: KeyPair) -> None:
        keys = create_new_key_pair(keypair.seed)
        self._noise = Noise(keys, noise_privkey=create_x25519().private_key)

    async def __call__(self, tcp: trio.SocketStream, peer_id: str | None) -> MuxedConnection:
        initiator = peer_id is not None
        stream = _Tcp(tcp, NOISE if initiator else "")
        raw = RawConnection(stream, initiator)
        secure: Any
        if peer_id is not None:
            secure = await self._noise.secure_outbound(raw, ID.from_base58(peer_id))
        else:
            stream.ahead = (await _settled(stream, NOISE)).rest()
            secure = await self._noise.secure_inbound(raw)
        # From here on the library's session only gives its keys: see `muxed`.
        channel = SecureChannel(tcp, stream.ahead, secure.conn.noise_state)
        talk = await (propose if initiator else _settled)(channel, _YAMUX)
        remote = secure.get_remote_peer().to_base58()
        return MuxedConnection(channel, remote, initiator=initiator, ahead=talk.rest())


async def _settled(stream: ByteStream, protocol: str) -> Conversation:
    """The answering side of `propose`."""
    talk = Conversation(stream)
    if await settle(talk, (protocol,)) is None:
        raise UnreachableError("the peer hung up")
    return talk


class Libp2pNetwork(Swarm):
    """`network.Network` among libp2p peers. Made by `open_network`."""

    async def connect(self, peer_id: str, addrs: Sequence[str], *, timeout_s: float) -> None:
        """See `Network.connect`. Who was dialled is asked at once what it speaks, so that
        the answer comes with that to the first request."""
        known = self._connections.best(peer_id) is not None
        await super().connect(peer_id, addrs, timeout_s=timeout_s)
        if not known and (connection := self._connections.best(peer_id)) is not None:
            self._nursery.start_soon(_identify, connection, _IDENTIFY_S)

    async def protocols(self, peer_id: str, *, timeout_s: float) -> tuple[str, ...]:
        """What a peer says that it speaks (libp2p's identify), sorted; empty if unknown."""
        connection = self._connections.best(peer_id)
        if connection is None:
            return ()
        await _identify(connection, timeout_s)
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


async def _identify(connection: Connection, timeout_s: float) -> None:
    """Asks a peer who it is, unless that is known."""
    if connection.identity is not None:
        return
    with trio.move_on_after(timeout_s):
        async with connection.identifying:
            if connection.identity is None:
                try:
                    connection.identity = await _ask_identify(connection)
                except RemoteError as error:
                    who = short(connection.peer_id)
                    _log.debug("peer %s does not identify itself: %s", who, error)


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
    names = message.protocols
    # Identify is proto2: a string that is not UTF-8 is not refused, but comes as bytes.
    size = sum(map(len, names))
    if len(names) > _PROTOCOLS_MAX or size > _PROTOCOL_CHARS_MAX:
        raise MalformedError("an identify message with too many protocols")
    if not all(isinstance(name, str) for name in names):
        raise MalformedError("an identify message with a protocol that is no text")
    addrs = multiaddr.readable(message.listen_addrs, connection.peer_id, _ADDRS_MAX)
    return Identity(tuple(sorted(set(names))), addrs)


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
    inbound_streams_max: int = 4096,
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
