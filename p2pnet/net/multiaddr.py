"""Multiaddrs: where a peer may be reached (github.com/multiformats/multiaddr).

As text ("/ip4/192.0.2.7/tcp/4001") inside this program, as bytes on the wire. The
codec knows whatever libp2p peers commonly hand out; what this node can dial is a
part of that, an `Endpoint`: TCP, at an IP address or a DNS name. Pure: no I/O, and
no libp2p. Codes are those of github.com/multiformats/multicodec/blob/master/table.csv.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from p2pnet.errors import MalformedError
from p2pnet.keys import peer_id_bytes, peer_id_from_bytes
from p2pnet.net.varint import encode_varint

MULTIADDR_BYTES_MAX = 512
_VARINT_BYTES_MAX = 9
_VARIABLE = -1
_CACHED = 4096
_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A TCP endpoint, and who is said to be there ("" where nobody is named)."""

    kind: str  # ip4, ip6, dns, dns4 or dns6
    host: str
    port: int
    peer_id: str = ""

    def __str__(self) -> str:
        return f"{self.where}/p2p/{self.peer_id}" if self.peer_id else self.where

    @property
    def where(self) -> str:
        """The multiaddr without /p2p/."""
        return f"/{self.kind}/{self.host}/tcp/{self.port}"


@dataclass(frozen=True, slots=True)
class _Protocol:
    """A kind of component: its value is `size` bytes long, or preceded by its length.

    `encode` and `decode` raise ValueError for what is no value of that kind.
    """

    name: str
    code: int
    size: int = 0
    encode: Callable[[str], bytes] = lambda text: b""
    decode: Callable[[bytes], str] = lambda raw: ""


def _number(size: int) -> Callable[[str], bytes]:
    def encode(text: str) -> bytes:
        if not (text.isascii() and text.isdigit()):
            raise ValueError("not a number")
        return int(text).to_bytes(size, "big")

    return encode


def _decode_number(raw: bytes) -> str:
    return str(int.from_bytes(raw, "big"))


def _encode_ip6(text: str) -> bytes:
    if "%" in text:
        raise ValueError("a scope, which means nothing on another machine")
    return ipaddress.IPv6Address(text).packed


def _dns_name(text: str) -> str:
    if not _DNS_NAME.fullmatch(text):
        raise ValueError("not a DNS name")
    return text


def _encode_certhash(text: str) -> bytes:
    if not text.startswith("u"):
        raise ValueError("not base64url, as multibase marks it")
    return base64.b64decode(text[1:] + "=" * (-len(text[1:]) % 4), altchars=b"-_", validate=True)


def _decode_certhash(raw: bytes) -> str:
    return "u" + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _dns(name: str, code: int) -> _Protocol:
    return _Protocol(
        name,
        code,
        _VARIABLE,
        lambda text: _dns_name(text).encode(),
        lambda raw: _dns_name(raw.decode()),
    )


_PROTOCOLS = (
    _Protocol(
        "ip4",
        4,
        4,
        lambda text: ipaddress.IPv4Address(text).packed,
        lambda raw: str(ipaddress.IPv4Address(raw)),
    ),
    _Protocol("ip6", 41, 16, _encode_ip6, lambda raw: str(ipaddress.IPv6Address(raw))),
    _Protocol("tcp", 6, 2, _number(2), _decode_number),
    _Protocol("udp", 273, 2, _number(2), _decode_number),
    _Protocol("p2p", 421, _VARIABLE, peer_id_bytes, peer_id_from_bytes),
    _Protocol("certhash", 466, _VARIABLE, _encode_certhash, _decode_certhash),
    _Protocol("memory", 777, 8, _number(8), _decode_number),
    _dns("dns", 53),
    _dns("dns4", 54),
    _dns("dns6", 55),
    _dns("dnsaddr", 56),
    _dns("sni", 449),
    _Protocol("p2p-circuit", 290),
    _Protocol("tls", 448),
    _Protocol("noise", 454),
    _Protocol("quic", 460),
    _Protocol("quic-v1", 461),
    _Protocol("webtransport", 465),
    _Protocol("ws", 477),
    _Protocol("wss", 478),
    _Protocol("webrtc-direct", 280),
    _Protocol("webrtc", 281),
)
_BY_NAME = {protocol.name: protocol for protocol in _PROTOCOLS}
_BY_NAME["ipfs"] = _BY_NAME["p2p"]  # its old spelling
_BY_CODE = {protocol.code: protocol for protocol in _PROTOCOLS}

