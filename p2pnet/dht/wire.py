"""kad-dht messages between bytes and plain values. Pure.

The format is that of github.com/libp2p/specs/tree/master/kad-dht. Everything
is bounded before it is kept: what a peer sends over a limit is refused whole, but
long lists of peers are cut, and addresses that we cannot read are left out.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from google.protobuf.message import DecodeError

from p2pnet.errors import MalformedError
from p2pnet.keys import peer_id_bytes, peer_id_from_bytes
from p2pnet.net import multiaddr
from p2pnet.net.network import PeerInfo
from p2pnet.v1 import kad_pb2 as pb

KAD_PROTOCOL = "/p2pnet/kad/1.0.0"
# Announced by peers that keep records; stock peers of the same DHT only route.
RECORD_PROTOCOL = "/p2pnet/record/1"
KEY_BYTES_MAX = 80  # as go-libp2p has it; ours have 34 bytes
PEERS_MAX = 20  # in a list of ours
ADDRS_MAX = 16
VALUE_BYTES_MAX = 256 << 10
BATCH_MAX = 32  # messages in a batch
BATCH_ENTRY_BYTES = 8  # what framing adds to each
# A public go-libp2p peer can list more addresses than we keep (transports times
# relays), so that only a list beyond reason refuses the message.
_ADDRS_SENT_MAX = 64
# Stock peers put whom one seeks beside the 20 nearest, at the end too, and list
# every provider that they know.
_PEERS_READ_MAX = 32
_MESSAGE_BYTES_MAX = 1 << 20
_PEERS_CACHED = 512  # neighbours are named again and again


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
    return Message(
        kind=kind,
        key=message.key,
        value=value,
        closer=tuple(map(_peer_from_wire, message.closer_peers[:_PEERS_READ_MAX])),
        providers=tuple(map(_peer_from_wire, message.provider_peers[:_PEERS_READ_MAX])),
    )


def serialise_batch(messages: Sequence[Message]) -> bytes:
    """Several requests to one peer that keeps records, in one; see `BATCH_MAX`."""
    return join_batch([serialise(message) for message in messages])


def join_batch(messages: Sequence[bytes]) -> bytes:
    """Serialised messages as one batch."""
    return pb.KadBatch(messages=messages).SerializeToString()


def parse_batch(data: bytes) -> list[bytes]:
    """The messages in a batch, each still to be parsed.

    Raises:
        MalformedError: not a batch, or over a limit.
    """
    if len(data) > _MESSAGE_BYTES_MAX:
        raise MalformedError(f"a batch of {len(data)} bytes")
    try:
        messages = list(pb.KadBatch.FromString(data).messages)
    except DecodeError:
        raise MalformedError("not a batch of kad-dht messages") from None
    if not 0 < len(messages) <= BATCH_MAX:
        raise MalformedError(f"a batch of {len(messages)} messages, not of 1 to {BATCH_MAX}")
    return messages


def _check_key(key: bytes) -> None:
    if len(key) > KEY_BYTES_MAX:
        raise MalformedError(f"a DHT key of {len(key)} bytes, over {KEY_BYTES_MAX}")


@lru_cache(maxsize=_PEERS_CACHED)
def _peer_to_wire(peer: PeerInfo) -> pb.KadMessage.Peer:
    addrs: list[bytes] = []
    for addr in peer.addrs[:ADDRS_MAX]:
        try:
            addrs.append(multiaddr.encode(addr))
        except MalformedError:
            continue
    return pb.KadMessage.Peer(id=peer_id_bytes(peer.peer_id), addrs=addrs)


def _peer_from_wire(peer: pb.KadMessage.Peer) -> PeerInfo:
    if len(peer.addrs) > _ADDRS_SENT_MAX:
        raise MalformedError(f"a peer with {len(peer.addrs)} addresses")
    # Only what can be an address is worth remembering.
    readable = (addr for addr in peer.addrs if len(addr) <= multiaddr.MULTIADDR_BYTES_MAX)
    return _peer_of(peer.id, tuple(readable))


@lru_cache(maxsize=_PEERS_CACHED)
def _peer_of(raw_id: bytes, raw_addrs: tuple[bytes, ...]) -> PeerInfo:
    peer_id = peer_id_from_bytes(raw_id)
    return PeerInfo(peer_id, multiaddr.readable(raw_addrs, peer_id, ADDRS_MAX))
