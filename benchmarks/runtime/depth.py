"""Step time against the number of VNodes: chains of small Linears over the same four nodes.

The depth's hops are the edges of the chain whose ends are on different nodes: each is
crossed twice a step, one after another.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from benchmarks.processes import Processes
from benchmarks.runtime.lines import P2PNET, Found, Line, over
from benchmarks.runtime.nodes import SGD, Swarm, chain_of
from benchmarks.runtime.steps import mean_s

VNODES = (4, 16, 64, 256)
_NODES = 4
_WIDTH = 64
_BATCH = 32
_STEPS = 10


def measure(directory: Path, rounds: int, *, hivemind: bool) -> Found:
    """One network at a time. Raises `processes.Failed`."""
    lines = []
    remarks = []
    per_hop: list[tuple[int, float]] = []  # hops, step time
    with Processes(directory) as processes:
        swarm = Swarm(processes, directory, _NODES)
        for vnodes in VNODES:
            name = f"chain{vnodes}"
            hosts = swarm.submit(chain_of(name, vnodes - 1, width=_WIDTH, optimizer=SGD))
            order = [*(f"fc{number}" for number in range(vnodes - 1)), "loss"]
            hops = sum(hosts[one] != hosts[other] for one, other in pairwise(order))
            took = [1000 * mean_s(swarm.client, name, _BATCH, _STEPS) for _ in range(rounds)]
            swarm.client.ask("cancel", name=name)
            lines.append(Line(f"{vnodes} VNodes, {hops} hops deep", "ms", {P2PNET: over(took)}))
            per_hop.append((hops, over(took).value))
    (least, least_ms), (most, most_ms) = per_hop[0], per_hop[-1]
    if least:
        remarks.append(
            f"{most / least:.1f} times the hops, {most_ms / least_ms:.1f} times the time; "
            f"{VNODES[-1] / VNODES[0]:g} times the VNodes"
        )
    return Found(lines, remarks)
