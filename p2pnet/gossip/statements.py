"""The two signed statements of membership: an advert (of oneself), an accusation (of another).

Pure. What is opened here is verified and within bounds; nothing else of this
package looks inside a `Signed`. A statement is kept as its own bytes: a `Signed`
read out of a message keeps the whole message in memory for as long as it lives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from google.protobuf.message import DecodeError, Message

from p2pnet import keys
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.gossip.capabilities import (
    Capabilities,
    check_text,
    read_capabilities,
    write_capabilities,
)
from p2pnet.gossip.coordinates import Coordinate, read_coordinate, write_coordinate
from p2pnet.v1 import common_pb2, gossip_pb2

ADDRS_MAX = 16
TARGETS_MAX = 8
ADDR_CHARS_MAX = 256
CERTIFICATE_BYTES_MAX = 4 << 10
ADVERT_BYTES_MAX = 8 << 10
AGENT_CHARS_MAX = 64
ACCUSATION_BYTES_MAX = 256
INCARNATION_MAX = 1 << 62
_SIGNATURE_BYTES = 120  # around a payload: key, signature, tags and lengths


@dataclass(frozen=True, slots=True)
class Versions:
    """The protocol versions that a peer speaks, both ends included."""

    min: int = 1
    max: int = 1

    def overlaps(self, other: Versions) -> bool:
        """True if there is a version that both speak."""
        return self.min <= other.max and other.min <= self.max

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min} to {self.max}"


@dataclass(frozen=True, slots=True)
class Contents:
    """What an advert says besides its author and its order."""

    grpc_targets: tuple[str, ...]
    grpc_certificate: bytes
    capabilities: Capabilities
    versions: Versions
    agent: str
    coordinate: Coordinate | None


@dataclass(frozen=True, slots=True)
class OpenAdvert:
    """What a peer says of itself, verified. `raw` is what to hand on.

    What is seldom asked for is read out of `raw` when it is: a node may hold
    100,000 of these.
    """

    peer_id: str
    incarnation: int
    sequence: int
    left: bool
    addrs: tuple[str, ...]
    raw: bytes = field(repr=False)  # a `Signed`, in its only form

    @property
    def order(self) -> tuple[int, bool, int]:
        """Of two adverts of a peer the one with the higher order counts.

        Leaving ends an incarnation: only a new one brings a peer back.
        """
        return self.incarnation, self.left, self.sequence

    @property
    def signed(self) -> common_pb2.Signed:
        """The statement itself."""
        return common_pb2.Signed.FromString(self.raw)

    @property
    def grpc_targets(self) -> tuple[str, ...]:
        """Where it serves gRPC: "host:port"."""
        return _contents(self.raw).grpc_targets

    @property
    def grpc_certificate(self) -> bytes:
        """Its certificate, DER."""
        return _contents(self.raw).grpc_certificate

    @property
    def capabilities(self) -> Capabilities:
        """What it lends."""
        return _contents(self.raw).capabilities

    @property
    def versions(self) -> Versions:
        """The protocol versions that it speaks."""
        return _contents(self.raw).versions

    @property
    def agent(self) -> str:
        """What software it says that it is."""
        return _contents(self.raw).agent

    @property
    def coordinate(self) -> Coordinate | None:
        """Where it was when it said so; None: it did not say."""
        return _contents(self.raw).coordinate


@dataclass(frozen=True, slots=True)
class OpenAccusation:
    """What an observer says of another peer, verified. `raw` is what to hand on."""

    accuser: str
    subject: str
    incarnation: int
    failed: bool
    raw: bytes = field(repr=False)

    @property
    def signed(self) -> common_pb2.Signed:
        """The statement itself."""
        return common_pb2.Signed.FromString(self.raw)


def build_advert(
    keypair: keys.KeyPair,
    *,
    incarnation: int,
    sequence: int,
    left: bool = False,
    addrs: tuple[str, ...] = (),
    grpc_targets: tuple[str, ...] = (),
    grpc_certificate: bytes = b"",
    capabilities: Capabilities | None = None,
    versions: Versions | None = None,
    agent: str = "p2pnet",
    coordinate: Coordinate | None = None,
) -> OpenAdvert:
    """Signs an advert of ours; the addresses beyond the first 16 are left out.

    Raises:
        MalformedError: it would be refused by every other peer.
    """
    spoken = versions or Versions()
    advert = gossip_pb2.Advert(
        peer_id=keypair.peer_id,
        incarnation=incarnation,
        sequence=sequence,
        presence=gossip_pb2.PRESENCE_LEFT if left else gossip_pb2.PRESENCE_HERE,
        addrs=addrs[:ADDRS_MAX],
        grpc_targets=grpc_targets[:TARGETS_MAX],
        grpc_certificate=grpc_certificate,
        capabilities=write_capabilities(capabilities or Capabilities()),
        versions=common_pb2.VersionRange(min=spoken.min, max=spoken.max),
        agent=agent,
        coordinate=write_coordinate(coordinate) if coordinate else None,
    )
    return open_advert(keypair.sign(keys.ADVERT, advert.SerializeToString(deterministic=True)))


def open_advert(signed: common_pb2.Signed) -> OpenAdvert:
    """Verifies an advert.

    Raises:
        MalformedError: bytes or values that no honest peer sends.
        ForgedError: not signed by the peer that it is about.
    """
    return _open_advert(raw_of(signed))


def raw_of(signed: common_pb2.Signed) -> bytes:
    """A statement's bytes in their only form: nothing rides along unsigned."""
    return common_pb2.Signed(
        payload=signed.payload, public_key=signed.public_key, signature=signed.signature
    ).SerializeToString(deterministic=True)


