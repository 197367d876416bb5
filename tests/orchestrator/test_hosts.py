"""Whom a network may be placed on: who answers, who agrees, who is well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import Letter, keypair_of
from small_network import plain, small_graph, submit, train
from virtual_time import play

from p2pnet.dht.manifest import network_id_of
from p2pnet.errors import UnreachableError
from p2pnet.keys import ACCEPTANCE, MANIFEST
from p2pnet.orchestrator import hosts as module
from p2pnet.orchestrator.hosts import Hosts, by_host
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2

GRAPH = small_graph()
OWNER = keypair_of("owner")
MANIFEST_OF_A = OWNER.sign(
    MANIFEST,
    records_pb2.Manifest(
        owner=OWNER.public_key,
        name=GRAPH.name,
        spec_digest=GRAPH.digest,
        orchestrators=[keypair_of("a").peer_id],
    ).SerializeToString(deterministic=True),
)
NETWORK = network_id_of(MANIFEST_OF_A)


def usable(found: Any, swarm: MemorySwarm) -> list[str]:
    return sorted(swarm.names([host.peer_id for host in found]))


def request(*vnodes: str, epoch: int = 1) -> pnode_pb2.AllocateRequest:
    return pnode_pb2.AllocateRequest(
        network_id=NETWORK,
        epoch=epoch,
        manifest=MANIFEST_OF_A,
        graph=GRAPH.to_json(),
        vnodes=vnodes,
        lease_s=60,
    )


def test_who_hosts_nothing_or_is_gone_is_not_placed_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            swarm.add("client", hosting=False)
            hosts = Hosts(swarm["a"], "small")
            assert usable(await hosts.usable(), swarm) == ["a", "b", "c"]
            swarm.kill(swarm["b"].peer_id)
            await asyncio.sleep(10)
            assert usable(await hosts.usable(), swarm) == ["a", "c"]
            assert swarm.letters == []  # nobody was asked

    play(main())


def test_who_does_not_answer_now_is_left_alone_for_a_while(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            hosts = Hosts(swarm["a"], "small")
            swarm.freeze(swarm["b"].peer_id)
            everybody = sorted(swarm.nodes)
            began = swarm.loop.time()
            assert usable(await hosts.usable(everybody), swarm) == ["a", "c"]
            assert swarm.loop.time() - began < 2
            swarm.nodes[swarm["b"].peer_id].awake.set()
            assert usable(await hosts.usable(), swarm) == ["a", "c"]
            await asyncio.sleep(module.SHUNNED_S)
            assert usable(await hosts.usable(everybody), swarm) == ["a", "b", "c"]
            hosts.shun(swarm["b"].peer_id)
            hosts.came(swarm["b"].peer_id)  # it was started anew
            assert usable(await hosts.usable(), swarm) == ["a", "b", "c"]

    play(main())


def test_who_is_leaving_stays_out_until_it_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            hosts = Hosts(swarm["a"], "small")
            hosts.leaves(swarm["b"].peer_id)
            await asyncio.sleep(100)
            assert usable(await hosts.usable(), swarm) == ["a", "c"]
            hosts.came(swarm["b"].peer_id)
            assert usable(await hosts.usable(), swarm) == ["a", "b", "c"]

    play(main())


def test_all_agree_or_nothing_is_agreed(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            hosts = Hosts(swarm["a"], "small")
            b, c = swarm["b"].peer_id, swarm["c"].peer_id
            accepted = await hosts.allocate({b: request("fc1", "act"), c: request("out")})
            assert accepted is not None
            said = [records_pb2.Allocation.FromString(it.payload) for it in accepted]
            assert {it.vnode: it.host for it in said} == {"fc1": b, "act": b, "out": c}

            wrong = request("out", epoch=2)
            wrong.lease_s = 0
            assert await hosts.allocate({b: request("fc1", epoch=2), c: wrong}) is None
            assert usable(await hosts.usable(), swarm) == ["a", "b"]  # "c" said no

    play(main())


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
def test_a_host_that_signs_something_else_is_not_taken_at_its_word(
    tmp_path: Path, lie: str
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            b = swarm["b"].peer_id
            answer_allocate(swarm, "b", lambda: LIES[lie](b))
            hosts = Hosts(swarm["a"], "small")
            assert await hosts.allocate({b: request("fc1")}) is None
            assert usable(await hosts.usable(), swarm) == ["a", "c"]
            answer_allocate(swarm, "b", lambda: signed_by("b")(b))
            assert await hosts.allocate({b: request("fc1")}) is not None

    play(main())


def answer_allocate(
    swarm: MemorySwarm, name: str, acceptances: Callable[[], list[common_pb2.Signed]]
) -> None:
    real = swarm[name].methods["PNode/Allocate"]

    async def run(requests: Any, caller: Any, write: Any) -> bytes:
        return pnode_pb2.AllocateReply(acceptances=acceptances()).SerializeToString()

    swarm[name].methods["PNode/Allocate"] = type(real)(run, True, real.timeout_s)


@pytest.mark.parametrize("lie", LIES)
def test_a_network_goes_around_a_host_that_lies(tmp_path: Path, lie: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            answer_allocate(swarm, "b", lambda: LIES[lie](swarm["b"].peer_id))
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            assert (await train(session, network, 3)).digest == plain(3)[0]
            locations = (await session.status(network)).locations
            assert swarm["b"].peer_id not in [it.host for it in locations]

    play(main())


def beat(epoch: int = 1) -> pnode_pb2.HeartbeatRequest:
    return pnode_pb2.HeartbeatRequest(network_id=NETWORK, epoch=epoch, lease_s=60)


def test_one_heartbeat_may_be_lost_and_not_two(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            b = swarm["b"].peer_id
            hosts = Hosts(swarm["a"], "small")
            await hosts.allocate({b: request("fc1")})
            well, wrong, lost = await hosts.heartbeat(b, beat(), ["fc1"])
            assert ([it.vnode for it in well], wrong, lost) == (["fc1"], "", False)

            def lose(letter: Letter) -> None:
                raise UnreachableError("lost")

            swarm.before.append(lose)
            assert await hosts.heartbeat(b, beat(), ["fc1"]) == ((), "", False)
            swarm.before.clear()
            assert (await hosts.heartbeat(b, beat(), ["fc1"]))[1] == ""
            swarm.before.append(lose)
            assert await hosts.heartbeat(b, beat(), ["fc1"]) == ((), "", False)
            _, wrong, lost = await hosts.heartbeat(b, beat(), ["fc1"])
            assert "misses heartbeats: lost" in wrong
            assert not lost  # it may run them all the same

    play(main())


@pytest.mark.parametrize("why", ["another epoch", "a VNode less"])
def test_a_host_that_no_longer_runs_its_vnodes_is_told_on_at_once(tmp_path: Path, why: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            b = swarm["b"].peer_id
            hosts = Hosts(swarm["a"], "small")
            await hosts.allocate({b: request("fc1")})
            vnodes = ["fc1"] if why == "another epoch" else ["fc1", "out"]
            epoch = 2 if why == "another epoch" else 1
            well, wrong, lost = await hosts.heartbeat(b, beat(epoch), vnodes)
            assert not well
            assert lost
            assert wrong.endswith("no longer runs fc1" if len(vnodes) == 1 else "runs out")
            # Who has moved on meanwhile does not hold it against the host: the caller shuns.
            assert usable(await hosts.usable(), swarm) == ["a", "b"]
            hosts.shun(b)
            assert lost

    play(main())


def test_former_hosts_are_told_until_they_have_heard(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            b, c = swarm["b"].peer_id, swarm["c"].peer_id
            hosts = Hosts(swarm["a"], "small")
            await hosts.allocate({b: request("fc1"), c: request("out")})
            hosts.lost([b, c], [c])
            swarm.freeze(b)
            drop = pnode_pb2.DropRequest(network_id=NETWORK, epoch=1)
            await hosts.release(drop)
            assert swarm["b"].host.usage.vnodes == 1
            swarm.thaw(b)
            await hosts.release(drop)
            assert swarm["b"].host.usage.vnodes == 0
            assert swarm["c"].host.usage.vnodes == 1  # it is placed on still
            before = len(swarm.letters)
            await hosts.release(drop)
            assert len(swarm.letters) == before

    play(main())


def test_the_vnodes_of_each_host() -> None:
    assert by_host({"b": "2", "a": "1", "c": "1"}) == {"1": ["a", "c"], "2": ["b"]}
