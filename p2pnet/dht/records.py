"""Signed records: making, checking and merging them. Pure.

A record is one author's statement under one key. Which of two is newer is
decided by (epoch, sequence) alone; `issued_at_ms` only bounds how long an old
one can be replayed to a peer that has never met a newer one (DESIGN D5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from p2pnet import keys
from p2pnet.dht.canonical import parse_canonical
from p2pnet.dht.keyspace import name_key, network_key, service_key, vnode_key
from p2pnet.dht.manifest import (
    MANIFEST_BYTES_MAX,
    NAME_CHARS_MAX,
    check_name,
    grants,
    network_id_of,
    open_manifest,
)
from p2pnet.dht.service import open_service, parse_signed
from p2pnet.errors import ForgedError, MalformedError, RemoteError
from p2pnet.v1 import common_pb2, records_pb2

BODY_BYTES_MAX = 16 << 10
PAYLOAD_BYTES_MAX = BODY_BYTES_MAX + 256
SET_BYTES_MAX = 256 << 10
AUTHORS_MAX = 32  # under one key
TTL_S_MAX = 24 * 3600
REPLAY_MS = 2 * 3600 * 1000  # how wrong people's wall clocks may be
VNODE_CHARS_MAX = 128
_ADDRS_MAX = 16
_TEXT_CHARS_MAX = 512
_KEEPERS_MAX = 32
_STANDBYS_MAX = 2
_SET_VERSION = 1
_COUNTER_MAX = (1 << 63) - 1

NETWORK = records_pb2.RECORD_KIND_NETWORK
ALLOCATION = records_pb2.RECORD_KIND_ALLOCATION
SERVICE = records_pb2.RECORD_KIND_SERVICE

Content = records_pb2.Allocation | records_pb2.NetworkRecord | records_pb2.SignedService


@dataclass(frozen=True, slots=True)
class OpenRecord:
    """A record that was checked. `content` is its body, parsed; `age_s` what it has had."""

    key: bytes
    author: str  # peer id
    kind: int
    epoch: int
    sequence: int
    ttl_s: int
    issued_at_ms: int
    body: bytes
    content: Content
    signed: common_pb2.Signed
    age_s: float = 0.0

    @property
    def rank(self) -> tuple[int, int, bytes]:
        """The greater, the newer; the payload only settles an author's contradicting itself."""
        return (self.epoch, self.sequence, self.signed.payload)

    @property
    def subject(self) -> str | None:
        """What a higher epoch under the same key outdoes, whoever its author is; None: nothing.

        Under a VNode's key and a network's there is but one network; under a name any
        number, by their ids. Services have no claims.
        """
        if isinstance(self.content, records_pb2.NetworkRecord):
            network_id = self.content.network_id
            return "" if self.key == network_key(network_id) else str(network_id)
        return "" if isinstance(self.content, records_pb2.Allocation) else None

    @property
    def expires_in_s(self) -> float:
        """What is left of its life; below zero: nothing."""
        return self.ttl_s - self.age_s

    @property
    def size_bytes(self) -> int:
        """What it takes in a store or a message, about."""
        return len(self.signed.payload) + 128


def make_record(
    keypair: keys.KeyPair,
    key: bytes,
    kind: int,
    *,
    epoch: int,
    sequence: int,
    ttl_s: int,
    issued_at_ms: int,
    body: bytes,
) -> common_pb2.Signed:
    """A signed record. Raises ValueError for what every holder would refuse."""
    if len(body) > BODY_BYTES_MAX:
        raise ValueError(f"a record's body has at most {BODY_BYTES_MAX} bytes, not {len(body)}")
    if not 1 <= ttl_s <= TTL_S_MAX:
        raise ValueError(f"a record lives from 1 to {TTL_S_MAX} s, not {ttl_s}")
    record = records_pb2.Record(
        key=key,
        kind=records_pb2.RecordKind.Name(kind),
        epoch=epoch,
        sequence=sequence,
        ttl_s=ttl_s,
        issued_at_ms=issued_at_ms,
        body=body,
    )
    return keypair.sign(keys.RECORD, record.SerializeToString(deterministic=True))


def next_sequence(last: int, wall_ms: int) -> int:
    """A sequence above the last, and above what this author used before a restart."""
    return max(last + 1, wall_ms)


