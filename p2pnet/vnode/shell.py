"""A shell: the PNode and VNode services, which together host VNodes.

The hot path (Forward, Train) lives on the gRPC thread and the compute thread
alone; each call is checked against the network's epoch and lease here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p2pnet.dht.keyspace import vnode_key
from p2pnet.dht.manifest import grants, network_id_of, open_manifest
from p2pnet.errors import (
    MalformedError,
    P2PNetError,
    RefusedError,
    RemoteError,
)
from p2pnet.keys import ACCEPTANCE, sha256, short
from p2pnet.net.handlers import Caller, Method, unary
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2, vnode_pb2
from p2pnet.vnode.blobs import BlobKeeper
from p2pnet.vnode.courier import LOOKUP_TIMEOUT_S
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.messages import Event
from p2pnet.vnode.network import HostedNetwork, refusal
from p2pnet.vnode.swarm import Swarm

if TYPE_CHECKING:
    from p2pnet.vnode.engine import Engine
    from p2pnet.vnode.trainee import Trainee

logger = logging.getLogger(__name__)

NETWORKS_MAX = 256
VNODES_MAX = 10_000
LEASE_S_MAX = 3600
BATCH_SAMPLES = 256  # what activations are admitted for
WARM_AFTER_S = 1.0
SWEEP_S = 10.0
ORPHANED_S = 600.0  # how long after its lease a VNode is kept for an orchestrator to come back


@dataclass(frozen=True, slots=True)
class Usage:
    """What is hosted: how many VNodes, and the memory that they are admitted for."""

    vnodes: int
    memory_bytes: int


class Host:
    """Every VNode on this PNode. Lives on the gRPC thread."""

    def __init__(
        self,
        swarm: Swarm,
        compute: ComputeThread,
        blobs: BlobKeeper,
        faults: Faults,
        *,
        memory_bytes: int,
        hosting: bool,
        state_url: str,
    ) -> None:
        self.memory_bytes = memory_bytes
        self._state_url = state_url
        self._swarm = swarm
        self._compute = compute
        self._blobs = blobs
        self._hosting = hosting
        self._faults = faults
        self._engine: Engine | None = None
        self._networks: dict[str, HostedNetwork] = {}
        self._trainees: dict[tuple[str, str], Trainee] = {}
        self._states: dict[tuple[str, str], common_pb2.BlobRef] = {}
        self._sweeping: asyncio.TimerHandle | None = None
        self._warming: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.usage = Usage(0, 0)  # replaced, never changed: other threads read it

    def services(self) -> dict[str, Mapping[str, Method]]:
        """What gRPC serves, by service."""
        return {
            "PNode": {
                "Register": unary(
                    self._register, pnode_pb2.RegisterRequest, pnode_pb2.RegisterReply
                ),
                "Describe": unary(
                    self._describe, pnode_pb2.DescribeRequest, pnode_pb2.DescribeReply
                ),
                "Heartbeat": unary(
                    self._heartbeat, pnode_pb2.HeartbeatRequest, pnode_pb2.HeartbeatReply
                ),
                "Allocate": unary(
                    self._allocate, pnode_pb2.AllocateRequest, pnode_pb2.AllocateReply
                ),
                "Drop": unary(self._drop, pnode_pb2.DropRequest, pnode_pb2.DropReply),
            },
            "VNode": {
                "Forward": unary(self._forward, vnode_pb2.ForwardRequest, vnode_pb2.HopReply),
                "Collect": unary(self._collect, vnode_pb2.CollectRequest, vnode_pb2.CollectReply),
                "Train": unary(self._train, vnode_pb2.TrainRequest, vnode_pb2.HopReply),
                "Health": unary(self._health, vnode_pb2.HealthRequest, vnode_pb2.HealthReply),
                "Save": unary(self._save, vnode_pb2.SaveRequest, vnode_pb2.SaveReply),
                "Load": unary(self._load, vnode_pb2.LoadRequest, vnode_pb2.LoadReply),
            },
        }

    async def close(self) -> None:
        """Stops every VNode."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._warming is not None:
            self._warming.cancel()
        if self._engine is not None:
            await self._engine.inference.close()
        await asyncio.gather(*(trainee.close() for trainee in self._trainees.values()))
        self._trainees.clear()

    def claimants(self) -> list[str]:
        """The orchestrators of what lives here, by peer id."""
        return sorted({self._networks[net].claimant for net, _ in self._trainees})

    def forget_locations(self) -> None:
        """Empties every cache of where VNodes live; the DHT knows."""
        for net in self._networks.values():
            net.locations.clear()

    # PNode

    async def _register(
        self, request: pnode_pb2.RegisterRequest, caller: Caller
    ) -> pnode_pb2.RegisterReply:
        """First contact: the caller's advert goes to the membership, ours comes back."""
        await self._swarm.introduce(caller.peer_id, request.advert)
        return pnode_pb2.RegisterReply(advert=self._swarm.advert())

    async def _describe(
        self, request: pnode_pb2.DescribeRequest, caller: Caller
    ) -> pnode_pb2.DescribeReply:
        return pnode_pb2.DescribeReply(advert=self._swarm.advert(), vnodes=self._hosted(""))

    async def _heartbeat(
        self, request: pnode_pb2.HeartbeatRequest, caller: Caller
    ) -> pnode_pb2.HeartbeatReply:
        net = self._networks.get(request.network_id)
        if net is None or net.epoch != request.epoch or net.claimant != caller.peer_id:
            return pnode_pb2.HeartbeatReply(refusal=_stale(net))
        net.lease_until = self._swarm.now() + min(request.lease_s, LEASE_S_MAX)
        return pnode_pb2.HeartbeatReply(vnodes=self._hosted(request.network_id))

    async def _allocate(
        self, request: pnode_pb2.AllocateRequest, caller: Caller
    ) -> pnode_pb2.AllocateReply:
        try:
            answer = await self._take_over(request, caller.peer_id)
        except (MalformedError, RemoteError) as error:
            answer = refusal(common_pb2.REFUSAL_CODE_BAD_REQUEST, str(error))
        if answer is not None:
            return pnode_pb2.AllocateReply(refusal=answer)
        for vnode in request.vnodes:
            self._spawn(self._provide(vnode_key(request.network_id, vnode)))
        # torch takes seconds to load, so begin before the first step; but not before the
        # orchestrator has had a moment to publish what was just agreed.
        asyncio.get_running_loop().call_later(WARM_AFTER_S, self._warm)
        self._swarm.emit(
            "allocated",
            network=self._networks[request.network_id].graph.name,
            epoch=request.epoch,
            vnodes=list(request.vnodes),
        )
        return pnode_pb2.AllocateReply(
            acceptances=[self._accept(request, vnode) for vnode in request.vnodes]
        )

    async def _take_over(
        self, request: pnode_pb2.AllocateRequest, claimant: str
    ) -> common_pb2.Refusal | None:
        """Hosts `request.vnodes` under its epoch, and no others of that network."""
        if not self._hosting:
            return refusal(common_pb2.REFUSAL_CODE_NOT_GRANTED, "this peer hosts no VNodes")
        if request.state_url not in ("", self._state_url):
            # Nobody but this machine's user says which of its directories are written.
            return refusal(
                common_pb2.REFUSAL_CODE_NOT_GRANTED,
                f"this peer was not started with --state {request.state_url}",
            )
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
            return _stale(net)
        if full := self._too_full(request, graph):
            return full
        if net is not None and request.epoch == net.epoch:
            same = {vnode for network, vnode in self._trainees if network == net.network_id}
            if same == set(wanted):
                return None  # said twice
        await self._begin_epoch(request, graph, claimant)
        return None

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
    ) -> None:
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
            self._trainees[key] = self._tensors().new_trainee(vnode, net)
        self._forget_networks()
        self._note_usage()
        self._sweep_later()
        await asyncio.gather(*(trainee.close() for trainee in closing))

    def _accept(self, request: pnode_pb2.AllocateRequest, vnode: str) -> common_pb2.Signed:
        me = self._swarm.keypair
        net = self._networks[request.network_id]
        addrs = next((m.addrs for m in self._swarm.members() if m.peer_id == me.peer_id), ())
        allocation = records_pb2.Allocation(
            network_id=request.network_id,
            vnode=vnode,
            host=me.peer_id,
            addrs=addrs,
            epoch=request.epoch,
            claimant=net.claimant,
            role="primary",
            lease_s=request.lease_s,
            manifest=request.manifest,
        )
        return me.sign(ACCEPTANCE, allocation.SerializeToString(deterministic=True))

    async def _drop(self, request: pnode_pb2.DropRequest, caller: Caller) -> pnode_pb2.DropReply:
        net = self._networks.get(request.network_id)
        if net is None:
            return pnode_pb2.DropReply()
        if caller.peer_id != net.claimant:
            return pnode_pb2.DropReply(refusal=_stale(net))
        if request.epoch < net.epoch:  # about an older allocation than the one here
            return pnode_pb2.DropReply()
        wanted = set(request.vnodes)
        gone = [
            key
            for key in self._trainees
            if key[0] == net.network_id and (not wanted or key[1] in wanted)
        ]
        await self._drop_all(gone)
        return pnode_pb2.DropReply()

    # VNode

    async def _train(self, request: vnode_pb2.TrainRequest, caller: Caller) -> vnode_pb2.HopReply:
        found = self._find(request.id.network_id, request.id.epoch, request.vnode)
        if isinstance(found, common_pb2.Refusal):
            return vnode_pb2.HopReply(
                refusal=await self._say_where(found, request.id.network_id, request.vnode)
            )
        return vnode_pb2.HopReply(refusal=found[1].hear(request))

    async def _deliver_train(
        self, net: HostedNetwork, vnode: str, event: Event
    ) -> common_pb2.Refusal | None:
        """From a VNode on this host to another: nothing is copied."""
        found = self._find(net.network_id, net.epoch, vnode)
        return found if isinstance(found, common_pb2.Refusal) else found[1].take(event)

    async def _forward(
        self, request: vnode_pb2.ForwardRequest, caller: Caller
    ) -> vnode_pb2.HopReply:
        found = self._find(request.network_id, request.epoch, request.vnode)
        if isinstance(found, common_pb2.Refusal):
            return vnode_pb2.HopReply(
                refusal=await self._say_where(found, request.network_id, request.vnode)
            )
        return vnode_pb2.HopReply(refusal=self._tensors().inference.take(*found, request))

    async def _deliver_forward(
        self, request: vnode_pb2.ForwardRequest
    ) -> common_pb2.Refusal | None:
        found = self._find(request.network_id, request.epoch, request.vnode)
        if isinstance(found, common_pb2.Refusal):
            return found
        return self._tensors().inference.take(*found, request)

    async def _collect(
        self, request: vnode_pb2.CollectRequest, caller: Caller
    ) -> vnode_pb2.CollectReply:
        found = self._find(request.network_id, request.epoch, request.vnode)
        if isinstance(found, common_pb2.Refusal):
            return vnode_pb2.CollectReply(
                refusal=await self._say_where(found, request.network_id, request.vnode)
            )
        return await self._tensors().collect(found[0], request.request_id, caller.timeout_s)

    async def _health(
        self, request: vnode_pb2.HealthRequest, caller: Caller
    ) -> vnode_pb2.HealthReply:
        return vnode_pb2.HealthReply(vnodes=self._hosted(request.network_id))

    async def _save(self, request: vnode_pb2.SaveRequest, caller: Caller) -> vnode_pb2.SaveReply:
        async def one(vnode: str) -> common_pb2.BlobRef:
            found = self._find(request.network_id, request.epoch, vnode)
            if isinstance(found, common_pb2.Refusal):
                raise RefusedError(found.detail, code=found.code, epoch=found.epoch)
            net, trainee = found
            state = await trainee.save(request.step)
            ref = await self._blobs.store(state, net.network_id, request.copy_to, net.state_url)
            trainee.saved_as(ref.digest)
            return ref

        net = self._networks.get(request.network_id)
        if net is None or net.claimant != caller.peer_id:
            return vnode_pb2.SaveReply(refusal=_stale(net))
        try:
            refs = await asyncio.gather(*(one(vnode) for vnode in request.vnodes))
        except RefusedError as error:
            answer = refusal(common_pb2.RefusalCode.Name(error.code), str(error), epoch=error.epoch)
            return vnode_pb2.SaveReply(refusal=answer)
        except (P2PNetError, TimeoutError) as error:
            detail = str(error) or "the state was not saved in time"
            return vnode_pb2.SaveReply(refusal=refusal(common_pb2.REFUSAL_CODE_FAILED, detail))
        return vnode_pb2.SaveReply(states=dict(zip(request.vnodes, refs, strict=True)))

    async def _load(self, request: vnode_pb2.LoadRequest, caller: Caller) -> vnode_pb2.LoadReply:
        """Makes the components now, rather than at first use."""
        net = self._networks.get(request.network_id)
        if net is None or net.claimant != caller.peer_id or net.epoch != request.epoch:
            return vnode_pb2.LoadReply(refusal=_stale(net))
        try:
            for vnode in sorted(request.states):
                found = self._find(request.network_id, request.epoch, vnode)
                if isinstance(found, common_pb2.Refusal):
                    return vnode_pb2.LoadReply(refusal=found)
                self._states[net.network_id, vnode] = request.states[vnode]
                await found[1].ready()
        except P2PNetError as error:
            return vnode_pb2.LoadReply(refusal=refusal(common_pb2.REFUSAL_CODE_FAILED, str(error)))
        return vnode_pb2.LoadReply()

    # Small things

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

    def _sweep_later(self) -> None:
        if self._sweeping is None:
            loop = asyncio.get_running_loop()
            self._sweeping = loop.call_later(SWEEP_S, lambda: self._spawn(self._sweep()))

    async def _sweep(self) -> None:
        """Lets VNodes go whose orchestrator has not been heard of for long."""
        self._sweeping = None
        before = self._swarm.now() - ORPHANED_S
        await self._drop_all(
            [key for key in self._trainees if self._networks[key[0]].lease_until < before]
        )
        if self._trainees:
            self._sweep_later()

    async def _provide(self, key: bytes) -> None:
        try:
            await self._swarm.provide(key)
        except P2PNetError as error:  # a hint for stock tools; the allocation is what counts
            logger.info("this peer could not be announced as a provider: %s", error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _warm(self) -> None:
        if self._warming is None and self._trainees:
            self._warming = asyncio.ensure_future(self._compute.warm())

    def _find(
        self, network_id: str, epoch: int, vnode: str
    ) -> tuple[HostedNetwork, Trainee] | common_pb2.Refusal:
        """The VNode, or why a call for it is refused."""
        net = self._networks.get(network_id)
        if net is not None and epoch < net.epoch:
            return _stale(net)
        trainee = self._trainees.get((network_id, vnode))
        if net is None or trainee is None:
            return refusal(
                common_pb2.REFUSAL_CODE_NOT_HOSTED,
                f"this peer does not host {vnode}",
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

    async def _say_where(
        self, answer: common_pb2.Refusal, network_id: str, vnode: str
    ) -> common_pb2.Refusal:
        """Adds to a refusal where the VNode has gone, as the DHT says."""
        if answer.code == common_pb2.REFUSAL_CODE_NOT_HOSTED and not answer.host:
            try:
                found = await self._swarm.find_allocations(
                    network_id, vnode, timeout_s=LOOKUP_TIMEOUT_S
                )
            except P2PNetError:
                return answer
            if found:
                answer.host, answer.epoch = found[0].host, found[0].epoch
        return answer

    async def _fetch(self, net: HostedNetwork, vnode: str) -> bytes | None:
        ref = self._states.get((net.network_id, vnode))
        return None if ref is None else await self._blobs.fetch(ref, net.network_id, net.state_url)

    def _tensors(self) -> Engine:
        if self._engine is None:
            from p2pnet.vnode.engine import Engine

            self._engine = Engine(
                self._swarm,
                self._compute,
                self._faults,
                fetch=self._fetch,
                train=self._deliver_train,
                forward=self._deliver_forward,
            )
        return self._engine

    def _size(self, network_id: str, vnode: str) -> int:
        return self._networks[network_id].graph.node(vnode).memory_bytes(BATCH_SAMPLES)

    def _hosted(self, network_id: str) -> list[pnode_pb2.HostedVNode]:
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


def _stale(net: HostedNetwork | None) -> common_pb2.Refusal:
    if net is None:
        return refusal(
            common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK, "this peer hosts nothing of that network"
        )
    return refusal(
        common_pb2.REFUSAL_CODE_STALE_EPOCH,
        f"{net.graph.name} is at epoch {net.epoch} under {short(net.claimant)} here",
        epoch=net.epoch,
    )
