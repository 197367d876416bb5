"""Gets one entry into one slot of a log on peers: the proposer. A pure core (DESIGN D6).

One round: ask the slot's keepers to promise a ballot; with a majority's promises
propose the entry that was accepted under the highest ballot that they report, or
our own where there is none; with a majority's acceptances it is decided. A round
that meets a higher ballot, silence or refusals ends, and another follows after a
random wait, up to a limit.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2pnet.core import Tick
from p2pnet.errors import RemoteError
from p2pnet.keys import short
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import History, check_entry, deciders_of_last, keepers_of_next
from p2pnet.log.keeper import BATCH_ENTRIES, ROUND_MAX, to_ballot, to_key
from p2pnet.log.proof import BallotKey, check_decided, check_vote, majority, prove
from p2pnet.v1 import common_pb2, log_pb2

ROUND_TIMEOUT_S = 2.0
BACKOFF_S = 0.05  # the mean wait after the first round; it doubles with each
BACKOFF_MAX_S = 2.0
ROUNDS_MAX = 12
LEARN_BYTES_MAX = 2 << 20

Request = log_pb2.PrepareRequest | log_pb2.AcceptRequest | log_pb2.LearnRequest


@dataclass(frozen=True, slots=True)
class Begin:
    """Starts the first round."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A keeper's answer to the last request of a `Send`."""

    keeper: str
    request: log_pb2.PrepareRequest | log_pb2.AcceptRequest
    reply: log_pb2.PrepareReply | log_pb2.AcceptReply


@dataclass(frozen=True, slots=True)
class Missed:
    """A keeper did not answer the last request of a `Send`, or refused it."""

    keeper: str
    request: log_pb2.PrepareRequest | log_pb2.AcceptRequest
    reason: str


@dataclass(frozen=True, slots=True)
class Send:
    """Requests to one keeper, each after the answer to the one before.

    The answer to a last Prepare or Accept comes back as `Answered` or `Missed`;
    answers to Learns do not matter.
    """

    keeper: str
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Decided:
    """The slot's entry. Where it is not `ours`, another proposer won the slot."""

    entry: common_pb2.Signed
    proof: log_pb2.Proof
    ours: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """No majority after all rounds. The entry may still be decided, by whoever tries next."""

    reason: str


Event = Begin | Answered | Missed | Tick
Effect = Send | Decided | Failed


