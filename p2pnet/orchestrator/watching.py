"""Heartbeats: whether the hosts of a network still run what they should. Pure.

A part of `Conductor`: what is wrong is said to the desk.
"""

from __future__ import annotations

from p2pnet.keys import short
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.desk import Desk
from p2pnet.orchestrator.hosts import by_host, following_by_host
from p2pnet.v1 import common_pb2, pnode_pb2

LEASE_S = 60
HEARTBEAT_S = 1.0
# What a host says whose claim is another than ours: the log knows which counts.
LOOK_INTO_THE_LOG = (
    common_pb2.REFUSAL_CODE_STALE_EPOCH,
    common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH,
    common_pb2.REFUSAL_CODE_CLOSED,
)


class Watch:
    """Of the hosts of one network, while it is ready.

    Attributes:
        health: how each VNode is, as its host said last.
        at: when the next heartbeats are due.
    """

    def __init__(self, desk: Desk) -> None:
        self.health: dict[str, pnode_pb2.HostedVNode] = {}
        self.at = 0.0
        self._desk = desk
        self._beating: dict[str, None] = {}  # hosts whose answer is awaited

    def begin_epoch(self) -> None:
        """Every host has agreed just now."""
        self._beating.clear()
        self.at = self._desk.now + HEARTBEAT_S
        self._release()

    def tick(self) -> None:
        """Renews every host's lease, when that is due."""
        desk = self._desk
        if desk.now < self.at:
            return
        self.at = desk.now + HEARTBEAT_S
        self._release()
        for host in desk.hosts_now:
            if host not in self._beating:
                self._beating[host] = None
                request = pnode_pb2.HeartbeatRequest(
                    network_id=desk.history.network_id, epoch=desk.epoch, lease_s=LEASE_S
                )
                desk.out.append(m.Beat(host, request))

    def take(self, event: m.Beaten | m.NotBeaten) -> bool:
        """A host's answer, or that there is none. True: look whether the log has a newer claim."""
        desk = self._desk
        if event.epoch != desk.epoch or not desk.ready:
            return False
        self._beating.pop(event.host, None)
        if isinstance(event, m.NotBeaten):
            if not desk.hosts.missed(event.host):
                return False
            if event.host in desk.placement.values():
                desk.trouble(f"peer {short(event.host)} misses heartbeats: {event.reason}")
            else:
                desk.hosts.shun(event.host, desk.now)
                desk.standby_gone(event.host, "it misses heartbeats")
            return False
        desk.hosts.answered(event.host)
        vnodes = by_host(desk.placement).get(event.host, ())
        followed = following_by_host(desk.standbys).get(event.host, ())
        rows = {row.vnode: row for row in event.rows if not row.error and not row.standby}
        follows = {row.vnode: None for row in event.rows if not row.error and row.standby}
        lost = [vnode for vnode in vnodes if vnode not in rows]
        why = event.refusal.detail if event.refusal is not None else "it follows it no longer"
        gone = followed if event.refusal is not None else (v for v in followed if v not in follows)
        desk.unfollow(gone, why)
        if event.refusal is None and not lost:
            self.health.update({vnode: rows[vnode] for vnode in vnodes})
            return False
        if vnodes:
            desk.hosts.shun(event.host, desk.now)
            desk.trouble(f"peer {short(event.host)} no longer runs {', '.join(lost or vnodes)}")
        return event.refusal is not None and event.refusal.code in LOOK_INTO_THE_LOG

    def _release(self) -> None:
        """Tells former hosts that are there; the others when they come back."""
        desk = self._desk
        for host in desk.hosts.to_release(desk.alive):
            desk.out.append(m.Release(host, desk.epoch - 1))
