"""Hosts that die while standbys follow: whole nodes in one process and in virtual time.

What a standby has followed is gone on from; what it cannot have is done again from the
cut. Either way no bit changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import Letter
from small_network import plain, submit, train
from test_conductor import DEATHS, kill_once
from virtual_time import play

STEPS = 8


def live_steps(swarm: MemorySwarm) -> list[int]:
    """The steps that hosts were asked to go on from in memory, each once."""
    steps = [it.request.live_step for it in swarm.letters if it.method == "PNode/Allocate"]
    return sorted(dict.fromkeys(step for step in steps if step))


def fed_again(swarm: MemorySwarm) -> list[int]:
    """Steps whose inputs a feeder has sent under more than one epoch."""
    epochs: dict[int, dict[int, None]] = {}
    peers = {node.peer_id for node in swarm.nodes.values()}
    for it in swarm.letters:
        if it.method == "VNode/Train" and it.source not in peers:
            epochs.setdefault(it.request.id.step, {})[it.request.id.epoch] = None
    return sorted(step for step, under in epochs.items() if len(under) > 1)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("death", DEATHS)
def test_a_host_that_dies_changes_no_bit(tmp_path: Path, death: str, when: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            killed = kill_once(swarm, getattr(swarm, when), *DEATHS[death])
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id, replicas=2, cut_every=3)
            trained = await train(session, network, STEPS)
            assert len(killed) == 1
            assert trained.digest == plain(STEPS)[0]
            assert [result.step for result in trained.results] == list(range(1, STEPS + 1))
            assert [r.loss for r in trained.results] == pytest.approx(plain(STEPS)[1], rel=1e-6)

    play(main())


FOLLOWED = ["in forward", "fed", "in backward", "given a gradient", "between held and decided"]


@pytest.mark.parametrize("death", FOLLOWED)
def test_no_decided_step_is_done_again(tmp_path: Path, death: str) -> None:
    """Step 5 is under way, the cut is of step 3, and 4 is decided."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            killed = kill_once(swarm, swarm.before, *DEATHS[death])
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id, replicas=2, cut_every=3)
            trained = await train(session, network, STEPS)
            assert len(killed) == 1
            assert trained.digest == plain(STEPS)[0]
            assert live_steps(swarm) == [4]
            assert [step for step in fed_again(swarm) if step <= 4] == []

    play(main())


def test_whoever_follows_dies_without_anybody_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdefg") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id, replicas=2, cut_every=3)
            status = await session.status(network)
            hosts = [row.host for row in status.locations if not row.standby]
            only = [row.host for row in status.locations if row.standby and row.host not in hosts]
            killed: list[str] = []

            def kill(letter: Letter) -> None:
                follows = letter.method == "VNode/Follow" and letter.request.id.step == 2
                if follows and letter.to in only and not killed:
                    killed.append(letter.to)
                    swarm.kill(letter.to)

            swarm.before.append(kill)
            trained = await train(session, network, STEPS)
            assert killed
            assert trained.digest == plain(STEPS)[0]
            assert trained.recoveries == []
            assert live_steps(swarm) == []

    play(main())


@pytest.mark.parametrize("seed", range(3))
def test_hosts_die_one_after_the_other(tmp_path: Path, seed: int) -> None:
    """Between any two deaths there may or may not have been time for new standbys."""

    async def main() -> None:
        rng = random.Random(seed)
        deaths = {rng.randrange(2, STEPS): None for _ in range(2)}
        killed: list[str] = []
        async with MemorySwarm(tmp_path, "abcdef") as swarm:
            where: Callable[[Letter], bool] = lambda letter: (  # noqa: E731
                letter.method in ("VNode/Train", "VNode/Follow", "Orchestrator/Report")
                and letter.request.id.step in deaths
                and rng.random() < 0.3
            )

            def kill(letter: Letter) -> None:
                peer = letter.to if rng.random() < 0.5 else letter.source
                if peer in swarm.nodes and peer != swarm["a"].peer_id and where(letter):
                    del deaths[letter.request.id.step]
                    killed.append(peer)
                    swarm.kill(peer)

            swarm.before.append(kill)
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id, replicas=2, cut_every=3)
            trained = await train(session, network, STEPS)
            assert killed
            assert trained.digest == plain(STEPS)[0]
            assert [result.step for result in trained.results] == list(range(1, STEPS + 1))

    play(main())
