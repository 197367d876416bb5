"""The compiled graph of a network: all that a host or a later orchestrator needs. Without torch.

`compile_graph` turns what a spec says into shapes, bytes and FLOPs, or says what
does not fit. As JSON the graph is canonical, and `from_json` compiles it anew and
takes only the very bytes that this gives: a peer cannot lie about a derived number,
and one digest (the manifest's `spec_digest`) stands for one graph. A change to any
formula here therefore needs a new FORMAT_VERSION; a new key that is left out where
it says nothing (as a node's `group`) does not, as the graphs of before keep their bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from p2pnet.errors import MalformedError, SpecError
from p2pnet.keys import sha256
from p2pnet.vnode.catalogue import (
    DoesNotFit,
    Shape,
    find_component,
    find_loss,
    find_optimizer,
    show,
)
from p2pnet.vnode.config import Config, fill
from p2pnet.vnode.draft import (
    CUT_EVERY,
    DTYPE,
    DTYPE_BYTES,
    NODE_BYTES_MAX,
    TARGET,
    Draft,
    TensorSpec,
    check_names,
    check_settings,
    check_tensor,
    in_order,
)

FORMAT_VERSION = 1
JSON_BYTES_MAX = 4 << 20

# What a hosted VNode costs beside its tensors: its objects, queues and buffers.
VNODE_OVERHEAD_BYTES = 256 << 10

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Node:
    """A VNode, the loss included. Sizes in bytes; activations and FLOPs are for one sample."""

    id: str
    type: str
    config: Config  # every key, defaults filled in
    inputs: tuple[str, ...]  # by slot: ids of nodes or names of network inputs
    output: TensorSpec
    param_shapes: Mapping[str, Shape]  # by torch's names, in torch's order
    param_bytes: int
    state_bytes: int  # parameters, gradients and what the optimizer keeps
    activation_bytes: int  # inputs and output, each with its gradient
    flops_forward: int
    flops_backward: int
    group: str = ""  # all VNodes of one group live on one host

    def memory_bytes(self, batch_size: int) -> int:
        """What its host needs for it while it trains with batches of that size."""
        return self.state_bytes + self.activation_bytes * batch_size + VNODE_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One and the same for every VNode; each has its own state of it."""

    type: str
    config: Config


