"""A power cut: every node is killed, the bootstrap peer never comes back, the others meet again."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from digits import DIGITS
from swarm import Figure, Node, Swarm, until

from p2pnet.clock import wall_ms
from p2pnet.dht import snapshot
from p2pnet.dht.keyspace import key_of_cid, name_key
from p2pnet.gossip import known

SAVED_S = 100.0  # files are written every half minute, or once all is quiet


def test_after_a_power_cut_nodes_meet_without_a_bootstrap_peer_and_know_what_they_held(
    tmp_path: Path, figure: Figure
) -> None:
    with Swarm(tmp_path) as swarm:
        bootstrap, *others = swarm.grow(3)
        placed = others[0].client.submit({**DIGITS, "name": "cut"}).locate()
        keys = [key_of_cid(row["cid"]) for row in placed]
        submitted = time.monotonic()
        for node in others:
            until(lambda node=node: is_saved(node, others, keys), SAVED_S, "all is on disk")
        figure(f"{time.monotonic() - submitted:.1f} s until what was submitted was on disk")
        dead_addr = bootstrap.addr
        for node in swarm.nodes:
            node.kill()
            node.end()
        shutil.rmtree(bootstrap.data_dir)

        began = time.monotonic()
        launched = [
            swarm.launch(
                node.data_dir,
                *("--listen", node.addr.rpartition("/p2p/")[0], "--bootstrap", dead_addr),
            )
            for node in others
        ]
        back = [swarm.up(*started) for started in launched]
        assert [node.peer_id for node in back] == [node.peer_id for node in others]
        swarm.wait_until_all_see_all()
        figure(f"two of three nodes met again {time.monotonic() - began:.1f} s after a power cut")
        for node in back:
            asked = swarm.cli("whereis", "cut", "--json", node=node)
            assert asked.rc == 0, asked.err
            shown = [(row["vnode"], row["peer_id"]) for row in asked.json]
            assert shown == [(row["vnode"], row["peer_id"]) for row in placed]
            assert all(0 < row["expires_in_s"] < 60 for row in asked.json)


def is_saved(node: Node, others: list[Node], keys: list[bytes]) -> bool:
    """Whether a node has the records under these keys on disk, and the other nodes."""
    records, peers = node.data_dir / "records", node.data_dir / "peers"
    if not records.exists() or not peers.exists():
        return False
    parts = snapshot.parse(records.read_bytes(), wall_ms)
    held = [record.key for part in parts for record, _ in part.records]
    there = [peer.advert.peer_id for peer in known.parse(peers.read_bytes())[0]]
    return all(key in held for key in [*keys, name_key("cut")]) and all(
        other.peer_id in there for other in others if other is not node
    )
