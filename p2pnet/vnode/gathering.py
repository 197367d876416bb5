"""Which forward passes are run together. Pure.

A pass waits for the inputs of a stage, and then for the compute thread. When that is
free, the pass that is complete longest goes, and with it all others that wait for the
same stage, as far as the largest batch reaches. Nothing ever waits for company: passes
meet only while the compute thread is busy anyway (as Orca schedules a language model's
iterations: Yu et al., OSDI 2022). A part of a session goes alone, since what it is
computed with belongs to nobody else.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from p2pnet.core import Tick

REQUESTS_MAX = 1024  # begun and not run
BYTES_MAX = 256 << 20  # of their inputs
WAIT_MAX_S = 60.0  # for the inputs, and for the compute thread


@dataclass(frozen=True, slots=True)
class InputArrived:
    """An input of a stage for one request.

    Args:
        stage: what is run; `place` is which of its `places` inputs this is.
        where: opaque, for who runs it.
        tensor: opaque.
        together_max: samples that may be run at once.
        session: of a part of a sequence, else empty.
    """

    stage: Hashable
    request: bytes
    place: int
    places: int
    samples: int
    size_bytes: int
    tensor: object
    where: object
    together_max: int
    session: bytes = b""


@dataclass(frozen=True, slots=True)
class Freed:
    """What was run has ended."""


Event = InputArrived | Freed | Tick


@dataclass(frozen=True, slots=True)
class Part:
    """One request's share of what is run; `tensors` by place."""

    request: bytes
    samples: int
    tensors: tuple[object, ...]
    where: object
    session: bytes


@dataclass(frozen=True, slots=True)
class Run:
    """Run a stage, on all parts at once; `Freed` is waited for."""

    stage: Hashable
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class GiveUp:
    """A request gives way, or has waited for too long."""

    request: bytes
    where: object
    reason: str


Effect = Run | GiveUp


@dataclass(slots=True)
class _Waiting:
    since: float
    places: int
    samples: int
    together_max: int
    where: object
    session: bytes
    tensors: dict[int, object]
    size_bytes: int = 0

    @property
    def complete(self) -> bool:
        return len(self.tensors) == self.places


class Gathering:
    """The requests of one host that have begun and do not run yet."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[Hashable, bytes], _Waiting] = {}  # the oldest first
        self._complete: dict[tuple[Hashable, bytes], None] = {}  # ... complete longest first
        self._size_bytes = 0
        self._busy = False

    def handle(self, event: Event, now: float) -> Sequence[Effect]:
        """Takes an event and says what is to be run, and who gives way."""
        effects: list[Effect] = []
        match event:
            case InputArrived():
                effects += self._arrived(event, now)
            case Freed():
                self._busy = False
            case Tick():
                effects += self._expired(now)
        if not self._busy and self._complete:
            effects.append(self._next())
        return effects

    def deadline(self) -> float | None:
        """When the oldest request has waited for too long."""
        oldest = next(iter(self._waiting.values()), None)
        return None if oldest is None else oldest.since + WAIT_MAX_S

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert self._size_bytes == sum(one.size_bytes for one in self._waiting.values())
        assert len(self._waiting) <= REQUESTS_MAX
        assert self._size_bytes <= BYTES_MAX or len(self._waiting) == 1
        assert all(self._waiting[key].complete for key in self._complete)
        assert len(self._complete) == sum(one.complete for one in self._waiting.values())

    def _arrived(self, event: InputArrived, now: float) -> list[Effect]:
        key = (event.stage, event.request)
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = _Waiting(
                now, event.places, event.samples, event.together_max, event.where,
                event.session, {},
            )  # fmt: skip
            self._waiting[key] = waiting
        elif event.place in waiting.tensors or waiting.samples != event.samples:
            return []  # a copy, or of another request of that name: the first counts
        waiting.tensors[event.place] = event.tensor
        waiting.size_bytes += event.size_bytes
        self._size_bytes += event.size_bytes
        if waiting.complete:
            self._complete[key] = None
        return self._give_way()

    def _give_way(self) -> list[Effect]:
        """The oldest go, those that lack an input before those that lack nothing."""
        effects: list[Effect] = []
        while len(self._waiting) > REQUESTS_MAX or (
            self._size_bytes > BYTES_MAX and len(self._waiting) > 1
        ):
            keys = (key for key in self._waiting if key not in self._complete)
            effects.append(
                self._give_up(next(keys, next(iter(self._waiting))), "this host has too many")
            )
        return effects

    def _expired(self, now: float) -> list[Effect]:
        late = [key for key, one in self._waiting.items() if one.since + WAIT_MAX_S <= now]
        return [self._give_up(key, f"it has waited for {WAIT_MAX_S:g} s") for key in late]

    def _give_up(self, key: tuple[Hashable, bytes], reason: str) -> GiveUp:
        waiting = self._remove(key)
        return GiveUp(key[1], waiting.where, reason)

    def _next(self) -> Run:
        self._busy = True
        first = next(iter(self._complete))
        chosen, samples = [first], self._waiting[first].samples
        if not self._waiting[first].session:
            for key in self._complete:
                waiting = self._waiting[key]
                fits = samples + waiting.samples <= waiting.together_max
                if key != first and key[0] == first[0] and fits and not waiting.session:
                    chosen.append(key)
                    samples += waiting.samples
        return Run(first[0], tuple(self._part(key) for key in chosen))

    def _part(self, key: tuple[Hashable, bytes]) -> Part:
        waiting = self._remove(key)
        tensors = tuple(waiting.tensors[place] for place in range(waiting.places))
        return Part(key[1], waiting.samples, tensors, waiting.where, waiting.session)

    def _remove(self, key: tuple[Hashable, bytes]) -> _Waiting:
        waiting = self._waiting.pop(key)
        self._complete.pop(key, None)
        self._size_bytes -= waiting.size_bytes
        return waiting
