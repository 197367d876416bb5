"""What goes into a host's `Tenancy` and what comes out of it. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pnet.core import Tick
from p2pnet.log.entry import parse_entry
from p2pnet.v1 import common_pb2, pnode_pb2
from p2pnet.vnode.admission import Offer

# Events. `ask` is a number that the `Reply` repeats; `caller` the peer id that its channel proved.


@dataclass(frozen=True, slots=True)
class AllocateAsked:
    """Somebody asks to have VNodes hosted. `wall_ms`: the wall clock."""

    ask: int
    caller: str
    request: pnode_pb2.AllocateRequest
    wall_ms: int


@dataclass(frozen=True, slots=True)
class ReadyAsked:
    """Somebody asks this host to get ready for VNodes that it may be given."""

    ask: int
    caller: str
    request: pnode_pb2.ReadyRequest
    wall_ms: int


@dataclass(frozen=True, slots=True)
class HeartbeatCame:
    """Somebody renews a lease."""

    ask: int
    caller: str
    request: pnode_pb2.HeartbeatRequest


@dataclass(frozen=True, slots=True)
class DropAsked:
    """Somebody says that VNodes are not to be hosted any more."""

    ask: int
    caller: str
    request: pnode_pb2.DropRequest


@dataclass(frozen=True, slots=True)
class ClaimShown:
    """Somebody says that he orchestrates a network: answered without a refusal if he does."""

    ask: int
    caller: str
    network_id: str
    claim: common_pb2.Signed


@dataclass(frozen=True, slots=True)
class LogRead:
    """The decided entries that a `ReadLog` asked for; perhaps none.

    A long log comes in parts, since each entry costs a signature to check; `more`: the
    next part follows.
    """

    network_id: str
    entries: tuple[common_pb2.Signed, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class LogSilent:
    """The log could not be read."""

    network_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class NotPersisted:
    """The disk did not take a `Persist`, or VNodes could not be begun: they are given up."""

    network_id: str


@dataclass(frozen=True, slots=True)
class Drain:
    """This host is about to leave: it takes nothing new."""


Event = (
    AllocateAsked | ReadyAsked | HeartbeatCame | DropAsked | ClaimShown | LogRead | LogSilent
    | NotPersisted | Drain | Tick
)  # fmt: skip


# Effects, to be carried out in order.


@dataclass(frozen=True, slots=True)
class ReadLog:
    """Read a network's log from a slot on: `LogRead` or `LogSilent`. One at a time a network.

    `keepers` are those of that slot; nobody for a log that is not on peers. `claim`: an
    entry that may be so new that keepers have not heard yet that it is decided; what
    they are to be given a moment for.
    """

    network_id: str
    manifest: common_pb2.Signed
    from_slot: int
    keepers: tuple[str, ...]
    claim: common_pb2.Signed | None = None

    @property
    def at_least(self) -> int:
        """The slot of that claim; 0: whatever there is."""
        return 0 if self.claim is None else int(parse_entry(self.claim).slot)


@dataclass(frozen=True, slots=True)
class Persist:
    """Keep `data` under the network's id instead of what was there, and sync it; None: nothing."""

    network_id: str
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A network that has VNodes here, under one claim."""

    network_id: str
    name: str
    manifest: common_pb2.Signed
    epoch: int
    claimant: str  # peer id
    sizes: Mapping[str, int]  # VNode -> bytes of memory, with the largest batch
    state_url: str  # where its states live, as its owner says; empty: on peers
    following: Mapping[str, int] = field(default_factory=dict)  # the same, of what is followed
    replicas: int = 1  # above 1: a newer claim may go on from what is in memory

    @property
    def size_bytes(self) -> int:
        """What its VNodes, followed ones included, are admitted for together."""
        return sum(self.sizes.values()) + sum(self.following.values())

    def has(self, vnode: str) -> bool:
        """Whether the VNode lives here, or is followed here."""
        return vnode in self.sizes or vnode in self.following


@dataclass(frozen=True, slots=True)
class Begin:
    """Run the tenant's VNodes, as the request says, instead of what was here of its network.

    `live`: go on in memory from the request's `live_step`, with the request's `norms`. All
    that is asked for was here or was followed here until now, under the claim before.
    """

    tenant: Tenant
    offer: Offer
    request: pnode_pb2.AllocateRequest
    live: bool = False


@dataclass(frozen=True, slots=True)
class End:
    """Run these VNodes, or follow them, no longer.

    `keep`: there is a newer claim, which may go on from their states in memory. They stay
    until a `Begin`, or until an `End` without it.
    """

    network_id: str
    vnodes: tuple[str, ...]
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a call."""

    ask: int
    refusal: common_pb2.Refusal | None = None


Effect = ReadLog | Persist | Begin | End | Reply
