"""The dialer on loopback: pins, versions, sessions lost, peers that die or fall silent."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from p2pnet.errors import CancelledByUs, MalformedError, UnreachableError, VersionError
from p2pnet.keys import KeyPair
from p2pnet.net.channel import target_uri
from p2pnet.net.dialer import PeerContact, TcpDialer
from p2pnet.net.handlers import Caller, bidi, unary
from p2pnet.net.rpc_server import RpcServer
from p2pnet.net.session import SESSIONS_PER_PEER_MAX
from p2pnet.net.tls import ServerCertificate, load_or_create_certificate, make_certificate
from p2pnet.v1 import common_pb2 as pb

LONG_S = 20.0  # a deadline that only a bug meets
FAST_S = 2.0  # what "fails fast" means, on a busy machine
HOST = KeyPair.from_seed(b"h" * 32)
ALICE = KeyPair.from_seed(b"a" * 32)
CERTIFICATE = make_certificate()


async def whoami(request: pb.Refusal, caller: Caller) -> pb.Refusal:
    return pb.Refusal(host=caller.peer_id)


async def echo(
    requests: AsyncIterator[pb.Refusal], caller: Caller
) -> AsyncGenerator[pb.Refusal, None]:
    async for request in requests:
        yield request


@asynccontextmanager
async def serving(
    address: str = "127.0.0.1:0",
    *,
    certificate: ServerCertificate = CERTIFICATE,
    versions: tuple[int, int] = (1, 1),
) -> AsyncIterator[PeerContact]:
    server = RpcServer(certificate, versions=versions)
    methods = {
        "WhoAmI": unary(whoami, pb.Refusal, pb.Refusal),
        "Echo": bidi(echo, pb.Refusal, pb.Refusal, timeout_s=LONG_S),
    }
    server.add("Test", methods)
    target = await server.start(address)
    try:
        yield PeerContact(HOST.peer_id, (target,), certificate.cert_der)
    finally:
        await server.stop(0)


async def ask(dialer: TcpDialer, contact: PeerContact, timeout_s: float = LONG_S) -> str:
    reply = await dialer.call(contact, "Test/WhoAmI", pb.Refusal(), pb.Refusal, timeout_s=timeout_s)
    return reply.host


def with_dialer(
    test: Callable[[TcpDialer], Awaitable[None]], dialer: TcpDialer | None = None
) -> None:
    async def main() -> None:
        async with asyncio.timeout(LONG_S):
            own = dialer or TcpDialer(ALICE)
            try:
                await test(own)
            finally:
                await own.close()

    asyncio.run(main())


@contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody listens on, held so that nobody takes it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_wrong_pin_is_refused() -> None:
    async def test(dialer: TcpDialer) -> None:
        async with serving() as contact:
            other = make_certificate().cert_der
            wrong = PeerContact(contact.peer_id, contact.targets, other)
            with pytest.raises(UnreachableError, match="somebody else answers"):
                await ask(dialer, wrong)
            assert await ask(dialer, contact) == ALICE.peer_id

    with_dialer(test)


def test_a_certificate_that_is_none() -> None:
    async def test(dialer: TcpDialer) -> None:
        with pytest.raises(MalformedError):
            await ask(dialer, PeerContact(HOST.peer_id, ("127.0.0.1:1",), b"x"))
        with pytest.raises(UnreachableError, match="no address for gRPC"):
            await ask(dialer, PeerContact(HOST.peer_id, (), CERTIFICATE.cert_der))

    with_dialer(test)


@pytest.mark.parametrize("theirs", [(2, 3), (7, 7)])
def test_no_version_in_common_is_a_version_error(theirs: tuple[int, int]) -> None:
    async def test(dialer: TcpDialer) -> None:
        async with serving(versions=theirs) as contact:
            with pytest.raises(VersionError, match="no protocol version in common"):
                await ask(dialer, contact)

    with_dialer(test)


def test_a_newer_peer_speaks_our_version() -> None:
    async def test(dialer: TcpDialer) -> None:
        async with serving(versions=(1, 5)) as contact:
            assert await ask(dialer, contact) == ALICE.peer_id

    with_dialer(test)


def test_dead_targets_are_passed_over_quickly() -> None:
    async def test(dialer: TcpDialer) -> None:
        with free_port() as dead:
            async with serving() as contact:
                targets = ("nonsense", "unix:/tmp/x", f"127.0.0.1:{dead}", *contact.targets)
                contact = PeerContact(contact.peer_id, targets, contact.certificate_der)
                async with asyncio.timeout(FAST_S):
                    assert await ask(dialer, contact) == ALICE.peer_id

    with_dialer(test)


def test_nobody_there_fails_fast_and_says_so() -> None:
    async def test(dialer: TcpDialer) -> None:
        with free_port() as dead:
            target = f"127.0.0.1:{dead}"
            contact = PeerContact(HOST.peer_id, (target,), CERTIFICATE.cert_der)
            for _ in range(3):  # no back-off the second time, either
                async with asyncio.timeout(FAST_S):
                    with pytest.raises(UnreachableError, match=f"{target}: .*refused"):
                        await ask(dialer, contact)

    with_dialer(test)


def test_a_silent_listener_costs_its_deadline_and_no_more() -> None:
    async def test(dialer: TcpDialer) -> None:
        with socket.socket() as silent:  # the kernel accepts; nobody ever answers
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            target = f"127.0.0.1:{silent.getsockname()[1]}"
            async with serving() as contact:
                targets = (target, *contact.targets)
                both = PeerContact(contact.peer_id, targets, contact.certificate_der)
                assert await ask(dialer, both) == ALICE.peer_id
            contact = PeerContact(HOST.peer_id, (target,), CERTIFICATE.cert_der)
            await dialer.forget(HOST.peer_id)
            async with asyncio.timeout(FAST_S):
                with pytest.raises(UnreachableError, match="did not answer in time"):
                    await ask(dialer, contact, timeout_s=0.05)

    with_dialer(test, TcpDialer(ALICE, target_s=1.0))


def test_callers_at_the_same_time_share_one_dial() -> None:
    async def test(dialer: TcpDialer) -> None:
        async with serving() as contact:
            answers = await asyncio.gather(*(ask(dialer, contact) for _ in range(50)))
            assert answers == [ALICE.peer_id] * 50
            assert dialer.links == 1

    with_dialer(test)


def test_one_caller_that_gives_up_does_not_break_the_dial_of_another() -> None:
    async def test(dialer: TcpDialer) -> None:
        async with serving() as contact:
            first = asyncio.create_task(ask(dialer, contact))
            second = asyncio.create_task(ask(dialer, contact))
            await asyncio.sleep(0)
            first.cancel()
            assert await second == ALICE.peer_id
            with pytest.raises(asyncio.CancelledError):
                await first

    with_dialer(test)


def test_the_number_of_channels_is_bounded() -> None:
    async def test(dialer: TcpDialer) -> None:
        async with serving() as contact:
            for i in range(5):
                peer_id = KeyPair.from_seed(bytes([i]) * 32).peer_id
                other = PeerContact(peer_id, contact.targets, contact.certificate_der)
                await ask(dialer, other)
                assert dialer.links <= 2

    with_dialer(test, TcpDialer(ALICE, links_max=2))


def test_a_restarted_server_is_called_again_with_a_new_session() -> None:
    async def test(dialer: TcpDialer) -> None:
        async with serving() as contact:
            assert await ask(dialer, contact) == ALICE.peer_id
        async with serving(contact.targets[0]):
            # The old connection may be found broken by the first call.
            for _ in range(2):
                async with asyncio.timeout(FAST_S):
                    try:
                        answer = await ask(dialer, contact)
                    except UnreachableError:
                        answer = await ask(dialer, contact)
                assert answer == ALICE.peer_id

    with_dialer(test)


def test_a_session_that_the_server_forgot_is_opened_again() -> None:
    async def flood(contact: PeerContact) -> None:
        """Opens so many sessions as ALICE that the server forgets the ones before."""
        for _ in range(SESSIONS_PER_PEER_MAX):
            other = TcpDialer(ALICE)
            await ask(other, contact)
            await other.close()

    async def test(dialer: TcpDialer) -> None:
        async with serving() as contact:
            await ask(dialer, contact)
            await flood(contact)
            assert await asyncio.gather(*(ask(dialer, contact) for _ in range(20)))
            await flood(contact)
            async with dialer.stream(contact, "Test/Echo", pb.Refusal, timeout_s=LONG_S) as stream:
                await stream.write(pb.Refusal(epoch=3))
                assert await stream.read() == pb.Refusal(epoch=3)
            assert dialer.links == 1

    with_dialer(test)


def test_closing_ends_calls_under_way_and_refuses_later_ones() -> None:
    async def test(dialer: TcpDialer) -> None:
        async with serving() as contact:
            entered = asyncio.Event()

            async def listen() -> None:
                async with dialer.stream(
                    contact, "Test/Echo", pb.Refusal, timeout_s=LONG_S
                ) as stream:
                    entered.set()
                    await stream.read()

            listening = asyncio.create_task(listen())
            await entered.wait()
            await dialer.close()
            with pytest.raises(CancelledByUs):
                await listening
            with pytest.raises(CancelledByUs):
                await ask(dialer, contact)

    with_dialer(test)


@pytest.mark.parametrize(
    ("target", "uri"),
    [
        ("127.0.0.1:80", "ipv4:127.0.0.1:80"),
        ("[::1]:80", "ipv6:[::1]:80"),
        ("node.example.org:443", "dns:node.example.org:443"),
    ],
)
def test_targets_become_names_that_grpc_knows(target: str, uri: str) -> None:
    assert target_uri(target) == uri


@pytest.mark.parametrize(
    "target",
    [
        *("", "host", "host:0", "host:65536", "[zz]:1", "[host]:1", "::1:80", "a b:1", "h:1\n"),
        *("unix:/a:1", "xds:///x:1", "a" * 300 + ":1"),
    ],
)
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(MalformedError):
        target_uri(target)


# A server in a process of its own, to be killed or stopped.
_SERVER = """
import asyncio, sys
from pathlib import Path
from p2pnet.net.handlers import unary
from p2pnet.net.rpc_server import RpcServer
from p2pnet.net.tls import load_or_create_certificate
from p2pnet.v1 import common_pb2 as pb

