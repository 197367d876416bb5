"""A picture of a report, by matplotlib (the extra `p2pnet[plot]`), loaded only here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2pnet.errors import UsageError
from p2pnet.sim.report import Report

_COLUMNS_MAX = 3


def check_can_plot(path: Path) -> None:
    """Raises UsageError: no matplotlib, a format that it does not know, no such directory."""
    formats = sorted(_canvas().get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        known = ", ".join(formats)
        raise UsageError(f"a picture cannot be written as {path.name!r}: end it in one of {known}")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"there is no directory {path.parent} for the picture")


def plot(report: Report, path: Path) -> None:
    """Draws every series into a file; its suffix says the format.

    "y over x" is drawn as a curve over the series "x", everything else as its cumulative
    distribution.

    Raises:
        UsageError: as `check_can_plot`, or there is nothing to draw.
    """
    check_can_plot(path)
    drawn = {name: values for name, values in report.series.items() if _drawn(report, name)}
    if not drawn:
        raise UsageError(f"scenario {report.name} has nothing to draw")
    columns = min(len(drawn), _COLUMNS_MAX)
    rows = -(-len(drawn) // columns)
    figure = _canvas().figure
    figure.set_size_inches(4.6 * columns, 3.4 * rows)
    figure.set_layout_engine("constrained")
    for number, (name, values) in enumerate(drawn.items(), start=1):
        _draw(figure.add_subplot(rows, columns, number), report, name, values)
    figure.suptitle(f"{report.name}, {report.nodes} nodes, seed {report.seed}")
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _canvas() -> Any:
    """A figure's canvas that needs no screen. Raises UsageError: no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "a picture needs matplotlib, which is not installed: pip install 'p2pnet[plot]'"
        ) from None
    return FigureCanvasAgg(Figure())


def _drawn(report: Report, name: str) -> bool:
    # What is only another curve's x axis is not drawn by itself.
    as_x = any(other.endswith(f" over {name}") for other in report.series)
    return bool(report.series[name]) and not as_x


def _draw(axes: Any, report: Report, name: str, values: list[float]) -> None:
    y, over, x = name.partition(" over ")
    if over and x in report.series:
        axes.plot(report.series[x], values)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=min(0.0, *values))
    else:
        ordered = sorted(values)
        shares = [(n + 1) / len(ordered) for n in range(len(ordered))]
        axes.step([ordered[0], *ordered], [0.0, *shares], where="post")
        axes.set_xlabel(name)
        axes.set_ylabel(f"share of {len(ordered):,}")
        axes.set_ylim(0.0, 1.02)
    axes.grid(alpha=0.3)
