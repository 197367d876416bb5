"""The results of a run's steps: every step's, once, in order. Pure; a part of `client.feed`."""

from __future__ import annotations

import math

from p2pnet.client.events import Deliver, Effect, StepResult

RESULT_S = 2.0  # for the results of steps that were decided unheard


class Results:
    """What was delivered, and what is still to come of steps that are decided.

    Attributes:
        delivered: the newest step whose result was delivered.
        due: until when the results of decided steps are awaited; None: there is none to await.
    """

    def __init__(self) -> None:
        self.delivered = 0
        self.due: float | None = None
        self._decided = 0

    def begin(self, step: int) -> None:
        """The run begins after that step."""
        self.delivered = step

    def await_until(self, decided: int, now: float) -> None:
        """Every step up to `decided` is; what was not heard of them may be told again."""
        self._decided = decided
        self.due = now + RESULT_S if decided > self.delivered else None

    def deliver(self, result: StepResult, effects: list[Effect]) -> None:
        """If it is news; those before it that never came are lost."""
        if result.step <= self.delivered:
            return
        for step in range(self.delivered + 1, result.step):
            effects.append(Deliver(StepResult(step, math.nan, 0, 0, known=False)))
        self.delivered = result.step
        effects.append(Deliver(result))
        if self.delivered >= self._decided:
            self.due = None

    def give_up(self, effects: list[Effect]) -> None:
        """Nothing that is awaited comes any more."""
        if self.due is not None:
            self.deliver(StepResult(self._decided, math.nan, 0, 0, known=False), effects)
