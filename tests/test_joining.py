"""Networks that find themselves again: after a restart without a bootstrap peer, after a split."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Awaitable, Callable, Sequence

import trio
import trio.testing

from p2pnet import keys
from p2pnet.dht.keyspace import record_key, vnode_key
from p2pnet.dht.local import REPLICAS
from p2pnet.dht.manifest import network_id_of
from p2pnet.dht.records import ALLOCATION, make_record, open_record
from p2pnet.dht.shell import Dht
from p2pnet.dht.snapshot import Held
from p2pnet.gossip import known
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.events import GossipConfig, State
from p2pnet.gossip.known import Known
from p2pnet.gossip.shell import Gossip
from p2pnet.gossip.statements import build_advert
from p2pnet.joining import Joining
from p2pnet.keys import KeyPair
from p2pnet.net.memory import MemoryFabric, MemoryNetwork
from p2pnet.rendezvous import Rendezvous
from p2pnet.v1 import common_pb2, records_pb2

WALL_MS = 1_800_000_000_000
# Fewer probes, for hours to pass quickly.
CALM = GossipConfig(probe_interval_s=10.0, sync_interval_s=30.0)
# Else it looks for failed members itself.
FORGETFUL = dataclasses.replace(CALM, forget_s=60.0, sweep_s=10.0)


def keypair(n: int) -> KeyPair:
    """Node n's."""
    return KeyPair.from_seed(keys.sha256(b"joining %d" % n))


def addr(n: int) -> str:
    """Where node n listens, and who it is."""
    return f"/ip4/127.0.0.1/tcp/{4000 + n}/p2p/{keypair(n).peer_id}"


def record(vnode: str) -> common_pb2.Signed:
    """Node 0's word that VNode `vnode` lives on node 1."""
    claimant, host = keypair(0), keypair(1)
    manifest = records_pb2.Manifest(
        owner=claimant.public_key, name="n", spec_digest=bytes(32), any_orchestrator=True
    )
    grant = claimant.sign(keys.MANIFEST, manifest.SerializeToString(deterministic=True))
    body = records_pb2.Allocation(
        network_id=network_id_of(grant), vnode=vnode, host=host.peer_id, epoch=1,
        claimant=claimant.peer_id, role="primary", lease_s=30, manifest=grant,
    )  # fmt: skip
    accepted = host.sign(keys.ACCEPTANCE, body.SerializeToString(deterministic=True))
    return make_record(
        claimant, vnode_key(body.network_id, vnode), ALLOCATION, epoch=1, sequence=1, ttl_s=3600,
        issued_at_ms=WALL_MS, body=accepted.SerializeToString(deterministic=True),
    )  # fmt: skip


def key_of(signed: common_pb2.Signed) -> bytes:
    """Where it belongs."""
    return records_pb2.Record.FromString(signed.payload).key


class Node:
    """What of a node finds others, over a network in memory."""

    def __init__(self, n: int, network: MemoryNetwork, *, config: GossipConfig | None) -> None:
        self.n = n
        self.network = network
        self.scope = trio.CancelScope()
        self.gossip = Gossip(
            network, keypair(n), grpc_targets=[], certificate_der=b"", capabilities=Capabilities(),
            incarnation=1000 + round(trio.current_time() * 1000), rng=random.Random(n),
            now=trio.current_time, config=config,
        )  # fmt: skip
        self.dht = Dht(
            network, rng=random.Random(n), now=trio.current_time,
            wall_ms=wall_ms,
        )  # fmt: skip
        rendezvous = Rendezvous(
            network, self.gossip, self.dht, rng=random.Random(n), provides=True, shared=False
        )
        self.joining = Joining(
            network,
            self.gossip,
            self.dht,
            rendezvous,
            rng=random.Random(n),
            now=trio.current_time,
            wall_ms=wall_ms,
        )

    def alive(self) -> list[int]:
        """Who it thinks is here."""
        names = {keypair(n).peer_id: n for n in range(40)}
        return sorted(names[m.peer_id] for m in self.gossip.members() if m.state is State.ALIVE)

    async def until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        """Waits for the change after which `holds`."""
        changed = trio.Event()
        self.gossip.watch(lambda change: changed.set() if holds() else None)
        with trio.fail_after(timeout_s):
            if not holds():
                await changed.wait()