# News come by several times, and what is kept is bounded: 1,024 of at most 8 KiB.
@lru_cache(maxsize=1024)
def _open_advert(raw: bytes) -> OpenAdvert:
    advert = gossip_pb2.Advert()
    author = _open(raw, keys.ADVERT, advert, ADVERT_BYTES_MAX)
    if advert.peer_id != author:
        raise ForgedError(f"{keys.short(author)} signed an advert in the name of another peer")
    if advert.presence not in (gossip_pb2.PRESENCE_HERE, gossip_pb2.PRESENCE_LEFT):
        raise MalformedError("an advert says neither that its peer is here nor that it left")
    if not 0 < advert.incarnation <= INCARNATION_MAX or advert.sequence > INCARNATION_MAX:
        raise MalformedError("an advert's incarnation or sequence is out of range")
    if len(advert.addrs) > ADDRS_MAX or len(advert.grpc_targets) > TARGETS_MAX:
        raise MalformedError("an advert has too many addresses")
    if len(advert.grpc_certificate) > CERTIFICATE_BYTES_MAX:
        raise MalformedError(f"a certificate of {len(advert.grpc_certificate)} bytes is too long")
    for text in (*advert.addrs, *advert.grpc_targets):
        check_text("address", text, ADDR_CHARS_MAX)
    check_text("agent", advert.agent, AGENT_CHARS_MAX)
    _read(advert)
    return OpenAdvert(
        peer_id=author,
        incarnation=advert.incarnation,
        sequence=advert.sequence,
        left=advert.presence == gossip_pb2.PRESENCE_LEFT,
        addrs=tuple(advert.addrs),
        raw=raw,
    )


@lru_cache(maxsize=1024)
def _contents(raw: bytes) -> Contents:
    return _read(gossip_pb2.Advert.FromString(common_pb2.Signed.FromString(raw).payload))


def _read(advert: gossip_pb2.Advert) -> Contents:
    return Contents(
        grpc_targets=tuple(advert.grpc_targets),
        grpc_certificate=advert.grpc_certificate,
        capabilities=read_capabilities(advert.capabilities),
        versions=read_versions(advert.versions),
        agent=advert.agent,
        coordinate=read_coordinate(advert.coordinate) if advert.HasField("coordinate") else None,
    )


def build_accusation(
    keypair: keys.KeyPair, subject: str, *, incarnation: int, failed: bool
) -> OpenAccusation:
    """Signs our accusation of `subject` as it is in this incarnation."""
    accusation = gossip_pb2.Accusation(
        accuser=keypair.peer_id, subject=subject, incarnation=incarnation, failed=failed
    )
    payload = accusation.SerializeToString(deterministic=True)
    return open_accusation(keypair.sign(keys.ACCUSATION, payload))


def open_accusation(signed: common_pb2.Signed) -> OpenAccusation:
    """Verifies an accusation; whether the accuser may make it is not looked at here.

    Raises:
        MalformedError: bytes or values that no honest peer sends.
        ForgedError: not signed by the accuser that it names.
    """
    return _open_accusation(raw_of(signed))


@lru_cache(maxsize=4096)
def _open_accusation(raw: bytes) -> OpenAccusation:
    accusation = gossip_pb2.Accusation()
    author = _open(raw, keys.ACCUSATION, accusation, ACCUSATION_BYTES_MAX)
    if accusation.accuser != author:
        raise ForgedError(f"{keys.short(author)} signed an accusation in another peer's name")
    if accusation.subject == author:
        raise MalformedError("a peer accuses itself")
    keys.public_key_of(accusation.subject)
    if not 0 < accusation.incarnation <= INCARNATION_MAX:
        raise MalformedError("an accusation's incarnation is out of range")
    return OpenAccusation(
        author, accusation.subject, accusation.incarnation, accusation.failed, raw
    )


def read_versions(message: common_pb2.VersionRange) -> Versions:
    """Raises MalformedError: not a range."""
    if not 0 < message.min <= message.max:
        raise MalformedError(f"protocol versions {message.min} to {message.max} are no range")
    return Versions(message.min, message.max)


def _open(raw: bytes, domain: bytes, into: Message, bytes_max: int) -> str:
    if len(raw) > bytes_max + _SIGNATURE_BYTES:
        raise MalformedError(f"a statement of {len(raw)} bytes is too long")
    signed = common_pb2.Signed.FromString(raw)
    author = keys.verify(domain, signed)
    try:
        into.ParseFromString(signed.payload)
    except DecodeError:
        raise MalformedError("a signed statement does not parse") from None
    # One statement, one sequence of bytes: equality of bytes is equality.
    if into.SerializeToString(deterministic=True) != signed.payload:
        raise MalformedError("a signed statement is not in its canonical form")
    return author
