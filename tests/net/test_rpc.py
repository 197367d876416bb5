"""The gRPC door on loopback: who gets in, what errors become, and what survives."""

from __future__ import annotations

import asyncio
import logging
import socket
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trio

from p2pnet.errors import (
    CancelledByUs,
    ForgedError,
    LocalError,
    MalformedError,
    NotFoundError,
    P2PNetError,
    RefusedError,
    ResourceError,
    UnreachableError,
    UsageError,
)
from p2pnet.keys import KeyPair, sha256
from p2pnet.net.bridge import open_bridge
from p2pnet.net.channel import CHANNEL_OPTIONS, Channel, NoSessionError, unix_channel
from p2pnet.net.dialer import PeerContact, TcpDialer
from p2pnet.net.handlers import Caller, Method, bidi, client_stream, server_stream, unary
from p2pnet.net.rpc_server import RpcServer
from p2pnet.net.session import SESSION_METADATA, make_proof, version_range
from p2pnet.net.tls import SERVER_NAME, ServerCertificate, make_certificate
from p2pnet.v1 import common_pb2 as pb
from p2pnet.v1 import session_pb2

LONG_S = 20.0  # a deadline that only a bug meets
HOST = KeyPair.from_seed(b"h" * 32)
ALICE = KeyPair.from_seed(b"a" * 32)
CERTIFICATE = make_certificate()

Test = Callable[["Bench"], Awaitable[None]]


async def whoami(request: pb.Refusal, caller: Caller) -> pb.Refusal:
    return pb.Refusal(host=caller.peer_id, detail=request.detail)


async def echo(request: pb.Tensor, caller: Caller) -> pb.Tensor:
    return request


async def count_to(request: pb.Refusal, caller: Caller) -> AsyncGenerator[pb.Refusal, None]:
    for i in range(request.epoch):
        yield pb.Refusal(epoch=i, host=caller.peer_id)


async def total(requests: AsyncIterator[pb.Refusal], caller: Caller) -> pb.Refusal:
    return pb.Refusal(epoch=sum([request.epoch async for request in requests]))


async def double(
    requests: AsyncIterator[pb.Refusal], caller: Caller
) -> AsyncGenerator[pb.Refusal, None]:
    async for request in requests:
        yield pb.Refusal(epoch=2 * request.epoch)


def raising(error: Exception) -> Method:
    async def handler(request: pb.Refusal, caller: Caller) -> pb.Refusal:
        raise error

    return unary(handler, pb.Refusal, pb.Refusal)


def methods() -> dict[str, Method]:
    return {
        "WhoAmI": unary(whoami, pb.Refusal, pb.Refusal),
        "Echo": unary(echo, pb.Tensor, pb.Tensor),
        "CountTo": server_stream(count_to, pb.Refusal, pb.Refusal, timeout_s=LONG_S),
        "Total": client_stream(total, pb.Refusal, pb.Refusal, timeout_s=LONG_S),
        "Double": bidi(double, pb.Refusal, pb.Refusal, timeout_s=LONG_S),
    }


class Bench:
    """A server on loopback with the service "Test", and a dialer."""

    def __init__(self, server: RpcServer, target: str) -> None:
        self.server = server
        self.contact = PeerContact(HOST.peer_id, (target,), CERTIFICATE.cert_der)
        self.dialer = TcpDialer(ALICE)

    @property
    def target(self) -> str:
        return self.contact.targets[0]

    async def whoami(self, detail: str = "") -> pb.Refusal:
        return await self.dialer.call(
            self.contact,
            "Test/WhoAmI",
            pb.Refusal(detail=detail),
            pb.Refusal,
            timeout_s=LONG_S,
        )

    async def raw(self, method: str, request: bytes, *, metadata: Any = ()) -> grpc.StatusCode:
        """Calls as a stranger would who knows the certificate; the status it gets."""
        async with raw_channel(self.target, CERTIFICATE) as channel:
            call: Any = channel.unary_unary(f"/p2pnet.v1.{method}")
            try:
                await call(request, timeout=LONG_S, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK


@asynccontextmanager
async def raw_channel(
    target: str, certificate: ServerCertificate
) -> AsyncIterator[grpc.aio.Channel]:
    credentials = grpc.ssl_channel_credentials(certificate.cert_pem)
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME))
    async with grpc.aio.secure_channel(target, credentials, options=options) as channel:
        yield channel


