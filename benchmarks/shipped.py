"""The whole nodes that each project ships, side by side: memory and start-up.

`p2pnet join` is membership, DHT, gRPC, and a host for parts of networks;
`hivemind-dht` is a DHT peer alone.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import START_S, Failed, Process, Processes
from benchmarks.systems import HIVEMIND_NODE, LOOPBACK, P2PNET_NODE, ROOT

_SETTLE_S = 5.0
_ANNOUNCES = "--initial_peers "


@dataclass(frozen=True)
class Shipped:
    """Of one node among `nodes`."""

    nodes: int
    pss_bytes: float
    ready_s: float  # from its spawn until it says that it runs; the last one's


def p2pnet_nodes(count: int, directory: Path) -> Shipped:
    """Starts `p2pnet join` so many times. Raises `processes.Failed`."""
    bootstrap = directory / "bootstrap.txt"
    with Processes(directory) as processes:
        nodes: list[Process] = []

        def start() -> Process:
            command = [*P2PNET_NODE, "--data-dir", str(directory / f"n{len(nodes)}")]
            command += ["--listen", LOOPBACK]
            if nodes:
                command += ["--bootstrap", str(bootstrap)]
            nodes.append(processes.start(command, ROOT))
            return nodes[-1]

        ready = json.loads(start().line())
        bootstrap.write_text(ready["addrs"][0] + "\n")
        for node in [start() for _ in range(count - 2)]:
            node.line()
        last = start()
        last.line()
        ready_s = time.perf_counter() - last.spawned
        return _weighed(nodes, ready_s)


def hivemind_nodes(count: int, directory: Path) -> Shipped:
    """Starts `hivemind-dht` so many times. Raises `processes.Failed`."""
    with Processes(directory) as processes:
        nodes: list[Process] = []

        def start(*options: str) -> Process:
            command = [*HIVEMIND_NODE, "--host_maddrs", LOOPBACK, *options]
            nodes.append(processes.start(command, directory))
            return nodes[-1]

        through = ("--initial_peers", _announced(start()))
        for node in [start(*through) for _ in range(count - 2)]:
            _announced(node)
        last = start(*through)
        _announced(last)
        ready_s = time.perf_counter() - last.spawned
        return _weighed(nodes, ready_s)


def _announced(node: Process) -> str:
    """The address that a hivemind-dht says in its log that it can be reached at."""
    until = time.perf_counter() + START_S
    while time.perf_counter() < until:
        log = node.log.read_text(errors="replace")
        if _ANNOUNCES in log:
            return log.partition(_ANNOUNCES)[2].split()[0].strip("\x1b[0m")
        time.sleep(0.02)
    raise Failed(f"hivemind-dht did not come up within {START_S:g} s")


def _weighed(nodes: list[Process], ready_s: float) -> Shipped:
    time.sleep(_SETTLE_S)
    pss_bytes = statistics.mean(node.pss_bytes() for node in nodes)
    return Shipped(len(nodes), pss_bytes, ready_s)
