"""Orchestrators die at any instruction, freeze, race and leave; the bits stay the same.

Whole nodes in one process and in virtual time; see `memory_swarm`. Each run ends with
the digest of the same training in plain torch, every step told once, in order, and a
log in which every commit counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm, claims_of, commits_of
from memory_wire import Letter, keypair_of
from small_network import Trained, batch, plain, small_graph, submit, train
from virtual_time import play

from p2pnet.client.run import TrainingRun
from p2pnet.client.session import NetworkInfo
from p2pnet.client.terms import Terms
from p2pnet.errors import P2PNetError, UnreachableError
from p2pnet.log.history import new_cancellation, parse_entry
from p2pnet.v1 import orchestrator_pb2 as pb

STEPS = 8

Where = Callable[[Letter], bool]


def of(method: str, step: int = 0) -> Where:
    def here(letter: Letter) -> bool:
        if letter.method != method:
            return False
        request = letter.request
        if step and method == "VNode/Save":
            return bool(request.step == step)
        if step and method == "Orchestrator/Report":
            return bool(request.id.step == step)
        if step and method == "Keeper/Accept":
            return bool(parse_entry(request.entry).commit.step == step)
        return True

    return here


# What the orchestrator does or is told when it dies; by its own hand unless "to".
DEATHS: dict[str, tuple[Where, str]] = {
    "a step is reported": (of("Orchestrator/Report", 5), "to"),
    "it saves": (of("VNode/Save", 6), "source"),
    "it asks keepers to promise": (of("Keeper/Prepare"), "source"),
    "it commits": (of("Keeper/Accept", 6), "source"),
    "it tells what is decided": (of("Keeper/Learn"), "source"),
    "it lets states go": (of("Blob/Retain"), "source"),
    "it renews leases": (of("PNode/Heartbeat"), "source"),
}


def fed(step: int) -> tuple[dict[str, object], object]:
    x, y = batch(step)
    return {"x": x}, y


async def check(swarm: MemorySwarm, network: NetworkInfo, trained: Trained) -> None:
    assert trained.digest == plain(STEPS)[0]
    assert [result.step for result in trained.results] == list(range(1, STEPS + 1))
    assert [r.loss for r in trained.results] == pytest.approx(plain(STEPS)[1], rel=1e-6)
    history = await swarm.log_of(network.network_id)  # every entry counts
    commits = commits_of(history)
    assert commits == sorted(set(commits))
    assert commits[-1] == STEPS
    assert claims_of(history) == list(range(1, len(claims_of(history)) + 1))


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("death", DEATHS)
def test_an_orchestrator_that_dies_is_succeeded(tmp_path: Path, death: str, moment: str) -> None:
    where, who = DEATHS[death]

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdef") as swarm:
            session = MemorySession(swarm)
            a = swarm["a"].peer_id
            network = await submit(session, a)
            killed: list[float] = []

            def kill(letter: Letter) -> None:
                if not killed and getattr(letter, who) == a and where(letter):
                    killed.append(swarm.loop.time())
                    swarm.kill(a)

            (swarm.before if moment == "before" else swarm.after).append(kill)
            trained = await train(session, network, STEPS, pause_s=0.2)
            assert killed
            await check(swarm, network, trained)
            again = await session.find(network.network_id)
            assert again.orchestrator != a
            assert (await session.status(again)).taken_over

    play(main())


@pytest.mark.parametrize("point", ["PNode/Allocate", "Keeper/Prepare", "Keeper/Accept"])
def test_a_successor_that_dies_while_it_takes_over_is_succeeded(tmp_path: Path, point: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdefg") as swarm:
            session = MemorySession(swarm)
            a = swarm["a"].peer_id
            network = await submit(session, a)
            second: list[str] = []

            def kill(letter: Letter) -> None:
                if letter.method == point and letter.source != a and not second:
                    second.append(letter.source)
                    swarm.kill(letter.source)

            swarm.before.append(kill)
            run = TrainingRun(session, network)
            results = [await run.step(*fed(step)) for step in range(1, 5)]
            swarm.kill(a)
            results += [await run.step(*fed(step)) for step in range(5, STEPS + 1)]
            await run.finish()
            assert len(second) == 1
            assert [result.step for result in results] == list(range(1, STEPS + 1))
            last = await train(session, network, STEPS + 1, first=STEPS + 1)
            assert last.digest == plain(STEPS + 1)[0]

    play(main())


def test_a_frozen_orchestrator_wakes_and_lets_go(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdef") as swarm:
            session = MemorySession(swarm)
            a = swarm["a"].peer_id
            network = await submit(session, a)
            running = asyncio.ensure_future(train(session, network, STEPS))
            await swarm.until(lambda: 4 in [e["step"] for e in swarm.emitted("decided")])
            swarm.freeze(a, noticed=True)
            trained = await running
            swarm.thaw(a)
            await check(swarm, network, trained)
            now = await session.find(network.network_id)
            assert now.orchestrator != a
            await swarm.until(lambda: not swarm["a"].orchestrator.names())
            history = await swarm.log_of(network.network_id)
            assert a not in [c.orchestrator for _, c in history.claims[1:]]

    play(main())


def test_an_orchestrator_whose_role_is_gone_is_succeeded_though_its_process_lives(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            a = swarm["a"].peer_id
            network = await submit(session, a)

            def mute(letter: Letter) -> None:
                if letter.to == a and letter.method.startswith("Orchestrator/"):
                    raise UnreachableError("lost")

            running = asyncio.ensure_future(train(session, network, STEPS))
            await swarm.until(lambda: 4 in [e["step"] for e in swarm.emitted("decided")])
            swarm.before.append(mute)
            await check(swarm, network, await running)
            assert (await session.find(network.network_id)).orchestrator != a

    play(main())


def test_all_that_know_a_network_but_one_may_die_at_once(tmp_path: Path) -> None:
    """Where no keeper's majority is left nothing can be claimed; it goes on when one is back."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdef") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            for step in range(1, 5):
                await run.step(*fed(step))
            await swarm.until(lambda: bool(swarm.emitted("committed")))
            history = await swarm.log_of(network.network_id)
            frozen = [peer for peer in history.keepers if peer != swarm["a"].peer_id][:2]
            for peer in frozen:
                swarm.freeze(peer, noticed=True)
            swarm.kill(swarm["a"].peer_id)
            step5 = asyncio.ensure_future(run.step(*fed(5)))
            await asyncio.sleep(60)
            thawed = step5.done()
            for peer in frozen:
                swarm.thaw(peer)
            assert (await step5).step == 5
            assert not thawed or len(history.keepers) > 4
            for step in range(6, STEPS + 1):
                await run.step(*fed(step))
            await run.finish()
            last = await train(session, network, STEPS + 1, first=STEPS + 1)
            assert last.digest == plain(STEPS + 1)[0]

    play(main())


