"""torch.fx with real shapes: a model is traced while a small batch of zeros runs through it.

Plain symbolic tracing knows no shapes, so that `B, T, C = x.shape` or `assert T <= 256` in a
forward would end it. Here every proxy knows the value that it stands for, answers for its
shape with plain numbers, and leaves the value in its node's `meta["value"]`.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from p2pnet.errors import SpecError
from p2pnet.vnode.draft import TensorSpec

BATCH = 5  # samples of the small batch; a dimension 0 of another length is no batch

# What is taken whole, though it is made of modules: it looks at its inputs' values.
COMPOSITES = ("TransformerEncoder", "TransformerEncoderLayer")


class WantsTokens(Exception):
    """An input goes into an Embedding, so that it has to be whole numbers."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class ShapedProxy(fx.Proxy):
    """A proxy that answers for its shape, dtype and device as a tensor does."""

    @property
    def _value(self) -> Any:
        return self.node.meta["value"]

    @property
    def shape(self) -> torch.Size:
        return self._tensor("shape").shape

    @property
    def ndim(self) -> int:
        return self._tensor("ndim").ndim

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor("dtype").dtype

    @property
    def device(self) -> torch.device:
        return self._tensor("device").device

    def size(self, dim: int | None = None) -> Any:
        shape = self.shape
        return shape if dim is None else shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self._tensor("numel").numel()

    def __len__(self) -> int:
        return len(self._value)

    def _tensor(self, what: str) -> Tensor:
        if not isinstance(self._value, Tensor):
            raise AttributeError(what)
        return self._value


class _Tracer(fx.Tracer):
    record_stack_traces = True

    def __init__(self, inputs: Mapping[str, Tensor], check: Callable[[str, nn.Module], None]):
        super().__init__()
        self._inputs = inputs
        self._check = check
        self._running = False
        self._stale: dict[fx.Node, fx.Node] = {}  # what was changed in place, and by what

    def proxy(self, node: fx.Node) -> ShapedProxy:
        return ShapedProxy(node, self)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> fx.Proxy:
        proxy: fx.Proxy = super().create_proxy(
            kind, target, args, kwargs, name, type_expr, proxy_factory_fn
        )
        node = proxy.node
        path = next(reversed(self.module_stack), "") if self.module_stack else ""
        node.meta["path"] = path.rpartition(".")[0] if kind == "call_module" else path
        if kind == "call_module":
            self._check(target, self.root.get_submodule(target))
        if kind not in ("output", "get_attr"):
            before = _versions(node)
            node.meta["value"] = self._run(node)
            self._note_changed(node, before)
        return proxy

    def _note_changed(self, node: fx.Node, before: Mapping[fx.Node, list[int]]) -> None:
        """A graph has values, not memory: who takes what was changed has to take the change."""
        changed = [one for one, now in _versions(node).items() if now != before[one]]
        for source in changed:
            if source.op == "get_attr":
                raise SpecError(
                    f"{place_of(node)} changes {source.target} in place: the forward of a network "
                    "cannot change weights and buffers by itself"
                )
        memory = {at for source in changed for at in _memory(source)}
        for other in node.graph.nodes:
            if other is not node and not memory.isdisjoint(_memory(other)):
                self._stale[other] = node

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        for source in node.all_input_nodes:
            if source in self._stale:
                raise SpecError(
                    f"{place_of(self._stale[source])} changes {source.name} in place, which is "
                    "taken again after that: take what the operation gives, or one that is not "
                    "in place"
                )
        if kind == "get_attr":  # constants are nodes without a proxy
            running, self._running = self._running, True  # not to be traced itself
            node.meta["value"] = _attribute(self.root, str(target))
            self._running = running
        return node

    @torch.no_grad()
    def _run(self, node: fx.Node) -> Any:
        """What the node's operation gives for the small batch."""
        given: Any = fx.node.map_arg(node.args, lambda one: one.meta["value"])
        named: Any = fx.node.map_arg(node.kwargs, lambda one: one.meta["value"])
        if node.op == "placeholder":
            return self._inputs.get(str(node.target), *node.args)
        if node.op == "call_module":
            function: Callable[..., Any] = self.root.get_submodule(str(node.target)).forward
            source = node.args[0] if node.args else None
            if (
                isinstance(source, fx.Node)
                and source.op == "placeholder"
                and isinstance(self.root.get_submodule(str(node.target)), nn.Embedding)
                and given[0].is_floating_point()
            ):
                raise WantsTokens(str(source.target))
        elif node.op == "call_method":
            function = getattr(type(given[0]), str(node.target))
        else:
            assert callable(node.target)
            function = node.target
        self._running = True
        try:
            return function(*given, **named)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            text = str(error).strip().split("\n")[0][:200]
            raise SpecError(f"{place_of(node)} fails for {_shapes(given)}: {text}") from None
        finally:
            self._running = False


