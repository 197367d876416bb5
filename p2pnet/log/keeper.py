"""A keeper of logs: the acceptor of one register a slot. A pure core (DESIGN D6).

Single-decree Paxos for each slot (Lamport 2001, "Paxos made simple"), over the
keepers that the entry before names (of the first slot, that the manifest names),
as in CASPaxos (Rystsov 2018). Only the next slot of a log is open; what is decided
stays and is told to whoever asks. Beyond Paxos a keeper knows the log's
rules and refuses what would not count, signs what it accepts, and takes nothing
for decided without a majority's votes (see `proof`).

Ballots cannot be used up: their rounds go no further than this keeper's clock
(`ROUND_AHEAD`), so who drives them to the end is outdone a millisecond later. A
bound to how far one Prepare may jump would not do: two keepers that are driven to
different heights leave the third out of anybody's reach.

A `Persist` or `Forget` comes before the `Reply` that depends on it: it has to be on
disk before the reply leaves. An event that is refused raises a RemoteError and
changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from google.protobuf.message import DecodeError

from p2pnet.core import Tick
from p2pnet.dht.manifest import check_network_id
from p2pnet.errors import ForgedError, LocalError, MalformedError, RemoteError
from p2pnet.keys import KeyPair
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import (
    Grants,
    History,
    check_entry,
    keepers_of_next,
    manifest_grants,
    open_charter,
)
from p2pnet.log.kept import Gone, KeptLog, decided_record, refused, refused_gone
from p2pnet.log.kept import to_ballot as to_ballot
from p2pnet.log.kept import to_key as to_key
from p2pnet.log.proof import BallotKey, vote
from p2pnet.log.room import GONE_MAX, NETWORKS_MAX, Places
from p2pnet.v1 import common_pb2, log_pb2

ROUND_AHEAD = 24 * 3600 * 1000  # ms: rounds are at most the wall clock's ms since 1970, and this
ROUND_STEP = 2**16  # and whatever the clock says, this much above the one promised
ROUND_MAX = 2**62
READ_BYTES_MAX = 2 << 20  # of one reply to ReadLog, or the first entry
BATCH_ENTRIES = 32  # of one Learn or ReadLog: each costs its checker about 1 ms


@dataclass(frozen=True, slots=True)
class Prepare:
    """`caller` is the peer id that the channel has proved. `wall_ms` since 1970; 0: unknown."""

    caller: str
    request: log_pb2.PrepareRequest
    wall_ms: int = 0


@dataclass(frozen=True, slots=True)
class Accept:
    """As Prepare."""

    caller: str
    request: log_pb2.AcceptRequest
    wall_ms: int = 0


@dataclass(frozen=True, slots=True)
class Learn:
    """As Prepare."""

    caller: str
    request: log_pb2.LearnRequest


@dataclass(frozen=True, slots=True)
class Read:
    """Anybody may read."""

    request: log_pb2.ReadLogRequest


@dataclass(frozen=True, slots=True)
class Persist:
    """Keep `data` under (network_id, slot), instead of what was there, and sync it."""

    network_id: str
    slot: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Forget:
    """Take away what is kept of a network in slots from 1 on, the highest first.

    After the `Persist`s before it are synced. A crash in between leaves a log that is shorter.
    """

    network_id: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the event."""

    message: log_pb2.PrepareReply | log_pb2.AcceptReply | log_pb2.LearnReply | log_pb2.ReadLogReply


Event = Prepare | Accept | Learn | Read | Tick
Effect = Persist | Forget | Reply

_FLOOR = ("floor", 0)  # where the floor is kept
_GONE = 0  # the slot under which a network's `Gone` is kept


