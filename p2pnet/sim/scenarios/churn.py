"""Churn: whole nodes come and go, and are found and missed as they should be. Pure.

Sessions are drawn from an exponential distribution, so that how long a node has
been here says nothing of how long it stays. One session ends by a kill, a pulled
plug or a pause; who died comes back after a while, with its disk or without.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from p2pnet.dht import events as ev
from p2pnet.gossip.events import MemberChanged, State
from p2pnet.keys import KeyPair, peer_id_bytes, sha256
from p2pnet.sim.gossip_node import GossipNode
from p2pnet.sim.grow import Peer, acquainted
from p2pnet.sim.links import Links
from p2pnet.sim.report import Report, quantile, share
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.truth import nearest
from p2pnet.sim.world import World

_DETECTED_S = 30.0  # within this everybody shall know of a death
_SETTLED_S = 10.0  # a peer that is here for so long shall be found
_TIMEOUT_S = 10.0
_NEAREST = 8  # of which a lookup shall name every one
_NOBODY = 256  # ids that nobody has
_OFF_S_MIN = 5.0


class _Churn:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        self.world = World(seed, Links(loss=options["loss"]), count_bytes=True)
        self.rng: random.Random = self.world.rng_of("churn")
        self.peers = acquainted(self.world, nodes)
        self.by_id = {peer.peer_id: peer for peer in self.peers}
        self.up_since = dict.fromkeys(self.by_id, -_SETTLED_S)
        self.dead_since: dict[str, float] = {}
        self.upset_until = dict.fromkeys(self.by_id, 0.0)  # by its own pause
        self.counts = dict.fromkeys(
            ("killed", "vanished", "paused", "restarted", "missed", "false alarms"), 0
        )
        self.detection_s: list[float] = []
        self.hops: list[float] = []
        self.requests: list[float] = []
        self.took_s: list[float] = []
        self.found = self.lookups = self.right = self.searches = 0
        keys = (KeyPair.from_seed(sha256(b"nobody %d" % n)) for n in range(_NOBODY))
        self.nobody = [key.peer_id for key in keys]
        for peer in self.peers:
            peer.gossip.watchers.append(self._changed)
        for number in range(nodes):
            stays = number in (0, nodes // 2)  # the bootstrap peers of `acquainted`
            if not stays and self.rng.random() < options["churning"]:
                self._session(self.peers[number])
        self._look_up()

    # Sessions

    def _session(self, peer: Peer) -> None:
        lasts_s = self.rng.expovariate(1.0 / self.options["session_s"])
        self.world.after(lasts_s, self._end, peer)

    def _end(self, peer: Peer) -> None:
        rng, world = self.rng, self.world
        if rng.random() < self.options["pauses"]:
            off_s = rng.uniform(1.0, self.options["pause_s"])
            self.counts["paused"] += 1
            peer.machine.pause()
            self.upset_until[peer.peer_id] = world.now + off_s + _DETECTED_S
            world.after(off_s, self._goes_on, peer)
            return
        self.dead_since[peer.peer_id] = world.now
        if rng.random() < 0.5:
            self.counts["killed"] += 1
            peer.machine.kill()
        else:
            self.counts["vanished"] += 1
            peer.machine.vanish()
        off_s = _OFF_S_MIN + rng.expovariate(1.0 / self.options["off_s"])
        if off_s > _DETECTED_S:
            world.after(_DETECTED_S, self._judge_death, peer, world.now)
        world.after(off_s, self._back, peer)

    def _goes_on(self, peer: Peer) -> None:
        peer.machine.resume()
        self.up_since[peer.peer_id] = self.world.now
        self._session(peer)

    def _back(self, peer: Peer) -> None:
        self.counts["restarted"] += 1
        del self.dead_since[peer.peer_id]
        self.up_since[peer.peer_id] = self.world.now
        peer.machine.restart(keep_disk=self.rng.random() < 0.5)
        self._session(peer)

    # Membership

    def _changed(self, node: GossipNode, change: MemberChanged) -> None:
        if change.new is not State.FAILED or change.old is None or not change.old.live:
            return
        dead_since = self.dead_since.get(change.peer_id)
        now = self.world.now
        if dead_since is None:
            came_back = now - self.up_since[change.peer_id] < _DETECTED_S
            if not came_back and now > self.upset_until[change.peer_id]:
                self.counts["false alarms"] += 1
        elif self.up_since[node.peer_id] <= dead_since:
            self.detection_s.append(now - dead_since)

    def _judge_death(self, peer: Peer, dead_since: float) -> None:
        if self.dead_since.get(peer.peer_id) != dead_since:
            return
        for other in self.peers:
            if other.machine.running and self.up_since[other.peer_id] <= dead_since:
                member = other.gossip.core.member(peer.peer_id)
                self.counts["missed"] += member is not None and member.state.live

    # Lookups

    def _look_up(self) -> None:
        """Of one peer, or of an id that nobody has: that lookup must name the nearest."""
        world, rng = self.world, self.rng
        world.after(rng.expovariate(self.options["lookups_s"]), self._look_up)
        asker = rng.choice(self.peers)
        sought = rng.choice(self.peers) if rng.random() < 0.5 else None
        peer_id = rng.choice(self.nobody) if sought is None else sought.peer_id
        if asker is sought or not all(self._settled(p) for p in (asker, sought) if p is not None):
            return
        since = world.now

        def done(result: ev.Result) -> None:
            self.took_s.append(world.now - since)
            if isinstance(result, ev.Nodes):
                self.hops.append(result.hops)
                self.requests.append(result.requests)
            if sought is None:
                self._judge_nearest(asker, peer_id, since, result)
            elif self._settled(sought) and self.up_since[sought.peer_id] <= since:
                self._judge_found(sought, result)

        asker.dht.start(lambda op: ev.FindNode(op, peer_id, _TIMEOUT_S), done)

    def _settled(self, peer: Peer) -> bool:
        lasts_s = self.world.now - self.up_since[peer.peer_id]
        return peer.machine.running and lasts_s >= _SETTLED_S

    def _judge_found(self, sought: Peer, result: ev.Result) -> None:
        self.lookups += 1
        target = result.target if isinstance(result, ev.Nodes) else None
        self.found += target is not None and sought.machine.addr in target.addrs

    def _judge_nearest(self, asker: Peer, peer_id: str, since: float, result: ev.Result) -> None:
        """Of those that were here all the time it shall name the nearest, each of them."""
        self.searches += 1
        named = [p.peer_id for p in result.closest] if isinstance(result, ev.Nodes) else []
        there = [p for p in self.peers if p is not asker and self._settled(p)]
        stayed = [p.machine for p in there if self.up_since[p.peer_id] <= since - _SETTLED_S]
        true = nearest(stayed, peer_id_bytes(peer_id), _NEAREST)
        self.right += all(peer_id in named for peer_id in true)

    # The outcome

    def report(self, nodes: int, seed: int) -> Report:
        world = self.world
        world.run_for(self.options["duration_s"])
        report = Report("churn", nodes, seed, trace=world.trace)
        rates = {
            name: world.wire.bytes.get(protocol, 0) / world.now / nodes
            for name, protocol in (
                ("membership", self.peers[0].gossip.protocol),
                ("DHT", self.peers[0].dht.protocol),
            )
        }
        found, right = share(self.found, self.lookups), share(self.right, self.searches)
        report.figures = {
            "virtual seconds": world.now,
            "events": world.events,
            **self.counts,
            "detection p50 s": quantile(self.detection_s, 0.5),
            "detection p99 s": quantile(self.detection_s, 0.99),
            "lookups of a peer": self.lookups,
            "which found it": found,
            "lookups of an id that nobody has": self.searches,
            "right against brute force": right,
            "lookup p50 s": quantile(self.took_s, 0.5),
            "lookup p99 s": quantile(self.took_s, 0.99),
            "hops p50": quantile(self.hops, 0.5),
            "hops p99": quantile(self.hops, 0.99),
            "requests a lookup p50": quantile(self.requests, 0.5),
            "requests a lookup p99": quantile(self.requests, 0.99),
            "membership bytes a node a second": rates["membership"],
            "DHT bytes a node a second": rates["DHT"],
        }
        report.series = {
            "detection s": self.detection_s,
            "hops": self.hops,
            "requests a lookup": self.requests,
            "lookup s": self.took_s,
            "bytes a node a second": [p.machine.sent_bytes / world.now for p in self.peers],
        }
        report.expect(not self.counts["missed"], "a death was not known to all in time")
        report.expect(not self.counts["false alarms"], "a node that was here was declared failed")
        report.expect(found >= 0.99, f"only {found:.2%} of lookups found their peer")
        report.expect(right >= 0.99, f"only {right:.2%} of lookups named the nearest")
        return report


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    return _Churn(nodes, seed, options).report(nodes, seed)


SCENARIO = Scenario(
    "churn",
    "whole nodes come and go; are they missed, and are the others found?",
    _run,
    nodes=100,
    nodes_min=10,
    options={
        "duration_s": 120.0,
        "session_s": 600.0,  # mean
        "off_s": 60.0,  # mean, after 5 s
        "churning": 1.0,  # the share of nodes that come and go
        "pauses": 0.3,  # the share of sessions that end in a pause
        "pause_s": 20.0,  # at most
        "lookups_s": 5.0,  # a second
        "loss": 0.0,
    },
)
