"""A shell: makes the plans that a conductor asks for."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from p2pnet.errors import P2PNetError, UsageError
from p2pnet.orchestrator.messages import MakePlan, Planned
from p2pnet.orchestrator.plan import host_view
from p2pnet.orchestrator.planning import Planning, unplanned
from p2pnet.swarm import Swarm
from p2pnet.v1 import pnode_pb2
from p2pnet.vnode.graph import CompiledGraph

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 1.5


class Planner:
    """Plans for one network. Lives on the gRPC thread; what takes long goes to another."""

    def __init__(self, swarm: Swarm, graph: CompiledGraph, *, hosts_max: int = 0) -> None:
        self._swarm = swarm
        self._planning = Planning(graph, hosts_max=hosts_max)

    async def plan(self, request: MakePlan) -> Planned:
        """Asks whom it has to, and places on who is there."""
        answers = await asyncio.gather(*(self._answers(peer) for peer in request.probe))
        absent = tuple(
            peer for peer, there in zip(request.probe, answers, strict=True) if not there
        )
        members = [member for member in self._swarm.members() if member.alive]
        barred = {*request.exclude, *absent}
        hosts = [host_view(member) for member in members if member.hosting]
        usable = [host for host in hosts if host.peer_id not in barred]
        now = self._swarm.now()
        try:
            planned = await asyncio.to_thread(self._planning.plan, request, usable, now)
        except UsageError as error:
            planned = unplanned(request.purpose, error, len(hosts), len(usable))
        alive = tuple(member.peer_id for member in members)
        return replace(planned, alive=alive, absent=absent)

    async def _answers(self, peer_id: str) -> bool:
        try:
            await self._swarm.call(
                peer_id,
                "PNode/Describe",
                pnode_pb2.DescribeRequest(),
                pnode_pb2.DescribeReply,
                timeout_s=PROBE_TIMEOUT_S,
            )
        except P2PNetError:
            return False
        return True
