"""`AsyncClient` from the first call to the last, over a swarm in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from small_network import SMALL, batch, plain, plain_output
from torch import nn
from virtual_time import play

import p2pnet
from p2pnet.client.inference import Chunk
from p2pnet.errors import LocalError, NotFoundError, UsageError

STEPS = 6


class InMemory(p2pnet.AsyncClient):
    """A client of a swarm in memory."""

    def __init__(self, swarm: MemorySwarm, path: Path) -> None:
        super().__init__(data_dir=path / "client")
        self._swarm = swarm

    async def open(self) -> None:
        self._session = MemorySession(self._swarm)

    async def close(self) -> None:
        self._session = None


async def batches(first: int = 1, last: int = STEPS) -> AsyncIterator[tuple[Any, Any]]:
    """The small network's, each after a while."""
    for step in range(first, last + 1):
        await asyncio.sleep(0.1)
        yield batch(step)


def test_a_network_from_submit_to_cancel(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm, InMemory(swarm, tmp_path) as client:
            assert len(await client.members()) == 4
            net = await client.submit(SMALL)
            seen: list[int] = []
            history = await net.train(batches(1, 3), on_step=lambda step, _: seen.append(step))
            assert seen == [1, 2, 3]
            assert history[0]["loss"] == pytest.approx(np.mean(plain(3)[1]), rel=1e-6)
            assert await net.train_step(*batch(4)) == pytest.approx(plain(4)[1][3], rel=1e-6)
            assert await net.finish() == 4
            await net.train(lambda epoch: [batch(5)] if epoch == 1 else [batch(6)], epochs=2)
            assert await net.digest() == plain(STEPS)[0]

            x, _ = batch(99)
            assert np.allclose(await net(x), plain_output(STEPS, x), atol=1e-6)
            assert isinstance(await net(torch.from_numpy(x)), torch.Tensor)
            many = np.concatenate([x] * 100)
            parts = [part async for part in net.infer(many)]
            outputs = [part.output for part in parts if isinstance(part, Chunk)]
            assert [len(output) for output in outputs] == [256, len(many) - 256]

            rows = await net.locate()
            assert [row["vnode"] for row in rows] == list(net.info.vnodes)
            assert (await net.status()).committed_step == STEPS
            assert (await net.graph()).name == net.name == "small"
            again = await client.network("small")
            assert await again.digest() == await net.digest()
            await net.cancel("enough")
            with pytest.raises(UsageError, match="enough"):
                await again.train(batches())

    play(main())


def test_training_and_asking_at_once_take_turns(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm, InMemory(swarm, tmp_path) as client:
            net = await client.submit(SMALL)
            x, _ = batch(99)
            for step in (1, 3, 5):  # asking ends the run, which the next step begins anew
                one, output, other = await asyncio.gather(
                    net.train_step(*batch(step)), net(x), net.train_step(*batch(step + 1))
                )
                assert one == pytest.approx(plain(step)[1][step - 1], rel=1e-6)
                assert other == pytest.approx(plain(step + 1)[1][step], rel=1e-6)
                assert np.isfinite(output).all()
            assert await net.digest() == plain(6)[0]

    play(main())


def test_a_torch_model_comes_back_trained(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    async def main() -> dict[str, Any]:
        async with MemorySwarm(tmp_path, "abc") as swarm, InMemory(swarm, tmp_path) as client:
            net = await client.submit(
                model,
                name="mine",
                optimizer={"type": "SGD", "lr": 0.1},
                micro_batches=2,
                clip_norm=0.5,
            )
            graph = await net.graph()
            assert (graph.micro_batches, graph.clip_norm) == (2, 0.5)
            await net.train(batches())
            return dict(await net.state_dict())

    trained = play(main())
    for step in range(1, STEPS + 1):
        x, y = (torch.from_numpy(array) for array in batch(step))
        optimizer.zero_grad()
        for part in np.array_split(np.arange(len(x)), 2):
            loss = nn.functional.cross_entropy(model(x[part]), y[part]) * (len(part) / len(x))
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.linalg.norm(trained[name] - tensor) <= 1e-6 * torch.linalg.norm(tensor)


def test_mistakes_are_said_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            client = InMemory(swarm, tmp_path)
            with pytest.raises(LocalError, match="async with"):
                await client.members()
            async with client:
                with pytest.raises(NotFoundError, match="no network 'small'"):
                    await client.network("small")
                with pytest.raises(UsageError, match="micro_batches is for torch models"):
                    await client.submit(SMALL, micro_batches=2)
                net = await client.submit({**SMALL, "micro_batches": 3})
                with pytest.raises(UsageError, match="cannot be split into the 3 micro-batches"):
                    await net.train_step(*(array[:2] for array in batch(1)))
                assert await net.train_step(*batch(1)) > 0  # and it is none the worse

    play(main())


def test_without_a_node_it_says_what_to_do(tmp_path: Path) -> None:
    async def main() -> None:
        async with p2pnet.AsyncClient(data_dir=tmp_path):
            pass

    with pytest.raises(UsageError, match=r"p2pnet join|--bootstrap"):
        asyncio.run(main())
