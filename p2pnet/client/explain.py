"""Why a network's VNodes are where they are: its log, read and checked entry by entry.

The log alone says who decided what, where everything went and why, signed by whoever
decided it. What comes back are dicts as `p2pnet explain --json` prints them: keys that
people script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from p2pnet import keys
from p2pnet.client.session import NetworkInfo, Session
from p2pnet.errors import ForgedError, MalformedError, NotFoundError
from p2pnet.log.history import History, parse_entry, placement_of
from p2pnet.v1 import common_pb2, control_pb2, log_pb2


@dataclass(frozen=True, slots=True)
class Checked:
    """An entry, who signed it ("": the signature does not hold), and why it is void, or ""."""

    entry: log_pb2.LogEntry
    signer: str
    void: str


def check_log(network_id: str, entries: Sequence[common_pb2.Signed]) -> list[Checked]:
    """Every entry with what is wrong with it; the last one, where it cannot be this log's at all.

    Raises:
        MalformedError: `network_id` is none, or an entry does not even parse.
    """
    history = History(network_id)
    checked: list[Checked] = []
    for signed in entries:
        entry = parse_entry(signed)
        try:
            signer = keys.verify(keys.LOG_ENTRY, signed)
        except (ForgedError, MalformedError) as error:
            return [*checked, Checked(entry, "", str(error))]
        try:
            void = history.add(signed)
        except (ForgedError, MalformedError) as error:
            return [*checked, Checked(entry, signer, str(error))]
        checked.append(Checked(entry, signer, void))
    return checked


def vnode_history(checked: Sequence[Checked], vnode: str) -> list[dict[str, Any]]:
    """Every claim, with where it put the VNode, and every entry that does not count."""
    rows: list[dict[str, Any]] = []
    before: str | None = None
    for each in checked:
        row = _row(each)
        if row["kind"] == "claim":
            host = placement_of(each.entry.claim).get(vnode)
            rows.append({**row, "host": host, "from": None, "commits": []})
            if each.void:
                continue
            if before is not None and host != before:
                rows[-1]["from"] = before
            before = host
        elif each.void or row["kind"] == "closing":
            rows.append({**row, "host": None, "from": None, "commits": []})
        else:
            last = next(r for r in reversed(rows) if r["kind"] == "claim" and r["counts"])
            last["commits"].append(each.entry.commit.step)
    return rows


def network_history(checked: Sequence[Checked]) -> list[dict[str, Any]]:
    """Every entry: what it says, and whether it counts; claims with what they moved."""
    rows = []
    before: Mapping[str, str] = {}
    for each in checked:
        row = _row(each)
        if row["kind"] == "claim":
            placement = placement_of(each.entry.claim)
            moved = [
                {"vnode": vnode, "from": before.get(vnode), "to": host}
                for vnode, host in placement.items()
                if before.get(vnode) != host
            ]
            row |= {"hosts": list(each.entry.claim.hosts), "moved": moved}
            if not each.void:
                before = placement
        elif row["kind"] == "commit":
            row |= {"step": each.entry.commit.step}
        rows.append(row)
    return rows


async def explain(session: Session, text: str) -> dict[str, Any]:
    """The history of a NETWORK, or of a NETWORK/VNODE, and how it is now.

    Raises:
        NotFoundError: no such network or VNode.
        RemoteError: its log cannot be read.
    """
    name, _, vnode = text.partition("/")
    network = await session.find(name)
    if vnode and vnode not in network.vnodes:
        raise NotFoundError(
            f"network {network.name} has no VNode {vnode!r}: it has {', '.join(network.vnodes)}"
        )
    request = control_pb2.LogRequest(network_id=network.network_id)
    reply = await session.control("ReadLog", request, control_pb2.LogReply)
    checked = check_log(network.network_id, list(reply.entries))
    about = {"network_id": network.network_id, "name": network.name}
    if not vnode:
        return {**about, "history": network_history(checked)}
    history = vnode_history(checked, vnode)
    now = await _now(session, network, vnode, _last_commit(checked))
    return {**about, "vnode": vnode, "history": history, "now": now}


async def _now(
    session: Session, network: NetworkInfo, vnode: str, commit: log_pb2.Commit | None
) -> dict[str, Any]:
    rows = await session.where_is(network, (vnode,))
    state = None if commit is None else commit.states.get(vnode)
    return {
        "host": rows[0].peer_id if rows else None,
        "epoch": rows[0].epoch if rows else None,
        "expires_in_s": rows[0].expires_in_s if rows else None,
        "committed_step": None if commit is None else commit.step,
        "state_digest": None if state is None else state.digest.hex(),
    }


def _last_commit(checked: Sequence[Checked]) -> log_pb2.Commit | None:
    kept = [each.entry.commit for each in checked if _kind(each) == "commit" and not each.void]
    return kept[-1] if kept else None


def _kind(each: Checked) -> str:
    return each.entry.WhichOneof("what") or ""


def _row(each: Checked) -> dict[str, Any]:
    entry, kind = each.entry, _kind(each)
    epoch = {"claim": entry.claim.epoch, "commit": entry.commit.epoch}.get(kind)
    return {
        "slot": entry.slot,
        "kind": kind,
        "epoch": epoch,
        "orchestrator": each.signer or (entry.claim.orchestrator if kind == "claim" else None),
        "reason": _reason(entry, kind),
        "signature_ok": bool(each.signer),
        "counts": not each.void,
        "void": each.void,
        "keepers": list(entry.keepers),
    }


def _reason(entry: log_pb2.LogEntry, kind: str) -> str:
    if kind == "claim":
        return str(entry.claim.reason)
    if kind != "closing":
        return ""
    try:
        said = log_pb2.Cancellation.FromString(entry.closing.cancellation.payload).reason
    except DecodeError:  # then it does not count, and why is said
        said = ""
    return f"ended by its owner: {said}" if said else "ended by its owner"
