"""A shell: a network's log in a store that all can reach, a directory or an object store."""

from __future__ import annotations

import asyncio
from typing import Protocol

from p2pnet.errors import ForgedError, LocalError, UnreachableError
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import History, check_entry
from p2pnet.log.shell import Log
from p2pnet.v1 import common_pb2

_AT_ONCE = 32


class Store(Protocol):
    """Entries by slot, each written once. Methods block."""

    def append(self, signed: common_pb2.Signed, slot: int) -> common_pb2.Signed:
        """Puts an entry into its slot unless there is one; returns what is there."""
        ...

    def read(self, network_id: str, from_slot: int = 1) -> list[common_pb2.Signed]:
        """The entries from a slot on, in order."""
        ...

    def networks(self) -> list[str]:
        """The networks that have a log here, by id, in order."""
        ...


def open_store(state_url: str) -> Store:
    """The logs below a state URL; raises UsageError where this node cannot use it."""
    # Here, because an object store's client is not for all.
    if state_url.startswith("s3://"):
        from p2pnet.data.objects import open_bucket
        from p2pnet.log.objects import ObjectLog

        return ObjectLog(open_bucket(state_url))
    from p2pnet.data.blobs import path_of
    from p2pnet.log.directory import DirectoryLog

    return DirectoryLog(path_of(state_url) / "log")


class LogInStore(Log):
    """The log in a store: what stands there is decided; a void entry stands there too."""

    def __init__(self, store: Store, network_id: str) -> None:
        self._store = store
        self._known = History(network_id)
        self._one_at_a_time = asyncio.Lock()

    async def append(self, history: History, entry: common_pb2.Signed) -> common_pb2.Signed:
        """See `Log`."""
        slot = int(check_entry(entry, history).slot)
        return await asyncio.to_thread(self._append, entry, slot)

    def _append(self, entry: common_pb2.Signed, slot: int) -> common_pb2.Signed:
        try:
            return self._store.append(entry, slot)
        except LocalError as error:  # the store does not answer, or holds no entry there
            raise UnreachableError(str(error)) from error

    async def history(self) -> History:
        """See `Log`."""
        async with self._one_at_a_time:
            await self._sync()
            return self._known

    async def confirm(self, entry: common_pb2.Signed) -> History:
        """See `Log`."""
        slot = parse_entry(entry).slot
        async with self._one_at_a_time:
            if self._known.entry(slot) is None:
                await self._sync()
            known = self._known.entry(slot)
            if known is None:
                raise UnreachableError(f"slot {slot} of the log is not decided")
            if known.payload != entry.payload:
                raise ForgedError(f"slot {slot} of the log holds another entry")
            return self._known

    async def _sync(self) -> None:
        known = self._known
        try:
            entries = await asyncio.to_thread(self._store.read, known.network_id, known.next_slot)
        except LocalError as error:
            raise UnreachableError(str(error)) from error
        for first in range(0, len(entries), _AT_ONCE):
            known.extend(entries[first : first + _AT_ONCE])
            await asyncio.sleep(0)  # each costs a signature: others may go on meanwhile

    @property
    def size_bytes(self) -> int:
        """See `Log`."""
        return self._known.size_bytes

    async def close(self) -> None:
        """See `Log`."""
