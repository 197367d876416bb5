"""Whole nodes that share a DHT with Go libp2p, and have nothing else to start from."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

from cluster.digits import DIGITS
from cluster.swarm import START_S, Node, Swarm, until
from p2pd import KAD, Daemon

from p2pnet.dht.keyspace import key_of_cid
from p2pnet.net.network import PeerInfo

CID_V1_RAW = b"\x01\x55"


def where(node: Node) -> PeerInfo:
    """A node, as Go names it."""
    return PeerInfo(node.peer_id, (node.addr.removesuffix(f"/p2p/{node.peer_id}"),))


def test_nodes_that_know_only_a_go_daemon_find_each_other_and_are_found(
    go: Daemon, second_go: Daemon, tmp_path: Path
) -> None:
    with Swarm(tmp_path) as swarm:
        options = ("--bootstrap", go.bootstrap, "--kad-protocol", KAD)
        nodes = [swarm.join(*options) for _ in range(3)]
        swarm.wait_until_all_see_all()
        second_go.connect(where(nodes[0]))  # it knows one of ours alone
        for node in nodes:
            for daemon in (go, second_go):
                find = partial(daemon.find_peer, node.peer_id)
                assert until(find, START_S, "the daemon finds the node") == where(node)

        nodes[0].client.submit(DIGITS)
        rows = swarm.cli("whereis", "digits", "--json", node=nodes[1]).json
        assert {row["vnode"] for row in rows} >= {"fc1", "out", "loss"}
        for row in rows:
            cid = CID_V1_RAW + key_of_cid(row["cid"])

            def hosts(cid: bytes = cid) -> list[str]:
                return [peer.peer_id for peer in second_go.providers(cid, 3)]

            found_by_go = until(hosts, START_S, "the daemon finds the VNode's host")
            assert found_by_go == [row["peer_id"]]

        # A node that comes later finds the members, and they live on without the daemon.
        nodes.append(swarm.join(*options))
        swarm.wait_until_all_see_all()
        nodes[3].kill(signal.SIGKILL)
        swarm.wait_until_all_see_all()
        for node in nodes[:3]:
            assert node.process.err == ""
