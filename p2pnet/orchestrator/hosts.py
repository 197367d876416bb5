"""A shell: the hosts of one network; who can be asked, who agrees, who is well."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from p2pnet.errors import RefusedError, RemoteError
from p2pnet.keys import ACCEPTANCE, short, verify
from p2pnet.net.channel import parse
from p2pnet.orchestrator.placement import HostView
from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 1.5
ALLOCATE_TIMEOUT_S = 5.0
HEARTBEAT_TIMEOUT_S = 2.0
HEARTBEATS_MISSED_MAX = 2
SHUNNED_S = 15.0  # how long a host that failed us is not placed on


class Hosts:
    """The PNodes that one network may be placed on. Lives on the gRPC thread."""

    def __init__(self, swarm: Swarm, name: str) -> None:
        self._swarm = swarm
        self._name = name
        self._shunned: dict[str, float] = {}  # until when
        self._leaving: dict[str, None] = {}
        self._missed: dict[str, int] = {}
        self._former: dict[str, None] = {}  # lost their VNodes, and may not know

    def leaves(self, peer_id: str) -> None:
        """The peer is about to go: nothing is placed there any more."""
        self._leaving[peer_id] = None

    def came(self, peer_id: str) -> None:
        """The peer is there (again)."""
        self._leaving.pop(peer_id, None)
        self._shunned.pop(peer_id, None)

    def well(self, peer_id: str) -> bool:
        """Whether nothing speaks against a peer at present."""
        until = self._shunned.get(peer_id, 0.0)
        return peer_id not in self._leaving and until <= self._swarm.now()

    async def usable(self, probe: Sequence[str] = ()) -> list[HostView]:
        """Who can host, by the membership and, for `probe`, by asking them now."""
        answers = await asyncio.gather(*(self._answers(peer_id) for peer_id in probe))
        for peer_id, answered in zip(probe, answers, strict=True):
            if not answered:
                self.shun(peer_id)
        return [
            HostView(
                peer_id=member.peer_id,
                cpus=member.cpus,
                memory_free_bytes=member.memory_bytes - member.memory_used_bytes,
                gflops=member.gflops,
                vnodes=member.vnodes,
            )
            for member in self._swarm.members()
            if member.alive and member.hosting and self.well(member.peer_id)
        ]

    async def allocate(
        self, requests: Mapping[str, pnode_pb2.AllocateRequest]
    ) -> list[common_pb2.Signed] | None:
        """Asks each host; all their countersignatures, or None if one did not agree."""

        async def ask(host: str) -> list[common_pb2.Signed] | None:
            try:
                reply = await self._swarm.call(
                    host,
                    "PNode/Allocate",
                    requests[host],
                    pnode_pb2.AllocateReply,
                    timeout_s=ALLOCATE_TIMEOUT_S,
                )
                if reply.HasField("refusal"):
                    raise RefusedError(reply.refusal.detail, code=reply.refusal.code)
                _check_accepted(host, requests[host], reply.acceptances)
            except RemoteError as error:
                logger.info("network %s: %s: %s", self._name, short(host), error)
                self.shun(host)
                return None
            return list(reply.acceptances)

        answers = await asyncio.gather(*(ask(host) for host in sorted(requests)))
        if any(answer is None for answer in answers):
            return None
        return [accepted for answer in answers if answer for accepted in answer]

    async def release(self, request: pnode_pb2.DropRequest) -> None:
        """Tells former hosts that they have lost their VNodes; those that are gone, later."""

        async def tell(host: str) -> None:
            try:
                await self._swarm.call(
                    host, "PNode/Drop", request, pnode_pb2.DropReply, timeout_s=PROBE_TIMEOUT_S
                )
            except RemoteError:
                return
            self._former.pop(host, None)

        alive = [member.peer_id for member in self._swarm.members() if member.alive]
        await asyncio.gather(*(tell(host) for host in alive if host in self._former))

    def lost(self, placed: Sequence[str], now_placed: Sequence[str]) -> None:
        """Of the hosts of an older placement, those of no newer one are to be told."""
        for host in placed:
            self._former[host] = None
        for host in now_placed:
            self._former.pop(host, None)

    async def heartbeat(
        self, host: str, request: pnode_pb2.HeartbeatRequest, vnodes: Sequence[str]
    ) -> tuple[Sequence[pnode_pb2.HostedVNode], str, bool]:
        """Renews a host's lease.

        Returns how its VNodes are, what is wrong ("" if nothing is), and whether it
        answers and no longer runs what it should.
        """
        try:
            reply = await self._swarm.call(
                host,
                "PNode/Heartbeat",
                request,
                pnode_pb2.HeartbeatReply,
                timeout_s=HEARTBEAT_TIMEOUT_S,
            )
        except RemoteError as error:
            self._missed[host] = self._missed.get(host, 0) + 1
            if self._missed[host] < HEARTBEATS_MISSED_MAX:
                return (), "", False
            self._missed[host] = 0
            return (), f"peer {short(host)} misses heartbeats: {error}", False
        self._missed[host] = 0
        running = {hosted.vnode for hosted in reply.vnodes if not hosted.error}
        lost = sorted(set(vnodes) - running)
        if reply.HasField("refusal") or lost:
            return (), f"peer {short(host)} no longer runs {', '.join(lost or vnodes)}", True
        rows = {hosted.vnode: hosted for hosted in reply.vnodes}
        return [rows[vnode] for vnode in vnodes], "", False

    def shun(self, peer_id: str) -> None:
        """Places nothing there for a while."""
        now = self._swarm.now()
        self._shunned = {peer: until for peer, until in self._shunned.items() if until > now}
        self._shunned[peer_id] = now + SHUNNED_S

    async def _answers(self, peer_id: str) -> bool:
        try:
            await self._swarm.call(
                peer_id,
                "PNode/Describe",
                pnode_pb2.DescribeRequest(),
                pnode_pb2.DescribeReply,
                timeout_s=PROBE_TIMEOUT_S,
            )
        except RemoteError:
            return False
        return True


def _check_accepted(
    host: str, request: pnode_pb2.AllocateRequest, acceptances: Sequence[common_pb2.Signed]
) -> None:
    """Raises RemoteError unless the host has signed just what it was asked for."""
    said = []
    for accepted in acceptances:
        if verify(ACCEPTANCE, accepted) != host:
            raise RefusedError("the host signed as somebody else")
        it = parse(records_pb2.Allocation, accepted.payload)
        said.append((it.network_id, it.vnode, it.host, it.epoch))
    if said != [(request.network_id, vnode, host, request.epoch) for vnode in request.vnodes]:
        raise RefusedError("the host agreed to something else than it was asked for")


def by_host(placement: Mapping[str, str]) -> dict[str, list[str]]:
    """The VNodes of each host, from the host of each VNode."""
    hosts: dict[str, list[str]] = {}
    for vnode, host in sorted(placement.items()):
        hosts.setdefault(host, []).append(vnode)
    return hosts
