"""The libp2p door on real sockets: it serves the honest and survives everybody else."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import multiaddr as stock_multiaddr
import pytest
import trio
from libp2p import new_host
from libp2p.peer.peerinfo import PeerInfo as StockPeerInfo

from p2pnet.errors import (
    MalformedError,
    RefusedError,
    ResourceError,
    UnreachableError,
    UsageError,
)
from p2pnet.keys import KeyPair
from p2pnet.net.libp2p import Libp2pNetwork, open_network
from p2pnet.net.network import MESSAGE_BYTES_MAX, ConnectionChange, Network
from p2pnet.net.streams import ByteStream, Conversation, propose
from p2pnet.net.varint import encode_varint, frame

ECHO = "/test/echo/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
DEADLINE_S = 10.0
A_KEY, B_KEY, C_KEY = (KeyPair.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
Test = Callable[[Libp2pNetwork, Libp2pNetwork], Awaitable[None]]


async def echo(peer_id: str, message: bytes) -> bytes:
    return message


async def silent(peer_id: str, message: bytes) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def fails(peer_id: str, message: bytes) -> bytes:
    raise ZeroDivisionError(message)


@asynccontextmanager
async def server(keypair: KeyPair = A_KEY, **limits: int) -> AsyncIterator[Libp2pNetwork]:
    async with open_network(keypair, listen=[LOOPBACK], **limits) as network:
        network.serve(ECHO, echo)
        network.serve("/silent", silent)
        network.serve("/fails", fails)
        yield network


def run(test: Test, *, silence_s: float = 5.0) -> None:
    """Runs `test` with a listening peer, and a client that is connected to it."""

    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            client = open_network(B_KEY, listen=[], silence_s=silence_s)
            async with server() as a, client as b:
                await b.connect(a.peer_id, a.addrs(), timeout_s=5)
                await test(a, b)

    trio.run(main)


async def ask(b: Network, a: Libp2pNetwork, message: bytes = b"hello") -> bytes:
    return await b.request(a.peer_id, ECHO, message, timeout_s=5, addrs=a.addrs())


def port_of(network: Network) -> int:
    return int(network.addrs()[0].rsplit("/", 1)[1])


async def until_end(stream: ByteStream) -> None:
    """Reads a stream until the peer has closed or reset it."""
    try:
        while await stream.read():
            pass
    except UnreachableError:
        pass


class Changes:
    """What a network tells its watchers, to be waited for."""

    def __init__(self, network: Network) -> None:
        self.seen: list[tuple[str, bool]] = []
        self._changed = trio.Event()
        network.watch(self._note)

    def _note(self, change: ConnectionChange) -> None:
        self.seen.append((change.peer_id, change.connected))
        self._changed.set()

    async def until(self, change: tuple[str, bool]) -> None:
        while change not in self.seen:
            self._changed = trio.Event()
            await self._changed.wait()


# Requests


@pytest.mark.parametrize("size", [0, 1, 300, 70_000, MESSAGE_BYTES_MAX])
def test_a_message_comes_back_whole(size: int) -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        message = bytes(i % 251 for i in range(size))
        assert await ask(b, a, message) == message

    run(test)


def test_a_message_over_the_limit_is_not_sent() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        with pytest.raises(ValueError, match="over"):
            await ask(b, a, bytes(MESSAGE_BYTES_MAX + 1))

    run(test)


def test_many_requests_at_once_both_ways() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        b.serve(ECHO, echo)
        replies: list[tuple[str, bytes]] = []

        async def one(here: Network, there: str, message: bytes) -> None:
            reply = await here.request(there, ECHO, message, timeout_s=8)
            replies.append((there, reply))

        async with trio.open_nursery() as nursery:
            for i in range(100):
                nursery.start_soon(one, b, a.peer_id, b"%d" % i)
                nursery.start_soon(one, a, b.peer_id, b"%d" % i)
        expected = [(peer, b"%d" % i) for peer in (a.peer_id, b.peer_id) for i in range(100)]
        assert sorted(replies) == sorted(expected)

    run(test)


def test_a_message_that_wants_no_reply() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        got: list[bytes] = []
        came = trio.Event()

        async def takes(peer_id: str, message: bytes) -> None:
            got.append(message)
            if len(got) == 3:
                came.set()

        a.serve("/takes", takes)
        for message in (b"1", b"2", b"3"):
            reply = await b.request(a.peer_id, "/takes", message, timeout_s=5, wants_reply=False)
            assert reply == b""
        await came.wait()
        assert got == [b"1", b"2", b"3"]

    run(test)


def test_an_answer_that_was_not_wanted_is_not_the_next_reply() -> None:
    """py-libp2p echoes an ADD_PROVIDER, which Go does not answer."""

    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        for n in range(5):
            reply = await b.request(a.peer_id, ECHO, b"a%d" % n, timeout_s=5, wants_reply=False)
            assert reply == b""
            assert await ask(b, a, b"b%d" % n) == b"b%d" % n

    run(test)


def test_a_message_without_reply_that_is_not_taken_is_an_error() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        async def refuses(peer_id: str, message: bytes) -> None:
            raise RefusedError("not here")

        a.serve("/refuses", refuses)
        for _ in range(10):
            with pytest.raises(UnreachableError, match="reset"):
                await b.request(a.peer_id, "/refuses", b"", timeout_s=5, wants_reply=False)
        assert a.offences(b.peer_id) == 0, "a refusal is none"

    run(test)


def test_small_requests_pass_beside_bulk_data() -> None:
    size = 16 << 20

    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        async def counts(talk: Conversation, peer_id: str) -> None:
            got = 0
            while got < size:
                got += len(await talk.stream.read())
            await talk.stream.write(b"%d" % got)

        a._handlers["/bulk"] = counts
        connection = b._connections.best(a.peer_id)
        assert connection is not None
        talk = await propose(await connection.muxed.open_stream(), "/bulk")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk.stream.write, bytes(size))
            for n in range(20):
                assert await ask(b, a, b"%d" % n) == b"%d" % n
        assert await talk.exactly(len(str(size))) == b"%d" % size
        await talk.stream.reset()

    run(test)


def test_a_cancelled_request_harms_no_other() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        seen = Changes(b)
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(ask, b, a, bytes(200_000)))
                for _ in range(3):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert await ask(b, a) == b"hello"
        assert seen.seen == [], "the one connection has lived through it"

    run(test)


def test_what_a_peer_does_not_speak_is_said() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        with pytest.raises(MalformedError, match="does not speak /other"):
            await b.request(a.peer_id, "/other", b"", timeout_s=5)
        assert a.offences(b.peer_id) == b.offences(a.peer_id) == 0
        assert await b.protocols(a.peer_id, timeout_s=5) == (
            "/fails", "/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/silent", ECHO,
        )  # fmt: skip
        assert await b.protocols(C_KEY.peer_id, timeout_s=5) == ()
        assert b.listen_addrs(a.peer_id) == a.addrs()
        assert a.listen_addrs(b.peer_id) == b.listen_addrs(C_KEY.peer_id) == ()

    run(test)


# Peers that misbehave


def test_a_handler_that_raises_ends_its_stream_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        with pytest.raises(UnreachableError, match="the stream was reset"):
            await b.request(a.peer_id, "/fails", b"boom", timeout_s=5)
        assert a.offences(b.peer_id) == 1
        assert await ask(b, a) == b"hello"

    run(test)
    assert "ZeroDivisionError" in caplog.text


def test_a_peer_that_offends_again_and_again_is_dropped() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        logging.getLogger("p2pnet.net.swarm").disabled = True
        seen = Changes(a)
        for _ in range(8):
            with pytest.raises(UnreachableError):
                await b.request(a.peer_id, "/fails", b"", timeout_s=5)
        await seen.until((b.peer_id, False))

    try:
        run(test)
    finally:
        logging.getLogger("p2pnet.net.swarm").disabled = False


HELLO = frame(b"/multistream/1.0.0\n")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x05\xff\xff\xff\xff\xff",
        frame(b"/multistream/9.9.9\n"),
        HELLO + frame(b"no line"),
        HELLO + frame(b"\xff\xfe\n"),
        HELLO + encode_varint(1 << 40),
        HELLO + frame(b"/unknown\n") * 20,
        HELLO + frame(ECHO.encode() + b"\n") + b"\xff" * 9,
        HELLO + frame(ECHO.encode() + b"\n") + encode_varint(MESSAGE_BYTES_MAX + 1),
    ],
    ids=["meshsub", "hello", "no-end", "utf-8", "long-line", "asking", "varint", "oversized"],
)
def test_garbage_on_a_stream_is_counted_and_harms_nobody(garbage: bytes) -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        connection = b._connections.best(a.peer_id)
        assert connection is not None
        stream = await connection.muxed.open_stream()
        await stream.write(garbage)
        await until_end(stream)
        assert a.offences(b.peer_id) == 1
        assert await ask(b, a) == b"hello"

    run(test)


def test_an_oversized_reply_is_malformed() -> None:
    async def huge(peer_id: str, message: bytes) -> bytes:
        return bytes(MESSAGE_BYTES_MAX + 1)

    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        a.serve("/huge", huge)
        with pytest.raises(MalformedError, match="over"):
            await b.request(a.peer_id, "/huge", b"", timeout_s=5)
        assert b.offences(a.peer_id) == 1
        assert await ask(b, a) == b"hello"

    run(test)


def test_streams_beyond_the_limit_are_reset() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        connection = b._connections.best(a.peer_id)
        assert connection is not None
        streams = [await connection.muxed.open_stream() for _ in range(32)]
        for stream in streams:  # each is being answered once it says hello
            await stream.write(HELLO)
            assert await stream.read() == HELLO
        excess = await connection.muxed.open_stream()
        with pytest.raises(UnreachableError, match="reset"):
            await excess.read()
        for stream in streams:
            await stream.reset()
        assert await ask(b, a) == b"hello"

    run(test)


def test_a_peer_that_ignores_its_window_loses_the_connection() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        seen = Changes(a)
        connection = b._connections.best(a.peer_id)
        assert connection is not None
        stream = await connection.muxed.open_stream()
        await stream.write(HELLO + frame(b"/silent\n") + frame(b"now block"))
        stream.state._may_send = 1 << 30  # type: ignore[attr-defined]
        with pytest.raises(UnreachableError):
            await stream.write(bytes(64 << 20))
        await seen.until((b.peer_id, False))
        assert await ask(b, a) == b"hello"

    run(test)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        bytes(4096),
        b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\xff" * 99,
    ],
    ids=["http", "zeros", "noise"],
)
def test_garbage_on_the_raw_port_ends_that_connection_alone(garbage: bytes) -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        tcp = await trio.open_tcp_stream("127.0.0.1", port_of(a))
        async with tcp:
            await tcp.send_all(garbage)
            await tcp.send_eof()
            try:
                while await tcp.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass  # a reset is an end too
        assert await ask(b, a) == b"hello"

    run(test)


def test_plaintext_is_refused() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        tcp = await trio.open_tcp_stream("127.0.0.1", port_of(a))
        async with tcp:
            await tcp.send_all(HELLO + frame(b"/plaintext/2.0.0\n"))
            expected = HELLO + frame(b"na\n")
            got = b""
            while len(got) < len(expected):
                got += await tcp.receive_some()
        assert got == expected

    run(test)


def test_somebody_else_at_the_address_is_unreachable() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        with pytest.raises(UnreachableError, match="no connection"):
            await b.identify(f"{a.addrs()[0]}/p2p/{C_KEY.peer_id}", timeout_s=5)
        with pytest.raises(UnreachableError, match="itself"):
            await b.connect(b.peer_id, a.addrs(), timeout_s=5)
        with pytest.raises(UsageError, match="PEER_ID"):
            await b.identify(a.addrs()[0], timeout_s=5)
        assert await b.identify(f"{a.addrs()[0]}/p2p/{a.peer_id}", timeout_s=5) == a.peer_id

    run(test)


# Peers that are silent, or gone


def test_a_peer_that_never_answers_is_given_up_and_can_be_reached_again() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        seen = Changes(b)
        began = trio.current_time()
        with pytest.raises(UnreachableError, match="in time"):
            await b.request(a.peer_id, "/silent", b"", timeout_s=0.2)
        assert 0.2 <= trio.current_time() - began < 1.0
        assert seen.seen == [(a.peer_id, False)]
        assert b.connected() == ()
        with pytest.raises(UnreachableError, match="no address"):
            await b.request(a.peer_id, ECHO, b"", timeout_s=1)  # forgotten
        assert await ask(b, a) == b"hello"

    run(test, silence_s=0.1)


def test_a_peer_that_is_slow_with_one_answer_keeps_its_connection() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        seen = Changes(b)
        with pytest.raises(UnreachableError, match="in time"):
            await b.request(a.peer_id, "/silent", b"", timeout_s=0.2)
        assert await ask(b, a) == b"hello"
        assert seen.seen == []

    run(test)


def test_addresses_of_other_transports_are_passed_over() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        await b.drop(a.peer_id)
        others = ["/ip4/127.0.0.1/udp/4001/quic-v1", f"/ip4/127.0.0.1/tcp/1/p2p/{C_KEY.peer_id}"]
        others += ["/dns4/example.org/tcp/443/wss", f"{a.addrs()[0]}/p2p-circuit", "nonsense"]
        await b.connect(a.peer_id, [*others, *a.addrs()], timeout_s=5)
        await b.drop(a.peer_id)
        with pytest.raises(UnreachableError, match="is not a TCP multiaddr"):
            await b.connect(a.peer_id, others, timeout_s=5)

    run(test)


def test_a_listener_that_never_shakes_hands_does_not_hold_us_up() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        with socket.create_server(("127.0.0.1", 0)) as mute:
            addr = f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}"
            await b.drop(a.peer_id)
            began = trio.current_time()
            await b.connect(a.peer_id, [addr, *a.addrs()], timeout_s=1.0)
            assert 0.4 < trio.current_time() - began < 0.9, "half the time for the first of two"
            with pytest.raises(UnreachableError):
                await b.connect(C_KEY.peer_id, [addr], timeout_s=0.2)

    run(test)


def test_dropping_forgets_and_a_later_connect_works() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        seen = Changes(a)
        await b.drop(a.peer_id)
        assert b.connected() == ()
        await seen.until((b.peer_id, False))
        with pytest.raises(UnreachableError, match="no address"):
            await b.connect(a.peer_id, [], timeout_s=1)
        await b.connect(a.peer_id, a.addrs(), timeout_s=1)
        assert b.connected() == (a.peer_id,)

    run(test)


def test_a_peer_that_restarts_is_reached_at_its_old_address() -> None:
    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            async with open_network(B_KEY, listen=[]) as b:
                async with server() as a:
                    addrs = a.addrs()
                    assert await ask(b, a) == b"hello"
                with pytest.raises(UnreachableError):
                    await b.request(a.peer_id, ECHO, b"", timeout_s=1)
                async with open_network(A_KEY, listen=addrs) as a:
                    a.serve(ECHO, echo)
                    assert await b.request(a.peer_id, ECHO, b"x", timeout_s=5) == b"x"

    trio.run(main)


CHILD = """
import trio
from p2pnet.keys import KeyPair
from p2pnet.net.libp2p import open_network

