"""Calls to peers: finds a way to one, proves who we are, and keeps the channel.

`Dialer` is the seam: `TcpDialer` reaches peers that can be reached directly;
one that tunnels through a relay has the same face. Everything here runs on the
asyncio loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from p2pnet import clock
from p2pnet.causality import Causality
from p2pnet.errors import CancelledByUs, MalformedError, UnreachableError
from p2pnet.keys import KeyPair, sha256, short
from p2pnet.net.channel import (
    CHANNEL_OPTIONS,
    Channel,
    Metadata,
    NoSessionError,
    Stream,
    target_uri,
)
from p2pnet.net.session import PROTOCOL_VERSIONS, SESSION_METADATA, make_proof, version_range
from p2pnet.net.tls import SERVER_NAME, pem_of
from p2pnet.v1 import session_pb2

M = TypeVar("M", bound=Message)
T = TypeVar("T")

TARGETS_MAX = 8  # of one peer that are tried
TARGET_S = 3.0  # for one of them, from the connection to the open session
LINKS_MAX = 256  # channels kept


@dataclass(frozen=True, slots=True)
class PeerContact:
    """How to reach a peer over gRPC: "host:port" targets and its certificate, from its advert."""

    peer_id: str
    targets: tuple[str, ...]
    certificate_der: bytes


class Dialer(Protocol):
    """Authenticated calls to peers. Errors are those of `Channel.call`."""

    async def call(
        self,
        contact: PeerContact,
        method: str,
        request: Message,
        reply_type: type[M],
        *,
        timeout_s: float,
    ) -> M:
        """One request, one reply; `timeout_s` covers the way there too."""
        ...

    def stream(
        self, contact: PeerContact, method: str, reply_type: type[M], *, timeout_s: float
    ) -> AbstractAsyncContextManager[Stream[M]]:
        """An open stream, for `async with`; see `Channel.stream`."""
        ...

    async def forget(self, peer_id: str) -> None:
        """Drops the peer's channels: the next call makes a new one."""
        ...

    async def close(self) -> None:
        """Drops all; calls under way raise CancelledByUs, and so do later ones."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Session:
    metadata: Metadata
    renew_at: float


class TcpDialer:
    """Dials peers' targets over TCP with TLS, pinned to each one's certificate."""

    def __init__(
        self,
        keypair: KeyPair,
        *,
        versions: tuple[int, int] = PROTOCOL_VERSIONS,
        links_max: int = LINKS_MAX,
        target_s: float = TARGET_S,
        causality: Causality | None = None,
    ) -> None:
        self._keypair = keypair
        self._causality = causality
        self._versions = versions
        self._links_max = links_max
        self._target_s = target_s
        self._closed = False
        # By (peer, certificate), the one used last at the end; one that is being
        # dialled is there already, so that callers at the same time share it.
        self._links: OrderedDict[tuple[str, bytes], _Link] = OrderedDict()
        self._chores: dict[asyncio.Task[None], None] = {}  # channels being closed

    async def call(
        self,
        contact: PeerContact,
        method: str,
        request: Message,
        reply_type: type[M],
        *,
        timeout_s: float,
    ) -> M:
        """See `Dialer`."""

        async def ask(channel: Channel, metadata: Metadata, left_s: float) -> M:
            return await channel.call(
                method, request, reply_type, timeout_s=left_s, metadata=metadata
            )

        until = clock.now() + timeout_s
        async with self._linked(contact) as link:
            return await link.let_in(ask, until)

    @asynccontextmanager
    async def stream(
        self, contact: PeerContact, method: str, reply_type: type[M], *, timeout_s: float
    ) -> AsyncIterator[Stream[M]]:
        """See `Dialer`."""

        async def ask(channel: Channel, metadata: Metadata, left_s: float) -> Stream[M]:
            return await channel.open(method, reply_type, timeout_s=left_s, metadata=metadata)

        until = clock.now() + timeout_s
        async with self._linked(contact) as link:
            stream = await link.let_in(ask, until)
            try:
                yield stream
            finally:
                stream.cancel()

    @property
    def links(self) -> int:
        """How many channels are kept, those being dialled among them."""
        return len(self._links)

    async def forget(self, peer_id: str) -> None:
        """See `Dialer`. Calls under way on the old channels may still end."""
        for link in [link for (peer, _), link in self._links.items() if peer == peer_id]:
            self._retire(link)

    async def close(self) -> None:
        """See `Dialer`."""
        self._closed = True
        for link in list(self._links.values()):
            self._retire(link)
            self._dispose(link)
        await asyncio.gather(*self._chores)

    @asynccontextmanager
    async def _linked(self, contact: PeerContact) -> AsyncIterator[_Link]:
        """The peer's link, kept open while in use and dropped when the peer was lost."""
        if self._closed:
            raise CancelledByUs(f"{_who(contact)} was not called: this node is shutting down")
        key = (contact.peer_id, contact.certificate_der)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = _Link(contact, self._dial, self._open_session)
            link.dialled.add_done_callback(lambda _: self._settle(link))
        self._links.move_to_end(key)
        while len(self._links) > self._links_max:
            self._retire(next(iter(self._links.values())))
        link.users += 1
        try:
            yield link
        finally:
            link.users -= 1
            self._settle(link)

    def _settle(self, link: _Link) -> None:
        if link.is_lost():
            self._retire(link)
        elif link.retired and not link.users:
            self._dispose(link)

    def _retire(self, link: _Link) -> None:
        """The next call dials anew; the channel closes with its last call."""
        link.retired = True
        if self._links.get(link.key) is link:
            del self._links[link.key]
        if not link.users:
            self._dispose(link)

    def _dispose(self, link: _Link) -> None:
        if not link.disposed:
            link.disposed = True
            chore = asyncio.create_task(link.close())
            self._chores[chore] = None
            chore.add_done_callback(self._chores.pop)

    async def _dial(self, contact: PeerContact) -> tuple[Channel, _Session]:
        """Tries a target after another; the first where the peer answers decides.

        Raises:
            UnreachableError: it answers at none.
            VersionError, RefusedError: it answers, and says no.
            MalformedError: its certificate is none.
        """
        root = pem_of(contact.certificate_der)
        failures = []
        for target in contact.targets[:TARGETS_MAX]:
            try:
                raw = grpc.aio.secure_channel(
                    target_uri(target),
                    grpc.ssl_channel_credentials(root),
                    options=(*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME)),
                )
            except MalformedError as error:
                failures.append(str(error))
                continue
            channel = Channel(
                raw,
                f"{_who(contact)} at {target}",
                causality=self._causality,
                peer_id=contact.peer_id,
            )
            try:
                return channel, await self._open_session(contact, channel)
            except UnreachableError as error:
                failures.append(str(error))
                await channel.close()
            except BaseException:
                await channel.close()
                raise
        raise UnreachableError("; ".join(failures) or f"{_who(contact)} has no address for gRPC")

    async def _open_session(self, contact: PeerContact, channel: Channel) -> _Session:
        until = clock.now() + self._target_s
        challenge = await channel.call(
            "Session/Challenge",
            session_pb2.ChallengeRequest(versions=version_range(self._versions)),
            session_pb2.ChallengeReply,
            timeout_s=self._target_s,
        )
        reply = await channel.call(
            "Session/Open",
            make_proof(self._keypair, challenge, sha256(contact.certificate_der), self._versions),
            session_pb2.OpenReply,
            timeout_s=max(until - clock.now(), 0.0),
        )
        # Renewed at half its life, so that the calls that cannot be repeated meet no old one.
        return _Session(((SESSION_METADATA, reply.token),), clock.now() + reply.lifetime_s / 2)


