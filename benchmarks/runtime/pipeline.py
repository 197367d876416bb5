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
from collections import defaultdict
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

Rates = dict[str, list[float]]  # samples a second, by who: a figure a round


def measure(directory: Path, rounds: int, *, hivemind: bool) -> Found:
    """Runs rounds, in which they take turns. Raises `processes.Failed`."""
    parts: Rates = defaultdict(list)  # over micro-batches
    whole: Rates = defaultdict(list)  # on the full batch
    with Processes(directory) as processes:
        swarm = Swarm(processes, directory, NODES)
        spec = chain_of(
            "mlp",
            LAYERS,
            activation=ACTIVATION,
            groups=NODES,
            optimizer=SGD,
            micro_batches=MICRO_BATCHES,
        )
        hosts = swarm.submit(spec)
        alone = {f"torch, threads: {n}": _torch(processes, n) for n in _threads()}
        for _ in range(rounds):
            parts[P2PNET].append(BATCH / mean_s(swarm.client, "mlp", BATCH, _STEPS))
            for who, peer in alone.items():
                parts[who].append(_samples_per_s(peer, MICRO_BATCHES))
                whole[who].append(_samples_per_s(peer, 1))
    whole[P2PNET] = parts[P2PNET]
    what = f"MLP 8 x 1024, batch {BATCH}, {MICRO_BATCHES} micro-batches: training"
    return Found(
        [
            _line(what, parts, Goal(ratio_min=0.7)),
            _line("  torch on the full batch", whole, None),
        ],
        [f"{len(set(hosts.values()))} of {NODES} nodes hold a part of it"],
        {"micro-batches": dict(parts), "full batch": dict(whole)},
    )


def _line(name: str, rates: Rates, goal: Goal | None) -> Line:
    """The rival is the faster torch."""
    figures = {who: over(rates[who]) for who in sorted(rates, key=lambda who: who != P2PNET)}
    rival = max((who for who in rates if who != P2PNET), key=lambda who: figures[who].value)
    return Line(name, "samples/s", figures, rival=rival, goal=goal)


def _threads() -> list[int]:
    return list(dict.fromkeys((1, os.cpu_count() or 1)))


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
