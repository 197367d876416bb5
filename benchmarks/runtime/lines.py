"""What the benchmark of the runtime finds: lines, figures, and whether a goal is met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.figures import Figure

P2PNET, HIVEMIND = "p2pnet", "hivemind"


@dataclass(frozen=True)
class Goal:
    """What our figure is to be: its ratio to a rival's, and in itself."""

    ratio_max: float = math.inf
    ratio_min: float = 0.0
    value_max: float = math.inf
    value_min: float = 0.0

    def verdict(self, ours: float | None, rivals: float | None) -> str:
        """Whether it is met, in words."""
        about_ratio = self.ratio_max < math.inf or self.ratio_min > 0
        if ours is None or (about_ratio and not rivals):
            return "not measured"
        ratio = ours / rivals if rivals else math.nan
        bounds = (
            (f"ratio ≤ {self.ratio_max:.2f}", ratio, 0.0, self.ratio_max),
            (f"ratio ≥ {self.ratio_min:.2g}", ratio, self.ratio_min, math.inf),
            (f"≤ {self.value_max:g}", ours, 0.0, self.value_max),
            (f"≥ {self.value_min:g}", ours, self.value_min, math.inf),
        )
        asked = [bound for bound in bounds if bound[2] > 0 or bound[3] < math.inf]
        met = all(low <= value <= high for _, value, low, high in asked)
        return f"{', '.join(name for name, *_ in asked)}: {'met' if met else 'missed'}"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        figures: by whose they are, in the order of the columns.
        ours, rival: the ratio is of the one's figure to the other's.
    """

    name: str
    unit: str
    figures: Mapping[str, Figure]
    rival: str = HIVEMIND
    goal: Goal | None = None
    ours: str = P2PNET

    @property
    def ratio(self) -> float | None:
        """Our figure to the rival's; None where either is missing."""
        ours, rivals = self._value(self.ours), self._value(self.rival)
        return ours / rivals if ours is not None and rivals else None

    @property
    def verdict(self) -> str:
        """Whether the goal is met; "" where there is none."""
        if self.goal is None:
            return ""
        ours, rivals = self._value(self.ours), self._value(self.rival)
        return self.goal.verdict(ours, rivals)

    def _value(self, who: str) -> float | None:
        figure = self.figures.get(who)
        return figure.value if figure else None


@dataclass(frozen=True)
class Found:
    """What one row of the benchmark found.

    Attributes:
        remarks: sentences that belong under the table.
        samples: all that was measured, for the JSON.
    """

    lines: Sequence[Line]
    remarks: Sequence[str] = ()
    samples: Mapping[str, object] = field(default_factory=dict)


def over(values: Sequence[float]) -> Figure:
    """The median over the rounds, the least and the greatest."""
    return Figure(statistics.median(values), min(values), max(values), len(values))
