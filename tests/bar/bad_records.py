"""Records that nobody may take, each made from a seed: what R17 feeds to a holder and a reader."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from p2pnet import keys
from p2pnet.dht.keyspace import name_key, record_key, vnode_key
from p2pnet.dht.manifest import network_id_of
from p2pnet.dht.records import ALLOCATION, BODY_BYTES_MAX, NETWORK, REPLAY_MS, TTL_S_MAX
from p2pnet.keys import KeyPair
from p2pnet.v1 import common_pb2, records_pb2

WALL_MS = 1_800_000_000_000
TTL_S = 60
NEWEST = (5, 1000)  # (epoch, sequence) of what the holder has, and had


def keypair(n: int) -> KeyPair:
    """A key pair by number."""
    return KeyPair.from_seed(keys.sha256(b"bad records %d" % n))


OWNER, CLAIMANT, HOST, STRANGER, OTHER_OWNER = (keypair(n) for n in range(5))


@lru_cache(maxsize=64)
def _manifest(
    *orchestrators: str,
    owner: KeyPair = OWNER,
    name: str = "net",
    keepers: tuple[str, ...] = (),
    state_url: str = "",
    claims_max: int = 0,
) -> common_pb2.Signed:
    body = records_pb2.Manifest(
        owner=owner.public_key, name=name, spec_digest=bytes(32),
        any_orchestrator=not orchestrators, orchestrators=orchestrators,
        keepers=keepers, state_url=state_url,
    )  # fmt: skip
    if claims_max:
        body.limits.claims_max = claims_max
    return owner.sign(keys.MANIFEST, body.SerializeToString(deterministic=True))


GRANT = _manifest()
NETWORK_ID = network_id_of(GRANT)


@dataclass(frozen=True, slots=True)
class Case:
    """A record set under a key, and the signed statement in it that must not be taken."""

    kind: str
    key: bytes
    signed: common_pb2.Signed
    value: bytes


def key_of(vnode: str) -> bytes:
    """Where a VNode's allocation belongs."""
    return vnode_key(NETWORK_ID, vnode)


def in_set(*signed: common_pb2.Signed, age_ms: int = 0, version: int = 1) -> bytes:
    """A record set as it travels."""
    held = [records_pb2.HeldRecord(record=one, age_ms=age_ms) for one in signed]
    return records_pb2.RecordSet(version=version, records=held).SerializeToString()


def make(
    vnode: str,
    *,
    key: bytes | None = None,
    kind: int = ALLOCATION,
    epoch: int = 1,
    sequence: int = 1,
    ttl_s: int = TTL_S,
    issued_at_ms: int = WALL_MS,
    body: bytes | None = None,
    author: KeyPair = CLAIMANT,
    domain: bytes = keys.RECORD,
    more: bytes = b"",
) -> common_pb2.Signed:
    """A record, good unless something is said; `more` is put behind its payload."""
    record = records_pb2.Record(
        key=key_of(vnode) if key is None else key,
        kind=kind,  # type: ignore[arg-type]
        epoch=epoch,
        sequence=sequence,
        ttl_s=ttl_s,
        issued_at_ms=issued_at_ms,
        body=accepted(vnode, epoch=epoch) if body is None else body,
    )
    return author.sign(domain, record.SerializeToString(deterministic=True) + more)


def accepted(
    vnode: str,
    *,
    by: KeyPair = HOST,
    domain: bytes = keys.ACCEPTANCE,
    more: bytes = b"",
    **fields: object,
) -> bytes:
    """A host's countersignature, good unless something is said."""
    allocation = records_pb2.Allocation(
        network_id=NETWORK_ID, vnode=vnode, host=HOST.peer_id, addrs=["/ip4/192.0.2.1/tcp/4001"],
        epoch=1, claimant=CLAIMANT.peer_id, role="primary", lease_s=30, manifest=GRANT,
    )  # fmt: skip
    for name, value in fields.items():
        if isinstance(value, common_pb2.Signed):
            getattr(allocation, name).CopyFrom(value)
        else:
            setattr(allocation, name, value)
    payload = allocation.SerializeToString(deterministic=True) + more
    return by.sign(domain, payload).SerializeToString(deterministic=True)


