"""The in-process network keeps the promises of `Network`, and its faults bite."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from p2pnet.errors import ForgedError, MalformedError, RefusedError, UnreachableError, UsageError
from p2pnet.keys import KeyPair
from p2pnet.net.memory import MemoryFabric, MemoryNetwork
from p2pnet.net.network import ConnectionChange, Network

ECHO = "/test/echo/1"
A, B = (KeyPair.from_seed(bytes([n]) * 32).peer_id for n in (1, 2))
A_ADDR, B_ADDR = "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1"


async def echo(peer_id: str, message: bytes) -> bytes:
    return message


def run(test: Callable[[MemoryFabric, MemoryNetwork, MemoryNetwork], Awaitable[None]]) -> None:
    async def main() -> None:
        fabric = MemoryFabric()
        a, b = fabric.network(A, A_ADDR), fabric.network(B, B_ADDR)
        b.serve(ECHO, echo)
        with trio.fail_after(1000):
            await test(fabric, a, b)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def ask(a: Network, timeout_s: float = 5.0) -> bytes:
    return await a.request(B, ECHO, b"hello", timeout_s=timeout_s, addrs=[B_ADDR])


def test_a_request_and_its_reply() -> None:
    async def test(fabric: MemoryFabric, a: MemoryNetwork, b: MemoryNetwork) -> None:
        network: Network = a
        assert await ask(network) == b"hello"
        assert a.connected() == (B,)
        assert b.connected() == (A,)
        assert await a.protocols(B, timeout_s=1) == (ECHO,)
        assert await a.identify(f"{B_ADDR}/p2p/{B}", timeout_s=1) == B
        assert fabric.sent == {(A, B, ECHO): 1}
        assert fabric.messages() == fabric.messages(ECHO) == 1

    run(test)


def test_addresses_of_other_transports_are_passed_over() -> None:
    async def test(fabric: MemoryFabric, a: MemoryNetwork, b: MemoryNetwork) -> None:
        quic = "/ip4/10.0.0.2/udp/1/quic-v1"
        with pytest.raises(UnreachableError):
            await a.connect(B, [quic], timeout_s=1)
        await a.connect(B, [quic, B_ADDR], timeout_s=1)
        assert a.listen_addrs(B) == (B_ADDR,)
        assert a.listen_addrs("nobody") == ()

    run(test)


def test_a_client_is_reached_over_its_own_connection_alone() -> None:
    async def test(fabric: MemoryFabric, a: MemoryNetwork, b: MemoryNetwork) -> None:
        client = fabric.network("client")
        client.serve(ECHO, echo)
        assert client.addrs() == ()
        with pytest.raises(UnreachableError):
            await b.request("client", ECHO, b"?", timeout_s=1)
        await client.connect(B, [A_ADDR, B_ADDR], timeout_s=1)
        assert await b.request("client", ECHO, b"?", timeout_s=1) == b"?"

    run(test)


def test_a_cut_is_silent_and_heals() -> None:
    async def test(fabric: MemoryFabric, a: MemoryNetwork, b: MemoryNetwork) -> None:
        await ask(a)
        fabric.cut(B, A)
        began = trio.current_time()
        with pytest.raises(UnreachableError, match="in time"):
            await ask(a, timeout_s=3)
        assert trio.current_time() - began == pytest.approx(3)
        assert a.connected() == ()
        fabric.heal(A, B)
        assert await ask(a) == b"hello"

    run(test)


def test_a_frozen_peer_never_answers_until_it_thaws() -> None:
    async def test(fabric: MemoryFabric, a: MemoryNetwork, b: MemoryNetwork) -> None:
        await ask(a)
        fabric.freeze(B)
        assert a.connected() == (B,), "freezing shows on no connection"
        with pytest.raises(UnreachableError):
            await ask(a)
        with pytest.raises(UnreachableError):
            await a.connect(B, [B_ADDR], timeout_s=1)
        fabric.thaw(B)
        assert await ask(a) == b"hello"

    run(test)


def test_a_killed_peer_is_seen_at_once_and_may_restart() -> None:
    async def test(fabric: MemoryFabric, a: MemoryNetwork, b: MemoryNetwork) -> None:
        seen: list[ConnectionChange] = []
        a.watch(seen.append)
        await ask(a)
        fabric.kill(B)
        assert [(change.peer_id, change.connected) for change in seen] == [(B, True), (B, False)]
        began = trio.current_time()
        with pytest.raises(UnreachableError):
            await ask(a)
        with pytest.raises(UnreachableError):
            await b.request(A, ECHO, b"", timeout_s=1, addrs=[A_ADDR])
        assert trio.current_time() == began, "a refusal takes no time"
        fabric.network(B, B_ADDR).serve(ECHO, echo)
        assert await ask(a) == b"hello"

    run(test)


def test_dropping_forgets() -> None:
    async def test(fabric: MemoryFabric, a: MemoryNetwork, b: MemoryNetwork) -> None:
        await ask(a)
        await a.request(B, ECHO, b"", timeout_s=1)  # where it was last reached
        await a.drop(B)
        assert b.connected() == ()
        with pytest.raises(UnreachableError):
            await a.request(B, ECHO, b"", timeout_s=1)

    run(test)


def test_a_failing_handler_ends_the_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def refuses(peer_id: str, message: bytes) -> bytes:
        raise RefusedError("no")

    async def forged(peer_id: str, message: bytes) -> bytes:
        raise ForgedError("no")

    async def broken(peer_id: str, message: bytes) -> bytes:
        raise ZeroDivisionError

    async def test(fabric: MemoryFabric, a: MemoryNetwork, b: MemoryNetwork) -> None:
        b.serve("/refuses", refuses)
        b.serve("/broken", broken)
        b.serve("/forged", forged)
        for protocol in ("/refuses", "/broken", "/forged"):
            with pytest.raises(UnreachableError):
                await a.request(B, protocol, b"", timeout_s=1, addrs=[B_ADDR])
        assert b.offences(A) == 2, "a refusal is none"
        assert await ask(a) == b"hello"

    run(test)
    assert "a handler failed" in caplog.text


def test_wrong_use_is_named() -> None:
    async def nothing(peer_id: str, message: bytes) -> None:
        return None

    async def test(fabric: MemoryFabric, a: MemoryNetwork, b: MemoryNetwork) -> None:
        b.serve("/nothing", nothing)
        with pytest.raises(MalformedError, match="does not speak"):
            await a.request(B, "/other", b"", timeout_s=1, addrs=[B_ADDR])
        with pytest.raises(UnreachableError, match="in time"):
            await a.request(B, "/nothing", b"", timeout_s=1, addrs=[B_ADDR])
        arguments = {"timeout_s": 1.0, "addrs": [B_ADDR]}
        assert await a.request(B, "/nothing", b"", wants_reply=False, **arguments) == b""
        with pytest.raises(ValueError, match="over"):
            await a.request(B, ECHO, bytes((1 << 20) + 1), timeout_s=1)
        with pytest.raises(UsageError, match="PEER_ID"):
            await a.identify(B_ADDR, timeout_s=1)

    run(test)
