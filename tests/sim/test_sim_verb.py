"""`p2pnet sim`: what it prints, and how it ends."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from p2pnet.cli.sim import sim
from p2pnet.sim.report import Report, quantile
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.scenarios import SCENARIOS


def _run(nodes: int, seed: int, options: dict[str, float]) -> Report:
    report = Report("coin", nodes, seed, trace="abcd")
    report.figures = {"heads": seed, "share": 0.51234}
    report.series = {"time": [0.0, 1.0, 2.0], "load over time": [1.0, 3.0, 2.0], "delay s": [2.0]}
    report.expect(seed != options["bad"], "it fell on its edge")
    return report


@pytest.fixture(autouse=True)
def coin(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario("coin", "toss it", _run, nodes=3, nodes_max=9, options={"bad": 7.0})
    monkeypatch.setitem(SCENARIOS, "coin", scenario)


def _sim(*arguments: str) -> Result:
    return CliRunner().invoke(sim, ["--scenario", "coin", *arguments])


def test_a_report_for_people() -> None:
    result = _sim("--seed", "3")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "coin, 3 nodes, seed 3",
        "  heads  3",
        "  share  0.5123",
        "trace abcd",
    ]


def test_a_failure_names_the_command_that_replays_it() -> None:
    result = _sim("--nodes", "5", "--seed", "8", "--option", "bad=8")
    assert result.exit_code == 1
    replay = "p2pnet sim --scenario coin --nodes 5 --seed 8 --option bad=8"
    assert result.output.splitlines()[-2:] == [
        "FAILED: it fell on its edge",
        f"to see it again: {replay}",
    ]
    again = CliRunner().invoke(sim, replay.split()[2:])
    assert again.output == result.output


def test_many_seeds_show_only_what_failed() -> None:
    result = _sim("--seeds", "20")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[0] == "coin, 3 nodes, seed 7"
    assert lines[-1] == "coin: 20 seeds from 0 on, 1 failed"
    assert _sim("--seed", "8", "--seeds", "20").exit_code == 0


def test_json_is_one_report_a_line() -> None:
    result = _sim("--seeds", "2", "--json")
    reports = [json.loads(line) for line in result.output.splitlines()]
    assert [report["seed"] for report in reports] == [0, 1]
    assert reports[1]["figures"] == {"heads": 1, "share": 0.51234}
    assert reports[1]["failures"] == []


def test_the_list_says_what_there_is() -> None:
    result = CliRunner().invoke(sim, ["--list"])
    assert result.exit_code == 0
    assert re.search(r"^coin +toss it \(3 nodes\)$", result.output, re.MULTILINE)
    assert "--option bad=7" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scenario", "dice"], "there are: "),
        (["--nodes", "99"], "from 2 to 9 nodes"),
        (["--option", "bad"], "KEY=NUMBER"),
        (["--option", "bad=x"], "KEY=NUMBER"),
        (["--option", "worse=1"], "it has: bad"),
        (["--plot", "x.png", "--seeds", "2"], "--plot draws one seed"),
        (["--plot", "x.nonsense"], "end it in one of"),
        (["--plot", "/nowhere/at/all/x.png"], "no directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_is_a_usage_error(arguments: list[str], says: str) -> None:
    if any("plot" in argument for argument in arguments):
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    result = _sim(*arguments)
    assert result.exit_code == 2
    assert says in result.output


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    path = tmp_path / "coin.png"
    assert _sim("--plot", str(path)).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_picture_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = _sim("--plot", "x.png")
    assert result.exit_code == 2
    assert "pip install 'p2pnet[plot]'" in result.output


@pytest.mark.parametrize(("q", "value"), [(0.0, 1.0), (0.5, 2.0), (0.51, 3.0), (0.99, 4.0)])
def test_a_quantile_is_a_value_that_was_seen(q: float, value: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], q) == value
