"""Multiaddrs of TCP: what is read, what is refused, and the bytes of the registry."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnet.errors import MalformedError
from p2pnet.keys import KeyPair
from p2pnet.net.interfaces import reachable_addrs
from p2pnet.net.multiaddr import Endpoint, encode, of_socket, parse

PEER = KeyPair.from_seed(bytes(32)).peer_id


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("/ip4/127.0.0.1/tcp/4001", Endpoint("ip4", "127.0.0.1", 4001)),
        ("/ip6/::1/tcp/1", Endpoint("ip6", "::1", 1)),
        ("/dns4/a-b.example.org/tcp/65535", Endpoint("dns4", "a-b.example.org", 65535)),
        (f"/dns/localhost/tcp/0/p2p/{PEER}", Endpoint("dns", "localhost", 0, PEER)),
    ],
)
def test_what_is_read(text: str, endpoint: Endpoint) -> None:
    assert parse(text) == endpoint
    assert str(endpoint) == text
    assert endpoint.where == text.split("/p2p/")[0]


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "127.0.0.1:1", "/ip4/127.0.0.1", "/ip4/127.0.0.1/tcp/65536", "/ip4/1.2.3/tcp/1",
        "/ip4/127.0.0.1/tcp/-1", "/ip4/127.0.0.1/tcp/٣", "/ip6/::1%eth0/tcp/1", "/dns4//tcp/1",
        "/dns4/a b/tcp/1", "/ip4/127.0.0.1/udp/1", "/ip4/127.0.0.1/udp/1/quic-v1",
        "/ip4/127.0.0.1/tcp/1/ws", "/ip4/127.0.0.1/tcp/1/p2p/0OIl", "/ip4/127.0.0.1/tcp/1/p2p/",
        "/dns4/" + "a" * 254 + "/tcp/1", "x/ip4/127.0.0.1/tcp/1",
    ],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(MalformedError):
        parse(text)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_malformed(text: str) -> None:
    for prefix in ("", "/ip4/", "/dns/", "/ip4/1.2.3.4/tcp/", "/ip4/1.2.3.4/tcp/1/p2p/"):
        try:
            parse(prefix + text)
        except MalformedError:
            pass


# As github.com/multiformats/py-multiaddr encodes them.
@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("/ip4/127.0.0.1/tcp/4001", "047f000001060fa1"),
        ("/ip6/::1/tcp/80", "2900000000000000000000000000000001060050"),
        ("/dns4/ab.c/tcp/1", "36" + "04" + b"ab.c".hex() + "060001"),
        (
            f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}",
            "0401020304060001a50326002408011220" + KeyPair.from_seed(bytes(32)).public_key.hex(),
        ),
    ],
)
def test_the_bytes_on_the_wire(text: str, encoded: str) -> None:
    assert encode(text).hex() == encoded


def test_sockets_addresses() -> None:
    assert of_socket("192.0.2.1", 5) == "/ip4/192.0.2.1/tcp/5"
    assert of_socket("fe80::1%eth0", 5) == "/ip6/fe80::1/tcp/5"
    assert of_socket("::ffff:192.0.2.1", 5) == "/ip4/192.0.2.1/tcp/5"


def test_a_wildcard_becomes_the_machines_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    from types import SimpleNamespace

    def interface(*ips: str) -> list[SimpleNamespace]:
        families = [socket.AF_INET6 if ":" in ip else socket.AF_INET for ip in ips]
        return [SimpleNamespace(family=f, address=ip) for f, ip in zip(families, ips, strict=True)]

    machine = {"lo": interface("127.0.0.1", "::1")}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: machine)
    assert reachable_addrs([("0.0.0.0", 7)]) == ("/ip4/127.0.0.1/tcp/7",)
    machine["eth0"] = interface("192.0.2.9", "2001:db8::9", "fe80::9%eth0")
    assert reachable_addrs([("0.0.0.0", 7)]) == ("/ip4/192.0.2.9/tcp/7",)
    assert reachable_addrs([("::", 7)]) == ("/ip6/2001:db8::9/tcp/7",)
    both = reachable_addrs([("127.0.0.1", 7), ("0.0.0.0", 8), ("127.0.0.1", 7)])
    assert both == ("/ip4/127.0.0.1/tcp/7", "/ip4/192.0.2.9/tcp/8")
