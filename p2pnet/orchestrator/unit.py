"""What is placed as a whole, and what it needs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2pnet.orchestrator.costs import flops_of
from p2pnet.orchestrator.loads import Work
from p2pnet.vnode.graph import CompiledGraph, Node


@dataclass(frozen=True, slots=True)
class Unit:
    """What goes to one host as a whole: a VNode, or all of a group."""

    nodes: tuple[Node, ...]
    work: Work
    replicas: int


def units_of(graph: CompiledGraph, batch_size: int, replicas: Mapping[str, int]) -> Sequence[Unit]:
    """All of a network, by the first VNode of each in the graph's order."""
    together: dict[tuple[str, str], list[Node]] = {}
    for vnode in graph.vnodes():
        node = graph.node(vnode)
        together.setdefault(("group", node.group) if node.group else ("", vnode), []).append(node)
    return [
        Unit(
            tuple(nodes),
            Work(
                len(nodes),
                sum(graph.memory_bytes(node.id) for node in nodes),
                sum(flops_of(graph, node.id) for node in nodes) * batch_size,
            ),
            max(replicas.get(node.id, 0) for node in nodes),
        )
        for nodes in together.values()
    ]
