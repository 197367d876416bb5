"""A shell: a client's way to its node, through the control socket, and straight to the peers."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from p2pnet.errors import UnreachableError, UsageError
from p2pnet.keys import KeyPair, short
from p2pnet.net.channel import Stream, unix_channel
from p2pnet.net.dialer import PeerContact, TcpDialer
from p2pnet.net.hop_frames import Buffer, Request
from p2pnet.v1 import control_pb2, gossip_pb2, vnode_pb2
from p2pnet.vnode.hops_shell import Hops

logger = logging.getLogger(__name__)

ReplyT = TypeVar("ReplyT", bound=Message)

CONTROL_TIMEOUT_S = 30.0
SETTLE_S = 5.0  # how long a client that has just joined waits to hear who is there
RETRY_S = 0.3  # it doubles with each try, up to ...
RETRY_MAX_S = 3.0
SAY_S = 2.0  # a wait that is longer is worth a word


class Connection:
    """A connection to a node's control socket, and calls to peers. Lives on an asyncio loop."""

    def __init__(self, socket: Path) -> None:
        self._control = unix_channel(socket)
        self._dialer = TcpDialer(KeyPair.from_seed(os.urandom(32)))
        self._hops = Hops(self._dialer)
        self._contacts: dict[str, PeerContact] = {}

    async def close(self) -> None:
        """Ends every connection."""
        await self._hops.close()
        await self._dialer.close()
        await self._control.close()

    async def control(
        self,
        method: str,
        request: Message,
        reply_type: type[ReplyT],
        timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> ReplyT:
        """A call to the node itself.

        Raises:
            UsageError: the node is gone, or says that what is asked for cannot be.
        """
        try:
            return await self._control.call(
                f"Control/{method}", request, reply_type, timeout_s=timeout_s
            )
        except UnreachableError as error:
            raise UsageError(f"the local node does not answer: {error}") from None

    def control_stream(
        self, method: str, reply_type: type[ReplyT], timeout_s: float
    ) -> AbstractAsyncContextManager[Stream[ReplyT]]:
        """A stream from the node itself, for `async with`."""
        return self._control.stream(f"Control/{method}", reply_type, timeout_s=timeout_s)

    # Peers

    async def members(self) -> Sequence[control_pb2.MemberRow]:
        """Who is here, as the node sees it."""
        reply = await self.control(
            "Members", control_pb2.MembersRequest(settle_s=SETTLE_S), control_pb2.MembersReply
        )
        return list(reply.members)

    async def hosting(self) -> list[str]:
        """The living members that host, by peer id, in the order in which the node has them."""
        alive = []
        for row in await self.members():
            advert = gossip_pb2.Advert.FromString(row.advert.payload)
            if row.state == "alive" and advert.grpc_targets and advert.capabilities.hosting:
                alive.append(advert.peer_id)
        return alive

    async def contact(self, peer_id: str) -> PeerContact:
        """How to reach a peer; raises UnreachableError if nobody knows it."""
        if peer_id not in self._contacts:
            reply = await self.control(
                "Peer", control_pb2.PeerRequest(peer_id=peer_id), control_pb2.PeerReply
            )
            if not reply.HasField("advert"):
                raise UnreachableError(f"peer {short(peer_id)} is not known here")
            advert = gossip_pb2.Advert.FromString(reply.advert.payload)
            self._contacts[peer_id] = PeerContact(
                peer_id, tuple(advert.grpc_targets), advert.grpc_certificate
            )
        return self._contacts[peer_id]

    async def call(
        self,
        peer_id: str,
        method: str,
        request: Message,
        reply_type: type[ReplyT],
        *,
        timeout_s: float,
    ) -> ReplyT:
        """A call to a peer; raises as `net.dialer.Dialer.call`."""
        contact = await self.contact(peer_id)
        try:
            return await self._dialer.call(
                contact, method, request, reply_type, timeout_s=timeout_s
            )
        except UnreachableError:
            self._contacts.pop(peer_id, None)  # it may have come back elsewhere
            raise

    async def hop(
        self, peer_id: str, request: Request, payload: Buffer | None, *, timeout_s: float
    ) -> tuple[vnode_pb2.HopReply, memoryview | None]:
        """A tensor to a VNode, or a word, over the one stream to its host; its reply.

        Raises:
            UnreachableError: the host is not reached, or not in time.
        """
        contact = await self.contact(peer_id)
        try:
            return await self._hops.hop(contact, request, payload, timeout_s=timeout_s)
        except UnreachableError:
            self._contacts.pop(peer_id, None)
            raise

    async def stream(
        self, peer_id: str, method: str, reply_type: type[ReplyT], timeout_s: float
    ) -> AbstractAsyncContextManager[Stream[ReplyT]]:
        """A stream to a peer, for `async with await`."""
        contact = await self.contact(peer_id)
        return self._dialer.stream(contact, method, reply_type, timeout_s=timeout_s)


class Patience:
    """Tries again for a while, and says so when it takes longer. `what`: that is waited for."""

    def __init__(self, what: str, limit_s: float) -> None:
        self._what = what
        self._limit_s = limit_s
        self._began = asyncio.get_running_loop().time()
        self._retry_s = RETRY_S
        self._said = False

    async def wait(self, why: Exception) -> None:
        """Before the next try; raises UnreachableError when there is to be none."""
        waited_s = asyncio.get_running_loop().time() - self._began
        if waited_s >= self._limit_s:
            raise UnreachableError(
                f"waited {self._limit_s:g} s for {self._what}, in vain: {why}"
            ) from why
        if waited_s + self._retry_s >= SAY_S and not self._said:
            self._said = True
            logger.warning("waiting for %s, for up to %g s: %s", self._what, self._limit_s, why)
        await asyncio.sleep(self._retry_s)
        self._retry_s = min(2 * self._retry_s, RETRY_MAX_S)
