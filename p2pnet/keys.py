"""Keys, peer ids and signed statements. Pure: no I/O, and no libp2p.

A peer is named as in libp2p (github.com/libp2p/specs, peer-ids): for Ed25519
the id is the base58 of the *identity* multihash of the public key's protobuf,
so that a peer id holds its public key and a signature can be checked from the
id alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pnet.errors import ForgedError, MalformedError
from p2pnet.v1 import common_pb2 as pb

# multihash code 0x00 (identity), length 36; protobuf: key type Ed25519 (1), 32 bytes of data
_ED25519_ID_PREFIX = bytes.fromhex("002408011220")
_PUBLIC_KEY_BYTES = 32
_SIGNATURE_BYTES = 64
PEER_ID_CHARS_MAX = 64

# What a signature is for. One made for one domain never serves another.
ADVERT = b"p2pnet/v1/advert"
ACCUSATION = b"p2pnet/v1/accusation"
RECORD = b"p2pnet/v1/record"
ACCEPTANCE = b"p2pnet/v1/acceptance"
MANIFEST = b"p2pnet/v1/manifest"
LOG_ENTRY = b"p2pnet/v1/log-entry"
VOTE = b"p2pnet/v1/vote"
CANCELLATION = b"p2pnet/v1/cancellation"
SERVICE = b"p2pnet/v1/service"
SESSION = b"p2pnet/v1/session"


@lru_cache(maxsize=8192)
def peer_id_of(public_key: bytes) -> str:
    """The libp2p peer id (base58) of a raw Ed25519 public key.

    Raises:
        MalformedError: the key is not 32 bytes long.
    """
    if len(public_key) != _PUBLIC_KEY_BYTES:
        raise MalformedError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    return base58.b58encode(_ED25519_ID_PREFIX + public_key).decode()


# base58 in Python takes 0.1 ms, and a DHT answer names 20 peers.
@lru_cache(maxsize=16384)
def peer_id_bytes(peer_id: str) -> bytes:
    """The multihash bytes of a peer id, as they travel on libp2p's wire.

    Raises:
        MalformedError: not base58, or far too long.
    """
    if not 0 < len(peer_id) <= PEER_ID_CHARS_MAX:
        raise MalformedError("a peer id has between 1 and 64 characters")
    try:
        return base58.b58decode(peer_id)
    except ValueError:
        raise MalformedError(f"{peer_id!r} is not a peer id: it is not base58") from None


@lru_cache(maxsize=16384)
def peer_id_from_bytes(multihash: bytes) -> str:
    """The inverse of `peer_id_bytes`; any multihash up to 64 bytes.

    Raises:
        MalformedError: empty or too long.
    """
    if not 0 < len(multihash) <= 64:
        raise MalformedError("a peer id has between 1 and 64 bytes")
    return base58.b58encode(multihash).decode()


def public_key_of(peer_id: str) -> bytes:
    """The Ed25519 public key inside a peer id.

    Raises:
        MalformedError: the peer id does not hold an Ed25519 key.
    """
    raw = peer_id_bytes(peer_id)
    if len(raw) != 38 or not raw.startswith(_ED25519_ID_PREFIX):
        raise MalformedError(f"peer id {peer_id} does not hold an Ed25519 key")
    return raw[6:]


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An Ed25519 identity. `seed` is the 32-byte private key."""

    seed: bytes

    @staticmethod
    def from_seed(seed: bytes) -> KeyPair:
        """The key pair of a 32-byte private key; raises ValueError for another length."""
        if len(seed) != 32:
            raise ValueError(f"an Ed25519 private key has 32 bytes, not {len(seed)}")
        return KeyPair(seed)

    @property
    def public_key(self) -> bytes:
        """The raw public key, 32 bytes."""
        return _private(self.seed).public_key().public_bytes_raw()

    @property
    def peer_id(self) -> str:
        """The libp2p peer id, base58."""
        return peer_id_of(self.public_key)

    def sign(self, domain: bytes, payload: bytes) -> pb.Signed:
        """A statement by this key, good for `domain` alone."""
        return pb.Signed(
            payload=payload,
            public_key=self.public_key,
            signature=_private(self.seed).sign(domain + b"\0" + payload),
        )


def verify(domain: bytes, signed: pb.Signed) -> str:
    """Checks a signed statement and returns its author's peer id.

    Raises:
        ForgedError: the signature does not hold for this domain.
        MalformedError: the key or the signature has a wrong length.
    """
    if len(signed.signature) != _SIGNATURE_BYTES:
        raise MalformedError(f"a signature has 64 bytes, not {len(signed.signature)}")
    peer_id = peer_id_of(signed.public_key)
    if not _holds(signed.public_key, signed.signature, domain + b"\0" + signed.payload):
        raise ForgedError(f"a statement said to be by {peer_id} is not signed by it")
    return peer_id


def short(peer_id: str) -> str:
    """A peer id for people: its last 8 characters (the first ones are alike in all)."""
    return "…" + peer_id[-8:] if len(peer_id) > 12 else peer_id


def sha256(data: bytes | memoryview) -> bytes:
    """SHA-256, 32 bytes."""
    return hashlib.sha256(data).digest()


@lru_cache(maxsize=64)
def _private(seed: bytes) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seed)


@lru_cache(maxsize=8192)
def _holds(public_key: bytes, signature: bytes, message: bytes) -> bool:
    # A record is met many times: in a lookup, from several holders, at a republish.
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
