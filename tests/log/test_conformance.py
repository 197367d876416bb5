"""One contract for a network's log, wherever it is kept: on peers, in a directory, on S3."""

from __future__ import annotations

import asyncio
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import log_helpers as given
import pytest
from keeper_swarm import KeeperSwarm
from memory_wire import keypair_of
from s3_server import S3Server
from virtual_time import play

from p2pnet.errors import ForgedError, LocalError, P2PNetError, RemoteError, UnreachableError
from p2pnet.keys import KeyPair
from p2pnet.log.history import History, new_cancellation, new_closing, new_commit, parse_entry
from p2pnet.log.shell import Log, open_log
from p2pnet.v1 import common_pb2

A, B, C = (keypair_of(name) for name in "abc")
BUCKET = "p2pnet-logs"


class Place(ABC):
    """Where logs are kept, and what can be done to it. Nodes "a" to "e" can reach it."""

    manifest: common_pb2.Signed
    swarm: KeeperSwarm

    @property
    def network(self) -> str:
        return given.network_of(self.manifest)

    def log(self, name: str) -> Log:
        """As a node that knows nothing yet opens it."""
        return open_log(self.swarm[name], self.network, self.manifest)  # type: ignore[arg-type]

    @contextmanager
    @abstractmethod
    def answers_lost(self) -> Iterator[None]:
        """What is written is done, and nobody hears of it."""

    @abstractmethod
    def damage(self, slot: int, how: str) -> None:
        """An entry is spoiled where it lies ("truncated", "flipped"), or gone ("missing")."""


class OnPeers(Place):
    def __init__(self, swarm: KeeperSwarm, path: Path) -> None:
        self.swarm = swarm
        self.manifest = given.manifest(anybody=True, keepers=swarm.ids("abc"))

    @contextmanager
    def answers_lost(self) -> Iterator[None]:
        undo = self.swarm.lose("Keeper/Accept")
        yield
        undo()

    def damage(self, slot: int, how: str) -> None:
        for name in "abc":  # every keeper: else the others tell
            spoil(self.swarm.directory / name / self.network / str(slot), how)


class InDirectory(Place):
    def __init__(self, swarm: KeeperSwarm, path: Path) -> None:
        self.swarm, self._path = swarm, path
        self.manifest = given.manifest(anybody=True, url=f"file://{path}/shared")

    @contextmanager
    def answers_lost(self) -> Iterator[None]:
        def lost(*args: object) -> None:
            raise OSError(5, "Input/output error")

        with mock.patch("p2pnet.log.directory.sync_folder", lost):
            yield

    def damage(self, slot: int, how: str) -> None:
        spoil(self._path / "shared/log" / self.network / f"{slot:08d}.entry", how)


class OnS3(Place):
    def __init__(self, swarm: KeeperSwarm, s3: S3Server) -> None:
        self.swarm, self._s3 = swarm, s3
        self.manifest = given.manifest(anybody=True, url=f"s3://{BUCKET}/{s3.url[-5:]}")

    @contextmanager
    def answers_lost(self) -> Iterator[None]:
        self._s3.fault = lambda method, key: "lost" if method == "PUT" else ""
        yield
        self._s3.fault = lambda method, key: ""

    def damage(self, slot: int, how: str) -> None:
        key = f"{self._s3.url[-5:]}/log/{self.network}/{slot:08d}.entry"
        data = spoiled(self._s3.objects.pop(key), how)
        if data is not None:
            self._s3.objects[key] = data


def spoiled(data: bytes, how: str) -> bytes | None:
    if how == "missing":
        return None
    return data[:-20] if how == "truncated" else data[:60] + bytes([data[60] ^ 1]) + data[61:]


def spoil(path: Path, how: str) -> None:
    data = spoiled(path.read_bytes(), how)
    path.unlink()
    if data is not None:
        path.write_bytes(data)


Scene = Callable[[Callable[[Place], Awaitable[None]]], None]


