"""Detection: some machines die, half of them without a word, and everybody shall know (R1). Pure.

Half of the dead have vanished (a pulled plug: silence), half were killed (their
connections break and their ports refuse). A detection is one survivor's verdict on
one of the dead; how long it took is counted from the death.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from p2pnet.gossip.events import MemberChanged, State
from p2pnet.sim.gossip_node import GossipNode
from p2pnet.sim.grow import acquainted
from p2pnet.sim.links import Links
from p2pnet.sim.report import Report, quantile
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World

_SETTLE_S = 3.0
_IDLE_S = 4.0


def run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    """See the module."""
    world = World(seed, Links(loss=options["loss"]))
    peers = acquainted(world, nodes, dht=False)
    dead_since: dict[str, float] = {}
    vanished = world.rng.sample(peers, 2 * max(1, int(options["dead"]) // 2))
    killed = [vanished.pop() for _ in range(len(vanished) // 2)]
    took_s: dict[str, list[float]] = {peer.peer_id: [] for peer in (*vanished, *killed)}
    wrong: dict[str, None] = {}

    def changed(node: GossipNode, change: MemberChanged) -> None:
        if change.new is not State.FAILED or change.old is State.FAILED:
            return
        since = dead_since.get(change.peer_id)
        if since is None:
            wrong[change.peer_id] = None
        else:
            took_s[change.peer_id].append(world.now - since)

    for peer in peers:
        peer.gossip.watchers.append(changed)
    world.run_for(_SETTLE_S)
    before = sum(world.wire.bytes.values())
    world.run_for(_IDLE_S)
    idle = (sum(world.wire.bytes.values()) - before) / _IDLE_S / nodes
    before, start = sum(world.wire.bytes.values()), world.now
    for peer in vanished:
        dead_since[peer.peer_id] = world.now
        peer.machine.vanish()
    for peer in killed:
        dead_since[peer.peer_id] = world.now
        peer.machine.kill()
    survivors = nodes - len(dead_since)
    world.run(
        lambda: all(len(found) >= survivors for found in took_s.values()),
        options["limit_s"],
        every_s=0.25,
    )
    spent = (sum(world.wire.bytes.values()) - before) / (world.now - start) / nodes
    report = Report("detection", nodes, seed, trace=world.trace)
    missed = 0
    for name, dead in (("vanished", vanished), ("killed", killed)):
        found = [s for peer in dead for s in took_s[peer.peer_id]]
        lacking = survivors * len(dead) - len(found)
        missed += lacking
        report.series[f"{name}: seconds to detection"] = found
        all_of_them = found + [math.inf] * lacking
        report.figures[f"{name} p50_s"] = quantile(all_of_them, 0.5)
        report.figures[f"{name} p99_s"] = quantile(all_of_them, 0.99)
    report.figures |= {
        "dead": len(dead_since),
        "missed": missed,
        "wrongly failed": len(wrong),
        "idle bytes/s a node": idle,
        "bytes/s a node until all know": spent,
        "events": world.events,
    }
    report.expect(missed == 0, f"{missed} deaths were missed by somebody")
    report.expect(not wrong, f"{len(wrong)} of those who are here were declared failed")
    return report


SCENARIO = Scenario(
    name="detection",
    summary="machines vanish or are killed: how long until everybody knows (membership)",
    run=run,
    nodes=32,
    options={"loss": 0.01, "dead": 4, "limit_s": 45},
)
