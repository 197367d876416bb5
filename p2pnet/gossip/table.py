"""What this node holds each member to be: the count of what is said of it. Pure.

Here statements are taken or not, and whoever they may concern is judged anew
(`verdicts`). A convict has a while to refute, and is asked before that time is over
(`inquiries`). Whoever is here does so: accusers alone, however many, evict nobody
who is. An accuser who was refuted is not heard for a while (`mutes`).
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from p2pnet.gossip.events import GossipConfig, Member, MemberChanged, State
from p2pnet.gossip.mutes import Mutes
from p2pnet.gossip.roster import Entry, Roster
from p2pnet.gossip.statements import OpenAccusation, OpenAdvert
from p2pnet.gossip.verdicts import Judge
from p2pnet.gossip.watchers import Watchers
from p2pnet.net.groups import GroupOf


class Table:
    """Members by peer id. `me` is this node, whose own accusations count like others'."""

    def __init__(
        self, me: str, config: GossipConfig, group_of: GroupOf, base: Roster | None = None
    ) -> None:
        self.me = me
        self._config = config
        self.roster = Roster(base)
        self._watchers = Watchers(me, config, self.roster, group_of)
        self._judge = Judge(me, config, self.roster, self._watchers)
        self._accused: dict[str, None] = {}  # live members that somebody accuses
        self._due: list[tuple[float, str]] = []  # a heap: when a convict's time to refute is over
        self._touched: list[str] = []  # since the last `begin`
        self._mutes = Mutes()
        self.convicted: list[tuple[float, str]] = []  # since the last `begin`: until when, who

    def __len__(self) -> int:
        return len(self.roster)

    @property
    def live(self) -> int:
        """How many members are alive or suspect, this node included."""
        return self.roster.live

    def get(self, peer_id: str) -> Member | None:
        """One member, or None."""
        return self.roster.member(peer_id)

    def entry(self, peer_id: str) -> Entry | None:
        """One member with what it is accused of, or None."""
        return self.roster.get(peer_id)

    def members(self) -> Iterator[Member]:
        """All members."""
        return self.roster.members()

    def accusations(self, peer_id: str) -> tuple[OpenAccusation, ...]:
        """Those of a member's present incarnation that this node holds."""
        entry = self.roster.get(peer_id)
        return entry.accusations if entry is not None else ()

    def observers(self, peer_id: str) -> list[str]:
        """The live members that watch a member."""
        return self._watchers.observers(peer_id)

    def subjects(self) -> list[str]:
        """The live members that this node watches."""
        return self._watchers.subjects()

    def sample(self, rng: random.Random, count: int, *states: State) -> list[str]:
        """Up to `count` different members of these states, at random; never this node."""
        return self.roster.sample(rng, count, self.me, *states)

    # What happens

    def begin(self) -> None:
        """An event begins: `check` looks at what is touched from now on."""
        self._touched.clear()
        self.convicted.clear()

    def connected(self, peer_id: str, addr: str) -> None:
        """A connection to a peer came up."""
        self._judge.mended(peer_id)
        self._watchers.seen(peer_id, addr)

    def disconnected(self, peer_id: str, now: float, *, telling: bool) -> list[MemberChanged]:
        """The last connection to a peer went; `telling` if that says something of the peer.

        Where a member was seen is kept as long as the member.
        """
        if self.roster.get(peer_id) is None:
            self._watchers.unseen(peer_id)
            return []
        if telling:
            self._judge.broken(peer_id, now)
        else:
            self._judge.mended(peer_id)
        return self._settle([peer_id], now)

    def take_advert(self, advert: OpenAdvert, now: float) -> list[MemberChanged] | None:
        """Takes an advert; returns what changed by it, None if it is no news."""
        old = self.roster.get(advert.peer_id)
        if old is None:
            if not self._room():
                return None
            state = State.LEFT if advert.left else State.ALIVE
            change = self._put(advert.peer_id, Entry(advert, state, now), None)
        elif advert.order <= old.advert.order:
            return None
        else:
            refuted = advert.incarnation > old.advert.incarnation  # or started anew
            if refuted and old.state.live:
                group = self._watchers.group(advert.peer_id)
                for accusation in old.accusations:
                    if accusation.failed:
                        self._mutes.refuted(accusation.accuser, advert.peer_id, group, now)
            state = State.LEFT if advert.left else State.ALIVE if refuted else old.state
            entry = Entry(
                advert,
                state,
                old.since if state is old.state else now,
                () if refuted else old.accusations,
                None if refuted or not state.live else old.refutes_until,
            )
            change = self._put(advert.peer_id, entry, old)
        return [change, *self._settle(self._affected(change), now)]

    def take_accusation(self, accusation: OpenAccusation, now: float) -> list[MemberChanged] | None:
        """Takes an accusation; returns what changed by it, None if it is no news or no right."""
        subject = accusation.subject
        entry = self.roster.get(subject)
        if (
            entry is None
            or not entry.state.live
            or subject == self.me
            or accusation.incarnation != entry.advert.incarnation
            or accusation in entry.accusations
            # One who is convicted needs no more accusers, but for our own eyes.
            or (entry.refutes_until is not None and accusation.accuser != self.me)
            or (accusation.accuser != self.me and self._is_muted(accusation, now))
            or accusation.accuser not in self._watchers.may_accuse(subject)
        ):
            return None
        # One voice of each group is kept, so that none keeps the others' out.
        group = self._watchers.group(accusation.accuser)
        same = [a for a in entry.accusations if self._watchers.group(a.accuser) == group]
        if any(a.failed or not accusation.failed for a in same):
            return None
        kept = tuple(a for a in entry.accusations if a not in same)
        self._put(subject, replace(entry, accusations=(*kept, accusation)), entry)
        own = [subject, *self._watchers.before(subject)] if accusation.accuser == self.me else []
        return self._settle(own or [subject], now)

    @property
    def window_s(self) -> float:
        """How long a convict has to refute."""
        return self._judge.window_s()

    def counts(self, accusation: OpenAccusation, now: float) -> bool:
        """Whether others who see what we see count that accusation of us."""
        may = self._watchers.may_accuse(self.me)
        return accusation.accuser in may and not self._is_muted(accusation, now)

    def refuted(self, accusation: OpenAccusation, now: float) -> None:
        """We are here, whoever says that we have failed."""
        if accusation.failed:
            self._mutes.refuted(accusation.accuser, self.me, self._watchers.group(self.me), now)

    def hear(self, peer_id: str, until: float) -> None:
        """A convict is being asked: no verdict before it could have answered."""
        entry = self.roster.get(peer_id)
        if entry is not None and entry.refutes_until is not None and entry.refutes_until < until:
            self._convict(peer_id, entry, until)

    def answered(self, peer_id: str, now: float) -> None:
        """A convict answered us: its refutation is on its way."""
        entry = self.roster.get(peer_id)
        if entry is not None and entry.refutes_until is not None:
            self._convict(peer_id, entry, now + self._judge.window_s())

    def refused(self, peer_id: str, now: float) -> list[MemberChanged]:
        """A convict's machine told us that it is gone."""
        entry = self.roster.get(peer_id)
        if entry is None or entry.refutes_until is None:
            return []
        self._convict(peer_id, entry, now)
        return self._settle([peer_id], now)

    def expire(self, now: float) -> list[MemberChanged]:
        """Comes to the verdicts for which the time to refute is over."""
        changes: list[MemberChanged] = []
        while self._due and self._due[0][0] <= now:
            changes += self._settle([heapq.heappop(self._due)[1]], now)
        return changes

    def deadline(self) -> float | None:
        """When `expire` is wanted."""
        while self._due:
            until, peer_id = self._due[0]
            entry = self.roster.get(peer_id)
            if entry is not None and entry.refutes_until == until:
                return until
            heapq.heappop(self._due)  # it refuted, or left, or its time was prolonged
        return None

    def stalled(self, lateness_s: float) -> None:
        """We were not there: refutations may be waiting for us to read them."""
        self._judge.stalled()
        for peer_id in tuple(self._accused):
            entry = self.roster.get(peer_id)
            if entry is not None and entry.refutes_until is not None:
                self._convict(peer_id, entry, entry.refutes_until + lateness_s)

    def forget(self, before: float) -> None:
        """Drops the members that left or failed before a time."""
        while (peer_id := self.roster.longest_gone()) is not None:
            entry = self.roster.get(peer_id)
            if entry is None or entry.since >= before:
                break
            self._drop(peer_id)

    def check(self, *, full: bool = False) -> None:
        """Raises AssertionError if the table contradicts itself.

        Looks at what the last event changed, or at everything.
        """
        assert len(self.roster) <= self._config.members_max
        if full:
            self.roster.check()
            assert list(self._accused) == [p for p in self._accused if self._is_accused(p)]
        for peer_id in dict.fromkeys(self._touched):
            self.roster.check_entry(peer_id)
            self.roster.digests.check_of(peer_id)
            assert (peer_id in self._accused) == self._is_accused(peer_id)
        if full or self._touched:
            self._watchers.check()

    # Verdicts

    def _is_muted(self, accusation: OpenAccusation, now: float) -> bool:
        return self._mutes.muted(accusation.accuser, accusation.subject, now)

    def _is_accused(self, peer_id: str) -> bool:
        entry = self.roster.get(peer_id)
        return entry is not None and entry.state.live and bool(entry.accusations)

    def _settle(self, peer_ids: Iterable[str], now: float) -> list[MemberChanged]:
        # A verdict changes who observes whom, and so may decide another.
        changes: list[MemberChanged] = []
        queue = deque(peer_ids)
        while queue:
            peer_id = queue.popleft()
            entry = self.roster.get(peer_id)
            if peer_id not in self._accused or entry is None:
                continue
            state, until = self._judge.verdict(peer_id, entry, now)
            if state is entry.state:
                if until != entry.refutes_until:
                    self._convict(peer_id, entry, until)
                continue
            change = self._put(
                peer_id, replace(entry, state=state, since=now, refutes_until=None), entry
            )
            if until is not None:
                self._convict(peer_id, self._held(peer_id), until)
            changes.append(change)
            queue.extend(self._affected(change))
        return changes

    def _convict(self, peer_id: str, entry: Entry, until: float | None) -> None:
        self._put(peer_id, replace(entry, refutes_until=until), entry)
        if until is not None:
            heapq.heappush(self._due, (until, peer_id))
            if entry.refutes_until is None:
                self.convicted.append((until, peer_id))

    # Changes

    def _held(self, peer_id: str) -> Entry:
        entry = self.roster.get(peer_id)
        assert entry is not None
        return entry

    def _put(self, peer_id: str, entry: Entry, old: Entry | None) -> MemberChanged:
        self._touched.append(peer_id)
        self.roster.put(peer_id, entry)
        if entry.state.live and entry.accusations:
            self._accused[peer_id] = None
        else:
            self._accused.pop(peer_id, None)
        if old is None or old.state.live != entry.state.live or old.advert != entry.advert:
            self._watchers.changed(peer_id)
        return MemberChanged(peer_id, old.state if old else None, entry.state, entry.advert)

    def _affected(self, change: MemberChanged) -> list[str]:
        # Who observes a member depends on who of those after it is live.
        was_live = change.old is not None and change.old.live
        if not self._accused or was_live == change.new.live:
            return []
        return [p for p in self._watchers.before(change.peer_id) if p in self._accused]

    def _room(self) -> bool:
        if len(self.roster) < self._config.members_max:
            return True
        longest = self.roster.longest_gone()
        if longest is not None:
            self._drop(longest)
        return longest is not None

    def _drop(self, peer_id: str) -> None:
        self._touched.append(peer_id)
        self.roster.drop(peer_id)
        self._watchers.unseen(peer_id)
        self._watchers.changed(peer_id)
        self._accused.pop(peer_id, None)
        self._judge.mended(peer_id)
