"""A shell: the p2p network as hosts and orchestrators on the gRPC thread see it.

Implements `swarm.Swarm`. The view of the members is an immutable snapshot
that the trio side replaces; only DHT calls cross over to trio.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from p2pnet import clock
from p2pnet.dht.keyspace import vnode_key
from p2pnet.dht.shell import Dht
from p2pnet.errors import (
    ForgedError,
    P2PNetError,
    RefusedError,
    RemoteError,
    UnreachableError,
)
from p2pnet.events import EventBus
from p2pnet.gossip.events import Member, State
from p2pnet.gossip.shell import Gossip
from p2pnet.gossip.statements import open_advert
from p2pnet.keys import KeyPair, short
from p2pnet.net.bridge import Bridge
from p2pnet.net.dialer import Dialer, PeerContact
from p2pnet.net.groups import ip_group
from p2pnet.net.handlers import Caller, Method
from p2pnet.net.hop_frames import Buffer, Request
from p2pnet.swarm import MemberView
from p2pnet.v1 import common_pb2, records_pb2, vnode_pb2
from p2pnet.vnode import transfer
from p2pnet.vnode.hops_shell import Hops

ReplyT = TypeVar("ReplyT", bound=Message)

DHT_TIMEOUT_S = 10.0
_CROSSING_S = 5.0  # on top of a DHT operation's own deadline


class Around:
    """This node's surroundings. `update` is called on trio; all else on the gRPC thread."""

    def __init__(
        self,
        keypair: KeyPair,
        dialer: Dialer,
        dht: Dht,
        gossip: Callable[[], Gossip],
        bridge: Bridge,
        events: EventBus,
    ) -> None:
        self._keypair = keypair
        self._dialer = dialer
        self._hops = Hops(dialer)
        self._dht = dht
        self._gossip = gossip
        self._bridge = bridge
        self._events = events
        self._members: tuple[MemberView, ...] = ()
        self._contacts: Mapping[str, PeerContact] = {}
        self._advert: common_pb2.Signed | None = None
        self._own: dict[str, Method] = {}

    def serves(self, service: str, methods: Mapping[str, Method]) -> None:
        """What this node serves: its calls to itself need no network."""
        self._own |= {f"{service}/{name}": it for name, it in methods.items() if it.is_unary}

    async def close(self) -> None:
        """Ends the streams of hops; before the dialer is closed."""
        await self._hops.close()

    def update(self, members: Sequence[Member]) -> None:
        """Replaces the snapshot; who is gone can no longer be called."""
        self._contacts = {
            member.peer_id: PeerContact(
                member.peer_id, member.advert.grpc_targets, member.advert.grpc_certificate
            )
            for member in members
            if member.state.live
        }
        self._members = tuple(view_of(member) for member in members)
        us = (m.advert.signed for m in members if m.peer_id == self._keypair.peer_id)
        self._advert = next(us, None)

    @property
    def keypair(self) -> KeyPair:
        """See `Swarm`."""
        return self._keypair

    def now(self) -> float:
        """See `Swarm`."""
        return clock.now()

    def advert(self) -> common_pb2.Signed | None:
        """See `Swarm`."""
        return self._advert

    async def introduce(self, peer_id: str, advert: common_pb2.Signed) -> None:
        """See `Swarm`."""
        if open_advert(advert).peer_id != peer_id:
            raise ForgedError("an advert that is somebody else's")
        await self._on_trio(self._gossip().hear, peer_id, advert, timeout_s=DHT_TIMEOUT_S)

    def members(self) -> Sequence[MemberView]:
        """See `Swarm`."""
        return self._members

    async def call(
        self,
        peer_id: str,
        method: str,
        request: Message,
        reply_type: type[ReplyT],
        *,
        timeout_s: float,
    ) -> ReplyT:
        """See `Swarm`."""
        own = self._own.get(method) if peer_id == self._keypair.peer_id else None
        if own is not None:
            return reply_type.FromString(await self._ask_ourselves(own, request, timeout_s))
        return await self._dialer.call(
            self._contact(peer_id), method, request, reply_type, timeout_s=timeout_s
        )

    async def _ask_ourselves(self, own: Method, request: Message, timeout_s: float) -> bytes:
        """A VNode and its orchestrator may live together: no round trip through gRPC then."""

        async def only() -> AsyncIterator[bytes]:
            yield request.SerializeToString()

        try:
            async with asyncio.timeout(timeout_s):
                reply = await own.run(only(), Caller(self._keypair.peer_id, timeout_s), _refuse)
        except TimeoutError:
            raise UnreachableError("this node did not answer itself in time") from None
        except RemoteError:
            raise
        except P2PNetError as error:  # as any other peer would hear of it
            raise RefusedError(str(error)) from None
        return reply or b""

    async def hop(
        self, peer_id: str, request: Request, payload: Buffer | None, *, timeout_s: float
    ) -> tuple[vnode_pb2.HopReply, memoryview | None]:
        """See `Swarm`."""
        return await self._hops.hop(self._contact(peer_id), request, payload, timeout_s=timeout_s)

    async def put_blob(
        self, peer_id: str, data: bytes, *, network_id: str, timeout_s: float, digest: bytes = b""
    ) -> None:
        """See `Swarm`."""
        await transfer.put_blob(
            self._dialer,
            self._contact(peer_id),
            data,
            network_id=network_id,
            timeout_s=timeout_s,
            digest=digest,
        )

    async def get_blob(self, peer_id: str, digest: bytes, *, timeout_s: float) -> bytes:
        """See `Swarm`."""
        return await transfer.get_blob(
            self._dialer, self._contact(peer_id), digest, timeout_s=timeout_s
        )

    async def find_allocations(
        self, network_id: str, vnode: str, *, timeout_s: float
    ) -> Sequence[records_pb2.Allocation]:
        """See `Swarm`."""
        key = vnode_key(network_id, vnode)
        records = await self._on_trio(self._dht.get, key, timeout_s, timeout_s=timeout_s)
        return [r.content for r in records if isinstance(r.content, records_pb2.Allocation)]

    async def keep_record(self, key: bytes, make: Callable[[], common_pb2.Signed]) -> int:
        """See `Swarm`."""
        holders: int = await self._on_trio(self._dht.publish, key, make, timeout_s=DHT_TIMEOUT_S)
        return holders

    async def drop_record(self, key: bytes) -> None:
        """See `Swarm`."""
        await self._on_trio(self._unkeep, key, timeout_s=DHT_TIMEOUT_S)

    async def provide(self, key: bytes) -> None:
        """See `Swarm`."""
        await self._on_trio(self._dht.provide, key, timeout_s=DHT_TIMEOUT_S)

    def emit(self, event: str, **fields: Any) -> None:
        """See `Swarm`."""
        self._events.emit(event, **fields)

    async def _unkeep(self, key: bytes) -> None:
        self._dht.unkeep(key)

    async def _on_trio(self, async_fn: Callable[..., Any], *args: Any, timeout_s: float) -> Any:
        try:
            return await self._bridge.to_trio(async_fn, *args, timeout_s=timeout_s + _CROSSING_S)
        except TimeoutError:
            raise UnreachableError("the DHT did not answer in time") from None

    def _contact(self, peer_id: str) -> PeerContact:
        contact = self._contacts.get(peer_id)
        if contact is None:
            raise UnreachableError(f"peer {short(peer_id)} is not among the living members")
        return contact


def view_of(member: Member) -> MemberView:
    """A member as those who place see it: what its own advert says, so that all see the same."""
    lent = member.advert.capabilities
    return MemberView(
        peer_id=member.peer_id,
        alive=member.state.live,
        hosting=lent.hosting,
        addrs=member.advert.addrs,
        cpus=lent.cpus,
        memory_bytes=lent.memory_bytes,
        memory_used_bytes=lent.memory_used_bytes,
        gflops=lent.matmul_gflops,
        vnodes=lent.vnodes,
        ip_group=ip_group(member.peer_id, next(iter(member.advert.addrs), "")),
        coordinate=member.advert.coordinate,
        suspect=member.state is State.SUSPECT,
    )


async def _refuse(reply: bytes) -> None:
    raise TypeError("a method with one reply gives no others")
