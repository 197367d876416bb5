"""A proxy before every node adds a delay to each hop: `chain` against `local`.

A chain of four blocks, one to a node. Everything over gRPC goes through the proxy of the node
that it goes to, and back: activations, gradients, what the feeder feeds, what the hosts
report and what is decided. Membership and DHT do not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.processes import Process, Processes
from benchmarks.runtime.lines import Found, Line, over
from benchmarks.runtime.nodes import SGD, Swarm, chain_of
from benchmarks.runtime.steps import mean_s
from benchmarks.systems import ROOT

DELAYS_MS = (0, 25, 50, 100)
RULES = ("chain", "local")
_NODES = 4
_WIDTH = 256
_BATCH = 64
# Under `local` 32 steps may be in flight: they have to be under way before it is steady.
_STEPS = {"chain": 8, "local": 64}
_WARM = {"chain": 4, "local": 48}


def measure(directory: Path, rounds: int, *, hivemind: bool) -> Found:
    """At each delay both rules, in one swarm. Raises `processes.Failed`."""
    took_ms: dict[str, list[float]] = {rule: [] for rule in RULES}
    with Processes(directory) as processes:
        proxies = processes.start([sys.executable, "tests/fault_proxy.py", str(_NODES)], ROOT)
        swarm = _Delayed(processes, directory, _NODES, proxies)
        for rule in RULES:
            spec = chain_of(
                rule,
                _NODES,
                width=_WIDTH,
                activation="ReLU",
                groups=_NODES,
                optimizer=SGD,
                learning=rule,
            )
            swarm.submit(spec)
        for delay_ms in DELAYS_MS:
            proxies.tell(delay_s=delay_ms / 1000)
            for rule in RULES:
                seconds = mean_s(swarm.client, rule, _BATCH, _STEPS[rule], _WARM[rule])
                took_ms[rule].append(1000 * seconds)
    lines = [
        Line(
            f"a step, {delay_ms} ms added to each hop",
            "ms",
            {"local": over([local]), "chain": over([chain])},
            ours="local",
            rival="chain",
        )
        for delay_ms, chain, local in zip(DELAYS_MS, *took_ms.values(), strict=True)
    ]
    return Found(lines, [crossover(took_ms)], {"delay": DELAYS_MS, **took_ms})


def crossover(took_ms: Mapping[str, Sequence[float]]) -> str:
    """From which delay on a step of `chain` takes longer than one of `local`, in a sentence."""
    ahead_ms = [c - n for c, n in zip(took_ms["chain"], took_ms["local"], strict=True)]
    if ahead_ms[0] >= 0:
        return "a step of local takes less than one of chain at every delay"
    for (low, before), (high, after) in pairwise(zip(DELAYS_MS, ahead_ms, strict=True)):
        if before < 0 <= after:
            at_ms = low + (high - low) * -before / (after - before)
            return f"from {at_ms:.0f} ms a hop on, a step of local takes less than one of chain"
    return f"up to {DELAYS_MS[-1]} ms a hop, a step of chain takes less than one of local"


class _Delayed(Swarm):
    """Each of its nodes advertises a proxy, which leads to it once it is up."""

    def __init__(self, processes: Processes, directory: Path, nodes: int, proxies: Process) -> None:
        self._proxies = proxies
        self._ports: list[int] = json.loads(proxies.line())["ports"]
        super().__init__(processes, directory, nodes)

    def command(self, number: int) -> list[str]:
        module = "benchmarks.peers.p2pnet_node"
        return [sys.executable, "-m", module, str(self._ports[number]), *self.options(number)]

    def started(self, number: int, ready: dict[str, Any]) -> None:
        port = int(ready["grpc"].rpartition(":")[2])
        self._proxies.tell(to={str(number): port})
