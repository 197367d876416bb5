"""Eight DHT shells on a memory network: put, get, provide, kill, freeze, clients."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from dht_samples import (
    CLAIMANT,
    STRANGER,
    VNODE_KEY,
    WALL_MS,
    allocation_record,
    keypair,
    manifest,
)

from p2pnet.dht.keyspace import record_key, vnode_key
from p2pnet.dht.manifest import network_id_of
from p2pnet.dht.shell import Dht
from p2pnet.dht.wire import KAD_PROTOCOL, RECORD_PROTOCOL
from p2pnet.errors import CancelledByUs, LocalError, MalformedError, UnreachableError
from p2pnet.net.memory import MemoryFabric
from p2pnet.net.network import PeerInfo
from p2pnet.v1 import common_pb2

COUNT = 8


class World:
    """`COUNT` nodes that met through the first, as nodes do."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.fabric = MemoryFabric()
        self.dhts: list[Dht] = []
        self.ids: list[str] = []

    async def start(self, count: int = COUNT) -> None:
        """Starts nodes until there are `count`."""
        while len(self.dhts) < count:
            self.dhts.append(await self.node(len(self.dhts)))
            self.ids.append(keypair(len(self.ids)).peer_id)

    async def node(self, n: int, *, server: bool = True) -> Dht:
        """A running node that knows the first."""
        listen = (addr(n),) if server else ()
        network = self.fabric.network(keypair(n), *listen)
        dht = Dht(
            network,
            rng=random.Random(n),
            server=server,
            now=trio.current_time,
            wall_ms=lambda: WALL_MS + round(trio.current_time() * 1000) % 10**6,
        )
        if n:
            await network.connect(keypair(0).peer_id, [addr(0)], timeout_s=1)
            dht.seen(keypair(0).peer_id, [addr(0)])
        await self.nursery.start(dht.run)
        await trio.testing.wait_all_tasks_blocked()
        return dht


def addr(n: int) -> str:
    """Where node n listens."""
    return f"/ip4/127.0.0.1/tcp/{4000 + n}"


def in_world(test: Callable[[World], Awaitable[None]]) -> None:
    """Runs a test among eight nodes, in a virtual time that jumps over waits."""

    async def main() -> None:
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                world = World(nursery)
                await world.start()
                await test(world)
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_record_put_by_one_is_read_by_all() -> None:
    async def test(world: World) -> None:
        assert await world.dhts[1].put(allocation_record()) == COUNT
        for dht in world.dhts:
            (record,) = await dht.get(VNODE_KEY)
            assert record.signed == allocation_record()
            assert record.author == CLAIMANT.peer_id

    in_world(test)


def records_of(count: int) -> dict[bytes, common_pb2.Signed]:
    """Allocations of so many VNodes, by key."""
    network = network_id_of(manifest())
    names = [f"v{n}" for n in range(count)]
    return {vnode_key(network, name): allocation_record(vnode=name) for name in names}


def test_many_records_are_put_and_read_in_few_messages() -> None:
    async def test(world: World) -> None:
        records = records_of(60)
        taken = await world.dhts[1].put_many(list(records.values()))
        assert taken == [COUNT] * len(records)
        before = world.fabric.messages()
        found = await world.dhts[2].get_many(list(records))
        assert {key: found[key][0].signed for key in records} == records
        # A read of its own asks three.
        assert world.fabric.messages() - before < len(records)
        with pytest.raises(LocalError):
            await world.dhts[1].put_many([common_pb2.Signed(payload=b"none")])

    in_world(test)


def test_of_many_reads_those_that_nobody_answers_are_left_out() -> None:
    async def test(world: World) -> None:
        for peer_id in world.ids[1:]:
            world.fabric.kill(peer_id)
        records = records_of(3)
        assert await world.dhts[0].get_many(list(records)) == {}
        assert await world.dhts[0].put_many(list(records.values())) == [1, 1, 1]  # ourselves

    in_world(test)


def test_everybody_knows_everybody_and_finds_them() -> None:
    async def test(world: World) -> None:
        for dht in world.dhts:
            assert dht.stats()["peers"] == COUNT - 1
            for n, peer_id in enumerate(world.ids):
                assert await dht.find_peer(peer_id) == PeerInfo(peer_id, (addr(n),))
        assert await world.dhts[2].find_peer(STRANGER.peer_id) is None
        with pytest.raises(MalformedError):
            await world.dhts[2].find_peer("not a peer id")

    in_world(test)


def test_providers_are_found_with_their_addresses() -> None:
    async def test(world: World) -> None:
        key = record_key("/p2pnet/a key")
        assert await world.dhts[0].providers(key) == []
        assert await world.dhts[5].provide(key) == COUNT
        for dht in world.dhts:
            assert await dht.providers(key) == [PeerInfo(world.ids[5], (addr(5),))]
        world.dhts[5].unprovide(key)
        await trio.sleep(60)
        assert await world.dhts[0].providers(key) != [], "a hint has its time"

    in_world(test)


def test_after_a_kill_reads_still_find_and_the_dead_are_forgotten() -> None:
    async def test(world: World) -> None:
        await world.dhts[1].put(allocation_record())
        for peer_id in world.ids[4:]:
            world.fabric.kill(peer_id)
        (record,) = await world.dhts[2].get(VNODE_KEY)
        assert record.sequence == 1
        assert await world.dhts[2].put(allocation_record(sequence=2)) == 4
        assert world.dhts[2].stats()["peers"] == 3
        assert await world.dhts[2].find_peer(world.ids[6]) is None

    in_world(test)


