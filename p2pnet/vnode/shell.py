"""A shell: the PNode and VNode services, which together host VNodes.

The hot path (Hops) lives on the gRPC thread and the compute thread alone; each hop is
checked against the network's epoch and lease here, and its sender against the claim.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pnet.dht.keyspace import vnode_key
from p2pnet.dht.manifest import open_manifest
from p2pnet.dht.service import Serves, anything
from p2pnet.errors import P2PNetError, RefusedError, ResourceError
from p2pnet.keys import ACCEPTANCE
from p2pnet.log.entry import HOLDERS_MAX
from p2pnet.net.handlers import Caller, Method, unary
from p2pnet.net.hop_frames import Request
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2, vnode_pb2
from p2pnet.vnode.admission import Limits
from p2pnet.vnode.blobs import BLOB_BYTES_MAX, BlobKeeper
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.hops_server_shell import Answer, HopsServer
from p2pnet.vnode.hosting import Hosting, Usage
from p2pnet.vnode.network import HostedNetwork, refusal

if TYPE_CHECKING:
    from p2pnet.vnode.crew import Adopt
    from p2pnet.vnode.engine import Engine
    from p2pnet.vnode.hosting import Present
    from p2pnet.vnode.tensors import Buffer

logger = logging.getLogger(__name__)

WARM_AFTER_S = 1.0
READY_KEPT_S = 300.0  # states that were fetched for VNodes which may come
READYING_MAX = 4  # callers at once for whom states are fetched


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
        directory: Path,
        serves: Serves = anything,
        service: Callable[[], str] = str,
    ) -> None:
        """Reads from `directory` what this host knew of networks before.

        Args:
            hosting: whether VNodes are taken at all.
            serves: which networks are; `service` names the one service that is served.
        """
        self._state_url = state_url
        self._service = service
        self._swarm = swarm
        self._compute = compute
        self._blobs = blobs
        self._faults = faults
        self._engine: Engine | None = None
        limits = Limits(swarm.keypair.peer_id, memory_bytes, hosting, state_url, serves)
        self._hosted = Hosting(swarm, self._begin, limits, directory)
        self._hops = HopsServer(self.hop, self.hop_bytes_max)
        blobs.vouch = self.vouch
        self._readying = 0
        self._warming: asyncio.Task[None] | None = None
        self._tasks = TaskSet("the host")

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
                "Ready": unary(self._ready, pnode_pb2.ReadyRequest, pnode_pb2.ReadyReply),
            },
            "VNode": {
                "Hops": self._hops.method,
                "Health": unary(self._health, vnode_pb2.HealthRequest, vnode_pb2.HealthReply),
                "Save": unary(self._save, vnode_pb2.SaveRequest, vnode_pb2.SaveReply),
                "Load": unary(self._load, vnode_pb2.LoadRequest, vnode_pb2.LoadReply),
            },
        }

    async def close(self) -> None:
        """Stops every VNode."""
        await self._hops.close()
        await self._tasks.close()
        if self._engine is not None:
            await self._engine.inference.close()
        await self._hosted.close()

    @property
    def usage(self) -> Usage:
        """What is hosted; from any thread."""
        return self._hosted.usage

    def claimants(self) -> list[str]:
        """The orchestrators of what lives here, by peer id; from any thread."""
        return list(self._hosted.claimants)

    def claims(self) -> list[tuple[common_pb2.Signed, bool]]:
        """Of every network that lives here the claim, and whether its owner has closed it."""
        return self._hosted.claims()

    def drain(self) -> None:
        """Nothing new is taken from now on; what is here stays until it is dropped."""
        self._hosted.drain()

    async def vouch(
        self, network_id: str, caller: str, claim: common_pb2.Signed
    ) -> common_pb2.Refusal | None:
        """Why somebody is not believed to orchestrate a network; None: its log says so."""
        return await self._hosted.vouch(network_id, caller, claim)

    def forget_locations(self) -> None:
        """Empties every cache of where VNodes live; the DHT knows."""
        self._hosted.forget_locations()

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
        return pnode_pb2.DescribeReply(
            advert=self._swarm.advert(),
            vnodes=self._hosted.rows(""),
            state_url=self._state_url,
            service=self._service(),
        )

    async def _heartbeat(
        self, request: pnode_pb2.HeartbeatRequest, caller: Caller
    ) -> pnode_pb2.HeartbeatReply:
        no = await self._hosted.renew(request, caller.peer_id)
        if no is not None:
            return pnode_pb2.HeartbeatReply(refusal=no)
        return pnode_pb2.HeartbeatReply(vnodes=self._hosted.rows(request.network_id))

    async def _allocate(
        self, request: pnode_pb2.AllocateRequest, caller: Caller
    ) -> pnode_pb2.AllocateReply:
        net = await self._hosted.allocate(request, caller.peer_id)
        if isinstance(net, common_pb2.Refusal):
            self._swarm.emit(
                "refused",
                network_id=request.network_id,
                epoch=request.epoch,
                newer=net.epoch,
                peer=caller.peer_id,
                reason=net.detail,
            )
            return pnode_pb2.AllocateReply(refusal=net)
        for vnode in request.vnodes:
            self._tasks.spawn(self._provide(vnode_key(net.network_id, vnode)))
        if self._warming is None:
            self._warming = self._tasks.spawn(self._warm())
        return pnode_pb2.AllocateReply(
            acceptances=[self._accept(net, vnode, request.lease_s) for vnode in request.vnodes]
        )

    def _accept(self, net: HostedNetwork, vnode: str, lease_s: int) -> common_pb2.Signed:
        me = self._swarm.keypair
        addrs = next((m.addrs for m in self._swarm.members() if m.peer_id == me.peer_id), ())
        allocation = records_pb2.Allocation(
            network_id=net.network_id,
            vnode=vnode,
            host=me.peer_id,
            addrs=addrs,
            epoch=net.epoch,
            claimant=net.claimant,
            role="primary",
            lease_s=lease_s,
            manifest=net.manifest,
            standbys=net.standbys.get(vnode, ()),
        )
        return me.sign(ACCEPTANCE, allocation.SerializeToString(deterministic=True))

    async def _drop(self, request: pnode_pb2.DropRequest, caller: Caller) -> pnode_pb2.DropReply:
        return pnode_pb2.DropReply(refusal=await self._hosted.drop(request, caller.peer_id))

    async def _ready(self, request: pnode_pb2.ReadyRequest, caller: Caller) -> pnode_pb2.ReadyReply:
        """Fetches states into this host's store, and lets torch load."""
        no = await self._hosted.ready(request, caller.peer_id)
        if no is None and not _are_blobs(request.states):
            no = refusal(common_pb2.REFUSAL_CODE_BAD_REQUEST, "a state that cannot be is named")
        if no is None and self._readying >= READYING_MAX:
            no = refusal(common_pb2.REFUSAL_CODE_BUSY, "this peer gets ready for others already")
        if no is not None:
            return pnode_pb2.ReadyReply(refusal=no)
        state_url = open_manifest(request.manifest).state_url
        self._readying += 1
        refs = [request.states[vnode] for vnode in request.vnodes if vnode in request.states]
        try:
            if not state_url:  # what all can reach need not be brought here
                fetched = await self._blobs.prefetch(refs, request.network_id)
                if fetched:
                    self._tasks.spawn(self._release(request.network_id, fetched))
            await self._compute.warm()
        except P2PNetError as error:
            lost = getattr(error, "code", 0) == common_pb2.REFUSAL_CODE_STATE_LOST
            code = common_pb2.REFUSAL_CODE_STATE_LOST if lost else common_pb2.REFUSAL_CODE_FAILED
            detail = f"this peer could not get ready: {error}"
            return pnode_pb2.ReadyReply(refusal=refusal(code, detail))
        finally:
            self._readying -= 1
        return pnode_pb2.ReadyReply()

    # VNode: the hot path

    def hop(
        self, request: Request, payload: memoryview | None, caller: Caller
    ) -> Answer | Coroutine[Any, Any, Answer]:
        """Whatever goes from VNode to VNode, or comes from who feeds or asks a network.

        Most of it need not wait, and is answered here and now: a task would cost more.
        """
        if isinstance(request, vnode_pb2.TrainRequest):
            found = self._hosted.find(request.id.network_id, request.id.epoch, request.vnode)
            if not isinstance(found, common_pb2.Refusal):
                net, crew = found
                no = net.refuse_sender(request.source, caller.peer_id)
                no = no or crew.hear_now(request, payload)
                if no is None or no.code != common_pb2.REFUSAL_CODE_BUSY:
                    return vnode_pb2.HopReply(refusal=no), None
        return self._hop(request, payload, caller)

    async def _hop(self, request: Request, payload: memoryview | None, caller: Caller) -> Answer:
        match request:
            case vnode_pb2.TrainRequest():
                no = await self._train(request, payload, caller.peer_id)
            case vnode_pb2.DecidedRequest():
                no = await self._decided(request)
            case vnode_pb2.FollowRequest():
                no = await self._follow(request, payload, caller.peer_id)
            case _:
                return await self._infer(request, payload, caller)
        return vnode_pb2.HopReply(refusal=no), None

    def hop_bytes_max(self, request: Request) -> int | None:
        """The most bytes that may come with a request; None: its network is not here, or not yet.

        Nothing larger is read.
        """
        if isinstance(request, vnode_pb2.DecidedRequest | vnode_pb2.CollectRequest):
            return 0
        net = self._hosted.graph_of(
            request.network_id
            if isinstance(request, vnode_pb2.ForwardRequest)
            else request.id.network_id
        )
        if net is None:
            return None
        from p2pnet.vnode.engine import payload_bytes_max

        try:
            return payload_bytes_max(net.graph, request)
        except KeyError:
            return None

    async def _train(
        self, request: vnode_pb2.TrainRequest, payload: Buffer | None, caller: str
    ) -> common_pb2.Refusal | None:
        network_id = request.id.network_id
        found = self._hosted.find(network_id, request.id.epoch, request.vnode)
        if isinstance(found, common_pb2.Refusal):
            return await self._hosted.point(network_id, request.vnode, found)
        net, crew = found
        return net.refuse_sender(request.source, caller) or await crew.hear(request, payload)

    async def _decided(self, request: vnode_pb2.DecidedRequest) -> common_pb2.Refusal | None:
        found = self._hosted.find_present(request.network_id, request.epoch)
        if isinstance(found, common_pb2.Refusal):
            return found
        if found.following is not None:
            await found.following.decided(request.step, request.norms)
        return None if found.crew is None else found.crew.decided(request.step, request.norms)

    async def _follow(
        self, request: vnode_pb2.FollowRequest, payload: Buffer | None, caller: str
    ) -> common_pb2.Refusal | None:
        found = self._hosted.find_following(request.id.network_id, request.id.epoch, request.vnode)
        if isinstance(found, common_pb2.Refusal):
            return found
        net, following = found
        no = net.refuse_sender(request.vnode, caller)
        return no or await following.follow(request, payload)

    async def _infer(
        self,
        request: vnode_pb2.ForwardRequest | vnode_pb2.CollectRequest,
        payload: Buffer | None,
        caller: Caller,
    ) -> tuple[vnode_pb2.HopReply, Buffer | None]:
        network_id, vnode = request.network_id, request.vnode
        replica = request.replica > 0
        found = self._hosted.find_answering(network_id, request.epoch, vnode, standby=replica)
        if isinstance(found, common_pb2.Refusal):
            return vnode_pb2.HopReply(
                refusal=await self._hosted.point(network_id, vnode, found)
            ), None
        net, crew = found
        inference = self._tensors().inference
        if isinstance(request, vnode_pb2.CollectRequest):
            return await inference.collect(net, request.request_id, caller.timeout_s)
        return await inference.forward(net, crew, request, payload, caller.timeout_s)

    async def _deliver_forward(
        self, request: vnode_pb2.ForwardRequest, payload: Buffer | None
    ) -> common_pb2.Refusal | None:
        """From a VNode on this host to another."""
        found = self._hosted.find_answering(
            request.network_id, request.epoch, request.vnode, standby=request.replica > 0
        )
        if isinstance(found, common_pb2.Refusal):
            return found
        return self._tensors().inference.take(*found, request, payload)

    # VNode: what the orchestrator asks

    async def _health(
        self, request: vnode_pb2.HealthRequest, caller: Caller
    ) -> vnode_pb2.HealthReply:
        return vnode_pb2.HealthReply(vnodes=self._hosted.rows(request.network_id))

    async def _save(self, request: vnode_pb2.SaveRequest, caller: Caller) -> vnode_pb2.SaveReply:
        """Stores the states after a step, which is decided, on enough peers."""
        found = self._hosted.network_of(request.network_id, caller.peer_id, request.epoch)
        if isinstance(found, common_pb2.Refusal):
            return vnode_pb2.SaveReply(refusal=found)
        net, crew = found
        if any(vnode not in crew.vnodes for vnode in request.vnodes):
            detail = "this peer is asked to store VNodes that it does not host"
            return vnode_pb2.SaveReply(refusal=refusal(common_pb2.REFUSAL_CODE_BAD_REQUEST, detail))

        def store(state: bytes) -> Awaitable[common_pb2.BlobRef]:
            return self._blobs.store(state, net.network_id, request.copy_to, net.state_url)

        try:
            states = await crew.save(request.step, request.norms)
            asked = dict.fromkeys(request.vnodes)
            refs = await asyncio.gather(*(store(states[vnode]) for vnode in asked))
        except RefusedError as error:
            answer = refusal(common_pb2.RefusalCode.Name(error.code), str(error), epoch=error.epoch)
            return vnode_pb2.SaveReply(refusal=answer)
        except ResourceError as error:
            answer = refusal(common_pb2.REFUSAL_CODE_NO_MEMORY, str(error))
            return vnode_pb2.SaveReply(refusal=answer)
        except (P2PNetError, TimeoutError) as error:
            detail = str(error) or "the state was not saved in time"
            return vnode_pb2.SaveReply(refusal=refusal(common_pb2.REFUSAL_CODE_FAILED, detail))
        return vnode_pb2.SaveReply(states=dict(zip(asked, refs, strict=True)))

    async def _load(self, request: vnode_pb2.LoadRequest, caller: Caller) -> vnode_pb2.LoadReply:
        """Makes the components now, rather than at first use."""
        found = self._hosted.network_of(request.network_id, caller.peer_id, request.epoch)
        if isinstance(found, common_pb2.Refusal):
            return vnode_pb2.LoadReply(refusal=found)
        net, crew = found
        try:
            for vnode in sorted(request.states):
                self._hosted.begin_from(net.network_id, vnode, request.states[vnode])
            await crew.ready()
        except RefusedError as error:
            answer = refusal(common_pb2.RefusalCode.Name(error.code), str(error))
            return vnode_pb2.LoadReply(refusal=answer)
        except P2PNetError as error:
            return vnode_pb2.LoadReply(refusal=refusal(common_pb2.REFUSAL_CODE_FAILED, str(error)))
        return vnode_pb2.LoadReply()

    # Small things

    async def _release(self, network_id: str, fetched: tuple[bytes, ...]) -> None:
        """Lets states go that were fetched for a network which has not come."""
        await asyncio.sleep(READY_KEPT_S)
        if not self._hosted.rows(network_id):
            await self._blobs.release(fetched, network_id)

    async def _provide(self, key: bytes) -> None:
        try:
            await self._swarm.provide(key)
        except P2PNetError as error:  # a hint for stock tools; the allocation is what counts
            logger.info("this peer could not be announced as a provider: %s", error)

    async def _warm(self) -> None:
        """Lets torch load, which takes seconds, before the first step comes.

        But not before the orchestrator has had a moment to publish what was just agreed.
        """
        await asyncio.sleep(WARM_AFTER_S)
        if self.usage.vnodes:
            await self._compute.warm()
        else:
            self._warming = None

    async def _fetch(self, net: HostedNetwork, vnode: str) -> bytes | None:
        ref = self._hosted.state_of(net.network_id, vnode)
        return None if ref is None else await self._blobs.fetch(ref, net.network_id, net.state_url)

    def _begin(
        self,
        net: HostedNetwork,
        vnodes: Sequence[str],
        following: Sequence[str],
        adopt: Adopt | None,
    ) -> Present:
        return self._tensors().begin(net, vnodes, following, adopt)

    def _tensors(self) -> Engine:
        if self._engine is None:
            from p2pnet.vnode.engine import Engine

            self._engine = Engine(
                self._swarm,
                self._compute,
                self._faults,
                fetch=self._fetch,
                forward=self._deliver_forward,
            )
        return self._engine


def _are_blobs(states: Mapping[str, common_pb2.BlobRef]) -> bool:
    return all(
        len(ref.digest) == 32
        and ref.size_bytes <= BLOB_BYTES_MAX
        and len(ref.holders) <= HOLDERS_MAX
        for ref in states.values()
    )
