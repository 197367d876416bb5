"""A shell: the VNodes that run here, and the calls that may reach them.

What this host agrees to is `Tenancy`'s to decide; here its decisions become VNodes.
Lives on the gRPC thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from p2pnet.clock import wall_ms
from p2pnet.errors import LocalError, P2PNetError
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
    from p2pnet.vnode.components import Component
    from p2pnet.vnode.crew import Adopt, Crew
    from p2pnet.vnode.standby import Following

    Found = tuple[HostedNetwork, Crew] | common_pb2.Refusal
    Answering = tuple[HostedNetwork, Crew | Following] | common_pb2.Refusal


@dataclass(frozen=True, slots=True)
class Usage:
    """What is hosted: how many VNodes, and the memory that they are admitted for."""

    vnodes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Present:
    """What runs here of a network: VNodes of its own, and those that are followed."""

    net: HostedNetwork
    crew: Crew | None
    following: Following | None

    async def close(self) -> None:
        """Stops; states stay in memory."""
        for part in (self.crew, self.following):
            if part is not None:
                await part.close()


class Hosting:
    """The networks that have VNodes here, and the VNodes.

    Attributes:
        usage, claimants: replaced and never changed, since other threads read them;
            the orchestrators of what lives here, by peer id.
    """

    def __init__(
        self,
        swarm: Swarm,
        begin: Callable[[HostedNetwork, Sequence[str], Sequence[str], Adopt | None], Present],
        limits: Limits,
        directory: Path,
    ) -> None:
        """`begin` runs VNodes, and follows others, of a network."""
        self.usage = Usage(0, 0)
        self.claimants: tuple[str, ...] = ()
        self._swarm = swarm
        self._begin_with = begin
        self._present: dict[str, Present] = {}
        self._kept: dict[str, Present] = {}  # stopped; a newer claim may go on from there
        self._states: dict[tuple[str, str], common_pb2.BlobRef] = {}
        self._tenancy = TenancyShell(swarm, limits, directory, self._carry_out)
        self._closing = TaskSet("VNodes that are let go")

    async def close(self) -> None:
        """Stops every VNode."""
        await self._tenancy.close()
        await self._closing.close()
        await asyncio.gather(*(present.close() for present in self._present.values()))
        self._present.clear()
        self._kept.clear()
        self._note_usage()

    # Asking the core

    async def allocate(
        self, request: pnode_pb2.AllocateRequest, caller: str
    ) -> HostedNetwork | common_pb2.Refusal:
        """Hosts and follows VNodes under the request's claim, and no others of that network."""
        no = await self._tenancy.ask(lambda ask: AllocateAsked(ask, caller, request, wall_ms()))
        present = self._present.get(request.network_id)
        if no is not None:
            return no
        if present is None or present.net.epoch != request.epoch:  # and over again already
            return refusal(
                common_pb2.REFUSAL_CODE_STALE_EPOCH,
                "a newer claim came meanwhile",
                epoch=0 if present is None else present.net.epoch,
            )
        if request.live_step:
            try:  # from memory: what is not there shall be known before anything goes on
                for part in (present.crew, present.following):
                    if part is not None:
                        await part.ready()
            except P2PNetError as error:
                return refusal(common_pb2.REFUSAL_CODE_FAILED, str(error))
        return present.net

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

    def graph_of(self, network_id: str) -> HostedNetwork | None:
        """What is known of a network that has VNodes here."""
        present = self._present.get(network_id)
        return None if present is None else present.net

    def network_of(self, network_id: str, caller: str, epoch: int | None = None) -> Found:
        """The VNodes here, if the network is that caller's (and of that epoch), or why not."""
        if no := self._tenancy.core.refuse_caller(network_id, caller, epoch):
            return no
        present = self._present.get(network_id)
        if present is None or present.crew is None:
            return _beginning()
        return present.net, present.crew

    def find(self, network_id: str, epoch: int, node: str) -> Found:
        """The VNodes here with that node among them, or why a call for it is refused."""
        if no := self._refuse(network_id, epoch, node):
            return no
        present = self._present.get(network_id)
        if present is None or present.crew is None or present.net.epoch != epoch:
            return _beginning()
        return present.net, present.crew

    def find_present(self, network_id: str, epoch: int) -> Present | common_pb2.Refusal:
        """All that runs of a network here, for a call that is for all of it."""
        present = self._present.get(network_id)
        parts = () if present is None else (present.crew, present.following)
        vnodes = [vnode for part in parts if part is not None for vnode in part.vnodes]
        if no := self._refuse(network_id, epoch, vnodes[0] if vnodes else "", following=True):
            return no
        return _beginning() if present is None or present.net.epoch != epoch else present

    def find_answering(
        self, network_id: str, epoch: int, node: str, *, standby: bool = False
    ) -> Answering:
        """As `find`, or the standby of that node: who answers forward passes."""
        if no := self._refuse(network_id, epoch, node, following=standby):
            return no
        present = self._present.get(network_id)
        if present is None or present.net.epoch != epoch:
            return _beginning()
        part = present.following if standby else present.crew
        if part is None or present.net.graph.home(node) not in part.vnodes:
            return _beginning()
        return present.net, part

    def find_following(
        self, network_id: str, epoch: int, vnode: str
    ) -> tuple[HostedNetwork, Following] | common_pb2.Refusal:
        """The standby of a VNode, or why there is none."""
        if no := self._refuse(network_id, epoch, vnode, following=True):
            return no
        present = self._present.get(network_id)
        following = None if present is None else present.following
        if present is None or following is None or vnode not in following.vnodes:
            return _beginning()
        return present.net, following

    async def point(self, network_id: str, node: str, no: common_pb2.Refusal) -> common_pb2.Refusal:
        """A refusal that says where the VNode has gone, too, if the log or the DHT knows."""
        gone = (common_pb2.REFUSAL_CODE_NOT_HOSTED, common_pb2.REFUSAL_CODE_LEASE_EXPIRED)
        if no.code in gone and not no.host:
            try:
                elsewhere = await self._swarm.find_allocations(
                    network_id, self._home(network_id, node), timeout_s=LOOKUP_TIMEOUT_S
                )
            except P2PNetError:
                return no
            me = self._swarm.keypair.peer_id
            if elsewhere and elsewhere[0].epoch >= no.epoch and elsewhere[0].host != me:
                no.host, no.epoch = elsewhere[0].host, elsewhere[0].epoch
        return no

    def state_of(self, network_id: str, vnode: str) -> common_pb2.BlobRef | None:
        """The state that a VNode begins with; None: it is initialised from the seed."""
        return self._states.get((network_id, vnode))

    def begin_from(self, network_id: str, vnode: str, state: common_pb2.BlobRef) -> None:
        """The state that a VNode begins with, if it has not begun."""
        self._states[network_id, vnode] = state

    def rows(self, network_id: str) -> list[pnode_pb2.HostedVNode]:
        """What is hosted of a network, or with "" of all, for who asks."""
        rows = []
        for name, present in sorted(self._present.items()):
            if network_id in ("", name):
                rows += _rows_of(name, present)
        return rows

    def forget_locations(self) -> None:
        """Empties every cache of where VNodes live; the DHT knows."""
        for present in self._present.values():
            present.net.locations.clear()

    def _home(self, network_id: str, node: str) -> str:
        """The VNode of a node, where its network is known here."""
        present = self._present.get(network_id)
        try:
            return node if present is None else present.net.graph.home(node)
        except KeyError:
            return node

    def _refuse(
        self, network_id: str, epoch: int, node: str, *, following: bool = False
    ) -> common_pb2.Refusal | None:
        return self._tenancy.core.refuse(
            network_id,
            epoch,
            self._home(network_id, node),
            self._swarm.now(),
            following=following,
        )

    # Doing what the core decides

    def _carry_out(self, effect: Begin | End) -> None:
        if isinstance(effect, Begin):
            self._begin(effect)
        else:
            self._end(effect)
        self._note_usage()

    def _begin(self, effect: Begin) -> None:
        tenant, request = effect.tenant, effect.request
        before = self._kept.pop(tenant.network_id, None)
        live_step = request.live_step if effect.live else 0
        net = HostedNetwork(
            network_id=tenant.network_id,
            graph=effect.offer.graph,
            manifest=tenant.manifest,
            epoch=tenant.epoch,
            claimant=tenant.claimant,
            base_step=live_step or request.step,
            state_url=tenant.state_url,
            placement=effect.offer.placement,
            locations=dict(effect.offer.placement),
            standbys=dict(effect.offer.standbys),
        )
        for vnode in (*tenant.sizes, *tenant.following):
            if vnode in request.states:
                self._states[tenant.network_id, vnode] = request.states[vnode]
        adopt = _from(before, live_step, request.norms) if live_step else None
        self._present[tenant.network_id] = self._begin_with(
            net, tuple(tenant.sizes), tuple(tenant.following), adopt
        )
        self._swarm.emit(
            "allocated",
            network=net.graph.name,
            network_id=net.network_id,
            epoch=net.epoch,
            vnodes=list(tenant.sizes),
            peer=net.claimant,
        )

    def _end(self, effect: End) -> None:
        if not effect.keep:
            self._kept.pop(effect.network_id, None)
        present = self._present.pop(effect.network_id, None)
        if present is None:
            return
        # Without one of its VNodes the network does not get on here, so that all stop.
        self._closing.spawn(present.close())
        if effect.keep:
            self._kept[effect.network_id] = present
        net, crew = present.net, present.crew
        for part in (crew, present.following):
            for vnode in () if part is None else part.vnodes:
                self._states.pop((net.network_id, vnode), None)
        if crew is not None:
            self._swarm.emit(
                "dropped",
                network=net.graph.name,
                network_id=net.network_id,
                epoch=net.epoch,
                vnodes=list(crew.vnodes),
                peer=net.claimant,
            )

    def _note_usage(self) -> None:
        tenants = self._tenancy.core.tenants()
        used_bytes = sum(tenant.size_bytes for tenant in tenants)
        self.usage = Usage(sum(len(tenant.sizes) for tenant in tenants), used_bytes)
        self.claimants = tuple(sorted(dict.fromkeys(tenant.claimant for tenant in tenants)))


