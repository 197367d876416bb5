"""Whether what was seen of a network can have been one history. Pure.

As in Jepsen (Kingsbury, github.com/jepsen-io): while a network runs everybody records
what they were told; afterwards this judges it, with none of the code that it judges
but the parsing of messages. It serves the simulator and runs of real processes alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from p2pnet import keys
from p2pnet.errors import RemoteError
from p2pnet.keys import short
from p2pnet.v1 import common_pb2, log_pb2

# step -> the SHA-256 of each VNode's state after it in an undisturbed run; None: unknown
Golden = Callable[[int], Mapping[str, bytes] | None]
# step -> its loss in an undisturbed run; None: unknown
GoldenLoss = Callable[[int], float | None]


@dataclass(frozen=True, slots=True)
class Decided:
    """`by` holds an entry of the log to be decided."""

    by: str
    entry: common_pb2.Signed


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """An entry that `by` wrote was said to be decided, and it acted on that."""

    by: str
    entry: common_pb2.Signed


@dataclass(frozen=True, slots=True)
class Accepted:
    """`host` has signed that it hosts a VNode."""

    vnode: str
    epoch: int
    claimant: str
    host: str


@dataclass(frozen=True, slots=True)
class Saved:
    """`host` has stored a VNode's state after a step."""

    host: str
    vnode: str
    step: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Heard:
    """Whoever trains was given the result of a step; NaN: that it is lost with who had it."""

    feeder: str
    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class ToldCommitted:
    """Whoever trains was told that all steps up to this one are committed."""

    feeder: str
    step: int


Observation = Decided | Acknowledged | Accepted | Saved | Heard | ToldCommitted


@dataclass(frozen=True, slots=True)
class Violation:
    """What cannot be, in a sentence, and what shows it. `rule`: a name for programs."""

    rule: str
    sentence: str
    evidence: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join((self.sentence, *self.evidence))


