"""Why a host refuses a call or a claim, by what it knows of the network. Pure (DESIGN D6)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2pnet.v1 import common_pb2
from p2pnet.vnode.admission import Offer
from p2pnet.vnode.follower import Call, Follower
from p2pnet.vnode.network import refusal
from p2pnet.vnode.standing import Standing
from p2pnet.vnode.tenancy_events import Reply, Tenant

NETWORKS_MAX = 256  # hosted
VNODES_MAX = 10_000


@dataclass(slots=True)
class Known:
    """One network, as this host knows it: its log, and what lives here of it."""

    log: Follower
    kept: Standing | None = None  # as it is on disk
    spent: int = 0  # the newest epoch whose VNodes were here and are no longer
    was_here: bool = False  # before a restart, and no newer claim has been read since
    tenant: Tenant | None = None
    lapsed: Tenant | None = None  # ended by a newer claim, and still in memory
    lapsed_until: float = 0.0
    lease_until: float = 0.0
    look_at: float = 0.0  # when the log is asked whether the tenant still is one

    @property
    def standing(self) -> Standing:
        """What of the log is verified."""
        return self.log.standing


def refused_call(
    net: Known | None, epoch: int, vnode: str, now: float, *, me: str, following: bool
) -> common_pb2.Refusal | None:
    """See `Tenancy.refuse`; `me` is this host's peer id."""
    if net is None or not net.standing.epoch:
        return refusal(common_pb2.REFUSAL_CODE_NOT_HOSTED, f"this peer does not host {vnode[:80]}")
    host = net.log.placement.get(vnode, "")
    if net.standing.closed:
        return net.log.closed()
    if epoch < net.standing.epoch:
        return net.log.stale(host)
    tenant = net.tenant
    here = tenant is not None and (
        vnode in tenant.sizes or (following and vnode in tenant.following)
    )
    if tenant is None or not here:
        return refusal(
            common_pb2.REFUSAL_CODE_NOT_HOSTED,
            f"this peer does not host {vnode[:80]}",
            epoch=net.standing.epoch,
            host="" if host == me else host,
        )
    if epoch > net.standing.epoch:
        return net.log.unknown(epoch)
    if now > net.lease_until:
        return refusal(
            common_pb2.REFUSAL_CODE_LEASE_EXPIRED,
            f"the orchestrator of {tenant.name} has not renewed this peer's lease",
        )
    return None


def refused_caller(net: Known | None, caller: str, epoch: int | None) -> common_pb2.Refusal | None:
    """See `Tenancy.refuse_caller`."""
    if net is None or not net.standing.epoch:
        return refusal(
            common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK, "this peer hosts nothing of that network"
        )
    if net.standing.closed:
        return net.log.closed()
    if epoch is not None and epoch > net.standing.epoch:
        return net.log.unknown(epoch)
    if caller != net.standing.claimant or epoch not in (None, net.standing.epoch):
        return net.log.stale()
    if net.tenant is None:
        return refusal(
            common_pb2.REFUSAL_CODE_NOT_HOSTED,
            "this peer has nothing more of that network",
            epoch=net.standing.epoch,
        )
    return None


def outdone(net: Known, offer: Offer) -> common_pb2.Refusal | None:
    """Why a claim is not, or no longer, to be followed, by what is known of the log."""
    standing = net.standing
    if standing.closed:
        return net.log.closed()
    if offer.epoch < standing.epoch or (
        offer.epoch == standing.epoch and offer.claim != standing.claim
    ):
        return net.log.stale()
    gone = offer.epoch == standing.epoch and (
        offer.epoch == net.spent
        or (net.tenant and net.tenant.sizes != offer.sizes)
        or (net.tenant and net.tenant.following != offer.following)
    )
    if gone:
        return refusal(
            common_pb2.REFUSAL_CODE_FAILED,
            f"what this peer had under epoch {offer.epoch} is gone: place it anew",
            epoch=standing.epoch,
        )
    if offer.epoch > standing.epoch and offer.slot <= standing.slot:
        return net.log.unknown(offer.epoch)  # the log has something else there
    return None


def no_room(memory_bytes: int, others: Iterable[Known], offer: Offer) -> common_pb2.Refusal | None:
    """Why what is offered does not fit beside the other networks; None: it does."""
    nets = list(others)
    tenants = [net.tenant for net in nets if net.tenant is not None]
    lapsed = [net.lapsed for net in nets if net.lapsed is not None]
    free_bytes = memory_bytes - sum(it.size_bytes for it in (*tenants, *lapsed))
    hosted = sum(len(it.sizes) + len(it.following) for it in tenants)
    if (
        offer.size_bytes > free_bytes
        or hosted + len(offer.sizes) + len(offer.following) > VNODES_MAX
        or len(tenants) >= NETWORKS_MAX
    ):
        return refusal(
            common_pb2.REFUSAL_CODE_NO_MEMORY,
            f"{offer.size_bytes} bytes are asked for, and {max(0, free_bytes)} are free",
        )
    return None


def goes_on(offer: Offer, lapsed: Tenant | None) -> bool:
    """Whether all that is asked for was here, or was followed, under the very claim before."""
    return (
        lapsed is not None
        and lapsed.epoch == offer.epoch - 1
        and all(map(lapsed.has, (*offer.sizes, *offer.following)))
    )


def cannot_go_on(live_step: int, offer: Offer) -> common_pb2.Refusal:
    """What is said where it does not."""
    return refusal(
        common_pb2.REFUSAL_CODE_FAILED,
        f"this peer cannot go on from step {live_step}: it did not have all of "
        f"{offer.opened.name} that it is asked for under epoch {offer.epoch - 1}",
        epoch=offer.epoch,
    )


def leaving() -> common_pb2.Refusal:
    """What is said by a host that takes nothing new."""
    return refusal(common_pb2.REFUSAL_CODE_DRAINING, "this peer is leaving and takes nothing new")


def busy(call: Call, why: str) -> Reply:
    """What is said where the answer would take too long."""
    detail = f"{why}: try again in a moment"
    return Reply(call.asked.ask, refusal(common_pb2.REFUSAL_CODE_BUSY, detail))
