"""One Linear on one remote host, by one client and by sixteen: beside hivemind's RemoteExpert.

p2pnet: a node that hosts a network of that one Linear, and a client process. Forward is
`net(x)`; forward and backward are one `train_step` with an MSELoss, its decision included.
hivemind: a Server with that one expert, and a client process. Forward is `expert(x)`;
forward and backward are that, an MSE loss and `backward()`, which applies the optimizer too.
The clients at once are threads of the client process: RemoteExpert has no other way.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from benchmarks.processes import Process, Processes, cpu_s_of
from benchmarks.runtime.lines import HIVEMIND, P2PNET, Found, Goal, Line, over
from benchmarks.runtime.nodes import SAMPLES, SGD, WIDTH, Experts, Swarm, chain_of
from benchmarks.systems import ROOT

CALLERS = 16
_LIMIT_S = 1.0
_LIMIT_AT_ONCE_S = 1.5
_LOCAL = "local"

Values = dict[str, list[float]]  # by what is measured: a figure a round


def measure(directory: Path, rounds: int, *, hivemind: bool) -> Found:
    """Runs rounds, in which the systems take turns. Raises `processes.Failed`."""
    with Processes(directory) as processes:
        swarm = Swarm(processes, directory, 1)
        swarm.submit(chain_of("linear", 1, optimizer=SGD))
        sides = {P2PNET: _Side(swarm.client, swarm.nodes, name="linear", samples=SAMPLES)}
        if hivemind:
            experts = Experts(processes, 1, SGD)
            sides[HIVEMIND] = _Side(experts.client, [experts.server])
        alone = processes.start([sys.executable, "-m", "benchmarks.peers.torch_alone"], ROOT)
        sides[_LOCAL] = _Side(alone, [], width=WIDTH, samples=SAMPLES)
        for _ in range(rounds):
            for who, side in sides.items():
                side.one_by_one("forward")
                side.one_by_one("train")
                if who != _LOCAL:
                    side.at_once()
    return Found(_lines(sides), samples={who: dict(side.values) for who, side in sides.items()})


class _Side:
    """A client, whom it asks, and what was measured of the two.

    Attributes:
        values: "forward" and "train", ms; "forward CPU" and "train CPU", of both, ms;
            "at once", samples a second. A figure a round.
    """

    def __init__(self, client: Process, hosts: Sequence[Process], **arguments: Any) -> None:
        self.values: Values = defaultdict(list)
        self._client = client
        self._everybody = [client, *hosts]
        self._arguments = arguments

    def one_by_one(self, do: str) -> None:
        cpu_s = cpu_s_of(self._everybody)
        took_ms: list[float] = self._client.ask(do, limit_s=_LIMIT_S, **self._arguments)["took_ms"]
        self.values[do].append(statistics.median(took_ms))
        self.values[f"{do} CPU"].append(1000 * (cpu_s_of(self._everybody) - cpu_s) / len(took_ms))

    def at_once(self) -> None:
        done = self._client.ask(
            "at_once", callers=CALLERS, limit_s=_LIMIT_AT_ONCE_S, **self._arguments
        )
        self.values["at once"].append(done["a_second"] * SAMPLES)


def _lines(sides: dict[str, _Side]) -> list[Line]:
    def figures(what: str) -> dict[str, Figure]:
        return {who: over(side.values[what]) for who, side in sides.items() if what in side.values}

    forward = figures("forward")
    local_ms = forward[_LOCAL].value
    hops = {
        who: Figure(one.value - local_ms, one.low - local_ms, one.high - local_ms, one.rounds)
        for who, one in forward.items()
        if who != _LOCAL
    }
    third, three_times = Goal(ratio_max=1 / 3), Goal(ratio_min=3.0)
    at_once = f"forward, {CALLERS} clients at once"
    return [
        Line("Linear 1024, batch 32: forward p50", "ms", forward, goal=third),
        Line("  CPU of host and client, a forward", "ms", figures("forward CPU")),
        Line("forward and backward p50", "ms", figures("train"), goal=third),
        Line("  CPU of host and client, forward and backward", "ms", figures("train CPU")),
        Line("overhead of a hop, 128 KiB each way, p50", "ms", hops, goal=Goal(value_max=1.0)),
        Line(at_once, "samples/s", figures("at once"), goal=three_times),
    ]
