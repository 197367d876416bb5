"""A training run as the feeder sees it: what goes wrong on the way is not the user's business."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm, commits_of
from memory_wire import Letter, keypair_of
from small_network import Trained, batch, plain, small_graph, submit, train
from virtual_time import play

from p2pnet.client.link import ORCHESTRATOR_GONE_S
from p2pnet.client.run import TrainingRun
from p2pnet.client.session import NetworkInfo
from p2pnet.client.terms import Terms
from p2pnet.client.weights import fetch_weights
from p2pnet.errors import (
    LocalError,
    NotFoundError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from p2pnet.v1 import common_pb2
from p2pnet.vnode.state import model_digest

STEPS = 8


def fed(step: int) -> tuple[dict[str, Any], Any]:
    x, y = batch(step)
    return {"x": x}, y


async def started(swarm: MemorySwarm, **changes: Any) -> tuple[MemorySession, NetworkInfo]:
    session = MemorySession(swarm)
    return session, await submit(session, swarm["a"].peer_id, **changes)


X, Y = batch(1)
WRONG: dict[str, tuple[dict[str, Any], Any, str]] = {
    "shape": ({"x": X[:, :5]}, Y, r"x has to be \[6\] a sample, and is \[5\]"),
    "dtype": ({"x": X.astype(np.int64)}, Y, "x has to be float32"),
    "target's dtype": ({"x": X}, Y.astype(np.float32), "y has to be int64"),
    "target's shape": ({"x": X}, Y[:, None], r"y has to be \[\] a sample, and is \[1\]"),
    "no samples dimension": ({"x": X}, np.array(1), "samples first"),
    "another input": ({"x": X, "z": X}, Y, "no input 'z'"),
    "no input": ({}, Y, "needs the input 'x'"),
    "lengths": ({"x": X}, Y[:2], "as many inputs as targets"),
    "nothing": ({"x": X[:0]}, Y[:0], "at least one"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_batch_that_does_not_fit_is_not_sent(tmp_path: Path, what: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            run = TrainingRun(*await started(swarm))
            x, y, why = WRONG[what]
            with pytest.raises(UsageError, match=why):
                await run.step(x, y)
            assert not [it for it in swarm.letters if it.method == "VNode/Train"]
            assert (await run.step(*fed(1))).step == 1  # and the run is none the worse
            await run.close()

    play(main())


def test_float64_and_int32_are_taken_for_what_is_meant(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session, network = await started(swarm)
            run = TrainingRun(session, network)
            for step in range(1, 4):
                x, y = batch(step)
                await run.step({"x": x.astype(np.float64)[:, ::1]}, y.astype(np.int32))
            await run.finish()
            again = await train(session, network, 4, first=4)
            assert again.digest == plain(4)[0]

    play(main())


def check(trained: Trained) -> None:
    assert trained.digest == plain(STEPS)[0]
    assert [result.step for result in trained.results] == list(range(1, STEPS + 1))
    assert [r.loss for r in trained.results] == pytest.approx(plain(STEPS)[1], rel=1e-6)


@pytest.mark.parametrize("cut_every", [1, 3])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("report", [1, 3, 4])
def test_a_broken_connection_is_opened_anew(
    tmp_path: Path, report: int, when: str, cut_every: int
) -> None:
    """It breaks at a host's report of step 5; with the fourth the step is decided."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, network = await started(swarm, cut_every=cut_every)
            seen: list[Letter] = []

            def hook(letter: Letter) -> None:
                if letter.method == "Orchestrator/Report" and letter.request.id.step == 5:
                    seen.append(letter)
                    if len(seen) == report:
                        swarm.hang_up(swarm["a"].peer_id)

            hooks = swarm.before if when == "before" else swarm.after
            hooks.append(hook)
            trained = await train(session, network, STEPS)
            assert len(seen) >= 4
            check(trained)
            commits = commits_of(await swarm.log_of(network.network_id))
            assert commits == sorted(set(commits))

    play(main(), limit_s=300)


def test_when_nobody_is_left_it_is_an_error_in_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            run = TrainingRun(*await started(swarm))
            await run.step(*fed(1))
            for peer_id in list(swarm.nodes):
                swarm.kill(peer_id)
            began = swarm.loop.time()
            with pytest.raises(UnreachableError, match="the orchestrator of small is gone"):
                await run.step(*fed(2))
            assert 0.9 < (swarm.loop.time() - began) / ORCHESTRATOR_GONE_S < 1.5
            with pytest.raises(UnreachableError):  # and stays one
                await run.finish()
            await run.close()

    play(main())


