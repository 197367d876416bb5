"""What goes into the membership core and what comes out of it (DESIGN D1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from p2pnet.core import Tick
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.statements import OpenAdvert


@dataclass(frozen=True, slots=True)
class GossipConfig:
    """Every number that membership turns on; durations in seconds."""

    observers: int = 6  # K: how many watch each member
    quorum: int = 3  # L: how many of them must agree, where there are as many
    probe_interval_s: float = 1.0
    probe_timeout_s: float = 1.0
    misses: int = 3  # in a row, before a silent member is suspected
    fast_failure_s: float = 0.5  # a probe that fails within this was refused, not unanswered
    fast_failures: int = 2  # in a row, before a member that refuses is accused of having failed
    fast_retry_s: float = 0.3
    suspicion_min_s: float = 2.0
    suspicion_max_s: float = 6.0
    # A member that others accuse, and that we have not found gone ourselves, has this
    # times log2 of the members to refute.
    refutation_s: float = 0.4
    # So long a connection that broke says that its peer may be gone; in a larger network
    # connections also break for want of room.
    broken_s: float = 30.0
    broken_members_max: int = 256
    local_health: bool = True  # doubt ourselves first; False only to measure what that is worth
    late_s: float = 0.5  # own ticks later than this lower the trust in ourselves
    stalled_s: float = 2.0  # later than this, what was missed meanwhile says nothing
    refute_interval_s: float = 0.5
    fanout: int = 4
    push_interval_s: float = 0.05  # news of a storm travel together
    sync_interval_s: float = 10.0
    sync_again_s: float = 0.5  # after one that showed new members; then twice as long each time
    request_timeout_s: float = 5.0
    digests_max: int = 512  # in one message; a summary of a larger ring takes several
    coordinate_s: float = 60.0  # our advert says where we are at most so often, and ...
    coordinate_member_s: float = 1.0  # ... not more often than so much times the members
    forget_s: float = 24 * 3600.0
    sweep_s: float = 60.0
    members_max: int = 100_000
    rumours_max: int = 4096
    pending_max: int = 128  # requests of ours under way, probes not counted
    statements_bytes_max: int = 64 << 10  # in one message
    piggyback_bytes_max: int = 16 << 10  # of them on a probe or an answer to one


class State(StrEnum):
    """How a member is, as far as this node knows."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    LEFT = "left"
    FAILED = "failed"

    @property
    def live(self) -> bool:
        """True for the members that watch and are watched."""
        return self in (State.ALIVE, State.SUSPECT)


@dataclass(frozen=True, slots=True)
class Member:
    """A member, its newest advert, and since when (by this node's clock) it is so."""

    peer_id: str
    state: State
    advert: OpenAdvert
    since: float


@dataclass(frozen=True, slots=True)
class Description:
    """What a node says of itself in its advert."""

    addrs: tuple[str, ...] = ()
    grpc_targets: tuple[str, ...] = ()
    grpc_certificate: bytes = b""
    capabilities: Capabilities = field(default_factory=Capabilities)


# Events


@dataclass(frozen=True, slots=True)
class Request:
    """A peer asks; answered by exactly one `Reply`, unless handling raises a RemoteError."""

    peer_id: str
    message: bytes


@dataclass(frozen=True, slots=True)
class Answered:
    """The reply to a `Send`."""

    rpc_id: int
    message: bytes


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A `Send` got no reply: refused, broken off or too late; the core measures how fast."""

    rpc_id: int


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """The first connection to a peer; `addr` is where it was seen, "" if unknown."""

    peer_id: str
    addr: str


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last connection to a peer went."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class SyncWith:
    """Exchange everything with this peer; its result follows as `Synced` or not at all."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class Describe:
    """We are different from now on; spreads at once if that is so."""

    description: Description


@dataclass(frozen=True, slots=True)
class Leave:
    """We go; `Departed` follows when those told have answered or cannot."""


Event = (
    Tick
    | Request
    | Answered
    | Unanswered
    | PeerConnected
    | PeerDisconnected
    | SyncWith
    | Describe
    | Leave
)

# Effects


@dataclass(frozen=True, slots=True)
class Send:
    """Ask a peer; feed back `Answered` or `Unanswered` with this `rpc_id`."""

    rpc_id: int
    peer_id: str
    addrs: tuple[str, ...]
    message: bytes
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the `Request` being handled."""

    message: bytes


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A member's state or advert changed; `old` is None for one met for the first time.

    `old == new` where only the advert did: a restart quicker than its detection
    shows as a higher incarnation.
    """

    peer_id: str
    old: State | None
    new: State
    advert: OpenAdvert


@dataclass(frozen=True, slots=True)
class Accused:
    """This node accuses a member: of being silent, or of having failed."""

    peer_id: str
    failed: bool


@dataclass(frozen=True, slots=True)
class PeerRefused:
    """We and this peer have no protocol version in common; `detail` is for people."""

    peer_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class Misbehaved:
    """A peer answered what no honest peer answers."""

    peer_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class Synced:
    """A peer told us everything it knows (or as much as fits a message)."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class Departed:
    """Our leaving is told."""


Effect = Send | Reply | MemberChanged | Accused | PeerRefused | Misbehaved | Synced | Departed
