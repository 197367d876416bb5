"""A network in an orchestrator's hands: trained, with anything killed anywhere, to the same bits.

Whole nodes in one process and in virtual time; see `memory_swarm`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm, claims_of, commits_of
from memory_wire import Hook, Letter, keypair_of
from small_network import Trained, batch, plain, small_graph, submit, train
from virtual_time import play

from p2pnet.client.run import TrainingRun
from p2pnet.client.session import NetworkInfo
from p2pnet.errors import RefusedError, UnreachableError, UsageError
from p2pnet.keys import MANIFEST
from p2pnet.log.directory import DirectoryLog
from p2pnet.log.history import History, new_claim, parse_entry
from p2pnet.log.shell import open_log
from p2pnet.v1 import common_pb2, log_pb2, orchestrator_pb2, records_pb2, vnode_pb2

STEPS = 8
GRAPH = small_graph()
# Of each of three hosts that can just hold the network, where two cannot.
LENT_BYTES = sum(GRAPH.memory_bytes(vnode) for vnode in GRAPH.vnodes()) * 2 // 5


@pytest.mark.parametrize("nodes", ["abc", "abcd", "abcde"])
def test_a_network_trains_as_in_one_torch_process(tmp_path: Path, nodes: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, nodes) as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            trained = await train(session, network, STEPS)
            digest, losses = plain(STEPS)
            assert trained.digest == digest
            assert [result.step for result in trained.results] == list(range(1, STEPS + 1))
            assert [result.loss for result in trained.results] == pytest.approx(losses, rel=1e-6)
            assert [result.samples for result in trained.results] == [4, 4, 4, 4, 4, 4, 3, 4]
            assert trained.done.step == STEPS
            assert trained.recoveries == []
            history = await swarm.log_of(network.network_id)
            assert claims_of(history) == [1]
            assert commits_of(history) == [3, 6, 8]

    play(main())


async def check_trained(swarm: MemorySwarm, network: NetworkInfo, trained: Trained) -> None:
    """As plain torch, every step once, and every cut committed once."""
    assert trained.digest == plain(STEPS)[0]
    assert [result.step for result in trained.results] == list(range(1, STEPS + 1))
    assert [r.loss for r in trained.results] == pytest.approx(plain(STEPS)[1], rel=1e-6)
    commits = commits_of(await swarm.log_of(network.network_id))
    assert commits[-1] == STEPS
    assert commits == sorted(set(commits)), "a step is committed once"


# Where a host dies: which call it is at (its own, or one that it is asked), and whether
# the call has been carried out by then.

Where = Callable[[Letter], bool]


def training(direction: vnode_pb2.Direction) -> Where:
    return lambda letter: (
        letter.method == "VNode/Train"
        and letter.request.direction == direction
        and letter.request.id.step == 5
    )


def report(letter: Letter) -> bool:
    return letter.method == "Orchestrator/Report" and letter.request.id.step == 5


def save(letter: Letter) -> bool:
    return letter.method == "VNode/Save" and letter.request.step == 6


DEATHS: dict[str, tuple[Where, str]] = {
    "in forward": (training(vnode_pb2.DIRECTION_FORWARD), "source"),
    "fed": (training(vnode_pb2.DIRECTION_FORWARD), "to"),
    "in backward": (training(vnode_pb2.DIRECTION_BACKWARD), "source"),
    "given a gradient": (training(vnode_pb2.DIRECTION_BACKWARD), "to"),
    "between held and decided": (report, "source"),
    "in a save": (save, "to"),
    "in a copy": (lambda letter: letter.method == "Blob/Put", "to"),
    "in a copy of its own": (lambda letter: letter.method == "Blob/Put", "source"),
    "in the first allocation": (lambda letter: letter.method == "PNode/Allocate", "to"),
    "as a keeper that promises": (lambda letter: letter.method == "Keeper/Prepare", "to"),
    "as a keeper that accepts": (lambda letter: letter.method == "Keeper/Accept", "to"),
    "as a keeper that learns": (lambda letter: letter.method == "Keeper/Learn", "to"),
    "in a retain": (lambda letter: letter.method == "Blob/Retain", "to"),
}


def kill_once(swarm: MemorySwarm, hooks: list[Hook], where: Where, who: str) -> list[str]:
    """Kills the first host but "a", the orchestrator, that is met there; the list says whom."""
    killed: list[str] = []

    def hook(letter: Letter) -> None:
        peer_id = getattr(letter, who)
        others = peer_id in swarm.nodes and peer_id != swarm["a"].peer_id
        if others and not killed and where(letter):
            killed.append(peer_id)
            swarm.kill(peer_id)

    hooks.append(hook)
    return killed


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("death", DEATHS)
def test_a_host_that_dies_changes_no_bit(tmp_path: Path, death: str, when: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            killed = kill_once(swarm, getattr(swarm, when), *DEATHS[death])
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            trained = await train(session, network, STEPS)
            assert len(killed) == 1
            await check_trained(swarm, network, trained)
            status = await session.status(network)
            assert killed[0] not in [location.host for location in status.locations]

    play(main())


@pytest.mark.parametrize("death", ["report", "save", "accept", "learn"])
def test_a_host_that_dies_at_the_very_end_changes_no_bit(tmp_path: Path, death: str) -> None:
    """The feeder has said by then that nothing more comes."""
    places: dict[str, tuple[Where, str]] = {
        "report": (
            lambda it: it.method == "Orchestrator/Report" and it.request.id.step == STEPS,
            "source",
        ),
        "save": (lambda it: it.method == "VNode/Save" and it.request.step == STEPS, "to"),
        "accept": (at_commit_of(STEPS), "to"),
        "learn": (lambda it: it.method == "Keeper/Learn" and commit_in(it) == STEPS, "to"),
    }

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            killed = kill_once(swarm, swarm.before, *places[death])
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            trained = await train(session, network, STEPS)
            assert len(killed) == 1
            assert trained.done.step == STEPS
            await check_trained(swarm, network, trained)

    play(main())


def commit_in(letter: Letter) -> int:
    """The step of the commit that goes to a keeper, or 0."""
    entries = [letter.request.entry] if letter.method == "Keeper/Accept" else letter.request.entries
    return max((log_pb2.LogEntry.FromString(it.payload).commit.step for it in entries), default=0)


def at_commit_of(step: int) -> Where:
    return lambda letter: letter.method == "Keeper/Accept" and commit_in(letter) == step


@pytest.mark.parametrize("seed", range(4))
def test_doubled_and_delayed_messages_are_harmless(tmp_path: Path, seed: int) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            rng = random.Random(seed)
            hot = ("VNode/Train", "Orchestrator/Report")
            swarm.latency_s = lambda it: (
                rng.choice((0.0, 0.001, 0.02, 0.4)) if it.method in hot else 0
            )
            swarm.copies = lambda it: rng.choice((1, 2, 3)) if it.method in hot else 1
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            trained = await train(session, network, STEPS)
            assert trained.recoveries == []
            await check_trained(swarm, network, trained)
            assert (await session.status(network)).steps_decided == STEPS

    play(main())


@pytest.mark.parametrize("seed", range(4))
def test_lost_messages_cost_time_and_no_bit(tmp_path: Path, seed: int) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            rng = random.Random(seed)
            lost: list[Letter] = []

            def lose(letter: Letter) -> None:
                if letter.method != "Orchestrator/Submit" and rng.random() < 0.01:
                    lost.append(letter)
                    raise UnreachableError("lost")

            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            swarm.before.append(lose)
            swarm.after.append(lose)
            trained = await train(session, network, STEPS)
            assert lost
            del swarm.before[:], swarm.after[:]
            await check_trained(swarm, network, trained)

    play(main())


def test_a_lost_report_is_noticed_and_the_step_done_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            lost: list[Letter] = []

            def lose(letter: Letter) -> None:
                if report(letter) and not lost:
                    lost.append(letter)
                    raise UnreachableError("lost")

            swarm.before.append(lose)
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            trained = await train(session, network, STEPS)
            await check_trained(swarm, network, trained)
            reason = "step 5 stands still: nothing from " + ", ".join(
                vnode for vnode in small_graph().vnodes() if vnode in lost[0].request.vnodes
            )
            assert trained.recoveries == [reason]

    play(main())


# Feeders


def test_a_second_feeder_is_refused_and_may_come_later(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            first = TrainingRun(session, network)
            await first.step(*fed(1))
            second = TrainingRun(MemorySession(swarm, "other"), network)
            with pytest.raises(RefusedError, match="wait until that is done") as refused:
                await second.start()
            assert refused.value.code == common_pb2.REFUSAL_CODE_BUSY
            await first.step(*fed(2))
            await first.finish()
            trained = await train(session, network, 4, first=3)
            assert trained.digest == plain(4)[0]

    play(main())


def fed(step: int) -> tuple[dict[str, Any], Any]:
    x, y = batch(step)
    return {"x": x}, y


@pytest.mark.parametrize("direction", ["FORWARD", "BACKWARD"])
def test_half_a_step_of_a_feeder_that_vanished_has_no_effect(
    tmp_path: Path, direction: str
) -> None:
    here = training(getattr(vnode_pb2, f"DIRECTION_{direction}"))

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            for step in range(1, 5):
                await run.step(*fed(step))
            step5 = asyncio.ensure_future(run.step(*fed(99)))  # a batch that must leave no trace
            await swarm.until(lambda: any(map(here, swarm.letters)))
            await run.close()
            await asyncio.gather(step5, return_exceptions=True)
            trained = await train(session, network, STEPS, first=5)
            assert [result.step for result in trained.results] == [5, 6, 7, 8]
            assert trained.digest == plain(STEPS)[0]
            history = await swarm.log_of(network.network_id)
            assert commits_of(history) == [3, 4, 7, 8]

    play(main())


def test_a_batch_that_can_never_be_right_ends_the_run_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            await run.step(*fed(1))
            x, y = fed(2)
            with pytest.raises(UsageError, match=r"small: .*class"):
                await run.step(x, y + 7)  # there are three classes
            await run.close()
            trained = await train(session, network, 4, first=2)
            assert trained.digest == plain(4)[0]

    play(main())


# Swarms that are too small, and logs that nobody keeps


def test_a_swarm_that_is_too_small_is_said_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "") as swarm:
            for name in "ab":
                swarm.add(name, lent_bytes=LENT_BYTES)
            session = MemorySession(swarm)
            with pytest.raises(UsageError, match="the swarm is too small") as error:
                await submit(session, swarm["a"].peer_id)
            assert "\n" not in str(error.value)
            assert not [it for it in swarm.letters if it.method == "Keeper/Prepare"]
            swarm.add("c", lent_bytes=LENT_BYTES)
            network = await submit(session, swarm["a"].peer_id)  # it is not half there
            assert (await train(session, network, 3)).digest == plain(3)[0]

    play(main())


def test_a_network_that_no_longer_fits_waits_for_a_peer(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "") as swarm:
            for name in "abc":
                swarm.add(name, lent_bytes=LENT_BYTES)
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            for step in range(1, 5):
                await run.step(*fed(step))
            swarm.kill(swarm["c"].peer_id)
            step5 = asyncio.ensure_future(run.step(*fed(5)))
            status = await said(session, network, "waiting")
            assert "the swarm is too small" in status.detail
            await asyncio.sleep(30)
            assert not step5.done()
            swarm.add("d", lent_bytes=LENT_BYTES)
            assert (await step5).step == 5
            for step in range(6, STEPS + 1):
                await run.step(*fed(step))
            done = await run.finish()
            assert done.step == STEPS
            status = await session.status(network)
            assert (status.state, status.detail) == ("ready", "")
            again = await train(session, network, STEPS + 1, first=STEPS + 1)
            assert again.digest == plain(STEPS + 1)[0]

    play(main())


async def said(
    session: MemorySession, network: NetworkInfo, state: str, *, epoch: int = 0
) -> orchestrator_pb2.StatusReply:
    """The status, once it says so."""
    async with asyncio.timeout(120):
        while True:
            status = await session.status(network)
            if status.state == state and status.epoch >= epoch:
                return status
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("lost", ["requests", "answers"])
def test_without_a_majority_of_keepers_steps_go_on_and_count_later(
    tmp_path: Path, lost: str
) -> None:
    """Where only answers are lost a commit is decided: the one after it has to meet it."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            hooks = swarm.before if lost == "requests" else swarm.after

            def lose(letter: Letter) -> None:
                if letter.method == "Keeper/Accept" and letter.to != swarm["a"].peer_id:
                    raise UnreachableError("lost")

            hooks.append(lose)
            running = asyncio.ensure_future(train(session, network, STEPS))
            status = await said(session, network, "uncommitted")
            assert "steps after 0 would be lost with a host" in status.detail
            assert "2 of 3 keepers" in status.detail
            await swarm.until(lambda: decided_by(swarm) == STEPS)  # nobody waits for the log
            assert (await session.status(network)).committed_step == 0
            assert not running.done()  # but the end does
            hooks.remove(lose)
            trained = await running
            await check_trained(swarm, network, trained)
            assert trained.recoveries == []
            assert (await session.status(network)).state == "ready"
            assert [e["step"] for e in swarm.emitted("uncommitted")] == [0]

    play(main())