@pytest.mark.parametrize("cut_every", [1, 3])
@pytest.mark.parametrize("decided", [1, 3, 4, 5])
def test_a_dead_orchestrator_is_followed_by_another(
    tmp_path: Path, decided: int, cut_every: int
) -> None:
    """Nobody does anything about it; a commit of the step may be on its way when it dies."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            session, network = await started(swarm, cut_every=cut_every)
            running = asyncio.ensure_future(train(session, network, STEPS))
            await swarm.until(lambda: len(swarm.emitted("decided")) == decided)
            swarm.kill(swarm["a"].peer_id)
            trained = await running
            check(trained)
            assert trained.recoveries
            commits = commits_of(await swarm.log_of(network.network_id))
            assert commits == sorted(set(commits))
            status = await session.status(network)
            assert status.orchestrator != swarm["a"].peer_id
            assert status.committed_step == STEPS

    play(main())


def test_a_network_that_its_owner_closes_ends_the_run(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, network = await started(swarm)
            run = TrainingRun(session, network)
            await run.step(*fed(1))
            await session.cancel(network, keypair_of("owner"), "the data was wrong")
            for _ in range(2):
                with pytest.raises(UsageError, match="closed small: the data was wrong"):
                    await run.step(*fed(2))
            await run.close()
            with pytest.raises(UsageError, match="closed small: the data was wrong"):
                await TrainingRun(session, network).start()

    play(main())


def test_the_only_one_that_may_orchestrate_is_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, a = MemorySession(swarm), swarm["a"].peer_id
            network = await session.submit(
                small_graph(), keypair_of("owner"), {}, a, Terms(allow=(a,))
            )
            running = asyncio.ensure_future(train(session, network, STEPS))
            await swarm.until(lambda: len(swarm.emitted("decided")) == 4)
            swarm.hang_up(a)
            swarm.freeze(a)
            await asyncio.sleep(50)
            assert not running.done()
            swarm.thaw(a)
            check(await running)

    play(main())


def test_an_orchestrator_that_sleeps_finds_another_in_its_place(tmp_path: Path) -> None:
    """Its lease ends meanwhile; when it wakes up it has nothing to say any more."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            session, network = await started(swarm)
            running = asyncio.ensure_future(train(session, network, STEPS))
            await swarm.until(lambda: len(swarm.emitted("decided")) == 4)
            swarm.freeze(swarm["a"].peer_id)
            await swarm.until(lambda: len(swarm.emitted("taken_over")) == 1)
            swarm.thaw(swarm["a"].peer_id)
            check(await running)
            await asyncio.sleep(30)
            assert (await session.status(network)).orchestrator != swarm["a"].peer_id
            commits = commits_of(await swarm.log_of(network.network_id))
            assert commits == sorted(set(commits))

    play(main())


