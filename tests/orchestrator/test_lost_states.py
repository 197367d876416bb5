"""States of a commit that nobody has any more: whole nodes in one process and in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm, commits_of
from small_network import plain, submit, train
from virtual_time import play

from p2pnet.errors import P2PNetError
from p2pnet.log.history import parse_entry


def lose(swarm: MemorySwarm, digests: list[bytes]) -> int:
    """Deletes blobs wherever they are; how many there were."""
    gone = 0
    for node in swarm.nodes.values():
        for digest in digests:
            for path in (node.directory / "blobs").rglob(f"*{digest.hex()}*"):
                path.unlink()
                gone += 1
    return gone


@pytest.mark.parametrize("which", ["one VNode's", "all"])
def test_a_network_goes_back_by_one_commit_and_gets_to_the_same_bits(
    tmp_path: Path, which: str
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            await train(session, network, 6)  # commits of steps 3 and 6
            status = await session.status(network)
            assert status.committed_step == 6
            before = dict.fromkeys(await _digests(swarm, network.network_id, 3))
            states = {
                vnode: ref.digest
                for vnode, ref in status.states.items()
                if ref.digest not in before  # VNodes without parameters share one
            }
            lost = list(states.values()) if which == "all" else [states["fc1"]]
            assert lose(swarm, lost) >= len(lost)
            host = next(row.host for row in status.locations if row.vnode == "fc1")
            if host == swarm["a"].peer_id:
                host = next(row.host for row in status.locations if row.host != host)
            swarm.kill(host)
            for _ in range(60):
                await asyncio.sleep(2.0)
                status = await session.status(network)
                if status.committed_step == 3 or status.state == "lost":
                    break
                with contextlib.suppress(P2PNetError):  # a state is looked for when it is needed
                    await train(session, network, 7, first=7)
            assert status.committed_step == 3
            trained = await train(session, network, 8, first=4)
            assert trained.digest == plain(8)[0]
            history = await swarm.log_of(network.network_id)
            assert commits_of(history) == [3, 6, 6, 8]
            claims = [parse_entry(entry).claim for entry in history.entries]
            assert [claim.from_step for claim in claims if claim.from_step] == [3]

    play(main())


async def _digests(swarm: MemorySwarm, network_id: str, step: int) -> list[bytes]:
    history = await swarm.log_of(network_id)
    [commit] = [
        entry.commit for entry in map(parse_entry, history.entries) if entry.commit.step == step
    ]
    return [ref.digest for ref in commit.states.values()]
