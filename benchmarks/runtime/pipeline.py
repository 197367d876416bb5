"""Training an MLP of 8 x 1024, batch 256, over four nodes, beside plain torch on the same cores.

Four groups of two layers, one to a node, so that micro-batches follow each other through
them; every node computes with one thread. Plain torch is one process over the same
micro-batches, with one thread and with as many as there are cores: the rival is the faster
of the two. It also trains on whole batches, which does more work at a time.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

from benchmarks.processes import Process, Processes
from benchmarks.runtime.lines import P2PNET, Found, Goal, Line, over
from benchmarks.runtime.nodes import SGD, WIDTH, Swarm, chain_of
from benchmarks.runtime.steps import mean_s
from benchmarks.systems import ROOT

NODES = 4
LAYERS = 8
BATCH = 256
MICRO_BATCHES = 4
ACTIVATION = "ReLU"
_STEPS = 16
_LIMIT_S = 1.5
_RIVAL = "plain torch"


def measure(directory: Path, rounds: int, *, hivemind: bool) -> Found:
    """Runs rounds, in which they take turns. Raises `processes.Failed`."""
    threads = list(dict.fromkeys((1, os.cpu_count() or 1)))
    ours: list[float] = []
    whole: dict[int, list[float]] = {count: [] for count in threads}
    parts: dict[int, list[float]] = {count: [] for count in threads}
    with Processes(directory) as processes:
        swarm = Swarm(processes, directory, NODES)
        hosts = swarm.submit(
            chain_of(
                "mlp",
                LAYERS,
                activation=ACTIVATION,
                groups=NODES,
                optimizer=SGD,
                micro_batches=MICRO_BATCHES,
            )
        )
        alone = {count: _torch(processes, count) for count in threads}
        for _ in range(rounds):
            ours.append(BATCH / mean_s(swarm.client, "mlp", BATCH, _STEPS))
            for count, peer in alone.items():
                parts[count].append(_samples_per_s(peer, MICRO_BATCHES))
                whole[count].append(_samples_per_s(peer, 1))
    best = max(threads, key=lambda count: statistics.median(parts[count]))
    best_whole = max(threads, key=lambda count: statistics.median(whole[count]))
    what = f"MLP 8 x 1024, batch {BATCH}, {MICRO_BATCHES} micro-batches, {NODES} nodes: training"
    figures = {P2PNET: over(ours), _RIVAL: over(parts[best])}
    figures |= {_threads(n): over(parts[n]) for n in threads if n != best}
    against_whole = {P2PNET: over(ours), _RIVAL: over(whole[best_whole])}
    against_whole |= {_threads(n): over(whole[n]) for n in threads if n != best_whole}
    return Found(
        [
            Line(what, "samples/s", figures, rival=_RIVAL, goal=Goal(ratio_min=0.7)),
            Line("  plain torch on the full batch", "samples/s", against_whole, rival=_RIVAL),
        ],
        [
            f"{len(set(hosts.values()))} nodes hold a part; the rival has {best} threads, "
            f"on the full batch {best_whole}"
        ],
        {"p2pnet": ours, "torch": {"micro-batches": parts, "full batch": whole}},
    )


def _torch(processes: Processes, threads: int) -> Process:
    command = [sys.executable, "-m", "benchmarks.peers.torch_alone", str(threads)]
    return processes.start(command, ROOT)


def _samples_per_s(peer: Process, micro_batches: int) -> float:
    done = peer.ask(
        "train",
        width=WIDTH,
        samples=BATCH,
        layers=LAYERS,
        activation=ACTIVATION,
        micro_batches=micro_batches,
        limit_s=_LIMIT_S,
    )
    took_ms: list[float] = done["took_ms"]
    return BATCH * 1000 / statistics.median(took_ms)


def _threads(count: int) -> str:
    return f"torch, {count} threads" if count > 1 else "torch, 1 thread"
