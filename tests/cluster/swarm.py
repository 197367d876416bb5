"""A swarm of real processes on loopback, for tests: started, asked, killed and always ended."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import p2pnet
from p2pnet.client.session import Session
from p2pnet.errors import P2PNetError
from p2pnet.v1 import control_pb2

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
COMMAND = (sys.executable, "-m", "p2pnet")
START_S = 60.0  # deadlines that only a bug meets, on a busy machine too
STOP_S = 30.0
CLI_S = 90.0
_POLL_S = 0.05

Figure = Callable[[str], None]  # the fixture `figure`: shows what was measured


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition`, which is polled; fails after `timeout_s`.

    For what tells nobody that it has changed, such as another process's view.
    """
    deadline = time.monotonic() + timeout_s
    never = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        never.wait(_POLL_S)
    return value


def environment(home: Path, **more: str) -> dict[str, str]:
    """What our processes see: a home of their own, and nothing of the user's p2pnet."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("P2PNET_")}
    return {**ours, "HOME": str(home), "PYTHONUNBUFFERED": "1", **more}


@dataclass(frozen=True)
class Result:
    """A command that has ended."""

    rc: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON value."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """Standard output as one JSON value a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    def sentence(self) -> str:
        """What a failed command said: one sentence on stderr and nothing else."""
        assert self.rc == 1, self
        assert self.out == "", self
        lines = self.err.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("p2pnet: "), self
        assert "Traceback" not in lines[0], self
        assert "something went wrong that should not" not in lines[0], self
        return lines[0]


def run(command: Sequence[str], env: Mapping[str, str], timeout_s: float = CLI_S) -> Result:
    """Runs a command to its end."""
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


class Process:
    """A command that runs until it is told to stop. Its stdin is ours: it ends when we do."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.command = " ".join(command)
        self.log = log
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._seen: list[str] = []
        with log.open("ab") as stderr:
            self.popen = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process."""
        return self.popen.pid

    @property
    def err(self) -> str:
        """What it wrote on stderr up to now."""
        return self.log.read_text()

    def next_line(self, timeout_s: float = START_S) -> str | None:
        """Its next line on stdout; None when it has closed it."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"nothing within {timeout_s:g} s: {self.describe()}") from None
        if line is None:
            self._lines.put(None)
        return line

    def next_event(self, name: str, timeout_s: float = START_S) -> dict[str, Any]:
        """Its next line, which has to be that event."""
        line = self.next_line(timeout_s)
        assert line is not None, f"ended before {name!r}: {self.describe()}"
        event: dict[str, Any] = json.loads(line)
        assert event.get("event") == name, self.describe()
        return event

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.popen.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Its exit code."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.describe()}") from None

    def end(self) -> None:
        """Ends it, whatever state it is in."""
        if self.popen.poll() is None:
            self.popen.kill()  # also where it is stopped
        self.popen.wait(STOP_S)
        self._reader.join(STOP_S)
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()

    def describe(self) -> str:
        """All that it said."""
        return (
            f"{self.command}\n  exit code {self.popen.poll()}\n"
            f"--- stdout\n{''.join(self._seen)}--- stderr\n{self.err}"
        )

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._seen.append(line.decode())
            self._lines.put(line.decode())
        self._lines.put(None)


@dataclass
class Node:
    """A PNode that is up."""

    process: Process
    data_dir: Path
    ready: dict[str, Any]
    ready_after_s: float
    _client: p2pnet.Client | None = None
    _events: list[Events] = field(default_factory=list)

    @property
    def peer_id(self) -> str:
        """As it said when it was ready."""
        return str(self.ready["peer_id"])

    @property
    def addr(self) -> str:
        """A multiaddr to start from."""
        return str(self.ready["addrs"][0])

    @property
    def client(self) -> p2pnet.Client:
        """A client through this node, in our own process."""
        if self._client is None:
            self._client = p2pnet.Client(data_dir=self.data_dir)
        return self._client

    def alive(self) -> list[str]:
        """Who this node thinks is alive."""
        return [row["peer_id"] for row in self.client.members() if row["state"] == "alive"]

    def stop_at(self, point: str, vnode: str, step: int = 0) -> int:
        """Returns when a VNode on this node has stopped at the point, with the step."""
        request = control_pb2.BreakRequest(point=point, vnode=vnode, step=step)
        call = self.client.session.control("Break", request, control_pb2.BreakReply, timeout_s=60)
        return int(self.client.run(call).step)

    def events(self) -> Events:
        """What happens in it from now on."""
        self._events.append(Events(self.client))
        return self._events[-1]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> float:
        """Signals it; returns when, on this process's monotonic clock."""
        at = time.monotonic()
        self.process.signal(number)
        if number == signal.SIGKILL:
            self.process.wait()
        return at

    def leave(self) -> None:
        """Has it leave in good order, and checks that it did."""
        request, reply = control_pb2.LeaveRequest(), control_pb2.LeaveReply
        self.client.run(self.client.session.control("Leave", request, reply))
        self.hang_up()
        self.process.next_event("left")
        assert self.process.wait() == 0, self.process.describe()

    def rss_bytes(self) -> int:
        """Its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def libraries(self) -> str:
        """What is mapped into it."""
        return Path(f"/proc/{self.process.pid}/maps").read_text()

    def end(self) -> None:
        """Ends it without a goodbye, and every connection to it."""
        self.hang_up()
        self.process.end()

    def hang_up(self) -> None:
        """Ends every connection to it."""
        if self._client is not None:
            self._client.close()
            self._client = None
        for events in self._events:
            events.join()


class Events:
    """The events of a node as they come, each with the time at which it came."""

    def __init__(self, client: p2pnet.Client) -> None:
        self._client = client
        self._queue: queue.Queue[tuple[float, dict[str, Any]]] = queue.Queue()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        self.next("following")

    def next(self, name: str, timeout_s: float = START_S) -> tuple[float, dict[str, Any]]:
        """The next event of that name; others before it are passed over."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                at, event = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no event {name!r} within {timeout_s:g} s") from None
            if event["event"] == name:
                return at, event

    def join(self) -> None:
        """Waits for the end, which comes when the client or the node is gone."""
        self._thread.join(STOP_S)

    def _follow(self) -> None:
        try:
            self._client.run(self._read(self._client.session), timeout_s=600)
        except P2PNetError:
            pass  # the node is gone, or the client

    async def _read(self, session: Session) -> None:
        async with session.control_stream("Events", control_pb2.EventReply, 600) as stream:
            await stream.write(control_pb2.EventsRequest(follow=True))
            await stream.done_writing()
            async for reply in stream:
                self._queue.put((time.monotonic(), json.loads(reply.json)))


