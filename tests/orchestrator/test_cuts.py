"""Cuts: what is stored where before the log names it, and what may go afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hosting import ORDER, allocation, manifest_of
from memory_client import MemorySession
from memory_swarm import MemorySwarm, commits_of
from memory_wire import Letter
from small_network import batch, plain, small_graph, submit, train
from virtual_time import play

from p2pnet.client.run import TrainingRun
from p2pnet.dht.manifest import network_id_of
from p2pnet.errors import RefusedError, RemoteError, UnreachableError
from p2pnet.log.shell import NetworkLog, open_log
from p2pnet.orchestrator.cuts import BLOB_COPIES, Cuts
from p2pnet.orchestrator.hosts import Hosts
from p2pnet.v1 import common_pb2, vnode_pb2


class Placed:
    """A network that is placed, and cuts of our own over a log of our own."""

    def __init__(self, swarm: MemorySwarm, log: NetworkLog, cuts: Cuts, hosts: Hosts) -> None:
        self.swarm, self.log, self.cuts, self.hosts = swarm, log, cuts, hosts
        self.placement: dict[str, str] = {}

    async def make(self, step: int = 0, epoch: int = 1) -> bool:
        return await self.cuts.make(self.placement, epoch, step)


async def placed(swarm: MemorySwarm, initial: Any = None) -> Placed:
    """As the conductor on "a" has it: claimed and allocated under epoch 1."""
    a, graph = swarm["a"], small_graph()
    manifest = manifest_of(graph, ["a"])
    network_id = network_id_of(manifest)
    log = open_log(a, network_id, manifest, swarm.state_url)
    hosts = Hosts(a, graph.name)
    it = Placed(swarm, log, Cuts(a, log, hosts, network_id, graph, initial or {}), hosts)
    assert await log.claim("test") == 1
    names = sorted(node.name for node in swarm.nodes.values() if node.hosting)
    for at, vnode in enumerate(ORDER):
        it.placement[vnode] = swarm[names[at % len(names)]].peer_id
    requests = {}
    for host in sorted(set(it.placement.values())):
        mine = [vnode for vnode in ORDER if it.placement[vnode] == host]
        requests[host] = allocation(graph, mine, network_id=network_id, manifest=manifest)
    assert await hosts.allocate(requests) is not None
    return it


def test_a_cut_is_of_every_vnode_and_held_by_three(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            it = await placed(swarm)
            assert not it.cuts.committed
            assert await it.make()
            assert it.cuts.committed
            assert it.cuts.step == 0
            assert sorted(it.cuts.states) == sorted(it.placement)
            for vnode, ref in it.cuts.states.items():
                assert ref.holders[0] == it.placement[vnode]
                assert len(set(ref.holders)) == 1 + BLOB_COPIES
                for holder in ref.holders:
                    assert swarm.nodes[holder].store.has(ref.digest.hex())
            await it.log.close()

    play(main())


def test_copies_go_to_peers_that_are_well_and_not_all_to_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdef") as swarm:
            swarm.add("client", hosting=False)
            it = await placed(swarm)
            it.hosts.leaves(swarm["f"].peer_id)
            await it.make()
            copies = [
                swarm.nodes[holder].name
                for ref in it.cuts.states.values()
                for holder in list(ref.holders)[1:]
            ]
            assert not {"f", "client"} & set(copies)
            assert len(set(copies)) > BLOB_COPIES
            await it.log.close()

    play(main())


def test_a_step_is_committed_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            it = await placed(swarm)
            done = await asyncio.gather(it.make(), it.make(), it.make())
            assert sorted(done) == [False, False, True]
            assert commits_of(await swarm.log_of(it.log.history.network_id)) == [0]
            await it.log.close()

    play(main())


@pytest.mark.parametrize("trouble", ["dead", "refuses", "others", "garbage"])
def test_without_every_state_nothing_is_committed(tmp_path: Path, trouble: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            it = await placed(swarm)
            real = swarm["b"].methods["VNode/Save"]

            async def run(requests: Any, caller: Any, write: Any) -> bytes:
                reply = vnode_pb2.SaveReply()
                if trouble == "refuses":
                    reply.refusal.code = common_pb2.REFUSAL_CODE_FAILED
                    reply.refusal.detail = "I have lost it"
                elif trouble == "others":
                    reply.states["nobody"].digest = bytes(32)
                else:
                    for vnode in it.placement:
                        if it.placement[vnode] == swarm["b"].peer_id:
                            reply.states[vnode].digest = b"short"
                return reply.SerializeToString()

            if trouble == "dead":
                swarm.kill(swarm["b"].peer_id)
            else:
                swarm["b"].methods["VNode/Save"] = type(real)(run, True, 30)
            with pytest.raises(RemoteError):
                await it.make()
            assert not it.cuts.committed
            assert commits_of(await swarm.log_of(it.log.history.network_id)) == []
            if trouble != "dead":
                swarm["b"].methods["VNode/Save"] = real
                assert await it.make()
            await it.log.close()

    play(main())


def test_a_cut_of_an_epoch_that_is_over_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            it = await placed(swarm)
            assert await it.log.claim("anew") == 2
            with pytest.raises(RefusedError, match="newer epoch"):
                await it.make(epoch=1)
            assert not it.cuts.committed
            await it.log.close()

    play(main())


def test_before_the_first_commit_the_states_are_those_submitted(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            initial = {"fc1": common_pb2.BlobRef(digest=b"1" * 32)}
            it = await placed(swarm, initial)
            assert it.cuts.states == initial
            assert it.cuts.step == 0
            await it.make()
            assert it.cuts.states != initial
            await it.log.close()

    play(main())


def test_the_last_two_cuts_are_kept_and_older_ones_let_go(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            cuts: list[set[str]] = []
            for step in range(1, 13):
                x, y = batch(step)
                await run.step({"x": x}, y)
                await asyncio.sleep(40)  # a blob that no commit names is kept for a minute
                if step % 3 == 0:
                    states = (await session.status(network)).states
                    cuts.append({ref.digest.hex() for ref in states.values()})
            await run.finish()
            held = [
                {
                    digest
                    for node in swarm.nodes.values()
                    for digest in cut
                    if node.store.has(digest)
                }
                for cut in cuts
            ]
            # what never changes (an activation has no parameters) may be in several cuts
            lasting = cuts[2] | cuts[3]
            assert held[3] == cuts[3]
            assert held[2] == cuts[2]
            assert held[0] <= lasting
            assert held[1] <= lasting
            assert not cuts[0] <= lasting

    play(main())


def test_a_lost_retain_is_only_a_hint_lost(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:

            def lose(letter: Letter) -> None:
                if letter.method == "Blob/Retain":
                    raise UnreachableError("lost")

            swarm.before.append(lose)
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            trained = await train(session, network, 6)
            assert trained.recoveries == []
            assert trained.digest == plain(6)[0]

    play(main())


def test_a_cut_is_found_again_when_all_its_hosts_but_one_copy_are_gone(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdefg") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            trained = await train(session, network, 4)
            ref = trained.done.states["fc1"]
            gone = [holder for holder in ref.holders if holder != swarm["a"].peer_id][:2]
            for holder in gone:
                swarm.kill(holder)
            again = await train(session, network, 8, first=5)
            assert again.digest == plain(8)[0]

    play(main())