def open_record(signed: common_pb2.Signed, key: bytes, wall_ms: int) -> OpenRecord:
    """Checks a record that was found under `key`, at that wall-clock time.

    Raises:
        ForgedError: a signature, a grant or a key that does not hold, or a replay.
        MalformedError: not a record, or with a field out of bounds.
    """
    record = parse_canonical(records_pb2.Record, signed.payload, PAYLOAD_BYTES_MAX)
    if not 1 <= record.ttl_s <= TTL_S_MAX:
        raise MalformedError(f"a record with a life of {record.ttl_s} s")
    if len(record.body) > BODY_BYTES_MAX:
        raise MalformedError(f"a record with a body of {len(record.body)} bytes")
    if max(record.epoch, record.sequence) > _COUNTER_MAX:
        raise MalformedError("a record with an epoch or a sequence beyond 63 bits")
    author = keys.verify(keys.RECORD, signed)
    if record.key != key:
        raise ForgedError("a record under another key than its author put it under")
    age_ms = wall_ms - record.issued_at_ms
    if not -REPLAY_MS <= age_ms <= record.ttl_s * 1000 + REPLAY_MS:
        raise ForgedError("a record from long ago or from the future")
    if record.kind == ALLOCATION:
        content: Content = _open_allocation(record, author)
    elif record.kind == NETWORK:
        content = _open_network(record, author)
    elif record.kind == SERVICE:
        content = _open_service(record)
    else:
        raise MalformedError(f"a record of the unknown kind {record.kind}")
    return OpenRecord(
        key=key,
        author=author,
        kind=record.kind,
        epoch=record.epoch,
        sequence=record.sequence,
        ttl_s=record.ttl_s,
        issued_at_ms=record.issued_at_ms,
        body=record.body,
        content=content,
        signed=_bare(signed),
    )


def _open_allocation(record: records_pb2.Record, author: str) -> records_pb2.Allocation:
    """The host's own word that it runs the VNode for the author under this epoch."""
    accepted = parse_canonical(common_pb2.Signed, record.body, BODY_BYTES_MAX)
    allocation = parse_canonical(records_pb2.Allocation, accepted.payload, BODY_BYTES_MAX)
    host = keys.verify(keys.ACCEPTANCE, accepted)
    check_name("VNode", allocation.vnode, VNODE_CHARS_MAX)
    _check_texts("addresses", allocation.addrs, _ADDRS_MAX)
    _check_texts("standbys", allocation.standbys, _STANDBYS_MAX)
    if allocation.host in allocation.standbys:
        raise MalformedError("an allocation whose host is its own standby")
    if len(allocation.role) > NAME_CHARS_MAX:
        raise MalformedError("an allocation with too long a role")
    if not 1 <= allocation.lease_s <= TTL_S_MAX:
        raise MalformedError(f"an allocation with a lease of {allocation.lease_s} s")
    if allocation.host != host:
        raise ForgedError("an allocation that another than its host accepted")
    if allocation.claimant != author:
        raise ForgedError("an allocation that another than its claimant put")
    if allocation.epoch != record.epoch:
        raise ForgedError("an allocation under another epoch than its record's")
    if record.key != vnode_key(allocation.network_id, allocation.vnode):
        raise ForgedError("an allocation under another VNode's key")
    _check_manifest(allocation.manifest, allocation.network_id, author, record.epoch)
    return allocation


def _open_network(record: records_pb2.Record, author: str) -> records_pb2.NetworkRecord:
    """An orchestrator's word that it runs the network under this epoch."""
    network = parse_canonical(records_pb2.NetworkRecord, record.body, BODY_BYTES_MAX)
    check_name("network", network.name)
    for vnode in network.vnodes:
        check_name("VNode", vnode, VNODE_CHARS_MAX)
    _check_texts("state URLs", [network.state_url], 1)
    _check_texts("keepers", network.keepers, _KEEPERS_MAX)
    if network.orchestrator != author:
        raise ForgedError("a network's record that another than its orchestrator put")
    if network.epoch != record.epoch:
        raise ForgedError("a network's body under another epoch than its record's")
    if record.key not in (name_key(network.name), network_key(network.network_id)):
        raise ForgedError("a network's record under neither its name's nor its id's key")
    manifest = _check_manifest(network.manifest, network.network_id, author, record.epoch)
    if manifest.name != network.name:
        raise ForgedError("a network's record under another name than its owner gave it")
    return network


def _open_service(record: records_pb2.Record) -> records_pb2.SignedService:
    """What a service's governors signed; whoever puts it there adds nothing to that."""
    signed = parse_signed(record.body)
    service = open_service(signed)
    if record.key != service_key(service.service_id):
        raise ForgedError("a service's record under another key than its own")
    if record.epoch != service.version:  # so that of 32 authors those of the newest are kept
        raise ForgedError("a service under another epoch than its version")
    return signed


