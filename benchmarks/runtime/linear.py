"""One Linear on one remote host, by one client and by sixteen: beside hivemind's RemoteExpert.

p2pnet: a node that hosts a network of that one Linear, and a client process. Forward is
`net(x)`; forward and backward are one `train_step` with an MSELoss, its decision included.
hivemind: a Server with that one expert, and a client process. Forward is `expert(x)`;
forward and backward are that, an MSE loss and `backward()`, which applies the optimizer too.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from benchmarks.processes import Process, Processes
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
    ours: Values = defaultdict(list)
    theirs: Values = defaultdict(list)
    local: Values = defaultdict(list)
    with Processes(directory) as processes:
        client = Swarm(processes, directory, 1).client
        client.ask("submit", spec=chain_of("linear", 1, optimizer=SGD))
        arguments: dict[str, Any] = {"name": "linear", "samples": SAMPLES}
        experts = Experts(processes, 1, SGD).client if hivemind else None
        alone = processes.start([sys.executable, "-m", "benchmarks.peers.torch_alone"], ROOT)
        for _ in range(rounds):
            _round(client, ours, arguments)
            if experts is not None:
                _round(experts, theirs, {})
            for do in ("forward", "train"):
                local[do].append(_p50(alone, do, width=WIDTH, samples=SAMPLES))
    measured = {P2PNET: dict(ours), HIVEMIND: dict(theirs), _LOCAL: dict(local)}
    return Found(_lines(measured), samples=measured)


def _round(client: Process, values: Values, arguments: dict[str, Any]) -> None:
    for do in ("forward", "train"):
        values[do].append(_p50(client, do, **arguments))
    done = client.ask("at_once", callers=CALLERS, limit_s=_LIMIT_AT_ONCE_S, **arguments)
    values["at once"].append(done["a_second"] * SAMPLES)


def _p50(peer: Process, do: str, **arguments: Any) -> float:
    took_ms: list[float] = peer.ask(do, limit_s=_LIMIT_S, **arguments)["took_ms"]
    return statistics.median(took_ms)


def _lines(measured: dict[str, Values]) -> list[Line]:
    def figures(what: str) -> dict[str, Figure]:
        return {who: over(values[what]) for who, values in measured.items() if what in values}

    forward = figures("forward")
    local_ms = forward[_LOCAL].value
    hops = {
        who: Figure(one.value - local_ms, one.low - local_ms, one.high - local_ms, one.rounds)
        for who, one in forward.items()
        if who != _LOCAL
    }
    third = Goal(ratio_max=1 / 3)
    return [
        Line("Linear 1024, batch 32: forward p50", "ms", forward, goal=third),
        Line("  forward and backward p50", "ms", figures("train"), goal=third),
        Line("  overhead of a hop, 128 KiB each way, p50", "ms", hops, goal=Goal(value_max=1.0)),
        Line(
            f"  forward, {CALLERS} clients at once",
            "samples/s",
            figures("at once"),
            goal=Goal(ratio_min=3.0),
        ),
    ]
