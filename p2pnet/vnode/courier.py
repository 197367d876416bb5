"""A shell: carries a message to a VNode, wherever that lives now.

Where it lives is in a cache (filled by the orchestrator's hints); what the cache
lacks, or turns out to have wrong, is asked of the DHT. A host that is busy is waited
for: so a slow VNode slows down those who send to it, and they hold no more than a few
messages for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from p2pnet.errors import P2PNetError, RemoteError
from p2pnet.keys import short
from p2pnet.net.hop_frames import Buffer
from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.choosing import CodecChooser
from p2pnet.vnode.network import HostedNetwork

if TYPE_CHECKING:
    from p2pnet.vnode.tensors import Array

logger = logging.getLogger(__name__)

HOP_TIMEOUT_S = 5.0  # and as long as the payload takes ...
SLOWEST_BYTES_S = 1 << 20  # ... on a slow line
LOOKUP_TIMEOUT_S = 3.0
BUSY_LIMIT_S = 60.0  # how long a host that is there may have no room
UNDER_WAY_MAX = 8  # over one edge; more wait for one to arrive
PACKED_BYTES_MIN = 256 << 10  # larger ones are packed away from the loop
_TRIES = 4
_BUSY_PAUSE_S = 0.02
_BUSY_PAUSE_S_MAX = 0.5
_ELSEWHERE = (
    common_pb2.REFUSAL_CODE_STALE_EPOCH,
    common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH,
    common_pb2.REFUSAL_CODE_NOT_HOSTED,
)

Hop = vnode_pb2.TrainRequest | vnode_pb2.ForwardRequest
Here = Callable[[], Awaitable[common_pb2.Refusal | None]]
Edge = tuple[str, str, str]  # network id, and whose message for whom


class EpochOver(Exception):
    """The network has moved on to a newer epoch: what was to be sent is of no use."""


class HopFailed(Exception):
    """The message did not arrive; `host` is who could not be reached, "" if nobody is known."""

    def __init__(self, host: str, reason: str) -> None:
        super().__init__(reason)
        self.host = host


class Courier:
    """Sends messages between VNodes. Lives on the gRPC thread."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._chooser = CodecChooser()
        self._under_way: dict[Edge, tuple[asyncio.Semaphore, int]] = {}  # and its users

    async def encode(
        self, net: HostedNetwork, node: str, array: Array, codec: common_pb2.Codec
    ) -> tuple[common_pb2.Tensor, Buffer]:
        """A tensor for a node as it should travel; see `tensors.encode`.

        AUTO is what gets it there sooner, as far as it has been measured.
        """
        from p2pnet.vnode.tensors import AUTO, RAW, encode, probe

        if codec == AUTO:
            there, edge = net.locations.get(net.graph.home(node), ""), f"{net.network_id} {node}"
            if self._chooser.wants_sample(there, edge, array.nbytes):
                began = self._swarm.now()
                size_bytes, left = probe(array.reshape(-1))
                self._chooser.sampled(edge, size_bytes, left, self._swarm.now() - began)
            packs = self._chooser.compresses(there, edge, array.nbytes)
            codec = common_pb2.CODEC_ZSTD if packs else RAW
        if codec == RAW or array.nbytes < PACKED_BYTES_MIN:
            return encode(array, codec)
        return await asyncio.to_thread(encode, array, codec)

    async def send(
        self, net: HostedNetwork, request: Hop, payload: Buffer | None, here: Here
    ) -> None:
        """Delivers `request` to its node; `here` does so if that turns out to live on this host.

        A forward pass follows its VNode into a newer epoch, and `request` then says that
        epoch; a training step ends with the epoch that it belongs to. A forward pass goes
        through the replica that it names, and nowhere else.

        Raises:
            HopFailed: it could not be delivered.
            EpochOver: the network has moved on.
        """
        edge = (net.network_id, request.source, request.vnode)
        turns, users = self._under_way.get(edge) or (asyncio.Semaphore(UNDER_WAY_MAX), 0)
        self._under_way[edge] = turns, users + 1
        try:
            async with turns:
                await self._send(net, request, payload, here)
        finally:
            turns, users = self._under_way[edge]
            if users == 1:
                del self._under_way[edge]
            else:
                self._under_way[edge] = turns, users - 1

    async def _send(
        self, net: HostedNetwork, request: Hop, payload: Buffer | None, here: Here
    ) -> None:
        vnode = net.graph.home(request.vnode)
        epoch = net.epoch
        there = _known_host(net, vnode, request)
        loop = asyncio.get_running_loop()
        tries, busy_until, pause_s = 0, loop.time() + BUSY_LIMIT_S, _BUSY_PAUSE_S
        while tries < _TRIES:
            if not there:
                there, found = await self.locate(net, vnode, epoch)
                epoch = _follow(request, net, found)
            refusal = await self._deliver(there, request, payload, here)
            if refusal is None:
                return
            if refusal.code == common_pb2.REFUSAL_CODE_BUSY and loop.time() < busy_until:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _BUSY_PAUSE_S_MAX)
                continue
            if refusal.code not in _ELSEWHERE or there in net.standbys.get(vnode, ()):
                raise HopFailed(there, refusal.detail)  # who asks tries another replica
            tries += 1
            net.locations.pop(vnode, None)
            there = ""
            if refusal.epoch > epoch:
                epoch = _follow(request, net, refusal.epoch)
                there = refusal.host
            elif refusal.code == common_pb2.REFUSAL_CODE_NOT_HOSTED:
                if refusal.host and refusal.epoch == epoch:
                    there = refusal.host
            else:
                # Older than ours: that host hears of ours in a moment, or was left out of it.
                await asyncio.sleep(_BUSY_PAUSE_S * 2**tries)
            if there and epoch == net.epoch:
                net.locations[vnode] = there
        raise HopFailed(net.locations.get(vnode, ""), f"{vnode} is not to be found")

    async def locate(self, net: HostedNetwork, vnode: str, epoch: int) -> tuple[str, int]:
        """The host of a VNode and under which epoch, as the DHT says: this one or a newer.

        Of the network's own epoch it is cached from then on.

        Raises:
            HopFailed: the DHT does not know, or not of that epoch.
        """
        try:
            found = await self._swarm.find_allocations(
                net.network_id, vnode, timeout_s=LOOKUP_TIMEOUT_S
            )
        except P2PNetError as error:
            raise HopFailed("", f"where {vnode} lives could not be asked: {error}") from None
        if found and found[0].epoch > max(epoch, net.epoch):
            return str(found[0].host), int(found[0].epoch)
        for allocation in found:
            ours = allocation.claimant == net.claimant or epoch != net.epoch
            if allocation.epoch == epoch and ours:
                logger.debug("%s lives on %s, says the DHT", vnode, short(allocation.host))
                self._swarm.emit(
                    "located",
                    network=net.graph.name,
                    network_id=net.network_id,
                    epoch=epoch,
                    vnode=vnode,
                    host=allocation.host,
                )
                if epoch == net.epoch:
                    net.locations[vnode] = allocation.host
                return str(allocation.host), epoch
        raise HopFailed("", f"the DHT does not know where {vnode} lives")

    async def _deliver(
        self, host: str, request: Hop, payload: Buffer | None, here: Here
    ) -> common_pb2.Refusal | None:
        size_bytes = 0 if payload is None else len(payload)
        try:
            if host == self._swarm.keypair.peer_id:
                return await here()
            began = self._swarm.now()
            reply, _ = await self._swarm.hop(
                host, request, payload, timeout_s=HOP_TIMEOUT_S + size_bytes / SLOWEST_BYTES_S
            )
        except RemoteError as error:
            raise HopFailed(host, str(error)) from None
        except P2PNetError as error:  # our own trouble, which nobody else is to be blamed for
            raise HopFailed("", str(error)) from None
        if reply.HasField("refusal"):
            return reply.refusal
        self._chooser.delivered(host, size_bytes, self._swarm.now() - began)
        return None


def _known_host(net: HostedNetwork, vnode: str, request: Hop) -> str:
    """Who has a VNode, as far as it is known; of the replica that a forward pass goes through."""
    replica = request.replica if isinstance(request, vnode_pb2.ForwardRequest) else 0
    if not replica:
        return net.locations.get(vnode, "")
    standbys = net.standbys.get(vnode, ())
    if replica > len(standbys):
        raise HopFailed("", f"{vnode} has no standby number {replica}")
    return standbys[replica - 1]


def _follow(request: Hop, net: HostedNetwork, epoch: int) -> int:
    """Makes a request one of that epoch, if it may outlive its own; raises EpochOver."""
    if epoch > net.epoch:
        if not isinstance(request, vnode_pb2.ForwardRequest):
            raise EpochOver
        request.epoch = epoch
    return epoch
