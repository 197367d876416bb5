"""What makes a record valid, and what does not; merging; arbitrary bytes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
from dht_samples import (
    CLAIMANT,
    HOST,
    OWNER,
    STRANGER,
    VNODE_KEY,
    WALL_MS,
    accepted,
    allocation,
    allocation_record,
    keypair,
    manifest,
    network_record,
)
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from p2pnet import keys
from p2pnet.dht.keyspace import name_key, network_key, record_key, vnode_key
from p2pnet.dht.manifest import grants, network_id_of, open_manifest
from p2pnet.dht.records import (
    ALLOCATION,
    AUTHORS_MAX,
    BODY_BYTES_MAX,
    REPLAY_MS,
    SET_BYTES_MAX,
    OpenRecord,
    make_record,
    merge,
    next_sequence,
    open_record,
    open_set,
    parse_set,
    serialise_set,
)
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.v1 import common_pb2, records_pb2

GRANT = manifest()
NETWORK_ID = network_id_of(GRANT)


def record(
    body: bytes, *, key: bytes = VNODE_KEY, kind: int = ALLOCATION, epoch: int = 1, ttl_s: int = 60
) -> common_pb2.Signed:
    """The claimant's record of any body."""
    return make_record(CLAIMANT, key, kind, epoch=epoch, sequence=1, ttl_s=ttl_s,
                       issued_at_ms=WALL_MS, body=body)  # fmt: skip


def by_hand(**fields: object) -> common_pb2.Signed:
    """A record that `make_record` would refuse to make."""
    payload = records_pb2.Record.FromString(allocation_record().payload)
    for name, value in fields.items():
        setattr(payload, name, value)
    return CLAIMANT.sign(keys.RECORD, payload.SerializeToString(deterministic=True))


def test_a_good_allocation_opens() -> None:
    opened = open_record(allocation_record(epoch=3, sequence=7), VNODE_KEY, WALL_MS)
    assert (opened.author, opened.kind, opened.epoch, opened.sequence, opened.ttl_s) == (
        CLAIMANT.peer_id, ALLOCATION, 3, 7, 60)  # fmt: skip
    assert opened.issued_at_ms == WALL_MS
    assert isinstance(opened.content, records_pb2.Allocation)
    assert opened.content.host == HOST.peer_id


@pytest.mark.parametrize("key", [name_key("digits"), network_key(NETWORK_ID)], ids=["name", "id"])
def test_a_good_network_record_opens_under_its_name_and_its_id(key: bytes) -> None:
    opened = open_record(network_record(GRANT, key=key), key, WALL_MS)
    assert isinstance(opened.content, records_pb2.NetworkRecord)
    assert opened.content.name == "digits"


def damaged() -> common_pb2.Signed:
    """A bit of the payload flipped."""
    signed = allocation_record()
    payload = bytearray(signed.payload)
    payload[-1] ^= 1
    return common_pb2.Signed(
        payload=bytes(payload), public_key=signed.public_key, signature=signed.signature
    )


def by_another() -> common_pb2.Signed:
    """A good payload under a stranger's signature: the author is then another."""
    return STRANGER.sign(keys.RECORD, allocation_record().payload)


def other_domain() -> common_pb2.Signed:
    """Signed by the author, for something else."""
    return CLAIMANT.sign(keys.ACCEPTANCE, allocation_record().payload)


def granted_to_others() -> common_pb2.Signed:
    """The owner grants somebody else."""
    grant = manifest(STRANGER.peer_id)
    return record(accepted(allocation(grant)), key=vnode_key(network_id_of(grant), "fc1"))


def own_grant() -> common_pb2.Signed:
    """A stranger's manifest that says it is the owner's."""
    grant = manifest()
    fake = STRANGER.sign(keys.MANIFEST, grant.payload)
    return record(accepted(allocation(fake)))


def other_manifest() -> common_pb2.Signed:
    """Good in itself, but of another network than the allocation's."""
    other = manifest(owner=STRANGER)
    return record(accepted(allocation(other, network_id=NETWORK_ID)))


