"""A network so small that a step takes no time, its batches, and the same in plain torch."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from memory_wire import keypair_of

from p2pnet.client.run import StepResult, TrainingRun
from p2pnet.client.session import NetworkInfo, Session
from p2pnet.client.weights import fetch_weights
from p2pnet.orchestrator.spec import load_spec
from p2pnet.v1 import orchestrator_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.state import model_digest
from p2pnet.vnode.tensors import Array

SEED = 5
CUT_EVERY = 3

SMALL: dict[str, Any] = {
    "name": "small",
    "inputs": {"x": {"shape": [6], "dtype": "float32"}},
    "nodes": [
        {"id": "fc1", "type": "Linear", "config": {"in_features": 6, "out_features": 8}},
        {"id": "act", "type": "ReLU"},
        {"id": "fc2", "type": "Linear", "config": {"in_features": 8, "out_features": 6}},
        {"id": "skip", "type": "Add", "inputs": ["fc2", "x"]},
        {"id": "out", "type": "Linear", "config": {"in_features": 6, "out_features": 3}},
    ],
    "loss": {"id": "loss", "type": "CrossEntropyLoss"},
    "optimizer": {"type": "Adam", "lr": 0.01},
    "learning": "chain",
    "seed": SEED,
    "cut_every": CUT_EVERY,
}


def small_graph(**changes: Any) -> CompiledGraph:
    """The compiled graph, with top-level keys of the spec changed."""
    return load_spec({**SMALL, **changes})


def batch(step: int, samples: int = 4) -> tuple[Array, Array]:
    """The batch of a step, from 1; every seventh is a ragged one."""
    rng = np.random.default_rng([SEED, step])
    samples -= step % 7 == 0
    x = rng.standard_normal((samples, 6)).astype(np.float32)
    return x, rng.integers(0, 3, samples)


@lru_cache(maxsize=64)
def plain(steps: int) -> tuple[str, tuple[float, ...]]:
    """The weights' digest and the losses of the same training in one torch process."""
    weights, losses = _plainly_trained(steps)
    return model_digest(weights), losses


def plain_output(steps: int, x: Array) -> Array:
    """What plain torch's network says after so many steps."""
    import torch

    model = _modules(_plainly_trained(steps)[0])
    with torch.no_grad():
        output: Array = _forward(model, torch.from_numpy(x)).numpy()
    return output


@dataclass
class Trained:
    """What a run over the small network has come to."""

    results: list[StepResult]
    done: orchestrator_pb2.TrainDone
    digest: str
    recoveries: list[str]


async def submit(session: Session, orchestrator: str, **changes: Any) -> NetworkInfo:
    """Submits the small network to a peer."""
    return await session.submit(small_graph(**changes), keypair_of("owner"), {}, orchestrator)


async def train(
    session: Session,
    network: NetworkInfo,
    steps: int,
    *,
    first: int = 1,
    samples: int = 4,
    pause_s: float = 0.0,
) -> Trained:
    """A whole training run: steps `first` to `steps`, each with its own batch, after a pause."""
    run = TrainingRun(session, network)
    try:
        results = []
        for step in range(first, steps + 1):
            x, y = batch(step, samples)
            await asyncio.sleep(pause_s)
            results.append(await run.step({"x": x}, y))
        done = await run.finish()
    finally:
        await run.close()
    weights = await fetch_weights(session, network, done.states)
    return Trained(results, done, model_digest(weights), run.recoveries)


def _plainly_trained(steps: int) -> tuple[dict[str, Array], tuple[float, ...]]:
    import torch
    from torch import nn

    torch.set_num_threads(1)
    model = _modules()
    optimizer = torch.optim.Adam(model.parameters(), lr=SMALL["optimizer"]["lr"])
    losses = []
    for step in range(1, steps + 1):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            _forward(model, torch.from_numpy(x)), torch.from_numpy(y)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    return weights, tuple(losses)


def _modules(weights: dict[str, Array] | None = None) -> Any:
    import torch
    from torch import nn

    from p2pnet.vnode.components import init_seed

    model = nn.ModuleDict()
    for node in SMALL["nodes"]:
        if node["type"] == "Linear":
            torch.manual_seed(init_seed(SEED, node["id"]))
            model[node["id"]] = nn.Linear(**node["config"])
    if weights is not None:
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return model


def _forward(model: Any, x: Any) -> Any:
    import torch

    return model["out"](model["fc2"](torch.relu(model["fc1"](x))) + x)
