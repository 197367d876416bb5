"""What was found, for people: the ratio first."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks import table
from benchmarks.runtime.lines import Found, Line


def show(console: Console, title: str, found: Found) -> None:
    """One table a row, as its columns differ."""
    shown = Table(title=title)
    shown.add_column("")
    shown.add_column("ratio", justify="right")
    shown.add_column("goal")
    who = _columns(found.lines)
    for name in who:
        shown.add_column(name, justify="right")
    for line in found.lines:
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        rival = f" to {line.rival}" if ratio and line.rival != who[-1] and len(who) > 2 else ""
        cells = [table.cell(line.unit, line.figures.get(name)) for name in who]
        shown.add_row(line.name, ratio + rival, table.coloured(line.verdict), *cells)
    console.print(shown)
    for remark in found.remarks:
        console.print(remark, style="dim", highlight=False)


def _columns(lines: Sequence[Line]) -> list[str]:
    """Whose figures there are, as they come."""
    return list(dict.fromkeys(name for line in lines for name in line.figures))