def _from(before: Present | None, step: int, norms: Sequence[float]) -> Adopt:
    """Components with the state after `step`, out of what ran here before."""

    async def adopt(vnode: str) -> Component:
        crew = None if before is None else before.crew
        following = None if before is None else before.following
        if crew is not None and vnode in crew.vnodes:
            return await crew.give(vnode, step, norms[-1] if norms else 0.0)
        if following is not None and vnode in following.vnodes:
            return await following.give(vnode, step, norms)
        raise LocalError(f"{vnode} cannot go on from step {step}, it was not here")

    return adopt


def _rows_of(network_id: str, present: Present) -> list[pnode_pb2.HostedVNode]:
    net, crew, following = present.net, present.crew, present.following
    rows = []
    if crew is not None:
        rows += [
            pnode_pb2.HostedVNode(
                network_id=network_id,
                vnode=vnode,
                epoch=net.epoch,
                step=crew.step,
                instantiated=crew.hosted is not None,
                error=crew.errors.get(vnode, ""),
            )
            for vnode in crew.vnodes
        ]
    if following is not None:
        rows += [
            pnode_pb2.HostedVNode(
                network_id=network_id,
                vnode=vnode,
                epoch=net.epoch,
                step=following.step_of(vnode),
                instantiated=following.hosted is not None,
                error=following.errors.get(vnode, ""),
                standby=True,
            )
            for vnode in following.vnodes
        ]
    return sorted(rows, key=lambda row: (row.vnode, row.standby))


def _beginning() -> common_pb2.Refusal:
    return refusal(
        common_pb2.REFUSAL_CODE_BUSY, "this peer is about to begin with it: try again in a moment"
    )
