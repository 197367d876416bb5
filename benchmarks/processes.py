"""Processes that the benchmark starts, asks, stops, kills, weighs, and always ends.

Each is a session of its own, so that whatever it starts in turn (hivemind's p2pd)
is signalled and weighed with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_S = 60.0
_TICKS_A_S = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A process said nothing in time, or ended."""


class Process:
    """One of ours. Its stdin is ours: it ends by itself when we are gone."""

    def __init__(self, command: Sequence[str], directory: Path, log: Path) -> None:
        self.log = log
        self.spawned = time.perf_counter()
        with log.open("ab") as stderr:
            self._popen = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        assert self._popen.stdout is not None
        self._out = self._popen.stdout.fileno()
        self._read = b""

    def line(self, timeout_s: float = START_S) -> str:
        """Its next line on stdout."""
        until = time.perf_counter() + timeout_s
        while b"\n" not in self._read:
            left_s = max(0.0, until - time.perf_counter())
            if not select.select([self._out], [], [], left_s)[0]:
                raise Failed(f"nothing within {timeout_s:g} s; {self._last_words()}")
            data = os.read(self._out, 1 << 16)
            if not data:
                raise Failed(f"ended; {self._last_words()}")
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def say(self, **command: object) -> None:
        """Sends it a command."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps(command).encode() + b"\n")
            self._popen.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"ended; {self._last_words()}") from None

    def ask(self, do: str, timeout_s: float = START_S, **arguments: object) -> dict[str, Any]:
        """Sends it a command and waits for what came of it."""
        return self.tell(timeout_s, do=do, **arguments)

    def tell(self, timeout_s: float = START_S, **command: object) -> dict[str, Any]:
        """The same for one that has no verbs."""
        self.say(**command)
        answer: dict[str, Any] = json.loads(self.line(timeout_s))
        return answer

    def signal(self, number: signal.Signals) -> None:
        """Signals it and all that it started."""
        os.killpg(self._popen.pid, number)

    def pss_bytes(self) -> int:
        """Memory: its own pages, and its share of those that others map too."""
        total = 0
        for pid in self.pids():
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            total += next(int(x.split()[1]) for x in rollup.splitlines() if x[:4] == "Pss:") * 1024
        return total

    def cpu_s(self) -> float:
        """CPU time that it has used."""
        ticks = 0
        for pid in self.pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += int(fields[11]) + int(fields[12])  # utime, stime
        return ticks / _TICKS_A_S

    def end(self) -> None:
        """Ends it and all that it started, in whatever state they are."""
        try:
            self.signal(signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass

    def pids(self) -> list[int]:
        """The processes of its session."""
        pids = []
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and os.getpgid(int(entry)) == self._popen.pid:
                    pids.append(int(entry))
            except ProcessLookupError:
                continue
        return pids

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return f"its last words: {lines[-1]}" if lines else "it said nothing"


def cpu_s_of(processes: Iterable[Process]) -> float:
    """CPU time that they have used, all together."""
    return sum(process.cpu_s() for process in processes)


class Processes:
    """Ends all that were started in the block, whatever happens in it."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._all: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._all:
            process.end()

    def start(self, command: Sequence[str], directory: Path) -> Process:
        """Starts one."""
        log = self._logs / f"{len(self._all)}.log"
        self._all.append(Process(command, directory, log))
        return self._all[-1]
