"""Who is here, as each machine sees it: late, not all alike, and now and then wrong. Pure.

For runs of which membership is not the subject; the shipped core is in `gossip_node.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from p2pnet.gossip.events import MemberChanged
from p2pnet.sim.gossip_node import GossipNode
from p2pnet.sim.machine import Machine, Phase
from p2pnet.sim.world import World

_LOOK_S = 0.5

# (peer id, alive): somebody is here that was not, or no longer
Changed = Callable[[str, bool], None]


class View(Protocol):
    """One machine's membership."""

    watchers: list[Changed]

    def alive(self) -> Sequence[str]:
        """The living, sorted; itself among them."""
        ...


class Oracle:
    """Tells every machine of every other, `late_s` (from, to) after the fact.

    `wrong`: how often in a second a machine takes another for dead, for a while.
    """

    def __init__(
        self,
        world: World,
        machines: Sequence[Machine],
        *,
        late_s: tuple[float, float] = (1.0, 6.0),
        wrong: float = 0.0,
    ) -> None:
        self.world = world
        self.machines = list(machines)
        self.late_s = late_s
        self.wrong = wrong
        self.rng: random.Random = world.rng_of("views")
        self.views = {machine.number: OracleView(self, machine) for machine in machines}
        self._last: dict[tuple[int, int], bool] = {}  # (seer, other), where it was ever False
        self._here = [True] * len(self.machines)
        self._parted = False
        world.after(_LOOK_S, self._look)

    def _look(self) -> None:
        links = self.world.links
        here = [machine.phase is Phase.UP for machine in self.machines]
        parted = links.any_cut
        if here != self._here or parted or self._parted:
            self._compare(here)
        self._here, self._parted = here, parted
        if self.wrong:
            self._mistake()
        self.world.after(_LOOK_S, self._look)

    def _compare(self, here: Sequence[bool]) -> None:
        links, last = self.world.links, self._last
        for seer in self.machines:
            if not seer.alive:
                continue
            for other, up in zip(self.machines, here, strict=True):
                seen = up and not links.parted(other.number, seer.number)
                at = seer.number, other.number
                if other is not seer and last.get(at, True) is not seen:
                    last[at] = seen
                    late_s = self.rng.uniform(*self.late_s)
                    self.world.after(late_s, self._tell, at, other.peer_id)

    def _mistake(self) -> None:
        for seer in self.machines:
            if self.rng.random() < self.wrong * _LOOK_S:
                other = self.rng.choice(self.machines)
                if other is not seer:
                    self.views[seer.number].set(other.peer_id, False)
                    at, late_s = (seer.number, other.number), self.rng.uniform(*self.late_s)
                    self.world.after(late_s, self._tell, at, other.peer_id)

    def _tell(self, at: tuple[int, int], peer_id: str) -> None:
        self.views[at[0]].set(peer_id, self._last.get(at, True))


class OracleView:
    """What one machine was told. A new process begins with it: it asks a bootstrap peer."""

    def __init__(self, oracle: Oracle, machine: Machine) -> None:
        self.watchers: list[Changed] = []
        self._machine = machine
        self._alive = dict.fromkeys(other.peer_id for other in oracle.machines)

    def alive(self) -> Sequence[str]:
        """See `View`."""
        return sorted(self._alive)

    def set(self, peer_id: str, alive: bool) -> None:
        """Somebody is here, or not."""
        if (peer_id in self._alive) is alive:
            return
        if alive:
            self._alive[peer_id] = None
        else:
            del self._alive[peer_id]
        machine = self._machine
        for watcher in self.watchers:
            machine.does(machine.boots, watcher, peer_id, alive)


class GossipView:
    """The shipped membership's."""

    def __init__(self, node: GossipNode) -> None:
        self.watchers: list[Changed] = []
        self._node = node
        node.watchers.append(self._changed)

    def alive(self) -> Sequence[str]:
        """See `View`."""
        return sorted({*self._node.live(), self._node.peer_id})

    def _changed(self, node: GossipNode, change: MemberChanged) -> None:
        before = change.old is not None and change.old.live
        if change.peer_id == node.peer_id or before is change.new.live:
            return
        machine = node.machine
        for watcher in self.watchers:
            machine.after(0.0, watcher, change.peer_id, change.new.live)
