"""Timelines of several nodes: causal order under clocks that are hours apart, and the picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnet.causality import Causality
from p2pnet.errors import MalformedError
from p2pnet.events import EventBus
from p2pnet.hlc import Timestamp
from p2pnet.perfetto import TRACKS, chrome_trace
from p2pnet.timeline import (
    LINE_CHARS_MAX,
    Happening,
    Timeline,
    mentioned,
    out_of_order,
    parse_happening,
    read_clock,
    timeline_of,
)

HOUR_MS = 3_600_000
NOW_MS = 1_764_000_000_000
LATENCY_MS = 5
ID = "ab" * 16


class Swarm:
    """Nodes with wrong clocks that send each other messages and note what happens."""

    def __init__(self, wrong_ms: dict[str, int]) -> None:
        self.true_ms = NOW_MS
        self._wrong_ms = wrong_ms
        self.buses = {name: EventBus(causality=Causality(self._clock(name))) for name in wrong_ms}

    def _clock(self, name: str) -> Any:
        return lambda: self.true_ms + self._wrong_ms[name]

    def emit(self, name: str, event: str, **fields: Any) -> None:
        self.buses[name].emit(event, network="digits", network_id=ID, **fields)

    def send(self, source: str, to: str) -> None:
        said = self.buses[source].causality.outgoing()
        self.true_ms += LATENCY_MS
        self.buses[to].causality.incoming(said, source)

    def timeline(self) -> Timeline:
        told = [
            parse_happening(kept.line, name)
            for name in reversed(list(self.buses))
            for kept in self.buses[name].kept()
        ]
        for name, wrong_ms in self._wrong_ms.items():
            now = parse_happening(self.buses[name].marker("now"))
            asked_ms, answered_ms = self.true_ms - LATENCY_MS, self.true_ms + 2 * LATENCY_MS
            told.append(read_clock(name, now.at, now.wall_ms, asked_ms, answered_ms))
            assert now.wall_ms == self.true_ms + wrong_ms
        return timeline_of(told)


def a_takeover(wrong_ms: dict[str, int]) -> Swarm:
    """o places a network on a and b; a dies; o moves it to c."""
    swarm = Swarm(wrong_ms)
    epoch = 1
    for hosts in ("ab", "bc"):
        swarm.emit("o", "recovering", reason="submitted" if epoch == 1 else "a", epoch=epoch - 1)
        swarm.true_ms += 100
        swarm.emit("o", "claimed", epoch=epoch, slot=epoch)
        for host in hosts:
            swarm.send("o", host)
            swarm.emit(host, "allocated", epoch=epoch, vnodes=["fc1"], peer="o")
            swarm.send(host, "o")
        swarm.emit("o", "placed", epoch=epoch, placement={"fc1": hosts[0], "fc2": hosts[1]})
        for step in (1, 2, 3):
            swarm.true_ms += 20
            swarm.emit("o", "decided", step=step, epoch=epoch)
        swarm.emit("o", "committed", step=3, epoch=epoch)
        epoch += 1
        swarm.true_ms += 1000
    swarm.emit("o", "member_failed", peer="a")
    return swarm


STEADY = {"o": 0, "a": 0, "b": 0, "c": 0}
WRONG = {"o": -HOUR_MS, "a": -HOUR_MS, "b": HOUR_MS, "c": 0}
EXPECTED = [
    "recovering", "claimed", "allocated", "allocated", "placed",
    "decided", "decided", "decided", "committed",
]  # fmt: skip


@pytest.mark.parametrize("wrong_ms", [STEADY, WRONG], ids=["right clocks", "clocks an hour wrong"])
def test_causes_come_before_effects_whatever_the_clocks_say(wrong_ms: dict[str, int]) -> None:
    happened = a_takeover(wrong_ms).timeline().happenings
    names = [event.event for event in happened if event.event != "member_failed"]
    assert names == EXPECTED * 2
    assert out_of_order(happened) == []
    by_clock = sorted(happened, key=lambda event: event.wall_ms)
    assert ([e.event for e in by_clock if e.event != "member_failed"] == names) == (
        wrong_ms is STEADY
    )


@pytest.mark.parametrize("wrong_ms", [STEADY, WRONG], ids=["right clocks", "clocks an hour wrong"])
def test_times_are_aligned_to_within_a_message(wrong_ms: dict[str, int]) -> None:
    wrong, right = a_takeover(wrong_ms).timeline(), a_takeover(STEADY).timeline()
    true = [event.wall_ms - right.happenings[0].wall_ms for event in right.happenings]
    assert wrong.times_ms() == true
    error_ms = LATENCY_MS // 2  # of a call that took longer one way than the other
    assert {n: ahead + error_ms for n, ahead in wrong.ahead_ms.items()} == wrong_ms


def test_a_clock_that_nobody_follows_shows() -> None:
    """So far apart that timestamps are not followed: the order is not known, and that is said."""
    swarm = a_takeover({**STEADY, "b": -5 * HOUR_MS})
    happened = swarm.timeline().happenings
    sentences = out_of_order(happened)
    assert sentences[0].startswith("b says 'allocated' of epoch 1 before o says 'claimed'")
    assert "clock_apart" in [event.event for event in happened]


def readings(timeline: Timeline) -> list[Happening]:
    at = Timestamp(NOW_MS, 0)
    return [
        read_clock(node, at, NOW_MS + ahead, NOW_MS, NOW_MS)
        for node, ahead in timeline.ahead_ms.items()
    ]


def test_a_liar_spoils_only_its_own_times() -> None:
    honest = a_takeover(STEADY).timeline()
    lie = Happening(Timestamp(NOW_MS + 9 * HOUR_MS, 0), "liar", "placed", 0, {})
    read = read_clock("liar", lie.at, 0, NOW_MS, NOW_MS)
    with_lie = timeline_of([lie, read, *honest.happenings, *readings(honest)])
    told = tuple(event for event in with_lie.happenings if event.node != "liar")
    assert told == honest.happenings
    gaps = [b - a for a, b in pairwise(honest.times_ms())]
    own = [
        ms
        for event, ms in zip(with_lie.happenings, with_lie.times_ms(), strict=True)
        if event.node != "liar"
    ]
    assert [b - a for a, b in pairwise(own)] == gaps


def test_equal_timestamps_are_ordered_by_node() -> None:
    at = Timestamp(NOW_MS, 0)
    two = [Happening(at, name, "placed", NOW_MS, {}) for name in "ba"]
    assert [event.node for event in timeline_of(two).happenings] == ["a", "b"]


GOOD = {"event": "placed", "at": str(Timestamp(NOW_MS, 0)), "wall_ms": NOW_MS}


@pytest.mark.parametrize(
    "line",
    [
        "", "no json", "[]", "null", "[" * 20_000, "{}",
        json.dumps({**GOOD, "event": ""}),
        json.dumps({**GOOD, "event": "x" * 65}),
        json.dumps({**GOOD, "event": "\x1b[2J"}),
        json.dumps({**GOOD, "event": 7}),
        json.dumps({**GOOD, "at": 7}),
        json.dumps({**GOOD, "at": "yesterday"}),
        json.dumps({**GOOD, "wall_ms": -1}),
        json.dumps({**GOOD, "wall_ms": 1.5}),
        json.dumps({**GOOD, "wall_ms": True}),
        json.dumps({**GOOD, "wall_ms": 10**30}),
        json.dumps({**GOOD, "node": 7}),
        json.dumps({**GOOD, **{str(n): n for n in range(65)}}),
        json.dumps({**GOOD, "reason": "x" * LINE_CHARS_MAX}),
    ],
)  # fmt: skip
def test_what_is_no_event_is_malformed(line: str) -> None:
    with pytest.raises(MalformedError):
        parse_happening(line)


@given(st.text(max_size=60))
def test_any_line_parses_or_is_malformed(line: str) -> None:
    try:
        parse_happening(line, "peer")
    except MalformedError:
        pass


def test_who_tells_an_event_is_not_for_the_event_to_say() -> None:
    line = json.dumps({**GOOD, "node": "somebody else"})
    assert parse_happening(line, "peer").node == "peer"
    assert parse_happening(line).node == "somebody else"
    assert parse_happening(json.dumps(parse_happening(line).to_json())) == parse_happening(line)


def test_peers_are_found_wherever_they_are_named() -> None:
    fields = {"placement": {"fc1": "p1"}, "hosts": ["p2"], "peer": "p3", "reason": "p9 is gone"}
    happened = [Happening(Timestamp(1, 0), "p4", "placed", 1, fields)]
    peers = [f"p{n}" for n in range(10)]
    assert mentioned(happened, peers) == ["p1", "p2", "p3", "p4"]


def check_format(picture: dict[str, Any]) -> list[dict[str, Any]]:
    """What the Trace Event Format asks for; returns the records without the names."""
    loaded = json.loads(json.dumps(picture, allow_nan=False))
    named = {(r["pid"], r["tid"]) for r in loaded["traceEvents"] if r["name"] == "thread_name"}
    records = []
    ends: dict[int, list[dict[str, Any]]] = {}
    for record in loaded["traceEvents"]:
        assert {"ph", "ts", "pid", "tid", "name"} <= record.keys()
        assert type(record["ts"]) is int
        assert record["ts"] >= 0
        match record["ph"]:
            case "M":
                assert record["args"]
                continue
            case "X":
                assert record["dur"] > 0
            case "i":
                assert record["s"] in "gpt"
            case "s" | "f":
                ends.setdefault(record["id"], []).append(record)
            case other:
                raise AssertionError(other)
        assert (record["pid"], record["tid"]) in named
        records.append(record)
    for start, end in ends.values():
        assert (start["ph"], end["ph"], end["bp"]) == ("s", "f", "e")
        assert start["ts"] <= end["ts"]
        for arrow in (start, end):  # an end without a span around it is not drawn
            assert any(
                (r["ph"], r["pid"], r["tid"]) == ("X", arrow["pid"], arrow["tid"])
                and r["ts"] <= arrow["ts"] <= r["ts"] + r["dur"]
                for r in records
            )
    return records


def of(records: Sequence[dict[str, Any]], ph: str, name: str) -> list[dict[str, Any]]:
    return [record for record in records if (record["ph"], record["name"]) == (ph, name)]


@pytest.mark.parametrize("wrong_ms", [STEADY, WRONG], ids=["right clocks", "clocks an hour wrong"])
def test_the_picture_has_spans_instants_and_arrows(wrong_ms: dict[str, int]) -> None:
    picture = chrome_trace(a_takeover(wrong_ms).timeline())
    records = check_format(picture)
    peers = [r for r in picture["traceEvents"] if r["name"] == "process_name"]
    assert [r["args"]["name"] for r in peers] == ["peer a", "peer b", "peer c", "peer o"]
    placing = of(records, "X", "placing")
    assert [span["dur"] // 1000 for span in placing] == [100 + 4 * LATENCY_MS] * 2
    assert [span["dur"] // 1000 for span in of(records, "X", "step 2")] == [20, 20]
    assert len(of(records, "i", "recovering")) == 2
    assert len(of(records, "i", "member_failed")) == 1
    assert [r["args"]["epoch"] for r in of(records, "X", "claimed")] == [1, 2]
    arrows = of(records, "s", "claim")
    assert len(arrows) == 4
    assert {r["tid"] for r in arrows} == {TRACKS.index("log") + 1}
    assert {r["tid"] for r in of(records, "f", "claim")} == {TRACKS.index("host") + 1}


@pytest.mark.parametrize("seed", range(10))
def test_any_history_makes_a_picture_that_opens(seed: int) -> None:
    rng = Random(seed)
    names = ("claimed", "allocated", "recovering", "placed", "decided", "over", "anything")
    timeline = timeline_of(
        Happening(
            Timestamp(NOW_MS + rng.randint(0, 50), rng.randint(0, 3)),
            rng.choice("abc"),
            rng.choice(names),
            NOW_MS + rng.randint(-HOUR_MS, HOUR_MS),
            {"epoch": rng.randint(1, 3), "network_id": ID},
        )
        for _ in range(60)
    )
    check_format(chrome_trace(timeline))


def test_nothing_makes_an_empty_picture() -> None:
    nothing = timeline_of([])
    assert check_format(chrome_trace(nothing)) == []
    assert (nothing.times_ms(), out_of_order(nothing.happenings)) == ([], [])
