"""kad-dht messages between bytes and plain values. Pure.

The format is that of github.com/libp2p/specs/tree/master/kad-dht. Everything
is bounded before it is kept: what a peer sends over a limit is refused whole,
except for addresses that we cannot read, which are left out.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from p2pnet.dht.addrs import decode_addr, encode_addr
from p2pnet.errors import MalformedError
from p2pnet.keys import peer_id_bytes, peer_id_from_bytes
from p2pnet.net.network import PeerInfo
from p2pnet.v1 import kad_pb2 as pb

KEY_BYTES_MAX = 50
PEERS_MAX = 20
ADDRS_MAX = 16
VALUE_BYTES_MAX = 256 << 10
# A public go-libp2p peer can list more addresses than we keep (transports times
# relays), so that only a list beyond reason refuses the message.
_ADDRS_SENT_MAX = 64
_MESSAGE_BYTES_MAX = 1 << 20


class Kind(enum.IntEnum):
    """What a message is; a reply has the kind of its request."""

    PUT_VALUE = 0
    GET_VALUE = 1
    ADD_PROVIDER = 2
    GET_PROVIDERS = 3
    FIND_NODE = 4
    PING = 5


@dataclass(frozen=True, slots=True)
class Message:
    """One kad-dht message.

    `value` is a serialised RecordSet, None where there is none. A request's
    `closer` is ours alone: a server names itself there, so that whom it asks
    learns its addresses; stock peers ignore it.
    """

    kind: Kind
    key: bytes = b""
    value: bytes | None = None
    closer: tuple[PeerInfo, ...] = ()
    providers: tuple[PeerInfo, ...] = ()


def serialise(message: Message) -> bytes:
    """The bytes of a message; addresses that have no binary form are left out.

    Raises:
        MalformedError: over a limit of the wire.
    """
    _check_key(message.key)
    out = pb.KadMessage(type=pb.KadMessage.MessageType.Name(message.kind), key=message.key)
    if message.value is not None:
        if len(message.value) > VALUE_BYTES_MAX:
            raise MalformedError(f"a value of {len(message.value)} bytes, over {VALUE_BYTES_MAX}")
        out.record.key = message.key
        out.record.value = message.value
    out.closer_peers.extend(map(_peer_to_wire, message.closer[:PEERS_MAX]))
    out.provider_peers.extend(map(_peer_to_wire, message.providers[:PEERS_MAX]))
    return out.SerializeToString()


def parse(data: bytes) -> Message:
    """The inverse of `serialise`, for bytes that a peer sent.

    Raises:
        MalformedError: not a kad-dht message, or over a limit.
    """
    if len(data) > _MESSAGE_BYTES_MAX:
        raise MalformedError(f"a DHT message of {len(data)} bytes")
    try:
        message = pb.KadMessage.FromString(data)
    except DecodeError:
        raise MalformedError("not a kad-dht message") from None
    try:
        kind = Kind(message.type)
    except ValueError:
        raise MalformedError(f"a kad-dht message of the unknown type {message.type}") from None
    _check_key(message.key)
    value: bytes | None = None
    if message.HasField("record") and message.record.value:
        if message.record.key != message.key:
            raise MalformedError("a record under another key than its message's")
        if len(message.record.value) > VALUE_BYTES_MAX:
            raise MalformedError(f"a value of {len(message.record.value)} bytes")
        value = message.record.value
    if max(len(message.closer_peers), len(message.provider_peers)) > PEERS_MAX:
        raise MalformedError(f"a kad-dht message with over {PEERS_MAX} peers")
    return Message(
        kind=kind,
        key=message.key,
        value=value,
        closer=tuple(map(_peer_from_wire, message.closer_peers)),
        providers=tuple(map(_peer_from_wire, message.provider_peers)),
    )


def _check_key(key: bytes) -> None:
    if len(key) > KEY_BYTES_MAX:
        raise MalformedError(f"a DHT key of {len(key)} bytes, over {KEY_BYTES_MAX}")


def _peer_to_wire(peer: PeerInfo) -> pb.KadMessage.Peer:
    addrs: list[bytes] = []
    for addr in peer.addrs[:ADDRS_MAX]:
        try:
            addrs.append(encode_addr(addr))
        except MalformedError:
            continue
    return pb.KadMessage.Peer(id=peer_id_bytes(peer.peer_id), addrs=addrs)


def _peer_from_wire(peer: pb.KadMessage.Peer) -> PeerInfo:
    peer_id = peer_id_from_bytes(peer.id)
    if len(peer.addrs) > _ADDRS_SENT_MAX:
        raise MalformedError(f"a peer with {len(peer.addrs)} addresses")
    addrs: list[str] = []
    for raw in peer.addrs:
        try:
            addr = decode_addr(raw)
        except MalformedError:
            continue
        addr = addr.removesuffix(f"/p2p/{peer_id}")
        if addr and addr not in addrs:
            addrs.append(addr)
    return PeerInfo(peer_id, tuple(addrs[:ADDRS_MAX]))
