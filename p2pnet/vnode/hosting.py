"""A shell: the VNodes that run here, and the calls that may reach them.

What this host agrees to is `Tenancy`'s to decide; here its decisions become VNodes.
Lives on the gRPC thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from p2pnet.clock import wall_ms
from p2pnet.errors import P2PNetError
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, pnode_pb2
from p2pnet.vnode.admission import Limits
from p2pnet.vnode.courier import LOOKUP_TIMEOUT_S
from p2pnet.vnode.network import HostedNetwork, refusal
from p2pnet.vnode.tenancy_events import (
    AllocateAsked,
    Begin,
    ClaimShown,
    Drain,
    DropAsked,
    End,
    HeartbeatCame,
    ReadyAsked,
)
from p2pnet.vnode.tenancy_shell import TenancyShell

if TYPE_CHECKING:
    from p2pnet.vnode.trainee import Trainee

Found = tuple[HostedNetwork, "Trainee"] | common_pb2.Refusal


@dataclass(frozen=True, slots=True)
class Usage:
    """What is hosted: how many VNodes, and the memory that they are admitted for."""

    vnodes: int
    memory_bytes: int


class Hosting:
    """The networks that have VNodes here, and the VNodes.

    Attributes:
        usage, claimants: replaced and never changed, since other threads read them;
            the orchestrators of what lives here, by peer id.
    """

    def __init__(
        self,
        swarm: Swarm,
        new_trainee: Callable[[str, HostedNetwork], Trainee],
        limits: Limits,
        directory: Path,
    ) -> None:
        self.usage = Usage(0, 0)
        self.claimants: tuple[str, ...] = ()
        self._swarm = swarm
        self._new_trainee = new_trainee
        self._networks: dict[str, HostedNetwork] = {}
        self._trainees: dict[tuple[str, str], Trainee] = {}
        self._states: dict[tuple[str, str], common_pb2.BlobRef] = {}
        self._tenancy = TenancyShell(swarm, limits, directory, self._carry_out)
        self._closing = TaskSet("VNodes that are let go")

    async def close(self) -> None:
        """Stops every VNode."""
        await self._tenancy.close()
        await self._closing.close()
        await asyncio.gather(*(trainee.close() for trainee in self._trainees.values()))
        self._trainees.clear()
        self._note_usage()

    # Asking the core

    async def allocate(
        self, request: pnode_pb2.AllocateRequest, caller: str
    ) -> HostedNetwork | common_pb2.Refusal:
        """Hosts `request.vnodes` under its claim, and no others of that network."""
        no = await self._tenancy.ask(lambda ask: AllocateAsked(ask, caller, request, wall_ms()))
        net = self._networks.get(request.network_id)
        if no is not None:
            return no
        if net is None or net.epoch != request.epoch:  # and over again already
            return refusal(
                common_pb2.REFUSAL_CODE_STALE_EPOCH,
                "a newer claim came meanwhile",
                epoch=0 if net is None else net.epoch,
            )
        return net

    async def ready(
        self, request: pnode_pb2.ReadyRequest, caller: str
    ) -> common_pb2.Refusal | None:
        """Why VNodes could not be hosted here; None: they could."""
        return await self._tenancy.ask(lambda ask: ReadyAsked(ask, caller, request, wall_ms()))

    async def renew(
        self, request: pnode_pb2.HeartbeatRequest, caller: str
    ) -> common_pb2.Refusal | None:
        """The network's orchestrator is there."""
        return await self._tenancy.ask(lambda ask: HeartbeatCame(ask, caller, request))

    async def drop(self, request: pnode_pb2.DropRequest, caller: str) -> common_pb2.Refusal | None:
        """Lets VNodes of a network go, or with none named all."""
        return await self._tenancy.ask(lambda ask: DropAsked(ask, caller, request))

    async def vouch(
        self, network_id: str, caller: str, claim: common_pb2.Signed
    ) -> common_pb2.Refusal | None:
        """Whether a caller orchestrates a network, hosted here or not: by its log."""
        return await self._tenancy.ask(lambda ask: ClaimShown(ask, caller, network_id, claim))

    def drain(self) -> None:
        """Nothing new is taken from now on."""
        self._tenancy.tell(Drain())

    # Looking

    @property
    def draining(self) -> bool:
        """Whether this host takes nothing new."""
        return self._tenancy.core.draining

    def claims(self) -> list[tuple[common_pb2.Signed, bool]]:
        """The claims that VNodes are hosted under; see `Tenancy.claims`."""
        return self._tenancy.core.claims()

    def network_of(
        self, network_id: str, caller: str, epoch: int | None = None
    ) -> HostedNetwork | common_pb2.Refusal:
        """The network, if it is that orchestrator's (and at that epoch), or why not."""
        if no := self._tenancy.core.refuse_caller(network_id, caller, epoch):
            return no
        net = self._networks.get(network_id)
        return _beginning() if net is None else net

    def find(self, network_id: str, epoch: int, vnode: str) -> Found:
        """The VNode, or why a call for it is refused."""
        if no := self._tenancy.core.refuse(network_id, epoch, vnode, self._swarm.now()):
            return no
        net = self._networks.get(network_id)
        trainee = self._trainees.get((network_id, vnode))
        if net is None or trainee is None or net.epoch != epoch:
            return _beginning()
        return net, trainee

    async def find_or_point(self, network_id: str, epoch: int, vnode: str) -> Found:
        """As `find`; the refusal says where the VNode has gone, if the log or the DHT knows."""
        found = self.find(network_id, epoch, vnode)
        if (
            isinstance(found, common_pb2.Refusal)
            and found.code
            in (common_pb2.REFUSAL_CODE_NOT_HOSTED, common_pb2.REFUSAL_CODE_LEASE_EXPIRED)
            and not found.host
        ):
            try:
                elsewhere = await self._swarm.find_allocations(
                    network_id, vnode, timeout_s=LOOKUP_TIMEOUT_S
                )
            except P2PNetError:
                return found
            me = self._swarm.keypair.peer_id
            if elsewhere and elsewhere[0].epoch >= found.epoch and elsewhere[0].host != me:
                found.host, found.epoch = elsewhere[0].host, elsewhere[0].epoch
        return found

    def state_of(self, network_id: str, vnode: str) -> common_pb2.BlobRef | None:
        """The state that a VNode begins with; None: it is initialised from the seed."""
        return self._states.get((network_id, vnode))

    def begin_from(self, network_id: str, vnode: str, state: common_pb2.BlobRef) -> None:
        """The state that a VNode begins with, if it has not begun."""
        self._states[network_id, vnode] = state

    def rows(self, network_id: str) -> list[pnode_pb2.HostedVNode]:
        """What is hosted of a network, or with "" of all, for who asks."""
        return [
            pnode_pb2.HostedVNode(
                network_id=net,
                vnode=vnode,
                epoch=self._networks[net].epoch,
                step=trainee.step,
                instantiated=trainee.component is not None,
                error=trainee.error,
            )
            for (net, vnode), trainee in sorted(self._trainees.items())
            if network_id in ("", net)
        ]

    def forget_locations(self) -> None:
        """Empties every cache of where VNodes live; the DHT knows."""
        for net in self._networks.values():
            net.locations.clear()

    # Doing what the core decides

    def _carry_out(self, effect: Begin | End) -> None:
        if isinstance(effect, Begin):
            self._begin(effect)
        else:
            self._end(effect)
        self._note_usage()

    def _begin(self, effect: Begin) -> None:
        tenant, request = effect.tenant, effect.request
        net = HostedNetwork(
            network_id=tenant.network_id,
            graph=effect.offer.graph,
            manifest=tenant.manifest,
            epoch=tenant.epoch,
            claimant=tenant.claimant,
            base_step=request.step,
            state_url=tenant.state_url,
            locations=dict(effect.offer.placement),
        )
        self._networks[tenant.network_id] = net
        for vnode in tenant.sizes:
            key = (tenant.network_id, vnode)
            if vnode in request.states:
                self._states[key] = request.states[vnode]
            self._trainees[key] = self._new_trainee(vnode, net)
        self._swarm.emit(
            "allocated",
            network=net.graph.name,
            network_id=net.network_id,
            epoch=net.epoch,
            vnodes=list(tenant.sizes),
            peer=net.claimant,
        )

    def _end(self, effect: End) -> None:
        net = self._networks.get(effect.network_id)
        if net is None:
            return
        gone = [vnode for vnode in effect.vnodes if (net.network_id, vnode) in self._trainees]
        for vnode in gone:
            self._states.pop((net.network_id, vnode), None)
            self._closing.spawn(self._trainees.pop((net.network_id, vnode)).close())
        if not any(network_id == net.network_id for network_id, _ in self._trainees):
            del self._networks[net.network_id]
        if gone:
            self._swarm.emit(
                "dropped",
                network=net.graph.name,
                network_id=net.network_id,
                epoch=net.epoch,
                vnodes=gone,
                peer=net.claimant,
            )

    def _note_usage(self) -> None:
        tenants = self._tenancy.core.tenants()
        used_bytes = sum(tenant.size_bytes for tenant in tenants)
        self.usage = Usage(sum(len(tenant.sizes) for tenant in tenants), used_bytes)
        self.claimants = tuple(sorted(dict.fromkeys(tenant.claimant for tenant in tenants)))


def _beginning() -> common_pb2.Refusal:
    return refusal(
        common_pb2.REFUSAL_CODE_BUSY, "this peer is about to begin with it: try again in a moment"
    )
