"""Which operation of torch is which component: functions, methods, and modules of several.

An operation that is not here is refused with its name, its place and what to do instead.
Bits matter: an operation stands for a component only if both compute the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from p2pnet.client.decompose import (
    Builder,
    Places,
    Ref,
    Weight,
    config_of,
    sample_of,
    unsupported,
)
from p2pnet.errors import SpecError


@dataclass(frozen=True, slots=True)
class Parts:
    """What a chunk or a split gives: parts of a tensor along a dimension."""

    whole: Ref
    dim: int
    sizes: tuple[int, ...]


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
        return _module(builder, node, args, kwargs)
    if node.op == "placeholder":
        return node.meta["value"]
    known = not any(
        isinstance(value, Ref | Weight | Places | Parts) for value in _flat(args, kwargs)
    )
    if known:
        return node.meta["value"]  # of numbers and constants alone
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "getitem":
        return _getitem(builder, node, args[0], args[1])
    if name in _OPERATIONS:
        return _OPERATIONS[name](builder, node, _bound(node, name, args, kwargs))
    raise unsupported(node, f"{name} is not in the catalogue", _advice(name))


# --- modules ------------------------------------------------------------------


def _module(builder: Builder, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    path = str(node.target)
    module: Any = builder.model.get_submodule(path)
    kind = type(module).__name__
    if kind == "MultiheadAttention":
        return _attention(builder, node, path, module, args, kwargs)
    if kind == "TransformerEncoderLayer":
        return _encoder_layer(builder, node, path, module, args, kwargs)
    if kind == "TransformerEncoder":
        return _encoder(builder, node, path, module, args, kwargs)
    given = [*args, *kwargs.values()]
    if kind == "Embedding" and isinstance(given[0], Tensor):
        return _places(node, path, module, given[0])
    if len(given) != 1 or not isinstance(given[0], Ref):
        raise unsupported(node, f"{kind} takes one tensor of the network", "give it nothing else")
    if kind == "Identity":
        return given[0]
    if getattr(module, "inplace", False) and _others(node):
        raise unsupported(node, "inplace=True changes what others take too", "write inplace=False")
    return builder.layer(path, module, [given[0]], sample_of(node))


def _others(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and len(source.users) > 1


def _places(node: fx.Node, path: str, module: nn.Embedding, given: Tensor) -> Places:
    expected = torch.arange(given.shape[-1])
    if given.dtype != torch.int64 or not torch.equal(given.flatten(), expected):
        raise unsupported(
            node, "an Embedding of numbers that are no input", "take torch.arange(tokens)"
        )
    return Places(path, config_of(path, module))


def _attention(
    builder: Builder,
    node: fx.Node,
    path: str,
    module: nn.MultiheadAttention,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> tuple[Ref, None]:
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask",
             "average_attn_weights", "is_causal")  # fmt: skip
    given = dict(zip(names, args, strict=False)) | kwargs
    query = given["query"]
    if not isinstance(query, Ref) or not query == given["key"] == given["value"]:
        raise unsupported(node, "attention of one sequence to another", "give it x, x, x")
    if given.get("key_padding_mask") is not None:
        raise unsupported(node, "a key_padding_mask", "pad sequences to one length, or cut them")
    causal = _causal(node, given.get("attn_mask"), query.shape[0])
    config = attention_config(path, module, causal)
    if given.get("need_weights", True):
        config["need_weights"] = True
    shape = query.shape
    return builder.add(
        builder.once(path, module), "MultiheadAttention", config, [query], shape
    ), None


def attention_config(path: str, module: nn.MultiheadAttention, causal: bool) -> dict[str, Any]:
    """The settings of torch's module, of which the catalogue has the usual ones."""
    usual = (
        module.batch_first
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )
    if not usual:
        raise SpecError(
            f"layer {path}: MultiheadAttention needs batch_first=True, and has no kdim, vdim, "
            "add_bias_kv and add_zero_attn here"
        )
    return {
        "embed_dim": module.embed_dim,
        "num_heads": module.num_heads,
        "dropout": float(module.dropout),
        "bias": module.in_proj_bias is not None,
        "causal": causal,
    }


def _causal(node: fx.Node, mask: object, tokens: int) -> bool:
    """Whether a mask is the causal one; there may be none, but no other."""
    if mask is None:
        return False
    if isinstance(mask, Tensor) and mask.shape[-2:] == (tokens, tokens):
        closed = mask.reshape(-1, tokens, tokens)
        shut = closed if mask.dtype == torch.bool else closed == -math.inf
        zero = mask.dtype == torch.bool or bool((closed[~shut] == 0).all())
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        if zero and bool((shut == later).all()):
            return True
    raise unsupported(node, "a mask that is not the causal one", "take the causal mask, or none")


