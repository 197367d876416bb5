"""Membership: who is here, found out by watching neighbours and passing it on. Pure.

Each member is watched by K others (`ring`), which accuse it when it does not
answer (`detector`); everybody counts the accusations for itself (`table`), and
the accused refutes them by a higher incarnation (`ourselves`). News is pushed at
once to a few random members and rides on every probe and answer for a while
(`packing`), and a comparison of digests with one random member now and then mends
what was missed (`digests`).
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from p2pnet.core import Tick
from p2pnet.errors import MalformedError, RemoteError
from p2pnet.gossip.coordinates import Coordinate, Coordinates
from p2pnet.gossip.detector import Detector
from p2pnet.gossip.digests import depth_for
from p2pnet.gossip.events import (
    Accused,
    Answered,
    Departed,
    Describe,
    Description,
    Effect,
    Event,
    GossipConfig,
    Leave,
    Member,
    Misbehaved,
    PeerConnected,
    PeerDisconnected,
    PeerRefused,
    Reply,
    Request,
    Send,
    State,
    Synced,
    SyncWith,
    Unanswered,
)
from p2pnet.gossip.messages import Kinds, Message, Summary, read_message, write_message
from p2pnet.gossip.ourselves import Ourselves
from p2pnet.gossip.packing import Packer
from p2pnet.gossip.roster import Roster
from p2pnet.gossip.statements import (
    OpenAccusation,
    OpenAdvert,
    Versions,
    build_accusation,
    open_accusation,
    open_advert,
    raw_of,
)
from p2pnet.gossip.table import Table
from p2pnet.keys import KeyPair, peer_id_of
from p2pnet.net.groups import GroupOf, ip_group

_REQUESTS = (Kinds.KIND_PROBE, Kinds.KIND_SYNC, Kinds.KIND_NEWS, Kinds.KIND_SYNC_REST)


class _Purpose(Enum):
    PROBE = auto()
    NEWS = auto()
    SYNC = auto()
    FAREWELL = auto()
    REST = auto()
    INQUIRY = auto()


@dataclass(slots=True)
class _Pending:
    purpose: _Purpose
    peer_id: str
    sent_at: float
    summary: Summary | None = None  # that a sync was asked with
    void: bool = False  # we stalled meanwhile: that no answer came says nothing


class Membership:
    """The core of one node. `incarnation` must be higher than in any earlier run of its key.

    A client (`client=True`) syncs and hears, but is no member: it has no advert,
    watches nobody and is told of by nobody. `base` is a roster that many start from.
    """

    def __init__(
        self,
        keypair: KeyPair,
        *,
        incarnation: int,
        now: float,
        rng: random.Random,
        description: Description | None = None,
        client: bool = False,
        config: GossipConfig | None = None,
        versions: Versions | None = None,
        group_of: GroupOf = ip_group,
        base: Roster | None = None,
    ) -> None:
        self._keypair = keypair
        self._me = keypair.peer_id
        self._rng = rng
        self._client = client
        self._config = config or GossipConfig()
        self._versions = versions or Versions()
        self._table = Table(self._me, self._config, group_of, base)
        self._detector = Detector(self._config, self._table, rng)
        self._packer = Packer(self._config, self._table, rng, self._versions, client=client)
        self._coordinates = Coordinates(rng)
        self._ourselves = Ourselves(
            keypair,
            description or Description(),
            self._versions,
            incarnation=incarnation,
            refute_interval_s=self._config.refute_interval_s,
        )
        self._pending: dict[int, _Pending] = {}
        self._next_rpc_id = 1
        self._syncs = 0
        self._sync_pause_s = self._config.sync_interval_s
        self._sync_at = now + self._sync_pause_s * rng.uniform(0.5, 1.5)
        self._sweep_at = now + self._config.sweep_s
        self._push_at: float | None = None
        self._pushed_at = -math.inf
        self._cursor = 0  # the bucket that the next sync begins with
        self._members_told = 0  # how many live members another said to know
        self._inquiries: list[tuple[float, str]] = []  # a heap: when to ask a convict itself
        self._awake_at = -math.inf  # when we last came back from a stall
        if not client:
            self._table.take_advert(self._ourselves.advert(), now)
        self._watch(now)
        self._due = self._next(now)

    # Asked by the shell

    def member(self, peer_id: str) -> Member | None:
        """One member, or None."""
        return self._table.get(peer_id)

    def members(self) -> list[Member]:
        """All of them, this node too unless it is a client, in the order of peer ids."""
        return sorted(self._table.members(), key=lambda member: member.peer_id)

    def accusations(self, peer_id: str) -> tuple[OpenAccusation, ...]:
        """What a member is accused of in its present incarnation, one voice a group."""
        return self._table.accusations(peer_id)

    def round_trip_s(self, a: str, b: str) -> float | None:
        """About how long a message from `a` to `b` and its answer take, in seconds.

        Measured where one of them is this node and it probes the other; else foretold
        from where both say that they are, None where one of them does not.
        """
        if a == b:
            return 0.0
        if self._me in (a, b):
            measured_s = self._coordinates.measured_s(b if a == self._me else a)
            if measured_s is not None:
                return measured_s
        one, other = self._where(a), self._where(b)
        return one.round_trip_s(other) if one is not None and other is not None else None

    def _where(self, peer_id: str) -> Coordinate | None:
        if peer_id == self._me:
            return self._coordinates.here
        heard = self._coordinates.heard_of(peer_id)
        entry = self._table.entry(peer_id)
        return heard if heard is not None or entry is None else entry.advert.coordinate

    # Core

    def handle(self, event: Event, now: float) -> Sequence[Effect]:
        """Takes one event.

        Raises:
            MalformedError, ForgedError: a `Request` that no honest peer sends; nothing
                of it was taken.
        """
        self._table.begin()
        self._doubt_ourselves(now)
        try:
            effects = self._on(event, now)
            effects += self._act(now)
        finally:
            self._watch(now)
            self._inquire_later(now)
            self._due = self._next(now)
        return effects

    def deadline(self) -> float:
        """When a `Tick` is wanted."""
        return self._due

    def check(self, *, full: bool = False) -> None:
        """Raises AssertionError if an invariant does not hold.

        Looks at what the last event touched, or at everything.
        """
        self._table.check(full=full)
        left = self._ourselves.left
        own = self._table.entry(self._me)
        assert (own is None) == self._client
        assert own is None or own.state is (State.LEFT if left else State.ALIVE)
        assert self._detector.watched == ([] if left else self._table.subjects())
        for peer_id in self._detector.watched:
            probe = self._detector.probe_of(peer_id)
            assert probe is None or probe in self._pending

    # What comes in

    def _on(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Request(peer_id, message):
                return self._asked(peer_id, message, now)
            case Answered(rpc_id, message):
                return self._answered(rpc_id, message, now)
            case Unanswered(rpc_id):
                return self._unanswered(rpc_id, now)
            case PeerConnected(peer_id, addr):
                self._table.connected(peer_id, addr)
            case PeerDisconnected(peer_id):
                self._detector.broken(peer_id, now)
                # After a stall it is we who were given up, and not by that peer alone.
                telling = now - self._awake_at > self._config.stalled_s
                return list(self._table.disconnected(peer_id, now, telling=telling))
            case SyncWith(peer_id):
                return [self._sync(peer_id, now)]
            case Describe(description):
                if self._ourselves.describe(description):
                    return self._readvertise(now)
            case Leave():
                return self._leave(now)
            case Tick():
                pass
        return []

    def _asked(self, peer_id: str, data: bytes, now: float) -> list[Effect]:
        message = read_message(data)
        if message.kind not in _REQUESTS:
            raise MalformedError("a gossip request is neither a probe nor a sync nor news")
        if not message.versions.overlaps(self._versions):
            return self._refuse(peer_id, message.versions)
        adverts, accusations = self._verified(message)
        self._detector.heard(peer_id)
        if message.coordinate is not None:
            self._coordinates.hear(peer_id, message.coordinate)
        rest = message.kind == Kinds.KIND_SYNC_REST
        older, effects = self._take(adverts, accusations, now, news=not rest)
        if message.kind == Kinds.KIND_SYNC:
            reply = self._packer.sync_reply(peer_id, message.summary, older)
        else:
            here = self._coordinates.here if message.kind == Kinds.KIND_PROBE else None
            reply = self._packer.probe(Kinds.KIND_PROBE_ACK, peer_id, here, older)
        return [*effects, Reply(reply)]

    def _refuse(self, peer_id: str, theirs: Versions) -> list[Effect]:
        detail = (
            f"this peer speaks gossip version {self._versions}, you speak {theirs}: "
            "upgrade the older of the two"
        )
        ours = (
            f"it speaks gossip version {theirs}, we speak {self._versions}: "
            "upgrade the older of the two"
        )
        reply = write_message(Kinds.KIND_REFUSED, self._versions, detail=detail)
        return [PeerRefused(peer_id, ours), Reply(reply)]

    def _answered(self, rpc_id: int, data: bytes, now: float) -> list[Effect]:
        pending = self._pending.pop(rpc_id, None)
        if pending is None:
            return []
        peer_id = pending.peer_id
        self._detector.answered(peer_id, rpc_id, pending.sent_at, now)
        effects = self._told_all()
        sync = pending.purpose is _Purpose.SYNC
        try:
            message = read_message(data)
            if message.kind == Kinds.KIND_REFUSED:
                return [*effects, PeerRefused(peer_id, message.detail)]
            wanted = Kinds.KIND_SYNC_REPLY if sync else Kinds.KIND_PROBE_ACK
            if message.kind != wanted or not message.versions.overlaps(self._versions):
                raise MalformedError("a gossip answer does not fit what was asked")
            adverts, accusations = self._verified(message)
        except RemoteError as error:
            return [*effects, Misbehaved(peer_id, str(error))]
        known = len(self._table)
        if pending.purpose is _Purpose.PROBE and not pending.void:
            self._coordinates.measure(peer_id, now - pending.sent_at, message.coordinate)
            effects += self._say_where(now)
        _, taken = self._take(adverts, accusations, now, news=False)
        effects += taken
        if pending.purpose is _Purpose.INQUIRY:
            self._table.answered(peer_id, now)
        if sync:
            effects += self._synced(pending, message, grown=len(self._table) > known, now=now)
        return effects

    def _synced(
        self, pending: _Pending, message: Message, *, grown: bool, now: float
    ) -> list[Effect]:
        effects: list[Effect] = [Synced(pending.peer_id)]
        asked, result = pending.summary, message.result
        assert asked is not None
        buckets = 1 << asked.depth
        span = len(asked.digests)
        told = [
            index
            for index in dict.fromkeys(result.told)
            if index < buckets and (index - asked.first) % buckets < span
        ]
        rest = self._packer.rest(
            asked.depth, told, {raw_of(s) for s in (*message.adverts, *message.accusations)}
        )
        if rest is not None:
            effects.append(self._send(_Purpose.REST, pending.peer_id, rest, now))
        self._members_told = result.members
        self._cursor = asked.first + span
        if result.more:
            self._cursor = told[-1] + 1 if told else asked.first
        if grown:  # there may be more; where there surely is, at once
            self._sync_pause_s = self._config.sync_again_s
            pause_s = 0.0 if result.more else self._sync_pause_s
            self._sync_at = min(self._sync_at, now + pause_s)
        return effects

    def _say_where(self, now: float) -> list[Effect]:
        # All members together tell about one such move a second, however many they are.
        pause_s = max(
            self._config.coordinate_s, self._config.coordinate_member_s * self._table.live
        )
        pause_s *= self._rng.uniform(0.5, 1.5)
        moved = not self._client and self._ourselves.moved(self._coordinates.here, now, pause_s)
        return self._readvertise(now) if moved else []

    def _unanswered(self, rpc_id: int, now: float) -> list[Effect]:
        pending = self._pending.pop(rpc_id, None)
        if pending is None:
            return []
        effects = self._told_all()
        if pending.void:
            self._detector.void(pending.peer_id, rpc_id, now)
            return effects
        if pending.purpose is _Purpose.INQUIRY:
            if now - pending.sent_at < self._config.fast_failure_s:
                effects += self._table.refused(pending.peer_id, now)
            else:
                heapq.heappush(self._inquiries, (now, pending.peer_id))
            return effects
        failed = self._detector.unanswered(pending.peer_id, rpc_id, pending.sent_at, now)
        if failed is not None:
            effects += self._accuse(pending.peer_id, failed, now)
        return effects

    def _verified(self, message: Message) -> tuple[list[OpenAdvert], list[OpenAccusation]]:
        adverts = []
        for signed in message.adverts:
            held = self._table.entry(peer_id_of(signed.public_key))
            # Else known, and verified then; but one who is gone is told of again.
            if held is None or not held.state.live or held.advert.raw != raw_of(signed):
                adverts.append(open_advert(signed))
        return adverts, [open_accusation(signed) for signed in message.accusations]

    def _take(
        self,
        adverts: list[OpenAdvert],
        accusations: list[OpenAccusation],
        now: float,
        *,
        news: bool,
    ) -> tuple[list[str], list[Effect]]:
        """Returns of whom we know better, and what changed.

        News are passed on; of what comparing two tables brought up only what changes
        a member already known: what a newcomer learns is no news to others.
        """
        effects: list[Effect] = []
        older: list[str] = []
        for advert in adverts:
            held = self._table.entry(advert.peer_id)
            if advert.peer_id == self._me:
                if not self._client and self._ourselves.met(advert):
                    effects += self._readvertise(now)
            elif held is not None and held.advert.order > advert.order:
                older.append(advert.peer_id)
            elif held is not None and held.advert.order == advert.order:
                if not held.state.live:  # whoever tells of it does not know that it is gone
                    older.append(advert.peer_id)
            else:
                effects += self._take_advert(advert, now, spread=news or held is not None)
        for accusation in accusations:
            if accusation.subject == self._me:
                effects += self._defend(accusation, now)
                continue
            changes = self._table.take_accusation(accusation, now)
            if changes is not None:
                if accusation.failed:
                    self._spread(accusation, now)
                self._detector.look(accusation.subject, now)
                effects += changes
        return older, effects

    def _take_advert(self, advert: OpenAdvert, now: float, *, spread: bool) -> list[Effect]:
        held = self._table.entry(advert.peer_id)
        accusations = self._table.accusations(advert.peer_id)
        changes = self._table.take_advert(advert, now)
        if changes is None:
            return []
        if held is not None and advert.incarnation > held.advert.incarnation:
            self._packer.refuted(accusations)
            if any(a.accuser == self._me for a in accusations):
                self._detector.refuted(advert.peer_id, now)
        if spread:
            self._spread(advert, now)
        return list(changes)

    # About ourselves

    def _doubt_ourselves(self, now: float) -> None:
        lateness_s = now - self._due
        if lateness_s <= self._config.late_s or not self._config.local_health:
            return
        self._detector.late(lateness_s, now)
        if lateness_s > self._config.stalled_s:
            self._awake_at = now
            self._table.stalled(lateness_s)
            for pending in self._pending.values():
                pending.void = True
            self._sync_at = min(self._sync_at, now)

    def _readvertise(self, now: float) -> list[Effect]:
        if self._client:
            return []
        return self._take_advert(self._ourselves.advert(), now, spread=True)

    def _defend(self, accusation: OpenAccusation, now: float) -> list[Effect]:
        if self._client or not self._ourselves.accused(accusation.incarnation, now):
            return []
        self._detector.accused(now)
        return self._refute(now)  # at once, for the answer to carry it

    def _refute(self, now: float) -> list[Effect]:
        return self._readvertise(now) if self._ourselves.refute(now) else []

    def _leave(self, now: float) -> list[Effect]:
        if self._client or self._ourselves.left:
            return [Departed()]
        told = [*self._table.observers(self._me), *self._table.subjects()]
        told += self._table.sample(self._rng, self._config.fanout, State.ALIVE)
        self._ourselves.leave()
        effects = self._readvertise(now)
        for peer_id in dict.fromkeys(told):
            data = self._packer.news(Kinds.KIND_NEWS, (self._me,))
            if data is not None:
                effects.append(self._send(_Purpose.FAREWELL, peer_id, data, now))
        return [*effects, *self._told_all()]

    def _told_all(self) -> list[Effect]:
        if not self._ourselves.left:
            return []
        open_ones = any(p.purpose is _Purpose.FAREWELL for p in self._pending.values())
        return [] if open_ones else [Departed()]

    # What is due

    def _watch(self, now: float) -> None:
        self._detector.watch([] if self._ourselves.left else self._table.subjects(), now)

    def _next(self, now: float) -> float:
        due = min(self._sync_at, self._sweep_at)
        for at in (
            self._inquiries[0][0] if self._inquiries else None,
            self._push_at,
            self._ourselves.refute_at,
            self._table.deadline(),
            self._detector.deadline(now),
        ):
            if at is not None and at < due:
                due = at
        return due

    def _inquire_later(self, now: float) -> None:
        # Nobody is condemned unheard. Not at once: most who are here will have refuted
        # before, and one that all n members ask has n to answer.
        for until, peer_id in self._table.convicted:
            wait_s = (until - now) * self._rng.uniform(0.4, 0.6)
            heapq.heappush(self._inquiries, (now + wait_s, peer_id))
        self._table.convicted.clear()

    def _inquire(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        while self._inquiries and self._inquiries[0][0] <= now:
            peer_id = heapq.heappop(self._inquiries)[1]
            entry = self._table.entry(peer_id)
            convicted = entry is not None and entry.refutes_until is not None
            if convicted and len(self._pending) < self._config.pending_max:
                data = self._packer.probe(Kinds.KIND_PROBE, peer_id, self._coordinates.here)
                effects.append(self._send(_Purpose.INQUIRY, peer_id, data, now))
        return effects

    def _act(self, now: float) -> list[Effect]:
        effects = self._refute(now)
        effects += self._table.expire(now)
        effects += self._inquire(now)
        self._watch(now)
        for peer_id in self._detector.run_out(now):
            effects += self._accuse(peer_id, True, now)
        self._watch(now)
        for peer_id in self._detector.to_probe(now):
            data = self._packer.probe(Kinds.KIND_PROBE, peer_id, self._coordinates.here)
            send = self._send(_Purpose.PROBE, peer_id, data, now)
            self._detector.probing(peer_id, send.rpc_id)
            effects.append(send)
        if self._sync_at <= now:
            effects += self._sync_round(now)
        if self._sweep_at <= now:
            self._sweep_at = now + self._config.sweep_s
            self._table.forget(now - self._config.forget_s)
        if self._push_at is not None and self._push_at <= now:
            effects += self._push(now)
        return effects

    def _accuse(self, peer_id: str, failed: bool, now: float) -> list[Effect]:
        member = self._table.get(peer_id)
        if member is None:
            return []
        accusation = build_accusation(
            self._keypair, peer_id, incarnation=member.advert.incarnation, failed=failed
        )
        changes = self._table.take_accusation(accusation, now)
        if changes is None:
            return []
        effects: list[Effect] = [Accused(peer_id, failed), *changes]
        if failed:
            self._spread(accusation, now)
            return effects
        # A suspicion concerns those who may share it; the suspect hears of it when probed.
        data = self._packer.accusation(accusation)
        for observer in self._table.observers(peer_id):
            if observer != self._me and len(self._pending) < self._config.pending_max:
                effects.append(self._send(_Purpose.NEWS, observer, data, now))
        return effects

    def _sync_round(self, now: float) -> list[Effect]:
        self._sync_pause_s = min(2 * self._sync_pause_s, self._config.sync_interval_s)
        self._sync_at = now + self._sync_pause_s * self._rng.uniform(0.8, 1.2)
        if self._ourselves.left or len(self._pending) >= self._config.pending_max:
            return []
        chosen = self._table.sample(self._rng, 1, State.ALIVE, State.SUSPECT)
        self._syncs += 1
        if self._syncs % 3 == 0 or not chosen:
            # Two halves of a split network hold each other to have failed:
            # somebody has to look.
            chosen += self._table.sample(self._rng, 1, State.FAILED)
        return [self._sync(peer_id, now) for peer_id in chosen]

    # What goes out

    def _spread(self, statement: OpenAdvert | OpenAccusation, now: float) -> None:
        if not self._client:
            self._packer.spread(statement)
            if self._push_at is None:
                self._push_at = max(now, self._pushed_at + self._config.push_interval_s)

    def _push(self, now: float) -> list[Effect]:
        self._push_at = None
        self._pushed_at = now
        effects: list[Effect] = []
        for peer_id in self._table.sample(self._rng, self._config.fanout, State.ALIVE):
            if len(self._pending) < self._config.pending_max:
                data = self._packer.news(Kinds.KIND_NEWS)
                if data is not None:
                    effects.append(self._send(_Purpose.NEWS, peer_id, data, now))
        return effects

    def _sync(self, peer_id: str, now: float) -> Send:
        depth = depth_for(max(self._table.live, min(self._members_told, self._config.members_max)))
        summary = self._packer.summary(self._cursor, depth)
        data = self._packer.sync(peer_id, summary)
        return self._send(_Purpose.SYNC, peer_id, data, now, summary)

    def _send(
        self,
        purpose: _Purpose,
        peer_id: str,
        data: bytes,
        now: float,
        summary: Summary | None = None,
    ) -> Send:
        rpc_id = self._next_rpc_id
        self._next_rpc_id += 1
        self._pending[rpc_id] = _Pending(purpose, peer_id, now, summary)
        probe = purpose in (_Purpose.PROBE, _Purpose.INQUIRY)
        timeout_s = self._config.probe_timeout_s if probe else self._config.request_timeout_s
        entry = self._table.entry(peer_id)
        return Send(rpc_id, peer_id, entry.advert.addrs if entry else (), data, timeout_s)
