"""Our DHT and a real Go libp2p daemon: each is a peer of the other's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio
from dht.dht_samples import VNODE_KEY, allocation_record
from dht_peers import Peer, peers, until
from p2pd import KAD, Daemon, GoError

from p2pnet.dht.keyspace import record_key
from p2pnet.net.network import PeerInfo
from p2pnet.net.streams import propose

CID_V1_RAW = b"\x01\x55"
KEY = record_key("/p2pnet/interop")
Test = Callable[[list[Peer]], Awaitable[None]]
in_thread = trio.to_thread.run_sync


def where(go: Daemon) -> PeerInfo:
    """A daemon, as our peers name it."""
    return PeerInfo(go.peer_id, (go.addr,))


def run(count: int, bootstrap: Daemon | None, test: Test) -> None:
    """Runs a test among peers of ours that know a daemon, and nobody else."""

    async def main() -> None:
        async with peers(count, KAD) as ours:
            if bootstrap is not None:
                for peer in ours:
                    await peer.join(where(bootstrap))
            await test(ours)

    trio.run(main)


def test_each_finds_the_others_peers(go: Daemon, second_go: Daemon) -> None:
    async def test(ours: list[Peer]) -> None:
        await in_thread(second_go.connect, where(go))
        for peer in ours:
            for other in ours:
                if other is not peer:
                    assert await peer.dht.find_peer(other.peer_id) == other.info
            found = await until(partial(peer.dht.find_peer, second_go.peer_id))
            assert found == where(second_go)
            for daemon in (go, second_go):
                ask = partial(in_thread, daemon.find_peer, peer.peer_id)
                assert await until(ask) == peer.info
            assert peer.network.offences(go.peer_id) == 0

    run(3, go, test)


def test_each_finds_the_others_providers(go: Daemon, second_go: Daemon) -> None:
    async def test(ours: list[Peer]) -> None:
        await in_thread(second_go.connect, where(go))
        first, second = ours
        assert await first.dht.provide(KEY) >= 3
        for daemon in (go, second_go):
            found = await in_thread(daemon.providers, CID_V1_RAW + KEY, 9)
            assert found == [first.info]
        assert await second.dht.providers(KEY) == [first.info]

        other = record_key("/p2pnet/interop/go")
        await in_thread(second_go.provide, CID_V1_RAW + other)
        for peer in ours:
            # It is told from Go's own tasks, after it has said that it is done.
            assert await until(partial(peer.dht.providers, other)) == [where(second_go)]

    run(2, go, test)


def test_a_go_peer_takes_us_into_its_routing_table(go: Daemon) -> None:
    async def test(ours: list[Peer]) -> None:
        expected = sorted(peer.peer_id for peer in ours)

        async def taken_in() -> bool:
            try:
                return sorted(await in_thread(go.closest, KEY)) == expected
            except GoError:  # its table is empty
                return False

        await until(taken_in)

    run(3, go, test)


def test_a_go_peer_that_only_dials_us_is_passed_on(go: Daemon) -> None:
    async def test(ours: list[Peer]) -> None:
        first, second = ours
        await second.join(first.info)
        await in_thread(go.connect, first.info)
        assert await until(partial(second.dht.find_peer, go.peer_id)) == where(go)
        assert go.peer_id in second.network.connected(), "it was reached where it listens"

    run(2, None, test)


def test_records_are_kept_by_our_peers_alone(go: Daemon) -> None:
    async def test(ours: list[Peer]) -> None:
        async def know_each_other() -> bool:
            for peer in ours:
                await peer.dht.find_peer(ours[0].peer_id)
            return all(peer.dht.stats()["holders"] == 2 for peer in ours)

        await until(know_each_other)
        record = allocation_record()
        assert await ours[0].dht.put(record) == 3
        for peer in ours:
            (found,) = await peer.dht.get(VNODE_KEY)
            assert found.signed == record

    run(3, go, test)


def test_bulk_data_passes_through_gos_flow_control_both_ways(go: Daemon) -> None:
    """Three windows of yamux each way: without updates in time it would stand still."""
    sent = bytes(range(256)) * 3 * 1024

    async def test(ours: list[Peer]) -> None:
        connection = ours[0].network._connections.best(go.peer_id)
        assert connection is not None
        talk = await propose(await connection.muxed.open_stream(), "/ipfs/ping/1.0.0")
        got = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk.stream.write, sent)
            while len(got) < len(sent):
                piece = await talk.exactly(32)  # as it sends them
                assert piece is not None
                got += piece
        assert got == sent
        await talk.stream.reset()

    run(1, go, test)
