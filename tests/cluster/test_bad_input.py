"""What people get wrong: one clear sentence each, exit 1 or 2, and nobody else is harmed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from digits import DIGITS
from swarm import LOOPBACK, Swarm, until

import p2pnet
from p2pnet.keys import KeyPair

NOBODY = KeyPair.from_seed(b"n" * 32).peer_id


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Swarm]:
    """A swarm of what a test starts itself."""
    with Swarm(tmp_path) as swarm:
        yield swarm


@contextmanager
def taken_port() -> Iterator[int]:
    """A port of loopback that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    with taken_port() as port:
        return port


def test_a_broken_line_in_a_bootstrap_file_is_named_and_the_others_used(calm: Swarm) -> None:
    file = calm.directory / "broken.txt"
    file.write_text(f"# peers\n/ip4/nonsense\n{calm.nodes[0].addr}\n")
    asked = calm.cli("members", "--bootstrap", str(file), "--json")
    assert asked.rc == 0
    alive = [row["peer_id"] for row in asked.json if row["state"] == "alive"]
    assert sorted(alive) == sorted(calm.nodes[0].alive())
    node = calm.join("--bootstrap", str(file))
    calm.wait_until_all_see_all()
    node.leave()
    for said in (asked.err, node.process.err):
        assert said.startswith(f"p2pnet: {file}, line 2: "), said
        assert len(said.splitlines()) == 1, said


def test_with_all_bootstraps_dead_a_node_keeps_trying_and_answers(alone: Swarm) -> None:
    node = alone.join("--bootstrap", f"/ip4/127.0.0.1/tcp/{closed_port()}/p2p/{NOBODY}")
    assert not node.ready["new_network"]
    members = alone.cli("members", "--json", node=node)
    assert members.rc == 0
    assert [row["peer_id"] for row in members.json] == [node.peer_id]
    said = until(lambda: node.process.err, 30, "it says that nobody is there")
    assert "keeps trying" in said
    assert len(said.splitlines()) == 1


def test_a_client_that_reaches_nobody_says_so(alone: Swarm) -> None:
    nobody = f"/ip4/127.0.0.1/tcp/{closed_port()}/p2p/{NOBODY}"
    asked = alone.cli("whereis", "digits", "--bootstrap", nobody)
    assert "bootstrap" in asked.sentence()


@pytest.mark.parametrize("what", ["libp2p", "grpc"])
def test_a_port_in_use(alone: Swarm, what: str) -> None:
    with taken_port() as port:
        options = (
            ["--listen", f"/ip4/127.0.0.1/tcp/{port}"]
            if what == "libp2p"
            else ["--listen", LOOPBACK, "--grpc-port", str(port)]
        )
        sentence = alone.cli(
            "join", *options, "--data-dir", str(alone.directory / "node"), "--json"
        ).sentence()
    assert str(port) in sentence
    assert "in use" in sentence or "taken" in sentence


def test_a_gpu_that_is_not_there(alone: Swarm) -> None:
    data_dir = str(alone.directory / "node")
    sentence = alone.cli("join", "--device", "cuda:99", "--data-dir", data_dir).sentence()
    assert sentence.startswith("p2pnet: --device cuda:99: ")


def test_more_threads_than_cpus(alone: Swarm) -> None:
    data_dir = str(alone.directory / "node")
    options = ("--cpus", "1.5", "--threads", "2", "--data-dir", data_dir)
    assert "2 threads are more than the 1.5 CPUs" in alone.cli("join", *options).sentence()


def test_a_node_says_what_it_computes_on(alone: Swarm) -> None:
    node = alone.join("--device", "cpu", "--cpus", "0.5")
    assert node.ready["device"] == "cpu"
    (row,) = node.client.members()
    lent = row["capabilities"]
    assert (lent["device"], lent["threads"], lent["cpus"]) == ("cpu", 1, 0.5)
    assert "cpu" in lent["devices"]
    assert "libtorch" not in node.libraries()


def test_a_data_dir_in_use(calm: Swarm) -> None:
    node = calm.nodes[0]
    sentence = calm.cli("join", "--listen", LOOPBACK, node=node).sentence()
    assert f"another node is running in {node.data_dir}" in sentence
    assert node.peer_id in node.alive()


def test_a_data_dir_that_cannot_be_made(alone: Swarm) -> None:
    file = alone.directory / "file"
    file.write_text("")
    sentence = alone.cli("join", "--data-dir", str(file / "node")).sentence()
    assert "--data-dir" in sentence