def test_an_orchestrator_that_leaves_hands_its_networks_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            a = swarm["a"]
            network = await submit(session, a.peer_id)
            run = TrainingRun(session, network)
            results = [await run.step(*fed(step)) for step in range(1, 5)]
            began = swarm.loop.time()
            assert await a.orchestrator.resign() == []
            assert swarm.loop.time() - began < 5.0
            assert a.orchestrator.names() == []
            history = await swarm.log_of(network.network_id)
            assert commits_of(history) == [3, 4]  # nothing that was decided is done again
            assert claims_of(history) == [1, 2]
            results += [await run.step(*fed(step)) for step in range(5, STEPS + 1)]
            await run.finish()
            assert [result.step for result in results] == list(range(1, STEPS + 1))
            last = await train(session, network, STEPS + 1, first=STEPS + 1)
            assert last.digest == plain(STEPS + 1)[0]

    play(main())


def test_of_those_whom_the_owner_allows_one_succeeds_and_nobody_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdefghij") as swarm:
            session = MemorySession(swarm)
            a = swarm["a"].peer_id
            allowed = (a, swarm["b"].peer_id, swarm["c"].peer_id)
            network = await session.submit(
                small_graph(), keypair_of("owner"), {}, a, Terms(allow=allowed)
            )
            running = asyncio.ensure_future(train(session, network, STEPS, pause_s=1.0))
            await swarm.until(lambda: 4 in [e["step"] for e in swarm.emitted("decided")])
            swarm.kill(a)
            await check(swarm, network, await running)
            history = await swarm.log_of(network.network_id)
            assert {claim.orchestrator for _, claim in history.claims} < {*allowed}

    play(main())


def test_keepers_of_an_idle_network_are_replaced_as_they_go(tmp_path: Path) -> None:
    """Nobody writes an entry, and still the log outlives all who kept it at first."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdefghij") as swarm:
            session = MemorySession(swarm)
            a = swarm["a"].peer_id
            network = await submit(session, a)
            await train(session, network, 3)
            first = (await swarm.log_of(network.network_id)).keepers
            hosts = {it.host for it in (await session.status(network)).locations}
            for keeper in [peer for peer in first if peer not in hosts and peer != a]:
                swarm.kill(keeper)
                await asyncio.sleep(120)
            history = await swarm.log_of(network.network_id)
            alive = [peer for peer, node in swarm.nodes.items() if not node.dead]
            assert all(peer in alive for peer in history.keepers)
            swarm.kill(a)
            trained = await train(session, network, STEPS, first=4)
            assert trained.digest == plain(STEPS)[0]

    play(main())


@pytest.mark.parametrize("feeding", [True, False])
def test_a_keeper_that_leaves_is_replaced_before_it_goes(tmp_path: Path, feeding: bool) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdefghij") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            for step in range(1, 5):
                await run.step(*fed(step))
            if not feeding:
                await run.finish()
            history = await swarm.log_of(network.network_id)
            hosts = {it.host for it in (await session.status(network)).locations}
            going = next(peer for peer in history.keepers if peer not in hosts)
            leaving = swarm.ask(
                "a",
                "Orchestrator/Leaving",
                pb.LeavingRequest(),
                pb.LeavingReply,
                by=swarm.nodes[going].name,
            )
            if feeding:
                _, step5 = await asyncio.gather(leaving, run.step(*fed(5)))
                assert step5.step == 5
            else:
                await leaving
            history = await swarm.log_of(network.network_id)
            assert going not in history.keepers
            assert len(claims_of(history)) == (1 if feeding else 2)

    play(main())


def test_a_submission_said_twice_at_once_is_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            twice: list[asyncio.Task[object]] = []

            def again(letter: Letter) -> None:
                if letter.method == "Orchestrator/Submit" and not twice:
                    ask = swarm.ask("a", letter.method, letter.request, pb.SubmitReply)
                    twice.append(asyncio.ensure_future(ask))

            swarm.before.append(again)
            network = await submit(session, swarm["a"].peer_id)
            await asyncio.gather(*twice)
            assert claims_of(await swarm.log_of(network.network_id)) == [1]
            assert (await train(session, network, 3)).digest == plain(3)[0]

    play(main())


@pytest.mark.parametrize("by", ["owner", "stranger"])
def test_only_the_owner_ends_a_network_and_then_it_is_over(tmp_path: Path, by: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            await train(session, network, 3)
            signed = new_cancellation(keypair_of(by), network.network_id, "enough", 1)
            reply = await swarm.ask(
                "a", "Orchestrator/Cancel", pb.CancelRequest(cancellation=signed), pb.CancelReply
            )
            history = await swarm.log_of(network.network_id)
            if by == "stranger":
                assert "owner" in reply.refusal.detail
                assert history.closing is None
                trained = await train(session, network, STEPS, first=4)
                assert trained.digest == plain(STEPS)[0]
                return
            assert not reply.HasField("refusal")
            assert history.closing is not None
            await swarm.until(
                lambda: not any(node.host.usage.vnodes for node in swarm.nodes.values())
            )
            with pytest.raises(P2PNetError, match="enough"):
                await train(session, network, STEPS, first=4)
            await asyncio.sleep(120)
            assert (await swarm.log_of(network.network_id)).entries == history.entries

    play(main())
