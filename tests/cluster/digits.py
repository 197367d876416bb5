"""The digits network of these tests, its batches, and the same training in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from p2pnet.data.datasets import batches, open_data
from p2pnet.vnode.components import init_seed
from p2pnet.vnode.tensors import Array

STEPS = 50
SEED = 3

DIGITS: dict[str, Any] = {
    "name": "digits",
    "inputs": {"x": {"shape": [64], "dtype": "float32"}},
    "nodes": [
        {"id": "fc1", "type": "Linear", "config": {"in_features": 64, "out_features": 128}},
        {"id": "act1", "type": "ReLU"},
        {"id": "fc2", "type": "Linear", "config": {"in_features": 128, "out_features": 64}},
        {"id": "skip", "type": "Add", "inputs": ["fc2", "x"]},
        {"id": "out", "type": "Linear", "config": {"in_features": 64, "out_features": 10}},
    ],
    "loss": {"id": "loss", "type": "CrossEntropyLoss"},
    "optimizer": {"type": "Adam", "lr": 0.001},
    "learning": "chain",
    "seed": SEED,
    "cut_every": 10,
}


def digits_batches(steps: int = STEPS, batch_size: int = 32) -> list[tuple[Array, Array]]:
    """The first batches of an endless run; at 32 samples, number 45 is a ragged one."""
    x, y = open_data("digits:train")
    found: list[tuple[Array, Array]] = []
    epoch = 0
    while len(found) < steps:
        epoch += 1
        found += batches(x, y, batch_size, SEED, epoch)
    return found[:steps]


class Plain(nn.Module):
    """The same network as one torch module."""

    def __init__(self) -> None:
        super().__init__()
        for node in DIGITS["nodes"]:
            if node["type"] == "Linear":
                torch.manual_seed(init_seed(SEED, node["id"]))
                self.add_module(node["id"], nn.Linear(**node["config"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.get_submodule("fc1")(x))
        skipped = self.get_submodule("fc2")(hidden) + x
        output: torch.Tensor = self.get_submodule("out")(skipped)
        return output


def plainly_trained(steps: int = STEPS) -> dict[str, Array]:
    """The weights after `steps`, of one process, one thread and one autograd graph."""
    with one_thread():
        model = Plain()
        optimizer = torch.optim.Adam(model.parameters(), lr=DIGITS["optimizer"]["lr"])
        for x, y in digits_batches(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}


@contextmanager
def one_thread() -> Iterator[None]:
    """As hosts compute: sums over several threads come out differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
