"""16 MiB one way, until the other side says that it has them: hops, bare gRPC, plain TCP."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from benchmarks.peers.bulk import SIZE_BYTES
from benchmarks.processes import Process, Processes
from benchmarks.runtime.lines import P2PNET, Found, Goal, Line, over
from benchmarks.systems import ROOT

_GRPC, _TCP = "bare gRPC, TLS", "plain TCP"
_PEERS = {P2PNET: "bulk_hops", _GRPC: "bulk_grpc", _TCP: "bulk_tcp"}
_LIMIT_S = 0.8


def measure(directory: Path, rounds: int, *, hivemind: bool) -> Found:
    """Runs rounds, in which they take turns. Raises `processes.Failed`."""
    rates: dict[str, list[float]] = {who: [] for who in _PEERS}
    with Processes(directory) as processes:
        senders = {who: _start(processes, module) for who, module in _PEERS.items()}
        for sender in senders.values():
            _mb_per_s(sender)  # connections and caches
        for _ in range(rounds):
            for who, sender in senders.items():
                rates[who].append(_mb_per_s(sender))
    figures = {who: over(values) for who, values in rates.items()}
    goal = Goal(ratio_min=0.8, value_min=400.0)
    line = Line("16 MiB one way", "MB/s", figures, rival=_GRPC, goal=goal)
    return Found([line], samples=rates)


def _start(processes: Processes, module: str) -> Process:
    """One that takes, and one that sends to it, which is returned."""
    command = [sys.executable, "-m", f"benchmarks.peers.{module}"]
    arguments = json.loads(processes.start([*command, "serve"], ROOT).line())["arguments"]
    return processes.start([*command, "send", *arguments], ROOT)


def _mb_per_s(sender: Process) -> float:
    took_ms: list[float] = sender.ask("send", limit_s=_LIMIT_S)["took_ms"]
    return SIZE_BYTES / 1e6 / (statistics.median(took_ms) / 1000)