class Swarm:
    """PNodes on loopback. Whatever happens in the block, its processes end with it.

    Args:
        directory: for data dirs, logs and the bootstrap file. Short: it holds sockets.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env = environment(directory)
        self.bootstrap = directory / "bootstrap.txt"
        self.nodes: list[Node] = []
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for node in self.nodes:
            node.end()
        for process in self._processes:
            process.end()
        if kind is not None:
            sys.stdout.write(self.describe())

    def describe(self) -> str:
        """What every process said."""
        return "\n".join(process.describe() for process in self._processes)

    def grow(self, count: int, *options: str) -> list[Node]:
        """Starts nodes at once and waits until each sees all; the first one ever is bootstrap."""
        new: list[Node] = []
        if not self.nodes:
            new.append(self.join(*options))
            self.bootstrap.write_text(f"# the first peer\n{new[0].addr}\n")
        starting = [
            self.launch(self.directory / f"n{len(self.nodes) + i}", *options)
            for i in range(count - len(new))
        ]
        new += [self.up(*started) for started in starting]
        self.wait_until_all_see_all()
        return new

    def wait_until_all_see_all(self) -> None:
        """Until every node that has not been killed sees all the others, and only them."""
        up = [node for node in self.nodes if node.process.popen.poll() is None]
        everybody = sorted(node.peer_id for node in up)

        def agreed() -> bool:
            return all(sorted(node.alive()) == everybody for node in up)

        until(agreed, START_S, "every node sees every other")

    def join(self, *options: str, data_dir: Path | None = None) -> Node:
        """Starts one node and waits until it is ready."""
        return self.up(*self.launch(data_dir or self.directory / f"n{len(self.nodes)}", *options))

    def launch(self, data_dir: Path, *options: str) -> tuple[Process, Path, float]:
        """Starts `join` and does not wait."""
        command = ["join", "--data-dir", str(data_dir), "--until-eof", "--json"]
        if "--listen" not in options:
            command += ["--listen", LOOPBACK]
        if "--bootstrap" not in options and self.bootstrap.exists():
            command += ["--bootstrap", str(self.bootstrap)]
        if "--device" not in options:  # what is computed is compared with torch on the CPU
            command += ["--device", "cpu"]
        started = time.monotonic()
        return self.process(*command, *options), data_dir, started

    def process(self, *args: str) -> Process:
        """Starts `p2pnet ARGS`, and ends it at the latest when the swarm ends."""
        return self.start([*COMMAND, *args])

    def start(self, command: Sequence[str]) -> Process:
        """Starts a command, and ends it at the latest when the swarm ends."""
        log = self.directory / f"process{len(self._processes)}.log"
        process = Process(command, self.env, log)
        self._processes.append(process)
        return process

    def cli(self, *args: str, node: Node | None = None) -> Result:
        """Runs `p2pnet ARGS` to its end, against a node where one is given."""
        through = [] if node is None else ["--data-dir", str(node.data_dir)]
        return run([*COMMAND, *args, *through], self.env)

    def up(self, process: Process, data_dir: Path, started: float) -> Node:
        """Waits until a node that was launched is ready."""
        ready = process.next_event("ready")
        node = Node(process, data_dir, ready, time.monotonic() - started)
        self.nodes.append(node)
        return node
