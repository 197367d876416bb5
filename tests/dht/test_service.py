"""Services: which manifests hold, m of n, and that the newest only ever moves on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from dht_samples import OWNER, STRANGER, WALL_MS, keypair
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from p2pnet import keys
from p2pnet.dht import service as core
from p2pnet.dht.keyspace import service_key
from p2pnet.dht.records import (
    AUTHORS_MAX,
    BODY_BYTES_MAX,
    SERVICE,
    OpenRecord,
    make_record,
    merge,
    open_record,
)
from p2pnet.dht.service import Newest, Verdict, open_draft, open_service, service_id_of
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.keys import KeyPair
from p2pnet.v1 import common_pb2, records_pb2

GOVERNORS = sorted((keypair(n) for n in range(101, 104)), key=lambda k: k.public_key)
A, B, C = GOVERNORS
KEYS = [governor.public_key for governor in GOVERNORS]
LISTED, UNLISTED = "1" * 32, "2" * 32
SERVICE_ID = service_id_of("club", 2, KEYS)


def manifest(version: int = 1, **fields: object) -> records_pb2.ServiceManifest:
    """Two of three have to sign."""
    out = records_pb2.ServiceManifest(
        name="club",
        version=version,
        threshold=2,
        governors=KEYS,
        networks=[LISTED],
        owners=[OWNER.public_key],
    )
    for name, value in fields.items():
        out.ClearField(name)
        if isinstance(value, list):
            getattr(out, name).extend(value)
        else:
            setattr(out, name, value)
    return out


def signed(
    by: Sequence[KeyPair] = (A, B), body: records_pb2.ServiceManifest | None = None
) -> records_pb2.SignedService:
    """By these, in order."""
    payload = (body or manifest()).SerializeToString(deterministic=True)
    signatures = [core.sign(payload, governor) for governor in by]
    return records_pb2.SignedService(payload=payload, signatures=signatures)


def test_a_manifest_that_two_of_three_signed_holds() -> None:
    service = open_service(signed())
    assert service.service_id == SERVICE_ID
    assert (service.name, service.version, service.threshold) == ("club", 1, 2)
    assert service.signers == (A.public_key, B.public_key)
    assert service.lists(LISTED, STRANGER.public_key)
    assert service.lists(UNLISTED, OWNER.public_key)
    assert not service.lists(UNLISTED, STRANGER.public_key)


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_exactly_as_many_as_have_to_sign_are_enough(threshold: int) -> None:
    body = manifest(threshold=threshold)
    for count in range(4):
        for by in itertools.combinations(GOVERNORS, count):
            assert len(open_draft(signed(by, body)).signers) == count
            if count >= threshold:
                assert open_service(signed(by, body)).version == 1
            else:
                with pytest.raises(ForgedError, match=f"{threshold} of the 3 governors.*{count}"):
                    open_service(signed(by, body))


def with_signature(signature: records_pb2.Signature) -> records_pb2.SignedService:
    """In the place of B's."""
    out = signed((A,))
    out.signatures.append(signature)
    return out


def tampered() -> records_pb2.SignedService:
    """A network more than was signed."""
    out = signed()
    out.payload = manifest(networks=[LISTED, UNLISTED]).SerializeToString(deterministic=True)
    return out


def of_another_version() -> records_pb2.SignedService:
    """B signed version 1, and this is version 2."""
    old = signed()
    new = signed((A,), manifest(2))
    new.signatures.append(old.signatures[1])
    return new


def other_domain() -> records_pb2.SignedService:
    """B signed these bytes, for something else."""
    by_b = B.sign(keys.MANIFEST, signed().payload)
    return with_signature(
        records_pb2.Signature(public_key=by_b.public_key, signature=by_b.signature)
    )


def borrowed() -> records_pb2.SignedService:
    """A's signature under B's name."""
    by_a = core.sign(signed().payload, A)
    return with_signature(records_pb2.Signature(public_key=B.public_key, signature=by_a.signature))


def own_governors() -> records_pb2.SignedService:
    """A stranger's list, with governors of its own: another service."""
    return signed((STRANGER,), manifest(governors=[STRANGER.public_key], threshold=1))


FORGED: list[Callable[[], records_pb2.SignedService]] = [
    tampered, of_another_version, other_domain, borrowed,
    lambda: signed((A,)),
    lambda: signed(sorted((A, STRANGER), key=lambda k: k.public_key)),
    lambda: signed(()),
]  # fmt: skip


@pytest.mark.parametrize("make", FORGED, ids=[
    "tampered", "of-another-version", "other-domain", "borrowed", "too-few", "no-governor", "none",
])  # fmt: skip
def test_what_is_forged(make: Callable[[], records_pb2.SignedService]) -> None:
    with pytest.raises(ForgedError):
        open_service(make())


def too_long_payload() -> records_pb2.SignedService:
    """Not to be parsed at all."""
    return records_pb2.SignedService(payload=bytes(core.PAYLOAD_BYTES_MAX + 1))


