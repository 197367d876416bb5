"""Outputs for many samples: in order, as they come, together with others', and what is missing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import Letter, keypair_of
from small_network import plain_output, small_graph, submit
from virtual_time import InlineCompute, play

from p2pnet.client import inference as client
from p2pnet.client.inference import Chunk, Missing
from p2pnet.client.passes import Passes
from p2pnet.errors import UnreachableError, UsageError
from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.components import init_seed
from p2pnet.vnode.hosted import Hosted
from p2pnet.vnode.tensors import Array

GRAPH = small_graph()


def samples(count: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)


def is_right(output: Array, x: Array) -> bool:
    return np.allclose(output, plain_output(0, x), rtol=1e-5, atol=1e-6)


def test_chunks_come_in_order_and_no_faster_than_they_are_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            x = samples(256 * 9 + 7)
            found, first = [], 0
            async for item in client.infer(Passes(session, network, GRAPH), {"x": x}):
                assert isinstance(item, Chunk)
                assert item.first == first
                first += len(item.output)
                found.append(item.output)
                if len(found) == 1:
                    await asyncio.sleep(5)
                    asked = {
                        letter.request.request_id
                        for letter in swarm.letters
                        if letter.method == "VNode/Forward"
                    }
                    assert len(asked) == client.CHUNKS_AT_ONCE
            assert is_right(np.concatenate(found), x)

    play(main())


def test_clients_that_ask_at_once_are_computed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = Hosted.do_infer

    def counted(self: Hosted, nodes: Any, inputs: Any, *rest: Any) -> Any:
        sizes.append(len(next(iter(inputs.values()))))
        return real(self, nodes, inputs, *rest)

    async def slow(self: InlineCompute, fn: Any, *args: Any) -> Any:
        await asyncio.sleep(0.1)
        return fn(*args)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            await client.infer_all(
                Passes(session, network, GRAPH), {"x": samples(1)}
            )  # it is made now
            monkeypatch.setattr(Hosted, "do_infer", counted)
            monkeypatch.setattr(InlineCompute, "run", slow)
            given = [samples(3, seed=n) for n in range(16)]
            outcomes = await asyncio.gather(
                *(
                    client.infer_all(
                        Passes(MemorySession(swarm, f"c{n}"), network, GRAPH), {"x": x}
                    )
                    for n, x in enumerate(given)
                )
            )
            for x, outcome in zip(given, outcomes, strict=True):
                assert is_right(outcome.output, x)
            assert sum(sizes) == 48
            assert len(sizes) <= 3, "16 requests in a few runs"

    play(main())


def test_one_bad_sample_costs_one_row(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            x = samples(600)
            x[300, 2] = np.inf
            x[599, 0] = np.nan
            began = swarm.loop.time()
            outcome = await client.infer_all(Passes(session, network, GRAPH), {"x": x})
            assert swarm.loop.time() - began < 5, "what can never be is not tried for a minute"
            assert [(it.first, it.last) for it in outcome.missing] == [(300, 300), (599, 599)]
            assert "NaN or infinity" in outcome.missing[0].reason
            good = np.delete(np.arange(600), [300, 599])
            assert is_right(outcome.output[good], x[good])
            assert np.isnan(outcome.output[[300, 599]]).all()

    play(main())


def test_what_is_missing_is_said_with_where_and_why(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            x = samples(1024)
            items: list[Chunk | Missing] = []
            lost: list[bytes] = []

            def hook(letter: Letter) -> None:
                if letter.method == "VNode/Forward" and len(items) >= 1:
                    lost.append(letter.request.request_id)
                    raise UnreachableError("a tree fell on the line")

            swarm.before.append(hook)
            async for item in client.infer(Passes(session, network, GRAPH), {"x": samples(2048)}):
                items.append(item)
            assert lost
            done = [item for item in items if isinstance(item, Chunk)]
            missing = [item for item in items if isinstance(item, Missing)]
            assert len(done) == client.CHUNKS_AT_ONCE
            assert (missing[0].first, missing[0].last) == (1024, 1279)
            assert {it.vnode for it in missing} <= {"fc1", "skip"}
            assert {it.host for it in missing} == {swarm["a"].peer_id}
            assert "a tree fell on the line" in str(missing[0])
            assert "samples 1024 to 1279 are missing" in str(missing[0])
            assert len(x) == 1024

    play(main())


def test_inputs_need_as_many_samples(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            with pytest.raises(UsageError, match="no input 'z'"):
                await client.infer_all(
                    Passes(session, network, GRAPH), {"x": samples(3), "z": samples(4)}
                )

    play(main())


def test_several_inputs_each_with_its_dtype(tmp_path: Path) -> None:
    graph = load_spec(
        {
            "name": "two-inputs",
            "inputs": {
                "tokens": {"shape": [4], "dtype": "int64"},
                "x": {"shape": [4, 6], "dtype": "float32"},
            },
            "nodes": [
                {
                    "id": "embed", "type": "Embedding", "inputs": ["tokens"],
                    "config": {"num_embeddings": 9, "embedding_dim": 6},
                },
                {"id": "sum", "type": "Add", "inputs": ["embed", "x"]},
            ],
            "loss": {"id": "loss", "type": "MSELoss"},
            "optimizer": {"type": "SGD", "lr": 0.1},
            "seed": 1,
        }
    )  # fmt: skip

    async def main() -> None:
        import torch

        async with MemorySwarm(tmp_path, "ab") as swarm:
            session = MemorySession(swarm)
            network = await session.submit(graph, keypair_of("owner"), {}, swarm["a"].peer_id)
            rng = np.random.default_rng(1)
            tokens = rng.integers(0, 9, (300, 4)).astype(np.int32)  # a width that fits is taken
            x = rng.standard_normal((300, 4, 6)).astype(np.float32)
            passes = Passes(session, network, graph)
            outcome = await client.infer_all(passes, {"x": x, "tokens": tokens})
            torch.manual_seed(init_seed(1, "embed"))
            embedded = torch.nn.Embedding(9, 6)(torch.from_numpy(tokens)).detach().numpy()
            np.testing.assert_allclose(outcome.output, embedded + x, rtol=1e-6)
            with pytest.raises(UsageError, match="as many samples"):
                await client.infer_all(passes, {"x": x, "tokens": tokens[:7]})
            tokens[17, 2] = 9
            outcome = await client.infer_all(passes, {"x": x, "tokens": tokens})
            assert [(it.first, it.last) for it in outcome.missing] == [(17, 17)]

    play(main())