class Proposer:
    """Drives the next slot of `history` until it is decided or the rounds are used up.

    `proofs`, by slot, are those of the history's entries, to teach keepers that lag. The
    history is read, never changed, and must not change meanwhile.
    """

    def __init__(
        self,
        me: str,
        history: History,
        entry: common_pb2.Signed,
        *,
        rng: random.Random,
        proofs: Mapping[int, log_pb2.Proof],
        round_timeout_s: float = ROUND_TIMEOUT_S,
        rounds_max: int = ROUNDS_MAX,
    ) -> None:
        """Raises MalformedError or ForgedError where the entry could not count."""
        self._me = me
        self._history = history
        self._entry = entry
        self._network_id = check_entry(entry, history).network_id
        self._slot = history.next_slot
        self._keepers = keepers_of_next(history, entry)
        if not self._keepers:
            raise ValueError("this network's log is in a store, not on peers")
        self._majority = majority(self._keepers)
        self._proofs = dict(proofs)
        self._rng = rng
        self._timeout_s = round_timeout_s
        self._rounds_left = rounds_max
        self._rounds = 0
        self._ballot: BallotKey = (0, me)
        self._seen = dict.fromkeys(self._keepers, 0)  # the highest round that each has told
        self._value: common_pb2.Signed | None = None  # proposed in this round; None: preparing
        self._yes: dict[str, log_pb2.PrepareReply | log_pb2.AcceptReply] = {}
        self._no: dict[str, str] = {}
        self._taught: dict[str, None] = {}
        self._waiting = False  # between two rounds
        self._deadline: float | None = None
        self._done = False

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Takes an answer or the time; after Decided or Failed it stays silent."""
        if self._done:
            return []
        if isinstance(event, Begin):
            return self._begin_round(now) if self._rounds == 0 else []
        if isinstance(event, Tick):
            if self._deadline is None or now < self._deadline:
                return []
            return self._begin_round(now) if self._waiting else self._end_round(now, "no answer")
        if event.keeper not in self._keepers:
            return []
        if isinstance(event, Answered) and isinstance(event.reply, log_pb2.PrepareReply):
            return self._on_prepare(event.keeper, event.request, event.reply, now)
        preparing = isinstance(event.request, log_pb2.PrepareRequest)
        if to_key(event.request.ballot) != self._ballot or preparing != (self._value is None):
            return []  # of a round or phase that is over
        if isinstance(event, Missed):
            return self._on_no(event.keeper, event.reason, now)
        return self._on_accept(event.keeper, event.reply, now)

    def deadline(self) -> float | None:
        """When the round, or the wait between two, is over."""
        return None if self._done else self._deadline

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert all(keeper in self._keepers for keeper in (*self._yes, *self._no))
        assert not any(keeper in self._no for keeper in self._yes)
        assert self._rounds_left >= 0

    # --- rounds ---

    def _begin_round(self, now: float) -> list[Effect]:
        if self._rounds_left == 0:
            return self._fail()
        self._rounds += 1
        self._rounds_left -= 1
        self._ballot = (max(self._ballot[0], self._round_of_a_majority()) + 1, self._me)
        self._value = None
        self._yes, self._no, self._taught = {}, {}, {}
        self._waiting = False
        self._deadline = now + self._timeout_s
        return [Send(keeper, (self._prepare(),)) for keeper in self._keepers]

    def _end_round(self, now: float, why: str) -> list[Effect]:
        for keeper in self._keepers:
            if keeper not in self._yes:
                self._no.setdefault(keeper, why)
        if self._rounds_left == 0:
            return self._fail()
        # Random waits that grow let one of several proposers through (as in Ethernet).
        mean_s = min(BACKOFF_S * 2 ** (self._rounds - 1), BACKOFF_MAX_S)
        self._waiting = True
        self._deadline = now + mean_s * self._rng.uniform(0.5, 1.5)
        return []

    def _fail(self) -> list[Effect]:
        self._done = True
        reasons = "; ".join(f"{short(keeper)}: {why}" for keeper, why in sorted(self._no.items()))
        return [
            Failed(
                f"slot {self._slot} of the log was not decided in {self._rounds} rounds: it takes "
                f"{self._majority} of {len(self._keepers)} keepers ({reasons})"
            )
        ]

    def _prepare(self) -> log_pb2.PrepareRequest:
        request = log_pb2.PrepareRequest(
            network_id=self._network_id, slot=self._slot, ballot=to_ballot(self._ballot)
        )
        if self._slot == 1:
            request.manifest.CopyFrom(parse_entry(self._entry).claim.manifest)
        return request

    # --- answers ---

    def _on_prepare(
        self,
        keeper: str,
        request: log_pb2.PrepareRequest | log_pb2.AcceptRequest,
        reply: log_pb2.PrepareReply,
        now: float,
    ) -> list[Effect]:
        if reply.decided:  # true whichever round it answers
            try:
                check_decided(reply.entry, reply.proof, self._history)
            except RemoteError as error:
                return self._on_no(keeper, f"its decided entry does not hold: {error}", now)
            return self._decided(reply.entry, reply.proof)
        self._see(keeper, reply.ballot)
        if to_key(request.ballot) != self._ballot or self._value is not None or self._waiting:
            return []
        if not reply.HasField("ballot"):
            # It has not heard of the slots before: tell it, and ask again, once a round.
            if keeper in self._taught:
                return self._on_no(keeper, "does not know the log", now)
            self._taught[keeper] = None
            unknown = self._history.entries[max(1, reply.next_slot) - 1 :]
            lessons = learn_requests(self._network_id, unknown, self._proofs)
            return [Send(keeper, (*lessons, self._prepare()))]
        if not reply.promised:
            return self._on_no(keeper, "has promised a higher ballot", now)
        if reply.HasField("accepted") and not self._holds(reply.entry):
            return self._on_no(keeper, "its accepted entry does not hold", now)
        self._no.pop(keeper, None)
        self._yes[keeper] = reply
        if len(self._yes) < self._majority:
            return []
        accepted = [
            (to_key(promise.accepted), promise.entry)
            for promise in self._yes.values()
            if isinstance(promise, log_pb2.PrepareReply) and promise.HasField("accepted")
        ]
        self._value = max(accepted, key=lambda pair: pair[0])[1] if accepted else self._entry
        self._yes, self._no = {}, {}
        proposal = log_pb2.AcceptRequest(
            network_id=self._network_id,
            slot=self._slot,
            ballot=to_ballot(self._ballot),
            entry=self._value,
        )
        return [Send(other, (proposal,)) for other in self._keepers]

    def _on_accept(
        self, keeper: str, reply: log_pb2.PrepareReply | log_pb2.AcceptReply, now: float
    ) -> list[Effect]:
        assert isinstance(reply, log_pb2.AcceptReply)
        assert self._value is not None
        self._see(keeper, reply.ballot)
        if not reply.accepted:
            return self._on_no(keeper, "has promised a higher ballot", now)
        ballot = to_ballot(self._ballot)
        try:
            check_vote(keeper, reply.vote, ballot, self._value)
        except RemoteError as error:
            return self._on_no(keeper, str(error), now)
        self._no.pop(keeper, None)
        self._yes[keeper] = reply
        if len(self._yes) < self._majority:
            return []
        votes = {
            voter: given.vote
            for voter, given in self._yes.items()
            if isinstance(given, log_pb2.AcceptReply)
        }
        return self._decided(self._value, prove(ballot, votes))

    def _on_no(self, keeper: str, why: str, now: float) -> list[Effect]:
        if self._waiting or keeper in self._yes:
            return []
        self._no[keeper] = why
        if len(self._keepers) - len(self._no) >= self._majority:
            return []
        return self._end_round(now, "no answer")

    def _decided(self, entry: common_pb2.Signed, proof: log_pb2.Proof) -> list[Effect]:
        self._done = True
        old = self._keepers
        new = [keeper for keeper in parse_entry(entry).keepers if keeper not in old]
        proofs = {**self._proofs, self._slot: proof}
        tail = learn_requests(self._network_id, [entry], proofs)
        everything = learn_requests(self._network_id, [*self._history.entries, entry], proofs)
        # Who kept it before hears that others do, and may give it up.
        former = [keeper for keeper in deciders_of_last(self._history) if keeper not in old]
        return [
            Decided(entry, proof, ours=entry.payload == self._entry.payload),
            *(Send(keeper, tail) for keeper in (*old, *former) if keeper not in new),
            *(Send(keeper, everything) for keeper in new),
        ]

    def _see(self, keeper: str, ballot: log_pb2.Ballot) -> None:
        if ballot.round < ROUND_MAX:
            self._seen[keeper] = max(self._seen[keeper], ballot.round)

    def _round_of_a_majority(self) -> int:
        """The lowest round that a majority has not gone beyond, as far as they tell.

        Not the highest round that anybody tells: one keeper that lies would drive all
        proposers to the end of all rounds, and the slot would never be decided.
        """
        return sorted(self._seen.values())[self._majority - 1]

    def _holds(self, entry: common_pb2.Signed) -> bool:
        """Whether a keeper's entry could count here; a keeper may lie."""
        try:
            check_entry(entry, self._history)
        except RemoteError:
            return False
        return True


def learn_requests(
    network_id: str,
    entries: Sequence[common_pb2.Signed],
    proofs: Mapping[int, log_pb2.Proof],
) -> tuple[log_pb2.LearnRequest, ...]:
    """Decided entries, in order, as messages of a bounded size (or of one entry).

    It ends before an entry without a proof, which nobody would believe.
    """
    requests: list[log_pb2.LearnRequest] = []
    size_bytes = 0
    for entry in entries:
        proof = proofs.get(parse_entry(entry).slot)
        if proof is None:
            break
        size_bytes += len(entry.payload)
        full = size_bytes > LEARN_BYTES_MAX or (
            bool(requests) and len(requests[-1].entries) == BATCH_ENTRIES
        )
        if not requests or full:
            requests.append(log_pb2.LearnRequest(network_id=network_id))
            size_bytes = len(entry.payload)
        requests[-1].entries.append(entry)
        requests[-1].proofs.append(proof)
    return tuple(requests)
