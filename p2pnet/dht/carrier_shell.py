"""Carries the DHT's requests to peers and the peers' answers back.

Requests to one peer that come together travel together, if it keeps records as we do.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from p2pnet.dht import events as ev
from p2pnet.dht import wire
from p2pnet.dht.wire import RECORD_PROTOCOL, Kind, Message
from p2pnet.errors import MalformedError, RemoteError
from p2pnet.keys import peer_id_bytes
from p2pnet.net.network import MESSAGE_BYTES_MAX, Network, PeerInfo

_log = logging.getLogger(__name__)


class Carrier:
    """Sends what the core wants sent, and feeds it what becomes of that.

    Args:
        server: whether we name ourselves to those whom we ask.
        protocol: the DHT's.
        feed: takes the core's events.
        spawn: starts a task.
        is_holder: whether a peer is known to keep records.
        is_open: whether the answer to a request (its id) is still of use.
        wall_ms: the wall clock.
    """

    def __init__(
        self,
        network: Network,
        *,
        server: bool,
        protocol: str,
        feed: Callable[..., None],
        spawn: Callable[..., None],
        is_holder: Callable[[str], bool],
        is_open: Callable[[int], bool],
        wall_ms: Callable[[], int],
    ) -> None:
        self._network = network
        self._server = server
        self._protocol = protocol
        self._feed = feed
        self._spawn: Callable[[Callable[..., Awaitable[None]], object], None] = spawn
        self._is_holder = is_holder
        self._is_open = is_open
        self._wall_ms = wall_ms
        # Requests that wait for a batch to the same peer to come back.
        self._lines: dict[str, list[ev.SendRequest]] = {}
        self.sent = 0
        self.failed = 0

    def send(self, peer_id: str, requests: list[ev.SendRequest]) -> None:
        """Sends requests to one peer.

        While a batch is under way there, the others wait and make the next one, which
        is Nagle's rule (RFC 896) and needs no timer.
        """
        holder = self._is_holder(peer_id)
        batched: list[ev.SendRequest] = []
        for request in requests:
            if holder and request.message.kind is not Kind.ADD_PROVIDER:
                batched.append(request)
            else:
                self._spawn(self._request, request)
        if peer_id in self._lines:
            self._lines[peer_id] += batched
        else:
            self._send_batched(peer_id, batched)

    def us(self) -> PeerInfo:
        """Ourselves, and where we are now."""
        return PeerInfo(self._network.peer_id, self._network.addrs()[: wire.ADDRS_MAX])

    def request_with_us(self, message: Message) -> Message:
        """A request with our present addresses wherever it names us; see `Message.closer`."""
        message = self._naming_us(message)
        return replace(message, closer=(self.us(),)) if self._server else message

    def reply_with_us(self, message: Message) -> Message:
        """A reply with our present addresses wherever it names us."""
        message, ours = self._naming_us(message), self.us()
        if message.kind is Kind.FIND_NODE and message.key == peer_id_bytes(ours.peer_id):
            # go-libp2p takes into its table only who names itself when asked for itself.
            closer = (ours, *message.closer[: wire.PEERS_MAX - 1])
            return replace(message, closer=closer)
        return message

    def _naming_us(self, message: Message) -> Message:
        if not message.providers:
            return message
        ours = self.us()
        named = (ours if peer.peer_id == ours.peer_id else peer for peer in message.providers)
        return replace(message, providers=tuple(named))

    def _send_batched(self, peer_id: str, requests: list[ev.SendRequest]) -> None:
        requests = [request for request in requests if self._is_open(request.rpc_id)]
        if len(requests) > 1:
            self._lines[peer_id] = requests[wire.BATCH_MAX :]
            self._spawn(self._request_batch, requests[: wire.BATCH_MAX])
        elif requests:
            self._spawn(self._request, requests[0])

    async def _request(self, effect: ev.SendRequest) -> None:
        wants_reply = effect.message.kind is not Kind.ADD_PROVIDER
        event: ev.Event
        try:
            request = wire.serialise(self.request_with_us(effect.message))
            data = await self._ask(effect, self._protocol, request, wants_reply=wants_reply)
            message = wire.parse(data) if wants_reply else None
            event = await self._arrived(effect, message)
        except RemoteError as error:
            event = self._no_answer(effect, error)
        self._feed(event)

    async def _request_batch(self, effects: list[ev.SendRequest]) -> None:
        peer_id = effects[0].peer.peer_id
        events: list[ev.Event] = []
        replies: list[bytes] = []
        try:
            batch = wire.serialise_batch([self.request_with_us(e.message) for e in effects])
            if len(batch) <= MESSAGE_BYTES_MAX:
                reply = await self._ask(effects[0], RECORD_PROTOCOL, batch, wants_reply=True)
                replies = wire.parse_batch(reply)
            if len(replies) > len(effects):
                raise MalformedError("a batch with more replies than requests")
        except RemoteError as error:
            events += [self._no_answer(effect, error) for effect in effects]
        else:
            for effect, data in zip(effects, replies, strict=False):
                try:
                    events.append(await self._arrived(effect, wire.parse(data)))
                except RemoteError as error:
                    events.append(self._no_answer(effect, error))
        self._feed(*events)
        for effect in effects[len(events) :]:  # what made a message too large, by itself
            self._spawn(self._request, effect)
        self._send_batched(peer_id, self._lines.pop(peer_id))

    async def _ask(
        self, effect: ev.SendRequest, protocol: str, data: bytes, *, wants_reply: bool
    ) -> bytes:
        self.sent += 1
        try:
            return await self._network.request(
                effect.peer.peer_id,
                protocol,
                data,
                timeout_s=effect.timeout_s,
                addrs=effect.peer.addrs,
                wants_reply=wants_reply,
            )
        except RemoteError:
            self.failed += 1
            raise

    async def _arrived(self, effect: ev.SendRequest, message: Message | None) -> ev.ReplyArrived:
        peer_id = effect.peer.peer_id
        spoken = await self._network.protocols(peer_id, timeout_s=effect.timeout_s)
        holder, addr = RECORD_PROTOCOL in spoken, self._network.seen_at(peer_id)
        addrs = self._network.listen_addrs(peer_id)[: wire.ADDRS_MAX]
        return ev.ReplyArrived(effect.rpc_id, message, holder, self._wall_ms(), addr, addrs)

    def _no_answer(self, effect: ev.SendRequest, error: RemoteError) -> ev.RequestFailed:
        _log.debug("%s to peer %s: %s", effect.message.kind.name, effect.peer.peer_id, error)
        return ev.RequestFailed(effect.rpc_id)
