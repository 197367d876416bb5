"""Faults drawn from a seed. Pure.

Each seed first draws *which* kinds of fault it has, and then their times: a run that
has every kind finds less than runs that each leave some out (Groce et al., "Swarm
testing", ISSTA 2012).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from p2pnet.sim.links import Links
from p2pnet.sim.machine import Clock, Machine
from p2pnet.sim.world import World

_CLOCK_OFFSET_S = 3000.0  # two such clocks are apart by less than records allow
_DRIFT = 0.02
_PAUSE_S_MAX = 8.0
_CUT_S_MAX = 8.0


def any_links(rng: random.Random) -> Links:
    """Links as bad as they come, or perfect ones."""
    links = Links(near_s=0.0005, far_s=10 ** rng.uniform(-3.0, -0.7), jitter=rng.uniform(0, 1))
    if rng.random() < 0.5:
        links.loss = rng.uniform(0.0, 0.1)
    if rng.random() < 0.5:
        links.duplication = rng.uniform(0.0, 0.2)
    if rng.random() < 0.5:
        links.reordering = rng.uniform(0.0, 0.2)
    return links


def any_clock(rng: random.Random, *, wrong: bool) -> Clock:
    """A clock that is right, or an hour off and 2 % fast or slow at worst."""
    if not wrong:
        return Clock()
    offset_s = rng.uniform(-_CLOCK_OFFSET_S, _CLOCK_OFFSET_S)
    return Clock(offset_s=offset_s, drift=rng.uniform(-_DRIFT, _DRIFT))


class Faults:
    """Does something bad to machines or links each time it is asked to.

    `keep_disks`: no restart loses a disk. `log` holds what was done, for people: (when, what).
    """

    def __init__(
        self,
        world: World,
        machines: Sequence[Machine],
        rng: random.Random,
        *,
        keep_disks: bool = False,
    ) -> None:
        self._world = world
        self._machines = machines
        self._rng = rng
        self._keep_disks = keep_disks
        kinds: list[Callable[[], str]] = [
            self._kill,
            self._vanish,
            self._pause,
            self._starve,
            self._restart,
            self._cut,
            self._cut_off,
            self._split,
            self._worsen,
            self._jump,
        ]
        self._kinds = rng.sample(kinds, rng.randint(2, len(kinds)))
        self.log: list[tuple[float, str]] = []

    def strike(self) -> None:
        """One fault, of a kind that this seed has."""
        what = self._rng.choice(self._kinds)()
        self.log.append((self._world.now, what))

    def cease(self) -> None:
        """No fault from now on: links are perfect, whoever is paused goes on."""
        self._world.links.perfect()
        for machine in self._machines:
            machine.resume()
        self.log.append((self._world.now, "all faults cease"))

    def _any(self) -> Machine:
        return self._rng.choice(self._machines)

    def _kill(self) -> str:
        machine = self._any()
        machine.kill()
        return f"kill {machine.number}"

    def _vanish(self) -> str:
        machine = self._any()
        machine.vanish()
        return f"pull the plug of {machine.number}"

    def _pause(self) -> str:
        machine, lasts_s = self._any(), self._rng.uniform(0.3, _PAUSE_S_MAX)
        machine.pause()
        self._world.after(lasts_s, machine.resume)
        return f"pause {machine.number} for {lasts_s:.1f} s"

    def _starve(self) -> str:
        machine = self._any()
        machine.starve(off_s=self._rng.uniform(0.3, 1.5), on_s=self._rng.uniform(0.1, 1), times=3)
        return f"starve {machine.number}"

    def _restart(self) -> str:
        machine, keep = self._any(), self._rng.random() < 0.5 or self._keep_disks
        machine.restart(keep_disk=keep)
        return f"restart {machine.number} {'with' if keep else 'without'} its disk"

    def _cut(self) -> str:
        one, other = self._rng.sample(self._machines, 2)
        both = self._rng.random() < 0.5
        self._world.links.cut(one, other, both_ways=both)
        self._world.after(self._lasts_s(), self._world.links.mend, one, other)
        return f"cut {one.number} {'<->' if both else '->'} {other.number}"

    def _cut_off(self) -> str:
        """A machine that is heard by nobody, or hears nobody."""
        one, mute = self._any(), self._rng.random() < 0.5
        lasts_s = self._lasts_s()
        for other in self._machines:
            if other is not one:
                ends = (one, other) if mute else (other, one)
                self._world.links.cut(*ends)
                self._world.after(lasts_s, self._world.links.mend, one, other)
        return f"{one.number} {'is heard by nobody' if mute else 'hears nobody'}"

    def _split(self) -> str:
        sides = self._rng.randint(2, 3)
        groups: list[list[Machine]] = [[] for _ in range(sides)]
        for machine in self._machines:
            self._rng.choice(groups).append(machine)
        self._world.links.split(*groups)
        self._world.after(self._lasts_s(), self._world.links.split)
        return "split into " + " | ".join(str([m.number for m in group]) for group in groups)

    def _worsen(self) -> str:
        one, other = self._rng.sample(self._machines, 2)
        loss = self._rng.uniform(0.2, 0.9)
        self._world.links.worsen(one, other, loss)
        return f"lose {loss:.0%} {one.number} -> {other.number}"

    def _jump(self) -> str:
        machine = self._any()
        machine.clock.offset_s = self._rng.uniform(-_CLOCK_OFFSET_S, _CLOCK_OFFSET_S)
        return f"set the wall clock of {machine.number}"

    def _lasts_s(self) -> float:
        return self._rng.uniform(0.5, _CUT_S_MAX)
