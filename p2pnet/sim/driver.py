"""What every simulated core needs: its events traced, its invariants checked, its ticks. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from p2pnet.core import Core, Tick
from p2pnet.sim.machine import Machine

EventT = TypeVar("EventT")
EffectT = TypeVar("EffectT")

TICK = 0
# The least between two ticks, for a core whose deadline has passed when it is asked.
_TICK_S_MIN = 0.001


class Driver(ABC, Generic[EventT, EffectT]):
    """Drives the core of one program on one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._now = 0.0  # the latest that the core was told; it never goes back
        self._tick_at: float | None = None  # by the machine's clock

    @property
    def peer_id(self) -> str:
        """Whose core it is."""
        return self.machine.peer_id

    @abstractmethod
    def _driven(self) -> Core[EventT | Tick, EffectT]: ...

    @abstractmethod
    def _carry_out(self, effect: EffectT) -> None: ...

    def hand_in(self, event: EventT | Tick, code: int, digest: bytes) -> Sequence[EffectT]:
        """Hands the core an event, and carries out what comes of it.

        `code` and `digest` are what the trace keeps of it.
        """
        machine = self.machine
        checked = machine.world.note(machine.number, code, digest)
        core = self._driven()
        self._now = max(self._now, machine.now)
        effects = core.handle(event, self._now)
        if checked:
            core.check()
        for effect in effects:
            self._carry_out(effect)
        self.schedule()
        return effects

    def schedule(self) -> None:
        """Sees to it that the core gets its tick. One waits at a time, the earliest."""
        due = self._driven().deadline()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            self.machine.after(max(due - self._now, _TICK_S_MIN), self._tick, due)

    def booted(self) -> None:
        """There is a new core."""
        self._tick_at = None
        self.schedule()

    def _tick(self, at: float) -> None:
        if self._tick_at != at:
            return  # an earlier one was set after this
        self._tick_at = None
        due = self._driven().deadline()
        if due is None:
            return
        # Between the two clocks a nanosecond may be lost.
        if due <= self.machine.now + 1e-6:
            self._now = max(self._now, due)
            self.hand_in(Tick(), TICK, b"")
        else:
            self.schedule()
