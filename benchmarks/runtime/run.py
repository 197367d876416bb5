"""Every row of the benchmark of the runtime, one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from benchmarks.processes import Failed
from benchmarks.runtime import bulk, delays, depth, experts, linear, pipeline, table
from benchmarks.runtime.lines import Found


class Measure(Protocol):
    """A row: starts processes, measures, ends them. Raises `processes.Failed`."""

    def __call__(self, directory: Path, rounds: int, *, hivemind: bool) -> Found:
        """`directory` is the row's own; without `hivemind` it is left out."""
        ...


ROWS: dict[str, tuple[str, Measure]] = {
    "linear": ("One Linear on one remote host", linear.measure),
    "bulk": ("A large tensor", bulk.measure),
    "experts": ("Eight experts on one host", experts.measure),
    "pipeline": ("A pipeline of four nodes", pipeline.measure),
    "delays": ("Delays between four nodes", delays.measure),
    "depth": ("Step time by the number of VNodes", depth.measure),
}


def run(
    console: Console,
    names: Sequence[str],
    rounds: int,
    directory: Path,
    *,
    hivemind: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures and shows; returns what the JSON has, by row. A row that fails says why."""
    out: dict[str, Any] = {}
    for name in names:
        title, measure = ROWS[name]
        say(title)
        own = directory / name
        own.mkdir()
        try:
            found = measure(own, rounds, hivemind=hivemind)
        except Failed as error:
            console.print(f"{title}: {error}", style="yellow", highlight=False)
            out[name] = {"failed": str(error)}
            continue
        table.show(console, title, found)
        out[name] = _as_json(found)
    return out


def _as_json(found: Found) -> dict[str, Any]:
    lines = [
        {
            "name": line.name.strip(),
            "unit": line.unit,
            "figures": {who: dataclasses.asdict(one) for who, one in line.figures.items()},
            "rival": line.rival,
            "ratio": line.ratio,
            "goal": line.verdict,
        }
        for line in found.lines
    ]
    return {"lines": lines, "remarks": list(found.remarks), "samples": found.samples}
