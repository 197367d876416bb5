"""A network's weights, from the last cut into a dict or a file, named as torch names them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from small_network import batch, plain, submit, train
from virtual_time import play

from p2pnet.client.run import TrainingRun
from p2pnet.client.weights import fetch_weights, write_weights
from p2pnet.errors import ForgedError, ResourceError, UnreachableError
from p2pnet.vnode.state import model_digest

SHAPES = {
    "fc1.bias": (8,),
    "fc1.weight": (8, 6),
    "fc2.bias": (6,),
    "fc2.weight": (6, 8),
    "out.bias": (3,),
    "out.weight": (3, 6),
}


def test_weights_are_those_of_torch_under_torchs_names(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            await train(session, network, 5)
            weights = await fetch_weights(session, network, await session.cut(network))
            assert {name: array.shape for name, array in sorted(weights.items())} == SHAPES
            assert model_digest(weights) == plain(5)[0]

    play(main())


def test_weights_come_from_whoever_still_has_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdefg") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            trained = await train(session, network, 3)
            states = trained.done.states
            *others, last = states["fc1"].holders
            assert len(others) >= 2
            for vnode in states:  # the others' states are not what this is about
                states[vnode].holders[:] = [*dict.fromkeys([*states[vnode].holders, last])]
            for holder in others:
                swarm.kill(holder)
            assert model_digest(await fetch_weights(session, network, states)) == plain(3)[0]
            swarm.kill(last)
            with pytest.raises(UnreachableError, match="that held a state has it"):
                await fetch_weights(session, network, states)

    play(main())


def test_states_of_several_steps_are_no_cut(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            older = dict((await train(session, network, 3)).done.states)
            newer = dict((await train(session, network, 4, first=4)).done.states)
            with pytest.raises(ForgedError, match=r"several steps: \[3, 4\]"):
                await fetch_weights(session, network, newer | {"fc1": older["fc1"]})

    play(main())


def test_a_cut_in_a_directory_is_read_there(tmp_path: Path) -> None:
    async def main() -> None:
        url = f"file://{tmp_path}/shared"
        async with MemorySwarm(tmp_path, "abc", state_url=url) as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            network = await session.find(network.name)
            assert network.state_url == url
            trained = await train(session, network, 3)
            assert trained.digest == plain(3)[0]
            assert not [it for it in swarm.letters if it.method == "Blob/Get"]

    play(main())


def test_a_running_trainings_weights_are_those_of_its_last_cut(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            run = TrainingRun(session, network)
            for step in range(1, 6):
                x, y = batch(step)
                await run.step({"x": x}, y)
            weights = await fetch_weights(session, network, await session.cut(network))
            assert model_digest(weights) == plain(3)[0]
            await run.finish()

    play(main())


def arrays() -> dict[str, Any]:
    return {
        "fc1.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "n": np.array(7, np.float32),
    }


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"of before")
    write_weights(path, arrays())
    found = safetensors.numpy.load_file(path)
    assert sorted(found) == ["fc1.weight", "n"]
    assert np.array_equal(found["fc1.weight"], arrays()["fc1.weight"])
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("broken", ["the folder", "the disk"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"of before")
    if broken == "the folder":
        target = tmp_path / "none" / "weights.safetensors"
    else:
        target = path

        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match=r"cannot be written: No (such file|space left)"):
        write_weights(target, arrays())
    assert path.read_bytes() == b"of before"
    assert os.listdir(tmp_path) == [path.name]
