"""A picture of the step times over the delay, by matplotlib (the extra `p2pnet[plot]`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot(row: Mapping[str, Any], path: Path) -> None:
    """Draws a curve a rule; the file's suffix says the format.

    Args:
        row: what the JSON has of `runtime.delays`; nothing is drawn of one that failed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if "samples" not in row:
        return
    samples = dict(row["samples"])
    delays_ms = samples.pop("delay")
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for rule, took_ms in samples.items():
        axes.plot(delays_ms, took_ms, marker="o", label=rule)
    axes.set_xlabel("delay added to each hop, ms")
    axes.set_ylabel("a step, ms")
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_figure(path)
