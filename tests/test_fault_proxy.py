"""The proxy for bad links itself: what it does to a connection is what its quality says."""

from __future__ import annotations

import json
import queue
from collections.abc import Awaitable, Callable
from random import Random

import pytest
import trio
from fault_proxy import PERFECT, RTO_S_MIN, Proxy, Quality, serve

from p2pnet.net.multiaddr import parse

DEADLINE_S = 20.0
PIECES = [bytes([n]) * 500 for n in range(40)]


def over(quality: Quality, test: Callable[[Proxy, trio.SocketStream], Awaitable[None]]) -> None:
    """Runs a test with a connection through a proxy to somebody who echoes."""

    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
                nursery.start_soon(trio.serve_listeners, _echo, [listener])
                proxy = await Proxy(nursery, Random(1), quality).open()
                proxy.to(listener.socket.getsockname()[1])
                async with await trio.open_tcp_stream("127.0.0.1", parse(proxy.addr).port) as near:
                    await test(proxy, near)
                nursery.cancel_scope.cancel()

    trio.run(main)


async def _echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def there_and_back(stream: trio.SocketStream, data: bytes) -> float:
    """Sends, waits for all of it to come back, and says how long that took."""
    began, back = trio.current_time(), b""
    await stream.send_all(data)
    while len(back) < len(data):
        back += await stream.receive_some()
    assert back == data
    return trio.current_time() - began


def test_what_is_sent_arrives_in_order_however_bad_the_link() -> None:
    async def test(proxy: Proxy, stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there_and_back, stream, b"".join(PIECES))
        assert proxy.bytes == 2 * sum(map(len, PIECES))
        assert proxy.stalls > 0

    over(Quality(delay_s=0.005, jitter_s=0.02, loss=0.3), test)


def test_a_round_trip_takes_two_delays_and_the_first_two_more() -> None:
    async def test(proxy: Proxy, stream: trio.SocketStream) -> None:
        assert await there_and_back(stream, b"first") >= 0.16  # the handshake, before all
        assert await there_and_back(stream, b"second") >= 0.08
        assert proxy.stalls == 0

    over(Quality(delay_s=0.04), test)


def test_a_lost_segment_is_a_stall() -> None:
    async def test(proxy: Proxy, stream: trio.SocketStream) -> None:
        took_s = 0.0
        while not proxy.stalls:
            took_s = await there_and_back(stream, b"x")
        assert took_s >= RTO_S_MIN

    over(Quality(loss=0.1), test)


def test_bandwidth() -> None:
    async def test(proxy: Proxy, stream: trio.SocketStream) -> None:
        assert await there_and_back(stream, bytes(20_000)) >= 20_000 / 100_000

    over(Quality(bytes_per_s=100_000), test)


def test_bursts_let_nothing_pass_while_they_last() -> None:
    async def test(proxy: Proxy, stream: trio.SocketStream) -> None:
        took_s = 0.0
        while not proxy.stalls:
            took_s = await there_and_back(stream, b"x")
        assert took_s >= RTO_S_MIN

    over(Quality(burst_s=0.05, burst_every_s=0.5), test)


def test_a_half_open_link_swallows_all_and_stays_open() -> None:
    async def test(proxy: Proxy, stream: trio.SocketStream) -> None:
        await there_and_back(stream, b"before")
        proxy.cut = True
        await stream.send_all(b"after")
        with pytest.raises(trio.TooSlowError):
            with trio.fail_after(0.1):
                await stream.receive_some()

    over(PERFECT, test)


def test_an_end_and_a_reset_are_passed_on() -> None:
    async def test(proxy: Proxy, stream: trio.SocketStream) -> None:
        await there_and_back(stream, b"all")
        await stream.send_eof()
        assert await stream.receive_some() == b""
        proxy.to(1)  # nobody is there
        async with await trio.open_tcp_stream("127.0.0.1", parse(proxy.addr).port) as other:
            assert await other.receive_some() == b""

    over(PERFECT, test)


def test_proxies_in_a_process_of_their_own_do_what_they_are_told() -> None:
    async def main() -> None:
        told: queue.Queue[str] = queue.Queue()
        say, said = trio.open_memory_channel[str](10)
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as others:
                (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
                others.start_soon(trio.serve_listeners, _echo, [listener])
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(serve, 2, told.get, say.send_nowait)
                    await drive(told, said, listener.socket.getsockname()[1])
                others.cancel_scope.cancel()

    async def drive(
        told: queue.Queue[str], said: trio.MemoryReceiveChannel[str], target: int
    ) -> None:
        ports = json.loads(await said.receive())["ports"]
        assert len(set(ports)) == 2
        told.put(json.dumps({"to": {"1": target}, "delay_s": 0.04}))
        assert json.loads(await said.receive()) == {}
        async with await trio.open_tcp_stream("127.0.0.1", ports[1]) as near:
            await there_and_back(near, b"first")
            assert await there_and_back(near, b"second") >= 0.08
        told.put("")  # its driver is gone: it ends, or this never does

    trio.run(main)
