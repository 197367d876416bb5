"""A shell: what happened in a node, and to a network on all nodes; for programs and people."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any

from p2pnet.client.session import Session
from p2pnet.errors import MalformedError, UnreachableError, UsageError
from p2pnet.hlc import Timestamp, parse_timestamp
from p2pnet.keys import short
from p2pnet.timeline import Happening, Timeline, out_of_order, parse_happening, timeline_of
from p2pnet.v1 import control_pb2

FOLLOW_TIMEOUT_S = 24 * 3600.0
KEPT_TIMEOUT_S = 60.0
_SHOWN_MAX = 8  # of a list, to people

_AGO = re.compile(r"(\d{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NOT_SAID = ("network", "network_id")


def since_of(text: str, wall_ms: int) -> str:
    """The timestamp from which on events are asked for: one, or 90s, 10m, 2h, 1d ago.

    Raises:
        UsageError: neither.
    """
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return str(Timestamp(max(0, wall_ms - int(ago[1]) * _SECONDS[ago[2]] * 1000), 0))
    try:
        return str(parse_timestamp(text)) if text else ""
    except MalformedError:
        raise UsageError(
            f"{text[:40]!r} is no time: say how long ago, such as 90s, 10m or 2h, or the `at` "
            "of an event"
        ) from None


async def events(
    session: Session, *, follow: bool = False, since: str = "", network: str = ""
) -> AsyncIterator[Happening]:
    """What the node keeps; with `follow` then what comes, with `following` between the two.

    Args:
        since: a timestamp; only what came after it.
        network: only events of that one, by name or id.

    Raises:
        UsageError: the node is gone.
    """
    request = control_pb2.EventsRequest(follow=follow, since=since)
    timeout_s = FOLLOW_TIMEOUT_S if follow else KEPT_TIMEOUT_S
    try:
        async with session.control_stream("Events", control_pb2.EventReply, timeout_s) as stream:
            await stream.write(request)
            await stream.done_writing()
            async for reply in stream:
                event = parse_happening(reply.json, "here")
                names = (event.fields.get("network"), event.fields.get("network_id"))
                if not network or network in names or event.event == "following":
                    yield event
    except UnreachableError as error:
        raise UsageError(f"the local node does not answer: {error}") from None


async def trace(session: Session, name: str) -> tuple[dict[str, Any], Timeline]:
    """What happened to a network: as `p2pnet trace --json` prints it, and for pictures.

    Raises:
        NotFoundError: no such network.
    """
    network = await session.find(name)
    request = control_pb2.TraceRequest(network_id=network.network_id)
    reply = await session.control("Trace", request, control_pb2.TraceReply)
    timeline = timeline_of(parse_happening(line) for line in reply.json)
    rows = [
        {"ms": ms, **event.to_json()}
        for event, ms in zip(timeline.happenings, timeline.times_ms(), strict=True)
    ]
    shown = {
        "network_id": network.network_id,
        "name": network.name,
        "events": rows,
        "silent": list(reply.silent),
        "clock_ahead_ms": dict(timeline.ahead_ms),
        "out_of_order": out_of_order(timeline.happenings),
    }
    return shown, timeline


def time_of(wall_ms: int) -> str:
    """A node's time of day for people, in the zone of this machine."""
    try:
        return datetime.fromtimestamp(wall_ms / 1000).isoformat(" ", "milliseconds")
    except (OverflowError, OSError, ValueError):
        return "(no date)"


def in_words(fields: Mapping[str, Any]) -> str:
    """What an event says, on one line. Peers are written short."""
    said = [
        f"{name.replace('_', ' ')} {_word(value)}"
        for name, value in fields.items()
        if name not in _NOT_SAID and value not in ("", None)
    ]
    network = fields.get("network")
    text = ", ".join([_word(network), *said] if network else said)
    return "".join(c if c.isprintable() else " " for c in text)  # a peer's, on a terminal


def _word(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name} on {_word(inner)}" for name, inner in value.items()]
    if isinstance(value, list):
        shown = " ".join(_word(each) for each in value[:_SHOWN_MAX])
        return f"{shown} and {len(value) - _SHOWN_MAX} more" if value[_SHOWN_MAX:] else shown
    text = str(value)
    if re.fullmatch(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}", text):
        return short(text)
    return text[:200]
