"""A shell: the control socket, by which this machine's user asks and steers the node."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from p2pnet.dht.keyspace import cid_of, name_key, network_key, vnode_key
from p2pnet.dht.records import OpenRecord
from p2pnet.dht.shell import Dht
from p2pnet.errors import RemoteError, UnreachableError
from p2pnet.events import EventBus
from p2pnet.gossip.shell import Gossip
from p2pnet.net.bridge import Bridge
from p2pnet.net.handlers import Caller, Method, server_stream, unary
from p2pnet.v1 import control_pb2 as pb
from p2pnet.v1 import records_pb2
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.shell import Host

SETTLE_S_MAX = 10.0
TRIES = 3
RETRY_S = 1.0
DHT_TIMEOUT_S = 10.0
GET_TIMEOUT_S = 25.0
_CROSSING_S = 20.0
EVENTS_TIMEOUT_S = 24 * 3600.0
BREAK_TIMEOUT_S = 600.0


@dataclass(slots=True)
class Progress:
    """How far the node has come with its bootstrap peers. Written on trio, read anywhere."""

    wanted: int = 0
    reached: int = 0


@dataclass(frozen=True, slots=True)
class Control:
    """The service `Control`. Lives on the gRPC thread; `leave` may be called from it."""

    peer_id: str
    addrs: Callable[[], Sequence[str]]
    grpc: str
    data_dir: str
    bridge: Bridge
    gossip: Gossip
    dht: Dht
    events: EventBus
    faults: Faults
    host: Host
    progress: Progress
    settled: Callable[[], trio.Event]
    refresh: Callable[[], None]  # tells the DHT again who is here
    lost: Callable[[], bool]  # a client that has found nobody
    leave: Callable[[], None]

    def services(self) -> dict[str, Mapping[str, Method]]:
        """What gRPC serves."""
        methods: dict[str, Method] = {
            "Info": unary(self._info, pb.InfoRequest, pb.InfoReply),
            "Members": unary(self._members, pb.MembersRequest, pb.MembersReply),
            "FindNetwork": unary(self._find, pb.FindNetworkRequest, pb.FindNetworkReply),
            "WhereIs": unary(self._where_is, pb.WhereIsRequest, pb.WhereIsReply),
            "Peer": unary(self._peer, pb.PeerRequest, pb.PeerReply),
            "Leave": unary(self._leave, pb.LeaveRequest, pb.LeaveReply),
            "Events": server_stream(
                self._events, pb.EventsRequest, pb.EventReply, timeout_s=EVENTS_TIMEOUT_S
            ),
            "Break": unary(self._break, pb.BreakRequest, pb.BreakReply, timeout_s=BREAK_TIMEOUT_S),
        }
        return {"Control": methods}

    async def _info(self, request: pb.InfoRequest, caller: Caller) -> pb.InfoReply:
        return pb.InfoReply(
            peer_id=self.peer_id,
            addrs=self.addrs(),
            grpc=self.grpc,
            data_dir=self.data_dir,
            peers_wanted=self.progress.wanted,
            peers_reached=self.progress.reached,
        )

    async def _members(self, request: pb.MembersRequest, caller: Caller) -> pb.MembersReply:
        wait_s = min(request.settle_s, SETTLE_S_MAX)
        rows: list[pb.MemberRow] = await self._on_trio(self._rows, wait_s)
        return pb.MembersReply(members=rows)

    async def _rows(self, settle_s: float) -> list[pb.MemberRow]:
        with trio.move_on_after(settle_s):
            await self.settled().wait()
        return [
            pb.MemberRow(state=str(member.state), advert=member.advert.signed)
            for member in self.gossip.members()
        ]

    async def _peer(self, request: pb.PeerRequest, caller: Caller) -> pb.PeerReply:
        return pb.PeerReply(advert=await self._on_trio(self._advert, request.peer_id))

    async def _advert(self, peer_id: str) -> object:
        advert = self.gossip.advert_of(peer_id)
        return None if advert is None else advert.signed

    async def _find(self, request: pb.FindNetworkRequest, caller: Caller) -> pb.FindNetworkReply:
        found: list[OpenRecord] = await self._on_trio(self._networks, request.name)
        return pb.FindNetworkReply(records=[record.signed for record in found])

    async def _networks(self, name: str) -> list[OpenRecord]:
        """By name, and by id."""
        found, failed = await self._get_all([name_key(name), network_key(name)])
        records = [record for part in found.values() for record in part]
        if failed and not records:
            raise failed[0]
        return records

    async def _where_is(self, request: pb.WhereIsRequest, caller: Caller) -> pb.WhereIsReply:
        rows: list[pb.WhereIsRow] = await self._on_trio(
            self._where, request.network_id, list(request.vnodes)
        )
        return pb.WhereIsReply(rows=rows)

    async def _where(self, network_id: str, vnodes: Sequence[str]) -> list[pb.WhereIsRow]:
        keys = {vnode: vnode_key(network_id, vnode) for vnode in vnodes}
        found, failed = await self._get_all(keys.values())
        if failed and not found:
            raise failed[0]
        rows = []
        for vnode in vnodes:
            for record in found.get(keys[vnode], [])[:1]:  # the newest epoch's
                allocation = record.content
                assert isinstance(allocation, records_pb2.Allocation)
                rows.append(
                    pb.WhereIsRow(
                        vnode=vnode,
                        peer_id=allocation.host,
                        addrs=allocation.addrs,
                        epoch=allocation.epoch,
                        role=allocation.role,
                        expires_in_s=max(0.0, record.expires_in_s),
                        cid=cid_of(keys[vnode]),
                    )
                )
        return rows

    async def _get_all(
        self, keys: Iterable[bytes]
    ) -> tuple[dict[bytes, list[OpenRecord]], list[RemoteError]]:
        """What is under several keys, asked for at once, and why some could not be asked."""
        found: dict[bytes, list[OpenRecord]] = {}
        failed: list[RemoteError] = []

        async def ask(key: bytes) -> None:
            try:
                found[key] = await self._get(key)
            except RemoteError as error:
                failed.append(error)

        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(ask, key)
        return found, failed

    async def _get(self, key: bytes) -> list[OpenRecord]:
        with trio.move_on_after(GET_TIMEOUT_S):  # before the client gives us up
            return await self._try_to_get(key)
        raise UnreachableError("the DHT does not answer in time: ask again in a moment")

    async def _try_to_get(self, key: bytes) -> list[OpenRecord]:
        with trio.move_on_after(SETTLE_S_MAX):
            await self.settled().wait()
        if self.lost():
            raise UnreachableError(
                f"none of the {self.progress.wanted} bootstrap peers can be reached: check the "
                "list, and that the network is up"
            )
        for _ in range(TRIES - 1):
            try:
                return await self.dht.get(key, DHT_TIMEOUT_S)
            except UnreachableError:  # a swarm that is busy, or has just lost many peers
                await trio.sleep(RETRY_S)
                self.refresh()
        return await self.dht.get(key, DHT_TIMEOUT_S)

    async def _leave(self, request: pb.LeaveRequest, caller: Caller) -> pb.LeaveReply:
        self.leave()
        return pb.LeaveReply()

    async def _events(
        self, request: pb.EventsRequest, caller: Caller
    ) -> AsyncGenerator[pb.EventReply, None]:
        yield pb.EventReply(json=json.dumps({"event": "following"}))
        async for line in self.events.follow():
            yield pb.EventReply(json=line)

    async def _break(self, request: pb.BreakRequest, caller: Caller) -> pb.BreakReply:
        if request.point == "forget-locations" and self.faults.enabled:
            self.host.forget_locations()
            return pb.BreakReply(hit=True)
        step = await self.faults.stop_at(request.point, request.vnode, request.step)
        return pb.BreakReply(hit=True, step=step)

    async def _on_trio(self, async_fn: Callable[..., Any], *args: Any) -> Any:
        return await self.bridge.to_trio(async_fn, *args, timeout_s=_CROSSING_S + DHT_TIMEOUT_S)
