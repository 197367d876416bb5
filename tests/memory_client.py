"""A client of a swarm in memory: the real session, over a fake control socket and wire."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from google.protobuf.message import Message
from memory_swarm import MemorySwarm
from memory_wire import LATENCY_S, MemoryDialer, MemoryHops, keypair_of

from p2pnet.client.session import Session
from p2pnet.dht.keyspace import name_key, network_key, vnode_key
from p2pnet.v1 import control_pb2, records_pb2

M = TypeVar("M", bound=Message)


class _Control:
    """A client's node: what it asks through the control socket."""

    def __init__(self, world: MemorySwarm) -> None:
        self._world = world

    async def call(
        self, method: str, request: Any, reply_type: type[M], *, timeout_s: float
    ) -> Message:
        await asyncio.sleep(LATENCY_S)
        world = self._world
        match request:
            case control_pb2.InfoRequest():
                return control_pb2.InfoReply(peer_id=keypair_of("client").peer_id)
            case control_pb2.MembersRequest():
                rows = [
                    control_pb2.MemberRow(
                        state="alive" if member.alive else "failed",
                        advert=world.nodes[member.peer_id].advert(),
                    )
                    for member in world.members()
                ]
                return control_pb2.MembersReply(members=rows)
            case control_pb2.PeerRequest():
                node = world.nodes.get(request.peer_id)
                return control_pb2.PeerReply(advert=None if node is None else node.advert())
            case control_pb2.FindNetworkRequest():
                keys_of = (name_key(request.name), network_key(request.name))
                records = [r.signed for key in keys_of for r in await world.look_up(key)]
                return control_pb2.FindNetworkReply(records=records)
            case control_pb2.WhereIsRequest():
                return control_pb2.WhereIsReply(
                    rows=[row for v in request.vnodes for row in await self._where(request, v)]
                )
        raise AssertionError(method)

    async def _where(self, request: Any, vnode: str) -> list[control_pb2.WhereIsRow]:
        found = await self._world.look_up(vnode_key(request.network_id, vnode))
        rows = []
        for record in found[:1]:
            assert isinstance(record.content, records_pb2.Allocation)
            hosts = [(record.content.host, "primary")]
            hosts += [(standby, "standby") for standby in record.content.standbys]
            rows += [
                control_pb2.WhereIsRow(vnode=vnode, peer_id=host, epoch=record.epoch, role=role)
                for host, role in hosts
            ]
        return rows

    async def close(self) -> None:
        pass


class MemorySession(Session):
    """The client's session, over memory instead of a socket and TCP."""

    def __init__(self, world: MemorySwarm, name: str = "client") -> None:
        self._control: Any = _Control(world)
        self._dialer: Any = MemoryDialer(world, keypair_of(name).peer_id)
        self._hops: Any = MemoryHops(world, keypair_of(name).peer_id)
        self._contacts = {}
        self._located = {}
