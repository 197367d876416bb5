"""What happens in a node: kept for a while, on disk for longer, told to whoever follows.

An event is a JSON object: `event` (its name), `at` (its hybrid logical timestamp, see
`p2pnet.hlc`), `wall_ms` (this node's clock, since 1970) and what it is about. The names
stand in docs/events.md.
"""

from __future__ import annotations

import asyncio
import json
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from p2pnet.causality import Causality
from p2pnet.errors import MalformedError
from p2pnet.event_file import EventFile, read_lines
from p2pnet.hlc import Timestamp, parse_timestamp

FOLLOWERS_MAX = 16
KEPT_MAX = 10_000
FREQUENT_KEPT_MAX = 2_000
EVENT_BYTES_MAX = 16 << 10
# One or more a step: they must neither fill the disk nor push out what is rare.
FREQUENT = frozenset({"decided", "located"})
_dump = json.JSONEncoder(default=str).encode
_WAITING_MAX = 10_000  # a follower that is so far behind misses events


@dataclass(frozen=True, slots=True)
class Kept:
    """An event as one line of JSON. `network` and `network_id` are "" where it is of none."""

    at: Timestamp
    line: str
    network: str = ""
    network_id: str = ""


class EventBus:
    """Stamps every event, keeps the last ones and hands each to every follower.

    `emit` may be called on any thread; followers live on the loop that `bind` names.

    Args:
        path: of the file that keeps events over restarts; without, there is none.
    """

    def __init__(self, path: Path | None = None, causality: Causality | None = None) -> None:
        self.causality = causality or Causality()
        self.causality.on_apart = self._note_apart
        self._loop: asyncio.AbstractEventLoop | None = None
        self._followers: list[asyncio.Queue[Kept]] = []
        self._lock = threading.Lock()
        self._kept: deque[Kept] = deque(maxlen=KEPT_MAX)
        self._frequent: deque[Kept] = deque(maxlen=FREQUENT_KEPT_MAX)
        self._file: EventFile | None = None
        if path is not None:
            self._recall(path)
            self._file = EventFile(path)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Followers live on this loop."""
        self._loop = loop

    def close(self) -> None:
        """Has what is not yet on disk written. Events go on to be kept in memory."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def emit(self, event: str, **fields: Any) -> None:
        """Something has happened; `fields` are what JSON can say of it."""
        with self._lock:  # events stand in the order of their timestamps
            kept = self._stamped(event, fields)
            frequent = event in FREQUENT
            (self._frequent if frequent else self._kept).append(kept)
            if self._file is not None and not frequent:
                self._file.append(kept.line)
            if self._followers and self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver, kept)

    def marker(self, event: str) -> str:
        """An event of now that is told to nobody but the caller."""
        with self._lock:
            return self._stamped(event, {}).line

    def kept(self, since: str = "", network: str = "") -> list[Kept]:
        """What is kept, in order: after a timestamp, of a network by its name or id.

        Raises:
            MalformedError: `since` is no timestamp.
        """
        after = parse_timestamp(since) if since else Timestamp(0, 0)
        with self._lock:
            found = [*self._kept, *self._frequent]
        if network:
            found = [k for k in found if k.network_id == network or k.network == network]
        found.sort(key=attrgetter("at"))  # two runs in order each: little to do
        return found[bisect_right(found, after, key=attrgetter("at")) :]

    async def follow(self, since: str | None = None) -> AsyncIterator[str]:
        """Events from now on; with `since`, first what is kept after it ("": all).

        Between the two, and at once without `since`, stands the event `following`.
        Who finds FOLLOWERS_MAX others there gets only what is kept.

        Raises:
            MalformedError: `since` is no timestamp.
        """
        before = [] if since is None else self.kept(since)
        if len(self._followers) >= FOLLOWERS_MAX:
            for kept in before:
                yield kept.line
            return
        queue: asyncio.Queue[Kept] = asyncio.Queue(maxsize=_WAITING_MAX)
        self._followers.append(queue)
        try:
            with self._lock:  # what is emitted from here on comes through the queue
                here = self._stamped("following", {})
            if since is not None:
                before = [kept for kept in self.kept(since) if kept.at < here.at]
            for kept in (*before, here):
                yield kept.line
            while True:
                kept = await queue.get()
                if kept.at > here.at:
                    yield kept.line
        finally:
            self._followers.remove(queue)

    def _stamped(self, event: str, fields: dict[str, Any]) -> Kept:
        at, wall_ms = self.causality.stamp()
        stamped = {"event": event, "at": str(at), "wall_ms": wall_ms, **fields}
        line = _dump(stamped)
        if len(line) > EVENT_BYTES_MAX:
            line = _dump(_shortened(stamped))
        return Kept(at, line, str(fields.get("network", "")), str(fields.get("network_id", "")))

    def _deliver(self, kept: Kept) -> None:
        for queue in self._followers:
            if not queue.full():
                queue.put_nowait(kept)

    def _recall(self, path: Path) -> None:
        """Takes up what an earlier run of this node kept, and its clock from there."""
        self._kept.extend(sorted(_parsed(read_lines(path)), key=attrgetter("at")))
        if self._kept and not self.causality.follow(self._kept[-1].at):
            self.emit("clock_went_back", before=str(self._kept[-1].at))

    def _note_apart(self, peer_id: str, ahead_s: float) -> None:
        self.emit("clock_apart", peer=peer_id, ahead_s=round(ahead_s, 3))


def _parsed(lines: Sequence[str]) -> list[Kept]:
    """Lines that are events; a crash or a full disk may have left others."""
    found = []
    for line in lines[-KEPT_MAX:]:
        try:
            event = json.loads(line)
            at = parse_timestamp(event["at"])
        except (ValueError, KeyError, TypeError, RecursionError, MalformedError):
            continue
        network, network_id = event.get("network", ""), event.get("network_id", "")
        found.append(Kept(at, line, str(network), str(network_id)))
    return found


def _shortened(stamped: dict[str, Any]) -> dict[str, Any]:
    """The same without what is long: a placement of thousands, say. `omitted` has the counts."""
    short = {
        name: value if not isinstance(value, str) else value[:1000]
        for name, value in stamped.items()
        if not isinstance(value, (list, tuple, dict))
    }
    omitted = {name: len(value) for name, value in stamped.items() if name not in short}
    return {**short, "omitted": omitted}