MALFORMED: dict[str, Callable[[], records_pb2.SignedService]] = {
    "one key twice": lambda: signed((A, A)),
    "unsorted signatures": lambda: signed((B, A)),
    "short signature": lambda: with_signature(
        records_pb2.Signature(public_key=B.public_key, signature=b"x")
    ),
    "noise": lambda: records_pb2.SignedService(payload=b"\xff"),
    "nothing": records_pb2.SignedService,
    "too long": too_long_payload,
    "version 0": lambda: signed(body=manifest(0)),
    "version over": lambda: signed(body=manifest(1 << 63)),
    "threshold 0": lambda: signed(body=manifest(threshold=0)),
    "threshold 4": lambda: signed(body=manifest(threshold=4)),
    "no governors": lambda: signed((), manifest(governors=[], threshold=0)),
    "unsorted governors": lambda: signed(body=manifest(governors=KEYS[::-1])),
    "a governor twice": lambda: signed(body=manifest(governors=[*KEYS, KEYS[-1]])),
    "short governor": lambda: signed(body=manifest(governors=[b"\0", *KEYS])),
    "17 governors": lambda: signed(
        body=manifest(governors=sorted(keypair(n).public_key for n in range(17)))
    ),
    "no network id": lambda: signed(body=manifest(networks=["digits"])),
    "unsorted networks": lambda: signed(body=manifest(networks=[UNLISTED, LISTED])),
    "257 networks": lambda: signed(body=manifest(networks=[f"{n:032x}" for n in range(257)])),
    "65 owners": lambda: signed(
        body=manifest(owners=sorted(keypair(n).public_key for n in range(65)))
    ),
    "no name": lambda: signed(body=manifest(name="")),
    "long name": lambda: signed(body=manifest(name="n" * 65)),
}


@pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_malformed(make: Callable[[], records_pb2.SignedService]) -> None:
    with pytest.raises(MalformedError):
        open_service(make())


def test_bytes_that_are_not_canonical_are_refused() -> None:
    payload = signed().payload
    trailing = payload + b"\x10\x01"  # the version said twice: the last one counts
    with pytest.raises(MalformedError, match="canonical"):
        open_draft(records_pb2.SignedService(payload=trailing))
    with pytest.raises(MalformedError):
        core.parse_signed(signed().SerializeToString() + b"\x7a\x00")
    with pytest.raises(MalformedError):
        core.parse_signed(bytes(core.SIGNED_BYTES_MAX + 1))


def test_the_largest_service_fits_a_record() -> None:
    governors = sorted((keypair(n) for n in range(core.GOVERNORS_MAX)), key=lambda k: k.public_key)
    body = records_pb2.ServiceManifest(
        name="\U0001f600" * 64,
        version=core.VERSION_MAX,
        threshold=len(governors),
        governors=[governor.public_key for governor in governors],
        networks=[f"{n:032x}" for n in range(core.NETWORKS_MAX)],
        owners=sorted(keypair(n).public_key for n in range(core.OWNERS_MAX)),
        issued_at_ms=core.VERSION_MAX,
    )
    whole = signed(governors, body)
    assert len(whole.SerializeToString()) <= BODY_BYTES_MAX
    assert open_service(core.parse_signed(whole.SerializeToString(deterministic=True))).networks


# The id


def test_an_id_is_of_name_threshold_and_governors_alone() -> None:
    assert open_service(signed(body=manifest(7, networks=[]))).service_id == SERVICE_ID
    others = {
        service_id_of("club", 2, KEYS[:2]),
        service_id_of("club", 1, KEYS),
        service_id_of("clubs", 2, KEYS),
        service_id_of("club", 2, [*KEYS, STRANGER.public_key]),
    }
    assert len(others | {SERVICE_ID}) == 5
    assert service_id_of("club", 2, KEYS[::-1]) == SERVICE_ID


# Which one counts


def test_the_newest_counts_and_nothing_goes_back() -> None:
    newest = Newest(SERVICE_ID)
    assert newest.take(signed()) is Verdict.NEW
    assert newest.take(signed((B, C))) is Verdict.SAME  # others of the governors, the same list
    assert newest.take(signed(body=manifest(3, networks=[UNLISTED]))) is Verdict.NEW
    assert newest.take(signed(body=manifest(2))) is Verdict.OLDER
    assert newest.take(signed()) is Verdict.OLDER
    assert newest.service is not None
    assert newest.service.networks == (UNLISTED,)


def test_two_lists_of_one_version_are_told_and_the_first_stays() -> None:
    newest = Newest(SERVICE_ID)
    newest.take(signed())
    assert newest.take(signed((A, C), manifest(networks=[UNLISTED]))) is Verdict.TWIN
    assert newest.service is not None
    assert newest.service.networks == (LISTED,)
    assert newest.take(signed((A, C), manifest(2, networks=[UNLISTED]))) is Verdict.NEW


