"""A shell: finds the network, keeps the DHT and the membership in step, and finds the rest.

What a node starts from are the bootstrap peers that it was given and the members that
it knew when it last ran. Who is found tells of all others.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence

import trio

from p2pnet import clock
from p2pnet.control import Progress
from p2pnet.dht.shell import Dht
from p2pnet.errors import CancelledByUs, RemoteError
from p2pnet.gossip.events import MemberChanged
from p2pnet.gossip.known import Known, recalled
from p2pnet.gossip.shell import Gossip
from p2pnet.gossip.statements import OpenAdvert
from p2pnet.net.multiaddr import parse
from p2pnet.net.network import ConnectionChange, Network
from p2pnet.rendezvous import Rendezvous
from p2pnet.tries import Tries

DIAL_TIMEOUT_S = 5.0
TRY_TIMEOUT_S = 15.0  # of a whole try: the connection, the exchange, the DHT
ENOUGH_MET = 4  # and the members known from before need not be tried
REFRESH_EVERY_S = 5.0
REFRESH_PEERS = 20  # what a bucket of the DHT's table holds

logger = logging.getLogger(__name__)


class Joining:
    """One node's way into its network. `tried` is set when somebody was met, or all were tried."""

    def __init__(
        self,
        network: Network,
        gossip: Gossip,
        dht: Dht,
        rendezvous: Rendezvous,
        *,
        rng: random.Random,
        now: Callable[[], float] = clock.now,
        wall_ms: Callable[[], int] = clock.wall_ms,
        client: bool = False,
    ) -> None:
        self._network = network
        self._gossip = gossip
        self._dht = dht
        self._rendezvous = rendezvous
        self._rng = rng
        self._now = now
        self._wall_ms = wall_ms
        self._client = client
        self._known: dict[str, OpenAdvert] = {}
        self._reached: dict[str, None] = {}
        self._wake = trio.Event()
        self.progress = Progress()
        self.tried = trio.Event()
        gossip.watch(self._member_changed)
        network.watch(self._connection_changed)

    def recall(self, known: Sequence[Known]) -> None:
        """Takes the members from before, to be listed and tried."""
        ours = self._network.peer_id
        self._known = {k.advert.peer_id: k.advert for k in known if k.advert.peer_id != ours}
        now, wall_ms = self._now(), self._wall_ms()
        self._gossip.recall(recalled(k, now, wall_ms) for k in known)

    async def run(self, bootstrap: Sequence[str]) -> None:
        """Tries everybody until cancelled; Gossip and Dht must be running.

        `bootstrap`: multiaddrs that name their peer.
        """
        ours = self._network.peer_id
        addrs = [addr for addr in dict.fromkeys(bootstrap) if parse(addr).peer_id != ours]
        self.progress.wanted = len(addrs) + len(self._known)
        now = self._now()
        first = Tries(addrs, self._rng, now)
        before = Tries(list(self._known), self._rng, now)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_fresh)
            while True:
                self._wake = trio.Event()
                now = self._now()
                for addr in first.due(now, lambda addr: self._met(parse(addr).peer_id)):
                    nursery.start_soon(self._try, first, addr, self._start_from)
                for peer_id in before.due(now, self._needless):
                    nursery.start_soon(self._try, before, peer_id, self._revisit)
                if first.all_tried and before.all_tried:
                    self._all_tried()
                due = [at for at in (first.deadline(), before.deadline()) if at is not None]
                with trio.move_on_after(max(0.0, min(due, default=math.inf) - self._now())):
                    await self._wake.wait()

    def refresh(self) -> None:
        """Tells the DHT again of some that are here: it gives up who was slow for a while."""
        alive = [m for m in self._gossip.members() if m.state.live]
        for member in self._rng.sample(alive, min(len(alive), REFRESH_PEERS)):
            if member.peer_id != self._network.peer_id:
                self._dht.seen(member.peer_id, member.advert.addrs)

    async def _keep_fresh(self) -> None:
        while True:
            await trio.sleep(REFRESH_EVERY_S)
            self.refresh()

    # Tries

    async def _try(
        self, tries: Tries, name: str, reach: Callable[[str], Awaitable[object]]
    ) -> None:
        reached = False
        try:
            with trio.move_on_after(TRY_TIMEOUT_S):
                await reach(name)
                reached = True
                self._reached[name] = None
                self.progress.reached = len(self._reached)
                self.tried.set()  # one is enough to know the others
        except (RemoteError, CancelledByUs) as error:
            logger.info("to start from: %s: %s", name, error)
        tries.ended(name, self._now(), reached=reached, alone=not self._others_met(1))
        self._wake.set()

    async def _start_from(self, addr: str) -> None:
        await self._rendezvous.join_through(addr, DIAL_TIMEOUT_S)

    async def _revisit(self, peer_id: str) -> None:
        addrs = self._known[peer_id].addrs
        await self._network.connect(peer_id, addrs, timeout_s=DIAL_TIMEOUT_S)
        await self._gossip.sync_with(peer_id)
        await self._dht.meet(peer_id, addrs)

    def _all_tried(self) -> None:
        if self.tried.is_set():
            return
        self.tried.set()
        if self.progress.wanted and not self._client:
            logger.warning(
                "none of the %d peers to start from can be reached yet; this node keeps trying, "
                "and others can join through it meanwhile",
                self.progress.wanted,
            )

    def _met(self, peer_id: str) -> bool:
        member = self._gossip.member(peer_id)
        return member is not None and member.state.live

    def _others_met(self, enough: int) -> bool:
        return sum(map(self._met, self._network.connected())) >= enough

    def _needless(self, peer_id: str) -> bool:
        return self._others_met(ENOUGH_MET) or self._met(peer_id)

    # What the membership and the network tell the DHT

    def _member_changed(self, change: MemberChanged) -> None:
        if change.peer_id == self._network.peer_id:
            return
        if change.new.live:
            self._dht.seen(change.peer_id, change.advert.addrs)
        else:
            self._dht.gone(change.peer_id)

    def _connection_changed(self, change: ConnectionChange) -> None:
        if change.connected:
            self._dht.seen(change.peer_id)
