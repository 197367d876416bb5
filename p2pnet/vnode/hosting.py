"""A shell: the table of what is hosted here, and under whose epoch.

What a host admits, for how long it keeps it, and whether a call is for a VNode
that lives here now (DESIGN D6). Lives on the gRPC thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pnet.dht.manifest import grants, network_id_of, open_manifest
from p2pnet.errors import P2PNetError
from p2pnet.keys import sha256, short
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, pnode_pb2
from p2pnet.vnode.courier import LOOKUP_TIMEOUT_S
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.network import BATCH_SAMPLES, HostedNetwork, refusal

if TYPE_CHECKING:
    from p2pnet.vnode.trainee import Trainee

NETWORKS_MAX = 256
VNODES_MAX = 10_000
LEASE_S_MAX = 3600
SWEEP_S = 10.0
ORPHANED_S = 600.0  # how long after its lease a VNode is kept for an orchestrator to come back


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
        *,
        memory_bytes: int,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.usage = Usage(0, 0)
        self.claimants: tuple[str, ...] = ()
        self._swarm = swarm
        self._new_trainee = new_trainee
        self._networks: dict[str, HostedNetwork] = {}
        self._trainees: dict[tuple[str, str], Trainee] = {}
        self._states: dict[tuple[str, str], common_pb2.BlobRef] = {}
        self._sweeping: asyncio.TimerHandle | None = None
        self._tasks = TaskSet("the table of hosted VNodes")

    async def close(self) -> None:
        """Stops every VNode."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        await self._tasks.close()
        await self._drop_all(list(self._trainees))

    # Looking

    def network(self, network_id: str) -> HostedNetwork | None:
        """A network that has, or had, something here."""
        return self._networks.get(network_id)

    def network_of(
        self, network_id: str, claimant: str, epoch: int | None = None
    ) -> HostedNetwork | common_pb2.Refusal:
        """The network, if it is that orchestrator's (and at that epoch), or why not."""
        net = self._networks.get(network_id)
        if net is None or net.claimant != claimant or epoch not in (None, net.epoch):
            return stale(net)
        return net

    def find(
        self, network_id: str, epoch: int, vnode: str
    ) -> tuple[HostedNetwork, Trainee] | common_pb2.Refusal:
        """The VNode, or why a call for it is refused."""
        net = self._networks.get(network_id)
        if net is not None and epoch < net.epoch:
            return stale(net)
        trainee = self._trainees.get((network_id, vnode))
        if net is None or trainee is None:
            return refusal(
                common_pb2.REFUSAL_CODE_NOT_HOSTED,
                f"this peer does not host {vnode[:80]}",
                epoch=0 if net is None else net.epoch,
                host="" if net is None else net.locations.get(vnode, ""),
            )
        if epoch > net.epoch:
            return refusal(
                common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH,
                f"this peer is at epoch {net.epoch}, not {epoch}",
                epoch=net.epoch,
            )
        if self._swarm.now() > net.lease_until:
            return refusal(
                common_pb2.REFUSAL_CODE_LEASE_EXPIRED,
                f"the orchestrator of {net.graph.name} has not renewed this peer's lease",
            )
        return net, trainee

    async def find_or_point(
        self, network_id: str, epoch: int, vnode: str
    ) -> tuple[HostedNetwork, Trainee] | common_pb2.Refusal:
        """As `find`; the refusal says where the VNode has gone, if the DHT knows."""
        found = self.find(network_id, epoch, vnode)
        if (
            isinstance(found, common_pb2.Refusal)
            and found.code == common_pb2.REFUSAL_CODE_NOT_HOSTED
            and not found.host
        ):
            try:
                elsewhere = await self._swarm.find_allocations(
                    network_id, vnode, timeout_s=LOOKUP_TIMEOUT_S
                )
            except P2PNetError:
                return found
            if elsewhere:
                found.host, found.epoch = elsewhere[0].host, elsewhere[0].epoch
        return found

    def state_of(self, network_id: str, vnode: str) -> common_pb2.BlobRef | None:
        """The state that a VNode begins with; None: it is initialised from the seed."""
        return self._states.get((network_id, vnode))

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

    # Changing

    async def take_over(
        self, request: pnode_pb2.AllocateRequest, claimant: str
    ) -> HostedNetwork | common_pb2.Refusal:
        """Hosts `request.vnodes` under its epoch, and no others of that network.

        Raises:
            MalformedError, ForgedError: a manifest or graph that is none.
        """
        manifest = open_manifest(request.manifest)
        graph = CompiledGraph.from_json(request.graph)
        wanted = dict.fromkeys(request.vnodes)
        known = dict.fromkeys(graph.vnodes())
        if (
            network_id_of(request.manifest) != request.network_id
            or sha256(request.graph) != manifest.spec_digest
            or not 0 < len(wanted) == len(request.vnodes)
            or any(vnode not in known for vnode in wanted)
            or not 0 < request.lease_s <= LEASE_S_MAX
        ):
            return refusal(
                common_pb2.REFUSAL_CODE_BAD_REQUEST, "the allocation does not fit its manifest"
            )
        if not grants(manifest, claimant):
            return refusal(
                common_pb2.REFUSAL_CODE_NOT_GRANTED,
                f"the owner of {graph.name} does not let {short(claimant)} orchestrate it",
            )
        net = self._networks.get(request.network_id)
        if net is not None and (
            request.epoch < net.epoch or (request.epoch == net.epoch and claimant != net.claimant)
        ):
            return stale(net)
        if full := self._too_full(request, graph):
            return full
        if net is not None and request.epoch == net.epoch:
            here = {vnode for network, vnode in self._trainees if network == net.network_id}
            if here == set(wanted):
                return net  # said twice
        net = await self._begin_epoch(request, graph, claimant)
        now = self._networks.get(request.network_id)
        # Another allocation may have come while the VNodes of the one before were closed.
        return net if net is now else stale(now)

    def renew(self, net: HostedNetwork, lease_s: int) -> None:
        """The network's orchestrator is there."""
        net.lease_until = self._swarm.now() + min(lease_s, LEASE_S_MAX)

    def begin_from(self, network_id: str, vnode: str, state: common_pb2.BlobRef) -> None:
        """The state that a VNode begins with, if it has not begun."""
        self._states[network_id, vnode] = state

    async def drop(self, network_id: str, vnodes: Collection[str]) -> None:
        """Lets VNodes of a network go, or with none named all."""
        wanted = set(vnodes)
        await self._drop_all(
            [
                key
                for key in self._trainees
                if key[0] == network_id and (not wanted or key[1] in wanted)
            ]
        )

    def forget_locations(self) -> None:
        """Empties every cache of where VNodes live; the DHT knows."""
        for net in self._networks.values():
            net.locations.clear()

    # Small things

    def _too_full(
        self, request: pnode_pb2.AllocateRequest, graph: CompiledGraph
    ) -> common_pb2.Refusal | None:
        others = sum(
            self._size(net, vnode) for net, vnode in self._trainees if net != request.network_id
        )
        needed = sum(graph.node(vnode).memory_bytes(BATCH_SAMPLES) for vnode in request.vnodes)
        hosted = {net for net, _ in self._trainees}
        new = request.network_id not in hosted
        if (
            others + needed > self.memory_bytes
            or len(self._trainees) + len(request.vnodes) > VNODES_MAX
            or (new and len(hosted) >= NETWORKS_MAX)
        ):
            return refusal(
                common_pb2.REFUSAL_CODE_NO_MEMORY,
                f"{needed} bytes are asked for, and {max(0, self.memory_bytes - others)} are free",
            )
        return None

    async def _begin_epoch(
        self, request: pnode_pb2.AllocateRequest, graph: CompiledGraph, claimant: str
    ) -> HostedNetwork:
        network_id = request.network_id
        net = HostedNetwork(
            network_id=network_id,
            graph=graph,
            manifest=request.manifest,
            epoch=request.epoch,
            claimant=claimant,
            lease_until=self._swarm.now() + request.lease_s,
            base_step=request.step,
            state_url=request.state_url,
            locations={location.vnode: location.host for location in request.locations},
        )
        old = [key for key in self._trainees if key[0] == network_id]
        closing = [self._trainees.pop(key) for key in old]
        self._networks[network_id] = net
        for vnode in request.vnodes:
            key = (network_id, vnode)
            self._states.pop(key, None)
            if vnode in request.states:
                self._states[key] = request.states[vnode]
            self._trainees[key] = self._new_trainee(vnode, net)
        self._forget_networks()
        self._note_usage()
        self._sweep_later()
        await asyncio.gather(*(trainee.close() for trainee in closing))
        return net

    async def _drop_all(self, keys: Sequence[tuple[str, str]]) -> None:
        closing = [self._trainees.pop(key) for key in keys]
        for key in keys:
            self._states.pop(key, None)
        self._note_usage()
        await asyncio.gather(*(trainee.close() for trainee in closing))

    def _forget_networks(self) -> None:
        """Of those that have nothing here the oldest; their logs remember their epochs."""
        hosted = {net for net, _ in self._trainees}
        idle = [net for net in self._networks if net not in hosted]
        for net in idle[: max(0, len(self._networks) - NETWORKS_MAX)]:
            del self._networks[net]

    def _note_usage(self) -> None:
        used = sum(self._size(net, vnode) for net, vnode in self._trainees)
        self.usage = Usage(len(self._trainees), used)
        self.claimants = tuple(sorted({self._networks[net].claimant for net, _ in self._trainees}))

    def _sweep_later(self) -> None:
        if self._sweeping is None:
            loop = asyncio.get_running_loop()
            self._sweeping = loop.call_later(SWEEP_S, lambda: self._tasks.spawn(self._sweep()))

    async def _sweep(self) -> None:
        """Lets VNodes go whose orchestrator has not been heard of for long."""
        self._sweeping = None
        before = self._swarm.now() - ORPHANED_S
        await self._drop_all(
            [key for key in self._trainees if self._networks[key[0]].lease_until < before]
        )
        if self._trainees:
            self._sweep_later()

    def _size(self, network_id: str, vnode: str) -> int:
        return self._networks[network_id].graph.node(vnode).memory_bytes(BATCH_SAMPLES)


def stale(net: HostedNetwork | None) -> common_pb2.Refusal:
    """Refuses who is behind, and says what there is here."""
    if net is None:
        return refusal(
            common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK, "this peer hosts nothing of that network"
        )
    return refusal(
        common_pb2.REFUSAL_CODE_STALE_EPOCH,
        f"{net.graph.name} is at epoch {net.epoch} under {short(net.claimant)} here",
        epoch=net.epoch,
    )
