"""What changes a tensor's shape in a forward, or takes a part of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from p2pnet.client.builder import Builder, Given, Parts, Ref, Weight, sample_of, unsupported


def reshape(builder: Builder, node: fx.Node, given: Given) -> Any:
    """view, reshape, squeeze and unsqueeze: all but dimension 0 may change."""
    x, wanted = given["x"], sample_of(node)
    if not isinstance(x, Ref) or math.prod(x.shape) != math.prod(wanted):
        raise unsupported(node, "it mixes the samples of a batch", "keep dimension 0 as it is")
    if wanted == x.shape:
        return x
    # A dimension that stays where it is may be a sequence's, of any length.
    kept = [place < len(x.shape) and x.shape[place] == n for place, n in enumerate(wanted)]
    shape = [0 if keep else length for keep, length in zip(kept, wanted, strict=True)]
    return builder.emit(node, "Reshape", {"shape": shape or [1]}, [x])


def permute(builder: Builder, node: fx.Node, given: Given) -> Ref:
    """permute, its dimensions one by one or in a tuple."""
    dims: Any = given.get("dims", given["rest"])
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    ndim = 1 + len(given["x"].shape)
    return builder.emit(node, "Permute", {"dims": [dim % ndim for dim in dims]}, [given["x"]])


def cat(builder: Builder, node: fx.Node, given: Given) -> Ref:
    """cat, of outputs."""
    tensors = given["tensors"]
    if isinstance(tensors, Parts):
        tensors = [_part(builder, node, tensors, index) for index in range(len(tensors.sizes))]
    return builder.emit(node, "Concat", {"dim": given.get("dim", 0)}, list(tensors))


def split(builder: Builder, node: fx.Node, given: Given) -> Parts:
    """chunk and split, along another dimension than the batch's."""
    dim, x = given.get("dim", 0), given["x"]
    values = node.meta["value"]
    if not isinstance(x, Ref) or dim % values[0].ndim == 0:
        raise unsupported(node, "it takes the batch apart", "split another dimension than 0")
    return Parts(x, dim, tuple(value.shape[dim] for value in values))


def getitem(builder: Builder, node: fx.Node, value: Any, index: Any) -> Any:
    """A part of what a split gives, of a parameter or of an output."""
    if isinstance(value, tuple | list | torch.Size):
        return value[index]
    if isinstance(value, Parts) and isinstance(index, int):
        return _part(builder, node, value, index)
    if isinstance(value, Weight):
        found = node.meta["value"]
        return Weight(value.name, found)
    if isinstance(value, Ref):
        return _sliced(builder, node, value, index if isinstance(index, tuple) else (index,))
    raise unsupported(node, "it takes a part of something", "take it from a layer's output")


def _part(builder: Builder, node: fx.Node, parts: Parts, index: int) -> Ref:
    length = parts.sizes[index]
    config = {"dim": parts.dim, "start": sum(parts.sizes[:index]), "length": length}
    shape = list(parts.whole.shape)
    shape[parts.dim % (1 + len(shape)) - 1] = length
    return builder.add(builder.named(node, "part"), "Narrow", config, [parts.whole], shape)


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
