"""Cuts: the states of all VNodes after one step, stored first, committed then. Pure.

What is stored on hosts is a candidate; it counts when the log names it (DESIGN D6).
The log may be slow, or have no majority for a while: then the newest stored cut
waits for it, in place of any older one, and training goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pnet.log.entry import HOLDERS_MAX
from p2pnet.orchestrator.hosts import by_host
from p2pnet.orchestrator.ledger import Decide
from p2pnet.orchestrator.messages import Stored
from p2pnet.v1 import common_pb2

DIGEST_BYTES = 32

States = Mapping[str, common_pb2.BlobRef]


@dataclass(frozen=True, slots=True)
class StoredCut:
    """A cut that is ready to be committed. `result`: of its step, None where it has none."""

    epoch: int
    step: int
    states: States
    result: Decide | None


@dataclass(slots=True)
class _Storing:
    epoch: int
    step: int
    result: Decide | None
    waiting: dict[str, tuple[str, ...]]  # hosts, and what each is to store
    states: dict[str, common_pb2.BlobRef] = field(default_factory=dict)


class Cuts:
    """At most one cut is being stored and at most one waits for the log."""

    def __init__(self) -> None:
        self.stored: StoredCut | None = None
        self._storing: _Storing | None = None
        self._holders: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        """Of the cut that is being stored."""
        return None if self._storing is None else self._storing.step

    @property
    def busy(self) -> bool:
        """Whether something is on its way into the log."""
        return self._storing is not None or self.stored is not None

    def begin(
        self, placement: Mapping[str, str], epoch: int, step: int, result: Decide | None
    ) -> dict[str, tuple[str, ...]]:
        """Starts a cut; returns what each host is to store."""
        waiting = by_host(placement)
        self._storing = _Storing(epoch, step, result, dict(waiting))
        return waiting

    def take(self, event: Stored) -> StoredCut | None:
        """A host has stored its part; the cut, if that was the last.

        Raises ValueError: it says that it has stored what it was not asked for, or what
        no commit can name.
        """
        cut = self._storing
        if cut is None or (event.epoch, event.step) != (cut.epoch, cut.step):
            return None
        wanted = cut.waiting.get(event.host)
        if wanted is None:
            return None
        if tuple(sorted(event.states)) != wanted:
            raise ValueError("it stored other VNodes than it was asked to")
        for ref in event.states.values():
            if len(ref.digest) != DIGEST_BYTES or len(ref.holders) > HOLDERS_MAX:
                raise ValueError("it names a state that cannot be")
        del cut.waiting[event.host]
        cut.states.update(event.states)
        if cut.waiting:
            return None
        self._storing = None
        self.stored = StoredCut(cut.epoch, cut.step, dict(sorted(cut.states.items())), cut.result)
        return self.stored

    def is_for(self, epoch: int, step: int) -> bool:
        """Whether that is the cut that is being stored."""
        cut = self._storing
        return cut is not None and (cut.epoch, cut.step) == (epoch, step)

    def forget_storing(self) -> None:
        """The cut that is being stored will not be."""
        self._storing = None

    def forget_stored(self) -> None:
        """The cut that waited is in the log, or cannot be any more."""
        self.stored = None

    def to_retain(self, before: States, after: States) -> tuple[tuple[str, ...], tuple[bytes, ...]]:
        """(whom to tell, what is still named) after a commit took the place of `before`.

        Holders of the cut before these are told, too: nothing of theirs is named any more.
        """
        refs = [*before.values(), *after.values()]
        if self.stored is not None:  # not named yet, and about to be
            refs += self.stored.states.values()
        holders = tuple(sorted({holder for ref in refs for holder in ref.holders}))
        told = tuple(sorted({*holders, *self._holders}))
        self._holders = holders
        return told, tuple(sorted({ref.digest for ref in refs}))
