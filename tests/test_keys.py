"""Peer ids as in libp2p, and signatures that serve one purpose."""

from __future__ import annotations

import base58
import pytest

from p2pnet import keys
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.keys import (
    KeyPair,
    peer_id_bytes,
    peer_id_from_bytes,
    peer_id_of,
    public_key_of,
    sha256,
    short,
    verify,
)
from p2pnet.v1 import common_pb2

KEY = KeyPair.from_seed(bytes(range(32)))
DOMAINS = (
    keys.ADVERT,
    keys.ACCUSATION,
    keys.RECORD,
    keys.ACCEPTANCE,
    keys.MANIFEST,
    keys.LOG_ENTRY,
    keys.SESSION,
)


def test_a_public_key_of_rfc_8032() -> None:
    """Test 1 of RFC 8032, section 7.1."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert KeyPair.from_seed(seed).public_key.hex() == public


def test_a_peer_id_of_the_libp2p_specification() -> None:
    """github.com/libp2p/specs, peer-ids: its example of an Ed25519 key."""
    peer_id = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
    assert peer_id_bytes(peer_id).hex().startswith("002408011220")
    assert peer_id_of(public_key_of(peer_id)) == peer_id
    assert peer_id_from_bytes(peer_id_bytes(peer_id)) == peer_id


def test_a_peer_id_holds_its_key() -> None:
    assert public_key_of(KEY.peer_id) == KEY.public_key
    assert KEY.peer_id.startswith("12D3KooW")
    other = KeyPair.from_seed(bytes(32))
    assert other.peer_id != KEY.peer_id


@pytest.mark.parametrize("text", ["", "0OIl", "1" * 65, "é" * 40])
def test_what_is_no_peer_id(text: str) -> None:
    with pytest.raises(MalformedError):
        peer_id_bytes(text)


def test_a_peer_id_of_another_kind_of_key_is_a_peer_id_without_a_key() -> None:
    rsa = base58.b58encode(bytes.fromhex("1220") + bytes(32)).decode()
    assert peer_id_from_bytes(peer_id_bytes(rsa)) == rsa
    with pytest.raises(MalformedError, match="Ed25519"):
        public_key_of(rsa)
    for multihash in (b"", bytes(65)):
        with pytest.raises(MalformedError):
            peer_id_from_bytes(multihash)
    with pytest.raises(MalformedError):
        peer_id_of(bytes(31))
    with pytest.raises(ValueError, match="32 bytes"):
        KeyPair.from_seed(bytes(31))


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_signature_is_good_for_one_purpose(domain: bytes) -> None:
    signed = KEY.sign(domain, b"payload")
    assert verify(domain, signed) == KEY.peer_id
    for other in DOMAINS:
        if other != domain:
            with pytest.raises(ForgedError, match="is not signed by it"):
                verify(other, signed)


def test_purposes_do_not_run_into_payloads() -> None:
    """What is signed is the domain, a zero byte and the payload."""
    assert len(set(DOMAINS)) == len(DOMAINS)
    assert all(b"\0" not in domain for domain in DOMAINS)


@pytest.mark.parametrize("part", ["payload", "signature", "public_key"])
def test_a_changed_bit_is_noticed(part: str) -> None:
    signed = KEY.sign(keys.RECORD, b"payload")
    raw = bytearray(getattr(signed, part))
    raw[0] ^= 1
    setattr(signed, part, bytes(raw))
    with pytest.raises(ForgedError):
        verify(keys.RECORD, signed)


def test_another_who_claims_it() -> None:
    signed = KEY.sign(keys.RECORD, b"payload")
    signed.public_key = KeyPair.from_seed(bytes(32)).public_key
    with pytest.raises(ForgedError):
        verify(keys.RECORD, signed)


@pytest.mark.parametrize(("key", "signature"), [(31, 64), (33, 64), (32, 63), (32, 0), (0, 64)])
def test_lengths_that_no_honest_peer_sends(key: int, signature: int) -> None:
    signed = common_pb2.Signed(payload=b"p", public_key=bytes(key), signature=bytes(signature))
    with pytest.raises(MalformedError):
        verify(keys.RECORD, signed)


def test_a_key_that_is_no_point_of_the_curve_signs_nothing() -> None:
    with pytest.raises(ForgedError):
        verify(
            keys.RECORD,
            common_pb2.Signed(payload=b"p", public_key=b"\xff" * 32, signature=bytes(64)),
        )


def test_small_things() -> None:
    assert short(KEY.peer_id) == "…" + KEY.peer_id[-8:]
    assert short("abc") == "abc"
    assert sha256(b"").hex().startswith("e3b0c44298fc1c14")
    assert sha256(memoryview(b"ab")) == sha256(b"ab")
