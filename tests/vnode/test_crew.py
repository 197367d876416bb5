"""The VNodes of a network on a host: what goes wrong there or around it, and what they tell."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hosting import ORDER, allocate, feed, network_of, place, training_input
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import Letter
from small_network import batch, plain, small_graph, submit, train
from virtual_time import play

from p2pnet.errors import ResourceError
from p2pnet.v1 import common_pb2, orchestrator_pb2, pnode_pb2, vnode_pb2
from p2pnet.vnode import edges
from p2pnet.vnode.draft import BATCH_MAX
from p2pnet.vnode.hosted import Hosted
from p2pnet.vnode.messages import Decided, Trouble
from p2pnet.vnode.network import REASON_CHARS_MAX
from p2pnet.vnode.step import StepCore

GRAPH = small_graph()
NETWORK = network_of(GRAPH)
HERE = dict.fromkeys(ORDER, "a")
APART = HERE | {"act": "c", "out": "c"}  # stages fc1; act, fc2, skip; out, loss of a and c in turn


def reports(swarm: MemorySwarm) -> list[Any]:
    return [it.request for it in swarm.letters if it.method == "Orchestrator/Report"]


def test_each_host_reports_once_and_the_loss_says_how_it_went(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            await place(swarm, GRAPH, APART, by="b")
            await feed(swarm, GRAPH, APART, batch(1))
            await swarm.until(lambda: len(reports(swarm)) >= 2)
            await asyncio.sleep(5)
            told = {tuple(it.vnodes): it.held for it in reports(swarm)}
            assert sorted(told) == [("act", "out"), ("fc1", "fc2", "skip", "loss")]
            assert len(reports(swarm)) == 2
            assert all(it.id.step == 1 and it.HasField("held") for it in reports(swarm))
            loss = told["fc1", "fc2", "skip", "loss"]
            assert loss.loss == pytest.approx(plain(1)[1][0])
            assert loss.samples == 4
            assert told["act", "out"].samples == 0

    play(main(), limit_s=100)


def test_a_component_that_fails_by_itself_says_so_and_waits_for_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Hosted, *args: Any) -> Any:
        raise RuntimeError("the adder caught fire")

    monkeypatch.setattr(Hosted, "do_backward", broken)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, HERE, by="b")
            await feed(swarm, GRAPH, HERE, batch(1))
            await swarm.until(lambda: reports(swarm))
            [told] = reports(swarm)
            assert told.vnode == "fc1"  # the first of the stage
            assert told.trouble.reason == "RuntimeError: the adder caught fire"
            assert not told.trouble.bad_input
            assert told.trouble.host == ""
            request = training_input(GRAPH, "loss", "y", batch(2)[1], step=1)
            reply, _ = await swarm.ask_hop("a", *request)
            assert reply.refusal.code == common_pb2.REFUSAL_CODE_FAILED
            assert "the adder caught fire" in reply.refusal.detail
            described = await swarm.ask(
                "a", "PNode/Describe", pnode_pb2.DescribeRequest(), pnode_pb2.DescribeReply
            )
            assert {it.vnode: it.error for it in described.vnodes if it.error} == {
                "fc1": "RuntimeError: the adder caught fire"
            }
            # a new epoch begins it anew
            monkeypatch.undo()
            await place(swarm, GRAPH, HERE, by="b", epoch=2)
            await feed(swarm, GRAPH, HERE, batch(1), epoch=2)
            await swarm.until(lambda: len(reports(swarm)) == 2)

    play(main(), limit_s=100)


def test_a_host_whose_vnode_fails_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole swarm: the failing host is let alone for a while, and no bit changes."""
    real = Hosted.do_backward
    failed: list[str] = []

    def once(self: Hosted, stage: int, step: int, *args: Any) -> Any:
        if "fc2" in self.stages[stage].nodes and step == 5 and not failed:
            failed.append("fc2")
            raise ResourceError("not enough memory for fc2")
        return real(self, stage, step, *args)

    monkeypatch.setattr(Hosted, "do_backward", once)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            before = {it.vnode: it.host for it in (await session.status(network)).locations}
            trained = await train(session, network, 8)
            assert trained.digest == plain(8)[0]
            [recovery] = trained.recoveries
            assert recovery.endswith(": not enough memory for fc2")
            after = {it.vnode: it.host for it in (await session.status(network)).locations}
            assert before["fc2"] not in after.values()

    play(main())


def test_who_cannot_be_reached_is_named_to_the_orchestrator(tmp_path: Path) -> None:
    hosts = HERE | {"act": "c"}

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            await place(swarm, GRAPH, hosts, by="b")
            swarm.kill(swarm["c"].peer_id)
            await feed(swarm, GRAPH, hosts, batch(1))
            await swarm.until(lambda: reports(swarm))
            [told] = reports(swarm)
            assert told.vnode == "fc1"
            assert told.trouble.host == swarm["c"].peer_id
            assert told.trouble.reason.startswith("act: ")

    play(main(), limit_s=100)