class _Link:
    """A channel to a peer, made once, with our session on it, for any number of calls."""

    def __init__(
        self,
        contact: PeerContact,
        dial: Callable[[PeerContact], Coroutine[Any, Any, tuple[Channel, _Session]]],
        open_session: Callable[[PeerContact, Channel], Awaitable[_Session]],
    ) -> None:
        self.key = (contact.peer_id, contact.certificate_der)
        self.dialled = asyncio.create_task(dial(contact))
        self.users = 0
        self.retired = False  # takes no new calls
        self.disposed = False  # closed, or about to be
        self._contact = contact
        self._open_session = open_session
        self._session: _Session | None = None
        self._lock = asyncio.Lock()

    async def let_in(
        self, ask: Callable[[Channel, Metadata, float], Awaitable[T]], until: float
    ) -> T:
        """Asks with a session; once more with a new one if the server knows ours no longer.

        That repeats nothing: a server that turns us away has not looked at the call.
        """
        channel, session = await self._in_time(self._ready(), until)
        try:
            return await ask(channel, session.metadata, max(until - clock.now(), 0.0))
        except NoSessionError:
            session = await self._in_time(self._renewed(channel, session), until)
            return await ask(channel, session.metadata, max(until - clock.now(), 0.0))

    def is_lost(self) -> bool:
        """Whether the dial failed, or a call since found nobody there."""
        if not self.dialled.done():
            return False
        if self.dialled.cancelled() or self.dialled.exception() is not None:
            return True
        return self.dialled.result()[0].lost

    async def close(self) -> None:
        """Breaks off a dial, or closes the channel."""
        self.dialled.cancel()  # nothing where it is done
        await asyncio.wait([self.dialled])
        if not self.dialled.cancelled() and self.dialled.exception() is None:
            await self.dialled.result()[0].close()

    async def _in_time(self, awaitable: Awaitable[T], until: float) -> T:
        try:
            async with asyncio.timeout(until - clock.now()):
                return await awaitable
        except TimeoutError:
            raise UnreachableError(f"{_who(self._contact)} did not answer in time") from None

    async def _ready(self) -> tuple[Channel, _Session]:
        try:
            if not self.dialled.done():
                # One caller that gives up must not break the dial for the others.
                await asyncio.shield(self.dialled)
            channel, session = self.dialled.result()
        except asyncio.CancelledError:
            if not self.dialled.cancelled():
                raise
            raise CancelledByUs("this node is shutting down") from None
        session = self._session or session
        if clock.now() >= session.renew_at:
            session = await self._renewed(channel, session)
        return channel, session

    async def _renewed(self, channel: Channel, old: _Session) -> _Session:
        async with self._lock:
            if self._session is None or self._session is old:
                self._session = await self._open_session(self._contact, channel)
            return self._session


def _who(contact: PeerContact) -> str:
    return f"peer {short(contact.peer_id)}"
