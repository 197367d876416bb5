"""What the DHT says, in short: records that arrive late, or not, or are out of date. Pure.

For runs of which the DHT is not the subject; the shipped one is in `dht_node.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from p2pnet.sim.machine import Machine
from p2pnet.sim.world import World


@dataclass(frozen=True, slots=True)
class Hint:
    """A record; of two the one with the higher rank is kept."""

    rank: tuple[int, ...]
    value: Any
    until: float


class Hints:
    """A map that everybody has a copy of, each as late as `delay_s` at most.

    `loss`: the share of copies that do not arrive, beside those that a partition stops.
    """

    def __init__(self, world: World, *, delay_s: float = 0.5, loss: float = 0.1) -> None:
        self._world = world
        self._delay_s = delay_s
        self._loss = loss
        self._rng: random.Random = world.rng_of("hints")
        self._copies: dict[tuple[int, str], Hint] = {}

    def put(
        self, machine: Machine, key: str, rank: tuple[int, ...], value: Any, ttl_s: float
    ) -> None:
        """Says something; lasting only if it is said again."""
        world, rng = self._world, self._rng
        hint = Hint(rank, value, world.now + ttl_s)
        for other in world.machines:
            if other is machine:
                self._arrive(other, key, hint)
                continue
            lost = rng.random() < self._loss
            if not lost and not world.links.parted(machine.number, other.number):
                world.after(rng.uniform(0.0, self._delay_s), self._arrive, other, key, hint)

    def get(self, machine: Machine, key: str) -> Any:
        """What that machine finds, or None."""
        hint = self._copies.get((machine.number, key))
        return hint.value if hint is not None and hint.until > self._world.now else None

    def _arrive(self, machine: Machine, key: str, hint: Hint) -> None:
        at = machine.number, key
        known = self._copies.get(at)
        if known is None or known.rank <= hint.rank or known.until <= self._world.now:
            self._copies[at] = hint
