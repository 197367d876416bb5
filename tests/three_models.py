"""An MLP, a ResNet and a transformer: as specs, as plain torch modules, and trained in plain torch.

A module's layers have the names of the spec's nodes, and begin with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2pnet.data.datasets import batches, open_data
from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.components import draw_seed
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.hosted import make_component
from p2pnet.vnode.tensors import Array

SEED = 7
BATCH = 24
TOKENS, VOCABULARY, WIDTH = 12, 20, 16
Batch = tuple[Array, Array]
Spec = dict[str, Any]


class Dropout(nn.Dropout):
    """torch's, drawn for (seed, node, step, micro-batch) as a VNode draws it."""

    where = (0, 0)

    def __init__(self, p: float, node: str) -> None:
        super().__init__(p)
        self.node = node

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(draw_seed(SEED, self.node, *self.where))
        return super().forward(x)


# --- MLP ----------------------------------------------------------------------


def _node(id: str, type: str, *inputs: str, **config: object) -> Spec:
    node: Spec = {"id": id, "type": type, "config": config}
    return node | ({"inputs": list(inputs)} if inputs else {})


MLP: Spec = {
    "inputs": {"x": {"shape": [64], "dtype": "float32"}},
    "nodes": [
        _node("fc1", "Linear", in_features=64, out_features=32),
        _node("act", "GELU"),
        _node("drop", "Dropout", p=0.1),
        _node("norm", "LayerNorm", normalized_shape=[32]),
        _node("fc2", "Linear", in_features=32, out_features=64),
        _node("skip", "Add", "fc2", "x"),
        _node("out", "Linear", in_features=64, out_features=10),
    ],
    "loss": {"id": "loss", "type": "CrossEntropyLoss"},
}


class PlainMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Linear(64, 32), nn.LayerNorm(32)
        self.drop = Dropout(0.1, "drop")
        self.fc2, self.out = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.out(self.fc2(self.norm(self.drop(F.gelu(self.fc1(x))))) + x)
        return h


# --- ResNet -------------------------------------------------------------------


