"""`python -m benchmarks.local_learning`: rules that need no gradient from the next block.

Plain torch on one thread, no network: which auxiliary head should a block have, what
does it cost, and how far is it from backpropagation? See docs/local_learning.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from p2pnet.data.datasets import batches, open_data
from p2pnet.vnode.components import init_seed

Batches = Iterator[tuple[Tensor, Tensor]]
BATCH, SEQUENCES = 32, 16
CONTEXT = 64  # tokens of a sequence
THRESHOLD = 2.0  # of Forward-Forward's goodness
HIDDEN = 128  # of the one-hidden-layer head


class Block(nn.Module):
    """Layers one after the other. With `skip` it adds the network's input."""

    def __init__(self, *layers: nn.Module, skip: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.skip = skip

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.layers(h)
        return out + x if self.skip else out


class Residual(nn.Module):
    """He et al. 2015: two convolutions beside the identity, before the last ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.layers(h) + h
        return out


class Embed(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.tokens(tokens) + self.positions.weight
        return out


class Attend(nn.Module):
    """A transformer's block, norms first (Xiong et al. 2020), causal."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        n, t, width = h.shape
        qkv = self.qkv(self.norm1(h)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        seen = torch.ones(t, t).tril().log()
        # Written out: the counter of FLOPs does not see fused attention on CPUs.
        mixed = ((q @ k.mT) / math.sqrt(q.shape[-1]) + seen).softmax(-1) @ v
        h = h + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        out: Tensor = h + self.down(F.gelu(self.up(self.norm2(h))))
        return out


@dataclass(frozen=True)
class Task:
    """A network as the blocks it is cut into, and its data."""

    blocks: Callable[[int], list[Block]]  # of a seed; the last one's output are logits, y last
    train: Callable[[int], Batches]  # of a seed, without end
    test: Callable[[], Batches]
    steps: int
    classes: int


def seeded(seed: int, parts: Sequence[Callable[[], Block]]) -> list[Block]:
    """Each block from a seed of its own, as VNodes are."""
    blocks = []
    for i, make in enumerate(parts):
        torch.manual_seed(init_seed(seed, f"block{i}"))
        blocks.append(make())
    return blocks


def demo(seed: int) -> list[Block]:
    """digits.yaml: fc1 and act1, fc2 and the skip, out."""
    return seeded(
        seed,
        [
            lambda: Block(nn.Linear(64, 128), nn.ReLU()),
            lambda: Block(nn.Linear(128, 64), skip=True),
            lambda: Block(nn.Linear(64, 10)),
        ],
    )


def mlp(seed: int) -> list[Block]:
    """Six hidden layers, each a block."""
    return seeded(
        seed,
        [
            lambda: Block(nn.Linear(64, 128), nn.ReLU()),
            *([lambda: Block(nn.Linear(128, 128), nn.ReLU())] * 4),
            lambda: Block(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)),
        ],
    )


def resnet(seed: int) -> list[Block]:
    """A stem and three residual blocks of 16 channels, at 8 x 8 and then at 4 x 4."""

    def stem() -> list[nn.Module]:
        return [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1, bias=False)]

    return seeded(
        seed,
        [
            lambda: Block(*stem(), nn.BatchNorm2d(16), nn.ReLU()),
            lambda: Block(Residual(16), nn.ReLU()),
            lambda: Block(Residual(16), nn.ReLU(), nn.MaxPool2d(2)),
            lambda: Block(
                Residual(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
            ),
        ],
    )


def transformer(seed: int) -> list[Block]:
    """Three blocks of width 64 over bytes; the embedding belongs to the first."""
    return seeded(
        seed,
        [
            lambda: Block(Embed(128, 64), Attend(64)),
            lambda: Block(Attend(64)),
            lambda: Block(Attend(64), nn.LayerNorm(64), nn.Linear(64, 128)),
        ],
    )


def digits_train(seed: int) -> Batches:
    x, y = open_data("digits:train")
    epoch = 0
    while True:
        for a, b in batches(x, y, BATCH, seed, epoch):
            yield torch.from_numpy(a), torch.from_numpy(b)
        epoch += 1


def digits_test() -> Batches:
    x, y = open_data("digits:test")
    yield torch.from_numpy(x), torch.from_numpy(y)


def text() -> Tensor:
    """A real text that every Python has: its manual, as ASCII."""
    from pydoc_data.topics import topics

    manual = "".join(topics[key] for key in sorted(topics)).encode("ascii", "replace")
    return torch.from_numpy(np.frombuffer(manual, np.uint8).astype(np.int64))


def sequences(tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    window = starts[:, None] + torch.arange(CONTEXT)
    return tokens[window], tokens[window + 1]


def text_train(seed: int) -> Batches:
    tokens = text()
    tokens = tokens[: len(tokens) * 9 // 10]
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield sequences(tokens, torch.randint(len(tokens) - CONTEXT, (SEQUENCES,), generator=rng))


def text_test() -> Batches:
    tokens = text()
    tokens = tokens[len(tokens) * 9 // 10 :]
    yield from (
        sequences(tokens, starts)
        for starts in torch.split(torch.arange(0, len(tokens) - CONTEXT, CONTEXT), 256)
    )


TASKS = {
    "digits.yaml": Task(demo, digits_train, digits_test, 900, 10),
    "MLP, 6 hidden": Task(mlp, digits_train, digits_test, 900, 10),
    "ResNet": Task(resnet, digits_train, digits_test, 900, 10),
    "transformer": Task(transformer, text_train, text_test, 600, 128),
}


class Fixed(nn.Module):
    """Random targets, one a class, drawn once: the head has nothing to learn."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        targets = torch.randn(classes, features) / math.sqrt(features)
        self.register_buffer("targets", targets)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.get_buffer("targets"))


def head(kind: str, shape: Sequence[int], classes: int) -> nn.Module | None:
    """The head for a block's output, [n, *shape] -> [n, classes], or [n, t, classes].

    None where this kind is the same as another for that shape.
    """
    layers: list[nn.Module] = []
    features = math.prod(shape)
    if len(shape) == 3:  # a picture
        side = {"flat": 0, "pooled": 1}.get(kind, 2)
        if side:
            layers.append(nn.AdaptiveAvgPool2d(side))
            features = shape[0] * side * side
        layers.append(nn.Flatten())
    elif kind in ("pooled", "pooled 2x2"):
        return None
    elif len(shape) == 2:  # a sequence: each token by itself, as the network's own last layer
        features = shape[1]
    match kind:
        case "flat" | "pooled" | "pooled 2x2":
            layers.append(nn.Linear(features, classes))
        case "linear":
            layers += [nn.LayerNorm(features), nn.Linear(features, classes)]
        case "mlp":
            layers += [nn.LayerNorm(features), nn.Linear(features, HIDDEN), nn.ReLU()]
            layers.append(nn.Linear(HIDDEN, classes))
        case "fixed":
            layers.append(Fixed(features, classes))
    return nn.Sequential(*layers)


KINDS = ("flat", "pooled", "pooled 2x2", "linear", "mlp", "fixed")


@dataclass
class Trained:
    """One run: how well it did and what a step of it takes."""

    accuracy: float
    loss: float  # nats a prediction
    flops: int  # a step, forward and backward; products of matrices and convolutions
    parameters: int


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def train(task: Task, kind: str, seed: int, steps: int, lr: float = 1e-3) -> Trained | None:
    """Trains by `chain` or with heads of a kind; each block ends what flows back."""
    blocks = task.blocks(seed)
    feed = task.train(seed)
    heads: list[nn.Module] = []
    h = x = next(task.train(seed))[0]
    for i, block in enumerate(blocks[:-1] if kind != "chain" else ()):
        block.eval()  # running statistics stay as they are
        h = block(h, x)
        block.train()
        torch.manual_seed(init_seed(seed, f"block{i}.head"))
        made = head(kind, h.shape[1:], task.classes)
        if made is None:
            return None
        heads.append(made)
    parameters = [p for part in (*blocks, *heads) for p in part.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr)

    def step() -> None:
        x, y = next(feed)
        h, total = x, torch.zeros(())
        for i, block in enumerate(blocks[:-1]):
            h = block(h, x)
            if heads:  # every block on the same batch: DGL, Belilovsky et al. 2020
                total = total + loss_of(heads[i](h), y)
                h = h.detach()
        total = total + loss_of(blocks[-1](h, x), y)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    flops = _run(step, steps)
    right, lost, count = 0, 0.0, 0
    with torch.no_grad():
        for x, y in task.test():
            h = x
            for block in blocks:
                h = block.eval()(h, x)
            right += int((h.argmax(-1) == y).sum())
            lost += float(loss_of(h, y)) * y.numel()
            count += y.numel()
    return Trained(right / count, lost / count, flops, sum(map(Tensor.numel, parameters)))


def _run(step: Callable[[], None], steps: int) -> int:
    """So many of them; returns the FLOPs of one."""
    with FlopCounterMode(display=False) as counter:
        step()
    for _ in range(steps - 1):
        step()
    return int(counter.get_total_flops())


def forward_forward(widths: Sequence[int], seed: int, steps: int, lr: float) -> Trained:
    """Hinton 2022 on digits: each layer tells right labels from wrong ones by its squares.

    The label goes in beside the pixels; a layer sees its input's direction alone; the
    answer is the label with the most squares over all layers but the first.
    """
    layers = []
    for i, (n, m) in enumerate(zip((64 + 10, *widths), widths, strict=False)):
        torch.manual_seed(init_seed(seed, f"block{i}"))
        layers.append(nn.Linear(n, m))
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for layer in layers for p in layer.parameters()], lr=lr)
    feed = digits_train(seed)

    def goodness(x: Tensor, label: Tensor) -> list[Tensor]:
        h, found = torch.cat([x, F.one_hot(label, 10).float()], 1), []
        for layer in layers:
            h = F.relu(layer(F.normalize(h) * math.sqrt(h.shape[1])))
            found.append(h.square().mean(1))
            h = h.detach()
        return found

    def step() -> None:
        x, y = next(feed)
        wrong = (y + torch.randint(1, 10, y.shape, generator=rng)) % 10
        good, bad = goodness(x, y), goodness(x, wrong)
        total = sum(
            (
                F.softplus(THRESHOLD - a).mean() + F.softplus(b - THRESHOLD).mean()
                for a, b in zip(good, bad, strict=True)
            ),
            torch.zeros(()),
        )
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    flops = _run(step, steps)
    with torch.no_grad():
        x, y = next(digits_test())
        labels = [torch.full_like(y, label) for label in range(10)]
        scores = torch.stack([sum(goodness(x, label)[1:], torch.zeros(())) for label in labels], 1)
        accuracy = float((scores.argmax(1) == y).float().mean())
    parameters = sum(p.numel() for layer in layers for p in layer.parameters())
    return Trained(accuracy, math.nan, flops, parameters)


FORWARD_FORWARD = {"digits.yaml": (128, 64), "MLP, 6 hidden": (128,) * 6}


def main() -> None:
    """Prints the table of docs/local_learning.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: what each network needs")
    parser.add_argument("--only", choices=tuple(TASKS), action="append", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| network | rule | accuracy, % | to chain | loss | FLOPs a step | parameters |")
    print("|---|---|---|---|---|---|---|")
    for name in options.only or TASKS:
        runs = _runs(name, options.seeds, options.steps or TASKS[name].steps)
        for kind, found in runs.items():
            print(_line(name, kind, found, runs["chain"]), flush=True)
            rows += [
                {"network": name, "rule": kind, "seed": seed, **asdict(run)}
                for seed, run in enumerate(found)
            ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _runs(name: str, seeds: int, steps: int) -> dict[str, list[Trained]]:
    """Of each rule, one a seed."""
    runs: dict[str, list[Trained]] = {}
    for kind in ("chain", *KINDS):
        made = [train(TASKS[name], kind, seed, steps) for seed in range(seeds)]
        if found := [run for run in made if run is not None]:
            runs[kind] = found
    if widths := FORWARD_FORWARD.get(name):
        found = [forward_forward(widths, seed, steps, 3e-3) for seed in range(seeds)]
        runs["Forward-Forward"] = found
    return runs


def _line(name: str, kind: str, found: Sequence[Trained], chain: Sequence[Trained]) -> str:
    accuracies = [run.accuracy * 100 for run in found]
    mean, spread = statistics.mean(accuracies), statistics.pstdev(accuracies)
    away = mean - statistics.mean(run.accuracy * 100 for run in chain)
    loss = statistics.mean(run.loss for run in found)
    return (
        f"| {name} | {kind} | {mean:.1f} ± {spread:.1f} "
        f"| {away:+.1f} | {'' if math.isnan(loss) else f'{loss:.3f}'} "
        f"| {found[0].flops / chain[0].flops:.2f} "
        f"| {found[0].parameters / chain[0].parameters:.2f} |"
    )


if __name__ == "__main__":
    main()
