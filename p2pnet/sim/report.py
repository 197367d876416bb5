"""What a run of a scenario comes to: figures, curves, the trace, and what failed. Pure."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """One run.

    `figures` are for people and for judges; `series` for the picture: a name and its
    values in order, plotted as their distribution, or against another series if the
    name is "y over x". `failures`: what the scenario's own judge found wrong.
    """

    name: str
    nodes: int
    seed: int
    figures: dict[str, float | int | str] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)
    trace: str = ""
    failures: list[str] = field(default_factory=list)
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def replay(self) -> str:
        """The one command that does exactly this again."""
        words = ["p2pnet", "sim", "--scenario", self.name, "--nodes", str(self.nodes)]
        words += ["--seed", str(self.seed)]
        for key, value in self.options.items():
            words += ["--option", f"{key}={value:g}"]
        return shlex.join(words)

    def expect(self, holds: bool, otherwise: str) -> None:
        """Notes a failure unless something holds."""
        if not holds:
            self.failures.append(otherwise)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "scenario": self.name,
            "nodes": self.nodes,
            "seed": self.seed,
            "options": dict(self.options),
            "figures": self.figures,
            "series": self.series,
            "trace": self.trace,
            "failures": self.failures,
            "replay": self.replay,
        }

    def text(self) -> str:
        """For people."""
        width = max((len(name) for name in self.figures), default=0)
        lines = [f"{self.name}, {self.nodes} nodes, seed {self.seed}"]
        lines += [f"  {name:{width}}  {shown(value)}" for name, value in self.figures.items()]
        lines.append(f"trace {self.trace}")
        lines += [f"FAILED: {failure}" for failure in self.failures]
        if self.failures:
            lines.append(f"to see it again: {self.replay}")
        return "\n".join(lines)


def shown(value: float | int | str) -> str:
    """A figure for people: four digits are enough."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share `q` of them does not exceed; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def share(part: int, whole: int) -> float:
    """`part` of `whole`, 1 where there is nothing."""
    return part / whole if whole else 1.0
