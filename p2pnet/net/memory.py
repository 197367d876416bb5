"""A network inside one process, for tests: `Network` without sockets, and with faults.

What `libp2p.Libp2pNetwork` promises holds here too, but that a handler runs in
its caller's task and ends with it. Nothing is random, and under trio's MockClock
timeouts take no time.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import trio

from p2pnet.errors import (
    LocalError,
    MalformedError,
    RefusedError,
    RemoteError,
    UnreachableError,
    UsageError,
)
from p2pnet.keys import KeyPair, short
from p2pnet.net import multiaddr
from p2pnet.net.network import MESSAGE_BYTES_MAX, ConnectionChange, Handler

_log = logging.getLogger(__name__)


class MemoryFabric:
    """The switchboard that a test's networks share.

    `sent` counts the requests that reached their peer, by (from, to, protocol).
    """

    def __init__(self) -> None:
        self.sent: Counter[tuple[str, str, str]] = Counter()
        self._peers: dict[str, MemoryNetwork] = {}
        self._links: dict[frozenset[str], None] = {}
        self._cuts: dict[frozenset[str], None] = {}
        self._frozen: dict[str, None] = {}

    def network(self, who: KeyPair | str, *listen: str) -> MemoryNetwork:
        """A peer, by key pair or peer id, at the multiaddrs `listen`; none for a client.

        One that was killed, or is still there, is replaced: a restart.
        """
        peer_id = who if isinstance(who, str) else who.peer_id
        self.kill(peer_id)
        network = MemoryNetwork(self, peer_id, tuple(multiaddr.parse(a).where for a in listen))
        self._peers[peer_id] = network
        return network

    def cut(self, a: str, b: str) -> None:
        """Nothing passes between two peers from now on, and neither is told."""
        self._cuts[frozenset((a, b))] = None

    def heal(self, a: str, b: str) -> None:
        """Undoes `cut`."""
        self._cuts.pop(frozenset((a, b)), None)

    def freeze(self, peer_id: str) -> None:
        """A peer neither answers nor asks any more; its connections stay up (SIGSTOP)."""
        self._frozen[peer_id] = None

    def thaw(self, peer_id: str) -> None:
        """Undoes `freeze`."""
        self._frozen.pop(peer_id, None)

    def kill(self, peer_id: str) -> None:
        """A peer is gone: its connections close and its address refuses (SIGKILL)."""
        self._peers.pop(peer_id, None)
        self._frozen.pop(peer_id, None)
        for other in self._linked(peer_id):
            self._unlink(peer_id, other)

    def messages(self, protocol: str = "") -> int:
        """How many requests reached their peer, of one protocol or of all."""
        return sum(n for (_, _, p), n in self.sent.items() if protocol in ("", p))

    # For MemoryNetwork

    def _linked(self, peer_id: str) -> tuple[str, ...]:
        both = [sorted(link) for link in self._links if peer_id in link]
        return tuple(sorted(a if b == peer_id else b for a, b in both))

    def _is_linked(self, a: str, b: str) -> bool:
        return frozenset((a, b)) in self._links

    def _link(self, a: MemoryNetwork, b: MemoryNetwork, addr: str) -> None:
        self._links[frozenset((a.peer_id, b.peer_id))] = None
        a._tell(ConnectionChange(b.peer_id, True, addr))
        b._tell(ConnectionChange(a.peer_id, True, (a.addrs() or ("",))[0]))

    def _unlink(self, a: str, b: str) -> None:
        if self._links.pop(frozenset((a, b)), "absent") is None:
            for one, other in ((a, b), (b, a)):
                if one in self._peers:
                    self._peers[one]._tell(ConnectionChange(other, False, ""))

    def _is_silent(self, a: str, b: str) -> bool:
        return frozenset((a, b)) in self._cuts or a in self._frozen or b in self._frozen

    def _at(self, addr: str) -> MemoryNetwork | None:
        return next((peer for peer in self._peers.values() if addr in peer.addrs()), None)

    def _peer(self, network: MemoryNetwork, peer_id: str) -> MemoryNetwork:
        if self._peers.get(network.peer_id) is not network:
            raise UnreachableError("this peer was killed")
        if (peer := self._peers.get(peer_id)) is None:
            raise UnreachableError(f"peer {short(peer_id)} is gone")
        return peer


class MemoryNetwork:
    """One peer's `Network`. Made by `MemoryFabric.network`."""

    def __init__(self, fabric: MemoryFabric, peer_id: str, addrs: tuple[str, ...]) -> None:
        self._fabric = fabric
        self._peer_id = peer_id
        self._addrs = addrs
        self._handlers: dict[str, Handler] = {}
        self._watchers: list[Callable[[ConnectionChange], None]] = []
        self._known_addrs: dict[str, tuple[str, ...]] = {}
        self._offences: Counter[str] = Counter()

    @property
    def peer_id(self) -> str:
        """Ours."""
        return self._peer_id

    def addrs(self) -> tuple[str, ...]:
        """Where others may reach us; none for a client."""
        return self._addrs

    def serve(self, protocol: str, handler: Handler) -> None:
        """Answers `protocol` with `handler` from now on."""
        self._handlers[protocol] = handler

    def watch(self, callback: Callable[[ConnectionChange], None]) -> None:
        """Calls back at each peer's connection and disconnection."""
        self._watchers.append(callback)

    def connected(self) -> tuple[str, ...]:
        """The peers with a connection, sorted."""
        return self._fabric._linked(self._peer_id)

    def seen_at(self, peer_id: str) -> str:
        """Where a connected peer is: the first address that it listens on, "" if it has none."""
        if not self._fabric._is_linked(self._peer_id, peer_id):
            return ""
        return (self._fabric._peers[peer_id].addrs() or ("",))[0]

    def offences(self, peer_id: str) -> int:
        """How often a peer's messages made a handler fail."""
        return self._offences[peer_id]

    async def drop(self, peer_id: str) -> None:
        """Closes the connection to a peer and forgets its addresses."""
        self._forget(peer_id)
        await trio.lowlevel.checkpoint()

    async def request(
        self,
        peer_id: str,
        protocol: str,
        message: bytes,
        *,
        timeout_s: float,
        addrs: Sequence[str] = (),
        wants_reply: bool = True,
    ) -> bytes:
        """Sends one message and returns the reply; see `Network.request`."""
        if len(message) > MESSAGE_BYTES_MAX:
            raise ValueError(f"a message of {len(message)} bytes, over {MESSAGE_BYTES_MAX}")
        deadline = trio.current_time() + timeout_s
        await self.connect(peer_id, addrs, timeout_s=timeout_s)
        reply = b""
        with trio.CancelScope(deadline=deadline) as scope:
            reply = await self._exchange(peer_id, protocol, message, wants_reply)
        if not scope.cancelled_caught:
            return reply
        self._forget(peer_id)
        raise UnreachableError(f"peer {short(peer_id)} did not answer in time")

    async def connect(self, peer_id: str, addrs: Sequence[str], *, timeout_s: float) -> None:
        """Makes sure of a connection, one address at a time; raises UnreachableError."""
        await trio.lowlevel.checkpoint()
        if self._fabric._is_linked(self._peer_id, peer_id):
            return
        if peer_id == self._peer_id:
            raise UnreachableError("a node does not connect to itself")
        with trio.move_on_after(timeout_s):
            for addr in addrs or self._known_addrs.get(peer_id, ()):
                try:
                    there = self._fabric._at(multiaddr.parse(addr).where)
                except MalformedError:
                    continue  # one of another transport
                if there is None or there.peer_id != peer_id:
                    continue
                await self._pass(peer_id)
                self._fabric._peer(self, peer_id)
                if not self._fabric._is_linked(self._peer_id, peer_id):
                    self._fabric._link(self, there, addr)
                self._known_addrs[peer_id] = (addr,)
                return
        raise UnreachableError(f"no connection to peer {short(peer_id)}")

    async def identify(self, addr: str, *, timeout_s: float) -> str:
        """Connects to a multiaddr with /p2p/ at its end, and returns the peer id."""
        try:
            end = multiaddr.parse(addr)
        except MalformedError as error:
            raise UsageError(str(error)) from None
        if not end.peer_id:
            raise UsageError(f"{addr} does not say who is there: it should end in /p2p/PEER_ID")
        await self.connect(end.peer_id, [end.where], timeout_s=timeout_s)
        return end.peer_id

    async def protocols(self, peer_id: str, *, timeout_s: float) -> tuple[str, ...]:
        """What a connected peer serves, sorted; empty if unknown."""
        await trio.lowlevel.checkpoint()
        if not self._fabric._is_linked(self._peer_id, peer_id):
            return ()
        spoken: list[str] = []
        with trio.move_on_after(timeout_s):
            await self._pass(peer_id)
            spoken += self._fabric._peer(self, peer_id)._handlers
        return tuple(sorted(spoken))

    def listen_addrs(self, peer_id: str) -> tuple[str, ...]:
        """Where a connected peer listens."""
        if not self._fabric._is_linked(self._peer_id, peer_id):
            return ()
        return self._fabric._peers[peer_id].addrs()

    async def _exchange(
        self, peer_id: str, protocol: str, message: bytes, wants_reply: bool
    ) -> bytes:
        await self._pass(peer_id)
        peer = self._fabric._peer(self, peer_id)
        self._fabric.sent[self._peer_id, peer_id, protocol] += 1
        reply = await peer._answer(self._peer_id, protocol, message)
        await self._pass(peer_id)
        if not wants_reply:
            return b""
        if reply is None:
            await trio.sleep_forever()
        if len(reply) > MESSAGE_BYTES_MAX:
            raise MalformedError(f"a reply of {len(reply)} bytes, over {MESSAGE_BYTES_MAX}")
        return reply

    async def _pass(self, peer_id: str) -> None:
        """Takes a message to or from a peer; for ever, where nothing passes."""
        await trio.lowlevel.checkpoint()
        if self._fabric._is_silent(self._peer_id, peer_id):
            await trio.sleep_forever()

    async def _answer(self, asker: str, protocol: str, message: bytes) -> bytes | None:
        if (handler := self._handlers.get(protocol)) is None:
            raise MalformedError(f"peer {short(self._peer_id)} does not speak {protocol}")
        try:
            return await handler(asker, message)
        except LocalError as error:
            _log.warning("could not serve peer %s: %s", short(asker), error)
        except (UnreachableError, RefusedError) as error:
            _log.debug("a request of peer %s: %s", short(asker), error)
        except RemoteError:
            self._offences[asker] += 1
        except Exception:
            _log.exception("a handler failed on a message of peer %s", short(asker))
            self._offences[asker] += 1
        raise UnreachableError(f"peer {short(self._peer_id)} ended the stream without a reply")

    def _forget(self, peer_id: str) -> None:
        self._known_addrs.pop(peer_id, None)
        self._fabric._unlink(self._peer_id, peer_id)

    def _tell(self, change: ConnectionChange) -> None:
        for callback in self._watchers:
            callback(change)
