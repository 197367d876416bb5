"""A torch model as a network: its layers as VNodes, its weights as their first states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from p2pnet.errors import SpecError
from p2pnet.vnode.catalogue import LOCAL_HEAD
from p2pnet.vnode.graph import CompiledGraph, Node
from p2pnet.vnode.state import BUFFER, PARAM, encode_state
from p2pnet.vnode.tensors import Array

if TYPE_CHECKING:
    from torch import nn


def spec_of(
    model: nn.Module,
    *,
    name: str,
    loss: str | Mapping[str, Any],
    optimizer: Mapping[str, Any],
    input_shape: object = None,
    seed: int = 0,
    cut_every: int | None = None,
    fuse: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """The spec of a model: any module that torch.fx can trace. Ids are torch's own names.

    Args:
        loss: a type, or a mapping of its `type` and torch's settings of it. Of a prediction
            [tokens, classes] of tokens, CrossEntropyLoss takes the last dimension for classes.
        input_shape: of one sample, or one a name of the forward's arguments; may be left out
            where the first layer tells it.
        fuse: what is cheap is hosted with what makes its input (a group of the spec).
        settings: further keys of a spec: micro_batches, learning, clip_norm, ...

    Raises:
        SpecError: what cannot be part of a network; names it, its place, and what to do.
    """
    from p2pnet.client.decompose import decompose, inputs_of

    parts = decompose(model, inputs_of(model, input_shape), fuse=fuse)
    measure = {"type": loss} if isinstance(loss, str) else dict(loss)
    config = {key: value for key, value in measure.items() if key != "type"}
    tokens = any(given["dtype"] == "int64" for given in parts.inputs.values())
    if measure.get("type") == "CrossEntropyLoss" and tokens and len(parts.output.shape) > 1:
        config.setdefault("class_dim", -1)
    last: dict[str, Any] = {"id": _loss_id(parts.nodes), "type": measure.get("type", "")}
    last |= {"config": config, "inputs": [parts.output.id]}
    if fuse:
        last["group"] = next(n["group"] for n in parts.nodes if n["id"] == parts.output.id)
    spec: dict[str, Any] = {
        "name": name,
        "inputs": parts.inputs,
        "nodes": parts.nodes,
        "loss": last,
        "optimizer": dict(optimizer),
        "seed": seed,
        **settings,
    }
    if cut_every is not None:
        spec["cut_every"] = cut_every
    return spec


def states_of(model: nn.Module, graph: CompiledGraph) -> dict[str, bytes]:
    """The first state of every VNode that has weights: the model's own, as safetensors.

    A block's head has none yet: it begins from the seed.

    Raises:
        SpecError: weights of another dtype than the network's.
    """
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    states: dict[str, bytes] = {}
    for node in graph.nodes:
        tensors: dict[str, Array] = {}
        for kind, names in ((PARAM, node.param_shapes), (BUFFER, node.buffers)):
            for name in names if node.type != LOCAL_HEAD else ():
                array = weights[_torch_name(node, name)]
                dtype = node.buffers[name].dtype if kind == BUFFER else "float32"
                if array.dtype.name != dtype:
                    raise SpecError(
                        f"{node.id}.{name} is {array.dtype.name}, and has to be {dtype}: "
                        "model.float()"
                    )
                tensors[kind + name] = array.reshape(node.param_shapes.get(name, array.shape))
        if tensors and not node.tied:
            states[node.id] = encode_state(tensors, 0)
    return states


def torch_names(graph: CompiledGraph, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Weights by the names of the model's state_dict, which `load_state_dict` takes.

    Of weights by VNODE.NAME: tied ones stand twice, as in torch, and heads of blocks, which
    are not the model's, are left out.
    """
    found: dict[str, Array] = {}
    for node in graph.nodes:
        if node.type == LOCAL_HEAD:
            continue
        shared = ("weight",) if node.tied and node.config["kept_as"] == "module" else ()
        for name in (*node.param_shapes, *node.buffers, *shared):
            array = weights[f"{node.tied or node.id}.{name}"]
            whole = array[None] if node.config.get("kept_as") == "batched parameter" else array
            found[_torch_name(node, name)] = whole
    return found


def _torch_name(node: Node, name: str) -> str:
    bare = str(node.config.get("kept_as", "")).endswith("parameter")
    return node.id if bare else f"{node.id}.{name}"


def _loss_id(nodes: list[dict[str, Any]]) -> str:
    taken = [node["id"] for node in nodes]
    return next(id for id in ("loss", "loss_1", "loss_2") if id not in taken)
