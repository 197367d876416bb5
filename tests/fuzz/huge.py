"""What a peer may declare, or really send, beyond every limit: each refused at once."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import trio
from fuzz.parsers import (
    ADVERT_PAYLOADS,
    ECHO,
    HELLO,
    IDENTIFY,
    MEMBERS,
    VNODE_KEY,
    WALL_MS,
    signed_of,
    start_answering,
    start_identify,
    written,
)
from google.protobuf.message import Message
from libp2p.identity.identify.pb.identify_pb2 import Identify

from p2pnet import keys
from p2pnet.dht import wire
from p2pnet.dht.records import open_record, open_set
from p2pnet.errors import RemoteError
from p2pnet.gossip.messages import read_message
from p2pnet.gossip.statements import open_accusation, open_advert
from p2pnet.net import multiaddr
from p2pnet.net.network import MESSAGE_BYTES_MAX
from p2pnet.net.tls import pem_of
from p2pnet.net.varint import Unframer, encode_varint, frame
from p2pnet.v1 import common_pb2, gossip_pb2, kad_pb2, records_pb2

PEAK_BYTES_MAX = 4 << 20  # beside the bytes themselves
CPU_S_MAX = 0.1


@dataclass(frozen=True)
class Oversize:
    """What a peer sends, and what reads it. `kept`: how many items, where the rest is left out."""

    read: Callable[[bytes], object]
    data: bytes
    kept: int | None = None


def unframe(data: bytes) -> None:
    """As a stream's reader does."""
    Unframer(MESSAGE_BYTES_MAX).feed(data)


def on_a_stream(data: bytes) -> None:
    """A stream that a peer opened."""
    trio.run(start_answering(Random(0)), data)


def identified(data: bytes) -> None:
    """An identify reply."""
    trio.run(start_identify(Random(0)), data)


def signed(domain: bytes, payload: Message | bytes) -> bytes:
    """A statement by a member."""
    data = payload if isinstance(payload, bytes) else written(payload)
    return written(MEMBERS[0].sign(domain, data))


def advert(**fields: object) -> bytes:
    """One with these instead, signed by its peer."""
    payload = gossip_pb2.Advert()
    payload.CopyFrom(ADVERT_PAYLOADS[0])
    payload.MergeFrom(gossip_pb2.Advert(**fields))  # type: ignore[arg-type]
    return signed(keys.ADVERT, payload)


def read_advert(data: bytes) -> object:
    return open_advert(signed_of(data))


def read_set(data: bytes) -> object:
    return open_set(data, VNODE_KEY, WALL_MS)


def kad(**fields: object) -> bytes:
    """A kad-dht message."""
    return written(kad_pb2.KadMessage(**fields))  # type: ignore[arg-type]


def peers_of(data: bytes) -> list[object]:
    """All that a kad-dht message names."""
    message = wire.parse(data)
    return [*message.closer, *message.providers]


def identify(**fields: object) -> bytes:
    """A reply on an identify stream."""
    message = Identify.FromString(IDENTIFY)
    message.MergeFrom(Identify(**fields))
    return HELLO + frame(b"/ipfs/id/1.0.0\n") + frame(written(message))


MIB = bytes(1 << 20)
PEER = kad_pb2.KadMessage.Peer
MANY_PEERS = [PEER(id=b"a")] * 100_000
HUGE = {
    "a frame said to have 1 GiB": Oversize(unframe, encode_varint(1 << 30) + bytes(100)),
    "a frame said to have 2**62 bytes": Oversize(unframe, encode_varint(1 << 62)),
    "a frame one byte too long": Oversize(unframe, encode_varint(MESSAGE_BYTES_MAX + 1)),
    "a length without an end": Oversize(unframe, b"\xff" * 20),
    "a multistream line of 1 MiB": Oversize(on_a_stream, frame(MIB)),
    "proposals without an end": Oversize(on_a_stream, HELLO + frame(b"/no\n") * 10_000),
    "a message of 1 GiB on a stream": Oversize(
        on_a_stream, HELLO + frame(ECHO.encode() + b"\n") + encode_varint(1 << 30)
    ),
    "300,000 protocols": Oversize(identified, identify(protocols=["a"] * 300_000)),
    "a DHT message of 1 MiB": Oversize(wire.parse, MIB + b"x"),
    "100,000 peers": Oversize(peers_of, kad(closer_peers=MANY_PEERS), kept=64),
    "100,000 providers": Oversize(peers_of, kad(provider_peers=MANY_PEERS), kept=64),
    "100,000 addresses": Oversize(
        wire.parse, kad(closer_peers=[PEER(id=b"a", addrs=[b"ab"] * 100_000)])
    ),
    "groups in groups": Oversize(wire.parse, b"\x0b" * 100_000),
    "a key of 81 bytes": Oversize(wire.parse, kad(key=bytes(81))),
    "a batch of 100,000": Oversize(
        wire.parse_batch, written(kad_pb2.KadBatch(messages=[b""] * 100_000))
    ),
    "a record of 1 MiB": Oversize(
        lambda data: open_record(signed_of(data), VNODE_KEY, WALL_MS), signed(keys.RECORD, MIB)
    ),
    "a record set of 1 MiB": Oversize(read_set, MIB),
    "20,000 records": Oversize(
        read_set,
        written(records_pb2.RecordSet(version=1, records=[records_pb2.HeldRecord()] * 20_000)),
    ),
    "a gossip message of 1 MiB": Oversize(read_message, MIB),
    "100,000 statements": Oversize(
        read_message,
        written(
            gossip_pb2.GossipMessage(
                versions=common_pb2.VersionRange(min=1, max=1),
                adverts=[common_pb2.Signed()] * 100_000,
            )
        ),
    ),
    "an advert of 1 MiB": Oversize(read_advert, advert(grpc_certificate=MIB)),
    "an advert with 2,000 addresses": Oversize(read_advert, advert(addrs=["a"] * 2_000)),
    "an advert with 2,000 targets": Oversize(read_advert, advert(grpc_targets=["a"] * 2_000)),
    "an accusation of 1 MiB": Oversize(
        lambda data: open_accusation(signed_of(data)), signed(keys.ACCUSATION, MIB)
    ),
    "a multiaddr of 1 MiB": Oversize(multiaddr.decode, MIB),
    "a multiaddr of 1 MiB of text": Oversize(
        lambda data: multiaddr.parse(data.decode()), b"/ip4" * (1 << 18)
    ),
    "a multiaddr of many parts": Oversize(
        lambda data: multiaddr.parse(data.decode()), b"/ws" * 170
    ),
    "a peer id of 1 MiB": Oversize(keys.peer_id_from_bytes, MIB),
    "a peer id of 1 MiB of text": Oversize(
        lambda data: keys.peer_id_bytes(data.decode()), b"z" * (1 << 20)
    ),
    "a certificate of 1 MiB": Oversize(pem_of, MIB),
}


def judge_huge(name: str) -> None:
    """Raises AssertionError unless it is refused or cut short, soon, with little memory."""
    case = HUGE[name]
    began = time.thread_time()
    _refused(name, case)
    cpu_s = time.thread_time() - began
    assert cpu_s < CPU_S_MAX, f"{name}: {cpu_s:.3f} s"
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        _refused(name, case)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < PEAK_BYTES_MAX, f"{name}: {peak} bytes"


def _refused(name: str, case: Oversize) -> None:
    try:
        found = case.read(case.data)
    except RemoteError:
        return
    assert case.kept is not None, f"{name}: taken"
    assert isinstance(found, list)
    assert len(found) <= case.kept, f"{name}: {len(found)} kept"
