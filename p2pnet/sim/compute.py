"""What simulated VNodes compute: a tensor is a hash of all that it was made from. Pure.

So a state after step n tells whether every step before was applied once, in order, and
with the right batch; `Golden` computes the same in a row, undisturbed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from p2pnet.keys import sha256
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.messages import Metrics
from p2pnet.vnode.stages import stages_of

SAMPLES = 4  # of a micro-batch


def batch_of(name: str, step: int, micro_batch: int = 0) -> bytes:
    """A network input of a step; the batches are the same in every run."""
    return _hash(b"batch", name.encode(), b"%d %d" % (step, micro_batch))


def initial(seed: int, vnode: str) -> bytes:
    """A VNode's first state."""
    return _hash(b"init", b"%d" % seed, vnode.encode())


class Hosted:
    """VNodes of a network on one host, in stages, as `vnode.hosted.Hosted` has them in torch."""

    def __init__(self, graph: CompiledGraph, states: Mapping[str, bytes]) -> None:
        self.graph = graph
        self.states = dict(states)
        self.stages = stages_of(graph, tuple(states))
        self._position = {node.id: i for i, node in enumerate((*graph.nodes, graph.loss))}
        # Of each forward that waits for its backward: the state that it used, and its inputs.
        self._passes: dict[tuple[int, int, str], tuple[bytes, bytes]] = {}
        self._held: dict[int, dict[str, dict[tuple[int, str], bytes]]] = {}

    def forward(
        self, stage: int, step: int, micro_batch: int, inputs: Sequence[bytes]
    ) -> tuple[tuple[bytes, ...], Metrics | None]:
        """The outputs, one an output edge, and of a loss the metrics."""
        shape = self.stages[stage]
        outside = {(e.node, e.slot): x for e, x in zip(shape.inputs, inputs, strict=True)}
        values: dict[str, bytes] = {}
        metrics: Metrics | None = None
        for node in shape.nodes:
            refs = self.graph.node(node).inputs
            given = [outside.get((node, i)) or values[ref] for i, ref in enumerate(refs)]
            state = self.states[self.graph.home(node)]
            taken = _hash(node.encode(), b"%d %d" % (step, micro_batch), *given)
            self._passes[step, micro_batch, node] = (state, taken)
            output = values[node] = _hash(b"forward", state, taken)
            if node == self.graph.loss.id:
                loss = int.from_bytes(output[:6], "big") / 2**48
                metrics = Metrics(loss, output[6] % 5, SAMPLES)
        return tuple(values[edge.node] for edge in shape.outputs), metrics

    def backward(
        self, stage: int, step: int, micro_batch: int, gradients: Sequence[bytes]
    ) -> tuple[bytes, ...]:
        """A gradient for each input edge that wants one; the VNodes' own are held."""
        shape = self.stages[stage]
        arrived: dict[str, list[tuple[int, int, bytes]]] = {}
        bringing = [edge for edge in shape.outputs if edge.brings_gradient]
        for edge, gradient in zip(bringing, gradients, strict=True):
            place = (-self._position[edge.consumer], edge.slot, gradient)
            arrived.setdefault(edge.node, []).append(place)
        leaving: dict[tuple[str, int], bytes] = {}
        for node in reversed(shape.nodes):
            state, taken = self._passes.pop((step, micro_batch, node))
            parts = [part[2] for part in sorted(arrived.pop(node, []))]
            if not parts and TARGET not in self.graph.node(node).inputs:
                continue
            mine = _hash(b"backward", state, taken, *parts)
            home = self.graph.home(node)
            self._held.setdefault(step, {}).setdefault(home, {})[micro_batch, node] = mine
            for slot, ref in enumerate(self.graph.node(node).inputs):
                if self.graph.gradient_flows(node, slot):
                    gradient = _hash(mine, b"%d" % slot)
                    if ref in shape.nodes:
                        part = (-self._position[node], slot, gradient)
                        arrived.setdefault(ref, []).append(part)
                    else:
                        leaving[node, slot] = gradient
        wanted = [edge for edge in shape.inputs if edge.wants_gradient]
        return tuple(leaving[edge.node, edge.slot] for edge in wanted)

    def pack(self, vnode: str, step: int) -> bytes:
        """What a standby applies for the step."""
        held = self._held.get(step, {}).get(vnode, {})
        return _hash(*(held[key] for key in sorted(held)))

    def apply(self, step: int, norm: float = 0.0) -> None:
        """The held gradients change the states."""
        for vnode in self.states:
            self.follow(vnode, step, self.pack(vnode, step), norm)
        self._held.pop(step, None)

    def follow(self, vnode: str, step: int, packed: bytes, norm: float) -> None:
        """One VNode's step with what `pack` gave."""
        state = self.states[vnode]
        self.states[vnode] = _hash(b"apply", state, b"%d" % step, packed, repr(norm).encode())

    def complete(self, vnode: str, step: int) -> bool:
        """Whether all that the VNode applies for the step is held."""
        held = self._held.get(step, {}).get(vnode, {})
        return len(held) == self.graph.micro_batches * len(self.graph.entries(vnode))

    def squares(self, step: int) -> list[float]:
        """What the global norm of the gradients is made of."""
        held = self._held.get(step, {})
        return [int.from_bytes(self.pack(vnode, step)[:4], "big") / 2**32 for vnode in held]


