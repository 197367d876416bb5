"""Spread: one member says something new of itself, and everybody shall know (R3). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.events import Describe, Description, MemberChanged
from p2pnet.sim.gossip_node import GossipNode
from p2pnet.sim.grow import acquainted
from p2pnet.sim.links import Links
from p2pnet.sim.report import Report, quantile
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World

_SETTLE_S = 3.0
_VNODES = 7


def run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    """See the module."""
    world = World(seed, Links(loss=options["loss"]))
    peers = acquainted(world, nodes, dht=False)
    author = world.rng.choice(peers)
    knows_after_s: dict[str, float] = {}
    said_at = 0.0

    def changed(node: GossipNode, change: MemberChanged) -> None:
        told = change.advert.capabilities.vnodes == _VNODES
        if change.peer_id == author.peer_id and told:
            knows_after_s.setdefault(node.peer_id, world.now - said_at)

    for peer in peers:
        peer.gossip.watchers.append(changed)
    world.run_for(_SETTLE_S)
    before = [peer.machine.sent_bytes for peer in peers]
    said_at = world.now
    description = Description(addrs=(author.machine.addr,))
    richer = replace(description, capabilities=Capabilities(vnodes=_VNODES))
    author.gossip.feed(Describe(richer))
    world.run_for(options["watched_s"])
    spent = [
        (peer.machine.sent_bytes - sent) / options["watched_s"]
        for peer, sent in zip(peers, before, strict=True)
    ]
    report = Report("spread", nodes, seed, trace=world.trace)
    took_s = list(knows_after_s.values())
    report.series["seconds until it knows"] = took_s
    report.series["bytes/s a node"] = spent
    report.figures = {
        "know": len(knows_after_s),
        "p50_s": quantile(took_s, 0.5),
        "all know after_s": max(took_s, default=0.0) if len(took_s) == nodes else float("inf"),
        "bytes/s a node": sum(spent) / nodes,
        "bytes/s a node p99": quantile(spent, 0.99),
        "events": world.events,
    }
    ignorant = nodes - len(knows_after_s)
    report.expect(ignorant == 0, f"{ignorant} members never heard of it")
    return report


SCENARIO = Scenario(
    name="spread",
    summary="one member changes: how long until everybody knows, and how many bytes (membership)",
    run=run,
    nodes=300,
    options={"loss": 0.05, "watched_s": 20},
)
