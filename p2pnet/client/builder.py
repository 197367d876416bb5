"""The nodes of a model while they are collected: names, groups, weights that are shared."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from p2pnet.client.shaped_trace import BATCH, place_of
from p2pnet.errors import SpecError
from p2pnet.vnode.catalogue import COMPONENTS

Given = dict[str, Any]  # an operation's arguments, by name

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


@dataclass(frozen=True, slots=True)
class Parts:
    """What a chunk or a split gives: parts of a tensor along a dimension."""

    whole: Ref
    dim: int
    sizes: tuple[int, ...]


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

    def emit(
        self, node: fx.Node, kind: str, config: Mapping[str, object], inputs: Sequence[Any]
    ) -> Ref:
        """A component for a function or a method of a forward, under a free id."""
        for value in inputs:
            if not isinstance(value, Ref):
                raise unsupported(
                    node,
                    f"{kind} of something that is no output of a layer",
                    "weights of their own belong into a layer of torch.nn",
                )
        name = self.named(node, node.name.rstrip("_0123456789") or kind.lower())
        return self.add(name, kind, config, inputs, sample_of(node))

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


def config_of(id: str, module: nn.Module) -> dict[str, Any]:
    """A module's settings by the catalogue's keys, which are torch's.

    Raises:
        SpecError: it is set to something that the catalogue has no key for.
    """
    kind = type(module).__name__
    keys = [key.name for key in COMPONENTS[kind].keys]
    config = {key: plain(getattr(module, key)) for key in keys if hasattr(module, key)}
    if "bias" in keys:  # a layer's attribute is the tensor itself
        config["bias"] = getattr(module, "bias", getattr(module, "in_proj_bias", None)) is not None
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in config and config[name] is None and parameter.default is not None:
            raise SpecError(f"layer {id}: {kind} with {name}=None is not there yet")
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


def sample_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a sample of what the node gives; raises SpecError if the batch is not first."""
    value = node.meta["value"]
    if not isinstance(value, Tensor) or not value.ndim or len(value) != BATCH:
        raise unsupported(
            node, "its output has no batch as dimension 0", "keep the samples apart, batch first"
        )
    return tuple(value.shape[1:])


def plain(value: object) -> object:
    """A tuple as the list that a spec has in its place."""
    return list(value) if isinstance(value, tuple | torch.Size) else value
