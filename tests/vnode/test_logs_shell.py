"""Which logs a host keeps open, and for how long."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from claims import Log as Decided
from small_network import small_graph
from virtual_time import play

from p2pnet.errors import UnreachableError
from p2pnet.v1 import common_pb2
from p2pnet.vnode import logs_shell
from p2pnet.vnode.logs_shell import READ_TIMEOUT_S, Logs
from p2pnet.vnode.tenancy_events import ReadLog

MANIFEST = Decided(small_graph()).manifest
IDS = [digit * 32 for digit in "0123456789"]


class Fake:
    """A log that gets on by 10 bytes a read, unless it is told otherwise."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.step_bytes = 10
        self.fails = False
        self.takes_s = 0.0
        self.closed = False

    async def read(self, from_slot: int) -> list[common_pb2.Signed]:
        assert not self.closed
        self.size_bytes += self.step_bytes
        await asyncio.sleep(self.takes_s)
        if self.fails:
            raise UnreachableError("no majority")
        return []

    async def close(self) -> None:
        assert not self.closed
        self.closed = True


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[tuple[str, Fake]] = []
        monkeypatch.setattr(logs_shell, "open_log", self._open)
        self.logs = Logs(None)  # type: ignore[arg-type]

    def _open(self, swarm: Any, network_id: str, manifest: Any, *, keepers: Any) -> Fake:
        self.opened.append((network_id, Fake()))
        return self.opened[-1][1]

    async def read(self, network_id: str) -> None:
        assert list(await self.logs.read(ReadLog(network_id, MANIFEST, 1, ()))) == []

    def living(self) -> list[str]:
        return [network_id for network_id, log in self.opened if not log.closed]


def test_a_log_stays_open_and_the_least_recently_read_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs_shell, "LOGS_MAX", 3)
    scene = Scene(monkeypatch)

    async def main() -> None:
        for network_id in (*IDS[:3], IDS[0], IDS[3]):
            await scene.read(network_id)
            await scene.logs.tidy(lambda network_id: True)
        assert [network_id for network_id, _ in scene.opened] == IDS[:4], "each once"
        assert scene.living() == [IDS[0], IDS[2], IDS[3]]
        await scene.logs.tidy(lambda network_id: network_id != IDS[2])
        assert scene.living() == [IDS[0], IDS[3]], "one that is no longer known goes"
        await scene.logs.close()
        assert scene.living() == []

    play(main())


def test_what_all_of_them_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_shell, "BYTES_MAX", 25)
    scene = Scene(monkeypatch)

    async def main() -> None:
        for network_id in IDS[:3]:
            await scene.read(network_id)
            await scene.logs.tidy(lambda network_id: True)
        assert scene.living() == IDS[1:3]
        await scene.read(IDS[2])
        await scene.logs.tidy(lambda network_id: True)
        assert scene.living() == [IDS[2]]

    play(main())


def test_a_read_that_fails_is_gone_on_with_if_it_got_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch)

    async def main() -> None:
        await scene.read(IDS[0])
        log = scene.opened[0][1]
        log.fails = True
        with pytest.raises(UnreachableError, match="no majority"):
            await scene.read(IDS[0])
        assert scene.living() == [IDS[0]]
        log.step_bytes = 0
        with pytest.raises(UnreachableError, match="no majority"):
            await scene.read(IDS[0])
        assert scene.living() == []
        await scene.read(IDS[0])  # opened anew: it may hear of other keepers
        assert len(scene.opened) == 2

    play(main())


def test_a_read_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)

    async def main() -> None:
        await scene.read(IDS[0])
        scene.opened[0][1].takes_s = 2 * READ_TIMEOUT_S
        began = asyncio.get_running_loop().time()
        with pytest.raises(UnreachableError, match="reading it goes on"):
            await scene.read(IDS[0])
        assert asyncio.get_running_loop().time() - began == READ_TIMEOUT_S
        assert scene.living() == [IDS[0]]

    play(main())
