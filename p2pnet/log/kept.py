"""One log as a keeper holds it, on disk too, and what is left of one that it gave up. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2pnet.errors import RefusedError
from p2pnet.log.history import History, deciders_of_last
from p2pnet.log.proof import BallotKey, take_decided
from p2pnet.v1 import common_pb2, kept_pb2, log_pb2

NEEDED = 4


@dataclass(slots=True)
class KeptLog:
    """A log, and the acceptor of its next slot."""

    history: History
    proofs: list[log_pb2.Proof] = field(default_factory=list)  # one an entry
    promised: BallotKey | None = None
    accepted: BallotKey | None = None
    entry: common_pb2.Signed | None = None  # what was accepted
    used_at: float | None = None  # when it last changed; None: before this process

    @property
    def size_bytes(self) -> int:
        """Of all entries, decided or not."""
        return self.history.size_bytes + (len(self.entry.payload) if self.entry else 0)

    def decide(self, signed: common_pb2.Signed, proof: log_pb2.Proof) -> None:
        """Takes the next decided entry; raises as `proof.check_decided`, and changes nothing."""
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

    def use(self, me: str) -> int:
        """Of how much use it is to have it here; what is below `NEEDED` may go.

        0: promises alone. 1: closed. 2: others keep it, and have shown that they do: a
        majority of them has decided a slot, and so has all slots before it. 3: an entry
        that nobody has decided.
        """
        history = self.history
        if not history.entries:
            return 0 if self.entry is None else 3
        if history.closing is not None:
            return 1
        if me in history.keepers or me in deciders_of_last(history):
            return NEEDED
        return 2


@dataclass(frozen=True, slots=True)
class Gone:
    """What a keeper remembers of a log that it has given up.

    Attributes:
        next_slot: it takes no part in any slot before this one, ever again.
        keepers: who kept the log then.
    """

    next_slot: int
    keepers: tuple[str, ...] = ()
    closed: bool = False

    @classmethod
    def of(cls, log: KeptLog, before: Gone | None) -> Gone:
        """What is left of `log`; `before`: of the last time that it was given up."""
        history = log.history
        # Of a log without entries the slot that is open is given up: something may have
        # been decided there with this keeper's vote.
        next_slot = max(2, history.next_slot)
        if before is not None and before.next_slot > next_slot:
            return before
        return cls(next_slot, history.keepers, history.closing is not None)

    @classmethod
    def parse(cls, data: bytes) -> Gone:
        """Raises DecodeError."""
        kept = kept_pb2.KeptGone.FromString(data)
        return cls(kept.next_slot, tuple(kept.keepers), kept.closed)

    def record(self) -> bytes:
        """The durable form."""
        kept = kept_pb2.KeptGone(next_slot=self.next_slot, keepers=self.keepers, closed=self.closed)
        return kept.SerializeToString(deterministic=True)


def decided_record(signed: common_pb2.Signed, proof: log_pb2.Proof) -> bytes:
    """The durable state of a slot that is decided."""
    record = log_pb2.PrepareReply(decided=True, entry=signed, proof=proof)
    return record.SerializeToString(deterministic=True)


def to_ballot(key: BallotKey) -> log_pb2.Ballot:
    """A ballot as it travels."""
    return log_pb2.Ballot(round=key[0], proposer=key[1])


def to_key(ballot: log_pb2.Ballot) -> BallotKey:
    """A ballot as it is compared."""
    return ballot.round, ballot.proposer


def refused_gone(gone: Gone) -> RefusedError:
    """The answer about a log that was given up."""
    if gone.closed:
        return refused("CLOSED", "the network's owner has ended it, and its log is gone here")
    return refused("NOT_HOSTED", "this peer does not keep that slot any more")


def refused(code: str, detail: str) -> RefusedError:
    """A keeper's refusal; `code` without its prefix."""
    return RefusedError(detail, code=common_pb2.RefusalCode.Value(f"REFUSAL_CODE_{code}"))