@pytest.mark.parametrize(
    ("by", "fields"),
    [
        ((A, B), {"governors": sorted([*KEYS[:2], STRANGER.public_key])}),
        ((A, B), {"threshold": 1}),
        ((A,), {"threshold": 1}),
        ((STRANGER,), {"threshold": 1, "governors": [STRANGER.public_key]}),
        ((A, B), {"name": "clubs"}),
    ],
    ids=["a-governor-replaced", "fewer-have-to", "fewer-and-fewer", "all-others", "renamed"],
)
def test_governors_never_change(by: Sequence[KeyPair], fields: dict[str, object]) -> None:
    newest = Newest(SERVICE_ID)
    newest.take(signed())
    by = [each for each in by if each.public_key in manifest(9, **fields).governors]
    assert newest.take(signed(by, manifest(9, **fields))) is Verdict.FOREIGN
    assert newest.service is not None
    assert newest.service.version == 1


def test_what_is_forged_changes_nothing() -> None:
    newest = Newest(SERVICE_ID)
    newest.take(signed())
    with pytest.raises(ForgedError):
        newest.take(signed((A,), manifest(2)))
    assert newest.service is not None
    assert newest.service.version == 1


def test_what_a_peer_says_to_who_asks_for_a_network() -> None:
    newest = Newest(SERVICE_ID)
    assert SERVICE_ID in newest.serves(LISTED, OWNER.public_key)
    newest.take(signed())
    assert newest.serves(LISTED, STRANGER.public_key) == ""
    assert newest.serves(UNLISTED, OWNER.public_key) == ""
    refused = newest.serves(UNLISTED, STRANGER.public_key)
    for told in ("club", SERVICE_ID, UNLISTED):
        assert told in refused
    assert core.anything(UNLISTED, STRANGER.public_key) == ""


@seed(1)
@settings(max_examples=60, deadline=None)
@given(
    offered=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([LISTED, UNLISTED])), max_size=12)
)
def test_in_whatever_order_they_come_versions_only_grow(offered: list[tuple[int, str]]) -> None:
    newest = Newest(SERVICE_ID)
    seen: dict[int, str] = {}
    last = 0
    for version, network in offered:
        verdict = newest.take(signed(body=manifest(version, networks=[network])))
        assert newest.service is not None
        assert newest.service.version == max(last, version)
        assert (verdict is Verdict.NEW) == (version > last)
        last = newest.service.version
        seen.setdefault(version, network) if verdict is Verdict.NEW else None
        assert newest.service.networks == (seen[last],)


@seed(2)
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_one_changed_bit_is_refused(data: st.DataObject) -> None:
    whole = signed().SerializeToString(deterministic=True)
    at = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed = bytearray(whole)
    changed[at // 8] ^= 1 << at % 8
    with pytest.raises((ForgedError, MalformedError)):
        open_service(core.parse_signed(bytes(changed)))


@seed(3)
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises((ForgedError, MalformedError)):
        open_service(core.parse_signed(data))
    with pytest.raises((ForgedError, MalformedError)):
        open_service(records_pb2.SignedService(payload=data))


# As a record


def record(
    body: records_pb2.SignedService,
    *,
    author: KeyPair = STRANGER,
    epoch: int = 1,
    key: bytes = service_key(SERVICE_ID),
) -> common_pb2.Signed:
    """Anybody may put it."""
    return make_record(
        author, key, SERVICE, epoch=epoch, sequence=1, ttl_s=60, issued_at_ms=WALL_MS,
        body=body.SerializeToString(deterministic=True),
    )  # fmt: skip


def opened(signed_record: common_pb2.Signed) -> OpenRecord:
    return open_record(signed_record, service_key(SERVICE_ID), WALL_MS)


def test_a_record_of_it_may_be_anybodys() -> None:
    content = opened(record(signed())).content
    assert isinstance(content, records_pb2.SignedService)
    assert open_service(content).service_id == SERVICE_ID


@pytest.mark.parametrize(
    "make",
    [
        lambda: record(signed((A,))),
        lambda: record(signed(), epoch=2),
        lambda: record(own_governors()),
        lambda: record(signed(), key=service_key("0" * 32)),
    ],
    ids=["too-few", "epoch-not-its-version", "another-service", "another-key"],
)
def test_a_record_that_does_not_hold(make: Callable[[], common_pb2.Signed]) -> None:
    with pytest.raises(ForgedError):
        opened(make())


def test_old_copies_by_many_do_not_push_the_newest_out() -> None:
    old = [opened(record(signed(), author=keypair(n))) for n in range(AUTHORS_MAX + 8)]
    new = opened(record(signed(body=manifest(2)), epoch=2))
    shuffled = [*old, new]
    random.Random(4).shuffle(shuffled)
    assert merge(shuffled)[0].epoch == 2
