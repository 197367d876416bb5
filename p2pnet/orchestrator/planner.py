"""A shell: makes the plans that a conductor asks for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from p2pnet.errors import P2PNetError, UsageError
from p2pnet.orchestrator.messages import MakePlan, Planned, Purpose
from p2pnet.orchestrator.placement import HostView, place
from p2pnet.orchestrator.plan import host_view
from p2pnet.orchestrator.rebalance import Rebalancer
from p2pnet.swarm import Swarm
from p2pnet.v1 import pnode_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.network import BATCH_SAMPLES

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 1.5


class Planner:
    """Plans for one network. Lives on the gRPC thread; what takes long goes to another."""

    def __init__(self, swarm: Swarm, graph: CompiledGraph, *, hosts_max: int = 0) -> None:
        self._swarm = swarm
        self._graph = graph
        self._hosts_max = hosts_max
        self._rebalancer = Rebalancer(graph, batch_size=BATCH_SAMPLES)

    async def plan(self, request: MakePlan) -> Planned:
        """Asks whom it has to, and places on who is there."""
        answers = await asyncio.gather(*(self._answers(peer) for peer in request.probe))
        absent = tuple(
            peer for peer, there in zip(request.probe, answers, strict=True) if not there
        )
        members = [member for member in self._swarm.members() if member.alive]
        alive = tuple(member.peer_id for member in members)
        barred = {*request.exclude, *absent}
        hosts = [host_view(member) for member in members if member.hosting]
        usable = [host for host in hosts if host.peer_id not in barred]
        try:
            placement, reason = await asyncio.to_thread(self._place, request, usable)
        except UsageError as error:
            reason = str(error)
            if hosts and not usable:
                reason = (
                    f"all {len(hosts)} peers that host VNodes have refused or failed lately; "
                    "they are asked again in a while"
                )
            return Planned(request.purpose, None, reason, alive, absent)
        return Planned(request.purpose, placement, reason, alive, absent)

    def _place(
        self, request: MakePlan, hosts: Sequence[HostView]
    ) -> tuple[dict[str, str] | None, str]:
        if request.purpose is Purpose.IMPROVE:
            move = self._rebalancer.improve(hosts, request.current, self._swarm.now())
            if move is None or 0 < self._hosts_max < len({*move.placement.values()}):
                return None, ""
            return dict(move.placement), move.reason
        placed = place(
            self._graph,
            hosts,
            batch_size=BATCH_SAMPLES,
            current=request.current,
            hosts_max=self._hosts_max,
        )
        return dict(placed.assignments), ""

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