class World:
    """Nodes on one fabric."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.fabric = MemoryFabric()
        self.nodes: dict[int, Node] = {}

    async def start(
        self, n: int, bootstrap: Sequence[int], remembered: Sequence[Known] = (),
        config: GossipConfig | None = None,
    ) -> Node:  # fmt: skip
        """Node n, which starts from these."""
        network = self.fabric.network(keypair(n), addr(n))
        node = self.nodes[n] = Node(n, network, config=config)
        addrs = [addr(b) for b in bootstrap]

        async def run(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            with node.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(node.gossip.run)
                    await nursery.start(node.dht.run)
                    node.joining.recall(remembered)
                    task_status.started()
                    nursery.start_soon(node.joining.run, addrs)

        await self.nursery.start(run)
        return node

    def kill(self, n: int) -> None:
        """SIGKILL."""
        self.nodes.pop(n).scope.cancel()
        self.fabric.kill(keypair(n).peer_id)

    def split(self, left: Sequence[int], right: Sequence[int], *, heal: bool = False) -> None:
        """Nothing passes between two sides, or everything again."""
        for a in left:
            for b in right:
                pair = keypair(a).peer_id, keypair(b).peer_id
                self.fabric.heal(*pair) if heal else self.fabric.cut(*pair)

    async def settle(self, numbers: Sequence[int], timeout_s: float) -> None:
        """Until these nodes see exactly one another."""
        for n in numbers:
            node = self.nodes[n]
            await node.until(lambda node=node: node.alive() == sorted(numbers), timeout_s)


def in_world(test: Callable[[World], Awaitable[None]], limit_s: float = 7200.0) -> None:
    """Runs a test in a virtual time that jumps over waits."""

    async def main() -> None:
        with trio.fail_after(limit_s):
            async with trio.open_nursery() as nursery:
                await test(World(nursery))
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


LEFT, RIGHT = [0, 2, 4, 6, 8], [1, 3, 5, 7, 9]


async def all_find(world: World, stored: Sequence[common_pb2.Signed], provided: bytes) -> None:
    """Everybody finds every record, and who provides a key."""
    for node in world.nodes.values():
        for signed in stored:
            found = await node.dht.get(key_of(signed))
            assert [r.signed for r in found] == [signed], node.n
        assert [p.peer_id for p in await node.dht.providers(provided)] == [keypair(2).peer_id]


def test_two_networks_that_could_not_see_each_other_become_one() -> None:
    async def test(world: World) -> None:
        world.split(LEFT, RIGHT)
        for n in (*LEFT, *RIGHT):
            await world.start(n, [0, 1], config=CALM)
        await world.settle(LEFT, 60)
        await world.settle(RIGHT, 60)
        stored = [record(f"v{n}") for n in range(6)]
        for n, signed in enumerate(stored):
            assert await world.nodes[n].dht.put(signed) == 5
        key = record_key("a key")
        await world.nodes[2].dht.provide(key)
        await trio.sleep(500)  # by now the other bootstrap peer is tried rarely
        assert all(len(node.alive()) == 5 for node in world.nodes.values())
        world.split(LEFT, RIGHT, heal=True)
        await world.settle([*LEFT, *RIGHT], 400)
        await trio.sleep(30)
        assert all(node.dht.stats()["peers"] == 9 for node in world.nodes.values())
        await all_find(world, stored, key)

    in_world(test)


def test_a_network_that_was_one_long_ago_becomes_one_again() -> None:
    async def test(world: World) -> None:
        for n in (*LEFT, *RIGHT):
            await world.start(n, [0, 1], config=FORGETFUL)
        await world.settle([*LEFT, *RIGHT], 60)
        world.split(LEFT, RIGHT)
        await trio.sleep(600)
        for n in (*LEFT, *RIGHT):  # each side has forgotten the other
            side = LEFT if n in LEFT else RIGHT
            assert [m.peer_id for m in world.nodes[n].gossip.members()] == sorted(
                keypair(other).peer_id for other in side
            )
        signed = record("v")
        assert await world.nodes[3].dht.put(signed) == 5
        key = record_key("a key")
        await world.nodes[2].dht.provide(key)
        world.split(LEFT, RIGHT, heal=True)
        await world.settle([*LEFT, *RIGHT], 400)
        await trio.sleep(30)
        await all_find(world, [signed], key)

    in_world(test)


def test_a_bootstrap_peer_that_is_not_there_is_asked_rarely() -> None:
    async def test(world: World) -> None:
        for n in range(3):
            await world.start(n, [0, 20], config=CALM)
        await world.settle(range(3), 60)
        tries = 0
        connect = world.nodes[1].network.connect

        async def counted(peer_id: str, addrs: Sequence[str], *, timeout_s: float) -> None:
            nonlocal tries
            tries += peer_id == keypair(20).peer_id
            await connect(peer_id, addrs, timeout_s=timeout_s)

        world.nodes[1].network.connect = counted  # type: ignore[method-assign]
        await trio.sleep(1200)
        assert 2 <= tries <= 12
        late = await world.start(20, [])
        await late.until(lambda: late.alive() == [0, 1, 2, 20], 400)

    in_world(test)


def wall_ms() -> int:
    """Everybody's wall clock."""
    return WALL_MS + round(trio.current_time() * 1000)


