"""Feeding: every edge gets its micro-batches in order, so many at a time, and hosts may be slow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from small_network import batch, small_graph
from virtual_time import play

from p2pnet.client import feeding as module
from p2pnet.client.batches import Content
from p2pnet.client.events import Batch, FeedFailed, FeedStep, TellDecided
from p2pnet.client.feeding import BUSY_S, HOLD_S, HOPS_MAX, Feeding
from p2pnet.client.session import NetworkInfo
from p2pnet.errors import LocalError, UnreachableError, UsageError
from p2pnet.v1 import common_pb2, vnode_pb2

INFO = NetworkInfo("0" * 32, "small", "o", (), 1, "")
WHERE = {"fc1": "host-a", "act": "host-a", "fc2": "host-a", "skip": "host-b", "loss": "host-c"}
BUSY = common_pb2.REFUSAL_CODE_BUSY

Answer = Callable[[str, Any], Awaitable[common_pb2.RefusalCode | None]]


class World:
    """Stands for the session: what hosts are sent, and what they say to it."""

    def __init__(self, answer: Answer | None = None, **settings: Any) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.payloads: list[bytes] = []
        self.under_way = 0
        self.most = 0
        self.failed: list[FeedFailed] = []
        self.errors: list[Exception] = []
        self._answer = answer
        graph = small_graph(**settings)
        self.feeding = Feeding(self, INFO, graph, self.failed.append, self.errors.append)  # type: ignore[arg-type]

    async def hop(
        self, host: str, request: Any, payload: Any, *, timeout_s: float
    ) -> tuple[vnode_pb2.HopReply, None]:
        self.sent.append((host, request))
        self.payloads.append(b"" if payload is None else bytes(payload))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0.01)
            code = await self._answer(host, request) if self._answer else None
        finally:
            self.under_way -= 1
        if code is None:
            return vnode_pb2.HopReply(), None
        name = common_pb2.RefusalCode.Name(code)
        refusal = common_pb2.Refusal(code=name, detail="no, because", epoch=9)
        return vnode_pb2.HopReply(refusal=refusal), None

    def trained(self) -> list[tuple[str, int, int, int]]:
        """Source, slot, step and micro-batch of what was sent, in order."""
        return [
            (r.source, r.slot, r.id.step, r.id.micro_batch)
            for _, r in self.sent
            if isinstance(r, vnode_pb2.TrainRequest)
        ]


def step(number: int, *, epoch: int = 1, samples: int = 7, **changes: Any) -> FeedStep:
    x, y = batch(number, samples)
    content = Content({"x": x}, y)
    usual = {"locations": WHERE, "decided_step": 0, "norms": ()}
    return FeedStep(epoch, number, Batch(content, 0), **{**usual, **changes})


def test_a_batch_goes_out_in_parts_to_all_that_read_it() -> None:
    async def main() -> None:
        world = World(micro_batches=3)
        world.feeding.feed(step(1, samples=8, decided_step=0, norms=(0.5, 2.0)))
        await asyncio.sleep(1)
        assert world.trained() == [
            edge
            for part in range(3)
            for edge in (("x", 0, 1, part), ("x", 1, 1, part), ("y", 1, 1, part))
        ]
        assert [host for host, _ in world.sent] == ["host-a", "host-b", "host-c"] * 3
        first = world.sent[0][1]
        assert (first.vnode, first.batch_samples, list(first.norms)) == ("fc1", 8, [0.5, 2.0])
        assert [list(r.tensor.shape) for _, r in world.sent[::3]] == [[3, 6], [3, 6], [2, 6]]
        x, _ = batch(1, 8)
        parts = [np.frombuffer(it, np.float32) for it in world.payloads[::3]]
        assert np.array_equal(np.concatenate(parts), x.reshape(-1))
        assert not world.failed
        await world.feeding.close()

    play(main())


def test_steps_follow_each_other_and_so_many_hops_are_under_way() -> None:
    async def main() -> None:
        world = World(micro_batches=7)
        for number in range(1, 7):
            world.feeding.feed(step(number, samples=14))
        await asyncio.sleep(5)
        edges: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for source, slot, number, part in world.trained():
            edges.setdefault((source, slot), []).append((number, part))
        assert len(edges) == 3
        assert all(order == sorted(order) for order in edges.values())
        assert world.most == HOPS_MAX
        await world.feeding.close()

    play(main())


def test_a_host_without_room_is_asked_again_and_complained_of_in_the_end() -> None:
    async def main() -> None:
        free = asyncio.get_running_loop().time() + 1

        async def answer(host: str, request: Any) -> common_pb2.RefusalCode | None:
            busy = host == "host-b" and asyncio.get_running_loop().time() < free
            return BUSY if busy or host == "host-c" else None

        world = World(answer)
        world.feeding.feed(step(1))
        await asyncio.sleep(BUSY_S - 1)
        assert not world.failed
        assert not [it for it in world.sent[-5:] if it[0] == "host-b"]
        await asyncio.sleep(3)
        (failed,) = world.failed
        assert (failed.epoch, failed.step, failed.host) == (1, 1, "host-c")
        assert failed.reason == "loss refuses a batch: no, because"
        assert failed.newer_epoch == 0
        await world.feeding.close()

    play(main())


def test_a_host_that_holds_everything_up_does_not_fill_the_memory() -> None:
    async def main() -> None:
        async def answer(host: str, request: Any) -> common_pb2.RefusalCode | None:
            await asyncio.sleep(3600)
            return None

        world = World(answer, micro_batches=64)
        world.feeding.feed(step(1, samples=64))
        await asyncio.sleep(60)
        assert world.most == len(world.sent) == HOPS_MAX
        await world.feeding.close()
        assert world.under_way == 0

    play(main())


@pytest.mark.parametrize("newer", ["an epoch", "a decision"])
def test_what_is_out_of_date_is_not_sent_any_more(newer: str) -> None:
    async def main() -> None:
        free = asyncio.Event()

        async def answer(host: str, request: Any) -> common_pb2.RefusalCode | None:
            await free.wait()
            return None

        world = World(answer)
        world.feeding.feed(step(1))
        await asyncio.sleep(1)
        assert world.under_way == 3
        out = step(1, epoch=2) if newer == "an epoch" else step(2, decided_step=1)
        world.feeding.feed(out)
        await asyncio.sleep(1)
        assert world.under_way == 3
        assert len(world.sent) == 6
        assert world.sent[-1][1].id.epoch == out.epoch
        assert not world.failed
        await world.feeding.close()

    play(main())


NEVER = {
    "a bad request": common_pb2.REFUSAL_CODE_BAD_REQUEST,
    "too large": common_pb2.REFUSAL_CODE_TOO_LARGE,
}


@pytest.mark.parametrize("what", NEVER)
def test_what_is_wrong_with_a_batch_ends_the_run(what: str) -> None:
    async def main() -> None:
        async def answer(host: str, request: Any) -> common_pb2.RefusalCode | None:
            return NEVER[what] if host == "host-b" else None

        world = World(answer)
        world.feeding.feed(step(1))
        await asyncio.sleep(1)
        (error,) = world.errors
        assert isinstance(error, UsageError)
        assert str(error) == "network small: no, because"
        assert not world.failed
        await world.feeding.close()

    play(main())


def test_who_cannot_be_reached_and_who_knows_a_newer_epoch() -> None:
    async def main() -> None:
        async def answer(host: str, request: Any) -> common_pb2.RefusalCode | None:
            if host == "host-a":
                raise UnreachableError("gone")
            if host == "host-b":
                return common_pb2.REFUSAL_CODE_STALE_EPOCH
            raise LocalError("the node is gone")

        world = World(answer)
        world.feeding.feed(step(1))
        await asyncio.sleep(1)
        assert [(it.host, it.reason, it.newer_epoch) for it in world.failed] == [
            ("host-a", "fc1 cannot be fed: gone", 0),
            ("host-b", "skip refuses a batch: no, because", 9),
        ]
        assert [type(it) for it in world.errors] == [LocalError]
        await world.feeding.close()

    play(main())


def test_a_decision_goes_to_every_host_once_and_the_newest_is_enough() -> None:
    async def main() -> None:
        world = World()
        for number in (1, 2, 3):
            world.feeding.tell(TellDecided(1, number, WHERE, (0.5,)))
            await asyncio.sleep(1.5 * HOLD_S)  # a hop takes longer
        await asyncio.sleep(1)
        told = sorted((request.step, host) for host, request in world.sent)
        assert told == [(n, h) for n in (1, 3) for h in ("host-a", "host-b", "host-c")]
        assert list(world.sent[0][1].norms) == [0.5]
        await world.feeding.close()

    play(main())


@pytest.mark.parametrize(
    ("decided_step", "epoch", "told"),
    [(7, 1, []), (8, 1, []), (6, 1, [7]), (6, 2, [])],
    ids=["the same", "a later one", "an earlier one", "another epoch"],
)
def test_a_decision_that_a_batch_carries_is_not_told(
    decided_step: int, epoch: int, told: list[int]
) -> None:
    async def main() -> None:
        world = World()
        world.feeding.tell(TellDecided(1, 7, dict.fromkeys(WHERE, "host-a"), ()))
        await asyncio.sleep(HOLD_S / 2)
        world.feeding.feed(step(9, epoch=epoch, decided_step=decided_step))
        await asyncio.sleep(1)
        alone = [it for _, it in world.sent if isinstance(it, vnode_pb2.DecidedRequest)]
        assert [it.step for it in alone] == told
        assert len(world.trained()) == 3
        await world.feeding.close()

    play(main())


def test_a_decision_that_no_batch_follows_is_told_soon() -> None:
    async def main() -> None:
        world = World()
        world.feeding.tell(TellDecided(1, 7, WHERE, ()))
        world.feeding.tell(TellDecided(1, 8, WHERE, ()))
        assert not world.sent
        await asyncio.sleep(1.5 * HOLD_S)
        assert [it.step for _, it in world.sent] == [8, 8, 8]
        await world.feeding.close()
        world.feeding.tell(TellDecided(1, 9, WHERE, ()))
        await world.feeding.close()
        await asyncio.sleep(1)
        assert len(world.sent) == 3

    play(main())


def test_a_decision_that_a_host_does_not_get_holds_up_the_next_step() -> None:
    async def main() -> None:
        async def answer(host: str, request: Any) -> common_pb2.RefusalCode | None:
            raise UnreachableError("gone")

        world = World(answer)
        world.feeding.tell(TellDecided(4, 7, {"fc1": "host-a", "skip": "host-a", "loss": "host-a"}))
        await asyncio.sleep(1)
        (failed,) = world.failed
        assert (failed.epoch, failed.step, failed.host) == (4, 8, "host-a")
        await world.feeding.close()

    play(main())


def test_a_large_batch_has_the_time_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOWEST_BYTES_PER_S", 24)  # one sample a second
    patience: list[float] = []

    async def main() -> None:
        world = World()
        hop = world.hop

        async def timed(host: str, request: Any, payload: Any, *, timeout_s: float) -> Any:
            patience.append(timeout_s)
            return await hop(host, request, payload, timeout_s=timeout_s)

        world.hop = timed  # type: ignore[method-assign]
        world.feeding.feed(step(1, samples=100))
        await asyncio.sleep(1)
        await world.feeding.close()

    play(main())
    assert max(patience) > module.HOP_TIMEOUT_S + 100
