"""The gRPC server: who may call, how much at once, and what becomes of errors.

With a certificate it serves TLS, and lets nobody in without a session (DESIGN
D8); without one it serves a Unix socket that only this user can open. It may be
made anywhere; `start` and `stop`, and all handlers, run on the asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from p2pnet import clock
from p2pnet.causality import Causality
from p2pnet.errors import ResourceError
from p2pnet.net.channel import COMMON_OPTIONS, HLC_METADATA, KEEPALIVE_S, OPEN_METADATA
from p2pnet.net.handlers import Caller, Context, Method, RawRequests, refusal_of, unary
from p2pnet.net.session import PROTOCOL_VERSIONS, SECRET_BYTES, SESSION_METADATA, SessionTable
from p2pnet.net.tls import ServerCertificate
from p2pnet.v1 import session_pb2

logger = logging.getLogger(__name__)

CALLS_MAX = 4096  # under way at once, of all callers
CALLS_PER_PEER_MAX = 1024
CONNECTIONS_MAX = 4096
UNIX_PATH_BYTES_MAX = 107  # sun_path in unix(7)

_OPTIONS = (
    *COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # by default a second server silently shares the port
    ("grpc.max_concurrent_streams", CALLS_PER_PEER_MAX),
    ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
)


class RpcServer:
    """Serves the methods that are added to it."""

    def __init__(
        self,
        certificate: ServerCertificate | None = None,
        *,
        versions: tuple[int, int] = PROTOCOL_VERSIONS,
        calls_max: int = CALLS_MAX,
        calls_per_peer_max: int = CALLS_PER_PEER_MAX,
        causality: Causality | None = None,
    ) -> None:
        self._certificate = certificate
        self._door = _Door(calls_per_peer_max, causality)
        if certificate is not None:
            self._door.sessions = SessionTable(certificate.digest, versions)
            self.add("Session", _session_service(self._door.sessions))
        self._calls_max = calls_max
        self._server: grpc.aio.Server | None = None

    def add(self, service: str, methods: Mapping[str, Method]) -> None:
        """Serves `methods` (by name) of the service of that name in package p2pnet.v1."""
        for name, method in methods.items():
            self._door.methods[f"/p2pnet.v1.{service}/{name}"] = method

    async def start(self, address: str) -> str:
        """Listens on "host:port" and returns it, with the real port for port 0.

        Raises:
            ResourceError: the port is taken, or the address is not this machine's.
        """
        if self._certificate is None:
            raise ValueError("a server on a network needs a certificate")
        pair = (self._certificate.key_pem, self._certificate.cert_pem)
        credentials = grpc.ssl_server_credentials([pair])
        server = self._make()
        try:
            port = server.add_secure_port(address, credentials)
        except RuntimeError:
            raise ResourceError(
                f"cannot listen on {address}: the port is taken, or the address is not "
                "this machine's; choose another, or port 0 for any that is free"
            ) from None
        await server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def start_unix(self, path: Path) -> None:
        """Listens on a Unix socket; its directory should be this user's alone.

        A socket that a dead process left there is replaced.

        Raises:
            ResourceError: no socket can be made there.
        """
        if self._certificate is not None:
            raise ValueError("a server with a certificate serves networks, not a Unix socket")
        if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
            raise ResourceError(f"{path} is too long for a socket: choose a shorter data directory")
        server = self._make()
        try:
            server.add_insecure_port(f"unix:{path}")
            os.chmod(path, 0o600)
        except (RuntimeError, OSError) as error:
            raise ResourceError(f"cannot make the socket {path}: {error}") from error
        await server.start()

    async def stop(self, grace_s: float = 1.0) -> None:
        """Takes no more calls, gives those under way `grace_s`, then cancels them."""
        if self._server is not None:
            await self._server.stop(grace_s)

    def _make(self) -> grpc.aio.Server:
        if self._server is not None:
            raise RuntimeError("a server listens once")
        self._server = grpc.aio.server(
            handlers=(self._door,), options=_OPTIONS, maximum_concurrent_rpcs=self._calls_max
        )
        return self._server


class _Door(grpc.GenericRpcHandler):
    """Finds a call's method once its caller is known.

    A stranger is turned away before a byte of the request is read.
    """

    def __init__(self, calls_per_peer_max: int, causality: Causality | None) -> None:
        self._causality = causality
        self.methods: dict[str, Method] = {}
        self.sessions: SessionTable | None = None
        self._calls_per_peer_max = calls_per_peer_max
        self._calls: dict[str, int] = {}  # under way, by peer

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """What gRPC asks for each call; None: no such method."""
        path = str(handler_call_details.method)
        peer_id: str | None = ""
        if self.sessions is not None and path not in _OPEN_TO_ALL:
            metadata = dict(handler_call_details.invocation_metadata or ())
            token = metadata.get(SESSION_METADATA)
            known = isinstance(token, bytes) and self.sessions.caller(token, clock.now())
            peer_id = known or None
            if peer_id is not None and self._causality is not None:
                self._causality.incoming(metadata.get(HLC_METADATA), peer_id)
        if peer_id is None:
            # On the wire all kinds of call are alike; this one reads nothing.
            return grpc.stream_stream_rpc_method_handler(_refuse_stranger)
        method = self.methods.get(path)
        return None if method is None else self._handler(method, peer_id)

    def _handler(self, method: Method, peer_id: str) -> grpc.RpcMethodHandler[Any, Any]:
        async def answer_one(request: bytes, context: Context) -> bytes | None:
            return await self._answer(method, peer_id, _just(request), context)

        async def answer_stream(requests: RawRequests, context: Context) -> None:
            await context.send_initial_metadata(((OPEN_METADATA, "1"), *self._stamp()))
            await self._answer(method, peer_id, requests, context)

        if method.is_unary:
            return grpc.unary_unary_rpc_method_handler(answer_one)
        return grpc.stream_stream_rpc_method_handler(answer_stream)

    async def _answer(
        self, method: Method, peer_id: str, requests: RawRequests, context: Context
    ) -> bytes | None:
        left_s = context.time_remaining()
        timeout_s = method.timeout_s if left_s is None else min(left_s, method.timeout_s)
        try:
            with self._counted(peer_id):
                async with asyncio.timeout(timeout_s):
                    caller = Caller(peer_id, timeout_s, self._causality)
                    reply = await method.run(requests, caller, context.write)
            context.set_trailing_metadata(self._stamp())
            return reply
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # the caller has left, or this node goes
            # What the handler waited for was cancelled. gRPC sends no status for that by
            # itself, and the caller would wait until its deadline.
            code, detail = grpc.StatusCode.ABORTED, "what the call waited for was given up"
        except Exception as error:
            code, detail = refusal_of(error)
            if code is grpc.StatusCode.INTERNAL:
                logger.exception("a handler failed, called by %s", peer_id or "this user")
        await context.abort(code, detail, self._stamp())

    def _stamp(self) -> tuple[tuple[str, str], ...]:
        """What an answer carries: the time after all that answering it did."""
        return () if self._causality is None else ((HLC_METADATA, self._causality.outgoing()),)

    @contextmanager
    def _counted(self, peer_id: str) -> Iterator[None]:
        calls = self._calls.get(peer_id, 0)
        if calls >= self._calls_per_peer_max:
            raise ResourceError(f"{calls} of your calls are under way already: wait for some")
        self._calls[peer_id] = calls + 1
        try:
            yield
        finally:
            self._calls[peer_id] -= 1
            if not self._calls[peer_id]:
                del self._calls[peer_id]


_OPEN_TO_ALL = ("/p2pnet.v1.Session/Challenge", "/p2pnet.v1.Session/Open")


def _session_service(sessions: SessionTable) -> dict[str, Method]:
    async def challenge(
        request: session_pb2.ChallengeRequest, caller: Caller
    ) -> session_pb2.ChallengeReply:
        return sessions.challenge(request, clock.now(), secrets.token_bytes(SECRET_BYTES))

    async def open_session(
        request: session_pb2.OpenRequest, caller: Caller
    ) -> session_pb2.OpenReply:
        return sessions.open(request, clock.now(), secrets.token_bytes(SECRET_BYTES))

    return {
        "Challenge": unary(challenge, session_pb2.ChallengeRequest, session_pb2.ChallengeReply),
        "Open": unary(open_session, session_pb2.OpenRequest, session_pb2.OpenReply),
    }


async def _refuse_stranger(requests: RawRequests, context: Context) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "no session: prove who you are with Session.Challenge and Session.Open first",
    )


async def _just(request: bytes) -> AsyncIterator[bytes]:
    yield request
