"""A shell: carries a message to a VNode, wherever that lives now.

Where it lives is in a cache (filled by the orchestrator's hints); what the cache
lacks, or turns out to have wrong, is asked of the DHT.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from p2pnet.errors import P2PNetError, RemoteError
from p2pnet.keys import short
from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.network import HostedNetwork

logger = logging.getLogger(__name__)

HOP_TIMEOUT_S = 5.0
LOOKUP_TIMEOUT_S = 3.0
_TRIES = 4
_BUSY_PAUSE_S = 0.02
_ELSEWHERE = (
    common_pb2.REFUSAL_CODE_STALE_EPOCH,
    common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH,
    common_pb2.REFUSAL_CODE_NOT_HOSTED,
)

Hop = vnode_pb2.TrainRequest | vnode_pb2.ForwardRequest
Here = Callable[[], Awaitable[common_pb2.Refusal | None]]


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

    async def send(
        self,
        net: HostedNetwork,
        method: str,
        request: Hop,
        here: Here,
    ) -> None:
        """Delivers `request` to its VNode; `here` does so if it turns out to live on this host.

        A forward pass follows its VNode into a newer epoch, and `request` then says that
        epoch; a training step ends with the epoch that it belongs to.

        Raises:
            HopFailed: it could not be delivered.
            EpochOver: the network has moved on.
        """
        vnode = request.vnode
        epoch, there = net.epoch, net.locations.get(vnode, "")
        for attempt in range(_TRIES):
            if not there:
                there, found = await self.locate(net, vnode, epoch)
                epoch = _follow(request, net, found)
            refusal = await self._deliver(there, method, request, here)
            if refusal is None:
                return
            if refusal.code == common_pb2.REFUSAL_CODE_BUSY:
                await asyncio.sleep(_BUSY_PAUSE_S * 2**attempt)
                continue
            if refusal.code not in _ELSEWHERE:
                raise HopFailed(there, refusal.detail)
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
                await asyncio.sleep(_BUSY_PAUSE_S * 2**attempt)
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
        self, host: str, method: str, request: Hop, here: Here
    ) -> common_pb2.Refusal | None:
        try:
            if host == self._swarm.keypair.peer_id:
                return await here()
            reply = await self._swarm.call(
                host, method, request, vnode_pb2.HopReply, timeout_s=HOP_TIMEOUT_S
            )
        except RemoteError as error:
            raise HopFailed(host, str(error)) from None
        except P2PNetError as error:  # our own trouble, which nobody else is to be blamed for
            raise HopFailed("", str(error)) from None
        return reply.refusal if reply.HasField("refusal") else None


def _follow(request: Hop, net: HostedNetwork, epoch: int) -> int:
    """Makes a request one of that epoch, if it may outlive its own; raises EpochOver."""
    if epoch > net.epoch:
        if not isinstance(request, vnode_pb2.ForwardRequest):
            raise EpochOver
        request.epoch = epoch
    return epoch
