"""Outputs wait for who asked for them: once, for a while, within bounds."""

from __future__ import annotations

import asyncio
import gc
import weakref

import numpy as np
import pytest
from virtual_time import play

from p2pnet.errors import MalformedError, ResourceError
from p2pnet.vnode import outputs
from p2pnet.vnode.outputs import Outputs
from p2pnet.vnode.tensors import Array


def ones(count: int = 4) -> Array:
    return np.ones(count, np.float32)


def test_whoever_comes_first_waits_for_the_other() -> None:
    async def main() -> None:
        table = Outputs()
        table.settle("late", ones())
        assert (await table.wait("late", 1)).sum() == 4
        waiting = asyncio.ensure_future(table.wait("early", 5))
        await asyncio.sleep(1)
        table.settle("early", ones(3))
        assert (await waiting).sum() == 3

    play(main())


def test_an_output_is_given_out_once_and_then_gone() -> None:
    async def main() -> None:
        table = Outputs()
        output = ones(10_000)
        gone = weakref.ref(output)
        table.settle("id", output)
        del output
        await table.wait("id", 1)
        gc.collect()
        assert gone() is None, "what was given out is still held"
        with pytest.raises(TimeoutError):
            await table.wait("id", 1)

    play(main())


def test_the_first_word_counts() -> None:
    async def main() -> None:
        table = Outputs()
        table.fail("id", MalformedError("never"))
        table.settle("id", ones())
        with pytest.raises(MalformedError, match="never"):
            await table.wait("id", 1)

    play(main())


def test_bytes_and_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "BYTES_MAX", 100)

    async def main() -> None:
        table = Outputs()
        waiting = asyncio.ensure_future(table.wait("waited for", 300))
        await asyncio.sleep(0)
        for number in range(4):
            table.settle(number, ones(10))  # 40 bytes each
        with pytest.raises(ResourceError, match="no room"):
            await waiting
        with pytest.raises(TimeoutError):
            await table.wait(0, 1)
        assert len(await table.wait(3, 1)) == 10
        await asyncio.sleep(outputs.KEPT_S + 1)
        with pytest.raises(TimeoutError):
            await table.wait(2, 1)

    play(main())
