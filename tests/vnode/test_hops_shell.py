"""Hops over real gRPC with TLS: one stream to a host, whatever happens on it."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from p2pnet.causality import Causality
from p2pnet.errors import (
    CancelledByUs,
    MalformedError,
    RefusedError,
    RemoteError,
    ResourceError,
    UnreachableError,
)
from p2pnet.keys import KeyPair, sha256
from p2pnet.net.dialer import PeerContact, TcpDialer
from p2pnet.net.handlers import Caller, Method, RawRequests
from p2pnet.net.hop_frames import Buffer, Request, first_frame
from p2pnet.net.rpc_server import RpcServer
from p2pnet.net.tls import make_certificate
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode import hops_server_shell, hops_shell
from p2pnet.vnode.alarm_shell import Alarm
from p2pnet.vnode.hops import Asker
from p2pnet.vnode.hops_answerer import Answerer
from p2pnet.vnode.hops_flow import EXCHANGES_MAX, PAYLOAD_BYTES_MAX, ROOM_BYTES_MAX, Room
from p2pnet.vnode.hops_server_shell import Handler, HopsServer
from p2pnet.vnode.hops_shell import UNSENT_BYTES_MAX, Hops

CERTIFICATE = make_certificate()
CALLER = KeyPair.from_seed(sha256(b"caller"))
LIMIT_S = 30.0

Answered = tuple[vnode_pb2.HopReply, Buffer | None]


async def echo(request: Request, payload: memoryview | None, caller: Caller) -> Answered:
    assert caller.peer_id in (CALLER.peer_id, "c")
    if isinstance(request, vnode_pb2.ForwardRequest):
        return vnode_pb2.HopReply(), payload
    return vnode_pb2.HopReply(), None


class Host:
    """A gRPC server with hops, which counts the streams that it has seen begin and end."""

    def __init__(self, method: Method) -> None:
        self.begun = 0
        self.ended = asyncio.Semaphore(0)
        self._run = method.run
        self.server = RpcServer(CERTIFICATE, causality=Causality(lambda: 5_000))
        self.server.add("VNode", {"Hops": Method(self._counted, False, method.timeout_s)})

    async def _counted(
        self, requests: RawRequests, caller: Caller, write: Callable[[bytes], Awaitable[None]]
    ) -> bytes | None:
        self.begun += 1
        try:
            return await self._run(requests, caller, write)
        finally:
            self.ended.release()


@asynccontextmanager
async def a_host(
    method: Method, causality: Causality | None = None
) -> AsyncIterator[tuple[Host, Hops, PeerContact, TcpDialer]]:
    host = Host(method)
    target = await host.server.start("127.0.0.1:0")
    dialer = TcpDialer(CALLER, causality=causality)
    hops = Hops(dialer)
    contact = PeerContact("host", (target,), CERTIFICATE.cert_der)
    try:
        async with asyncio.timeout(LIMIT_S):
            yield host, hops, contact, dialer
    finally:
        await hops.close()
        await dialer.close()
        await host.server.stop(0)


def serving(handler: Handler = echo, bytes_max: int = 1 << 26) -> HopsServer:
    return HopsServer(handler, lambda request: bytes_max)


def train(step: int = 1) -> vnode_pb2.TrainRequest:
    return vnode_pb2.TrainRequest(id=vnode_pb2.StepId(step=step), vnode="fc1")


FORWARD = vnode_pb2.ForwardRequest(vnode="fc1")


def test_many_hops_share_one_stream() -> None:
    async def main() -> None:
        async with a_host(serving().method) as (host, hops, contact, _):
            payloads = [os.urandom(size) for size in (0, 1, 1000, 600_000, 5_000_000) * 4]
            answers = await asyncio.gather(
                *(hops.hop(contact, FORWARD, payload, timeout_s=20) for payload in payloads)
            )
            assert [bytes(data or b"") for _, data in answers] == payloads
            reply, data = await hops.hop(contact, train(), None, timeout_s=5)
            assert (reply, data) == (vnode_pb2.HopReply(), None)
            assert host.begun == 1

    asyncio.run(main())


def test_a_small_hop_overtakes_a_large_one() -> None:
    came: list[int] = []

    async def note(request: Request, payload: memoryview | None, caller: Caller) -> Answered:
        came.append(0 if payload is None else len(payload))
        return vnode_pb2.HopReply(), None

    async def main() -> None:
        async with a_host(serving(note).method) as (_, hops, contact, _):
            await hops.hop(contact, train(), b"warm", timeout_s=5)
            large = asyncio.create_task(hops.hop(contact, train(), bytes(32 << 20), timeout_s=20))
            await asyncio.sleep(0)
            await hops.hop(contact, train(), b"small", timeout_s=5)
            await large
            assert came == [4, 5, 32 << 20]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "code", "detail"),
    [
        (MalformedError("no tensor"), common_pb2.REFUSAL_CODE_BAD_REQUEST, "no tensor"),
        (ResourceError("disk full"), common_pb2.REFUSAL_CODE_FAILED, "disk full"),
        (RefusedError("gone", code=3, epoch=7, host="h"), 3, "gone"),
        (KeyError("secret"), common_pb2.REFUSAL_CODE_FAILED, "the handler failed"),
    ],
)
def test_what_a_handler_raises_is_a_refusal(error: Exception, code: int, detail: str) -> None:
    async def fail(request: Request, payload: memoryview | None, caller: Caller) -> Answered:
        if isinstance(request, vnode_pb2.TrainRequest):
            raise error
        return vnode_pb2.HopReply(), None

    async def main() -> None:
        async with a_host(serving(fail).method) as (host, hops, contact, _):
            reply, _ = await hops.hop(contact, train(), b"x", timeout_s=5)
            assert reply.refusal.code == code
            assert detail in reply.refusal.detail
            assert "secret" not in reply.refusal.detail
            if isinstance(error, RefusedError):
                assert (reply.refusal.epoch, reply.refusal.host) == (7, "h")
            reply, _ = await hops.hop(contact, FORWARD, b"x", timeout_s=5)
            assert not reply.HasField("refusal")
            assert host.begun == 1

    asyncio.run(main())


def test_a_host_that_is_too_slow_says_so() -> None:
    async def never(request: Request, payload: memoryview | None, caller: Caller) -> Answered:
        assert caller.timeout_s < 0.5
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        async with a_host(serving(never).method) as (_, hops, contact, _):
            reply, _ = await hops.hop(contact, train(), b"x", timeout_s=0.5)
            assert reply.refusal.code == common_pb2.REFUSAL_CODE_BUSY

    asyncio.run(main())


def test_what_is_too_large_is_refused_with_both_sizes() -> None:
    async def main() -> None:
        async with a_host(serving(bytes_max=1000).method) as (host, hops, contact, _):
            reply, _ = await hops.hop(contact, train(), bytes(3 << 20), timeout_s=5)
            assert reply.refusal.code == common_pb2.REFUSAL_CODE_TOO_LARGE
            assert "3145728" in reply.refusal.detail
            assert "1000" in reply.refusal.detail
            reply, _ = await hops.hop(contact, train(), b"small", timeout_s=5)
            assert not reply.HasField("refusal")
            assert host.begun == 1

    asyncio.run(main())


def test_a_caller_that_gives_up_ends_the_work() -> None:
    async def main() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def work(request: Request, payload: memoryview | None, caller: Caller) -> Answered:
            if isinstance(request, vnode_pb2.ForwardRequest):
                return vnode_pb2.HopReply(), None
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            raise AssertionError

        async with a_host(serving(work).method) as (host, hops, contact, _):
            hop = asyncio.create_task(hops.hop(contact, train(), b"x", timeout_s=20))
            await begun.wait()
            hop.cancel()
            await ended.wait()
            await hops.hop(contact, FORWARD, None, timeout_s=5)
            assert host.begun == 1

    asyncio.run(main())


def test_a_stream_that_breaks_is_opened_anew() -> None:
    async def main() -> None:
        server = serving()
        async with a_host(server.method) as (host, hops, contact, _):
            await hops.hop(contact, train(), b"x", timeout_s=5)
            await server.close()
            await host.ended.acquire()
            for _ in range(100):  # until the caller has heard of it
                try:
                    await hops.hop(contact, train(), b"x", timeout_s=5)
                    break
                except RemoteError:
                    pass
            assert host.begun == 2

    asyncio.run(main())


def test_a_host_that_dies_is_unreachable() -> None:
    async def never(request: Request, payload: memoryview | None, caller: Caller) -> Answered:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    begun = asyncio.Event()

    async def main() -> None:
        async with a_host(serving(never).method) as (host, hops, contact, _):
            hop = asyncio.create_task(hops.hop(contact, train(), b"x", timeout_s=20))
            await begun.wait()
            await host.server.stop(0)
            with pytest.raises(RemoteError):
                await hop
            with pytest.raises(UnreachableError):
                await hops.hop(contact, train(), b"x", timeout_s=20)

    asyncio.run(main())


async def silent(
    requests: RawRequests, caller: Caller, write: Callable[[bytes], Awaitable[None]]
) -> None:
    await asyncio.Event().wait()


def test_a_silent_host_costs_a_bounded_time_and_no_memory() -> None:
    """It takes no frame: what is on its way to it stays under a bound, and the rest waits."""

    async def main() -> None:
        async with a_host(Method(silent, False, 60.0)) as (host, hops, contact, _):
            payload = bytes(16 << 20)
            hop = [hops.hop(contact, train(), payload, timeout_s=1.0) for _ in range(40)]
            tasks = [asyncio.create_task(one) for one in hop]
            unsent = 0
            while not all(task.done() for task in tasks):
                await asyncio.wait(tasks, timeout=0.05)
                for line in hops._lines.values():
                    unsent = max(unsent, line._core.outbox.unsent_bytes)
            assert all(isinstance(task.exception(), UnreachableError) for task in tasks)
            assert UNSENT_BYTES_MAX / 2 < unsent <= UNSENT_BYTES_MAX + len(payload)
            with pytest.raises(UnreachableError):  # on a new channel
                await hops.hop(contact, train(), None, timeout_s=0.2)
            assert host.begun == 2

    asyncio.run(main())


def test_a_host_that_breaks_the_rules_costs_its_stream() -> None:
    async def lie(
        requests: RawRequests, caller: Caller, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        async for _ in requests:
            await write(vnode_pb2.HopFrame(id=99, reply=vnode_pb2.HopReply()).SerializeToString())

    async def main() -> None:
        async with a_host(Method(lie, False, 60.0)) as (host, hops, contact, _):
            for streams in (1, 2):
                with pytest.raises(MalformedError, match="never sent"):
                    await hops.hop(contact, train(), b"x", timeout_s=5)
                assert host.begun == streams

    asyncio.run(main())


def test_a_caller_that_breaks_the_rules_costs_its_stream() -> None:
    async def main() -> None:
        async with a_host(serving().method) as (_, hops, contact, dialer):
            await hops.hop(contact, train(), b"x", timeout_s=5)
            async with dialer.stream(
                contact, "VNode/Hops", vnode_pb2.HopFrame, timeout_s=5
            ) as stream:
                await stream.write_raw(b"\xff" * 100)
                with pytest.raises(RefusedError, match="no frame of a hop"):
                    await stream.read()
            reply, _ = await hops.hop(contact, train(), b"x", timeout_s=5)
            assert not reply.HasField("refusal")

    asyncio.run(main())


def test_a_caller_has_so_many_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hops_server_shell, "STREAMS_MAX", 1)

    async def main() -> None:
        async with a_host(serving().method) as (_, hops, contact, dialer):
            await hops.hop(contact, train(), b"x", timeout_s=5)
            other = Hops(dialer)
            with pytest.raises(RefusedError, match="streams"):
                await other.hop(contact, train(), b"x", timeout_s=5)
            await other.close()

    asyncio.run(main())


def test_a_stream_that_is_idle_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hops_shell, "IDLE_S", 0.05)

    async def main() -> None:
        async with a_host(serving().method) as (host, hops, contact, _):
            await hops.hop(contact, train(), b"x", timeout_s=5)
            await host.ended.acquire()
            await hops.hop(contact, train(), b"x", timeout_s=5)
            assert host.begun == 2

    asyncio.run(main())


def test_an_idle_caller_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hops_server_shell, "IDLE_S", 0.05)

    async def main() -> None:
        async with a_host(serving().method) as (host, hops, contact, _):
            await hops.hop(contact, train(), b"x", timeout_s=5)
            await host.ended.acquire()
            assert not hops._closed

    asyncio.run(main())


def test_timestamps_go_along() -> None:
    async def main() -> None:
        here = Causality(lambda: 1_000)
        async with a_host(serving().method, here) as (_, hops, contact, _):
            await hops.hop(contact, train(), b"x", timeout_s=5)
            first = here.stamp()[0]
            assert first.wall_ms == 5_000  # the host's clock is ahead, and was heard
            await hops.hop(contact, train(), b"x", timeout_s=5)
            # Our stamp went there, and its own came back after it.
            assert here.stamp()[0].counter >= first.counter + 3

    asyncio.run(main())


def test_a_node_that_goes_ends_its_hops() -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def never(request: Request, payload: memoryview | None, caller: Caller) -> Answered:
            begun.set()
            await asyncio.Event().wait()
            raise AssertionError

        async with a_host(serving(never).method) as (_, hops, contact, _):
            hop = asyncio.create_task(hops.hop(contact, train(), b"x", timeout_s=20))
            await begun.wait()
            await hops.close()
            with pytest.raises(CancelledByUs):
                await hop
            with pytest.raises(CancelledByUs):
                await hops.hop(contact, train(), b"x", timeout_s=20)

    asyncio.run(main())


def test_what_is_larger_than_anything_is_not_even_sent() -> None:
    async def main() -> None:
        async with a_host(serving().method) as (host, hops, contact, _):
            with pytest.raises(ResourceError, match=str(PAYLOAD_BYTES_MAX)):
                await hops.hop(
                    contact, train(), memoryview(bytearray(PAYLOAD_BYTES_MAX + 1)), timeout_s=5
                )
            assert host.begun == 0

    asyncio.run(main())


def test_a_caller_that_reads_nothing_costs_a_host_bounded_memory() -> None:
    """It asks and asks, and takes no reply: the host stops reading what it asks."""
    handled: list[int] = []

    async def note(request: Request, payload: memoryview | None, caller: Caller) -> Answered:
        handled.append(1)
        return vnode_pb2.HopReply(), payload

    async def main() -> None:
        async with a_host(serving(note).method) as (_, _, contact, dialer):
            data = memoryview(bytes(1 << 20))
            async with dialer.stream(
                contact, "VNode/Hops", vnode_pb2.HopFrame, timeout_s=20
            ) as stream:
                sent = 0
                try:
                    async with asyncio.timeout(1.5) as patience:
                        for id in range(1, 400):
                            head = vnode_pb2.HopFrame(
                                id=id, forward=FORWARD, size_bytes=len(data), timeout_ms=20_000
                            )
                            await stream.write_raw(first_frame(head, data))
                            sent = id
                            patience.reschedule(asyncio.get_running_loop().time() + 1.5)
                except TimeoutError:
                    pass
                assert sent < 200
                assert len(handled) <= UNSENT_BYTES_MAX // len(data) + 40

    asyncio.run(main())


class Wire:
    """The called side of a stream without gRPC, which hears frames at once."""

    def __init__(self, handler: Handler) -> None:
        self.asker = Asker()
        self.room = Room(EXCHANGES_MAX, ROOM_BYTES_MAX)
        self.replies: list[vnode_pb2.HopReply] = []
        self.replied = asyncio.Event()
        core = Answerer(lambda request: 1 << 26, self.room, self.room)
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.serving = hops_server_shell._Serving(handler, core, Caller("c", 60.0), self._write)
        self._task = asyncio.ensure_future(self.serving.run(self._requests()))

    def ask(self, timeout_s: float = 5.0, payload: bytes | None = None) -> int:
        data = None if payload is None else memoryview(payload)
        return self.asker.ask(train(), data, 0.0, timeout_s, "", reply_bytes_max=0)

    def flush(self, frames: int = 1000) -> None:
        for _ in range(frames):
            if (raw := self.asker.outbox.take()) is not None:
                self.frames.put_nowait(raw)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _requests(self) -> AsyncIterator[bytes]:
        while True:
            yield await self.frames.get()
            self.frames.task_done()

    async def _write(self, raw: bytes) -> None:
        replied = self.asker.heard(raw)
        assert replied is not None
        self.replies.append(replied.reply)
        self.replied.set()


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_is_given_up_before_it_has_begun_leaves_nothing() -> None:
    async def main() -> None:
        wire = Wire(echo)
        for _ in range(100):
            id = wire.ask()
            wire.flush()
            wire.asker.give_up(id)
            wire.flush()
        await wire.frames.join()
        await turns()
        assert not wire.serving._tasks
        assert (wire.room.exchanges, wire.room.held_bytes) == (0, 0)
        await wire.close()

    asyncio.run(main())


def test_room_is_taken_as_long_as_a_handler_runs() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def stubborn(
            request: Request, payload: memoryview | None, caller: Caller
        ) -> Answered:
            try:
                await asyncio.Event().wait()
            finally:
                await go.wait()
            raise AssertionError

        wire = Wire(stubborn)
        ids = [wire.ask() for _ in range(EXCHANGES_MAX)]
        wire.flush()
        await turns(EXCHANGES_MAX + 20)
        for id in ids:
            wire.asker.give_up(id)
        wire.ask()
        wire.flush()
        await turns(2 * EXCHANGES_MAX + 20)
        (reply,) = wire.replies
        assert reply.refusal.code == common_pb2.REFUSAL_CODE_BUSY
        assert wire.room.exchanges == EXCHANGES_MAX
        go.set()
        await turns()
        assert (wire.room.exchanges, wire.room.held_bytes) == (0, 0)
        await wire.close()

    asyncio.run(main())


def test_what_is_announced_and_does_not_come_is_refused() -> None:
    async def main() -> None:
        wire = Wire(echo)
        wire.ask(0.05, bytes(2 << 20))
        wire.flush(1)
        async with asyncio.timeout(LIMIT_S):
            await wire.replied.wait()
        assert wire.replies[0].refusal.code == common_pb2.REFUSAL_CODE_BUSY
        assert (wire.room.exchanges, wire.room.held_bytes) == (0, 0)
        await wire.close()

    asyncio.run(main())


def test_a_handler_may_answer_at_once() -> None:
    def at_once(request: Request, payload: memoryview | None, caller: Caller) -> Answered:
        if payload is None:
            raise MalformedError("nothing came")
        return vnode_pb2.HopReply(), payload

    async def main() -> None:
        async with a_host(serving(at_once).method) as (host, hops, contact, _):
            payloads = [os.urandom(size) for size in (1, 1000, 3_000_000) * 4]
            answers = await asyncio.gather(
                *(hops.hop(contact, FORWARD, payload, timeout_s=20) for payload in payloads)
            )
            assert [bytes(data or b"") for _, data in answers] == payloads
            reply, _ = await hops.hop(contact, train(), None, timeout_s=5)
            assert reply.refusal.code == common_pb2.REFUSAL_CODE_BAD_REQUEST
            assert host.begun == 1

    asyncio.run(main())


def test_an_alarm_rings_for_the_earliest_deadline_and_then_the_next() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        rung: list[float] = []
        began = loop.time()
        done = asyncio.Event()

        def ring() -> float:
            rung.append(loop.time() - began)
            if len(rung) == 2:
                done.set()
            return began + 0.1 if len(rung) == 1 else math.inf

        alarm = Alarm(ring)
        alarm.by(began + 5)
        alarm.by(began + 0.05)
        alarm.by(began + 0.2)  # it is asked for when the first one rings
        async with asyncio.timeout(LIMIT_S):
            await done.wait()
        assert rung[0] > 0.04
        assert rung[1] > 0.09
        alarm.by(loop.time())
        alarm.stop()
        await asyncio.sleep(0.01)
        assert len(rung) == 2

    asyncio.run(main())
