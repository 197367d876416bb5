"""What `p2pnet plan` shows: a placement with reasons, and who slows the whole down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import p2pnet
from p2pnet.gossip.coordinates import Coordinate
from p2pnet.orchestrator.placement import place
from p2pnet.orchestrator.plan import host_view, plan_json
from p2pnet.orchestrator.spec import load_spec
from p2pnet.swarm import MemberView

DIGITS = load_spec(Path(p2pnet.__file__).parent / "data" / "digits.yaml")
GIB = 1 << 30


def member(name: str, **what: Any) -> MemberView:
    view = MemberView(
        peer_id=name, alive=True, hosting=True, addrs=(), cpus=2.0, memory_bytes=GIB,
        memory_used_bytes=0, gflops=20.0, vnodes=0, ip_group=name,
    )  # fmt: skip
    return replace(view, **what)


def planned(members: list[MemberView]) -> dict[str, Any]:
    found = plan_json(DIGITS, members, batch_size=32)
    return json.loads(json.dumps(found, allow_nan=False))  # type: ignore[no-any-return]


def test_it_is_the_placement_that_an_orchestrator_makes() -> None:
    members = [member(f"p{n}") for n in range(5)]
    found = planned(members)
    placed = place(DIGITS, [host_view(one) for one in members], batch_size=DIGITS.batch_max)
    assert {row["vnode"]: row["peer_id"] for row in found["placements"]} == placed.assignments
    assert {row["vnode"]: row["score"] for row in found["placements"]} == placed.scores
    assert found["rejected"] == found["warnings"] == []
    step = found["predicted"]
    assert step["path"] == list(DIGITS.vnodes())
    assert 18 + 4 <= step["step_ms"] < 18 + 5  # six VNodes, four edges between hosts
    assert (
        step["samples_per_s"] == round(32 / step["step_ms"] * 1e3, 1) or step["samples_per_s"] > 0
    )


def test_who_is_not_taken_and_why() -> None:
    found = planned(
        [
            member("p0"), member("client", hosting=False), member("dead", alive=False),
            member("full", memory_used_bytes=GIB), member("outcast", trust=0.0),
        ]
    )  # fmt: skip
    assert {row["peer_id"] for row in found["placements"]} == {"p0"}
    why = {(row["vnode"], row["peer_id"]): row["reason"] for row in found["rejected"]}
    assert why[None, "client"] == "does not host"
    assert why["fc1", "outcast"] == "not trusted"
    assert why["fc1", "full"] == "needs 1.9 MiB, has 0 B left"
    assert not any(peer == "dead" for _, peer in why)


def test_a_swarm_that_is_too_small_is_told_what_is_missing() -> None:
    found = planned([member("p0", memory_bytes=4 << 20), member("p1", memory_bytes=1 << 20)])
    assert "the swarm is too small" in found["error"]
    total = sum(DIGITS.memory_bytes(vnode) for vnode in DIGITS.vnodes())
    assert found["memory_missing_bytes"] == total - (5 << 20)
    assert found["peers_missing"] >= 1
    more = [
        member(f"q{n}", memory_bytes=found["peer_bytes"]) for n in range(found["peers_missing"])
    ]
    first = [member("p0", memory_bytes=4 << 20), member("p1", memory_bytes=1 << 20)]
    assert "error" not in planned(first + more)
    assert "no peer here hosts VNodes" in planned([])["error"]


def test_a_peer_that_slows_the_whole_down_is_named() -> None:
    """Its memory is needed; the others are quick and small."""
    quick = [member(f"p{n}", memory_bytes=1 << 20) for n in range(3)]
    slow = member("slow", gflops=0.1)
    (warning,) = planned([*quick, slow])["warnings"]
    assert warning["peer_id"] == "slow"
    assert warning["factor"] >= 1.25
    assert "slow (0.1 GFLOP/s) makes a step" in warning["text"]
    assert "with a peer like the others in its place" in warning["text"]


def test_a_peer_far_from_the_others_is_named_with_the_way_to_it() -> None:
    here, there = (Coordinate((x, 0.0, 0.0, 0.0), 0.001, 0.1) for x in (0.0, 0.3))
    near = [member(f"p{n}", memory_bytes=2 << 20, coordinate=here) for n in range(4)]
    found = planned([*near, member("far", memory_bytes=5 << 19, coordinate=there)])
    assert found["predicted"]["slowest_edge"]["ms"] >= 300
    assert "far" in [warning["peer_id"] for warning in found["warnings"]]
