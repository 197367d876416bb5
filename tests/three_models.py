"""The zoo's MLP, ResNet and transformer with all that makes equality hard, and plain torch's runs.

Dropout, running statistics, tied weights, batches in unequal parts, a global norm.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from models_zoo import EXAMPLES, SkipMLP, Transformer
from torch import Tensor, nn

from p2pnet.client.models import spec_of
from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.components import draw_seed
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array

SEED = 7
MODELS = ("mlp", "resnet", "transformer")
RAGGED_STEP = 45
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"type": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4},
    "Adam": {"type": "Adam", "lr": 2e-3},
    "AdamW": {"type": "AdamW", "lr": 2e-3, "weight_decay": 0.05},
}
Batch = tuple[Array, Array]


def made(name: str) -> nn.Module:
    """A model of the zoo, always with the same weights; with Dropout, and one RMSNorm."""
    model = EXAMPLES[name].make()
    if isinstance(model, SkipMLP):
        model.fc2 = nn.Sequential(nn.Dropout(0.1), model.fc2)  # type: ignore[assignment]
    elif isinstance(model, Transformer):
        for block in model.blocks:
            block.mlp = nn.Sequential(*block.mlp, nn.Dropout(0.1))
        model.blocks[1].norm2 = nn.RMSNorm(16)
    return model


def options(name: str, optimizer: str, **settings: Any) -> dict[str, Any]:
    """What a client says of a model when it submits it."""
    return {
        "loss": EXAMPLES[name].loss,
        "optimizer": OPTIMIZERS[optimizer],
        "input_shape": EXAMPLES[name].input_shape,
        "seed": SEED,
        **settings,
    }


def graph_of(name: str, optimizer: str, **settings: Any) -> CompiledGraph:
    """A model as the network that it becomes."""
    return load_spec(spec_of(made(name), name=name, **options(name, optimizer, **settings)))


def batches(name: str, steps: int) -> list[Batch]:
    """A seeded run's; one of them is smaller."""
    found = EXAMPLES[name].batches(steps, 14)
    if steps >= RAGGED_STEP:
        x, y = found[RAGGED_STEP - 1]
        found[RAGGED_STEP - 1] = x[:9], y[:9]
    return found


def parts(batch: Batch, micro_batches: int) -> list[Batch]:
    """A batch in micro-batches, as a feeder splits it."""
    x, y = (np.array_split(array, micro_batches) for array in batch)
    return list(zip(x, y, strict=True))


def plainly_trained(
    name: str, optimizer: str, steps: int, micro_batches: int = 1, clip_norm: float = 0.0
) -> tuple[dict[str, Array], list[float]]:
    """The state_dict and the losses: one process, one thread, one autograd graph a micro-batch."""
    config = dict(OPTIMIZERS[optimizer])
    with one_thread():
        model = made(name)
        place = _draw_as_vnodes_do(model)
        updates = getattr(torch.optim, config.pop("type"))(model.parameters(), **config)
        losses = []
        for step, batch in enumerate(batches(name, steps), start=1):
            updates.zero_grad()
            total = 0.0
            for part, (x, y) in enumerate(parts(batch, micro_batches)):
                place[:] = [step, part]
                loss = EXAMPLES[name].measure(model(torch.from_numpy(x)), torch.from_numpy(y))
                loss = loss * (len(x) / len(batch[0]))
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            if clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            updates.step()
            losses.append(total)
        return {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()}, losses


def _draw_as_vnodes_do(model: nn.Module) -> list[int]:
    """Every Dropout draws by (seed, node, step, micro-batch); the last two are the list's."""
    place = [0, 0]

    def seeded(node: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            torch.manual_seed(draw_seed(SEED, node, *place))
            return (given[0].contiguous(),)  # torch draws in the order of the memory

        return hook

    for node, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_pre_hook(seeded(node))
    return place


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
