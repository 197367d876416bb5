"""Full disks: the cut fails and is said to, steps go on, and count once there is room."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm, commits_of
from small_network import CUT_EVERY, batch, plain, submit, train
from virtual_time import play

from p2pnet.client.run import TrainingRun

STEPS = 9


def set_room(swarm: MemorySwarm, names: str, size_bytes: int) -> None:
    for name in names:
        swarm[name].store.bytes_max = size_bytes


def test_steps_go_on_while_every_disk_is_full(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            set_room(swarm, "abc", 100)
            run = TrainingRun(session, network)
            for step in range(1, 2 * CUT_EVERY + 1):
                x, y = batch(step)
                assert (await run.step({"x": x}, y)).step == step
            await swarm.until(lambda: swarm.emitted("uncommitted"))
            status = await session.status(network)
            assert (status.state, status.committed_step) == ("uncommitted", 0)
            assert "steps after 0 would be lost with a host" in status.detail
            assert "no room for a state" in status.detail
            assert status.epoch == 1, "nothing was placed anew for it"
            set_room(swarm, "abc", 1 << 30)
            x, y = batch(2 * CUT_EVERY + 1)
            await run.step({"x": x}, y)
            assert (await run.finish()).step == 2 * CUT_EVERY + 1
            await run.close()
            status = await session.status(network)
            assert (status.state, status.detail) == ("ready", "")
            assert status.epoch == 1
            trained = await train(session, network, STEPS, first=2 * CUT_EVERY + 2)
            assert trained.digest == plain(STEPS)[0]

    play(main())


def test_a_full_disk_is_no_trouble_while_two_others_have_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            set_room(swarm, "a", 100)
            trained = await train(session, network, STEPS)
            assert trained.digest == plain(STEPS)[0]
            assert commits_of(await swarm.log_of(network.network_id)) == [3, 6, 9]
            assert not swarm.emitted("uncommitted")

    play(main())
    said = [message for message in caplog.messages if "could not be kept here" in message]
    assert len(said) == 1, "once, and not at every cut"
