"""The bridge between trio and asyncio: results, errors, cancellation and shutdown, both ways."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio

from p2pnet.errors import CancelledByUs, ForgedError, LocalError, ResourceError
from p2pnet.net.bridge import AsyncioThread, Bridge, open_bridge

LONG_S = 20.0  # a deadline that only a bug meets


def on_bridge(test: Callable[[Bridge], Awaitable[None]], crossings_max: int = 4096) -> None:
    async def main() -> None:
        with trio.fail_after(LONG_S):
            async with open_bridge(crossings_max) as bridge:
                await test(bridge)

    trio.run(main)


async def add_on_trio(a: int, b: int) -> int:
    await trio.lowlevel.checkpoint()
    return a + b


async def add_on_asyncio(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


def test_a_call_from_trio_runs_on_the_other_thread() -> None:
    async def test(bridge: Bridge) -> None:
        async def where() -> str:
            return threading.current_thread().name

        assert await bridge.to_asyncio(add_on_asyncio, 1, 2, timeout_s=LONG_S) == 3
        assert await bridge.to_asyncio(where, timeout_s=LONG_S) == "p2pnet-grpc"

    on_bridge(test)


def test_a_call_there_and_back() -> None:
    async def test(bridge: Bridge) -> None:
        async def there() -> int:
            return 1 + await bridge.to_trio(add_on_trio, 1, 2, timeout_s=LONG_S)

        assert await bridge.to_asyncio(there, timeout_s=LONG_S) == 4

    on_bridge(test)


def test_errors_cross_both_ways() -> None:
    async def test(bridge: Bridge) -> None:
        async def refuse() -> None:
            raise ForgedError("from trio")

        async def there() -> None:
            await bridge.to_trio(refuse, timeout_s=LONG_S)

        with pytest.raises(ForgedError, match="from trio"):
            await bridge.to_asyncio(there, timeout_s=LONG_S)

    on_bridge(test)


def test_a_thousand_at_once() -> None:
    async def test(bridge: Bridge) -> None:
        async def there() -> list[int]:
            calls = (bridge.to_trio(add_on_trio, i, i, timeout_s=LONG_S) for i in range(1000))
            return await asyncio.gather(*calls)

        results = await bridge.to_asyncio(there, timeout_s=LONG_S)
        assert results == [2 * i for i in range(1000)]

    on_bridge(test)


def test_more_than_the_bound_are_refused() -> None:
    async def test(bridge: Bridge) -> None:
        release = trio.Event()

        async def there() -> None:
            first = asyncio.create_task(bridge.to_trio(release.wait, timeout_s=LONG_S))
            await asyncio.sleep(0)
            with pytest.raises(ResourceError, match="busy"):
                await bridge.to_trio(trio.sleep_forever, timeout_s=LONG_S)
            trio.from_thread.run_sync(release.set, trio_token=token)
            await first
            assert await bridge.to_trio(add_on_trio, 1, 1, timeout_s=LONG_S) == 2

        token = trio.lowlevel.current_trio_token()
        await bridge.to_asyncio(there, timeout_s=LONG_S)

    on_bridge(test, crossings_max=1)


def test_cancelling_the_asyncio_caller_cancels_the_trio_task() -> None:
    async def test(bridge: Bridge) -> None:
        started, cancelled = trio.Event(), trio.Event()

        async def hang() -> None:
            started.set()
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

        async def there() -> None:
            call = asyncio.create_task(bridge.to_trio(hang, timeout_s=LONG_S))
            await bridge.to_trio(started.wait, timeout_s=LONG_S)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        await bridge.to_asyncio(there, timeout_s=LONG_S)
        await cancelled.wait()

    on_bridge(test)


def test_cancelling_the_trio_caller_cancels_the_asyncio_task() -> None:
    async def test(bridge: Bridge) -> None:
        started, cancelled = trio.Event(), threading.Event()

        async def hang() -> None:
            try:  # the cancellation may come before the word from trio does
                await bridge.to_trio(set_started, timeout_s=LONG_S)
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async def set_started() -> None:
            started.set()

        async with trio.open_nursery() as nursery:

            async def call() -> None:
                await bridge.to_asyncio(hang, timeout_s=LONG_S)

            nursery.start_soon(call)
            await started.wait()
            nursery.cancel_scope.cancel()
        assert await trio.to_thread.run_sync(cancelled.wait, LONG_S)

    on_bridge(test)


def test_deadlines_both_ways() -> None:
    async def test(bridge: Bridge) -> None:
        stopped = threading.Event()

        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

        with pytest.raises(TimeoutError):
            await bridge.to_asyncio(hang, timeout_s=0.01)
        assert await trio.to_thread.run_sync(stopped.wait, LONG_S)

        async def there() -> None:
            with pytest.raises(TimeoutError):
                await bridge.to_trio(trio.sleep_forever, timeout_s=0.01)

        await bridge.to_asyncio(there, timeout_s=LONG_S)

    on_bridge(test)


def test_a_stalled_trio_side_does_not_hold_its_caller() -> None:
    async def test(bridge: Bridge) -> None:
        gave_up = threading.Event()

        async def there() -> None:
            with pytest.raises(TimeoutError):
                await bridge.to_trio(add_on_trio, 1, 2, timeout_s=0.01)
            gave_up.set()

        call = bridge.thread.submit(there)
        assert gave_up.wait(LONG_S)  # blocks trio's own thread
        await trio.to_thread.run_sync(call.result, LONG_S)

    on_bridge(test)


def test_closing_ends_what_is_under_way_in_both_directions() -> None:
    outcomes: dict[str, str] = {}

    async def note(name: str, call: Awaitable[object]) -> None:
        try:
            await call
        except Exception as error:
            outcomes[name] = type(error).__name__

    async def main() -> None:
        started = trio.Event()

        async def there() -> None:
            try:
                await note("to trio", bridge.to_trio(hang, timeout_s=LONG_S))
                await asyncio.Event().wait()
            finally:
                late = bridge.to_trio(add_on_trio, 1, 2, timeout_s=LONG_S)
                await note("to trio, later", late)

        async def hang() -> None:
            started.set()
            await trio.sleep_forever()

        with trio.fail_after(LONG_S):
            async with trio.open_nursery() as nursery, open_bridge() as bridge:
                call = bridge.to_asyncio(there, timeout_s=LONG_S)
                nursery.start_soon(note, "to asyncio", call)
                await started.wait()
            await note("to asyncio, later", bridge.to_asyncio(there, timeout_s=LONG_S))

    trio.run(main)
    assert outcomes == {
        "to trio": "CancelledByUs",
        "to trio, later": "CancelledByUs",
        "to asyncio": "CancelledByUs",
        "to asyncio, later": "CancelledByUs",
    }


def test_the_thread_alone_runs_coroutines_and_passes_errors_on() -> None:
    async def refuse() -> None:
        raise ForgedError("no")

    with AsyncioThread() as thread:
        assert thread.run(add_on_asyncio(1, 2), LONG_S) == 3
        with pytest.raises(ForgedError):
            thread.run(refuse(), LONG_S)
        with pytest.raises(TimeoutError):
            thread.run(asyncio.sleep(LONG_S), 0.01)
    with pytest.raises(CancelledByUs):
        thread.run(add_on_asyncio(1, 2), LONG_S)
    thread.stop()  # once more does nothing


def test_a_thread_never_started_says_so() -> None:
    with pytest.raises(CancelledByUs):
        AsyncioThread().run(add_on_asyncio(1, 2), LONG_S)


def test_stopping_the_thread_wakes_a_blocked_caller() -> None:
    outcome: list[type[BaseException]] = []
    started = threading.Event()

    async def hang() -> None:
        started.set()
        await asyncio.Event().wait()

    def block() -> None:
        try:
            thread.run(hang(), LONG_S)
        except BaseException as error:
            outcome.append(type(error))

    with AsyncioThread() as thread:
        blocked = threading.Thread(target=block)
        blocked.start()
        assert started.wait(LONG_S)
    blocked.join(LONG_S)
    assert outcome == [CancelledByUs]


def test_a_task_that_will_not_end_is_reported() -> None:
    release = threading.Event()

    async def stubborn() -> None:
        started.set()
        release.wait(LONG_S)  # blocks the loop, as no handler should

    started = threading.Event()
    thread = AsyncioThread()
    thread.start()
    thread.submit(stubborn)
    assert started.wait(LONG_S)
    with pytest.raises(LocalError, match="did not end"):
        thread.stop(timeout_s=0.01)
    release.set()


def test_what_nobody_awaits_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    logged = threading.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.set()

    watch = Watch()
    logging.getLogger("p2pnet.net.bridge").addHandler(watch)

    async def spawn() -> None:
        async def fail() -> None:
            raise RuntimeError("lost?")

        task = asyncio.create_task(fail())
        await asyncio.sleep(0)
        del task

    with AsyncioThread() as thread:
        thread.run(spawn(), LONG_S)
        assert logged.wait(LONG_S)
    logging.getLogger("p2pnet.net.bridge").removeHandler(watch)
    assert "lost?" in caplog.text
