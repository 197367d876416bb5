"""A timeline as a picture: the Trace Event Format that Chrome and Perfetto open. Pure.

"Trace Event Format", Nat Duca and Dean Sinclair, Google. A process is a peer and a
thread a track of it; X is a span, i an instant, s and f are the two ends of an arrow, M
gives a name. Times are in microseconds.
"""

from __future__ import annotations

from typing import Any

from p2pnet.keys import short
from p2pnet.timeline import Happening, Timeline

TRACKS = ("orchestrator", "steps", "log", "host", "members")  # a peer's, in this order
_TRACK_OF = {
    "claimed": "log",
    "committed": "log",
    "uncommitted": "log",
    "closed": "log",
    "log_learned": "log",
    "allocated": "host",
    "dropped": "host",
    "located": "host",
    "stopped": "host",
    "decided": "steps",
    "member_came": "members",
    "member_failed": "members",
    "member_left": "members",
    "clock_apart": "members",
}
_RESOLUTION_US = 1000  # the clocks count milliseconds: so long is what takes no time
_ENDS_PLACING = ("placed", "over", "closed", "recovering")

Record = dict[str, Any]


def chrome_trace(timeline: Timeline) -> Record:
    """The whole file, as an object for JSON."""
    happenings = timeline.happenings
    nodes = sorted(dict.fromkeys(happening.node for happening in happenings))
    pids = {node: number for number, node in enumerate(nodes, start=1)}
    records = [record for node in nodes for record in _names(node, pids[node])]
    placing: dict[tuple[str, str], tuple[Happening, int]] = {}  # by node and network
    deciding: dict[tuple[str, str], int] = {}  # when the last step was decided
    claims: dict[tuple[str, str], tuple[Happening, int]] = {}  # by network and epoch
    arrows = 0
    for happening, ms in zip(happenings, timeline.times_ms(), strict=True):
        pid, ts = pids[happening.node], ms * 1000
        network, epoch = _text(happening, "network_id"), _text(happening, "epoch")
        role = (happening.node, network)
        if happening.event in _ENDS_PLACING and role in placing:
            began, since = placing.pop(role)
            records.append(_span("placing", began, pid, since, ts, "orchestrator"))
        if happening.event == "recovering":
            placing[role] = (happening, ts)
            deciding.pop(role, None)
        elif happening.event == "placed":
            deciding[role] = ts
        elif happening.event == "decided":
            name = f"step {_text(happening, 'step')}"
            records.append(_span(name, happening, pid, deciding.get(role, ts), ts, "steps"))
            deciding[role] = ts
            continue
        records.append(_moment(happening, pid, ts))
        if happening.event == "claimed":
            claims[network, epoch] = (happening, ts)
        elif happening.event == "allocated" and (network, epoch) in claims:
            cause, when = claims[network, epoch]
            if when <= ts:  # the clocks are set right only to a call's travel time
                arrows += 1
                records.append(_arrow("s", arrows, pids[cause.node], when, "log"))
                records.append(_arrow("f", arrows, pid, ts, "host"))
    return {"traceEvents": records, "displayTimeUnit": "ms"}


def _names(node: str, pid: int) -> list[Record]:
    def name(what: str, tid: int, **args: Any) -> Record:
        return {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": args}

    records = [
        name("process_name", 0, name=f"peer {short(node)}"),
        name("process_labels", 0, labels=node),
    ]
    for tid, track in enumerate(TRACKS, start=1):
        records.append(name("thread_name", tid, name=track))
        records.append(name("thread_sort_index", tid, sort_index=tid))
    return records


def _span(name: str, of: Happening, pid: int, since: int, until: int, track: str) -> Record:
    return {
        "ph": "X",
        "name": name,
        "cat": track,
        "pid": pid,
        "tid": _tid(track),
        "ts": since,
        "dur": max(until - since, _RESOLUTION_US),
        "args": _args(of),
    }


def _moment(happening: Happening, pid: int, ts: int) -> Record:
    """Arrows begin and end at spans only, so these are spans of no length."""
    track = _TRACK_OF.get(happening.event, "orchestrator")
    if track in ("log", "host"):
        return _span(happening.event, happening, pid, ts, ts, track)
    return {
        "ph": "i",
        "s": "p",
        "name": happening.event,
        "cat": track,
        "pid": pid,
        "tid": _tid(track),
        "ts": ts,
        "args": _args(happening),
    }


def _arrow(ph: str, number: int, pid: int, ts: int, track: str) -> Record:
    record = {
        "ph": ph,
        "id": number,
        "name": "claim",
        "cat": "claim",
        "pid": pid,
        "tid": _tid(track),
        "ts": ts,
    }
    return {**record, "bp": "e"} if ph == "f" else record


def _tid(track: str) -> int:
    return TRACKS.index(track) + 1


def _args(happening: Happening) -> Record:
    return {"at": str(happening.at), "wall_ms": happening.wall_ms, **happening.fields}


def _text(happening: Happening, field: str) -> str:
    return str(happening.fields.get(field, ""))
