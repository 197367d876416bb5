"""The members that a node knows, each with what is held of it. Pure.

A roster may start from another one that many share and nobody changes any more:
then it keeps only what is different, so that a simulator can hold 10,000 rosters
of 10,000 members.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from p2pnet.gossip.digests import Digests
from p2pnet.gossip.events import Member, State
from p2pnet.gossip.ring import Ring, points_of
from p2pnet.gossip.statements import OpenAccusation, OpenAdvert

_SAMPLE_LISTS_UP_TO = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """What is held of one member. `accusations` are of its present incarnation."""

    advert: OpenAdvert
    state: State
    since: float
    accusations: tuple[OpenAccusation, ...] = ()
    refutes_until: float | None = None  # enough accuse it, and this is how long it may refute


class Roster:
    """Entries by peer id, on a ring, with their digests."""

    def __init__(self, base: Roster | None = None) -> None:
        self._base = base
        self._entries: dict[str, Entry] = {}
        self._dropped: set[str] = set()  # of the base
        self._gone: dict[str, None] = {}  # who left or failed, the first first
        self._live = base.live if base else 0
        self.ring: Ring = Ring(base.ring.base if base else ())
        self.digests: Digests = Digests(self._content, base.digests if base else None)

    @classmethod
    def shared(cls, adverts: Iterable[OpenAdvert], since: float) -> Roster:
        """A base for others: these members, all of them alive."""
        roster = cls()
        roster._entries = {a.peer_id: Entry(a, State.ALIVE, since) for a in adverts}
        roster._live = len(roster._entries)
        roster.ring = Ring(points_of(list(roster._entries)))
        return roster

    def __len__(self) -> int:
        return len(self.ring)

    @property
    def live(self) -> int:
        """How many members are alive or suspect."""
        return self._live

    def get(self, peer_id: str) -> Entry | None:
        """What is held of a member, or None."""
        entry = self._entries.get(peer_id)
        if entry is None and self._base is not None and peer_id not in self._dropped:
            return self._base.get(peer_id)
        return entry

    def member(self, peer_id: str) -> Member | None:
        """The same, as others are told."""
        entry = self.get(peer_id)
        return Member(peer_id, entry.state, entry.advert, entry.since) if entry else None

    def members(self) -> Iterator[Member]:
        """All of them, in the ring's order."""
        for peer_id in self.ring.all():
            member = self.member(peer_id)
            assert member is not None
            yield member

    def put(self, peer_id: str, entry: Entry) -> None:
        """Holds this of a member from now on."""
        old = self.get(peer_id)
        if old is None:
            self.ring.add(peer_id)
            self._dropped.discard(peer_id)
        self._entries[peer_id] = entry
        self._live += entry.state.live - (old is not None and old.state.live)
        if entry.state.live:
            self._gone.pop(peer_id, None)
        elif old is None or old.state is not entry.state:
            self._gone.pop(peer_id, None)
            self._gone[peer_id] = None
        self.digests.changed(peer_id)

    def drop(self, peer_id: str) -> None:
        """Forgets a member."""
        entry = self.get(peer_id)
        assert entry is not None
        self.ring.remove(peer_id)
        self._entries.pop(peer_id, None)
        self._gone.pop(peer_id, None)
        if self._base is not None and self._base.get(peer_id) is not None:
            self._dropped.add(peer_id)
        self._live -= entry.state.live
        self.digests.changed(peer_id)

    def longest_gone(self) -> str | None:
        """Who left or failed before all others that did."""
        return next(iter(self._gone), None)

    def sample(self, rng: random.Random, count: int, me: str, *states: State) -> list[str]:
        """Up to `count` different members of these states, at random; never `me`."""
        if State.FAILED in states and len(self._gone) < len(self) // 4:
            # So few that drawing from all would not find them.
            few = [p for p in self._gone if self._is(p, me, states)]
            return rng.sample(few, min(count, len(few)))
        if len(self) <= _SAMPLE_LISTS_UP_TO:
            fitting = [p for p in self.ring.all() if self._is(p, me, states)]
            return rng.sample(fitting, min(count, len(fitting)))
        picked: list[str] = []
        for _ in range(8 * count):
            peer_id = self.ring.pick(rng)
            if peer_id is not None and peer_id not in picked and self._is(peer_id, me, states):
                picked.append(peer_id)
                if len(picked) == count:
                    break
        return picked

    def live_within(self, depth: int, index: int) -> list[tuple[str, Entry]]:
        """The live members of one of 2**depth buckets of the ring, in order."""
        found = []
        for peer_id in self.ring.within(depth, index):
            entry = self.get(peer_id)
            if entry is not None and entry.state.live:
                found.append((peer_id, entry))
        return found

    def check(self) -> None:
        """Raises AssertionError if the roster contradicts itself; looks at all of it."""
        entries = {peer_id: self.get(peer_id) for peer_id in self.ring.all()}
        assert len(entries) == len(self)
        assert sum(e is not None and e.state.live for e in entries.values()) == self._live
        for peer_id, entry in entries.items():
            assert entry is not None
            own = peer_id in self._entries
            assert (peer_id in self._gone) == (own and not entry.state.live)
            self.check_entry(peer_id)
        assert all(peer_id in entries for peer_id in self._entries)
        self.digests.check(0)

    def check_entry(self, peer_id: str) -> None:
        """Raises AssertionError if what is held of one member cannot be."""
        entry = self.get(peer_id)
        if entry is None:
            return
        assert entry.advert.peer_id == peer_id
        assert entry.advert.left == (entry.state is State.LEFT)
        assert len({a.accuser for a in entry.accusations}) == len(entry.accusations)
        for accusation in entry.accusations:
            assert accusation.subject == peer_id
            assert accusation.incarnation == entry.advert.incarnation
        assert entry.refutes_until is None or entry.state is State.SUSPECT

    def _is(self, peer_id: str, me: str, states: tuple[State, ...]) -> bool:
        entry = self.get(peer_id)
        return peer_id != me and entry is not None and entry.state in states

    def _content(self, depth: int, index: int) -> bytes:
        return b"".join(
            repr((peer_id, entry.advert.incarnation, entry.advert.sequence)).encode()
            + b"".join(sorted(a.accuser.encode() for a in entry.accusations if a.failed))
            for peer_id, entry in self.live_within(depth, index)
        )
