"""Two nodes serve one service, a third anything: who hosts what, and who is told why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from swarm import Node, Swarm, until

from p2pnet.client import service as ask
from p2pnet.orchestrator.spec import load_spec

LAYERS = 5
ROOM_LAYERS = 2.9  # of a node: no two have room for LAYERS, nor one and what else is there


def chain(name: str, layers: int) -> dict[str, Any]:
    """So many layers of one size, and a small last one."""
    config = {"in_features": 64, "out_features": 64}
    nodes: list[dict[str, Any]] = [
        {"id": f"fc{n}", "type": "Linear", "config": config} for n in range(layers)
    ]
    small = {"in_features": 64, "out_features": 10}
    return {
        "name": name,
        "inputs": {"x": {"shape": [64], "dtype": "float32"}},
        "nodes": [*nodes, {"id": "out", "type": "Linear", "config": small}],
        "loss": {"id": "loss", "type": "CrossEntropyLoss"},
        "optimizer": {"type": "SGD", "lr": 0.1},
    }


def node_memory() -> str:
    """What a node lends."""
    layer = load_spec(chain("one", 1)).memory_bytes("fc0")
    return str(round(ROOM_LAYERS * layer))


@dataclass
class Club:
    """A swarm in which nodes 1 and 2 serve one service; node 1's user is an owner it lists."""

    swarm: Swarm
    file: Path
    service_id: str
    owner: str

    def verb(self, *args: str) -> Any:
        """`p2pnet service ARGS --json`."""
        done = self.swarm.cli("service", *args, "--json")
        assert done.rc == 0, done
        return done.json


@pytest.fixture(scope="module")
def club(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Club]:
    with Swarm(tmp_path_factory.mktemp("club")) as swarm:
        memory = ("--memory", node_memory())
        swarm.grow(1, *memory)
        made = Club(swarm, swarm.directory / "club.json", "", "")
        governors = []
        for n in range(3):
            shown = made.verb("key", "--key", str(swarm.directory / f"governor{n}"))
            governors += ["--governor", shown["governor"]]
        made.owner = made.verb("key", "--key", str(swarm.directory / "n1" / "owner"))["governor"]
        new = made.verb(
            "new", str(made.file), "--name", "club", "--threshold", "2", *governors,
            "--owner", made.owner,
        )  # fmt: skip
        made.service_id = new["id"]
        swarm.join("--service", str(made.file), *memory)  # the file: not signed yet
        swarm.join("--service", made.service_id, *memory)
        swarm.wait_until_all_see_all()
        yield made


def submit(club: Club, spec: dict[str, Any], node: int) -> Any:
    """`p2pnet submit` through a node."""
    file = club.swarm.directory / f"{spec['name']}.yaml"
    file.write_text(json.dumps(spec))  # JSON is YAML
    return club.swarm.cli("submit", str(file), "--json", node=club.swarm.nodes[node])


def hosts(club: Club, name: str) -> set[int]:
    """Which nodes host a network, as the DHT says."""
    number = {node.peer_id: n for n, node in enumerate(club.swarm.nodes)}
    rows = until(
        lambda: club.swarm.cli("whereis", name, "--json", node=club.swarm.nodes[0]).json,
        30, f"{name} is in the DHT",
    )  # fmt: skip
    return {number[row["peer_id"]] for row in rows}


def version(node: Node) -> int:
    """Of the manifest that a node goes by, 0 while it has none."""
    return int(node.client.run(ask.pinned(node.client.session))["version"])


def vnodes(node: Node) -> int:
    """How many it hosts, as it tells the others."""
    rows = {row["peer_id"]: row for row in node.client.members()}
    return int(rows[node.peer_id]["vnodes"])


def test_who_serves_what_is_said_at_the_start(club: Club) -> None:
    service = [node.ready["service"] for node in club.swarm.nodes]
    assert service == [None, *2 * [{"id": club.service_id, "version": 0}]]
    assert "--service" in club.swarm.cli("service", "show", node=club.swarm.nodes[0]).sentence()


def test_the_life_of_a_service(club: Club) -> None:
    swarm = club.swarm
    unlisted = chain("unlisted", 0)

    # Too few governors.
    key = [str(swarm.directory / f"governor{n}") for n in range(3)]
    club.verb("sign", str(club.file), "--key", key[0])
    refused = swarm.cli("service", "publish", str(club.file), node=swarm.nodes[0]).sentence()
    assert "2 of the 3 governors of club have to sign, and 1 did" in refused

    # Enough: published through a client that is no member.
    club.verb("sign", str(club.file), "--key", key[2])
    published = club.verb("publish", str(club.file), "--bootstrap", str(swarm.bootstrap))
    assert published["valid"]
    for node in swarm.nodes[1:]:
        until(partial(version, node), 30, "the nodes of the service find its manifest")
    by_id = swarm.cli("service", "show", club.service_id, "--json", node=swarm.nodes[0])
    assert by_id.json == published
    assert published["owners"] == [club.owner]

    # What is not listed is placed on the open node alone, and who asks another is told why.
    submitted = submit(club, unlisted, node=2)
    assert submitted.rc == 0
    assert submitted.json["orchestrator"] == swarm.nodes[0].peer_id
    for told in ("serves only the service club", club.service_id, "does not list"):
        assert told in submitted.err
    assert hosts(club, "unlisted") == {0}

    # What is listed is placed on all.
    listed = submit(club, chain("listed", LAYERS), node=1)
    assert listed.rc == 0, listed
    assert hosts(club, "listed") == {0, 1, 2}

    # The next version lists nobody: its nodes let the network go, and there is no other place.
    second = swarm.directory / "club2.json"
    body = json.loads(club.file.read_text()) | {"version": 2, "owners": [], "signatures": []}
    second.write_text(json.dumps(body))
    for each in key[:2]:
        club.verb("sign", str(second), "--key", each)
    club.verb("publish", str(second), "--data-dir", str(swarm.nodes[1].data_dir))
    until(lambda: vnodes(swarm.nodes[1]) == 0, 60, "node 1 has let its VNodes go")


def test_wrong_use_is_told_in_one_sentence(club: Club, tmp_path: Path) -> None:
    swarm = club.swarm
    joined = swarm.cli("join", "--service", "nonsense", "--data-dir", str(tmp_path / "n"))
    assert "'nonsense' is neither a service's id" in joined.sentence()
    stranger = str(tmp_path / "stranger")
    swarm.cli("service", "key", "--key", stranger)
    signed = swarm.cli("service", "sign", str(club.file), "--key", stranger)
    assert "none of the 3 governors" in signed.sentence()
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(json.loads(club.file.read_text()) | {"version": 2}))
    published = swarm.cli("service", "publish", str(broken), node=swarm.nodes[0])
    assert "signed again" in published.sentence()
    nobody = swarm.cli("service", "show", "0" * 32, node=swarm.nodes[0])
    assert "has no manifest" in nobody.sentence()
