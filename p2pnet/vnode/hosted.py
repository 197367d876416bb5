"""The components of a network on this host, stage by stage: numpy in, numpy out.

All of `do_...` run in the compute thread, which alone imports torch. Whatever VNodes
are together in a stage, each computes what it would compute alone, to the bit: its own
forward, its own backward, and the gradients of one output summed from the last consumer
to the first, as torch's engine does it. Gradients are held until the step is applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pnet.errors import LocalError, MalformedError, UsageError
from p2pnet.vnode.codecs import LOSSY, through
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.messages import Metrics
from p2pnet.vnode.stages import Stage, stages_of
from p2pnet.vnode.state import decode_state, encode_state
from p2pnet.vnode.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor

    from p2pnet.vnode.components import Component
    from p2pnet.vnode.modules import Cache

GRADIENT, BUFFER = "gradient.", "buffer."  # what a standby is sent, by kind and torch's name


@dataclass(frozen=True, slots=True)
class _Op:
    """A node of a stage, and where its inputs come from."""

    node: str
    vnode: str  # whose component computes it
    entry: int  # by which entry of that
    sources: tuple[str, ...]  # by slot
    inner: tuple[bool, ...]  # by slot: from a node of the same stage
    wants_gradient: tuple[bool, ...]  # by slot
    position: int  # in the graph
    codec: str  # lossy, or ""
    is_loss: bool  # its backward begins with it
    is_graphs_loss: bool  # and its metrics are the network's


@dataclass(slots=True)
class _Held:
    """The gradients of a VNode's parameters for one step, summed in order of micro-batches.

    With several entries (tied weights) those of one micro-batch are summed first, the last
    entry in the graph first, as torch's engine does it.
    """

    entries: int
    total: list[Tensor] | None = None
    folded: int = 0  # micro-batches in `total`
    own: list[bool] = field(default_factory=list)  # by tensor of `total`: may be written to
    waiting: dict[int, dict[int, list[Tensor]]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, micro_batch: int, entry: int, gradients: list[Tensor], others: Sequence[Tensor]
    ) -> None:
        """`others` are tensors whose memory a gradient might be: they are not written to."""
        if not self.own:
            taken = {_memory(tensor) for tensor in others}
            for gradient in gradients:
                self.own.append(_memory(gradient) not in taken)
                taken.add(_memory(gradient))
        self.waiting.setdefault(micro_batch, {})[entry] = gradients
        while len(parts := self.waiting.get(self.folded, {})) == self.entries:
            del self.waiting[self.folded]
            self.folded += 1
            for place, entry in enumerate(sorted(parts, reverse=True)):
                part = parts[entry]
                if place == 0:
                    whole = part
                else:
                    whole = [one + other for one, other in zip(whole, part, strict=True)]
            if self.total is None:
                self.total = whole
            else:
                # In place where it may be: fresh memory costs more than the sum.
                for place, (one, other) in enumerate(zip(self.total, whole, strict=True)):
                    self.total[place] = one.add_(other) if self.own[place] else one + other
                self.own = [True] * len(self.own)


class Hosted:
    """The VNodes of one network on this host, under one epoch. Lives in the compute thread.

    Made empty: components come with `do_make` or from another epoch's with `do_adopt`.
    """

    def __init__(self, graph: CompiledGraph, vnodes: Sequence[str], device: str = "cpu") -> None:
        self.graph = graph
        self.vnodes = tuple(vnode for vnode in graph.vnodes() if vnode in vnodes)
        self.stages = stages_of(graph, self.vnodes)
        self.step = 0  # of the states
        self._device = device
        self._spoilt = False  # a step was applied in part, and then something failed
        self._components: dict[str, Component] = {}
        self._held: dict[int, dict[str, _Held]] = {}
        self._weights: dict[tuple[int, int, int], float] = {}  # of micro-batches under way
        order = {node.id: position for position, node in enumerate((*graph.nodes, graph.loss))}
        self._position = order
        self._ops = tuple(
            tuple(self._op(node, stage) for node in stage.nodes) for stage in self.stages
        )
        self._op_of = {op.node: op for ops in self._ops for op in ops}

    def _op(self, node_id: str, stage: Stage) -> _Op:
        graph = self.graph
        node, home = graph.node(node_id), graph.home(node_id)
        codec = node.codec or graph.codec
        slots = range(len(node.inputs))
        return _Op(
            node=node_id,
            vnode=home,
            entry=graph.entries(home).index(node_id),
            sources=node.inputs,
            inner=tuple(ref in stage.nodes for ref in node.inputs),
            wants_gradient=tuple(graph.gradient_flows(node_id, slot) for slot in slots),
            position=self._position[node_id],
            codec=codec if codec in LOSSY else "",
            is_loss=TARGET in node.inputs,
            is_graphs_loss=node_id == graph.loss.id,
        )

    # Components and their states

    def do_make(self, vnode: str, state: bytes | None) -> int:
        """Makes a component, from a state or from the seed; returns the state's step.

        Raises:
            MalformedError: no state, or not of this component.
            SpecError, ResourceError: the component cannot be made.
        """
        component = make_component(self.graph, vnode, self._device)
        step = 0
        if state is not None:
            tensors, step = decode_state(state)
            component.load(tensors, step)
        self._components[vnode] = component
        self.step = step
        return step

    def do_adopt(self, vnode: str, component: Component, step: int) -> None:
        """Goes on with a component that has the state after `step`."""
        component.forget()
        self._components[vnode] = component
        self.step = step

    def do_give(self, vnode: str, step: int, norm: float) -> Component:
        """The component with the state after `step`, which is decided; it is not ours any more.

        Raises:
            LocalError: that state is not to be had.
        """
        component = None if self._spoilt else self._components.get(vnode)
        held = self._held.get(step, {}).get(vnode)
        if component is not None and self.step == step - 1 and self._complete(component, held):
            self._apply_one(vnode, step, norm)
        elif component is None or self.step != step:
            raise LocalError(f"{vnode} cannot go on from step {step}, it is at {self.step} here")
        return self._components.pop(vnode)

    def do_take_out(self, vnode: str) -> Component:
        """The component as it is; it is not ours any more."""
        return self._components.pop(vnode)

    def do_follow(self, vnode: str, data: bytes, norm: float) -> None:
        """One step of a VNode with what it applies itself on another host, as `do_pack` gives it.

        Raises:
            MalformedError: not of this component.
        """
        component = self._components[vnode]
        gradients, buffers = _unpack(component, data)
        component.apply(gradients, norm=norm, clip_norm=self.graph.clip_norm, buffers=buffers)

    def do_save(self, step: int) -> dict[str, bytes]:
        """The states after `step`, by VNode, safetensors; raises LocalError if at another step."""
        if step != self.step:
            raise LocalError(f"{self.graph.name} is at step {self.step} here, not {step}")
        return {
            vnode: encode_state(component.state(), step)
            for vnode, component in sorted(self._components.items())
        }

    # Steps

    def do_forward(
        self,
        stage: int,
        step: int,
        micro_batch: int,
        inputs: Sequence[Array],
        batch_samples: int,
    ) -> tuple[tuple[Array, ...], Metrics | None]:
        """The outputs of a stage, one an output edge, and the loss's metrics.

        `inputs` are one an input edge. What a backward needs is kept.

        Raises:
            MalformedError: inputs that a component cannot take, or a result that is no number.
            ResourceError: not enough memory.
        """
        shape = self.stages[stage]
        outside = self._outside(shape, inputs, step)
        last = micro_batch == self.graph.micro_batches - 1
        values: dict[str, Tensor] = {}
        metrics: Metrics | None = None
        for op in self._ops[stage]:
            component = self._components[op.vnode]
            tensors = _inputs(op, outside, values)
            draw = self._draw(component, op, step, micro_batch)
            key = (step, micro_batch, op.node)
            output, said = component.forward(
                key, tensors, op.wants_gradient, entry=op.entry, draw=draw
            )
            if op.is_graphs_loss:
                metrics = said
            values[op.node] = _seen(output, op.codec, op.node, step)
            if last and (buffers := component.held_buffers()):
                self._holding(step, op.vnode).buffers = buffers
        self._check_numbers(shape, values, step)
        # Of a batch in parts, the gradient of a loss is that part's share of the mean.
        samples = len(inputs[0])
        if samples > batch_samples:
            raise MalformedError(
                f"a micro-batch of {samples} samples in a batch of {batch_samples}"
            )
        self._weights[stage, step, micro_batch] = samples / batch_samples
        return tuple(_array(values[edge.node]) for edge in shape.outputs), metrics

    def do_backward(
        self, stage: int, step: int, micro_batch: int, gradients: Sequence[Array]
    ) -> tuple[Array, ...]:
        """The gradients of a stage's inputs, one an input edge that wants one.

        `gradients` are one an output edge that brings one. Those of parameters are held.

        Raises:
            MalformedError: gradients of another shape than the output, or that are no numbers.
        """
        shape = self.stages[stage]
        weight = self._weights.pop((stage, step, micro_batch))
        arrived: dict[str, list[tuple[int, int, Tensor]]] = {}
        bringing = [edge for edge in shape.outputs if edge.brings_gradient]
        for out, array in zip(bringing, gradients, strict=True):
            place = (-self._position[out.consumer], out.slot, _tensor(array))
            arrived.setdefault(out.node, []).append(place)
        leaving: dict[tuple[str, int], Tensor] = {}
        for op in reversed(self._ops[stage]):
            component = self._components[op.vnode]
            key = (step, micro_batch, op.node)
            parts = sorted(arrived.pop(op.node, []), key=lambda part: part[:2])
            if not parts and not op.is_loss:
                component.discard(key)  # in `local`, what only other blocks take
                continue
            gradients_in = [part[2] for part in parts]
            found, params = component.backward(key, gradients_in, weight)
            for slot, gradient in enumerate(found):
                if gradient is None:
                    continue
                source = op.sources[slot]
                codec = self.graph.codec_of(source)
                seen = _seen(gradient, codec if codec in LOSSY else "", op.node, step)
                if op.inner[slot]:
                    arrived.setdefault(source, []).append((-op.position, slot, seen))
                else:
                    leaving[op.node, slot] = seen
            if params:
                held = self._holding(step, op.vnode)
                others = [*gradients_in, *(tensor for tensor in found if tensor is not None)]
                held.add(micro_batch, op.entry, params, others)
                if held.folded == self.graph.micro_batches:
                    self._check_held(component, held, step)
        wanted = [edge for edge in shape.inputs if edge.wants_gradient]
        for edge in wanted:
            if not _finite(leaving[edge.node, edge.slot]):
                raise MalformedError(_no_number(f"the gradient of {edge.node}", step))
        return tuple(_array(leaving[edge.node, edge.slot]) for edge in wanted)

    def do_squares(self, step: int) -> list[float]:
        """The squared norms of all gradients held for a step: what the global norm is made of."""
        from p2pnet.vnode.components import gradient_squares

        held = self._held.get(step, {})
        totals = [held[vnode].total for vnode in self.vnodes if vnode in held]
        return [square for total in totals if total for square in gradient_squares(total)]

    def do_pack(self, vnode: str, step: int) -> bytes:
        """What is held of a VNode for a step, for its standby: safetensors."""
        held = self._held.get(step, {}).get(vnode) or _Held(1)
        names = self._components[vnode].params
        tensors = {
            GRADIENT + name: _array(gradient)
            for name, gradient in zip(names, held.total or [], strict=False)
        }
        tensors |= {BUFFER + name: _array(buffer) for name, buffer in held.buffers.items()}
        return encode_state(tensors, step)

    def do_apply(self, step: int, norm: float) -> None:
        """The states after `step`, from what is held; `norm`: of all gradients of the network.

        Raises:
            LocalError: what is held is not of the step after the states'.
        """
        if step != self.step + 1:
            raise LocalError(
                f"{self.graph.name} has the states of step {self.step} here: no {step}"
            )
        for vnode in self.vnodes:
            held = self._held.get(step, {}).get(vnode)
            if not self._complete(self._components[vnode], held):
                raise LocalError(f"{vnode} holds no gradients for step {step}")
        self._spoilt = True  # some may have it, and others not
        for vnode in self.vnodes:
            self._apply_one(vnode, step, norm)
        self._spoilt = False
        self._held.pop(step, None)
        self.step = step

    def _apply_one(self, vnode: str, step: int, norm: float) -> None:
        held = self._held.get(step, {}).get(vnode) or _Held(1)
        self._components[vnode].apply(
            held.total or [], norm=norm, clip_norm=self.graph.clip_norm, buffers=held.buffers
        )

    # Inference

    def do_infer(
        self,
        nodes: Sequence[str],
        inputs: Mapping[tuple[str, int], Array],
        outputs: Sequence[str],
        caches: Mapping[str, Cache] | None = None,
    ) -> list[Array]:
        """What `outputs` give, of nodes in topological order, and nothing is kept of it.

        `inputs` are by node and slot, where they come from outside of `nodes`. `caches` are
        those of a session, by node.

        Raises:
            MalformedError: inputs that a component cannot take, or a result that is no number.
        """
        outside = {place: _tensor(array) for place, array in inputs.items()}
        values: dict[str, Tensor] = {}
        for node in nodes:
            op = self._op_of[node]
            tensors = [
                outside[node, slot] if (node, slot) in outside else values[source]
                for slot, source in enumerate(op.sources)
            ]
            cache = None if caches is None else caches.get(node)
            found = self._components[op.vnode].infer(tensors, entry=op.entry, cache=cache)
            values[node] = _seen(found, op.codec, node)
        if not all(_finite(values[node]) for node in outputs):
            culprit = next(node for node in nodes if not _finite(values[node]))
            raise MalformedError(f"{culprit} gives NaN or infinity")
        return [_array(values[node]) for node in outputs]

    def do_cache(self, nodes: Sequence[str]) -> dict[str, Cache]:
        """Empty caches for a session, for those nodes that need one."""
        made = {node: self._components[self._op_of[node].vnode].new_cache() for node in nodes}
        return {node: cache for node, cache in made.items() if cache is not None}

    # Small things

    def _holding(self, step: int, vnode: str) -> _Held:
        entries = len(self.graph.entries(vnode))
        return self._held.setdefault(step, {}).setdefault(vnode, _Held(entries))

    def _complete(self, component: Component, held: _Held | None) -> bool:
        if not component.params:
            return True
        return held is not None and held.folded == self.graph.micro_batches

    def _draw(self, component: Component, op: _Op, step: int, micro_batch: int) -> int:
        from p2pnet.vnode.components import draw_seed

        if not component.draws:
            return 0
        return draw_seed(self.graph.seed, op.node, step, micro_batch)

    def _outside(
        self, stage: Stage, inputs: Sequence[Array], step: int
    ) -> dict[tuple[str, int], Tensor]:
        found: dict[tuple[str, int], Tensor] = {}
        for edge, array in zip(stage.inputs, inputs, strict=True):
            if len(array) != len(inputs[0]):
                raise MalformedError(
                    f"{edge.node} got {len(array)} samples of {edge.source} in step {step}, "
                    f"and {len(inputs[0])} of {stage.inputs[0].source}"
                )
            tensor = found[edge.node, edge.slot] = _tensor(array)
            if not _finite(tensor):
                raise MalformedError(_no_number(f"the input {edge.source} of {edge.node}", step))
        return found

    def _check_held(self, component: Component, held: _Held, step: int) -> None:
        """All that is sent may be finite, and a weight's gradient still overflow."""
        for name, gradient in zip(component.params, held.total or (), strict=True):
            if not _finite(gradient):
                what = f"the gradient of {component.vnode}'s {name}"
                raise MalformedError(_no_number(what, step))

    def _check_numbers(self, stage: Stage, values: Mapping[str, Tensor], step: int) -> None:
        """Names the first VNode whose output has NaN or infinity, if what leaves has."""
        ends = [edge.node for edge in stage.outputs] + [stage.nodes[-1]]
        if all(_finite(values[node]) for node in dict.fromkeys(ends)):
            return
        culprit = next(node for node in stage.nodes if not _finite(values[node]))
        raise MalformedError(_no_number(culprit, step))


