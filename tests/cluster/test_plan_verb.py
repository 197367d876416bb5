"""`p2pnet plan`: the same through a node and without one; and a swarm that is too small."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from digits import DIGITS
from swarm import Swarm

SPEC = {**DIGITS, "name": "planned"}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(SPEC))
    return file


def test_a_node_and_a_client_plan_alike(calm: Swarm, spec: Path) -> None:
    alive = sorted(calm.nodes[2].alive())
    for asked in (
        calm.cli("plan", str(spec), "--json", node=calm.nodes[2]),
        calm.cli("plan", str(spec), "--json", "--bootstrap", calm.nodes[4].addr),
    ):
        assert (asked.rc, asked.err) == (0, "")
        plan = asked.json
        assert [row["vnode"] for row in plan["placements"]] == [
            *(node["id"] for node in SPEC["nodes"]), SPEC["loss"]["id"],
        ]  # fmt: skip
        assert {row["peer_id"] for row in plan["placements"]} <= set(alive)
        assert plan["predicted"]["step_ms"] > 0
    shown = calm.cli("plan", str(spec), node=calm.nodes[2])
    assert shown.rc == 0
    assert "A step of 32 samples would take about" in shown.out


def test_a_swarm_too_small_and_a_spec_that_is_wrong_are_one_sentence(
    calm: Swarm, tmp_path: Path
) -> None:
    big = tmp_path / "big.yaml"
    wide = 1 << 28
    nodes = [
        {"id": "fc1", "type": "Linear", "config": {"in_features": 64, "out_features": wide}},
        {"id": "fc2", "type": "Linear", "config": {"in_features": wide, "out_features": 10}},
    ]
    big.write_text(yaml.safe_dump({**SPEC, "nodes": nodes}))
    asked = calm.cli("plan", str(big), "--json", node=calm.nodes[0])
    assert asked.rc == 1
    assert asked.json["memory_missing_bytes"] > 0
    assert asked.json["peers_missing"] > 0
    assert asked.err.startswith("p2pnet: planned cannot be placed: the swarm is too small: VNode ")
    assert len(asked.err.splitlines()) == 1
    nodes[1]["config"] = {"in_features": 7, "out_features": 10}
    big.write_text(yaml.safe_dump({**SPEC, "nodes": nodes}))
    asked = calm.cli("plan", str(big), node=calm.nodes[0])
    assert (asked.rc, asked.out) == (1, "")
    assert "fc2: Linear expects in_features=7 values a sample" in asked.err
