"""How this node judges a member that others accuse. Pure.

There is no agreed view (unlike in Rapid, Suresh et al., ATC 2018): each node
counts the accusations of those that are near enough to the subject on the ring
as the node itself sees it, so that two nodes' views may differ by a few members
and still come to the same verdict.

A quorum of accusers convicts. Where this node has seen for itself that the
accused is gone, that is the verdict; else the accused has as long as news take
to reach it, and its answer to come back, to refute (`refutation_s`).
"""

from __future__ import annotations

import math

from p2pnet.gossip.events import GossipConfig, State
from p2pnet.gossip.roster import Entry, Roster
from p2pnet.gossip.watchers import Watchers


class Judge:
    """Judges by a roster, and by the connections that broke. `me` is this node."""

    def __init__(self, me: str, config: GossipConfig, roster: Roster, watchers: Watchers) -> None:
        self._me = me
        self._config = config
        self._roster = roster
        self._watchers = watchers
        self._broken: dict[str, float] = {}  # when our connection to a peer broke, the first first

    def broken(self, peer_id: str, now: float) -> None:
        """Our connection to a member broke."""
        self.mended(peer_id)
        while self._broken and now - next(iter(self._broken.values())) > self._config.broken_s:
            del self._broken[next(iter(self._broken))]
        self._broken[peer_id] = now

    def mended(self, peer_id: str) -> None:
        """That a connection broke says nothing any more."""
        self._broken.pop(peer_id, None)

    def stalled(self) -> None:
        """We were not there: it was we who were given up."""
        self._broken.clear()

    def verdict(self, subject: str, entry: Entry, now: float) -> tuple[State, float | None]:
        """What an accused member is held to be, and until when a convict may refute."""
        may = self._watchers.may_accuse(subject)
        voices = [a for a in entry.accusations if a.accuser in may]
        groups = {self._watchers.group(a.accuser) for a in voices if a.failed}
        if len(groups) < self._quorum(subject):
            return (State.SUSPECT if voices else State.ALIVE), None
        until = now + self.window_s() if entry.refutes_until is None else entry.refutes_until
        if self._seen_gone(subject, now) or now >= until:
            return State.FAILED, None
        return State.SUSPECT, until

    def window_s(self) -> float:
        """How long a convict has to refute."""
        # An epidemic reaches all of n in O(log n) rounds (Demers et al., PODC 1987).
        return self._config.refutation_s * math.log2(self._roster.live + 1)

    def _quorum(self, subject: str) -> int:
        # Observers that we ourselves find failed cannot be waited for: the last
        # one of three would else never give the other two up.
        groups = {
            self._watchers.group(peer_id)
            for peer_id in self._watchers.observers(subject)
            if not self._found_failed(peer_id)
        }
        return max(1, min(self._config.quorum, len(groups)))

    def _found_failed(self, peer_id: str) -> bool:
        entry = self._roster.get(peer_id)
        accusations = entry.accusations if entry is not None else ()
        return any(a.failed and a.accuser == self._me for a in accusations)

    def _seen_gone(self, peer_id: str, now: float) -> bool:
        broken_at = self._broken.get(peer_id)
        recently = (
            broken_at is not None
            and now - broken_at <= self._config.broken_s
            and self._roster.live <= self._config.broken_members_max
        )
        return recently or self._found_failed(peer_id)
