"""Which steps a standby has, and which of them it may apply. Pure.

At most the step after the applied one is held: a VNode does not send the next before
that is decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Follow:
    """A standby's place in the steps of the VNode that it follows, from `base_step` on."""

    def __init__(self, base_step: int, *, clips: bool) -> None:
        self.applied_step = base_step
        self._clips = clips
        self._held: bytes | None = None  # of the step after `applied_step`

    def take(self, step: int, data: bytes) -> str:
        """What the VNode holds for a step; the reason why it is not taken, or "".

        The same step may come again, and is then taken anew: it was not decided.
        """
        if step <= self.applied_step:
            return ""  # late: it is applied
        if step > self.applied_step + 1:
            return f"the standby is at step {self.applied_step}, and cannot follow step {step}"
        self._held = data
        return ""

    def decided(self, step: int, norms: Sequence[float]) -> Iterator[tuple[int, float, bytes]]:
        """What may be applied now: step, norm of all gradients, what is held. `applied` follows."""
        if self._held is None or step <= self.applied_step:
            return
        back = step - (self.applied_step + 1)
        if self._clips and back >= len(norms):
            return
        norm = norms[len(norms) - 1 - back] if self._clips else 0.0
        yield self.applied_step + 1, norm, self._held

    def applied(self, step: int) -> None:
        """That step is done."""
        self.applied_step, self._held = step, None

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert self.applied_step >= 0
