"""Events reach whoever follows them, from any thread, and nobody's slowness is another's."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import aclosing
from typing import Any

import pytest

from p2pnet import events
from p2pnet.events import EventBus


async def followed(bus: EventBus, count: int) -> list[dict[str, Any]]:
    """The next events, of which there have to be so many."""
    found = []
    async with asyncio.timeout(5), aclosing(bus.follow()) as lines:  # type: ignore[type-var]
        async for line in lines:
            found.append(json.loads(line))
            if len(found) == count:
                break
    return found


async def settled() -> None:
    """What was begun has come to its first wait."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_every_follower_gets_every_event_in_order() -> None:
    async def main() -> None:
        bus = EventBus()
        bus.bind(asyncio.get_running_loop())
        following = [asyncio.ensure_future(followed(bus, 2)) for _ in range(3)]
        await settled()
        bus.emit("placed", network="digits", epoch=1)
        bus.emit("decided", step=1)
        expected = [
            {"event": "placed", "network": "digits", "epoch": 1},
            {"event": "decided", "step": 1},
        ]
        assert await asyncio.gather(*following) == [expected] * 3

    asyncio.run(main())


def test_another_thread_may_emit() -> None:
    async def main() -> None:
        bus = EventBus()
        bus.bind(asyncio.get_running_loop())
        following = asyncio.ensure_future(followed(bus, 1))
        await settled()
        thread = threading.Thread(target=bus.emit, args=("here",))
        thread.start()
        assert await following == [{"event": "here"}]
        thread.join()

    asyncio.run(main())


def test_events_of_before_and_after_are_not_kept() -> None:
    async def main() -> EventBus:
        bus = EventBus()
        bus.emit("before anybody named a loop")
        bus.bind(asyncio.get_running_loop())
        bus.emit("before anybody followed")
        following = asyncio.ensure_future(followed(bus, 1))
        await settled()
        bus.emit("now")
        assert await following == [{"event": "now"}]
        return bus

    bus = asyncio.run(main())
    bus.emit("after the loop is closed")  # costs nothing and raises nothing


def test_who_is_far_behind_misses_events_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "_WAITING_MAX", 3)

    async def main() -> None:
        bus = EventBus()
        bus.bind(asyncio.get_running_loop())
        slow = bus.follow()
        first = asyncio.ensure_future(anext(slow))
        await settled()
        quick = asyncio.ensure_future(followed(bus, 10))
        await settled()
        for number in range(10):
            bus.emit("number", n=number)
            await settled()
        assert json.loads(await first) == {"event": "number", "n": 0}
        rest = [json.loads(await anext(slow))["n"] for _ in range(3)]
        assert rest == [1, 2, 3]
        assert [line["n"] for line in await quick] == list(range(10))
        bus.emit("number", n=99)
        assert json.loads(await anext(slow))["n"] == 99

    asyncio.run(main())


def test_followers_are_limited_and_make_room_when_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "FOLLOWERS_MAX", 2)

    async def main() -> None:
        bus = EventBus()
        bus.bind(asyncio.get_running_loop())
        following = [asyncio.ensure_future(followed(bus, 1)) for _ in range(2)]
        await settled()
        assert [line async for line in bus.follow()] == []  # one too many: it ends at once
        bus.emit("one")
        await asyncio.gather(*following)
        again = asyncio.ensure_future(followed(bus, 1))
        await settled()
        bus.emit("two")
        assert await again == [{"event": "two"}]

    asyncio.run(main())
