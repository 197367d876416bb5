"""Standbys answer too: they share the load, and take over while a host is gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from small_network import plain_output, small_graph, submit, train
from virtual_time import play

from p2pnet.client import inference as client
from p2pnet.client.passes import Passes

GRAPH = small_graph(replicas=2)


@pytest.mark.parametrize(("replicas", "hosts"), [(2, "abcd"), (3, "abcdef")])
def test_standbys_share_the_load(tmp_path: Path, replicas: int, hosts: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, hosts) as swarm:
            session = MemorySession(swarm)
            graph = small_graph(replicas=replicas)
            network = await submit(session, swarm["a"].peer_id, replicas=replicas)
            x = np.random.default_rng(1).standard_normal((256 * 6, 6)).astype(np.float32)
            outcome = await client.infer_all(Passes(session, network, graph), {"x": x})
            assert not outcome.missing
            np.testing.assert_allclose(outcome.output, plain_output(0, x), rtol=1e-5, atol=1e-6)
            hops = [it for it in swarm.letters if it.method == "VNode/Forward"]
            assert {it.request.replica for it in hops} == set(range(replicas))
            rows = await session.where_is(network)
            hosts_of: dict[str, list[str]] = {}
            for row in rows:  # the VNode's own first, then its standbys in order
                hosts_of.setdefault(row.vnode, []).append(row.peer_id)
            for hop in hops:
                assert hop.to == hosts_of[hop.request.vnode][hop.request.replica]

    play(main())


def test_after_training_all_say_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id, replicas=2)
            await train(session, network, 4)
            x = np.random.default_rng(1).standard_normal((256 * 4, 6)).astype(np.float32)
            outcome = await client.infer_all(Passes(session, network, GRAPH), {"x": x})
            np.testing.assert_allclose(outcome.output, plain_output(4, x), rtol=1e-5, atol=1e-6)

    play(main())


def test_a_dead_host_is_gone_around(tmp_path: Path) -> None:
    """All VNodes on one host, their standbys on the other: nobody has to be placed anew."""

    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id, replicas=2)
            rows = [row for row in await session.where_is(network) if row.role == "primary"]
            x = np.random.default_rng(2).standard_normal((8, 6)).astype(np.float32)
            passes = Passes(session, network, GRAPH)
            await client.infer_all(passes, {"x": x})
            hosts = [row.peer_id for row in rows if row.peer_id != swarm["a"].peer_id]
            swarm.kill(max(hosts, key=hosts.count))
            outcome = await client.infer_all(passes, {"x": x})
            np.testing.assert_allclose(outcome.output, plain_output(0, x), rtol=1e-5, atol=1e-6)

    play(main())
