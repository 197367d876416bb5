"""A message finds its VNode: by the cache, by what a former host says, or through the DHT."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hosting import BOSS, ORDER, allocate, manifest_of, network_of, place, training_input
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import Letter, keypair_of
from small_network import batch, plain, small_graph, submit, train
from virtual_time import play

from p2pnet.errors import ForgedError, MalformedError, P2PNetError, ResourceError, UnreachableError
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.courier import Courier, EpochOver, HopFailed
from p2pnet.vnode.network import HostedNetwork, refusal

GRAPH = small_graph()
NETWORK = network_of(GRAPH)


def net_at(epoch: int, swarm: MemorySwarm, **locations: str) -> HostedNetwork:
    """What the sender knows of the network."""
    return HostedNetwork(
        network_id=NETWORK,
        graph=GRAPH,
        manifest=manifest_of(GRAPH),
        epoch=epoch,
        claimant=keypair_of(BOSS).peer_id,
        base_step=0,
        state_url="",
        locations={vnode: swarm[name].peer_id for vnode, name in locations.items()},
    )


def message(vnode: str = "out", epoch: int = 1) -> vnode_pb2.TrainRequest:
    return training_input(GRAPH, vnode, "skip", batch(1)[0], epoch=epoch)


async def nowhere() -> common_pb2.Refusal | None:
    raise AssertionError("it does not live here")


def hops(swarm: MemorySwarm) -> list[str]:
    return swarm.names([it.to for it in swarm.letters if it.method == "VNode/Train"])


def test_the_cache_is_believed_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await allocate(swarm, "b", GRAPH)
            net = net_at(1, swarm, out="b")
            await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)
            assert hops(swarm) == ["b"]
            assert not swarm.emitted("located")

    play(main())


def test_what_lives_here_crosses_no_wire(tmp_path: Path) -> None:
    taken: list[str] = []

    async def here() -> common_pb2.Refusal | None:
        taken.append("here")
        return None

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            net = net_at(1, swarm, out="a")
            await Courier(swarm["a"]).send(net, "VNode/Train", message(), here)
            assert taken == ["here"]
            assert hops(swarm) == []

    play(main())


def test_a_former_host_that_knows_is_believed(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            hosts = dict.fromkeys(ORDER, "b") | {"out": "c"}  # as the claim says
            await place(swarm, GRAPH, hosts)
            net = net_at(1, swarm, out="b")
            await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)
            assert hops(swarm)[:2] == ["b", "c"]
            assert net.locations == {"out": swarm["c"].peer_id}

    play(main())


def test_an_empty_cache_is_filled_from_the_dht(tmp_path: Path) -> None:
    """A whole run in which every host forgets every location before every step."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:

            def forget(letter: Letter) -> None:
                if letter.method == "VNode/Train":
                    for node in swarm.nodes.values():
                        node.host.forget_locations()

            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            swarm.before.append(forget)
            trained = await train(session, network, 4)
            assert trained.digest == plain(4)[0]
            assert trained.recoveries == []
            hosts = {it.vnode: it.host for it in (await session.status(network)).locations}
            located = swarm.emitted("located")
            assert len(located) >= 10
            assert all(hosts[it["vnode"]] == it["host"] for it in located)

    play(main())


Refusing = Callable[[Letter], common_pb2.Refusal | None]


def answering(swarm: MemorySwarm, answer: Refusing) -> None:
    """Everybody answers a training message as `answer` says."""
    for node in swarm.nodes.values():
        real = node.methods["VNode/Train"]

        async def run(requests: Any, caller: Any, write: Any, peer_id: str = node.peer_id) -> bytes:
            [raw] = [raw async for raw in requests]
            request = vnode_pb2.TrainRequest.FromString(raw)
            said = answer(Letter(caller.peer_id, peer_id, "VNode/Train", request))
            return vnode_pb2.HopReply(refusal=said).SerializeToString()

        node.methods["VNode/Train"] = type(real)(run, True, real.timeout_s)


def test_a_busy_vnode_is_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            busy = [refusal("REFUSAL_CODE_BUSY", "later")] * 3
            answering(swarm, lambda it: busy.pop() if busy else None)
            net = net_at(1, swarm, out="b")
            began = swarm.loop.time()
            await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)
            assert hops(swarm) == ["b"] * 4
            assert swarm.loop.time() > began + 0.1  # and not at once
            answering(swarm, lambda it: refusal("REFUSAL_CODE_BUSY", "later"))
            with pytest.raises(HopFailed):
                await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)

    play(main())


@pytest.mark.parametrize("code", ["STALE_EPOCH", "UNKNOWN_EPOCH"])
def test_a_newer_epoch_ends_the_errand(tmp_path: Path, code: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            answering(swarm, lambda it: refusal(f"REFUSAL_CODE_{code}", "no", epoch=2))
            net = net_at(1, swarm, out="b")
            with pytest.raises(EpochOver):
                await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)
            assert hops(swarm) == ["b"]

    play(main())


