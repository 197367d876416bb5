"""R26: a small swarm to which the seed does everything: safe always, well again afterwards.

Short form: 1,000 seeds of `p2pnet sim --scenario swarm` (6 to 8 machines with both
cores, 3 s of faults each), in as many processes as there are cores; a dozen of them
again under another PYTHONHASHSEED. As written: 10,000 seeds of up to 12 machines and 4 s.
The mutants play seeds one by one until the same judge has caught them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from p2pnet import keys
from p2pnet.dht.records import OpenRecord
from p2pnet.dht.searches import RecordSearch
from p2pnet.dht.store import RecordStore
from p2pnet.gossip import statements
from p2pnet.gossip.ourselves import Ourselves
from p2pnet.sim.scenarios.swarm import SCENARIO

SEEDS = 1_000
SEEDS_AS_WRITTEN = 10_000
SHORT = ["--nodes", "8", "--option", "storm_s=3"]
MUTANT_SEEDS_MAX = 60


def _start(first: int, count: int, hash_seed: int, options: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "p2pnet", "sim", "--scenario", "swarm", "--json"]
    command += ["--seed", str(first), "--seeds", str(count), *options]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def _play(
    ranges: Sequence[tuple[int, int]], hash_seed: int, options: Sequence[str]
) -> list[dict[str, Any]]:
    """The reports of ranges (first, count) of seeds, each in a process of its own."""
    started = [_start(first, count, hash_seed, options) for first, count in ranges]
    try:
        outputs = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [json.loads(line) for output in outputs for line in output.splitlines()]


def test_r26_swarm(scale: Any, figure: Callable[[str], None]) -> None:
    seeds, options = (SEEDS_AS_WRITTEN, ()) if scale.as_written else (SEEDS, SHORT)
    cores = os.cpu_count() or 1
    share = -(-seeds // cores)
    ranges = [(first, min(share, seeds - first)) for first in range(0, seeds, share)]
    reports = _play(ranges, hash_seed=1, options=options)
    assert [report["seed"] for report in reports] == list(range(seeds))
    failed = [
        f"{report['replay']}: {report['failures']}" for report in reports if report["failures"]
    ]
    assert not failed, "\n".join(failed)

    again = _play([(seeds // 2, 12)], hash_seed=2, options=options)
    traces = {report["seed"]: report["trace"] for report in reports}
    assert all(report["trace"] == traces[report["seed"]] for report in again)

    def total(name: str) -> float:
        return sum(report["figures"][name] for report in reports)

    figure(
        f"{seeds} seeds, {total('faults'):,.0f} faults, {total('operations'):,.0f} operations, "
        f"{total('events'):,.0f} events; {total('reads judged'):,.0f} reads, of which "
        f"{total('reads bound by a quorum'):,.0f} had to see a certain record; well again after "
        f"{total('records well after s') / seeds:.1f} s on average, "
        f"{max(r['figures']['records well after s'] for r in reports):.1f} s at most"
    )
    assert total("reads bound by a quorum") > seeds / 10, "the judge had next to nothing to judge"


def _caught() -> str:
    """The first failure that the judge finds."""
    for seed in range(MUTANT_SEEDS_MAX):
        failures = SCENARIO.play(SCENARIO.nodes, seed, {"recover_s": 40.0}).failures
        if failures:
            return failures[0]
    return "nothing"


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What a mutant took for verified is not, for the others."""
    yield
    for cached in vars(statements).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_r26_mutant_believes_every_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_holds", lambda *_: True)
    assert "never signed" in _caught()


def test_r26_mutant_takes_older_records(monkeypatch: pytest.MonkeyPatch) -> None:
    put = RecordStore.put

    def takes_all(store: RecordStore, record: OpenRecord, now: float, source: str = "") -> bool:
        if record.author in store._entries.get(record.key, {}):
            store._remove(record.key, record.author)
        store._marks.pop((record.key, record.author))
        if record.subject is not None:
            store._fences.pop((record.key, record.subject))
        return put(store, record, now, source)

    monkeypatch.setattr(RecordStore, "put", takes_all)
    assert "older record" in _caught()


def test_r26_mutant_believes_the_first_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    one = property(lambda _: 1, lambda *_: None)
    monkeypatch.setattr(RecordSearch, "quorum", one, raising=False)
    assert "holders" in _caught()


def test_r26_mutant_never_refutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ourselves, "accused", lambda *_, **__: False)
    assert "members" in _caught()
