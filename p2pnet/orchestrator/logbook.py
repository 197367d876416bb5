"""Reads of the network's log and writes to it, at most one of each at a time. Pure.

A part of `Conductor`, which alone decides what an entry means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from p2pnet.errors import RemoteError
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.desk import Desk
from p2pnet.v1 import common_pb2, log_pb2

PATIENCE_S = 60.0


class Entry(Enum):
    """What is being appended."""

    CLAIM = auto()
    COMMIT = auto()
    CLOSING = auto()


@dataclass(frozen=True, slots=True)
class Written:
    """What an append came to.

    Attributes:
        what: it was to be; `ours`: the slot has it, and `void` says why it does not count.
        epoch: the log's before; `commit` and `states`: the last one's before.
    """

    what: Entry
    ours: bool
    void: str
    epoch: int
    commit: log_pb2.Commit | None
    states: dict[str, common_pb2.BlobRef]


class Logbook:
    """The log, as its orchestrator reads and writes it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._reading = False
        self._waits_since: float | None = None  # since when it takes nothing of ours
        self._appending: tuple[Entry, common_pb2.Signed] | None = None

    @property
    def writing(self) -> bool:
        """Whether an append is under way."""
        return self._appending is not None

    def holds(self, now: float) -> bool:
        """Whether the log takes what we write, or has not failed to for long."""
        return self._waits_since is None or now < self._waits_since + PATIENCE_S

    def read(self) -> None:
        """Has what is new read."""
        if not self._reading:
            self._reading = True
            self._desk.out.append(m.ReadLog(self._desk.history.next_slot))

    def was_read(self, entries: Sequence[common_pb2.Signed]) -> str:
        """Takes what was read, where no append is to tell; why that is no log, or ""."""
        self._reading = False
        self._waits_since = None
        if self._appending is None:
            try:
                self._desk.history.extend(entries)
            except RemoteError as error:
                return str(error)
        return ""

    def was_silent(self) -> None:
        """Nothing could be read."""
        self._reading = False

    def waits(self) -> None:
        """It takes nothing at present."""
        if self._waits_since is None:
            self._waits_since = self._desk.now

    def append(self, what: Entry, entry: common_pb2.Signed) -> None:
        """Has an entry written into the next slot."""
        self._appending = what, entry
        self._desk.out.append(m.Append(entry))

    def was_appended(self, winner: common_pb2.Signed) -> Written | str | None:
        """Takes what the slot has. Text: why that is no entry; None: nobody waits for it."""
        if self._appending is None:
            return None
        what, sent = self._appending
        history, states = self._desk.history, dict(self._desk.states)
        epoch, commit = history.epoch, history.commit
        try:
            void = history.add(winner)
        except RemoteError as error:
            return str(error)
        self._appending = self._waits_since = None
        return Written(what, winner.payload == sent.payload, void, epoch, commit, states)

    def was_not_appended(self) -> Entry | None:
        """It may be in the log or not: what was to be."""
        what = None if self._appending is None else self._appending[0]
        self._appending = None
        if what is Entry.CLOSING:
            self._waits_since = None  # and nothing else waits
        else:
            self.waits()
        return what

    def forget(self) -> None:
        """No answer matters any more."""
        self._appending = None