def test_when_nothing_is_heard_the_orchestrator_is_asked_to_look(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, network = await started(swarm)

            def lose(letter: Letter) -> None:
                if letter.method == "Orchestrator/Report" and letter.request.id.epoch == 1:
                    raise UnreachableError("lost")

            swarm.before.append(lose)
            trained = await train(session, network, STEPS)
            check(trained)
            assert trained.recoveries == ["nothing was decided for 20 s"]

    play(main())


@pytest.mark.parametrize("how", ["dead", "silent"])
def test_a_host_that_cannot_be_fed_is_told_on(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, network = await started(swarm)
            where = {it.vnode: it.host for it in (await session.status(network)).locations}
            host = where["fc1"] if where["fc1"] != swarm["a"].peer_id else where["loss"]
            running = asyncio.ensure_future(train(session, network, STEPS))
            await swarm.until(lambda: len(swarm.emitted("decided")) == 4)
            if how == "dead":
                swarm.kill(host)
            else:
                swarm.freeze(host)
            trained = await running
            check(trained)
            assert trained.recoveries
            await asyncio.sleep(5)
            after = {it.host for it in (await session.status(network)).locations}
            assert host not in after

    play(main())


def test_a_tensor_that_a_host_refuses_ends_the_run(tmp_path: Path) -> None:
    """It can never be right, so that to begin anew would only be to fail anew."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session, network = await started(swarm)
            run = TrainingRun(session, network)
            await run.step(*fed(1))

            def garble(letter: Letter) -> None:
                if letter.method == "VNode/Train" and letter.request.source == "x":
                    letter.request.tensor.shape[:] = [2, 12]

            swarm.before.append(garble)
            began = swarm.loop.time()
            with pytest.raises(UsageError, match=r"float32\[6\] a sample"):
                await run.step(*fed(2))
            assert swarm.loop.time() - began < 5
            swarm.before.clear()
            await run.close()
            trained = await train(session, network, 4, first=2)
            assert trained.digest == plain(4)[0]

    play(main(), limit_s=600)


def test_a_run_that_is_closed_says_so_to_who_waits(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            run = TrainingRun(*await started(swarm))
            await run.start()
            swarm.freeze(swarm["b"].peer_id)
            swarm.freeze(swarm["c"].peer_id)
            step = asyncio.ensure_future(run.step(*fed(1)))
            await asyncio.sleep(0.5)
            await run.close()
            with pytest.raises(LocalError, match="closed"):
                await step
            with pytest.raises(LocalError, match="closed"):
                await run.step(*fed(2))

    play(main())


def test_an_empty_run_commits_nothing_and_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session, network = await started(swarm)
            run = TrainingRun(session, network)
            done = await run.finish()
            assert done.step == 0
            assert commits_of(await swarm.log_of(network.network_id)) == []
            assert (await train(session, network, 3)).digest == plain(3)[0]
            done = await TrainingRun(session, network).finish()
            assert done.step == 3
            assert len(done.states) == 6

    play(main())


def test_steps_that_are_asked_for_at_once_are_done_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session, network = await started(swarm)
            run = TrainingRun(session, network)
            results = await asyncio.gather(*(run.step(*fed(step)) for step in range(1, 7)))
            assert [it.step for it in results] == [1, 2, 3, 4, 5, 6]
            await run.finish()
            again = await train(session, network, STEPS, first=7)
            assert again.digest == plain(STEPS)[0]

    play(main())


def test_a_network_that_nobody_knows(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session, network = await started(swarm)
            with pytest.raises(NotFoundError, match="there is no network 'other'"):
                await session.find("other")
            assert (await session.find("small")).network_id == network.network_id
            assert (await session.find(network.network_id)).name == "small"
            rows = await session.where_is(network)
            assert [row.vnode for row in rows] == list(network.vnodes)
            with pytest.raises(NotFoundError, match="has no VNode 'fc9'"):
                await session.where_is(network, ["fc9"])

    play(main())


def test_a_peer_that_does_not_orchestrate_it_is_not_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session, network = await started(swarm)
            elsewhere = replace(network, orchestrator=swarm["b"].peer_id)
            check(await train(session, elsewhere, STEPS))

    play(main())


def test_what_is_refused_otherwise_is_an_error_with_its_code(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session, network = await started(swarm)
            first = TrainingRun(session, network)
            await first.step(*fed(1))
            second = TrainingRun(MemorySession(swarm, "another client"), network)
            with pytest.raises(RefusedError, match="by somebody else") as refused:
                await second.step(*fed(1))
            assert refused.value.code == common_pb2.REFUSAL_CODE_BUSY
            with pytest.raises(RefusedError, match="by somebody else"):
                await second.finish()
            await second.close()
            assert (await first.step(*fed(2))).step == 2
            await first.finish()
            with pytest.raises(LocalError, match="finished"):
                await first.step(*fed(3))

    play(main())


def test_who_waits_is_told_what_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, network = await started(swarm)
            notices: list[str] = []
            run = TrainingRun(session, network, notices.append)
            await run.step(*fed(1))
            swarm.freeze(swarm["a"].peer_id)
            swarm.hang_up(swarm["a"].peer_id)
            step = asyncio.ensure_future(run.step(*fed(2)))
            await asyncio.sleep(30)
            swarm.thaw(swarm["a"].peer_id)
            assert (await step).step == 2
            waits, goes_on = notices
            assert waits.startswith("waiting for an orchestrator of small")
            assert goes_on.endswith("going on")
            await run.close()

    play(main())


def test_what_is_held_for_want_of_a_commit_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cut is due before step 1000, and only four batches may be held."""
    monkeypatch.setattr("p2pnet.client.feed.HELD_STEPS_MAX", 4)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session, network = await started(swarm, cut_every=1000)
            run = TrainingRun(session, network)
            results = await asyncio.gather(*(run.step(*fed(step)) for step in range(1, 11)))
            assert [it.step for it in results] == list(range(1, 11))
            done = await run.finish()
            assert done.step == 10
            assert commits_of(await swarm.log_of(network.network_id)) == [4, 8, 10]
            weights = await fetch_weights(session, network, done.states)
            assert model_digest(weights) == plain(10)[0]
            assert not run.recoveries

    play(main())


async def ahead(run: TrainingRun, steps: int) -> list[Any]:
    """Steps that are handed in as fast as there is room, and their results."""
    given = []
    for step in range(1, steps + 1):
        x, y = fed(step)
        given.append(await run.give(x, y))
    return [await result for result in given]


async def digest_of_run(session: MemorySession, network: NetworkInfo, run: TrainingRun) -> str:
    done = await run.finish()
    return model_digest(await fetch_weights(session, network, done.states))


def test_the_next_batch_is_out_before_a_step_is_decided(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, network = await started(swarm)
            run = TrainingRun(session, network)
            most = 0

            def watch(letter: Letter) -> None:
                nonlocal most
                if letter.method == "VNode/Train" and letter.request.source == "x":
                    most = max(most, letter.request.id.step - len(swarm.emitted("decided")))

            swarm.before.append(watch)
            results = await ahead(run, STEPS)
            assert most == small_graph().window == 2
            assert [it.step for it in results] == list(range(1, STEPS + 1))
            assert await digest_of_run(session, network, run) == plain(STEPS)[0]

    play(main())


def test_hosts_hear_of_a_decision_also_where_no_batch_follows(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, network = await started(swarm, cut_every=1000)
            run = TrainingRun(session, network)
            await run.step(*fed(1))
            await asyncio.sleep(1)
            where = {it.vnode: it.host for it in (await session.status(network)).locations}
            told = [it for it in swarm.letters if it.method == "VNode/Decided"]
            assert {it.to for it in told} == {where[node] for node in ("fc1", "skip", "loss")}
            assert {it.request.step for it in told} == {1}
            await run.close()

    play(main())


SETTINGS: dict[str, dict[str, Any]] = {
    "micro-batches": {"micro_batches": 3},
    "clipping": {"clip_norm": 0.5, "micro_batches": 2},
    "zstd": {"codec": "zstd"},
    "fp16": {"codec": "fp16", "micro_batches": 2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_a_death_changes_no_bit_whatever_the_settings(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    async def trained(path: Path, kill: bool) -> str:
        async with MemorySwarm(path, "abcde") as swarm:
            session, network = await started(swarm, **settings)
            run = TrainingRun(session, network)
            running = asyncio.ensure_future(ahead(run, STEPS))
            await swarm.until(lambda: len(swarm.emitted("decided")) == 5)
            if kill:
                where = {it.vnode: it.host for it in (await session.status(network)).locations}
                swarm.kill(where["fc2"])
            assert [it.step for it in await running] == list(range(1, STEPS + 1))
            assert bool(run.recoveries) == kill
            return await digest_of_run(session, network, run)

    calm = play(trained(tmp_path / "calm", False))
    assert play(trained(tmp_path / "not calm", True)) == calm


def test_with_standbys_nothing_is_fed_again_after_a_death(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdef") as swarm:
            session, network = await started(swarm, cut_every=1000, replicas=2)
            run = TrainingRun(session, network)
            running = asyncio.ensure_future(ahead(run, STEPS))
            await swarm.until(lambda: len(swarm.emitted("decided")) == 5)
            rows = (await session.status(network)).locations
            where = {it.vnode: it.host for it in rows if not it.standby}
            a = swarm["a"].peer_id
            swarm.kill(next(where[node] for node in ("fc1", "skip", "loss") if where[node] != a))
            results = await running
            assert all(it.known for it in results)
            again = [
                it.request.id.step
                for it in swarm.letters
                if it.method == "VNode/Train" and it.request.source in ("x", "y")
                if it.request.id.epoch > 1
            ]
            assert min(again) > 5 - small_graph().window + 1
            assert run.recoveries
            assert await digest_of_run(session, network, run) == plain(STEPS)[0]

    play(main())
