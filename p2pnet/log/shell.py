"""A shell: a network's log, wherever it is kept (DESIGN D6)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from p2pnet.errors import MalformedError
from p2pnet.log.history import History, open_charter
from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2


class Log(ABC):
    """The log of one network. Lives on the gRPC thread."""

    @abstractmethod
    async def append(self, history: History, entry: common_pb2.Signed) -> common_pb2.Signed:
        """Gets an entry into the next slot of `history`; returns what is decided for that slot.

        That is `entry`, or another's, or an older one of ours that we had given up.
        `history` must not change meanwhile.

        Raises:
            MalformedError, ForgedError: the entry could not count.
            UnreachableError: no majority, or no store. It may be decided all the same.
        """

    async def read(self, from_slot: int = 1) -> list[common_pb2.Signed]:
        """The decided entries from a slot on, in order, each checked. Raises as `history`."""
        return (await self.history()).entries[max(1, from_slot) - 1 :]

    @abstractmethod
    async def history(self) -> History:
        """All that is decided, each entry checked once; not to be changed, it grows.

        An entry that is being decided now may be missing.

        Raises:
            UnreachableError: no majority, or no store.
            ForgedError, MalformedError: what is in the store is not this network's log.
        """

    @abstractmethod
    async def confirm(self, entry: common_pb2.Signed) -> History:
        """That this entry is decided for its slot; returns the history, at least up to it.

        It costs no call for a slot that has been read before. The history is not to be
        changed; it grows with the next call.

        Raises:
            ForgedError: the slot holds another entry.
            UnreachableError: it is not decided, as far as can be found out.
            MalformedError: no entry at all.
        """

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Of the entries that are known: they are kept in memory for the next call."""

    @abstractmethod
    async def close(self) -> None:
        """Ends what is under way."""


def open_log(
    swarm: Swarm,
    network_id: str,
    manifest: common_pb2.Signed,
    *,
    keepers: Sequence[str] = (),
) -> Log:
    """The log of a network, where its manifest says: on peers, in a directory or on S3.

    `keepers`: the newest known, for a log on peers; its first ones are in the manifest.

    Raises:
        MalformedError, ForgedError: the manifest is not that network's, or names no place.
        UsageError: its store cannot be used by this node, and why.
    """
    # Here, because what they make is a Log.
    from p2pnet.log.peers_shell import LogOnPeers
    from p2pnet.log.store_shell import LogInStore, open_store

    charter = open_charter(network_id, manifest)
    if charter.keepers:
        return LogOnPeers(swarm, network_id, charter.keepers, keepers)
    if not charter.state_url:
        raise MalformedError("a manifest names neither keepers nor a store for the log")
    return LogInStore(open_store(charter.state_url), network_id)
