"""What a scenario is. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from p2pnet.errors import UsageError
from p2pnet.sim.report import Report


@dataclass(frozen=True)
class Scenario:
    """A function of (nodes, seed, options) to a `Report`.

    `options`: what --option takes, each with its value unless one is given. `nodes`:
    how many unless --nodes says.
    """

    name: str
    summary: str
    run: Callable[[int, int, Mapping[str, float]], Report]
    nodes: int = 100
    nodes_min: int = 2
    nodes_max: int = 20_000
    options: Mapping[str, float] = field(default_factory=dict)

    def play(self, nodes: int, seed: int, options: Mapping[str, float] | None = None) -> Report:
        """One run. Raises UsageError: too few or too many nodes, an option that there is not."""
        if not self.nodes_min <= nodes <= self.nodes_max:
            raise UsageError(
                f"scenario {self.name} takes from {self.nodes_min} to {self.nodes_max} nodes, "
                f"not {nodes}"
            )
        given = dict(options or {})
        for key in given:
            if key not in self.options:
                known = ", ".join(self.options) or "none"
                raise UsageError(f"scenario {self.name} has no option {key!r}; it has: {known}")
        report = self.run(nodes, seed, {**self.options, **given})
        report.options = given
        return report
