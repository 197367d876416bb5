"""A service: the one list of networks that peers who pin its governors host. Pure.

A service is its name, its governors and how many of them have to sign (m of n);
its id is the hash of just that, so that who pins an id pins the keys. Governors
never change: no signature can make others trusted in place of those that a
volunteer chose. Other governors are another service, which volunteers pin anew.

The highest version that m of them signed counts. It lies in the DHT as the body of
a record that anybody may put there: what is inside is checked, not who brought it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from p2pnet import keys
from p2pnet.dht.canonical import parse_canonical
from p2pnet.dht.manifest import NAME_CHARS_MAX, check_name, check_network_id
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.v1 import common_pb2, records_pb2

# All of it at its most takes 14 KiB, which fits a DHT record's body (16 KiB).
GOVERNORS_MAX = 16
NETWORKS_MAX = 256
OWNERS_MAX = 64
PAYLOAD_BYTES_MAX = 14 << 10
SIGNED_BYTES_MAX = 16 << 10
VERSION_MAX = (1 << 63) - 1
_KEY_BYTES = 32

Entry = TypeVar("Entry", str, bytes)

Serves = Callable[[str, bytes], str]
"""(network id, its owner's public key) -> "", or the sentence of a refusal (NOT_IN_SERVICE)."""


def anything(network_id: str, owner: bytes) -> str:
    """What an open peer serves."""
    return ""


@dataclass(frozen=True, slots=True)
class Service:
    """A manifest that holds. `networks` are ids, `owners` and `governors` public keys, sorted."""

    service_id: str
    name: str
    version: int
    threshold: int
    governors: tuple[bytes, ...]
    networks: tuple[str, ...]
    owners: tuple[bytes, ...]
    payload: bytes
    signers: tuple[bytes, ...]

    def lists(self, network_id: str, owner: bytes) -> bool:
        """Whether a network is one of this service's."""
        return network_id in self.networks or owner in self.owners


def service_id_of(name: str, threshold: int, governors: Iterable[bytes]) -> str:
    """16 bytes of a SHA-256 over what never changes of a service, as hex; any order will do."""
    fixed = records_pb2.ServiceManifest(
        name=name, threshold=threshold, governors=sorted(governors)
    ).SerializeToString(deterministic=True)
    return keys.sha256(keys.SERVICE + b"\0" + fixed)[:16].hex()


def make_payload(
    name: str,
    threshold: int,
    governors: Sequence[bytes],
    *,
    version: int,
    networks: Sequence[str] = (),
    owners: Sequence[bytes] = (),
    issued_at_ms: int = 0,
) -> bytes:
    """What governors sign; raises MalformedError as `check_manifest`."""
    manifest = records_pb2.ServiceManifest(
        name=name,
        version=version,
        threshold=threshold,
        governors=sorted(governors),
        networks=sorted(networks),
        owners=sorted(owners),
        issued_at_ms=issued_at_ms,
    )
    check_manifest(manifest)
    return manifest.SerializeToString(deterministic=True)


def sign(payload: bytes, keypair: keys.KeyPair) -> records_pb2.Signature:
    """A governor's signature."""
    signed = keypair.sign(keys.SERVICE, payload)
    return records_pb2.Signature(public_key=signed.public_key, signature=signed.signature)


def check_manifest(manifest: records_pb2.ServiceManifest) -> None:
    """Raises MalformedError for a manifest with a field out of bounds; says which."""
    check_name("service", manifest.name, NAME_CHARS_MAX)
    if not 1 <= manifest.version <= VERSION_MAX:
        raise MalformedError("a service's version is a number from 1 on")
    _check_list("governors", manifest.governors, GOVERNORS_MAX)
    _check_list("networks", manifest.networks, NETWORKS_MAX)
    _check_list("owners", manifest.owners, OWNERS_MAX)
    for key in (*manifest.governors, *manifest.owners):
        if len(key) != _KEY_BYTES:
            raise MalformedError("a service that names a key which is no Ed25519 key")
    for network_id in manifest.networks:
        check_network_id(network_id)
    if not 1 <= manifest.threshold <= len(manifest.governors):
        raise MalformedError(
            f"a service of which {manifest.threshold} governors have to sign, and it has "
            f"{len(manifest.governors)}"
        )


def _check_list(what: str, entries: Sequence[Entry], count_max: int) -> None:
    if len(entries) > count_max:
        raise MalformedError(f"a service has at most {count_max} {what}, not {len(entries)}")
    if list(entries) != sorted(set(entries)):
        raise MalformedError(f"a service whose {what} are not sorted, or one of them twice")


def open_draft(signed: records_pb2.SignedService) -> Service:
    """A manifest that too few may have signed; the signatures that are there hold.

    Raises:
        ForgedError: a signature that does not hold, or is no governor's.
        MalformedError: not a manifest, or with a field out of bounds.
    """
    manifest = parse_canonical(records_pb2.ServiceManifest, signed.payload, PAYLOAD_BYTES_MAX)
    check_manifest(manifest)
    governors = tuple(manifest.governors)
    signers = tuple(signature.public_key for signature in signed.signatures)
    if len(signers) > len(governors):
        raise MalformedError("a service with more signatures than governors")
    if list(signers) != sorted(set(signers)):
        raise MalformedError("a service whose signatures are not sorted, or two of one governor")
    for signature in signed.signatures:
        if signature.public_key not in governors:
            raise ForgedError("a service that another than its governors signed")
        _check_signature(signed.payload, signature)
    return Service(
        service_id=service_id_of(manifest.name, manifest.threshold, governors),
        name=manifest.name,
        version=manifest.version,
        threshold=manifest.threshold,
        governors=governors,
        networks=tuple(manifest.networks),
        owners=tuple(manifest.owners),
        payload=signed.payload,
        signers=signers,
    )


def _check_signature(payload: bytes, signature: records_pb2.Signature) -> None:
    signed = common_pb2.Signed(
        payload=payload, public_key=signature.public_key, signature=signature.signature
    )
    try:
        keys.verify(keys.SERVICE, signed)
    except ForgedError:
        raise ForgedError(
            f"what {keys.peer_id_of(signature.public_key)} signed is not this list: whoever "
            "changed it has to have it signed again"
        ) from None


def open_service(signed: records_pb2.SignedService) -> Service:
    """A manifest that as many governors signed as have to.

    Raises:
        ForgedError: too few did; otherwise as `open_draft`.
        MalformedError: as `open_draft`.
    """
    service = open_draft(signed)
    if len(service.signers) < service.threshold:
        raise ForgedError(missing(service))
    return service


def parse_signed(data: bytes) -> records_pb2.SignedService:
    """A SignedService from its canonical bytes; raises MalformedError."""
    return parse_canonical(records_pb2.SignedService, data, SIGNED_BYTES_MAX)


def missing(service: Service) -> str:
    """How many signatures a manifest lacks."""
    return (
        f"{service.threshold} of the {len(service.governors)} governors of {service.name} have to "
        f"sign, and {len(service.signers)} did"
    )


# Which manifest counts


class Verdict(StrEnum):
    """What became of a manifest that was offered."""

    NEW = "new"
    SAME = "same"
    OLDER = "older"
    TWIN = (
        "twin"  # another list under the version that we have: the governors contradict themselves
    )
    FOREIGN = "foreign"  # of another service than the one pinned


class Newest:
    """The newest manifest of one service that a peer has met. It never goes back.

    Of two lists of one version the one met first stays: which of them is meant, only
    the governors can say, with a higher version.
    """

    def __init__(self, service_id: str) -> None:
        self.service_id = service_id
        self.service: Service | None = None
        self.signed: records_pb2.SignedService | None = None

    def take(self, signed: records_pb2.SignedService) -> Verdict:
        """Raises ForgedError, MalformedError as `open_service`."""
        service = open_service(signed)
        if service.service_id != self.service_id:
            return Verdict.FOREIGN
        known = self.service
        if known is not None and service.version <= known.version:
            if service.version < known.version:
                return Verdict.OLDER
            return Verdict.SAME if service.payload == known.payload else Verdict.TWIN
        self.service = service
        self.signed = records_pb2.SignedService()
        self.signed.CopyFrom(signed)
        return Verdict.NEW

    def serves(self, network_id: str, owner: bytes) -> str:
        """As `Serves`, for a peer that pins this service."""
        service = self.service
        if service is None:
            return (
                f"this peer serves only the service {self.service_id}, whose manifest it has not "
                "found yet: until then it takes no network"
            )
        if service.lists(network_id, owner):
            return ""
        return (
            f"this peer serves only the service {service.name} ({self.service_id}), whose version "
            f"{service.version} does not list the network {network_id}: ask its governors, or "
            "peers that are open"
        )
