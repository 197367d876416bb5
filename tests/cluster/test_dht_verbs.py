"""`p2pnet dht`: what it prints, for scripts and for people, through a node and without one."""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from swarm import Node, Result, Swarm

import p2pnet
from p2pnet.cli import main
from p2pnet.dht.keyspace import cid_of, network_key, record_key
from p2pnet.keys import KeyPair

STRANGER = KeyPair.from_seed(b"x" * 32).peer_id
NOBODYS_CID = cid_of(record_key("/p2pnet/nothing is here"))
WAYS = ["through a node", "as a client"]


def ask(calm: Swarm, way: str, *args: str) -> Result:
    """Runs `p2pnet dht ...` through node 2, or as a client that starts from node 4."""
    if way == "through a node":
        return calm.cli("dht", *args, node=calm.nodes[2])
    return calm.cli("dht", *args, "--bootstrap", calm.nodes[4].addr)


def quick(calm: Swarm, *args: str) -> Result:
    """As `ask` through a node, without a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    before, rc = sys.argv, 0
    sys.argv = ["p2pnet", "dht", *args, "--data-dir", str(calm.nodes[2].data_dir)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        rc = int(stop.code or 0)
    finally:
        sys.argv = before
    return Result(rc, out.getvalue(), err.getvalue())


def where(node: Node) -> dict[str, object]:
    """As the verbs name a peer."""
    addrs = [addr.removesuffix(f"/p2p/{node.peer_id}") for addr in node.ready["addrs"]]
    return {"peer_id": node.peer_id, "addrs": addrs}


@pytest.mark.parametrize("way", WAYS)
def test_find_peer(calm: Swarm, way: str) -> None:
    node = calm.nodes[3]
    found = ask(calm, way, "find-peer", node.peer_id, "--json")
    assert (found.rc, found.err) == (0, "")
    assert found.json == where(node)


def test_find_peer_finds_the_node_itself_and_prints_what_can_be_copied(calm: Swarm) -> None:
    node = calm.nodes[2]
    assert quick(calm, "find-peer", node.peer_id, "--json").json == where(node)
    said = quick(calm, "find-peer", node.peer_id).out
    assert said.splitlines() == [node.peer_id, *(f"    {addr}" for addr in node.ready["addrs"])]


def test_a_peer_that_nobody_knows(calm: Swarm) -> None:
    sentence = ask(calm, "as a client", "find-peer", STRANGER, "--json").sentence()
    assert STRANGER in sentence


@pytest.mark.parametrize("text", ["nonsense", "12D3KooW", "0OIl", STRANGER[:-2], "x" * 500])
def test_a_peer_id_that_is_none(calm: Swarm, text: str) -> None:
    assert "is not a peer id" in quick(calm, "find-peer", text).sentence()


def test_get_a_networks_record_by_name_by_id_and_by_cid(calm: Swarm, quiet: p2pnet.Network) -> None:
    id_of_it = quiet.info.network_id
    for key in ("quiet", id_of_it, cid_of(network_key(id_of_it))):
        (row,) = quick(calm, "get", key, "--json").json
        assert list(row) == [
            "cid", "author", "kind", "epoch", "sequence", "age_s", "expires_in_s", "content",
        ]  # fmt: skip
        assert (row["kind"], row["author"]) == ("network", calm.nodes[1].peer_id)
        assert row["epoch"] >= 1  # more where a busy machine had it placed anew
        assert row["age_s"] >= 0
        assert 0 < row["expires_in_s"] <= 24 * 3600
        content = row["content"]
        assert content["network_id"] == id_of_it
        assert content["name"] == "quiet"
        assert content["orchestrator"] == calm.nodes[1].peer_id
        assert content["vnodes"] == list(quiet.info.vnodes)


@pytest.mark.parametrize("way", WAYS)
def test_get_a_vnodes_record_says_what_whereis_says(
    calm: Swarm, quiet: p2pnet.Network, way: str
) -> None:
    (place,) = quiet.locate("fc1")
    (row,) = ask(calm, way, "get", "quiet/fc1", "--json").json
    assert row["kind"] == "allocation"
    assert row["cid"] == place["cid"]
    assert row["author"] == row["content"]["claimant"] == calm.nodes[1].peer_id
    assert row["content"]["vnode"] == "fc1"
    assert row["content"]["host"] == place["peer_id"]
    assert row["content"]["addrs"] == place["addrs"]
    (by_cid,) = quick(calm, "get", place["cid"], "--json").json
    assert by_cid["content"] == row["content"]


def test_providers_of_a_vnode_are_its_hosts(calm: Swarm, quiet: p2pnet.Network) -> None:
    (place,) = quiet.locate("fc2")
    for result in (
        quick(calm, "providers", "quiet/fc2", "--json"),
        ask(calm, "as a client", "providers", place["cid"], "--json"),
    ):
        rows = result.json
        hosts = {node.peer_id: where(node) for node in calm.nodes}
        assert place["peer_id"] in [row["peer_id"] for row in rows]
        assert all(row == hosts[row["peer_id"]] for row in rows)


def test_nobody_provides(calm: Swarm) -> None:
    assert quick(calm, "providers", NOBODYS_CID, "--json").json == []
    said = quick(calm, "providers", NOBODYS_CID)
    assert (said.rc, said.out) == (0, f"Nobody says that it provides {NOBODYS_CID}.\n")


def test_stats(calm: Swarm) -> None:
    others = len(calm.nodes[0].alive()) - 1  # a node of another test may have left
    stats = quick(calm, "stats", "--json").json
    assert stats["peers"] == others
    assert stats["holders"] == others
    assert stats["requests_answered"] > 0
    client = ask(calm, "as a client", "stats", "--json").json
    assert client["peers"] >= 1
    assert client["records"] == 0, "a client keeps nothing for others"
    said = quick(calm, "stats").out
    assert re.search(rf"^Peers +{others}$", said, re.MULTILINE)
    assert len(said.splitlines()) == len(stats)


def test_what_people_read(calm: Swarm, quiet: p2pnet.Network) -> None:
    (place,) = quiet.locate("fc1")
    records = quick(calm, "get", "quiet/fc1").out
    assert records.startswith(f"allocation by {calm.nodes[1].peer_id}, epoch ")
    assert f"    host          {place['peer_id']}\n" in records
    providers = quick(calm, "providers", "quiet/fc1").out
    assert f"{place['addrs'][0]}/p2p/{place['peer_id']}\n" in providers


WRONG = {
    "no such name": (["get", "nowhere"], "no record under 'nowhere'"),
    "nothing under a CID": (["get", NOBODYS_CID], NOBODYS_CID),
    "no such network": (["get", "nowhere/fc1"], "there is no network 'nowhere'"),
    "providers of no such network": (["providers", "nowhere/fc1"], "'nowhere'"),
    "no such VNode": (["get", "quiet/fc9"], "it has fc1"),
    "providers of no such VNode": (["providers", "quiet/fc9"], "it has fc1"),
    "providers of a network": (["providers", "quiet"], "neither NAME/VNODE nor the CID"),
    "a CID that is cut short": (["providers", NOBODYS_CID[:-3]], "neither NAME/VNODE nor the CID"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_there(calm: Swarm, quiet: p2pnet.Network, name: str) -> None:
    args, expected = WRONG[name]
    assert expected in quick(calm, *args, "--json").sentence()


@pytest.mark.parametrize("args", [["find-peer"], ["frobnicate"], ["get", "a", "b"]])
def test_wrong_usage(calm: Swarm, args: list[str]) -> None:
    done = quick(calm, *args)
    assert (done.rc, done.out) == (2, "")
    assert "Usage: p2pnet dht" in done.err


def test_a_client_asks_a_swarm_whose_dht_has_another_protocol_id(tmp_path: Path) -> None:
    other = ("--kad-protocol", "/test/kad/1")
    with Swarm(tmp_path) as swarm:
        first, second = swarm.grow(2, *other)
        wanted = ["dht", "find-peer", second.peer_id, "--bootstrap", first.addr, "--json"]
        assert swarm.cli(*wanted, *other).json == where(second)
        assert "no peer" in swarm.cli(*wanted).sentence()