def test_a_data_dir_whose_path_is_too_long_for_a_socket(alone: Swarm) -> None:
    node = alone.join(data_dir=alone.directory / ("long" * 40) / "node")
    members = alone.cli("members", "--json", node=node)
    assert [row["peer_id"] for row in members.json] == [node.peer_id]
    socket_path = Path((node.data_dir / "control.path").read_text())
    assert socket_path.exists()
    node.leave()
    assert not socket_path.parent.exists()  # nothing stays behind among the temporary files


def test_a_damaged_list_of_remembered_peers_is_only_a_hint(alone: Swarm) -> None:
    data_dir = alone.directory / "node"
    data_dir.mkdir(mode=0o700)
    (data_dir / "peers.json").write_text(json.dumps(["nonsense", "/ip4/127.0.0.1/tcp/1", 7]))
    node = alone.join(data_dir=data_dir)
    assert node.alive() == [node.peer_id]
    node.leave()


def test_no_node_here(alone: Swarm) -> None:
    empty = str(alone.directory / "empty")
    assert "start one with `p2pnet join`" in alone.cli("members", "--data-dir", empty).sentence()


def linear(n: int, m: int) -> dict[str, Any]:
    return {"type": "Linear", "config": {"in_features": n, "out_features": m}}


def spec(*nodes: dict[str, Any]) -> str:
    return yaml.safe_dump({**DIGITS, "name": "bad", "nodes": list(nodes)})


