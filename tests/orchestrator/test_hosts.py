"""Whom a network may be placed on: who is well, who has agreed, who is still to be told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import keypair_of
from small_network import plain, small_graph, submit, train
from virtual_time import play

from p2pnet.errors import RemoteError
from p2pnet.keys import ACCEPTANCE
from p2pnet.orchestrator.allocations import check_accepted
from p2pnet.orchestrator.hosts import SHUNNED_MAX_S, SHUNNED_S, HostBook, by_host
from p2pnet.orchestrator.messages import MakePlan, Planned, Purpose
from p2pnet.orchestrator.planner import Planner
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2

NETWORK = "0" * 32
ALIVE = dict.fromkeys("abc")


def test_who_failed_us_is_left_alone_for_a_while() -> None:
    book = HostBook()
    book.shun("a", 10.0)
    assert not book.well("a", 10.0 + SHUNNED_S - 0.1)
    assert book.well("a", 10.0 + SHUNNED_S)
    book.shun("a", 50.0)
    book.shun("b", 50.0)
    book.leaves("c")
    assert book.barred(51.0) == ("a", "b", "c")
    assert book.is_leaving("c")
    book.came("a")
    book.came("c")
    assert book.barred(51.0) == ("b",)


def test_one_heartbeat_may_be_lost_and_not_two() -> None:
    book = HostBook()
    assert not book.missed("a")
    book.answered("a")
    assert not book.missed("a")
    assert not book.missed("b")
    assert book.missed("a")
    assert not book.missed("a")  # it was told of, and counts anew


def test_former_hosts_are_told_until_they_have_heard() -> None:
    book = HostBook()
    book.lost(["a", "b", "d"], ["b"])
    assert book.to_release(ALIVE) == ["a"]  # b is placed on still, d is not there
    assert book.to_release(ALIVE) == []  # it is being told
    book.released("a", heard=False)
    assert book.to_release(ALIVE | {"d": None}) == ["a", "d"]
    book.released("a", heard=True)
    book.lost([], ["d"])
    book.released("d", heard=False)
    assert book.to_release(ALIVE | {"d": None}) == []


def test_two_that_cannot_reach_each_other_are_no_neighbours_for_long() -> None:
    book = HostBook()
    book.blame("a", "b", 0.0)
    assert book.barred(0.0) == ()  # it may have been a moment's trouble
    book.blame("a", "b", 1.0)
    assert book.barred(1.0) == ("a",)
    book.blame("a", "b", 2.0)  # and the fault is on the other side
    assert book.barred(2.0) == ("a", "b")
    book.forgive()
    later = 2.0 + SHUNNED_S
    book.blame("a", "b", later)
    assert book.barred(later) == ()


def test_who_fails_again_and_again_is_left_alone_for_longer() -> None:
    book = HostBook()
    now = 0.0
    for times in range(12):
        book.shun("a", now)
        book.shun("a", now)  # seen from two sides, it is one failure
        length_s = min(SHUNNED_S * 2**times, SHUNNED_MAX_S)
        assert not book.well("a", now + length_s - 0.1)
        now += length_s
        assert book.well("a", now)
    book.answered("a")
    book.shun("a", now)
    assert book.well("a", now + SHUNNED_S)


def test_the_vnodes_of_each_host() -> None:
    hosts = by_host({"b": "2", "a": "1", "c": "1"})
    assert hosts == {"1": ("a", "c"), "2": ("b",)}
    assert list(hosts) == ["1", "2"]


def signed_by(name: str, **changes: Any) -> Callable[[str], list[common_pb2.Signed]]:
    def make(host: str) -> list[common_pb2.Signed]:
        fields: dict[str, Any] = {
            "network_id": NETWORK,
            "vnode": "fc1",
            "host": host,
            "epoch": 1,
        } | changes
        payload = records_pb2.Allocation(**fields).SerializeToString()
        return [keypair_of(name).sign(ACCEPTANCE, payload)]

    return make


LIES: dict[str, Callable[[str], list[common_pb2.Signed]]] = {
    "nothing": lambda host: [],
    "by somebody else": signed_by("c"),
    "unsigned": lambda host: [common_pb2.Signed(payload=b"", public_key=bytes(32))],
    "another VNode": signed_by("b", vnode="act"),
    "another network": signed_by("b", network_id="f" * 32),
    "another epoch": signed_by("b", epoch=9),
    "another host": signed_by("b", host="12D3KooW"),
    "no allocation": lambda host: [keypair_of("b").sign(ACCEPTANCE, b"\xff\xff\xff")],
    "twice": lambda host: signed_by("b")(host) * 2,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_host_that_signs_something_else_is_not_taken_at_its_word(lie: str) -> None:
    b = keypair_of("b").peer_id
    check_accepted(NETWORK, 1, b, ["fc1"], signed_by("b")(b), {})
    with pytest.raises(RemoteError):
        check_accepted(NETWORK, 1, b, ["fc1"], LIES[lie](b), {})


@pytest.mark.parametrize("lie", LIES)
def test_a_network_goes_around_a_host_that_lies(tmp_path: Path, lie: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            real = swarm["b"].methods["PNode/Allocate"]

            async def run(requests: Any, caller: Any, write: Any) -> bytes:
                acceptances = LIES[lie](swarm["b"].peer_id)
                return pnode_pb2.AllocateReply(acceptances=acceptances).SerializeToString()

            swarm["b"].methods["PNode/Allocate"] = type(real)(run, True, real.timeout_s)
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            assert (await train(session, network, 3)).digest == plain(3)[0]
            locations = (await session.status(network)).locations
            assert swarm["b"].peer_id not in [it.host for it in locations]

    play(main())


async def plan(
    swarm: MemorySwarm, *, probe: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> Planned:
    planner = Planner(swarm["a"], small_graph())
    return await planner.plan(MakePlan(Purpose.PLACE, {}, exclude, probe))


def test_who_hosts_nothing_is_gone_or_does_not_answer_is_not_placed_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            client = swarm.add("client", hosting=False).peer_id
            b, c = swarm["b"].peer_id, swarm["c"].peer_id
            planned = await plan(swarm)
            assert planned.placement is not None
            assert {*planned.placement.values()} == {swarm["a"].peer_id, b, c}
            assert client in planned.alive  # it may keep the log
            swarm.freeze(b)
            planned = await plan(swarm, probe=(b, c))
            assert planned.absent == (b,)
            assert planned.placement is not None
            assert b not in planned.placement.values()
            planned = await plan(swarm, exclude=(c,))
            assert planned.placement is not None
            assert c not in planned.placement.values()
            swarm.kill(c)
            await asyncio.sleep(10)
            planned = await plan(swarm)
            assert c not in planned.alive

    play(main())


def test_a_swarm_without_room_is_said_and_not_raised(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "") as swarm:
            swarm.add("a", lent_bytes=1)
            planned = await plan(swarm)
            assert planned.placement is None
            assert "the swarm is too small" in planned.reason

    play(main())
