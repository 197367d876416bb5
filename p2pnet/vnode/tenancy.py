"""What one PNode hosts and under whose claim: the fence at the host. A pure core (DESIGN D6).

A claim is believed when the network's log has it, and the newest one counts. What is
known of a log is on disk (`Persist`) before an answer that rests on it leaves
(`Reply`), so that a host that was restarted falls for no claim that it has seen
outdone. VNodes themselves are not restored: whoever orchestrates notices, and places
them under a new claim.

What is known of each log, and who waits for it to be read, is a `Follower`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Self

from p2pnet.core import Tick
from p2pnet.errors import LocalError, RemoteError
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import placement_of
from p2pnet.v1 import common_pb2
from p2pnet.vnode.admission import (
    LEASE_S_MAX,
    Limits,
    Offer,
    claim_in,
    examine,
    examine_manifest,
)
from p2pnet.vnode.follower import Call, Follower
from p2pnet.vnode.network import refusal
from p2pnet.vnode.refusing import (
    NETWORKS_MAX,
    Known,
    busy,
    cannot_go_on,
    goes_on,
    leaving,
    no_room,
    outdone,
    refused_call,
    refused_caller,
)
from p2pnet.vnode.standing import Standing, unseal_standing
from p2pnet.vnode.tenancy_events import (
    AllocateAsked,
    Begin,
    ClaimShown,
    Drain,
    DropAsked,
    Effect,
    End,
    Event,
    HeartbeatCame,
    LogRead,
    LogSilent,
    NotPersisted,
    Persist,
    ReadyAsked,
    Reply,
    Tenant,
)

logger = logging.getLogger(__name__)

KNOWN_MAX = 1024  # hosted now or once; of others the log tells again
HEARD_MAX = 32  # of those others: whose log was read in vain, or has just been read
READS_MAX = 32  # of logs, at once
WAITS_S = 3.0  # for a log: less than callers' patience
READY_WAITS_S = 15.0
QUIET_S = 3.0  # without a heartbeat, until a host asks the log whether it has been replaced
LOOK_AGAIN_S = 10.0
LAPSED_S = 15.0  # how long what a newer claim has ended stays in memory, to go on from
ORPHANED_S = 600.0  # how long after its lease a VNode is kept for an orchestrator to come back


class Tenancy:
    """The networks that this PNode hosts, or has hosted, by network id."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._networks: dict[str, Known] = {}  # the least recently changed first
        self._draining = False

    # The core

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Takes one event and says what is to be done, in that order."""
        match event:
            case AllocateAsked():
                offer = examine(event.request, event.caller, self._limits, event.wall_ms)
                return self._offered(event, offer, now + WAITS_S, now)
            case ReadyAsked():
                offer = examine_manifest(event.request, event.caller, self._limits, event.wall_ms)
                return self._offered(event, offer, now + READY_WAITS_S, now)
            case DropAsked() | ClaimShown():
                return self._try(Call(event, now + WAITS_S), now, final=False)
            case HeartbeatCame():
                return self._renew(event, now)
            case LogRead():
                return self._read(event, now)
            case LogSilent():
                return self._read_ended(event.network_id, event.reason, now)
            case NotPersisted():
                return self._not_kept(event.network_id)
            case Drain():
                self._draining = True
                return []
            case Tick():
                return self._tick(now)

    def deadline(self) -> float | None:
        """When somebody has waited too long for a log, or a host too long for an orchestrator.

        For so long that the log is asked, or that it waits no more. Who was stopped for a
        while learns so that he has been replaced.
        """
        times = [
            net.lease_until + ORPHANED_S if net.log.is_read else net.look_at
            for net in self._networks.values()
            if net.tenant is not None
        ]
        times += [net.lapsed_until for net in self._networks.values() if net.lapsed is not None]
        waits = (net.log.deadline() for net in self._networks.values() if net.log.is_read)
        return min((*times, *(at for at in waits if at is not None)), default=None)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        tenants = self.tenants()
        assert len(tenants) <= NETWORKS_MAX
        lapsed = [net.lapsed for net in self._networks.values() if net.lapsed is not None]
        held = sum(tenant.size_bytes for tenant in (*tenants, *lapsed))
        assert held <= self._limits.memory_bytes
        for network_id, net in self._networks.items():
            assert net.standing.network_id == network_id
            net.log.check()
            assert net.spent <= net.standing.epoch
            if net.lapsed is not None:
                assert net.lapsed.epoch < net.standing.epoch
            if net.tenant is not None:
                assert net.kept is not None
                assert net.kept.epoch >= net.tenant.epoch
                assert net.tenant.sizes or net.tenant.following
                assert not any(vnode in net.tenant.sizes for vnode in net.tenant.following)
                assert net.lapsed is None
                assert not net.standing.closed
                assert net.tenant.epoch == net.standing.epoch > net.spent
                assert net.tenant.claimant == net.standing.claimant

    def dump(self) -> dict[str, bytes]:
        """What is on disk, by network id."""
        return {
            id_: net.kept.seal(net.log.claim) for id_, net in self._networks.items() if net.kept
        }

    @classmethod
    def load(cls, limits: Limits, records: Mapping[str, bytes]) -> Self:
        """What a host knows after a restart. A damaged record is no knowledge: the log tells."""
        self = cls(limits)
        for network_id in sorted(records)[:KNOWN_MAX]:
            try:
                standing, newest = unseal_standing(network_id, records[network_id])
            except LocalError as error:
                logger.warning("what was kept of network %s is not used: %s", network_id, error)
                continue
            log = Follower(standing)
            net = Known(log, kept=standing, spent=standing.epoch)
            if newest is not None:
                log.claim, log.placement = newest[0], placement_of(newest[1])
                net.was_here = limits.me in log.placement.values()
            self._networks[network_id] = net
        return self

    # Looking

    @property
    def draining(self) -> bool:
        """Whether this host takes nothing new."""
        return self._draining

    def tenants(self) -> list[Tenant]:
        """All that is hosted, in order of network id."""
        nets = (self._networks[network_id] for network_id in sorted(self._networks))
        return [net.tenant for net in nets if net.tenant is not None]

    def tenant(self, network_id: str) -> Tenant | None:
        """What is hosted of a network."""
        net = self._networks.get(network_id)
        return None if net is None else net.tenant

    def claims(self) -> list[tuple[common_pb2.Signed, bool]]:
        """Of every network that is hosted, or was when this node went down, the newest claim.

        And of those that were closed here the last. Each with whether the network is closed.
        """
        nets = (self._networks[network_id] for network_id in sorted(self._networks))
        return [
            (net.log.claim, net.standing.closed)
            for net in nets
            if net.log.claim is not None
            and (net.tenant or net.was_here or (net.standing.closed and net.kept))
        ]

    def standing(self, network_id: str) -> Standing | None:
        """What is known of a network's log."""
        net = self._networks.get(network_id)
        return None if net is None else net.standing

    def refuse(
        self, network_id: str, epoch: int, vnode: str, now: float, *, following: bool = False
    ) -> common_pb2.Refusal | None:
        """Why a call for a VNode is refused; None: it is in date, and the VNode lives here.

        `following`: it is good enough if the VNode is followed here.
        """
        net = self._networks.get(network_id)
        return refused_call(net, epoch, vnode, now, me=self._limits.me, following=following)

    def refuse_caller(
        self, network_id: str, caller: str, epoch: int | None = None
    ) -> common_pb2.Refusal | None:
        """Why a call that only the network's orchestrator may make is refused."""
        return refused_caller(self._networks.get(network_id), caller, epoch)

    # Deciding

    def _offered(
        self,
        event: AllocateAsked | ReadyAsked,
        offer: Offer | common_pb2.Refusal,
        until: float,
        now: float,
    ) -> list[Effect]:
        if isinstance(offer, common_pb2.Refusal):
            return [Reply(event.ask, offer)]
        return self._try(Call(event, until, offer), now, final=False)

    def _try(self, call: Call, now: float, *, final: bool) -> list[Effect]:
        """Answers a call if that can be done; else, unless `final`, asks the log first."""
        match call.asked:
            case AllocateAsked():
                return self._allocate(call, call.asked, now, final)
            case ReadyAsked():
                return self._get_ready(call, call.asked, final)
            case DropAsked():
                return self._drop(call, call.asked, final)
            case ClaimShown():
                return self._vouch(call, call.asked, final)

    def _allocate(self, call: Call, event: AllocateAsked, now: float, final: bool) -> list[Effect]:
        request, offer = event.request, call.offer
        assert offer is not None
        net = self._networks.get(offer.network_id)
        if net is not None and (no := outdone(net, offer)):
            return [Reply(event.ask, no)]
        if no := self._no_room(offer):
            return [Reply(event.ask, no)]
        if (
            net is None
            or offer.epoch > net.standing.epoch
            or net.log.is_behind
            or (net.tenant is None and not final)  # nobody would tell us of a newer one
        ):
            return self._ask_log(call, offer.network_id, offer.manifest, final)
        if net.tenant is not None:  # said twice: an answer was lost
            net.lease_until = max(net.lease_until, now + request.lease_s)
            net.look_at = now + QUIET_S
            return [Reply(event.ask)]
        lapsed, live_step = net.lapsed, request.live_step
        live = live_step > 0
        if live and not goes_on(offer, lapsed):
            return [Reply(event.ask, cannot_go_on(live_step, offer))]
        net.lapsed = None
        net.tenant = Tenant(
            network_id=offer.network_id,
            name=offer.opened.name,
            manifest=offer.manifest,
            epoch=offer.epoch,
            claimant=offer.claimant,
            sizes=offer.sizes,
            state_url=offer.opened.state_url,
            following=offer.following,
            replicas=offer.graph.replicas,
        )
        net.lease_until = now + request.lease_s
        net.look_at = now + QUIET_S
        begin = Begin(net.tenant, offer, request, live)
        return [*self._keep(net), begin, Reply(event.ask)]

    def _no_room(self, offer: Offer) -> common_pb2.Refusal | None:
        if self._draining and self.tenant(offer.network_id) is None:
            return leaving()
        others = [net for key, net in self._networks.items() if key != offer.network_id]
        return no_room(self._limits.memory_bytes, others, offer)

    def _get_ready(self, call: Call, event: ReadyAsked, final: bool) -> list[Effect]:
        """Whether there is room; the log is read before, so that a claim finds it known."""
        offer = call.offer
        assert offer is not None
        net = self._networks.get(offer.network_id)
        if net is not None and net.standing.closed:
            return [Reply(event.ask, net.log.closed())]
        no = leaving() if self._draining else self._no_room(offer)
        if no or final or self.tenant(offer.network_id) is not None:
            return [Reply(event.ask, no)]
        return self._ask_log(call, offer.network_id, offer.manifest, final)

    def _renew(self, event: HeartbeatCame, now: float) -> list[Effect]:
        request = event.request
        if no := self.refuse_caller(request.network_id, event.caller, request.epoch):
            return [Reply(event.ask, no)]
        net = self._networks[request.network_id]
        if net.tenant is not None and (
            why := self._limits.serves(request.network_id, net.tenant.manifest.public_key)
        ):  # the service has a newer list, without it
            no = refusal(common_pb2.REFUSAL_CODE_NOT_IN_SERVICE, why)
            return [*self._end(net), Reply(event.ask, no)]
        net.lease_until = max(net.lease_until, now + min(request.lease_s, LEASE_S_MAX))
        net.look_at = now + QUIET_S
        return [Reply(event.ask)]

    def _drop(self, call: Call, event: DropAsked, final: bool) -> list[Effect]:
        request = event.request
        net = self._networks.get(request.network_id)
        if net is None or net.tenant is None:
            return [Reply(event.ask)]
        if event.caller == net.standing.claimant:
            if request.epoch < net.standing.epoch:  # about an older allocation than the one here
                return [Reply(event.ask)]
            return [*self._end(net, tuple(request.vnodes)), Reply(event.ask)]
        if request.epoch < net.standing.epoch:
            return [Reply(event.ask, net.log.stale())]
        return self._ask_log(call, request.network_id, net.tenant.manifest, final)

    def _vouch(self, call: Call, event: ClaimShown, final: bool) -> list[Effect]:
        net = self._networks.get(event.network_id)
        if net is not None and net.log.is_behind:
            net = None  # who is newest here need not be the newest
        is_newest = net is not None and event.caller == net.standing.claimant
        if is_newest and (final or self.tenant(event.network_id) is not None):
            return [Reply(event.ask)]  # of what is not here nobody would tell us of a newer one
        try:
            shown = claim_in(event.claim, event.network_id, event.caller)
        except RemoteError as error:
            return [Reply(event.ask, refusal(common_pb2.REFUSAL_CODE_NOT_GRANTED, str(error)))]
        if net is not None and not is_newest and shown.epoch <= net.standing.epoch:
            return [Reply(event.ask, net.log.stale())]
        return self._ask_log(call, event.network_id, shown.manifest, final)

    # The log

    def _ask_log(
        self, call: Call, network_id: str, manifest: common_pb2.Signed, final: bool
    ) -> list[Effect]:
        net = self._networks.get(network_id)
        if final:  # it has been asked
            assert net is not None
            if call.claim is None:
                return [Reply(call.asked.ask, net.log.stale())]
            return [Reply(call.asked.ask, net.log.unknown(parse_entry(call.claim).claim.epoch))]
        is_read = net is not None and net.log.is_read
        if (net is not None and net.log.is_full) or (not is_read and self._reads() >= READS_MAX):
            return [busy(call, "too many ask this peer to read logs")]
        if net is None:
            net = self._networks[network_id] = Known(Follower(Standing(network_id)))
        if is_read:
            net.log.queue(call)
            return []
        net.log.manifest = net.log.manifest or manifest
        return [net.log.begin_read(call)]

    def _reads(self) -> int:
        return sum(1 for net in self._networks.values() if net.log.is_read)

    def _read(self, event: LogRead, now: float) -> list[Effect]:
        net = self._networks.get(event.network_id)
        if net is None or not net.log.is_read:
            return []
        effects: list[Effect] = []
        try:
            if net.log.take(event.entries):
                net.was_here = False
                effects += self._lapse(net, now)
                if net.kept is not None:
                    effects += self._keep(net)
        except RemoteError as error:
            silent = f"what was read of it does not hold: {error}"
            return self._read_ended(event.network_id, silent, now)
        net.log.is_behind = event.more
        return effects if event.more else effects + self._read_ended(event.network_id, "", now)

    def _read_ended(self, network_id: str, silent: str, now: float) -> list[Effect]:
        """Tries again who waited for the log; `silent`: why nothing was heard of it."""
        net = self._networks.get(network_id)
        if net is None or not net.log.is_read:
            return []
        self._networks[network_id] = self._networks.pop(network_id)  # the latest to be forgotten
        asked, queued = net.log.end_read()
        net.look_at = max(net.look_at, now + LOOK_AGAIN_S)
        effects: list[Effect] = []
        for call in asked:
            if silent and not isinstance(call.asked, ReadyAsked):
                effects.append(busy(call, f"the network's log cannot be read: {silent}"[:200]))
            else:
                effects += self._try(call, now, final=True)
        for call in queued:
            effects += self._try(call, now, final=False)
        return [*effects, *self._forget()]

    def _waited(self, net: Known, now: float) -> list[Effect]:
        """Answers whom a read keeps too long; it goes on."""
        effects: list[Effect] = []
        for call in net.log.overdue(now):
            if isinstance(call.asked, ReadyAsked):  # what it comes to is room, and there is some
                effects += self._try(call, now, final=True)
            else:
                effects.append(busy(call, "this peer still reads the network's log"))
        return effects

    # Small things

    def _keep(self, net: Known) -> list[Effect]:
        if net.kept == net.standing:
            return []
        net.kept = net.standing
        return [Persist(net.standing.network_id, net.standing.seal(net.log.claim))]

    def _not_kept(self, network_id: str) -> list[Effect]:
        net = self._networks.get(network_id)
        if net is None:
            return []
        ended = self._end(net)
        net.kept = None
        return [*ended, *self._forget()]

    def _lapse(self, net: Known, now: float) -> list[Effect]:
        """Under an older claim nothing counts any more.

        What is in memory may: the newer claim may go on from it, where VNodes have standbys.
        A claim after that may not, since it is not known here what came between.
        """
        tenant, earlier = net.tenant, self._let_go(net)
        if tenant is None or tenant.replicas < 2 or net.standing.closed:
            return [*earlier, *self._end(net)]
        net.tenant, net.spent = None, tenant.epoch
        net.lapsed, net.lapsed_until = tenant, now + LAPSED_S
        ended = (*tenant.sizes, *tenant.following)
        return [*earlier, End(tenant.network_id, ended, keep=True)]

    def _let_go(self, net: Known) -> list[Effect]:
        """What a newer claim has ended leaves the memory."""
        lapsed, net.lapsed = net.lapsed, None
        if lapsed is None:
            return []
        return [End(lapsed.network_id, (*lapsed.sizes, *lapsed.following))]

    def _end(self, net: Known, vnodes: tuple[str, ...] = ()) -> list[Effect]:
        """Lets VNodes of a network go, followed ones included; with none named, all."""
        tenant = net.tenant
        if tenant is None:
            return []
        here = (*tenant.sizes, *tenant.following)
        gone = dict.fromkeys(vnode for vnode in here if not vnodes or vnode in vnodes)
        left, followed = (
            {vnode: size for vnode, size in sizes.items() if vnode not in gone}
            for sizes in (tenant.sizes, tenant.following)
        )
        some = left or followed
        net.tenant = replace(tenant, sizes=left, following=followed) if some else None
        if not some:
            net.spent = tenant.epoch
        return [End(tenant.network_id, tuple(gone))] if gone else []

    def _tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for net in self._networks.values():
            effects += self._waited(net, now)
            if net.lapsed is not None and now >= net.lapsed_until:
                effects += self._let_go(net)
            if net.tenant is None:
                continue
            if now >= net.lease_until + ORPHANED_S:
                effects += self._end(net)
            elif now >= net.look_at and not net.log.is_read:
                net.look_at = now + LOOK_AGAIN_S
                if self._reads() < READS_MAX:
                    effects.append(net.log.begin_read())
        return effects

    def _forget(self) -> list[Effect]:
        """Networks that lived here long ago, and others than the last that were asked for."""
        idle = [
            network_id
            for network_id, net in self._networks.items()
            if net.tenant is None and net.lapsed is None and not net.log.is_read
        ]
        kept = [network_id for network_id in idle if self._networks[network_id].kept]
        heard = [network_id for network_id in idle if not self._networks[network_id].kept]
        over = kept[: max(0, len(kept) - KNOWN_MAX)]
        for network_id in (*over, *heard[: max(0, len(heard) - HEARD_MAX)]):
            del self._networks[network_id]
        return [Persist(network_id, None) for network_id in over]