def test_frozen_peers_cost_a_patience_and_are_dropped() -> None:
    async def test(world: World) -> None:
        await world.dhts[1].put(allocation_record())
        await world.dhts[2].get(VNODE_KEY)  # now it knows how fast its peers are
        for peer_id in world.ids[6:]:
            world.fabric.freeze(peer_id)
        began = trio.current_time()
        assert len(await world.dhts[2].get(VNODE_KEY)) == 1
        assert trio.current_time() - began < 0.5
        await trio.sleep(9)
        assert world.dhts[2].stats()["peers"] == COUNT - 3
        began = trio.current_time()
        assert len(await world.dhts[2].get(VNODE_KEY)) == 1
        assert trio.current_time() - began < 0.01, "they are remembered as silent"

    in_world(test)


def test_a_kept_record_lives_as_long_as_it_is_kept() -> None:
    async def test(world: World) -> None:
        made: list[int] = []

        def make() -> common_pb2.Signed:
            made.append(len(made) + 1)
            return allocation_record(sequence=made[-1])

        world.dhts[3].keep(VNODE_KEY, make)
        await trio.sleep(205)
        assert 9 <= len(made) <= 11, "once in a third of a minute"
        for dht in world.dhts:
            (record,) = await dht.get(VNODE_KEY)
            assert record.sequence == made[-1]
            assert record.expires_in_s > 30
        world.dhts[3].unkeep(VNODE_KEY)
        await trio.sleep(61)
        assert await world.dhts[0].get(VNODE_KEY) == []

    in_world(test)


def test_a_maker_that_fails_is_tried_again() -> None:
    async def test(world: World) -> None:
        calls: list[int] = []

        def make() -> common_pb2.Signed:
            calls.append(len(calls) + 1)
            if calls[-1] in (2, 3):
                raise LocalError("the log cannot be read just now")
            return allocation_record(sequence=calls[-1])

        world.dhts[3].keep(VNODE_KEY, make)
        await trio.sleep(35)
        (record,) = await world.dhts[0].get(VNODE_KEY)
        assert record.sequence == 4

    in_world(test)


def test_a_client_reads_and_writes_and_is_in_nobodys_table() -> None:
    async def test(world: World) -> None:
        client = await world.node(100, server=False)
        assert await client.put(allocation_record()) == COUNT
        assert len(await client.get(VNODE_KEY)) == 1
        assert client.stats()["peers"] == COUNT
        assert all(dht.stats()["peers"] == COUNT - 1 for dht in world.dhts)
        assert await world.dhts[0].find_peer(keypair(100).peer_id) is None

    in_world(test)


def test_a_peer_that_restarts_is_found_again() -> None:
    async def test(world: World) -> None:
        world.fabric.kill(world.ids[7])
        assert await world.dhts[2].find_peer(world.ids[7]) is None
        await world.node(7)
        assert await world.dhts[2].find_peer(world.ids[7]) == PeerInfo(world.ids[7], (addr(7),))

    in_world(test)


def test_garbage_is_the_peers_fault_and_harms_nobody() -> None:
    async def test(world: World) -> None:
        network = world.fabric.network(keypair(100))
        await network.connect(world.ids[0], [addr(0)], timeout_s=1)
        for protocol in (KAD_PROTOCOL, RECORD_PROTOCOL):
            for data in (b"", b"\xff\xff", b"\x08\x04", bytes(1000)):
                with pytest.raises(UnreachableError):
                    await network.request(world.ids[0], protocol, data, timeout_s=1)
        assert await world.dhts[0].put(allocation_record()) == COUNT

    in_world(test)


def test_a_record_that_peers_would_refuse_is_our_own_mistake() -> None:
    async def test(world: World) -> None:
        forged = STRANGER.sign(b"p2pnet/v1/record", allocation_record().payload)
        with pytest.raises(LocalError, match="refuse"):
            await world.dhts[0].put(forged)
        with pytest.raises(LocalError, match="another key"):
            world.dhts[0].keep(record_key("elsewhere"), allocation_record)

    in_world(test)


def test_everybody_frozen_is_unreachable_in_time() -> None:
    async def test(world: World) -> None:
        for peer_id in world.ids[1:]:
            world.fabric.freeze(peer_id)
        began = trio.current_time()
        with pytest.raises(UnreachableError):
            await world.dhts[0].get(VNODE_KEY, timeout_s=3)
        assert trio.current_time() - began <= 3.1

    in_world(test)


def test_alone_it_keeps_its_own_records_and_needs_to_be_running() -> None:
    async def main() -> None:
        dht = Dht(
            MemoryFabric().network(keypair(0), addr(0)),
            rng=random.Random(0),
            now=trio.current_time,
            wall_ms=lambda: WALL_MS,
        )
        with pytest.raises(CancelledByUs):
            await dht.get(VNODE_KEY)
        async with trio.open_nursery() as nursery:
            await nursery.start(dht.run)
            assert await dht.put(allocation_record()) == 1
            assert len(await dht.get(VNODE_KEY)) == 1
            nursery.cancel_scope.cancel()
        with pytest.raises(CancelledByUs):
            await dht.get(VNODE_KEY)

    trio.run(main)
