"""Who watches whom, as this node sees it. Pure.

A member is watched by the K live ones that follow it on the ring, one of each IP
group as far as there are so many: identities are free and can be ground until
they stand where one wants them, addresses are not.
"""

from __future__ import annotations

from collections.abc import Iterator

from p2pnet.gossip.events import GossipConfig
from p2pnet.gossip.ring import position
from p2pnet.gossip.roster import Roster
from p2pnet.net.groups import GroupOf

_REACH = 4  # of so many times as many members as are wanted, groups are told apart


class Watchers:
    """Observers and subjects by a roster. `me` is this node."""

    def __init__(self, me: str, config: GossipConfig, roster: Roster, group_of: GroupOf) -> None:
        self._me = me
        self._config = config
        self._roster = roster
        self._group_of = group_of
        self._seen_at: dict[str, str] = {}
        self._subjects: list[str] | None = None  # until who is live near us changes
        self._from: bytes | None = None  # they depend on nobody before this; None: on all

    def seen(self, peer_id: str, addr: str) -> None:
        """Where a connected peer was observed to be, for its IP group."""
        if addr and self._seen_at.get(peer_id) != addr:
            self._seen_at[peer_id] = addr
            self.changed(peer_id)

    def unseen(self, peer_id: str) -> None:
        """Forgets where a peer was."""
        self._seen_at.pop(peer_id, None)

    def changed(self, peer_id: str) -> None:
        """A member came, went, or is in another group."""
        if self._subjects is not None and self._matters(peer_id):
            self._subjects = None

    def group(self, peer_id: str) -> str:
        """The IP group of a member: where it was seen, else where it says that it is."""
        addr = self._seen_at.get(peer_id)
        if addr is None:
            entry = self._roster.get(peer_id)
            addr = entry.advert.addrs[0] if entry is not None and entry.advert.addrs else ""
        return self._group_of(peer_id, addr)

    def observers(self, peer_id: str) -> list[str]:
        """The live members that watch a member."""
        return self._nearest(peer_id, self._config.observers)[0]

    def subjects(self) -> list[str]:
        """The live members that this node watches, the nearest first."""
        if self._subjects is None:
            self._subjects = self._find_subjects()
        return self._subjects

    def may_accuse(self, subject: str) -> list[str]:
        """Whose accusations of a member count.

        Those within our own 2K nearest live observers, as two nodes' views differ a
        little, and the failed and left ones between them: what they said while they
        were here stands, so that one who learns of it later comes to the same verdict.
        """
        nearest, passed = self._nearest(subject, 2 * self._config.observers)
        between = [p for p in passed if not self._is_live(p)]
        return nearest + between

    def before(self, peer_id: str) -> Iterator[str]:
        """The members whose accusers may change with this one, the nearest first."""
        left = 2 * _REACH * self._config.observers
        for before in self._roster.ring.before(peer_id):
            yield before
            left -= self._is_live(before)
            if left == 0:
                break

    def check(self) -> None:
        """Raises AssertionError if the subjects kept are others than they would be now."""
        assert self._subjects is None or self._subjects == self._find_subjects()

    def _nearest(self, peer_id: str, count: int) -> tuple[list[str], list[str]]:
        """The nearest live ones, and everybody passed on the way."""
        picked: list[str] = []
        spare: list[str] = []
        passed: list[str] = []
        groups: set[str] = set()
        for other in self._roster.ring.after(peer_id):
            passed.append(other)
            if not self._is_live(other):
                continue
            group = self.group(other)
            (spare if group in groups else picked).append(other)
            groups.add(group)
            if len(picked) == count or len(picked) + len(spare) == _REACH * count:
                break
        return (picked + spare)[:count], passed

    def _find_subjects(self) -> list[str]:
        self._from = None
        if self._roster.get(self._me) is None:
            return []
        candidates: list[str] = []
        groups: set[str] = set()
        ours = self.group(self._me)
        for other in self._roster.ring.before(self._me):
            if len(groups) == self._config.observers and ours not in groups:
                # We are within K groups of each candidate, whoever stands behind us.
                self._from = position(other)
                return candidates
            if len(candidates) == _REACH * self._config.observers:
                break
            if self._is_live(other):
                candidates.append(other)
                groups.add(self.group(other))
        watched = (self._nearest(p, self._config.observers)[0] for p in candidates)
        return [p for p, watchers in zip(candidates, watched, strict=True) if self._me in watchers]

    def _matters(self, peer_id: str) -> bool:
        if self._from is None:
            return True
        at, to = position(peer_id), position(self._me)
        return self._from <= at <= to if self._from <= to else at >= self._from or at <= to

    def _is_live(self, peer_id: str) -> bool:
        entry = self._roster.get(peer_id)
        return entry is not None and entry.state.live
