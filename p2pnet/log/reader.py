"""Reads a log on peers: which entries are decided, as far as its keepers know. A pure core.

What one keeper says is enough to believe that an entry is decided, because the
keepers' votes prove it (`proof`); so a liar cannot lengthen the log. He could
shorten it, by telling less than he knows. Therefore a read ends when a majority
of the newest slot's keepers have told all that they know: one of them has voted
for every entry that could stand before that slot.

What a read may miss is an entry that was decided but of which no keeper that
answers has heard yet: its proposer is only now telling them, or has died. This is
harmless. Who appends then meets it (the votes are there), and who wants to know
whether a given slot is decided asks for it with `at_least` and waits a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pnet.core import Tick
from p2pnet.dht.manifest import check_keepers
from p2pnet.errors import ForgedError, RemoteError
from p2pnet.keys import short
from p2pnet.log.history import History
from p2pnet.log.proof import majority, take_decided
from p2pnet.log.room import BYTES_MAX
from p2pnet.v1 import common_pb2, log_pb2

GRACE_S = 0.3  # for who knows more than a majority, once a majority has answered
ROUNDS_MAX = 4
PAUSE_S = 0.1  # before the second round; it doubles with each
ROUND_TIMEOUT_S = 2.0
NAMED_MAX = 32  # peers that others have named as keepers, and that are asked


@dataclass(frozen=True, slots=True)
class Begin:
    """Starts reading."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A keeper's answer to an `Ask`."""

    keeper: str
    reply: log_pb2.ReadLogReply


