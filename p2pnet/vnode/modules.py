"""The catalogue's modules: torch's own, and what torch has as functions or not at all.

Importing this module imports torch: only the compute thread does (`p2pnet.vnode.executor`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2pnet.vnode.catalogue import LOCAL_HEAD
from p2pnet.vnode.rules import HEAD_POOL


@dataclass(slots=True)
class Cache:
    """What a component keeps of a sequence that comes in parts (inference).

    Attributes:
        tokens: how many there were so far.
        keys, values: an attention's, [samples, heads, tokens, values], from the first part on.
    """

    tokens: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Of keys and values."""
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in (self.keys, self.values)
            if tensor is not None
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of a part to all there was and itself; takes its keys and values."""
        if self.keys is not None and self.values is not None:
            key = torch.cat([self.keys, key], dim=-2)
            value = torch.cat([self.values, value], dim=-2)
        self.keys, self.values = key, value
        before, part = self.tokens, query.shape[-2]
        self.tokens += part
        if not before:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        if part == 1:
            return F.scaled_dot_product_attention(query, key, value)
        seen = torch.ones(part, before + part, dtype=torch.bool, device=query.device).tril(before)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


class Add(nn.Module):
    """The sum of its inputs, in slot order."""

    def forward(self, *inputs: Tensor) -> Tensor:
        total = inputs[0]
        for other in inputs[1:]:
            total = total + other
        return total


class Mul(nn.Module):
    """The product of its inputs, element by element, in slot order."""

    def forward(self, *inputs: Tensor) -> Tensor:
        product = inputs[0]
        for other in inputs[1:]:
            product = product * other
        return product


class Concat(nn.Module):
    """torch.cat of its inputs, in slot order."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, dim=self.dim)


class Scale(nn.Module):
    """Its input times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Mean(nn.Module):
    """The mean over some dimensions."""

    def __init__(self, dim: Sequence[int], keepdim: bool) -> None:
        super().__init__()
        self.dim, self.keepdim = tuple(dim), keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim, keepdim=self.keepdim)


class Transpose(nn.Module):
    """Two dimensions change places."""

    def __init__(self, dim0: int, dim1: int) -> None:
        super().__init__()
        self.dim0, self.dim1 = dim0, dim1

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(self.dim0, self.dim1)


class Permute(nn.Module):
    """Dimensions in another order."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class Reshape(nn.Module):
    """A sample in another shape: 0 is the input's length at that place, -1 what is left."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (length or x.shape[1 + place] for place, length in enumerate(self.shape))
        return x.reshape(len(x), *lengths)


class Narrow(nn.Module):
    """A part of a dimension, as torch.narrow takes it."""

    def __init__(self, dim: int, start: int, length: int) -> None:
        super().__init__()
        self.dim, self.start, self.length = dim, start, length

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.dim, self.start, self.length)


class Embedding(nn.Embedding):
    """torch's, with a second entry that goes back from the embedding by the same weight."""

    def scores(self, x: Tensor) -> Tensor:
        """As a Linear without bias that has the weight: what a TiedLinear computes."""
        return F.linear(x, self.weight)


class PositionalEmbedding(nn.Embedding):
    """Adds the embedding of a token's place in the sequence to the token."""

    def __init__(self, num_embeddings: int, embedding_dim: int, kept_as: str) -> None:
        super().__init__(num_embeddings, embedding_dim)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        first = cache.tokens if cache else 0
        places = torch.arange(first, first + x.shape[1], device=x.device)
        if cache:
            cache.tokens += x.shape[1]
        return x + super().forward(places)