async def whoami(request, caller):
    return pb.Refusal(host=caller.peer_id)

async def main():
    server = RpcServer(load_or_create_certificate(Path(sys.argv[1])))
    server.add("Test", {"WhoAmI": unary(whoami, pb.Refusal, pb.Refusal)})
    print(await server.start("127.0.0.1:0"), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextmanager
def server_process(directory: Path) -> Iterator[tuple[int, PeerContact]]:
    certificate = load_or_create_certificate(directory)
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        target = process.stdout.readline().strip()
        yield process.pid, PeerContact(HOST.peer_id, (target,), certificate.cert_der)
    finally:
        process.kill()
        process.communicate()


def test_a_killed_server_is_unreachable_at_once(tmp_path: Path) -> None:
    with server_process(tmp_path) as (pid, contact):

        async def test(dialer: TcpDialer) -> None:
            assert await ask(dialer, contact) == ALICE.peer_id
            os.kill(pid, signal.SIGKILL)
            for _ in range(3):
                async with asyncio.timeout(FAST_S):
                    with pytest.raises(UnreachableError):
                        await ask(dialer, contact)

        with_dialer(test)


def test_a_stopped_server_costs_its_callers_their_deadline_and_its_channel(tmp_path: Path) -> None:
    with server_process(tmp_path) as (pid, contact):

        async def test(dialer: TcpDialer) -> None:
            assert await ask(dialer, contact) == ALICE.peer_id
            os.kill(pid, signal.SIGSTOP)
            # On the kept channel, which is dropped; then on a new one, still being dialled.
            for dials_left in (0, 1):
                began = time.monotonic()
                with pytest.raises(UnreachableError, match="did not answer in time"):
                    await ask(dialer, contact, timeout_s=0.2)
                assert time.monotonic() - began < FAST_S
                assert dialer.links == dials_left
            os.kill(pid, signal.SIGCONT)
            assert await ask(dialer, contact) == ALICE.peer_id

        with_dialer(test)
