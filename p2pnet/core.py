"""The shape of everything that decides (DESIGN D1: pure cores, thin shells).

A core is a plain object: no `await`, socket, clock, thread or global random.
Events go in with the time, effects come out; a shell carries the effects out
and feeds their results back as events. The same core therefore runs in a node
and by the thousand in a simulator. Events and effects are frozen slotted
dataclasses, each core's own; sets are never iterated, so that a run depends on
nothing but its events and its `random.Random`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

EventT = TypeVar("EventT", contravariant=True)
EffectT = TypeVar("EffectT", covariant=True)


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that a core's `deadline()` asked for has come."""


class Core(Protocol[EventT, EffectT]):
    """What a driver needs of a core. `now` is in seconds and never goes back."""

    def handle(self, event: EventT, now: float) -> Sequence[EffectT]:
        """Takes one event and says what is to be done about it."""
        ...

    def deadline(self) -> float | None:
        """When the core wants a `Tick`, at the latest; None: not before another event."""
        ...

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        ...