@dataclass(frozen=True)  # no slots: the cached properties live in __dict__
class CompiledGraph:
    """A network that fits together. `nodes` are in topological order and without the loss."""

    name: str
    inputs: Mapping[str, TensorSpec]
    nodes: tuple[Node, ...]
    loss: Node  # inputs: the output node's id and "y"
    target: TensorSpec  # "y"
    optimizer: Optimizer
    learning: str
    seed: int
    micro_batches: int
    cut_every: int  # steps
    format_version: int = FORMAT_VERSION

    @property
    def output(self) -> str:
        """The id of the node whose output is the network's."""
        return self.loss.inputs[0]

    def vnodes(self) -> tuple[str, ...]:
        """The ids of all that is hosted: every node in topological order, then the loss."""
        return (*(node.id for node in self.nodes), self.loss.id)

    def node(self, vnode: str) -> Node:
        """The node of that id, the loss included; KeyError if there is none."""
        return self._by_id[vnode]

    def consumers(self, ref: str) -> tuple[tuple[str, int], ...]:
        """Who takes the output of a node, a network input or "y": (vnode, slot), sorted."""
        return self._consumers.get(ref, ())

    def tensor(self, ref: str) -> TensorSpec:
        """What a node, a network input or "y" gives; KeyError if there is no such thing."""
        if ref in self._by_id:
            return self._by_id[ref].output
        return self.target if ref == TARGET else self.inputs[ref]

    def to_json(self) -> bytes:
        """The canonical form: sorted keys, no spaces, ASCII."""
        return self._json

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form: a manifest's `spec_digest`."""
        return sha256(self._json)

    @staticmethod
    def from_json(data: bytes) -> CompiledGraph:
        """As `from_json`."""
        return from_json(data)

    @cached_property
    def _by_id(self) -> dict[str, Node]:
        return {node.id: node for node in (*self.nodes, self.loss)}

    @cached_property
    def _consumers(self) -> dict[str, tuple[tuple[str, int], ...]]:
        edges: dict[str, list[tuple[str, int]]] = {}
        for node in (*self.nodes, self.loss):
            for slot, ref in enumerate(node.inputs):
                edges.setdefault(ref, []).append((node.id, slot))
        return {ref: tuple(sorted(ends)) for ref, ends in edges.items()}

    @cached_property
    def _json(self) -> bytes:
        # Mappings are plain dicts and tuples become lists.
        top = dataclasses.asdict(self)
        for node in (*top["nodes"], top["loss"]):
            if not node["group"]:
                del node["group"]
        return json.dumps(top, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def compile_graph(
    *,
    name: str,
    inputs: Mapping[str, TensorSpec],
    nodes: Sequence[Draft],
    loss: Draft,
    optimizer: str,
    optimizer_config: Mapping[str, object],
    learning: str = "chain",
    seed: int = 0,
    micro_batches: int = 1,
    cut_every: int = CUT_EVERY,
) -> CompiledGraph:
    """Checks that a network fits together and works out its shapes, bytes and FLOPs.

    The loss's draft names one input, the output node.

    Raises:
        SpecError: one sentence that names the node and what was expected of it.
    """
    check_settings(name, learning, seed, micro_batches, cut_every)
    check_names(inputs, nodes, loss)
    for input_name, spec in inputs.items():
        check_tensor(f"input {input_name}", spec)
    kind = find_optimizer(optimizer)
    chosen = Optimizer(optimizer, fill("optimizer", kind.keys, optimizer_config))
    if conflict := kind.conflict(chosen.config):
        raise SpecError(f"optimizer: {conflict}")

    known: dict[str, TensorSpec] = dict(inputs)
    compiled: list[Node] = []
    for draft in in_order(inputs, nodes):
        node = _compile_node(draft, known, chosen)
        known[node.id] = node.output
        compiled.append(node)
    compiled_loss, target = _compile_loss(loss, known, inputs)
    graph = CompiledGraph(
        name=name,
        inputs=dict(sorted(inputs.items())),
        nodes=tuple(compiled),
        loss=compiled_loss,
        target=target,
        optimizer=chosen,
        learning=learning,
        seed=seed,
        micro_batches=micro_batches,
        cut_every=cut_every,
    )
    _check_all_used(graph)
    if len(graph.to_json()) > JSON_BYTES_MAX:
        raise SpecError(f"the network takes over {JSON_BYTES_MAX >> 20} MiB to describe")
    return graph


def from_json(data: bytes) -> CompiledGraph:
    """The graph that a peer sent, good only if it is what we would have compiled ourselves.

    Raises:
        MalformedError: too large, not JSON, another format version, a network
            that does not fit together, or not its canonical form.
    """
    if len(data) > JSON_BYTES_MAX:
        raise MalformedError(f"a compiled graph has at most {JSON_BYTES_MAX >> 20} MiB")
    try:
        top = json.loads(data.decode())
        version = _get(top, "format_version", int)
        if version != FORMAT_VERSION:
            raise MalformedError(
                f"a compiled graph has format {version}, and this node reads {FORMAT_VERSION}"
            )
        chosen = _get(top, "optimizer", dict)
        loss = _draft(_get(top, "loss", dict))
        graph = compile_graph(
            name=_get(top, "name", str),
            inputs={
                name: TensorSpec(tuple(_get(spec, "shape", list)), _get(spec, "dtype", str))
                for name, spec in _get(top, "inputs", dict).items()
            },
            nodes=[_draft(node) for node in _get(top, "nodes", list)],
            loss=dataclasses.replace(loss, inputs=loss.inputs[:1]),
            optimizer=_get(chosen, "type", str),
            optimizer_config=_get(chosen, "config", dict),
            learning=_get(top, "learning", str),
            seed=_get(top, "seed", int),
            micro_batches=_get(top, "micro_batches", int),
            cut_every=_get(top, "cut_every", int),
        )
    except (ValueError, RecursionError):
        raise MalformedError("a compiled graph is not JSON") from None
    except SpecError as error:
        raise MalformedError(f"a compiled graph does not fit together: {error}") from None
    if graph.to_json() != data:
        raise MalformedError("a compiled graph is not in its canonical form")
    return graph


# --- compiling ----------------------------------------------------------------


def _compile_node(draft: Draft, known: Mapping[str, TensorSpec], optimizer: Optimizer) -> Node:
    component = find_component(draft.id, draft.type)
    config = fill(draft.id, component.keys, draft.config)
    low, high = component.inputs_min, component.inputs_max
    if not low <= len(draft.inputs) <= high:
        wanted = f"{low} input" if low == high == 1 else f"{low} to {high} inputs"
        raise SpecError(f"{draft.id}: {draft.type} takes {wanted}, not {len(draft.inputs)}")
    given = tuple(known[ref].shape for ref in draft.inputs)
    try:
        output = TensorSpec(component.shape(config, given))
    except DoesNotFit as error:
        raise _misfit(draft, str(error), known) from None
    check_tensor(draft.id, output)
    shapes = component.params(config)
    values = sum(math.prod(shape) for shape in shapes.values())
    kind = find_optimizer(optimizer.type)
    kept = values * (2 + kind.copies(optimizer.config)) + kind.scalars * len(shapes)
    item = DTYPE_BYTES[DTYPE]
    if kept * item > NODE_BYTES_MAX:
        raise SpecError(f"{draft.id}: {draft.type} has more parameters than any host could hold")
    flops = component.flops(config, given, output.shape)
    return Node(
        id=draft.id,
        type=draft.type,
        config=config,
        inputs=draft.inputs,
        output=output,
        param_shapes=shapes,
        param_bytes=values * item,
        state_bytes=kept * item,
        activation_bytes=2 * (sum(map(math.prod, given)) + math.prod(output.shape)) * item,
        flops_forward=flops,
        flops_backward=flops * component.backward,
        group=draft.group,
    )


def _compile_loss(
    draft: Draft, known: Mapping[str, TensorSpec], inputs: Mapping[str, TensorSpec]
) -> tuple[Node, TensorSpec]:
    kind = find_loss(draft.id, draft.type)
    config = fill(draft.id, kind.keys, draft.config)
    if len(draft.inputs) != 1:
        raise SpecError(f"{draft.id}: {draft.type} takes 1 prediction, not {len(draft.inputs)}")
    if draft.inputs[0] not in known or draft.inputs[0] in inputs:
        raise SpecError(f"{draft.id} takes {draft.inputs[0]!r}, which is no node")
    prediction = known[draft.inputs[0]]
    try:
        target = TensorSpec(*kind.target(prediction.shape))
    except DoesNotFit as error:
        raise _misfit(draft, str(error), known) from None
    count = math.prod(prediction.shape)
    node = Node(
        id=draft.id,
        type=draft.type,
        config=config,
        inputs=(*draft.inputs, TARGET),
        output=TensorSpec(()),
        param_shapes={},
        param_bytes=0,
        state_bytes=0,
        activation_bytes=2 * prediction.size_bytes + target.size_bytes,
        flops_forward=kind.flops_per_element * count,
        flops_backward=2 * count,
        group=draft.group,
    )
    return node, target


def _misfit(draft: Draft, expected: str, known: Mapping[str, TensorSpec]) -> SpecError:
    given = " and ".join(f"{ref} gives {show(known[ref].shape)}" for ref in draft.inputs[:8])
    return SpecError(f"{draft.id}: {draft.type} expects {expected}, but {given}")


def _check_all_used(graph: CompiledGraph) -> None:
    # In `chain` a node learns from the gradient that its consumers send back.
    for node in graph.nodes:
        if not graph.consumers(node.id):
            raise SpecError(f"{node.id} leads nowhere: no node takes its output")
    for name in graph.inputs:
        if not graph.consumers(name):
            raise SpecError(f"no node takes the input {name}")


# --- JSON ---------------------------------------------------------------------


def _get(container: object, key: str, kind: type[T]) -> T:
    value = container.get(key) if isinstance(container, dict) else None
    if type(value) is not kind:
        raise MalformedError(f"a compiled graph has no {key} of the right type")
    return value


def _draft(data: object) -> Draft:
    inputs = _get(data, "inputs", list)
    if not all(isinstance(ref, str) for ref in inputs):
        raise MalformedError("a compiled graph has a node whose inputs are not names")
    grouped = isinstance(data, dict) and "group" in data
    return Draft(
        _get(data, "id", str),
        _get(data, "type", str),
        _get(data, "config", dict),
        tuple(inputs),
        _get(data, "group", str) if grouped else "",
    )
