"""One log for a network, on peers or in a directory: claims, commits, and lost answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from log_helpers import states
from memory_swarm import MemorySwarm, claims_of, commits_of
from memory_wire import Letter, keypair_of
from virtual_time import play

from p2pnet.dht.manifest import network_id_of
from p2pnet.errors import LocalError, RefusedError, RemoteError, UnreachableError
from p2pnet.keys import MANIFEST
from p2pnet.log.directory import DirectoryLog
from p2pnet.log.history import History
from p2pnet.log.shell import (
    KEEPERS,
    LogInDirectory,
    LogOnPeers,
    NetworkLog,
    open_log,
)
from p2pnet.v1 import records_pb2

OWNER = keypair_of("owner")
OPEN = OWNER.sign(
    MANIFEST,
    records_pb2.Manifest(
        owner=OWNER.public_key, name="small", spec_digest=bytes(32), any_orchestrator=True
    ).SerializeToString(deterministic=True),
)
NETWORK = network_id_of(OPEN)


def log_at(swarm: MemorySwarm, name: str, url: str) -> NetworkLog:
    return open_log(swarm[name], NETWORK, OPEN, url)


async def entries(swarm: MemorySwarm, url: str) -> History:
    """The log as anybody may read it."""
    if not url:
        return await swarm.log_of(NETWORK)
    history = History(NETWORK)
    for entry in DirectoryLog(Path(url.removeprefix("file://")) / "log").read(NETWORK):
        history.add(entry)
    return history


@pytest.fixture(params=["peers", "directory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the log lives."""
    return "" if request.param == "peers" else f"file://{tmp_path}/shared"


