"""A stream of messages both ways, as a gRPC call has: in order and whole, or over. Pure.

A message that the link loses is sent again (TCP does), and the ones behind it wait.
When nothing has come through for SILENCE_S the end that sends notices; each end asks
for a sign of life that often.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from p2pnet.sim.machine import Machine, Phase

_REPEAT_S = 0.2  # TCP's first time-out; it doubles
SILENCE_S = 5.0
_PING = object()

Heard = Callable[[Any], None]
Ended = Callable[[str], None]


class End:
    """One end of a stream. `heard` and `ended` are called in the process that has it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.boots = machine.boots
        self.open = True
        self._heard: Heard | None = None
        self._early: list[Any] = []  # came before anybody heard
        self.ended: Ended = lambda reason: None
        self.twin: End = self
        self._waiting: deque[Any] = deque()  # the first of them is being sent
        self._free_at = 0.0  # when the last one that came through arrives
        machine.after(SILENCE_S, self._ping)

    @property
    def heard(self) -> Heard | None:
        """Who hears what comes; what came before waits for the first."""
        return self._heard

    @heard.setter
    def heard(self, heard: Heard) -> None:
        self._heard = heard
        early, self._early = self._early, []
        for message in early:
            heard(message)

    def send(self, message: Any) -> None:
        """Sends a message, in order."""
        if self.open:
            self._waiting.append(message)
            if len(self._waiting) == 1:
                self._carry(self.machine.world.now, _REPEAT_S)

    def close(self, reason: str = "hung up") -> None:
        """Ends it here now, and there as soon as what was sent before has arrived."""
        if self.open:
            self.open = False
            self._say_over(reason)

    def _break(self, reason: str) -> None:
        """This end notices that it is over."""
        if self.open:
            self.open = False
            self.ended(reason)
            self._say_over(reason)

    def _carry(self, since: float, repeat_s: float) -> None:
        world, machine, there = self.machine.world, self.machine, self.twin
        while self.open and self._waiting:
            if there.machine.phase is Phase.DOWN or there.boots != there.machine.boots:
                back_s = world.links.base_s(machine, there.machine)
                world.after(back_s, machine.does, self.boots, self._break, "it was reset")
                return
            delay_s = self._delay_s()
            if delay_s is None:
                if world.now - since >= SILENCE_S:
                    self._break("nothing comes through")
                else:
                    again = world.now + repeat_s
                    world.at(again, machine.does, self.boots, self._carry, since, 2 * repeat_s)
                return
            message = self._waiting.popleft()
            self._free_at = max(world.now + delay_s, self._free_at)
            world.at(self._free_at, there.machine.does, there.boots, there._arrive, message)
            since, repeat_s = world.now, _REPEAT_S

    def _delay_s(self) -> float | None:
        there = self.twin.machine
        if there.phase is Phase.VANISHED:
            return None
        return self.machine.world.links.carry_s(self.machine, there)

    def _arrive(self, message: Any) -> None:
        if not self.open or message is _PING:
            return
        if self._heard is None:
            self._early.append(message)
        else:
            self._heard(message)

    def _ping(self) -> None:
        if self.open:
            self.send(_PING)
            self.machine.after(SILENCE_S, self._ping)

    def _say_over(self, reason: str) -> None:
        world, there = self.machine.world, self.twin
        if there.machine.phase is Phase.VANISHED:
            return
        parted = world.links.parted(self.machine.number, there.machine.number)
        delay_s = SILENCE_S if parted else world.links.base_s(self.machine, there.machine)
        when = max(world.now + delay_s, self._free_at)
        world.at(when, there.machine.does, there.boots, there._break, reason)


def pair(asker: Machine, server: Machine) -> tuple[End, End]:
    """The two ends of a new stream."""
    one, other = End(asker), End(server)
    one.twin, other.twin = other, one
    return one, other
