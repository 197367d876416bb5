"""One hivemind peer: a DHTNode and its p2pd. Runs in hivemind's own environment.

The node itself, and not hivemind.DHT, which puts it into a forked process behind
a pipe: the faster of the two. Its caches are off, so that each get is a look-up.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import talk
from hivemind.dht import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.utils import get_dht_time

LIFE_S = 3600


class Peer(talk.Peer):
    """See `talk.Peer`."""

    def __init__(self, listen: str) -> None:
        self._listen = listen
        self._node: DHTNode

    async def start(self, addrs: Sequence[str]) -> list[str]:
        """The node can only meet others at its start."""
        self._node = await DHTNode.create(
            initial_peers=list(addrs) or None,
            host_maddrs=[self._listen],
            num_replicas=talk.REPLICAS,
            cache_locally=False,
            cache_on_store=False,
            cache_nearest=0,
            auto_nat=False,
            nat_port_map=False,
            use_relay=False,
        )
        return [str(addr) for addr in await self._node.get_visible_maddrs()]

    async def known(self) -> int:
        return len(self._node.protocol.routing_table.peer_id_to_uid)

    async def holds(self, number: int) -> bool:
        return self._node.protocol.storage.get(DHTID.generate(source=_key(number))) is not None

    async def put(self, number: int) -> bool:
        return bool(
            await self._node.store(_key(number), talk.value(number), get_dht_time() + LIFE_S)
        )

    async def get(self, number: int) -> bool:
        # The newest of all copies, as a quorum is for; `get_any` is the other way to ask.
        found = await self._node.get(_key(number), latest=True)
        return found is not None and found.value == talk.value(number)

    async def get_any(self, number: int) -> bool:
        found = await self._node.get(_key(number))
        return found is not None and found.value == talk.value(number)

    async def put_all(self, numbers: Sequence[int]) -> int:
        stored = await self._node.store_many(
            [_key(n) for n in numbers],
            [talk.value(n) for n in numbers],
            get_dht_time() + LIFE_S,
        )
        return sum(map(bool, stored.values()))

    async def get_all(self, numbers: Sequence[int]) -> int:
        found = await self._node.get_many(
            [_key(n) for n in numbers], sufficient_expiration_time=float("inf")
        )
        return sum(
            found[_key(n)] is not None and found[_key(n)].value == talk.value(n) for n in numbers
        )

    async def stop(self) -> None:
        """Ends p2pd too."""
        await self._node.shutdown()


def _key(number: int) -> str:
    return f"bench-{number}"


async def main(listen: str, *addrs: str) -> None:
    """Runs a peer that listens there until its driver is gone."""
    peer = Peer(listen)
    talk.say(addrs=await peer.start(addrs))
    loop = asyncio.get_running_loop()
    try:
        while command := await loop.run_in_executor(None, talk.listen):
            talk.say(**await peer.obey(command))
    finally:
        await peer.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