def test_claims_and_commits_stand_in_order(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            log = log_at(swarm, "a", url)
            assert isinstance(log, LogInDirectory if url else LogOnPeers)
            assert await log.claim("submitted") == 1
            await log.commit(1, 20, states("20"))
            assert await log.claim("peer … has failed") == 2
            await log.commit(2, 40, states("40"))
            history = await entries(swarm, url)
            assert claims_of(history) == [1, 2]
            assert commits_of(history) == [20, 40]
            assert history.orchestrator == swarm["a"].peer_id
            assert dict(log.history.commit.states) == states("40")  # type: ignore[union-attr]
            assert len(log.keepers()) == (0 if url else KEEPERS)
            await log.close()

    play(main())


def test_one_of_two_claimants_gets_the_epoch(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            logs = [log_at(swarm, name, url) for name in "ab"]
            got = await asyncio.gather(
                *(log.claim("submitted") for log in logs), return_exceptions=True
            )
            assert sorted(map(str, got))[0] == "1"
            [loser] = [answer for answer in got if answer != 1]
            assert isinstance(loser, RefusedError)
            assert "has taken the network" in str(loser)
            history = await entries(swarm, url)
            winner = logs[got.index(1)]
            assert history.orchestrator == winner.history.orchestrator
            assert claims_of(history) == [1]
            await winner.commit(1, 20, states())
            for log in logs:
                if log is not winner:
                    with pytest.raises(RefusedError):  # nor does it try again and again
                        await log.claim("again")
                await log.close()
            assert claims_of(await entries(swarm, url)) == [1]

    play(main())


def test_a_commit_under_an_older_claim_does_not_count(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            ours, theirs = log_at(swarm, "a", url), log_at(swarm, "b", url)
            await ours.claim("submitted")
            theirs.history.extend(ours.history.entries)
            assert await theirs.claim("taken over") == 2
            with pytest.raises((RefusedError, LocalError)):
                await ours.commit(1, 20, states())
            with pytest.raises(RefusedError, match="has taken the network"):
                await ours.claim("back to me")
            await theirs.commit(2, 20, states("theirs"))
            history = await entries(swarm, url)
            assert claims_of(history) == [1, 2]
            assert dict(history.commit.states) == states("theirs")  # type: ignore[union-attr]
            for log in (ours, theirs):
                await log.close()

    play(main())


def test_a_commit_of_an_epoch_that_we_have_left_is_not_even_tried(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            log = log_at(swarm, "a", url)
            await log.claim("one")
            await log.claim("two")
            before = len((await entries(swarm, url)).entries)
            with pytest.raises(RefusedError, match="newer epoch"):
                await log.commit(1, 20, states())
            assert len((await entries(swarm, url)).entries) == before
            await log.close()

    play(main())


# On peers


def deaf(swarm: MemorySwarm, method: str) -> None:
    """Everybody's answers are lost; what was asked is done."""

    def lose(letter: Letter) -> None:
        if letter.method == method:
            raise UnreachableError("lost")

    swarm.after.append(lose)


@pytest.mark.parametrize("next_step", [20, 40])
def test_a_commit_that_was_given_up_may_count_all_the_same(tmp_path: Path, next_step: int) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            log = log_at(swarm, "a", "")
            await log.claim("submitted")
            deaf(swarm, "Keeper/Accept")
            with pytest.raises(UnreachableError, match="2 of 3 keepers"):
                await log.commit(1, 20, states("given up"))
            swarm.after.clear()
            await log.commit(1, next_step, states("next"))
            history = await swarm.log_of(NETWORK)
            assert commits_of(history) == [20] if next_step == 20 else [20, 40]
            kept = "given up" if next_step == 20 else "next"
            assert dict(history.commit.states) == states(kept)  # type: ignore[union-attr]
            assert log.history.entries == history.entries
            await log.close()

    play(main())


def test_a_claim_meets_our_own_commit_that_was_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            log = log_at(swarm, "a", "")
            await log.claim("submitted")
            deaf(swarm, "Keeper/Accept")
            with pytest.raises(UnreachableError):
                await log.commit(1, 20, states("given up"))
            swarm.after.clear()
            assert await log.claim("something went wrong") == 2
            assert dict(log.history.commit.states) == states("given up")  # type: ignore[union-attr]
            await log.commit(2, 40, states("next"))
            history = await swarm.log_of(NETWORK)
            assert claims_of(history) == [1, 2]
            assert commits_of(history) == [20, 40]
            await log.close()

    play(main())


def test_without_a_majority_nothing_is_decided_and_time_is_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            log = log_at(swarm, "a", "")
            await log.claim("submitted")
            for name in "bc":
                swarm.freeze(swarm[name].peer_id)
            began = swarm.loop.time()
            with pytest.raises(UnreachableError, match="2 of 3 keepers"):
                await log.claim("again")
            assert swarm.loop.time() - began < 60
            for name in "bc":
                swarm.thaw(swarm[name].peer_id)
            assert await log.claim("again") == 2
            assert claims_of(await swarm.log_of(NETWORK)) == [1, 2]
            await log.close()

    play(main())


def test_the_dead_are_replaced_and_the_living_stay(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcdefg") as swarm:
            log = log_at(swarm, "a", "")
            await log.claim("submitted")
            first = log.keepers()
            assert len(first) == KEEPERS
            gone = [peer for peer in first if peer != swarm["a"].peer_id][:2]
            for peer in gone:
                swarm.kill(peer)
            await asyncio.sleep(10)
            await log.claim("two keepers have failed")  # they are named by this entry ...
            second = log.keepers()
            assert len(second) == KEEPERS
            assert set(first) - set(gone) <= set(second)
            assert not set(gone) & set(second)
            survivors = [peer for peer in first if peer not in gone and peer != swarm["a"].peer_id]
            for peer in survivors[:2]:  # ... so that two more may go
                swarm.kill(peer)
            await asyncio.sleep(10)
            await log.commit(2, 20, states())
            assert len(log.keepers()) == 3  # of the three that are left
            history = await swarm.log_of(NETWORK)
            assert claims_of(history) == [1, 2]
            assert commits_of(history) == [20]
            await log.close()

    play(main())


@pytest.mark.parametrize(("nodes", "keepers"), [("a", 1), ("ab", 1), ("abc", 3), ("abcdef", 5)])
def test_keepers_are_an_odd_number(tmp_path: Path, nodes: str, keepers: int) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, nodes) as swarm:
            log = log_at(swarm, "a", "")
            await log.claim("submitted")
            assert len(log.keepers()) == keepers
            assert list(log.keepers()) == sorted(log.keepers())
            await log.close()

    play(main())


def test_a_keeper_that_was_away_learns_what_it_missed(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abc") as swarm:
            log = log_at(swarm, "a", "")
            await log.claim("submitted")
            swarm.freeze(swarm["c"].peer_id)
            for step in (20, 40):
                await log.commit(1, step, states(str(step)))
            await asyncio.sleep(5)
            swarm.thaw(swarm["c"].peer_id)
            swarm["c"].start_keeper()  # it was even restarted
            swarm.freeze(swarm["b"].peer_id)  # so that "c" is needed
            await log.commit(1, 60, states("60"))
            swarm.thaw(swarm["b"].peer_id)
            await asyncio.sleep(5)
            swarm.kill(swarm["b"].peer_id)
            await asyncio.sleep(5)
            assert commits_of(await swarm.log_of(NETWORK)) == [20, 40, 60]
            await log.close()

    play(main())


def test_two_orchestrators_that_race_for_every_epoch_never_both_hold_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcde") as swarm:
            held: list[tuple[int, str]] = []

            async def rounds(name: str) -> None:
                for _ in range(4):
                    log = log_at(swarm, name, "")
                    log.history.extend((await swarm.log_of(NETWORK)).entries)
                    try:
                        epoch = await log.claim(f"{name} wants it")
                        held.append((epoch, name))
                        await log.commit(epoch, 20 * epoch, states(name))
                    except RemoteError:
                        pass
                    await log.close()

            await asyncio.gather(rounds("a"), rounds("b"))
            history = await swarm.log_of(NETWORK)
            assert claims_of(history) == sorted(claims_of(history))
            assert len({epoch for epoch, _ in held}) == len(held) >= 4
            assert commits_of(history) == sorted(set(commits_of(history)))

    play(main())