_Component = tuple[_Protocol, bytes]


@lru_cache(maxsize=_CACHED)
def parse(text: str) -> Endpoint:
    """Reads the text of a multiaddr that can be dialled.

    Raises:
        MalformedError: not a multiaddr, or not one of TCP (QUIC, WebSocket, a relay).
    """
    try:
        components = _from_text(text)
    except MalformedError:
        components = []
    names = [protocol.name for protocol, _ in components]
    if names[1:] not in (["tcp"], ["tcp", "p2p"]) or names[0] not in _HOSTS:
        raise MalformedError(
            f"{text[:100]!r} is not a TCP multiaddr such as /ip4/192.0.2.7/tcp/4001/p2p/PEER_ID"
        )
    host, port, *peer = (protocol.decode(raw) for protocol, raw in components)
    return Endpoint(names[0], host, int(port), *peer)


def of_socket(host: str, port: int) -> str:
    """The multiaddr of an IP address (a scope such as %eth0 is dropped) and a port."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    if ip.version == 6 and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return f"/ip{ip.version}/{ip}/tcp/{port}"


@lru_cache(maxsize=_CACHED)
def encode(text: str) -> bytes:
    """The bytes of a multiaddr's text.

    Raises:
        MalformedError: not a multiaddr, or with a protocol that we don't know.
    """
    out = bytearray()
    for protocol, raw in _from_text(text):
        out += encode_varint(protocol.code)
        if protocol.size == _VARIABLE:
            out += encode_varint(len(raw))
        out += raw
    return bytes(out)


@lru_cache(maxsize=_CACHED)
def decode(raw: bytes) -> str:
    """The text of a multiaddr's bytes.

    Raises:
        MalformedError: not a multiaddr, or with a protocol that we don't know.
    """
    if not 0 < len(raw) <= MULTIADDR_BYTES_MAX:
        raise MalformedError(f"a multiaddr of {len(raw)} bytes")
    out: list[str] = []
    at = 0
    while at < len(raw):
        code, at = _varint(raw, at)
        protocol = _BY_CODE.get(code)
        if protocol is None:
            raise MalformedError(f"a multiaddr with the unknown protocol {code}")
        size = protocol.size
        if size == _VARIABLE:
            size, at = _varint(raw, at)
        if at + size > len(raw):
            raise MalformedError("a multiaddr that ends too early")
        out.append(protocol.name)
        if protocol.size != 0:
            try:
                out.append(protocol.decode(raw[at : at + size]))
            except ValueError:
                raise MalformedError(f"a multiaddr with a wrong /{protocol.name}") from None
        at += size
    return "/" + "/".join(out)


def readable(raws: Iterable[bytes], peer_id: str, addrs_max: int) -> tuple[str, ...]:
    """The addresses that a peer hands out for one peer, without /p2p/ and each once.

    What we cannot read is left out. Those that can be dialled come first, so that
    the limit takes others.
    """
    addrs: dict[str, bool] = {}
    for raw in raws:
        try:
            addr = decode(raw).removesuffix(f"/p2p/{peer_id}")
        except MalformedError:
            continue
        if addr:
            addrs[addr] = can_dial(addr)
    dialled_first = sorted(addrs, key=lambda addr: not addrs[addr])
    return tuple(dialled_first[:addrs_max])


def can_dial(text: str) -> bool:
    """Whether a multiaddr is one that `parse` reads."""
    try:
        parse(text)
    except MalformedError:
        return False
    return True


def _from_text(text: str) -> list[_Component]:
    if not text.startswith("/") or len(text) > MULTIADDR_BYTES_MAX:
        raise MalformedError(f"{text[:80]!r} is not a multiaddr")
    components: list[_Component] = []
    parts = iter(text.split("/")[1:])
    for name in parts:
        protocol = _BY_NAME.get(name)
        if protocol is None:
            raise MalformedError(f"a multiaddr with the unknown protocol {name[:40]!r}")
        raw = b""
        if protocol.size != 0:
            value = next(parts, "")
            try:
                raw = protocol.encode(value)
            except (ValueError, OverflowError, binascii.Error):
                raise MalformedError(f"{value[:80]!r} is no value for /{name}") from None
        components.append((protocol, raw))
    return components


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and where it ends."""
    value = 0
    for i, byte in enumerate(raw[at : at + _VARINT_BYTES_MAX]):
        value |= (byte & 0x7F) << 7 * i
        if not byte & 0x80:
            return value, at + i + 1
    raise MalformedError("a multiaddr that ends too early")
