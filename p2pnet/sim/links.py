"""What lies between two machines: delay, jitter, loss, duplication, reordering, cuts. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pnet.sim.machine import Machine


@dataclass
class Links:
    """The network. All may be changed while the world runs.

    Machines stand at random places in a square; a message from one to another takes
    from `near_s` (same place) to `far_s` (opposite corners), and up to `jitter` times as
    much more. `loss`, `duplication` and `reordering` are probabilities for each message:
    to be lost, to come twice, to come up to `late_s` later than it should.

    A lost message is lost for good, request or reply, as over UDP. Real connections
    repeat it, so that it is late instead: what holds here holds there.
    """

    near_s: float = 0.002
    far_s: float = 0.06
    jitter: float = 0.2
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    late_s: float = 1.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    _loss: dict[tuple[int, int], float] = field(default_factory=dict)  # (from, to)
    _cut: dict[tuple[int, int], None] = field(default_factory=dict)  # (from, to)
    _side: dict[int, int] = field(default_factory=dict)

    def carry_s(self, sender: Machine, receiver: Machine) -> float | None:
        """After how long a message arrives, None: never."""
        rng = self.rng
        a, b = sender.number, receiver.number
        if (self._cut or self._side) and self.parted(a, b):
            return None
        loss = self._loss.get((a, b), self.loss) if self._loss else self.loss
        if loss and rng.random() < loss:
            return None
        delay_s = self.base_s(sender, receiver) * (1.0 + self.jitter * rng.random())
        if self.reordering and rng.random() < self.reordering:
            delay_s += self.late_s * rng.random()
        return delay_s

    def base_s(self, sender: Machine, receiver: Machine) -> float:
        """The shortest time that a message takes."""
        (ax, ay), (bx, by) = sender.place, receiver.place
        apart = math.hypot(ax - bx, ay - by) / math.sqrt(2.0)  # 0 to 1
        return self.near_s + apart * (self.far_s - self.near_s)

    def twice(self) -> bool:
        """Whether a message comes twice."""
        return self.duplication > 0.0 and self.rng.random() < self.duplication

    def parted(self, sender: int, receiver: int) -> bool:
        """Whether nothing comes through from one machine (its number) to another."""
        if (sender, receiver) in self._cut:
            return True
        side = self._side
        return bool(side) and side.get(sender, 0) != side.get(receiver, 0)

    @property
    def any_cut(self) -> bool:
        """Whether something does not come through somewhere."""
        return bool(self._cut or self._side)

    # Faults

    def cut(self, sender: Machine, receiver: Machine, *, both_ways: bool = False) -> None:
        """Nothing comes through from `sender` to `receiver` any more."""
        self._cut[sender.number, receiver.number] = None
        if both_ways:
            self._cut[receiver.number, sender.number] = None

    def mend(self, sender: Machine, receiver: Machine) -> None:
        """The opposite of `cut`, both ways."""
        self._cut.pop((sender.number, receiver.number), None)
        self._cut.pop((receiver.number, sender.number), None)

    def split(self, *groups: Iterable[Machine]) -> None:
        """Full partitions: each group hears only itself; who is in none is with the first."""
        self._side = {m.number: side for side, group in enumerate(groups) for m in group}

    def worsen(self, sender: Machine, receiver: Machine, loss: float) -> None:
        """Another loss in one direction."""
        self._loss[sender.number, receiver.number] = loss

    def heal(self) -> None:
        """No cuts, no partitions, no direction worse than others."""
        self._cut.clear()
        self._side.clear()
        self._loss.clear()

    def perfect(self) -> None:
        """`heal`, and nothing is lost, doubled or reordered."""
        self.heal()
        self.loss = self.duplication = self.reordering = 0.0
