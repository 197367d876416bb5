"""Compiling: what a spec says becomes a graph, or what does not fit is named.

`from_json` compiles a graph anew and takes only the very bytes that this gives: a peer
cannot lie about a derived number.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from p2pnet.errors import MalformedError, SpecError
from p2pnet.vnode.catalogue import (
    COMPONENTS,
    LOCAL_HEAD,
    TIED_HOME,
    DoesNotFit,
    find_component,
    find_loss,
    find_optimizer,
    show,
)
from p2pnet.vnode.config import Config, fill
from p2pnet.vnode.draft import (
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
from p2pnet.vnode.graph import FORMAT_VERSION, LATER_SETTINGS, CompiledGraph, Node, Optimizer

JSON_BYTES_MAX = 4 << 20
_USUAL = Settings()

T = TypeVar("T")


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
            if key.name in top or key.name not in LATER_SETTINGS
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
        if node.param_shapes and node.id not in graph.taught:
            raise SpecError(
                f"{node.id} would learn nothing: no {LOCAL_HEAD} and no loss follows it in its "
                f"block {graph.block(node.id)}"
            )


def at_length(graph: CompiledGraph, length: int) -> CompiledGraph:
    """The same network for sequences of another length, see `CompiledGraph.at_length`."""
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
