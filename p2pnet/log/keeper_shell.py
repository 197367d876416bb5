"""A shell: this node's part in the logs of networks, on disk before any answer leaves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from p2pnet import clock
from p2pnet.datadir import sync_folder
from p2pnet.errors import LocalError, ResourceError
from p2pnet.keys import KeyPair
from p2pnet.log.history import History
from p2pnet.log.keeper import Accept, Event, Forget, Keeper, Learn, Persist, Prepare, Read, Reply
from p2pnet.net.handlers import Caller, Method, unary
from p2pnet.v1 import log_pb2

_FILE_BYTES_MAX = 8 << 20


class KeeperService:
    """The service `Keeper`. Lives on the gRPC thread; one request at a time, as the core wants.

    Files: `<dir>/<network id>/<slot>`, each written whole and synced.
    """

    def __init__(
        self, key: KeyPair, directory: Path, emit: Callable[..., None] | None = None
    ) -> None:
        """Reads what was kept before. `emit` is told of each entry that is learned.

        Raises:
            LocalError: a file is damaged, and which; nothing is thrown away.
        """
        self._directory = directory
        self._emit = emit
        self._core = Keeper.load(key, _read_all(directory))
        self._one_at_a_time = asyncio.Lock()
        self._broken = ""

    def services(self) -> dict[str, Mapping[str, Method]]:
        """What gRPC serves."""
        return {
            "Keeper": {
                "Prepare": unary(self._prepare, log_pb2.PrepareRequest, log_pb2.PrepareReply),
                "Accept": unary(self._accept, log_pb2.AcceptRequest, log_pb2.AcceptReply),
                "Learn": unary(self._learn, log_pb2.LearnRequest, log_pb2.LearnReply),
                "ReadLog": unary(self._read, log_pb2.ReadLogRequest, log_pb2.ReadLogReply),
            }
        }

    def histories(self) -> list[History]:
        """Every log that is kept here, by network id; not to be changed."""
        return self._core.histories()

    async def _prepare(
        self, request: log_pb2.PrepareRequest, caller: Caller
    ) -> log_pb2.PrepareReply:
        reply = await self._answer(Prepare(caller.peer_id, request, clock.wall_ms()))
        assert isinstance(reply, log_pb2.PrepareReply)
        return reply

    async def _accept(self, request: log_pb2.AcceptRequest, caller: Caller) -> log_pb2.AcceptReply:
        reply = await self._answer(Accept(caller.peer_id, request, clock.wall_ms()))
        assert isinstance(reply, log_pb2.AcceptReply)
        return reply

    async def _learn(self, request: log_pb2.LearnRequest, caller: Caller) -> log_pb2.LearnReply:
        reply = await self._answer(Learn(caller.peer_id, request))
        assert isinstance(reply, log_pb2.LearnReply)
        return reply

    async def _read(self, request: log_pb2.ReadLogRequest, caller: Caller) -> log_pb2.ReadLogReply:
        reply = await self._answer(Read(request))
        assert isinstance(reply, log_pb2.ReadLogReply)
        return reply

    async def _answer(self, event: Event) -> object:
        # A caller that gives up must not let go of the lock while a thread still writes.
        return await asyncio.shield(asyncio.ensure_future(self._one_answer(event)))

    async def _one_answer(self, event: Event) -> object:
        async with self._one_at_a_time:
            if self._broken:  # the core has promised what the disk does not know
                raise ResourceError(self._broken)
            effects = self._core.handle(event, clock.now())
            kept = [effect for effect in effects if isinstance(effect, Persist | Forget)]
            if kept:
                try:
                    await asyncio.to_thread(self._write, kept)
                except OSError as error:
                    self._broken = f"this keeper cannot write: {error.strerror}"
                    raise ResourceError(self._broken) from error
            if isinstance(event, Learn) and self._emit is not None:
                for effect in kept:
                    if isinstance(effect, Persist):
                        self._emit("log_learned", network_id=effect.network_id, slot=effect.slot)
            return next(effect.message for effect in effects if isinstance(effect, Reply))

    def _write(self, kept: Sequence[Persist | Forget]) -> None:
        """In order. After a crash in between the first of them are there.

        That names appear in the order of their making is what journals of file systems
        give; were it otherwise, `_read_all` and `Keeper.load` would say that one is missing.
        """
        for number, effect in enumerate(kept):
            folder = self._directory / effect.network_id
            if isinstance(effect, Forget):
                self._forget(folder)
                continue
            new = not folder.is_dir()
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".{effect.slot}"
            with temporary.open("wb") as file:
                file.write(effect.data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / str(effect.slot))
            following = kept[number + 1] if number + 1 < len(kept) else None
            if not isinstance(following, Persist) or following.network_id != effect.network_id:
                sync_folder(folder)  # the new names, too
            if new:
                sync_folder(self._directory)

    def _forget(self, folder: Path) -> None:
        slots = [int(file.name) for file in folder.iterdir() if file.name.isdigit()]
        for slot in sorted(slots, reverse=True):
            if slot:  # in 0 is what must be remembered of it
                (folder / str(slot)).unlink()
        if 0 not in slots:
            folder.rmdir()


def _read_all(directory: Path) -> dict[tuple[str, int], bytes]:
    records: dict[tuple[str, int], bytes] = {}
    if not directory.is_dir():
        return records
    for folder in sorted(directory.iterdir()):
        for file in sorted(folder.iterdir()):
            if file.name.startswith("."):
                file.unlink()  # was being written when the node died; never answered for
            elif not file.name.isdigit() or file.stat().st_size > _FILE_BYTES_MAX:
                raise LocalError(f"{file} does not belong there: take it away")
            else:
                records[folder.name, int(file.name)] = file.read_bytes()
    return records
