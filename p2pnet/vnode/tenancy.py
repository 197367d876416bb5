"""What one PNode hosts and under whose claim: the fence at the host. A pure core (DESIGN D6).

A claim is believed when the network's log has it, and the newest one counts. What is
known of a log is on disk (`Persist`) before an answer that rests on it leaves
(`Reply`), so that a host that was restarted falls for no claim that it has seen
outdone. VNodes themselves are not restored: whoever orchestrates notices, and places
them under a new claim.

At most one log read a network is under way. Who asks meanwhile waits for it, and for
one more where his claim may have been decided only after it began.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from p2pnet.core import Tick
from p2pnet.dht.manifest import open_manifest
from p2pnet.errors import ForgedError, LocalError, MalformedError, RemoteError
from p2pnet.keys import LOG_ENTRY, short, verify
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import manifest_grants, placement_of
from p2pnet.v1 import common_pb2, log_pb2
from p2pnet.vnode.admission import LEASE_S_MAX, Limits, Offer, examine, examine_manifest
from p2pnet.vnode.network import refusal
from p2pnet.vnode.standing import Standing, follow, unseal_standing
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
    ReadLog,
    ReadyAsked,
    Reply,
    Tenant,
)

logger = logging.getLogger(__name__)

NETWORKS_MAX = 256  # hosted
KNOWN_MAX = 1024  # hosted now or once; of others the log tells again
VNODES_MAX = 10_000
READS_MAX = 32  # of logs, at once
WAITING_MAX = 16  # for one read
QUIET_S = 3.0  # without a heartbeat, until a host asks the log whether it has been replaced
LOOK_AGAIN_S = 10.0
ORPHANED_S = 600.0  # how long after its lease a VNode is kept for an orchestrator to come back


# What waits for a log read: tried again after it, when `final` with what is known then.
_Waiting = AllocateAsked | DropAsked | ClaimShown


@dataclass(slots=True)
class _Network:
    standing: Standing
    manifest: common_pb2.Signed | None = None
    kept: Standing | None = None  # as it is on disk
    spent: int = 0  # the newest epoch whose VNodes were here and are no longer
    tenant: Tenant | None = None
    lease_until: float = 0.0
    claim: common_pb2.Signed | None = None  # the newest, unless it was read before a restart
    placement: Mapping[str, str] = field(default_factory=dict)  # as that claim says
    look_at: float = 0.0  # when the log is asked whether the tenant still is one
    is_read: bool = False  # whether a read is under way
    reading: list[_Waiting] = field(default_factory=list)  # who waits for it
    queued: list[_Waiting] = field(default_factory=list)  # came after it began


class Tenancy:
    """The networks that this PNode hosts, or has hosted, by network id."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._networks: dict[str, _Network] = {}  # the least recently changed first
        self._draining = False

    # The core

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Takes one event and says what is to be done, in that order."""
        match event:
            case AllocateAsked() | DropAsked() | ClaimShown():
                return self._try(event, now, final=False)
            case ReadyAsked():
                return [Reply(event.ask, self._not_ready(event))]
            case HeartbeatCame():
                return self._renew(event, now)
            case LogRead():
                return self._read(event.network_id, event.entries, "", now)
            case LogSilent():
                return self._read(event.network_id, (), event.reason, now)
            case NotPersisted():
                return self._not_kept(event.network_id)
            case Drain():
                self._draining = True
                return []
            case Tick():
                return self._tick(now)

    def deadline(self) -> float | None:
        """When an orchestrator has not been heard of for so long that the log is asked, or no more.

        Who was stopped for a while learns so that he has been replaced.
        """
        return min(
            (
                net.lease_until + ORPHANED_S if net.is_read else net.look_at
                for net in self._networks.values()
                if net.tenant is not None
            ),
            default=None,
        )

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        tenants = self.tenants()
        assert len(tenants) <= NETWORKS_MAX
        assert sum(tenant.size_bytes for tenant in tenants) <= self._limits.memory_bytes
        for network_id, net in self._networks.items():
            assert net.standing.network_id == network_id
            assert net.is_read or not (net.reading or net.queued)
            assert net.spent <= net.standing.epoch
            if net.tenant is not None:
                assert net.kept is not None
                assert net.kept.epoch >= net.tenant.epoch
                assert net.tenant.sizes
                assert not net.standing.closed
                assert net.tenant.epoch == net.standing.epoch > net.spent
                assert net.tenant.claimant == net.standing.claimant

    def dump(self) -> dict[str, bytes]:
        """What is on disk, by network id."""
        return {id_: net.kept.seal() for id_, net in self._networks.items() if net.kept}

    @classmethod
    def load(cls, limits: Limits, records: Mapping[str, bytes]) -> Self:
        """What a host knows after a restart. A damaged record is no knowledge: the log tells."""
        self = cls(limits)
        for network_id in sorted(records)[:KNOWN_MAX]:
            try:
                standing = unseal_standing(network_id, records[network_id])
            except LocalError as error:
                logger.warning("what was kept of network %s is not used: %s", network_id, error)
                continue
            self._networks[network_id] = _Network(standing, kept=standing, spent=standing.epoch)
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
        """Of every network that is hosted the claim, and of those that were closed here the last.

        Each with whether the network is closed.
        """
        nets = (self._networks[network_id] for network_id in sorted(self._networks))
        return [
            (net.claim, net.standing.closed)
            for net in nets
            if net.claim is not None and (net.tenant is not None or net.standing.closed)
        ]

    def standing(self, network_id: str) -> Standing | None:
        """What is known of a network's log."""
        net = self._networks.get(network_id)
        return None if net is None else net.standing

    def refuse(
        self, network_id: str, epoch: int, vnode: str, now: float
    ) -> common_pb2.Refusal | None:
        """Why a call for a VNode is refused; None: it is in date, and the VNode lives here."""
        net = self._networks.get(network_id)
        if net is None or not net.standing.epoch:
            return refusal(
                common_pb2.REFUSAL_CODE_NOT_HOSTED, f"this peer does not host {vnode[:80]}"
            )
        host = net.placement.get(vnode, "")
        if net.standing.closed:
            return _closed(net)
        if epoch < net.standing.epoch:
            return _stale(net, host)
        if net.tenant is None or vnode not in net.tenant.sizes:
            return refusal(
                common_pb2.REFUSAL_CODE_NOT_HOSTED,
                f"this peer does not host {vnode[:80]}",
                epoch=net.standing.epoch,
                host="" if host == self._limits.me else host,
            )
        if epoch > net.standing.epoch:
            return _unknown(net.standing, epoch)
        if now > net.lease_until:
            return refusal(
                common_pb2.REFUSAL_CODE_LEASE_EXPIRED,
                f"the orchestrator of {net.tenant.name} has not renewed this peer's lease",
            )
        return None

    def refuse_caller(
        self, network_id: str, caller: str, epoch: int | None = None
    ) -> common_pb2.Refusal | None:
        """Why a call that only the network's orchestrator may make is refused."""
        net = self._networks.get(network_id)
        if net is None or not net.standing.epoch:
            return refusal(
                common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK, "this peer hosts nothing of that network"
            )
        if net.standing.closed:
            return _closed(net)
        if epoch is not None and epoch > net.standing.epoch:
            return _unknown(net.standing, epoch)
        if caller != net.standing.claimant or epoch not in (None, net.standing.epoch):
            return _stale(net)
        if net.tenant is None:
            return refusal(
                common_pb2.REFUSAL_CODE_NOT_HOSTED,
                "this peer has nothing more of that network",
                epoch=net.standing.epoch,
            )
        return None

    # Deciding

    def _try(self, event: _Waiting, now: float, *, final: bool) -> list[Effect]:
        """Answers a call if that can be done; else, unless `final`, asks the log first."""
        if isinstance(event, AllocateAsked):
            return self._allocate(event, now, final)
        if isinstance(event, DropAsked):
            return self._drop(event, final)
        return self._vouch(event, final)

    def _allocate(self, event: AllocateAsked, now: float, final: bool) -> list[Effect]:
        request = event.request
        offer = examine(request, event.caller, self._limits, event.wall_ms)
        if isinstance(offer, common_pb2.Refusal):
            return [Reply(event.ask, offer)]
        net = self._networks.get(offer.network_id)
        if net is not None and (no := self._outdone(net, offer)):
            return [Reply(event.ask, no)]
        if no := self._no_room(offer):
            return [Reply(event.ask, no)]
        if net is None or offer.epoch > net.standing.epoch:
            return self._ask_log(event, offer.network_id, offer.manifest, final)
        if net.tenant is not None:  # said twice: an answer was lost
            net.lease_until = max(net.lease_until, now + request.lease_s)
            net.look_at = now + QUIET_S
            return [Reply(event.ask)]
        net.tenant = Tenant(
            network_id=offer.network_id,
            name=offer.opened.name,
            manifest=offer.manifest,
            epoch=offer.epoch,
            claimant=offer.claimant,
            sizes=offer.sizes,
            state_url=offer.opened.state_url,
        )
        net.manifest = offer.manifest
        net.lease_until = now + request.lease_s
        net.look_at = now + QUIET_S
        return [*self._keep(net), Begin(net.tenant, offer, request), Reply(event.ask)]

    def _outdone(self, net: _Network, offer: Offer) -> common_pb2.Refusal | None:
        """Why a claim is not, or no longer, to be followed, by what is known of the log."""
        standing = net.standing
        if standing.closed:
            return _closed(net)
        if offer.epoch < standing.epoch or (
            offer.epoch == standing.epoch and offer.claim != standing.claim
        ):
            return _stale(net)
        gone = offer.epoch == standing.epoch and (
            offer.epoch == net.spent or (net.tenant and net.tenant.sizes != offer.sizes)
        )
        if gone:
            return refusal(
                common_pb2.REFUSAL_CODE_FAILED,
                f"what this peer had under epoch {offer.epoch} is gone: place it anew",
                epoch=standing.epoch,
            )
        if offer.epoch > standing.epoch and offer.slot <= standing.slot:
            return _unknown(net.standing, offer.epoch)  # the log has something else there
        return None

    def _no_room(self, offer: Offer) -> common_pb2.Refusal | None:
        others = [it for it in self.tenants() if it.network_id != offer.network_id]
        if self._draining and self.tenant(offer.network_id) is None:
            return refusal(
                common_pb2.REFUSAL_CODE_DRAINING, "this peer is leaving and takes nothing new"
            )
        free_bytes = self._limits.memory_bytes - sum(it.size_bytes for it in others)
        if (
            offer.size_bytes > free_bytes
            or sum(len(it.sizes) for it in others) + len(offer.sizes) > VNODES_MAX
            or len(others) >= NETWORKS_MAX
        ):
            return refusal(
                common_pb2.REFUSAL_CODE_NO_MEMORY,
                f"{offer.size_bytes} bytes are asked for, and {max(0, free_bytes)} are free",
            )
        return None

    def _not_ready(self, event: ReadyAsked) -> common_pb2.Refusal | None:
        offer = examine_manifest(event.request, event.caller, self._limits, event.wall_ms)
        if isinstance(offer, common_pb2.Refusal):
            return offer
        net = self._networks.get(offer.network_id)
        if net is not None and net.standing.closed:
            return _closed(net)
        if self._draining:
            return refusal(
                common_pb2.REFUSAL_CODE_DRAINING, "this peer is leaving and takes nothing new"
            )
        return self._no_room(offer)

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

    def _drop(self, event: DropAsked, final: bool) -> list[Effect]:
        request = event.request
        net = self._networks.get(request.network_id)
        if net is None or net.tenant is None:
            return [Reply(event.ask)]
        if event.caller == net.standing.claimant:
            if request.epoch < net.standing.epoch:  # about an older allocation than the one here
                return [Reply(event.ask)]
            return [*self._end(net, tuple(request.vnodes)), Reply(event.ask)]
        if request.epoch < net.standing.epoch:
            return [Reply(event.ask, _stale(net))]
        return self._ask_log(event, request.network_id, net.tenant.manifest, final)

    def _vouch(self, event: ClaimShown, final: bool) -> list[Effect]:
        net = self._networks.get(event.network_id)
        if net is not None and net.standing.epoch and event.caller == net.standing.claimant:
            return [Reply(event.ask)]
        try:
            shown = claim_in(event.claim, event.network_id, event.caller)
        except RemoteError as error:
            return [Reply(event.ask, refusal(common_pb2.REFUSAL_CODE_NOT_GRANTED, str(error)))]
        if net is not None and shown.epoch <= net.standing.epoch:
            return [Reply(event.ask, _stale(net))]
        return self._ask_log(event, event.network_id, shown.manifest, final)

    # The log

    def _ask_log(
        self, event: _Waiting, network_id: str, manifest: common_pb2.Signed, final: bool
    ) -> list[Effect]:
        net = self._networks.get(network_id)
        if final:  # it has been asked
            assert net is not None
            if isinstance(event, DropAsked):
                return [Reply(event.ask, _stale(net))]
            epoch = parse_entry(_claim_of(event)).claim.epoch
            return [Reply(event.ask, _unknown(net.standing, epoch))]
        if net is None:
            net = self._networks[network_id] = _Network(Standing(network_id))
        if len(net.reading) + len(net.queued) >= WAITING_MAX or (
            not net.is_read and self._reads() >= READS_MAX
        ):
            self._forget()
            busy = "too many ask this peer to read logs: try again in a moment"
            return [Reply(event.ask, refusal(common_pb2.REFUSAL_CODE_BUSY, busy))]
        if net.is_read:
            net.queued.append(event)
            return []
        net.reading.append(event)
        if net.manifest is None:
            net.manifest = manifest
        return [self._read_for(net, None if isinstance(event, DropAsked) else _claim_of(event))]

    def _reads(self) -> int:
        return sum(1 for net in self._networks.values() if net.is_read)

    def _read_for(self, net: _Network, claim: common_pb2.Signed | None) -> ReadLog:
        assert net.manifest is not None
        net.is_read = True
        standing = net.standing
        return ReadLog(
            standing.network_id,
            net.manifest,
            standing.slot + 1,
            standing.keepers if standing.slot else _first_keepers(net.manifest),
            claim,
        )

    def _read(
        self, network_id: str, entries: tuple[common_pb2.Signed, ...], silent: str, now: float
    ) -> list[Effect]:
        net = self._networks.get(network_id)
        if net is None or not net.is_read or net.manifest is None:
            return []
        asked, net.reading, net.is_read = net.reading, [], False
        net.look_at = max(net.look_at, now + LOOK_AGAIN_S)
        effects: list[Effect] = []
        if not silent:
            try:
                effects += self._advance(net, *follow(net.standing, net.manifest, entries))
            except RemoteError as error:
                silent = f"what was read of it does not hold: {error}"
        if silent:
            said = f"the log of the network cannot be read: {silent}"
            busy = refusal(common_pb2.REFUSAL_CODE_BUSY, said[:200])
            effects += [Reply(event.ask, busy) for event in asked]
        else:
            for event in asked:
                effects += self._try(event, now, final=True)
        waiting, net.queued = net.queued, []
        for event in waiting:
            effects += self._try(event, now, final=False)
        return [*effects, *self._forget()]

    def _advance(
        self, net: _Network, standing: Standing, newest: common_pb2.Signed | None
    ) -> list[Effect]:
        if standing == net.standing:
            return []
        net.standing = standing
        if newest is not None:
            net.claim, net.placement = newest, placement_of(parse_entry(newest).claim)
        effects: list[Effect] = []
        if newest is not None or standing.closed:
            effects += self._end(net)  # under the older claim nothing counts any more
            if net.kept is not None:
                effects += self._keep(net)
        return effects

    # Small things

    def _keep(self, net: _Network) -> list[Effect]:
        network_id = net.standing.network_id
        self._networks[network_id] = self._networks.pop(network_id)  # the latest to be forgotten
        if net.kept == net.standing:
            return []
        net.kept = net.standing
        return [Persist(network_id, net.standing.seal())]

    def _not_kept(self, network_id: str) -> list[Effect]:
        net = self._networks.get(network_id)
        if net is None:
            return []
        ended = self._end(net)
        net.kept = None
        return [*ended, *self._forget()]

    def _end(self, net: _Network, vnodes: tuple[str, ...] = ()) -> list[Effect]:
        """Lets VNodes of a network go; with none named, all."""
        tenant = net.tenant
        if tenant is None:
            return []
        gone = {
            vnode: size for vnode, size in tenant.sizes.items() if vnode in (vnodes or tenant.sizes)
        }
        left = {vnode: size for vnode, size in tenant.sizes.items() if vnode not in gone}
        net.tenant = replace(tenant, sizes=left) if left else None
        if not left:
            net.spent = tenant.epoch
        return [End(tenant.network_id, tuple(gone))] if gone else []

    def _tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for net in self._networks.values():
            if net.tenant is None:
                continue
            if now >= net.lease_until + ORPHANED_S:
                effects += self._end(net)
            elif now >= net.look_at and not net.is_read:
                net.look_at = now + LOOK_AGAIN_S
                if self._reads() < READS_MAX:
                    effects.append(self._read_for(net, None))
        return effects

    def _forget(self) -> list[Effect]:
        """Networks that never lived here, and of those that did the ones of long ago."""
        idle = [
            network_id
            for network_id, net in self._networks.items()
            if net.tenant is None and not net.is_read
        ]
        known = [network_id for network_id in idle if self._networks[network_id].kept]
        over = known[: max(0, len(known) - KNOWN_MAX)]
        for network_id in idle:
            if network_id in over or self._networks[network_id].kept is None:
                del self._networks[network_id]
        return [Persist(network_id, None) for network_id in over]


