"""What is printed of a network: where its VNodes and their standbys are, and how it is trained."""

from __future__ import annotations

import pytest
from small_network import small_graph

from p2pnet.client.describe import status_json
from p2pnet.errors import MalformedError
from p2pnet.v1 import orchestrator_pb2, pnode_pb2


def reply(graph: bytes) -> orchestrator_pb2.StatusReply:
    """fc1 lives on a and is followed on b, at another step."""
    return orchestrator_pb2.StatusReply(
        name="small",
        graph=graph,
        vnodes=[
            pnode_pb2.HostedVNode(vnode="fc1", step=4, instantiated=True),
            pnode_pb2.HostedVNode(vnode="fc1", step=3, instantiated=True, standby=True),
        ],
        locations=[
            pnode_pb2.Location(vnode="fc1", host="a", epoch=2),
            pnode_pb2.Location(vnode="fc1", host="b", epoch=2, standby=True),
            pnode_pb2.Location(vnode="act", host="b", epoch=2),
        ],
    )


def test_a_standby_is_no_vnode_of_its_own() -> None:
    shown = status_json(reply(small_graph(replicas=2).to_json()))
    assert shown["replicas"] == 2
    first, second = shown["vnodes"]
    assert (first["vnode"], first["peer_id"], first["standbys"]) == ("fc1", "a", ["b"])
    assert (first["step"], first["instantiated"]) == (4, True)
    assert (second["vnode"], second["standbys"], second["step"]) == ("act", [], 0)


def test_how_it_is_trained() -> None:
    graph = small_graph(micro_batches=3, staleness=2, clip_norm=0.5)
    shown = status_json(reply(graph.to_json()))
    keys = ("learning", "micro_batches", "staleness", "clip_norm", "replicas")
    assert [shown[key] for key in keys] == ["chain", 3, 2, 0.5, 1]


def test_an_orchestrator_that_gives_no_graph_is_wrong() -> None:
    with pytest.raises(MalformedError):
        status_json(reply(b"{}"))
