"""What a host computes in one go: never something that waits for what depends on it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from p2pnet.vnode.compiling import compile_graph
from p2pnet.vnode.draft import Draft, TensorSpec
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.stages import InputEdge, OutputEdge, Stage, inference_stages_of, stages_of

LINEAR = {"in_features": 4, "out_features": 4}


def graph_of(nodes: dict[str, list[str]]) -> CompiledGraph:
    drafts = [
        Draft(node, "Add", {}, tuple(refs))
        if len(refs) > 1
        else Draft(node, "Linear", LINEAR, tuple(refs))
        for node, refs in nodes.items()
    ]
    return compile_graph(
        name="net",
        inputs={"x": TensorSpec((4,))},
        nodes=drafts,
        loss=Draft("loss", "MSELoss", {}, (list(nodes)[-1],)),
        optimizer="SGD",
        optimizer_config={},
    )


RESIDUAL = graph_of({"a": ["x"], "b": ["a"], "c": ["b"], "sum": ["a", "c"], "out": ["sum"]})


def nodes_of(stages: tuple[Stage, ...]) -> list[tuple[str, ...]]:
    return [stage.nodes for stage in stages]


def test_what_is_all_on_one_host_is_one_stage() -> None:
    [stage] = stages_of(RESIDUAL, RESIDUAL.vnodes())
    assert stage.nodes == ("a", "b", "c", "sum", "out", "loss")
    assert stage.inputs == (InputEdge("a", 0, "x", False), InputEdge("loss", 1, "y", False))
    assert stage.outputs == ()
    assert stage.learns
    assert stage.weighs


def test_a_residual_block_is_split_where_something_has_to_be_waited_for() -> None:
    first, second = stages_of(RESIDUAL, ["a", "b", "sum"])
    assert (first.nodes, second.nodes) == (("a", "b"), ("sum",))
    assert first.outputs == (OutputEdge("a", "sum", 0, True), OutputEdge("b", "c", 0, True))
    assert second.inputs == (InputEdge("sum", 0, "a", True), InputEdge("sum", 1, "c", True))
    assert nodes_of(stages_of(RESIDUAL, ["c", "out", "loss"])) == [("c",), ("out", "loss")]


def test_two_hosts_do_not_wait_for_each_other() -> None:
    """Convex sets would: a1 -> b1 and b2 -> a2."""
    graph = graph_of({"a1": ["x"], "b2": ["x"], "b1": ["a1"], "a2": ["b2"], "end": ["b1", "a2"]})
    assert nodes_of(stages_of(graph, ["a1", "a2"])) == [("a1",), ("a2",)]
    assert nodes_of(stages_of(graph, ["b1", "b2"])) == [("b2",), ("b1",)]


def test_forward_passes_leave_the_loss_out() -> None:
    [stage] = inference_stages_of(RESIDUAL, RESIDUAL.vnodes())
    assert stage.nodes == ("a", "b", "c", "sum", "out")
    assert stage.inputs == (InputEdge("a", 0, "x", False),)
    assert stage.outputs == ()
    assert inference_stages_of(RESIDUAL, ["loss"]) == ()


@pytest.mark.parametrize("seed", range(40))
def test_any_graph_on_any_hosts_gets_through(seed: int) -> None:
    """Stages form no ring: with all inputs there at once, each can be run, forward and back."""
    rng = random.Random(seed)
    nodes: dict[str, list[str]] = {}
    for index in range(rng.randint(3, 14)):
        names = ["x", *nodes]
        count = rng.choice((1, 1, 2, 3))
        nodes[f"n{index}"] = [rng.choice(names[-5:]) for _ in range(count)]
    ends = [node for node in nodes if not any(node in refs for refs in nodes.values())]
    nodes["end"] = [*ends, ends[0]]
    graph = graph_of(nodes)
    hosts = [[] for _ in range(rng.randint(1, 4))]
    for vnode in graph.vnodes():
        rng.choice(hosts).append(vnode)
    stages = [stage for host in hosts for stage in stages_of(graph, host)]
    assert sorted(n for stage in stages for n in stage.nodes) == sorted([*nodes, "loss"])

    done: set[str] = set()
    waiting = list(stages)
    order = []
    while waiting:
        ready = [s for s in waiting if all(e.source in {"x", "y", *done} for e in s.inputs)]
        assert ready, "stages wait for each other"
        for stage in ready:
            waiting.remove(stage)
            order.append(stage)
            done.update(stage.nodes)
    back: set[str] = set()
    for stage in reversed(order):
        assert all(edge.consumer in back for edge in stage.outputs)
        back.update(stage.nodes)
    for stage in stages:
        assert all(
            one < other for one, other in pairwise(map(list(graph_order(graph)).index, stage.nodes))
        )


def graph_order(graph: CompiledGraph) -> list[str]:
    return [*(node.id for node in graph.nodes), graph.loss.id]
