"""Keys, positions and distances. Pure.

A DHT key is what travels: a peer id's multihash bytes, or the sha2-256
multihash of a path. Its *position* is the SHA-256 of those bytes as a number
of 256 bits, and the distance of two positions is their XOR (Maymounkov and
Mazieres 2002; github.com/libp2p/specs/tree/master/kad-dht).
"""

from __future__ import annotations

import base64
from functools import lru_cache

import base58

from p2pnet.errors import UsageError
from p2pnet.keys import peer_id_bytes, sha256

POSITION_BITS = 256
_SHA2_256_PREFIX = b"\x12\x20"  # multihash: code 0x12, 32 bytes of digest
_MULTIHASH_BYTES = 34
_CID_V1_RAW = b"\x01\x55"  # version 1, content "raw"


def record_key(path: str) -> bytes:
    """The DHT key of a path: its sha2-256 multihash, 34 bytes (the wire refuses over 50)."""
    return _SHA2_256_PREFIX + sha256(path.encode())


def vnode_key(network_id: str, vnode: str) -> bytes:
    """Where a VNode's allocations and providers are kept."""
    return record_key(f"/p2pnet/{network_id}/{vnode}")


def network_key(network_id: str) -> bytes:
    """Where a network's record is kept, by its id."""
    return record_key(f"/p2pnet/net/{network_id}")


def name_key(name: str) -> bytes:
    """Where the records of the networks of that name are kept."""
    return record_key(f"/p2pnet/name/{name}")


def service_key(service_id: str) -> bytes:
    """Where a service's manifest is kept."""
    return record_key(f"/p2pnet/service/{service_id}")


@lru_cache(maxsize=16384)
def position(key: bytes) -> int:
    """Where a key lies, from 0 to 2**256 - 1."""
    return int.from_bytes(sha256(key), "big")


@lru_cache(maxsize=16384)
def peer_position(peer_id: str) -> int:
    """Where a peer lies: the position of its id's multihash bytes.

    Raises:
        MalformedError: not a peer id.
    """
    return position(peer_id_bytes(peer_id))


def common_prefix_bits(a: int, b: int) -> int:
    """How many leading bits two positions share, 0 to 256: the number of a k-bucket."""
    return POSITION_BITS - (a ^ b).bit_length()


def cid_of(key: bytes) -> str:
    """A multihash key as a CIDv1 string (raw codec, base32), which stock tools take."""
    return "b" + base64.b32encode(_CID_V1_RAW + key).decode().lower().rstrip("=")


def key_of_cid(text: str) -> bytes:
    """The key in a CID over a sha2-256 multihash: version 1 in base32 or
    base58, or version 0 ("Qm...").

    Raises:
        UsageError: not such a CID.
    """
    try:
        if text.startswith("Qm"):
            return _multihash(base58.b58decode(text))
        if text.startswith("b"):
            digits = text[1:].upper()
            raw = base64.b32decode(digits + "=" * (-len(digits) % 8))
        elif text.startswith("z"):
            raw = base58.b58decode(text[1:])
        else:
            raise ValueError("a CID in another base")
        # Before the multihash: the version and the codec, a varint of 1 to 3 bytes.
        if raw[:1] != b"\x01" or not 2 <= len(raw) - _MULTIHASH_BYTES <= 4:
            raise ValueError("not a CIDv1 of such a length")
        return _multihash(raw[-_MULTIHASH_BYTES:])
    except ValueError:
        raise UsageError(
            f"{text[:120]!r} is not the CID of a SHA-256: one looks like bafkrei... or Qm..."
        ) from None


def _multihash(raw: bytes) -> bytes:
    if len(raw) != _MULTIHASH_BYTES or not raw.startswith(_SHA2_256_PREFIX):
        raise ValueError("not a sha2-256 multihash")
    return raw