def network_body(manifest: common_pb2.Signed, **fields: object) -> bytes:
    """A network's record's body."""
    body = records_pb2.NetworkRecord(
        network_id=network_id_of(manifest), name="net", manifest=manifest, epoch=1,
        orchestrator=CLAIMANT.peer_id, vnodes=["fc1"], state_url="peers:",
    )  # fmt: skip
    for name, value in fields.items():
        setattr(body, name, value)
    return body.SerializeToString(deterministic=True)


def good(rng: random.Random) -> Case:
    """One that everybody takes: the test of the test."""
    vnode = f"good{rng.randrange(1 << 60)}"
    signed = make(vnode, epoch=rng.randrange(9), sequence=rng.randrange(9),
                  body=None)  # fmt: skip
    return Case("good", key_of(vnode), signed, in_set(signed, age_ms=rng.randrange(20_000)))


def _vnode(rng: random.Random) -> str:
    return f"v{rng.randrange(1 << 60)}"


def _flipped(data: bytes, rng: random.Random) -> bytes:
    at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def _signed(payload: bytes, public_key: bytes, signature: bytes) -> common_pb2.Signed:
    return common_pb2.Signed(payload=payload, public_key=public_key, signature=signature)


# Forged


def bit_of_payload(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    ok = make(vnode)
    return vnode, _signed(_flipped(ok.payload, rng), ok.public_key, ok.signature)


def bit_of_signature(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    ok = make(vnode)
    return vnode, _signed(ok.payload, ok.public_key, _flipped(ok.signature, rng))


def anothers_signature(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    ok, by = make(vnode), keypair(rng.randrange(10, 20))
    return vnode, _signed(ok.payload, ok.public_key, by.sign(keys.RECORD, ok.payload).signature)


def anothers_name(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, author=keypair(rng.randrange(10, 20)))


def another_domain(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, domain=rng.choice([keys.ACCEPTANCE, keys.MANIFEST, keys.ADVERT]))


def hosts_word_by_another(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, body=accepted(vnode, by=keypair(rng.randrange(10, 20))))


def hosts_word_forged(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    ok = common_pb2.Signed.FromString(accepted(vnode))
    ok.signature = _flipped(ok.signature, rng)
    return vnode, make(vnode, body=ok.SerializeToString(deterministic=True))


def hosts_word_for_another_vnode(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, body=accepted(_vnode(rng)))


def hosts_word_for_another_epoch(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode, epoch = _vnode(rng), rng.randrange(2, 99)
    return vnode, make(vnode, epoch=epoch, body=accepted(vnode, epoch=epoch - 1))


def hosts_word_to_another_claimant(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, body=accepted(vnode, claimant=keypair(rng.randrange(10, 20)).peer_id))


def hosts_word_of_another_kind(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, body=accepted(vnode, domain=keys.RECORD))


# Not granted


def granted_to_another(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    grant = _manifest(keypair(rng.randrange(10, 20)).peer_id)
    vnode = _vnode(rng)
    key = vnode_key(network_id_of(grant), vnode)
    body = accepted(vnode, manifest=grant, network_id=network_id_of(grant))
    return key.hex(), make(vnode, key=key, body=body)


def manifest_by_another(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    fake = keypair(rng.randrange(10, 20)).sign(keys.MANIFEST, GRANT.payload)
    return vnode, make(vnode, body=accepted(vnode, manifest=fake))


def manifest_of_another_network(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    other = _manifest(owner=OTHER_OWNER, name=f"other {rng.randrange(8)}")
    return vnode, make(vnode, body=accepted(vnode, manifest=other))


def no_manifest(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, body=accepted(vnode, manifest=common_pb2.Signed()))


def _under(
    rng: random.Random, grant: common_pb2.Signed, epoch: int
) -> tuple[str, common_pb2.Signed]:
    network_id, vnode = network_id_of(grant), _vnode(rng)
    key = vnode_key(network_id, vnode)
    body = accepted(vnode, manifest=grant, network_id=network_id, epoch=epoch)
    return key.hex(), make(vnode, key=key, body=body, epoch=epoch)


def terms_that_cannot_be(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    peers = sorted(keypair(n).peer_id for n in range(10, 20))
    grant = rng.choice(
        [
            _manifest(keepers=(peers[1], peers[0])),
            _manifest(keepers=(peers[0], peers[0])),
            _manifest(keepers=tuple(peers)),
            _manifest(keepers=("nobody",)),
            _manifest(state_url="http://192.0.2.1/"),
            _manifest(state_url="file:///" + "a" * 600),
            _manifest(keepers=(peers[0],), state_url="file:///srv"),
        ]
    )
    return _under(rng, grant, 1)


def more_claims_than_allowed(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    return _under(rng, _manifest(claims_max=3), rng.randrange(4, 1 << 60))


def network_not_granted(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    grant, key = _manifest(STRANGER.peer_id), name_key("net")
    sequence = rng.randrange(1 << 60)
    return key.hex(), make("", key=key, kind=NETWORK, sequence=sequence, body=network_body(grant))


def network_of_another_orchestrator(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    body = network_body(GRANT, orchestrator=keypair(rng.randrange(10, 20)).peer_id)
    key, sequence = name_key("net"), rng.randrange(1 << 60)
    return key.hex(), make("", key=key, kind=NETWORK, sequence=sequence, body=body)


def network_under_another_name(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    name = f"famous{rng.randrange(1 << 60)}"
    key = name_key(name)
    return key.hex(), make("", key=key, kind=NETWORK, body=network_body(GRANT, name=name))


# Under the wrong key


def anothers_key(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    return _vnode(rng), make(_vnode(rng))  # good where it belongs, offered elsewhere


def own_key_says_another(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode, key = _vnode(rng), record_key(_vnode(rng))
    return key.hex(), make(vnode, key=key)


# Expired and rolled back. The holder has NEWEST of the VNode "held", and had it of "gone".


def rolled_back(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    epoch = rng.randrange(1, NEWEST[0] + 1)
    sequence = rng.randrange(NEWEST[1]) if epoch == NEWEST[0] else rng.randrange(1 << 60)
    return "held", make("held", epoch=epoch, sequence=sequence)


def replayed_after_expiry(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    epoch = rng.randrange(1, NEWEST[0] + 1)
    sequence = rng.randrange(NEWEST[1] + 1) if epoch == NEWEST[0] else rng.randrange(1 << 60)
    return "gone", make("gone", epoch=epoch, sequence=sequence)


def rolled_back_by_another(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    """By who orchestrated the network before: an older epoch loses, whosever it is."""
    return "held", _by_another("held", rng)


def replayed_claim_of_another(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    return "gone", _by_another("gone", rng)


def _by_another(vnode: str, rng: random.Random) -> common_pb2.Signed:
    author, epoch = keypair(rng.randrange(10, 20)), rng.randrange(1, NEWEST[0])
    body = accepted(vnode, epoch=epoch, claimant=author.peer_id)
    sequence = rng.randrange(1 << 60)
    return make(vnode, epoch=epoch, sequence=sequence, body=body, author=author)


def from_long_ago(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode, ago_ms = _vnode(rng), TTL_S * 1000 + REPLAY_MS + rng.randrange(1, 10**12)
    return vnode, make(vnode, issued_at_ms=WALL_MS - ago_ms)


def from_the_future(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, issued_at_ms=WALL_MS + REPLAY_MS + rng.randrange(1, 10**12))


def expired(rng: random.Random) -> tuple[str, common_pb2.Signed, int]:
    vnode = _vnode(rng)
    return vnode, make(vnode), TTL_S * 1000 + rng.randrange(10**9)


def age_below_zero(rng: random.Random) -> tuple[str, common_pb2.Signed, int]:
    # What -1, a NaN and an infinity look like in 64 bits, for whoever reads them as such.
    bits = [(1 << 64) - 1 - rng.randrange(10**6), 0x7FF8 << 48, 0x7FF0 << 48, 1 << 63]
    vnode = _vnode(rng)
    return vnode, make(vnode), rng.choice(bits)


# Out of bounds


def life_out_of_bounds(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, ttl_s=rng.choice([0, TTL_S_MAX + 1, (1 << 32) - 1]))


def counter_out_of_bounds(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, sequence=rng.randrange(1 << 63, 1 << 64))


def unknown_kind(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, kind=rng.choice([0, 3, 77]))


def kind_of_another_body(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, kind=NETWORK)


def over_long_body(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    role = "x" * (BODY_BYTES_MAX + rng.randrange(1000))
    return vnode, make(vnode, body=accepted(vnode, role=role))


def over_long_text(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, body=accepted(vnode, role="x" * rng.randrange(65, 500)))


def unprintable_name(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng) + rng.choice(["\n", "\x1b[2J", "\u202e", "x" * 200])
    return vnode, make(vnode)


# Not in the canonical form, though signed by whom it should be


def unknown_field(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, more=b"\xf8\x01" + bytes([rng.randrange(1, 128)]))  # field 31


def unknown_field_inside(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    more = b"\xf8\x01" + bytes([rng.randrange(1, 128)])
    return vnode, make(vnode, body=accepted(vnode, more=more))


def field_twice(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    return vnode, make(vnode, more=b"\x20" + bytes([rng.randrange(1, 128)]))  # the sequence


def long_varint(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode, sequence = _vnode(rng), rng.randrange(1, 128)
    payload = make(vnode, sequence=sequence).payload
    at = payload.index(bytes([0x20, sequence]), 36)
    longer = payload[:at] + bytes([0x20, sequence | 0x80, 0]) + payload[at + 2 :]
    return vnode, CLAIMANT.sign(keys.RECORD, longer)


def other_order(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode, sequence = _vnode(rng), rng.randrange(1, 128)
    payload = make(vnode, sequence=sequence).payload
    at = payload.index(bytes([0x20, sequence]), 36)
    moved = payload[:at] + payload[at + 2 :] + payload[at : at + 2]
    return vnode, CLAIMANT.sign(keys.RECORD, moved)


def zero_written_out(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    payload = make(vnode, sequence=0).payload
    at = payload.index(b"\x28", 36)  # before the TTL
    return vnode, CLAIMANT.sign(keys.RECORD, payload[:at] + b"\x20\x00" + payload[at:])


def truncated_payload(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    vnode = _vnode(rng)
    payload = make(vnode).payload
    return vnode, CLAIMANT.sign(keys.RECORD, payload[: rng.randrange(len(payload))])


def garbage_payload(rng: random.Random) -> tuple[str, common_pb2.Signed]:
    return _vnode(rng), CLAIMANT.sign(keys.RECORD, rng.randbytes(rng.randrange(300)))


# The set around a good record


def truncated_set(rng: random.Random) -> tuple[str, common_pb2.Signed, bytes]:
    vnode = _vnode(rng)
    signed = make(vnode)
    whole = in_set(signed)
    return vnode, signed, whole[: rng.randrange(3, len(whole) - 70)]


def set_of_another_version(rng: random.Random) -> tuple[str, common_pb2.Signed, bytes]:
    vnode = _vnode(rng)
    signed = make(vnode)
    return vnode, signed, in_set(signed, version=rng.choice([0, 2, 77]))


def crowded_set(rng: random.Random) -> tuple[str, common_pb2.Signed, bytes]:
    vnode = _vnode(rng)
    signed = make(vnode)
    return vnode, signed, in_set(*[signed] * 33)


_Made = tuple[str, common_pb2.Signed] | tuple[str, common_pb2.Signed, int | bytes]
KINDS: tuple[Callable[[random.Random], _Made], ...] = (
    bit_of_payload, bit_of_signature, anothers_signature, anothers_name, another_domain,
    hosts_word_by_another, hosts_word_forged, hosts_word_for_another_vnode,
    hosts_word_for_another_epoch, hosts_word_to_another_claimant, hosts_word_of_another_kind,
    granted_to_another, manifest_by_another, manifest_of_another_network, no_manifest,
    terms_that_cannot_be, more_claims_than_allowed,
    network_not_granted, network_of_another_orchestrator, network_under_another_name,
    anothers_key, own_key_says_another,
    rolled_back, rolled_back_by_another, replayed_after_expiry, replayed_claim_of_another,
    from_long_ago, from_the_future, expired, age_below_zero,
    life_out_of_bounds, counter_out_of_bounds, unknown_kind, kind_of_another_body,
    over_long_body, over_long_text, unprintable_name,
    unknown_field, unknown_field_inside, field_twice, long_varint, other_order, zero_written_out,
    truncated_payload, garbage_payload,
    truncated_set, set_of_another_version, crowded_set,
)  # fmt: skip


def bad(n: int, seed: int) -> Case:
    """The n-th case of a seed: the kinds take turns."""
    make_one = KINDS[n % len(KINDS)]
    where, signed, *rest = make_one(random.Random(f"{seed} {n}"))
    value = rest[0] if rest and isinstance(rest[0], bytes) else None
    age_ms = rest[0] if rest and isinstance(rest[0], int) else 0
    key = bytes.fromhex(where) if where.startswith("1220") else key_of(where)
    return Case(make_one.__name__, key, signed, value or in_set(signed, age_ms=age_ms))
