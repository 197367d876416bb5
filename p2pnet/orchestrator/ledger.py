"""Which steps are decided, and when a cut is due. A pure core (DESIGN D11).

A step is decided when every VNode has reported that it holds the step's gradients; where
it learns by `chain` nothing is applied before. Several steps may be reported at a time
(`window`), and they are decided in order.

Every `cut_every` decided steps, and when one is asked for, the states are stored. In a
`chain` a cut overlaps with the next steps, which compute meanwhile but are not decided
before every state is stored: until then each VNode still has the state that the cut is
of. A `local` VNode does not wait for decisions; it keeps the states of the last two steps
that `cut_every` divides, so cuts are of those alone (and of the last step, which nothing
follows), and decisions stop short of where a VNode might drop the state that is being
stored. Whether the log takes the cut is not waited for.

Where a network clips, the norm of all gradients is that of the squares of all tensors'
norms, which VNodes report: summed without error, so that their order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from p2pnet.core import Tick

# A step that some VNodes have reported and the others have not for this long
# has lost a message or a host.
STALL_S = 10.0


@dataclass(frozen=True, slots=True)
class Reported:
    """VNodes of one host hold the gradients of a step. Loss is the mean over `samples`.

    `squares`: of each gradient tensor's norm, where the network clips.
    """

    vnodes: tuple[str, ...]
    epoch: int
    step: int
    loss: float = 0.0
    correct: int = 0
    samples: int = 0
    squares: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Saved:
    """Every state of the cut at `step` is stored, whether or not it is committed yet."""

    step: int


@dataclass(frozen=True, slots=True)
class Unsaved:
    """The cut at `step` could not be stored, and steps go on; the next one is asked for."""

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


Event = Reported | Saved | Unsaved | EndOfData | CutWanted | Tick


@dataclass(frozen=True, slots=True)
class Decide:
    """The step counts: tell the feeder. `norm`: of all gradients; 0 where nothing is clipped."""

    step: int
    loss: float
    correct: int
    samples: int
    norm: float = 0.0


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


@dataclass(frozen=True, slots=True)
class NotFinite:
    """A step's gradients have no finite norm: it can never count, whoever computes it."""

    step: int


Effect = Decide | Cut | Finished | Stalled | NotFinite


