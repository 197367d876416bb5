"""`local`: as good as `chain` on digits, over real processes, and no gradient crosses the wire."""

from __future__ import annotations

from pathlib import Path

import pytest
from digits import DIGITS, digits_batches
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from small_network import submit, train
from swarm import Figure, Swarm
from virtual_time import play

from p2pnet.data.datasets import open_data
from p2pnet.v1 import vnode_pb2

EPOCHS = 6
BATCHES = 45  # an epoch's, of 32 samples
STEPS = 8


def test_local_is_within_two_points_of_chain(calm: Swarm, figure: Figure) -> None:
    x_test, y_test = open_data("digits:test")
    accuracy: dict[str, float] = {}
    for learning in ("chain", "local"):
        spec = {**DIGITS, "name": f"digits-{learning}", "learning": learning, "cut_every": BATCHES}
        network = calm.nodes[1].client.submit(spec)
        network.train(digits_batches(EPOCHS * BATCHES))
        assert len({row["peer_id"] for row in network.locate()}) >= 2
        accuracy[learning] = float((network(x_test).argmax(axis=1) == y_test).mean())
    figure(f"accuracy on digits after {EPOCHS} epochs: {accuracy}")
    assert accuracy["chain"] > 0.9
    assert accuracy["local"] >= accuracy["chain"] - 0.02


@pytest.mark.parametrize("learning", ["chain", "local"])
def test_in_local_no_gradient_crosses_the_wire(tmp_path: Path, learning: str) -> None:
    """In `chain` they do: so this would see one."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id, learning=learning)
            trained = await train(session, network, STEPS)
            assert len(trained.results) == STEPS
            sent = {vnode_pb2.DIRECTION_FORWARD: 0, vnode_pb2.DIRECTION_BACKWARD: 0}
            for letter in swarm.letters:
                if letter.method == "VNode/Train":
                    sent[letter.request.direction] += len(letter.payload or b"")
                else:
                    assert not letter.payload, letter.method
            assert sent[vnode_pb2.DIRECTION_FORWARD] > 0
            assert (sent[vnode_pb2.DIRECTION_BACKWARD] > 0) == (learning == "chain")

    play(main())
