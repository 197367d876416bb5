"""NaN and infinity: refused where they first show, with VNode and step named, and no harm done."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from small_network import batch, plain, submit, train
from virtual_time import play

from p2pnet.client.run import TrainingRun
from p2pnet.client.session import NetworkInfo
from p2pnet.client.weights import fetch_weights
from p2pnet.errors import UsageError
from p2pnet.v1 import orchestrator_pb2
from p2pnet.vnode.tensors import Array

STEPS = 6
BAD_AT = 3


def with_one(value: float) -> Array:
    x = batch(BAD_AT)[0].copy()
    x[2, 4] = value
    return x


def huge() -> Array:
    """Each number is one, and their sum over a row is too large to be one."""
    return np.full_like(batch(BAD_AT)[0], 3e38)


WRONG: dict[str, tuple[Array, str]] = {
    "NaN comes in": (with_one(np.nan), r"the input x of (fc1|skip) has NaN or infinity in step 3"),
    "infinity comes in": (with_one(np.inf), r"the input x of (fc1|skip) has .* in step 3"),
    "minus infinity": (with_one(-np.inf), r"the input x of (fc1|skip) has .* in step 3"),
    "an output overflows": (huge(), r"(fc1|act|fc2|skip) has NaN or infinity in step 3"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("nodes", ["abc", "a"])
def test_what_is_no_number_is_refused_and_the_next_good_batch_trains(
    tmp_path: Path, nodes: str, what: str
) -> None:
    x, why = WRONG[what]

    async def main() -> None:
        async with MemorySwarm(tmp_path, nodes) as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            for step in range(1, BAD_AT):
                good = batch(step)
                await run.step({"x": good[0]}, good[1])
            with pytest.raises(UsageError, match=rf"^network small: {why}") as refused:
                await run.step({"x": x}, np.zeros(len(x), np.int64))
            assert "\n" not in str(refused.value)
            await run.close()
            trained = await train(session, network, STEPS, first=BAD_AT)
            assert trained.digest == plain(STEPS)[0]

    play(main())


ONE: dict[str, Any] = {
    "name": "one",
    "inputs": {"x": {"shape": [1], "dtype": "float32"}},
    "nodes": [{"id": "fc", "type": "Linear", "config": {"in_features": 1, "out_features": 1}}],
    "loss": {"id": "loss", "type": "MSELoss"},
    "optimizer": {"type": "SGD", "lr": 0.01},
}


def test_a_weights_gradient_that_is_too_large_spoils_no_weight(tmp_path: Path) -> None:
    """Everything that goes from VNode to VNode is a number, and the loss (wx)^2 is one, too."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id, **ONE)
            run = TrainingRun(session, network)
            await run.step({"x": ones(1.0)}, ones(0.0))
            before = await weights(session, network, await run.finish())
            run = TrainingRun(session, network)
            x = math.sqrt(2.5e38 / abs(before["fc.weight"].item()))  # 2 w x^2 is over 3.4e38
            with pytest.raises(UsageError, match=r"gradient of fc.* has NaN or infinity in step 2"):
                await run.step({"x": ones(x)}, ones(0.0))
            await run.close()
            run = TrainingRun(session, network)
            await run.step({"x": ones(0.0)}, ones(before["fc.bias"].item()))  # has no gradient
            assert await weights(session, network, await run.finish()) == before

    play(main())


def ones(value: float) -> Array:
    return np.full((1, 1), value, np.float32)


async def weights(
    session: MemorySession, network: NetworkInfo, done: orchestrator_pb2.TrainDone
) -> dict[str, Array]:
    return await fetch_weights(session, network, done.states)


def test_a_training_that_runs_away_is_told_at_which_step_and_keeps_the_step_before(
    tmp_path: Path,
) -> None:
    """With a learning rate that is far too high."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            session = MemorySession(swarm)
            fast: dict[str, Any] = {"optimizer": {"type": "SGD", "lr": 1e30}, "cut_every": 1}
            network = await submit(session, swarm["a"].peer_id, **fast)
            run = TrainingRun(session, network)
            step, refused = 0, None
            while refused is None:
                step += 1
                x, y = batch(step)
                try:
                    await run.step({"x": x}, y)
                except UsageError as error:
                    refused = error
            assert 1 < step < 10
            assert f"has NaN or infinity in step {step}" in str(refused)
            await run.close()
            assert (await session.status(network)).step == step - 1

    play(main())
