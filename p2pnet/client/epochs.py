"""An epoch of training: several batches on their way, results in order, and its figures."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from p2pnet.client.events import StepResult
from p2pnet.errors import UsageError
from p2pnet.vnode.graph import CompiledGraph

_CLASSIFIES = ("CrossEntropyLoss",)


@dataclass(frozen=True, slots=True)
class Given:
    """A batch that was handed in: how many samples, and what will come of it."""

    samples: int
    result: asyncio.Future[StepResult]


class Trains(Protocol):
    """What takes batches: `AsyncNetwork`."""

    async def give(self, x: Any, y: Any) -> Given:
        """Hands in a batch, and waits for there being room for it."""
        ...

    async def graph(self) -> CompiledGraph:
        """The network's."""
        ...


async def in_flight(
    network: Trains, batches: Iterable[tuple[Any, Any]] | AsyncIterable[tuple[Any, Any]]
) -> AsyncGenerator[tuple[int, StepResult], None]:
    """Hands in batches; gives the samples and the result of each, in order.

    One batch more than the network can use at a time is handed in, so that it never waits
    for the next. Where that goes wrong, the results of those before come first.
    """
    waiting: deque[Given] = deque()
    problem: Exception | None = None
    window = 1
    async with aclosing(_each(batches)) as coming:
        while problem is None:
            try:
                x, y = await anext(coming)
                waiting.append(await network.give(x, y))
                window = (await network.graph()).window
            except StopAsyncIteration:
                break
            except Exception as error:
                problem = error
            while len(waiting) > window:
                yield await _result(waiting)
    while waiting:
        yield await _result(waiting)
    if problem is not None:
        raise problem


async def _result(waiting: deque[Given]) -> tuple[int, StepResult]:
    first = waiting.popleft()
    return first.samples, await first.result


async def _each(
    batches: Iterable[tuple[Any, Any]] | AsyncIterable[tuple[Any, Any]],
) -> AsyncGenerator[tuple[Any, Any], None]:
    if isinstance(batches, AsyncIterable):
        async for batch in batches:
            yield batch
    else:
        for batch in batches:
            yield batch


class Epoch:
    """The figures of an epoch, from its steps' results; those that are lost are left out."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._began = time.monotonic()
        self._fed = 0
        self._answers = 0  # one a sample, or one a token of it
        self._loss = 0.0
        self._correct = 0

    def add(self, samples: int, result: StepResult) -> None:
        """A step of so many samples is decided."""
        self._fed += samples
        if result.known:
            self._loss += result.loss * result.samples
            self._correct += result.correct
            self._answers += result.samples

    def row(self, graph: CompiledGraph) -> dict[str, Any]:
        """epoch, loss (the mean), accuracy (None where nothing is classified), samples_per_s.

        Raises:
            UsageError: there was no step.
        """
        if not self._fed:
            raise UsageError("there is nothing to train on: no batches came")
        known = self._answers or math.nan
        return {
            "epoch": self._number,
            "loss": self._loss / known,
            "accuracy": self._correct / known if graph.loss.type in _CLASSIFIES else None,
            "samples_per_s": self._fed / (time.monotonic() - self._began),
        }