def test_an_orchestrator_that_does_not_hear_is_no_reason_to_stop(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, HERE, by="b")
            swarm.kill(swarm["b"].peer_id)
            await feed(swarm, GRAPH, HERE, batch(1))
            await asyncio.sleep(10)
            await feed(swarm, GRAPH, HERE, batch(2), step=2)  # says that step 1 is decided
            await asyncio.sleep(10)
            described = await swarm.ask(
                "a", "PNode/Describe", pnode_pb2.DescribeRequest(), pnode_pb2.DescribeReply
            )
            assert {it.step for it in described.vnodes} == {1}
            assert not any(it.error for it in described.vnodes)

    play(main(), limit_s=100)


def test_a_batch_too_far_ahead_is_to_be_sent_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await allocate(swarm, "a", GRAPH)
            request = training_input(GRAPH, "fc1", "x", batch(9)[0], step=9, decided_step=0)
            reply, _ = await swarm.ask_hop("a", *request)
            assert reply.refusal.code == common_pb2.REFUSAL_CODE_BUSY
            twice = training_input(GRAPH, "fc1", "x", batch(1)[0])
            for _ in range(2):
                reply, _ = await swarm.ask_hop("a", *twice)
                assert not reply.HasField("refusal")
            other = training_input(GRAPH, "fc1", "x", batch(2)[0])
            reply, _ = await swarm.ask_hop("a", *other)
            assert reply.refusal.code == common_pb2.REFUSAL_CODE_BAD_REQUEST
            assert "another tensor" in reply.refusal.detail

    play(main())


def test_two_saves_at_once_get_the_same_state(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, HERE, by="b")
            await feed(swarm, GRAPH, HERE, batch(1))
            await swarm.until(lambda: len(reports(swarm)) == 1)
            request = vnode_pb2.SaveRequest(network_id=NETWORK, epoch=1, step=1, vnodes=ORDER)
            one, two = await asyncio.gather(
                *(swarm.ask("a", "VNode/Save", request, vnode_pb2.SaveReply, by="b") for _ in "ab")
            )
            assert not one.HasField("refusal"), one.refusal
            assert dict(one.states) == dict(two.states)

    play(main(), limit_s=100)


