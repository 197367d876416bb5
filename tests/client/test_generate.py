"""Text token by token: the same as plain torch says, whatever happens to hosts and sessions."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import Letter, keypair_of
from small_network import small_graph
from small_network import submit as submit_small
from tiny_language import CONTEXT, language_graph, plain_greedy
from virtual_time import play

from p2pnet.client.generate import generate
from p2pnet.client.networks import NetworkInfo
from p2pnet.client.passes import Passes
from p2pnet.client.sampling import pick
from p2pnet.data.text import decode, encode
from p2pnet.errors import UsageError
from p2pnet.vnode import sessions

GRAPH = language_graph()
PROMPT = "Ab ovo"


async def submit(swarm: MemorySwarm, **terms: Any) -> tuple[MemorySession, NetworkInfo]:
    session = MemorySession(swarm)
    network = await session.submit(GRAPH, keypair_of("owner"), {}, swarm["a"].peer_id, **terms)
    return session, network


async def greedy(session: MemorySession, network: NetworkInfo, tokens: int) -> str:
    pieces = generate(Passes(session, network, GRAPH), PROMPT, tokens=tokens, temperature=0)
    return "".join([piece async for piece in pieces])


def plainly(tokens: int) -> str:
    return decode(np.array(plain_greedy(encode(PROMPT), tokens)))


def parts(swarm: MemorySwarm) -> list[Any]:
    """The requests that clients sent."""
    return [
        letter.request
        for letter in swarm.letters
        if letter.method == "VNode/Forward" and letter.source not in swarm.nodes
    ]


@pytest.mark.parametrize("hosts", ["a", "abc"])
def test_the_same_tokens_as_computing_all_anew_in_torch(tmp_path: Path, hosts: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, hosts) as swarm:
            session, network = await submit(swarm)
            assert await greedy(session, network, 10) == plainly(10)
            fed = [(it.position, it.tensor.shape[1]) for it in parts(swarm)]
            assert fed == [(0, 6), *((n, 1) for n in range(6, 15))]
            assert len({it.session for it in parts(swarm)}) == 1

    play(main())


def test_a_full_context_goes_on_with_its_last_half(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            session, network = await submit(swarm)
            assert await greedy(session, network, 3 * CONTEXT) == plainly(3 * CONTEXT)
            anew = [it.tensor.shape[1] for it in parts(swarm) if it.position == 0]
            assert anew[1:] == [CONTEXT // 2] * (len(anew) - 1)
            assert len(anew) > 3

    play(main())


def test_a_session_that_is_let_go_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "SESSIONS_MAX", 1)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            session, network = await submit(swarm)
            began = swarm.loop.time()
            texts = await asyncio.gather(*(greedy(session, network, 6) for _ in range(3)))
            assert texts == [plainly(6)] * 3
            assert sum(it.position == 0 for it in parts(swarm)) > 3, "they chase each other away"
            assert swarm.loop.time() - began < 10

    play(main())


def test_a_host_that_dies_is_not_seen_in_the_text(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, network = await submit(swarm)
            killed: list[str] = []

            def hook(letter: Letter) -> None:
                spared = letter.to == swarm["a"].peer_id or letter.source not in swarm.nodes
                late = letter.method == "VNode/Forward" and letter.request.position > 8
                if late and not spared and not killed:
                    killed.append(letter.to)
                    swarm.kill(letter.to)

            swarm.before.append(hook)
            assert await greedy(session, network, 8) == plainly(8)
            assert killed
            assert len({it.session for it in parts(swarm)}) > 1

    play(main())


def test_the_seed_decides(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            session, network = await submit(swarm)

            async def text(seed: int) -> str:
                pieces = generate(Passes(session, network, GRAPH), PROMPT, tokens=8, seed=seed)
                return "".join([piece async for piece in pieces])

            first, again, other = [await text(seed) for seed in (1, 1, 2)]
            assert first == again != other

    play(main())


def test_what_is_no_language_model_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            session = MemorySession(swarm)
            network = await submit_small(session, swarm["a"].peer_id)
            with pytest.raises(UsageError, match="small is no language model"):
                await anext(generate(Passes(session, network, small_graph()), PROMPT))

    play(main())


@pytest.mark.parametrize(
    "wrong", [{"tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}]
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            session, network = await submit(swarm)
            with pytest.raises(UsageError, match=r"temperature|tokens"):
                await anext(generate(Passes(session, network, GRAPH), PROMPT, **wrong))

    play(main())


def test_sampling() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(4)
    count = 4000
    found = np.bincount([pick(logits, rng, 1.0, 0) for _ in range(count)], minlength=4) / count
    np.testing.assert_allclose(found, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    found = np.bincount([pick(logits, rng, 1.0, 2) for _ in range(count)], minlength=4) / count
    np.testing.assert_allclose(found, [0.625, 0.375, 0, 0], atol=0.03)
    assert {pick(logits, rng, 0.0, 0) for _ in range(20)} == {0}
    assert {pick(logits, rng, 0.01, 0) for _ in range(20)} == {0}
    assert {pick(logits * 1e4, rng, 1e-9, 0) for _ in range(20)} == {0}
