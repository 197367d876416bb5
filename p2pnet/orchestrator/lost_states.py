"""States that the last commit names and nobody has any more. Pure.

A host that finds no holder may only be cut off from them for a moment. So it takes two
epochs, and with that two tries, some time apart, to believe it: then the network goes
back to the commit before, whose states are kept for that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRIES = 2
APART_S = 10.0


@dataclass(slots=True)
class LostStates:
    """What was said about the states of one commit. `why`: by whom last, and of which VNode."""

    why: str = ""
    _step: int = -1
    _first_at: float = 0.0
    _epochs: dict[int, None] = field(default_factory=dict)

    def said(self, step: int, epoch: int, why: str, now: float) -> None:
        """A host has not found a state of the commit of `step`, in that epoch."""
        if step != self._step:
            self.forget()
            self._step, self._first_at = step, now
        self._epochs[epoch] = None
        self.why = why

    def certain(self, step: int, now: float) -> bool:
        """Whether the states of the commit of `step` are to be given up."""
        said = step == self._step and len(self._epochs) >= TRIES
        return said and now >= self._first_at + APART_S

    def wait_s(self, step: int, now: float) -> float:
        """How long to wait before the next try; 0: nothing is said to be lost, or it is."""
        if step != self._step or self.certain(step, now):
            return 0.0
        return max(0.0, self._first_at + APART_S - now)

    def forget(self) -> None:
        """They are there again, or may be."""
        self.why, self._step = "", -1
        self._epochs.clear()