class Keeper:
    """Keeps the logs of any number of networks, within limits. `key`: what it signs with."""

    def __init__(self, key: KeyPair, grants: Grants = manifest_grants) -> None:
        self._key = key
        self._me = key.peer_id
        self._grants = grants
        self._logs: dict[str, KeptLog] = {}
        self._gone: dict[str, Gone] = {}
        self._floor: BallotKey | None = None  # the highest ballot of promises that are gone
        self._began: float | None = None

    # --- the core ---

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Answers one request.

        Raises:
            MalformedError, ForgedError: the request does not hold.
            RefusedError: not granted, not kept here, or full.
        """
        if self._began is None:
            self._began = now
        if isinstance(event, Prepare):
            return self._prepare(event, now)
        if isinstance(event, Accept):
            return self._accept(event, now)
        if isinstance(event, Learn):
            return self._learn(event.caller, event.request, now)
        if isinstance(event, Read):
            return [Reply(self._read(event.request))]
        return []

    def deadline(self) -> float | None:
        """Never: a keeper only answers."""
        return None

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        for log in self._logs.values():
            assert (log.accepted is None) == (log.entry is None)
            if log.accepted is not None:
                assert log.promised is not None
                assert log.promised >= log.accepted
        assert len(self._logs) <= NETWORKS_MAX
        assert len(self._gone) <= GONE_MAX

    def history(self, network_id: str) -> History | None:
        """What is known to be decided, or None; not to be changed."""
        log = self._logs.get(network_id)
        return None if log is None else log.history

    def histories(self) -> list[History]:
        """What is known to be decided of every log, by network id; not to be changed."""
        return [log.history for _, log in sorted(self._logs.items())]

    # --- durable state ---

    def dump(self) -> dict[tuple[str, int], bytes]:
        """All that is kept after the effects so far, by (network id, slot)."""
        records = {(network_id, _GONE): gone.record() for network_id, gone in self._gone.items()}
        if self._floor is not None:
            records[_FLOOR] = _floor_record(self._floor)
        for network_id, log in sorted(self._logs.items()):
            for slot, signed in enumerate(log.history.entries, start=1):
                records[network_id, slot] = decided_record(signed, log.proofs[slot - 1])
            if log.promised is not None:
                records[network_id, log.history.next_slot] = log.open_record()
        return records

    @classmethod
    def load(
        cls,
        key: KeyPair,
        records: Mapping[tuple[str, int], bytes],
        grants: Grants = manifest_grants,
    ) -> Self:
        """A keeper with the state that `dump` or the effects gave.

        Raises:
            LocalError: a record is damaged or missing, and which.
        """
        keeper = cls(key, grants)
        for network_id, slot in sorted(records):
            try:
                data = records[network_id, slot]
                if (network_id, slot) == _FLOOR:
                    keeper._floor = to_key(log_pb2.PrepareReply.FromString(data).ballot)
                    continue
                if slot == _GONE:
                    keeper._gone[network_id] = Gone.parse(data)
                    continue
                record = log_pb2.PrepareReply.FromString(data)
                log = keeper._logs.setdefault(network_id, KeptLog(History(network_id, grants)))
                if slot != log.history.next_slot or log.promised is not None:
                    raise MalformedError("the record before it is missing")
                if record.decided:
                    log.decide(record.entry, record.proof)
                else:
                    log.promised = to_key(record.ballot)
                    if record.HasField("accepted"):
                        log.accepted = to_key(record.accepted)
                        log.entry = record.entry
            except (DecodeError, RemoteError) as error:
                raise LocalError(
                    f"what this node kept of slot {slot} of network {network_id} is damaged: "
                    f"{error}"
                ) from None
        return keeper

    # --- Paxos ---

    def _prepare(self, event: Prepare, now: float) -> list[Effect]:
        caller, request = event.caller, event.request
        log = self._find(caller, request.network_id)
        if decided := log.history.entry(request.slot):
            proof = log.proofs[request.slot - 1]
            return [Reply(log_pb2.PrepareReply(decided=True, entry=decided, proof=proof))]
        if request.slot != log.history.next_slot:
            behind = log_pb2.PrepareReply(next_slot=log.history.next_slot)
            return [Reply(behind)]  # no ballot: "tell me what came before"
        if not log.history.entries:
            # Else anybody could make logs here, of networks that are nowhere.
            self._check_granted(request.network_id, request.manifest, caller)
            charter = open_charter(request.network_id, request.manifest)
            self._check_named(list(charter.keepers))
        ballot = self._ballot(caller, request.ballot, log, event.wall_ms)
        # Never the same ballot twice: a proposer that has restarted may use one anew,
        # for another entry.
        promised = log.promised is None or ballot > log.promised
        effects: list[Effect] = []
        if promised:
            effects += self._give_up(self._in_the_way(log, caller, now))
            self._logs[request.network_id] = log
            log.promised, log.used_at = ballot, now
            effects.append(_persist(log))
        assert log.promised is not None
        reply = log_pb2.PrepareReply(promised=promised, ballot=to_ballot(log.promised))
        if log.accepted is not None and log.entry is not None:
            reply.accepted.CopyFrom(to_ballot(log.accepted))
            reply.entry.CopyFrom(log.entry)
        return [*effects, Reply(reply)]

    def _accept(self, event: Accept, now: float) -> list[Effect]:
        caller, request = event.caller, event.request
        log = self._find(caller, request.network_id)
        if request.slot != log.history.next_slot:
            return [Reply(log_pb2.AcceptReply())]  # decided already, or still unknown here
        ballot = self._ballot(caller, request.ballot, log, event.wall_ms)
        if log.promised is not None and ballot < log.promised:
            return [Reply(log_pb2.AcceptReply(ballot=to_ballot(log.promised)))]
        entry = check_entry(request.entry, log.history)
        if not log.history.entries:
            self._check_granted(request.network_id, entry.claim.manifest, caller)
        self._check_named(keepers_of_next(log.history, request.entry))
        signature = vote(self._key, request.ballot, request.entry)
        reply = Reply(log_pb2.AcceptReply(accepted=True, ballot=to_ballot(ballot), vote=signature))
        if log.accepted == ballot and log.entry is not None:
            # One ballot stands for one entry: its proposer made it so, or lies.
            if log.entry.payload != request.entry.payload:
                raise ForgedError("two entries were proposed under one ballot")
            return [reply]
        effects = self._give_up(self._in_the_way(log, caller, now, request.entry))
        self._logs[request.network_id] = log
        log.promised = log.accepted = ballot
        log.entry, log.used_at = request.entry, now
        return [*effects, _persist(log), reply]

    def _learn(self, caller: str, request: log_pb2.LearnRequest, now: float) -> list[Effect]:
        log = self._find(caller, request.network_id)
        if log.history.manifest is None and request.entries:
            first = parse_entry(request.entries[0])
            self._check_granted(request.network_id, first.claim.manifest, caller)
        effects: list[Effect] = []
        if len(request.proofs) != len(request.entries):
            raise MalformedError("entries are said to be decided without proofs")
        if len(request.entries) > BATCH_ENTRIES:
            raise MalformedError(f"a lesson has at most {BATCH_ENTRIES} entries")
        for signed, proof in zip(request.entries, request.proofs, strict=True):
            try:
                slot = parse_entry(signed).slot
                known = log.history.entry(slot)
                if known is not None and known.payload != signed.payload:
                    raise ForgedError(f"two entries are said to be decided for slot {slot}")
                if known is not None:
                    continue
                if slot > log.history.next_slot:
                    break  # a gap: who needs us to know tells us from the start, when we ask
                in_the_way = self._in_the_way(log, caller, now, signed)
                log.decide(signed, proof)
            except RemoteError:
                if effects:
                    break  # what came before it is learned and has to be kept
                raise
            effects += self._give_up(in_the_way)
            self._logs[request.network_id] = log
            log.used_at = now
            effects.append(Persist(request.network_id, slot, decided_record(signed, proof)))
        return [*effects, Reply(log_pb2.LearnReply())]

    def _read(self, request: log_pb2.ReadLogRequest) -> log_pb2.ReadLogReply:
        check_network_id(request.network_id)
        reply = log_pb2.ReadLogReply()
        log = self._logs.get(request.network_id)
        next_slot = 1 if log is None else log.history.next_slot
        size_bytes = 0
        for slot in range(max(1, request.from_slot), next_slot):
            assert log is not None
            signed = log.history.entries[slot - 1]
            size_bytes += len(signed.payload)
            full = size_bytes > READ_BYTES_MAX or len(reply.entries) == BATCH_ENTRIES
            if full and reply.entries:
                break
            reply.entries.append(signed)
            reply.proofs.append(log.proofs[slot - 1])
        gone = self._gone.get(request.network_id)
        if gone is not None and next_slot < gone.next_slot and not reply.entries:
            # "Nothing more is known" would be a lie, and a majority of lies an empty log.
            if not gone.keepers or gone.closed:
                raise refused_gone(gone)
            reply.keepers.extend(gone.keepers)
        return reply

    # --- checks ---

    def _find(self, caller: str, network_id: str) -> KeptLog:
        """The log, or a new one that is not held yet; refuses whom the owner has not granted."""
        check_network_id(network_id)
        log = self._logs.get(network_id)
        if log is None:
            gone = self._gone.get(network_id)
            if gone is not None and gone.closed:
                raise refused_gone(gone)
            log = KeptLog(History(network_id, self._grants), promised=self._floor)
        if log.history.manifest is not None:
            self._check_granted(network_id, log.history.manifest, caller)
        return log

    def _check_granted(self, network_id: str, manifest: common_pb2.Signed, caller: str) -> None:
        if not self._grants(network_id, manifest, caller):
            raise refused("NOT_GRANTED", f"the owner does not let {caller} write this log")

    def _check_named(self, keepers: Sequence[str]) -> None:
        if self._me not in keepers:
            raise refused("NOT_HOSTED", "the network's manifest names other keepers")

    def _ballot(self, caller: str, ballot: log_pb2.Ballot, log: KeptLog, wall_ms: int) -> BallotKey:
        if ballot.proposer != caller or not 1 <= ballot.round <= ROUND_MAX:
            raise MalformedError("a ballot is not its proposer's own, or has no possible round")
        step_max = (log.promised[0] if log.promised else 0) + ROUND_STEP
        if ballot.round > max(wall_ms + ROUND_AHEAD, step_max):
            raise MalformedError("a ballot is of a round that is still to come")
        if log.history.keepers and self._me not in log.history.keepers:
            raise refused("NOT_HOSTED", "this peer is not a keeper of that slot")
        gone = self._gone.get(log.history.network_id)
        if gone is not None and log.history.next_slot < gone.next_slot:
            raise refused_gone(gone)  # it may have voted there
        return to_key(ballot)

    # --- room ---

    def _in_the_way(
        self, log: KeptLog, caller: str, now: float, entry: common_pb2.Signed | None = None
    ) -> list[str]:
        assert self._began is not None
        places = Places(self._me, self._logs, self._gone, self._began)
        return places.in_the_way(log, caller, now, entry)

    def _give_up(self, networks: Sequence[str]) -> list[Effect]:
        effects: list[Effect] = []
        for network_id in networks:
            log = self._logs.pop(network_id)
            if log.use(self._me) == 0:
                assert log.promised is not None
                self._floor = max(self._floor or log.promised, log.promised)
                effects.append(Persist(*_FLOOR, _floor_record(self._floor)))
            else:
                gone = Gone.of(log, self._gone.get(network_id))
                self._gone[network_id] = gone
                effects.append(Persist(network_id, _GONE, gone.record()))
            effects.append(Forget(network_id))
        return effects


def _persist(log: KeptLog) -> Persist:
    return Persist(log.history.network_id, log.history.next_slot, log.open_record())


def _floor_record(floor: BallotKey) -> bytes:
    record = log_pb2.PrepareReply(promised=True, ballot=to_ballot(floor))
    return record.SerializeToString(deterministic=True)