def _conv(id: str, source: str, n: int, m: int, kernel: int = 3, stride: int = 1) -> list[Spec]:
    """A convolution and its norm."""
    sizes = {"kernel_size": kernel, "stride": stride, "padding": kernel // 2, "bias": False}
    return [
        _node(f"{id}.conv", "Conv2d", source, in_channels=n, out_channels=m, **sizes),
        _node(f"{id}.norm", "BatchNorm2d", num_features=m),
    ]


RESNET: Spec = {
    "inputs": {"x": {"shape": [1, 8, 8], "dtype": "float32"}},
    "nodes": [
        *_conv("stem", "x", 1, 6),
        _node("relu", "ReLU"),
        *_conv("a1", "relu", 6, 6),
        _node("a_relu", "ReLU"),
        *_conv("a2", "a_relu", 6, 6),
        _node("a_add", "Add", "a2.norm", "relu"),
        _node("a_out", "ReLU"),
        *_conv("b1", "a_out", 6, 10, stride=2),
        _node("b_relu", "ReLU"),
        *_conv("b2", "b_relu", 10, 10),
        *_conv("short", "a_out", 6, 10, kernel=1, stride=2),
        _node("b_add", "Add", "b2.norm", "short.norm"),
        _node("b_out", "ReLU"),
        _node("max", "MaxPool2d", kernel_size=2),
        _node("mean", "AdaptiveAvgPool2d", output_size=1),
        _node("flat", "Flatten"),
        _node("out", "Linear", in_features=10, out_features=10),
    ],
    "loss": {"id": "loss", "type": "CrossEntropyLoss"},
}


class PlainConv(nn.Module):
    def __init__(self, n: int, m: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n, m, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(m)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.conv(x))
        return h


class PlainResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = PlainConv(1, 6)
        self.a1, self.a2 = PlainConv(6, 6), PlainConv(6, 6)
        self.b1, self.b2 = PlainConv(6, 10, stride=2), PlainConv(10, 10)
        self.short = PlainConv(6, 10, kernel=1, stride=2)
        self.out = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = F.relu(self.a2(F.relu(self.a1(h))) + h)
        h = F.relu(self.b2(F.relu(self.b1(h))) + self.short(h))
        h = F.adaptive_avg_pool2d(F.max_pool2d(h, 2), 1)
        logits: Tensor = self.out(h.flatten(1))
        return logits


# --- transformer --------------------------------------------------------------


def _attend(id: str, source: str) -> list[Spec]:
    """A block of a transformer, norms first."""
    return [
        _node(f"{id}.norm1", "LayerNorm", source, normalized_shape=[WIDTH]),
        _node(f"{id}.attend", "MultiheadAttention", embed_dim=WIDTH, num_heads=2, causal=True),
        _node(f"{id}.drop", "Dropout", p=0.1),
        _node(f"{id}.add1", "Add", f"{id}.drop", source),
        _node(f"{id}.norm2", "RMSNorm", normalized_shape=[WIDTH]),
        _node(f"{id}.up", "Linear", in_features=WIDTH, out_features=2 * WIDTH),
        _node(f"{id}.act", "SiLU"),
        _node(f"{id}.down", "Linear", in_features=2 * WIDTH, out_features=WIDTH),
        _node(f"{id}.add2", "Add", f"{id}.down", f"{id}.add1"),
    ]


TRANSFORMER: Spec = {
    "inputs": {"x": {"shape": [TOKENS], "dtype": "int64"}},
    "nodes": [
        _node("embed", "Embedding", "x", num_embeddings=VOCABULARY, embedding_dim=WIDTH),
        _node("place", "PositionalEmbedding", num_embeddings=TOKENS, embedding_dim=WIDTH),
        *_attend("one", "place"),
        *_attend("two", "one.add2"),
        _node("norm", "LayerNorm", normalized_shape=[WIDTH]),
        _node("out", "TiedLinear") | {"tied": "embed"},
    ],
    "loss": {"id": "loss", "type": "CrossEntropyLoss", "config": {"class_dim": -1}},
}


class PlainBlock(nn.Module):
    def __init__(self, id: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.drop = Dropout(0.1, f"{id}.drop")
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm1(h)
        mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
        x, _ = self.attend(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
        h = self.drop(x) + h
        out: Tensor = self.down(F.silu(self.up(self.norm2(h)))) + h
        return out


class PlainTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.one, self.two = PlainBlock("one"), PlainBlock("two")
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place(torch.arange(TOKENS))
        return F.linear(self.norm(self.two(self.one(h))), self.embed.weight)


# --- batches ------------------------------------------------------------------


def _vectors(steps: int) -> list[Batch]:
    x, y = open_data("digits:train")
    found: list[Batch] = []
    for epoch in range(-(-steps * BATCH // len(x)) + 1):
        found += batches(x, y, BATCH, SEED, epoch)
    return found[:steps]


def _images(steps: int) -> list[Batch]:
    return [(x.reshape(-1, 1, 8, 8), y) for x, y in _vectors(steps)]


def _tokens(steps: int) -> list[Batch]:
    """Sequences that count on by a step of their own, now and then with a slip."""
    rng = np.random.default_rng(SEED)
    found: list[Batch] = []
    for step in range(steps):
        size = BATCH if step != 44 else 13  # one ragged batch, as the others have
        first, by = rng.integers(0, VOCABULARY, (2, size, 1))
        text = (first + by * np.arange(TOKENS + 1)) % VOCABULARY
        slips = rng.random(text.shape) < 0.05
        text[slips] = rng.integers(0, VOCABULARY, int(slips.sum()))
        found.append((text[:, :-1].copy(), text[:, 1:].copy()))
    return found


# --- the three ----------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A network: its spec without name and optimizer, the same in torch, and batches for it."""

    spec: Spec
    plain: Callable[[], nn.Module]
    batches: Callable[[int], list[Batch]]


MODELS = {
    "mlp": Model(MLP, PlainMLP, _vectors),
    "resnet": Model(RESNET, PlainResNet, _images),
    "transformer": Model(TRANSFORMER, PlainTransformer, _tokens),
}
OPTIMIZERS: dict[str, Spec] = {
    "SGD": {"type": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
    "Adam": {"type": "Adam", "lr": 2e-3},
    "AdamW": {"type": "AdamW", "lr": 2e-3, "weight_decay": 0.05},
}


def spec_of(model: Model, name: str, optimizer: str = "Adam", **settings: object) -> Spec:
    """The whole spec."""
    top = {"name": name, "optimizer": OPTIMIZERS[optimizer], "seed": SEED}
    return {**model.spec, **top, **settings}


def graph_of(model: Model, optimizer: str = "Adam", **settings: object) -> CompiledGraph:
    """The whole spec, compiled."""
    return load_spec(spec_of(model, "three", optimizer, **settings))


def parts(batch: Batch, micro_batches: int) -> list[Batch]:
    """A batch in micro-batches, as a feeder splits it."""
    x, y = (np.array_split(array, micro_batches) for array in batch)
    return list(zip(x, y, strict=True))


def first_weights(graph: CompiledGraph) -> dict[str, Array]:
    """What the VNodes begin with, by torch's names."""
    found: dict[str, Array] = {}
    for vnode in graph.vnodes():
        for name, array in make_component(graph, vnode).state().items():
            found[f"{vnode}.{name.split('.', 1)[1]}"] = array
    return found


def plainly_trained(
    model: Model, graph: CompiledGraph, steps: int
) -> tuple[dict[str, Array], list[float]]:
    """Weights, buffers and losses: one process, one thread, one autograd graph a micro-batch."""
    with one_thread():
        module = model.plain()
        first = {name: torch.from_numpy(array) for name, array in first_weights(graph).items()}
        module.load_state_dict(first)
        kind = getattr(torch.optim, graph.optimizer.type)
        optimizer = kind(module.parameters(), **graph.optimizer.config, foreach=False)
        drops = [part for part in module.modules() if isinstance(part, Dropout)]
        losses = []
        for step, batch in enumerate(model.batches(steps), start=1):
            optimizer.zero_grad()
            total = 0.0
            for number, (x, y) in enumerate(parts(batch, graph.micro_batches)):
                for drop in drops:
                    drop.where = (step, number)
                logits = module(torch.from_numpy(x)).flatten(0, -2)
                loss = F.cross_entropy(logits, torch.from_numpy(y).flatten())
                loss = loss * (len(x) / len(batch[0]))
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            if graph.clip_norm:
                nn.utils.clip_grad_norm_(module.parameters(), graph.clip_norm, foreach=False)
            optimizer.step()
            losses.append(total)
        return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}, losses


def worst_error(ours: Mapping[str, Array], plain: Mapping[str, Array]) -> tuple[float, str]:
    """The largest ||a - b|| / ||b|| of all tensors, and which one it is."""
    assert sorted(ours) == sorted(plain)
    errors = []
    for name, expected in plain.items():
        away = np.linalg.norm((ours[name] - expected).ravel())
        errors.append((float(away / (np.linalg.norm(expected.ravel()) or 1.0)), name))
    return max(errors)


def placements(vnodes: Sequence[str], hosts: int, seed: int) -> dict[str, list[str]]:
    """VNodes at random on so many hosts, each of which has one."""
    import random

    rng = random.Random(seed)
    placed: dict[str, list[str]] = {f"host{i}": [] for i in range(hosts)}
    for number, vnode in enumerate(rng.sample(list(vnodes), len(vnodes))):
        placed[f"host{number if number < hosts else rng.randrange(hosts)}"].append(vnode)
    return placed


@contextmanager
def one_thread() -> Iterator[None]:
    """As hosts compute: sums over several threads come out differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
