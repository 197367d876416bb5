"""A network's components driven by hand in one process: what hosts do together, without them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from p2pnet.vnode.components import Component, draw_seed, gradient_squares
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.state import decode_state, weights_of
from p2pnet.vnode.tensors import Array


class ByHand:
    """All VNodes of a graph; `states` are their first ones."""

    def __init__(self, graph: CompiledGraph, states: Mapping[str, bytes] | None = None) -> None:
        self.graph = graph
        self.parts = {vnode: self._component(vnode) for vnode in graph.vnodes()}
        for vnode, data in (states or {}).items():
            self.parts[vnode].load(*decode_state(data))
        self.step = 0
        self.crossed = 0  # gradients that went from block to block

    def _component(self, vnode: str) -> Component:
        node, optimizer = self.graph.node(vnode), self.graph.optimizer
        return Component(
            vnode,
            node.type,
            node.config,
            seed=self.graph.seed,
            optimizer=optimizer.type,
            optimizer_config=optimizer.config,
        )

    def infer(self, *inputs: Array) -> Tensor:
        values = dict(zip(self.graph.inputs, map(torch.from_numpy, inputs), strict=True))
        for node in self.graph.nodes:
            if not self.graph.takes_target(node.id):
                home, entry = self._home(node.id)
                values[node.id] = home.infer([values[ref] for ref in node.inputs], entry=entry)
        return values[self.graph.output]

    def train(self, x: Array, y: Array) -> float:
        """One step with a batch; the mean loss."""
        self.step += 1
        graph, loss = self.graph, 0.0
        held: dict[str, list[Tensor]] = {}
        pieces = zip(
            np.array_split(x, graph.micro_batches),
            np.array_split(y, graph.micro_batches),
            strict=True,
        )
        for number, (part_x, part_y) in enumerate(pieces):
            weight = len(part_x) / len(x)
            value, gradients = self._micro_batch(number, part_x, part_y, weight)
            loss += value * weight
            for vnode, found in gradients.items():
                before = held.get(vnode)
                pairs = zip(before, found, strict=True) if before else ()
                held[vnode] = [one + other for one, other in pairs] if before else found
        squares = [square for found in held.values() for square in gradient_squares(found)]
        for vnode, part in self.parts.items():
            part.apply(held.get(vnode, []), norm=sum(squares) ** 0.5, clip_norm=graph.clip_norm)
        return loss

    def _micro_batch(
        self, number: int, x: Array, y: Array, weight: float
    ) -> tuple[float, dict[str, list[Tensor]]]:
        graph, nodes = self.graph, (*self.graph.nodes, self.graph.loss)
        values = {next(iter(graph.inputs)): torch.from_numpy(x), TARGET: torch.from_numpy(y)}
        said = None
        for node in nodes:
            home, entry = self._home(node.id)
            draw = draw_seed(graph.seed, node.id, self.step, number)
            flows = [graph.gradient_flows(node.id, slot) for slot in range(len(node.inputs))]
            given = [values[ref] for ref in node.inputs]
            values[node.id], metrics = home.forward(
                (node.id, number), given, flows, entry=entry, draw=draw
            )
            said = metrics if node.id == graph.loss.id else said
        sent: dict[tuple[str, int], Tensor] = {}
        held: dict[str, list[Tensor]] = {}
        for node in reversed(nodes):
            ends = reversed(graph.consumers(node.id))  # slots of one consumer ascending:
            order = sorted(ends, key=lambda end: (-self._place(end[0]), end[1]))
            arrived = [sent[end] for end in order if end in sent]
            home, _ = self._home(node.id)
            if not arrived and not graph.takes_target(node.id):
                home.discard((node.id, number))
                continue
            inputs, params = home.backward((node.id, number), arrived, weight)
            for slot, gradient in enumerate(inputs):
                if gradient is not None:
                    sent[node.id, slot] = gradient
                    self.crossed += graph.block(node.id) != graph.block(node.inputs[slot])
            vnode = graph.home(node.id)
            before = held.get(vnode)  # of a tied weight's other entry
            pairs = zip(before, params, strict=True) if before else ()
            held[vnode] = [one + other for one, other in pairs] if before else params
        assert said is not None
        return said.loss, held

    def _home(self, node: str) -> tuple[Component, int]:
        vnode = self.graph.home(node)
        return self.parts[vnode], self.graph.entries(vnode).index(node)

    def _place(self, node: str) -> int:
        ids = [one.id for one in self.graph.nodes]
        return ids.index(node) if node in ids else len(ids)

    def weights(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for vnode, part in self.parts.items():
            found |= weights_of(vnode, part.state())
        return found
