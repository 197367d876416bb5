"""A shell: the control socket, by which this machine's user asks and steers the node."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from p2pnet.around import view_of
from p2pnet.dht.keyspace import cid_of, name_key, network_key, vnode_key
from p2pnet.dht.manifest import check_network_id
from p2pnet.dht.records import OpenRecord
from p2pnet.dht.service import Service
from p2pnet.dht.shell import Dht
from p2pnet.draining import Draining
from p2pnet.errors import (
    MalformedError,
    NotFoundError,
    RemoteError,
    ResourceError,
    UnreachableError,
)
from p2pnet.events import EventBus
from p2pnet.gossip.shell import Gossip
from p2pnet.log.shell import open_log
from p2pnet.net.bridge import Bridge
from p2pnet.net.handlers import Caller, Method, server_stream, unary
from p2pnet.net.network import PeerInfo
from p2pnet.orchestrator.plan import plan_json
from p2pnet.service import Scope
from p2pnet.service_file import to_json
from p2pnet.swarm import MemberView, Swarm
from p2pnet.tracing import Tracing
from p2pnet.units import format_size
from p2pnet.v1 import control_pb2 as pb
from p2pnet.v1 import records_pb2
from p2pnet.vnode.compiling import from_json
from p2pnet.vnode.draft import BATCH_MAX
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.shell import Host

SETTLE_S_MAX = 10.0
TRIES = 3
RETRY_S = 1.0
DHT_TIMEOUT_S = 10.0
GET_TIMEOUT_S = 25.0
LOG_BYTES_MAX = 60 << 20
KEYS_MAX = 16  # asked for in one call
_CROSSING_S = 20.0
EVENTS_TIMEOUT_S = 24 * 3600.0
BREAK_TIMEOUT_S = 600.0
DRAIN_TIMEOUT_S = 60.0
PLAN_TIMEOUT_S = 60.0

T = TypeVar("T")


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
    scope: Scope
    tracing: Tracing
    swarm: Swarm
    progress: Progress
    settled: Callable[[], trio.Event]
    refresh: Callable[[], None]  # tells the DHT again who is here
    lost: Callable[[], bool]  # a client that has found nobody
    leave: Callable[[], None]
    draining: Draining

    def services(self) -> dict[str, Mapping[str, Method]]:
        """What gRPC serves."""
        methods: dict[str, Method] = {
            "Info": unary(self._info, pb.InfoRequest, pb.InfoReply),
            "Members": unary(self._members, pb.MembersRequest, pb.MembersReply),
            "FindNetwork": unary(self._find, pb.FindNetworkRequest, pb.FindNetworkReply),
            "WhereIs": unary(self._where_is, pb.WhereIsRequest, pb.WhereIsReply),
            "Peer": unary(self._peer, pb.PeerRequest, pb.PeerReply),
            "FindPeer": unary(self._find_peer, pb.FindPeerRequest, pb.FindPeerReply),
            "GetRecords": unary(self._get_records, pb.GetRecordsRequest, pb.GetRecordsReply),
            "FindProviders": unary(
                self._find_providers, pb.FindProvidersRequest, pb.FindProvidersReply
            ),
            "DhtStats": unary(self._dht_stats, pb.DhtStatsRequest, pb.DhtStatsReply),
            "Service": unary(self._service, pb.ServiceRequest, pb.ServiceReply),
            "Plan": unary(self._plan, pb.PlanRequest, pb.PlanReply, timeout_s=PLAN_TIMEOUT_S),
            "ReadLog": unary(self._read_log, pb.LogRequest, pb.LogReply),
            "Trace": unary(self._trace, pb.TraceRequest, pb.TraceReply),
            "Drain": unary(self._drain, pb.DrainRequest, pb.DrainReply, timeout_s=DRAIN_TIMEOUT_S),
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
        wait_s = max(0.0, min(request.settle_s, SETTLE_S_MAX))
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
                host = pb.WhereIsRow(
                    vnode=vnode,
                    peer_id=allocation.host,
                    addrs=allocation.addrs,
                    epoch=allocation.epoch,
                    role=allocation.role,
                    expires_in_s=max(0.0, record.expires_in_s),
                    cid=cid_of(keys[vnode]),
                )
                rows.append(host)
                for peer_id in allocation.standbys:
                    row = pb.WhereIsRow()
                    row.CopyFrom(host)
                    row.peer_id, row.role = peer_id, "standby"
                    del row.addrs[:]
                    rows.append(row)
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
        return await self._ask_dht(lambda: self.dht.get(key, DHT_TIMEOUT_S))

    # The DHT as it is

    async def _find_peer(self, request: pb.FindPeerRequest, caller: Caller) -> pb.FindPeerReply:
        found: PeerInfo | None = await self._on_trio(
            self._ask_dht, lambda: self.dht.find_peer(request.peer_id, DHT_TIMEOUT_S)
        )
        return pb.FindPeerReply(peer=None if found is None else _to_message(found))

    async def _get_records(
        self, request: pb.GetRecordsRequest, caller: Caller
    ) -> pb.GetRecordsReply:
        keys = list(request.keys)[:KEYS_MAX]
        found, failed = await self._on_trio(self._get_all, keys)
        if failed and not any(found.values()):
            raise failed[0]
        return pb.GetRecordsReply(
            records=[
                records_pb2.HeldRecord(record=record.signed, age_ms=round(record.age_s * 1000))
                for key in keys
                for record in found.get(key, ())
            ]
        )

    async def _find_providers(
        self, request: pb.FindProvidersRequest, caller: Caller
    ) -> pb.FindProvidersReply:
        found: list[PeerInfo] = await self._on_trio(
            self._ask_dht, lambda: self.dht.providers(request.key, DHT_TIMEOUT_S)
        )
        return pb.FindProvidersReply(peers=map(_to_message, found))

    async def _dht_stats(self, request: pb.DhtStatsRequest, caller: Caller) -> pb.DhtStatsReply:
        return pb.DhtStatsReply(json=json.dumps(await self._on_trio(self._stats)))

    async def _stats(self) -> dict[str, int | float | None]:
        with trio.move_on_after(SETTLE_S_MAX):
            await self.settled().wait()
        return self.dht.stats()

    async def _ask_dht(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What the DHT says, asked again where nobody answered; an end before the caller's."""
        with trio.move_on_after(GET_TIMEOUT_S):
            return await self._try_to_ask(ask)
        raise UnreachableError("the DHT does not answer in time: ask again in a moment")

    async def _try_to_ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        await self._settle()
        for _ in range(TRIES - 1):
            try:
                return await ask()
            except UnreachableError:  # a swarm that is busy, or has just lost many peers
                await trio.sleep(RETRY_S)
                self.refresh()
        return await ask()

    async def _service(self, request: pb.ServiceRequest, caller: Caller) -> pb.ServiceReply:
        if not request.HasField("publish"):
            return pb.ServiceReply(json=json.dumps(self.scope.describe()))
        published: Service = await self._on_trio(self._publish, request.publish)
        return pb.ServiceReply(json=json.dumps(to_json(published)))

    async def _publish(self, signed: records_pb2.SignedService) -> Service:
        return await self._ask_dht(lambda: self.scope.publish(signed))

    async def _drain(self, request: pb.DrainRequest, caller: Caller) -> pb.DrainReply:
        return pb.DrainReply(json=json.dumps(dataclasses.asdict(await self.draining.drain())))

    async def _plan(self, request: pb.PlanRequest, caller: Caller) -> pb.PlanReply:
        graph = from_json(request.graph)
        if not 1 <= request.batch_size <= BATCH_MAX:
            raise MalformedError(f"a batch has 1 to {BATCH_MAX} samples")
        plan = functools.partial(plan_json, batch_size=request.batch_size)
        members = await self._on_trio(self._views)
        found = await asyncio.to_thread(plan, graph, members)  # may take seconds
        return pb.PlanReply(json=json.dumps(found))

    async def _views(self) -> list[MemberView]:
        await self._settle()
        return [view_of(member) for member in self.gossip.members()]

    async def _settle(self) -> None:
        with trio.move_on_after(SETTLE_S_MAX):
            await self.settled().wait()
        if self.lost():
            raise UnreachableError(
                f"no bootstrap peer can be reached, of {self.progress.wanted}: check the list, "
                "and that the network is up"
            )

    async def _leave(self, request: pb.LeaveRequest, caller: Caller) -> pb.LeaveReply:
        self.leave()
        return pb.LeaveReply()

    async def _events(
        self, request: pb.EventsRequest, caller: Caller
    ) -> AsyncGenerator[pb.EventReply, None]:
        if request.follow:
            async for line in self.events.follow(request.since):
                yield pb.EventReply(json=line)
        else:
            for kept in self.events.kept(request.since):
                yield pb.EventReply(json=kept.line)

    async def _read_log(self, request: pb.LogRequest, caller: Caller) -> pb.LogReply:
        check_network_id(request.network_id)
        records = await self._on_trio(self._get, network_key(request.network_id))
        for record in records:
            if isinstance(record.content, records_pb2.NetworkRecord):
                break
        else:
            raise NotFoundError(
                f"the DHT does not say where the log of network {request.network_id} is: a "
                "network's records run out some time after its last orchestrator has gone"
            )
        log = open_log(
            self.swarm,
            request.network_id,
            record.content.manifest,
            keepers=record.content.keepers,
        )
        try:
            reply = pb.LogReply(entries=await log.read())
        finally:
            await log.close()
        if reply.ByteSize() > LOG_BYTES_MAX:
            raise ResourceError(
                f"the log has {format_size(reply.ByteSize())}, more than can be shown"
            )
        return reply

    async def _trace(self, request: pb.TraceRequest, caller: Caller) -> pb.TraceReply:
        check_network_id(request.network_id)
        return await self.tracing.gather(request.network_id)

    async def _break(self, request: pb.BreakRequest, caller: Caller) -> pb.BreakReply:
        if request.point == "forget-locations" and self.faults.enabled:
            self.host.forget_locations()
            return pb.BreakReply(hit=True)
        step = await self.faults.stop_at(request.point, request.vnode, request.step)
        return pb.BreakReply(hit=True, step=step)

    async def _on_trio(self, async_fn: Callable[..., Any], *args: Any) -> Any:
        return await self.bridge.to_trio(async_fn, *args, timeout_s=_CROSSING_S + DHT_TIMEOUT_S)


def _to_message(peer: PeerInfo) -> pb.PeerAddrs:
    return pb.PeerAddrs(peer_id=peer.peer_id, addrs=peer.addrs)
