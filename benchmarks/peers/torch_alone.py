"""Plain torch in one process, as a process that is driven over a pipe.

python -m benchmarks.peers.torch_alone [THREADS]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import talk, timing


def forward(width: int, samples: int, limit_s: float) -> dict[str, Any]:
    """One Linear's forward."""
    layer, (x, _) = nn.Linear(width, width), _batch(width, samples)
    with torch.no_grad():
        layer(x)
        return {"took_ms": timing.each(lambda: layer(x), limit_s)}


def train(
    width: int,
    samples: int,
    limit_s: float,
    layers: int = 1,
    micro_batches: int = 1,
    activation: str = "",
) -> dict[str, Any]:
    """Steps of a chain of Linears with an MSELoss and SGD, over micro-batches."""
    model = nn.Sequential(*_modules(width, layers, activation))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = _batch(width, samples)
    parts = list(zip(x.tensor_split(micro_batches), y.tensor_split(micro_batches), strict=True))

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for x_part, y_part in parts:
            loss = nn.functional.mse_loss(model(x_part), y_part) * (len(x_part) / samples)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.step()
        return total

    step()
    return {"took_ms": timing.each(step, limit_s)}


def _modules(width: int, layers: int, activation: str) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for number in range(layers):
        modules.append(nn.Linear(width, width))
        if activation and number < layers - 1:
            modules.append(getattr(nn, activation)())
    return modules


def _batch(width: int, samples: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(samples, width), torch.randn(samples, width)


def main(threads: str = "1") -> None:
    """Does what it is told to until its driver is gone."""
    torch.set_num_threads(int(threads))
    verbs = {"forward": forward, "train": train}
    while command := talk.listen():
        do = verbs[command.pop("do")]
        talk.say(**do(**command))


if __name__ == "__main__":
    main(*sys.argv[1:])
