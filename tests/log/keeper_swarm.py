"""A swarm of nothing but keepers, in virtual time: enough for a log on peers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message
from memory_wire import Endpoint, Letter, MemoryDialer, Wire, contact_of, keypair_of

from p2pnet.errors import UnreachableError
from p2pnet.keys import KeyPair
from p2pnet.log.keeper_shell import KeeperService
from p2pnet.swarm import MemberView
from p2pnet.v1 import common_pb2, records_pb2

M = TypeVar("M", bound=Message)


class KeeperNode(Endpoint):
    """One node; as much of `p2pnet.swarm.Swarm` as a log needs."""

    def __init__(self, world: KeeperSwarm, name: str) -> None:
        super().__init__()
        self._world = world
        self._dialer = MemoryDialer(world, keypair_of(name).peer_id)
        self._directory = world.directory / name
        self.keypair: KeyPair = keypair_of(name)
        self.peer_id = self.keypair.peer_id
        self.restart()

    def restart(self) -> None:
        """(Again) from what is on disk."""
        for task in list(self.tasks):
            task.cancel()
        keeper = KeeperService(self.keypair, self._directory)
        self.methods = {f"Keeper/{name}": m for name, m in keeper.services()["Keeper"].items()}

    def now(self) -> float:
        return self._world.loop.time()

    async def call(
        self, peer_id: str, method: str, request: Message, reply_type: type[M], *, timeout_s: float
    ) -> M:
        return await self._dialer.call(
            contact_of(peer_id), method, request, reply_type, timeout_s=timeout_s
        )

    # Of no use to a log

    def advert(self) -> common_pb2.Signed | None:
        return None

    async def introduce(self, peer_id: str, advert: common_pb2.Signed) -> None:
        raise AssertionError

    def members(self) -> Sequence[MemberView]:
        raise AssertionError

    async def put_blob(self, *args: Any, **more: Any) -> None:
        raise AssertionError

    async def get_blob(self, *args: Any, **more: Any) -> bytes:
        raise AssertionError

    async def find_allocations(self, *args: Any, **more: Any) -> Sequence[records_pb2.Allocation]:
        raise AssertionError

    async def keep_record(self, key: bytes, make: Callable[[], common_pb2.Signed]) -> int:
        raise AssertionError

    async def drop_record(self, key: bytes) -> None:
        raise AssertionError

    async def provide(self, key: bytes) -> None:
        raise AssertionError

    def emit(self, event: str, **fields: Any) -> None:
        pass


class KeeperSwarm(Wire):
    """Nodes by name; made inside a running loop, for `async with`."""

    def __init__(self, directory: Path, names: str) -> None:
        super().__init__()
        self.directory = directory
        made = [KeeperNode(self, name) for name in names]
        self._by_name = dict(zip(names, made, strict=True))
        self._nodes = {node.peer_id: node for node in made}

    @property
    def nodes(self) -> Mapping[str, KeeperNode]:
        return self._nodes

    def __getitem__(self, name: str) -> KeeperNode:
        return self._by_name[name]

    def ids(self, names: str) -> list[str]:
        """Their peer ids, sorted."""
        return sorted(self[name].peer_id for name in names)

    def is_seen(self, peer_id: str) -> bool:
        return not self._nodes[peer_id].dead

    def lose(self, method: str, source: str = "") -> Callable[[], None]:
        """From now on the answers to a method are lost; call what is returned to end it."""

        def hook(letter: Letter) -> None:
            if letter.method == method and source in ("", letter.source):
                raise UnreachableError("lost")

        self.after.append(hook)
        return lambda: self.after.remove(hook)

    async def __aenter__(self) -> KeeperSwarm:
        return self

    async def __aexit__(self, *error: object) -> None:
        for node in self._nodes.values():
            for task in list(node.tasks):
                task.cancel()
        await asyncio.gather(*list(self._strays), return_exceptions=True)
        if self.crashes:
            raise self.crashes[0]
