"""A foretold step: the longest way through the graph, and what of it takes longest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pnet.gossip.coordinates import Coordinate
from p2pnet.orchestrator.costs import (
    LINK_BYTES_PER_S,
    NEAR_NS,
    STEP_NS,
    Distances,
    HostView,
    edge_ns,
    hop_ns,
)
from p2pnet.orchestrator.predict import predict
from p2pnet.vnode.compiling import compile_graph
from p2pnet.vnode.draft import Draft, TensorSpec
from p2pnet.vnode.graph import CompiledGraph

STEP_S = STEP_NS / 1e9
EDGE_S = edge_ns(0, 4096) / 1e9  # to another host that is near, one sample


def at(x_s: float, height_s: float = 0.0) -> Coordinate:
    return Coordinate((x_s, 0.0, 0.0, 0.0), height_s, 0.1)


def host(name: str, **what: object) -> HostView:
    return replace(HostView(name, 2.0, 1 << 30, 1e6), **what)  # type: ignore[arg-type]


def diamond() -> CompiledGraph:
    """in -> left, right -> both -> loss; activations of 4 KiB a sample."""
    wide = {"in_features": 1024, "out_features": 1024}
    return compile_graph(
        name="diamond",
        inputs={"x": TensorSpec((1024,))},
        nodes=[
            Draft("in", "Linear", wide, ("x",)),
            Draft("left", "Linear", wide, ("in",)),
            Draft("right", "Linear", wide, ("in",)),
            Draft("both", "Add", {}, ("left", "right")),
        ],
        loss=Draft("loss", "MSELoss", {}, ("both",)),
        optimizer="SGD",
        optimizer_config={},
    )


GRAPH = diamond()
ALL_ON_A = dict.fromkeys(GRAPH.vnodes(), "a")


def test_one_host_does_one_thing_after_the_other() -> None:
    step = predict(GRAPH, [host("a")], ALL_ON_A, batch_size=1)
    assert step.step_s == pytest.approx(5 * STEP_S, rel=1e-3)
    assert step.path == ("in", "left", "right", "both", "loss")
    assert (step.slowest_host, step.slowest_edge) == ("a", None)
    assert step.busiest_s == pytest.approx(step.step_s)


def test_branches_on_two_hosts_go_on_at_once() -> None:
    where = {**ALL_ON_A, "right": "b"}
    step = predict(GRAPH, [host("a"), host("b")], where, batch_size=1)
    assert step.step_s == pytest.approx(4 * STEP_S + 2 * EDGE_S, rel=1e-3)


def test_a_way_takes_its_round_trip_and_its_bytes() -> None:
    hosts = [host("a", coordinate=at(0.0)), host("b", coordinate=at(0.08, 0.005))]
    step = predict(GRAPH, hosts, {**ALL_ON_A, "right": "b"}, batch_size=32)
    bytes_s = 2 * 32 * 4096 / LINK_BYTES_PER_S  # there, and the gradient back
    assert step.path == ("in", "right", "both", "loss")
    assert step.step_s == pytest.approx(4 * STEP_S + 2 * (0.08 + bytes_s), rel=0.01)
    assert step.slowest_edge is not None
    assert step.slowest_edge[:2] == ("in", "right")
    assert step.slowest_edge[2] == pytest.approx(0.08 + bytes_s, rel=0.01)


def test_a_slow_a_distrusted_and_a_busy_host_are_named() -> None:
    where = {**ALL_ON_A, "right": "b"}
    flops = GRAPH.node("right").flops_forward + GRAPH.node("right").flops_backward
    slow = predict(GRAPH, [host("a"), host("b", gflops=1.0)], where, batch_size=32)
    assert slow.slowest_host == "b"
    assert slow.slowest_host_s == pytest.approx(STEP_S + 32 * flops / 1e9)
    doubted = predict(GRAPH, [host("a"), host("b", trust=0.1)], where, batch_size=1)
    assert doubted.slowest_host_s == pytest.approx(10 * STEP_S, rel=1e-3)
    busy = predict(GRAPH, [host("a"), host("b", vnodes=9)], where, batch_size=1)
    assert (busy.slowest_host, busy.busiest_host) == ("b", "b")
    assert busy.step_s == pytest.approx(13 * STEP_S + 2 * EDGE_S, rel=1e-3)
    # What it hosts of this very network already is not somebody else's.
    ours = predict(
        GRAPH, [host("a"), host("b", vnodes=9)], where, batch_size=1,
        current=dict.fromkeys(["in", "left", "right"], "b"),
    )  # fmt: skip
    assert ours.step_s == pytest.approx(10 * STEP_S + 2 * EDGE_S, rel=1e-3)


def test_what_is_near_is_the_same_place() -> None:
    hosts = [host("a", coordinate=at(0.0)), host("b", coordinate=at(NEAR_NS / 1e9 * 0.9))]
    distances = Distances(hosts)
    assert not distances.matter
    assert distances.row(0) == [0, 0]
    assert hop_ns(0, 1 << 20) == 0


def test_distances_are_the_same_both_ways_and_whole() -> None:
    hosts = [host(f"p{n}", coordinate=at(n * 0.0237, 0.003) if n % 3 else None) for n in range(12)]
    distances = Distances(hosts)
    for one in range(12):
        row = distances.row(one)
        assert row[one] == 0
        for other in range(12):
            assert row[other] == distances.row(other)[one] == distances.between_ns(one, other)
            assert row[other] % NEAR_NS == 0
    assert distances.between_ns(0, 1) == distances.between_ns(3, 7) > 0  # 0 and 3 do not say
