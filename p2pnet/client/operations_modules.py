"""Modules in a forward: a layer of the catalogue, or one that is made of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from p2pnet.client.builder import Builder, Places, Ref, config_of, sample_of, unsupported
from p2pnet.client.operations_attention import attention, encoder, encoder_layer


def called(builder: Builder, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a module's call becomes: a layer's Ref, or what it gives on to others."""
    path = str(node.target)
    module: Any = builder.model.get_submodule(path)
    kind = type(module).__name__
    if kind == "MultiheadAttention":
        return attention(builder, node, path, module, args, kwargs)
    if kind == "TransformerEncoderLayer":
        return encoder_layer(builder, node, path, module, args, kwargs)
    if kind == "TransformerEncoder":
        return encoder(builder, node, path, module, args, kwargs)
    given = [*args, *kwargs.values()]
    if kind == "Embedding" and isinstance(given[0], Tensor):
        return _places(node, path, module, given[0])
    if len(given) != 1 or not isinstance(given[0], Ref):
        raise unsupported(node, f"{kind} takes one tensor of the network", "give it nothing else")
    if kind == "Identity":
        return given[0]
    return builder.layer(path, module, [given[0]], sample_of(node))


def _places(node: fx.Node, path: str, module: nn.Embedding, given: Tensor) -> Places:
    expected = torch.arange(given.shape[-1])
    if given.dtype != torch.int64 or not torch.equal(given.flatten(), expected):
        raise unsupported(
            node, "an Embedding of numbers that are no input", "take torch.arange(tokens)"
        )
    return Places(path, config_of(path, module))
