"""Any traceable module as nodes of the catalogue: what of a spec comes from a model.

The model is traced (`p2pnet.client.shaped_trace`), and every operation that its output
needs becomes a node: a module by its own name, so that weights keep torch's names, and a
function by the name of the module whose forward it stands in. `p2pnet.client.operations`
says which operation is which component.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from p2pnet.client.builder import Builder, Ref
from p2pnet.client.operations import apply_operation
from p2pnet.client.shaped_trace import COMPOSITES, input_names, trace
from p2pnet.errors import SpecError
from p2pnet.vnode.catalogue import COMPONENTS, find_component
from p2pnet.vnode.draft import DTYPE, TensorSpec

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(slots=True)
class Decomposed:
    """What of a spec comes from a model."""

    inputs: dict[str, dict[str, Any]]
    nodes: list[dict[str, Any]]
    output: Ref


def decompose(
    model: nn.Module,
    inputs: Mapping[str, TensorSpec],
    *,
    fuse: bool = True,
) -> Decomposed:
    """The nodes of a model, in the order of its forward.

    `inputs` are by the names of the forward's arguments; an Embedding's becomes int64.
    With `fuse`, what is cheap shares the group of what makes its input.

    Raises:
        SpecError: an operation that is not there, with its place in the model and what to do.
    """
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            raise SpecError(f"{name} is {kind}, and weights are {DTYPE}: model.float()")
    _check_hooks(model)
    twin, graph, whole = trace(model, inputs, _check_leaf)
    builder = Builder(twin, fuse)
    names = list(inputs)
    renamed = {name: name if len(names) > 1 else "x" for name in names}
    needed = _needed(graph)
    output: Any = None
    for node in graph.nodes:
        if node.op == "output":
            output = builder.values.get(node.args[0]) if _is_node(node.args[0]) else None
        elif node.op == "placeholder" and str(node.target) in inputs:
            name = str(node.target)
            builder.values[node] = Ref(renamed[name], tuple(inputs[name].shape))
        elif node in needed:
            builder.values[node] = apply_operation(builder, node)
    if not builder.nodes:
        raise SpecError("the model has no layers")
    if not isinstance(output, Ref):
        raise SpecError(
            f"the forward of {type(model).__name__} has to return one tensor, the prediction"
        )
    if fuse:
        for spec in builder.nodes:
            spec["group"] = builder.groups[spec["id"]]
    specs = {
        renamed[name]: {
            "shape": list(inputs[name].shape),
            "dtype": "int64" if name in whole else DTYPE,
        }
        for name in names
    }
    return Decomposed(specs, builder.nodes, output)


def inputs_of(model: nn.Module, shape: object) -> dict[str, TensorSpec]:
    """The inputs by the forward's names: one shape for all, a shape a name, or as layers tell.

    Raises:
        SpecError: the shape is not given, and the first layer does not tell it.
    """
    names = input_names(model)
    if not names:
        raise SpecError(f"the forward of {type(model).__name__} takes no input")
    if isinstance(shape, Mapping):
        for name in shape:
            if name not in names:
                raise SpecError(f"input_shape names {name!r}: the forward takes {', '.join(names)}")
        names = [name for name in names if name in shape]
        return {name: TensorSpec(tuple(shape[name])) for name in names}
    if shape is not None:
        return {name: TensorSpec(_plain_shape(shape)) for name in names}
    first = next((m for m in model.modules() if m is not model and not list(m.children())), None)
    if first is None:
        raise SpecError("the model has no layers")
    for attribute in ("in_features", "normalized_shape"):
        if len(names) == 1 and hasattr(first, attribute):
            return {names[0]: TensorSpec(_plain_shape(getattr(first, attribute)))}
    raise SpecError(
        f"the first layer, {type(first).__name__}, does not say what it takes: give "
        "input_shape=..., the shape of one sample"
    )


def _check_hooks(model: nn.Module) -> None:
    """A component computes what its class does, and nothing that was hung on an instance."""
    for name, module in model.named_modules():
        where = f"layer {name}" if name else "the model"
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise SpecError(
                f"{where} has a hook, which would not be called: write into the forward what it "
                "does (spectral_norm and weight_norm are hooks)"
            )
        if "forward" in vars(module):
            raise SpecError(
                f"{where} has a forward of its own instance: write a class with this forward"
            )
    for name, weight in model.named_parameters():
        if weight._backward_hooks:
            raise SpecError(f"{name} has a hook on its gradient, which would not be called")


def _check_leaf(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if kind in COMPOSITES or (kind in COMPONENTS and type(module).__module__.startswith("torch.")):
        return
    find_component(f"layer {name}", kind)  # says what is near
    near = difflib.get_close_matches(kind, list(COMPONENTS), n=1)
    raise SpecError(f"layer {name} is a {kind}, which is no layer of torch.nn: {near}")


def _needed(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes that the output depends on."""
    found: dict[fx.Node, None] = {}
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in found:
                found[node] = None
                waiting.append(node)
    return found


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


def _plain_shape(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple | torch.Size) else (int(value),)
