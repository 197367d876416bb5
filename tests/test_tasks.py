"""A set of background tasks: kept, ended, and never dead unheard."""

from __future__ import annotations

import asyncio
import logging

import pytest

from p2pnet.tasks import TaskSet


def test_what_a_task_dies_of_is_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[BaseException] = []

    async def fails() -> None:
        raise ValueError("no such thing")

    async def main() -> None:
        tasks = TaskSet("the tests", told.append)
        await asyncio.wait([tasks.spawn(fails())])
        await tasks.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert [str(error) for error in told] == ["no such thing"]
    assert "the tests: a task died" in caplog.text


def test_close_ends_what_is_under_way_and_waits_for_it() -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("cancelled")

    async def main() -> None:
        tasks = TaskSet("the tests", lambda error: ended.append("told"))
        task = tasks.spawn(waits())
        await asyncio.wait([task], timeout=0)  # lets it begin
        await tasks.close()
        assert task.cancelled()

    asyncio.run(main())
    assert ended == ["cancelled"]