def _encoder(
    builder: Builder,
    node: fx.Node,
    path: str,
    module: nn.TransformerEncoder,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Ref:
    names = ("src", "mask", "src_key_padding_mask", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    x = given["src"]
    for number, layer in enumerate(module.layers):
        inner = {"src_mask": given.get("mask"),
                 "src_key_padding_mask": given.get("src_key_padding_mask")}  # fmt: skip
        x = _encoder_layer(builder, node, f"{path}.layers.{number}", layer, [x], inner)
    if module.norm is not None:
        x = builder.layer(f"{path}.norm", module.norm, [x], x.shape)
    return x  # type: ignore[no-any-return]


def _encoder_layer(
    builder: Builder,
    node: fx.Node,
    path: str,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Ref:
    """torch.nn.TransformerEncoderLayer, as its forward in training has it."""
    names = ("src", "src_mask", "src_key_padding_mask", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    x = given["src"]
    if not isinstance(x, Ref) or given.get("src_key_padding_mask") is not None:
        raise unsupported(node, "a padding mask", "pad sequences to one length, or cut them")
    causal = _causal(node, given.get("src_mask"), x.shape[0])
    layer: Any = module

    def within(name: str) -> str:
        return f"{path}.{name}"

    def attend(x: Ref) -> Ref:
        config = attention_config(within("self_attn"), layer.self_attn, causal)
        x = builder.add(within("self_attn"), "MultiheadAttention", config, [x], x.shape)
        return builder.layer(within("dropout1"), layer.dropout1, [x], x.shape)

    def forward(x: Ref) -> Ref:
        wide = (*x.shape[:-1], layer.linear1.out_features)
        shape = x.shape
        x = builder.layer(within("linear1"), layer.linear1, [x], wide)
        x = _activation(builder, node, within("activation"), layer.activation, x)
        x = builder.layer(within("dropout"), layer.dropout, [x], wide)
        x = builder.layer(within("linear2"), layer.linear2, [x], shape)
        return builder.layer(within("dropout2"), layer.dropout2, [x], shape)

    def norm(number: int, x: Ref) -> Ref:
        return builder.layer(within(f"norm{number}"), getattr(layer, f"norm{number}"), [x], x.shape)

    def both(number: int, x: Ref, other: Ref) -> Ref:
        return builder.add(within(f"add{number}"), "Add", {}, [x, other], x.shape)

    if layer.norm_first:
        x = both(1, x, attend(norm(1, x)))
        return both(2, x, forward(norm(2, x)))
    x = norm(1, both(1, x, attend(x)))
    return norm(2, both(2, x, forward(x)))


def _activation(builder: Builder, node: fx.Node, id: str, function: Any, x: Ref) -> Ref:
    if isinstance(function, nn.Module):
        return builder.layer(id, function, [x], x.shape)
    kind = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU"}.get(getattr(function, "__name__", ""))
    if kind is None:
        raise unsupported(node, f"the activation {function}", "take relu or gelu")
    return builder.add(id, kind, {}, [x], x.shape)


# --- functions and methods ----------------------------------------------------

Given = dict[str, Any]
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
        config = {key: _as_plain(given[key]) for key in keys if given.get(key) is not None}
        return _emit(builder, node, kind, config, [given["x"]])

    return apply


def _emit(builder: Builder, node: fx.Node, kind: str, config: Given, inputs: Sequence[Any]) -> Ref:
    for value in inputs:
        if not isinstance(value, Ref):
            raise unsupported(
                node, f"{kind} of something that is no output of a layer",
                "weights of their own belong into a layer of torch.nn",
            )  # fmt: skip
    return builder.add(
        builder.named(node, node.name.rstrip("_0123456789") or kind.lower()),
        kind, config, inputs, sample_of(node),
    )  # fmt: skip


def _add(builder: Builder, node: fx.Node, given: Given) -> Any:
    one, other = _two(node, given)
    if isinstance(one, Places | Weight):
        one, other = other, one
    if isinstance(one, Ref) and isinstance(other, Places):
        return builder.add(other.id, "PositionalEmbedding", other.config, [one], sample_of(node))
    if isinstance(one, Ref) and isinstance(other, Weight):
        return _added_weight(builder, node, one, other)
    if isinstance(one, Ref) and isinstance(other, Ref):
        if one.shape != other.shape:
            raise unsupported(
                node, f"a sum of {list(one.shape)} and {list(other.shape)}", "give both one shape"
            )
        return _emit(builder, node, "Add", {}, [one, other])
    raise unsupported(node, "a sum with something else than a tensor", "leave it out")


def _added_weight(builder: Builder, node: fx.Node, x: Ref, weight: Weight) -> Ref:
    """A parameter of [tokens, values], with a 1 before it or not, is a positional embedding."""
    whole = node_weight(builder, weight)
    batched = whole.ndim == 3 and len(whole) == 1
    if len(x.shape) != 2 or whole.ndim - batched != 2 or weight.value.shape[-2:] != x.shape:
        raise unsupported(node, f"the parameter {weight.name}", "put it into a layer of torch.nn")
    config = {
        "num_embeddings": whole.shape[-2],
        "embedding_dim": whole.shape[-1],
        "kept_as": "batched parameter" if batched else "parameter",
    }
    return builder.add(weight.name, "PositionalEmbedding", config, [x], sample_of(node))


def node_weight(builder: Builder, weight: Weight) -> Tensor:
    """The whole parameter of which a forward may have taken a part."""
    value: Any = builder.model
    for part in weight.name.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def _sub(builder: Builder, node: fx.Node, given: Given) -> Any:
    """x - y is x + -1 * y, to the bit."""
    one, other = _two(node, given)
    if not (isinstance(one, Ref) and isinstance(other, Ref) and one.shape == other.shape):
        raise unsupported(node, "a difference of other shapes", "subtract tensors of one shape")
    name = builder.named(node, "minus")
    negative = builder.add(name, "Scale", {"factor": -1.0}, [other], other.shape)
    return _emit(builder, node, "Add", {}, [one, negative])


def _neg(builder: Builder, node: fx.Node, given: Given) -> Any:
    return _emit(builder, node, "Scale", {"factor": -1.0}, [given["x"]])


def _mul(builder: Builder, node: fx.Node, given: Given) -> Any:
    one, other = _two(node, given)
    if isinstance(one, int | float):
        one, other = other, one
    if isinstance(one, Ref) and isinstance(other, int | float):
        return _emit(builder, node, "Scale", {"factor": float(other)}, [one])
    if isinstance(one, Ref) and isinstance(other, Ref) and one.shape == other.shape:
        return _emit(builder, node, "Mul", {}, [one, other])
    raise unsupported(node, "a product of other shapes", "multiply tensors of one shape")


def _div(builder: Builder, node: fx.Node, given: Given) -> Any:
    one, other = _two(node, given)
    if isinstance(one, Ref) and isinstance(other, int | float) and math.frexp(other)[0] == 0.5:
        return _emit(builder, node, "Scale", {"factor": 1 / other}, [one])
    raise unsupported(node, "a division", "multiply by the reciprocal, as a plain number")


def _two(node: fx.Node, given: Given) -> tuple[Any, Any]:
    other = given["rest"][0] if given["rest"] else given.get("other")
    if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
        raise unsupported(node, "an option of it", "leave alpha and rounding_mode out")
    return given["x"], other


def _reshape(builder: Builder, node: fx.Node, given: Given) -> Any:
    x, wanted = given["x"], sample_of(node)
    if not isinstance(x, Ref) or math.prod(x.shape) != math.prod(wanted):
        raise unsupported(node, "it mixes the samples of a batch", "keep dimension 0 as it is")
    if wanted == x.shape:
        return x
    # A dimension that stays where it is may be a sequence's, of any length.
    kept = [place < len(x.shape) and x.shape[place] == n for place, n in enumerate(wanted)]
    shape = [0 if keep else length for keep, length in zip(kept, wanted, strict=True)]
    return _emit(builder, node, "Reshape", {"shape": shape or [1]}, [x])


def _permute(builder: Builder, node: fx.Node, given: Given) -> Ref:
    dims: Any = given.get("dims", given["rest"])
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    ndim = 1 + len(given["x"].shape)
    return _emit(builder, node, "Permute", {"dims": [dim % ndim for dim in dims]}, [given["x"]])


def _cat(builder: Builder, node: fx.Node, given: Given) -> Ref:
    return _emit(builder, node, "Concat", {"dim": given.get("dim", 0)}, list(given["tensors"]))


def _mean(builder: Builder, node: fx.Node, given: Given) -> Ref:
    dim = given.get("dim")
    if dim is None:
        raise unsupported(node, "a mean over the whole batch", "name the dimensions, without 0")
    dims = [dim] if isinstance(dim, int) else list(dim)
    config = {"dim": dims, "keepdim": bool(given.get("keepdim", False))}
    return _emit(builder, node, "Mean", config, [given["x"]])


def _dropout(builder: Builder, node: fx.Node, given: Given) -> Any:
    if not given.get("training", True):
        return given["x"]
    return _emit(builder, node, "Dropout", {"p": float(given.get("p", 0.5))}, [given["x"]])


def _split(builder: Builder, node: fx.Node, given: Given) -> Parts:
    dim, x = given.get("dim", 0), given["x"]
    values = node.meta["value"]
    if not isinstance(x, Ref) or dim % values[0].ndim == 0:
        raise unsupported(node, "it takes the batch apart", "split another dimension than 0")
    return Parts(x, dim, tuple(value.shape[dim] for value in values))


def _getitem(builder: Builder, node: fx.Node, value: Any, index: Any) -> Any:
    if isinstance(value, tuple | list | torch.Size):
        return value[index]
    if isinstance(value, Parts):
        start = sum(value.sizes[:index])
        config = {"dim": value.dim, "start": start, "length": value.sizes[index]}
        return builder.add(
            builder.named(node, "part"), "Narrow", config, [value.whole], sample_of(node)
        )
    if isinstance(value, Weight):
        found = node.meta["value"]
        return Weight(value.name, found)
    if isinstance(value, Ref):
        return _sliced(builder, node, value, index if isinstance(index, tuple) else (index,))
    raise unsupported(node, "it takes a part of something", "take it from a layer's output")


def _sliced(builder: Builder, node: fx.Node, x: Ref, index: tuple[Any, ...]) -> Ref:
    """x[:, 3] and x[:, 2:5] are parts; the batch stays whole."""
    if index[0] != slice(None) or not all(isinstance(part, int | slice) for part in index):
        raise unsupported(node, "such an index", "take x[:, number] or x[:, from:to]")
    for dim, part in enumerate(index[1:], start=1):
        length = x.shape[dim - 1]
        whole = part if isinstance(part, slice) else slice(part % length, part % length + 1)
        start, stop, step = whole.indices(length)
        if step != 1 or stop <= start:
            raise unsupported(node, "such an index", "take x[:, number] or x[:, from:to]")
        if (start, stop) != (0, length):
            shape = (*x.shape[: dim - 1], stop - start, *x.shape[dim:])
            config = {"dim": dim, "start": start, "length": stop - start}
            x = builder.add(builder.named(node, "part"), "Narrow", config, [x], shape)
    wanted = sample_of(node)
    if wanted != x.shape:
        x = builder.add(
            builder.named(node, "pick"), "Reshape", {"shape": list(wanted)}, [x], wanted
        )
    return x


def _linear(builder: Builder, node: fx.Node, given: Given) -> Ref:
    weight = given.get("weight")
    if isinstance(weight, Weight) and given.get("bias") is None:
        whole = node_weight(builder, weight)
        if builder.home(whole) is not None:
            id = builder.named(node, "linear")
            return builder.tied(id, whole, [given["x"]], sample_of(node), "function")
    raise unsupported(node, "a linear function of other weights", "make it a torch.nn.Linear")


def _product(builder: Builder, node: fx.Node, given: Given) -> Ref:
    query = given["query"]
    causal = bool(given.get("is_causal")) or _causal(node, given.get("attn_mask"), query.shape[-2])
    for option in ("scale", "enable_gqa"):
        if given.get(option):
            raise unsupported(node, f"{option}={given[option]}", "leave it out")
    config = {"causal": causal, "dropout": float(given.get("dropout_p") or 0.0)}
    inputs = [query, given["key"], given["value"]]
    return _emit(builder, node, "ScaledDotProductAttention", config, inputs)


def _pass_on(builder: Builder, node: fx.Node, given: Given) -> Any:
    if node.meta["value"].dtype != torch.float32:
        raise unsupported(node, "another dtype", "activations are float32")
    return given["x"]


def _pool(kind: str, *keys: str) -> Operation:
    return _same_shape(kind, "kernel_size", "stride", "padding", *keys)


_OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(("add", "iadd", "add_"), _add),
    **dict.fromkeys(("sub", "isub"), _sub),
    "neg": _neg,
    **dict.fromkeys(("mul", "imul", "multiply"), _mul),
    **dict.fromkeys(("truediv", "div"), _div),
    **dict.fromkeys(("relu", "relu_"), _same_shape("ReLU")),
    "silu": _same_shape("SiLU"),
    "gelu": _same_shape("GELU", "approximate"),
    "tanh": _same_shape("Tanh"),
    "sigmoid": _same_shape("Sigmoid"),
    "softmax": _same_shape("Softmax", "dim"),
    "dropout": _dropout,
    **dict.fromkeys(("cat", "concat"), _cat),
    "flatten": _same_shape("Flatten", "start_dim", "end_dim"),
    **dict.fromkeys(("view", "reshape", "unflatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("transpose", "swapaxes"), _same_shape("Transpose", "dim0", "dim1")),
    "permute": _permute,
    **dict.fromkeys(("chunk", "split"), _split),
    "mean": _mean,
    **dict.fromkeys(
        ("max_pool2d", "boolean_dispatch"), _pool("MaxPool2d", "dilation", "ceil_mode")
    ),
    "avg_pool2d": _pool("AvgPool2d", "ceil_mode", "count_include_pad"),
    "adaptive_avg_pool2d": _same_shape("AdaptiveAvgPool2d", "output_size"),
    "linear": _linear,
    "scaled_dot_product_attention": _product,
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


def _as_plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | torch.Size) else value
