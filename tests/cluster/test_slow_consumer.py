"""A host that takes nothing for a while: whoever sends to it waits, and keeps little meanwhile."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from swarm import Figure, Swarm, until

from p2pnet.orchestrator.spec import load_spec

PARTS = 64  # micro-batches of a step
BATCH = 16 * PARTS
WIDE = 16384  # features that go from host to host: 1 MiB a micro-batch
PART_BYTES = WIDE * (BATCH // PARTS) * 4
STOPPED_S = 3.0  # not long enough to be given up
# Of the 64 parts of a step no more than this many are kept: what is not taken yet, what waits
# for its gradient, and what is on its way.
PARTS_KEPT_MAX = 20

SPEC: dict[str, Any] = {
    "name": "wide",
    "inputs": {"x": {"shape": [16], "dtype": "float32"}},
    "nodes": [
        {"id": "up", "type": "Linear", "config": {"in_features": 16, "out_features": WIDE}},
        {"id": "down", "type": "Linear", "config": {"in_features": WIDE, "out_features": 10}},
    ],
    "loss": {"id": "loss", "type": "CrossEntropyLoss"},
    "optimizer": {"type": "SGD", "lr": 0.01},
    "micro_batches": PARTS,
}


def test_what_a_producer_keeps_for_a_stopped_consumer_is_bounded(
    tmp_path: Path, figure: Figure
) -> None:
    graph = load_spec(SPEC)
    needs = {vnode: graph.memory_bytes(vnode) for vnode in graph.vnodes()}
    lent = max(needs["up"], needs["down"] + needs["loss"]) * 5 // 4
    assert lent < sum(needs.values()), "one host would do"
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, 16)).astype(np.float32)
    y = rng.integers(0, 10, BATCH)

    with Swarm(tmp_path) as swarm:
        feeder = swarm.grow(1, "--memory", "1KiB")[0]
        swarm.grow(2, "--memory", str(lent))
        network = feeder.client.submit(SPEC)
        host_of = {row["vnode"]: row["peer_id"] for row in network.locate()}
        by_id = {node.peer_id: node for node in swarm.nodes}
        producer, consumer = by_id[host_of["up"]], by_id[host_of["down"]]
        assert producer is not consumer
        for _ in range(3):  # with parts of one sample, 64 KiB, so that all is loaded
            network.train_step(x[:PARTS], y[:PARTS])
        before = producer.rss_bytes()

        losses: list[float] = []
        consumer.kill(signal.SIGSTOP)
        stopped_at = time.monotonic()
        training = threading.Thread(target=lambda: losses.append(network.train_step(x, y)))
        training.start()
        peaks = [before]

        def long_enough() -> bool:
            peaks.append(producer.rss_bytes())
            return time.monotonic() > stopped_at + STOPPED_S

        until(long_enough, 60, "it was stopped for a while")
        assert losses == [], "the step waits for it"
        consumer.kill(signal.SIGCONT)
        training.join(120)
        assert len(losses) == 1
        grown = max(peaks) - before
        figure(
            f"a consumer stopped for {STOPPED_S:g} s: its producer grew {grown / 2**20:.1f} MiB, "
            f"of {PARTS * PART_BYTES >> 20} MiB a step"
        )
        assert grown <= PARTS_KEPT_MAX * PART_BYTES
        network.finish()
