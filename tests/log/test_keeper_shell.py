"""A keeper's promises are on disk before they are made, and hold after a restart."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import log_helpers as given
import pytest
from virtual_time import play

from p2pnet.errors import LocalError, ResourceError
from p2pnet.log import keeper_shell, room
from p2pnet.log.history import History
from p2pnet.log.keeper_shell import KeeperService
from p2pnet.net.handlers import Caller
from p2pnet.v1 import common_pb2, log_pb2

ME, ONE, TWO = given.key(1), given.key(2), given.key(3)
OPEN = given.manifest(anybody=True, keepers=[ME.peer_id])
NETWORK = given.network_of(OPEN)


class Asked:
    """A keeper that is asked as gRPC would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._methods = KeeperService(ME, directory).services()["Keeper"]

    async def __call__(self, method: str, request: Any, by: str, reply_type: Any) -> Any:
        async def requests() -> Any:
            yield request.SerializeToString()

        async def write(reply: bytes) -> None:
            raise AssertionError("no stream")

        raw = await self._methods[method].run(requests(), Caller(by, 5.0), write)
        return reply_type.FromString(raw)

    async def prepare(self, round: int, by: Any = ONE) -> log_pb2.PrepareReply:
        request = log_pb2.PrepareRequest(
            network_id=NETWORK, slot=1, ballot=ballot(round, by), manifest=OPEN
        )
        reply: log_pb2.PrepareReply = await self(
            "Prepare", request, by.peer_id, log_pb2.PrepareReply
        )
        return reply

    async def accept(self, round: int, by: Any = ONE) -> log_pb2.AcceptReply:
        request = log_pb2.AcceptRequest(
            network_id=NETWORK, slot=1, ballot=ballot(round, by), entry=claim(by)
        )
        reply: log_pb2.AcceptReply = await self("Accept", request, by.peer_id, log_pb2.AcceptReply)
        return reply

    async def learn(self) -> None:
        entry = claim(ONE)
        proof = given.proof_of(History(NETWORK), entry, {ME.peer_id: ME})
        request = log_pb2.LearnRequest(network_id=NETWORK, entries=[entry], proofs=[proof])
        await self("Learn", request, ONE.peer_id, log_pb2.LearnReply)

    async def read(self) -> list[common_pb2.Signed]:
        request = log_pb2.ReadLogRequest(network_id=NETWORK)
        reply = await self("ReadLog", request, "anybody", log_pb2.ReadLogReply)
        return list(reply.entries)

    def again(self) -> Asked:
        """After a restart."""
        return Asked(self.directory)


def ballot(round: int, by: Any) -> log_pb2.Ballot:
    return log_pb2.Ballot(round=round, proposer=by.peer_id)


def claim(by: Any) -> common_pb2.Signed:
    entry: common_pb2.Signed = given.claim(History(NETWORK), by, OPEN)
    return entry


def test_a_promise_outlasts_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        keeper = Asked(tmp_path / "keeper")
        assert (await keeper.prepare(5)).promised
        after = keeper.again()
        refused = await after.prepare(4, TWO)
        assert not refused.promised
        assert refused.ballot.round == 5
        assert not (await after.accept(4, TWO)).accepted

    play(main())


def test_what_was_accepted_outlasts_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        keeper = Asked(tmp_path / "keeper")
        await keeper.prepare(5)
        assert (await keeper.accept(5)).accepted
        promise = await keeper.again().prepare(6, TWO)
        assert promise.promised
        assert promise.accepted.round == 5
        assert promise.entry == claim(ONE)

    play(main())


def test_what_was_decided_outlasts_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        keeper = Asked(tmp_path / "keeper")
        await keeper.learn()
        after = keeper.again()
        assert await after.read() == [claim(ONE)]
        reply = await after.prepare(9, TWO)
        assert reply.decided
        assert reply.entry == claim(ONE)
        assert os.listdir(tmp_path / "keeper" / NETWORK) == ["1"]

    play(main())


