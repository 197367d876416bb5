"""From samples to figures, and from figures to goals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.rounds import Round

MIB = 1 << 20


@dataclass(frozen=True)
class Figure:
    """One figure of one system: the median over its rounds, and the least and the greatest."""

    value: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Goal:
    """p2pnet is to take at most `ratio` of what hivemind takes, and less than `limit`."""

    ratio: float
    limit: float = math.inf


@dataclass(frozen=True)
class Row:
    """What is measured, and how it is read out of a round."""

    name: str
    unit: str
    of: Callable[[Round], float | None]
    goal: Goal | None = None


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def over_rounds(row: Row, rounds: Iterable[Round]) -> Figure | None:
    """The figure of one system; None where it was not measured."""
    rounds = list(rounds)
    values = [value for value in map(row.of, rounds) if value is not None]
    if not values:
        return None
    return Figure(statistics.median(values), min(values), max(values), len(values))


def _took(phase: str, share: float) -> Callable[[Round], float | None]:
    def of(one: Round) -> float | None:
        took_ms = one.phases[phase].took_ms if phase in one.phases else []
        return percentile(took_ms, share) if took_ms else None

    return of


def _found(phase: str) -> Callable[[Round], float | None]:
    def of(one: Round) -> float | None:
        at = one.phases.get(phase)
        return 100 * at.good / len(at.took_ms) if at and at.took_ms else None

    return of


def _cpu(phase: str) -> Callable[[Round], float | None]:
    return lambda one: one.phases[phase].cpu_ms if phase in one.phases else None


def _rate(one: tuple[int, float]) -> float | None:
    return one[0] / one[1] if one[1] else None


_THIRD, _HALF, _SIXTH = Goal(1 / 3), Goal(1 / 2), Goal(1 / 6, limit=500.0)

ROWS = (
    Row("store p50", "ms", _took("store", 0.5), _HALF),
    Row("store p95", "ms", _took("store", 0.95), _HALF),
    Row("  confirmed", "%", _found("store")),
    Row("  copies a record", "", lambda one: one.copies),
    Row("  CPU of the swarm, a store", "ms", _cpu("store")),
    Row("get (quorum) p50", "ms", _took("get", 0.5), _THIRD),
    Row("get (quorum) p95", "ms", _took("get", 0.95)),
    Row("  right value found", "%", _found("get")),
    Row("  CPU of the swarm, a get", "ms", _cpu("get")),
    Row("get (any copy) p50", "ms", _took("get_any", 0.5)),
    Row("get (any copy) p95", "ms", _took("get_any", 0.95)),
    Row("bulk store", "keys/s", lambda one: _rate(one.bulk_put)),
    Row("bulk get (quorum)", "keys/s", lambda one: _rate(one.bulk_get)),
    Row("  right values found", "%", lambda one: 100 * one.bulk_get[0] / one.bulk),
    Row("get, 30 % killed, p50", "ms", _took("killed", 0.5)),
    Row("get, 30 % killed, p95", "ms", _took("killed", 0.95)),
    Row("  right value found", "%", _found("killed")),
    Row("get, 25 % hung, first, p50", "ms", _took("hung", 0.5)),
    Row("get, 25 % hung, first, p95", "ms", _took("hung", 0.95), _SIXTH),
    Row("get, 25 % hung, first, max", "ms", _took("hung", 1.0)),
    Row("  right value found", "%", _found("hung")),
    Row("get, 25 % hung, later, p95", "ms", _took("hung later", 0.95)),
    Row("memory a peer (PSS)", "MiB", lambda one: one.pss_bytes / MIB, Goal(1.0)),
    Row("start-up to the first get", "s", lambda one: one.start_s),
)


def verdict(goal: Goal, ours: float | None, theirs: float | None) -> str:
    """Whether a goal is met, in words."""
    if ours is None or theirs is None:
        return "not measured"
    ratio = ours / theirs
    met = ratio <= goal.ratio and ours < goal.limit
    wanted = f"≤ {goal.ratio:.2f}" + (f", < {goal.limit:g}" if goal.limit < math.inf else "")
    return f"{wanted}: {'met' if met else 'missed'}"
