"""Multiaddrs between text and bytes (github.com/multiformats/multiaddr). Pure.

The kad-dht wire carries them as bytes, everything here keeps them as text, and
only the libp2p door may import the multiaddr library. Codes are those of the
multicodec table (github.com/multiformats/multicodec/blob/master/table.csv).
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from p2pnet.errors import MalformedError
from p2pnet.keys import peer_id_bytes, peer_id_from_bytes
from p2pnet.net.varint import encode_varint

ADDR_BYTES_MAX = 512
_VARIABLE = -1


@dataclass(frozen=True, slots=True)
class _Protocol:
    """One component: its value is `size` bytes long, or preceded by its length."""

    name: str
    code: int
    size: int
    encode: Callable[[str], bytes] = lambda text: b""
    decode: Callable[[bytes], str] = lambda raw: ""


def _encode_port(text: str) -> bytes:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("a port is a number")
    return int(text).to_bytes(2, "big")


def _decode_port(raw: bytes) -> str:
    return str(int.from_bytes(raw, "big"))


def _encode_memory(text: str) -> bytes:
    return int(text).to_bytes(8, "big")


def _encode_name(text: str) -> bytes:
    if not text.isprintable() or " " in text:
        raise ValueError("a host name is printable")
    return text.encode()


def _decode_name(raw: bytes) -> str:
    text = raw.decode()
    if not text or "/" in text or " " in text or not text.isprintable():
        raise ValueError("a host name is printable")
    return text


def _encode_certhash(text: str) -> bytes:
    if not text.startswith("u"):
        raise ValueError("a certhash is in base64url")
    return base64.b64decode(text[1:] + "=" * (-len(text[1:]) % 4), altchars=b"-_", validate=True)


def _decode_certhash(raw: bytes) -> str:
    return "u" + base64.urlsafe_b64encode(raw).decode().rstrip("=")


_PROTOCOLS = (
    _Protocol(
        "ip4",
        4,
        4,
        lambda text: ipaddress.IPv4Address(text).packed,
        lambda raw: str(ipaddress.IPv4Address(raw)),
    ),
    _Protocol(
        "ip6",
        41,
        16,
        lambda text: ipaddress.IPv6Address(text).packed,
        lambda raw: str(ipaddress.IPv6Address(raw)),
    ),
    _Protocol("tcp", 6, 2, _encode_port, _decode_port),
    _Protocol("udp", 273, 2, _encode_port, _decode_port),
    _Protocol("dns", 53, _VARIABLE, _encode_name, _decode_name),
    _Protocol("dns4", 54, _VARIABLE, _encode_name, _decode_name),
    _Protocol("dns6", 55, _VARIABLE, _encode_name, _decode_name),
    _Protocol("dnsaddr", 56, _VARIABLE, _encode_name, _decode_name),
    _Protocol("sni", 449, _VARIABLE, _encode_name, _decode_name),
    _Protocol("p2p", 421, _VARIABLE, peer_id_bytes, peer_id_from_bytes),
    _Protocol("certhash", 466, _VARIABLE, _encode_certhash, _decode_certhash),
    _Protocol("memory", 777, 8, _encode_memory, _decode_port),
    _Protocol("p2p-circuit", 290, 0),
    _Protocol("tls", 448, 0),
    _Protocol("noise", 454, 0),
    _Protocol("quic", 460, 0),
    _Protocol("quic-v1", 461, 0),
    _Protocol("webtransport", 465, 0),
    _Protocol("ws", 477, 0),
    _Protocol("wss", 478, 0),
    _Protocol("webrtc-direct", 280, 0),
    _Protocol("webrtc", 281, 0),
)
_BY_NAME = {protocol.name: protocol for protocol in _PROTOCOLS}
_BY_CODE = {protocol.code: protocol for protocol in _PROTOCOLS}


@lru_cache(maxsize=4096)
def encode_addr(text: str) -> bytes:
    """The bytes of a multiaddr such as "/ip4/127.0.0.1/tcp/4001".

    Raises:
        MalformedError: not a multiaddr, or with a protocol that we don't know.
    """
    parts = text.split("/")[1:]
    if not text.startswith("/") or len(text) > ADDR_BYTES_MAX:
        raise MalformedError(f"{text[:80]!r} is not a multiaddr")
    out = bytearray()
    at = 0
    while at < len(parts):
        protocol = _BY_NAME.get(parts[at])
        if protocol is None:
            raise MalformedError(f"a multiaddr with the unknown protocol {parts[at][:40]!r}")
        out += encode_varint(protocol.code)
        at += 1
        if protocol.size == 0:
            continue
        if at == len(parts) or not parts[at]:
            raise MalformedError(f"/{protocol.name} in a multiaddr needs a value")
        try:
            value = protocol.encode(parts[at])
        except (ValueError, OverflowError, binascii.Error):
            raise MalformedError(f"{parts[at][:80]!r} is no value for /{protocol.name}") from None
        if protocol.size == _VARIABLE:
            out += encode_varint(len(value))
        out += value
        at += 1
    if not out:
        raise MalformedError("an empty multiaddr")
    return bytes(out)


@lru_cache(maxsize=4096)
def decode_addr(raw: bytes) -> str:
    """The text of a multiaddr's bytes.

    Raises:
        MalformedError: not a multiaddr, or with a protocol that we don't know.
    """
    if not 0 < len(raw) <= ADDR_BYTES_MAX:
        raise MalformedError(f"a multiaddr of {len(raw)} bytes")
    out: list[str] = []
    at = 0
    while at < len(raw):
        code, at = _read_varint(raw, at)
        protocol = _BY_CODE.get(code)
        if protocol is None:
            raise MalformedError(f"a multiaddr with the unknown protocol {code}")
        size = protocol.size
        if size == _VARIABLE:
            size, at = _read_varint(raw, at)
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


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(9):
        if at + i >= len(raw):
            break
        byte = raw[at + i]
        value |= (byte & 0x7F) << 7 * i
        if not byte & 0x80:
            return value, at + i + 1
    raise MalformedError("a multiaddr that ends too early")
