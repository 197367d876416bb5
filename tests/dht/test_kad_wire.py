"""kad-dht messages and multiaddrs as bytes, good and bad."""

from __future__ import annotations

import pytest
from dht_samples import keypair
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from multiaddr import Multiaddr

from p2pnet.dht.wire import ADDRS_MAX, Kind, Message, parse, serialise
from p2pnet.errors import MalformedError
from p2pnet.keys import peer_id_bytes
from p2pnet.net.multiaddr import decode, encode
from p2pnet.net.network import PeerInfo
from p2pnet.v1 import kad_pb2 as pb

PEER = keypair(1).peer_id
ADDR = "/ip4/192.0.2.7/tcp/4001"


@pytest.mark.parametrize(
    "text",
    [
        ADDR,
        "/ip6/2001:db8::1/tcp/4001",
        "/ip4/192.0.2.7/udp/4001/quic-v1",
        "/ip4/192.0.2.7/udp/4001/quic-v1/webtransport",
        "/dns/example.org/tcp/443/wss",
        "/dns4/example.org/tcp/443/tls/ws",
        "/dns6/example.org/tcp/443",
        "/dnsaddr/bootstrap.example.org",
        f"{ADDR}/p2p/{PEER}/p2p-circuit",
        f"{ADDR}/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    ],
)
def test_a_multiaddr_is_what_the_library_makes_of_it(text: str) -> None:
    assert encode(text) == Multiaddr(text).to_bytes()
    assert decode(encode(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "/", "x", "/ip4", "/ip4/1.2.3", "/ip4/1.2.3.4/tcp", "/ip4/1.2.3.4/tcp/65536",
     "/ip4/1.2.3.4/tcp/-1", "/ip4/1.2.3.4/tcp/x", "/onion/abc", "/ip6/1.2.3.4/tcp/1", "/p2p/0O"],
)  # fmt: skip
def test_what_is_no_multiaddr(text: str) -> None:
    with pytest.raises(MalformedError):
        encode(text)


@pytest.mark.parametrize("kind", list(Kind))
def test_a_message_survives_the_wire(kind: Kind) -> None:
    peer = PeerInfo(PEER, (ADDR, "/dns/example.org/tcp/1"))
    message = Message(kind, b"key", b"value", (peer,), (peer, PeerInfo(keypair(2).peer_id, ())))
    assert parse(serialise(message)) == message


def test_the_bytes_are_those_of_the_specification() -> None:
    """Field numbers and types as in the kad-dht specification, by hand."""
    peer = b"\x0a" + bytes([38]) + peer_id_bytes(PEER)
    expected = b"\x08\x04" + b"\x12\x01k" + b"\x42" + bytes([len(peer)]) + peer
    assert serialise(Message(Kind.FIND_NODE, b"k", closer=(PeerInfo(PEER, ()),))) == expected


def wire_message(**fields: object) -> bytes:
    """A message with whatever in it."""
    return pb.KadMessage(**fields).SerializeToString()  # type: ignore[arg-type]


def wire_peer(*addrs: bytes) -> pb.KadMessage.Peer:
    """A peer with these addresses."""
    return pb.KadMessage.Peer(id=peer_id_bytes(PEER), addrs=addrs)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"\x08\x09",
        wire_message(key=bytes(81)),
        wire_message(key=b"a", record=pb.KadRecord(key=b"b", value=b"v")),
        wire_message(key=b"a", record=pb.KadRecord(key=b"a", value=bytes((256 << 10) + 1))),
        wire_message(closer_peers=[wire_peer(*[encode(ADDR)] * 65)]),
        wire_message(closer_peers=[pb.KadMessage.Peer()]),
        wire_message(closer_peers=[pb.KadMessage.Peer(id=bytes(65))]),
        bytes(1 << 21),
    ],
    ids=["no protobuf", "type", "key", "record's key", "value", "addresses",
         "no id", "long id", "size"],
)  # fmt: skip
def test_what_no_honest_peer_sends(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse(data)


def test_addresses_that_we_cannot_read_are_left_out_and_the_peer_stays() -> None:
    named = encode(f"{ADDR}/p2p/{PEER}")
    peer = wire_peer(b"\xff\xff", b"\xbc\x03onion", b"", encode(ADDR), named)
    message = parse(wire_message(closer_peers=[peer]))
    assert message.closer == (PeerInfo(PEER, (ADDR,)),)


def test_more_addresses_than_we_keep_are_cut() -> None:
    addrs = [encode(f"/ip4/192.0.2.7/tcp/{port}") for port in range(1, 30)]
    (peer,) = parse(wire_message(closer_peers=[wire_peer(*addrs)])).closer
    assert len(peer.addrs) == ADDRS_MAX


def test_of_many_addresses_those_that_can_be_dialled_are_kept() -> None:
    quic = [encode(f"/ip4/192.0.2.7/udp/{port}/quic-v1") for port in range(1, 30)]
    (peer,) = parse(wire_message(closer_peers=[wire_peer(*quic, encode(ADDR))])).closer
    assert peer.addrs[0] == ADDR
    assert len(peer.addrs) == ADDRS_MAX


def test_long_lists_of_peers_are_cut_as_stock_peers_send_them() -> None:
    """Whom one seeks comes after the 20 nearest; a popular key has many providers."""
    peers = [pb.KadMessage.Peer(id=peer_id_bytes(keypair(n).peer_id)) for n in range(21)]
    message = parse(wire_message(closer_peers=peers, provider_peers=peers * 10))
    assert message.closer[20].peer_id == keypair(20).peer_id
    assert len(message.providers) == 32


@seed(1)
@settings(max_examples=600, deadline=None, database=None)
@given(st.binary(max_size=300))
def test_any_bytes_parse_or_are_malformed(data: bytes) -> None:
    for parser in (parse, decode):
        try:
            parser(data)
        except MalformedError:
            pass


GOOD = serialise(
    Message(Kind.GET_VALUE, b"key", b"value", (PeerInfo(PEER, (ADDR, f"{ADDR}/p2p-circuit")),) * 2)
)


@seed(2)
@settings(max_examples=600, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4))
def test_a_damaged_message_parses_to_one_that_survives_or_is_malformed(
    changes: list[tuple[int, int]],
) -> None:
    data = bytearray(GOOD)
    for at, byte in changes:
        data[at] = byte
    try:
        message = parse(bytes(data))
    except MalformedError:
        return
    assert parse(serialise(message)) == message
