"""Events and traces for people: times, words, filters, and the file for Perfetto."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from memory_wire import keypair_of

from p2pnet.cli.events import events, trace
from p2pnet.client.session import NetworkInfo
from p2pnet.client.trace import in_words, since_of, time_of
from p2pnet.errors import UsageError
from p2pnet.events import EventBus
from p2pnet.hlc import Timestamp
from p2pnet.keys import short
from p2pnet.timeline import parse_happening, read_clock
from p2pnet.v1 import control_pb2

NOW_MS = 1_764_000_000_000
ID = "ab" * 16
A, B = keypair_of("a").peer_id, keypair_of("b").peer_id


@pytest.mark.parametrize(
    ("text", "ms"), [("90s", 90_000), ("10m", 600_000), ("2h", 7_200_000), ("1d", 86_400_000)]
)
def test_since_is_how_long_ago(text: str, ms: int) -> None:
    assert since_of(text, NOW_MS) == str(Timestamp(NOW_MS - ms, 0))


def test_since_is_an_events_timestamp_or_nothing() -> None:
    at = str(Timestamp(NOW_MS, 7))
    assert (since_of(at, 0), since_of("", 0)) == (at, "")
    assert since_of("999999d", 1) == str(Timestamp(0, 0))


@pytest.mark.parametrize("text", ["yesterday", "10", "m", "-5m", "1.5h", "12:30", "5m "])
def test_what_is_no_time_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="is no time"):
        since_of(text, NOW_MS)


def test_fields_read_as_words() -> None:
    fields = {
        "network": "digits", "network_id": ID, "epoch": 2, "from_host": A, "reason": "",
        "vnodes": [f"fc{n}" for n in range(10)], "placement": {"fc1": B}, "text": "\x1b[2Jx\n",
    }  # fmt: skip
    assert in_words(fields) == (
        f"digits, epoch 2, from host {short(A)}, vnodes fc0 fc1 fc2 fc3 fc4 fc5 fc6 fc7 and 2 more"
        f", placement fc1 on {short(B)}, text  [2Jx "
    )
    assert in_words({}) == ""


def test_a_time_that_cannot_be_is_no_crash() -> None:
    assert time_of(2**48 - 1)
    assert len(time_of(NOW_MS)) == len("2025-11-24 16:00:00.000")


class Told:
    """A session whose node has an event bus, and one network."""

    def __init__(self) -> None:
        self.bus = EventBus()

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *error: object) -> None: ...

    @property
    def session(self) -> Told:
        return self

    def run(self, coro: Any, timeout_s: float = 0.0) -> Any:
        return asyncio.run(coro)

    async def find(self, name: str) -> NetworkInfo:
        return NetworkInfo(ID, name, A, ("fc1",), 1, "")

    async def control(self, method: str, request: Any, reply_type: Any) -> control_pb2.TraceReply:
        assert (method, request.network_id) == ("Trace", ID)
        told = [parse_happening(kept.line, A) for kept in self.bus.kept(network=ID)]
        ahead = 5000
        told += [
            read_clock(A, each.at, each.wall_ms + ahead, each.wall_ms, each.wall_ms)
            for each in told
        ]
        return control_pb2.TraceReply(
            json=[json.dumps(each.to_json()) for each in told], silent=[B]
        )

    @asynccontextmanager
    async def control_stream(
        self, method: str, reply_type: Any, timeout_s: float
    ) -> AsyncIterator[Stream]:
        assert method == "Events"
        yield Stream(self.bus)


class Stream:
    """What comes of the control socket; a follower is hung up on after `following`."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._request = control_pb2.EventsRequest()

    async def write(self, request: control_pb2.EventsRequest) -> None:
        self._request = request

    async def done_writing(self) -> None: ...

    async def __aiter__(self) -> AsyncIterator[control_pb2.EventReply]:
        for kept in self._bus.kept(self._request.since):
            yield control_pb2.EventReply(json=kept.line)
        if self._request.follow:
            yield control_pb2.EventReply(json=self._bus.marker("following"))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    session = Told()
    verb = importlib.import_module("p2pnet.cli.events")
    monkeypatch.setattr(verb, "connect", lambda data_dir, bootstrap: session)
    bus = session.bus
    bus.emit("claimed", network="digits", network_id=ID, epoch=1, slot=1, reason="submitted")
    bus.emit("allocated", network="digits", network_id=ID, epoch=1, vnodes=["fc1"], peer=A)
    bus.emit("member_came", peer=B)
    return session


def ask(verb: Any, *args: str) -> str:
    done = CliRunner().invoke(verb, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_events_are_a_line_each(told: Told) -> None:
    lines = ask(events).splitlines()
    assert [line[25:].split()[0] for line in lines] == ["claimed", "allocated", "member_came"]
    assert lines[0].endswith("digits, epoch 1, slot 1, reason submitted")
    assert short(B) in lines[2]


def test_events_as_json_and_since_and_of_one_network(told: Told) -> None:
    rows = [json.loads(line) for line in ask(events, "--json").splitlines()]
    assert [row["event"] for row in rows] == ["claimed", "allocated", "member_came"]
    assert list(rows[2]) == ["event", "at", "wall_ms", "peer"]
    for network in ("digits", ID):
        of_network = ask(events, "--json", "--network", network).splitlines()
        assert [json.loads(line) for line in of_network] == rows[:2]
    newer = ask(events, "--json", "--since", rows[1]["at"]).splitlines()
    assert [json.loads(line) for line in newer] == rows[2:]
    followed = ask(events, "--json", "--follow", "--network", "nobody").splitlines()
    assert [json.loads(line)["event"] for line in followed] == ["following"]
    assert ask(events, "--follow", "--network", "nobody") == ""


def test_a_trace_says_who_when_what_and_who_was_silent(told: Told, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    lines = ask(trace, "digits", "--output", str(output)).splitlines()
    assert lines[0].split()[:3] == ["0.000", short(A), "claimed"]
    assert lines[1].split()[1:3] == [short(A), "allocated"]
    assert lines[2] == f"The clock of {short(A)} is 5.0 s ahead of this node's."
    assert lines[3] == f"{B} did not answer: what it knows is missing."
    assert str(output) in lines[4]
    picture = json.loads(output.read_text())
    phases = [record["ph"] for record in picture["traceEvents"]]
    assert (phases.count("X"), phases.count("s"), phases.count("f")) == (2, 1, 1)


def test_a_trace_as_json(told: Told) -> None:
    shown = json.loads(ask(trace, "digits", "--json"))
    assert list(shown) == [
        "network_id", "name", "events", "silent", "clock_ahead_ms", "out_of_order",
    ]  # fmt: skip
    assert [(row["ms"] < 1000, row["node"], row["event"]) for row in shown["events"]] == [
        (True, A, "claimed"), (True, A, "allocated"),
    ]  # fmt: skip
    assert (shown["silent"], shown["clock_ahead_ms"]) == ([B], {A: 5000})


def test_nobody_remembers(told: Told) -> None:
    told.bus = EventBus()
    assert ask(trace, "digits").splitlines()[0] == "Nobody remembers anything of digits."
