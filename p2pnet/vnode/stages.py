"""What a host computes in one go: the stages of a network there. Pure.

A stage (pipeline parallelism's word) is a VNode and all the others on the same host that
can be computed as soon as it is, because everything they take comes from within the
stage or from outside the network. Within a stage nothing is sent, copied or waited for.

A stage waits for the inputs of its first VNode and for network inputs, never for what
depends on itself: so stages cannot wait for each other in a ring, whatever the placement,
forward or backward. (With several VNodes that wait, they could: a1 -> b1 and b2 -> a2,
with a1, a2 on one host and b1, b2 on another.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph


@dataclass(frozen=True, slots=True)
class InputEdge:
    """Where an input of a stage comes from: `source` is a VNode elsewhere, or a network input."""

    node: str  # whose input it is
    slot: int
    source: str
    wants_gradient: bool


@dataclass(frozen=True, slots=True)
class OutputEdge:
    """Who, outside of the stage, takes a node's output, and as which of its inputs."""

    node: str
    consumer: str
    slot: int
    brings_gradient: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """Nodes that one host computes in one go, in topological order.

    `learns`: whether there is anything to be done backward; `weighs`: a loss is among them,
    which weighs a micro-batch by its share of the samples.
    """

    nodes: tuple[str, ...]
    inputs: tuple[InputEdge, ...]
    outputs: tuple[OutputEdge, ...]
    learns: bool
    weighs: bool


def stages_of(graph: CompiledGraph, here: Collection[str]) -> tuple[Stage, ...]:
    """The stages of the VNodes `here`, by their first nodes in topological order."""
    hosted = dict.fromkeys(here)
    inner = dict.fromkeys((*(node.id for node in graph.nodes), graph.loss.id))
    members: list[list[str]] = []
    stage_of: dict[str, int] = {}
    for node in (*graph.nodes, graph.loss):
        if graph.home(node.id) not in hosted:
            continue
        sources = [ref for ref in node.inputs if ref in inner]
        found = {stage_of.get(ref, -1) for ref in sources}
        index = found.pop() if len(found) == 1 else -1
        if index < 0:
            index = len(members)
            members.append([])
        members[index].append(node.id)
        stage_of[node.id] = index
    return tuple(_stage(graph, tuple(nodes), inner) for nodes in members)


def _stage(graph: CompiledGraph, nodes: tuple[str, ...], inner: Collection[str]) -> Stage:
    own = dict.fromkeys(nodes)
    inputs = tuple(
        InputEdge(node, slot, ref, ref in inner and graph.gradient_flows(node, slot))
        for node in nodes
        for slot, ref in enumerate(graph.node(node).inputs)
        if ref not in own
    )
    outputs = tuple(
        OutputEdge(node, consumer, slot, graph.gradient_flows(consumer, slot))
        for node in nodes
        for consumer, slot in graph.consumers(node)
        if consumer not in own
    )
    weighs = any(TARGET in graph.node(node).inputs for node in nodes)
    learns = weighs or any(edge.brings_gradient for edge in outputs)
    return Stage(nodes, inputs, outputs, learns, weighs)


def inference_stages_of(graph: CompiledGraph, here: Collection[str]) -> tuple[Stage, ...]:
    """The same without losses and heads: what a forward pass without training goes through."""
    graded = {node.id for node in (*graph.nodes, graph.loss) if TARGET in node.inputs}
    stages = []
    for stage in stages_of(graph, here):
        nodes = tuple(node for node in stage.nodes if node not in graded)
        if nodes:
            inputs = tuple(edge for edge in stage.inputs if edge.node not in graded)
            outputs = tuple(edge for edge in stage.outputs if edge.consumer not in graded)
            stages.append(Stage(nodes, inputs, outputs, learns=False, weighs=False))
    return tuple(stages)
