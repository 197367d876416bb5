"""One p2pnet peer: its network and its DHT, as a node runs them, without the rest of a node."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from functools import lru_cache

import trio

from benchmarks.peers import talk
from p2pnet import clock, keys
from p2pnet.dht.keyspace import name_key
from p2pnet.dht.manifest import network_id_of
from p2pnet.dht.records import NETWORK, OpenRecord, make_record
from p2pnet.dht.shell import Dht
from p2pnet.keys import KeyPair
from p2pnet.net.libp2p import open_network
from p2pnet.v1 import common_pb2, records_pb2

TIMEOUT_S = 30.0
_AUTHOR = KeyPair.from_seed(keys.sha256(b"benchmark"))


class Peer(talk.Peer):
    """See `talk.Peer`."""

    def __init__(self, dht: Dht) -> None:
        self._dht = dht
        self._records: dict[int, common_pb2.Signed] = {}

    async def prepare(self, number: int) -> None:
        self._records[number] = _record(number)  # signing is its author's work

    async def meet(self, addrs: Sequence[str]) -> None:
        for addr in addrs:
            where, _, peer_id = addr.partition("/p2p/")
            await self._dht.meet(peer_id, [where])

    async def known(self) -> int:
        return int(self._dht.stats()["peers"] or 0)

    async def holds(self, number: int) -> bool:
        held = self._dht._core.local.store.keys()  # nothing public tells
        return _key(number) in held

    async def put(self, number: int) -> bool:
        return await self._dht.put(self._records[number], TIMEOUT_S) > 0

    async def get(self, number: int) -> bool:
        return _is_right(number, await self._dht.get(_key(number), TIMEOUT_S))

    async def get_any(self, number: int) -> bool:
        return _is_right(number, await self._dht.get(_key(number), TIMEOUT_S, quorum=1))

    async def put_all(self, numbers: Sequence[int]) -> int:
        holders = await self._dht.put_many([self._records[n] for n in numbers], TIMEOUT_S)
        return sum(count > 0 for count in holders)

    async def get_all(self, numbers: Sequence[int]) -> int:
        found = await self._dht.get_many([_key(n) for n in numbers], TIMEOUT_S)
        return sum(_is_right(n, found.get(_key(n), [])) for n in numbers)


def _name(number: int) -> str:
    return f"bench-{number}"


def _key(number: int) -> bytes:
    return name_key(_name(number))


@lru_cache(maxsize=4096)
def _body(number: int) -> bytes:
    """A network's record as an orchestrator puts it, the owner's manifest included."""
    manifest = records_pb2.Manifest(
        owner=_AUTHOR.public_key,
        name=_name(number),
        spec_digest=bytes(32),
        any_orchestrator=True,
    )
    grant = _AUTHOR.sign(keys.MANIFEST, manifest.SerializeToString(deterministic=True))
    body = records_pb2.NetworkRecord(
        network_id=network_id_of(grant),
        name=_name(number),
        manifest=grant,
        epoch=1,
        orchestrator=_AUTHOR.peer_id,
        vnodes=["fc1", "act1"],
        state_url="peers:",
    )
    return body.SerializeToString(deterministic=True)


def _record(number: int) -> common_pb2.Signed:
    return make_record(
        _AUTHOR,
        _key(number),
        NETWORK,
        epoch=1,
        sequence=clock.wall_ms(),
        ttl_s=3600,
        issued_at_ms=clock.wall_ms(),
        body=_body(number),
    )


def _is_right(number: int, records: list[OpenRecord]) -> bool:
    return [record.body for record in records] == [_body(number)]


async def main(listen: str) -> None:
    """Runs a peer that listens there until its driver is gone."""
    keypair = KeyPair.from_seed(random.randbytes(32))
    async with open_network(keypair, listen=[listen]) as network, trio.open_nursery() as nursery:
        dht = Dht(network, rng=random.Random(keypair.peer_id))
        await nursery.start(dht.run)
        talk.say(addrs=[f"{addr}/p2p/{network.peer_id}" for addr in network.addrs()])
        peer = Peer(dht)
        while command := await trio.to_thread.run_sync(talk.listen, abandon_on_cancel=True):
            talk.say(**await peer.obey(command))
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