class MultiheadAttention(nn.MultiheadAttention):
    """torch's, batch first, of a sequence to itself, and causal if asked for."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        bias: bool,
        causal: bool,
        need_weights: bool,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout=dropout, bias=bias, batch_first=True)
        self.causal, self.need_weights = causal, need_weights

    def forward(  # type: ignore[override]
        self, x: Tensor, cache: Cache | None = None
    ) -> Tensor:
        if cache is not None:
            return self._next(x, cache)
        # What the class calls; but the class has another, inexact way for inference.
        turned = x.transpose(1, 0)
        mask = None
        if self.causal:
            mask = x.new_ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        output, _ = F.multi_head_attention_forward(
            turned, turned, turned, self.embed_dim, self.num_heads,
            self.in_proj_weight, self.in_proj_bias, None, None, False, self.dropout,
            self.out_proj.weight, self.out_proj.bias, training=self.training,
            need_weights=self.need_weights, attn_mask=mask,
            is_causal=self.causal and not self.need_weights,
        )  # fmt: skip
        return output.transpose(1, 0)

    def _next(self, x: Tensor, cache: Cache) -> Tensor:
        samples, tokens, width = x.shape
        heads = (samples, tokens, self.num_heads, width // self.num_heads)
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        query, key, value = (part.view(heads).transpose(1, 2) for part in projected)
        output = cache.attend(query, key, value).transpose(1, 2).reshape(x.shape)
        return F.linear(output, self.out_proj.weight, self.out_proj.bias)


class ScaledDotProductAttention(nn.Module):
    """The inner part of an attention: a query, keys and values, [samples, ..., tokens, values]."""

    def __init__(self, causal: bool, dropout: float) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Cache | None = None
    ) -> Tensor:
        if cache is not None:
            return cache.attend(query, key, value)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=self.causal
        )


class ClassLoss(nn.CrossEntropyLoss):
    """torch's; with class_dim -1, of [..., classes] against [...], as people flatten both."""

    def __init__(self, reduction: str, label_smoothing: float, class_dim: int) -> None:
        super().__init__(reduction=reduction, label_smoothing=label_smoothing)
        self.class_dim = class_dim

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.class_dim == -1:
            prediction, target = prediction.flatten(0, -2), target.flatten()
        return super().forward(prediction, target)


class LocalHead(nn.Module):
    """Layers over what a block gives, and a loss of their prediction (`vnode.local`)."""

    def __init__(
        self,
        loss: str,
        over: str,
        in_features: int,
        out_features: int,
        hidden: int,
        label_smoothing: float,
        class_dim: int,
    ) -> None:
        super().__init__()
        self.over = over
        self.norm = nn.LayerNorm(in_features)
        self.hidden = nn.Linear(in_features, hidden) if hidden else None
        self.out = nn.Linear(hidden or in_features, out_features)
        self.loss: nn.Module = nn.MSELoss()
        if loss == "CrossEntropyLoss":
            self.loss = ClassLoss("mean", label_smoothing, class_dim)

    def predict(self, x: Tensor, target: Tensor) -> Tensor:
        """The prediction, in the target's shape if that is no class."""
        if self.over == "picture":
            height, width = (min(HEAD_POOL, side) for side in x.shape[2:])
            x = F.adaptive_avg_pool2d(x, (height, width))
        if self.over != "last":
            x = x.flatten(1)
        x = self.norm(x)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
        x = self.out(x)
        return x.view(target.shape) if target.is_floating_point() else x


MODULES: dict[str, Callable[..., nn.Module]] = {
    "Linear": nn.Linear,
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
    "Flatten": nn.Flatten,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "Softmax": nn.Softmax,
    "Dropout": nn.Dropout,
    "Identity": nn.Identity,
    "Add": Add,
    "Mul": Mul,
    "Concat": Concat,
    "Scale": Scale,
    "Mean": Mean,
    "Transpose": Transpose,
    "Permute": Permute,
    "Reshape": Reshape,
    "Narrow": Narrow,
    "Conv2d": nn.Conv2d,
    "MaxPool2d": nn.MaxPool2d,
    "AvgPool2d": nn.AvgPool2d,
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d,
    "Embedding": Embedding,
    "PositionalEmbedding": PositionalEmbedding,
    "MultiheadAttention": MultiheadAttention,
    "ScaledDotProductAttention": ScaledDotProductAttention,
    LOCAL_HEAD: LocalHead,
    "MSELoss": nn.MSELoss,
    "CrossEntropyLoss": ClassLoss,
}

# Whose forward takes a cache, if it is causal or knows a token's place.
CACHED = ("PositionalEmbedding", "MultiheadAttention", "ScaledDotProductAttention")