def decided_by(swarm: MemorySwarm) -> int:
    return max((fields["step"] for fields in swarm.emitted("decided")), default=0)


def test_what_is_uncommitted_is_rolled_back_with_a_host(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            hosts = {it.host for it in (await session.status(network)).locations}

            def lose(letter: Letter) -> None:
                if letter.method in ("Keeper/Accept", "Keeper/Prepare"):
                    raise UnreachableError("lost")

            run = TrainingRun(session, network)
            for step in range(1, 5):
                await run.step(*fed(step))
            await swarm.until(lambda: [e["step"] for e in swarm.emitted("committed")] == [3])
            swarm.before.append(lose)
            for step in range(5, 8):
                await run.step(*fed(step))
            await said(session, network, "uncommitted")
            swarm.kill(max(hosts - {swarm["a"].peer_id}))
            status = await said(session, network, "waiting")
            assert status.committed_step == 3
            swarm.before.remove(lose)
            step8 = await run.step(*fed(8))
            assert step8.step == 8
            done = await run.finish()
            assert (await train(session, network, 9, first=9)).digest == plain(9)[0]
            assert done.step == STEPS

    play(main())


def test_without_a_majority_of_keepers_nothing_is_submitted(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:

            def lose(letter: Letter) -> None:
                if letter.method.startswith("Keeper/") and letter.to != swarm["a"].peer_id:
                    raise UnreachableError("lost")

            swarm.before.append(lose)
            session = MemorySession(swarm)
            with pytest.raises(UsageError, match="log cannot be reached"):
                await submit(session, swarm["a"].peer_id)
            swarm.before.remove(lose)
            network = await submit(session, swarm["a"].peer_id)
            assert (await train(session, network, 3)).digest == plain(3)[0]

    play(main())


# Hosts that say no, and hosts that go


def test_a_host_that_has_no_memory_after_all_is_not_insisted_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            boaster = swarm.add("d", lent_bytes=1, says_bytes=1 << 34).peer_id
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            asked = [it for it in swarm.letters if it.method == "PNode/Allocate"]
            assert boaster in [it.to for it in asked]
            status = await session.status(network)
            assert boaster not in [location.host for location in status.locations]
            assert (await train(session, network, 3)).digest == plain(3)[0]

    play(main())


@pytest.mark.parametrize("feeding", [True, False])
def test_a_host_that_leaves_hands_its_vnodes_over(tmp_path: Path, feeding: bool) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            for step in range(1, 6):
                await run.step(*fed(step))
            if not feeding:
                await run.finish()
            status = await session.status(network)
            going = status.locations[0].host
            if going == swarm["a"].peer_id:
                going = next(it.host for it in status.locations if it.host != going)
            moved = [it.vnode for it in status.locations if it.host == going]
            await leave(swarm, going)
            status = await session.status(network)
            assert going not in [location.host for location in status.locations]
            assert sorted(it.vnode for it in status.relocations) == sorted(moved)
            assert {it.from_host for it in status.relocations} == {going}
            assert "is leaving" in status.relocations[0].reason
            swarm.kill(going)
            if feeding:
                for step in range(6, STEPS + 1):
                    await run.step(*fed(step))
                done = await run.finish()
                assert done.step == STEPS
                trained = await train(session, network, STEPS + 1, first=STEPS + 1)
                assert trained.digest == plain(STEPS + 1)[0]
            else:
                trained = await train(session, network, STEPS, first=6)
                assert trained.digest == plain(STEPS)[0]
                assert trained.recoveries == []

    play(main())


async def leave(swarm: MemorySwarm, peer_id: str) -> None:
    await swarm.ask(
        "a",
        "Orchestrator/Leaving",
        orchestrator_pb2.LeavingRequest(),
        orchestrator_pb2.LeavingReply,
        by=swarm.nodes[peer_id].name,
    )


def test_a_relocation_is_on_record_and_the_former_host_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            before = {it.vnode: it.host for it in (await session.status(network)).locations}
            slow = next(host for host in before.values() if host != swarm["a"].peer_id)
            await train(session, network, 4)
            swarm.freeze(slow, noticed=True)
            status = await said(session, network, "ready", epoch=2)
            moved = {it.vnode: it for it in status.relocations}
            assert sorted(moved) == sorted(v for v, host in before.items() if host == slow)
            after = {it.vnode: it.host for it in status.locations}
            for vnode, relocation in moved.items():
                assert relocation.from_host == slow
                assert relocation.to_host == after[vnode] != slow
                assert relocation.epoch == 2
                assert 0 < relocation.seconds < 10
                assert "misses heartbeats" in relocation.reason or "failed" in relocation.reason
            assert swarm.nodes[slow].host.usage.vnodes > 0
            swarm.thaw(slow)
            await swarm.until(lambda: swarm.nodes[slow].host.usage.vnodes == 0)
            trained = await train(session, network, STEPS, first=5)
            assert trained.digest == plain(STEPS)[0]

    play(main())


# What others may not do


def test_a_report_by_who_does_not_host_the_vnode_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            await run.start()
            status = await session.status(network)
            hosts = {it.vnode: it.host for it in status.locations}
            for vnode in hosts:
                for node in swarm.nodes.values():
                    if node.peer_id == hosts[vnode]:
                        continue
                    reply = await swarm.ask(
                        "a",
                        "Orchestrator/Report",
                        held(network, vnode, epoch=1, step=1),
                        orchestrator_pb2.ReportReply,
                        by=node.name,
                    )
                    assert reply.refusal.code == common_pb2.REFUSAL_CODE_STALE_EPOCH
                    assert reply.refusal.epoch == 1
            for vnode, host in hosts.items():  # and what hosts say of other epochs changes nothing
                for epoch in (0, 2):
                    await swarm.ask(
                        "a",
                        "Orchestrator/Report",
                        held(network, vnode, epoch=epoch, step=1),
                        orchestrator_pb2.ReportReply,
                        by=swarm.nodes[host].name,
                    )
                    trouble = held(network, vnode, epoch=epoch, step=1)
                    trouble.trouble.reason = "it was long ago"
                    await swarm.ask(
                        "a",
                        "Orchestrator/Report",
                        trouble,
                        orchestrator_pb2.ReportReply,
                        by=swarm.nodes[host].name,
                    )
            await asyncio.sleep(5)
            status = await session.status(network)
            assert (status.steps_decided, status.epoch, status.state) == (0, 1, "training")
            await run.close()

    play(main())


def held(network: NetworkInfo, vnode: str, *, epoch: int, step: int) -> Any:
    return orchestrator_pb2.ReportRequest(
        id=vnode_pb2.StepId(network_id=network.network_id, epoch=epoch, step=step),
        vnode=vnode,
        held=orchestrator_pb2.Held(loss=1.0, samples=4),
    )


def test_what_is_asked_of_a_network_that_is_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            pb = orchestrator_pb2
            calls: tuple[tuple[str, Any, Any], ...] = (
                ("Status", pb.StatusRequest(network_id="f" * 32), pb.StatusReply),
                ("Resolve", pb.ResolveRequest(network_id="f" * 32), pb.ResolveReply),
                ("Commit", pb.CommitRequest(network_id="f" * 32), pb.CommitReply),
                ("Report", pb.ReportRequest(vnode="fc1"), pb.ReportReply),
            )
            for method, request, reply_type in calls:
                reply = await swarm.ask("a", f"Orchestrator/{method}", request, reply_type)
                assert reply.refusal.code == common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK
            network = NetworkInfo("f" * 32, "small", swarm["a"].peer_id, (), 1, "")
            with pytest.raises(UnreachableError, match="does not orchestrate"):
                await TrainingRun(MemorySession(swarm), network).start()

    play(main())


@pytest.mark.parametrize("wrong", ["graph", "grant", "signature"])
def test_a_submission_that_does_not_hold_is_refused(tmp_path: Path, wrong: str) -> None:
    graph, owner = small_graph(), keypair_of("owner")
    body = records_pb2.Manifest(
        owner=owner.public_key,
        name=graph.name,
        spec_digest=graph.digest,
        any_orchestrator=wrong != "grant",
        orchestrators=[keypair_of("b").peer_id],
    ).SerializeToString(deterministic=True)
    manifest = owner.sign(MANIFEST, body)
    if wrong == "signature":
        manifest.signature = bytes(64)
    other = small_graph(seed=1) if wrong == "graph" else graph

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            request = orchestrator_pb2.SubmitRequest(manifest=manifest, graph=other.to_json())
            reply = await swarm.ask(
                "a", "Orchestrator/Submit", request, orchestrator_pb2.SubmitReply
            )
            expected = {"graph": "BAD_REQUEST", "grant": "NOT_GRANTED", "signature": "FAILED"}
            code = common_pb2.RefusalCode.Value(f"REFUSAL_CODE_{expected[wrong]}")
            assert reply.refusal.code == code
            assert not [it for it in swarm.letters if it.method == "PNode/Allocate"]

    play(main())


def test_a_network_submitted_twice_is_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            await submit(session, swarm["a"].peer_id)
            request = next(it.request for it in swarm.letters if it.method == "Orchestrator/Submit")
            asked = len([it for it in swarm.letters if it.method == "PNode/Allocate"])
            reply = await swarm.ask(
                "a", "Orchestrator/Submit", request, orchestrator_pb2.SubmitReply
            )
            assert reply.epoch == 1
            assert len(reply.locations) == 6
            assert len([it for it in swarm.letters if it.method == "PNode/Allocate"]) == asked
            with pytest.raises(UsageError, match="is here already"):
                await submit(session, swarm["a"].peer_id)

    play(main())


def test_a_second_orchestrator_is_told_whose_the_network_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            request = next(it.request for it in swarm.letters if it.method == "Orchestrator/Submit")
            reply = await swarm.ask(
                "b", "Orchestrator/Submit", request, orchestrator_pb2.SubmitReply
            )
            assert "has taken the network" in reply.refusal.detail
            trained = await train(session, network, STEPS)
            await check_trained(swarm, network, trained)
            assert trained.recoveries == []

    play(main())


def test_an_orchestrator_that_has_lost_its_claim_commits_nothing_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            await run.step(*fed(1))
            history = await swarm.log_of(network.network_id)
            assert history.manifest is not None
            log = open_log(swarm["b"], network.network_id, history.manifest)
            claim = new_claim(
                history,
                swarm["b"].keypair,
                history.manifest,
                placement=history.placement,
                keepers=history.keepers,
                reason="I want it",
            )
            assert await log.append(history, claim) == claim
            await log.close()  # and does nothing more with it
            for step in range(2, STEPS + 1):
                await run.step(*fed(step))
            await run.finish()
            reasons = [fields["reason"] for fields in swarm.emitted("over")]
            assert any("has taken the network" in reason for reason in reasons)
            history = await swarm.log_of(network.network_id)
            assert claims_of(history) == [1, 2, 3]  # b's, who does not stand by it; then an heir's
            commits = [parse_entry(it).commit for it in history.entries]
            assert {it.epoch for it in commits if it.states} == {3}
            trained = await train(session, network, STEPS + 1, first=STEPS + 1)
            assert trained.digest == plain(STEPS + 1)[0]

    play(main())


# Cuts


def test_a_cut_is_made_when_somebody_wants_the_weights(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            states = await session.cut(network)
            assert sorted(states) == ["act", "fc1", "fc2", "loss", "out", "skip"]
            assert commits_of(await swarm.log_of(network.network_id)) == [0]
            assert dict(await session.cut(network)) == dict(states)
            run = TrainingRun(session, network)
            for step in range(1, 3):
                await run.step(*fed(step))
            await run.close()  # without finish: what was decided is committed all the same
            await said(session, network, "ready")
            assert dict(await session.cut(network)) != dict(states)
            assert commits_of(await swarm.log_of(network.network_id)) == [0, 2]

    play(main())


def test_with_a_state_directory_log_and_states_are_there_and_nowhere_else(tmp_path: Path) -> None:
    shared = tmp_path / "shared"

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd", state_url=f"file://{shared}") as swarm:
            killed = kill_once(swarm, swarm.before, save, "to")
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            network = await session.find(network.network_id)  # it says where the states are
            trained = await train(session, network, STEPS)
            assert len(killed) == 1
            assert trained.digest == plain(STEPS)[0]
            assert not [it for it in swarm.letters if it.method.startswith(("Keeper/", "Blob/Put"))]
            history = History(network.network_id)
            for entry in DirectoryLog(shared / "log").read(network.network_id):
                assert history.add(entry) == ""
            commits = commits_of(history)
            assert commits == sorted(set(commits))
            assert commits[-1] == STEPS
            assert all((shared / ref.digest.hex()).exists() for ref in trained.done.states.values())

    play(main())


def test_what_reaches_the_orchestrator_does_not_grow_with_the_batch(tmp_path: Path) -> None:
    async def bytes_a_step(directory: Path, samples: int) -> tuple[float, int]:
        async with MemorySwarm(directory, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            await train(session, network, 6, samples=samples)
            status = await session.status(network)
            sent = [
                len(it.request.SerializeToString())
                for it in swarm.letters
                if it.method == "Orchestrator/Report"
            ]
            assert status.steps_decided == 6
            assert status.step_bytes == sum(sent)
            return status.step_bytes / status.steps_decided, sum(
                len(it.payload or b"") for it in swarm.letters if it.method == "VNode/Train"
            )

    small, small_hops = play(bytes_a_step(tmp_path / "small", 4))
    large, large_hops = play(bytes_a_step(tmp_path / "large", 256))
    assert large_hops > 10 * small_hops
    assert large <= small + 8  # a number of samples takes a byte more
    assert small < 6 * 200
