"""What `train` makes of the steps' results, for programs with async and without."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from small_network import small_graph

from p2pnet.client.api import Client, Network
from p2pnet.client.epochs import Given
from p2pnet.client.events import StepResult
from p2pnet.client.network import AsyncNetwork
from p2pnet.errors import UsageError
from p2pnet.net.bridge import AsyncioThread
from p2pnet.vnode.graph import CompiledGraph


class Steps(AsyncNetwork):
    """A network whose steps have these results, each as soon as the next batch but one is in."""

    def __init__(self, *results: StepResult) -> None:
        self._results = list(results)
        self._given: list[Given] = []
        self.under_way = 0  # at most
        self.ended = ""

    async def graph(self) -> CompiledGraph:
        return small_graph()

    async def give(self, x: Any, y: Any) -> Given:
        if x is None:
            raise UsageError("there has to be an x")
        given = Given(len(x), asyncio.get_running_loop().create_future())
        self._given.append(given)
        self.under_way = max(self.under_way, sum(not it.result.done() for it in self._given))
        asyncio.get_running_loop().call_later(0.001 * len(self._given), self._decide)
        return given

    def _decide(self) -> None:
        first = next(it for it in self._given if not it.result.done())
        first.result.set_result(self._results.pop(0))

    async def finish(self) -> int:
        self.ended = "finished"
        return 0

    async def abandon(self) -> None:
        self.ended = "abandoned"


class InTests(Client):
    """A client that is connected to nothing."""

    def __init__(self, thread: AsyncioThread) -> None:
        self.thread = thread


LOST = StepResult(2, math.nan, 0, 0, known=False)
BATCH = ([0.0] * 4, [0] * 4)
FOUR = [StepResult(step, float(step), 1, 4) for step in range(1, 5)]

Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture(params=["async", "sync"])
def train(request: pytest.FixtureRequest) -> Iterator[Train]:
    """Trains a network of either kind."""
    if request.param == "async":
        yield lambda steps, *args, **kw: asyncio.run(steps.train(*args, **kw))
        return
    with AsyncioThread("a-test") as thread:
        yield lambda steps, *args, **kw: Network(InTests(thread), steps).train(*args, **kw)


def test_an_epochs_figures_are_means_over_its_samples(train: Train) -> None:
    network = Steps(StepResult(1, 1.0, 3, 4), StepResult(2, 4.0, 0, 2))
    seen: list[tuple[int, float]] = []
    rows: list[dict[str, Any]] = []
    (row,) = train(
        network, [BATCH, BATCH], on_step=lambda *it: seen.append(it), on_epoch=rows.append
    )
    assert row["loss"] == 2.0
    assert row["accuracy"] == 0.5
    assert seen == [(1, 1.0), (2, 4.0)]
    assert rows == [row]
    assert network.ended == "finished"


def test_a_result_that_is_lost_is_left_out(train: Train) -> None:
    network = Steps(StepResult(1, 1.0, 3, 4), LOST, StepResult(3, 3.0, 1, 4))
    (row,) = train(network, [BATCH] * 3)
    assert row["loss"] == 2.0
    assert row["accuracy"] == 0.5
    (row,) = train(Steps(LOST), [BATCH])
    assert math.isnan(row["loss"])
    assert math.isnan(row["accuracy"])
    assert row["samples_per_s"] > 0


def test_nothing_to_train_on(train: Train) -> None:
    network = Steps()
    with pytest.raises(UsageError, match="no batches came"):
        train(network, [])
    assert network.ended == "abandoned"


def test_as_many_batches_are_under_way_as_the_network_can_use_and_one(train: Train) -> None:
    network = Steps(*FOUR, *FOUR)
    train(network, lambda epoch: [BATCH] * 4, epochs=2)
    assert network.under_way == small_graph().window + 1 == 3


@pytest.mark.parametrize("where", ["in a batch", "in making one"])
def test_what_is_wrong_is_said_after_the_results_of_those_before(train: Train, where: str) -> None:
    def batches() -> Iterator[Any]:
        yield from [BATCH] * 3
        if where == "in making one":
            raise ValueError("the disk is on fire")
        yield None, None
        raise AssertionError("nobody wants this one")

    seen: list[int] = []
    network = Steps(*FOUR)
    problem = UsageError if where == "in a batch" else ValueError
    with pytest.raises(problem):
        train(network, batches(), on_step=lambda step, _: seen.append(step))
    assert seen == [1, 2, 3]
    assert network.ended == "abandoned"


def test_a_callback_that_raises_ends_the_training(train: Train) -> None:
    def stop(step: int, loss: float) -> None:
        if step == 2:
            raise KeyError("enough")

    network = Steps(*FOUR)
    with pytest.raises(KeyError, match="enough"):
        train(network, [BATCH] * 4, on_step=stop)
    assert network.ended == "abandoned"


def test_without_async_batches_and_callbacks_are_the_callers_own() -> None:
    here: list[int] = []

    def batches(epoch: int) -> Iterator[Any]:
        here.append(threading.get_ident())
        yield BATCH
        here.append(threading.get_ident())

    def told(*_: Any) -> None:
        here.append(threading.get_ident())

    with AsyncioThread("a-test") as thread:
        network = Network(InTests(thread), Steps(*FOUR))
        network.train(batches, on_step=told, on_epoch=told)
    assert here == [threading.get_ident()] * 4


def test_ctrl_c_ends_the_training_in_good_order() -> None:
    def batches() -> Iterator[Any]:
        yield BATCH
        raise KeyboardInterrupt

    steps = Steps(*FOUR)
    with AsyncioThread("a-test") as thread, pytest.raises(KeyboardInterrupt):
        Network(InTests(thread), steps).train(batches())
    assert steps.ended == "abandoned"


def test_with_async_batches_and_callbacks_may_wait() -> None:
    seen: list[int] = []

    async def batches() -> AsyncIterator[Any]:
        for _ in range(4):
            await asyncio.sleep(0)
            yield BATCH

    async def told(step: int, loss: float) -> None:
        await asyncio.sleep(0)
        seen.append(step)

    (row,) = asyncio.run(Steps(*FOUR).train(batches(), on_step=told))
    assert row["loss"] == 2.5
    assert seen == [1, 2, 3, 4]
