"""What was measured, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.figures import MIB, ROWS, Figure, Goal, Row, over_rounds, verdict
from benchmarks.placing import Placed
from benchmarks.rounds import Round
from benchmarks.shipped import Shipped
from benchmarks.systems import ALL, HIVEMIND, P2PNET

Figures = Mapping[str, Figure | None]  # by system


def figures(rounds: Mapping[str, Sequence[Round]]) -> list[tuple[Row, Figures]]:
    """Every row, with the figure of each system."""
    return [(row, {name: over_rounds(row, some) for name, some in rounds.items()}) for row in ROWS]


def show_swarms(
    console: Console, rows: Sequence[tuple[Row, Figures]], notes: Mapping[str, str]
) -> None:
    """The systems side by side; the ratio is p2pnet's figure to hivemind's."""
    table = Table(title="16 peers on one machine; median over the rounds (least–greatest)")
    table.add_column("")
    table.add_column("p2pnet : hivemind", justify="right")
    table.add_column("goal")
    for system in ALL:
        table.add_column(system.name, justify="right")
    for row, by_system in rows:
        ours, theirs = (_value(by_system.get(s.name)) for s in (P2PNET, HIVEMIND))
        goal = verdict(row.goal, ours, theirs) if row.goal else ""
        cells = [cell(row.unit, by_system.get(system.name)) for system in ALL]
        table.add_row(row.name, _ratio(ours, theirs), coloured(goal), *cells)
    console.print(table)
    for name, note in notes.items():
        console.print(f"{name}: {note}", style="yellow", highlight=False)


def show_shipped(console: Console, nodes: Mapping[str, Shipped | str]) -> None:
    """The whole nodes."""
    ours, theirs = (nodes.get(s.name) for s in (P2PNET, HIVEMIND))
    table = Table(title="The shipped commands: p2pnet join, hivemind-dht")
    for name in ("", "p2pnet : hivemind", "goal", P2PNET.name, HIVEMIND.name):
        table.add_column(name, justify="right" if name else "left")
    both = [one if isinstance(one, Shipped) else None for one in (ours, theirs)]
    memory = [one.pss_bytes / MIB if one else None for one in both]
    goal = coloured(verdict(Goal(1.0), *memory))
    cells = [f"{_number(mib)} MiB" if mib else "" for mib in memory]
    table.add_row("memory a node (PSS)", _ratio(*memory), goal, *cells)
    ready_s = [one.ready_s if one else None for one in both]
    cells = [f"{_number(seconds)} s" if seconds else "" for seconds in ready_s]
    table.add_row("start-up until ready", _ratio(*ready_s), "", *cells)
    console.print(table)
    for name, one in nodes.items():
        if isinstance(one, str):
            console.print(f"{name}: {one}", style="yellow", highlight=False)


def show_simulated(
    console: Console, plays: Mapping[str, Mapping[int, Mapping[str, float] | str]]
) -> None:
    """What grows with the network."""
    sizes = sorted({nodes for by_nodes in plays.values() for nodes in by_nodes})
    table = Table(title="In the simulator, by number of nodes")
    table.add_column("")
    for nodes in sizes:
        table.add_column(f"{nodes:,}", justify="right")
    for scenario, by_nodes in plays.items():
        results = [by_nodes.get(nodes, "") for nodes in sizes]
        names = dict.fromkeys(name for one in results if isinstance(one, Mapping) for name in one)
        for name in names or [""]:
            cells = [
                one if isinstance(one, str) else _number(one[name]) if name in one else ""
                for one in results
            ]
            table.add_row(f"{scenario}: {name}", *cells)
    console.print(table)


def show_placed(console: Console, placed: Sequence[Placed]) -> None:
    """What a placement takes."""
    table = Table(title="Placement, by number of VNodes / PNodes; CPU time of one core")
    table.add_column("")
    for one in placed:
        table.add_column(f"{one.vnodes:,} / {one.pnodes:,}", justify="right")
    seconds = (
        ("nobody far from anybody", [one.place_s for one in placed]),
        ("in twenty places of the world", [one.place_far_s for one in placed]),
        ("the same after a loss", [one.again_far_s for one in placed]),
        ("a step, foretold", [one.step_s for one in placed]),
    )
    for name, row in seconds:
        table.add_row(name, *(f"{_number(one)} s" for one in row))
    table.add_row("VNodes moved after a loss", *(str(one.moved) for one in placed))
    console.print(table)


def _value(figure: Figure | None) -> float | None:
    return figure.value if figure else None


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours is not None and theirs else ""


def coloured(goal: str) -> str:
    """A verdict, green where it is met and red where it is missed."""
    colour = "green" if goal.endswith(": met") else "red" if goal.endswith(": missed") else ""
    return f"[{colour}]{goal}[/{colour}]" if colour else goal


def cell(unit: str, figure: Figure | None) -> str:
    """A figure, and between what it lay."""
    if figure is None:
        return ""
    spread = f" ({_number(figure.low)}–{_number(figure.high)})" if figure.rounds > 1 else ""
    return f"{_number(figure.value)} {unit}{spread}"


def _number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
