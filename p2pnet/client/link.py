"""Which orchestrator a training run talks to. Pure; a part of `p2pnet.client.feed`.

A run keeps to one orchestrator for as long as it is there and has the newest epoch. When its
stream ends, is refused or stays silent, the link looks for whoever orchestrates the network
now, and never goes back to one of an older epoch than it has seen.
"""

from __future__ import annotations

from p2pnet.client.events import (
    CloseStream,
    Effect,
    FindOrchestrator,
    OpenStream,
    OrchestratorFound,
    Say,
)
from p2pnet.errors import UnreachableError
from p2pnet.keys import short
from p2pnet.v1 import common_pb2

OPEN_S = 15.0  # for a stream to be let in
RETRY_S = 0.5  # between two tries to find the orchestrator; it doubles up to ...
RETRY_MAX_S = 4.0
SILENT_S = 45.0  # on an open stream: see whether the network has another orchestrator
ORCHESTRATOR_GONE_S = 600.0  # without a word of any: give up
BEGIN_S = 120.0  # the same, for a run that has not begun yet
SAY_S = 2.0  # a wait that is longer is worth a word
REASON_CHARS_MAX = 500

# What it says who is not the network's orchestrator, not any more, or is about to go.
LOOK_FURTHER = (
    common_pb2.REFUSAL_CODE_STALE_EPOCH,
    common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK,
    common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH,
    common_pb2.REFUSAL_CODE_NOT_GRANTED,
    common_pb2.REFUSAL_CODE_DRAINING,
)


