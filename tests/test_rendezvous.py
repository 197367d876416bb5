"""Members whose only peer to start from is none find each other through the DHT."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio
from trio.testing import MockClock

from p2pnet.dht.shell import Dht
from p2pnet.errors import UnreachableError
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.shell import Gossip
from p2pnet.keys import KeyPair
from p2pnet.net.memory import MemoryFabric, MemoryNetwork
from p2pnet.rendezvous import MEMBERS_KEY, Rendezvous


@dataclass
class Node:
    """What of a node takes part."""

    network: MemoryNetwork
    dht: Dht
    gossip: Gossip
    rendezvous: Rendezvous

    def living(self) -> list[str]:
        """Who is here, as it sees it."""
        return sorted(member.peer_id for member in self.gossip.members() if member.state.live)


class World:
    """A peer that only routes, and nodes that start from it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.fabric = MemoryFabric()
        self.nursery = nursery
        self.stock_addr = ""

    async def start(self) -> None:
        """Starts the peer that routes."""
        network, _ = self._network(0)
        dht = Dht(network, rng=random.Random(0), now=trio.current_time)
        await self.nursery.start(dht.run)
        self.stock_addr = f"{network.addrs()[0]}/p2p/{network.peer_id}"

    async def node(self, n: int, *, client: bool = False, shared: bool = False) -> Node:
        """A node that knows nobody yet."""
        network, keypair = self._network(n, client=client)
        rng = random.Random(n)
        dht = Dht(network, rng=rng, server=not client, now=trio.current_time)
        gossip = Gossip(
            network,
            keypair,
            grpc_targets=[],
            certificate_der=b"",
            capabilities=Capabilities(),
            incarnation=1,
            rng=rng,
            now=trio.current_time,
            client=client,
        )
        rendezvous = Rendezvous(network, gossip, dht, rng=rng, provides=not client, shared=shared)
        for run in (gossip.run, dht.run):
            await self.nursery.start(run)
        self.nursery.start_soon(rendezvous.run)
        return Node(network, dht, gossip, rendezvous)

    def _network(self, n: int, *, client: bool = False) -> tuple[MemoryNetwork, KeyPair]:
        keypair = KeyPair.from_seed(bytes([n]) * 32)
        listen = () if client else (f"/ip4/127.0.0.1/tcp/{4000 + n}",)
        return self.fabric.network(keypair, *listen), keypair


def in_world(test: Callable[[World], Awaitable[None]]) -> None:
    """Runs a test in virtual time."""

    async def main() -> None:
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                world = World(nursery)
                await world.start()
                await test(world)
                nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def until_they_see(*nodes: Node) -> None:
    """Returns when the nodes see each other, and only them."""
    everybody = sorted(node.network.peer_id for node in nodes)
    with trio.fail_after(30):
        while any(node.living() != everybody for node in nodes):  # noqa: ASYNC110
            await trio.sleep(0.5)  # of virtual time


def test_members_meet_through_a_peer_that_is_none() -> None:
    async def test(world: World) -> None:
        nodes = [await world.node(n) for n in (1, 2, 3)]
        for node in nodes:
            await node.rendezvous.join_through(world.stock_addr, 5)
        await until_they_see(*nodes)
        late = await world.node(4)
        await late.rendezvous.join_through(world.stock_addr, 5)
        assert nodes[0].network.peer_id in late.living(), "it need not wait for a next look"

    in_world(test)


def test_a_client_finds_members_and_is_not_found() -> None:
    async def test(world: World) -> None:
        node = await world.node(1)
        await node.rendezvous.join_through(world.stock_addr, 5)
        await trio.sleep(5)
        client = await world.node(2, client=True)
        await client.rendezvous.join_through(world.stock_addr, 5)
        assert client.living() == [node.network.peer_id]
        await trio.sleep(100)
        found = await node.dht.providers(MEMBERS_KEY)
        assert [peer.peer_id for peer in found] == [node.network.peer_id]

    in_world(test)


def test_where_members_start_from_members_nobody_is_asked() -> None:
    async def test(world: World) -> None:
        first, second = await world.node(1), await world.node(2)
        addr = f"{first.network.addrs()[0]}/p2p/{first.network.peer_id}"
        await second.rendezvous.join_through(addr, 5)
        await trio.sleep(100)
        await until_they_see(first, second)
        assert await second.dht.providers(MEMBERS_KEY) == []
        with pytest.raises(UnreachableError):
            await first.rendezvous.join_through(addr.replace("4001", "4009"), 5)

    in_world(test)


def test_no_more_members_than_needed_are_under_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pnet.rendezvous.ENOUGH_PROVIDERS", 2)

    async def test(world: World) -> None:
        nodes = [await world.node(n, shared=True) for n in range(1, 5)]
        for node in nodes:
            await node.rendezvous.join_through(world.stock_addr, 5)
            await trio.sleep(10)
        await until_they_see(*nodes)
        found = sorted(peer.peer_id for peer in await nodes[0].dht.providers(MEMBERS_KEY))
        assert found == sorted(node.network.peer_id for node in nodes[:2])

    in_world(test)
