"""A host is killed in real processes: events, trace and explain each show it, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from digits import DIGITS, digits_batches
from swarm import Node, Swarm

STEPS = 12  # one cut, every 10, before the host dies; one more after


@dataclass
class Story:
    """Three nodes; the first orchestrates and hosts nothing; the last is killed, and back."""

    swarm: Swarm
    orchestrator: Node
    other: Node
    victim: Node
    vnode: str
    network_id: str
    traced_without: dict[str, Any]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with Swarm(tmp_path_factory.mktemp("told")) as swarm:
        (orchestrator,) = swarm.grow(1, "--memory", "1KiB")
        other, victim = swarm.grow(2)
        network = orchestrator.client.submit({**DIGITS, "name": "told"})
        vnode = next(r["vnode"] for r in network.locate() if r["peer_id"] == victim.peer_id)
        events = orchestrator.events()
        batches = digits_batches(2 * STEPS)
        for x, y in batches[:STEPS]:
            network.train_step(x, y)
        victim.kill()
        for x, y in batches[STEPS:]:
            network.train_step(x, y)
        network.finish()
        events.next("placed")
        traced = swarm.cli("trace", "told", "--json", node=other)
        assert traced.rc == 0, traced
        swarm.nodes.remove(victim)
        victim.end()
        back = swarm.join(data_dir=victim.data_dir)
        swarm.wait_until_all_see_all()
        yield Story(swarm, orchestrator, other, back, vnode, network.info.network_id, traced.json)


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


def test_explain_says_who_moved_a_vnode_and_why(story: Story) -> None:
    asked = story.swarm.cli("explain", f"told/{story.vnode}", "--json", node=story.other)
    assert asked.rc == 0, asked
    first, *_, last = asked.json["history"]
    assert (first["host"], first["from"], first["epoch"]) == (story.victim.peer_id, None, 1)
    assert 10 in first["commits"]
    assert (last["host"], last["epoch"]) == (story.other.peer_id, len(asked.json["history"]))
    moves = [row for row in asked.json["history"] if row["from"] == story.victim.peer_id]
    assert [row["host"] for row in moves] == [story.other.peer_id]
    assert story.victim.peer_id[-8:] in moves[0]["reason"]
    for row in asked.json["history"]:
        assert row["orchestrator"] == story.orchestrator.peer_id
        assert row["signature_ok"]
        assert row["counts"]
        assert len(row["keepers"]) in (1, 3)
    now = asked.json["now"]
    assert (now["host"], now["committed_step"]) == (story.other.peer_id, 2 * STEPS)
    assert len(now["state_digest"]) == 64


def test_explain_works_without_a_node_and_says_what_is_not_there(story: Story) -> None:
    swarm = story.swarm
    bootstrap = ("--bootstrap", str(swarm.bootstrap))
    whole = swarm.cli("explain", "told", "--json", *bootstrap)
    assert whole.rc == 0, whole
    kinds = [(row["kind"], row.get("step")) for row in whole.json["history"]]
    assert kinds[0] == ("claim", None)
    assert kinds[-1] == ("commit", 2 * STEPS)
    table = swarm.cli("explain", "told", node=story.orchestrator)
    assert story.orchestrator.peer_id[-8:] in table.out
    assert "no network 'nobody'" in swarm.cli("explain", "nobody", *bootstrap).sentence()
    assert "no VNode 'fc9'" in swarm.cli("explain", "told/fc9", node=story.other).sentence()


def test_a_trace_has_everybodys_events_in_causal_order(story: Story) -> None:
    traced = story.traced_without
    assert traced["network_id"] == story.network_id
    assert traced["silent"] == [story.victim.peer_id]
    assert traced["out_of_order"] == []
    events = traced["events"]
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)
    claims, placings = named(events, "claimed"), named(events, "placed")
    assert [event["epoch"] for event in claims] == list(range(1, len(claims) + 1))
    assert len(claims) >= 2
    for claim in claims:
        allocated = [e for e in named(events, "allocated") if e["epoch"] == claim["epoch"]]
        placed = [e for e in placings if e["epoch"] == claim["epoch"]]
        for event in allocated:
            assert claim["at"] < event["at"]
            assert event["node"] == story.other.peer_id
        assert all(event["at"] < placed[0]["at"] for event in allocated if placed)
    failed = named(events, "member_failed")
    assert [event["peer"] for event in failed] == [story.victim.peer_id]
    moved = [event for event in named(events, "relocated") if event["vnode"] == story.vnode]
    assert [(event["from_host"], event["to_host"]) for event in moved] == [
        (story.victim.peer_id, story.other.peer_id)
    ]
    assert named(events, "committed")[-1]["step"] == 2 * STEPS
    assert claims[0]["slot"] in [event["slot"] for event in named(events, "log_learned")]


def test_who_comes_back_still_knows_and_the_picture_opens(story: Story) -> None:
    output = story.swarm.directory / "trace.json"
    done = story.swarm.cli(
        "trace", "told", "--output", str(output), "--json", node=story.orchestrator
    )
    assert done.rc == 0, done
    assert done.json["silent"] == []
    mine = [event for event in done.json["events"] if event["node"] == story.victim.peer_id]
    assert [event["epoch"] for event in named(mine, "allocated")] == [1]  # from before the kill
    picture = json.loads(output.read_text())
    phases = [record["ph"] for record in picture["traceEvents"]]
    assert phases.count("s") == phases.count("f") >= 2
    placing = [r for r in picture["traceEvents"] if (r["ph"], r["name"]) == ("X", "placing")]
    assert len(placing) >= 2


def test_events_of_a_node_and_of_before_its_restart(story: Story) -> None:
    swarm = story.swarm
    before = swarm.cli("events", "--json", "--network", "told", node=story.victim)
    assert before.rc == 0, before
    assert before.lines[0]["event"] == "allocated"
    said = swarm.cli("events", "--since", "1h", node=story.orchestrator)
    assert "claimed" in said.out
    assert f"member_failed   peer …{story.victim.peer_id[-8:]}" in said.out
    following = swarm.process(
        "events", "--follow", "--json", "--data-dir", str(story.orchestrator.data_dir)
    )
    while (line := following.next_line()) is not None:
        if json.loads(line)["event"] == "following":
            break
    story.victim.kill()
    assert following.next_event("member_failed")["peer"] == story.victim.peer_id
    refused = swarm.cli("events", "--since", "ago", node=story.other)
    assert (refused.rc, refused.out) == (2, "")
    assert "is no time" in refused.err