def on_bench(test: Test, **limits: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(LONG_S):
            server = RpcServer(CERTIFICATE, **limits)
            server.add("Test", methods())
            bench = Bench(server, await server.start("127.0.0.1:0"))
            try:
                await test(bench)
            finally:
                await bench.dialer.close()
                await server.stop(0)

    asyncio.run(main())


def test_the_handler_sees_the_callers_proven_peer_id() -> None:
    async def test(bench: Bench) -> None:
        reply = await bench.whoami("hello")
        assert (reply.host, reply.detail) == (ALICE.peer_id, "hello")

    on_bench(test)


def test_a_handler_may_ask_the_trio_side() -> None:
    async def main() -> None:
        server, dialer = RpcServer(CERTIFICATE), TcpDialer(ALICE)
        with trio.fail_after(LONG_S):
            async with open_bridge() as bridge:

                async def on_trio(detail: str) -> pb.Refusal:
                    await trio.lowlevel.checkpoint()
                    return pb.Refusal(detail=f"trio says {detail}")

                async def handler(request: pb.Refusal, caller: Caller) -> pb.Refusal:
                    return await bridge.to_trio(on_trio, request.detail, timeout_s=LONG_S)

                async def ask(target: str) -> str:
                    contact = PeerContact(HOST.peer_id, (target,), CERTIFICATE.cert_der)
                    request = pb.Refusal(detail="hello")
                    reply = await dialer.call(
                        contact, "Test/Ask", request, pb.Refusal, timeout_s=LONG_S
                    )
                    return reply.detail

                server.add("Test", {"Ask": unary(handler, pb.Refusal, pb.Refusal)})
                target = await bridge.to_asyncio(server.start, "127.0.0.1:0", timeout_s=LONG_S)
                assert await bridge.to_asyncio(ask, target, timeout_s=LONG_S) == "trio says hello"
                await bridge.to_asyncio(dialer.close, timeout_s=LONG_S)
                await bridge.to_asyncio(server.stop, 0.0, timeout_s=LONG_S)

    trio.run(main)


def test_streams_of_each_shape() -> None:
    async def test(bench: Bench) -> None:
        async with bench.dialer.stream(
            bench.contact, "Test/CountTo", pb.Refusal, timeout_s=LONG_S
        ) as stream:
            await stream.write(pb.Refusal(epoch=3))
            await stream.done_writing()
            assert [(r.epoch, r.host) async for r in stream] == [
                (i, ALICE.peer_id) for i in range(3)
            ]
        async with bench.dialer.stream(
            bench.contact, "Test/Total", pb.Refusal, timeout_s=LONG_S
        ) as stream:
            for i in range(5):
                await stream.write(pb.Refusal(epoch=i))
            await stream.done_writing()
            reply = await stream.read()
            assert reply is not None
            assert reply.epoch == 10
            assert await stream.read() is None
        async with bench.dialer.stream(
            bench.contact, "Test/Double", pb.Refusal, timeout_s=LONG_S
        ) as stream:
            for i in range(3):
                await stream.write(pb.Refusal(epoch=i))
                reply = await stream.read()
                assert reply is not None
                assert reply.epoch == 2 * i

    on_bench(test)


@pytest.mark.parametrize("size_bytes", [0, 128 << 10, 32 << 20])
def test_a_tensor_there_and_back(size_bytes: int) -> None:
    async def test(bench: Bench) -> None:
        tensor = pb.Tensor(payload=bytes(size_bytes), shape=[size_bytes])
        reply = await bench.dialer.call(
            bench.contact, "Test/Echo", tensor, pb.Tensor, timeout_s=LONG_S
        )
        assert reply == tensor

    on_bench(test)


def test_a_thousand_calls_at_once() -> None:
    async def test(bench: Bench) -> None:
        replies = await asyncio.gather(*(bench.whoami(str(i)) for i in range(1000)))
        assert [reply.detail for reply in replies] == [str(i) for i in range(1000)]

    on_bench(test)


def test_one_callers_calls_at_once_are_bounded() -> None:
    async def test(bench: Bench) -> None:
        entered, release = asyncio.Event(), asyncio.Event()

        async def wait(request: pb.Refusal, caller: Caller) -> pb.Refusal:
            entered.set()
            await release.wait()
            return request

        bench.server.add("Test", {"Wait": unary(wait, pb.Refusal, pb.Refusal)})
        first = asyncio.create_task(
            bench.dialer.call(
                bench.contact, "Test/Wait", pb.Refusal(), pb.Refusal, timeout_s=LONG_S
            )
        )
        await entered.wait()
        with pytest.raises(RefusedError, match="under way already"):
            await bench.whoami()
        release.set()
        await first
        await bench.whoami()

    on_bench(test, calls_per_peer_max=1)


def test_strangers_are_refused() -> None:
    async def test(bench: Bench) -> None:
        refused = grpc.StatusCode.UNAUTHENTICATED
        assert await bench.raw("Test/WhoAmI", b"") is refused
        assert await bench.raw("No/Such", b"") is refused
        token = ((SESSION_METADATA, b"t" * 32),)
        assert await bench.raw("Test/WhoAmI", b"", metadata=token) is refused
        async with raw_channel(bench.target, CERTIFICATE) as raw:
            with pytest.raises(NoSessionError, match="no session: prove who you are"):
                await Channel(raw, "host").open("Test/Double", pb.Refusal, timeout_s=LONG_S)

    on_bench(test)


def test_plaintext_is_refused() -> None:
    async def test(bench: Bench) -> None:
        async with grpc.aio.insecure_channel(bench.target, options=CHANNEL_OPTIONS) as raw:
            with pytest.raises(UnreachableError):
                await Channel(raw, "host").call(
                    "Session/Challenge",
                    session_pb2.ChallengeRequest(versions=version_range()),
                    session_pb2.ChallengeReply,
                    timeout_s=LONG_S,
                )
        await bench.whoami()

    on_bench(test)


def test_a_replayed_proof_and_one_for_another_server_are_refused() -> None:
    async def test(bench: Bench) -> None:
        async with raw_channel(bench.target, CERTIFICATE) as raw:
            channel = Channel(raw, "host")

            async def challenge() -> session_pb2.ChallengeReply:
                return await channel.call(
                    "Session/Challenge",
                    session_pb2.ChallengeRequest(versions=version_range()),
                    session_pb2.ChallengeReply,
                    timeout_s=LONG_S,
                )

            async def open_session(proof: session_pb2.OpenRequest) -> session_pb2.OpenReply:
                return await channel.call(
                    "Session/Open", proof, session_pb2.OpenReply, timeout_s=LONG_S
                )

            proof = make_proof(ALICE, await challenge(), CERTIFICATE.digest)
            assert len((await open_session(proof)).token) == 32
            with pytest.raises(RefusedError, match="used"):
                await open_session(proof)
            elsewhere = make_proof(ALICE, await challenge(), sha256(b"another certificate"))
            with pytest.raises(RefusedError, match="made for another server"):
                await open_session(elsewhere)

    on_bench(test)


@pytest.mark.parametrize("garbage", [b"\xff", b"\x0a\xff\xff"])
def test_bytes_that_are_no_message_are_an_invalid_argument(garbage: bytes) -> None:
    async def test(bench: Bench) -> None:
        assert await bench.raw("Session/Open", garbage) is grpc.StatusCode.INVALID_ARGUMENT
        await bench.whoami()

    on_bench(test)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (KeyError("secret"), RefusedError, "its node's log says why"),
        (RefusedError("not today"), RefusedError, "not today"),
        (ForgedError("forged"), RefusedError, "forged"),
        (ResourceError("disk full"), RefusedError, "disk full"),
        (NotFoundError("no such thing"), RefusedError, "no such thing"),
        (UnreachableError("a third peer is gone"), RefusedError, "a third peer is gone"),
        (TimeoutError(), RefusedError, "not done in time"),
        (CancelledByUs("shutting down"), UnreachableError, "shutting down"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_a_handlers_error_is_to_a_peer(
    error: Exception, kind: type[Exception], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(bench: Bench) -> None:
        bench.server.add("Test", {"Fail": raising(error)})
        with pytest.raises(kind, match=text) as caught:
            await bench.dialer.call(
                bench.contact, "Test/Fail", pb.Refusal(), pb.Refusal, timeout_s=LONG_S
            )
        assert type(caught.value) is kind
        assert "secret" not in str(caught.value)
        await bench.whoami()  # the server lives

    with caplog.at_level(logging.ERROR):
        on_bench(test)
    assert ("KeyError" in caplog.text) == isinstance(error, KeyError)


def test_a_handler_that_makes_the_wrong_reply_is_our_own_fault() -> None:
    async def test(bench: Bench) -> None:
        wrong: Any = echo
        bench.server.add("Test", {"Wrong": unary(wrong, pb.Tensor, pb.Refusal)})
        with pytest.raises(RefusedError, match="the handler failed"):
            await bench.dialer.call(
                bench.contact, "Test/Wrong", pb.Tensor(), pb.Refusal, timeout_s=LONG_S
            )

    on_bench(test)


def test_an_error_in_a_stream_comes_after_what_was_sent() -> None:
    async def test(bench: Bench) -> None:
        async def one_then_fail(
            request: pb.Refusal, caller: Caller
        ) -> AsyncGenerator[pb.Refusal, None]:
            yield request
            raise RefusedError("no more")

        method = server_stream(one_then_fail, pb.Refusal, pb.Refusal, timeout_s=LONG_S)
        bench.server.add("Test", {"OneThenFail": method})
        async with bench.dialer.stream(
            bench.contact, "Test/OneThenFail", pb.Refusal, timeout_s=LONG_S
        ) as stream:
            await stream.write(pb.Refusal(epoch=7))
            first = await stream.read()
            assert first is not None
            assert first.epoch == 7
            with pytest.raises(RefusedError, match="no more"):
                await stream.read()

    on_bench(test)


def test_a_handler_has_a_deadline_of_its_own() -> None:
    async def test(bench: Bench) -> None:
        async def hang(request: pb.Refusal, caller: Caller) -> pb.Refusal:
            assert caller.timeout_s == 0.01
            await asyncio.Event().wait()
            return request

        method = unary(hang, pb.Refusal, pb.Refusal, timeout_s=0.01)
        bench.server.add("Test", {"Hang": method})
        with pytest.raises(RefusedError, match="not done in time"):
            await bench.dialer.call(
                bench.contact, "Test/Hang", pb.Refusal(), pb.Refusal, timeout_s=LONG_S
            )

    on_bench(test)


def test_a_handler_whose_work_was_cancelled_answers_at_once() -> None:
    async def given_up(request: pb.Refusal, caller: Caller) -> pb.Refusal:
        work = asyncio.get_running_loop().create_future()
        work.cancel()
        await work
        return pb.Refusal()

    async def test(bench: Bench) -> None:
        bench.server.add("Given", {"Up": unary(given_up, pb.Refusal, pb.Refusal)})
        with pytest.raises(RefusedError, match="given up"):
            await bench.dialer.call(
                bench.contact, "Given/Up", pb.Refusal(), pb.Refusal, timeout_s=LONG_S * 2
            )

    on_bench(test)


def test_a_caller_that_leaves_a_stream_ends_its_handler() -> None:
    async def test(bench: Bench) -> None:
        ended = asyncio.Event()

        async def forever(
            requests: AsyncIterator[pb.Refusal], caller: Caller
        ) -> AsyncGenerator[pb.Refusal, None]:
            try:
                async for request in requests:
                    yield request
            finally:
                ended.set()

        bench.server.add(
            "Test", {"Forever": bidi(forever, pb.Refusal, pb.Refusal, timeout_s=LONG_S)}
        )
        async with bench.dialer.stream(
            bench.contact, "Test/Forever", pb.Refusal, timeout_s=LONG_S
        ) as stream:
            await stream.write(pb.Refusal(epoch=1))
            await stream.read()
        await ended.wait()

    on_bench(test)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(4096), b"\x16\x03\x01\xff\xff"]
)
def test_garbage_on_the_port_harms_nobody(garbage: bytes) -> None:
    async def test(bench: Bench) -> None:
        host, port = bench.target.split(":")
        for _ in range(5):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(garbage)
            writer.write_eof()
            await reader.read()  # until the server hangs up
            writer.close()
        await bench.whoami()

    on_bench(test)


def test_a_taken_port_is_one_clear_sentence() -> None:
    async def test(bench: Bench) -> None:
        second = RpcServer(CERTIFICATE)
        with pytest.raises(ResourceError, match=f"cannot listen on {bench.target}: the port"):
            await second.start(bench.target)
        await second.stop(0)
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            third = RpcServer(CERTIFICATE)
            with pytest.raises(ResourceError):
                await third.start(f"127.0.0.1:{other.getsockname()[1]}")
            await third.stop(0)

    on_bench(test)


def on_unix(
    path: Path, test: Callable[[Channel], Awaitable[None]], extra: dict[str, Method]
) -> None:
    async def main() -> None:
        async with asyncio.timeout(LONG_S):
            server = RpcServer()
            server.add("Test", {**methods(), **extra})
            await server.start_unix(path)
            channel = unix_channel(path)
            try:
                await test(channel)
            finally:
                await channel.close()
                await server.stop(0)

    asyncio.run(main())


def test_the_control_socket_is_its_users_alone_and_needs_no_session(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    async def test(channel: Channel) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        reply = await channel.call("Test/WhoAmI", pb.Refusal(), pb.Refusal, timeout_s=LONG_S)
        assert reply.host == ""
        async with channel.stream("Test/CountTo", pb.Refusal, timeout_s=LONG_S) as stream:
            await stream.write(pb.Refusal(epoch=2))
            await stream.done_writing()
            assert [r.epoch async for r in stream] == [0, 1]

    on_unix(path, test, {})
    on_unix(path, test, {})  # a second start finds nothing in its way


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NotFoundError("no network digits"), NotFoundError),
        (UsageError("a bad name"), UsageError),
        (ResourceError("disk full"), ResourceError),
        (LocalError("our own fault"), LocalError),
        (RefusedError("no"), RefusedError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_local_nodes_errors_keep_their_kind(
    tmp_path: Path, error: P2PNetError, kind: type[P2PNetError]
) -> None:
    async def test(channel: Channel) -> None:
        with pytest.raises(kind, match=str(error)) as caught:
            await channel.call("Test/Fail", pb.Refusal(), pb.Refusal, timeout_s=LONG_S)
        assert type(caught.value) is kind

    on_unix(tmp_path / "s", test, {"Fail": raising(error)})


def test_no_node_on_the_socket(tmp_path: Path) -> None:
    async def main() -> None:
        channel = unix_channel(tmp_path / "nobody.sock")
        with pytest.raises(UnreachableError, match="the local node"):
            await channel.call("Test/WhoAmI", pb.Refusal(), pb.Refusal, timeout_s=LONG_S)
        await channel.close()
        with pytest.raises(CancelledByUs):
            await channel.call("Test/WhoAmI", pb.Refusal(), pb.Refusal, timeout_s=LONG_S)

    asyncio.run(main())


def test_what_is_no_place_for_a_socket(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ResourceError, match="too long for a socket"):
            await RpcServer().start_unix(tmp_path / ("x" * 120))
        (tmp_path / "file").write_text("precious")
        with pytest.raises(ResourceError, match="cannot make the socket"):
            await RpcServer().start_unix(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "precious"
        with pytest.raises(ValueError, match="needs a certificate"):
            await RpcServer().start("127.0.0.1:0")

    asyncio.run(main())


def test_a_reply_that_is_no_message_is_the_peers_fault() -> None:
    async def test(bench: Bench) -> None:
        async def garbage(requests: Any, caller: Caller, write: Any) -> bytes:
            return b"\xff\xff"

        bench.server.add("Test", {"Garbage": Method(garbage, True, LONG_S)})
        with pytest.raises(MalformedError, match="bytes that are no Refusal"):
            await bench.dialer.call(
                bench.contact, "Test/Garbage", pb.Refusal(), pb.Refusal, timeout_s=LONG_S
            )

    on_bench(test)