def test_a_host_that_is_behind_is_waited_for(tmp_path: Path) -> None:
    """It is allocated under our epoch a moment after we are; the DHT says that it is there."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            slow = next(
                it.host
                for it in (await session.status(network)).locations
                if it.host != swarm["a"].peer_id
            )

            async def late(letter: Letter) -> None:
                if letter.method == "PNode/Allocate" and letter.to == slow:
                    await asyncio.sleep(0.2)

            swarm.before.append(late)
            first = await train(session, network, 3)
            assert first.digest == plain(3)[0]
            again = await train(session, network, 6, first=4)
            assert again.digest == plain(6)[0]

    play(main())


@pytest.mark.parametrize(
    ("code", "detail"), [("BAD_REQUEST", "no such slot"), ("LEASE_EXPIRED", "not renewed")]
)
def test_what_is_refused_for_good_is_not_tried_again(
    tmp_path: Path, code: str, detail: str
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            answering(swarm, lambda it: refusal(f"REFUSAL_CODE_{code}", detail))
            net = net_at(1, swarm, out="b")
            with pytest.raises(HopFailed, match=detail) as failed:
                await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)
            assert failed.value.host == swarm["b"].peer_id
            assert hops(swarm) == ["b"]

    play(main())


def test_a_host_that_is_gone_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            swarm.kill(swarm["b"].peer_id)
            net = net_at(1, swarm, out="b")
            with pytest.raises(HopFailed) as failed:
                await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)
            assert failed.value.host == swarm["b"].peer_id

    play(main())


def test_hosts_that_point_at_each_other_are_not_followed_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            other = {swarm["b"].peer_id: swarm["c"].peer_id, swarm["c"].peer_id: swarm["b"].peer_id}
            answering(
                swarm,
                lambda it: refusal("REFUSAL_CODE_NOT_HOSTED", "no", epoch=1, host=other[it.to]),
            )
            net = net_at(1, swarm, out="b")
            with pytest.raises(HopFailed, match="out is not to be found"):
                await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)
            assert len(hops(swarm)) < 10

    play(main())


def test_what_the_dht_says_of_other_epochs(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            courier = Courier(swarm["b"])
            net = net_at(1, swarm)
            net.network_id, net.claimant = network.network_id, swarm["a"].peer_id
            host, epoch = await courier.locate(net, "fc1", 1)
            assert epoch == 1
            assert host == next(
                it.host for it in (await session.status(network)).locations if it.vnode == "fc1"
            )
            net.epoch = 0  # we are behind
            assert await courier.locate(net, "fc1", 0) == (host, 1)
            with pytest.raises(EpochOver):
                await courier.send(net, "VNode/Train", message("out", 0), nowhere)
            net.epoch = 2  # the DHT is behind
            with pytest.raises(HopFailed, match="does not know where fc1 lives"):
                await courier.locate(net, "fc1", 2)
            net.epoch, net.claimant = 1, swarm["c"].peer_id  # of a race that another has won
            with pytest.raises(HopFailed, match="does not know where fc1 lives"):
                await courier.locate(net, "fc1", 1)
            swarm.dht_answers = False
            with pytest.raises(HopFailed, match="could not be asked"):
                await courier.locate(net, "fc1", 1)

    play(main())


def test_a_silent_host_costs_a_bounded_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            swarm.freeze(swarm["b"].peer_id)
            net = net_at(1, swarm, out="b")
            began = swarm.loop.time()
            with pytest.raises(HopFailed, match="in time"):
                await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)
            assert swarm.loop.time() < began + 6

    play(main())


def test_a_lost_message_is_a_failed_hop(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:

            def lose(letter: Letter) -> None:
                raise UnreachableError("lost")

            swarm.before.append(lose)
            net = net_at(1, swarm, out="b")
            with pytest.raises(HopFailed, match="lost"):
                await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)

    play(main())


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (MalformedError("no reply at all"), "b"),
        (ForgedError("another peer's certificate"), "b"),
        (ResourceError("the bridge is busy"), ""),  # ours
    ],
)
def test_whatever_goes_wrong_is_a_failed_hop(
    tmp_path: Path, error: P2PNetError, blamed: str
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:

            def fail(letter: Letter) -> None:
                raise error

            async def here() -> common_pb2.Refusal | None:
                raise error

            swarm.before.append(fail)
            net = net_at(1, swarm, out="b")
            with pytest.raises(HopFailed, match=str(error)) as failed:
                await Courier(swarm["a"]).send(net, "VNode/Train", message(), nowhere)
            assert failed.value.host == (swarm[blamed].peer_id if blamed else "")
            net = net_at(1, swarm, out="a")
            with pytest.raises(HopFailed, match=str(error)):
                await Courier(swarm["a"]).send(net, "VNode/Train", message(), here)

    play(main())


def test_a_lookup_that_cannot_be_made_is_a_failed_hop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:

            async def busy(*args: Any, **kwargs: Any) -> Any:
                raise ResourceError("the bridge is busy")

            monkeypatch.setattr(swarm["a"], "find_allocations", busy)
            with pytest.raises(HopFailed, match="busy") as failed:
                await Courier(swarm["a"]).send(net_at(1, swarm), "VNode/Train", message(), nowhere)
            assert failed.value.host == ""

    play(main())
