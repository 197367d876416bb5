"""What a client asks of networks while orchestrators come and go."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import Letter, keypair_of
from small_network import batch, plain, plain_output, small_graph, submit, train
from virtual_time import play

from p2pnet.client import networks as module
from p2pnet.client.inference import infer_all
from p2pnet.client.passes import Passes
from p2pnet.client.terms import Terms
from p2pnet.client.weights import fetch_weights
from p2pnet.dht.manifest import open_manifest
from p2pnet.errors import UnreachableError, UsageError
from p2pnet.vnode.state import model_digest

OWNER = keypair_of("owner")


def submissions(swarm: MemorySwarm) -> list[Letter]:
    return [it for it in swarm.letters if it.method == "Orchestrator/Submit"]


def test_every_verb_works_after_the_orchestrator_has_died(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            await train(session, network, 4)
            swarm.kill(swarm["a"].peer_id)
            status = await session.status(network)  # at once, before anybody has noticed
            assert status.orchestrator != swarm["a"].peer_id
            assert status.committed_step == 4
            said = [it.message for it in caplog.records if it.name.startswith("p2pnet.client")]
            assert len([it for it in said if it.startswith("waiting for an orchestrator")]) == 1
            weights = await fetch_weights(session, network, await session.cut(network))
            assert model_digest(weights) == plain(4)[0]
            x, _ = batch(1)
            outcome = await infer_all(Passes(session, network, small_graph()), {"x": x})
            assert not outcome.missing
            assert outcome.output == pytest.approx(plain_output(4, x), rel=1e-5)
            rows = await session.where_is(network)
            assert swarm["a"].peer_id not in [row.peer_id for row in rows]
            assert (await session.find("small")).orchestrator == status.orchestrator
            trained = await train(session, network, 6, first=5)
            assert trained.digest == plain(6)[0]
            # Who it is now is asked once, not at every call.
            asked = len([it for it in swarm.letters if it.method == "Orchestrator/Lease"])
            await session.status(network)
            leases = [
                it
                for it in swarm.letters[asked:]
                if it.method == "Orchestrator/Lease" and it.source == keypair_of("client").peer_id
            ]
            assert len({it.to for it in leases}) <= 5

    play(main())


def test_a_record_that_is_behind_is_no_hindrance(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            for name in "bcde":
                stale = replace(network, orchestrator=swarm[name].peer_id, epoch=0)
                found = await MemorySession(swarm).locate(stale)
                assert (found.orchestrator, found.epoch) == (swarm["a"].peer_id, 1)
                assert (await MemorySession(swarm).status(stale)).name == "small"
            swarm.dht_answers = False  # its host or keeper knows who it is
            found = await MemorySession(swarm).locate(stale)
            assert found.orchestrator == swarm["a"].peer_id

    play(main())


def test_without_any_orchestrator_a_verb_gives_up_in_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            for peer_id in list(swarm.nodes):
                swarm.kill(peer_id)
            began = swarm.loop.time()
            with pytest.raises(UnreachableError, match="cannot reach"):
                await session.status(network)
            assert 0.9 < (swarm.loop.time() - began) / module.ASK_LIMIT_S < 1.5

    play(main())


def test_only_the_owner_cancels_and_only_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session = MemorySession(swarm)
            await submit(session, swarm["a"].peer_id)
            network = await session.find("small")
            with pytest.raises(UsageError, match="only its owner can cancel it"):
                await session.cancel(network, keypair_of("another"))
            with pytest.raises(UsageError, match="at most 200"):
                await session.cancel(network, OWNER, "x" * 201)
            assert (await session.status(network)).state == "ready"
            await session.cancel(network, OWNER, "it is done")
            for verb in (
                session.status(network),
                session.cut(network),
                session.cancel(network, OWNER),
                MemorySession(swarm).status(replace(network, orchestrator=swarm["b"].peer_id)),
            ):
                with pytest.raises(UsageError, match="owner has closed small: it is done"):
                    await verb

    play(main())


def test_the_owners_word_is_taken_to_a_new_orchestrator_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            swarm.kill(swarm["a"].peer_id)
            await session.cancel(network, OWNER)
            assert (await swarm.log_of(network.network_id)).closing is not None

    play(main())


def test_the_terms_are_in_the_manifest_and_hold(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            session = MemorySession(swarm)
            terms = Terms((swarm["b"].peer_id, swarm["c"].peer_id), hosts_max=2)
            network = await session.submit(small_graph(), OWNER, {}, terms=terms)
            assert network.orchestrator in terms.allow
            status = await session.status(network)
            assert len({location.host for location in status.locations}) <= 2
            manifest = open_manifest(submissions(swarm)[0].request.manifest)
            assert len(manifest.keepers) == 5
            with pytest.raises(UsageError, match="not among those allowed"):
                await session.submit(
                    small_graph(name="second"), OWNER, {}, swarm["a"].peer_id, terms
                )

    play(main())


def test_with_a_store_the_manifest_says_where_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        url = f"file://{tmp_path}/shared"
        async with MemorySwarm(tmp_path, "abc", state_url=url) as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            manifest = open_manifest(submissions(swarm)[0].request.manifest)
            assert manifest.state_url == url
            assert not manifest.keepers
            assert (await train(session, network, 3)).digest == plain(3)[0]

    play(main())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["Orchestrator/Submit", "PNode/Allocate", "Keeper/Accept"])
def test_an_orchestrator_that_dies_over_a_submission_leaves_one_network(
    tmp_path: Path, method: str, when: str
) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdef") as swarm:
            killed: list[str] = []

            def hook(letter: Letter) -> None:
                if letter.method == method and not killed:
                    killed.append(swarm["a"].peer_id)
                    swarm.kill(swarm["a"].peer_id)

            hooks: list[Any] = swarm.before if when == "before" else swarm.after
            hooks.append(hook)
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            assert killed
            manifests = {it.request.manifest.payload for it in submissions(swarm)}
            assert len(manifests) == 1
            assert network.orchestrator != swarm["a"].peer_id
            assert (await session.find("small")).network_id == network.network_id
            assert (await train(session, network, 4)).digest == plain(4)[0]

    play(main())


def test_a_swarm_of_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            session = MemorySession(swarm)
            with pytest.raises(UnreachableError):
                await submit(session, keypair_of("nobody").peer_id)
            for peer_id in list(swarm.nodes):
                swarm.kill(peer_id)
            await asyncio.sleep(5)
            with pytest.raises(UsageError, match="no peer of the network can be reached"):
                await submit(session, "")

    play(main())