async def main():
    keypair = KeyPair.from_seed(bytes([1]) * 32)
    async with open_network(keypair, listen=["/ip4/127.0.0.1/tcp/0"]) as a:
        print(a.addrs()[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture(name="child")
def _child() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


def test_a_killed_process_is_seen_at_once(child: tuple[subprocess.Popen[str], str]) -> None:
    process, addr = child

    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            async with open_network(B_KEY, listen=[]) as b:
                seen = Changes(b)
                await b.connect(A_KEY.peer_id, [addr], timeout_s=5)
                process.kill()
                with trio.fail_after(1.0):
                    await seen.until((A_KEY.peer_id, False))

    trio.run(main)


def test_a_stopped_process_holds_up_neither_requests_nor_the_end(
    child: tuple[subprocess.Popen[str], str],
) -> None:
    process, addr = child

    async def main() -> None:
        async with open_network(B_KEY, listen=[], silence_s=0.1) as b:
            await b.connect(A_KEY.peer_id, [addr], timeout_s=5)
            os.kill(process.pid, signal.SIGSTOP)
            # More than the sockets' buffers and the window take: a write blocks.
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(blocked, b)
            assert b.connected() == ()

    async def blocked(b: Network) -> None:
        with pytest.raises(UnreachableError):
            await b.request(A_KEY.peer_id, ECHO, bytes(MESSAGE_BYTES_MAX), timeout_s=0.3)

    assert trio.run(bounded, main) < 3.0


async def bounded(main: Callable[[], Awaitable[None]]) -> float:
    began = trio.current_time()
    with trio.fail_after(DEADLINE_S):
        await main()
    return trio.current_time() - began


# Opening and closing


def test_a_port_that_is_taken_is_one_clear_sentence() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        with pytest.raises(ResourceError, match=rf"cannot listen on {a.addrs()[0]}: .*in use"):
            async with open_network(C_KEY, listen=[LOOPBACK, *a.addrs()]):
                raise AssertionError("it must not open")

    run(test)


@pytest.mark.parametrize("addr", ["127.0.0.1:4001", "/ip4/127.0.0.1/udp/1/quic-v1", "/ip4/x/tcp/1"])
def test_an_address_that_is_none_is_named(addr: str) -> None:
    async def main() -> None:
        async with open_network(C_KEY, listen=[addr]):
            raise AssertionError("it must not open")

    with pytest.raises(UsageError, match="is not a TCP multiaddr"):
        trio.run(main)


def test_addresses_are_real() -> None:
    async def main() -> None:
        async with open_network(A_KEY, listen=["/ip4/0.0.0.0/tcp/0"]) as a:
            assert a.addrs()
            for addr in a.addrs():
                assert "/0.0.0.0/" not in addr
                assert not addr.endswith("/0")
            async with open_network(B_KEY, listen=[]) as b:
                assert b.addrs() == ()
                await b.connect(a.peer_id, a.addrs(), timeout_s=5)
        announced = "/dns4/node.example.org/tcp/4001"
        async with open_network(A_KEY, listen=[LOOPBACK], announce=[announced]) as a:
            assert a.addrs() == (announced,)

    trio.run(main)


def test_the_connection_idle_the_longest_makes_room() -> None:
    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            async with (
                server(A_KEY) as a,
                server(C_KEY) as c,
                open_network(B_KEY, listen=[], connections_max=1) as b,
            ):
                assert await ask(b, a) == b"hello"
                assert await ask(b, c) == b"hello"
                assert b.connected() == (c.peer_id,)

    trio.run(main)


def test_a_full_node_refuses_newcomers() -> None:
    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            async with (
                server(A_KEY, inbound_connections_max=1) as a,
                open_network(B_KEY, listen=[]) as b,
                open_network(C_KEY, listen=[]) as c,
            ):
                assert await ask(b, a) == b"hello"
                with pytest.raises(UnreachableError):
                    await c.connect(a.peer_id, a.addrs(), timeout_s=2)
                assert await ask(b, a) == b"hello"
                await b.drop(a.peer_id)

    trio.run(main)


def test_an_error_of_the_block_comes_out_as_it_is() -> None:
    async def test(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(test)


def test_closing_is_quick_with_requests_under_way() -> None:
    async def main() -> None:
        async with (
            trio.open_nursery() as nursery,
            server() as a,
            open_network(B_KEY, listen=[]) as b,
        ):
            asked = trio.Event()

            async def blocks(peer_id: str, message: bytes) -> bytes:
                asked.set()
                return await silent(peer_id, message)

            async def asks() -> None:
                with pytest.raises(UnreachableError):
                    await b.request(a.peer_id, "/blocks", b"", timeout_s=60, addrs=a.addrs())

            a.serve("/blocks", blocks)
            nursery.start_soon(asks)
            await asked.wait()

    assert trio.run(bounded, main) < 2.0


def test_being_cancelled_closes_too() -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            async with server() as a, open_network(B_KEY, listen=[]) as b:
                await ask(b, a)
                scope.cancel()
                await trio.sleep_forever()

    assert trio.run(bounded, main) < 2.0


# Stock libp2p


def test_a_stock_libp2p_peer_is_a_peer() -> None:
    async def main() -> None:
        stock = new_host()
        listen = [stock_multiaddr.Multiaddr(LOOPBACK)]

        async def stock_echo(stream: object) -> None:
            await stream.write(await stream.read(100))  # type: ignore[attr-defined]

        stock.set_stream_handler(ECHO, stock_echo)  # type: ignore[arg-type]
        with trio.fail_after(DEADLINE_S):
            async with server() as a, stock.run(listen_addrs=listen):
                addr = str(stock.get_transport_addrs()[0])
                peer_id = stock.get_id().to_base58()
                assert await a.identify(f"{addr.split('/p2p/')[0]}/p2p/{peer_id}", timeout_s=5)
                assert await a.request(peer_id, ECHO, b"to stock", timeout_s=5) == b"to stock"
                assert ECHO in await a.protocols(peer_id, timeout_s=5)
                await a.drop(peer_id)

        stock = new_host()
        with trio.fail_after(DEADLINE_S):
            async with server() as a, stock.run(listen_addrs=[]):
                where = stock_multiaddr.Multiaddr(f"{a.addrs()[0]}/p2p/{a.peer_id}")
                await stock.connect(StockPeerInfo(stock.get_id().from_base58(a.peer_id), [where]))
                stream = await stock.new_stream(stock.get_id().from_base58(a.peer_id), [ECHO])  # type: ignore[list-item]
                await stream.write(frame(b"from stock"))
                assert await stream.read(100) == frame(b"from stock")
                await stream.reset()
                await stock.close()

    trio.run(main)
