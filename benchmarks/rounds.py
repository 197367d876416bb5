"""One round of one system: a swarm is started, measured in every way, and ended."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import Process, Processes
from benchmarks.systems import System

_ASK_S = 180.0  # a deadline that only a bug meets
_WARM = 9000  # keys from here on are not measured
_WARM_EACH = 8
_WARM_S = 0.5
_BULK = 1000
# Longer than hivemind passes a peer over that was silent.
_CALM_S = 6.0


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        phase_s: no operation of a phase is begun later; slow systems do fewer.
        hung_s: the same for the phases with hung peers.
        later: how often each survivor asks again after its first get beside hung peers.
    """

    peers: int = 16
    keys: int = 200
    hung: int = 4  # a quarter
    killed: int = 5  # 30 %
    survivors: int = 12
    later: int = 2
    phase_s: float = 10.0
    hung_s: float = 40.0


@dataclass
class Phase:
    """What one kind of operation took, one at a time."""

    took_ms: list[float] = field(default_factory=list)
    good: int = 0
    cpu_ms: float | None = None  # of the whole swarm, an operation
    error: str = ""


@dataclass
class Round:
    """All that was measured; see `measure`."""

    start_s: float = 0.0
    known: float = 0.0
    copies: float = 0.0
    pss_bytes: float = 0.0
    bulk_put: tuple[int, float] = (0, 0.0)  # confirmed, seconds
    bulk_get: tuple[int, float] = (0, 0.0)
    bulk: int = 0
    phases: dict[str, Phase] = field(default_factory=dict)


def measure(system: System, size: Size, logs: Path) -> Round:
    """Runs a round. Raises `processes.Failed`."""
    out = Round(bulk=min(system.bulk, size.keys))
    with Processes(logs) as processes:
        peers, out.start_s = _start(system, size.peers, processes)
        for i, peer in enumerate(peers):  # connections and caches, as in a swarm that is in use
            numbers = list(range(_WARM + _WARM_EACH * i, _WARM + _WARM_EACH * (i + 1)))
            _work(peer, "put", numbers, _WARM_S)
            _work(peer, "get", numbers, _WARM_S)
        out.known = sum(peer.ask("known")["known"] for peer in peers) / len(peers)
        keys = list(range(size.keys))
        shares = [keys[i :: len(peers)] for i in range(len(peers))]
        out.phases["store"] = _phase(peers, peers, "put", shares, size.phase_s)
        held = [set(peer.ask("holds", numbers=keys)["holds"]) for peer in peers]
        stored = [key for key in keys if any(key in h for h in held)]
        out.copies = sum(map(len, held)) / max(1, len(stored))
        shares = _share(stored, held)
        out.phases["get"] = _phase(peers, peers, "get", shares, size.phase_s)
        out.phases["get_any"] = _phase(peers, peers, "get_any", shares, size.phase_s)
        numbers = list(range(_BULK, _BULK + out.bulk))
        done = peers[0].ask("put_all", _ASK_S, numbers=numbers)
        out.bulk_put = done["good"], done["took_s"]
        done = peers[1].ask("get_all", _ASK_S, numbers=numbers)
        out.bulk_get = done["good"], done["took_s"]
        out.pss_bytes = sum(peer.pss_bytes() for peer in peers) / len(peers)
        _hang(peers, held, stored, size, out)
        time.sleep(_CALM_S)
        at = size.peers - size.hung - size.killed  # others than those that hung
        for peer in peers[at : at + size.killed]:
            peer.end()
        alive = peers[:at] + peers[at + size.killed :]
        shares = _share(stored, held[:at] + held[at + size.killed :])
        out.phases["killed"] = _phase(alive, alive, "get", shares, size.phase_s)
    return out


def _start(system: System, count: int, processes: Processes) -> tuple[list[Process], float]:
    """All but one at once; of the last, how long it takes until it has got a record."""
    first = processes.start(system.peer([]), system.directory)
    bootstrap = _addrs(first)[:1]
    peers = [first]
    peers += [processes.start(system.peer(bootstrap), system.directory) for _ in range(count - 2)]
    for peer in peers[1:]:
        _addrs(peer)
    for peer in peers[1:]:
        _meet(system, peer, bootstrap)
    _work(first, "put", [_WARM], _ASK_S)
    last = processes.start(system.peer(bootstrap), system.directory)
    _addrs(last)
    _meet(system, last, bootstrap)
    while not _work(last, "get", [_WARM], _ASK_S).good:
        pass
    return [*peers, last], time.perf_counter() - last.spawned


def _addrs(peer: Process) -> list[str]:
    addrs: list[str] = json.loads(peer.line())["addrs"]
    return addrs


def _meet(system: System, peer: Process, bootstrap: Sequence[str]) -> None:
    if not system.meets_at_start:
        peer.ask("meet", addrs=bootstrap)


def _hang(
    peers: Sequence[Process],
    held: Sequence[set[int]],
    stored: Sequence[int],
    size: Size,
    out: Round,
) -> None:
    """Stops the last few; each survivor then gets keys that it does not hold."""
    hung = peers[-size.hung :]
    alive = peers[: size.survivors]
    shares = [[k for k in stored if k not in held[i]] or list(stored) for i in range(len(alive))]
    for peer in hung:
        peer.signal(signal.SIGSTOP)
    try:
        first = [share[:1] for share in shares]
        out.phases["hung"] = _phase(alive, alive, "get", first, size.hung_s)
        later = [share[1 : 1 + size.later] for share in shares]
        out.phases["hung later"] = _phase(alive, alive, "get", later, size.phase_s)
    finally:
        for peer in hung:
            peer.signal(signal.SIGCONT)
    for peer in hung:
        peer.ask("known")


def _share(keys: Sequence[int], held: Sequence[set[int]]) -> list[list[int]]:
    """Each key to one peer that does not hold it, where there is one."""
    shares: list[list[int]] = [[] for _ in held]
    load: Counter[int] = Counter()
    for key in keys:
        able = [i for i in range(len(held)) if key not in held[i]] or list(range(len(held)))
        chosen = min(able, key=lambda i: load[i])
        load[chosen] += 1
        shares[chosen].append(key)
    return shares


def _phase(
    everybody: Sequence[Process],
    clients: Sequence[Process],
    do: str,
    shares: Sequence[Sequence[int]],
    limit_s: float,
) -> Phase:
    """One client after another does its share, one operation at a time."""
    phase = Phase()
    until = time.perf_counter() + limit_s
    cpu_s = sum(peer.cpu_s() for peer in everybody)
    for i, (client, share) in enumerate(zip(clients, shares, strict=True)):
        left_s = until - time.perf_counter()
        if left_s <= 0:
            break
        done = _work(client, do, share, left_s / (len(clients) - i))
        phase.took_ms += done.took_ms
        phase.good += done.good
        phase.error = phase.error or done.error
    cpu_s = sum(peer.cpu_s() for peer in everybody) - cpu_s
    phase.cpu_ms = 1000 * cpu_s / len(phase.took_ms) if phase.took_ms else None
    return phase


def _work(client: Process, do: str, numbers: Sequence[int], limit_s: float) -> Phase:
    done = client.ask(do, _ASK_S, numbers=list(numbers), limit_s=limit_s)
    return Phase(done["took_ms"], done["good"], error=done["error"])
