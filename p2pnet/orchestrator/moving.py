"""Moves in good order: a host leaves, or a better placement is there. Pure.

A part of `Conductor`. A move is planned, the new hosts are made ready, the network is
cut for the last time under the present epoch; only then is the new placement claimed.
So the new hosts have the states before the old ones let go, and no decided step is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.desk import Desk
from p2pnet.orchestrator.hosts import by_host
from p2pnet.v1 import pnode_pb2

TRIES = 3


@dataclass(slots=True)
class Move:
    """One move. `waiting`: hosts that are not ready yet; `cutting`: all of them are."""

    purpose: m.Purpose
    reason: str
    placement: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, None] = field(default_factory=dict)
    cutting: bool = False
    tries: int = 0

    def begin(self, placement: dict[str, str], desk: Desk) -> None:
        """It is planned: the hosts that gain VNodes are made ready."""
        self.placement = placement
        coming = {v: h for v, h in placement.items() if desk.placement.get(v) != h}
        gains = by_host(coming)
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
            return False
        self.cutting = not self.waiting
        return True

    @property
    def given_up(self) -> bool:
        """Whether it is not worth another plan."""
        return self.purpose is m.Purpose.IMPROVE or self.tries >= TRIES

    def newcomers(self, desk: Desk) -> tuple[str, ...]:
        """Hosts that have nothing of the network yet."""
        return tuple(sorted({*self.placement.values()} - {*desk.placement.values()}))
