"""Every member's events of a network put together: pages, silent peers, and peers that lie."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from memory_wire import keypair_of

from p2pnet import clock, tracing
from p2pnet.causality import Causality
from p2pnet.errors import MalformedError, UnreachableError
from p2pnet.events import EventBus
from p2pnet.hlc import Timestamp
from p2pnet.net.handlers import Caller
from p2pnet.timeline import parse_happening, timeline_of
from p2pnet.tracing import PAGE_EVENTS_MAX, Tracing
from p2pnet.v1 import control_pb2, pnode_pb2

ID, OTHER = "ab" * 16, "cd" * 16


class World:
    """Nodes by name; the first gathers. `dead` ones are members that have failed."""

    def __init__(self, names: str, dead: str = "") -> None:
        ticks = itertools.count(clock.wall_ms())  # what comes later has a later timestamp
        self.buses = {name: EventBus(causality=Causality(ticks.__next__)) for name in names}
        self.dead = dead
        self.asked: list[tuple[str, str]] = []
        self.answers: dict[str, Callable[[pnode_pb2.NetworkEventsRequest], Any]] = {}
        self.tracing = {name: Tracing(self._swarm(name), self.buses[name]) for name in names}

    def _swarm(self, name: str) -> Any:
        return SimpleNamespace(keypair=keypair_of(name), members=self._members, call=self._call)

    def _members(self) -> list[Any]:
        return [
            SimpleNamespace(peer_id=peer(name), alive=name not in self.dead)
            for name in sorted(self.buses)
        ]

    async def _call(
        self, peer_id: str, method: str, request: Any, reply_type: Any, *, timeout_s: float
    ) -> Any:
        assert method == "PNode/Events"
        name = next(name for name in self.buses if peer(name) == peer_id)
        assert name not in self.dead
        self.asked.append((name, request.since))
        if name in self.answers:
            return self.answers[name](request)
        return reply_type.FromString(await self.serve(name, request))

    async def serve(self, name: str, request: pnode_pb2.NetworkEventsRequest) -> bytes:
        async def requests() -> AsyncIterator[bytes]:
            yield request.SerializeToString()

        async def write(reply: bytes) -> None:
            raise AssertionError

        method = self.tracing[name].services()["PNode"]["Events"]
        reply = await method.run(requests(), Caller("anybody", 5.0), write)
        assert reply is not None
        return reply

    def emit(self, name: str, event: str, network_id: str = ID, **fields: Any) -> None:
        self.buses[name].emit(event, network_id=network_id, **fields)

    def gather(self, network_id: str = ID) -> control_pb2.TraceReply:
        async def main() -> control_pb2.TraceReply:
            async with asyncio.timeout(10):
                return await next(iter(self.tracing.values())).gather(network_id)

        return asyncio.run(main())


def peer(name: str) -> str:
    return keypair_of(name).peer_id


def told(reply: control_pb2.TraceReply) -> list[tuple[str, str]]:
    timeline = timeline_of(parse_happening(line) for line in reply.json)
    names = {peer(name): name for name in "abcdefgh"}
    return [(names[event.node], event.event) for event in timeline.happenings]


def silent(reply: control_pb2.TraceReply) -> list[str]:
    return sorted(name for name in "abcdefgh" if peer(name) in reply.silent)


def test_what_each_member_says_of_the_network_comes_together() -> None:
    world = World("abc")
    world.emit("b", "claimed", epoch=1)
    world.emit("c", "allocated", epoch=1)
    world.emit("a", "decided", step=1)
    world.emit("c", "allocated", network_id=OTHER, epoch=1)
    reply = world.gather()
    assert sorted(told(reply)) == [("a", "decided"), ("b", "claimed"), ("c", "allocated")]
    assert list(reply.silent) == []
    timeline = timeline_of(parse_happening(line) for line in reply.json)
    assert sorted(timeline.ahead_ms) == sorted([peer("b"), peer("c")])
    assert all(abs(ahead) < 1000 for ahead in timeline.ahead_ms.values())


def test_a_long_story_comes_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "PAGE_BYTES_MAX", 5000)
    world = World("ab")
    for step in range(200):
        world.emit("b", "decided", step=step)
    reply = world.gather()
    steps = [
        parse_happening(line).fields["step"]
        for line in reply.json
        if parse_happening(line).event == "decided"
    ]
    assert steps == list(range(200))
    assert len(world.asked) > 3
    assert world.asked == sorted(world.asked)


def test_at_most_so_many_events_a_page() -> None:
    world = World("ab")
    for step in range(PAGE_EVENTS_MAX + 1):
        world.emit("b", "decided", step=step)

    async def ask(limit: int) -> pnode_pb2.NetworkEventsReply:
        request = pnode_pb2.NetworkEventsRequest(network_id=ID, limit=limit)
        return pnode_pb2.NetworkEventsReply.FromString(await world.serve("b", request))

    page = asyncio.run(ask(10**6))
    assert (len(page.json), page.more) == (PAGE_EVENTS_MAX + 1, True)  # and the clock
    page = asyncio.run(ask(3))
    assert (len(page.json), page.more) == (4, True)
    assert json.loads(page.json[-1])["event"] == "clock_read"


@pytest.mark.parametrize("since", ["yesterday", "x" * 5000])
def test_a_bad_question_is_refused(since: str) -> None:
    world = World("a")
    request = pnode_pb2.NetworkEventsRequest(network_id=ID, since=since)
    with pytest.raises(MalformedError):
        asyncio.run(world.serve("a", request))
    with pytest.raises(MalformedError):
        asyncio.run(world.serve("a", pnode_pb2.NetworkEventsRequest()))


def line(wall_ms: int, event: str = "placed", **fields: Any) -> str:
    at = str(Timestamp(wall_ms, 0))
    return json.dumps({"event": event, "at": at, "wall_ms": wall_ms, "network_id": ID, **fields})


CLOCK = line(9, "clock_read")


def says(*lines: str, more: bool = False) -> Callable[[Any], pnode_pb2.NetworkEventsReply]:
    return lambda request: pnode_pb2.NetworkEventsReply(json=lines, more=more)


def raises(request: Any) -> Any:
    raise UnreachableError("no answer")


WRONG = {
    "no answer": raises,
    "no event": says("[]", CLOCK),
    "no clock": says(line(1)),
    "nothing": says(),
    "out of order": says(line(2), line(1), CLOCK),
    "the same twice": says(line(1), line(1), CLOCK),
    "for ever": says(line(1), CLOCK, more=True),
    "too much": says(*(line(n, text="x" * 30_000) for n in range(1, 1200)), CLOCK),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_who_answers_wrong_or_not_at_all_is_named_and_spoils_nothing(wrong: str) -> None:
    world = World("abc")
    world.emit("a", "claimed", epoch=1)
    world.emit("c", "allocated", epoch=1)
    world.answers["b"] = WRONG[wrong]
    reply = world.gather()
    assert silent(reply) == ["b"]
    honest = [each for each in told(reply) if each[0] != "b"]
    assert sorted(honest) == [("a", "claimed"), ("c", "allocated")]
    assert sum(name == "b" for name, _ in world.asked) <= 2


def test_an_event_is_whose_who_tells_it() -> None:
    world = World("abc")
    world.answers["b"] = says(line(1, node=peer("c")), CLOCK)
    assert told(world.gather()) == [("b", "placed")]


def test_of_the_dead_those_that_took_part_are_named_with_when_they_went() -> None:
    world = World("abcd", dead="cd")
    world.buses["a"].emit("member_came", peer=peer("c"))
    world.emit("b", "placed", placement={"fc1": peer("c"), "fc2": peer("b")})
    world.buses["a"].emit("member_failed", peer=peer("c"))
    world.buses["a"].emit("member_failed", peer=peer("d"))
    reply = world.gather()
    assert silent(reply) == ["c"]
    assert told(reply) == [("b", "placed"), ("a", "member_failed")]


def test_nobody_knows_the_network() -> None:
    world = World("ab")
    world.buses["a"].emit("member_came", peer=peer("b"))
    reply = world.gather()
    assert (list(reply.json), list(reply.silent)) == ([], [])


def test_a_crowd_is_asked_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "ASKED_AT_ONCE", 2)
    world = World("abcdefgh")
    under_way = [0, 0]
    call = world._call

    async def counted(*args: Any, **kwargs: Any) -> Any:
        under_way[0] += 1
        under_way[1] = max(under_way)
        await asyncio.sleep(0)
        try:
            return await call(*args, **kwargs)
        finally:
            under_way[0] -= 1

    world.tracing["a"]._swarm.call = counted  # type: ignore[method-assign]
    for name in "abcdefgh":
        world.emit(name, "allocated")
    assert len(told(world.gather())) == 8
    assert under_way[1] == 2
