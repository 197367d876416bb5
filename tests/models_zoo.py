"""Three models as people write them, small: an MLP with a skip, a ResNet, a transformer.

Each with its loss, an optimizer and seeded batches, for tests of many kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from p2pnet.vnode.tensors import Array

SEED = 11
TOKENS, CLASSES, VOCABULARY = 12, 4, 17


class SkipMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 24)
        self.fc2 = nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(x))
        return self.out(self.norm(x + self.fc2(hidden)))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """As torchvision's, with two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = BasicBlock(6, 6, 1)
        self.layer2 = BasicBlock(6, 10, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        # The true gradient of a key's bias is 0: what Adam makes of its rounding is noise, and
        # a norm to clip by that is another in the last bit would give other noise.
        self.attention = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        h, _ = self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)
        x = x + h
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A GPT: learned places, blocks with the norms first, and the head tied to the embedding."""

    def __init__(self, width: int = 16, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        _, length = x.shape
        h = self.tokens(x) + self.places(torch.arange(length, device=x.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        for block in self.blocks:
            h = block(h, mask)
        return self.head(self.norm(h))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Example:
    """A model and how it is trained.

    `make` always gives the same weights; `loss` is torch's, of a prediction and a target.
    """

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    optimizer: dict[str, Any]
    tokens: bool = False
    loss: str = "CrossEntropyLoss"
    settings: dict[str, Any] = field(default_factory=dict)

    def batches(self, count: int, size: int = 12) -> list[tuple[Array, Array]]:
        """Seeded batches: inputs, and classes that have to do with them."""
        rng = np.random.default_rng(SEED)
        return [self._batch(rng, size) for _ in range(count)]

    def _batch(self, rng: np.random.Generator, size: int) -> tuple[Array, Array]:
        if self.tokens:
            text = (rng.integers(VOCABULARY, size=(size, 1)) + np.arange(TOKENS + 1)) % VOCABULARY
            return text[:, :-1].astype(np.int64), text[:, 1:].astype(np.int64)
        x = rng.standard_normal((size, *self.input_shape)).astype(np.float32)
        flat = x.reshape(size, -1)
        return x, flat[:, :CLASSES].argmax(axis=1).astype(np.int64)

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss as people write it in plain torch."""
        if self.tokens:
            prediction, target = prediction.flatten(0, -2), target.flatten()
        return nn.functional.cross_entropy(prediction, target)

    def plain_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """torch's own, for the model."""
        config = {key: value for key, value in self.optimizer.items() if key != "type"}
        made: torch.optim.Optimizer = getattr(torch.optim, self.optimizer["type"])(
            model.parameters(), **config
        )
        return made


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return make()

    return made


def mlp() -> Example:
    return Example("mlp", _seeded(SkipMLP), (16,), {"type": "Adam", "lr": 1e-3})


def resnet() -> Example:
    return Example(
        "resnet", _seeded(ResNet), (3, 8, 8), {"type": "SGD", "lr": 0.05, "momentum": 0.9}
    )


def transformer() -> Example:
    return Example(
        "transformer", _seeded(Transformer), (TOKENS,), {"type": "AdamW", "lr": 1e-3}, tokens=True
    )


EXAMPLES = {example.name: example for example in (mlp(), resnet(), transformer())}
