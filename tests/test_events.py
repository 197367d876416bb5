"""Events are stamped, kept, told to whoever follows, and survive a restart and a full disk."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from p2pnet import event_file, events
from p2pnet.causality import Causality
from p2pnet.errors import MalformedError
from p2pnet.event_file import EventFile, read_lines
from p2pnet.events import EVENT_BYTES_MAX, EventBus
from p2pnet.hlc import AHEAD_MS_MAX, parse_timestamp

NOW_MS = 1_764_000_000_000


def of(line: str) -> dict[str, Any]:
    """An event without what it was stamped with."""
    event: dict[str, Any] = json.loads(line)
    parse_timestamp(event.pop("at"))
    assert event.pop("wall_ms") > 0
    return event


async def followed(bus: EventBus, count: int, since: str | None = None) -> list[dict[str, Any]]:
    """The next events, of which there have to be so many; `following` is not counted."""
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(5), aclosing(bus.follow(since)) as lines:  # type: ignore[type-var]
        async for line in lines:
            event = of(line)
            if event["event"] == "following":
                assert since is not None or not found
                continue
            found.append(event)
            if len(found) == count:
                break
    return found


async def settled() -> None:
    """What was begun has come to its first wait."""
    for _ in range(5):
        await asyncio.sleep(0)


def names(bus: EventBus, since: str = "", network: str = "") -> list[str]:
    return [of(kept.line)["event"] for kept in bus.kept(since, network)]


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


def test_a_follower_gets_what_was_before_only_if_it_asks() -> None:
    async def main() -> EventBus:
        bus = EventBus()
        bus.emit("before anybody named a loop")
        bus.bind(asyncio.get_running_loop())
        bus.emit("before anybody followed")
        from_now_on = asyncio.ensure_future(followed(bus, 1))
        from_the_start = asyncio.ensure_future(followed(bus, 3, since=""))
        first_at = json.loads(bus.kept()[0].line)["at"]
        from_the_first = asyncio.ensure_future(followed(bus, 2, since=first_at))
        await settled()
        bus.emit("now")
        everything = ["before anybody named a loop", "before anybody followed", "now"]
        assert [event["event"] for event in await from_now_on] == everything[2:]
        assert [event["event"] for event in await from_the_start] == everything
        assert [event["event"] for event in await from_the_first] == everything[1:]
        return bus

    bus = asyncio.run(main())
    bus.emit("after the loop is closed")
    assert names(bus)[-1] == "after the loop is closed"


def test_what_happens_while_a_follower_catches_up_comes_once() -> None:
    async def main() -> None:
        bus = EventBus()
        bus.bind(asyncio.get_running_loop())
        bus.emit("number", n=0)
        lines = bus.follow(since="")
        assert of(await anext(lines)) == {"event": "number", "n": 0}
        bus.emit("number", n=1)
        assert of(await anext(lines)) == {"event": "following"}
        bus.emit("number", n=2)
        assert [of(await anext(lines))["n"] for _ in range(2)] == [1, 2]

    asyncio.run(main())


def test_what_is_on_its_way_to_others_comes_once_to_a_new_follower() -> None:
    async def main() -> None:
        bus = EventBus()
        bus.bind(asyncio.get_running_loop())
        early, late = bus.follow(), bus.follow(since="")
        assert of(await anext(early)) == {"event": "following"}
        bus.emit("number", n=1)  # the loop has not yet run since
        assert of(await anext(late)) == {"event": "number", "n": 1}
        assert of(await anext(late)) == {"event": "following"}
        bus.emit("number", n=2)
        for follower, expected in ((early, [1, 2]), (late, [2])):
            assert [of(await anext(follower))["n"] for _ in expected] == expected

    asyncio.run(main())


def test_who_is_far_behind_misses_events_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "_WAITING_MAX", 3)

    async def main() -> None:
        bus = EventBus()
        bus.bind(asyncio.get_running_loop())
        slow = bus.follow()
        assert of(await anext(slow)) == {"event": "following"}
        first = asyncio.ensure_future(anext(slow))
        quick = asyncio.ensure_future(followed(bus, 10))
        await settled()
        for number in range(10):
            bus.emit("number", n=number)
            await settled()
        assert of(await first) == {"event": "number", "n": 0}
        rest = [of(await anext(slow))["n"] for _ in range(3)]
        assert rest == [1, 2, 3]
        assert [line["n"] for line in await quick] == list(range(10))
        bus.emit("number", n=99)
        assert of(await anext(slow))["n"] == 99

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


def test_events_are_kept_in_the_order_of_their_timestamps() -> None:
    bus = EventBus(causality=Causality(lambda: NOW_MS))  # a clock that stands still
    for number in range(20):
        bus.emit("decided" if number % 2 else "placed", n=number)
    kept = bus.kept()
    assert [of(each.line)["n"] for each in kept] == list(range(20))
    assert [each.at for each in kept] == sorted({each.at for each in kept})
    since = str(kept[4].at)
    assert [of(each.line)["n"] for each in bus.kept(since)] == list(range(5, 20))
    with pytest.raises(MalformedError):
        bus.kept("yesterday")


def test_a_network_is_found_by_its_name_or_id() -> None:
    bus = EventBus()
    bus.emit("placed", network="digits", network_id="ab")
    bus.emit("placed", network="other", network_id="cd")
    bus.emit("member_came", peer="x")
    assert names(bus, network="digits") == names(bus, network="ab") == ["placed"]
    assert names(bus, network="nobody") == []
    assert len(names(bus)) == 3


def test_the_many_do_not_push_out_the_rare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bus = EventBus(tmp_path / "events.jsonl")
    bus.emit("claimed", epoch=1)
    for step in range(events.KEPT_MAX + 1):
        bus.emit("decided", step=step)
    bus.emit("committed", step=20)
    bus.close()
    kept = names(bus)
    assert kept[0] == "claimed"
    assert kept[-1] == "committed"
    assert kept.count("decided") == events.FREQUENT_KEPT_MAX
    on_disk = [of(line)["event"] for line in read_lines(tmp_path / "events.jsonl")]
    assert on_disk == ["claimed", "committed"]


def test_what_is_long_is_counted_instead() -> None:
    bus = EventBus()
    placement = {f"vnode{n}": "12D3KooW" for n in range(2000)}
    bus.emit("placed", network="big", placement=placement, reason="x" * EVENT_BYTES_MAX)
    line = bus.kept()[0].line
    assert len(line) < EVENT_BYTES_MAX
    event = of(line)
    assert event.pop("reason") == "x" * 1000
    assert event == {"event": "placed", "network": "big", "omitted": {"placement": 2000}}


def test_events_and_the_clock_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    before = EventBus(path, Causality(lambda: NOW_MS))
    before.emit("placed", network="digits", epoch=1)
    before.emit("committed", step=20)
    before.close()
    with path.open("a") as file:
        file.write('{"event": "half a li')  # as a power cut leaves it
    an_hour_back = Causality(lambda: NOW_MS - 3_600_000)
    after = EventBus(path, an_hour_back)
    assert names(after) == ["placed", "committed"]
    after.emit("came back")
    after.close()
    again = EventBus(path, an_hour_back)
    again.close()
    assert names(again) == ["placed", "committed", "came back"]
    assert [kept.at for kept in again.kept()] == sorted(kept.at for kept in again.kept())
    assert names(again, network="digits") == ["placed"]


def test_a_past_that_was_in_the_far_future_does_not_hold_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    wrong = EventBus(path, Causality(lambda: NOW_MS + AHEAD_MS_MAX + 1000))
    wrong.emit("once upon a time")
    wrong.close()
    right = EventBus(path, Causality(lambda: NOW_MS))
    right.emit("now")
    right.close()
    assert names(right) == ["clock_went_back", "now", "once upon a time"]
    assert right.causality.stamp()[0].wall_ms == NOW_MS


@pytest.mark.parametrize(
    "line", ["", "[]", "7", "{}", '{"at": 7}', '{"at": "x"}', "[" * 100_000, "\x00\xff"]
)
def test_what_is_no_event_in_the_file_is_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(line + "\n")
    bus = EventBus(path)
    bus.emit("here")
    bus.close()
    assert names(bus) == ["here"]


def test_the_file_is_bounded_and_keeps_the_latest(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = EventFile(path, bytes_max=1000)
    for number in range(100):
        file.append(json.dumps({"n": number, "text": "x" * 50}))
    file.close()
    sizes = [each.stat().st_size for each in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 1000
    numbers = [json.loads(line)["n"] for line in read_lines(path)]
    assert numbers == list(range(numbers[0], 100))
    assert len(numbers) > 13  # of 13 bytes and 50


def test_a_line_longer_than_the_file_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = EventFile(path, bytes_max=100)
    file.append("x" * 200)
    file.append('{"n": 1}')
    file.close()
    assert '{"n": 1}' in read_lines(path)


def test_a_full_disk_costs_only_the_file_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = [True]
    write = EventFile._write

    def write_or_fail(self: EventFile, line: str, torn: bool) -> bool:
        if full[0]:
            raise OSError(28, "No space left on device")
        return write(self, line, torn)

    monkeypatch.setattr(event_file.EventFile, "_write", write_or_fail)
    path = tmp_path / "events.jsonl"
    with caplog.at_level(logging.WARNING):
        bus = EventBus(path)
        for number in range(5):
            bus.emit("number", n=number)
        bus.close()
    assert len(names(bus)) == 5
    assert [record.message.count("No space left on device") for record in caplog.records] == [1]
    full[0] = False
    bus = EventBus(path)
    bus.emit("room again")
    bus.close()
    assert [of(line)["event"] for line in read_lines(path)] == ["room again"]


def test_a_data_dir_that_is_gone_is_survived(tmp_path: Path) -> None:
    bus = EventBus(tmp_path / "nowhere" / "events.jsonl")
    bus.emit("here")
    bus.close()
    bus.emit("after it was closed")
    assert names(bus) == ["here", "after it was closed"]


def test_every_event_stands_in_the_docs() -> None:
    root = Path(events.__file__).parents[1]
    code = "".join(
        file.read_text()
        for file in sorted((root / "p2pnet").rglob("*.py"))
        if "v1" not in file.parts
    )
    said = dict.fromkeys(re.findall(r'(?:[._]emit|\.note)\(\s*"(\w+)"', code))
    assert len(said) > 15
    docs = (root / "docs" / "events.md").read_text()
    assert [name for name in said if f"`{name}`" not in docs] == []
