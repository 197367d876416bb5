"""What becomes of a `MakePlan`, once it is known who is there. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from p2pnet.errors import UsageError
from p2pnet.orchestrator.costs import HostView
from p2pnet.orchestrator.messages import MakePlan, Planned, Purpose
from p2pnet.orchestrator.placement import place
from p2pnet.orchestrator.rebalance import Rebalancer
from p2pnet.orchestrator.standbys import Standbys, choose, count, left_of, promote
from p2pnet.vnode.graph import CompiledGraph


class Planning:
    """Plans for one network, on hosts that it is told of each time.

    Args:
        hosts_max: on so many hosts at most, standbys included; 0: on any number.
    """

    def __init__(self, graph: CompiledGraph, *, hosts_max: int = 0) -> None:
        self._graph = graph
        self._hosts_max = hosts_max
        self._rebalancer = Rebalancer(graph, batch_size=graph.batch_max)

    def plan(self, request: MakePlan, hosts: Sequence[HostView], now: float) -> Planned:
        """The plan that is asked for; `hosts` are those that may be used, at `now`.

        Raises:
            UsageError: there is no room for the network, in a sentence.
        """
        if request.purpose is Purpose.IMPROVE:
            return self._improve(request, hosts, now)
        usable = dict.fromkeys(host.peer_id for host in hosts if host.trust > 0)
        if request.live:
            kept = promote(self._graph, request.current, request.standbys, usable)
            if kept is not None:
                # Who is new here has no state to go on from: standbys are replaced later,
                # when nothing waits for them.
                left = left_of(request.standbys, kept, usable)
                return Planned(request.purpose, kept, standbys=left, live=True)
        placed = place(
            self._graph,
            self._freed(request, hosts),
            batch_size=self._graph.batch_max,
            current=request.current,
            hosts_max=self._hosts_max,
        ).assignments
        return Planned(
            request.purpose, dict(placed), standbys=self._standbys(request, hosts, placed)
        )

    def _improve(self, request: MakePlan, hosts: Sequence[HostView], now: float) -> Planned:
        """A better placement; or the same, with standbys for whom has lost his.

        That can wait until somebody looks for something better anyhow: a claim stops the
        network for a moment and is an entry of its log for good, while what a missing
        standby costs, if its VNode's host dies, is the way back to the last cut.
        """
        move = self._rebalancer.improve(hosts, request.current, now)
        if move is not None and not 0 < self._hosts_max < len({*move.placement.values()}):
            standbys = self._standbys(request, hosts, move.placement)
            return Planned(request.purpose, dict(move.placement), move.reason, standbys=standbys)
        there = dict.fromkeys(host.peer_id for host in hosts)
        if all(peer in there for peer in request.current.values()):
            standbys = self._standbys(request, hosts, request.current)
            missing = [v for v in standbys if len(standbys[v]) > len(request.standbys.get(v, ()))]
            if missing and count(standbys) > count(request.standbys):
                reason = f"a standby for {missing[0]}" + (", and others" if missing[1:] else "")
                return Planned(request.purpose, dict(request.current), reason, standbys=standbys)
        return Planned(request.purpose, None)

    def _standbys(
        self, request: MakePlan, hosts: Sequence[HostView], placed: Mapping[str, str]
    ) -> Standbys:
        return choose(
            self._graph,
            hosts,
            placed,
            current=request.current,
            following=request.standbys,
            hosts_max=self._hosts_max,
        )

    def _freed(self, request: MakePlan, hosts: Sequence[HostView]) -> list[HostView]:
        """The hosts without the standbys that they have of this network: these make room."""
        taken: dict[str, int] = {}
        for vnode, peers in request.standbys.items():
            for peer in peers:
                taken[peer] = taken.get(peer, 0) + self._graph.memory_bytes(vnode)
        return [
            replace(host, memory_free_bytes=host.memory_free_bytes + taken.get(host.peer_id, 0))
            for host in hosts
        ]


def unplanned(purpose: Purpose, error: UsageError, hosts: int, usable: int) -> Planned:
    """Why there is no plan, of so many hosts that are there and those that may be used."""
    reason = str(error)
    if hosts and not usable:
        reason = (
            f"all {hosts} peers that host VNodes have refused or failed lately; "
            "they are asked again in a while"
        )
    return Planned(purpose, None, reason)
