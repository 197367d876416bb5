"""Our DHT and py-libp2p's stock KadDHT: each is a peer of the other's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio
from dht_peers import Peer, peers, until
from p2pd import KAD
from stock_kad import StockPeer, stock_peer

from p2pnet.dht.keyspace import cid_of, record_key

KEY = record_key("/p2pnet/interop")
OTHER_KEY = record_key("/p2pnet/interop/stock")
Test = Callable[[list[Peer], StockPeer], Awaitable[None]]


def run(count: int, test: Test) -> None:
    """Runs a test among peers of ours and a stock one that knows nobody."""

    async def main() -> None:
        async with peers(count, KAD) as ours, stock_peer() as stock:
            await test(ours, stock)

    trio.run(main)


def test_each_finds_the_others_peers_and_providers() -> None:
    async def test(ours: list[Peer], stock: StockPeer) -> None:
        for peer in ours:
            await peer.join(stock.info)
        for peer in ours:
            for other in ours:
                if other is not peer:
                    assert await peer.dht.find_peer(other.peer_id) == other.info
            assert await stock.find_peer(peer.peer_id) == peer.info
        first = ours[0]
        assert await first.dht.provide(KEY) == 4
        for peer in ours:
            assert await peer.dht.providers(KEY) == [first.info]
        assert await stock.providers(cid_of(KEY)) == [first.info]
        # An echo that the stock peer sent to our ADD_PROVIDER is not the next answer.
        assert await first.dht.providers(OTHER_KEY) == []
        assert await stock.dht.provide(cid_of(OTHER_KEY))
        for peer in ours:
            assert await until(partial(peer.dht.providers, OTHER_KEY)) == [stock.info]
            assert peer.network.offences(stock.info.peer_id) == 0
            assert peer.dht.stats()["requests_failed"] == 0

    run(3, test)


def test_a_stock_peer_that_only_dials_us_is_passed_on() -> None:
    async def test(ours: list[Peer], stock: StockPeer) -> None:
        first, second = ours
        await second.join(first.info)
        await stock.connect(first.info)
        assert await stock.find_peer(second.peer_id) == second.info
        assert await until(partial(second.dht.find_peer, stock.info.peer_id)) == stock.info

    run(2, test)


def test_a_value_of_a_stock_peers_is_refused_and_no_offence() -> None:
    async def test(ours: list[Peer], stock: StockPeer) -> None:
        (peer,) = ours
        await stock.connect(peer.info)
        stock.dht.register_validator("any", _Anything())
        for _ in range(10):
            await stock.dht.put_value("/any/key", b"value")
        assert peer.network.offences(stock.info.peer_id) == 0
        assert peer.dht.stats()["records"] == 0
        assert stock.info.peer_id in peer.network.connected()

    run(1, test)


class _Anything:
    """A validator of the library's that takes everything."""

    def validate(self, key: str, value: bytes) -> None:
        pass

    def select(self, key: str, values: list[bytes]) -> int:
        return 0
