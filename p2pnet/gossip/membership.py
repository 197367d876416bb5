"""Membership: who is here, found out by watching neighbours and passing it on. Pure.

Each member is watched by K others (`ring`), which accuse it when it does not
answer (`detector`, `accusing`); everybody counts the accusations for itself
(`table`) and asks whom they convict (`inquiries`), and the accused refutes them by
a higher incarnation (`presence`). News is pushed at once to a few random members
(`news`) and rides on every probe and answer for a while (`packing`), and a
comparison of digests with one random member now and then mends what was missed
(`syncing`). This file says what happens at which event, and in which order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from p2pnet.core import Tick
from p2pnet.errors import MalformedError, RemoteError
from p2pnet.gossip.accusing import Accuser
from p2pnet.gossip.answering import Answerer
from p2pnet.gossip.coordinates import Coordinates
from p2pnet.gossip.detector import Detector
from p2pnet.gossip.distances import Distances
from p2pnet.gossip.events import (
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
    Request,
    State,
    SyncWith,
    Unanswered,
)
from p2pnet.gossip.farewell import Farewell
from p2pnet.gossip.inquiries import Inquiries
from p2pnet.gossip.intake import Intake
from p2pnet.gossip.messages import Kinds, read_message
from p2pnet.gossip.news import News
from p2pnet.gossip.ourselves import Ourselves
from p2pnet.gossip.packing import Packer
from p2pnet.gossip.pending import Pending, Purpose
from p2pnet.gossip.presence import Presence
from p2pnet.gossip.roster import Roster
from p2pnet.gossip.statements import OpenAccusation, Versions
from p2pnet.gossip.syncing import Syncing
from p2pnet.gossip.table import Table
from p2pnet.keys import KeyPair
from p2pnet.net.groups import GroupOf, ip_group


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
        self._me = keypair.peer_id
        self._client = client
        self._config = config = config or GossipConfig()
        self._versions = versions = versions or Versions()
        self._table = table = Table(self._me, config, group_of, base)
        self._detector = detector = Detector(config, table, rng)
        self._coordinates = coordinates = Coordinates(rng)
        self._distances = Distances(coordinates, table)
        self._packer = packer = Packer(config, table, rng, versions, client=client)
        self._pending = pending = Pending(config, table)
        news = News(config, table, packer, pending, rng, client=client)
        ourselves = Ourselves(
            keypair,
            description or Description(),
            versions,
            incarnation=incarnation,
            refute_interval_s=config.refute_interval_s,
        )
        presence = Presence(ourselves, config, table, detector, news, rng, client=client)
        self._news, self._presence = news, presence
        self._intake = intake = Intake(table, detector, packer, news, presence)
        self._answerer = Answerer(versions, detector, coordinates, packer, intake)
        self._accuser = Accuser(keypair, table, packer, pending, news)
        self._inquiries = Inquiries(config, table, packer, pending, coordinates, rng)
        self._syncing = Syncing(config, table, packer, pending, rng, now)
        self._farewell = Farewell(config, table, packer, pending, presence, rng)
        self._sweep_at = now + config.sweep_s
        self._awake_at = -math.inf  # when we last came back from a stall
        if not client:
            table.take_advert(ourselves.advert(), now)
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
        return self._distances.round_trip_s(a, b)

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
            self._inquiries.plan(now)
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
        left = self._presence.left
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
                return self._answerer.asked(peer_id, message, now)
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
                return [self._syncing.sync(peer_id, now)]
            case Describe(description):
                return self._presence.describe(description, now)
            case Leave():
                gone = self._client or self._presence.left
                return [Departed()] if gone else self._farewell.leave(now)
            case Tick():
                pass
        return []

    def _answered(self, rpc_id: int, data: bytes, now: float) -> list[Effect]:
        asked = self._pending.ended(rpc_id)
        if asked is None:
            return []
        peer_id = asked.peer_id
        self._detector.answered(peer_id, rpc_id, asked.sent_at, now)
        effects = self._farewell.departed()
        sync = asked.purpose is Purpose.SYNC
        try:
            message = read_message(data)
            if message.kind == Kinds.KIND_REFUSED:
                return [*effects, PeerRefused(peer_id, message.detail)]
            wanted = Kinds.KIND_SYNC_REPLY if sync else Kinds.KIND_PROBE_ACK
            if message.kind != wanted or not message.versions.overlaps(self._versions):
                raise MalformedError("a gossip answer does not fit what was asked")
            adverts, accusations = self._intake.verified(message)
        except RemoteError as error:
            return [*effects, Misbehaved(peer_id, str(error))]
        known = len(self._table)
        if asked.purpose is Purpose.PROBE and not asked.void:
            self._coordinates.measure(peer_id, now - asked.sent_at, message.coordinate)
            effects += self._presence.moved(self._coordinates.here, now)
        effects += self._intake.take(adverts, accusations, now, news=False)[1]
        if asked.purpose is Purpose.INQUIRY:
            self._inquiries.answered(peer_id, now)
        if sync:
            grown = len(self._table) > known
            effects += self._syncing.synced(asked, message, now, grown=grown)
        return effects

    def _unanswered(self, rpc_id: int, now: float) -> list[Effect]:
        asked = self._pending.ended(rpc_id)
        if asked is None:
            return []
        peer_id = asked.peer_id
        effects = self._farewell.departed()
        if asked.void:
            self._detector.void(peer_id, rpc_id, now)
            if asked.purpose is Purpose.INQUIRY:
                self._inquiries.again(peer_id, now)
        elif asked.purpose is Purpose.INQUIRY:
            effects += self._inquiries.unanswered(asked, now, cut_off=self._detector.cut_off)
        else:
            failed = self._detector.unanswered(peer_id, rpc_id, asked.sent_at, now)
            if failed is not None:
                effects += self._accuser.accuse(peer_id, failed, now)
        return effects

    def _doubt_ourselves(self, now: float) -> None:
        lateness_s = now - self._due
        if lateness_s <= self._config.late_s or not self._config.local_health:
            return
        self._detector.late(lateness_s, now)
        if lateness_s > self._config.stalled_s:
            self._awake_at = now
            self._table.stalled(lateness_s)
            self._pending.stalled()
            self._syncing.soon(now)

    # What is due

    def _watch(self, now: float) -> None:
        self._detector.watch([] if self._presence.left else self._table.subjects(), now)

    def _next(self, now: float) -> float:
        due = (
            self._syncing.at,
            self._sweep_at,
            self._inquiries.deadline(),
            self._news.push_at,
            self._presence.refute_at,
            self._table.deadline(),
            self._detector.deadline(now),
        )
        return min(at for at in due if at is not None)

    def _act(self, now: float) -> list[Effect]:
        effects = self._presence.refute(now)
        effects += self._table.expire(now)
        effects += self._inquiries.ask(now)
        self._watch(now)
        for peer_id in self._detector.run_out(now):
            effects += self._accuser.accuse(peer_id, True, now)
        self._watch(now)
        for peer_id in self._detector.to_probe(now):
            data = self._packer.probe(Kinds.KIND_PROBE, peer_id, self._coordinates.here)
            send = self._pending.send(Purpose.PROBE, peer_id, data, now)
            self._detector.probing(peer_id, send.rpc_id)
            effects.append(send)
        if self._syncing.at <= now:
            effects += self._syncing.round(now, left=self._presence.left)
        if self._sweep_at <= now:
            self._sweep_at = now + self._config.sweep_s
            self._table.forget(now - self._config.forget_s)
        if self._news.push_at is not None and self._news.push_at <= now:
            effects += self._news.push(now)
        return effects
