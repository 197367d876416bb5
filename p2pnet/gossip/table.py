"""The members that this node knows, and what it holds each of them to be. Pure.

There is no agreed view (unlike in Rapid, Suresh et al., ATC 2018): each node
counts the accusations of those that are near enough to the subject on the ring
as the node itself sees it, so that two nodes' views may differ by a few members
and still come to the same verdict.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from p2pnet.gossip.events import GossipConfig, Member, MemberChanged, State
from p2pnet.net.groups import GroupOf
from p2pnet.gossip.ring import Ring
from p2pnet.gossip.statements import OpenAccusation, OpenAdvert

_SAMPLE_LISTS_UP_TO = 64


@dataclass(slots=True)
class _Entry:
    advert: OpenAdvert
    state: State
    since: float
    accusations: dict[str, OpenAccusation] = field(default_factory=dict)  # by accuser


class Table:
    """Members by peer id. `me` is this node, whose own accusations count like others'."""

    def __init__(self, me: str, config: GossipConfig, group_of: GroupOf) -> None:
        self.me = me
        self._config = config
        self._group_of = group_of
        self._entries: dict[str, _Entry] = {}  # the longest unchanged first
        self._accused: dict[str, None] = {}  # live members that somebody accuses
        self._ring = Ring()  # every member, whatever its state
        self._seen_at: dict[str, str] = {}
        self._live = 0
        self._subjects: list[str] | None = None  # until who is live changes

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def live(self) -> int:
        """How many members are alive or suspect, this node included."""
        return self._live

    def get(self, peer_id: str) -> Member | None:
        """One member, or None."""
        entry = self._entries.get(peer_id)
        return Member(peer_id, entry.state, entry.advert, entry.since) if entry else None

    def newest(self) -> Iterator[Member]:
        """All members, the last changed first."""
        for peer_id, entry in reversed(self._entries.items()):
            yield Member(peer_id, entry.state, entry.advert, entry.since)

    def slice(self, start: int) -> Iterator[Member]:
        """All members in the ring's order, from an index on."""
        for step in range(len(self._ring)):
            peer_id = self._ring.at((start + step) % len(self._ring))
            entry = self._entries[peer_id]
            yield Member(peer_id, entry.state, entry.advert, entry.since)

    def accusations(self, peer_id: str) -> tuple[OpenAccusation, ...]:
        """Those of a member's present incarnation that this node holds."""
        entry = self._entries.get(peer_id)
        return tuple(entry.accusations.values()) if entry else ()

    def seen(self, peer_id: str, addr: str) -> None:
        """Where a connected peer was observed to be, for its IP group."""
        if addr:
            self._seen_at[peer_id] = addr

    def unseen(self, peer_id: str) -> None:
        """The connection went; where a member was seen is kept as long as the member."""
        if peer_id not in self._entries:
            self._seen_at.pop(peer_id, None)

    def observers(self, peer_id: str) -> list[str]:
        """The live members that watch a member: the K that follow it on the ring."""
        return self._near(self._ring.after(peer_id))

    def subjects(self) -> list[str]:
        """The live members that this node watches: the K that go before it."""
        if self._subjects is None:
            known = self.me in self._entries
            self._subjects = self._near(self._ring.before(self.me)) if known else []
        return self._subjects

    def sample(self, rng: random.Random, count: int, *states: State) -> list[str]:
        """Up to `count` different members of these states, at random; never this node."""
        if len(self._ring) <= _SAMPLE_LISTS_UP_TO:
            fitting = [p for p in map(self._ring.at, range(len(self._ring))) if self._is(p, states)]
            return rng.sample(fitting, min(count, len(fitting)))
        picked: list[str] = []
        for _ in range(8 * count):
            peer_id = self._ring.at(rng.randrange(len(self._ring)))
            if len(picked) < count and self._is(peer_id, states) and peer_id not in picked:
                picked.append(peer_id)
        return picked

    def take_advert(self, advert: OpenAdvert, now: float) -> list[MemberChanged] | None:
        """Takes an advert; returns what changed by it, None if it is no news."""
        entry = self._entries.get(advert.peer_id)
        if entry is None:
            return self._add(advert, now) if self._room() else None
        if advert.order <= entry.advert.order:
            return None
        if advert.incarnation > entry.advert.incarnation:  # refutes, or started anew
            entry.accusations.clear()
            self._accused.pop(advert.peer_id, None)
            verdict = State.ALIVE
        else:
            verdict = entry.state
        entry.advert = advert
        change = self._set(advert.peer_id, State.LEFT if advert.left else verdict, now)
        return [change, *self._settle(now)]

    def take_accusation(self, accusation: OpenAccusation, now: float) -> list[MemberChanged] | None:
        """Takes an accusation; returns what changed by it, None if it is no news or no right."""
        entry = self._entries.get(accusation.subject)
        if (
            entry is None
            or not entry.state.live
            or accusation.subject == self.me
            or accusation.incarnation != entry.advert.incarnation
            or len(entry.accusations) >= 4 * self._config.observers
            or accusation.accuser not in self._may_accuse(accusation.subject)
        ):
            return None
        held = entry.accusations.get(accusation.accuser)
        if held is not None and (held.failed or not accusation.failed):
            return None
        entry.accusations[accusation.accuser] = accusation
        self._accused[accusation.subject] = None
        return self._settle(now)

    def forget(self, before: float) -> list[str]:
        """Drops the members that left or failed before a time; returns them."""
        gone = [p for p, e in self._entries.items() if not e.state.live and e.since < before]
        for peer_id in gone:
            self._drop(peer_id)
        return gone

    def check(self) -> None:
        """Raises AssertionError if the table contradicts itself."""
        assert len(self._ring) == len(self._entries) <= self._config.members_max
        kept, self._subjects = self._subjects, None
        assert kept is None or kept == self.subjects()
        assert self._live == sum(entry.state.live for entry in self._entries.values())
        for peer_id, entry in self._entries.items():
            assert entry.advert.peer_id == peer_id
            assert entry.advert.left == (entry.state is State.LEFT)
            assert len(entry.accusations) <= 4 * self._config.observers
            for accusation in entry.accusations.values():
                assert accusation.incarnation == entry.advert.incarnation
            assert (peer_id in self._accused) == bool(entry.state.live and entry.accusations)

    def _is(self, peer_id: str, states: tuple[State, ...]) -> bool:
        return peer_id != self.me and self._entries[peer_id].state in states

    def _near(self, walk: Iterator[str]) -> list[str]:
        near: list[str] = []
        for peer_id in walk:
            if self._entries[peer_id].state.live:
                near.append(peer_id)
                if len(near) == self._config.observers:
                    break
        return near

    def _may_accuse(self, subject: str) -> list[str]:
        # Those within our own 2K nearest live observers (DESIGN D7), and the
        # failed and left ones between them: what they said while they were here
        # stands, so that one who joins later comes to the same verdict.
        near: list[str] = []
        live = 0
        for peer_id in self._ring.after(subject):
            near.append(peer_id)
            live += self._entries[peer_id].state.live
            if live == 2 * self._config.observers:
                break
        return near

    def _group(self, peer_id: str) -> str:
        entry = self._entries[peer_id]
        addr = self._seen_at.get(peer_id) or next(iter(entry.advert.addrs), "")
        return self._group_of(peer_id, addr)

    def _quorum(self, subject: str) -> int:
        # Observers that we ourselves find failed cannot be waited for: the last
        # one of three would else never give the other two up.
        groups = {
            self._group(peer_id)
            for peer_id in self.observers(subject)
            if not self._find_failed(peer_id)
        }
        return max(1, min(self._config.quorum, len(groups)))

    def _find_failed(self, peer_id: str) -> bool:
        ours = self._entries[peer_id].accusations.get(self.me)
        return ours is not None and ours.failed

    def _verdict(self, subject: str, entry: _Entry) -> State:
        may = self._may_accuse(subject)
        accusations = [a for a in entry.accusations.values() if a.accuser in may]
        groups = {self._group(a.accuser) for a in accusations if a.failed}
        if len(groups) >= self._quorum(subject):
            return State.FAILED
        return State.SUSPECT if accusations else State.ALIVE

    def _settle(self, now: float) -> list[MemberChanged]:
        # A verdict changes who observes whom, and so may decide another.
        changes: list[MemberChanged] = []
        again = True
        while again:
            again = False
            for peer_id in tuple(self._accused):
                entry = self._entries[peer_id]
                verdict = self._verdict(peer_id, entry)
                if verdict is not entry.state:
                    changes.append(self._set(peer_id, verdict, now))
                    again = again or not verdict.live
        return changes

    def _set(self, peer_id: str, state: State, now: float) -> MemberChanged:
        entry = self._entries.pop(peer_id)
        self._entries[peer_id] = entry  # the last changed comes last
        old = entry.state
        self._count(state.live - old.live)
        if state is not old:
            entry.state, entry.since = state, now
        if not state.live:
            self._accused.pop(peer_id, None)
        return MemberChanged(peer_id, old, state, entry.advert)

    def _add(self, advert: OpenAdvert, now: float) -> list[MemberChanged]:
        state = State.LEFT if advert.left else State.ALIVE
        self._entries[advert.peer_id] = _Entry(advert, state, now)
        self._ring.add(advert.peer_id)
        self._count(state.live)
        return [MemberChanged(advert.peer_id, None, state, advert), *self._settle(now)]

    def _count(self, by: int) -> None:
        self._live += by
        if by:
            self._subjects = None

    def _room(self) -> bool:
        if len(self._entries) < self._config.members_max:
            return True
        oldest = next((p for p, e in self._entries.items() if not e.state.live), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def _drop(self, peer_id: str) -> None:
        self._count(-self._entries.pop(peer_id).state.live)
        self._ring.remove(peer_id)
        self._seen_at.pop(peer_id, None)
        self._accused.pop(peer_id, None)
