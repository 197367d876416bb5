"""What goes into the core of an orchestrated network and what comes out of it. Plain data.

`Conductor` decides (`p2pnet.orchestrator.conductor`); who carries the effects out is a
shell, or the simulator. Every effect that asks for something is answered by exactly
one of the events that its docstring names; an answer that is late, or of an older
epoch, changes nothing. Times in seconds, peers by peer id, steps from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from p2pnet.core import Tick
from p2pnet.v1 import common_pb2, orchestrator_pb2, pnode_pb2


class Purpose(Enum):
    """What a plan is made for."""

    PLACE = auto()  # to be claimed at once
    MOVE = auto()  # away from a host that leaves, in good order
    IMPROVE = auto()  # because something much better may be there


# Events


@dataclass(frozen=True, slots=True)
class Begin:
    """Take the network: with its first claim, or over from another orchestrator.

    `epoch`: the last claim that the caller knows of. Where the log has a newer one of
    another orchestrator, the network is in good hands, and `Over` says so.
    """

    reason: str
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class LogRead:
    """The decided entries from the slot that was asked for on; perhaps none."""

    entries: tuple[common_pb2.Signed, ...]


@dataclass(frozen=True, slots=True)
class LogSilent:
    """The log could not be read."""

    reason: str


@dataclass(frozen=True, slots=True)
class Appended:
    """What was decided for the slot of an `Append`: that entry, or another's."""

    entry: common_pb2.Signed


@dataclass(frozen=True, slots=True)
class NotAppended:
    """No majority, or no store: the entry may or may not be decided by whoever tries next."""

    reason: str


@dataclass(frozen=True, slots=True)
class Planned:
    """Where every VNode may go: a host for each, or None and why not.

    `alive`: the living members, hosting or not, for the choice of keepers; `absent`:
    who of those that were to be probed did not answer; `standbys`: who is to follow a
    VNode; `live`: every host, and every standby, has had the VNode until now.
    """

    purpose: Purpose
    placement: Mapping[str, str] | None
    reason: str = ""
    alive: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    standbys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    live: bool = False


@dataclass(frozen=True, slots=True)
class Allocated:
    """A host has agreed to all that it was asked for; one countersignature a VNode."""

    host: str
    epoch: int
    acceptances: tuple[common_pb2.Signed, ...]


@dataclass(frozen=True, slots=True)
class NotAllocated:
    """A host has refused, or did not answer."""

    host: str
    epoch: int
    reason: str
    code: int = 0  # a RefusalCode, 0: no answer


@dataclass(frozen=True, slots=True)
class HostReady:
    """A host has what it needs to take VNodes over; or has not, and why. `busy`: just now."""

    host: str
    error: str = ""
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Beaten:
    """A host has answered a heartbeat; `refusal` where it is not ours any more."""

    host: str
    epoch: int
    rows: tuple[pnode_pb2.HostedVNode, ...]
    refusal: common_pb2.Refusal | None = None


@dataclass(frozen=True, slots=True)
class NotBeaten:
    """A host has not answered a heartbeat."""

    host: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """A former host was told that it is one, or could not be."""

    host: str
    heard: bool


@dataclass(frozen=True, slots=True)
class Stored:
    """A host has stored the states of a cut."""

    host: str
    epoch: int
    step: int
    states: Mapping[str, common_pb2.BlobRef]


@dataclass(frozen=True, slots=True)
class NotStored:
    """A host has not. `code`: a RefusalCode, 0: no answer."""

    host: str
    epoch: int
    step: int
    reason: str
    code: int = 0


@dataclass(frozen=True, slots=True)
class ReportArrived:
    """A VNode's report. The shell has checked that `caller` is authenticated, nothing else."""

    caller: str
    report: orchestrator_pb2.ReportRequest
    size_bytes: int


@dataclass(frozen=True, slots=True)
class MemberGone:
    """The membership no longer counts a peer among the living."""

    peer_id: str
    why: str


@dataclass(frozen=True, slots=True)
class MemberCame:
    """A peer is there that was not."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class FeederCame:
    """Somebody wants to feed batches. `feeder`: a number for this stream."""

    feeder: int
    peer_id: str


@dataclass(frozen=True, slots=True)
class FeederLeft:
    """Its stream is closed."""

    feeder: int


@dataclass(frozen=True, slots=True)
class FeederEnds:
    """It has no more batches after that of `last_step`."""

    feeder: int
    last_step: int


@dataclass(frozen=True, slots=True)
class FeederFailed:
    """It could not reach a VNode."""

    feeder: int
    epoch: int
    host: str
    reason: str


@dataclass(frozen=True, slots=True)
class CutAsked:
    """Somebody wants the network's present state committed; answered by `Answer`."""

    ask: int