FORGED: dict[str, Callable[[], common_pb2.Signed]] = {
    "a flipped bit": damaged,
    "another's signature": by_another,
    "a signature for another purpose": other_domain,
    "not granted": granted_to_others,
    "a manifest the owner did not sign": own_grant,
    "another network's manifest": other_manifest,
    "accepted by another than the host": lambda: record(accepted(allocation(GRANT), by=STRANGER)),
    "claimed by another": lambda: record(accepted(allocation(GRANT, claimant=STRANGER))),
    "another epoch": lambda: record(accepted(allocation(GRANT, epoch=2))),
    "another VNode's key": lambda: record(accepted(allocation(GRANT, vnode="fc2"))),
    "another key": lambda: record(accepted(allocation(GRANT)), key=record_key("elsewhere")),
    "from long ago": lambda: by_hand(issued_at_ms=WALL_MS - 60_000 - REPLAY_MS - 1),
    "from the future": lambda: by_hand(issued_at_ms=WALL_MS + REPLAY_MS + 1),
}


@pytest.mark.parametrize("name", list(FORGED))
def test_forged(name: str) -> None:
    with pytest.raises(ForgedError):
        open_record(FORGED[name](), VNODE_KEY, WALL_MS)


def unusual_serialisation() -> common_pb2.Signed:
    """The same fields in another order: signed by the author, but not canonical."""
    payload = allocation_record().payload
    reordered = records_pb2.Record.FromString(payload)
    key = b"\x0a" + bytes([len(reordered.key)]) + reordered.key
    assert payload.startswith(key)
    return CLAIMANT.sign(keys.RECORD, payload[len(key) :] + key)


def unusual_manifest() -> common_pb2.Signed:
    """A manifest with a default written out: another network id for the same words."""
    grant = OWNER.sign(keys.MANIFEST, manifest().payload + b"\x30\x00")
    body = allocation(grant)
    return record(accepted(body), key=vnode_key(body.network_id, "fc1"))


MALFORMED: dict[str, Callable[[], common_pb2.Signed]] = {
    "nothing": common_pb2.Signed,
    "no protobuf": lambda: CLAIMANT.sign(keys.RECORD, b"\xff\xff"),
    "fields in another order": unusual_serialisation,
    "a short signature": lambda: common_pb2.Signed(
        payload=allocation_record().payload, public_key=CLAIMANT.public_key, signature=b"short"
    ),
    "no life": lambda: by_hand(ttl_s=0),
    "too long a life": lambda: by_hand(ttl_s=24 * 3600 + 1),
    "too long a body": lambda: by_hand(body=bytes(BODY_BYTES_MAX + 1)),
    "an unknown kind": lambda: record(accepted(allocation(GRANT)), kind=0),
    "a sequence beyond 63 bits": lambda: by_hand(sequence=1 << 63),
    "no body": lambda: record(b""),
    "a body of noise": lambda: record(b"\xff" * 40),
    "a VNode without a name": lambda: record(
        accepted(allocation(GRANT, vnode="")), key=vnode_key(NETWORK_ID, "")
    ),
    "no lease": lambda: record(accepted(allocation(GRANT, lease_s=0))),
    "more standbys than there can be": lambda: followed_by("one", "two", "three"),
    "a standby of itself": lambda: followed_by(HOST.peer_id),
}


def followed_by(*standbys: str) -> common_pb2.Signed:
    body = allocation(GRANT)
    body.standbys.extend(standbys)
    return record(accepted(body))


def test_an_allocation_says_who_follows() -> None:
    opened = open_record(followed_by("one", "two"), VNODE_KEY, WALL_MS)
    assert isinstance(opened.content, records_pb2.Allocation)
    assert list(opened.content.standbys) == ["one", "two"]


