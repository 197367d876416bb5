"""A shell: a network's outputs for many samples, chunk by chunk, as they come.

Chunks are under way several at a time and are given out in order. One that fails is tried
again while any of them come through; what cannot be had is said, and the rest goes on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from p2pnet.client.batches import fitted
from p2pnet.client.connection import Patience
from p2pnet.client.passes import Astray, Passes
from p2pnet.errors import NotFoundError, RefusedError, UnreachableError, UsageError
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array

CHUNK_SAMPLES = 256
CHUNKS_AT_ONCE = 4
GIVE_UP_S = 60.0  # without any chunk coming through
SPLITS_MAX = 64  # of refused chunks, to find the samples that are the matter


@dataclass(frozen=True, slots=True)
class Chunk:
    """Outputs of some samples; `first` is the first one's index."""

    first: int
    output: Array


@dataclass(frozen=True, slots=True)
class Missing:
    """Samples `first` to `last` whose output could not be had, and why; where, if known."""

    first: int
    last: int
    reason: str
    vnode: str
    host: str

    def __str__(self) -> str:
        if self.first == self.last:
            return f"sample {self.first} is missing: {self.reason}"
        return f"samples {self.first} to {self.last} are missing: {self.reason}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has come of all samples; the rows of those missing are NaN."""

    output: Array
    missing: tuple[Missing, ...]


async def infer(
    passes: Passes, inputs: Mapping[str, Array]
) -> AsyncGenerator[Chunk | Missing, None]:
    """The network's outputs for a batch of any size, samples first: in order, as they come.

    Raises:
        UsageError: inputs of a wrong shape or dtype, or the local node is gone.
    """
    graph = passes.graph
    arrays = _checked(graph, inputs)
    samples = len(next(iter(arrays.values())))
    step = min(CHUNK_SAMPLES, graph.batch_max)
    work = _Work(passes, arrays)
    todo = deque(range(0, samples, step))
    running: deque[asyncio.Task[list[Chunk | Missing]]] = deque()
    try:
        while todo or running:
            while todo and len(running) < CHUNKS_AT_ONCE:
                first = todo.popleft()
                running.append(asyncio.create_task(work.get(first, min(first + step, samples))))
            for item in await running[0]:
                yield item
            running.popleft()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def infer_all(passes: Passes, inputs: Mapping[str, Array]) -> Outcome:
    """The same at once: every row that could be had, and which could not. Raises as `infer`."""
    graph = passes.graph
    arrays = _checked(graph, inputs)
    spec = graph.tensor(graph.output)
    samples = len(next(iter(arrays.values())))
    outputs = np.full((samples, *spec.shape), np.nan, spec.dtype)
    missing = []
    async with aclosing(infer(passes, inputs)) as items:
        async for item in items:
            if isinstance(item, Missing):
                missing.append(item)
            else:
                outputs[item.first : item.first + len(item.output)] = item.output
    return Outcome(outputs, tuple(missing))


def _checked(graph: CompiledGraph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    arrays = {name: fitted(graph, name, array) for name, array in inputs.items()}
    for name in graph.inputs:
        if name not in arrays:
            raise NotFoundError(f"network {graph.name} also needs the input {name!r}")
    sizes = sorted({len(array) for array in arrays.values()})
    if len(sizes) != 1:
        raise UsageError(f"all inputs need as many samples, and these have {sizes}")
    return arrays


class _Work:
    """Chunks of one batch."""

    def __init__(self, passes: Passes, arrays: Mapping[str, Array]) -> None:
        self._passes = passes
        self._graph = passes.graph
        self._arrays = arrays
        self._splits = 0
        self._gone = 0  # chunks that were given up since one came through

    async def get(self, first: int, end: int) -> list[Chunk | Missing]:
        """The samples from `first` to before `end`."""
        part = {name: array[first:end] for name, array in self._arrays.items()}
        # Once one was waited for in vain, the others need not wait as long again.
        limit_s = 0.0 if self._gone else GIVE_UP_S
        patience = Patience(f"an answer of network {self._graph.name}", limit_s)
        while True:
            try:
                output = await self._passes.once(part)
            except RefusedError as error:
                return await self._find_bad(first, end, error)
            except Astray as error:
                try:
                    await patience.wait(error)
                except UnreachableError as in_vain:
                    self._gone += 1
                    return [Missing(first, end - 1, str(in_vain), error.vnode, error.host)]
            else:
                self._gone = 0
                return [Chunk(first, output)]

    async def _find_bad(self, first: int, end: int, error: RefusedError) -> list[Chunk | Missing]:
        """Halves what is refused: one bad sample shall not cost the others."""
        if end - first == 1 or self._splits >= SPLITS_MAX:
            return [Missing(first, end - 1, str(error), self._graph.output, error.host)]
        self._splits += 1
        middle = (first + end) // 2
        return _joined([*await self.get(first, middle), *await self.get(middle, end)])


def _joined(items: Sequence[Chunk | Missing]) -> list[Chunk | Missing]:
    """Neighbours that miss for the same reason are one."""
    joined: list[Chunk | Missing] = []
    for item in items:
        last = joined[-1] if joined else None
        if isinstance(item, Missing) and isinstance(last, Missing) and last.reason == item.reason:
            joined[-1] = Missing(last.first, item.last, item.reason, item.vnode, item.host)
        else:
            joined.append(item)
    return joined
