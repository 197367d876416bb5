"""The benchmark of the runtime: what it compares can be submitted, and its verdicts are right."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from p2pnet.orchestrator.spec import load_spec


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks.runtime.run`: benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    import benchmarks.runtime.run

    yield benchmarks.runtime.run
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("goal", "ours", "rivals", "verdict"),
    [
        ({"ratio_max": 1 / 3}, 2.0, 6.1, "ratio ≤ 0.33: met"),
        ({"ratio_max": 1 / 3}, 2.0, 5.9, "ratio ≤ 0.33: missed"),
        ({"ratio_max": 1 / 3}, 2.0, None, "not measured"),
        ({"ratio_min": 3.0}, 9.0, 3.0, "ratio ≥ 3: met"),
        ({"ratio_min": 0.8, "value_min": 400.0}, 500.0, 600.0, "ratio ≥ 0.8, ≥ 400: met"),
        ({"ratio_min": 0.8, "value_min": 400.0}, 399.0, 400.0, "ratio ≥ 0.8, ≥ 400: missed"),
        ({"ratio_min": 0.8, "value_min": 400.0}, 500.0, 700.0, "ratio ≥ 0.8, ≥ 400: missed"),
        ({"value_max": 1.0}, 1.0, None, "≤ 1: met"),
        ({"value_max": 1.0}, None, 5.0, "not measured"),
    ],
)
def test_verdicts(
    runtime: Any, goal: dict[str, float], ours: float | None, rivals: float | None, verdict: str
) -> None:
    from benchmarks.runtime.lines import Goal

    assert Goal(**goal).verdict(ours, rivals) == verdict


def test_a_line_tells_the_ratio_of_medians(runtime: Any) -> None:
    from benchmarks.runtime.lines import Goal, Line, over

    figures = {"p2pnet": over([1.0, 9.0, 2.0]), "hivemind": over([8.0, 4.0])}
    line = Line("a line", "ms", figures, goal=Goal(ratio_max=1 / 3))
    assert line.ratio is not None
    assert math.isclose(line.ratio, 1 / 3)
    assert Line("another", "ms", {"p2pnet": over([1.0])}).ratio is None


@pytest.mark.parametrize(
    ("chain", "local", "sentence"),
    [
        ([9, 30, 60, 90], [8, 8, 8, 8], "a step of local takes less than one of chain at every"),
        ([6, 10, 60, 90], [8, 8, 8, 8], "from 12 ms a hop on"),
        ([6, 6, 6, 6], [8, 8, 8, 8], "up to 100 ms a hop, a step of chain takes less"),
    ],
)
def test_the_crossover_is_between_the_two_delays(
    runtime: Any, chain: list[float], local: list[float], sentence: str
) -> None:
    from benchmarks.runtime.delays import crossover

    assert crossover({"chain": chain, "local": local}).startswith(sentence)


@pytest.mark.parametrize("learning", ["chain", "local"])
def test_a_chain_is_cut_into_as_many_groups_of_neighbours(runtime: Any, learning: str) -> None:
    from benchmarks.runtime.nodes import chain_of

    spec = chain_of("mlp", 8, width=16, activation="ReLU", groups=4, learning=learning)
    groups = [node["group"] for node in spec["nodes"]]
    assert groups == sorted(groups)
    assert set(groups) == {"g0", "g1", "g2", "g3"}
    assert spec["loss"]["group"] == "g3"
    assert len(load_spec(spec).vnodes()) >= 8 + 7 + 1


def test_calls_are_counted_over_all_callers(runtime: Any) -> None:
    from benchmarks.peers import timing

    called = []
    rate = timing.at_once([lambda: called.append(1)] * 3, 0.05)
    assert rate > 0
    assert len(called) >= 3
    assert len(timing.each(lambda: called.clear(), 0.01)) >= 1
