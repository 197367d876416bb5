"""Authors of signed records, and what may be said of them by who sees everything. Pure."""

from __future__ import annotations

from functools import lru_cache

from p2pnet import keys
from p2pnet.dht.keyspace import name_key
from p2pnet.dht.manifest import network_id_of
from p2pnet.dht.records import NETWORK, OpenRecord, make_record
from p2pnet.keys import KeyPair
from p2pnet.sim.machine import Machine
from p2pnet.v1 import common_pb2, records_pb2


@lru_cache(maxsize=4096)
def _manifest(seed: bytes, name: str) -> common_pb2.Signed:
    owner = KeyPair.from_seed(seed)
    manifest = records_pb2.Manifest(
        owner=owner.public_key, name=name, spec_digest=bytes(32), any_orchestrator=True
    )
    return owner.sign(keys.MANIFEST, manifest.SerializeToString(deterministic=True))


def network_record(
    author: Machine, name: str, *, epoch: int, sequence: int = 1, ttl_s: int = 60
) -> common_pb2.Signed:
    """A machine's record that it runs a network of its own of that name, dated by its clock."""
    manifest = _manifest(author.key.seed, name)
    body = records_pb2.NetworkRecord(
        network_id=network_id_of(manifest),
        name=name,
        manifest=manifest,
        epoch=epoch,
        orchestrator=author.peer_id,
        vnodes=["fc1"],
        state_url="peers:",
    )
    return make_record(
        author.key,
        name_key(name),
        NETWORK,
        epoch=epoch,
        sequence=sequence,
        ttl_s=ttl_s,
        issued_at_ms=author.wall_ms,
        body=body.SerializeToString(deterministic=True),
    )


class Ledger:
    """Every record that was ever signed, by author and key: the truth to judge reads by."""

    def __init__(self) -> None:
        self._signed: dict[bytes, float] = {}  # by payload: when
        self._latest: dict[tuple[bytes, str], list[tuple[float, OpenRecord]]] = {}

    def signed(self, record: OpenRecord, now: float) -> None:
        """An author has signed one."""
        self._signed[record.signed.payload] = now
        self._latest.setdefault((record.key, record.author), []).append((now, record))

    def latest(self, key: bytes, author: str, before: float) -> OpenRecord | None:
        """The newest that was signed up to a time."""
        issued = self._latest.get((key, author), [])
        known = [record for at, record in issued if at <= before]
        return max(known, key=lambda record: record.rank, default=None)

    def issued(self, key: bytes) -> list[OpenRecord]:
        """Everything that was signed under a key."""
        return [r for (of, _), each in self._latest.items() if of == key for _, r in each]

    def authors(self, key: bytes) -> list[str]:
        """Who has signed something under a key."""
        return [author for of, author in self._latest if of == key]

    def signed_at(self, record: OpenRecord) -> float | None:
        """When it was signed; None: never, so that it is forged."""
        return self._signed.get(record.signed.payload)
