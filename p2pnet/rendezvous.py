"""How members find each other where those to start from are none.

In a DHT that is shared with stock libp2p peers a bootstrap peer may route and know
nothing of our membership. So members provide one well-known key, and who joins asks
the DHT for its providers, as any libp2p application advertises itself
(github.com/libp2p/specs/tree/master/discovery). Providers are unsigned hints: one
only tells whom to try, and what a peer then says of members is signed.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable

import trio

from p2pnet.dht.keyspace import record_key
from p2pnet.dht.shell import Dht
from p2pnet.errors import CancelledByUs, RemoteError
from p2pnet.gossip.shell import PROTOCOL as GOSSIP
from p2pnet.gossip.shell import Gossip
from p2pnet.keys import short
from p2pnet.net.multiaddr import parse
from p2pnet.net.network import Network, PeerInfo

MEMBERS_KEY = record_key("/p2pnet/members")
ENOUGH_PROVIDERS = 16  # so many living members under the key, and no more need to be there
TRIES_AT_ONCE = 8
TRY_S = 5.0
LOOK_TIMEOUT_S = 10.0
ALONE_MIN_S = 1.0  # between two looks while we are alone, doubled each time ...
ALONE_MAX_S = 60.0  # ... up to this
LOOK_EVERY_S = 600.0  # so that networks that grew apart meet

logger = logging.getLogger(__name__)


class Rendezvous:
    """Joins through peers of either kind. `run()` must be running.

    Args:
        provides: whether others may find us; not so for a short-lived client.
        shared: whether stock peers are expected in the DHT; else the first one met counts.
    """

    def __init__(
        self,
        network: Network,
        gossip: Gossip,
        dht: Dht,
        *,
        rng: random.Random,
        provides: bool,
        shared: bool,
    ) -> None:
        self._network = network
        self._gossip = gossip
        self._dht = dht
        self._rng = rng
        self._provides = provides
        self._providing = False
        self._needed = trio.Event()
        self._looking = trio.Lock()  # one after the other
        if shared:
            self._needed.set()

    async def join_through(self, addr: str, timeout_s: float) -> str:
        """Meets the peer at a multiaddr that names it, and members through it; who it is.

        Raises:
            RemoteError: it cannot be reached, or is a member that we cannot talk to.
        """
        peer_id = await self._network.identify(addr, timeout_s=timeout_s)
        spoken = await self._network.protocols(peer_id, timeout_s=timeout_s)
        if not spoken or GOSSIP in spoken:
            await self._gossip.sync_with(peer_id)
            await self._dht.meet(peer_id, (parse(addr).where,))
        else:
            await self._dht.meet(peer_id, (parse(addr).where,))
            logger.info("peer %s routes, and is no member: looking for members", short(peer_id))
            self._needed.set()
            await self._look()
        return peer_id

    async def run(self) -> None:
        """Looks for members and lets itself be found, from when that is needed on."""
        await self._needed.wait()
        delay_s = ALONE_MIN_S
        while True:
            await self._look()
            delay_s = min(delay_s * 2, ALONE_MAX_S) if not self._others() else LOOK_EVERY_S
            await trio.sleep(delay_s * self._rng.uniform(0.5, 1.0))

    async def _look(self) -> None:
        async with self._looking:
            await self._look_once()

    async def _look_once(self) -> None:
        try:
            found = await self._dht.providers(MEMBERS_KEY, LOOK_TIMEOUT_S)
        except (RemoteError, CancelledByUs) as error:
            logger.debug("nobody says who is a member: %s", error)
            found = []
        # The peers near us in the DHT may be members too.
        near = [PeerInfo(peer_id, ()) for peer_id in self._network.connected()]
        await self._meet([*found, *near])
        living = self._others()
        enough = sum(peer.peer_id in living for peer in found) >= ENOUGH_PROVIDERS
        if self._provides and not self._providing and not enough and near:
            await self._provide()

    async def _meet(self, peers: Iterable[PeerInfo]) -> None:
        """Tries some of those that we do not know as members."""
        known = (self._network.peer_id, *self._others())
        strangers = {peer.peer_id: peer for peer in peers if peer.peer_id not in known}
        some = self._rng.sample(sorted(strangers), min(len(strangers), TRIES_AT_ONCE))
        async with trio.open_nursery() as nursery:
            for peer_id in some:
                nursery.start_soon(self._try, strangers[peer_id])

    async def _try(self, peer: PeerInfo) -> None:
        try:
            if peer.peer_id not in self._network.connected():
                await self._network.connect(peer.peer_id, peer.addrs, timeout_s=TRY_S)
            if GOSSIP in await self._network.protocols(peer.peer_id, timeout_s=TRY_S):
                await self._gossip.sync_with(peer.peer_id)
        except (RemoteError, CancelledByUs) as error:
            logger.debug("not met: peer %s: %s", short(peer.peer_id), error)

    async def _provide(self) -> None:
        try:
            self._providing = True  # what fails now is tried again by the DHT
            await self._dht.provide(MEMBERS_KEY, LOOK_TIMEOUT_S)
        except (RemoteError, CancelledByUs) as error:
            logger.debug("nobody knows yet that we are a member: %s", error)

    def _others(self) -> tuple[str, ...]:
        ours = self._network.peer_id
        return tuple(
            m.peer_id for m in self._gossip.members() if m.state.live and m.peer_id != ours
        )
