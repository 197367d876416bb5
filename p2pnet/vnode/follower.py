"""How far a host follows one network's log, and who waits to know more. Pure (DESIGN D6).

At most one read is under way. Who asks meanwhile waits for it, and for one more where
what he shows may have been decided only after it began. A long log takes longer than
a caller has patience: he is told so, and the read goes on for when he asks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2pnet.dht.manifest import open_manifest
from p2pnet.keys import short
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import placement_of
from p2pnet.v1 import common_pb2
from p2pnet.vnode.admission import Offer
from p2pnet.vnode.network import refusal
from p2pnet.vnode.standing import Standing, follow
from p2pnet.vnode.tenancy_events import (
    AllocateAsked,
    ClaimShown,
    DropAsked,
    ReadLog,
    ReadyAsked,
)

WAITING_MAX = 16  # for one network


@dataclass(frozen=True, slots=True)
class Call:
    """A call that may have to wait for a log, and until when it does so at most."""

    asked: AllocateAsked | ReadyAsked | DropAsked | ClaimShown
    until: float
    offer: Offer | None = None  # what has been examined, of an Allocate or Ready

    @property
    def claim(self) -> common_pb2.Signed | None:
        """The claim that it shows."""
        if isinstance(self.asked, AllocateAsked):
            return self.asked.request.claim
        return self.asked.claim if isinstance(self.asked, ClaimShown) else None


class Follower:
    """What is known of one network's log.

    Attributes:
        standing: how far it has been followed.
        manifest: the network's; None: as after a restart, until somebody shows it.
        claim: the newest, unless it is very large and was read before a restart.
        placement: VNode -> peer id, as that claim says.
        is_read: whether a read is under way.
        is_behind: whether a read has brought a part of the log and not its end, so that
            what is newest here need not be the newest.
    """

    def __init__(self, standing: Standing) -> None:
        self.standing = standing
        self.manifest: common_pb2.Signed | None = None
        self.claim: common_pb2.Signed | None = None
        self.placement: Mapping[str, str] = {}
        self.is_read = False
        self.is_behind = False
        self._waiting: list[Call] = []
        self._queued: list[Call] = []  # came after the read began

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert self.is_read or not (self._waiting or self._queued)
        assert len(self._waiting) + len(self._queued) <= WAITING_MAX
        assert self.manifest is not None or not self.is_read

    # Reading

    @property
    def is_full(self) -> bool:
        """Whether nobody else can wait."""
        return len(self._waiting) + len(self._queued) >= WAITING_MAX

    def begin_read(self, call: Call | None = None) -> ReadLog:
        """Starts a read, perhaps for a call: none is under way, and the manifest is known."""
        assert self.manifest is not None
        assert not self.is_read
        self.is_read = True
        if call is not None:
            self._waiting.append(call)
        standing = self.standing
        first = tuple(open_manifest(self.manifest).keepers)
        return ReadLog(
            standing.network_id,
            self.manifest,
            standing.slot + 1,
            standing.keepers if standing.slot else first,
            None if call is None else call.claim,
        )

    def queue(self, call: Call) -> None:
        """Has a call wait for the read that is under way, and try again after it."""
        self._queued.append(call)

    def take(self, entries: Sequence[common_pb2.Signed]) -> bool:
        """Follows the log on; whether what was here before counts no more.

        Raises:
            MalformedError, ForgedError: these are not the log's next entries.
        """
        assert self.manifest is not None
        self.standing, newest = follow(self.standing, self.manifest, entries)
        if newest is not None:
            self.claim, self.placement = newest, placement_of(parse_entry(newest).claim)
        return newest is not None or self.standing.closed

    def end_read(self) -> tuple[list[Call], list[Call]]:
        """The read is over: who was waiting for it, and who came after it began."""
        asked, queued = self._waiting, self._queued
        self._waiting, self._queued, self.is_read = [], [], False
        return asked, queued

    def overdue(self, now: float) -> list[Call]:
        """Takes out whom the read has kept waiting for too long."""
        late = [call for call in (*self._waiting, *self._queued) if now >= call.until]
        self._waiting = [call for call in self._waiting if now < call.until]
        self._queued = [call for call in self._queued if now < call.until]
        return late

    def deadline(self) -> float | None:
        """When somebody will have waited for too long."""
        return min((call.until for call in (*self._waiting, *self._queued)), default=None)

    # What is said by it

    def closed(self) -> common_pb2.Refusal:
        """The refusal of whatever is asked of a network that is over."""
        return refusal(
            common_pb2.REFUSAL_CODE_CLOSED,
            "the network's owner has ended it",
            epoch=self.standing.epoch,
        )

    def stale(self, host: str = "") -> common_pb2.Refusal:
        """The refusal of who is outdone; `host`: where he may go."""
        return refusal(
            common_pb2.REFUSAL_CODE_STALE_EPOCH,
            f"the network is at epoch {self.standing.epoch} under {short(self.standing.claimant)}",
            epoch=self.standing.epoch,
            host=host,
        )

    def unknown(self, epoch: int) -> common_pb2.Refusal:
        """The refusal of an epoch that the log does not have."""
        newest = self.standing.epoch
        has = f"its newest claim has epoch {newest}" if newest else "it has no claim"
        return refusal(
            common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH,
            f"the network's log has no claim of epoch {epoch}, as far as this peer knows: {has}",
            epoch=newest,
        )
