"""One peer of py-libp2p's own KadDHT, on its own host, with its defaults."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from benchmarks.peers import talk

# It has no bulk call, and its peers reset every request beyond twelve at a time.
AT_ONCE = 4


class Peer(talk.Peer):
    """See `talk.Peer`. Its `put` confirms nothing, and goes to the 20 nearest."""

    def __init__(self, dht: KadDHT) -> None:
        self._dht = dht

    async def meet(self, addrs: Sequence[str]) -> None:
        for addr in addrs:
            info = info_from_p2p_addr(Multiaddr(addr))
            await self._dht.host.connect(info)
            await self._dht.add_peer(info.peer_id)
        await self._dht.peer_routing.refresh_routing_table()

    async def known(self) -> int:
        return int(self._dht.routing_table.size())

    async def holds(self, number: int) -> bool:
        return self._dht.value_store.has(_key(number).encode())

    async def put(self, number: int) -> bool:
        await self._dht.put_value(_key(number), talk.value(number))
        return True

    async def get(self, number: int) -> bool:
        found = await self._dht.get_value(_key(number), quorum=talk.QUORUM)
        return found == talk.value(number)

    async def put_all(self, numbers: Sequence[int]) -> int:
        return await _several_at_once(self.put, numbers)

    async def get_all(self, numbers: Sequence[int]) -> int:
        return await _several_at_once(self.get, numbers)

    async def prepare(self, number: int) -> None:
        # Every peer is among the 20 nearest and holds a copy, which would be its answer.
        self._dht.value_store.remove(_key(number).encode())


def _key(number: int) -> str:
    return f"bench-{number}"


async def _several_at_once(do: Callable[[int], Awaitable[bool]], numbers: Sequence[int]) -> int:
    good = 0
    slots = trio.CapacityLimiter(AT_ONCE)

    async def one(number: int) -> None:
        nonlocal good
        async with slots:
            done = await do(number)
        good += done

    async with trio.open_nursery() as nursery:
        for number in numbers:
            nursery.start_soon(one, number)
    return good


async def main(listen: str) -> None:
    """Runs a peer that listens there until its driver is gone."""
    logging.disable(logging.CRITICAL)
    host = new_host(key_pair=create_new_key_pair(secrets.token_bytes(32)))
    async with host.run(listen_addrs=[Multiaddr(listen)]):
        dht = KadDHT(host, DHTMode.SERVER)
        async with background_trio_service(dht):
            talk.say(addrs=[str(addr) for addr in host.get_addrs()])
            peer = Peer(dht)
            while command := await trio.to_thread.run_sync(talk.listen, abandon_on_cancel=True):
                talk.say(**await peer.obey(command))
        sys.exit()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
