"""Bad links in userspace: a TCP proxy that delays, stalls, throttles, cuts off. Runs on trio.

TCP hides loss from what runs over it: a lost segment is a stall, for a retransmission
time-out and twice as long each time it is lost again (RFC 6298), and all that follows
waits behind it. So that is what loss is here, drawn per segment from a seed.

`python tests/fault_proxy.py COUNT` opens so many in a process of its own, which is driven
over its pipes (`serve`).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Self

import trio

SEGMENT_BYTES = 1400
RTO_S_MIN = 0.2  # Linux's least retransmission time-out, on top of the round trip
RTO_S_MAX = 8.0
_READ_BYTES = 64 * 1024
_WINDOW = 256  # chunks on their way, one way of a connection; then the sender has to wait


@dataclass(frozen=True)
class Quality:
    """A link. Times in seconds, one way; `loss` per segment; bytes a second.

    A burst is a time of `burst_s` on average, one each `burst_every_s` on average, in
    which every segment is lost.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    burst_s: float = 0.0
    burst_every_s: float = math.inf
    bytes_per_s: float = math.inf


PERFECT = Quality()


class Proxy:
    """Listens on loopback and passes what comes on to a target, over a link of a quality.

    `quality` may be changed at any time, `cut` too: while it is set, nothing passes in
    either direction and every connection stays open (a half-open link).
    """

    def __init__(self, nursery: trio.Nursery, rng: Random, quality: Quality = PERFECT) -> None:
        self.quality = quality
        self.cut = False
        self.stalls = 0
        self.bytes = 0
        self.addr = ""
        self._nursery = nursery
        self._rng = rng
        self._target = 0
        self._bursts = _Bursts(rng)
        self._listeners: list[trio.SocketListener] = []

    async def open(self) -> Self:
        """Begins to listen; `addr` is then its multiaddr."""
        self._listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = self._listeners[0].socket.getsockname()[1]
        self.addr = f"/ip4/127.0.0.1/tcp/{port}"
        self._nursery.start_soon(trio.serve_listeners, self._serve, self._listeners)
        return self

    def to(self, port: int) -> None:
        """Where connections lead from now on."""
        self._target = port

    async def _serve(self, near: trio.SocketStream) -> None:
        try:
            far = await trio.open_tcp_stream("127.0.0.1", self._target)
        except OSError:
            return
        # The three-way handshake over the link, which the kernel has done without it.
        open_at = trio.current_time() + 2 * self._passage_s(64)
        async with far, trio.open_nursery() as nursery:
            hang_up = nursery.cancel_scope.cancel
            nursery.start_soon(self._pump, near, far, open_at, hang_up)
            nursery.start_soon(self._pump, far, near, open_at, hang_up)

    async def _pump(
        self,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        open_at: float,
        hang_up: Callable[[], None],
    ) -> None:
        """One way of a connection. Where it is reset at one end, so it is at the other."""
        send, receive = trio.open_memory_channel[tuple[float, bytes]](_WINDOW)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deliver, receive, sink)
                arrives = sent = open_at
                data = b"?"
                while data:
                    data = await source.receive_some(_READ_BYTES)
                    sent = max(sent, trio.current_time()) + len(data) / self.quality.bytes_per_s
                    # in order: what was sent later waits for what is late
                    arrives = max(arrives, sent + self._passage_s(len(data)))
                    await send.send((arrives, data))
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            hang_up()

    async def _deliver(
        self,
        receive: trio.MemoryReceiveChannel[tuple[float, bytes]],
        sink: trio.SocketStream,
    ) -> None:
        async for at, data in receive:
            await trio.sleep_until(at)
            if self.cut:
                await trio.sleep_forever()  # for good: what was swallowed would be missing
            self.bytes += len(data)
            if not data:
                await sink.send_eof()
                return
            await sink.send_all(data)

    def _passage_s(self, size: int) -> float:
        """How long so many bytes, sent now, are under way: as long as the unluckiest segment."""
        quality, now = self.quality, trio.current_time()
        stall_s = 0.0
        for _ in range(max(1, math.ceil(size / SEGMENT_BYTES))):
            waited_s, rto_s = 0.0, RTO_S_MIN + 2 * quality.delay_s
            while self._rng.random() < quality.loss or self._bursts.lose(quality, now + waited_s):
                waited_s += rto_s
                rto_s = min(2 * rto_s, RTO_S_MAX)
                self.stalls += 1
            stall_s = max(stall_s, waited_s)
        return quality.delay_s + self._rng.uniform(0.0, quality.jitter_s) + stall_s


class _Bursts:
    """When a link loses everything: as long as drawn, as often as drawn (Gilbert 1960)."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._times: list[tuple[float, float]] = []
        self._until = -math.inf  # the end of the last burst drawn

    def lose(self, quality: Quality, at: float) -> bool:
        if not math.isfinite(quality.burst_every_s):
            return False
        # After a long silence the drawing goes on from not too long ago.
        self._until = max(self._until, at - 10 * (quality.burst_every_s + quality.burst_s))
        while self._until <= at:
            begin = self._until + self._rng.expovariate(1 / quality.burst_every_s)
            self._until = begin + self._rng.expovariate(1 / quality.burst_s)
            self._times.append((begin, self._until))
        del self._times[:-8]
        return any(begin <= at < end for begin, end in self._times)


async def serve(count: int, lines: Callable[[], str], say: Callable[[str], None]) -> None:
    """Opens `count` proxies, says their ports, and does what it is told until the lines end.

    A line is JSON with one or both of: `to`, the port that each leads to, by number;
    `delay_s`, of all of them, one way. Each is answered by an empty object.
    """
    async with trio.open_nursery() as nursery:
        proxies = [await Proxy(nursery, Random(number)).open() for number in range(count)]
        say(json.dumps({"ports": [int(proxy.addr.rpartition("/")[2]) for proxy in proxies]}))
        while line := await trio.to_thread.run_sync(lines, abandon_on_cancel=True):
            command = json.loads(line)
            for number, port in command.get("to", {}).items():
                proxies[int(number)].to(port)
            if "delay_s" in command:
                for proxy in proxies:
                    proxy.quality = Quality(delay_s=command["delay_s"])
            say("{}")
        nursery.cancel_scope.cancel()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    trio.run(serve, int(sys.argv[1]), sys.stdin.readline, _say)