def test_a_message_of_a_closed_epoch_reaches_nobody(tmp_path: Path) -> None:
    """What a VNode still computes for an older epoch is neither sent nor reported."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, HERE, by="b")
            late = asyncio.ensure_future(feed(swarm, GRAPH, HERE, batch(1)))
            await swarm.until(lambda: reports(swarm))
            await place(swarm, GRAPH, HERE, by="b", epoch=2)
            count = len(reports(swarm))
            await asyncio.gather(late, return_exceptions=True)
            await asyncio.sleep(20)
            assert len(reports(swarm)) == count

    play(main(), limit_s=100)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tensor_digest": b"1" * 32}, "not the one that its digest names"),
        ({"direction": vnode_pb2.DIRECTION_UNSPECIFIED}, "forward or backward"),
        (
            {"tensor": common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=[4, 6])},
            "has the codec 0",
        ),
    ],
)
def test_what_is_no_training_message(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await allocate(swarm, "a", GRAPH)
            request = training_input(GRAPH, "fc1", "x", np.zeros((4, 6), np.float32), **changes)
            reply, _ = await swarm.ask_hop("a", *request)
            assert reply.refusal.code == common_pb2.REFUSAL_CODE_BAD_REQUEST
            assert why in reply.refusal.detail

    play(main())


Message = tuple[vnode_pb2.TrainRequest, Any]


def said(**changes: Any) -> Message:
    return training_input(GRAPH, "fc1", "x", batch(1)[0], **changes)


def saying(array: Any, **changes: Any) -> Message:
    return training_input(GRAPH, "fc1", "x", array, **changes)


REFUSED_BY_HEAD = {
    "too many samples": saying(np.zeros((BATCH_MAX + 1, 6), np.float32)),
    "other samples": saying(np.zeros((4, 7), np.float32)),
    "another dtype": saying(np.zeros((4, 6), np.float64)),
    "another place": said(slot=1),
    "another direction": said(direction=vnode_pb2.DIRECTION_BACKWARD),
    "a micro-batch too many": said(
        id=vnode_pb2.StepId(network_id=NETWORK, epoch=1, step=1, micro_batch=1)
    ),
    "a step too far ahead": said(step=9, decided_step=0),
    "decided too early": said(decided_step=1),
    "another tensor than before": said(tensor_digest=b"1" * 32),
}
CODES = {"a step too far ahead": "BUSY", "too many samples": "TOO_LARGE"}


@pytest.mark.parametrize("what", REFUSED_BY_HEAD)
def test_what_is_wrong_already_by_its_head_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def decode(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("decoded")

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            await allocate(swarm, "a", GRAPH)

            async def give(message: Message) -> common_pb2.Refusal:
                return (await swarm.ask_hop("a", *message))[0].refusal

            if what == "another tensor than before":
                assert (await give(said())).code == 0
            monkeypatch.setattr(edges, "decode", decode)
            refused = await give(REFUSED_BY_HEAD[what])
            code = CODES.get(what, "BAD_REQUEST")
            assert refused.code == common_pb2.RefusalCode.Value(f"REFUSAL_CODE_{code}")
            if what == "too many samples":
                assert refused.detail == (
                    "fc1 takes batches of at most 1024 samples (24576 bytes of x), and this one "
                    "has 1025 (24600 bytes)"
                )

    play(main())


def test_what_comes_again_or_late_is_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    real = edges.decode

    def counted(tensor: common_pb2.Tensor, payload: Any, *, bytes_max: int) -> Any:
        decoded.append(bytes_max)
        return real(tensor, payload, bytes_max=bytes_max)

    monkeypatch.setattr(edges, "decode", counted)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, HERE, by="b")
            for _ in range(3):
                await feed(swarm, GRAPH, HERE, batch(1))
            await swarm.until(lambda: len(reports(swarm)) == 1)
            await feed(swarm, GRAPH, HERE, batch(2), step=2)
            await asyncio.sleep(5)
            await feed(swarm, GRAPH, HERE, batch(1))
            # "x" goes to two VNodes and "y" to one, in two steps
            assert sorted(decoded) == sorted([BATCH_MAX * 24] * 4 + [BATCH_MAX * 8] * 2)

    play(main(), limit_s=100)


def test_the_largest_batch_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, HERE, by="b")
            await feed(swarm, GRAPH, HERE, batch(1, BATCH_MAX))
            await swarm.until(lambda: len(reports(swarm)) == 1)
            [told] = reports(swarm)
            assert told.held.samples == BATCH_MAX

    play(main(), limit_s=100)


@pytest.mark.parametrize("how", ["a new epoch", "dropped"])
def test_a_save_ends_with_its_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, HERE, by="b")
            await feed(swarm, GRAPH, HERE, batch(1))
            await swarm.until(lambda: len(reports(swarm)) == 1)
            compute, asked = swarm["a"].host._compute, asyncio.Event()
            real = compute.run

            async def run(fn: Any, *args: Any) -> Any:
                if fn.__name__ == "do_save":
                    asked.set()
                    await asyncio.sleep(1000)
                return await real(fn, *args)

            monkeypatch.setattr(compute, "run", run)
            request = vnode_pb2.SaveRequest(network_id=NETWORK, epoch=1, step=1, vnodes=["fc1"])
            saving = [
                asyncio.ensure_future(
                    swarm.ask("a", "VNode/Save", request, vnode_pb2.SaveReply, by="b")
                )
                for _ in range(2)
            ]
            await asked.wait()
            began = swarm.loop.time()
            if how == "dropped":
                drop = pnode_pb2.DropRequest(network_id=NETWORK, epoch=1)
                await swarm.ask("a", "PNode/Drop", drop, pnode_pb2.DropReply, by="b")
            else:
                await place(swarm, GRAPH, HERE, by="b", epoch=2)
            for reply in await asyncio.gather(*saving):
                assert reply.refusal.code == common_pb2.REFUSAL_CODE_STALE_EPOCH
                assert "epoch 1 of small is over" in reply.refusal.detail
            assert swarm.loop.time() < began + 1

    play(main(), limit_s=100)


def test_any_number_of_effects_is_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a host with thousands of VNodes."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, HERE, by="b")
            crew = swarm["a"].host._hosted._present[NETWORK].crew
            many = [Trouble(1, 0, f"number {i}", False) for i in range(3000)]
            with monkeypatch.context() as patched:
                patched.setattr(StepCore, "handle", lambda core, event, now: many)
                assert crew.take(Decided(1, 0)) is None
            await swarm.until(lambda: len(reports(swarm)) == len(many))

    play(main(), limit_s=100)


def test_what_went_wrong_is_told_in_few_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Hosted, *args: Any) -> Any:
        raise ResourceError("not enough " * 100_000)

    monkeypatch.setattr(Hosted, "do_backward", broken)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await place(swarm, GRAPH, HERE, by="b")
            await feed(swarm, GRAPH, HERE, batch(1))
            await swarm.until(lambda: reports(swarm))
            described = await swarm.ask(
                "a", "PNode/Describe", pnode_pb2.DescribeRequest(), pnode_pb2.DescribeReply
            )
            [error] = [it.error for it in described.vnodes if it.error]
            assert error == reports(swarm)[0].trouble.reason
            assert len(error) == REASON_CHARS_MAX

    play(main(), limit_s=100)


def test_a_report_that_was_lost_is_not_repeated_by_itself(tmp_path: Path) -> None:
    """The orchestrator notices; see its own tests."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            seen: list[Letter] = []

            def lose(letter: Letter) -> None:
                if letter.method == "Orchestrator/Report":
                    seen.append(letter)
                    raise ResourceError("lost")

            swarm.before.append(lose)
            await place(swarm, GRAPH, HERE, by="b")
            await feed(swarm, GRAPH, HERE, batch(1))
            await asyncio.sleep(30)
            assert len(seen) == 1
            assert all(isinstance(it.request, orchestrator_pb2.ReportRequest) for it in seen)

    play(main(), limit_s=100)
