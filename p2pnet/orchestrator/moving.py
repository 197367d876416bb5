"""Moves in good order: a host leaves, or a better placement is there. Pure.

A part of `Conductor`. A move is planned, the new hosts are made ready, the network is
cut for the last time under the present epoch; only then is the new placement claimed.
So the new hosts have the states before the old ones let go, and no decided step is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.desk import Desk
from p2pnet.orchestrator.hosts import all_hosts, by_host, following_by_host
from p2pnet.v1 import pnode_pb2

TRIES = 3


@dataclass(slots=True)
class Move:
    """One move. `waiting`: hosts that are not ready yet; `cutting`: all of them are."""

    purpose: m.Purpose
    reason: str
    placement: dict[str, str] = field(default_factory=dict)
    standbys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    waiting: dict[str, None] = field(default_factory=dict)
    cutting: bool = False
    tries: int = 0

    def begin(
        self, placement: dict[str, str], standbys: dict[str, tuple[str, ...]], desk: Desk
    ) -> None:
        """It is planned: the hosts that gain VNodes, or follow more, are made ready."""
        self.placement, self.standbys = placement, standbys
        had = _by_host(desk.placement, desk.followers)
        gains = {
            host: vnodes
            for host, here in _by_host(placement, standbys).items()
            if (vnodes := tuple(v for v in here if v not in had.get(host, ())))
        }
        self.waiting = dict.fromkeys(gains)
        for host, vnodes in gains.items():
            request = pnode_pb2.ReadyRequest(
                network_id=desk.history.network_id,
                manifest=desk.manifest,
                graph=desk.graph.to_json(),
                vnodes=vnodes,
                states={v: desk.states[v] for v in vnodes if v in desk.states},
            )
            desk.out.append(m.MakeReady(host, request))

    def host_ready(self, event: m.HostReady, desk: Desk) -> bool:
        """Takes a host's answer; False where the move has to be planned anew."""
        if event.host not in self.waiting:
            return True
        del self.waiting[event.host]
        if event.error:
            if not event.busy:
                desk.hosts.shun(event.host, desk.now)
            self.tries += 1
            self.waiting.clear()
            self.placement.clear()
            self.standbys.clear()
            return False
        self.cutting = not self.waiting
        return True

    @property
    def given_up(self) -> bool:
        """Whether it is not worth another plan."""
        return self.purpose is m.Purpose.IMPROVE or self.tries >= TRIES

    def newcomers(self, desk: Desk) -> tuple[str, ...]:
        """Hosts that have nothing of the network yet."""
        there = dict.fromkeys(desk.hosts_now)
        return tuple(h for h in all_hosts(self.placement, self.standbys) if h not in there)


def _by_host(
    placement: Mapping[str, str], standbys: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """All that each host needs the states of; both sorted."""
    hosted, followed = by_host(placement), following_by_host(standbys)
    return {
        host: tuple(sorted((*hosted.get(host, ()), *followed.get(host, ()))))
        for host in all_hosts(placement, standbys)
    }