@pytest.fixture(params=["peers", "directory", "s3"])
def on(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    """Plays a scene in one of the places, in virtual time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with S3Server(BUCKET).running() as s3:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "test")

        def scene(act: Callable[[Place], Awaitable[None]]) -> None:
            async def main() -> None:
                async with KeeperSwarm(tmp_path / "nodes", "abcde") as swarm:
                    place: Place
                    if request.param == "peers":
                        place = OnPeers(swarm, tmp_path)
                    elif request.param == "directory":
                        place = InDirectory(swarm, tmp_path)
                    else:
                        place = OnS3(swarm, s3)
                    await act(place)
                    await asyncio.sleep(10)  # for what is still on its way

            play(main())

        yield scene


ON_PEERS = pytest.mark.parametrize("on", ["peers"], indirect=True)
IN_A_STORE = pytest.mark.parametrize("on", ["directory", "s3"], indirect=True)


class Writer:
    """A node that follows the log and writes."""

    def __init__(self, place: Place, name: str) -> None:
        self.key: KeyPair = keypair_of(name)
        self.log = place.log(name)
        self.history = History(place.network)
        self._manifest = place.manifest

    async def catch_up(self) -> None:
        self.history.extend(await self.log.read(self.history.next_slot))

    async def claim(self, **more: object) -> bool:
        """Whether it is ours that is next."""
        return await self.append(given.claim(self.history, self.key, self._manifest, **more))

    async def commit(self, step: int, text: str = "", **more: object) -> bool:
        states = given.states(text or str(step))
        return await self.append(new_commit(self.history, self.key, step, states, **more))  # type: ignore[arg-type]

    async def append(self, entry: common_pb2.Signed) -> bool:
        winner = await self.log.append(self.history, entry)
        assert self.history.add(winner) == ""
        return winner == entry


def steps_of(history: History) -> list[int]:
    entries = [parse_entry(signed) for signed in history.entries]
    return [entry.commit.step for entry in entries if entry.HasField("commit")]


def test_what_is_appended_is_read_back_in_order(on: Scene) -> None:
    async def act(place: Place) -> None:
        a = Writer(place, "a")
        assert await a.log.read() == []
        assert await a.claim(reason="submitted")
        for step in (20, 40, 60):
            assert await a.commit(step)
        for name in "ab":  # by who wrote it, and by who knows nothing
            log = place.log(name)
            assert await log.read() == a.history.entries
            assert await log.read(3) == a.history.entries[2:]
            assert await log.read(5) == []
        assert await a.log.read(4) == a.history.entries[3:]

    on(act)


def test_of_many_first_claims_one_is_decided_and_all_are_told_which(on: Scene) -> None:
    async def act(place: Place) -> None:
        writers = [Writer(place, name) for name in "abcde"]
        won = await asyncio.gather(*(writer.claim() for writer in writers))
        assert sorted(won) == [False] * 4 + [True]
        for writer in writers:
            assert writer.history.entries == writers[0].history.entries
            assert writer.history.orchestrator == writers[won.index(True)].key.peer_id
        assert await place.log("e").read() == writers[0].history.entries

    on(act)


@pytest.mark.parametrize("seed", range(4))
def test_writers_that_race_agree_on_every_slot(on: Scene, seed: int) -> None:
    async def act(place: Place) -> None:
        rng = random.Random(seed)
        decided: dict[int, dict[bytes, None]] = {}

        async def write(name: str) -> int:
            writer, won = Writer(place, name), 0
            for _ in range(6):
                await asyncio.sleep(rng.random() * 0.02)
                await writer.catch_up()
                mine = writer.history.orchestrator == writer.key.peer_id
                committed = writer.history.commit
                step = 1 + (committed.step if committed else 0)
                try:
                    if mine and rng.random() < 0.7:
                        won += await writer.commit(step, name)
                    else:
                        won += await writer.claim()
                except UnreachableError:
                    await writer.catch_up()  # duelled too long
            for slot, entry in enumerate(writer.history.entries, start=1):
                decided.setdefault(slot, {})[entry.payload] = None
            return won

        won = await asyncio.gather(*(write(name) for name in "abc"))
        assert all(len(payloads) == 1 for payloads in decided.values())
        reader = Writer(place, "d")
        await reader.catch_up()
        assert [e.payload for e in reader.history.entries] == [
            next(iter(decided[slot])) for slot in sorted(decided)
        ]
        assert sum(won) <= len(reader.history.entries)
        assert len(reader.history.entries) >= 6

    on(act)


def test_the_same_entry_again_is_no_harm(on: Scene) -> None:
    async def act(place: Place) -> None:
        a = Writer(place, "a")
        before = History(place.network)
        await a.claim()
        again = Writer(place, "a")
        for log in (a.log, again.log):
            assert await log.append(before, a.history.entries[0]) == a.history.entries[0]
        assert await again.log.read() == a.history.entries

    on(act)


def test_an_entry_whose_answer_was_lost_may_be_decided_all_the_same(on: Scene) -> None:
    async def act(place: Place) -> None:
        a = Writer(place, "a")
        await a.claim()
        given_up = new_commit(a.history, a.key, 20, given.states("given up"))
        with place.answers_lost(), pytest.raises(UnreachableError):
            await a.log.append(a.history, given_up)
        await asyncio.sleep(5)
        # Whoever comes next meets it, and nobody puts another there.
        b = Writer(place, "b")
        b.history.extend(a.history.entries)
        assert not await b.claim()
        assert b.history.entries[1] == given_up
        assert await b.claim()
        assert not await a.commit(20, "instead")
        assert a.history.entries == b.history.entries[:2]
        assert await place.log("c").read() == b.history.entries

    on(act)


def test_a_writer_that_dies_in_between_leaves_the_log_sound(on: Scene) -> None:
    async def act(place: Place) -> None:
        a, b = Writer(place, "a"), Writer(place, "b")
        await a.claim()
        for wait_s in (0.0, 0.0015, 0.0025, 0.0035, 0.0045, 0.006):
            dying = asyncio.ensure_future(a.commit(a.history.next_slot * 10, f"{wait_s}"))
            await asyncio.sleep(wait_s)
            dying.cancel()
            await asyncio.gather(dying, return_exceptions=True)
            await a.log.close()
            await asyncio.sleep(1)
            await b.catch_up()
            while not await b.claim():
                pass
            a = Writer(place, "a")
            await a.catch_up()
            assert a.history.entries == b.history.entries
            while not await a.claim():
                pass
        await b.catch_up()
        assert steps_of(b.history) == sorted(set(steps_of(b.history)))

    on(act)


def test_a_gap_is_refused(on: Scene) -> None:
    async def act(place: Place) -> None:
        a = Writer(place, "a")
        ahead = given.claimed(A, place.manifest, commits=1)
        entry = new_commit(ahead, A, 40, given.states())
        with pytest.raises(P2PNetError, match=r"empty|cannot be read|is not decided"):
            await a.log.append(ahead, entry)
        assert await a.log.read() == []

    on(act)


def test_what_could_not_count_is_not_even_tried(on: Scene) -> None:
    async def act(place: Place) -> None:
        a, b = Writer(place, "a"), Writer(place, "b")
        await a.claim()
        await b.catch_up()
        with pytest.raises(ForgedError, match="holds the claim"):
            await b.commit(20)
        with pytest.raises(ForgedError, match="only a network's first"):
            await b.claim(genesis=given.GENESIS)
        assert await b.log.read() == a.history.entries

    on(act)


def test_an_old_orchestrator_is_told_of_the_newer_claim(on: Scene) -> None:
    async def act(place: Place) -> None:
        a, b = Writer(place, "a"), Writer(place, "b")
        await a.claim()
        await b.catch_up()
        await b.claim()
        assert not await a.commit(20)  # it meets the claim in that slot
        assert (a.history.epoch, a.history.orchestrator) == (2, B.peer_id)
        with pytest.raises(ForgedError, match="holds the claim"):
            await a.commit(20)
        assert await b.commit(20)
        assert steps_of(b.history) == [20]

    on(act)


def test_a_slot_is_confirmed_for_that_entry_and_for_no_other(on: Scene) -> None:
    async def act(place: Place) -> None:
        a, b = Writer(place, "a"), Writer(place, "b")
        await a.claim()
        fake = given.claim(a.history, B, place.manifest, reason="fake")
        history = await b.log.confirm(a.history.entries[0])
        assert history.placement == {"fc1": A.peer_id}
        with pytest.raises(UnreachableError, match="not decided"):
            await b.log.confirm(fake)
        await a.commit(20)
        with pytest.raises(ForgedError, match="another entry"):
            await b.log.confirm(fake)
        assert (await b.log.confirm(a.history.entries[1])).commit is not None

    on(act)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damage_is_said_aloud(on: Scene, how: str) -> None:
    async def act(place: Place) -> None:
        a = Writer(place, "a")
        await a.claim()
        for step in (20, 40):
            await a.commit(step)
        await asyncio.sleep(1)
        place.damage(2, how)
        if isinstance(place, OnPeers):  # a keeper looks when it starts, and then serves nothing
            with pytest.raises(LocalError, match="damaged"):
                place.swarm["a"].restart()
        else:
            with pytest.raises(UnreachableError, match="the log is damaged"):
                await place.log("b").read()

    on(act)


def test_after_the_owners_closing_nothing_is_taken(on: Scene) -> None:
    async def act(place: Place) -> None:
        a, b = Writer(place, "a"), Writer(place, "b")
        await a.claim()
        await b.catch_up()
        word = new_cancellation(given.OWNER, place.network, "it is trained", 5)
        assert await b.append(new_closing(b.history, b.key, word))
        assert not await a.commit(20)
        assert a.history.closing is not None
        for writer in (a, b):
            with pytest.raises(ForgedError, match="has closed it"):
                await writer.claim()
        fresh = Writer(place, "c")
        await fresh.catch_up()
        assert fresh.history.closing == a.history.closing

    on(act)


@IN_A_STORE
def test_a_store_takes_one_of_many_claims_at_the_same_time(on: Scene) -> None:
    """In threads, which truly run at once, as the processes do that share a store."""

    async def act(place: Place) -> None:
        log = place.log("a")
        store = log._store  # type: ignore[attr-defined]
        empty = History(place.network)
        claims = [given.claim(empty, given.key(n), place.manifest) for n in range(1, 13)]
        with ThreadPoolExecutor(6) as pool:
            winners = list(pool.map(lambda claim: store.append(claim, 1), claims))
        assert winners.count(winners[0]) == 12
        assert winners[0] in claims
        assert await log.read() == [winners[0]]

    on(act)


@ON_PEERS
def test_keepers_are_replaced_through_the_log_one_by_one(on: Scene) -> None:
    async def act(place: Place) -> None:
        swarm, a = place.swarm, Writer(place, "a")
        await a.claim()
        for step, keepers in ((20, "abd"), (40, "ade"), (60, "ade")):
            assert await a.commit(step, keepers=swarm.ids(keepers))
            await asyncio.sleep(1)
            for gone in "bc":
                if gone not in keepers:
                    swarm[gone].dead = True
        # Of the manifest's keepers one is left; a stranger who knows newer ones reads it all.
        log = open_log(  # type: ignore[arg-type]
            swarm["e"], place.network, place.manifest, keepers=swarm.ids("de")
        )
        assert await log.read() == a.history.entries
        for back in "bc":  # with what they had
            swarm[back].dead = False
            swarm[back].restart()
        b = Writer(place, "b")
        await b.catch_up()
        assert b.history.entries == a.history.entries
        assert await b.claim()

    on(act)


@ON_PEERS
def test_a_minority_of_keepers_neither_hides_the_log_nor_speaks_for_it(on: Scene) -> None:
    async def act(place: Place) -> None:
        swarm, a = place.swarm, Writer(place, "a")
        await a.claim()
        await a.commit(20)
        await asyncio.sleep(1)
        spoken = Writer(place, "b")
        await spoken.catch_up()
        await spoken.claim()
        await asyncio.sleep(1)
        assert [len(await place.log(name).read()) for name in "abcde"] == [3] * 5
        swarm["a"].dead = True
        assert len(await place.log("d").read()) == 3
        swarm["b"].dead = True
        with pytest.raises(UnreachableError, match="1 of 3 keepers answer, and it takes 2"):
            await place.log("d").read()
        with pytest.raises((UnreachableError, RemoteError)):
            await spoken.commit(40)

    on(act)


def test_a_store_that_cannot_be_used_is_said_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with KeeperSwarm(tmp_path / "nodes", "a") as swarm:
            (tmp_path / "file").write_text("in the way")
            nowhere = given.manifest(anybody=True, url=f"file://{tmp_path}/file")
            log = open_log(swarm["a"], given.network_of(nowhere), nowhere)  # type: ignore[arg-type]
            with pytest.raises(UnreachableError, match="cannot read the log at"):
                await log.read()
            neither = given.manifest(anybody=True, url="")
            with pytest.raises(RemoteError, match="neither keepers nor a store"):
                open_log(swarm["a"], given.network_of(neither), neither)  # type: ignore[arg-type]

    play(main())
