"""Adverts, accusations and messages: round trips, bounds, forgeries, and bytes from anybody."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from gossip_world import keypair
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnet import keys
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.messages import (
    MESSAGE_BYTES_MAX,
    STATEMENTS_MAX,
    Kinds,
    Parcel,
    read_message,
    write_message,
)
from p2pnet.gossip.statements import (
    INCARNATION_MAX,
    Versions,
    build_accusation,
    build_advert,
    open_accusation,
    open_advert,
)
from p2pnet.v1 import common_pb2, gossip_pb2

ALICE, BOB = keypair(1), keypair(2)
CAPABILITIES = Capabilities(2.5, 1 << 33, 5, "x86_64", ("cpu", "cuda:0 NVIDIA X"), 66.5, 2, True)


def plain(**changes: object) -> gossip_pb2.Advert:
    values: dict[str, object] = {
        "peer_id": ALICE.peer_id,
        "incarnation": 5,
        "presence": gossip_pb2.PRESENCE_HERE,
        "versions": common_pb2.VersionRange(min=1, max=1),
    }
    return gossip_pb2.Advert(**{**values, **changes})  # type: ignore[arg-type]


def signed(advert: gossip_pb2.Advert) -> common_pb2.Signed:
    return ALICE.sign(keys.ADVERT, advert.SerializeToString(deterministic=True))


def test_an_advert_says_what_was_put_in() -> None:
    built = build_advert(
        ALICE,
        incarnation=7,
        sequence=3,
        addrs=("/ip4/1.2.3.4/tcp/5",),
        grpc_targets=("1.2.3.4:6",),
        grpc_certificate=b"der",
        capabilities=CAPABILITIES,
        versions=Versions(1, 4),
    )
    opened = open_advert(built.signed)
    assert opened == built
    assert opened.peer_id == ALICE.peer_id
    assert opened.capabilities == CAPABILITIES
    assert (opened.incarnation, opened.sequence, opened.left) == (7, 3, False)
    assert opened.versions == Versions(1, 4)
    assert opened.grpc_certificate == b"der"


def test_too_many_addresses_of_ours_are_left_out() -> None:
    addrs = tuple(f"/ip4/1.2.3.4/tcp/{port}" for port in range(1, 30))
    assert build_advert(ALICE, incarnation=1, sequence=0, addrs=addrs).addrs == addrs[:16]


def test_leaving_ends_an_incarnation() -> None:
    def order(incarnation: int, sequence: int, left: bool) -> tuple[int, bool, int]:
        return build_advert(ALICE, incarnation=incarnation, sequence=sequence, left=left).order

    assert order(1, 9, False) < order(1, 2, True) < order(2, 0, False)
    assert order(1, 1, False) < order(1, 2, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"presence": gossip_pb2.PRESENCE_UNSPECIFIED},
        {"presence": 77},
        {"incarnation": 0},
        {"incarnation": INCARNATION_MAX + 1},
        {"sequence": INCARNATION_MAX + 1},
        {"addrs": ["/ip4/1.2.3.4/tcp/1"] * 17},
        {"addrs": ["x" * 257]},
        {"addrs": ["/ip4/\x1b[31m"]},
        {"grpc_targets": ["h:1"] * 9},
        {"grpc_certificate": bytes(4097)},
        {"agent": "x" * 65},
        {"versions": common_pb2.VersionRange(min=0, max=1)},
        {"versions": common_pb2.VersionRange(min=2, max=1)},
        {"capabilities": gossip_pb2.Capabilities(cpus=math.nan)},
        {"capabilities": gossip_pb2.Capabilities(cpus=-1.0)},
        {"capabilities": gossip_pb2.Capabilities(matmul_gflops=math.inf)},
        {"capabilities": gossip_pb2.Capabilities(devices=["d"] * 17)},
        {"capabilities": gossip_pb2.Capabilities(arch="a" * 33)},
        {"grpc_certificate": bytes(4096), "addrs": ["x" * 256] * 16, "agent": "é" * 64},
    ],
    ids=lambda changes: str(changes)[:48],
)
def test_an_advert_out_of_bounds_is_malformed(changes: dict[str, object]) -> None:
    if len(changes) == 3:  # each within its own bound, all together not
        changes = {**changes, "grpc_targets": ["y" * 256] * 8}
        advert = plain(**changes)
        advert.capabilities.devices.extend(["d" * 128] * 16)
        assert len(signed(advert).payload) > 8 << 10
        with pytest.raises(MalformedError):
            open_advert(signed(advert))
        return
    with pytest.raises(MalformedError):
        open_advert(signed(plain(**changes)))


def test_an_advert_in_another_peers_name_is_forged() -> None:
    with pytest.raises(ForgedError):
        open_advert(signed(plain(peer_id=BOB.peer_id)))


def test_a_changed_advert_and_one_signed_for_something_else_are_forged() -> None:
    good = signed(plain())
    changed = common_pb2.Signed(
        payload=plain(incarnation=6).SerializeToString(deterministic=True),
        public_key=good.public_key,
        signature=good.signature,
    )
    elsewhere = ALICE.sign(keys.RECORD, good.payload)
    for bad in (changed, elsewhere):
        with pytest.raises(ForgedError):
            open_advert(bad)


def test_the_same_statement_in_other_bytes_is_malformed() -> None:
    payload = plain().SerializeToString(deterministic=True)
    twice = ALICE.sign(keys.ADVERT, payload + plain().SerializeToString(deterministic=True))
    with pytest.raises(MalformedError):
        open_advert(twice)


def test_an_accusation_says_what_was_put_in_and_names_its_author() -> None:
    built = build_accusation(ALICE, BOB.peer_id, incarnation=4, failed=True)
    assert open_accusation(built.signed) == built
    assert (built.accuser, built.subject) == (ALICE.peer_id, BOB.peer_id)
    forged = gossip_pb2.Accusation(accuser=BOB.peer_id, subject=keypair(3).peer_id, incarnation=1)
    with pytest.raises(ForgedError):
        open_accusation(ALICE.sign(keys.ACCUSATION, forged.SerializeToString(deterministic=True)))


@pytest.mark.parametrize(
    ("subject", "incarnation"),
    [(ALICE.peer_id, 1), ("", 1), ("x" * 300, 1), ("0OIl", 1), (BOB.peer_id, 0)],
)
def test_an_accusation_out_of_bounds_is_malformed(subject: str, incarnation: int) -> None:
    bad = gossip_pb2.Accusation(accuser=ALICE.peer_id, subject=subject, incarnation=incarnation)
    with pytest.raises(MalformedError):
        open_accusation(ALICE.sign(keys.ACCUSATION, bad.SerializeToString(deterministic=True)))


def test_messages_are_bounded() -> None:
    with pytest.raises(MalformedError):
        read_message(bytes(MESSAGE_BYTES_MAX + 1))
    many = [b""] * (STATEMENTS_MAX + 1)
    with pytest.raises(MalformedError):
        read_message(write_message(Kinds.KIND_NEWS, Versions(), accusations=many))
    with pytest.raises(MalformedError):
        read_message(b"")  # no versions


def test_what_a_message_says_to_people_is_made_printable_and_short() -> None:
    detail = read_message(
        write_message(Kinds.KIND_REFUSED, Versions(), detail="\x1b[2J" + "x" * 999)
    ).detail
    assert detail.isprintable()
    assert len(detail) == 256


def test_a_parcel_keeps_to_its_bytes_and_packs_nothing_twice() -> None:
    advert = build_advert(ALICE, incarnation=1, sequence=0).raw
    parcel = Parcel(len(advert) + 20)
    assert parcel.advert(advert)
    assert parcel.advert(advert)
    assert len(parcel.adverts) == 1
    assert not parcel.accusation(
        build_accusation(ALICE, BOB.peer_id, incarnation=1, failed=True).raw
    )


OPENERS: list[tuple[bytes, Callable[[common_pb2.Signed], object]]] = [
    (keys.ADVERT, open_advert),
    (keys.ACCUSATION, open_accusation),
]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.binary(max_size=400), st.sampled_from([0, 1]), st.booleans())
def test_no_bytes_raise_anything_but_what_is_promised(
    payload: bytes, which: int, well_signed: bool
) -> None:
    domain, opener = OPENERS[which]
    statement = (
        ALICE.sign(domain, payload)
        if well_signed
        else common_pb2.Signed(payload=payload, public_key=payload[:32], signature=payload[:64])
    )
    with pytest.raises((MalformedError, ForgedError)):
        opener(statement)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_never_passes_and_never_raises_anything_else(at: int, flip: int) -> None:
    data = bytearray(
        build_advert(ALICE, incarnation=1, sequence=0, capabilities=CAPABILITIES).signed.payload
    )
    data[at % len(data)] ^= flip
    honest = build_advert(ALICE, incarnation=1, sequence=0, capabilities=CAPABILITIES).signed
    tampered = common_pb2.Signed(
        payload=bytes(data), public_key=honest.public_key, signature=honest.signature
    )
    with pytest.raises(ForgedError):
        open_advert(tampered)
    try:
        open_advert(ALICE.sign(keys.ADVERT, bytes(data)))  # well signed, whatever it says
    except (MalformedError, ForgedError):
        pass


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_reading_any_message_gives_one_or_is_malformed(data: bytes) -> None:
    try:
        read_message(data)
    except MalformedError:
        pass
