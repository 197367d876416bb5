"""What simulated VNodes compute: a tensor is a hash of all that it was made from. Pure.

So a state after step n tells whether every step before was applied once, in order, and
with the right batch; `Golden` computes the same in a row, undisturbed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from p2pnet.keys import sha256
from p2pnet.vnode.edges import wiring_of
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.messages import Metrics, Wiring

SAMPLES = 4


def batch_of(name: str, step: int) -> bytes:
    """A network input of a step; the batches are the same in every run."""
    return _hash(b"batch", name.encode(), b"%d" % step)


def initial(seed: int, vnode: str) -> bytes:
    """A VNode's first state."""
    return _hash(b"init", b"%d" % seed, vnode.encode())


class Component:
    """One VNode's state and its gradients of the step under way."""

    def __init__(self, wiring: Wiring, state: bytes) -> None:
        self.state = state
        self._wiring = wiring
        self._taken: list[bytes] = []

    def forward(
        self, step: int, micro_batch: int, inputs: Sequence[bytes]
    ) -> tuple[bytes, Metrics | None]:
        """The output, and of a loss the metrics."""
        taken = _hash(b"%d %d" % (step, micro_batch), *inputs)
        self._taken.append(taken)
        output = _hash(b"forward", self.state, taken)
        if not self._wiring.is_loss:
            return output, None
        return output, Metrics(int.from_bytes(output[:6], "big") / 2**48, output[6] % 5, SAMPLES)

    def backward(
        self, step: int, micro_batch: int, gradients: Sequence[bytes]
    ) -> tuple[bytes, ...]:
        """A gradient for each input; its own is held."""
        taken = _hash(b"%d %d" % (step, micro_batch), *gradients)
        self._taken.append(taken)
        return tuple(
            _hash(b"backward", self.state, *self._taken, b"%d" % slot)
            for slot in range(len(self._wiring.inputs))
        )

    def apply(self, step: int) -> None:
        """The held gradients change the state."""
        self.state = _hash(b"apply", self.state, b"%d" % step, *self._taken)
        self._taken.clear()


class Golden:
    """The undisturbed run of a network, as far as it was asked for."""

    def __init__(self, graph: CompiledGraph) -> None:
        self._graph = graph
        self._wirings = [wiring_of(graph, vnode) for vnode in graph.vnodes()]
        self._parts = {
            wiring.vnode: Component(wiring, initial(graph.seed, wiring.vnode))
            for wiring in self._wirings
        }
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
        step = len(self._states)
        for micro_batch in range(self._graph.micro_batches):
            self._micro_batch(step, micro_batch)
        for part in self._parts.values():
            part.apply(step)
        self._states.append(self._digests())

    def _micro_batch(self, step: int, micro_batch: int) -> None:
        outputs: dict[str, bytes] = {}
        for wiring in self._wirings:
            inputs = [
                batch_of(slot.source, step) if slot.is_network_input else outputs[slot.source]
                for slot in wiring.inputs
            ]
            outputs[wiring.vnode], metrics = self._parts[wiring.vnode].forward(
                step, micro_batch, inputs
            )
            if metrics is not None:
                self._losses.append(metrics.loss)
        gradients: dict[tuple[str, int], bytes] = {}
        for wiring in reversed(self._wirings):
            given = [gradients[to.vnode, to.slot] for to in wiring.consumers]
            back = self._parts[wiring.vnode].backward(step, micro_batch, given)
            gradients.update({(wiring.vnode, slot): grad for slot, grad in enumerate(back)})

    def _digests(self) -> Mapping[str, bytes]:
        return {vnode: sha256(part.state) for vnode, part in self._parts.items()}


def _hash(*parts: bytes) -> bytes:
    return sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts))