def make_component(graph: CompiledGraph, vnode: str, device: str = "cpu") -> Component:
    """A VNode's component as it is made from the seed; raises SpecError, ResourceError."""
    from p2pnet.vnode.components import Component

    node = graph.node(vnode)
    return Component(
        vnode,
        node.type,
        node.config,
        seed=graph.seed,
        optimizer=graph.optimizer.type,
        optimizer_config=graph.optimizer.config,
        device=device,
        stash=graph.staleness > 0,
    )


def _inputs(
    op: _Op, outside: Mapping[tuple[str, int], Tensor], values: Mapping[str, Tensor]
) -> list[Tensor]:
    return [
        values[source] if inner else outside[op.node, slot]
        for slot, (source, inner) in enumerate(zip(op.sources, op.inner, strict=True))
    ]


def _seen(tensor: Tensor, codec: str, node: str, step: int = 0) -> Tensor:
    """As whoever takes it sees it, on this host as on any other.

    Raises:
        MalformedError: it has what a lossy codec cannot carry.
    """
    if not codec:
        return tensor
    try:
        return _tensor(through(_array(tensor), codec))
    except UsageError as error:
        where = f" in step {step}" if step else ""
        raise MalformedError(f"{node}{where}: {error}") from None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _finite(tensor: Tensor) -> bool:
    import torch

    if not tensor.is_floating_point():
        return True
    # The sum costs a fraction of looking at each: only if it says so is there a closer look.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _no_number(what: str, step: int) -> str:
    return f"{what} has NaN or infinity in step {step}"


def _tensor(array: Array) -> Tensor:
    import torch

    # torch has no read-only tensors; what came in several parts is writable
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().numpy()
    return array


def _unpack(component: Component, data: bytes) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients, in the component's order, and the buffers that `do_pack` has packed.

    Raises:
        MalformedError: not of this component.
    """
    tensors, _ = decode_state(data)
    params = component.params
    names = [GRADIENT + name for name in params] if params else []
    held = [name for name in tensors if name.startswith(GRADIENT)]
    if sorted(names) != sorted(held):
        raise MalformedError("what is to be followed has other gradients than the VNode")
    for name, param in params.items():
        if tensors[GRADIENT + name].shape != tuple(param.shape):
            raise MalformedError(f"the gradient of {name} has another shape than the parameter")
    buffers = {
        name.removeprefix(BUFFER): _tensor(array)
        for name, array in tensors.items()
        if name.startswith(BUFFER)
    }
    return [_tensor(tensors[name]) for name in names], buffers
