"""Runs the membership core over a network, on trio.

Everything happens on the trio thread, so that the core is never entered twice:
each event is handed in, and its effects are carried out before the next.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from p2pnet import clock
from p2pnet.core import Tick
from p2pnet.errors import MalformedError, RemoteError, UnreachableError, VersionError
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.events import (
    Accused,
    Answered,
    Departed,
    Describe,
    Description,
    Effect,
    Event,
    GossipConfig,
    Leave,
    Member,
    MemberChanged,
    Misbehaved,
    PeerConnected,
    PeerDisconnected,
    PeerRefused,
    Reply,
    Request,
    Send,
    State,
    Synced,
    SyncWith,
    Unanswered,
)
from p2pnet.gossip.membership import Membership
from p2pnet.gossip.statements import OpenAdvert, Versions
from p2pnet.keys import KeyPair, short
from p2pnet.net.groups import GroupOf, ip_group
from p2pnet.net.network import ConnectionChange, Network
from p2pnet.v1 import common_pb2
from p2pnet.v1 import gossip_pb2 as pb

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # libp2p installs trio-stubs, which hides trio's own

PROTOCOL = "/p2pnet/gossip/1.0.0"
_TOLD_MAX = 1024

log = logging.getLogger(__name__)


class Gossip:
    """Who is here. `run()` must be running for anything but the plain questions.

    `incarnation` is the wall clock's milliseconds at the start of this run; `now`
    gives seconds and never goes back. A client hears of members but is none.
    """

    def __init__(
        self,
        network: Network,
        keypair: KeyPair,
        *,
        grpc_targets: Sequence[str],
        certificate_der: bytes,
        capabilities: Capabilities,
        incarnation: int,
        rng: random.Random,
        now: Callable[[], float] = clock.now,
        client: bool = False,
        config: GossipConfig | None = None,
        group_of: GroupOf = ip_group,
    ) -> None:
        self._network = network
        self._now = now
        self._grpc_targets = tuple(grpc_targets)
        self._certificate_der = certificate_der
        self._core = Membership(
            keypair,
            incarnation=incarnation,
            now=now(),
            rng=rng,
            description=self._description(capabilities),
            client=client,
            config=config,
            group_of=group_of,
        )
        self._nursery: trio.Nursery | None = None
        self._wake = trio.Event()
        self._departed = trio.Event()
        self._callbacks: list[Callable[[MemberChanged], None]] = []
        self._recalled: dict[str, Member] = {}
        self._forget_s = (config or GossipConfig()).forget_s
        self._told: dict[str, None] = {}  # of whom a warning was logged
        self.synced = trio.Event()  # set by the first exchange with anybody

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves, probes and spreads until cancelled; `started()` once it serves."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                self._network.watch(self._connection_changed)
                self._network.serve(PROTOCOL, self._serve)
                for peer_id in self._network.connected():
                    self._feed(PeerConnected(peer_id, ""))
                task_status.started()
                while True:
                    await self._sleep_until(self._core.deadline())
            finally:
                self._nursery = None

    async def sync_with(self, peer_id: str) -> None:
        """Exchanges all we know with a peer that the network can reach.

        Raises:
            UnreachableError: no answer.
            VersionError: no protocol version in common; says which both speak.
            MalformedError: an answer that no honest peer gives.
        """
        effects = self._core.handle(SyncWith(peer_id), self._now())
        ours = next(e for e in effects if isinstance(e, Send))  # what is due besides comes after
        self._perform([effect for effect in effects if effect is not ours])
        for effect in await self._exchange(ours):
            if isinstance(effect, PeerRefused) and effect.peer_id == peer_id:
                raise VersionError(effect.detail)
            if isinstance(effect, Misbehaved) and effect.peer_id == peer_id:
                raise MalformedError(effect.detail)
            if isinstance(effect, Synced) and effect.peer_id == peer_id:
                return
        raise UnreachableError(f"peer {short(peer_id)} did not tell us who is here")

    async def hear(self, peer_id: str, advert: common_pb2.Signed) -> None:
        """Takes an advert that a peer handed us by another way than gossip."""
        news = pb.GossipMessage(
            versions=common_pb2.VersionRange(min=Versions().min, max=Versions().max),
            kind=pb.GossipMessage.KIND_NEWS,
            adverts=[advert],
        )
        await self._serve(peer_id, news.SerializeToString())

    def recall(self, members: Iterable[Member]) -> None:
        """Takes members known from before a restart.

        They are listed as having failed until something is heard of them; until then
        nobody else is told of them, and nobody watches them.
        """
        for member in members:
            if self._core.member(member.peer_id) is None:
                self._recalled[member.peer_id] = replace(member, state=State.FAILED)

    async def leave(self, timeout_s: float) -> None:
        """Says goodbye: returns when those told have answered, at the latest after `timeout_s`.

        Afterwards this node still answers, but probes nobody and cannot come back.
        """
        self._feed(Leave())
        with trio.move_on_after(timeout_s):
            await self._departed.wait()

    def members(self) -> list[Member]:
        """Everyone known, ourselves included (unless a client), in the order of peer ids."""
        members = self._core.members()
        if self._recalled:
            members += filter(None, map(self._recall, tuple(self._recalled)))
            members.sort(key=lambda member: member.peer_id)
        return members

    def member(self, peer_id: str) -> Member | None:
        """One member, or None."""
        return self._core.member(peer_id) or self._recall(peer_id)

    def advert_of(self, peer_id: str) -> OpenAdvert | None:
        """A member's newest advert (our own by our own peer id), or None."""
        member = self.member(peer_id)
        return member.advert if member else None

    def round_trip_s(self, a: str, b: str) -> float | None:
        """About how long a message between two peers and its answer take, in seconds.

        None where that cannot be told; see `Membership.round_trip_s`.
        """
        return self._core.round_trip_s(a, b)

    def update_capabilities(self, capabilities: Capabilities) -> None:
        """Advertises these, and the addresses that we have now, if anything is different."""
        self._feed(Describe(self._description(capabilities)))

    def watch(self, callback: Callable[[MemberChanged], None]) -> None:
        """Calls back on the trio thread at each change, our own too; must not block."""
        self._callbacks.append(callback)

    def _recall(self, peer_id: str) -> Member | None:
        # Of whom the core has heard by now, or whom it would have forgotten, that is over.
        member = self._recalled.get(peer_id)
        if member is not None and (
            self._core.member(peer_id) is not None or member.since + self._forget_s < self._now()
        ):
            del self._recalled[peer_id]
            return None
        return member

    def _description(self, capabilities: Capabilities) -> Description:
        return Description(
            addrs=tuple(self._network.addrs()),
            grpc_targets=self._grpc_targets,
            grpc_certificate=self._certificate_der,
            capabilities=capabilities,
        )

    async def _sleep_until(self, due: float | None) -> None:
        self._wake = trio.Event()
        with trio.move_on_after(math.inf if due is None else max(0.0, due - self._now())):
            await self._wake.wait()
        if due is not None and self._now() >= due:
            self._feed(Tick())

    async def _serve(self, peer_id: str, message: bytes) -> bytes | None:
        effects = self._feed(Request(peer_id, message))
        return next((e.message for e in effects if isinstance(e, Reply)), None)

    def _connection_changed(self, change: ConnectionChange) -> None:
        if change.connected:
            self._feed(PeerConnected(change.peer_id, change.addr))
        else:
            self._feed(PeerDisconnected(change.peer_id))

    def _feed(self, event: Event) -> Sequence[Effect]:
        effects = self._core.handle(event, self._now())
        self._perform(effects)
        self._wake.set()  # the deadline may have moved
        return effects

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send() if self._nursery is not None:
                    # As many at once as the core allows itself (`pending_max`).
                    self._nursery.start_soon(self._exchange, effect)
                case MemberChanged():
                    self._announce(effect)
                case Accused(peer_id, failed):
                    said = "has failed" if failed else "is silent"
                    log.info("member %s %s, as far as we can see", short(peer_id), said)
                case PeerRefused(peer_id, detail):
                    self._warn_once(peer_id, f"cannot talk to peer {short(peer_id)}: {detail}")
                case Misbehaved(peer_id, detail):
                    self._warn_once(peer_id, f"peer {short(peer_id)} misbehaves: {detail}")
                case Synced():
                    self.synced.set()
                case Departed():
                    self._departed.set()
                case _:
                    pass

    async def _exchange(self, send: Send) -> Sequence[Effect]:
        event: Event = Unanswered(send.rpc_id)
        try:
            reply = await self._network.request(
                send.peer_id,
                PROTOCOL,
                send.message,
                timeout_s=send.timeout_s,
                addrs=send.addrs,
            )
            event = Answered(send.rpc_id, reply)
        except MalformedError:
            event = Answered(send.rpc_id, b"")  # it is there, whatever it says
        except RemoteError as error:
            log.debug("no answer from %s: %s", short(send.peer_id), error)
        finally:
            effects = self._feed(event)  # also when cancelled: the core counts what is under way
        return effects

    def _announce(self, change: MemberChanged) -> None:
        if change.old is not change.new:
            log.info("member %s is %s", short(change.peer_id), change.new)
        for callback in self._callbacks:
            try:
                callback(change)
            except Exception:
                log.exception("a callback for changes of members failed")

    def _warn_once(self, peer_id: str, text: str) -> None:
        if peer_id not in self._told and len(self._told) < _TOLD_MAX:
            self._told[peer_id] = None
            log.warning("%s", text)
