"""The DHT and what stands around it, beside other systems'; docs/benchmarks.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import placing, shipped, simulated, table
from benchmarks.figures import Row, verdict
from benchmarks.processes import Failed
from benchmarks.rounds import Round, Size, measure
from benchmarks.systems import HIVEMIND, P2PNET, System

_QUICK = Size(keys=48, survivors=4, later=1, phase_s=6.0, hung_s=15.0)


def run(
    console: Console,
    wanted: Sequence[System],
    rounds: int,
    directory: Path,
    notes: dict[str, str],
    *,
    quick: bool,
    long: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures and shows; returns what the JSON has.

    Args:
        notes: by system, what is not measured and why; more may be added.
    """
    nodes: dict[str, shipped.Shipped | str] = {}
    plays: simulated.Played = {}
    placed: list[placing.Placed] = []
    size, count = (_QUICK, 1) if quick else (Size(), rounds)
    measured = _rounds(wanted, size, count, directory, notes, say)
    rows = table.figures(measured)
    table.show_swarms(console, rows, notes)
    if not quick:
        nodes = _shipped([s for s in wanted if s.name not in notes], directory, say)
        table.show_shipped(console, nodes)
    if P2PNET in wanted:
        say("the simulator")
        sizes = simulated.NODES[:1] if quick else simulated.NODES
        plays = simulated.play_all(sizes, long=long)
        table.show_simulated(console, plays)
        say("placement")
        placed = placing.place_all()
        table.show_placed(console, placed)
    return {
        "table": [_row_as_json(row, by_system) for row, by_system in rows],
        "shipped": _plain(nodes),
        "simulated": plays,
        "placed": placing.as_rows(placed),
        "rounds": _plain(measured),
    }


def _rounds(
    wanted: Sequence[System],
    size: Size,
    count: int,
    temporary: Path,
    notes: dict[str, str],
    say: Callable[[str], None],
) -> dict[str, list[Round]]:
    """By system. Round by round: what else the machine does hits all systems alike."""
    rounds: dict[str, list[Round]] = {system.name: [] for system in wanted}
    for number in range(1, count + 1):
        for system in wanted:
            if number > system.rounds_max or system.name in notes:
                continue
            say(f"round {number}: {system.name}")
            logs = temporary / f"{system.name} {number}"
            logs.mkdir()
            try:
                rounds[system.name].append(measure(system, size, logs))
            except Failed as error:
                notes[system.name] = f"round {number} failed: {error}"
    return rounds


def _shipped(
    wanted: Sequence[System], temporary: Path, say: Callable[[str], None]
) -> dict[str, shipped.Shipped | str]:
    nodes: dict[str, shipped.Shipped | str] = {}
    for system, start in ((P2PNET, shipped.p2pnet_nodes), (HIVEMIND, shipped.hivemind_nodes)):
        if system not in wanted:
            continue
        say(f"the shipped command: {system.name}")
        directory = temporary / system.name[0]
        directory.mkdir()
        try:
            nodes[system.name] = start(Size().peers, directory)
        except Failed as error:
            nodes[system.name] = str(error)
    return nodes


def _row_as_json(row: Row, by_system: table.Figures) -> dict[str, Any]:
    out: dict[str, Any] = {"name": row.name.strip(), "unit": row.unit}
    out["figures"] = {name: _plain(figure) for name, figure in by_system.items() if figure}
    if row.goal:
        figures = (by_system.get(system.name) for system in (P2PNET, HIVEMIND))
        out["goal"] = verdict(row.goal, *(one.value if one else None for one in figures))
    return out


def _plain(value: Any) -> Any:
    """Dataclasses as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
