"""Cuts: what is stored where before the log names it, and what may go afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm, commits_of
from memory_wire import Letter
from small_network import batch, plain, submit, train
from virtual_time import play

from p2pnet.client.run import TrainingRun
from p2pnet.errors import UnreachableError
from p2pnet.orchestrator.conductor_shell import BLOB_COPIES
from p2pnet.orchestrator.cuts import Cuts
from p2pnet.orchestrator.ledger import Decide
from p2pnet.orchestrator.messages import Stored
from p2pnet.v1 import common_pb2

PLACEMENT = {"a": "h1", "b": "h1", "c": "h2"}
RESULT = Decide(20, 0.5, 3, 8)


def ref(tag: str, *holders: str) -> common_pb2.BlobRef:
    return common_pb2.BlobRef(digest=tag.encode().ljust(32), holders=holders)


def stored(host: str, *vnodes: str, step: int = 20, epoch: int = 1) -> Stored:
    return Stored(host, epoch, step, {vnode: ref(f"{vnode}{step}", host) for vnode in vnodes})


def test_a_cut_is_there_when_every_host_has_stored_its_part() -> None:
    cuts = Cuts()
    assert cuts.begin(PLACEMENT, 1, 20, RESULT) == {"h1": ("a", "b"), "h2": ("c",)}
    assert cuts.busy
    assert cuts.take(stored("h1", "a", "b")) is None
    assert cuts.take(stored("h1", "a", "b")) is None  # twice
    for late in (stored("h2", "c", step=19), stored("h2", "c", epoch=2), stored("h3", "c")):
        assert cuts.take(late) is None
    cut = cuts.take(stored("h2", "c"))
    assert cut is not None
    assert (cut.epoch, cut.step, cut.result) == (1, 20, RESULT)
    assert list(cut.states) == ["a", "b", "c"]
    assert cuts.stored == cut
    cuts.forget_stored()
    assert not cuts.busy


def test_other_vnodes_than_asked_for_are_not_taken() -> None:
    cuts = Cuts()
    cuts.begin(PLACEMENT, 1, 20, None)
    with pytest.raises(ValueError, match="other VNodes"):
        cuts.take(stored("h1", "a"))
    assert cuts.is_for(1, 20)


def test_the_newest_stored_cut_waits_for_the_log() -> None:
    cuts = Cuts()
    for step in (20, 40):
        cuts.begin({"a": "h1"}, 1, step, None)
        cuts.take(stored("h1", "a", step=step))
    assert cuts.stored is not None
    assert cuts.stored.step == 40


def test_what_waits_is_not_let_go() -> None:
    cuts = Cuts()
    cuts.begin({"a": "h1"}, 1, 60, None)
    cuts.take(stored("h1", "a", step=60))
    told, digests = cuts.to_retain({"a": ref("a20", "h0")}, {"a": ref("a40", "h1", "h2")})
    assert told == ("h0", "h1", "h2")
    assert [digest.strip() for digest in digests] == [b"a20", b"a40", b"a60"]
    told, _ = cuts.to_retain({"a": ref("a40", "h1")}, {"a": ref("a60", "h1")})
    assert told == ("h0", "h1", "h2")  # whoever held what nobody names any more


def test_a_cut_is_held_by_several_that_are_well(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdefgh") as swarm:
            swarm.add("client", hosting=False)
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            states = (await train(session, network, 3)).done.states
            hosts = {it.vnode: it.host for it in (await session.status(network)).locations}
            assert sorted(states) == sorted(hosts)
            for vnode, state in states.items():
                assert state.holders[0] == hosts[vnode]
                assert len(set(state.holders)) == 1 + 2 * BLOB_COPIES  # they are small
                assert swarm["client"].peer_id not in state.holders
                for holder in state.holders:
                    assert swarm.nodes[holder].store.has(state.digest.hex())

    play(main())


def test_a_host_that_failed_us_gets_no_copies(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdef") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            for step in range(1, 4):
                x, y = batch(step)
                await run.step({"x": x}, y)
            frozen = next(
                it.host
                for it in (await session.status(network)).locations
                if it.host != swarm["a"].peer_id
            )
            swarm.freeze(frozen)  # and the membership still counts it among the living
            for step in range(4, 9):
                x, y = batch(step)
                await run.step({"x": x}, y)
            done = await run.finish()
            assert frozen not in [it for state in done.states.values() for it in state.holders]
            assert (await train(session, network, 9, first=9)).digest == plain(9)[0]

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
                    cuts.append({state.digest.hex() for state in states.values()})
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
            assert commits_of(await swarm.log_of(network.network_id)) == [3, 6]

    play(main())


def test_a_cut_is_found_again_when_all_its_hosts_but_one_copy_are_gone(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdefghi") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            trained = await train(session, network, 4)
            state = trained.done.states["fc1"]
            gone = [holder for holder in state.holders if holder != swarm["a"].peer_id]
            for holder in gone[: len(state.holders) - 1]:
                swarm.kill(holder)
            again = await train(session, network, 8, first=5)
            assert again.digest == plain(8)[0]

    play(main())