@dataclass(frozen=True, slots=True)
class HostLeaves:
    """A host is about to go; answered by `Answer` when nothing is there any more."""

    ask: int
    peer_id: str


@dataclass(frozen=True, slots=True)
class Resign:
    """This orchestrator is about to go; answered when all that is decided is committed."""

    ask: int


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """The owner ends the network; answered by `Answer`."""

    ask: int
    cancellation: common_pb2.Signed


Event = (
    Begin | LogRead | LogSilent | Appended | NotAppended | Planned | Allocated | NotAllocated
    | HostReady | Beaten | NotBeaten | Released | Stored | NotStored | ReportArrived
    | MemberGone | MemberCame | FeederCame | FeederLeft | FeederEnds | FeederFailed
    | CutAsked | HostLeaves | Resign | CancelAsked | Tick
)  # fmt: skip


# Effects


@dataclass(frozen=True, slots=True)
class ReadLog:
    """Read the log from a slot on: `LogRead` or `LogSilent`. One at a time."""

    from_slot: int


@dataclass(frozen=True, slots=True)
class Append:
    """Get an entry into the next slot: `Appended` or `NotAppended`. One at a time.

    `history` ends just before that slot; it does not change until the answer.
    """

    entry: common_pb2.Signed


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Place every VNode: `Planned`. `probe`: ask these hosts first whether they are there.

    `standbys`: who follows a VNode and has all of it; `live`: go on in memory if it can
    be done, with every VNode where it is, or where one of its standbys is.
    """

    purpose: Purpose
    current: Mapping[str, str]
    exclude: tuple[str, ...]
    probe: tuple[str, ...] = ()
    standbys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    live: bool = False


@dataclass(frozen=True, slots=True)
class MakeReady:
    """Have a host fetch states, before it is given the VNodes: `HostReady`."""

    host: str
    request: pnode_pb2.ReadyRequest


@dataclass(frozen=True, slots=True)
class Allocate:
    """Ask a host to take its VNodes: `Allocated` or `NotAllocated`."""

    host: str
    request: pnode_pb2.AllocateRequest


@dataclass(frozen=True, slots=True)
class Publish:
    """Put the records of an epoch into the DHT and keep them alive; they are hints."""

    epoch: int
    acceptances: tuple[common_pb2.Signed, ...]
    keepers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Let the records run out."""


@dataclass(frozen=True, slots=True)
class Beat:
    """Renew a host's lease: `Beaten` or `NotBeaten`."""

    host: str
    request: pnode_pb2.HeartbeatRequest


@dataclass(frozen=True, slots=True)
class Release:
    """Tell a former host that it has lost its VNodes, up to that epoch: `Released`."""

    host: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Store:
    """Have a host store its VNodes' states after a step: `Stored` or `NotStored`.

    `first`: who should have copies before others do, since the VNodes move there;
    `avoid`: who failed us lately, and is not to be waited for. `norms`: of the last
    decided steps, that of `step` last, where the network clips.
    """

    host: str
    epoch: int
    step: int
    vnodes: tuple[str, ...]
    first: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    norms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Retain:
    """Let holders drop the states that the last two commits do not name. A hint.

    `claim`: ours, which a holder that knows nothing of the network can look up.
    """

    holders: tuple[str, ...]
    digests: tuple[bytes, ...]
    claim: common_pb2.Signed


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a feeder an event; after `done` or `refused` the stream ends."""

    feeder: int
    event: orchestrator_pb2.TrainEvent


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a `CutAsked`, `HostLeaves`, `Resign` or `CancelAsked`."""

    ask: int
    refusal: common_pb2.Refusal | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """Something happened that people may want to know of (`p2pnet events`)."""

    event: str
    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Over:
    """This orchestrator has nothing more to do with the network.

    `code`: STALE_EPOCH where `orchestrator` has claimed it, CLOSED where its owner has
    ended it, FAILED where it could not be placed at all.
    """

    code: int
    reason: str
    orchestrator: str = ""


Effect = (
    ReadLog | Append | MakePlan | MakeReady | Allocate | Publish | Withdraw | Beat | Release
    | Store | Retain | Tell | Answer | Note | Over
)  # fmt: skip
