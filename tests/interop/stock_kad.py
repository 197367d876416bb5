"""A stock py-libp2p peer with its own Kademlia, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from dht_peers import LOOPBACK
from libp2p import new_host
from libp2p.kad_dht import KadDHT
from libp2p.kad_dht.kad_dht import DHTMode
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo as StockPeerInfo
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from p2pnet.net.network import PeerInfo

_CLOSE_S = 5.0


class StockPeer:
    """A running one. `host` and `dht` are the library's."""

    def __init__(self) -> None:
        self.host = new_host()
        self.dht: KadDHT

    @property
    def info(self) -> PeerInfo:
        """Where it is."""
        peer_id = self.host.get_id().to_base58()
        addrs = [str(addr).removesuffix(f"/p2p/{peer_id}") for addr in self.host.get_addrs()]
        return PeerInfo(peer_id, tuple(addrs))

    async def connect(self, peer: PeerInfo) -> None:
        """Dials a peer, and takes it into its routing table."""
        where = StockPeerInfo(ID.from_base58(peer.peer_id), [Multiaddr(a) for a in peer.addrs])
        await self.host.connect(where)
        await self.dht.add_peer(where.peer_id)

    async def find_peer(self, peer_id: str) -> PeerInfo | None:
        """By its DHT."""
        return _ours(await self.dht.find_peer(ID.from_base58(peer_id)))

    async def providers(self, cid: str) -> list[PeerInfo]:
        """By its DHT."""
        found = map(_ours, await self.dht.find_providers(cid))
        return [peer for peer in found if peer is not None]


def _ours(found: StockPeerInfo | None) -> PeerInfo | None:
    if found is None:
        return None
    peer_id = found.peer_id.to_base58()
    addrs = (str(addr).removesuffix(f"/p2p/{peer_id}") for addr in found.addrs)
    return PeerInfo(peer_id, tuple(dict.fromkeys(addrs)))


@asynccontextmanager
async def stock_peer() -> AsyncIterator[StockPeer]:
    """A peer that listens, serves its DHT, and knows nobody."""
    peer = StockPeer()
    async with peer.host.run(listen_addrs=[Multiaddr(LOOPBACK)]):
        peer.dht = KadDHT(peer.host, DHTMode.SERVER)
        async with background_trio_service(peer.dht):
            yield peer
        with trio.move_on_after(_CLOSE_S, shield=True):
            await peer.host.close()  # which leaving `run` does not do for what it has dialled
