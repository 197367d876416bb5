"""Manifests, allocations and records for the DHT's tests."""

from __future__ import annotations

from p2pnet import keys
from p2pnet.dht.keyspace import name_key, vnode_key
from p2pnet.dht.manifest import network_id_of
from p2pnet.dht.records import ALLOCATION, NETWORK, make_record
from p2pnet.keys import KeyPair
from p2pnet.v1 import common_pb2, records_pb2

WALL_MS = 1_800_000_000_000


def keypair(number: int) -> KeyPair:
    """A key pair by number."""
    return KeyPair.from_seed(keys.sha256(b"test key %d" % number))


OWNER, CLAIMANT, HOST, STRANGER = (keypair(-n) for n in range(1, 5))


def manifest(*orchestrators: str, owner: KeyPair = OWNER, **fields: object) -> common_pb2.Signed:
    """Granted to `orchestrators`, or to anybody where there are none."""
    payload = records_pb2.Manifest(
        owner=owner.public_key,
        name="digits",
        spec_digest=bytes(32),
        any_orchestrator=not orchestrators,
        orchestrators=orchestrators,
    )
    for name, value in fields.items():
        setattr(payload, name, value)
    return owner.sign(keys.MANIFEST, payload.SerializeToString(deterministic=True))


def allocation(
    grant: common_pb2.Signed, *, claimant: KeyPair = CLAIMANT, epoch: int = 1, **fields: object
) -> records_pb2.Allocation:
    """VNode fc1 on HOST."""
    out = records_pb2.Allocation(
        network_id=network_id_of(grant),
        vnode="fc1",
        host=HOST.peer_id,
        addrs=["/ip4/127.0.0.1/tcp/4001"],
        epoch=epoch,
        claimant=claimant.peer_id,
        role="primary",
        lease_s=30,
        manifest=grant,
    )
    for name, value in fields.items():
        setattr(out, name, value)
    return out


def accepted(body: records_pb2.Allocation, by: KeyPair = HOST) -> bytes:
    """The host's countersignature, as a record's body."""
    signed = by.sign(keys.ACCEPTANCE, body.SerializeToString(deterministic=True))
    return signed.SerializeToString(deterministic=True)


def allocation_record(
    *,
    claimant: KeyPair = CLAIMANT,
    epoch: int = 1,
    sequence: int = 1,
    ttl_s: int = 60,
    vnode: str = "fc1",
    grant: common_pb2.Signed | None = None,
) -> common_pb2.Signed:
    """A good record."""
    grant = grant or manifest()
    body = allocation(grant, claimant=claimant, epoch=epoch, vnode=vnode)
    return make_record(
        claimant,
        vnode_key(body.network_id, vnode),
        ALLOCATION,
        epoch=epoch,
        sequence=sequence,
        ttl_s=ttl_s,
        issued_at_ms=WALL_MS,
        body=accepted(body),
    )


def network_record(
    grant: common_pb2.Signed,
    *,
    key: bytes | None = None,
    author: KeyPair = CLAIMANT,
    **fields: object,
) -> common_pb2.Signed:
    """A good record of network "digits", but for `fields` of its body."""
    body = records_pb2.NetworkRecord(
        network_id=network_id_of(grant),
        name="digits",
        manifest=grant,
        epoch=1,
        orchestrator=CLAIMANT.peer_id,
        vnodes=["fc1", "act1"],
        state_url="peers:",
    )
    for name, value in fields.items():
        setattr(body, name, value)
    return make_record(
        author,
        key or name_key("digits"),
        NETWORK,
        epoch=1,
        sequence=1,
        ttl_s=60,
        issued_at_ms=WALL_MS,
        body=body.SerializeToString(deterministic=True),
    )


VNODE_KEY = vnode_key(network_id_of(manifest()), "fc1")
