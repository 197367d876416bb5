"""A message finds its VNode: by the cache, by what a former host says, or through the DHT."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hosting import BOSS, ORDER, allocate, manifest_of, network_of, place, training_input
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import Letter, keypair_of
from small_network import batch, plain, small_graph, submit, train
from virtual_time import play

from p2pnet.errors import ForgedError, MalformedError, P2PNetError, ResourceError, UnreachableError
from p2pnet.net.handlers import Caller
from p2pnet.net.hop_frames import Buffer, Request
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.courier import UNDER_WAY_MAX, Courier, EpochOver, HopFailed
from p2pnet.vnode.network import HostedNetwork, refusal
from p2pnet.vnode.tensors import AUTO, RAW, ZSTD, decode

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


PAYLOAD = training_input(GRAPH, "out", "skip", batch(1)[0])[1]


def message(vnode: str = "out", epoch: int = 1) -> vnode_pb2.TrainRequest:
    source = "x" if vnode == "fc1" else "skip"
    return training_input(GRAPH, vnode, source, batch(1)[0], epoch=epoch)[0]


async def nowhere() -> common_pb2.Refusal | None:
    raise AssertionError("it does not live here")


def hops(swarm: MemorySwarm) -> list[str]:
    return swarm.names([it.to for it in swarm.letters if it.method == "VNode/Train"])


def test_the_cache_is_believed_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await allocate(swarm, "b", GRAPH)
            net = net_at(1, swarm, fc1="b")
            await Courier(swarm["a"]).send(net, message("fc1"), PAYLOAD, nowhere)
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
            await Courier(swarm["a"]).send(net, message(), PAYLOAD, here)
            assert taken == ["here"]
            assert hops(swarm) == []

    play(main())


def test_a_former_host_that_knows_is_believed(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            hosts = dict.fromkeys(ORDER, "b") | {"skip": "a", "out": "c"}  # as claimed
            await place(swarm, GRAPH, hosts)
            net = net_at(1, swarm, out="b")
            await Courier(swarm["a"]).send(net, message(), PAYLOAD, nowhere)
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

        async def hop(
            request: Request,
            payload: memoryview | None,
            caller: Caller,
            peer_id: str = node.peer_id,
        ) -> tuple[vnode_pb2.HopReply, Buffer | None]:
            said = answer(Letter(caller.peer_id, peer_id, "VNode/Train", request))
            return vnode_pb2.HopReply(refusal=said), None

        node.answer_hop = hop


def test_a_busy_vnode_is_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            busy = [refusal("REFUSAL_CODE_BUSY", "later")] * 3
            answering(swarm, lambda it: busy.pop() if busy else None)
            net = net_at(1, swarm, out="b")
            began = swarm.loop.time()
            await Courier(swarm["a"]).send(net, message(), PAYLOAD, nowhere)
            assert hops(swarm) == ["b"] * 4
            assert swarm.loop.time() > began + 0.1  # and not at once
            answering(swarm, lambda it: refusal("REFUSAL_CODE_BUSY", "later"))
            with pytest.raises(HopFailed):
                await Courier(swarm["a"]).send(net, message(), PAYLOAD, nowhere)

    play(main())


@pytest.mark.parametrize("code", ["STALE_EPOCH", "UNKNOWN_EPOCH"])
def test_a_newer_epoch_ends_the_errand(tmp_path: Path, code: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            answering(swarm, lambda it: refusal(f"REFUSAL_CODE_{code}", "no", epoch=2))
            net = net_at(1, swarm, out="b")
            with pytest.raises(EpochOver):
                await Courier(swarm["a"]).send(net, message(), PAYLOAD, nowhere)
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
                await Courier(swarm["a"]).send(net, message(), PAYLOAD, nowhere)
            assert failed.value.host == swarm["b"].peer_id
            assert hops(swarm) == ["b"]

    play(main())


def test_a_host_that_is_gone_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            swarm.kill(swarm["b"].peer_id)
            net = net_at(1, swarm, out="b")
            with pytest.raises(HopFailed) as failed:
                await Courier(swarm["a"]).send(net, message(), PAYLOAD, nowhere)
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
                await Courier(swarm["a"]).send(net, message(), PAYLOAD, nowhere)
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
                await courier.send(net, message("out", 0), PAYLOAD, nowhere)
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
                await Courier(swarm["a"]).send(net, message(), PAYLOAD, nowhere)
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
                await Courier(swarm["a"]).send(net, message(), PAYLOAD, nowhere)

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
                await Courier(swarm["a"]).send(net, message(), PAYLOAD, nowhere)
            assert failed.value.host == (swarm[blamed].peer_id if blamed else "")
            net = net_at(1, swarm, out="a")
            with pytest.raises(HopFailed, match=str(error)):
                await Courier(swarm["a"]).send(net, message(), PAYLOAD, here)

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
                await Courier(swarm["a"]).send(net_at(1, swarm), message(), PAYLOAD, nowhere)
            assert failed.value.host == ""

    play(main())


def forward(replica: int = 0) -> vnode_pb2.ForwardRequest:
    return vnode_pb2.ForwardRequest(
        network_id=NETWORK,
        epoch=1,
        request_id=b"r" * 16,
        vnode="out",
        source="skip",
        replica=replica,
    )


def test_a_forward_pass_stays_on_its_replica(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            asked: list[str] = []

            def note(it: Letter) -> common_pb2.Refusal | None:
                asked.extend(swarm.names([it.to]))
                return None

            answering(swarm, note)
            net = net_at(1, swarm, out="b")
            net.standbys = {"out": (swarm["c"].peer_id,)}
            courier = Courier(swarm["a"])
            await courier.send(net, forward(0), PAYLOAD, nowhere)
            await courier.send(net, forward(1), PAYLOAD, nowhere)
            assert asked == ["b", "c"]
            with pytest.raises(HopFailed, match="no standby number 2"):
                await courier.send(net, forward(2), PAYLOAD, nowhere)
            answering(swarm, lambda it: refusal("REFUSAL_CODE_NOT_HOSTED", "not here"))
            with pytest.raises(HopFailed, match="not here") as failed:
                await courier.send(net, forward(1), PAYLOAD, nowhere)
            assert failed.value.host == swarm["c"].peer_id
            assert net.locations  # of which nothing is known to be wrong

    play(main())


def test_a_slow_consumer_slows_down_its_producer(tmp_path: Path) -> None:
    """It has no room for half a minute: nothing fails, and no more than a few are under way."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            room_at = swarm.loop.time() + 30.0
            under_way: list[int] = [0, 0]

            async def slow(
                request: Request, payload: memoryview | None, caller: Caller
            ) -> tuple[vnode_pb2.HopReply, Buffer | None]:
                under_way[0] += 1
                under_way[1] = max(under_way)
                try:
                    await asyncio.sleep(1.0)
                finally:
                    under_way[0] -= 1
                if swarm.loop.time() >= room_at:
                    return vnode_pb2.HopReply(), None
                return vnode_pb2.HopReply(refusal=refusal("REFUSAL_CODE_BUSY", "full")), None

            swarm["b"].answer_hop = slow
            net = net_at(1, swarm, out="b")
            courier = Courier(swarm["a"])
            began = swarm.loop.time()
            await asyncio.gather(
                *(courier.send(net, message(), PAYLOAD, nowhere) for _ in range(40))
            )
            assert swarm.loop.time() - began >= 30.0
            assert under_way[1] == UNDER_WAY_MAX
            assert not courier._under_way

    play(main())


def test_auto_follows_the_line(tmp_path: Path) -> None:
    """What is mostly zeros is compressed for a slow line, after the first tensors."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            answering(swarm, lambda it: None)
            net = net_at(1, swarm, out="b")
            courier = Courier(swarm["a"])
            array = np.zeros((64, 1024), np.float32)
            codecs = []
            for _ in range(4):
                head, payload = await courier.encode(net, "out", array, AUTO)
                assert np.array_equal(decode(head, payload), array)
                codecs.append(head.codec)
                await courier.send(net, message(), payload, nowhere)
            assert codecs[0] == RAW
            seconds = 0.5
            swarm.latency_s = lambda letter: seconds / 2
            for _ in range(20):  # until the quick ones are forgotten
                await courier.send(net, message(), bytes(array.nbytes), nowhere)
            head, payload = await courier.encode(net, "out", array, AUTO)
            assert head.codec == ZSTD
            assert np.array_equal(decode(head, payload), array)
            head, _ = await courier.encode(net, "out", array, RAW)
            assert head.codec == RAW

    play(main())
