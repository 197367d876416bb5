"""What happened on several nodes, as one history in causal order. Pure.

Every node tells its own events, stamped by its hybrid logical clock (`p2pnet.hlc`). If
one can have caused another, it has the smaller timestamp, so sorting puts no effect
before its cause, however wrong the wall clocks are. Among events of which neither can
have caused the other, the order says nothing.

Wall clocks are for people, who want to see how long things took. Who gathers a
timeline reads every node's clock while it asks (Cristian, "Probabilistic clock
synchronization", 1989), and times are shown as its own clock would have told them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2pnet.errors import MalformedError
from p2pnet.hlc import WALL_MS_MAX, Timestamp, parse_timestamp

LINE_CHARS_MAX = 32 << 10
_NAME_CHARS_MAX = 64
_FIELDS_MAX = 64
CLOCK_READ = "clock_read"
_STAMPED = ("event", "at", "wall_ms", "node")

# What of two events with the same epoch causes the other.
_CAUSES = (("claimed", "allocated"), ("claimed", "placed"))


@dataclass(frozen=True, slots=True)
class Happening:
    """One event of one node, as that node tells it. `wall_ms`: by the node's own clock."""

    at: Timestamp
    node: str
    event: str
    wall_ms: int
    fields: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As `p2pnet trace --json` prints it."""
        return {
            "event": self.event,
            "at": str(self.at),
            "wall_ms": self.wall_ms,
            "node": self.node,
            **self.fields,
        }


def parse_happening(line: str, node: str = "") -> Happening:
    """An event from its line of JSON, which `node` has sent; without, the line says whose.

    Raises:
        MalformedError: it is no event.
    """
    if len(line) > LINE_CHARS_MAX:
        raise MalformedError(f"an event has at most {LINE_CHARS_MAX} characters")
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        raise MalformedError("an event is not JSON") from None
    if not isinstance(told, dict) or len(told) > _FIELDS_MAX:
        raise MalformedError("an event is no object")
    event, at, wall_ms = told.get("event"), told.get("at"), told.get("wall_ms")
    if not isinstance(event, str) or not 0 < len(event) <= _NAME_CHARS_MAX:
        raise MalformedError("an event has no name")
    if not event.isprintable() or not isinstance(at, str):
        raise MalformedError("an event has no name or no timestamp")
    if type(wall_ms) is not int or not 0 <= wall_ms <= WALL_MS_MAX:
        raise MalformedError("an event has no time")
    who = node or told.get("node", "")
    if not isinstance(who, str):
        raise MalformedError("an event is nobody's")
    fields = {name: value for name, value in told.items() if name not in _STAMPED}
    return Happening(parse_timestamp(at), who, event, wall_ms, fields)


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened, in causal order; by how much each node's clock is ahead of the asker's."""

    happenings: tuple[Happening, ...]
    ahead_ms: Mapping[str, int]

    def times_ms(self) -> list[int]:
        """When each happened, since the first, as the asker's clock would have told it.

        These are estimates, off by a part of a call's round trip, or by more where a clock
        was set meanwhile; it is the order that is certain.
        """
        times = [each.wall_ms - self.ahead_ms.get(each.node, 0) for each in self.happenings]
        start = min(times, default=0)
        return [time - start for time in times]


def read_clock(
    node: str, at: Timestamp, wall_ms: int, asked_ms: int, answered_ms: int
) -> Happening:
    """That a node's clock said `wall_ms` between two moments of the asker's clock."""
    here_ms = (asked_ms + answered_ms) // 2
    return Happening(at, node, CLOCK_READ, wall_ms, {"here_ms": here_ms})


def timeline_of(happenings: Iterable[Happening]) -> Timeline:
    """In causal order; the node decides between equal timestamps."""
    ordered = sorted(happenings, key=lambda happening: (happening.at, happening.node))
    ahead_ms = {
        each.node: each.wall_ms - int(each.fields["here_ms"])
        for each in ordered
        if each.event == CLOCK_READ
    }
    told = tuple(each for each in ordered if each.event != CLOCK_READ)
    return Timeline(told, dict(sorted(ahead_ms.items())))


def out_of_order(happenings: Sequence[Happening]) -> list[str]:
    """Where a timeline, as the nodes told it, contradicts itself; a sentence each.

    Some clock is then more than two hours wrong, so that others did not follow it, or
    somebody lies.
    """
    found = []
    causes: dict[tuple[str, str, str], Happening] = {}
    for happening in happenings:
        key = _key(happening)
        if any(happening.event == cause for cause, _ in _CAUSES):
            causes.setdefault((happening.event, *key), happening)
    for happening in happenings:
        for cause, effect in _CAUSES:
            if happening.event != effect:
                continue
            before = causes.get((cause, *_key(happening)))
            if before is not None and before.at >= happening.at:
                found.append(
                    f"{happening.node} says {effect!r} of epoch {happening.fields.get('epoch')} "
                    f"before {before.node} says {cause!r}"
                )
    return found


def _key(happening: Happening) -> tuple[str, str]:
    fields = happening.fields
    return str(fields.get("network_id")), str(fields.get("epoch"))


def mentioned(happenings: Iterable[Happening], peers: Sequence[str]) -> list[str]:
    """Which of some peers a timeline speaks of."""
    said: dict[str, None] = {}
    for happening in happenings:
        said[happening.node] = None
        for value in happening.fields.values():
            for word in _words(value):
                said[word] = None
    return [peer for peer in peers if peer in said]


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []
