"""A log of thousands of entries, and a host that has yet to read it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from claims import Log
from hosting import BOSS, GRANTED, KEEPER, ORDER, allocation, manifest_of
from memory_swarm import MemorySwarm
from small_network import small_graph
from virtual_time import play

from p2pnet.log.keeper import BATCH_ENTRIES
from p2pnet.v1 import common_pb2, log_pb2, pnode_pb2
from p2pnet.vnode.tenancy import WAITS_S, Tenancy
from p2pnet.vnode.tenancy_events import LogRead
from p2pnet.vnode.tenancy_shell import PART_ENTRIES

GRAPH = small_graph()
ENTRIES = 3_000
BUSY = common_pb2.REFUSAL_CODE_BUSY
PIECES = -(-ENTRIES // BATCH_ENTRIES)


@pytest.fixture(scope="module")
def taught() -> tuple[Log, list[log_pb2.Proof]]:
    log = Log(GRAPH, GRANTED, keepers=[KEEPER])
    log.claim(BOSS, dict.fromkeys(ORDER, KEEPER))
    for step in range(1, ENTRIES - 1):
        log.commit(BOSS, step)
    log.claim(BOSS, dict.fromkeys(ORDER, "b"))
    return log, log.proofs


class Parts:
    """Sees what comes of a log into the core, and that others have a turn in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self._had_a_turn = True
        handle = Tenancy.handle

        def seen(core: Tenancy, event: Any, now: float) -> Any:
            if isinstance(event, LogRead):
                assert self._had_a_turn, "two parts in one turn of the loop"
                self._had_a_turn = False
                self.sizes.append(len(event.entries))
                asyncio.get_running_loop().call_soon(self._turn)
            return handle(core, event, now)

        monkeypatch.setattr(Tenancy, "handle", seen)

    def _turn(self) -> None:
        self._had_a_turn = True


async def begun(swarm: MemorySwarm, log: Log, proofs: list[log_pb2.Proof], page_s: float) -> None:
    """The keeper knows the log, and tells it slowly."""
    for node in swarm.nodes.values():
        await node.orchestrator.close()
    for at in range(0, ENTRIES, BATCH_ENTRIES):
        request = log_pb2.LearnRequest(
            network_id=log.network_id,
            entries=log.entries[at : at + BATCH_ENTRIES],
            proofs=proofs[at : at + BATCH_ENTRIES],
        )
        await swarm.ask(KEEPER, "Keeper/Learn", request, log_pb2.LearnReply, by=BOSS)
    swarm.latency_s = lambda letter: page_s if letter.method == "Keeper/ReadLog" else 0.001
    swarm.letters.clear()


def pages(swarm: MemorySwarm) -> int:
    return sum(letter.method == "Keeper/ReadLog" for letter in swarm.letters)


def test_a_host_that_reads_for_long_is_busy_and_reads_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taught: tuple[Log, list[log_pb2.Proof]]
) -> None:
    log, proofs = taught
    parts = Parts(monkeypatch)
    request = allocation(GRAPH, ORDER, log.entries[-1], epoch=2)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await begun(swarm, log, proofs, page_s=0.2)
            answers = []

            async def ask() -> pnode_pb2.AllocateReply:
                asked_at = swarm.loop.time()
                reply = await swarm.ask(
                    "b", "PNode/Allocate", request, pnode_pb2.AllocateReply, by=BOSS
                )
                assert swarm.loop.time() - asked_at < WAITS_S + 0.1
                answers.append(reply.refusal.code)
                return reply

            await ask()
            assert 5 < pages(swarm) < PIECES / 2, "nowhere near the end"
            swarm.freeze(swarm[KEEPER].peer_id)  # the read breaks off, and begins again
            for _ in range(5):
                await ask()
            swarm.thaw(swarm[KEEPER].peer_id)
            while answers[-1] == BUSY:
                reply = await ask()
            assert len(reply.acceptances) == len(ORDER), reply.refusal
            assert answers[:-1] == [BUSY] * (len(answers) - 1)
            assert len(answers) > 7
            assert pages(swarm) <= PIECES + 2 * len(answers) + 20
            assert sum(parts.sizes) == ENTRIES
            assert max(parts.sizes) <= PART_ENTRIES

            # and after that no more than what is new
            swarm.letters.clear()
            assert (await ask()).acceptances == reply.acceptances
            await asyncio.sleep(5)  # no heartbeat comes: it asks the log
            assert 1 <= pages(swarm) <= 3
            assert sum(parts.sizes) == ENTRIES

    play(main())


def test_a_host_that_gets_ready_has_read_the_log_when_the_claim_comes(
    tmp_path: Path, taught: tuple[Log, list[log_pb2.Proof]]
) -> None:
    log, proofs = taught

    async def main() -> None:
        async with MemorySwarm(tmp_path, "ab") as swarm:
            await begun(swarm, log, proofs, page_s=0.05)
            ready = pnode_pb2.ReadyRequest(
                network_id=log.network_id,
                manifest=manifest_of(GRAPH),
                graph=GRAPH.to_json(),
                vnodes=ORDER,
            )
            reply = await swarm.ask("b", "PNode/Ready", ready, pnode_pb2.ReadyReply, by=BOSS)
            assert not reply.HasField("refusal"), reply.refusal
            read = pages(swarm)
            assert read >= PIECES
            request = allocation(GRAPH, ORDER, log.entries[-1], epoch=2)
            allocated = await swarm.ask(
                "b", "PNode/Allocate", request, pnode_pb2.AllocateReply, by=BOSS
            )
            assert allocated.acceptances, allocated.refusal
            assert pages(swarm) <= read + 2

    play(main())