class Link:
    """The stream to the orchestrator of the network that people call `name`."""

    def __init__(self, name: str) -> None:
        self.peer = ""
        self.stream = 0  # numbers grow; 0: there was none
        self.up = False  # a stream is open, or being opened
        self.ready = False  # the orchestrator takes batches
        self.epoch = 0  # of the last `ready`
        self.why = ""  # we wait: the last that went wrong
        self._name = name
        self._floor = 0  # no orchestrator of an older epoch is talked to
        self._open_by: float | None = None
        self._finding = False
        self._find_at: float | None = None
        self._asked_at: float | None = None
        self._retry_s = RETRY_S
        self._hinted = False  # the present stream is to whom another orchestrator named
        self._waiting_since: float | None = None  # for `ready`
        self._heard = False  # a word on the present stream
        self._heard_at = 0.0
        self._said = False

    # What happens

    def found(self, found: OrchestratorFound, now: float, effects: list[Effect]) -> None:
        """The answer to a `FindOrchestrator`, or the beginning."""
        self._finding = False
        newer = found.epoch > max(self.epoch, self._floor - 1)
        # A record may lag behind the claims of the very peer that we have been with.
        same = found.peer == self.peer and self._floor <= self.epoch
        if self.up and found.peer != self.peer and newer:
            self.hang_up("another peer orchestrates it now", now, effects)
            self._open(found.peer, now, effects)
        elif self.up:
            self._find_at = now + SILENT_S
        elif same or newer or found.epoch >= self._floor:
            self._hinted = False
            self._open(found.peer, now, effects)
        else:
            self.why = f"only one of an older epoch is to be found, {short(found.peer)}"
            self._find_later(now)

    def not_found(self, reason: str, now: float) -> None:
        """The other answer."""
        self._finding = False
        if self.up:
            self._find_at = now + SILENT_S
            return
        self.why = reason[:REASON_CHARS_MAX]
        self._find_later(now)

    def opened(self, now: float) -> None:
        """The stream is let in."""
        self._open_by = None
        self._find_at = now + SILENT_S

    def word(self, now: float) -> None:
        """The orchestrator has said something other than no."""
        self.opened(now)
        self._heard, self._heard_at = True, now

    def accept(self, epoch: int, now: float, effects: list[Effect]) -> bool:
        """It is ready, under that epoch; False, and the stream is closed, if that is an old one."""
        if epoch < self._floor:
            self.hang_up(f"{short(self.peer)} is still at an older epoch", now, effects)
            return False
        self.epoch = self._floor = epoch
        self.ready = True
        if self._said:
            effects.append(Say(f"{short(self.peer)} orchestrates {self._name}: going on"))
        self._waiting_since, self._said, self.why = None, False, ""
        self._retry_s = RETRY_S
        return True

    def unready(self, reason: str, now: float) -> None:
        """It takes no batches for now."""
        self.ready = False
        self.why = reason
        if self._waiting_since is None:
            self._waiting_since = now

    def left(self, why: str, peer: str, now: float, effects: list[Effect]) -> None:
        """The one that we talk to does not orchestrate it; but `peer`, if it says so."""
        before = self.peer
        self.hang_up(why, now, effects)
        if peer not in ("", before) and not self._hinted:
            self._hinted = True
            self._open(peer, now, effects)

    def superseded(self) -> None:
        """The orchestrator has lost the claim that we were at to somebody."""
        if self.epoch:
            self._floor = self.epoch + 1

    def hint(self, now: float) -> None:
        """Somebody says that there is a newer epoch: worth a look, and nothing more."""
        if self._asked_at is None or now >= self._asked_at + RETRY_MAX_S:
            self._find_at = now

    def lost(self, reason: str, now: float) -> None:
        """The stream has ended."""
        self.unready(reason[:REASON_CHARS_MAX], now)
        self.up = self._heard = False
        self._open_by = None
        self._find_later(now)

    def hang_up(self, reason: str, now: float, effects: list[Effect]) -> None:
        """Ends the stream, and looks further."""
        effects.append(CloseStream(self.stream))
        self.lost(reason, now)

    def reopen(self, now: float, effects: list[Effect]) -> None:
        """A new stream to the same orchestrator, instead of the present one."""
        self.hang_up("it is asked for another run", now, effects)
        self._open(self.peer, now, effects)

    # Time

    def tick(self, waiting: bool, now: float, effects: list[Effect]) -> None:
        """Does what is due; `waiting`: something is expected of the orchestrator.

        Raises:
            UnreachableError: there is no orchestrator for too long.
        """
        if self._open_by is not None and now >= self._open_by:
            self.hang_up(f"{short(self.peer)} does not answer", now, effects)
        if self._find_at is not None and now >= self._find_at and not self._finding:
            if self.up and not waiting:
                self._find_at = now + SILENT_S
            else:
                self._find_at, self._finding, self._asked_at = None, True, now
                effects.append(FindOrchestrator())
        gone_at, say_at = self._gone_at(), self._say_at()
        if gone_at is not None and now >= gone_at:
            raise UnreachableError(
                f"the orchestrator of {self._name} is gone, and no other has taken its place "
                f"for {self._limit_s:g} s: {self.why}"
            )
        if say_at is not None and now >= say_at:
            self._said = True
            limit = "" if gone_at is None else f", for up to {self._limit_s:g} s"
            effects.append(Say(f"waiting for an orchestrator of {self._name}{limit}: {self.why}"))

    def deadlines(self) -> list[float]:
        """When `tick` has something to do."""
        find_at = None if self._finding else self._find_at
        times = (self._open_by, find_at, self._gone_at(), self._say_at())
        return [time for time in times if time is not None]

    @property
    def _limit_s(self) -> float:
        return ORCHESTRATOR_GONE_S if self.epoch else BEGIN_S

    def _gone_at(self) -> float | None:
        """An orchestrator that has said something on an open stream is there, whatever it does."""
        if self._waiting_since is None or self._heard:
            return None
        return max(self._waiting_since, self._heard_at) + self._limit_s

    def _say_at(self) -> float | None:
        if self._waiting_since is None or self._said:
            return None
        return self._waiting_since + SAY_S

    def _open(self, peer: str, now: float, effects: list[Effect]) -> None:
        self.unready(self.why or f"{short(peer)} has not answered yet", now)
        self.peer = peer
        self.stream += 1
        self.up = True
        self._open_by = now + OPEN_S
        self._find_at = None
        effects.append(OpenStream(self.stream, peer))

    def _find_later(self, now: float) -> None:
        self._find_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, RETRY_MAX_S)