@dataclass(slots=True)
class StepLedger:
    """The steps of one network under one claim.

    Args:
        vnodes: all of the network's.
        loss: the one whose report carries the loss.
        epoch: of the claim; reports of any other are ignored.
        step: the cut that the claim starts from.
        cut_every: steps between cuts.
        window: how many undecided steps VNodes may be at.
        local: VNodes apply before a step is decided.
        clips: reports have squares of norms.
        norms_kept: of how many decided steps the norms are remembered.
        last: the last decision, where the claim goes on from later than the cut.
        norms: as `norms` was then.
    """

    vnodes: tuple[str, ...]
    loss: str
    epoch: int
    step: int
    cut_every: int
    window: int = 2
    local: bool = False
    clips: bool = False
    norms_kept: int = 1
    last: Decide | None = None
    norms: tuple[float, ...] = ()  # of the last decided steps, the newest last
    decided: int = field(init=False)
    saved: int = field(init=False)
    _cutting: int | None = field(init=False, default=None)
    # By step, from the first that is not decided on: who has reported, and what.
    _held: dict[int, dict[str, Reported]] = field(init=False, default_factory=dict)
    _progress_at: float | None = field(init=False, default=None)
    _last: int | None = field(init=False, default=None)  # the last step that will be fed
    _finished: bool = field(init=False, default=False)
    _wanted: bool = field(init=False, default=False)
    _failed: bool = field(init=False, default=False)  # the last cut: it is not tried unasked
    _halting: bool = field(init=False, default=False)
    _spoilt: bool = field(init=False, default=False)  # by a step that can never count

    def __post_init__(self) -> None:
        self.decided = self.saved = self.step
        if self.last is not None:
            self.decided = self.last.step

    def handle(self, event: Event, now: float) -> Sequence[Effect]:
        """See `p2pnet.core.Core`."""
        if isinstance(event, Reported):
            return self._reported(event, now)
        if isinstance(event, Saved):
            if event.step == self._cutting:
                self.saved, self._cutting, self._failed = event.step, None, False
            return self._advance(now)
        if isinstance(event, Unsaved):
            if event.step == self._cutting:
                self._cutting, self._failed = None, True
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
            if self._held and self._may_decide():
                return [Stalled(self.decided + 1, self._missing())]
        return []

    def deadline(self) -> float | None:
        """See `p2pnet.core.Core`."""
        return None if self._progress_at is None else self._progress_at + STALL_S

    def check(self) -> None:
        """See `p2pnet.core.Core`."""
        assert self.step <= self.saved <= self.decided
        if self._cutting is not None:
            assert self.saved < self._cutting <= self.decided
            if self.local:  # nobody drops the state that is being stored
                assert self.decided <= self._cutting + self.cut_every
                assert (
                    self.decided == self._cutting
                    or self.decided + self.window < self._cutting + 2 * self.cut_every
                )
            else:
                assert self._cutting == self.decided
        for step, reports in self._held.items():
            assert self.decided < step <= self.decided + self.window
            assert reports
            assert all(report.step == step for report in reports.values())
        assert not self._finished or self.saved == self.decided
        assert len(self.norms) <= self.norms_kept
        assert all(map(math.isfinite, self.norms))

    def _missing(self) -> tuple[str, ...]:
        held = self._held.get(self.decided + 1, {})
        return tuple(vnode for vnode in self.vnodes if vnode not in held)

    def _reported(self, report: Reported, now: float) -> Sequence[Effect]:
        in_window = self.decided < report.step <= self.decided + self.window
        if report.epoch != self.epoch or not in_window or not report.vnodes:
            return []  # late, or of another claim
        held = self._held.get(report.step, {})
        if any(vnode in held or vnode not in self.vnodes for vnode in report.vnodes):
            return []  # doubled, or of another network
        self._held[report.step] = held | dict.fromkeys(report.vnodes, report)
        self._progress_at = now
        return self._advance(now)

    def _advance(self, now: float) -> Sequence[Effect]:
        effects: list[Effect] = []
        while True:
            if self._cutting is None and self._cut_is_due() and self.last is not None:
                self._cutting = self.decided
                self._wanted = False
                effects.append(Cut(self.last))
            if not self._may_decide() or not self._is_held(self.decided + 1):
                break
            decision = self._decide(now)
            effects.append(decision)
            if isinstance(decision, NotFinite):
                break
        if self._at_end and self.saved == self.decided and not self._finished:
            self._finished = True
            effects.append(Finished(self.decided))
        return effects

    def _is_held(self, step: int) -> bool:
        return len(self._held.get(step, ())) == len(self.vnodes)

    @property
    def _at_end(self) -> bool:
        return self._last is not None and self.decided >= self._last

    @property
    def _has_states(self) -> bool:
        """Whether the VNodes have the states of the last decided step, to be stored."""
        return not self.local or self._at_end or self.decided % self.cut_every == 0

    def _cut_is_due(self) -> bool:
        if self.decided == self.saved or not self._has_states:
            return False
        if self._failed:
            return self._wanted
        due = 1 if self.local or self._at_end or self._wanted else self.cut_every
        return self.decided - self.saved >= due

    def _may_decide(self) -> bool:
        """Whether the next step may be decided once it is held."""
        if self._spoilt or (self._halting and self._has_states):
            return False
        if self._cutting is None:
            return True
        following = self.decided + 1
        return (
            self.local
            and following <= self._cutting + self.cut_every
            and following + self.window < self._cutting + 2 * self.cut_every
        )

    def _decide(self, now: float) -> Decide | NotFinite:
        step = self.decided + 1
        reports = self._held.pop(step)
        # Of a host's several VNodes there is one report, and it counts once.
        whole = {report.vnodes: report for report in reports.values()}
        norm = _norm(square for report in whole.values() for square in report.squares)
        self._progress_at = now if self._held else None
        if self.clips and not math.isfinite(norm):
            self._spoilt = True
            return NotFinite(step)
        self.decided = step
        if self.clips:
            self.norms = (*self.norms, norm)[-self.norms_kept :]
        loss = reports[self.loss]
        self.last = Decide(step, loss.loss, loss.correct, loss.samples, norm if self.clips else 0.0)
        return self.last


def _norm(squares: Iterable[float]) -> float:
    """The root of the sum; NaN where that is no number, or a square cannot be one."""
    try:
        return math.sqrt(math.fsum(squares))
    except (ValueError, OverflowError):
        return math.nan
