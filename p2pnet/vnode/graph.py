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
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from p2pnet.errors import MalformedError, SpecError
from p2pnet.keys import sha256
from p2pnet.vnode.catalogue import (
    COMPONENTS,
    LOCAL_HEAD,
    TIED_HOME,
    DoesNotFit,
    Shape,
    find_component,
    find_loss,
    find_optimizer,
    show,
)
from p2pnet.vnode.config import Config, fill
from p2pnet.vnode.draft import (
    CHAIN,
    DTYPE,
    DTYPE_BYTES,
    LOCAL,
    NODE_BYTES_MAX,
    TARGET,
    WHOLE_DTYPE,
    Draft,
    Settings,
    TensorSpec,
    check_names,
    check_tensor,
    in_order,
)

FORMAT_VERSION = 1
JSON_BYTES_MAX = 4 << 20

# What a hosted VNode costs beside its tensors: its objects, queues and buffers.
VNODE_OVERHEAD_BYTES = 256 << 10
# The most micro-batches of which a VNode keeps what their backward needs (1F1B's bound).
IN_FLIGHT_MAX = 8
_LENGTHS_KEPT = 32
_USUAL = Settings()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Node:
    """A component, the loss included. Sizes in bytes; activations and FLOPs are for one sample."""

    id: str
    type: str
    config: Config  # every key, defaults filled in
    inputs: tuple[str, ...]  # by slot: ids of nodes, names of network inputs, "y"
    output: TensorSpec
    param_shapes: Mapping[str, Shape]  # by torch's names, in torch's order
    param_bytes: int
    state_bytes: int  # parameters, gradients, buffers and what the optimizer keeps
    activation_bytes: int  # inputs, output and what is in between, with the gradients
    flops_forward: int
    flops_backward: int
    group: str = ""  # all VNodes of one group live on one host
    tied: str = ""  # the Embedding whose weight it shares: then it is no VNode of its own
    codec: str = ""  # of its output on the wire; "": the network's
    buffers: Mapping[str, TensorSpec] = field(default_factory=dict)  # by torch's names, whole


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One and the same for every VNode; each has its own state of it."""

    type: str
    config: Config


@dataclass(frozen=True, kw_only=True)  # no slots: the cached properties live in __dict__
class CompiledGraph(Settings):
    """A network that fits together. `nodes` are in topological order and without the loss.

    A *node* computes; a *VNode* is what is hosted, by a node's id. They are the same but for
    a tied node, which is a second entry of the VNode whose weight it shares (its `home`).
    """

    name: str
    inputs: Mapping[str, TensorSpec]
    nodes: tuple[Node, ...]
    loss: Node  # inputs: the output node's id and "y"
    target: TensorSpec  # "y"
    optimizer: Optimizer
    format_version: int = FORMAT_VERSION

    @property
    def output(self) -> str:
        """The id of the node whose output is the network's."""
        return self.loss.inputs[0]

    def vnodes(self) -> tuple[str, ...]:
        """The ids of all that is hosted, in topological order, then the loss."""
        return (*(node.id for node in self.nodes if not node.tied), self.loss.id)

    def node(self, node_id: str) -> Node:
        """The node of that id, the loss included; KeyError if there is none."""
        return self._by_id[node_id]

    def home(self, node_id: str) -> str:
        """The VNode that the node belongs to; KeyError if there is no such node."""
        return self._by_id[node_id].tied or node_id

    def entries(self, vnode: str) -> tuple[str, ...]:
        """The nodes of a VNode: the one it is named by, then those tied to it, in order."""
        return self._entries[vnode]

    def consumers(self, ref: str) -> tuple[tuple[str, int], ...]:
        """Who takes the output of a node, a network input or "y": (node, slot).

        In topological order, the loss last, so that the reverse is the order in which
        torch's autograd engine comes to them.
        """
        return self._consumers.get(ref, ())

    def takes_target(self, node_id: str) -> bool:
        """Whether a backward begins at the node: the loss, or a block's head."""
        return node_id == self.loss.id or self._by_id[node_id].type == LOCAL_HEAD

    def block(self, node_id: str) -> str:
        """The name of the node's block: in `local`, no gradient leaves it."""
        node = self._by_id[node_id]
        return node.group or node.tied or node.id

    def gradient_flows(self, node_id: str, slot: int) -> bool:
        """Whether the node sends a gradient back to what it takes at that slot."""
        ref = self._by_id[node_id].inputs[slot]
        if ref not in self._by_id:
            return False  # a network input, or "y"
        if self.learning == CHAIN:
            return True
        return self.block(ref) == self.block(node_id) and node_id in self._taught

    def codec_of(self, ref: str) -> str:
        """The codec of what a node gives, and of its gradient; of inputs: the network's."""
        return (self._by_id[ref].codec if ref in self._by_id else "") or self.codec

    def tensor(self, ref: str) -> TensorSpec:
        """What a node, a network input or "y" gives; KeyError if there is no such thing."""
        if ref in self._by_id:
            return self._by_id[ref].output
        return self.target if ref == TARGET else self.inputs[ref]

    def memory_bytes(self, vnode: str) -> int:
        """What a host needs for a VNode while the network trains with its largest batches.

        Its state; the activations, each with its gradient, of the micro-batches that may
        be between their forward and their backward; as many more copies of the weights as
        forwards may be behind (`staleness`); and, in `local`, the outputs that wait for a
        slower block.
        """
        home = self._by_id[vnode]
        samples = -(-self.batch_max // self.micro_batches)
        in_flight = min(self.micro_batches * (1 + self.staleness), IN_FLIGHT_MAX)
        activations = sum(self._by_id[entry].activation_bytes for entry in self.entries(vnode))
        stashed = home.param_bytes * self.staleness
        waiting = self._given_away_bytes(vnode) * self.window if self.learning == LOCAL else 0
        flying = (activations * in_flight + waiting) * samples
        return home.state_bytes + stashed + flying + VNODE_OVERHEAD_BYTES

    def _given_away_bytes(self, vnode: str) -> int:
        """Of a sample: what of a VNode's outputs another block takes."""
        return sum(
            self._by_id[entry].output.size_bytes
            for entry in self.entries(vnode)
            if any(self.block(end) != self.block(entry) for end, _ in self.consumers(entry))
        )

    def at_length(self, length: int) -> CompiledGraph:
        """The same network, with the same weights, for sequences of `length` tokens.

        Every input's first dimension (after the batch's) becomes `length`.

        Raises:
            SpecError: there is none, or it would not fit the network.
        """
        if length not in self._lengths:
            while len(self._lengths) >= _LENGTHS_KEPT:
                del self._lengths[next(iter(self._lengths))]
            self._lengths[length] = _at_length(self, length)
        return self._lengths[length]

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
    def _entries(self) -> dict[str, tuple[str, ...]]:
        entries = {vnode: [vnode] for vnode in self.vnodes()}
        for node in self.nodes:
            if node.tied:
                entries[node.tied].append(node.id)
        return {vnode: tuple(nodes) for vnode, nodes in entries.items()}

    @cached_property
    def _consumers(self) -> dict[str, tuple[tuple[str, int], ...]]:
        edges: dict[str, list[tuple[str, int]]] = {}
        for node in (*self.nodes, self.loss):
            for slot, ref in enumerate(node.inputs):
                edges.setdefault(ref, []).append((node.id, slot))
        return {ref: tuple(ends) for ref, ends in edges.items()}

    @cached_property
    def _taught(self) -> dict[str, None]:
        """The nodes that a gradient of their own block comes to, in `local`."""
        taught: dict[str, None] = {}
        for node in (self.loss, *reversed(self.nodes)):
            ends = (end for end, _ in self.consumers(node.id) if end in taught)
            if self.takes_target(node.id) or self.block(node.id) in map(self.block, ends):
                taught[node.id] = None
        return taught

    @cached_property
    def _lengths(self) -> dict[int, CompiledGraph]:
        return {}

    @cached_property
    def _json(self) -> bytes:
        # Mappings are plain dicts and tuples become lists. What came after the first
        # networks is left out where it says nothing, so that their bytes stay as they are.
        top = dataclasses.asdict(self)
        for key in _LATER_SETTINGS:
            if top[key] == getattr(_USUAL, key):
                del top[key]
        for node in (*top["nodes"], top["loss"]):
            for key in _LATER_KEYS:
                if not node[key]:
                    del node[key]
            for key, usual in _LATER_CONFIG.items():
                if node["config"].get(key) == usual:
                    del node["config"][key]
        return json.dumps(top, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


_LATER_SETTINGS = ("batch_max", "clip_norm", "staleness", "replicas", "codec")
_LATER_KEYS = ("group", "tied", "codec", "buffers")
_LATER_CONFIG = {"class_dim": 1}


def compile_graph(
    *,
    name: str,
    inputs: Mapping[str, TensorSpec],
    nodes: Sequence[Draft],
    loss: Draft,
    optimizer: str,
    optimizer_config: Mapping[str, object],
    settings: Settings = _USUAL,
) -> CompiledGraph:
    """Checks that a network fits together and works out its shapes, bytes and FLOPs.

    The loss's draft names one input, the output node.

    Raises:
        SpecError: one sentence that names the node and what was expected of it.
    """
    settings.check()
    check_names(name, inputs, nodes, loss)
    for input_name, spec in inputs.items():
        check_tensor(f"input {input_name}", spec)
    kind = find_optimizer(optimizer)
    chosen = Optimizer(optimizer, fill("optimizer", kind.keys, optimizer_config))
    if conflict := kind.conflict(chosen.config):
        raise SpecError(f"optimizer: {conflict}")

    homes = _homes(nodes)
    known: dict[str, TensorSpec] = dict(inputs)
    compiled: dict[str, Node] = {}
    order = in_order(inputs, nodes)
    for draft in order:
        if draft.type != LOCAL_HEAD:
            compiled[draft.id] = _compile_node(draft, known, chosen, homes)
            known[draft.id] = compiled[draft.id].output
    compiled_loss, target = _compile_loss(loss, known, inputs)
    known[TARGET] = target  # which only a head takes
    for draft in order:
        if draft.type == LOCAL_HEAD:
            compiled[draft.id] = _compile_node(draft, known, chosen, homes)
    graph = CompiledGraph(
        name=name,
        inputs=dict(sorted(inputs.items())),
        nodes=tuple(compiled[draft.id] for draft in order),
        loss=compiled_loss,
        target=target,
        optimizer=chosen,
        **{key.name: getattr(settings, key.name) for key in dataclasses.fields(Settings)},
    )
    _check_all_used(graph)
    if graph.learning == LOCAL:
        _check_all_taught(graph)
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
        settings: dict[str, Any] = {
            key.name: _get(top, key.name, type(key.default))
            for key in dataclasses.fields(Settings)
            if key.name in top or key.name not in _LATER_SETTINGS
        }
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
            settings=Settings(**settings),
        )
    except (ValueError, RecursionError):
        raise MalformedError("a compiled graph is not JSON") from None
    except SpecError as error:
        raise MalformedError(f"a compiled graph does not fit together: {error}") from None
    if graph.to_json() != data:
        raise MalformedError("a compiled graph is not in its canonical form")
    return graph


# --- compiling ----------------------------------------------------------------


def _homes(nodes: Sequence[Draft]) -> dict[str, Draft]:
    """By the id of a tied node: the Embedding whose weight it takes. Raises SpecError."""
    by_id = {draft.id: draft for draft in nodes}
    homes: dict[str, Draft] = {}
    for draft in nodes:
        wants_one = draft.type in COMPONENTS and COMPONENTS[draft.type].tied
        if not (wants_one or draft.tied):
            continue
        if not wants_one:
            raise SpecError(f"{draft.id}: {draft.type} has no weight to tie to {draft.tied!r}")
        home = by_id.get(draft.tied)
        if home is None or home.type != TIED_HOME:
            raise SpecError(f"{draft.id}: {draft.type} needs tied: the id of an {TIED_HOME}")
        if draft.group != home.group:
            raise SpecError(f"{draft.id} shares the weight of {home.id}, and so its group")
        homes[draft.id] = home
    return homes


def _compile_node(
    draft: Draft,
    known: Mapping[str, TensorSpec],
    optimizer: Optimizer,
    homes: Mapping[str, Draft],
) -> Node:
    component = find_component(draft.id, draft.type)
    config = fill(draft.id, component.keys, draft.config)
    low, high = component.inputs_min, component.inputs_max
    if not low <= len(draft.inputs) <= high:
        count = f"{low}" if low == high else f"{low} to {high}"
        wanted = f"{count} input{'s' * (high > 1)}"
        raise SpecError(f"{draft.id}: {draft.type} takes {wanted}, not {len(draft.inputs)}")
    for ref in draft.inputs:
        if ref not in known:
            raise SpecError(f"{draft.id} takes {ref!r}, a {LOCAL_HEAD}, whose output none takes")
    given = tuple(known[ref] for ref in draft.inputs)
    if draft.type == LOCAL_HEAD:
        _check_head(draft, config, known)
    wanted_dtype = WHOLE_DTYPE if component.whole else DTYPE
    for ref, spec in zip(draft.inputs, given, strict=True):
        if spec.dtype != wanted_dtype and ref != TARGET:
            raise SpecError(
                f"{draft.id}: {draft.type} takes {wanted_dtype}, but {ref} gives {spec.dtype}"
            )
    shapes = tuple(spec.shape for spec in given)
    # What a tied node computes with is its home's.
    own = config
    if draft.id in homes:
        home = homes[draft.id]
        own = fill(home.id, find_component(home.id, home.type).keys, home.config)
    try:
        output = TensorSpec(component.shape(own, shapes))
    except DoesNotFit as error:
        raise _misfit(draft, str(error), known) from None
    check_tensor(draft.id, output)
    params = component.params(own)
    buffers = {
        name: TensorSpec(shape, dtype) for name, (shape, dtype) in component.buffers(own).items()
    }
    values = sum(math.prod(shape) for shape in params.values())
    kind = find_optimizer(optimizer.type)
    kept = values * (2 + kind.copies(optimizer.config)) + kind.scalars * len(params)
    item = DTYPE_BYTES[DTYPE]
    # A step's new buffers are kept beside the old ones until it is decided.
    state_bytes = kept * item + 2 * sum(spec.size_bytes for spec in buffers.values())
    if state_bytes > NODE_BYTES_MAX:
        raise SpecError(f"{draft.id}: {draft.type} has more parameters than any host could hold")
    flops = component.flops(own, shapes, output.shape)
    return Node(
        id=draft.id,
        type=draft.type,
        config=config,
        inputs=draft.inputs,
        output=output,
        param_shapes=params,
        param_bytes=values * item,
        state_bytes=state_bytes,
        activation_bytes=_with_gradient(*given, output) + 2 * item * component.within(own, shapes),
        flops_forward=flops,
        flops_backward=flops * component.backward,
        group=draft.group,
        tied=draft.tied,
        codec=draft.codec,
        buffers=buffers,
    )


def _check_head(draft: Draft, config: Config, known: Mapping[str, TensorSpec]) -> None:
    first, second = draft.inputs
    if second != TARGET or first == TARGET:
        raise SpecError(f"{draft.id}: a {LOCAL_HEAD} takes a node and {TARGET}")
    dtype = WHOLE_DTYPE if config["loss"] == "CrossEntropyLoss" else DTYPE
    if known[TARGET].dtype != dtype:
        raise SpecError(f"{draft.id}: {config['loss']} takes a target of {dtype}")


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
        target = TensorSpec(*kind.target(config, prediction.shape))
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


def _with_gradient(*tensors: TensorSpec) -> int:
    """Bytes: whole numbers have no gradient."""
    return sum(spec.size_bytes * (2 if spec.dtype == DTYPE else 1) for spec in tensors)


def _misfit(draft: Draft, expected: str, known: Mapping[str, TensorSpec]) -> SpecError:
    given = " and ".join(f"{ref} gives {show(known[ref].shape)}" for ref in draft.inputs[:8])
    return SpecError(f"{draft.id}: {draft.type} expects {expected}, but {given}")


def _check_all_used(graph: CompiledGraph) -> None:
    # In `chain` a node learns from the gradient that its consumers send back.
    for node in graph.nodes:
        if graph.consumers(node.id):
            if graph.takes_target(node.id):
                raise SpecError(f"{node.id} is a {LOCAL_HEAD}: no node takes its output")
        elif not graph.takes_target(node.id):
            raise SpecError(f"{node.id} leads nowhere: no node takes its output")
        elif graph.learning != LOCAL:
            raise SpecError(f"{node.id} is a {LOCAL_HEAD}, which needs learning: local")
    for name in graph.inputs:
        if not graph.consumers(name):
            raise SpecError(f"no node takes the input {name}")


def _check_all_taught(graph: CompiledGraph) -> None:
    # In `local` nothing comes back from another block.
    for node in graph.nodes:
        if node.tied:
            raise SpecError(f"{node.id} shares the weight of {node.tied}: write learning: chain")
        if node.param_shapes and node.id not in graph._taught:
            raise SpecError(
                f"{node.id} would learn nothing: no {LOCAL_HEAD} and no loss follows it in its "
                f"block {graph.block(node.id)}"
            )


def _at_length(graph: CompiledGraph, length: int) -> CompiledGraph:
    if any(not spec.shape for spec in graph.inputs.values()):
        raise SpecError(f"the network {graph.name} takes no sequences")
    return compile_graph(
        name=graph.name,
        inputs={
            name: TensorSpec((length, *spec.shape[1:]), spec.dtype)
            for name, spec in graph.inputs.items()
        },
        nodes=[
            Draft(node.id, node.type, node.config, node.inputs, node.group, node.tied, node.codec)
            for node in graph.nodes
        ],
        loss=Draft(graph.loss.id, graph.loss.type, graph.loss.config, graph.loss.inputs[:1]),
        optimizer=graph.optimizer.type,
        optimizer_config=graph.optimizer.config,
        settings=graph,
    )


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
    assert isinstance(data, dict)  # it has inputs
    later = {key: _get(data, key, str) for key in ("group", "tied", "codec") if key in data}
    return Draft(
        _get(data, "id", str),
        _get(data, "type", str),
        _get(data, "config", dict),
        tuple(inputs),
        **later,
    )
