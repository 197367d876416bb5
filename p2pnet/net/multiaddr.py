"""Multiaddrs: where a peer may be reached.

Only what can be dialled over TCP (github.com/multiformats/multiaddr): ip4, ip6 or
a DNS name, then tcp, then perhaps /p2p/PEER_ID. Other addresses, which stock
libp2p peers also hand out (QUIC, WebSocket, relays), are refused. Pure: no I/O,
and no libp2p.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from p2pnet.errors import MalformedError
from p2pnet.keys import peer_id_bytes
from p2pnet.net.varint import encode_varint

# github.com/multiformats/multiaddr/blob/master/protocols.csv
_CODES = {"ip4": 4, "tcp": 6, "ip6": 41, "dns": 53, "dns4": 54, "dns6": 55, "p2p": 421}
_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")
_DNS_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
MULTIADDR_BYTES_MAX = 512


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A TCP endpoint, and who is said to be there ("" where nobody is named)."""

    kind: str  # ip4, ip6, dns, dns4 or dns6
    host: str
    port: int
    peer_id: str = ""

    def __str__(self) -> str:
        text = f"/{self.kind}/{self.host}/tcp/{self.port}"
        return f"{text}/p2p/{self.peer_id}" if self.peer_id else text

    @property
    def where(self) -> str:
        """The multiaddr without /p2p/."""
        return f"/{self.kind}/{self.host}/tcp/{self.port}"


def parse(text: str) -> Endpoint:
    """Reads a multiaddr's text; "/ipfs/" is an old spelling of "/p2p/".

    Raises:
        MalformedError: not a multiaddr, or not one of TCP.
    """
    parts = text.split("/")
    if len(text) > MULTIADDR_BYTES_MAX or len(parts) not in (5, 7) or parts[0]:
        raise _malformed(text)
    _, kind, host, tcp, port, *named = parts
    if kind not in _HOSTS or tcp != "tcp" or not re.fullmatch(r"[0-9]{1,5}", port):
        raise _malformed(text)
    if int(port) > 0xFFFF or (named and named[0] not in ("p2p", "ipfs")):
        raise _malformed(text)
    if named:
        peer_id_bytes(named[1])
    return Endpoint(kind, _host(kind, host, text), int(port), named[1] if named else "")


def of_socket(host: str, port: int) -> str:
    """The multiaddr of an IP address (a scope such as %eth0 is dropped) and a port."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    if ip.version == 6 and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return f"/ip{ip.version}/{ip}/tcp/{port}"


def encode(text: str) -> bytes:
    """The bytes of a multiaddr's text; raises MalformedError as `parse` does."""
    end = parse(text)
    out = encode_varint(_CODES[end.kind])
    if end.kind.startswith("ip"):
        out += ipaddress.ip_address(end.host).packed
    else:
        out += encode_varint(len(end.host)) + end.host.encode()
    out += encode_varint(_CODES["tcp"]) + end.port.to_bytes(2, "big")
    if end.peer_id:
        name = peer_id_bytes(end.peer_id)
        out += encode_varint(_CODES["p2p"]) + encode_varint(len(name)) + name
    return out


def _host(kind: str, host: str, text: str) -> str:
    if not kind.startswith("ip"):
        if len(host) > 253 or not _DNS_NAME.fullmatch(host):
            raise _malformed(text)
        return host
    if "%" in host:  # a scope, which means nothing on another machine
        raise _malformed(text)
    try:
        return str(ipaddress.IPv4Address(host) if kind == "ip4" else ipaddress.IPv6Address(host))
    except ValueError:
        raise _malformed(text) from None


def _malformed(text: str) -> MalformedError:
    return MalformedError(
        f"{text[:100]!r} is not a TCP multiaddr such as /ip4/192.0.2.7/tcp/4001/p2p/PEER_ID"
    )