def saved(node: Node) -> list[Known]:
    """What the node would find on its disk."""
    now = trio.current_time()
    chosen = known.choose(node.gossip.members(), node.network.peer_id, now, wall_ms())
    found, dropped = known.parse(known.serialise(chosen))
    assert dropped == 0
    return found


def test_with_every_bootstrap_peer_dead_a_node_finds_its_way_back() -> None:
    async def test(world: World) -> None:
        for n in range(6):
            await world.start(n, [0])
        await world.settle(range(6), 60)
        remembered = saved(world.nodes[5])
        world.kill(0)
        world.kill(5)
        await world.settle([1, 2, 3, 4], 60)
        back = await world.start(5, [0], remembered)
        assert len(back.gossip.members()) == 6, "known before anybody was reached"
        assert back.alive() == [5]
        assert back.gossip.advert_of(keypair(3).peer_id) is not None
        await world.settle([1, 2, 3, 4, 5], 30)
        await trio.sleep(30)
        assert back.dht.stats()["peers"] == 4

    in_world(test)


def test_of_those_it_knew_most_are_gone_and_each_costs_one_bounded_try() -> None:
    async def test(world: World) -> None:
        for n in (0, 1, 2):
            await world.start(n, [0])
        await world.settle([0, 1, 2], 60)
        ghosts = [
            Known(
                build_advert(
                    keypair(n), incarnation=5, sequence=0, addrs=(addr(n).split("/p2p")[0],)
                ),
                wall_ms(),
            )
            for n in range(3, 40)
        ]
        for n in range(3, 20):  # these are silent, the others refuse
            world.fabric.network(keypair(n), addr(n))
            world.fabric.freeze(keypair(n).peer_id)
        node = await world.start(39, [], [*ghosts[:-1], *saved(world.nodes[0])])
        with trio.fail_after(20):
            await node.joining.tried.wait()
        await node.until(lambda: node.alive() == [0, 1, 2, 39], 20)
        assert len(node.gossip.members()) == 40
        await trio.sleep(60)
        assert len(world.nodes[1].gossip.members()) == 4, "nobody else is told of ghosts"

    in_world(test)


def test_what_a_node_brings_back_is_soon_held_by_others_too() -> None:
    async def test(world: World) -> None:
        for n in range(10):
            await world.start(n, [0])
        await world.settle(range(10), 60)
        signed = record("v")
        opened = open_record(signed, key_of(signed), WALL_MS)
        now = trio.current_time()
        world.nodes[7].dht.restore(Held([(dataclasses.replace(opened, age_s=3500.0), "")]))
        await trio.sleep(95)
        holders = [n for n, node in world.nodes.items() if node.dht.stats()["records"]]
        assert len(holders) >= REPLICAS
        for n in holders:
            ((back, _),) = world.nodes[n].dht.held().records
            assert back.age_s >= 3500 + trio.current_time() - now - 1, "and no younger"
        await trio.sleep(10)
        assert await world.nodes[3].dht.get(key_of(signed)) == []

    in_world(test)


def test_alone_it_goes_on_trying_those_it_knew() -> None:
    async def test(world: World) -> None:
        for n in (0, 1):
            await world.start(n, [0])
        await world.settle([0, 1], 60)
        remembered = saved(world.nodes[1])
        world.split([0], [1])
        world.kill(1)
        node = await world.start(1, [], remembered)
        await trio.sleep(600)
        assert node.alive() == [1]
        world.split([0], [1], heal=True)
        await world.settle([0, 1], 60)

    in_world(test)