def test_it_is_on_disk_and_synced_before_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    (tmp_path / "keeper").mkdir()
    fsync, replace = os.fsync, os.replace

    def noted(name: str, real: Any) -> Any:
        def call(*args: Any) -> None:
            done.append(name)
            real(*args)

        return call

    monkeypatch.setattr(os, "fsync", noted("fsync", fsync))
    monkeypatch.setattr(os, "replace", noted("replace", replace))

    async def main() -> None:
        keeper = Asked(tmp_path / "keeper")
        for ask in (lambda: keeper.prepare(5), lambda: keeper.accept(5), keeper.learn):
            await ask()
        # Each time the file, its name, the name's folder; at first the folder's own name, too.
        once = ["fsync", "replace", "fsync"]
        assert done == [*once, "fsync", *once, *once]
        done.clear()
        await keeper.read()
        await keeper.prepare(9)
        assert done == []  # nothing new to keep

    play(main())


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_after_a_write_error_nothing_is_promised_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def main() -> None:
        keeper = Asked(tmp_path / "keeper")
        assert (await keeper.prepare(5)).promised
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, full)
            with pytest.raises(ResourceError, match="No space left"):
                await keeper.prepare(7)
        # The core has promised 7 and the disk may not know: whatever it answered now,
        # a restart might take back.
        for ask in (lambda: keeper.prepare(6), lambda: keeper.accept(7), keeper.learn, keeper.read):
            with pytest.raises(ResourceError, match="No space left"):
                await ask()
        after = keeper.again()
        assert (await after.prepare(8)).promised

    play(main())


def test_half_a_file_of_a_crash_is_not_taken_for_a_promise(tmp_path: Path) -> None:
    async def main() -> None:
        keeper = Asked(tmp_path / "keeper")
        await keeper.prepare(5)
        aside = tmp_path / "keeper" / NETWORK / ".1"
        aside.write_bytes(b"half")
        assert not (await keeper.again().prepare(5, TWO)).promised or ONE.peer_id < TWO.peer_id
        assert not aside.exists()

    play(main())


@pytest.mark.parametrize("damage", ["bytes", "name", "gap", "size"])
def test_damage_is_said_and_nothing_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = tmp_path / "keeper" / NETWORK

    async def main() -> None:
        keeper = Asked(tmp_path / "keeper")
        await keeper.learn()
        if damage == "bytes":
            (folder / "1").write_bytes(b"\xff\xff")
        elif damage == "name":
            (folder / "1").rename(folder / "one")
        elif damage == "gap":
            (folder / "1").rename(folder / "2")
        else:
            monkeypatch.setattr(keeper_shell, "_FILE_BYTES_MAX", 10)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(LocalError, match=r"damaged|does not belong"):
            keeper.again()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    play(main())


def test_a_new_keeper_has_kept_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        keeper = Asked(tmp_path / "not yet")
        assert await keeper.read() == []
        assert not (tmp_path / "not yet").exists()

    play(main())


def test_what_has_to_go_goes_and_what_it_leaves_is_on_disk_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One promise goes for another; after a crash in between both are still there."""
    monkeypatch.setattr(room, "NETWORKS_MAX", 1)
    other = given.manifest(anybody=True, keepers=[ME.peer_id], nonce=b"2")
    request = log_pb2.PrepareRequest(
        network_id=given.network_of(other), slot=1, ballot=ballot(1, ONE), manifest=other
    )
    unlink = Path.unlink

    def crash(path: Path, *args: Any, **more: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def main() -> None:
        keeper = Asked(tmp_path / "keeper")
        assert (await keeper.prepare(5, TWO)).promised
        monkeypatch.setattr(Path, "unlink", crash)
        with pytest.raises(ResourceError):
            await keeper("Prepare", request, ONE.peer_id, log_pb2.PrepareReply)
        monkeypatch.setattr(Path, "unlink", unlink)
        assert sorted(os.listdir(tmp_path / "keeper")) == sorted([NETWORK, "floor"])
        keeper = keeper.again()
        assert not (await keeper.prepare(5, TWO)).promised
        request.ballot.round = 6
        reply = await keeper("Prepare", request, ONE.peer_id, log_pb2.PrepareReply)
        assert reply.promised
        assert sorted(os.listdir(tmp_path / "keeper")) == sorted([request.network_id, "floor"])
        after = keeper.again()
        assert not (await after.prepare(5, TWO)).promised  # it was promised once, and stays so
        assert (await after.prepare(7, TWO)).promised

    play(main())