@dataclass(slots=True)
class Recording:
    """What was seen of one network, in the order in which it was."""

    network_id: str
    seen: list[Observation] = field(default_factory=list)

    def note(self, observation: Observation) -> None:
        """One more."""
        self.seen.append(observation)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A decided entry; `why`: what keeps it from counting, if anything does."""

    signed: common_pb2.Signed
    entry: log_pb2.LogEntry
    signer: str
    why: str

    def __str__(self) -> str:
        what = self.entry.WhichOneof("what") or "nothing"
        number = {
            "claim": f" of epoch {self.entry.claim.epoch}",
            "commit": f" of step {self.entry.commit.step} in epoch {self.entry.commit.epoch}",
        }.get(what, "")
        return f"slot {self.entry.slot}: a {what}{number} by {short(self.signer)}"


def check(
    recording: Recording,
    *,
    golden: Golden = lambda step: None,
    loss: GoldenLoss = lambda step: None,
) -> list[Violation]:
    """Everything that cannot be in a recording; nothing, if all is well."""
    slots, found = _log_of(recording)
    by_kind: dict[type[Observation], list[Observation]] = {}
    for observation in recording.seen:
        by_kind.setdefault(type(observation), []).append(observation)

    acknowledged = [o for o in by_kind.get(Acknowledged, ()) if isinstance(o, Acknowledged)]
    accepted = [o for o in by_kind.get(Accepted, ()) if isinstance(o, Accepted)]
    saved = [o for o in by_kind.get(Saved, ()) if isinstance(o, Saved)]
    heard = [o for o in by_kind.get(Heard, ()) if isinstance(o, Heard)]
    told = [o for o in by_kind.get(ToldCommitted, ()) if isinstance(o, ToldCommitted)]
    return [
        *found,
        *_claims(slots),
        *_commits(slots, saved, golden),
        *_acknowledged(slots, acknowledged),
        *_accepted(slots, accepted),
        *_heard(slots, heard, told, loss),
    ]


def _log_of(recording: Recording) -> tuple[list[_Slot], list[Violation]]:
    """The log that all saw, and where they saw two."""
    found: list[Violation] = []
    first: dict[int, Decided | Acknowledged] = {}
    for observation in recording.seen:
        if not isinstance(observation, Decided | Acknowledged):
            continue
        slot = _parse(observation.entry).slot
        known = first.setdefault(slot, observation)
        if known.entry.payload != observation.entry.payload:
            found.append(
                Violation(
                    "one entry a slot",
                    f"two entries were decided for slot {slot}",
                    tuple(
                        f"{short(seen.by)} was told of {keys.sha256(seen.entry.payload)[:4].hex()}"
                        for seen in (known, observation)
                    ),
                )
            )
    slots: list[_Slot] = []
    epoch, claimant, previous, closed = 0, "", b"", False
    for number in range(1, len(first) + 1):
        if number not in first:
            found.append(
                Violation("no gaps", f"slot {number} was decided by nobody, but a later one was")
            )
            break
        signed = first[number].entry
        entry = _parse(signed)
        try:
            signer = keys.verify(keys.LOG_ENTRY, signed)
        except RemoteError as error:
            signer = ""
            found.append(Violation("signed", f"slot {number} is not signed: {error}"))
        if entry.previous != previous or entry.network_id != recording.network_id:
            found.append(Violation("a chain", f"slot {number} does not follow the entry before it"))
        previous = keys.sha256(signed.payload)
        why = _why_void(entry, signer, epoch, claimant, closed=closed)
        if not why and entry.WhichOneof("what") == "claim":
            epoch, claimant = entry.claim.epoch, signer
        closed = closed or (not why and entry.WhichOneof("what") == "closing")
        slots.append(_Slot(signed, entry, signer, why))
    return slots, found


def _why_void(
    entry: log_pb2.LogEntry, signer: str, epoch: int, claimant: str, *, closed: bool
) -> str:
    what = entry.WhichOneof("what")
    if closed:
        return "its owner had closed the network"
    if what == "claim" and entry.claim.epoch != epoch + 1:
        return f"the epoch before it is {epoch}"
    if what == "claim" and entry.claim.orchestrator != signer:
        return "somebody else signed it"
    if what == "commit" and (entry.commit.epoch, signer) != (epoch, claimant):
        return f"the last claim is of epoch {epoch} and by {short(claimant)}"
    return ""


def _claims(slots: Sequence[_Slot]) -> list[Violation]:
    """Whoever keeps the log lets nothing in that is stale or void."""
    return [
        Violation(
            "nothing stale is kept" if slot.entry.HasField("commit") else "epochs grow by one",
            f"the log has an entry that cannot count: {slot.why}",
            (str(slot),),
        )
        for slot in slots
        if slot.why
    ]


def _commits(slots: Sequence[_Slot], saved: Sequence[Saved], golden: Golden) -> list[Violation]:
    found: list[Violation] = []
    named: dict[int, _Slot] = {}
    last: _Slot | None = None
    stored = {(o.vnode, o.step, o.digest): o for o in saved}
    for slot in slots:
        if not slot.why and slot.entry.claim.from_step:
            # The commits after that are undone, and their steps are done again.
            back_to = int(slot.entry.claim.from_step)
            if sorted(named)[-2:-1] != [back_to]:
                found.append(
                    Violation(
                        "back by one commit",
                        f"a claim goes back to step {back_to}, not to the last commit but one",
                        (str(slot),),
                    )
                )
            named = {step: at for step, at in named.items() if step <= back_to}
            last = named.get(back_to)
        if slot.why or not slot.entry.HasField("commit"):
            continue
        commit = slot.entry.commit
        step = int(commit.step)
        if step in named:
            found.append(
                Violation(
                    "one commit a step",
                    f"two commits of step {step} count",
                    (str(named[step]), str(slot)),
                )
            )
        elif last is not None and step < last.entry.commit.step:
            found.append(
                Violation("commits go on", f"step {step} was committed after a later one",
                          (str(last), str(slot)))
            )  # fmt: skip
        named[step] = last = slot
        wanted = golden(step)
        for vnode in sorted(commit.states):
            digest = commit.states[vnode].digest
            if wanted is not None and wanted.get(vnode, digest) != digest:
                found.append(
                    Violation(
                        "one run of steps",
                        f"the state of {vnode} after step {step} does not come of the steps "
                        "up to there, each once and in order",
                        (str(slot), f"digest {digest[:4].hex()}"),
                    )
                )
            if saved and (vnode, step, digest) not in stored:
                found.append(
                    Violation(
                        "stored before committed",
                        f"a commit names a state of {vnode} that nobody has stored",
                        (str(slot),),
                    )
                )
        if wanted is not None and sorted(wanted) != sorted(commit.states):
            found.append(
                Violation("whole cuts", f"the commit of step {step} lacks VNodes", (str(slot),))
            )
    return found


def _acknowledged(slots: Sequence[_Slot], acknowledged: Sequence[Acknowledged]) -> list[Violation]:
    found: list[Violation] = []
    for said in acknowledged:
        number = int(_parse(said.entry).slot)
        slot = slots[number - 1] if number <= len(slots) else None
        if slot is None or slot.signed.payload != said.entry.payload:
            found.append(
                Violation(
                    "nothing acknowledged is lost",
                    f"{short(said.by)} was told that its entry is in slot {number}, and it is not",
                )
            )
        elif slot.why and slot.entry.HasField("commit"):
            found.append(
                Violation(
                    "no stale commit",
                    f"{short(said.by)} took a commit for good that does not count: {slot.why}",
                    (str(slot),),
                )
            )
    return found


def _accepted(slots: Sequence[_Slot], accepted: Sequence[Accepted]) -> list[Violation]:
    found: list[Violation] = []
    claims = {
        (int(slot.entry.claim.epoch), slot.signer): slot.entry.claim
        for slot in slots
        if not slot.why and slot.entry.HasField("claim")
    }
    hosts: dict[tuple[str, int, str], Accepted] = {}
    for one in accepted:
        other = hosts.setdefault((one.vnode, one.epoch, one.claimant), one)
        if other.host != one.host:
            found.append(
                Violation(
                    "one host a claim",
                    f"two hosts accepted {one.vnode} under epoch {one.epoch} of "
                    f"{short(one.claimant)}",
                    (short(other.host), short(one.host)),
                )
            )
        claim = claims.get((one.epoch, one.claimant))
        if claim is None:
            found.append(
                Violation(
                    "no host without a claim",
                    f"{short(one.host)} accepted {one.vnode} under epoch {one.epoch} of "
                    f"{short(one.claimant)}, which the log does not have",
                )
            )
        elif claim.placement and (
            one.vnode not in claim.placement or claim.hosts[claim.placement[one.vnode]] != one.host
        ):
            found.append(
                Violation(
                    "the host that the claim names",
                    f"{short(one.host)} accepted {one.vnode}, which the claim of epoch "
                    f"{one.epoch} gives to another",
                )
            )
    return found


def _heard(
    slots: Sequence[_Slot],
    heard: Sequence[Heard],
    told: Sequence[ToldCommitted],
    loss: GoldenLoss,
) -> list[Violation]:
    found: list[Violation] = []
    last: dict[str, int] = {}
    for one in heard:
        before = last.get(one.feeder)
        if before is not None and one.step != before + 1:
            found.append(
                Violation(
                    "every step once, in order",
                    f"the result of step {one.step} came after that of step {before}",
                    (one.feeder,),
                )
            )
        last[one.feeder] = one.step
        wanted = loss(one.step)
        if wanted is not None and not math.isnan(one.loss) and wanted != one.loss:
            found.append(
                Violation(
                    "the result of that step",
                    f"step {one.step} has the loss {wanted!r}, but {one.loss!r} was heard",
                    (one.feeder,),
                )
            )
    committed = max(
        (int(s.entry.commit.step) for s in slots if not s.why and s.entry.HasField("commit")),
        default=0,
    )
    return found + [
        Violation(
            "nothing acknowledged is lost",
            f"{one.feeder} was told that step {one.step} is committed, but the last commit is "
            f"of step {committed}",
        )
        for one in told
        if one.step > committed
    ]


def _parse(signed: common_pb2.Signed) -> log_pb2.LogEntry:
    try:
        return log_pb2.LogEntry.FromString(signed.payload)
    except DecodeError:
        return log_pb2.LogEntry()
