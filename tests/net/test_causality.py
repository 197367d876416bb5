"""Timestamps on real gRPC calls: both ways, for streams and errors too, and harmless if wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import pytest

from p2pnet.causality import Causality
from p2pnet.errors import NotFoundError, RefusedError
from p2pnet.keys import KeyPair
from p2pnet.net.dialer import PeerContact, TcpDialer
from p2pnet.net.handlers import Caller, bidi, unary
from p2pnet.net.rpc_server import RpcServer
from p2pnet.net.tls import make_certificate
from p2pnet.v1 import common_pb2 as pb

LONG_S = 20.0
HOUR_MS = 3_600_000
NOW_MS = 1_764_000_000_000
HOST = KeyPair.from_seed(b"h" * 32)
ALICE = KeyPair.from_seed(b"a" * 32)
CERTIFICATE = make_certificate()


class Unparsable(Causality):
    """What goes out is no timestamp."""

    def __init__(self, says: str) -> None:
        super().__init__()
        self._says = says

    def outgoing(self) -> str:
        return self._says


def with_both(
    test: Callable[[TcpDialer, PeerContact], Awaitable[None]],
    ours: Causality | None,
    theirs: Causality | None,
    in_handler: Callable[[], None] = lambda: None,
) -> None:
    """A dialer with one clock and a server with another."""

    async def ask(request: pb.Refusal, caller: Caller) -> pb.Refusal:
        in_handler()
        if request.detail == "fail":
            raise NotFoundError("there is none")
        return pb.Refusal(host=caller.peer_id)

    async def echo(
        requests: AsyncIterator[pb.Refusal], caller: Caller
    ) -> AsyncGenerator[pb.Refusal, None]:
        in_handler()
        async for request in requests:
            yield request

    async def main() -> None:
        server = RpcServer(CERTIFICATE, causality=theirs)
        methods = {
            "Ask": unary(ask, pb.Refusal, pb.Refusal),
            "Echo": bidi(echo, pb.Refusal, pb.Refusal, timeout_s=LONG_S),
        }
        server.add("Test", methods)
        target = await server.start("127.0.0.1:0")
        dialer = TcpDialer(ALICE, causality=ours)
        try:
            async with asyncio.timeout(LONG_S):
                await test(dialer, PeerContact(HOST.peer_id, (target,), CERTIFICATE.cert_der))
        finally:
            await dialer.close()
            await server.stop(0)

    asyncio.run(main())


def clock_at(wall_ms: int) -> Causality:
    return Causality(lambda: wall_ms)


async def ask(dialer: TcpDialer, contact: PeerContact, detail: str = "") -> str:
    request = pb.Refusal(detail=detail)
    reply = await dialer.call(contact, "Test/Ask", request, pb.Refusal, timeout_s=LONG_S)
    return reply.host


async def call(dialer: TcpDialer, contact: PeerContact) -> None:
    assert await ask(dialer, contact) == ALICE.peer_id


async def fail(dialer: TcpDialer, contact: PeerContact) -> None:
    with pytest.raises(RefusedError, match="there is none"):
        await ask(dialer, contact, "fail")


async def begin_stream(dialer: TcpDialer, contact: PeerContact) -> None:
    async with dialer.stream(contact, "Test/Echo", pb.Refusal, timeout_s=LONG_S):
        pass


async def open_stream(dialer: TcpDialer, contact: PeerContact) -> None:
    async with dialer.stream(contact, "Test/Echo", pb.Refusal, timeout_s=LONG_S) as stream:
        await stream.write(pb.Refusal(detail="x"))
        assert await stream.read() == pb.Refusal(detail="x")
        await stream.done_writing()
        assert await stream.read() is None


@pytest.mark.parametrize("way", [call, fail, open_stream])
@pytest.mark.parametrize("we_are_behind", [True, False])
def test_both_sides_continue_after_each_other(
    way: Callable[[TcpDialer, PeerContact], Awaitable[None]], we_are_behind: bool
) -> None:
    slow, fast = clock_at(NOW_MS - HOUR_MS), clock_at(NOW_MS + HOUR_MS)
    ours, theirs = (slow, fast) if we_are_behind else (fast, slow)
    before = ours.outgoing()
    at_handler: list[str] = []

    async def test(dialer: TcpDialer, contact: PeerContact) -> None:
        await way(dialer, contact)
        assert ours.outgoing() > at_handler[0] > before

    with_both(test, ours, theirs, lambda: at_handler.append(theirs.outgoing()))


def test_a_stream_that_has_begun_has_told_both() -> None:
    ours, theirs = clock_at(NOW_MS - HOUR_MS), clock_at(NOW_MS + HOUR_MS)
    before = theirs.outgoing()

    async def test(dialer: TcpDialer, contact: PeerContact) -> None:
        await dialer.call(contact, "Test/Ask", pb.Refusal(), pb.Refusal, timeout_s=LONG_S)
        now = [theirs.outgoing() for _ in range(9)][-1]
        assert ours.outgoing() < now  # they go on by themselves
        await begin_stream(dialer, contact)
        assert ours.outgoing() > now > before

    with_both(test, ours, theirs)


@pytest.mark.parametrize("says", ["", "no timestamp", "ffffffffffff-ffff", "x" * 4000])
@pytest.mark.parametrize("they", [True, False])
def test_what_is_no_timestamp_or_too_far_ahead_changes_nothing(says: str, they: bool) -> None:
    honest, wrong = clock_at(NOW_MS), Unparsable(says)
    ours, theirs = (honest, wrong) if they else (wrong, honest)

    async def test(dialer: TcpDialer, contact: PeerContact) -> None:
        for way in (call, fail, open_stream):
            await way(dialer, contact)

    with_both(test, ours, theirs)
    assert honest.stamp()[0].wall_ms == NOW_MS


@pytest.mark.parametrize("we_have_one", [True, False])
def test_who_has_no_clock_is_served_as_ever(we_have_one: bool) -> None:
    clock = clock_at(NOW_MS)

    async def test(dialer: TcpDialer, contact: PeerContact) -> None:
        for way in (call, fail, open_stream):
            await way(dialer, contact)

    with_both(test, *((clock, None) if we_have_one else (None, clock)))


def test_a_stranger_drags_no_clock_along() -> None:
    """Before a session is open nobody is known, and nobody's time is taken."""
    theirs = clock_at(NOW_MS)

    async def test(dialer: TcpDialer, contact: PeerContact) -> None:
        stranger = TcpDialer(ALICE, versions=(9, 9), causality=clock_at(NOW_MS + HOUR_MS))
        try:
            with pytest.raises(RefusedError):
                await ask(stranger, contact)
        finally:
            await stranger.close()

    with_both(test, None, theirs)
    assert theirs.stamp()[0].wall_ms == NOW_MS
