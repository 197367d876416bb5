"""A torch model as a network: its layers as VNodes, its weights as their first states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from p2pnet.errors import SpecError
from p2pnet.vnode.draft import DTYPE
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.hosted import HostedComponent
from p2pnet.vnode.state import BUFFER, PARAM, decode_state, encode_state

if TYPE_CHECKING:
    from torch import nn


def spec_of(
    model: nn.Sequential,
    *,
    name: str,
    loss: str,
    optimizer: Mapping[str, Any],
    input_shape: Sequence[int] | None,
    seed: int,
    cut_every: int | None,
) -> dict[str, Any]:
    """The spec of a Sequential; nested ones are taken apart, ids are torch's own names.

    Raises:
        SpecError: the shape of the input cannot be told from the first layer.
    """
    from p2pnet.vnode.catalogue import find_component

    nodes: list[dict[str, Any]] = []
    for layer_id, layer in _layers(model):
        kind = find_component(f"layer {layer_id}", type(layer).__name__)
        keys = [key.name for key in kind.keys]
        config: dict[str, Any] = {
            key: _plain(getattr(layer, key)) for key in keys if hasattr(layer, key)
        }
        if "bias" in keys:  # a layer's attribute is the tensor itself
            config["bias"] = getattr(layer, "bias", None) is not None
        nodes.append({"id": layer_id, "type": type(layer).__name__, "config": config})
    if not nodes:
        raise SpecError("the model has no layers")
    if input_shape is None:
        first: dict[str, Any] = nodes[0]["config"]
        if "in_features" in first:
            input_shape = [first["in_features"]]
        elif "normalized_shape" in first:
            input_shape = list(first["normalized_shape"])
        else:
            raise SpecError(
                f"the first layer, {nodes[0]['type']}, does not say what it takes: give "
                "input_shape=..., the shape of one sample"
            )
    spec: dict[str, Any] = {
        "name": name,
        "inputs": {"x": {"shape": list(input_shape), "dtype": "float32"}},
        "nodes": nodes,
        "loss": {"id": "loss", "type": loss},
        "optimizer": dict(optimizer),
        "learning": "chain",
        "seed": seed,
    }
    if cut_every is not None:
        spec["cut_every"] = cut_every
    return spec


def states_of(model: nn.Module, graph: CompiledGraph) -> dict[str, bytes]:
    """The first state of every VNode that has weights: the model's own, as safetensors.

    Raises:
        SpecError: weights that are not float32.
    """
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    for name, array in weights.items():
        if array.dtype.name != DTYPE:
            raise SpecError(f"{name} is {array.dtype.name}, and weights are {DTYPE}: model.float()")
    states: dict[str, bytes] = {}
    for node in graph.nodes:
        component = HostedComponent(
            node.id,
            node.type,
            node.config,
            seed=graph.seed,
            optimizer=graph.optimizer.type,
            optimizer_config=graph.optimizer.config,
            wants_gradient=[True] * len(node.inputs),
        )
        tensors, _ = decode_state(component.do_save(0))
        for name in tensors:
            for kind in (PARAM, BUFFER):
                if name.startswith(kind):
                    tensors[name] = weights[f"{node.id}.{name.removeprefix(kind)}"]
        if tensors:
            states[node.id] = encode_state(tensors, 0)
    return states


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every layer by its full name, in order; one that stands twice is there twice.

    Raises:
        SpecError: one with weights stands twice: two VNodes do not share them.
    """
    found: list[tuple[str, nn.Module]] = []
    first: dict[int, str] = {}
    for layer_id, layer in model.named_modules(remove_duplicate=False):
        if type(layer).__name__ == "Sequential":
            continue
        known = first.setdefault(id(layer), layer_id)
        if known != layer_id and any(True for _ in layer.parameters()):
            raise SpecError(
                f"layer {layer_id} is layer {known} again: weights that layers share are not "
                "there yet, give each its own"
            )
        found.append((layer_id, layer))
    return found


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