def claim_in(signed: common_pb2.Signed, network_id: str, caller: str) -> log_pb2.Claim:
    """The claim of `caller` for that network in a signed log entry.

    Raises:
        MalformedError, ForgedError: it is none, or the owner does not grant it.
    """
    entry = parse_entry(signed)
    if entry.WhichOneof("what") != "claim" or entry.network_id != network_id:
        raise MalformedError("what is shown is not a claim of that network")
    if verify(LOG_ENTRY, signed) != caller or entry.claim.orchestrator != caller:
        raise ForgedError("a claim that another than the caller made")
    if not manifest_grants(network_id, entry.claim.manifest, caller):
        raise ForgedError(f"the network's owner does not let {short(caller)} orchestrate it")
    return entry.claim


def _claim_of(event: AllocateAsked | ClaimShown) -> common_pb2.Signed:
    return event.request.claim if isinstance(event, AllocateAsked) else event.claim


def _first_keepers(manifest: common_pb2.Signed) -> tuple[str, ...]:
    return tuple(open_manifest(manifest).keepers)


def _closed(net: _Network) -> common_pb2.Refusal:
    return refusal(
        common_pb2.REFUSAL_CODE_CLOSED,
        "the network's owner has ended it",
        epoch=net.standing.epoch,
    )


def _stale(net: _Network, host: str = "") -> common_pb2.Refusal:
    return refusal(
        common_pb2.REFUSAL_CODE_STALE_EPOCH,
        f"the network is at epoch {net.standing.epoch} under {short(net.standing.claimant)}",
        epoch=net.standing.epoch,
        host=host,
    )


def _unknown(standing: Standing, epoch: int) -> common_pb2.Refusal:
    has = f"its newest claim has epoch {standing.epoch}" if standing.epoch else "it has no claim"
    return refusal(
        common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH,
        f"the network's log has no claim of epoch {epoch}, as far as this peer knows: {has}",
        epoch=standing.epoch,
    )
