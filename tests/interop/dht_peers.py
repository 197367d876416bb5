"""DHT peers of ours on real sockets, for the tests that put stock libp2p peers among them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import trio
from dht.dht_samples import WALL_MS

from p2pnet.dht.shell import Dht
from p2pnet.keys import KeyPair
from p2pnet.net.libp2p import Libp2pNetwork, open_network
from p2pnet.net.network import PeerInfo

T = TypeVar("T")
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
DEADLINE_S = 40.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Peer:
    """One of our peers."""

    keypair: KeyPair
    network: Libp2pNetwork
    dht: Dht

    @property
    def peer_id(self) -> str:
        """Its name."""
        return self.keypair.peer_id

    @property
    def info(self) -> PeerInfo:
        """Where it is."""
        return PeerInfo(self.peer_id, self.network.addrs())

    async def join(self, peer: PeerInfo) -> None:
        """Meets a peer to start from."""
        await self.network.connect(peer.peer_id, peer.addrs, timeout_s=10)
        await self.dht.meet(peer.peer_id, peer.addrs)


@asynccontextmanager
async def peers(count: int, protocol: str) -> AsyncIterator[list[Peer]]:
    """Running peers that know nobody yet."""
    with trio.fail_after(DEADLINE_S):
        async with AsyncExitStack() as stack:
            keypairs = [KeyPair.from_seed(bytes([n]) * 32) for n in range(1, count + 1)]
            networks = [
                await stack.enter_async_context(open_network(keypair, listen=[LOOPBACK]))
                for keypair in keypairs
            ]
            nursery = await stack.enter_async_context(trio.open_nursery())
            started: list[Peer] = []
            for n, (keypair, network) in enumerate(zip(keypairs, networks, strict=True)):
                dht = Dht(network, rng=random.Random(n), protocol=protocol, wall_ms=lambda: WALL_MS)
                await nursery.start(dht.run)
                started.append(Peer(keypair, network, dht))
            yield started
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Awaitable[T]]) -> T:
    """The first true value of `condition`: for what another program does in its own time."""
    while not (value := await condition()):  # noqa: ASYNC110  # it can tell us nothing
        await trio.sleep(_POLL_S)  # the deadline is that of `peers`
    return value
