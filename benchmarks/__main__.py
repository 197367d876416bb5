"""`python -m benchmarks`: see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import placing, shipped, simulated, table
from benchmarks.figures import Row, verdict
from benchmarks.processes import Failed
from benchmarks.rounds import Round, Size, measure
from benchmarks.systems import ALL, HIVEMIND, P2PNET, System, install_hivemind

_QUICK = Size(keys=48, survivors=4, later=1, phase_s=6.0, hung_s=15.0)


def main() -> None:
    """Measures, prints tables, and writes JSON where asked to."""
    options = _options()
    console = Console(stderr=options.json == Path("-"), width=None if sys.stdout.isatty() else 160)
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends our processes
    wanted = [system for system in ALL if system.name in options.only]
    notes: dict[str, str] = {}  # what was not measured, and why
    if HIVEMIND in wanted and (why := install_hivemind()):
        notes[HIVEMIND.name] = why
        wanted.remove(HIVEMIND)
    nodes: dict[str, shipped.Shipped | str] = {}
    plays: simulated.Played = {}
    placed: list[placing.Placed] = []

    def say(what: str) -> None:
        console.print(f"{what} ...", style="dim", highlight=False)

    # /tmp: the data dirs hold sockets, whose paths have to be short.
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as temporary:
        size, count = (_QUICK, 1) if options.quick else (Size(), options.rounds)
        rounds = _rounds(wanted, size, count, Path(temporary), notes, say)
        rows = table.figures(rounds)
        table.show_swarms(console, rows, notes)
        if not options.quick:
            nodes = _shipped([s for s in wanted if s.name not in notes], Path(temporary), say)
            table.show_shipped(console, nodes)
    if P2PNET in wanted:
        say("the simulator")
        sizes = simulated.NODES[:1] if options.quick else simulated.NODES
        plays = simulated.play_all(sizes, long=options.long)
        table.show_simulated(console, plays)
        say("placement")
        placed = placing.place_all()
        table.show_placed(console, placed)
    machine = (
        f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    console.print(f"{machine}; {time.perf_counter() - began:.0f} s in all", style="dim")
    if options.json:
        figures = {
            "machine": machine,
            "notes": notes,
            "table": [_row_as_json(row, by_system) for row, by_system in rows],
            "shipped": _plain(nodes),
            "simulated": plays,
            "placed": placing.as_rows(placed),
            "rounds": _plain(rounds),
        }
        _write(options.json, json.dumps(figures, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench ARGS='...'", description=main.__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="p2pnet and hivemind, one small round; 2 minutes")
    add("--long", action="store_true", help="also the simulations that take half an hour")
    add("--rounds", type=int, default=2, help="of each system (default 2)")
    add("--only", choices=[s.name for s in ALL], action="append", help="one system, or several")
    add("--json", type=Path, metavar="FILE", help="every figure and sample; - for stdout")
    options = parser.parse_args()
    if not options.only:
        some = (P2PNET, HIVEMIND) if options.quick else ALL
        options.only = [system.name for system in some]
    return options


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


def _write(file: Path, text: str) -> None:
    if file == Path("-"):
        sys.stdout.write(text)
    else:
        file.write_text(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
