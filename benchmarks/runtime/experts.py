"""Eight Linears on one host, each trained by itself with Adam: processes and memory.

p2pnet: eight networks of one Linear on one node. hivemind: a Server with eight experts. Each
expert has been trained, so that parameters, gradients and Adam's state are there on both sides.
Only the host is weighed, not who trains.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.figures import MIB
from benchmarks.processes import Process, Processes
from benchmarks.runtime.lines import HIVEMIND, P2PNET, Found, Goal, Line, over
from benchmarks.runtime.nodes import ADAM, SAMPLES, Experts, Swarm, chain_of

EXPERTS = 8
_TRAIN_S = 0.1
_SETTLE_S = 2.0


def measure(directory: Path, rounds: int, *, hivemind: bool) -> Found:
    """Starts each system once: memory hardly moves. Raises `processes.Failed`."""
    hosts: dict[str, Process] = {}
    with Processes(directory) as processes:
        swarm = Swarm(processes, directory, 1)
        for number in range(EXPERTS):
            name = f"expert{number}"
            swarm.submit(chain_of(name, 1, optimizer=ADAM))
            swarm.client.ask("train", name=name, samples=SAMPLES, limit_s=_TRAIN_S)
        hosts[P2PNET] = swarm.nodes[0]
        if hivemind:
            hosts[HIVEMIND] = Experts(processes, EXPERTS, ADAM).server
        time.sleep(_SETTLE_S)
        counts = {who: over([float(len(host.pids()))]) for who, host in hosts.items()}
        memory = {who: over([host.pss_bytes() / MIB]) for who, host in hosts.items()}
    return Found(
        [
            Line("8 Linear experts with Adam: processes", "", counts, goal=Goal(value_max=1)),
            Line("  memory of the host (PSS)", "MiB", memory, goal=Goal(ratio_max=1.0)),
        ]
    )