def _check_manifest(
    signed: common_pb2.Signed, network_id: str, claimant: str, epoch: int
) -> records_pb2.Manifest:
    if len(signed.payload) > MANIFEST_BYTES_MAX or network_id_of(signed) != network_id:
        raise ForgedError("a record whose manifest is not that of its network")
    manifest = open_manifest(signed)
    if not grants(manifest, claimant):
        raise ForgedError(f"the network's owner grants {keys.short(claimant)} nothing")
    if 0 < manifest.limits.claims_max < epoch:  # each claim is one epoch further
        raise ForgedError(f"the network's owner allows {manifest.limits.claims_max} claims")
    return manifest


def _check_texts(what: str, texts: Iterable[str], count_max: int) -> None:
    lengths = [len(text) for text in texts]
    if len(lengths) > count_max or max(lengths, default=0) > _TEXT_CHARS_MAX:
        raise MalformedError(f"a record with too many or too long {what}")


def merge(records: Iterable[OpenRecord]) -> list[OpenRecord]:
    """The newest of each author, newest first, at most AUTHORS_MAX; none of an epoch that is over.

    Of one and the same record the greater age counts: copies only grow older.
    Commutative, associative and idempotent, so that the order in which holders
    answer decides nothing.
    """
    newest: dict[str, OpenRecord] = {}
    for record in records:
        known = newest.get(record.author)
        if known is None or (known.rank, known.age_s) < (record.rank, record.age_s):
            newest[record.author] = record
    in_order = sorted(newest.values(), key=lambda r: (r.epoch, r.sequence, r.author), reverse=True)
    return in_date(in_order)[:AUTHORS_MAX]


def in_date(records: Iterable[OpenRecord]) -> list[OpenRecord]:
    """Of records under one key those of the newest epoch of their subject (DESIGN D6)."""
    all_of = list(records)
    highest: dict[str, int] = {}
    for record in all_of:
        if record.subject is not None:
            highest[record.subject] = max(record.epoch, highest.get(record.subject, 0))
    return [r for r in all_of if r.subject is None or r.epoch == highest[r.subject]]


def serialise_set(records: Iterable[OpenRecord]) -> bytes:
    """A RecordSet of the newest records that fit SET_BYTES_MAX."""
    out = records_pb2.RecordSet(version=_SET_VERSION)
    size_bytes = 0
    for record in merge(records):
        size_bytes += record.size_bytes
        if size_bytes > SET_BYTES_MAX - 64:
            break
        out.records.add(record=record.signed, age_ms=max(0, math.ceil(record.age_s * 1000)))
    return out.SerializeToString()


def parse_set(data: bytes) -> list[tuple[common_pb2.Signed, float]]:
    """The records of a RecordSet, unchecked, each with its age in seconds.

    Raises:
        MalformedError: not a RecordSet, too long, or of another version.
    """
    if len(data) > SET_BYTES_MAX:
        raise MalformedError(f"a record set of {len(data)} bytes, over {SET_BYTES_MAX}")
    try:
        parsed = records_pb2.RecordSet.FromString(data)
    except DecodeError:
        raise MalformedError("not a record set") from None
    if parsed.version != _SET_VERSION:
        raise MalformedError(f"a record set of the unknown version {parsed.version}")
    if len(parsed.records) > AUTHORS_MAX:
        raise MalformedError(f"a record set with over {AUTHORS_MAX} records")
    return [(_bare(held.record), held.age_ms / 1000) for held in parsed.records]


def open_set(data: bytes, key: bytes, wall_ms: int) -> tuple[list[OpenRecord], int]:
    """The records of a set that hold and live, and how many did not.

    Raises:
        MalformedError: not a RecordSet at all.
    """
    good: list[OpenRecord] = []
    parsed = parse_set(data)
    for signed, age_s in parsed:
        try:
            record = replace(open_record(signed, key, wall_ms), age_s=age_s)
        except RemoteError:
            continue
        if record.expires_in_s > 0:
            good.append(record)
    return merge(good), len(parsed) - len(good)


def _bare(signed: common_pb2.Signed) -> common_pb2.Signed:
    """Without the unknown fields that a peer may have hung on it."""
    return common_pb2.Signed(
        payload=signed.payload, public_key=signed.public_key, signature=signed.signature
    )