SPECS = {
    "an unknown type": (
        spec({"id": "fc1", "type": "Linnear", "config": {}}),
        ("fc1", "Linnear"),
    ),
    "a cycle": (
        spec(
            {"id": "a", "type": "Add", "inputs": ["x", "b"]},
            {"id": "b", "type": "ReLU", "inputs": ["a"]},
        ),
        ("a", "b"),
    ),
    "a shape that does not fit": (
        spec({"id": "fc1", **linear(64, 128)}, {"id": "fc2", **linear(100, 10)}),
        ("fc2", "100", "128"),
    ),
    "no spec": ("just: a mapping\n", ("has no name",)),
    "no YAML": ("a: [1, 2\n", ("YAML",)),
    "more memory than there is": (
        spec({"id": "huge", **linear(64, 10**9)}, {"id": "out", **linear(10**9, 10)}),
        ("huge", "memory"),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_that_cannot_be(calm: Swarm, name: str) -> None:
    text, expected = SPECS[name]
    file = calm.directory / "bad.yaml"
    file.write_text(text)
    sentence = calm.cli("submit", str(file), "--json", node=calm.nodes[2]).sentence()
    for word in expected:
        assert word in sentence
    assert calm.cli("whereis", "bad", node=calm.nodes[2]).rc == 1  # nothing is left of it


def test_a_spec_that_is_not_there(calm: Swarm) -> None:
    missing = str(calm.directory / "missing.yaml")
    assert missing in calm.cli("submit", missing, node=calm.nodes[0]).sentence()


@pytest.mark.parametrize("verb", ["whereis", "status", "infer", "export", "train", "cancel"])
def test_an_unknown_network(calm: Swarm, verb: str) -> None:
    source, output = calm.directory / "some.npy", str(calm.directory / "none")
    np.save(source, np.zeros((1, 64), np.float32))
    more = {
        "infer": ["--input", str(source), "--output", output],
        "export": ["--output", output],
        "train": ["--data", "digits:train"],
    }
    sentence = calm.cli(verb, "nowhere", *more.get(verb, []), node=calm.nodes[3]).sentence()
    assert "there is no network 'nowhere'" in sentence


def test_an_unknown_vnode(calm: Swarm, quiet: p2pnet.Network) -> None:
    sentence = calm.cli("whereis", "quiet/fc9", node=calm.nodes[0]).sentence()
    assert "fc9" in sentence
    assert "fc1" in sentence  # what there is


def test_a_name_that_is_taken(calm: Swarm, quiet: p2pnet.Network) -> None:
    file = calm.directory / "again.yaml"
    file.write_text(yaml.safe_dump({**DIGITS, "name": "quiet"}))
    assert "is here already" in calm.cli("submit", str(file), node=calm.nodes[4]).sentence()


def test_peers_that_cannot_orchestrate(calm: Swarm) -> None:
    file = calm.directory / "allowed.yaml"
    file.write_text(yaml.safe_dump({**DIGITS, "name": "allowed"}))
    submit = ("submit", str(file), "--allow")
    assert "peer id nonsense" in calm.cli(*submit, "nonsense", node=calm.nodes[0]).sentence()
    sentence = calm.cli(*submit, NOBODY, node=calm.nodes[0]).sentence()
    assert "none of the peers that may orchestrate" in sentence
    other = calm.nodes[1].peer_id
    sentence = calm.cli(*submit, NOBODY, "--orchestrator", other, node=calm.nodes[0]).sentence()
    assert f"{other} is to orchestrate it" in sentence


def test_a_network_ends_by_its_owners_word_alone_and_then_for_good(calm: Swarm) -> None:
    owner, stranger = calm.nodes[2], calm.nodes[3]
    file = calm.directory / "doomed.yaml"
    file.write_text(yaml.safe_dump({**DIGITS, "name": "doomed"}))
    submitted = calm.cli("submit", str(file), "--json", node=owner)
    assert submitted.rc == 0, submitted.err
    assert "only its owner can cancel it" in calm.cli("cancel", "doomed", node=stranger).sentence()
    assert calm.cli("status", "doomed", "--json", node=stranger).json["state"] == "ready"
    reason = ("--reason", "it has served its turn")
    cancelled = calm.cli("cancel", "doomed", *reason, "--json", node=owner)
    assert cancelled.rc == 0, cancelled.err
    assert cancelled.json == {
        "network_id": submitted.json["network_id"],
        "name": "doomed",
        "closed": True,
    }
    for verb in (["cancel"], ["status"], ["train", "--data", "digits:test", "--json"]):
        sentence = calm.cli(verb[0], "doomed", *verb[1:], node=owner).sentence()
        assert "its owner has closed doomed: it has served its turn" in sentence, verb


ARRAYS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a wrong shape": (np.zeros((3, 63), np.float32), ("[64]", "[63]")),
    "a wrong dtype": (np.zeros((3, 64), np.int64), ("float32", "int64")),
    "no samples": (np.float32(1), ("float32", "samples first")),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_input_that_does_not_fit(calm: Swarm, quiet: p2pnet.Network, name: str) -> None:
    array, expected = ARRAYS[name]
    source, output = calm.directory / "bad.npy", calm.directory / "bad-out.npy"
    np.save(source, array)
    sentence = calm.cli(
        "infer", "quiet", "--input", str(source), "--output", str(output), node=calm.nodes[0]
    ).sentence()
    for word in expected:
        assert word in sentence
    assert not output.exists()


def test_an_input_that_is_no_npy(calm: Swarm) -> None:
    source = calm.directory / "no.npy"
    source.write_text("not numbers")
    sentence = calm.cli(
        "infer", "quiet", "--input", str(source), "--output", "unwritten", node=calm.nodes[0]
    ).sentence()
    assert str(source) in sentence


def test_data_that_is_not_there(calm: Swarm) -> None:
    sentence = calm.cli("train", "quiet", "--data", "nonsense", node=calm.nodes[0]).sentence()
    assert "'nonsense' is no data" in sentence


USAGES = {
    "a verb": ["frobnicate"],
    "an option": ["members", "--frob"],
    "a size": ["join", "--memory", "much"],
    "a device": ["join", "--device", "gpu"],
    "no threads": ["join", "--threads", "0"],
    "no CPUs": ["join", "--cpus", "0"],
    "a port": ["join", "--grpc-port", "70000"],
    "a missing argument": ["submit"],
    "a duration": ["submit", "some.yaml", "--expires", "soon"],
    "a limit": ["submit", "some.yaml", "--hosts-max", "0"],
}


@pytest.mark.parametrize("name", USAGES)
def test_wrong_usage_exits_with_2(alone: Swarm, name: str) -> None:
    done = alone.cli(*USAGES[name])
    assert (done.rc, done.out) == (2, "")
    assert "Usage: p2pnet" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("addr", ["nonsense", "/ip4/127.0.0.1/udp/1", "/ip4/256.0.0.1/tcp/0"])
def test_an_address_to_listen_on_that_is_none(alone: Swarm, addr: str) -> None:
    data_dir = str(alone.directory / "node")
    assert addr in alone.cli("join", "--listen", addr, "--data-dir", data_dir).sentence()
