"""A client of a p2pnet swarm, as a process that is driven over a pipe.

    python -m benchmarks.peers.p2pnet_client DATA_DIR

It goes through the node of that data directory, and straight to the hosts.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

import p2pnet
from benchmarks.peers import talk, timing
from p2pnet.client import Network
from p2pnet.client.passes import STANDBY

_WAIT_S = 60.0  # a deadline that only a bug meets


class _Peer:
    """What it can be told to do; one network at a time is in its hands."""

    def __init__(self, client: p2pnet.Client) -> None:
        self._client = client
        self._networks: dict[str, Network] = {}
        self._rng = np.random.default_rng(0)

    def wait(self, nodes: int) -> dict[str, Any]:
        """Until so many nodes are here and have measured their speed."""
        until = time.monotonic() + _WAIT_S
        while True:
            alive = [row for row in self._client.members() if row["state"] == "alive"]
            if sum(row["capabilities"]["matmul_gflops"] > 0 for row in alive) >= nodes:
                return {}
            if time.monotonic() > until:
                raise TimeoutError(f"{len(alive)} of {nodes} nodes are here")
            time.sleep(0.1)

    def submit(self, spec: dict[str, Any], orchestrator: str = "") -> dict[str, Any]:
        """Submits a network; where its VNodes are."""
        network = self._client.submit(spec, orchestrator=orchestrator)
        self._networks[network.name] = network
        return {"hosts": _hosts(network)}

    def forward(self, name: str, samples: int, limit_s: float) -> dict[str, Any]:
        """Inference, one call after another."""
        network, (x, _) = self._networks[name], self._batch(name, samples)
        network(x)
        return {"took_ms": timing.each(lambda: network(x), limit_s)}

    def train(self, name: str, samples: int, limit_s: float) -> dict[str, Any]:
        """Training steps, each when the one before is decided."""
        network, (x, y) = self._networks[name], self._batch(name, samples)
        network.train_step(x, y)
        took_ms = timing.each(lambda: network.train_step(x, y), limit_s)
        network.finish()
        return {"took_ms": took_ms}

    def train_through(self, name: str, samples: int, steps: int) -> dict[str, Any]:
        """Training as `Network.train` does it, with steps in flight; when each was decided, s."""
        batch = self._batch(name, samples)
        decided: list[float] = []
        self._networks[name].train(
            (batch for _ in range(steps)),
            on_step=lambda step, loss: decided.append(time.perf_counter()),
        )
        return {"decided_s": decided}

    def at_once(self, name: str, samples: int, callers: int, limit_s: float) -> dict[str, Any]:
        """Inference by so many callers at once; calls a second."""
        network, (x, _) = self._networks[name], self._batch(name, samples)
        network(x)
        return {"a_second": timing.at_once([lambda: network(x)] * callers, limit_s)}

    def cancel(self, name: str) -> dict[str, Any]:
        """Ends a network."""
        self._networks.pop(name).cancel()
        return {}

    def _batch(self, name: str, samples: int) -> tuple[Any, Any]:
        graph = self._networks[name].graph
        (spec,) = graph.inputs.values()
        x = self._rng.standard_normal((samples, *spec.shape), dtype=np.float32)
        y = self._rng.standard_normal((samples, *graph.target.shape), dtype=np.float32)
        return x, y


def _hosts(network: Network) -> dict[str, str]:
    """The host of each VNode, once the DHT has them all."""
    until = time.monotonic() + _WAIT_S
    while True:
        hosts = {row["vnode"]: row["peer_id"] for row in network.locate() if row["role"] != STANDBY}
        if set(network.graph.vnodes()) <= set(hosts):
            return hosts
        if time.monotonic() > until:
            raise TimeoutError(f"the DHT has {len(hosts)} of {len(network.graph.vnodes())} VNodes")
        time.sleep(0.1)


def main(data_dir: str) -> None:
    """Does what it is told to until its driver is gone."""
    with p2pnet.Client(data_dir=data_dir) as client:
        peer = _Peer(client)
        talk.say(ready=True)
        while command := talk.listen():
            do = getattr(peer, command.pop("do"))
            talk.say(**do(**command))


if __name__ == "__main__":
    main(sys.argv[1])