@pytest.mark.parametrize("name", list(MALFORMED))
def test_malformed(name: str) -> None:
    signed = MALFORMED[name]()
    key = VNODE_KEY
    if name == "a VNode without a name":
        key = vnode_key(NETWORK_ID, "")
    with pytest.raises(MalformedError):
        open_record(signed, key, WALL_MS)


def test_a_manifest_written_in_another_way_is_refused() -> None:
    signed = unusual_manifest()
    key = records_pb2.Record.FromString(signed.payload).key
    with pytest.raises(MalformedError, match="canonical"):
        open_record(signed, key, WALL_MS)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"author": STRANGER}, ForgedError),
        ({"epoch": 2}, ForgedError),
        ({"name": "letters"}, ForgedError),
        ({"network_id": "00" * 16}, ForgedError),
        ({"name": "x" * 65}, MalformedError),
        ({"state_url": "x" * 600}, MalformedError),
        ({"key": network_key("00" * 16)}, ForgedError),
    ],
    ids=["author", "epoch", "name", "id", "long name", "long URL", "key"],
)
def test_bad_network_records(fields: dict[str, object], error: type[Exception]) -> None:
    signed = network_record(GRANT, **fields)  # type: ignore[arg-type]
    key = records_pb2.Record.FromString(signed.payload).key
    with pytest.raises(error):
        open_record(signed, key, WALL_MS)


def test_a_name_cannot_be_taken_with_another_names_manifest() -> None:
    signed = network_record(GRANT, key=name_key("letters"), name="letters")
    with pytest.raises(ForgedError):
        open_record(signed, name_key("letters"), WALL_MS)


def test_the_manifest() -> None:
    grant = manifest(CLAIMANT.peer_id)
    assert network_id_of(grant) == keys.sha256(grant.payload)[:16].hex()
    opened = open_manifest(grant)
    assert grants(opened, CLAIMANT.peer_id)
    assert not grants(opened, STRANGER.peer_id)
    assert grants(open_manifest(manifest()), STRANGER.peer_id)
    with pytest.raises(ForgedError):
        open_manifest(STRANGER.sign(keys.MANIFEST, grant.payload))
    for wrong in ({"name": ""}, {"name": "a\nb"}, {"spec_digest": b"short"}, {"nonce": bytes(65)}):
        with pytest.raises(MalformedError):
            open_manifest(manifest(**wrong))  # type: ignore[arg-type]
    with pytest.raises(MalformedError):
        open_manifest(manifest("no peer id"))


@pytest.mark.parametrize("wrong", [{"ttl_s": 0}, {"ttl_s": 86401}, {"body": bytes(16385)}])
def test_we_make_no_record_that_others_would_refuse(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {"ttl_s": 60, "body": b"", "epoch": 1, "sequence": 1}
    with pytest.raises(ValueError, match="record"):
        make_record(CLAIMANT, VNODE_KEY, ALLOCATION, issued_at_ms=0, **fields | wrong)  # type: ignore[arg-type]


def test_a_sequence_grows_even_if_the_clock_does_not() -> None:
    assert next_sequence(0, WALL_MS) == WALL_MS
    assert next_sequence(WALL_MS + 5, WALL_MS) == WALL_MS + 6


OPENED = open_record(allocation_record(), VNODE_KEY, WALL_MS)


def fake(author: int, epoch: int, sequence: int, twin: int, age_s: float) -> OpenRecord:
    """An open record of any rank, without the cost of signing it."""
    signed = common_pb2.Signed(payload=b"%d %d %d %d" % (author, epoch, sequence, twin))
    return dataclasses.replace(
        OPENED,
        author=f"author {author:02}",
        epoch=epoch,
        sequence=sequence,
        signed=signed,
        age_s=age_s,
    )


FAKES = st.builds(
    fake, st.integers(0, 5), st.integers(0, 2), st.integers(0, 2), st.integers(0, 1),
    st.sampled_from([0.0, 1.0, 2.0]),
)  # fmt: skip


def as_values(records: list[OpenRecord]) -> list[tuple[object, ...]]:
    """What counts of records."""
    return [(r.author, r.rank, r.age_s) for r in records]


@seed(3)
@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(FAKES, max_size=12), st.lists(FAKES, max_size=12), st.randoms())
def test_merge_is_a_join(a: list[OpenRecord], b: list[OpenRecord], rng: random.Random) -> None:
    both = merge([*a, *b])
    shuffled = [*a, *b]
    rng.shuffle(shuffled)
    assert as_values(merge(shuffled)) == as_values(both)
    assert as_values(merge([*merge(a), *merge(b)])) == as_values(both)
    assert as_values(merge([*both, *both])) == as_values(both)
    for held in both:
        rivals = [r for r in [*a, *b] if r.author == held.author]
        assert held.rank == max(r.rank for r in rivals)
        assert held.age_s == max(r.age_s for r in rivals if r.rank == held.rank)


