"""Keys, positions, distances and CIDs."""

from __future__ import annotations

import hashlib

import cid
import pytest
from dht_samples import keypair

from p2pnet.dht.keyspace import (
    cid_of,
    common_prefix_bits,
    key_of_cid,
    name_key,
    network_key,
    peer_position,
    position,
    record_key,
    vnode_key,
)
from p2pnet.errors import UsageError
from p2pnet.keys import peer_id_bytes


def test_a_key_is_the_multihash_of_its_path() -> None:
    assert record_key("/p2pnet/ab/fc1") == b"\x12\x20" + hashlib.sha256(b"/p2pnet/ab/fc1").digest()
    assert vnode_key("ab", "fc1") == record_key("/p2pnet/ab/fc1")
    assert network_key("ab") == record_key("/p2pnet/net/ab")
    assert name_key("digits") == record_key("/p2pnet/name/digits")


def test_a_position_is_the_sha_256_of_what_travels() -> None:
    peer_id = keypair(1).peer_id
    expected = int.from_bytes(hashlib.sha256(peer_id_bytes(peer_id)).digest(), "big")
    assert peer_position(peer_id) == position(peer_id_bytes(peer_id)) == expected


@pytest.mark.parametrize(
    ("a", "b", "bits"),
    [(0, 0, 256), (0, 1, 255), (0, 1 << 255, 0), (0b1011 << 252, 0b1010 << 252, 3)],
)
def test_common_prefix(a: int, b: int, bits: int) -> None:
    assert common_prefix_bits(a, b) == bits


def test_a_cid_is_what_stock_tools_make_and_take() -> None:
    key = record_key("/p2pnet/ab/fc1")
    text = cid_of(key)
    assert text == cid.make_cid(1, "raw", key).encode("base32").decode()
    assert key_of_cid(text) == key
    assert key_of_cid(cid.make_cid(1, "raw", key).encode("base58btc").decode()) == key
    assert key_of_cid(cid.make_cid(0, "dag-pb", key).encode().decode()) == key
    assert key_of_cid(cid.make_cid(1, "dag-pb", key).encode("base32").decode()) == key
    assert key_of_cid(cid.make_cid(1, "dag-json", key).encode("base32").decode()) == key


@pytest.mark.parametrize(
    "text", ["", "b", "bafk", "Qm", "Qm0", "zb2rhe", "bbbbbbbb!", "digits/fc1", "b" + "a" * 500]
)
def test_what_is_no_cid_is_the_users_mistake(text: str) -> None:
    with pytest.raises(UsageError, match="CID"):
        key_of_cid(text)
