"""A keeper of logs: the acceptor of one register a slot. A pure core (DESIGN D6).

Single-decree Paxos for each slot (Lamport 2001, "Paxos made simple"), over the
keepers that the entry before names (of the first slot, that the manifest names),
as in CASPaxos (Rystsov 2018). Only the next slot of a log is open; what is decided
stays for ever and is told to whoever asks. Beyond Paxos a keeper knows the log's
rules and refuses what would not count, signs what it accepts, and takes nothing
for decided without a majority's votes (see `proof`).

A `Persist` comes before the `Reply` that depends on it: it has to be on disk
before the reply leaves. An event that is refused raises a RemoteError and changes
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from google.protobuf.message import DecodeError

from p2pnet.core import Tick
from p2pnet.dht.manifest import check_network_id
from p2pnet.errors import ForgedError, LocalError, MalformedError, RefusedError, RemoteError
from p2pnet.keys import KeyPair
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import (
    Grants,
    History,
    check_entry,
    keepers_of_next,
    manifest_grants,
)
from p2pnet.log.proof import BallotKey, take_decided, vote
from p2pnet.v1 import common_pb2, log_pb2

NETWORKS_MAX = 1_024
UNCLAIMED_MAX = 16  # logs without an entry, of one caller
ROUND_MAX = 2**32
BYTES_MAX = 256 << 20  # of all logs kept
READ_BYTES_MAX = 2 << 20  # of one reply to ReadLog, or the first entry
BATCH_ENTRIES = 32  # of one Learn or ReadLog: each costs its checker about 1 ms


@dataclass(frozen=True, slots=True)
class Prepare:
    """`caller` is the peer id that the channel has proved."""

    caller: str
    request: log_pb2.PrepareRequest


@dataclass(frozen=True, slots=True)
class Accept:
    """As Prepare."""

    caller: str
    request: log_pb2.AcceptRequest


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
class Reply:
    """The answer to the event."""

    message: log_pb2.PrepareReply | log_pb2.AcceptReply | log_pb2.LearnReply | log_pb2.ReadLogReply


Event = Prepare | Accept | Learn | Read | Tick
Effect = Persist | Reply


@dataclass(slots=True)
class _Log:
    history: History
    proofs: list[log_pb2.Proof] = field(default_factory=list)  # one an entry
    promised: BallotKey | None = None
    accepted: BallotKey | None = None
    entry: common_pb2.Signed | None = None  # what was accepted

    @property
    def size_bytes(self) -> int:
        return self.history.size_bytes + (len(self.entry.payload) if self.entry else 0)

    def decide(self, signed: common_pb2.Signed, proof: log_pb2.Proof) -> None:
        take_decided(signed, proof, self.history)
        self.proofs.append(proof)
        self.promised = self.accepted = self.entry = None

    def open_record(self) -> bytes:
        """The durable state of the open slot."""
        record = log_pb2.PrepareReply(promised=self.promised is not None)
        if self.promised is not None:
            record.ballot.CopyFrom(to_ballot(self.promised))
        if self.accepted is not None and self.entry is not None:
            record.accepted.CopyFrom(to_ballot(self.accepted))
            record.entry.CopyFrom(self.entry)
        return record.SerializeToString(deterministic=True)


class Keeper:
    """Keeps the logs of any number of networks, within limits. `key`: what it signs with."""

    def __init__(self, key: KeyPair, grants: Grants = manifest_grants) -> None:
        self._key = key
        self._me = key.peer_id
        self._grants = grants
        self._logs: dict[str, _Log] = {}

    # --- the core ---

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Answers one request.

        Raises:
            MalformedError, ForgedError: the request does not hold.
            RefusedError: not granted, not kept here, or full.
        """
        if isinstance(event, Prepare):
            return self._prepare(event.caller, event.request)
        if isinstance(event, Accept):
            return self._accept(event.caller, event.request)
        if isinstance(event, Learn):
            return self._learn(event.caller, event.request)
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

    def history(self, network_id: str) -> History | None:
        """What is known to be decided, or None; not to be changed."""
        log = self._logs.get(network_id)
        return None if log is None else log.history

    def histories(self) -> list[History]:
        """What is known to be decided of every log, by network id; not to be changed."""
        return [log.history for _, log in sorted(self._logs.items())]

    # --- durable state ---

    def dump(self) -> dict[tuple[str, int], bytes]:
        """All that `Persist` effects have said so far, by (network id, slot)."""
        records: dict[tuple[str, int], bytes] = {}
        for network_id, log in sorted(self._logs.items()):
            for slot, signed in enumerate(log.history.entries, start=1):
                records[network_id, slot] = _decided_record(signed, log.proofs[slot - 1])
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
        """A keeper with the state that `dump` or `Persist` effects gave.

        Raises:
            LocalError: a record is damaged or missing, and which.
        """
        keeper = cls(key, grants)
        for network_id, slot in sorted(records):
            try:
                record = log_pb2.PrepareReply.FromString(records[network_id, slot])
                log = keeper._logs.setdefault(network_id, _Log(History(network_id, grants)))
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

    def _prepare(self, caller: str, request: log_pb2.PrepareRequest) -> list[Effect]:
        log = self._find(caller, request.network_id)
        if decided := log.history.entry(request.slot):
            proof = log.proofs[request.slot - 1]
            return [Reply(log_pb2.PrepareReply(decided=True, entry=decided, proof=proof))]
        if request.slot != log.history.next_slot:
            behind = log_pb2.PrepareReply(next_slot=log.history.next_slot)
            return [Reply(behind)]  # no ballot: "tell me what came before"
        ballot = self._ballot(caller, request.ballot, log)
        # Never the same ballot twice: a proposer that has restarted may use one anew,
        # for another entry.
        promised = log.promised is None or ballot > log.promised
        effects: list[Effect] = []
        if promised:
            self._check_room(log, caller)
            self._logs[request.network_id] = log
            log.promised = ballot
            effects.append(_persist(log))
        assert log.promised is not None
        reply = log_pb2.PrepareReply(promised=promised, ballot=to_ballot(log.promised))
        if log.accepted is not None and log.entry is not None:
            reply.accepted.CopyFrom(to_ballot(log.accepted))
            reply.entry.CopyFrom(log.entry)
        return [*effects, Reply(reply)]

    def _accept(self, caller: str, request: log_pb2.AcceptRequest) -> list[Effect]:
        log = self._find(caller, request.network_id)
        if request.slot != log.history.next_slot:
            return [Reply(log_pb2.AcceptReply())]  # decided already, or still unknown here
        ballot = self._ballot(caller, request.ballot, log)
        if log.promised is not None and ballot < log.promised:
            return [Reply(log_pb2.AcceptReply(ballot=to_ballot(log.promised)))]
        check_entry(request.entry, log.history)
        if self._me not in keepers_of_next(log.history, request.entry):
            raise _refused("NOT_HOSTED", "the network's manifest names other keepers")
        signature = vote(self._key, request.ballot, request.entry)
        reply = Reply(log_pb2.AcceptReply(accepted=True, ballot=to_ballot(ballot), vote=signature))
        if log.accepted == ballot and log.entry is not None:
            # One ballot stands for one entry: its proposer made it so, or lies.
            if log.entry.payload != request.entry.payload:
                raise ForgedError("two entries were proposed under one ballot")
            return [reply]
        self._check_room(log, caller, request.entry)
        self._logs[request.network_id] = log
        log.promised = log.accepted = ballot
        log.entry = request.entry
        return [_persist(log), reply]

    def _learn(self, caller: str, request: log_pb2.LearnRequest) -> list[Effect]:
        log = self._find(caller, request.network_id, request.entries[:1])
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
                self._check_room(log, caller, signed)
                log.decide(signed, proof)
                self._logs[request.network_id] = log
            except RemoteError:
                if effects:
                    break  # what came before it is learned and has to be kept
                raise
            effects.append(Persist(request.network_id, slot, _decided_record(signed, proof)))
        return [*effects, Reply(log_pb2.LearnReply())]

    def _read(self, request: log_pb2.ReadLogRequest) -> log_pb2.ReadLogReply:
        check_network_id(request.network_id)
        reply = log_pb2.ReadLogReply()
        log = self._logs.get(request.network_id)
        size_bytes = 0
        if log is None:
            return reply
        for slot in range(max(1, request.from_slot), log.history.next_slot):
            signed = log.history.entries[slot - 1]
            size_bytes += len(signed.payload)
            full = size_bytes > READ_BYTES_MAX or len(reply.entries) == BATCH_ENTRIES
            if full and reply.entries:
                break
            reply.entries.append(signed)
            reply.proofs.append(log.proofs[slot - 1])
        return reply

    # --- checks ---

    def _find(self, caller: str, network_id: str, first: Sequence[common_pb2.Signed] = ()) -> _Log:
        """The log, or a new one that is not held yet; refuses whom the owner has not granted."""
        check_network_id(network_id)
        log = self._logs.get(network_id) or _Log(History(network_id, self._grants))
        manifest = log.history.manifest
        if manifest is None and first:
            manifest = parse_entry(first[0]).claim.manifest
        if manifest is not None and not self._grants(network_id, manifest, caller):
            raise _refused("NOT_GRANTED", f"the owner does not let {caller} write this log")
        return log

    def _ballot(self, caller: str, ballot: log_pb2.Ballot, log: _Log) -> BallotKey:
        if ballot.proposer != caller or not 1 <= ballot.round <= ROUND_MAX:
            raise MalformedError("a ballot is not its proposer's own, or has no possible round")
        if log.history.keepers and self._me not in log.history.keepers:
            raise _refused("NOT_HOSTED", "this peer is not a keeper of that slot")
        return to_key(ballot)

    def _check_room(self, log: _Log, caller: str, entry: common_pb2.Signed | None = None) -> None:
        """Raises RefusedError where there is no room for a log, or for an entry in it."""
        network_id = log.history.network_id
        if network_id not in self._logs:
            # Nobody has claimed them yet, so nothing says that they are anyone's.
            unclaimed = sum(
                1
                for other in self._logs.values()
                if not other.history.entries and other.promised and other.promised[1] == caller
            )
            if len(self._logs) >= NETWORKS_MAX or unclaimed >= UNCLAIMED_MAX:
                raise _refused("BUSY", "this peer keeps as many logs as it can")
        if entry is not None:
            held = sum(other.size_bytes for other in self._logs.values())
            if held + len(entry.payload) > BYTES_MAX:
                raise _refused("NO_MEMORY", "this peer's room for logs is full")


def to_ballot(key: BallotKey) -> log_pb2.Ballot:
    """A ballot as it travels."""
    return log_pb2.Ballot(round=key[0], proposer=key[1])


def to_key(ballot: log_pb2.Ballot) -> BallotKey:
    """A ballot as it is compared."""
    return ballot.round, ballot.proposer


def _persist(log: _Log) -> Persist:
    return Persist(log.history.network_id, log.history.next_slot, log.open_record())


def _decided_record(signed: common_pb2.Signed, proof: log_pb2.Proof) -> bytes:
    record = log_pb2.PrepareReply(decided=True, entry=signed, proof=proof)
    return record.SerializeToString(deterministic=True)


def _refused(code: str, detail: str) -> RefusedError:
    return RefusedError(detail, code=common_pb2.RefusalCode.Value(f"REFUSAL_CODE_{code}"))