def test_a_merged_set_is_bounded() -> None:
    many = [fake(n, 1, n, 0, 0.0) for n in range(50)]
    assert [r.sequence for r in merge(many)] == list(range(49, 49 - AUTHORS_MAX, -1))


def test_a_set_survives_and_what_is_bad_in_it_is_left_out() -> None:
    good = dataclasses.replace(OPENED, age_s=12.5)
    expired = dataclasses.replace(
        open_record(allocation_record(claimant=STRANGER), VNODE_KEY, WALL_MS), age_s=60.0
    )
    data = serialise_set([good, expired])
    forged = records_pb2.RecordSet.FromString(data)
    forged.records.add(record=by_another(), age_ms=0)
    records, refused = open_set(forged.SerializeToString(), VNODE_KEY, WALL_MS)
    assert refused == 2
    assert as_values(records) == as_values([good])


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"",
        records_pb2.RecordSet(version=2).SerializeToString(),
        records_pb2.RecordSet(
            version=1, records=[records_pb2.HeldRecord()] * (AUTHORS_MAX + 1)
        ).SerializeToString(),
        bytes(SET_BYTES_MAX + 1),
    ],
    ids=["noise", "empty", "version", "authors", "size"],
)
def test_what_is_no_set(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_set(data)


def test_a_set_that_would_be_too_long_is_cut_to_its_newest() -> None:
    long = [
        dataclasses.replace(
            fake(n, 1, n, 0, 0.0), signed=common_pb2.Signed(payload=bytes(16000 + n))
        )
        for n in range(32)
    ]
    data = serialise_set(long)
    assert SET_BYTES_MAX * 0.9 < len(data) <= SET_BYTES_MAX
    assert len(parse_set(data)[0][0].payload) == 16031


PAYLOAD = allocation_record().payload


@seed(4)
@settings(max_examples=600, deadline=None, database=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(PAYLOAD) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_a_damaged_record_raises_what_it_may_even_if_its_author_signed_it(
    changes: list[tuple[int, int]],
) -> None:
    payload = bytearray(PAYLOAD)
    for at, byte in changes:
        payload[at] = byte
    signed = CLAIMANT.sign(keys.RECORD, bytes(payload))
    try:
        opened = open_record(signed, VNODE_KEY, WALL_MS)
    except (MalformedError, ForgedError):
        return
    assert opened.key == VNODE_KEY


@seed(5)
@settings(max_examples=600, deadline=None, database=None)
@given(st.binary(max_size=200), st.sampled_from([keypair(1), CLAIMANT]))
def test_any_bytes_as_body_manifest_record_or_set(data: bytes, author: keys.KeyPair) -> None:
    for attempt in (
        lambda: open_record(record(data), VNODE_KEY, WALL_MS),
        lambda: open_record(author.sign(keys.RECORD, data), VNODE_KEY, WALL_MS),
        lambda: open_manifest(author.sign(keys.MANIFEST, data)),
        lambda: open_set(data, VNODE_KEY, WALL_MS),
    ):
        try:
            attempt()
        except (MalformedError, ForgedError):
            pass
