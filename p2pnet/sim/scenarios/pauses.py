"""Pauses: some machines stand still again and again, and nobody else shall pay (R2). Pure.

A machine that wakes up has missed everybody's answers: without doubting itself it
declares others failed that are well. `local_health` 0 takes that doubt away; a quorum
of 1 and no time to refute take away what protects the others from it all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from p2pnet.gossip.events import Accused, Effect, Event, GossipConfig, MemberChanged, State
from p2pnet.sim.gossip_node import GossipNode
from p2pnet.sim.grow import Peer, acquainted
from p2pnet.sim.links import Links
from p2pnet.sim.report import Report
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World

_SETTLE_S = 2.0


def run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    """See the module."""
    world = World(seed, Links(loss=options["loss"]))
    config = GossipConfig(
        local_health=bool(options["local_health"]),
        quorum=int(options["quorum"]),
        refutation_s=options["refutation_s"],
    )
    peers = acquainted(world, nodes, dht=False, config=config)
    rng = world.rng_of("pauses")
    pausing = rng.sample(peers, max(1, round(options["pausing"] * nodes)))
    healthy = {peer.peer_id for peer in peers} - {peer.peer_id for peer in pausing}
    evicted: dict[str, None] = {}
    verdicts = pauses = accused = 0

    def changed(node: GossipNode, change: MemberChanged) -> None:
        nonlocal verdicts
        failed = change.new is State.FAILED and change.old is not State.FAILED
        if failed and change.peer_id in healthy:
            verdicts += 1
            evicted[change.peer_id] = None

    def accusing(node: GossipNode) -> None:
        # What an observer says of another is no change of a member yet.
        handle = node.core.handle

        def handled(event: Event, now: float) -> Sequence[Effect]:
            nonlocal accused
            effects = handle(event, now)
            for effect in effects:
                if isinstance(effect, Accused) and effect.failed and effect.peer_id in healthy:
                    accused += 1
            return effects

        setattr(node.core, "handle", handled)  # noqa: B010 (mypy forbids the plain assignment)

    def pause(peer: Peer) -> None:
        nonlocal pauses
        pauses += 1
        off_s = rng.uniform(0.5, options["pause_s"])
        peer.machine.pause()
        world.after(off_s, resume, peer)

    def resume(peer: Peer) -> None:
        peer.machine.resume()
        world.after(rng.uniform(0.0, options["awake_s"]), pause, peer)

    for peer in peers:
        peer.gossip.watchers.append(changed)
        accusing(peer.gossip)
    for peer in pausing:
        world.after(_SETTLE_S + rng.uniform(0.0, options["pause_s"] / 2), pause, peer)
    world.run_for(_SETTLE_S + options["lasts_s"])
    report = Report("pauses", nodes, seed, trace=world.trace)
    report.figures = {
        "pausing": len(pausing),
        "pauses": pauses,
        "healthy declared failed": len(evicted),
        "wrong verdicts": verdicts,
        "wrong accusations": accused,
        "events": world.events,
    }
    report.expect(not evicted, f"{len(evicted)} healthy members were declared failed")
    return report


SCENARIO = Scenario(
    name="pauses",
    summary="some machines stand still again and again: nobody healthy is given up (membership)",
    run=run,
    nodes=100,
    options={
        "loss": 0.05,
        "pausing": 0.1,
        "pause_s": 20,
        "awake_s": 2,
        "lasts_s": 60,
        "local_health": 1,
        "quorum": GossipConfig().quorum,
        "refutation_s": GossipConfig().refutation_s,
    },
)
