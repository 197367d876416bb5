"""Virtual time: an event queue, the machines, and a hash of everything that happens. Pure.

Nothing here asks a clock or the system for anything: a run is decided by its seed.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from p2pnet.sim.links import Links
from p2pnet.sim.machine import Clock, Machine, default_addr
from p2pnet.sim.wire import Wire

# Below so many machines a core is checked after each of its events (RELIABILITY,
# "Suite rules"); above, after one event in as many as there are machines.
CHECK_ALL_BELOW = 200

_stamp = struct.Struct("<dIB").pack

Action = Callable[..., None]


class World:
    """One simulated world. Times are in seconds of virtual time, from 0 on.

    `check_every`: after how many events of cores one core is checked; None: as above.
    `count_bytes`: whether DHT messages are serialised to be counted (membership's
    are bytes already).
    """

    def __init__(
        self,
        seed: int = 0,
        links: Links | None = None,
        *,
        check_every: int | None = None,
        count_bytes: bool = False,
    ) -> None:
        self.seed = seed
        self.now = 0.0
        self.rng = self.rng_of("world")
        self.links = links if links is not None else Links()
        self.links.rng = self.rng_of("links")
        self.machines: list[Machine] = []
        self.by_id: dict[str, Machine] = {}
        self.by_addr: dict[str, Machine] = {}
        self.wire = Wire(self, count_bytes=count_bytes)
        self.events = 0  # that were handed to cores
        self._check_every = check_every
        self._queue: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._order = 0
        self._trace = hashlib.blake2b(digest_size=16)
        self._watchers: list[Action] = []

    # Randomness

    def rng_of(self, *names: object) -> random.Random:
        """A generator of its own for each use, so that one use more changes no other."""
        return random.Random(" ".join(map(str, (self.seed, *names))))

    # Time

    def at(self, when: float, action: Action, *arguments: Any) -> None:
        """Does something at a time; what is due at the same time goes in the order of calls."""
        self._order += 1
        heappush(self._queue, (when, self._order, action, arguments))

    def after(self, delay_s: float, action: Action, *arguments: Any) -> None:
        """Does something so many seconds from now."""
        self.at(self.now + delay_s, action, *arguments)

    def run_for(self, seconds: float) -> None:
        """Lets time pass."""
        self._run_to(self.now + seconds)

    def run(
        self, until: Callable[[], bool], limit_s: float = 60.0, *, every_s: float = 0.0
    ) -> float | None:
        """Lets time pass until something holds; after how many seconds, None if it never did.

        It is asked after each event, or every `every_s` seconds.
        """
        start, end = self.now, self.now + limit_s
        queue = self._queue
        while not until():
            if self.now >= end:
                return None
            if every_s:
                self._run_to(min(end, self.now + every_s))
            elif queue and queue[0][0] <= end:
                self._step()
            else:
                self.now = end
        return self.now - start

    def _run_to(self, end: float) -> None:
        queue = self._queue
        while queue and queue[0][0] <= end:
            self._step()
        self.now = end

    def _step(self) -> None:
        when, _, action, arguments = heappop(self._queue)
        if when > self.now:
            self.now = when
        action(*arguments)

    # Machines

    def machine(
        self, *, clock: Clock | None = None, addr: str | None = None, peer_id: str | None = None
    ) -> Machine:
        """One more machine, up. Its keys come from its number alone, not from the seed.

        `peer_id`: an id of the caller's choice, for a liar that signs nothing.
        """
        number = len(self.machines)
        machine = Machine(self, number, clock or Clock(), addr or default_addr(number))
        machine.peer_id = peer_id or machine.peer_id
        machine.place = (self.links.rng.random(), self.links.rng.random())
        self.machines.append(machine)
        self.by_id[machine.peer_id] = machine
        self.by_addr[machine.addr] = machine
        return machine

    def running(self) -> list[Machine]:
        """The machines that are up and not paused."""
        return [machine for machine in self.machines if machine.running]

    # The trace

    @property
    def trace(self) -> str:
        """The hash, in hex, of every event of every core up to now: which, whose and when."""
        return self._trace.copy().hexdigest()

    def note(self, machine: int, kind: int, payload: bytes) -> bool:
        """An event is handed to a core; True if the core is to be checked after it."""
        self.events += 1
        self._trace.update(_stamp(self.now, machine, kind))
        self._trace.update(payload)
        return self.events % (self._check_every or self._checks()) == 0

    def _checks(self) -> int:
        return 1 if len(self.machines) < CHECK_ALL_BELOW else len(self.machines)
