"""Any traceable module as nodes of the catalogue: what of a spec comes from a model.

The model is traced (`p2pnet.client.shaped_trace`), and every operation that its output
needs becomes a node: a module by its own name, so that weights keep torch's names, and a
function by the name of the module whose forward it stands in. `p2pnet.client.operations`
says which operation is which component.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from p2pnet.client.shaped_trace import BATCH, COMPOSITES, input_names, place_of, trace
from p2pnet.errors import SpecError
from p2pnet.vnode.catalogue import COMPONENTS, find_component
from p2pnet.vnode.draft import DTYPE, TensorSpec

# Constructor arguments that say nothing of what is computed.
_NO_MATTER = ("device", "dtype", "inplace", "batch_first", "_weight", "_freeze")
# What is worth a hop; the rest goes where its input is made.
_HEAVY = ("Linear", "Conv2d", "Embedding", "MultiheadAttention")


@dataclass(frozen=True, slots=True)
class Ref:
    """The output of a node, or a network input."""

    id: str
    shape: tuple[int, ...]  # of one sample


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter that a forward takes by itself, or a part of one from its start."""

    name: str
    value: Tensor


@dataclass(frozen=True, slots=True)
class Places:
    """The embedding of a token's place, which is still to be added to a sequence."""

    id: str
    config: dict[str, object]


@dataclass(slots=True)
class Decomposed:
    """What of a spec comes from a model."""

    inputs: dict[str, dict[str, Any]]
    nodes: list[dict[str, Any]]
    output: Ref


@dataclass(slots=True)
class Builder:
    """Collects nodes while the graph is gone through; what operations are made with."""

    model: nn.Module  # the traced copy
    fuse: bool
    nodes: list[dict[str, Any]] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)  # by node
    _names: dict[str, None] = field(default_factory=dict)
    _cheap_alone: dict[str, None] = field(default_factory=dict)  # groups with nothing heavy
    _first: dict[int, str] = field(default_factory=dict)  # modules that have stood somewhere

    def __post_init__(self) -> None:
        self._names = {name: None for name, _ in self.model.named_modules() if name}

    def add(
        self,
        id: str,
        type: str,
        config: Mapping[str, object],
        inputs: Sequence[Ref],
        shape: Sequence[int],
        tied: str = "",
    ) -> Ref:
        """Another node, which has the id; its output."""
        node: dict[str, Any] = {
            "id": id,
            "type": type,
            "config": dict(config),
            "inputs": [ref.id for ref in inputs],
        }
        if tied:
            node["tied"] = tied
        self.nodes.append(node)
        group = self.groups.get(tied, "") if tied else self._group(id, type, inputs)
        self.groups[id] = group
        return Ref(id, tuple(shape))

    def named(self, node: fx.Node, name: str) -> str:
        """A free id for an operation in a forward: the module's, and the operation's name."""
        path = node.meta.get("path") or ""
        wanted = f"{path}.{name}" if path else name
        wanted = re.sub(r"[^A-Za-z0-9_.-]", "_", wanted)[-56:].lstrip(".")
        found, number = wanted, 1
        while found in self._names:
            found, number = f"{wanted}_{number}", number + 1
        self._names[found] = None
        return found

    def layer(
        self, name: str, module: nn.Module, inputs: Sequence[Ref], shape: Sequence[int]
    ) -> Ref:
        """A module of the catalogue as a node."""
        name = self.once(name, module)
        kind = type(module).__name__
        self._check_frozen(name, module)
        weight: Any = getattr(module, "weight", None)
        if kind == "Linear" and self.home(weight) is not None:
            if getattr(module, "bias", None) is not None:
                raise SpecError(f"layer {name} shares the weight of an Embedding: write bias=False")
            return self.tied(name, weight, inputs, shape)
        return self.add(name, kind, config_of(name, module), inputs, shape)

    def tied(
        self,
        name: str,
        weight: object,
        inputs: Sequence[Ref],
        shape: Sequence[int],
        kept_as: str = "module",
    ) -> Ref:
        """A node that goes back from the embedding by the Embedding's own weight."""
        home = self.home(weight) or ""
        return self.add(name, "TiedLinear", {"kept_as": kept_as}, inputs, shape, tied=home)

    def home(self, weight: object) -> str | None:
        """The Embedding that has this weight, if one has."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) and module.weight is weight:
                return str(name)
        return None

    def once(self, name: str, module: nn.Module) -> str:
        """The name for a module; another of its names, or a new one, if it stands here again."""
        if id(module) not in self._first:
            self._first[id(module)] = name
            return name
        known = self._first[id(module)]
        used = {node["id"] for node in self.nodes}
        aliases = [
            alias
            for alias, one in self.model.named_modules(remove_duplicate=False)
            if one is module and alias not in used
        ]
        again = aliases[0] if aliases else ""
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            what = f"layer {again or known} is layer {known} again"
            raise SpecError(
                f"{what}: weights that layers share are not there yet, give each its own"
            )
        number = 1
        while not again or again in used:
            again, number = f"{known}_{number}", number + 1
        self._names[again] = None
        return again

    def _check_frozen(self, id: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                raise SpecError(
                    f"{name} of layer {id} has requires_grad=False: every weight is trained here"
                )

    def _group(self, id: str, kind: str, inputs: Sequence[Ref]) -> str:
        """What is cheap joins the group of the latest node it takes; a hop would cost more."""
        taken = {ref.id: None for ref in inputs}
        before = next((node for node in reversed(self.nodes[:-1]) if node["id"] in taken), None)
        group = self.groups[before["id"]] if before else ""
        if group and (kind not in _HEAVY or group in self._cheap_alone):
            if kind in _HEAVY:
                del self._cheap_alone[group]
            return group
        if kind not in _HEAVY:
            self._cheap_alone[id] = None
        return id


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
    from p2pnet.client.operations import apply_operation

    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            raise SpecError(f"{name} is {kind}, and weights are {DTYPE}: model.float()")
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


def config_of(id: str, module: nn.Module) -> dict[str, Any]:
    """A module's settings by the catalogue's keys, which are torch's.

    Raises:
        SpecError: it is set to something that the catalogue has no key for.
    """
    kind = type(module).__name__
    keys = [key.name for key in COMPONENTS[kind].keys]
    config = {key: _plain(getattr(module, key)) for key in keys if hasattr(module, key)}
    if "bias" in keys:  # a layer's attribute is the tensor itself
        config["bias"] = getattr(module, "bias", getattr(module, "in_proj_bias", None)) is not None
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in ("self", *keys, *_NO_MATTER) or parameter.default is parameter.empty:
            continue
        value = getattr(module, name, parameter.default)
        if isinstance(value, Tensor) or (name == "bias" and config.get("affine") is False):
            continue
        if value is not parameter.default and value != parameter.default:
            raise SpecError(f"layer {id}: {kind} with {name}={value!r} is not there yet")
    return {key: value for key, value in config.items() if value is not None}


def unsupported(node: fx.Node, what: str, instead: str) -> SpecError:
    """One sentence: the operation, its place in the model, and what to do."""
    return SpecError(f"{place_of(node)}: {what}: {instead}")


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


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _plain_shape(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple | torch.Size) else (int(value),)


def sample_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a sample of what the node gives; raises SpecError if the batch is not first."""
    value = node.meta["value"]
    if not isinstance(value, Tensor) or not value.ndim or len(value) != BATCH:
        raise unsupported(
            node, "its output has no batch as dimension 0", "keep the samples apart, batch first"
        )
    return tuple(value.shape[1:])
