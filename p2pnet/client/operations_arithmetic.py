"""Sums, products and linear functions in a forward, and the parameters that they take."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from p2pnet.client.builder import Builder, Given, Places, Ref, Weight, sample_of, unsupported


def add(builder: Builder, node: fx.Node, given: Given) -> Any:
    """A sum of two outputs, or of one and an embedding of places."""
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
        return builder.emit(node, "Add", {}, [one, other])
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


def sub(builder: Builder, node: fx.Node, given: Given) -> Any:
    """x - y is x + -1 * y, to the bit."""
    one, other = _two(node, given)
    if not (isinstance(one, Ref) and isinstance(other, Ref) and one.shape == other.shape):
        raise unsupported(node, "a difference of other shapes", "subtract tensors of one shape")
    name = builder.named(node, "minus")
    negative = builder.add(name, "Scale", {"factor": -1.0}, [other], other.shape)
    return builder.emit(node, "Add", {}, [one, negative])


def neg(builder: Builder, node: fx.Node, given: Given) -> Any:
    """-x is -1 * x."""
    return builder.emit(node, "Scale", {"factor": -1.0}, [given["x"]])


def mul(builder: Builder, node: fx.Node, given: Given) -> Any:
    """A product of two outputs, or of one and a number."""
    one, other = _two(node, given)
    if isinstance(one, int | float):
        one, other = other, one
    if isinstance(one, Ref) and isinstance(other, int | float):
        return builder.emit(node, "Scale", {"factor": float(other)}, [one])
    if isinstance(one, Ref) and isinstance(other, Ref) and one.shape == other.shape:
        return builder.emit(node, "Mul", {}, [one, other])
    raise unsupported(node, "a product of other shapes", "multiply tensors of one shape")


def div(builder: Builder, node: fx.Node, given: Given) -> Any:
    """By a power of 2 only: with others, the reciprocal rounds."""
    one, other = _two(node, given)
    if isinstance(one, Ref) and isinstance(other, int | float) and math.frexp(other)[0] == 0.5:
        return builder.emit(node, "Scale", {"factor": 1 / other}, [one])
    raise unsupported(node, "a division", "multiply by the reciprocal, as a plain number")


def _two(node: fx.Node, given: Given) -> tuple[Any, Any]:
    other = given["rest"][0] if given["rest"] else given.get("other")
    if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
        raise unsupported(node, "an option of it", "leave alpha and rounding_mode out")
    return given["x"], other


def linear(builder: Builder, node: fx.Node, given: Given) -> Ref:
    """F.linear with an Embedding's weight."""
    weight = given.get("weight")
    if isinstance(weight, Weight) and given.get("bias") is None:
        whole = node_weight(builder, weight)
        if builder.home(whole) is not None:
            id = builder.named(node, "linear")
            return builder.tied(id, whole, [given["x"]], sample_of(node), "function")
    raise unsupported(node, "a linear function of other weights", "make it a torch.nn.Linear")
