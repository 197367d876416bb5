"""A p2pnet swarm to measure, and hivemind's counterpart of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import Process, Processes
from benchmarks.systems import HIVEMIND_PEERS, HIVEMIND_PYTHON, LOOPBACK, ROOT

WIDTH = 1024
SAMPLES = 32  # of [WIDTH] float32: 128 KiB
_SUBMIT_S = 120.0
_HANDLERS = 1  # of hivemind's: the most that two cores gain from; more are slower


class Swarm:
    """Nodes on loopback, and a client of the first; ends with the `Processes`."""

    def __init__(self, processes: Processes, directory: Path, nodes: int) -> None:
        self._processes = processes
        self._directory = directory
        self._bootstrap: list[str] = []
        self.nodes = [self._start(number) for number in range(nodes)]
        self.client = self._join()

    def submit(self, spec: dict[str, Any]) -> dict[str, str]:
        """Submits a network; the host of each VNode."""
        hosts: dict[str, str] = self.client.ask("submit", _SUBMIT_S, spec=spec)["hosts"]
        return hosts

    def command(self, number: int) -> list[str]:
        """What starts a node."""
        return [sys.executable, "-m", "p2pnet", "join", *self.options(number)]

    def options(self, number: int) -> list[str]:
        """Of `p2pnet join`."""
        options = ["--json", "--until-eof", "--listen", LOOPBACK, "--device", "cpu"]
        options += ["--data-dir", str(self._data_dir(number))]
        for addr in self._bootstrap:
            options += ["--bootstrap", addr]
        return options

    def started(self, number: int, ready: dict[str, Any]) -> None:
        """A node has said that it is ready."""

    def _start(self, number: int) -> Process:
        node = self._processes.start(self.command(number), ROOT)
        ready = json.loads(node.line())
        self._bootstrap = self._bootstrap or ready["addrs"][:1]
        self.started(number, ready)
        return node

    def _join(self) -> Process:
        command = (sys.executable, "-m", "benchmarks.peers.p2pnet_client", str(self._data_dir(0)))
        client = self._processes.start(command, ROOT)
        client.line()
        client.ask("wait", _SUBMIT_S, nodes=len(self.nodes))
        return client

    def _data_dir(self, number: int) -> Path:
        return self._directory / f"n{number}"


def chain_of(
    name: str,
    layers: int,
    *,
    width: int = WIDTH,
    activation: str = "",
    groups: int = 0,
    optimizer: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The spec of Linears one after another; `more` are keys of the spec's own.

    Args:
        groups: into so many groups they are cut, each of which goes to one node; 0: none.
    """
    nodes: list[dict[str, Any]] = []
    for number in range(layers):
        group = {"group": f"g{number * groups // layers}"} if groups else {}
        config = {"in_features": width, "out_features": width}
        nodes.append({"id": f"fc{number}", "type": "Linear", "config": config, **group})
        if activation and number < layers - 1:
            nodes.append({"id": f"act{number}", "type": activation, **group})
    return {
        "name": name,
        "inputs": {"x": {"shape": [width]}},
        "nodes": nodes,
        "loss": {
            "id": "loss",
            "type": "MSELoss",
            **({"group": f"g{groups - 1}"} if groups else {}),
        },
        "optimizer": optimizer or SGD,
        "cut_every": CUT_EVERY,
        **more,
    }


SGD = {"type": "SGD", "lr": 1e-3}
ADAM = {"type": "Adam", "lr": 1e-3}
CUT_EVERY = 1000  # what it is compared with commits nothing while it is measured


class Experts:
    """A hivemind Server and a client of it."""

    def __init__(self, processes: Processes, count: int, optimizer: dict[str, Any]) -> None:
        arguments = [count, WIDTH, _HANDLERS, optimizer["type"], optimizer["lr"]]
        self.server = _start_hivemind(processes, "hivemind_server.py", arguments)
        addrs = json.loads(self.server.line())["addrs"]
        self.client = _start_hivemind(
            processes, "hivemind_client.py", [count, WIDTH, SAMPLES, *addrs]
        )
        self.client.line()


def _start_hivemind(processes: Processes, script: str, arguments: Sequence[object]) -> Process:
    return processes.start([str(HIVEMIND_PYTHON), script, *map(str, arguments)], HIVEMIND_PEERS)
