"""A shell: what a node remembers from one run to the next, in its data dir.

Members, as their own signed adverts, and what the DHT's other peers left here. All of
it is only hints: of a file that is damaged, or a disk that is full, one sentence is
said, and the node goes on without.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from p2pnet import clock
from p2pnet.datadir import read_whole, write_whole
from p2pnet.dht import snapshot
from p2pnet.dht.shell import Dht
from p2pnet.errors import LocalError, ResourceError
from p2pnet.gossip import known
from p2pnet.gossip.events import MemberChanged
from p2pnet.gossip.known import Known
from p2pnet.gossip.shell import Gossip
from p2pnet.gossip.statements import OpenAdvert

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # libp2p installs trio-stubs, which hides trio's own

# A node that has just started learns much at once: it writes soon, then more rarely.
SAVE_EVERY_S_MIN = 2.0
SAVE_EVERY_S = 30.0
QUIET_S = 1.0  # so that what belongs together is written together
# A full store that is written every 30 s would wear out a flash disk.
SAVED_BYTES_PER_S_MAX = 128 << 10
PEERS_EVERY_S = 3600.0  # at least so often, to say that they are still here
RESTORED_AT_ONCE = 512
_CHOSEN_FROM_MAX = 4096

logger = logging.getLogger(__name__)


class _Pace:
    """When to write what has changed."""

    def __init__(self, now: float) -> None:
        self.pause_s = SAVE_EVERY_S_MIN
        self._written = 0
        self._written_at = now
        self._seen = 0
        self._seen_at = now
        self._first_at: float | None = None  # since when something is not written

    def due(self, changes: int, now: float) -> bool:
        """Whether it is time, after so many changes in all."""
        if changes != self._seen:
            self._seen, self._seen_at = changes, now
        if changes == self._written:
            return False
        if self._first_at is None:
            self._first_at = now
        quiet = now >= self._seen_at + QUIET_S or now >= self._first_at + self.pause_s
        return quiet and now >= self._written_at + self.pause_s

    def written(self, changes: int, now: float, size_bytes: int, *, done: bool) -> None:
        """It was tried to write it as it was after so many changes."""
        self._written_at = now
        self._first_at = None
        pause_s = min(2 * self.pause_s, SAVE_EVERY_S)
        self.pause_s = max(pause_s, size_bytes / SAVED_BYTES_PER_S_MAX)
        if done:
            self._written = changes

    def is_written(self, changes: int) -> bool:
        """Whether nothing has changed since."""
        return changes == self._written


class Remembered:
    """One node's, in a directory that only it writes to."""

    def __init__(
        self,
        directory: Path,
        peer_id: str,
        gossip: Gossip,
        dht: Dht,
        *,
        rng: random.Random,
        now: Callable[[], float] = clock.now,
        wall_ms: Callable[[], int] = clock.wall_ms,
    ) -> None:
        self._peers_file = directory / "peers"
        self._records_file = directory / "records"
        self._peer_id = peer_id
        self._gossip = gossip
        self._dht = dht
        self._rng = rng
        self._now = now
        self._wall_ms = wall_ms
        self._restored = trio.Event()
        self._records = _Pace(now())
        self._peers = _Pace(now())
        self._adverts: list[OpenAdvert] = []  # as they were written
        self._adverts_at = now() - PEERS_EVERY_S
        self._member_changes = 0
        gossip.watch(self._member_changed)
        self._said: dict[Path, str] = {}

    # At the start

    async def members(self) -> list[Known]:
        """The members from before, best first."""
        try:
            data = await trio.to_thread.run_sync(read_whole, self._peers_file, known.FILE_BYTES_MAX)
            if data is None:
                return []
            found, dropped = await trio.to_thread.run_sync(known.parse, data)
        except LocalError as error:
            self._say(
                self._peers_file, f"{self._peers_file}: members from before are forgotten: {error}"
            )
            return []
        if dropped:
            self._say(self._peers_file, f"{self._peers_file}: {dropped} adverts do not hold")
        return found

    async def restore(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Gives the DHT back what it held; `started()` when it has the records nearest to us.

        To verify a record takes about a millisecond, and there may be many thousands.
        """
        dropped: Counter[str] = Counter()
        records = 0
        try:
            parts = await trio.to_thread.run_sync(self._parts)
            while (part := await trio.to_thread.run_sync(next, parts, None)) is not None:
                self._dht.restore(part)
                records += len(part.records)
                dropped += part.dropped
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
        except LocalError as error:
            self._say(
                self._records_file, f"{self._records_file}: what others left here is lost: {error}"
            )
        if records or dropped:
            left_out = ", ".join(f"{count} x {what}" for what, count in dropped.items())
            logger.info("%d records are back; left out: %s", records, left_out or "nothing")
        self._restored.set()
        task_status.started()

    def _parts(self) -> Iterator[snapshot.Held]:
        data = read_whole(self._records_file, snapshot.FILE_BYTES_MAX)
        if data is None:
            return iter(())
        return snapshot.parse(data, self._wall_ms, records_at_once=RESTORED_AT_ONCE)

    # From then on

    async def keep(self) -> None:
        """Writes what has changed now and then, until cancelled."""
        while True:
            await trio.sleep(QUIET_S)
            now = self._now()
            if now >= self._adverts_at + PEERS_EVERY_S:
                self._member_changes += 1
            if self._peers.due(self._member_changes, now):
                await self._save_members()
            if self._records.due(self._dht.changes, now):
                await self._save_records()

    async def save(self) -> None:
        """Writes what has changed."""
        await self._save_members()
        if not self._records.is_written(self._dht.changes):
            await self._save_records()

    def _member_changed(self, change: MemberChanged) -> None:
        self._member_changes += change.peer_id != self._peer_id

    async def _save_members(self) -> None:
        members, changes, now = self._gossip.members(), self._member_changes, self._now()
        if len(members) > _CHOSEN_FROM_MAX:
            members = self._rng.sample(members, _CHOSEN_FROM_MAX)
        chosen = known.choose(members, self._peer_id, now, self._wall_ms())
        adverts = [peer.advert for peer in chosen]
        data, done = b"", True
        # Nobody is no news: there may be nobody just now.
        if chosen and (adverts != self._adverts or now >= self._adverts_at + PEERS_EVERY_S):
            data = known.serialise(chosen)
            done = await self._write(self._peers_file, data)
            if done:
                self._adverts = adverts
        self._adverts_at = now
        self._peers.written(changes, now, len(data), done=done)

    async def _save_records(self) -> None:
        if not self._restored.is_set():
            return
        held, changes, wall_ms = self._dht.held(), self._dht.changes, self._wall_ms()
        data = await trio.to_thread.run_sync(snapshot.serialise, held, wall_ms)
        done = await self._write(self._records_file, data)
        self._records.written(changes, self._now(), len(data), done=done)

    async def _write(self, file: Path, data: bytes) -> bool:
        try:
            await trio.to_thread.run_sync(write_whole, file, data)
        except ResourceError as error:
            self._say(file, f"{error}; the node goes on, and tries again")
            return False
        self._said.pop(file, None)
        return True

    def _say(self, file: Path, what: str) -> None:
        """Once, and not again before it was better."""
        if self._said.get(file) != what:
            self._said[file] = what
            logger.warning("%s", what)
