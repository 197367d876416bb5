"""A shell: the logs that a host reads, each from where its last read stopped.

A log on peers has to be read from its first slot, and that of a network which has
trained for days has thousands. So what was read is kept for the next read, also
of one that was broken off, within limits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from p2pnet.errors import P2PNetError, UnreachableError
from p2pnet.log.entry import parse_entry
from p2pnet.log.shell import Log, open_log
from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2
from p2pnet.vnode.tenancy_events import ReadLog

logger = logging.getLogger(__name__)

LOGS_MAX = 32  # open, besides those that are being read
BYTES_MAX = 256 << 20  # of their entries
READ_TIMEOUT_S = 60.0


class Logs:
    """Lives on the gRPC thread; whoever reads sees to it that each log is read once at a time."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._idle: dict[str, Log] = {}  # by network id; the least recently read first

    async def close(self) -> None:
        """Closes all that are open."""
        while self._idle:
            await self._idle.pop(next(iter(self._idle))).close()

    async def read(self, wanted: ReadLog) -> Sequence[common_pb2.Signed]:
        """What a log has from that slot on.

        Raises:
            UnreachableError: it cannot be read, or not in time; the next read goes on from
                where this one got.
            ForgedError, MalformedError, UsageError: see `open_log` and `Log.read`.
        """
        log = self._idle.pop(wanted.network_id, None) or open_log(
            self._swarm, wanted.network_id, wanted.manifest, keepers=wanted.keepers
        )
        before = log.size_bytes
        is_of_use = False
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                entries = await _read(log, wanted)
            is_of_use = True
            return entries
        except TimeoutError:
            raise UnreachableError("it is long: reading it goes on") from None
        finally:
            if is_of_use or log.size_bytes > before:
                self._idle[wanted.network_id] = log
            else:  # opened anew, it may hear of other keepers
                await log.close()

    async def tidy(self, is_known: Callable[[str], bool]) -> None:
        """Closes those of unknown networks, and the least recently read that are too many."""
        over: list[str] = []
        room_bytes = BYTES_MAX
        for number, network_id in enumerate(reversed(self._idle), start=1):
            room_bytes -= self._idle[network_id].size_bytes
            if number > LOGS_MAX or room_bytes < 0 or not is_known(network_id):
                over.append(network_id)
        for log in [self._idle.pop(network_id) for network_id in over]:
            await log.close()


async def _read(log: Log, wanted: ReadLog) -> Sequence[common_pb2.Signed]:
    entries = await log.read(wanted.from_slot)
    last = parse_entry(entries[-1]).slot if entries else wanted.from_slot - 1
    if wanted.claim is None or last >= wanted.at_least:
        return entries
    # Its proposer tells us and the keepers at once: they may hear a little later.
    try:
        history = await log.confirm(wanted.claim)
    except P2PNetError as error:
        logger.debug("a claim is not to be found in its log: %s", error)
        return entries
    return history.entries[wanted.from_slot - 1 :]
