"""A shell: a node's events on its disk, bounded, and written without holding anybody up.

`events.jsonl` has a JSON object a line; when it is full it becomes `events.jsonl.1`,
in the place of the one before. A thread writes, since a disk may take its time. What
cannot be written is not kept: that costs the file, and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

FILE_BYTES_MAX = 2 << 20  # of each of the two
_WAITING_MAX = 10_000  # lines; more are lost
_CLOSE_S = 2.0  # for a disk that does not take the last lines


class EventFile:
    """The events of a node, over its restarts. `append` may be called from any thread."""

    def __init__(self, path: Path, bytes_max: int = FILE_BYTES_MAX) -> None:
        self._path = path
        self._old = path.with_name(path.name + ".1")
        self._bytes_max = bytes_max
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING_MAX)
        self._troubled = False
        self._thread = threading.Thread(target=self._write_all, name="p2pnet-events", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        """Has a line written, some time soon."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    def close(self) -> None:
        """Writes what is left; waits a little for that."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_CLOSE_S)
        self._thread.join(_CLOSE_S)

    def _write_all(self) -> None:
        torn = True  # what the process before us left may end in half a line
        while (line := self._lines.get()) is not None:
            try:
                torn = self._write(line, torn)
            except OSError as error:
                torn = True
                if not self._troubled:
                    self._troubled = True
                    logger.warning(
                        "what happens here is not kept in %s for now (%s); the node goes on",
                        self._path,
                        error.strerror,
                    )

    def _write(self, line: str, torn: bool) -> bool:
        data = line.encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            if size + len(data) > self._bytes_max:
                os.replace(self._path, self._old)
                return self._write(line, False) if size else True
            if torn and size:
                data = b"\n" + data
            if file.write(data) != len(data):
                raise OSError(0, "the disk is full")
        return False


def read_lines(path: Path, bytes_max: int = FILE_BYTES_MAX) -> list[str]:
    """What was kept, oldest first; what cannot be read is not there."""
    lines: list[str] = []
    for file in (path.with_name(path.name + ".1"), path):
        try:
            with file.open("rb") as opened:
                data = opened.read(bytes_max)
        except OSError:
            continue
        lines += data.decode(errors="replace").splitlines()
    return lines
