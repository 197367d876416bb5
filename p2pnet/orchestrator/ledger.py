"""Which steps are decided, and when a cut is due. A pure core (DESIGN D11).

A step is decided when every VNode has reported that it holds the step's
gradients; nothing is applied before. Every `cut_every` decided steps, and when one
is asked for, the states are stored. A cut overlaps with the next step, which computes
meanwhile but is not decided before every state is stored: until then each VNode
still has the state that the cut is of. Whether the log takes the cut is not waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from p2pnet.core import Tick

# A step that some VNodes have reported and the others have not for this long
# has lost a message or a host.
STALL_S = 10.0


@dataclass(frozen=True, slots=True)
class Reported:
    """A VNode holds the gradients of a step. Loss is the mean over `samples`."""

    vnode: str
    epoch: int
    step: int
    loss: float = 0.0
    correct: int = 0
    samples: int = 0


@dataclass(frozen=True, slots=True)
class Saved:
    """Every state of the cut at `step` is stored, whether or not it is committed yet."""

    step: int


@dataclass(frozen=True, slots=True)
class EndOfData:
    """The feeder has no more batches after that of `last_step`."""

    last_step: int


@dataclass(frozen=True, slots=True)
class CutWanted:
    """A cut as soon as it can be, where a decided step is not stored yet.

    `last`: nothing is decided after it, because the network goes elsewhere.
    """

    last: bool = False


Event = Reported | Saved | EndOfData | CutWanted | Tick


@dataclass(frozen=True, slots=True)
class Decide:
    """The step counts: tell the feeder."""

    step: int
    loss: float
    correct: int
    samples: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Store every VNode's state as it is after a step; the step's own decision comes along."""

    decided: Decide

    @property
    def step(self) -> int:
        """Which step the states are of."""
        return self.decided.step


@dataclass(frozen=True, slots=True)
class Finished:
    """All that was fed is decided and stored."""

    step: int


@dataclass(frozen=True, slots=True)
class Stalled:
    """A step does not get on; `missing` have not reported."""

    step: int
    missing: tuple[str, ...]


Effect = Decide | Cut | Finished | Stalled


@dataclass(slots=True)
class StepLedger:
    """The steps of one network under one claim.

    Args:
        vnodes: all of the network's.
        loss: the one whose report carries the loss.
        epoch: of the claim; reports of any other are ignored.
        step: the cut that the claim starts from.
        cut_every: steps between cuts.
    """

    vnodes: tuple[str, ...]
    loss: str
    epoch: int
    step: int
    cut_every: int
    decided: int = field(init=False)
    saved: int = field(init=False)
    _cutting: int | None = field(init=False, default=None)
    _held: dict[str, Reported] = field(init=False, default_factory=dict)
    _progress_at: float | None = field(init=False, default=None)
    _last: int | None = field(init=False, default=None)  # the last step that will be fed
    _finished: bool = field(init=False, default=False)
    _wanted: bool = field(init=False, default=False)
    _halting: bool = field(init=False, default=False)
    _decision: Decide | None = field(init=False, default=None)  # the last one

    def __post_init__(self) -> None:
        self.decided = self.saved = self.step

    def handle(self, event: Event, now: float) -> Sequence[Effect]:
        """See `p2pnet.core.Core`."""
        if isinstance(event, Reported):
            return self._reported(event, now)
        if isinstance(event, Saved):
            if event.step == self._cutting:
                self.saved, self._cutting = event.step, None
            return self._advance(now)
        if isinstance(event, EndOfData):
            self._last = event.last_step
            return self._advance(now)
        if isinstance(event, CutWanted):
            self._wanted = True
            self._halting = self._halting or event.last
            return self._advance(now)
        if self._progress_at is not None and now >= self._progress_at + STALL_S:
            self._progress_at = now
            if self._cutting is None and self._held and not self._halting:
                return [Stalled(self.decided + 1, self._missing())]
        return []

    def deadline(self) -> float | None:
        """See `p2pnet.core.Core`."""
        return None if self._progress_at is None else self._progress_at + STALL_S

    def check(self) -> None:
        """See `p2pnet.core.Core`."""
        assert self.step <= self.saved <= self.decided
        assert self._cutting is None or self.saved < self._cutting == self.decided
        assert all(report.step == self.decided + 1 for report in self._held.values())
        assert not self._finished or self.saved == self.decided

    def _missing(self) -> tuple[str, ...]:
        return tuple(vnode for vnode in self.vnodes if vnode not in self._held)

    def _reported(self, report: Reported, now: float) -> Sequence[Effect]:
        known = report.vnode in self.vnodes and report.epoch == self.epoch
        if not known or report.step != self.decided + 1 or report.vnode in self._held:
            return []  # late, doubled, or of another claim
        self._held[report.vnode] = report
        self._progress_at = now
        return self._advance(now)

    def _advance(self, now: float) -> Sequence[Effect]:
        if self._cutting is not None:
            return []
        effects: list[Effect] = []
        if len(self._held) == len(self.vnodes) and not self._halting:
            loss = self._held[self.loss]
            self.decided += 1
            self._held.clear()
            self._progress_at = None
            self._decision = Decide(self.decided, loss.loss, loss.correct, loss.samples)
            effects.append(self._decision)
        at_end = self._last is not None and self.decided >= self._last
        due = 1 if at_end or self._wanted else self.cut_every
        if self.decided - self.saved >= due and self._decision is not None:
            self._cutting = self.decided
            self._wanted = False
            effects.append(Cut(self._decision))
        elif at_end and not self._finished:
            self._finished = True
            effects.append(Finished(self.decided))
        return effects