class Golden:
    """The undisturbed run of a network, as far as it was asked for."""

    def __init__(self, graph: CompiledGraph) -> None:
        self._graph = graph
        self._hosted = Hosted(graph, {v: initial(graph.seed, v) for v in graph.vnodes()})
        self._states = [self._digests()]
        self._losses: list[float] = []

    def states(self, step: int) -> Mapping[str, bytes]:
        """The SHA-256 of every VNode's state after a step."""
        while len(self._states) <= step:
            self._step()
        return self._states[step]

    def loss(self, step: int) -> float:
        """Of a step, from 1."""
        self.states(step)
        return self._losses[step - 1]

    def _step(self) -> None:
        step, graph, hosted = len(self._states), self._graph, self._hosted
        losses = []
        for part in range(graph.micro_batches):
            # With every VNode on one host each stage has all its inputs from outside the
            # network or from stages before it.
            outputs: dict[tuple[str, int], bytes] = {}
            for index, stage in enumerate(hosted.stages):
                given = [
                    outputs.get((edge.node, edge.slot)) or batch_of(edge.source, step, part)
                    for edge in stage.inputs
                ]
                found, metrics = hosted.forward(index, step, part, given)
                for edge, output in zip(stage.outputs, found, strict=True):
                    outputs[edge.consumer, edge.slot] = output
                if metrics is not None:
                    losses.append(metrics.loss)
            gradients: dict[tuple[str, int], bytes] = {}
            for index in reversed(range(len(hosted.stages))):
                stage = hosted.stages[index]
                if not stage.learns:
                    continue
                edges = [edge for edge in stage.outputs if edge.brings_gradient]
                back = [gradients[edge.consumer, edge.slot] for edge in edges]
                found_back = hosted.backward(index, step, part, back)
                wanted = [edge for edge in stage.inputs if edge.wants_gradient]
                for wants, gradient in zip(wanted, found_back, strict=True):
                    gradients[wants.node, wants.slot] = gradient
        self._losses.append(sum(losses) / len(losses))
        norm = sum(hosted.squares(step)) if graph.clip_norm else 0.0
        hosted.apply(step, norm)
        self._states.append(self._digests())

    def _digests(self) -> Mapping[str, bytes]:
        return {vnode: sha256(state) for vnode, state in sorted(self._hosted.states.items())}


def _hash(*parts: bytes) -> bytes:
    return sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts))
