"""Attention, and torch's modules that are made of it, as components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from p2pnet.client.builder import Builder, Given, Ref, unsupported
from p2pnet.errors import SpecError


def attention(
    builder: Builder,
    node: fx.Node,
    path: str,
    module: nn.MultiheadAttention,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> tuple[Ref, None]:
    """nn.MultiheadAttention of a sequence to itself; its weights are not given."""
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


def encoder(
    builder: Builder,
    node: fx.Node,
    path: str,
    module: nn.TransformerEncoder,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Ref:
    """torch.nn.TransformerEncoder, layer by layer."""
    names = ("src", "mask", "src_key_padding_mask", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    x = given["src"]
    for number, layer in enumerate(module.layers):
        inner = {"src_mask": given.get("mask"),
                 "src_key_padding_mask": given.get("src_key_padding_mask")}  # fmt: skip
        x = encoder_layer(builder, node, f"{path}.layers.{number}", layer, [x], inner)
    if module.norm is not None:
        x = builder.layer(f"{path}.norm", module.norm, [x], x.shape)
    return x  # type: ignore[no-any-return]


def encoder_layer(
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


def product(builder: Builder, node: fx.Node, given: Given) -> Ref:
    """F.scaled_dot_product_attention."""
    query = given["query"]
    causal = bool(given.get("is_causal")) or _causal(node, given.get("attn_mask"), query.shape[-2])
    for option in ("scale", "enable_gqa"):
        if given.get(option):
            raise unsupported(node, f"{option}={given[option]}", "leave it out")
    config = {"causal": causal, "dropout": float(given.get("dropout_p") or 0.0)}
    inputs = [query, given["key"], given["value"]]
    return builder.emit(node, "ScaledDotProductAttention", config, inputs)