def trace(
    model: nn.Module,
    inputs: Mapping[str, TensorSpec],
    check: Callable[[str, nn.Module], None],
) -> tuple[nn.Module, fx.Graph, frozenset[str]]:
    """A copy of the model, its graph, and the names of the inputs that are whole numbers.

    `check` is called with the name of every module that is taken whole, and the module.

    Raises:
        SpecError: the forward does what cannot be traced, or fails; says where.
    """
    given = dict(inputs)
    for _ in range(len(inputs) + 1):
        twin = copy.deepcopy(model).cpu().train()
        zeros = {
            name: torch.zeros(BATCH, *spec.shape, dtype=getattr(torch, spec.dtype))
            for name, spec in given.items()
        }
        try:
            with torch.random.fork_rng(devices=[]):
                graph = _Tracer(zeros, check).trace(twin, concrete_args=_usual(model))
        except WantsTokens as wanted:
            given[wanted.name] = TensorSpec(given[wanted.name].shape, "int64")
            continue
        except (TraceError, TypeError, AttributeError, RuntimeError) as error:
            text = str(error).strip().split("\n")[0][:200]
            raise SpecError(
                f"the forward of {type(model).__name__} cannot be traced by torch.fx: {text} "
                "(values of tensors cannot decide what is computed)"
            ) from None
        whole = frozenset(name for name, spec in given.items() if spec.dtype == "int64")
        return twin, graph, whole
    raise SpecError(f"the inputs of {type(model).__name__} are both numbers and tokens")


def input_names(model: nn.Module) -> list[str]:
    """The forward's arguments that have to be given."""
    return [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]


def _usual(model: nn.Module) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not parameter.empty
    }


def place_of(node: fx.Node) -> str:
    """Where in the model an operation stands, for people."""
    path = node.meta.get("path") or "the model's forward"
    what = str(node.target) if node.op in ("call_module", "call_method") else node.name
    if node.op == "call_module":
        return f"layer {what}"
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    lines = [frame for frame in frames if "/torch/" not in frame[0] and frame[0] != __file__]
    at = f" ({lines[-1][0].rpartition('/')[2]}, line {lines[-1][1]})" if lines else ""
    return f"{what} in {path}{at}"


def _tensors(node: fx.Node) -> list[Tensor]:
    """What a node has given: a tensor, or several."""
    found: list[Any] = []
    fx.node.map_aggregate(node.meta.get("value"), found.append)
    return [value for value in found if isinstance(value, Tensor)]


def _versions(node: fx.Node) -> dict[fx.Node, list[int]]:
    """How often what a node takes has been changed, as autograd counts it."""
    return {one: [tensor._version for tensor in _tensors(one)] for one in node.all_input_nodes}


def _memory(node: fx.Node) -> frozenset[int]:
    """Where a node's tensors lie; views lie where their base does."""
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in _tensors(node))


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _shapes(values: Any) -> str:
    shapes = [str(list(v.shape[1:])) for v in values if isinstance(v, Tensor) and v.ndim]
    return f"samples of {' and '.join(shapes[:4])}" if shapes else "its inputs"
