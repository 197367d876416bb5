"""Which operation of torch is which component.

An operation that is not here is refused with its name, its place and what to do instead.
Bits matter: an operation stands for a component only if both compute the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from p2pnet.client import operations_arithmetic as arithmetic
from p2pnet.client import operations_shapes as shapes
from p2pnet.client.builder import Builder, Given, Parts, Places, Ref, Weight, plain, unsupported
from p2pnet.client.operations_attention import product
from p2pnet.client.operations_modules import called


def apply_operation(builder: Builder, node: fx.Node) -> Any:
    """What a traced operation becomes: mostly a node, and then its Ref.

    Raises:
        SpecError: it is no component's.
    """
    args = fx.node.map_arg(tuple(node.args), builder.values.__getitem__)
    kwargs = fx.node.map_arg(dict(node.kwargs), builder.values.__getitem__)
    if node.op == "get_attr":
        value = node.meta["value"]
        return Weight(str(node.target), value) if isinstance(value, nn.Parameter) else value
    if node.op == "call_module":
        return called(builder, node, args, kwargs)
    if node.op == "placeholder":
        return node.meta["value"]
    known = not any(
        isinstance(value, Ref | Weight | Places | Parts) for value in _flat(args, kwargs)
    )
    if known:
        return node.meta["value"]  # of numbers and constants alone
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "getitem":
        return shapes.getitem(builder, node, args[0], args[1])
    if name in _OPERATIONS:
        return _OPERATIONS[name](builder, node, _bound(node, name, args, kwargs))
    raise unsupported(node, f"{name} is not in the catalogue", _advice(name))


Operation = Callable[[Builder, fx.Node, Given], Any]

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "gelu": ("x", "approximate"),
    "softmax": ("x", "dim"),
    "flatten": ("x", "start_dim", "end_dim"),
    "mean": ("x", "dim", "keepdim"),
    "dropout": ("x", "p", "training"),
    "transpose": ("x", "dim0", "dim1"),
    "cat": ("tensors", "dim"),
    "chunk": ("x", "chunks", "dim"),
    "split": ("x", "sizes", "dim"),
    "max_pool2d": ("x", "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "boolean_dispatch": ("x", "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool2d": (
        "x", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
    ),
    "adaptive_avg_pool2d": ("x", "output_size"),
    "linear": ("x", "weight", "bias"),
    "scaled_dot_product_attention": (
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal",
    ),
}  # fmt: skip
_ALSO_CALLED = {
    "input": "x", "self": "x", "axis": "dim", "split_size_or_sections": "sizes",
    "split_size": "sizes",
}  # fmt: skip


def _bound(node: fx.Node, name: str, args: Sequence[Any], kwargs: Given) -> Given:
    """Arguments by name; what has no name is in "rest"."""
    names = _ARGUMENTS.get(name, ("x",))
    given = dict(zip(names, args, strict=False))
    given |= {_ALSO_CALLED.get(key, key): value for key, value in kwargs.items()}
    given["rest"] = tuple(args[1:])
    return given


def _same_shape(kind: str, *keys: str) -> Operation:
    """A component that takes these arguments as its config, and nothing else."""

    def apply(builder: Builder, node: fx.Node, given: Given) -> Ref:
        config = {key: plain(given[key]) for key in keys if given.get(key) is not None}
        return builder.emit(node, kind, config, [given["x"]])

    return apply


def _mean(builder: Builder, node: fx.Node, given: Given) -> Ref:
    dim = given.get("dim")
    if dim is None:
        raise unsupported(node, "a mean over the whole batch", "name the dimensions, without 0")
    dims = [dim] if isinstance(dim, int) else list(dim)
    config = {"dim": dims, "keepdim": bool(given.get("keepdim", False))}
    return builder.emit(node, "Mean", config, [given["x"]])


def _dropout(builder: Builder, node: fx.Node, given: Given) -> Any:
    if not given.get("training", True):
        return given["x"]
    return builder.emit(node, "Dropout", {"p": float(given.get("p", 0.5))}, [given["x"]])


def _pass_on(builder: Builder, node: fx.Node, given: Given) -> Any:
    if node.meta["value"].dtype != torch.float32:
        raise unsupported(node, "another dtype", "activations are float32")
    return given["x"]


def _pool(kind: str, *keys: str) -> Operation:
    return _same_shape(kind, "kernel_size", "stride", "padding", *keys)


_OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(("add", "iadd", "add_"), arithmetic.add),
    **dict.fromkeys(("sub", "isub"), arithmetic.sub),
    "neg": arithmetic.neg,
    **dict.fromkeys(("mul", "imul", "multiply"), arithmetic.mul),
    **dict.fromkeys(("truediv", "div"), arithmetic.div),
    **dict.fromkeys(("relu", "relu_"), _same_shape("ReLU")),
    "silu": _same_shape("SiLU"),
    "gelu": _same_shape("GELU", "approximate"),
    "tanh": _same_shape("Tanh"),
    "sigmoid": _same_shape("Sigmoid"),
    "softmax": _same_shape("Softmax", "dim"),
    "dropout": _dropout,
    **dict.fromkeys(("cat", "concat"), shapes.cat),
    "flatten": _same_shape("Flatten", "start_dim", "end_dim"),
    **dict.fromkeys(("view", "reshape", "unflatten", "squeeze", "unsqueeze"), shapes.reshape),
    **dict.fromkeys(("transpose", "swapaxes"), _same_shape("Transpose", "dim0", "dim1")),
    "permute": shapes.permute,
    **dict.fromkeys(("chunk", "split"), shapes.split),
    "mean": _mean,
    **dict.fromkeys(
        ("max_pool2d", "boolean_dispatch"), _pool("MaxPool2d", "dilation", "ceil_mode")
    ),
    "avg_pool2d": _pool("AvgPool2d", "ceil_mode", "count_include_pad"),
    "adaptive_avg_pool2d": _same_shape("AdaptiveAvgPool2d", "output_size"),
    "linear": arithmetic.linear,
    "scaled_dot_product_attention": product,
    **dict.fromkeys(("contiguous", "float", "to"), _pass_on),
}


def _advice(name: str) -> str:
    if name in ("matmul", "bmm", "einsum", "masked_fill", "masked_fill_"):
        return (
            "attention is nn.MultiheadAttention or F.scaled_dot_product_attention; other "
            "products of tensors are not there"
        )
    if name in ("layer_norm", "batch_norm", "conv2d", "embedding", "rms_norm"):
        return "make it a layer of torch.nn, so that its weights are a layer's"
    return "docs/models.md lists what there is; rewrite the forward with that"


def _flat(args: Sequence[Any], kwargs: Given) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate((tuple(args), kwargs), found.append)
    return found