@dataclass(frozen=True, slots=True)
class Missed:
    """A keeper did not answer an `Ask`, or refused."""

    keeper: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to one keeper; answered by `Answered` or `Missed`."""

    keeper: str
    request: log_pb2.ReadLogRequest


@dataclass(frozen=True, slots=True)
class Found:
    """The next decided entry, proved; it is in the history already."""

    slot: int
    entry: common_pb2.Signed
    proof: log_pb2.Proof


@dataclass(frozen=True, slots=True)
class Done:
    """A majority of the newest keepers has told all that it knows."""


@dataclass(frozen=True, slots=True)
class Failed:
    """No majority answers, or the slot asked for is not decided as far as they know."""

    reason: str


Event = Begin | Answered | Missed | Tick
Effect = Ask | Found | Done | Failed


class LogReader:
    """Extends `history` by what its log's keepers prove.

    Args:
        history: what is known already; extended in place, and true even after `Failed`.
        first: the keepers of slot 1, as the manifest names them.
        hints: others who may know more: newer keepers, as records or members say.
        at_least: the slot that has to be there; 0: whatever there is.
    """

    def __init__(
        self,
        history: History,
        *,
        first: Sequence[str],
        hints: Sequence[str] = (),
        at_least: int = 0,
        rounds_max: int = ROUNDS_MAX,
    ) -> None:
        if not first:
            raise ValueError("this network's log is in a store, not on peers")
        self._history = history
        self._first = tuple(first)
        self._hints = tuple(hints)
        self._at_least = at_least
        self._rounds_left = rounds_max
        self._pause_s = PAUSE_S
        self._asked: dict[str, int] = {}  # whose answers are awaited -> from which slot on
        self._told: dict[str, None] = {}  # who has told all, in this round
        self._no: dict[str, str] = {}
        self._teller = ""  # who has told us last what we did not know
        self._later: dict[str, None] = {}  # who may know more, but told what we knew
        self._grace: float | None = None  # when we wait no more, having a majority
        self._round_ends = 0.0
        self._resumes: float | None = None  # between two rounds
        self._named = 0
        self._done = False

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Takes an answer or the time; after Done or Failed it stays silent."""
        if self._done:
            return []
        if isinstance(event, Begin):
            return self._begin_round(now)
        if isinstance(event, Tick):
            if self._resumes is not None:
                return self._begin_round(now) if now >= self._resumes else []
            if now < self._round_ends:
                return self._judge(now)
            self._no |= dict.fromkeys(self._asked, "no answer")
            self._asked = {}
            return [*self._ask_later(now), *self._judge(now)]
        if event.keeper not in self._asked:
            return []  # late, or unasked
        from_slot = self._asked.pop(event.keeper)
        if isinstance(event, Missed):
            self._no[event.keeper] = event.reason
            return [*self._ask_later(now), *self._judge(now)]
        effects = self._take(event.keeper, from_slot, event.reply, now)
        return [*effects, *self._ask_later(now), *self._judge(now)]

    def deadline(self) -> float | None:
        """When the grace, the round, or the wait between two is over."""
        if self._done:
            return None
        if self._resumes is not None:
            return self._resumes
        return self._round_ends if self._grace is None else min(self._grace, self._round_ends)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert self._rounds_left >= 0
        assert not any(keeper in self._told for keeper in self._asked)

    def _keepers(self) -> tuple[str, ...]:
        """Of the next slot."""
        return self._history.keepers or self._first

    def _begin_round(self, now: float) -> list[Effect]:
        self._rounds_left -= 1
        self._asked, self._told, self._no, self._later = {}, {}, {}, {}
        self._grace = self._resumes = None
        self._round_ends = now + ROUND_TIMEOUT_S
        return self._ask(dict.fromkeys((*self._keepers(), *self._hints)))

    def _ask(self, keepers: dict[str, None]) -> list[Effect]:
        asks: list[Effect] = []
        for keeper in keepers:
            self._asked[keeper] = self._history.next_slot
            request = log_pb2.ReadLogRequest(
                network_id=self._history.network_id, from_slot=self._history.next_slot
            )
            asks.append(Ask(keeper, request))
        return asks

    def _take(
        self, keeper: str, from_slot: int, reply: log_pb2.ReadLogReply, now: float
    ) -> list[Effect]:
        if reply.keepers:
            return self._take_hint(keeper, reply.keepers)
        if not reply.entries:
            self._told[keeper] = None
            return []
        history = self._history
        found: list[Effect] = []
        try:
            if len(reply.proofs) != len(reply.entries):
                raise ForgedError("it gives no proofs")
            for slot, signed in enumerate(reply.entries, start=from_slot):
                if slot < history.next_slot:
                    continue  # another has told us meanwhile
                proof = reply.proofs[slot - from_slot]
                if history.size_bytes + len(signed.payload) > BYTES_MAX:
                    raise ForgedError("it is longer than any log may be")
                take_decided(signed, proof, history)
                found.append(Found(slot, signed, proof))
        except RemoteError as error:
            self._no[keeper] = str(error)
            return found
        if not found:
            self._later[keeper] = None
            return []
        # It may know more; and an entry may have named new keepers.
        self._teller = keeper
        self._round_ends = now + ROUND_TIMEOUT_S
        unheard = [who for who in self._keepers() if not self._is_heard(who)]
        return [*found, *self._ask(dict.fromkeys((keeper, *unheard)))]

    def _take_hint(self, keeper: str, named: Sequence[str]) -> list[Effect]:
        """It keeps the log no longer, and says who does: nothing but a hint where to ask."""
        self._no[keeper] = "keeps it no longer"
        try:
            check_keepers(named)
        except RemoteError as error:
            self._no[keeper] = str(error)
            return []
        unheard = [who for who in named if not self._is_heard(who)][: NAMED_MAX - self._named]
        self._named += len(unheard)
        return self._ask(dict.fromkeys(unheard))

    def _ask_later(self, now: float) -> list[Effect]:
        """Who was behind the teller is asked when he has told all: a long log comes once."""
        if not self._later or self._teller in self._asked:
            return []
        later, self._later = self._later, {}
        self._round_ends = now + ROUND_TIMEOUT_S
        return self._ask(later)

    def _is_heard(self, keeper: str) -> bool:
        return any(keeper in them for them in (self._asked, self._told, self._no, self._later))

    def _judge(self, now: float) -> list[Effect]:
        keepers = self._keepers()
        told = sum(1 for keeper in keepers if keeper in self._told)
        there = self._history.next_slot > self._at_least
        if told >= majority(keepers) and there:
            if self._grace is None:
                self._grace = now + GRACE_S
            if now < self._grace and self._asked and not self._at_least:
                return []
            self._done = True
            return [Done()]
        if there and self._at_least:  # proved: no more has to be known
            self._done = True
            return [Done()]
        if self._asked:
            return []
        if self._rounds_left:
            self._resumes = now + self._pause_s
            self._pause_s *= 2
            return []
        self._done = True
        if told >= majority(keepers):
            return [Failed(f"slot {self._at_least} of the log is not decided")]
        reasons = "; ".join(f"{short(keeper)}: {why}" for keeper, why in sorted(self._no.items()))
        return [
            Failed(
                f"the log cannot be read: {told} of {len(keepers)} keepers answer, "
                f"and it takes {majority(keepers)} ({reasons})"
            )
        ]
